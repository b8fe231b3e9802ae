//! What goes over the socket. Plain data, serialised here and nowhere else; a newer daemon may add members, so a reader ignores
//! those it does not know.

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
    /// `host:container/protocol`.
    pub ports: Vec<String>,
}
