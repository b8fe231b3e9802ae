//! The manager's rules: what a node says, what a person orders and what time brings go in; messages to publish come out. It does
//! no I/O; clock and randomness are arguments.
//!
//! The rules are those of the reference cluster (freshness, silence, redeploy, zombies) with these differences, each towards
//! losing less: a deploy that no node reacts to is sent again; redeploys back off; an instance whose node fell silent is not
//! given up before another node can take it; nothing a node sends ends the manager.
//!
//! Interests are not kept: every change of a service's rows is published, and the broker knows who listens.

mod orders;
mod timers;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use crate::model::{InstanceId, NodeId, Policy, Query, ServiceName, Status, Subnet};

use super::address::{AddressPlan, Pool};
use super::inventory::{AddressPair, Deployed, Instance, InstanceUsage, Moment, Node, NodeFacts, Phase, Service};

/// A node is fresh while it reported within this time.
pub(super) const FRESH: Duration = Duration::from_secs(30);

/// So many nodes may register. Their tunnels make a full mesh; a cluster of this size has long outgrown one process.
const MAX_NODES: usize = 4096;

/// A sample of what runs may be so much older than a status: the topics are not ordered among each other.
const LATE_SAMPLES: Duration = Duration::from_secs(10);

/// Numbers of orders that one save makes good for.
pub(super) const ORDERS_RESERVED: u64 = 4096;

/// Longest reason that is kept of what a node says.
const MAX_DETAIL: usize = 1024;

/// What is to be said. Each becomes one MQTT message.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Message {
    Deploy(Box<DeployOrder>),
    Delete { node: NodeId, instance: InstanceId, virtualization: String, generation: u64 },
    NotRegistered { node: NodeId },
    Subnet { node: NodeId, subnet: Subnet },
    Table { node: NodeId, answer: Table },
    Changed { service: ServiceName, change: Change },
}

/// An instance for a node, with what its job document says of service and node. Other instances are not in it: a large service
/// would be described to every node of it with all its instances.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct DeployOrder {
    pub(super) node: NodeId,
    pub(super) instance: InstanceId,
    pub(super) job: String,
    pub(super) document: Arc<str>,
    pub(super) round_robin: AddressPair,
    pub(super) next_number: u32,
    pub(super) host: Option<IpAddr>,
    pub(super) port: Option<String>,
    /// Of all orders of this cluster, the one that counts more is newer.
    pub(super) generation: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Change {
    Deployment,
    Undeployment,
}

/// The answer to a table query.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Table {
    pub(super) query: Query,
    /// Absent where no service has the name or address.
    pub(super) service: Option<ServiceName>,
    pub(super) rows: Vec<Row>,
}

/// One instance. Without a network it is listed all the same, as the reference does.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Row {
    pub(super) number: u32,
    pub(super) node: Option<NodeId>,
    pub(super) address: AddressPair,
    pub(super) services: Vec<(Policy, AddressPair)>,
    pub(super) deployed: Option<Deployed>,
    /// 0: new flows go to others, as far as there are any.
    pub(super) weight: u32,
}

/// One instance in a node's report of what runs.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Sample {
    pub(super) instance: InstanceId,
    pub(super) virtualization: String,
    pub(super) usage: InstanceUsage,
}

/// What is to be done, in this order: save where `save` is set, then publish.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Effects {
    pub(super) save: bool,
    pub(super) messages: Vec<Message>,
}

/// Why a registration is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum RegisterError {
    #[error("{MAX_NODES} nodes have registered, and there may be no more")]
    TooMany,
}

#[derive(Debug)]
pub(super) struct Core {
    pub(super) cluster_id: NodeId,
    pub(super) plan: AddressPlan,
    /// By host name, which is a node's identity.
    pub(super) nodes: BTreeMap<String, Node>,
    hosts: HashMap<NodeId, String>,
    pub(super) services: BTreeMap<ServiceName, Service>,
    /// Where the next subnet is looked for. Subnets are never taken back.
    pub(super) next_subnet: u32,
    pub(super) services_v4: Pool,
    pub(super) round_robin_v6: Pool,
    pub(super) instances_v6: Pool,
    /// Orders given so far, and how far the saved state lets them be counted.
    orders: u64,
    pub(super) orders_reserved: u64,
    effects: Effects,
    /// Services whose rows may have changed since the last effects were taken.
    touched: BTreeSet<ServiceName>,
    /// The rows of each service as the peers were last told.
    told: BTreeMap<ServiceName, BTreeMap<u32, (Deployed, u32)>>,
    /// Nodes that have just been heard again, and when: what they were told before that may have been lost with a broker.
    back: HashMap<NodeId, Moment>,
}

impl Core {
    pub(super) fn new(cluster_id: NodeId, plan: AddressPlan) -> Self {
        Self {
            cluster_id,
            nodes: BTreeMap::new(),
            hosts: HashMap::new(),
            services: BTreeMap::new(),
            next_subnet: 0,
            services_v4: plan.services_v4(),
            round_robin_v6: plan.round_robin_v6(),
            instances_v6: plan.instances_v6(),
            plan,
            orders: 0,
            orders_reserved: 0,
            effects: Effects::default(),
            touched: BTreeSet::new(),
            told: BTreeMap::new(),
            back: HashMap::new(),
        }
    }

    /// Takes the rows as they are for what the peers know: after a restart nobody is told what has not changed.
    pub(super) fn resume(&mut self) {
        self.orders = self.orders_reserved;
        self.told = self.services.iter().map(|(name, service)| (name.clone(), rows_of(service))).collect();
        self.effects = Effects::default();
        self.touched.clear();
    }

    /// What came of everything since the last call.
    pub(super) fn take_effects(&mut self) -> Effects {
        for name in std::mem::take(&mut self.touched) {
            self.tell(name);
        }
        std::mem::take(&mut self.effects)
    }

    /// A node registers. Who comes under a known name is that node; `fresh_id` is for one that is new.
    pub(super) fn register(&mut self, host: &str, facts: NodeFacts, fresh_id: NodeId) -> Result<NodeId, RegisterError> {
        if let Some(node) = self.nodes.get_mut(host) {
            self.effects.save |= node.facts.technologies != facts.technologies || node.facts.address != facts.address;
            node.facts = facts;
            node.seen = None;
            return Ok(node.id.clone());
        }
        if self.nodes.len() >= MAX_NODES {
            return Err(RegisterError::TooMany);
        }
        self.add_node(Node { id: fresh_id.clone(), host: host.to_owned(), facts, subnet: None, seen: None });
        self.effects.save = true;
        Ok(fresh_id)
    }

    pub(super) fn add_node(&mut self, node: Node) {
        self.hosts.insert(node.id.clone(), node.host.clone());
        self.nodes.insert(node.host.clone(), node);
    }

    /// `nodes/<id>/information`.
    pub(super) fn information(&mut self, id: &NodeId, facts: NodeFacts, now: Moment) {
        let Some(node) = self.node_mut(id) else { return self.not_registered(id) };
        node.facts.update(facts);
        self.heard_from(id, now);
    }

    /// `nodes/<id>/job`.
    pub(super) fn report(&mut self, id: &NodeId, instance: &InstanceId, status: Status, detail: &str, now: Moment) {
        if self.node(id).is_none() {
            return self.not_registered(id);
        }
        self.heard_from(id, now);
        let Some(found) = self.instance_on(id, instance) else { return };
        let detail = detail[..detail.floor_char_boundary(MAX_DETAIL)].to_owned();
        match (status, found.phase) {
            // A node takes its orders one by one: this is the answer to the delete that went before the deploy.
            (Status::Undeployed, Phase::Scheduled) => {}
            (_, Phase::Waiting { .. } | Phase::Completed | Phase::Retiring { .. }) => {}
            // The delete and the next attempt are on their way already.
            (_, Phase::Failed { .. } | Phase::Dead { .. } | Phase::Undeployed { .. }) => {}
            (Status::Creating | Status::Created, Phase::Running { .. }) => found.heard = now,
            (Status::Creating, _) => self.progress(instance, Phase::Creating, detail, now),
            (Status::Created, _) => self.progress(instance, Phase::Created, detail, now),
            (Status::Running, Phase::Running { .. }) => found.heard = now,
            (Status::Running, _) => self.progress(instance, Phase::Running { since: now }, detail, now),
            (Status::Failed, _) => self.failed(instance, detail, |retry| Phase::Failed { retry }, now),
            (Status::Dead, _) => self.failed(instance, detail, |retry| Phase::Dead { retry }, now),
            (Status::Completed, _) => self.completed(instance, detail, now),
            (Status::Undeployed, _) => self.undeployed(instance, detail, now),
        }
    }

    /// `nodes/<id>/jobs/resources`: these run there. What should not is taken down.
    pub(super) fn resources(&mut self, id: &NodeId, samples: Vec<Sample>, now: Moment) {
        if self.node(id).is_none() {
            return self.not_registered(id);
        }
        self.heard_from(id, now);
        for Sample { instance, virtualization, usage } in samples {
            let Some(found) = self.instance_on(id, &instance) else {
                self.push_delete(id.clone(), instance, virtualization);
                continue;
            };
            let mut late = false;
            match found.phase {
                Phase::Running { since } => {
                    if now.saturating_sub(since) >= timers::STEADY {
                        found.failures = 0;
                    }
                    found.heard = now;
                    found.usage = usage;
                }
                Phase::Scheduled | Phase::Creating | Phase::Created | Phase::Lost { .. } => {
                    found.usage = usage;
                    self.progress(&instance, Phase::Running { since: now }, String::new(), now);
                }
                // At first it is an older sample than the status that ended it, later a delete that got lost.
                Phase::Failed { .. } | Phase::Dead { .. } | Phase::Undeployed { .. } | Phase::Completed => {
                    late = now.saturating_sub(found.heard) >= LATE_SAMPLES;
                }
                Phase::Waiting { .. } | Phase::Retiring { .. } => {}
            }
            if late {
                self.push_delete(id.clone(), instance, virtualization);
            }
        }
    }

    /// `nodes/<id>/net/subnet`: the first time a new pair, then always the same.
    pub(super) fn subnet_request(&mut self, id: &NodeId, now: Moment) {
        if self.node(id).is_none() {
            return self.not_registered(id);
        }
        self.heard_from(id, now);
        match self.assign_subnet(id) {
            Some(subnet) => self.effects.messages.push(Message::Subnet { node: id.clone(), subnet }),
            None => tracing::error!(node = %id, "no subnet is left to hand out; widen the address plan"),
        }
    }

    /// The node's subnet for ever; `None` where none is left or there is no such node.
    pub(super) fn assign_subnet(&mut self, id: &NodeId) -> Option<Subnet> {
        let next = self.plan.subnet_from(self.next_subnet);
        let node = self.node_mut(id)?;
        if node.subnet.is_none() {
            let (subnet, next) = next?;
            node.subnet = Some(subnet);
            self.next_subnet = next;
            self.effects.save = true;
        }
        self.node(id)?.subnet
    }

    /// `nodes/<id>/net/tablequery/request`. Who asks need not have registered: a network part can run on its own.
    pub(super) fn table_query(&mut self, id: &NodeId, query: Query) {
        let answer = self.table(query);
        self.effects.messages.push(Message::Table { node: id.clone(), answer });
    }

    /// The rows of the service that has this name or address.
    pub(super) fn table(&self, query: Query) -> Table {
        let service = match &query {
            Query::Name(name) => self.services.get(name),
            Query::Address(address) => self.services.values().find(|service| has_address(service, *address)),
        };
        let Some(service) = service else { return Table { query, service: None, rows: Vec::new() } };
        let retiring = |instance: &&Instance| !matches!(instance.phase, Phase::Retiring { .. });
        let rows = service.instances.values().filter(retiring).map(|instance| Row {
            number: instance.number,
            node: instance.node.clone(),
            address: instance.address,
            services: service.addresses().collect(),
            deployed: instance.reachable().copied(),
            weight: service.weight(instance),
        });
        Table { query, service: Some(service.request.name.clone()), rows: rows.collect() }
    }

    /// `nodes/<id>/net/service/deployed`: the instance's network is up.
    pub(super) fn deployed(&mut self, id: &NodeId, instance: &InstanceId, deployed: Deployed, now: Moment) {
        if self.node(id).is_none() {
            return self.not_registered(id);
        }
        let Some(found) = self.instance_on(id, instance) else { return };
        if matches!(found.phase, Phase::Completed | Phase::Retiring { .. } | Phase::Waiting { .. }) {
            return;
        }
        found.deployed = Some(deployed);
        found.heard = now;
        self.changed(instance);
    }

    /// `nodes/<id>/net/service/address-changed`: the same instance behind another address of its node.
    pub(super) fn address_changed(&mut self, id: &NodeId, instance: &InstanceId, host: IpAddr, port: u16) {
        let Some(found) = self.instance_on(id, instance) else { return };
        let Some(deployed) = &mut found.deployed else { return };
        (deployed.host, deployed.host_port) = (host, port);
        self.changed(instance);
    }

    pub(super) fn node(&self, id: &NodeId) -> Option<&Node> {
        self.nodes.get(self.hosts.get(id)?)
    }

    pub(super) fn is_fresh(node: &Node, now: Moment) -> bool {
        node.seen.is_some_and(|seen| now.saturating_sub(seen) < FRESH)
    }

    fn node_mut(&mut self, id: &NodeId) -> Option<&mut Node> {
        self.nodes.get_mut(self.hosts.get(id)?)
    }

    fn heard_from(&mut self, id: &NodeId, now: Moment) {
        let Some(node) = self.node_mut(id) else { return };
        let was_fresh = Self::is_fresh(node, now);
        node.seen = Some(now);
        if !was_fresh {
            self.node_is_back(id, now);
        }
    }

    fn push_delete(&mut self, node: NodeId, instance: InstanceId, virtualization: String) {
        let generation = self.count_order();
        self.effects.messages.push(Message::Delete { node, instance, virtualization, generation });
    }

    /// The number of the next order. Numbers are reserved on the disk many at a time, so that none is given twice and few cost a save.
    fn count_order(&mut self) -> u64 {
        self.orders += 1;
        if self.orders >= self.orders_reserved {
            self.orders_reserved = self.orders + ORDERS_RESERVED;
            self.effects.save = true;
        }
        self.orders
    }

    fn not_registered(&mut self, id: &NodeId) {
        self.effects.messages.push(Message::NotRegistered { node: id.clone() });
    }

    fn instance_mut(&mut self, id: &InstanceId) -> Option<&mut Instance> {
        self.services.get_mut(&id.service)?.instances.get_mut(&id.number)
    }

    /// The instance, if this node is the one that runs it.
    fn instance_on(&mut self, node: &NodeId, id: &InstanceId) -> Option<&mut Instance> {
        self.instance_mut(id).filter(|instance| instance.node.as_ref() == Some(node))
    }

    /// Something of this instance that outlives a restart, or that its peers see, is different.
    fn changed(&mut self, instance: &InstanceId) {
        self.effects.save = true;
        self.touched.insert(instance.service.clone());
    }

    fn tell(&mut self, name: ServiceName) {
        let rows = self.services.get(&name).map(rows_of).unwrap_or_default();
        let told = self.told.remove(&name).unwrap_or_default();
        let more = rows.iter().any(|(number, row)| told.get(number) != Some(row));
        let less = told.keys().any(|number| !rows.contains_key(number));
        if !rows.is_empty() {
            self.told.insert(name.clone(), rows);
        }
        let change = match (more, less) {
            (true, _) => Change::Deployment,
            (false, true) => Change::Undeployment,
            (false, false) => return,
        };
        self.effects.messages.push(Message::Changed { service: name, change });
    }
}

fn rows_of(service: &Service) -> BTreeMap<u32, (Deployed, u32)> {
    let row = |instance: &Instance| Some((instance.number, (*instance.reachable()?, service.weight(instance))));
    service.instances.values().filter_map(row).collect()
}

fn has_address(service: &Service, address: IpAddr) -> bool {
    let has = |pair: &AddressPair| match address {
        IpAddr::V4(v4) => pair.v4 == v4,
        IpAddr::V6(v6) => pair.v6 == v6,
    };
    service.addresses().any(|(_, pair)| has(&pair)) || service.instances.values().any(|instance| has(&instance.address))
}

/// Pools count in plain numbers.
pub(super) fn number_of(address: Ipv4Addr) -> u128 {
    u128::from(u32::from(address))
}
