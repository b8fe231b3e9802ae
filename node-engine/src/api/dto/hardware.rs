//! What the machine is made of, as it goes over the socket and as `node-engine hardware --json` prints it.

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hardware {
    pub machine: String,
    pub firmware: String,
    pub cpu: Cpu,
    pub memory_bytes: u64,
    pub disks: Vec<Disk>,
    pub networks: Vec<Network>,
    pub gpus: Vec<Gpu>,
    /// What is attached; an instance is given one by its name.
    pub devices: Vec<Device>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cpu {
    pub model: String,
    pub architecture: String,
    pub logical: u32,
    /// 0 where it is not known.
    pub physical: u32,
    pub max_mhz: Option<f64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Disk {
    pub name: String,
    pub model: String,
    pub size_bytes: u64,
    pub rotational: bool,
    pub removable: bool,
    /// Percent of its life, where it tells.
    pub life_used_percent: Option<f64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Network {
    pub name: String,
    pub driver: String,
    pub address: String,
    pub state: String,
    pub mtu: u32,
    pub speed_mbit: Option<u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Gpu {
    pub name: String,
    pub vendor: String,
    pub driver: String,
    /// PCI slot or platform name.
    pub place: String,
    /// `vendor:device` on PCI.
    pub id: String,
    pub usage_percent: Option<f64>,
    pub memory_total_mib: Option<u64>,
    pub memory_used_mib: Option<u64>,
    pub temperature_celsius: Option<f64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Device {
    pub name: String,
    pub kind: String,
    pub description: String,
    /// What tells it from others of its kind wherever it is plugged in.
    pub id: String,
    /// Device nodes.
    pub nodes: Vec<String>,
    pub readings: Vec<Reading>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Reading {
    pub channel: String,
    pub value: f64,
    pub unit: String,
}
