//! What a node says to be taken in, and what a cluster answers.

use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

use super::json::{MAX_MESSAGE, Malformed, Members, excerpt};
use super::table::{base_v4, subnet_v6};
use crate::model::{Generation, NodeFacts, NodeId, NodeIdentity, NodeUsage, Subnet};

/// The port upstream workers name as their own. Nothing listens there; it is only stored.
const NAMED_PORT: u16 = 3000;

/// The registration of clusters with HTTP: everything about the node, under the names of both telemetry dialects, with
/// every text a text and nothing null.
#[derive(Serialize)]
struct Registration<'a> {
    host: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    ip: Option<IpAddr>,
    port: String,
    system_info: SystemInfo<'a>,
    #[serde(skip_serializing_if = "str::is_empty")]
    architecture: &'a str,
    virtualization: Vec<&'a str>,
    technology: Vec<&'a str>,
    supported_addons: [&'static str; 0],
    csi_drivers: Vec<CsiDriver<'a>>,
    #[serde(flatten)]
    usage: serde_json::Value,
}

#[derive(Serialize)]
struct CsiDriver<'a> {
    csi_driver_name: &'a str,
    csi_driver_endpoint: String,
}

#[derive(Serialize)]
struct SystemInfo<'a> {
    kernel_version: &'a str,
    architecture: &'a str,
    os_version: &'a str,
    uptime: String,
}

/// The body of `POST /api/node/register`.
pub fn registration(generation: Generation, facts: &NodeFacts, usage: &NodeUsage, ip: Option<IpAddr>) -> String {
    let technologies: Vec<&str> = facts.technologies.iter().map(|technology| technology.as_str()).collect();
    super::text(&Registration {
        host: &facts.host,
        ip,
        port: facts.announced_port.unwrap_or(NAMED_PORT).to_string(),
        system_info: SystemInfo {
            kernel_version: &facts.kernel_version,
            architecture: &facts.architecture,
            os_version: &facts.os_version,
            uptime: usage.uptime_seconds.to_string(),
        },
        architecture: &facts.architecture,
        virtualization: technologies.clone(),
        technology: technologies,
        supported_addons: [],
        csi_drivers: facts
            .volume_drivers
            .iter()
            .map(|(name, socket)| CsiDriver { csi_driver_name: name, csi_driver_endpoint: format!("unix://{socket}") })
            .collect(),
        usage: super::node::usage_members(generation, usage),
    })
}

/// The answer of a cluster with HTTP. Both are texts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    pub id: String,
    #[serde(rename = "MQTT_BROKER_PORT")]
    pub broker_port: String,
}

/// What a cluster writes for a node it took in.
pub fn answer(id: &NodeId, broker_port: u16) -> String {
    super::text(&Answer { id: id.to_string(), broker_port: broker_port.to_string() })
}

/// Reads the answer to a registration of any generation.
///
/// # Errors
/// Where the id or the port is missing or unusable.
pub fn read_answer(bytes: &[u8], generation: Generation) -> Result<NodeIdentity, Malformed> {
    let members = Members::parse(bytes, MAX_MESSAGE)?;
    let id = members.said("id")?.ok_or(Malformed::Missing("id"))?;
    let port = members.whole("MQTT_BROKER_PORT")?.ok_or(Malformed::Missing("MQTT_BROKER_PORT"))?;
    Ok(NodeIdentity {
        id: id.parse().map_err(|_| member("id", "a node id", &id))?,
        broker_port: port
            .try_into()
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| member("MQTT_BROKER_PORT", "a port", &port.to_string()))?,
        generation,
        subnet: first_generation_subnet(&members)?,
    })
}

/// Only the first generation assigns the subnet with the registration, and only an IPv4 one.
fn first_generation_subnet(members: &Members<'_>) -> Result<Option<Subnet>, Malformed> {
    let Some(text) = members.said("SUBNETWORK")? else { return Ok(None) };
    let v4: Ipv4Addr = text.parse().map_err(|_| member("SUBNETWORK", "an IPv4 address", &text))?;
    let v4 = base_v4("SUBNETWORK", v4)?;
    Ok(Some(Subnet { v4, v6: subnet_v6(v4) }))
}

fn member(member: &'static str, expected: &'static str, found: &str) -> Malformed {
    Malformed::Member { member, expected, found: excerpt(found.as_bytes()) }
}

/// A node as a cluster takes it in.
#[derive(Clone, Debug, PartialEq)]
pub struct Registrant {
    /// The node's identity: the same host registers as the same node.
    pub host: String,
    pub ip: Option<String>,
    pub architecture: Option<String>,
    pub virtualization: Vec<String>,
    pub vcpus: Option<u64>,
    pub memory_mib: Option<u64>,
}

/// Reads a registration with the strictness of a cluster of the newest generation, which answers 500 to any violation.
///
/// # Errors
/// Where a member has a type its schema does not allow.
pub fn read_registration(bytes: &[u8]) -> Result<Registrant, Malformed> {
    let members = Members::parse(bytes, MAX_MESSAGE)?;
    strict(&members)?;
    Ok(Registrant {
        host: members.said("host")?.ok_or(Malformed::Missing("host"))?,
        ip: members.said("ip")?,
        architecture: members.said("architecture")?,
        virtualization: members.texts("virtualization")?,
        vcpus: members.number("vcpus")?.map(|number| number as u64),
        memory_mib: members.number("memory")?.map(|number| number as u64),
    })
}

const TEXTS: [&str; 5] = ["ip", "port", "architecture", "candidate_name", "candidate_location"];
const NUMBERS: [&str; 8] = [
    "memory",
    "vcpus",
    "vgpus",
    "gpu_percent",
    "active_nodes",
    "cpu_percent",
    "memory_percent",
    "last_modified_timestamp",
];
const LISTS: [&str; 2] = ["virtualization", "supported_addons"];

fn strict(members: &Members<'_>) -> Result<(), Malformed> {
    let null = |name, expected| Malformed::Member { member: name, expected, found: "null".into() };
    for name in TEXTS {
        if members.is_null(name) {
            return Err(null(name, "a text"));
        }
        members.text(name)?;
    }
    for name in NUMBERS {
        if members.is_null(name) {
            return Err(null(name, "a number"));
        }
        members.number(name)?;
    }
    for name in LISTS {
        members.texts(name)?;
    }
    if members.get("csi_drivers").is_some_and(|text| !text.starts_with('[')) {
        return Err(member("csi_drivers", "a list", members.get("csi_drivers").unwrap_or_default()));
    }
    if members.is_null("aggregation_per_architecture") {
        return Err(null("aggregation_per_architecture", "an object"));
    }
    members.object("aggregation_per_architecture")?;
    Ok(())
}

/// What a first-generation worker says of itself (`cs1`). The cluster uses `host`, `technology` and `node_port`.
#[derive(Serialize)]
struct Greeting<'a> {
    host: &'a str,
    ip: String,
    port: u16,
    technology: Vec<&'a str>,
    node_port: u16,
    uname: [&'a str; 6],
    boot_time_timestamp: u64,
    cpu_count_physical: u32,
    cpu_count_total: u32,
    cpufreq: [f64; 3],
    svmem: [f64; 5],
    swap: [u64; 0],
    partitions: Vec<[&'a str; 4]>,
    disk_io: [u64; 0],
    if_addrs: std::collections::BTreeMap<&'a str, Vec<(u8, IpAddr)>>,
    net_io: [u64; 2],
    gpus: Vec<&'a str>,
    list_gpus: Vec<[String; 6]>,
}

/// The JSON text that a first-generation worker sends as `cs1`. `tunnel_port` has to be the real one: the cluster assumes
/// another where it is missing.
pub fn greeting(facts: &NodeFacts, usage: &NodeUsage, ip: Option<IpAddr>, tunnel_port: u16) -> String {
    let mib = 1_048_576.0;
    let total = usage.memory_total_mib as f64 * mib;
    let available = usage.memory_available_mib as f64 * mib;
    super::text(&Greeting {
        host: &facts.host,
        ip: ip.map(|ip| ip.to_string()).unwrap_or_default(),
        port: facts.announced_port.unwrap_or(NAMED_PORT),
        technology: facts.technologies.iter().map(|technology| technology.as_str()).collect(),
        node_port: tunnel_port,
        uname: ["Linux", &facts.host, &facts.kernel_version, &facts.os_version, &facts.architecture, ""],
        boot_time_timestamp: facts.boot_time_seconds,
        cpu_count_physical: facts.cpus_physical,
        cpu_count_total: facts.cpus_logical,
        cpufreq: [0.0; 3],
        svmem: [total, available, super::node::finite(usage.memory_percent), total - available, available],
        swap: [],
        partitions: usage
            .disks
            .iter()
            .map(|disk| [disk.device.as_str(), disk.mount_point.as_str(), disk.file_system.as_str(), ""])
            .collect(),
        disk_io: [],
        if_addrs: usage
            .networks
            .iter()
            .map(|network| {
                let family = |ip: &IpAddr| (if ip.is_ipv4() { 2 } else { 10 }, *ip);
                (network.interface.as_str(), network.addresses.iter().map(family).collect())
            })
            .collect(),
        net_io: usage
            .networks
            .iter()
            .fold([0, 0], |[sent, received], network| [sent + network.sent_bytes, received + network.received_bytes]),
        gpus: usage.gpus.iter().map(|gpu| gpu.name.as_str()).collect(),
        list_gpus: usage
            .gpus
            .iter()
            .enumerate()
            .map(|(nth, gpu)| {
                [
                    nth.to_string(),
                    gpu.name.clone(),
                    format!("{}%", super::node::finite(gpu.usage_percent)),
                    format!("{} MB", gpu.memory_total_mib.saturating_sub(gpu.memory_used_mib)),
                    format!("{} MB", gpu.memory_used_mib),
                    format!("{} MB", gpu.memory_total_mib),
                ]
            })
            .collect(),
    })
}
