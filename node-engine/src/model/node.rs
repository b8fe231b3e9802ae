//! The node: who it is to the cluster, and what it has and uses.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use super::{InstanceId, Technology};

/// The id the cluster gave this node. It becomes part of MQTT topics, so it is `[a-zA-Z0-9_-]{1,64}`
/// (released clusters send 24 hexadecimal digits).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct NodeId(String);

/// A text that cannot be a node id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a node id (expected 1 to 64 letters, digits, `-` or `_`)")]
pub struct InvalidNodeId(String);

impl NodeId {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for NodeId {
    type Err = InvalidNodeId;

    fn from_str(text: &str) -> Result<Self, InvalidNodeId> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_';
        if text.is_empty() || text.len() > 64 || !text.bytes().all(plain) {
            return Err(InvalidNodeId(text.chars().take(80).collect()));
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What a registration gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeIdentity {
    pub id: NodeId,
    pub broker_port: u16,
    /// What kind of cluster gave it.
    pub generation: Generation,
    /// Only a first-generation cluster assigns the subnet with the registration.
    pub subnet: Option<Subnet>,
}

/// Generations of the reference system that differ on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Generation {
    /// Socket.IO registration on port 10000, subnet assigned with it, overlay questions by HTTP.
    G1,
    /// HTTP registration on port 10100, telemetry under the older names.
    G2,
    /// HTTP registration on port 10100, telemetry under the newer names.
    G4,
}

/// The namespace subnets of a node: a /26 and a /120. +1 is the bridge, +2 and up are instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Subnet {
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
}

impl Subnet {
    pub const V4_PREFIX: u8 = 26;
    pub const V6_PREFIX: u8 = 120;
}

/// What never changes while the daemon runs, or rarely; sent at registration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    pub host: String,
    /// The port the node names as its own; nothing listens there, clusters only store it. `None`: the one upstream workers name.
    pub announced_port: Option<u16>,
    pub kernel_version: String,
    pub os_version: String,
    /// Go style: `amd64`, `arm64`, `arm`.
    pub architecture: String,
    pub boot_time_seconds: u64,
    pub cpus_physical: u32,
    pub cpus_logical: u32,
    pub technologies: Vec<Technology>,
}

/// A sample of what the node uses now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeUsage {
    /// Percent used, average over all CPUs.
    pub cpu_percent: f64,
    pub cpus_logical: u32,
    pub memory_percent: f64,
    pub memory_available_mib: u64,
    pub memory_total_mib: u64,
    pub uptime_seconds: u64,
    pub disks: Vec<DiskUsage>,
    pub networks: Vec<NetworkUsage>,
    pub gpus: Vec<GpuUsage>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct DiskUsage {
    pub device: String,
    pub mount_point: String,
    pub file_system: String,
    pub total_bytes: u64,
    pub available_bytes: u64,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct NetworkUsage {
    pub interface: String,
    pub addresses: Vec<IpAddr>,
    pub received_bytes: u64,
    pub sent_bytes: u64,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct GpuUsage {
    pub name: String,
    pub driver: String,
    pub usage_percent: f64,
    pub memory_total_mib: u64,
    pub memory_used_mib: u64,
    pub temperature_celsius: f64,
}

/// What one running instance uses.
#[derive(Clone, Debug, PartialEq)]
pub struct InstanceUsage {
    pub instance: InstanceId,
    pub technology: Technology,
    /// Percent of the whole machine.
    pub cpu_percent: f64,
    pub memory_bytes: u64,
    pub memory_percent: f64,
    pub disk_bytes: u64,
    /// At most the last 1,024 bytes of its log.
    pub log_tail: String,
}
