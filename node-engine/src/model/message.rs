//! What the cluster says to the node and the node to the cluster, as two closed enums.

use std::net::IpAddr;

use super::{
    Addresses, InstanceId, InstanceSpec, InstanceUsage, NodeIdentity, NodeUsage, Sample, ServiceName, Status, Subnet,
};

/// From the control plane to the node.
#[derive(Clone, Debug)]
pub enum Command {
    /// Bring up this instance. Repeating it for an instance that runs changes nothing.
    Deploy(Box<InstanceSpec>, Receipt),
    /// Take this instance down; answered with `Undeployed` even where it is unknown.
    Delete(InstanceId, Receipt),
    /// The cluster gave the node this identity, at first or anew.
    Registered(NodeIdentity),
    /// The connection to the broker stands (again): whatever may have been missed is asked for anew.
    Connected,
    /// The connection to the broker is lost, and why; nothing stops because of it.
    Disconnected(String),
    /// What is in the way of a connection, where that is something else than before.
    Trouble(String),
    /// Answer to `Report::SubnetRequest`.
    Subnet(Subnet),
    /// Answer to `Report::TableQuery`, or unasked.
    Table(TableAnswer),
    /// Instances of this service came or went: ask again.
    ServiceChanged(ServiceName),
}

/// What comes with an order besides what it says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Receipt {
    /// To be named in `Report::Stored`; `None`: nobody waits for that.
    pub ticket: Option<u64>,
    /// The cluster's own count of its orders, where it has one: of two for the same instance the one that counts less is older.
    pub generation: Option<u64>,
}

/// From the node to the control plane. Each becomes at most one wire message; the control plane adds node id, tunnel port
/// and node address.
#[derive(Clone, Debug)]
pub enum Report {
    /// The order with this ticket cannot get lost any more, or has been refused: the cluster need not say it again.
    Stored(u64),
    Status {
        instance: InstanceId,
        status: Status,
        detail: String,
    },
    /// The instance's network is up: its namespace addresses, reachable through this node.
    Deployed {
        instance: InstanceId,
        addresses: Addresses,
    },
    /// This node's address towards its peers is another now.
    Address(IpAddr),
    SubnetRequest,
    TableQuery(Query),
    /// Hear of changes to this service.
    InterestAdd(ServiceName),
    InterestRemove(ServiceName),
    Node(Box<NodeUsage>),
    /// Every instance that really runs now. Empty is a statement too.
    Instances(Vec<InstanceUsage>),
    Sensor(Box<Sample>),
}

/// What a table is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Query {
    Name(ServiceName),
    Address(IpAddr),
}

/// Rows of the cluster's service table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableAnswer {
    /// What was asked, where the cluster repeats it (`query_key`; clusters before v0.4.202 do not).
    pub query: Option<Query>,
    /// `None` where the cluster knows no such service.
    pub service: Option<ServiceName>,
    /// Instances that have an address; those still without one are left out.
    pub rows: Vec<TableRow>,
}

/// One instance as the service table has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableRow {
    pub number: u32,
    /// Addresses inside the instance's node subnets.
    pub namespace: FamilyPair,
    /// The addresses that mean exactly this instance, and that it sends from.
    pub instance: FamilyPair,
    /// The node that runs it, and its tunnel port.
    pub host: IpAddr,
    pub host_port: u16,
    /// How much of what is shared by weight it gets; also its rank among those that stand in for each other.
    pub weight: u32,
    /// Semantic addresses of the service (not those in `instance`).
    pub services: Vec<SemanticAddress>,
}

impl TableRow {
    /// What an instance weighs where nobody says it.
    pub const DEFAULT_WEIGHT: u32 = 1;
    /// The heaviest.
    pub const MAX_WEIGHT: u32 = 100;
}

/// An address per family, where there is one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FamilyPair {
    pub v4: Option<std::net::Ipv4Addr>,
    pub v6: Option<std::net::Ipv6Addr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SemanticAddress {
    pub policy: Policy,
    pub address: IpAddr,
}

/// How an instance is chosen behind a semantic address. What is chosen is chosen for a new flow; a flow stays with what it got.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Policy {
    /// One after the other.
    RoundRobin,
    /// Any.
    Random,
    /// The one with the shortest round trip from here.
    Closest,
    /// Those with the least to do get the most.
    Underutilised,
    /// The same one for the same client, as long as it lives.
    Sticky,
    /// By the weights of the instances.
    Weighted,
    /// One on the client's own node, where there is any.
    LocalFirst,
    /// The first that lives: by weight, then by number.
    FailOver,
}

impl Policy {
    pub const ALL: [Self; 8] = [
        Self::RoundRobin,
        Self::Random,
        Self::Closest,
        Self::Underutilised,
        Self::Sticky,
        Self::Weighted,
        Self::LocalFirst,
        Self::FailOver,
    ];

    /// The word for it in tables, descriptions and names: a DNS label.
    pub const fn label(self) -> &'static str {
        match self {
            Self::RoundRobin => "rr",
            Self::Random => "random",
            Self::Closest => "closest",
            Self::Underutilised => "underutilised",
            Self::Sticky => "sticky",
            Self::Weighted => "weighted",
            Self::LocalFirst => "local",
            Self::FailOver => "failover",
        }
    }

    pub fn from_label(label: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|policy| policy.label() == label)
    }
}
