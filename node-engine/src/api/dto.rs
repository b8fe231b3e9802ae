//! What goes over the socket. Plain data, serialised here and nowhere else; a newer daemon may add members, so a reader ignores
//! those it does not know.

pub mod hardware;
pub mod look;
pub mod net;
pub mod upgrade;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A node as its cluster sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClusterNode {
    pub id: String,
    /// The node's name: its host name unless configured.
    pub name: String,
    /// Where its peers reach it.
    pub address: String,
    pub architecture: String,
    /// It was heard of within the freshness window.
    pub active: bool,
    /// Seconds since it was last heard of.
    pub seen_seconds: u64,
    pub cpu_percent: f64,
    pub cpus: u32,
    pub memory_percent: f64,
    /// Available.
    pub memory_mib: u64,
    /// Instances placed on it.
    pub instances: usize,
    /// Base of its IPv4 subnet; empty where none is assigned.
    pub subnet: String,
}

/// An instance as its cluster sees it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClusterInstance {
    /// `<app>.<namespace>.<service>.<namespace>`.
    pub service: String,
    pub number: u32,
    pub image: String,
    /// Name of the node that runs it or shall run it; empty while it is nowhere.
    pub node: String,
    /// The status word of the wire.
    pub status: String,
    /// Why, where the status needs a reason.
    pub detail: String,
    /// Inside the node's subnet; empty before the network is up.
    pub address: String,
    /// The address that means exactly this instance.
    pub instance_address: String,
    /// The addresses of the service, round robin first.
    pub service_addresses: Vec<String>,
    /// The addresses of the service's other policies, by label.
    pub policies: BTreeMap<String, Vec<String>>,
    /// `host:container/protocol`.
    pub ports: Vec<String>,
}

/// The answer to `GET /status`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    pub version: String,
    pub pid: u32,
    pub uptime_seconds: u64,
    pub node: NodeStatus,
    pub cluster: ClusterStatus,
    /// `None` where this process runs no node.
    pub network: Option<NetworkStatus>,
    pub usage: Option<UsageStatus>,
    /// Instances that run now.
    pub running: usize,
    /// What was sent to the cluster today (in UTC), by purpose.
    pub sent_today: Vec<SentStatus>,
    /// Reports to the cluster that were given up since the daemon began.
    pub reports_dropped: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SentStatus {
    pub purpose: String,
    pub messages: u64,
    /// Topics and payloads.
    pub bytes: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NodeStatus {
    pub name: String,
    /// Empty until the cluster has given one.
    pub id: String,
    pub architecture: String,
    pub kernel: String,
    /// What it can run, in the words of the wire.
    pub technologies: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ClusterStatus {
    /// Host of the cluster manager; empty where this process is the cluster.
    pub address: String,
    pub connected: bool,
    /// Seconds since the connection was made or lost.
    pub since_seconds: u64,
    /// `g1`, `g2` or `g4`; empty until known.
    pub generation: String,
    /// This process is the cluster.
    pub standalone: bool,
    /// Why there is no connection, or was none before this one; empty where nothing has gone wrong.
    pub last_error: String,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct NetworkStatus {
    pub datapath: String,
    /// Why the datapath is not a faster one; empty where it is the fastest.
    pub reason: String,
    pub uplink: String,
    /// This node's address towards its peers.
    pub address: String,
    /// Base addresses; empty until the cluster has assigned them.
    pub subnet_v4: String,
    pub subnet_v6: String,
    pub services: usize,
    pub peers: usize,
    pub counters: Vec<(String, u64)>,
    /// What on this machine is in the way of traffic, a sentence each.
    pub warnings: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct UsageStatus {
    pub cpu_percent: f64,
    pub cpus: u32,
    pub memory_percent: f64,
    pub memory_available_mib: u64,
    pub memory_total_mib: u64,
    pub gpus: usize,
}

/// An instance on this node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Instance {
    pub service: String,
    pub number: u32,
    pub technology: String,
    pub image: String,
    pub state: String,
    pub detail: String,
    /// Inside the node's subnet; empty before the network is up.
    pub address_v4: String,
    pub address_v6: String,
}

/// The answer to `GET /instances/{instance}/explain`: what is wanted, what is, and why they differ.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Explanation {
    pub service: String,
    pub number: u32,
    pub technology: String,
    pub image: String,
    /// `run`; `ended`: it has, and is not to run again by itself; `nothing`.
    pub wanted: String,
    /// How it ended for good: the word of the wire, and why.
    pub ended: Option<(String, String)>,
    /// Number of the command that says so; 0 where it was found running.
    pub command: u64,
    /// So long it has been wanted as far as this process knows.
    pub wanted_seconds: u64,
    pub state: String,
    /// So long it has been so; nothing where it is absent.
    pub state_seconds: Option<u64>,
    pub address_v4: String,
    pub address_v6: String,
    /// Why it is not as wanted, a sentence each.
    pub reasons: Vec<String>,
    pub next_try_seconds: Option<f64>,
    /// Within the window.
    pub restarts: usize,
    pub restart_limit: u32,
    pub restart_window_seconds: u64,
    /// How its process ended last, and how long ago.
    pub fell: Option<(u64, String)>,
    /// Why the disk does not take what is wanted now; empty where it does.
    pub state_not_kept: String,
}

/// Query of `GET /instances/{instance}/logs`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct LogsQuery {
    /// Bytes from the end.
    pub tail: Option<usize>,
    /// Go on with what comes, until the instance ends.
    pub follow: bool,
}

/// Query of `POST /cluster/deploy`; the body is the description.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeployQuery {
    /// Where it is not given, what the description says, or else 1.
    pub replicas: Option<u32>,
    /// Id or name of the node that shall run them.
    pub on: Option<String>,
}

/// Body of `POST /cluster/replicate`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Replicate {
    pub service: String,
    pub replicas: u32,
}

/// Body of `POST /cluster/move`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Move {
    pub instance: String,
    pub node: String,
}

/// Instances by their full names, as the answer to what changes them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Changed {
    pub instances: Vec<String>,
}

/// Any answer that is not 2xx.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Refusal {
    pub error: String,
}
