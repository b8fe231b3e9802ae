//! Makes the parts from the configuration.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use tokio::net::lookup_host;
use tokio::sync::{mpsc, watch};

use super::node::NoNode;
use super::runtimes::{self, Runtimes};
use super::tasks::Tasks;
use super::{GRACE, LAST_MOMENT, Parts, checks, operate, plan, remove, serve, supervise};
use crate::api::{Api, RunLock};
use crate::cli::StandaloneChoice;
use crate::config::{ClusterConfig, Config, Generation, OnExit};
use crate::control::{self, Cluster, Node};
use crate::drain::Drain;
use crate::events::Events;
use crate::model::{NodeFacts, Sent};
use crate::names::Names;
use crate::netmanager;
use crate::netmanager::table::ServiceNets;
use crate::notify::{FdStore, Notify};
use crate::standalone::{Standalone, StandaloneConfig};
use crate::store::{Desired, Store};
use crate::telemetry;

/// Reports that may wait for the control plane, which takes them whether or not there is a connection.
const REPORTS: usize = 1024;
/// Subnets that may wait to be kept.
const SUBNETS: usize = 4;
/// Answers of the cluster's table that may wait to be kept.
const LEARNED: usize = 1024;
/// So long the start waits to hear where the cluster is.
const LOOK_UP: Duration = Duration::from_secs(1);

/// Runs a node, a cluster, or both in one process, until the drain begins or a part ends.
///
/// # Errors
/// If something is missing that a node needs, before anything is touched; or with what ended a part.
pub async fn run(config: Config, standalone: Option<StandaloneChoice>, drain: Drain) -> anyhow::Result<()> {
    let version = env!("CARGO_PKG_VERSION");
    match standalone {
        Some(choice) if !choice.node => {
            tracing::info!("node-engine {version}: a cluster without a node");
            cluster_alone(config, choice, drain).await
        }
        Some(choice) => {
            checks::node()?;
            let mut config = config;
            config.cluster = at_home(&choice);
            greet(&config, "its own");
            let lock = RunLock::take(&config.run_dir)?;
            // It ends after the node, which has reports for it to the last.
            let home = Drain::new(GRACE);
            let cluster = start_cluster(&config, &choice, home.clone()).await?;
            node(config, lock, Some((cluster, home)), drain).await
        }
        None => {
            checks::node()?;
            let generation = match config.cluster.generation {
                Some(generation) => format!("{generation:?}"),
                None => "generation to be found out".into(),
            };
            greet(&config, &generation);
            let lock = RunLock::take(&config.run_dir)?;
            node(config, lock, None, drain).await
        }
    }
}

/// The first line of every log.
fn greet(config: &Config, kind: &str) {
    let (version, name, cluster) = (env!("CARGO_PKG_VERSION"), &config.node_name, &config.cluster.host);
    tracing::info!("node-engine {version}: node {name}, cluster {cluster} ({kind})");
}

/// A cluster in this process is found like any other.
fn at_home(choice: &StandaloneChoice) -> ClusterConfig {
    let listen = choice.listen;
    let host = match listen {
        IpAddr::V4(_) if listen.is_unspecified() => "127.0.0.1".into(),
        IpAddr::V6(_) if listen.is_unspecified() => "::1".into(),
        other => other.to_string(),
    };
    let port = Some(choice.http_port);
    ClusterConfig { host, port, tls: false, generation: Some(Generation::G4), mqtt_tls: None }
}

async fn node(
    config: Config,
    lock: RunLock,
    standalone: Option<(Standalone, Drain)>,
    drain: Drain,
) -> anyhow::Result<()> {
    let (store, aside) = Store::open(&config.state_dir)?;
    if let Some(aside) = aside {
        tracing::warn!(kept = %aside.display(), "the state of the last run is damaged: asking the cluster for everything anew");
    }
    let state_dir = config.state_dir.clone();
    let desired =
        tokio::task::spawn_blocking(move || Desired::open(&state_dir)).await.context("open the desired state")?;
    let mut tasks = Tasks::default();
    let (reports, reported) = mpsc::channel(REPORTS);
    let (subnets, assigned) = mpsc::channel(SUBNETS);
    let (learns, learned) = mpsc::channel(LEARNED);
    let (leased, addresses) = watch::channel(desired.addresses());
    let net_drain = Drain::new(GRACE);

    // Nothing has been made so far; from here on the network is.
    let (resolvers, resolving) = watch::channel(None);
    let made = runtimes::make(&config, resolving)?;
    let network = netmanager::start(netmanager::Setup {
        config: config.network.clone(),
        cluster: address_of(&config.cluster).await,
        run_dir: config.run_dir.clone(),
        subnet: store.assigned_in(&config.cluster.host),
        memory: netmanager::Memory { addresses: desired.addresses(), services: desired.services() },
        reports: reports.clone(),
        subnets,
        learns,
        leased,
        kept: Arc::new(FdStore::from_environment()),
        drain: net_drain.clone(),
    });
    // An engine that does not answer keeps nobody's packets waiting.
    let (Runtimes { held: runtimes, announced, drivers }, network) =
        tokio::join!(runtimes::try_out(made, &config), network);
    let (net, network) = network?;
    tasks.adopt("network manager", network);
    let names = Names {
        directory: Arc::new(net.clone()),
        nets: ServiceNets { v4: config.network.service_v4, v6: config.network.service_v6 },
        bridge: config.network.bridge.clone(),
        gateway: net.gateway(),
        resolvers,
    };
    tasks.spawn("resolver", names.run(drain.clone()));

    let facts = NodeFacts {
        announced_port: Some(config.announced_port),
        volume_drivers: drivers.into_iter().map(|(name, socket)| (name, socket.display().to_string())).collect(),
        ..telemetry::facts(&config.node_name, announced)
    };
    let (pace, paced) = watch::channel(telemetry::pace(config.cluster.generation));
    let events = Events::default();
    let telemetry = telemetry::start(telemetry::Setup {
        config: config.telemetry.clone(),
        reports: reports.clone(),
        pace: paced,
        events: events.clone(),
        drain: drain.clone(),
    })
    .await?;
    for (name, task) in telemetry.tasks {
        tasks.adopt(name, task);
    }
    let usage = telemetry.usage;

    // Towards a cluster elsewhere the way there decides, anew at each registration; the way to one in this process leads nowhere.
    let fixed = standalone.is_some() || config.network.uplink.is_some() || config.network.public_ip.is_some();
    let overlay = net.status().await?;
    let address = overlay.address.filter(|_| fixed);
    let plan = plan(&desired);
    let told = Node {
        facts: facts.clone(),
        usage: usage.borrow().clone(),
        address,
        overlay_address: overlay.address,
        tunnel_port: config.network.tunnel_port,
        jobs: plan.wanted.iter().map(|wanted| (wanted.spec.id.clone(), wanted.spec.job.clone())).collect(),
        announced: overlay.leases.into_iter().map(|lease| lease.instance).collect(),
    };
    let (sending, sent) = watch::channel(Sent::default());
    let control = Box::new(Cluster::new(config.cluster.clone(), told).telling(config.telemetry.reports, sending));

    let (cluster, home) = match standalone {
        Some((standalone, home)) => {
            tasks.adopt("cluster", standalone.task);
            (Some(standalone.cluster), Some(home))
        }
        None => (None, None),
    };
    let parts = Parts {
        config: config.clone(),
        lock,
        store,
        desired,
        plan,
        facts,
        runtimes,
        net,
        net_drain,
        control,
        reports,
        reported,
        assigned,
        learned,
        addresses,
        usage,
        devices: telemetry.devices,
        sent,
        events,
        pace,
        cluster,
        home,
        tasks,
    };
    let ended = operate(parts, drain).await;
    if ended.is_ok() && config.on_exit == OnExit::Stop {
        let mut left = Vec::new();
        remove::network(&config, &mut left).await;
        for error in left {
            tracing::warn!(error, "a part of the network is left behind");
        }
    }
    ended
}

/// Only a hint to which interface leads to the peers: a name that cannot be looked up now is no reason not to start. Of several
/// addresses the one that the registration takes, too: what peers hear of this node and what it thinks itself have to be the same.
async fn address_of(cluster: &ClusterConfig) -> Option<IpAddr> {
    match tokio::time::timeout(LOOK_UP, lookup_host((cluster.host.as_str(), 0))).await {
        Ok(Ok(addresses)) => control::preferred(addresses.map(|address| address.ip()).collect()).await,
        Ok(Err(error)) => {
            tracing::warn!(host = cluster.host, %error, "the cluster's address is not known yet");
            None
        }
        Err(_) => {
            tracing::warn!(host = cluster.host, "nobody tells the cluster's address, going on without it");
            None
        }
    }
}

async fn cluster_alone(config: Config, choice: StandaloneChoice, drain: Drain) -> anyhow::Result<()> {
    let lock = RunLock::take(&config.run_dir)?;
    let notify = Notify::from_environment();
    let cluster = start_cluster(&config, &choice, drain.clone()).await?;
    let mut tasks = Tasks::default();
    tasks.adopt("cluster", cluster.task);
    let api = Api {
        node: Arc::new(NoNode { began: Instant::now(), name: config.node_name.clone() }),
        cluster: Ok(cluster.cluster),
    };
    tasks.spawn("local API", serve(lock.listen()?, api, drain.clone()));
    notify.ready("a cluster without a node");
    let ended = supervise(&mut tasks, &notify, &drain).await;
    notify.stopping();
    let deadline = drain.wait().await;
    ended.and(tasks.all_ended(deadline + LAST_MOMENT).await)
}

async fn start_cluster(config: &Config, choice: &StandaloneChoice, drain: Drain) -> anyhow::Result<Standalone> {
    let settings = StandaloneConfig {
        listen: choice.listen,
        http_port: choice.http_port,
        socketio_port: choice.socketio_port,
        broker_port: choice.broker_port,
        broker: choice.broker.clone(),
        first_generation: choice.first_generation,
        ..StandaloneConfig::new(config.state_dir.join("cluster"))
    };
    Standalone::start(settings, drain).await.context("start the cluster")
}
