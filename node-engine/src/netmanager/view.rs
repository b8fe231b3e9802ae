//! What a person may look at: rows of the overlay's tables with names in place of numbers. Copies, made when somebody asks; nothing
//! decides by them.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use netmanager_common::abi::{PEER_OURS, Peer};

use super::datapath::{self, FlowRow, Words};
use crate::model::{InstanceId, ServiceName};

/// The rows that were asked for, and how many there are in all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page<T> {
    pub rows: Vec<T>,
    pub total: usize,
}

impl<T> Page<T> {
    pub(super) fn cut(mut rows: Vec<T>, limit: usize) -> Self {
        let total = rows.len();
        rows.truncate(limit);
        Self { rows, total }
    }
}

/// Which rows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Choice {
    /// Full name of a service, or its third part.
    pub service: Option<String>,
    /// The same of an instance, and its number where one is meant.
    pub instance: Option<(String, Option<u32>)>,
    pub limit: usize,
}

impl Choice {
    pub(super) fn takes_service(&self, service: Option<&ServiceName>) -> bool {
        self.service.as_ref().is_none_or(|wanted| service.is_some_and(|service| called(service, wanted)))
    }

    pub(super) fn takes_instance(&self, instances: &[Option<&InstanceId>]) -> bool {
        let Some((name, number)) = &self.instance else { return true };
        let meant = |instance: &&InstanceId| {
            called(&instance.service, name) && number.is_none_or(|number| number == instance.number)
        };
        instances.iter().flatten().any(meant)
    }
}

fn called(service: &ServiceName, name: &str) -> bool {
    service.as_str() == name || service.short() == name
}

/// A service and the addresses that mean it or one of its instances, each with its label: a policy's, or `instance-N`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Named {
    pub service: ServiceName,
    pub addresses: Vec<(String, IpAddr)>,
}

/// What became of looking up a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lookup {
    Known(Named),
    /// The cluster knows no such service, or none that ever had an instance.
    Unknown,
    /// It is not known here, and the cluster cannot be asked or does not answer.
    Unreachable,
}

/// A service this node knows of.
#[derive(Clone, Debug, PartialEq)]
pub struct ServiceView {
    pub service: ServiceName,
    /// Those that mean the service.
    pub addresses: Vec<AddressView>,
    pub instances: Vec<InstanceView>,
    /// Flows of this node to any of its addresses.
    pub flows: usize,
}

/// An address that means a service.
#[derive(Clone, Debug, PartialEq)]
pub struct AddressView {
    /// Label of its policy.
    pub policy: &'static str,
    pub address: IpAddr,
    /// Numbers of the instances that new flows are sent to, each with its share of them in percent.
    pub candidates: Vec<(u32, f64)>,
}

/// An instance, here or elsewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceView {
    pub number: u32,
    pub weight: u32,
    /// Round trip to its node, where it is measured.
    pub rtt: Option<Duration>,
    /// Flows it was chosen for, where that was asked for; and TCP connections among them that it has answered and refused.
    pub picks: Option<Picks>,
    pub state: State,
    /// Its node; `None` for this one.
    pub node: Option<IpAddr>,
    /// Inside its node's subnets.
    pub namespace: Vec<IpAddr>,
    /// Those that mean exactly this instance.
    pub own: Vec<IpAddr>,
}

/// What became of flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Picks {
    pub chosen: u64,
    pub answered: u64,
    pub refused: u64,
}

/// Does an instance get new flows?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Well,
    /// It is passed over: what it did wrong, and for how long still; nothing where the next flow tries it.
    PassedOver(&'static str, Option<Duration>),
    /// It is on its way out and keeps what it has, for so long still where there is a limit.
    Draining(Option<Duration>),
}

/// Another node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerView {
    pub address: SocketAddr,
    /// Our address towards it.
    pub source: IpAddr,
    /// It has said hello.
    pub ours: bool,
    /// How packets to it are wrapped.
    pub framing: &'static str,
    /// The longest packet on the way there, where it is less than what instances send.
    pub mtu: Option<u32>,
    /// Round trip, where it is measured.
    pub rtt: Option<Duration>,
    /// Slots of the tables that lead to it: one for each instance and family.
    pub slots: usize,
}

/// How packets to a peer are wrapped, in words.
pub(super) fn framing(peer: &Peer) -> &'static str {
    if peer.framed_port == [0, 0] { "bare IP in UDP" } else { "VXLAN" }
}

pub(super) fn is_ours(flags: u32) -> bool {
    flags & PEER_OURS != 0
}

/// A flow from an instance here to a service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FlowView {
    pub row: FlowRow,
    pub client: Option<InstanceId>,
    pub service: Option<ServiceName>,
    /// Label of the policy of the address it uses.
    pub policy: &'static str,
    /// Who was chosen; `None` where the choice is void.
    pub chosen: Option<InstanceId>,
    /// Where the chosen instance is; `None` on this node, or where the choice is void.
    pub node: Option<IpAddr>,
}

/// A counter with its sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CounterView {
    pub name: String,
    pub value: u64,
    pub words: Option<Words>,
}

impl CounterView {
    pub(super) fn new((name, value): (String, u64)) -> Self {
        let words = datapath::explain(&name);
        Self { name, value, words }
    }
}
