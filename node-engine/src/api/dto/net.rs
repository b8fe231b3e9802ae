//! Tables of the overlay, as they go over the socket and as `node-engine net … --json` prints them.

use serde::{Deserialize, Serialize};

/// Query of `GET /net/flows` and `GET /net/services`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Choice {
    /// `web`, or its full name.
    pub service: Option<String>,
    /// `web`, `web#0`, or with the full name.
    pub instance: Option<String>,
    /// Rows at most.
    pub limit: Option<usize>,
}

/// What carries the packets, and why nothing faster does.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Datapath {
    /// `ebpf`, `ebpf-plain` or `tun`.
    pub datapath: String,
    pub reason: String,
}

/// Rows, and how many there are in all: more than rows where the limit was reached.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Page<T> {
    pub total: usize,
    pub rows: Vec<T>,
}

/// A flow from an instance on this node to a service address. Traffic to an instance's own address needs no choice and is none.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Flow {
    /// `app.default.web.default#0`; empty where the client has gone.
    pub client: String,
    pub client_address: String,
    /// An echo's identifier for ICMP.
    pub client_port: u16,
    pub service: String,
    pub service_address: String,
    /// 0 for ICMP.
    pub service_port: u16,
    /// How the address chooses: `rr`, `closest`, …
    pub policy: String,
    /// `tcp`, `udp`, `icmp`, `icmp6`, or the protocol's number.
    pub protocol: String,
    /// The chosen instance; empty where it has gone, and the next packet chooses anew.
    pub instance: String,
    /// Address of the chosen instance's node; `here` on this one.
    pub node: String,
    /// Since the last packet, where it is known.
    pub idle_seconds: Option<f64>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Service {
    pub service: String,
    /// Those that mean the service.
    pub addresses: Vec<ServiceAddress>,
    pub instances: Vec<ServiceInstance>,
    /// Flows of this node's instances to any of its addresses.
    pub flows: usize,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ServiceAddress {
    pub policy: String,
    pub address: String,
    /// Whom new flows are sent to.
    pub candidates: Vec<Candidate>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Candidate {
    /// Number of the instance.
    pub number: u32,
    /// Percent of new flows.
    pub share: f64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ServiceInstance {
    pub number: u32,
    /// `well`, `passed over` or `draining`.
    pub state: String,
    /// Why it is passed over; empty otherwise.
    pub reason: String,
    /// Until it is tried again, or until its flows are ended, where that is known.
    pub seconds_left: Option<f64>,
    pub weight: u32,
    /// Round trip to its node, where it is measured.
    pub rtt_ms: Option<f64>,
    /// Flows of this node that it was chosen for, where one service is asked for.
    pub chosen: Option<u64>,
    /// TCP connections among them that it has answered, and refused.
    pub answered: Option<u64>,
    pub refused: Option<u64>,
    /// Address of its node; `here` on this one.
    pub node: String,
    /// Inside its node's subnets.
    pub namespace: Vec<String>,
    /// Those that mean exactly this instance.
    pub addresses: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Peer {
    /// Node and tunnel port.
    pub address: String,
    /// This node's address towards it.
    pub source: String,
    /// It runs node-engine; else it is taken for a node of the reference system.
    pub ours: bool,
    /// How packets to it are wrapped.
    pub framing: String,
    /// The longest packet on the way there, where it is less than what instances send.
    pub path_mtu: Option<u32>,
    /// Round trip, where it is measured.
    pub rtt_ms: Option<f64>,
    /// Rows of the tables that lead to it: one for each instance and address family.
    pub slots: usize,
}

/// A counter and its sentence.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Counter {
    pub name: String,
    pub count: u64,
    /// `carried`, `dropped`, `refused`, `level`.
    pub kind: String,
    pub meaning: String,
    /// What to do; empty where nothing is.
    pub advice: String,
}
