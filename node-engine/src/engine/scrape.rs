//! The snapshot that metrics are made of.

use std::collections::BTreeMap;
use std::time::UNIX_EPOCH;

use nix::sys::resource::{UsageWho, getrusage};
use nix::unistd::{SysconfVar, sysconf};

use super::node::RunningNode;
use crate::metrics::{Process, Snapshot};
use crate::netmanager::datapath::{Kind, explain};

/// States that are told also where nobody is in them: an alert compares with nothing else.
const STATES: [&str; 9] =
    ["absent", "preparing", "attaching", "starting", "running", "stopping", "failed", "dead", "completed"];

pub(super) async fn snapshot(node: &RunningNode) -> Snapshot {
    // A part that has stopped shows as missing; the supervisor is about to say why.
    let network = node.net.status().await.unwrap_or_default();
    let listed = node.workload.list().await.unwrap_or_default();
    let mut states: BTreeMap<&'static str, usize> = STATES.iter().map(|state| (*state, 0)).collect();
    for instance in &listed {
        *states.entry(instance.state).or_default() += 1;
    }
    let counters = network.counters.into_iter().filter_map(|(name, value)| {
        let kind = match explain(&name)?.kind {
            Kind::Carried => "carried",
            Kind::Dropped => "dropped",
            Kind::Refused => "refused",
            Kind::Level => "level",
        };
        Some((kind, name, value))
    });
    let instances = node.workload.usage().await.unwrap_or_default();
    let samples = node.readings.now().await;
    Snapshot {
        version: env!("CARGO_PKG_VERSION"),
        architecture: node.facts.architecture.clone(),
        started_seconds: node.started.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
        connected: node.link.borrow().connected,
        usage: node.usage.borrow().clone(),
        states: states.into_iter().collect(),
        instances,
        services: network.services,
        peers: network.peers,
        counters: counters.collect(),
        sent: *node.sent.borrow(),
        events: node.events.counts(),
        samples,
        process: process(),
    }
}

fn process() -> Process {
    let seconds = |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
    let used = getrusage(UsageWho::RUSAGE_SELF).map(|usage| seconds(usage.user_time()) + seconds(usage.system_time()));
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten().and_then(|size| u64::try_from(size).ok()).unwrap_or(4096);
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let resident: u64 = pages.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    Process {
        cpu_seconds: used.unwrap_or(0.0),
        resident_bytes: resident.saturating_mul(page),
        open_files: std::fs::read_dir("/proc/self/fd").map_or(0, |files| files.count() as u64),
    }
}
