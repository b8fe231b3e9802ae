//! The control side of what carries packets. A datapath is told the projection of the service table by [`TableDelta`]s, the only
//! way its tables change, and says what it misses. Packets never pass through this trait.
//!
//! ```text
//! tun      TUN device + UDP socket ── proxy (the law in user space, held packets) ── MemoryTables
//! ebpf     kernel programs at veths and uplink; what they leave alone goes the same way, over BpfTables
//! ladder   the two as one datapath, that stands on the fastest rung and changes it while packets flow
//! memory   a fake for tests of whoever steers a datapath
//! ```
//!
//! This directory knows neither where rows come from nor who asks the cluster for missing ones.

mod any;
mod batch;
mod capacity;
mod carry;
mod choose;
mod counters;
mod device;
mod ebpf;
mod errors;
mod flows;
mod fragments;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzed;
mod held;
mod host;
mod join;
mod ladder;
mod memory;
mod merge;
mod offload;
mod pod;
mod probe;
mod projection;
mod proxy;
mod refusal;
mod sheet;
mod socket;
mod tables;
mod tun;
mod watch;
mod words;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use async_trait::async_trait;
use netmanager_common::abi::{Answers, Config, Endpoint, FLOW_CHOSEN, Flow, FlowKey, Peer, Service, Slot};
use netmanager_common::addr::Addr;

use crate::config::{DatapathChoice, XdpChoice};

pub use capacity::Capacity;
pub use choose::{Chosen, choose};
pub use ebpf::{Change, Outlook, outlook, uninstall};
pub use ladder::Ladder;
pub use memory::Memory;
pub use words::{Kind, Words, explain};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use {
    ebpf::layouts,
    offload::round_trip as offload_round_trip,
    sheet::{round_trip as sheet_round_trip, sample as sheet_sample},
};

/// A carrier of packets under the law of `netmanager-common`.
#[async_trait]
pub trait Datapath: Send + Sync {
    /// `ebpf` or `tun`.
    fn name(&self) -> &'static str;

    /// On which rung it stands.
    fn standing(&self) -> Standing {
        Standing { rung: self.name(), reason: String::new() }
    }

    /// Goes on by the datapath of this choice while packets flow; with `Auto`, by the fastest that works. `why`: a person's reason, where
    /// it is not the fastest. The port for framed packets must be free where the choice is TUN.
    async fn switch(&self, _choice: DatapathChoice, _why: &str) -> Result<(), DatapathError> {
        Err(DatapathError::Unsupported { what: "switch", reason: format!("{} has no other rung", self.name()) })
    }

    /// Begins (or continues) to carry what the instance behind this port sends. Repeatable.
    async fn attach(&self, port: &Port) -> Result<(), DatapathError>;

    /// Stops carrying for this port. A port that is not attached, or whose interface is gone, is a success.
    async fn detach(&self, port: &Port) -> Result<(), DatapathError>;

    /// Takes in what peers send at the interfaces with these indices, and at no others. Repeatable; cheap where nothing changes.
    async fn follow(&self, _uplinks: &BTreeSet<u32>) -> Result<(), DatapathError> {
        Ok(())
    }

    /// What the tables hold: after a restart the rows of the previous run, so that slots keep their numbers and generations, services
    /// their ids, and flows their instances. Empty where nothing outlives the process.
    async fn snapshot(&self) -> Result<Snapshot, DatapathError>;

    /// Applies `full` and then removes every service, endpoint and candidate it does not name; a live slot it does not name loses its
    /// instance. Flows stay. For the first change after a start.
    async fn reconcile(&self, full: &TableDelta) -> Result<(), DatapathError>;

    /// Changes the tables, in the order that never leaves a packet with a half-written row: peers, slots and endpoints that come,
    /// then services, then what goes. Applying the same delta twice changes nothing.
    async fn apply(&self, delta: &TableDelta) -> Result<(), DatapathError>;

    /// Do framed packets want a device that makes the kernel join them?
    fn joins_framed(&self) -> bool {
        false
    }

    /// Takes in framed packets that come to this port from now on, whatever the rung. Where [`Self::joins_framed`], also
    /// [`Self::take_framed`] is wanted. Repeatable.
    async fn take_framed_at(&self, port: u16) -> Result<(), DatapathError> {
        let reason = format!("{} carries no framed packets, and none on port {port}", self.name());
        Err(DatapathError::Unsupported { what: "take framed packets", reason })
    }

    /// Takes in framed packets from now on. `device`: a VXLAN device on their port, still down, whose only use is that the kernel joins
    /// them. Repeatable, also with another device.
    async fn take_framed(&self, device: &Port) -> Result<(), DatapathError> {
        let reason = format!("{} carries no framed packets", self.name());
        let reason = format!("{}: {reason}", device.name);
        Err(DatapathError::Unsupported { what: "take framed packets", reason })
    }

    /// The next thing the datapath does not know or has heard; pends until there is one. Each address is reported once until it is
    /// resolved by `apply` or given up by `give_up`, however many packets wait for it.
    async fn event(&self) -> Event;

    /// Nobody knows this address: what waits for it is dropped, and for a while so is what comes for it.
    async fn give_up(&self, address: Addr);

    /// Sends a control datagram to a peer's tunnel port, from ours.
    async fn send_control(&self, to: std::net::SocketAddr, payload: &[u8]) -> Result<(), DatapathError>;

    /// Sends a control datagram to a peer's tunnel port that arrives whole or not at all: nobody on the way cuts it.
    async fn send_whole(&self, to: std::net::SocketAddr, payload: &[u8]) -> Result<(), DatapathError>;

    /// The flows that are remembered now, for people to look at. Rows come and go while they are read.
    async fn flows(&self) -> Result<Vec<FlowRow>, DatapathError>;

    /// What became of the flows for which each of these slots was chosen since its instance came; slot 0 has the sum of what was asked.
    async fn tallies(&self, slots: Vec<u32>) -> Vec<Tally>;

    /// Differs from what it was whenever somebody may have begun a connection or got an answer since; cheap to ask for.
    fn bustle(&self) -> u64;

    /// Packets that were to go to peers; after a change of rung it may be less than before.
    fn sent(&self) -> u64;

    /// Counter names and values: verdicts, and drops by reason.
    fn counters(&self) -> Vec<(String, u64)>;
}

/// Where a datapath stands, and why not higher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// `ebpf`, `ebpf-plain` or `tun`.
    pub rung: &'static str,
    /// Empty on the highest.
    pub reason: String,
}

/// The host end of an instance's veth.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    pub name: String,
    pub ifindex: u32,
}

/// Changes to the projection of the service table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableDelta {
    /// Replaces the one row of configuration.
    pub config: Option<Config>,
    pub peers: Vec<(u32, Peer)>,
    /// Also removals: a slot whose generation is even.
    pub slots: Vec<(u32, Slot)>,
    pub endpoints: Vec<(Addr, Endpoint)>,
    /// By a service's id, the slot that one new flow shall try; 0: none.
    pub trials: Vec<(u32, u32)>,
    /// A service row with the whole list of its candidates' slots, in the epoch the row names.
    pub services: Vec<(Addr, Service, Vec<u32>)>,
    pub services_gone: Vec<Addr>,
    pub endpoints_gone: Vec<Addr>,
}

/// Flows for which a slot was chosen, and what became of them. Counts begin anew with an instance, and wrap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub chosen: u64,
    /// Those that are TCP connections.
    pub answers: Answers,
}

/// What the tables hold, as far as it was written by [`Datapath::apply`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// The configuration's: it must go on from there, or flows would trust what they have noted of another time.
    pub epoch: u32,
    /// Every slot that ever had an instance, live or not: its generation must go on from there.
    pub slots: Vec<(u32, Slot)>,
    pub peers: Vec<(u32, Peer)>,
    pub services: Vec<(Addr, Service)>,
    pub endpoints: Vec<(Addr, Endpoint)>,
}

/// A flow as a person may look at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct FlowRow {
    /// Namespace address of the sender.
    pub source: Addr,
    /// The semantic address it uses.
    pub service: Addr,
    /// An echo's identifier for ICMP.
    pub source_port: u16,
    pub service_port: u16,
    pub protocol: u8,
    /// The chosen instance; void once the slot's generation differs.
    pub slot: u32,
    pub generation: u32,
    /// Since the last packet, where the datapath knows it.
    pub idle: Option<std::time::Duration>,
}

impl FlowRow {
    /// The row of a flow that has chosen an instance, at `now`; `None` for what only remembers replies or saves look-ups.
    fn chosen(key: &FlowKey, flow: &Flow, now: u32) -> Option<Self> {
        (flow.kind == FLOW_CHOSEN).then(|| Self {
            source: key.source,
            service: key.destination,
            source_port: u16::from_be_bytes(key.source_port),
            service_port: u16::from_be_bytes(key.destination_port),
            protocol: key.protocol as u8,
            slot: flow.slot,
            generation: flow.generation,
            idle: Some(std::time::Duration::from_secs(now.saturating_sub(flow.seen).into())),
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A packet waits for this service address, or came from this instance address, and no row knows it.
    UnknownService(Addr),
    /// An instance on this node sends before its own instance address is known. The address is its namespace address.
    UnknownEndpoint(Addr),
    /// A datagram on the tunnel port that is not a packet: first nibble neither 4 nor 6.
    Control { from: std::net::SocketAddr, payload: Vec<u8> },
    /// The kernel takes programs away, for this reason: the datapath carries on below them, and is to [`Datapath::switch`] to TUN.
    Lost(String),
    /// The datapath carries no more, for this reason.
    Failed(String),
}

#[derive(Debug, thiserror::Error)]
pub enum DatapathError {
    /// This datapath cannot work on this machine; the next rung may.
    #[error("{what}: {reason}")]
    Unsupported { what: &'static str, reason: String },
    /// The same, in words that say it all.
    #[error("{0}")]
    Refused(String),
    #[error("{step}: {reason}")]
    Step { step: &'static str, reason: String },
    #[error("{0} is full")]
    Full(&'static str),
    /// The programs of before carry on, and whoever put them there is to be started again.
    #[error("the programs of this version were put back, as they do not carry packets as they should: {0}")]
    WentBack(String),
}

/// What a datapath needs to know of the node when it is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Underlay {
    pub uplink: String,
    pub uplink_ifindex: u32,
    /// This node's address towards its peers.
    pub address: IpAddr,
    pub tunnel_port: u16,
    /// The TUN device: the slow path, and the whole path where there is no eBPF.
    pub tun_name: String,
    pub tun_v4: Ipv4Addr,
    pub tun_v6: Ipv6Addr,
    pub mtu: u32,
    /// Networks whose addresses are service addresses.
    pub service_v4: (Ipv4Addr, u8),
    pub service_v6: (Ipv6Addr, u8),
    pub capacity: Capacity,
    /// Where programs, links and maps are pinned, on a bpffs.
    pub pin_dir: std::path::PathBuf,
    /// Whether what does not belong is dropped in the uplink's driver.
    pub xdp: XdpChoice,
    /// Where tables in memory are kept for the next run; a reboot forgets it.
    pub table_dir: std::path::PathBuf,
}
