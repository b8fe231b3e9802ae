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
    /// Between the first and the second: registration and reports of jobs as in the first, everything else as in the second.
    G1b,
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
    /// Names of volume drivers, and their sockets.
    pub volume_drivers: Vec<(String, String)>,
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
    pub health: NodeHealth,
}

/// How the machine bears its work; what it does not tell is absent.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeHealth {
    /// Mean number of tasks that run or wait for a CPU or a disk, over 1, 5 and 15 minutes.
    pub load: Option<[f64; 3]>,
    pub pressures: Vec<Pressure>,
    /// Sensor and degrees Celsius.
    pub temperatures: Vec<(String, f64)>,
    /// How often CPUs were slowed down because of heat since the machine came up.
    pub throttle_events: Option<u64>,
    /// The clock is held down now, by heat or by want of voltage.
    pub throttled: Option<bool>,
    /// The supply voltage is too low now.
    pub under_voltage: Option<bool>,
    pub wear: Vec<Wear>,
    pub clock: Option<Clock>,
}

/// Time that tasks have waited for a resource (kernel document accounting/psi).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Pressure {
    /// `cpu`, `memory`, `io`.
    pub resource: &'static str,
    /// Percent of the last ten seconds in which some task waited, and in which all did.
    pub some_percent: f64,
    pub full_percent: f64,
    /// The same since the machine came up, in microseconds.
    pub some_microseconds: u64,
    pub full_microseconds: u64,
}

/// How far a storage device has come through its life.
#[derive(Clone, Debug, PartialEq)]
pub struct Wear {
    pub device: String,
    /// Of its life, as its maker counts it; may go beyond 100.
    pub used_percent: f64,
    /// Its spare blocks run out.
    pub urgent: bool,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Clock {
    /// The kernel's clock minus that of its reference; means something where it is synchronised.
    pub offset_seconds: f64,
    pub synchronised: bool,
    /// How far off it may be, as the kernel reckons.
    pub error_seconds: f64,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct DiskUsage {
    pub device: String,
    pub mount_point: String,
    pub file_system: String,
    pub total_bytes: u64,
    pub available_bytes: u64,
    /// Nobody fills it.
    pub read_only: bool,
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
    pub counters: InstanceCounters,
}

/// What an instance has used since its first process began, and its bounds; `None` where the runtime or this kernel does not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InstanceCounters {
    pub cpu_nanoseconds: Option<u64>,
    /// It wanted to run and its limit did not let it.
    pub throttled_nanoseconds: Option<u64>,
    pub memory_peak_bytes: Option<u64>,
    pub memory_limit_bytes: Option<u64>,
    pub out_of_memory_kills: Option<u64>,
    pub processes: Option<u64>,
    /// From and to disks.
    pub read_bytes: Option<u64>,
    pub written_bytes: Option<u64>,
    /// At the instance's own interfaces, without its loopback.
    pub received_bytes: Option<u64>,
    pub received_packets: Option<u64>,
    pub sent_bytes: Option<u64>,
    pub sent_packets: Option<u64>,
    /// Dropped by its interfaces, in either direction.
    pub dropped_packets: Option<u64>,
}

/// What a runtime knows of an instance that it holds.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct InstanceDetails {
    /// The runtime's own name for it, such as a container id.
    pub handle: String,
    /// What the image's name stands for here, such as a digest.
    pub image_id: String,
    /// First process, in the process namespace of this daemon; `None` where it does not run.
    pub pid: Option<u32>,
    pub command: Vec<String>,
    /// Names alone: values may be secrets.
    pub environment: Vec<String>,
    pub working_directory: String,
    pub user: String,
    /// As the runtime applies them; `None` is unlimited.
    pub cpus: Option<f64>,
    pub memory_bytes: Option<u64>,
    pub gpus: Vec<String>,
    /// Device nodes of the host that it may use.
    pub devices: Vec<String>,
    /// `source on the host:path inside`.
    pub mounts: Vec<String>,
    /// RFC 3339; empty where it has not happened.
    pub created: String,
    pub started: String,
    pub ended: String,
    /// Exit code, where it has ended.
    pub exit_code: Option<i64>,
    pub out_of_memory: bool,
}
