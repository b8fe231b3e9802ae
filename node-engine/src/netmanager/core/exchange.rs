//! What goes into the core, and what comes out of it.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use netmanager_common::addr::Addr;

use crate::model::{Addresses, Command, InstanceId, NodeId, PortMapping, Report, Subnet};
use crate::netmanager::connect::{Made, Step};
use crate::netmanager::datapath::{Event as DatapathEvent, Port, TableDelta, Tally};
use crate::netmanager::lease::Leases;
use crate::netmanager::link::Bridge;
use crate::netmanager::memory::Learned;
use crate::netmanager::table::Way;
use crate::netmanager::{Attachment, Lease, NetError};

/// Published ports, and where each leads.
pub(in crate::netmanager) type Published = Vec<(PortMapping, Addresses)>;

/// Somebody who waits for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::netmanager) struct Waiter(pub(in crate::netmanager) u64);

#[derive(Clone, Debug)]
pub(in crate::netmanager) enum Event {
    Attach(Attachment, Waiter),
    Detach(InstanceId, Waiter),
    /// Of all instances on this node only these exist.
    Retain(Vec<InstanceId>),
    Command(Command),
    Datapath(DatapathEvent),
    /// A step of a connection has ended.
    Stepped {
        instance: InstanceId,
        step: Step,
        result: Result<Made, String>,
    },
    /// `Publish` has ended.
    Published(Result<(), String>),
    /// `Upkeep` has ended: the bridge, and the veths that are there.
    Kept(Result<(Bridge, Vec<(InstanceId, u32)>), String>),
    /// `FindUplink` has found this.
    Uplink {
        address: IpAddr,
        way: Way,
    },
    /// The ways to these nodes, as far as there are any.
    Ways(Vec<(IpAddr, Way)>),
    /// What became of the flows for which slots were chosen.
    Tallied(Vec<(u32, Tally)>),
    /// Flows of this node by slot.
    Flows(HashMap<u32, u32>),
    /// Links, addresses or routes of the host have changed.
    HostChanged,
    /// The datapath did not take a change.
    ApplyFailed,
    /// It is time for a path ([`Core::paths_due`]).
    PathsDue,
    Tick,
}

#[derive(Debug)]
pub(in crate::netmanager) enum Effect {
    AttachVeth {
        instance: InstanceId,
        netns: PathBuf,
        /// Only where the path leads to this namespace.
        inode: Option<u64>,
        subnet: Subnet,
        addresses: Addresses,
    },
    DetachVeth(InstanceId),
    /// Attaches the datapath, and detaches it from a veth that this one replaces.
    Carry {
        instance: InstanceId,
        port: Port,
        replaces: Option<Port>,
    },
    /// Detaches the datapath.
    Release {
        instance: InstanceId,
        port: Port,
    },
    /// Ends the instance's step when all deltas before it are applied.
    Settle(InstanceId),
    Publish(Subnet, Published),
    /// Makes bridge and routes where they are missing.
    Upkeep(Subnet),
    FindUplink,
    FindWays(Vec<IpAddr>),
    Apply(TableDelta),
    /// Makes the datapath's tables exactly this.
    Reconcile(TableDelta),
    GiveUp(Addr),
    SendControl(SocketAddr, Vec<u8>),
    /// The same, and nobody may cut it.
    SendWhole(SocketAddr, Vec<u8>),
    Report(Report),
    SaveSubnet(NodeId, Subnet),
    KeepLeases(Leases),
    /// To be remembered over a reboot.
    Remember(BTreeMap<InstanceId, Addresses>),
    Learn(Learned),
    Attached(Waiter, Result<Lease, NetError>),
    Detached(Waiter, Result<(), NetError>),
    /// A sentence for an operator.
    Warn(String),
}
