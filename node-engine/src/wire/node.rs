//! What a node tells of itself while it runs: its own usage, and that of its instances.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::Serialize;
use serde_json::{Map, Value, json};

use super::json::{MAX_DOCUMENT, MAX_MESSAGE, Malformed, Members, tail};
use super::status::instance;
use crate::model::{Generation, GpuUsage, InstanceId, InstanceUsage, NodeUsage};

/// Instances told of in one message; more make another. A cluster takes each entry by itself.
const SERVICES_A_MESSAGE: usize = 32;

const MAX_LOG: usize = 1024;

/// The payload of `nodes/<id>/information`: only what changes. Static members are left out rather than sent empty, since a
/// cluster stores empty texts over what the registration said.
pub fn information(generation: Generation, usage: &NodeUsage, ip: Option<IpAddr>) -> String {
    let mut members = usage_members(generation, usage);
    if let (Some(ip), Value::Object(members)) = (ip, &mut members) {
        members.insert("ip".into(), ip.to_string().into());
    }
    super::text(&members)
}

/// The same for where each byte counts: the names of one dialect, tenths, and GPUs only where there are any.
pub fn compact_information(generation: Generation, usage: &NodeUsage, ip: Option<IpAddr>) -> String {
    const OLDER: [&str; 4] = ["cpu", "free_cores", "memory", "memory_free_in_MB"];
    const OLDER_GPUS: [&str; 6] = ["gpu_driver", "gpu_usage", "gpu_temp", "gpu_cores", "gpu_tot_mem", "gpu_mem_used"];
    const NEWER: [&str; 4] = ["cpu_percent", "vcpus", "memory_percent", "memory"];
    const NEWER_GPUS: [&str; 6] = ["gpu_driver", "gpu_usage", "gpu_temp", "vgpus", "vram", "vram_percent"];
    let (names, gpus) = match generation {
        Generation::G1 | Generation::G1b | Generation::G2 => (OLDER, OLDER_GPUS),
        Generation::G4 => (NEWER, NEWER_GPUS),
    };
    let mut members = usage_members(generation, usage);
    if let Value::Object(members) = &mut members {
        let kept = |name: &str| names.contains(&name) || (!usage.gpus.is_empty() && gpus.contains(&name));
        members.retain(|name, _| kept(name));
        for value in members.values_mut().filter(|value| value.is_f64()) {
            *value = tenths(value.as_f64().unwrap_or_default()).into();
        }
        if let Some(ip) = ip {
            members.insert("ip".into(), ip.to_string().into());
        }
    }
    super::text(&members)
}

fn tenths(number: f64) -> f64 {
    (number * 10.0).round() / 10.0
}

/// Usage under the names of both dialects. They collide in one: `memory` is the available MiB to the newest generation, and
/// the used percentage to all before it.
pub(super) fn usage_members(generation: Generation, usage: &NodeUsage) -> Value {
    let cpu = finite(usage.cpu_percent);
    let memory = finite(usage.memory_percent);
    let available = usage.memory_available_mib;
    let mut members = Map::new();
    let mut put = |name: &str, value: Value| {
        members.insert(name.into(), value);
    };
    match generation {
        Generation::G1 => {
            put("cpu", cpu.into());
            put("free_cores", (f64::from(usage.cpus_logical) * (1.0 - cpu / 100.0).max(0.0)).into());
            put("memory", memory.into());
            put("memory_free_in_MB", available.into());
            return Value::Object(members);
        }
        Generation::G1b | Generation::G2 => put("memory", memory.into()),
        Generation::G4 => put("memory", available.into()),
    }
    put("cpu_percent", cpu.into());
    put("cpu", cpu.into());
    put("vcpus", usage.cpus_logical.into());
    put("free_cores", usage.cpus_logical.into());
    put("memory_percent", memory.into());
    put("memory_free_in_MB", available.into());
    let gpus = Gpus::of(&usage.gpus);
    put("gpu_driver", gpus.driver.into());
    put("gpu_usage", gpus.usage_percent.into());
    put("gpu_temp", gpus.temperature.into());
    put("vgpus", usage.gpus.len().into());
    put("gpu_cores", usage.gpus.len().into());
    put("vram", gpus.memory_total_mib.into());
    put("gpu_tot_mem", gpus.memory_total_mib.into());
    put("vram_percent", gpus.memory_percent.into());
    put("gpu_mem_used", gpus.memory_percent.into());
    if let Some(root) = usage.disks.iter().find(|disk| disk.mount_point == "/") {
        let used = root.total_bytes.saturating_sub(root.available_bytes) as f64 / (root.total_bytes.max(1)) as f64;
        put("disk_info", json!({ "/": format!("{:.1}", used * 100.0) }));
    }
    if !usage.networks.is_empty() {
        let interfaces: Map<String, Value> = usage
            .networks
            .iter()
            .enumerate()
            .map(|(nth, network)| {
                let entry = json!({ "name": network.interface, "addresses": network.addresses,
                    "received": network.received_bytes, "sent": network.sent_bytes });
                (format!("interface_{nth}"), entry.to_string().into())
            })
            .collect();
        put("network_info", interfaces.into());
    }
    Value::Object(members)
}

/// All GPUs as one, as the cluster has one place for them.
struct Gpus {
    driver: String,
    usage_percent: f64,
    temperature: f64,
    memory_total_mib: u64,
    memory_percent: f64,
}

impl Gpus {
    fn of(gpus: &[GpuUsage]) -> Self {
        let count = gpus.len().max(1) as f64;
        let total: u64 = gpus.iter().map(|gpu| gpu.memory_total_mib).sum();
        let used: u64 = gpus.iter().map(|gpu| gpu.memory_used_mib).sum();
        Self {
            driver: gpus
                .first()
                .map(|gpu| gpu.driver.as_str())
                .filter(|driver| !driver.is_empty())
                .unwrap_or("-")
                .into(),
            usage_percent: gpus.iter().map(|gpu| finite(gpu.usage_percent)).sum::<f64>() / count,
            temperature: gpus.iter().map(|gpu| finite(gpu.temperature_celsius)).fold(0.0, f64::max),
            memory_total_mib: total,
            memory_percent: 100.0 * used as f64 / total.max(1) as f64,
        }
    }
}

/// JSON has no infinity, and a null where a number is expected is worse than a zero.
pub(super) fn finite(number: f64) -> f64 {
    if number.is_finite() { number } else { 0.0 }
}

#[derive(Serialize)]
struct Resources<'a> {
    services: Vec<ServiceUsage<'a>>,
}

#[derive(Serialize)]
struct ServiceUsage<'a> {
    job_name: &'a str,
    instance: u32,
    virtualization: &'a str,
    #[serde(skip_serializing_if = "String::is_empty")]
    cpu_percent: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    memory_percent: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    cpu: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    memory: String,
    disk: String,
    logs: &'a str,
}

/// The payloads of `nodes/<id>/jobs/resources`: one message for each technology, and one that says "none" where nothing runs.
pub fn resources(usages: &[InstanceUsage]) -> Vec<String> {
    messages(usages, service_usage)
}

/// The same for where each byte counts: the names of one dialect, and tenths.
pub fn compact_resources(generation: Generation, usages: &[InstanceUsage]) -> Vec<String> {
    messages(usages, |usage| {
        let cpu = tenths(finite(usage.cpu_percent)).to_string();
        let memory = tenths(finite(usage.memory_percent)).to_string();
        let nothing = String::new;
        let (cpu_percent, memory_percent, cpu, memory) = match generation {
            Generation::G1 | Generation::G1b | Generation::G2 => (nothing(), nothing(), cpu, memory),
            Generation::G4 => (cpu, memory, nothing(), nothing()),
        };
        ServiceUsage { cpu_percent, memory_percent, cpu, memory, ..service_usage(usage) }
    })
}

fn messages<'a>(usages: &'a [InstanceUsage], entry: impl Fn(&'a InstanceUsage) -> ServiceUsage<'a>) -> Vec<String> {
    let mut by_technology: BTreeMap<&str, Vec<ServiceUsage<'_>>> = BTreeMap::new();
    for usage in usages {
        by_technology.entry(usage.technology.as_str()).or_default().push(entry(usage));
    }
    if by_technology.is_empty() {
        return vec![super::text(&Resources { services: Vec::new() })];
    }
    let mut messages = Vec::new();
    for mut services in by_technology.into_values() {
        while !services.is_empty() {
            let rest = services.split_off(services.len().min(SERVICES_A_MESSAGE));
            messages.push(super::text(&Resources { services }));
            services = rest;
        }
    }
    messages
}

fn service_usage(usage: &InstanceUsage) -> ServiceUsage<'_> {
    let cpu = format!("{:.6}", finite(usage.cpu_percent));
    let memory = format!("{:.6}", finite(usage.memory_percent));
    ServiceUsage {
        job_name: usage.instance.service.as_str(),
        instance: usage.instance.number,
        virtualization: usage.technology.as_str(),
        cpu: cpu.clone(),
        memory: memory.clone(),
        cpu_percent: cpu,
        memory_percent: memory,
        disk: usage.disk_bytes.to_string(),
        logs: tail(&usage.log_tail, MAX_LOG),
    }
}

/// A running instance as a cluster reads it from its node's list.
#[derive(Clone, Debug, PartialEq)]
pub struct RunningService {
    pub instance: InstanceId,
    /// As the node wrote it; a delete repeats it.
    pub virtualization: String,
    pub cpu_percent: f64,
    pub memory_percent: f64,
    pub logs: String,
}

/// Reads the list of what runs on a node.
///
/// # Errors
/// Where `services` is no list or an entry does not say which instance it is.
pub fn read_resources(bytes: &[u8]) -> Result<Vec<RunningService>, Malformed> {
    let members = Members::parse(bytes, MAX_DOCUMENT)?;
    if !members.has("services") {
        return Err(Malformed::Missing("services"));
    }
    members.objects("services")?.iter().map(running).collect()
}

fn running(entry: &Members<'_>) -> Result<RunningService, Malformed> {
    let percent =
        |member| Ok::<_, Malformed>(entry.text(member)?.and_then(|text| text.parse().ok()).unwrap_or_default());
    Ok(RunningService {
        instance: instance(entry, "job_name", "instance")?,
        virtualization: entry.text("virtualization")?.unwrap_or_default(),
        cpu_percent: percent("cpu_percent")?,
        memory_percent: percent("memory_percent")?,
        logs: entry.text("logs")?.unwrap_or_default(),
    })
}

/// A node's usage as a cluster keeps it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Information {
    pub cpu_percent: f64,
    pub vcpus: u64,
    pub memory_percent: f64,
    pub memory_available_mib: u64,
}

/// Reads a node's usage under the names of the newest generation.
///
/// # Errors
/// Where a member that is a number by its meaning is none.
pub fn read_information(bytes: &[u8]) -> Result<Information, Malformed> {
    let members = Members::parse(bytes, MAX_MESSAGE)?;
    let number = |member| members.number(member).map(Option::unwrap_or_default);
    Ok(Information {
        cpu_percent: number("cpu_percent")?,
        vcpus: number("vcpus")? as u64,
        memory_percent: number("memory_percent")?,
        memory_available_mib: number("memory")? as u64,
    })
}
