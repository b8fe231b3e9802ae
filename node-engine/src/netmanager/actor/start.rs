//! How the actor begins: the uplink, the datapath, and what an earlier run left.

use std::collections::{BTreeMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use netmanager_common::framed_port;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use super::{Actor, OVERHEAD_V4, OVERHEAD_V6, SMALLEST_MTU, Wish, known_veths, step, way};
use crate::backoff::Complaints;
use crate::netmanager::core::{Core, Remains, Settings};
use crate::netmanager::datapath::{self, Datapath, DatapathError, Underlay};
use crate::netmanager::framing;
use crate::netmanager::hello::Secret;
use crate::netmanager::lease::Leases;
use crate::netmanager::link::{LinkError, Links, Route};
use crate::netmanager::naming::{Gateway, Naming};
use crate::netmanager::outbox::Outbox;
use crate::netmanager::table::ServiceNets;
use crate::netmanager::{Memory, NetError, Request, Setup, TUN_V4, TUN_V6, link_config, pin_dir};

pub(in crate::netmanager) async fn start(
    mut setup: Setup,
    inbox: mpsc::Receiver<Request>,
    gateway: watch::Sender<Option<Gateway>>,
) -> Result<JoinHandle<anyhow::Result<()>>, NetError> {
    let config = &setup.config;
    std::fs::create_dir_all(&setup.run_dir).map_err(|error| step("make the run directory", &error))?;
    // The size of our links follows from the uplink, and only netlink knows that one.
    let finder = open_links(&setup, SMALLEST_MTU).await?;
    let wish = Wish { uplink: config.uplink.clone(), cluster: setup.cluster };
    let uplink = find_uplink(&finder, &wish).await.map_err(|error| NetError::NoUplink(error.to_string()))?;
    drop(finder);
    let overhead = if uplink.source.is_ipv4() { OVERHEAD_V4 } else { OVERHEAD_V6 };
    let mtu = uplink.mtu.saturating_sub(overhead).clamp(SMALLEST_MTU, u32::from(u16::MAX) - overhead);
    let links = Arc::new(open_links(&setup, mtu).await?);
    let underlay = Underlay {
        uplink: uplink.interface.clone(),
        uplink_ifindex: uplink.ifindex,
        address: uplink.source,
        tunnel_port: config.tunnel_port,
        tun_name: config.tun.clone(),
        tun_v4: TUN_V4,
        tun_v6: TUN_V6,
        mtu,
        service_v4: config.service_v4,
        service_v6: config.service_v6,
        capacity: config.instances,
        pin_dir: pin_dir(config),
        xdp: config.xdp,
        table_dir: setup.run_dir.join("tables"),
    };
    let chosen =
        datapath::choose(config.datapath, &underlay, Arc::clone(&setup.kept)).await.map_err(|error| match error {
            DatapathError::WentBack(_) => NetError::WentBack(error.to_string()),
            _ => NetError::NoDatapath(error.to_string()),
        })?;
    let lease_file = setup.run_dir.join("leases");
    let memory = std::mem::take(&mut setup.memory);
    let remains = remains(&lease_file, &links, chosen.datapath.as_ref(), memory).await?;
    links.adopt(&known_veths(&remains));
    let port = framed_port(config.tunnel_port).filter(|_| config.framing);
    let framed_port = framing::begin(&links, chosen.datapath.as_ref(), port, uplink.source).await;
    // What another configuration, or another version, has read from.
    setup.kept.forget_rest();
    let settings = Settings {
        nets: ServiceNets { v4: config.service_v4, v6: config.service_v6 },
        tunnel_port: config.tunnel_port,
        relax_source: config.relax_source,
        capacity: config.instances,
        framed_port,
        mtu: u16::try_from(mtu).unwrap_or(u16::MAX),
        address: config.public_ip.unwrap_or(uplink.source),
        uplink: way(&uplink, mtu),
        subnet: setup.subnet.clone(),
        drain: config.drain,
        seed: RandomState::new().hash_one(0),
        secret: Secret([1, 2].map(|half| RandomState::new().hash_one(half))),
    };
    tracing::info!(
        datapath = chosen.datapath.standing().rung,
        reason = chosen.reason,
        uplink = uplink.interface,
        address = %settings.address,
        mtu,
        framed_port,
        "the overlay carries"
    );
    let (core, effects) = Core::new(settings, remains);
    let mut actor = Actor {
        core,
        setup,
        wish,
        links,
        datapath: chosen.datapath,
        uplink,
        framed_port,
        mtu,
        began: Instant::now(),
        outbox: Outbox::default(),
        work: JoinSet::new(),
        attaching: BTreeMap::new(),
        detaching: BTreeMap::new(),
        looking_up: BTreeMap::new(),
        naming: Naming::default(),
        bridge: None,
        gateway,
        next_waiter: 0,
        lane: VecDeque::new(),
        lane_runs: false,
        sampling: false,
        sampled: (0, 0),
        bustle: (0, false),
        sent: 0,
        counting: false,
        lease_file,
        leases: None,
        writing: false,
        unkept: Complaints::default(),
        moved: 0,
        failure: None,
    };
    actor.run_all(effects);
    Ok(tokio::spawn(actor.run(inbox)))
}

async fn open_links(setup: &Setup, mtu: u32) -> Result<Links, NetError> {
    Links::open(link_config(&setup.config, &setup.run_dir, mtu)).await.map_err(|error| step("open netlink", &error))
}

/// The configured interface, else the one that leads to the cluster, else the default route's. A cluster on this very machine leads
/// nowhere.
pub(super) async fn find_uplink(links: &Links, wish: &Wish) -> Result<Route, LinkError> {
    if let Some(name) = &wish.uplink {
        let missing = || LinkError::Kernel {
            step: "look up",
            object: name.clone(),
            reason: "there is no such interface, or it has no address".into(),
        };
        return links.route_over(name).await?.ok_or_else(missing);
    }
    if let Some(cluster) = wish.cluster
        && let Ok(route) = links.route_to(cluster).await
        && !route.source.is_loopback()
        && route.source != cluster
    {
        return Ok(route);
    }
    links.default_route().await
}

/// What an earlier run left on this host. What cannot be read is made anew.
async fn remains(
    file: &std::path::Path,
    links: &Links,
    datapath: &dyn Datapath,
    memory: Memory,
) -> Result<Remains, NetError> {
    let leases = Leases::read(file).unwrap_or_else(|error| {
        tracing::warn!(%error, "leases of an earlier run are lost, its instances are connected anew");
        Leases::default()
    });
    let veths = links.attached().await.map_err(|error| step("list the instances' interfaces", &error))?;
    let snapshot = datapath.snapshot().await.map_err(|error| step("read the datapath's tables", &error))?;
    Ok(Remains { leases, veths, snapshot, memory })
}
