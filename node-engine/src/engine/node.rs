//! What the local API is told about this node.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use tokio::sync::{mpsc, watch};

use super::link::ClusterLink;
use super::{hardware, look, scrape, view};
use crate::api::dto::hardware::Hardware;
use crate::api::dto::look::{Inspection, Usage};
use crate::api::dto::{
    ClusterStatus, Explanation, Instance, NetworkStatus, NodeStatus, SentStatus, Status, UsageStatus, net,
};
use crate::api::{NetChoice, NodeApi, NodeApiError};
use crate::config::{DatapathChoice, Generation, Roots};
use crate::events::Events;
use crate::metrics::Snapshot;
use crate::model::{Event, InstanceId, NodeFacts, NodeUsage, Purpose, Sent};
use crate::netmanager::{NetManager, NetStatus};
use crate::runtime::{Exec, Follow, RuntimeError, Session};
use crate::telemetry::readings::Readings;
use crate::workload::{self, InstanceInfo, Wanting, Workload, WorkloadError};

/// A node at work.
#[derive(Debug)]
pub(super) struct RunningNode {
    pub(super) began: Instant,
    pub(super) started: SystemTime,
    pub(super) facts: NodeFacts,
    pub(super) cluster: String,
    pub(super) standalone: bool,
    pub(super) workload: Workload,
    pub(super) net: NetManager,
    pub(super) usage: watch::Receiver<NodeUsage>,
    /// What sensors say.
    pub(super) readings: Readings,
    /// What was said to the cluster.
    pub(super) sent: watch::Receiver<Sent>,
    pub(super) roots: Roots,
    pub(super) link: watch::Receiver<ClusterLink>,
    pub(super) events: Events,
    /// Why the disk does not take what is wanted; empty where it does.
    pub(super) kept: watch::Receiver<String>,
}

/// A process that is a cluster and no node.
#[derive(Debug)]
pub(super) struct NoNode {
    pub(super) began: Instant,
    pub(super) name: String,
}

#[async_trait]
impl NodeApi for RunningNode {
    async fn status(&self) -> Status {
        let link = self.link.borrow().clone();
        let sent = *self.sent.borrow();
        // A part that has stopped shows as missing; the supervisor is about to say why.
        let network = self.net.status().await.ok();
        let running =
            self.workload.list().await.unwrap_or_default().iter().filter(|known| known.state == "running").count();
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_seconds: self.began.elapsed().as_secs(),
            node: NodeStatus {
                name: self.facts.host.clone(),
                id: link.node.as_ref().map(ToString::to_string).unwrap_or_default(),
                architecture: self.facts.architecture.clone(),
                kernel: self.facts.kernel_version.clone(),
                technologies: self.facts.technologies.iter().map(ToString::to_string).collect(),
            },
            cluster: ClusterStatus {
                address: self.cluster.clone(),
                connected: link.connected,
                since_seconds: link.since.elapsed().as_secs(),
                generation: link.generation.map(word).unwrap_or_default().into(),
                standalone: self.standalone,
                last_error: link.last_error,
            },
            network: network.map(network_status),
            usage: Some(usage_status(&self.usage.borrow())),
            running,
            sent_today: sent_today(&sent),
            reports_dropped: sent.dropped,
        }
    }

    async fn instances(&self) -> Result<Vec<Instance>, NodeApiError> {
        let known = self.workload.list().await.map_err(|error| unavailable("list", &error))?;
        Ok(known.into_iter().map(instance).collect())
    }

    async fn explain(&self, instance: InstanceId) -> Result<Explanation, NodeApiError> {
        let known = self.workload.explain(instance.clone()).await.map_err(|error| unavailable("explain", &error))?;
        let mut told = explanation(known.ok_or(NodeApiError::UnknownInstance(instance))?);
        told.state_not_kept = self.kept.borrow().clone();
        let waits = told.state == "attaching" && self.net.status().await.is_ok_and(|network| network.subnet.is_none());
        if waits {
            told.reasons.push("the cluster has not assigned a subnet to this node yet".into());
        }
        Ok(told)
    }

    async fn flows(&self, choice: NetChoice) -> Result<net::Page<net::Flow>, NodeApiError> {
        view::flows(&self.net, choice).await
    }

    async fn services(&self, choice: NetChoice) -> Result<net::Page<net::Service>, NodeApiError> {
        view::services(&self.net, choice).await
    }

    async fn peers(&self) -> Result<Vec<net::Peer>, NodeApiError> {
        view::peers(&self.net).await
    }

    async fn switch(&self, choice: DatapathChoice) -> Result<net::Datapath, NodeApiError> {
        view::switch(&self.net, choice).await
    }

    async fn counters(&self) -> Result<Vec<net::Counter>, NodeApiError> {
        view::counters(&self.net).await
    }

    async fn logs(&self, instance: InstanceId, tail: usize) -> Result<Vec<u8>, NodeApiError> {
        self.workload.logs(instance, tail).await.map_err(|error| refused("logs", error))
    }

    async fn inspect(&self, instance: InstanceId) -> Result<Inspection, NodeApiError> {
        self.workload.inspect(instance).await.map(look::inspection).map_err(|error| refused("inspect", error))
    }

    async fn stats(&self) -> Result<Vec<Usage>, NodeApiError> {
        let usage = self.workload.usage().await.map_err(|error| refused("stats", error))?;
        Ok(usage.iter().map(look::usage).collect())
    }

    async fn follow(&self, instance: InstanceId, tail: usize) -> Result<Follow, NodeApiError> {
        self.workload.follow(instance, tail).await.map_err(|error| refused("logs", error))
    }

    async fn exec(&self, instance: InstanceId, exec: Exec) -> Result<Session, NodeApiError> {
        self.workload.exec(instance, exec).await.map_err(|error| refused("exec", error))
    }

    async fn hardware(&self) -> Result<Hardware, NodeApiError> {
        let roots = self.roots.clone();
        let looked = tokio::task::spawn_blocking(move || crate::telemetry::hardware::look(&roots)).await;
        let found =
            looked.map_err(|error| NodeApiError::Unavailable { what: "hardware", reason: error.to_string() })?;
        Ok(hardware::told(found, &self.usage.borrow().health.wear))
    }

    async fn metrics(&self) -> Result<Snapshot, NodeApiError> {
        Ok(scrape::snapshot(self).await)
    }

    async fn events(&self, past: usize) -> Result<mpsc::Receiver<Event>, NodeApiError> {
        self.events.watch(past).map_err(|error| NodeApiError::Unavailable { what: "events", reason: error.to_string() })
    }
}

#[async_trait]
impl NodeApi for NoNode {
    async fn status(&self) -> Status {
        Status {
            version: env!("CARGO_PKG_VERSION").into(),
            pid: std::process::id(),
            uptime_seconds: self.began.elapsed().as_secs(),
            node: NodeStatus { name: self.name.clone(), ..NodeStatus::default() },
            cluster: ClusterStatus { connected: true, standalone: true, ..ClusterStatus::default() },
            ..Status::default()
        }
    }

    async fn instances(&self) -> Result<Vec<Instance>, NodeApiError> {
        Err(NodeApiError::NoNode)
    }

    async fn explain(&self, _instance: InstanceId) -> Result<Explanation, NodeApiError> {
        Err(NodeApiError::NoNode)
    }

    async fn logs(&self, _instance: InstanceId, _tail: usize) -> Result<Vec<u8>, NodeApiError> {
        Err(NodeApiError::NoNode)
    }

    async fn flows(&self, _choice: NetChoice) -> Result<net::Page<net::Flow>, NodeApiError> {
        Err(NodeApiError::NoNode)
    }

    async fn services(&self, _choice: NetChoice) -> Result<net::Page<net::Service>, NodeApiError> {
        Err(NodeApiError::NoNode)
    }

    async fn peers(&self) -> Result<Vec<net::Peer>, NodeApiError> {
        Err(NodeApiError::NoNode)
    }

    async fn switch(&self, _choice: DatapathChoice) -> Result<net::Datapath, NodeApiError> {
        Err(NodeApiError::NoNode)
    }

    async fn counters(&self) -> Result<Vec<net::Counter>, NodeApiError> {
        Err(NodeApiError::NoNode)
    }
}

fn word(generation: Generation) -> &'static str {
    match generation {
        Generation::G1 => "g1",
        Generation::G1b => "g1b",
        Generation::G2 => "g2",
        Generation::G4 => "g4",
    }
}

fn network_status(status: NetStatus) -> NetworkStatus {
    NetworkStatus {
        datapath: status.datapath,
        reason: status.reason,
        uplink: status.uplink,
        address: status.address.map(|address| address.to_string()).unwrap_or_default(),
        subnet_v4: status.subnet.map(|subnet| format!("{}/26", subnet.v4)).unwrap_or_default(),
        subnet_v6: status.subnet.map(|subnet| format!("{}/120", subnet.v6)).unwrap_or_default(),
        services: status.services,
        peers: status.peers,
        counters: status.counters,
        warnings: status.warnings,
    }
}

fn sent_today(sent: &Sent) -> Vec<SentStatus> {
    let day = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs() / 86_400;
    let status = |purpose: Purpose| {
        let volume = sent.on(day, purpose);
        SentStatus { purpose: purpose.word().into(), messages: volume.messages, bytes: volume.bytes }
    };
    Purpose::ALL.map(status).into()
}

fn usage_status(usage: &NodeUsage) -> UsageStatus {
    UsageStatus {
        cpu_percent: usage.cpu_percent,
        cpus: usage.cpus_logical,
        memory_percent: usage.memory_percent,
        memory_available_mib: usage.memory_available_mib,
        memory_total_mib: usage.memory_total_mib,
        gpus: usage.gpus.len(),
    }
}

fn instance(info: InstanceInfo) -> Instance {
    Instance {
        service: info.id.service.to_string(),
        number: info.id.number,
        technology: info.technology.to_string(),
        image: info.image,
        state: info.state.into(),
        detail: info.detail,
        address_v4: info.addresses.map(|addresses| addresses.v4.to_string()).unwrap_or_default(),
        address_v6: info.addresses.map(|addresses| addresses.v6.to_string()).unwrap_or_default(),
    }
}

fn refused(what: &'static str, error: WorkloadError) -> NodeApiError {
    match error {
        WorkloadError::Unknown(instance) | WorkloadError::Runtime(RuntimeError::Unknown(instance)) => {
            NodeApiError::UnknownInstance(instance)
        }
        WorkloadError::Runtime(RuntimeError::Refused { what, reason }) => NodeApiError::Refused { what, reason },
        other => unavailable(what, &other),
    }
}

fn explanation(known: workload::Explanation) -> Explanation {
    let (wanted, ended) = match known.wanted {
        Wanting::Run => ("run", None),
        Wanting::Ended(status, why) => ("ended", Some((status.to_string(), why))),
        Wanting::Nothing => ("nothing", None),
    };
    Explanation {
        service: known.id.service.to_string(),
        number: known.id.number,
        technology: known.technology.to_string(),
        image: known.image,
        wanted: wanted.into(),
        ended,
        command: known.sequence,
        wanted_seconds: known.wanted_for.as_secs(),
        state: known.state.into(),
        state_seconds: known.state_for.map(|since| since.as_secs()),
        address_v4: known.addresses.map(|addresses| addresses.v4.to_string()).unwrap_or_default(),
        address_v6: known.addresses.map(|addresses| addresses.v6.to_string()).unwrap_or_default(),
        reasons: known.reasons,
        next_try_seconds: known.next_try.map(|next| next.as_secs_f64()),
        restarts: known.restarts,
        restart_limit: known.policy.limit,
        restart_window_seconds: known.policy.window.as_secs(),
        fell: known.fell.map(|(ago, why)| (ago.as_secs(), why)),
        state_not_kept: String::new(),
    }
}

fn unavailable(what: &'static str, error: &WorkloadError) -> NodeApiError {
    NodeApiError::Unavailable { what, reason: error.to_string() }
}
