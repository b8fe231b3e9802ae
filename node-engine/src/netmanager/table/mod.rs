//! The service table: what the cluster says of services, and what this node knows of its own instances, projected into the rows of
//! a datapath. The one place that decides whose an address is. Nothing reads the projection back to decide, and nothing the
//! cluster says can make two instances share a slot.
//!
//! Rules, in this order: an address leased on this node belongs to the leased instance; of several services that claim an address
//! the one heard of last has it; an instance that lost one of its addresses in a family is not there in that family.

mod balance;
mod claims;
mod health;
mod leaving;
mod numbers;
mod projection;
mod reproject;
mod row;
mod sticky;
#[cfg(test)]
mod tests;
mod view;
mod watch;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use netmanager_common::abi::{Config, Endpoint, Peer};
use netmanager_common::addr::Addr;

use self::balance::Choice;
use self::claims::Claims;
use self::health::Health;
pub use self::health::{Fault, Standing};
use self::leaving::Leaving;
pub use self::projection::{Counts, PeerKey, Way};
use self::projection::{Projection, SlotKey};
pub use self::row::ServiceNets;
use self::row::{Row, Side, sift};
use self::watch::Watch;
use super::datapath::{Capacity, Snapshot, TableDelta, Tally};
use crate::model::{Addresses, FamilyPair, InstanceId, Policy, Query, ServiceName, Subnet, TableAnswer};

/// An instance connected on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Local {
    pub instance: InstanceId,
    pub addresses: Addresses,
    /// Host end of its veth.
    pub ifindex: u32,
    /// MAC of the container end.
    pub mac: [u8; 6],
    /// Its instance addresses as far as they are known already.
    pub own: FamilyPair,
}

/// What was not believed, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Refusals {
    /// Addresses out of range.
    pub range: u64,
    /// A number or an address twice in one answer.
    pub duplicate: u64,
    /// An instance said to be here that is not, or the namespace address of another of our instances.
    pub stale: u64,
}

/// Rows per service, and their projection.
#[derive(Clone, Debug)]
pub struct ServiceTable {
    nets: ServiceNets,
    /// This node's address as its peers see it.
    host: Addr,
    subnet: Option<Subnet>,
    entries: BTreeMap<ServiceName, Entry>,
    locals: BTreeMap<InstanceId, Local>,
    leased: HashMap<Addr, InstanceId>,
    /// Services with a row that names this namespace address, believed or not.
    mentions: HashMap<Addr, BTreeSet<ServiceName>>,
    /// Who has a namespace address.
    namespaces: Claims,
    /// Who has a service address: as one instance's, or as the service's.
    semantics: Claims,
    sequence: u64,
    projection: Projection,
    /// What is remembered of the choices behind each address that means a service.
    choices: HashMap<Addr, (Policy, Choice)>,
    figures: Figures,
    health: Health,
    watch: Watch,
    /// Who is in no row any more and keeps its flows for so long.
    leaving: Leaving,
    drain: Duration,
    now: Duration,
    refusals: Refusals,
    /// It was said that the cluster's services have addresses that this node does not carry.
    told_elsewhere: bool,
}

/// What was measured of nodes and instances.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Figures {
    /// Round trip by number of the peer.
    pub rtts: HashMap<u32, Duration>,
    /// Percent of the processors in use by number of the peer; 0 is this node.
    pub busy: HashMap<u32, u8>,
    /// Flows of this node by slot.
    pub flows: HashMap<u32, u32>,
}

/// What is known of one service.
#[derive(Clone, Debug, Default)]
struct Entry {
    rows: Vec<Row>,
    semantics: BTreeMap<Addr, Policy>,
    /// Its semantic addresses when it last had instances: while it has none, they are still its own.
    remembered: BTreeMap<Addr, Policy>,
    sequence: u64,
    claimed: Claimed,
    /// Slots by instance number and family.
    slots: BTreeMap<SlotKey, u32>,
}

/// What a service claims now. With each address, the claim's rank: 0 for what is only remembered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Claimed {
    namespaces: BTreeMap<Addr, u64>,
    semantics: BTreeMap<Addr, u64>,
}

impl ServiceTable {
    /// An empty table. `host` is this node's address as the cluster tells it to others.
    pub fn new(nets: ServiceNets, host: Addr) -> Self {
        Self {
            nets,
            host,
            subnet: None,
            entries: BTreeMap::new(),
            locals: BTreeMap::new(),
            leased: HashMap::new(),
            mentions: HashMap::new(),
            namespaces: Claims::default(),
            semantics: Claims::default(),
            sequence: 0,
            projection: Projection::with_room(Capacity::USUAL),
            choices: HashMap::new(),
            figures: Figures::default(),
            health: Health::default(),
            watch: Watch::default(),
            leaving: Leaving::default(),
            drain: Duration::ZERO,
            now: Duration::ZERO,
            refusals: Refusals::default(),
            told_elsewhere: false,
        }
    }

    /// An empty table as large as the datapath's.
    #[must_use]
    pub fn with_room(self, capacity: Capacity) -> Self {
        Self { projection: Projection::with_room(capacity), ..self }
    }

    /// Whoever vanishes from the table keeps the flows it has for so long.
    pub fn set_drain(&mut self, drain: Duration) {
        self.drain = drain;
    }

    /// What is changed from here on is changed at this time.
    pub fn set_now(&mut self, now: Duration) {
        self.now = now;
    }

    /// Takes over the datapath's rows of an earlier run, so that slots, generations, ids and peers stay the same for the same
    /// instances and established flows stay valid. Call it before anything else.
    pub fn adopt(&mut self, snapshot: &Snapshot) -> TableDelta {
        self.projection.adopt(snapshot);
        self.projection.take()
    }

    /// Addresses of an earlier run of which the cluster has not said yet whose they are. Ask for them.
    pub fn unclaimed(&self) -> Vec<Addr> {
        self.projection.unclaimed().collect()
    }

    /// Replaces all that is known of the answered service. An answer that knows no service ends what an earlier run left of the
    /// address that was asked for.
    pub fn update(&mut self, answer: &TableAnswer) -> TableDelta {
        let known = answer.service.is_some();
        let name = answer.service.clone().or_else(|| match &answer.query {
            Some(Query::Name(name)) => Some(name.clone()),
            _ => None,
        });
        if let Some(name) = name {
            self.replace(name, answer, known);
        }
        if let Some(Query::Address(address)) = answer.query {
            self.projection.disown(address.into());
        }
        self.projection.take()
    }

    /// What the passing of time brings: ends of who leaves, trials of who was passed over.
    pub fn tick(&mut self) -> TableDelta {
        let over = self.leaving.due(self.now);
        self.end(over);
        self.health.retain(|slot| self.watch.contains(slot));
        let due = self.health.tick(self.now);
        self.choose_again(due);
        self.projection.take()
    }

    /// What became of the flows for which these slots were chosen.
    pub fn observe(&mut self, tallies: &[(u32, Tally)]) -> TableDelta {
        let mut changed = Vec::new();
        for (slot, tally) in tallies.iter().filter(|(slot, _)| self.watch.contains(*slot)) {
            let rtt = self.figures.rtts.get(&self.projection.peer_of(*slot)).copied().unwrap_or_default();
            if self.health.observe(*slot, *tally, rtt, self.now) {
                changed.push(*slot);
            }
        }
        changed.extend(self.health.tick(self.now));
        self.choose_again(changed);
        self.projection.take()
    }

    /// Slots behind whose addresses there is a choice: so many at most, those after this one first.
    pub fn watched(&self, after: u32, limit: usize) -> Vec<u32> {
        self.watch.next(after, limit)
    }

    /// Is somebody waited for, or passed over?
    pub fn ails(&self) -> bool {
        self.health.ails()
    }

    /// Instances on the peer that leave, by namespace address.
    pub fn leaving_at(&self, peer: u32) -> Vec<Addr> {
        self.leaving.all().filter(|(_, left)| left.peer == peer).map(|(_, left)| left.namespace).collect()
    }

    /// Peers with instances that leave.
    pub fn left(&self) -> BTreeSet<u32> {
        self.leaving.all().map(|(_, left)| left.peer).filter(|peer| *peer != 0).collect()
    }

    /// The peer says that nothing is at these namespace addresses any more.
    pub fn gone(&mut self, peer: u32, namespaces: &[Addr]) -> TableDelta {
        let here = |address: &Addr| {
            let (key, left) = self.leaving.at(*address)?;
            (left.peer == peer && left.namespace == *address).then(|| key.clone())
        };
        let gone = namespaces.iter().filter_map(here).collect();
        self.end(gone);
        self.projection.take()
    }

    /// Is an instance connected here at this namespace address?
    pub fn hosts(&self, namespace: Addr) -> bool {
        self.leased.contains_key(&namespace)
    }

    /// Forgets a service nobody here is interested in any more.
    pub fn remove(&mut self, service: &ServiceName) -> TableDelta {
        if let Some(entry) = self.entries.get_mut(service) {
            unmention(&mut self.mentions, service, &entry.rows);
            (entry.rows, entry.semantics, entry.remembered) = Default::default();
            self.reproject([service.clone()].into());
        }
        let leaving: Vec<SlotKey> = self.leaving.of_service(service).map(|(key, _)| key.clone()).collect();
        self.end(leaving);
        self.projection.take()
    }

    /// An instance is connected here, or is connected anew.
    pub fn attach(&mut self, local: Local) -> TableDelta {
        let mut own = self.own(&local.instance);
        let mut touched = self.unlease(&local.instance, local.addresses);
        for address in both(local.addresses) {
            // Two leases of one address cannot come from our own address book; if they do, the newer has it.
            if let Some(owner) = self.leased.get(&address).cloned() {
                touched.extend(self.unlease(&owner, local.addresses));
            }
            self.leased.insert(address, local.instance.clone());
            touched.extend(self.mentions.get(&address).into_iter().flatten().cloned());
            if let Some(adopted) = self.projection.endpoint(address) {
                learn(&mut own, adopted.instance);
            }
        }
        for told in [local.own.v4.map(Addr::from), local.own.v6.map(Addr::from)].into_iter().flatten() {
            learn(&mut own, told);
        }
        let service = local.instance.service.clone();
        self.write_endpoints(&Local { own, ..local.clone() });
        self.locals.insert(local.instance.clone(), Local { own, ..local });
        self.learn_own_addresses(&service);
        touched.insert(service);
        self.reproject(touched);
        self.projection.take()
    }

    /// An instance is not connected here any more. An unknown one changes nothing.
    pub fn detach(&mut self, instance: &InstanceId) -> TableDelta {
        let nothing = Addresses { v4: std::net::Ipv4Addr::UNSPECIFIED, v6: std::net::Ipv6Addr::UNSPECIFIED };
        let touched = self.unlease(instance, nothing);
        self.reproject(touched);
        self.end(self.leaving.of(instance));
        self.projection.take()
    }

    /// Endpoints of an earlier run without an instance. Call it when all leases of that run are attached.
    pub fn drop_foreign_endpoints(&mut self) -> TableDelta {
        let foreign: Vec<Addr> =
            self.projection.endpoints().filter(|address| !self.leased.contains_key(address)).collect();
        for address in foreign {
            self.projection.remove_endpoint(address);
        }
        self.projection.take()
    }

    /// This node has this address towards its peers, and this subnet for its instances.
    pub fn set_node(&mut self, host: Addr, subnet: Option<Subnet>) -> TableDelta {
        if (self.host, self.subnet) != (host, subnet) {
            (self.host, self.subnet) = (host, subnet);
            self.reproject(self.entries.keys().cloned().collect());
        }
        self.projection.take()
    }

    pub fn set_config(&mut self, config: Config) -> TableDelta {
        self.projection.set_config(config);
        self.projection.take()
    }

    /// The way to peers for which none has been looked up.
    pub fn set_uplink(&mut self, way: Way) -> TableDelta {
        self.projection.set_uplink(way);
        self.projection.take()
    }

    /// The ways to some nodes, as the kernel's routes have them.
    pub fn set_ways(&mut self, ways: impl IntoIterator<Item = (Addr, Way)>) -> TableDelta {
        self.projection.set_ways(ways);
        self.projection.take()
    }

    /// The peer has said hello, or says nothing any more.
    pub fn set_ours(&mut self, peer: u32, ours: bool) -> TableDelta {
        self.projection.set_ours(peer, ours);
        self.projection.take()
    }

    /// New figures: what is chosen by them is chosen anew.
    pub fn weigh(&mut self, figures: Figures) -> TableDelta {
        self.figures = figures;
        let measured = |policy: &Policy| matches!(policy, Policy::Closest | Policy::Underutilised);
        let addresses: BTreeSet<Addr> =
            self.choices.iter().filter(|(_, (policy, _))| measured(policy)).map(|(address, _)| *address).collect();
        for address in addresses {
            self.serve(address, true);
        }
        self.projection.take()
    }

    /// Are there addresses behind which this policy chooses?
    pub fn uses(&self, policy: Policy) -> bool {
        self.choices.values().any(|(used, _)| *used == policy)
    }

    /// The peers whose round trip decides something.
    pub fn raced(&self) -> BTreeSet<u32> {
        let closest = self.choices.iter().filter(|(_, (policy, _))| *policy == Policy::Closest);
        let entries = closest.filter_map(|(address, _)| self.entries.get(self.semantics.winner(*address)?));
        let slots = entries.flat_map(|entry| entry.slots.values());
        slots.map(|slot| self.projection.peer_of(*slot)).filter(|peer| *peer != 0).collect()
    }

    /// The peer takes framed packets on this port, or none.
    pub fn set_path_mtu(&mut self, peer: u32, mtu: Option<u16>) -> TableDelta {
        self.projection.set_path_mtu(peer, mtu);
        self.projection.take()
    }

    /// The longest packet on the way to the peer, where it is less than what instances send.
    pub fn path_mtu(&self, peer: u32) -> Option<u16> {
        let (_, row) = self.peers().find(|(number, _)| *number == peer)?;
        u16::try_from(row.mtu).ok().filter(|mtu| *mtu != 0)
    }

    pub fn set_framed(&mut self, peer: u32, port: Option<u16>) -> TableDelta {
        self.projection.set_framed(peer, port);
        self.projection.take()
    }

    /// The whole projection, for a datapath that begins with empty tables. Services of an earlier run that nobody has claimed yet
    /// are not in it: only the datapath knows their candidates.
    pub fn full(&self) -> TableDelta {
        self.projection.full()
    }

    /// Is there a row for this service address?
    pub fn serves(&self, address: Addr) -> bool {
        self.projection.serves(address)
    }

    /// The instance addresses of an instance on this node, as far as the cluster has told them.
    pub fn own(&self, instance: &InstanceId) -> FamilyPair {
        self.locals.get(instance).map(|local| local.own).unwrap_or_default()
    }

    /// Does the instance here with this namespace address know its instance address?
    pub fn knows_own(&self, namespace: Addr) -> bool {
        self.projection.endpoint(namespace).is_some_and(|endpoint| !endpoint.instance.is_none())
    }

    /// Which service has this address: a service address, or the namespace address of an instance here.
    pub fn owner(&self, address: Addr) -> Option<&ServiceName> {
        self.leased.get(&address).map(|instance| &instance.service).or_else(|| self.semantics.winner(address))
    }

    /// Addresses that mean this service or one of its instances.
    pub fn addresses(&self, service: &ServiceName) -> impl Iterator<Item = Addr> {
        self.entries.get(service).into_iter().flat_map(|entry| entry.claimed.semantics.keys().copied())
    }

    pub fn peers(&self) -> impl Iterator<Item = (u32, &Peer)> {
        self.projection.peers()
    }

    pub fn counts(&self) -> Counts {
        self.projection.counts()
    }

    pub fn refusals(&self) -> Refusals {
        self.refusals
    }

    fn replace(&mut self, name: ServiceName, answer: &TableAnswer, known: bool) {
        let sifted = sift(answer, &self.nets);
        self.refusals.range += sifted.out_of_range;
        if let Some(address) = sifted.elsewhere
            && !std::mem::replace(&mut self.told_elsewhere, true)
        {
            let ServiceNets { v4, v6 } = self.nets;
            tracing::warn!(
                service = %name, %address,
                "the cluster's services have addresses outside of {}/{} and {}/{}, which go nowhere: set network.service_v4 or \
                 network.service_v6 to the cluster's (172.30.0.0/16 in the first generation)", v4.0, v4.1, v6.0, v6.1
            );
        }
        self.refusals.duplicate += sifted.duplicate;
        self.sequence += 1;
        let entry = self.entries.entry(name.clone()).or_default();
        let before = std::mem::take(&mut entry.semantics);
        entry.remembered = match (known, sifted.rows.is_empty()) {
            (true, true) if before.is_empty() => std::mem::take(&mut entry.remembered),
            (true, true) => before,
            (true, false) | (false, _) => BTreeMap::new(),
        };
        unmention(&mut self.mentions, &name, &entry.rows);
        for side in sifted.rows.iter().flat_map(|row| &row.sides) {
            self.mentions.entry(side.namespace).or_default().insert(name.clone());
        }
        (entry.rows, entry.semantics, entry.sequence) = (sifted.rows, sifted.semantics, self.sequence);
        self.learn_own_addresses(&name);
        self.refusals.stale += self.stale(&name);
        self.reproject([name].into());
    }

    /// A row of an instance here tells its own instance addresses. They are kept while it is connected, also where the cluster
    /// forgets them: they never change, and without them it could not send.
    fn learn_own_addresses(&mut self, name: &ServiceName) {
        let Some(entry) = self.entries.get(name) else { return };
        let mut learnt = Vec::new();
        for row in &entry.rows {
            let instance = InstanceId { service: name.clone(), number: row.number };
            let Some(local) = self.locals.get_mut(&instance) else { continue };
            for side in row.sides.iter().filter(|side| both(local.addresses).contains(&side.namespace)) {
                learn(&mut local.own, side.instance);
            }
            learnt.push(local.clone());
        }
        for local in learnt {
            self.write_endpoints(&local);
        }
    }

    fn stale(&self, name: &ServiceName) -> u64 {
        let sides = self.entries.get(name).into_iter().flat_map(|entry| sides(&entry.rows));
        sides.filter(|(row, side)| self.admit(name, row, side).is_none()).count() as u64
    }

    fn write_endpoints(&mut self, local: &Local) {
        let own = [local.own.v4.map(Addr::from), local.own.v6.map(Addr::from)];
        for (namespace, own) in both(local.addresses).into_iter().zip(own) {
            let endpoint = Endpoint {
                instance: own.unwrap_or(Addr::NONE),
                ifindex: local.ifindex,
                mac: local.mac,
                ..Endpoint::default()
            };
            self.projection.set_endpoint(namespace, endpoint);
        }
    }

    /// Takes the instance's addresses away and returns the services that this concerns. Endpoints at `kept` addresses stay.
    fn unlease(&mut self, instance: &InstanceId, kept: Addresses) -> BTreeSet<ServiceName> {
        let mut touched = BTreeSet::new();
        let Some(local) = self.locals.remove(instance) else { return touched };
        touched.insert(instance.service.clone());
        for address in both(local.addresses) {
            self.leased.remove(&address);
            touched.extend(self.mentions.get(&address).into_iter().flatten().cloned());
            if !both(kept).contains(&address) {
                self.projection.remove_endpoint(address);
            }
        }
        touched
    }
}

impl Entry {
    fn is_empty(&self) -> bool {
        self.rows.is_empty() && self.semantics.is_empty() && self.remembered.is_empty()
    }

    /// The policy of an address that means the service.
    fn policy(&self, address: Addr) -> Option<Policy> {
        self.semantics.get(&address).or_else(|| self.remembered.get(&address)).copied()
    }

    /// The instance's slot of the address's family.
    fn slots_of(&self, address: Addr, number: u32) -> Vec<u32> {
        let fits = |key: &SlotKey| key.is_v4 == address.is_v4() && key.instance.number == number;
        self.slots.iter().filter(|(key, _)| fits(key)).map(|(_, slot)| *slot).collect()
    }
}

fn unmention(mentions: &mut HashMap<Addr, BTreeSet<ServiceName>>, service: &ServiceName, rows: &[Row]) {
    for (_, side) in sides(rows) {
        if let Some(services) = mentions.get_mut(&side.namespace) {
            services.remove(service);
            if services.is_empty() {
                mentions.remove(&side.namespace);
            }
        }
    }
}

fn sides(rows: &[Row]) -> impl Iterator<Item = (&Row, &Side)> {
    rows.iter().flat_map(|row| row.sides.iter().map(move |side| (row, side)))
}

fn both(addresses: Addresses) -> [Addr; 2] {
    [addresses.v4.into(), addresses.v6.into()]
}

/// Notes an instance address in its family.
fn learn(own: &mut FamilyPair, instance: Addr) {
    if instance.is_none() {
        return;
    }
    match instance.into() {
        std::net::IpAddr::V4(v4) => own.v4 = Some(v4),
        std::net::IpAddr::V6(v6) => own.v6 = Some(v6),
    }
}

fn in_subnet(subnet: Subnet, address: Addr) -> bool {
    match address.into() {
        std::net::IpAddr::V4(v4) => (v4.to_bits() ^ subnet.v4.to_bits()) >> (32 - Subnet::V4_PREFIX) == 0,
        std::net::IpAddr::V6(v6) => (v6.to_bits() ^ subnet.v6.to_bits()) >> (128 - Subnet::V6_PREFIX) == 0,
    }
}
