//! The composition root: builds the parts, connects them, watches over them, and takes them down. It decides nothing about
//! instances or packets.
//!
//! Stopping has an order. The control plane takes no more commands; workloads finish the step in hand, which still needs the
//! network; then the network ends; then, when nobody is left to report, the control plane has said everything and ends too.

mod build;
mod checks;
mod hardware;
mod link;
mod look;
mod node;
mod remove;
mod route;
mod runtimes;
mod scrape;
mod signals;
mod tasks;
mod upgrade;
mod view;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, anyhow};
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;

use crate::api::{self, Api, RunLock};
use crate::config::{Config, OnExit};
use crate::control::ControlPlane;
use crate::drain::Drain;
use crate::events::Events;
use crate::model::{Addresses, InstanceId, NodeFacts, NodeId, NodeUsage, Report, Sent, Subnet};
use crate::netmanager::{Learned, NetError, NetManager};
use crate::notify::Notify;
use crate::runtime::Runtime;
use crate::standalone::ClusterApi;
use crate::store::{Desired, Fate, Store};
use crate::telemetry::devices::watch::Inventory;
use crate::telemetry::readings::Readings;
use crate::workload::{self, Plan, Wanted, Workload};
use link::ClusterLink;
use node::RunningNode;
use route::{Router, Sources};
use tasks::Tasks;

pub use build::run;
pub use remove::uninstall;
pub use signals::stop_on_signals;
pub use upgrade::upgrade;

/// What the whole end of a daemon may take. Shorter than the service manager's patience, so that it never has to kill.
pub const GRACE: Duration = Duration::from_secs(25);

/// The exit code of a daemon that could not carry on what the version before it did, and has left that as it was: it is to be started
/// again (EX_TEMPFAIL of sysexits.h).
pub const WENT_BACK: u8 = 75;

/// Commands that may wait to be routed.
const COMMANDS: usize = 256;
/// Notes on what became of workloads that may wait to be kept.
const NOTES: usize = 256;
/// What is left of the end for tasks that were told to stop and have not.
const LAST_MOMENT: Duration = Duration::from_secs(2);

/// Everything a node consists of, made and not yet connected.
struct Parts {
    config: Config,
    lock: RunLock,
    store: Store,
    desired: Desired,
    plan: Plan,
    facts: NodeFacts,
    runtimes: Vec<Arc<dyn Runtime>>,
    net: NetManager,
    /// Told when the last workload has finished, so that the network outlives them.
    net_drain: Drain,
    control: Box<dyn ControlPlane>,
    reports: mpsc::Sender<Report>,
    reported: mpsc::Receiver<Report>,
    /// Subnets to be kept.
    assigned: mpsc::Receiver<(NodeId, Subnet)>,
    /// What the cluster's table said, and the addresses of instances, to be kept.
    learned: mpsc::Receiver<Learned>,
    addresses: watch::Receiver<BTreeMap<InstanceId, Addresses>>,
    usage: watch::Receiver<NodeUsage>,
    devices: watch::Receiver<Inventory>,
    sent: watch::Receiver<Sent>,
    events: Events,
    pace: watch::Sender<Duration>,
    /// The cluster, where it is in this process.
    cluster: Option<Arc<dyn ClusterApi>>,
    /// Told when the node has ended, so that the cluster in this process outlives it.
    home: Option<Drain>,
    /// Those parts that run already.
    tasks: Tasks,
}

/// Is it for this reason that the daemon has ended?
pub fn went_back(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| matches!(cause.downcast_ref(), Some(NetError::WentBack(_))))
}

/// Connects the parts and runs them until the drain begins or one of them ends.
async fn operate(parts: Parts, drain: Drain) -> anyhow::Result<()> {
    let Parts {
        config, lock, store, desired, plan, facts, runtimes, net, net_drain, control, reports, reported, ..
    } = parts;
    let Parts { assigned, learned, addresses, usage, devices, sent, events, pace, cluster, home, mut tasks, .. } =
        parts;
    let notify = Notify::from_environment();
    let listener = lock.listen()?;

    let identity = store.state().identity.as_ref().filter(|identity| identity.cluster == config.cluster.host);
    let link = ClusterLink::new(identity.map(|identity| identity.node.clone()), config.cluster.generation);
    let (link, linked) = watch::channel(link);

    let (kept, keeping) = watch::channel(desired.behind().unwrap_or_default().to_owned());
    let (noting, notes) = mpsc::channel(NOTES);
    let (workload, working) = workload::start(workload::Setup {
        runtimes,
        net: net.clone(),
        reports: reports.clone(),
        events: events.clone(),
        plan,
        notes: noting,
        restarts: config.runtime.restarts,
        devices: devices.clone(),
        parse: |document| crate::wire::deploy::kept(document).ok(),
        drain: drain.clone(),
    });
    tasks.adopt("workload", working);

    let node = Arc::new(RunningNode {
        began: Instant::now(),
        started: SystemTime::now(),
        facts,
        cluster: config.cluster.host.clone(),
        standalone: cluster.is_some(),
        workload: workload.clone(),
        net: net.clone(),
        usage,
        readings: Readings::new(devices),
        sent,
        roots: config.telemetry.roots.clone(),
        link: linked,
        events: events.clone(),
        kept: keeping,
    });
    if let Some(address) = config.telemetry.metrics {
        tasks.adopt("metrics", tokio::spawn(api::metrics::serve(address, node.clone(), drain.clone())));
    }
    if let Some(url) = config.telemetry.otlp.clone() {
        let every = config.telemetry.otlp_every;
        tasks.adopt("collector", tokio::spawn(api::collector::push(node.clone(), url, every, drain.clone())));
    }
    let api = Api { node, cluster: cluster.ok_or_else(|| config.cluster.host.clone()) };
    tasks.spawn("local API", serve(listener, api, drain.clone()));

    let (commands, commanded) = mpsc::channel(COMMANDS);
    let router = Router {
        cluster: config.cluster.host.clone(),
        workload: workload.clone(),
        net,
        store,
        desired: Arc::new(Mutex::new(desired)),
        link,
        pace,
        kept,
        reports: reports.clone(),
        events,
        sources: Sources { assigned, learned, addresses, notes },
    };
    tasks.spawn("router", router.run(commanded, drain.clone()));
    tasks.spawn("control plane", control.run(commands, reported, drain.clone()));

    notify.ready(&format!("node {}, cluster {}", config.node_name, config.cluster.host));
    let ended = supervise(&mut tasks, &notify, &drain).await;
    notify.stopping();
    let deadline = drain.wait().await;
    // After a failure nothing is taken down that the next start could adopt.
    let fate = if ended.is_ok() { config.on_exit } else { OnExit::Leave };
    let finished = finish_workloads(workload, fate, deadline).await;
    net_drain.begin();
    drop(reports);
    let node = tasks.ended_except("cluster", deadline + LAST_MOMENT).await;
    if let Some(home) = home {
        home.begin();
    }
    let all = tasks.all_ended(deadline + LAST_MOMENT).await;
    ended.and(finished).and(node).and(all)
}

/// Returns when the drain has begun, or with the part that ended unasked, having begun the drain itself.
async fn supervise(tasks: &mut Tasks, notify: &Notify, drain: &Drain) -> anyhow::Result<()> {
    let mut heartbeat = tokio::time::interval(notify.heartbeat.unwrap_or(Duration::from_secs(3600)));
    heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            biased;
            _ = drain.wait() => return Ok(()),
            (name, result) = tasks.ended() => {
                drain.begin();
                let unasked = || format!("the {name} has ended unasked");
                return result.and_then(|()| Err(anyhow!("nobody told it to"))).with_context(unasked);
            }
            _ = heartbeat.tick() => notify.alive(),
        }
    }
}

async fn finish_workloads(workload: Workload, fate: OnExit, deadline: tokio::time::Instant) -> anyhow::Result<()> {
    match tokio::time::timeout_at(deadline, workload.drain(fate)).await {
        // It has ended by itself, which is known or about to be.
        Ok(_) => Ok(()),
        Err(_) => Err(anyhow!("workloads have not finished in time; the next start goes on with them")),
    }
}

/// What an earlier run was told to run. A description that cannot be read (an older format) is that of nothing: its cluster sends
/// another.
fn plan(desired: &Desired) -> Plan {
    let wanted = desired.instances().filter_map(|(instance, record)| {
        let (document, ended) = match &record.fate {
            Fate::Run(document) => (document, None),
            Fate::Ended { document, status, detail } => (document, Some((*status, detail.clone()))),
            Fate::Deleted => return None,
        };
        let spec = crate::wire::deploy::kept(document).ok().filter(|spec| spec.id == *instance)?;
        Some(Wanted { spec, sequence: record.sequence, ended })
    });
    Plan { wanted: wanted.collect(), complete: desired.complete() }
}

async fn serve(listener: api::OwnerListener, api: Api, drain: Drain) -> anyhow::Result<()> {
    api::serve(listener, api, drain).await.context("serve the local API")
}

#[cfg(test)]
mod tests;
