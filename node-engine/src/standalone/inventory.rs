//! What the manager knows: nodes, services and their instances. Plain state; the rules are in `core`.
//!
//! **Instance numbers.** A service counts its instances from 0 upward and never uses a number twice. An instance that fails is
//! deployed again under its own number and keeps its instance address, be it on another node. A move is a new instance: the
//! replacement gets the next number and an instance address of its own, because for a while both run.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use crate::model::{InstanceId, NodeId, Policy, PortMapping, ServiceName, Status, Subnet, TableRow, Technology};

/// Time since the manager started. It never goes backward and does not know the date.
pub(super) type Moment = Duration;

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Node {
    pub(super) id: NodeId,
    /// The node's identity: who registers under this name is this node.
    pub(super) host: String,
    pub(super) facts: NodeFacts,
    pub(super) subnet: Option<Subnet>,
    /// When it last reported over the broker; `None` since a registration, so that nothing is sent to a node that cannot hear
    /// it yet.
    pub(super) seen: Option<Moment>,
}

/// What a node says about itself. At a registration what is absent is unknown; in a report it has not changed.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct NodeFacts {
    pub(super) address: Option<IpAddr>,
    /// Only stored, and repeated in deploy documents.
    pub(super) port: Option<String>,
    /// Go style: `amd64`, `arm64`, `arm`.
    pub(super) architecture: Option<String>,
    pub(super) technologies: BTreeSet<Technology>,
    pub(super) vcpus: Option<u64>,
    pub(super) vgpus: Option<u64>,
    pub(super) memory_available_mib: Option<u64>,
    pub(super) cpu_percent: Option<f64>,
    pub(super) memory_percent: Option<f64>,
}

impl NodeFacts {
    /// Takes over what `newer` says. Upstream nodes report empty static members, which therefore say nothing.
    pub(super) fn update(&mut self, newer: Self) {
        fn newer_of<T>(old: &mut Option<T>, new: Option<T>) {
            if new.is_some() {
                *old = new;
            }
        }
        newer_of(&mut self.address, newer.address);
        newer_of(&mut self.port, newer.port);
        newer_of(&mut self.architecture, newer.architecture);
        newer_of(&mut self.vcpus, newer.vcpus);
        newer_of(&mut self.vgpus, newer.vgpus);
        newer_of(&mut self.memory_available_mib, newer.memory_available_mib);
        newer_of(&mut self.cpu_percent, newer.cpu_percent);
        newer_of(&mut self.memory_percent, newer.memory_percent);
        if !newer.technologies.is_empty() {
            self.technologies = newer.technologies;
        }
    }
}

/// What somebody asked for, checked. The document is the description as it came, which the nodes get back.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Request {
    pub(super) name: ServiceName,
    pub(super) document: Arc<str>,
    /// As written (`container`, `docker`, …); repeated in deletes.
    pub(super) virtualization: String,
    pub(super) one_shot: bool,
    pub(super) needs: Needs,
    pub(super) ports: Vec<PortMapping>,
    pub(super) image: String,
    /// Asked-for round robin addresses.
    pub(super) round_robin_v4: Option<Ipv4Addr>,
    pub(super) round_robin_v6: Option<Ipv6Addr>,
    /// Policies besides round robin, each of which gets addresses of its own.
    pub(super) policies: BTreeSet<Policy>,
    /// By instance number, where it is not the usual one.
    pub(super) weights: BTreeMap<u32, u32>,
}

/// What a node must have to be chosen.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Needs {
    pub(super) memory_mib: u64,
    pub(super) vcpus: u64,
    pub(super) vgpus: u64,
    /// Any of these; empty: any at all.
    pub(super) architectures: Vec<String>,
    /// Ids or host names, any of these; empty: any at all.
    pub(super) nodes: Vec<String>,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Service {
    /// The `_id` of the job document.
    pub(super) job: String,
    pub(super) request: Request,
    pub(super) round_robin: AddressPair,
    /// The addresses of the other policies. Once given they stay.
    pub(super) policies: BTreeMap<Policy, AddressPair>,
    pub(super) next_number: u32,
    pub(super) instances: BTreeMap<u32, Instance>,
}

impl Service {
    pub(super) fn technology(&self) -> Technology {
        Technology::from(self.request.virtualization.as_str())
    }

    pub(super) fn instance_id(&self, number: u32) -> InstanceId {
        InstanceId { service: self.request.name.clone(), number }
    }

    /// All addresses that mean the service, round robin first.
    pub(super) fn addresses(&self) -> impl Iterator<Item = (Policy, AddressPair)> {
        let others = self.policies.iter().map(|(policy, pair)| (*policy, *pair));
        std::iter::once((Policy::RoundRobin, self.round_robin)).chain(others)
    }

    /// Nothing until it is ready.
    pub(super) fn weight(&self, instance: &Instance) -> u32 {
        let weight = self.request.weights.get(&instance.number).copied().unwrap_or(TableRow::DEFAULT_WEIGHT);
        if instance.ready() { weight } else { 0 }
    }

    /// Instances that somebody wants: not those that are being retired, and of a move's two only the one that is replaced.
    pub(super) fn wanted(&self) -> Vec<u32> {
        let stays = |instance: &&Instance| {
            let replaced = instance.replaces.filter(|old| self.instances.contains_key(old));
            !matches!(instance.phase, Phase::Retiring { .. }) && replaced.is_none()
        };
        self.instances.values().filter(stays).map(|instance| instance.number).collect()
    }

    /// The instance that is being brought up in place of `number`.
    pub(super) fn replacement_of(&self, number: u32) -> Option<u32> {
        self.instances.values().find(|instance| instance.replaces == Some(number)).map(|instance| instance.number)
    }
}

/// An address of each family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct AddressPair {
    pub(super) v4: Ipv4Addr,
    pub(super) v6: Ipv6Addr,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Instance {
    pub(super) number: u32,
    /// The addresses that mean this instance.
    pub(super) address: AddressPair,
    pub(super) phase: Phase,
    /// Why, where the phase needs a reason.
    pub(super) detail: String,
    /// Where it runs or shall run.
    pub(super) node: Option<NodeId>,
    /// Its network, once the node said it is up.
    pub(super) deployed: Option<Deployed>,
    /// It may run only there.
    pub(super) pin: Option<NodeId>,
    /// The instance that goes when this one runs.
    pub(super) replaces: Option<u32>,
    /// When its node last spoke of it.
    pub(super) heard: Moment,
    /// Attempts that ended badly, since it last ran for a while.
    pub(super) failures: u32,
    pub(super) usage: InstanceUsage,
}

impl Instance {
    /// A row of the table has addresses only while the instance can be reached.
    pub(super) fn reachable(&self) -> Option<&Deployed> {
        match self.phase {
            Phase::Scheduled | Phase::Creating | Phase::Created | Phase::Running { .. } => self.deployed.as_ref(),
            Phase::Waiting { .. }
            | Phase::Lost { .. }
            | Phase::Failed { .. }
            | Phase::Dead { .. }
            | Phase::Undeployed { .. }
            | Phase::Completed
            | Phase::Retiring { .. } => None,
        }
    }
}

impl Instance {
    /// Its program runs. Before that it can be reached, but may not listen yet; a replacement waits for its turn.
    pub(super) const fn ready(&self) -> bool {
        matches!(self.phase, Phase::Running { .. }) && self.replaces.is_none()
    }
}

/// Where the life of an instance stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// No node yet; the next search is due at the moment given.
    Waiting {
        retry: Moment,
        searched: bool,
    },
    /// The deploy was sent.
    Scheduled,
    Creating,
    Created,
    Running {
        since: Moment,
    },
    /// Its node fell silent. Where no other can take it, it may come back as it was.
    Lost {
        retry: Moment,
    },
    /// Its node said so. `None`: it is not tried again.
    Failed {
        retry: Option<Moment>,
    },
    Dead {
        retry: Option<Moment>,
    },
    /// Its node took it down unasked.
    Undeployed {
        retry: Moment,
    },
    /// One-shot, ended well.
    Completed,
    /// Gone from the table; the delete follows at the moment given, when the peers know.
    Retiring {
        delete: Moment,
    },
}

impl Phase {
    /// The word of the wire.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Waiting { searched: false, .. } => "REQUESTED",
            Self::Waiting { searched: true, .. } => "NO_WORKER_CAPACITY",
            Self::Scheduled => "NODE_SCHEDULED",
            Self::Creating => Status::Creating.as_str(),
            Self::Created => Status::Created.as_str(),
            Self::Running { .. } => Status::Running.as_str(),
            Self::Lost { .. } | Self::Failed { .. } => Status::Failed.as_str(),
            Self::Dead { .. } => Status::Dead.as_str(),
            Self::Undeployed { .. } | Self::Retiring { .. } => Status::Undeployed.as_str(),
            Self::Completed => Status::Completed.as_str(),
        }
    }

    /// When to look for a node again; `None` where there is nothing to look for.
    pub(super) fn retry(self) -> Option<Moment> {
        match self {
            Self::Waiting { retry, .. } | Self::Lost { retry } | Self::Undeployed { retry } => Some(retry),
            Self::Failed { retry } | Self::Dead { retry } => retry,
            Self::Scheduled
            | Self::Creating
            | Self::Created
            | Self::Running { .. }
            | Self::Completed
            | Self::Retiring { .. } => None,
        }
    }

    /// A node is expected to speak of it.
    pub(super) fn placed(self) -> bool {
        matches!(self, Self::Scheduled | Self::Creating | Self::Created | Self::Running { .. })
    }
}

/// The network of an instance as its node reported it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Deployed {
    pub(super) namespace_v4: Ipv4Addr,
    pub(super) namespace_v6: Option<Ipv6Addr>,
    pub(super) host: IpAddr,
    pub(super) host_port: u16,
}

/// What a running instance uses, in the words of the report.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct InstanceUsage {
    pub(super) cpu_percent: String,
    pub(super) memory_percent: String,
    pub(super) disk: String,
    pub(super) logs: String,
}
