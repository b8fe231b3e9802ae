//! The rows in the datapath, as it was told them: stable numbers, generations and epochs, and the smallest delta to the next state.
//! Knows instances and addresses, not which of several statements about them is right.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use netmanager_common::abi::{COUNTED_SLOTS, Config, Endpoint, PEER_OURS, POLICY_TRIAL, Peer, Service, Slot};
use netmanager_common::addr::Addr;
use netmanager_common::{MAX_ENDPOINTS, MAX_PEERS};

use super::numbers::Numbers;
use crate::model::InstanceId;
use crate::netmanager::datapath::{Capacity, Snapshot, TableDelta};

/// An instance in one family.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct SlotKey {
    pub(super) instance: InstanceId,
    pub(super) is_v4: bool,
}

/// Whose slot it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Occupant {
    Known(SlotKey),
    /// Left by an earlier run; nobody has said yet which instance of which service it is.
    Adopted {
        namespace: Addr,
        instance: Addr,
    },
}

/// Where an instance is. `peer` is `None` on this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Placement {
    pub(super) namespace: Addr,
    pub(super) instance: Addr,
    pub(super) peer: Option<PeerKey>,
}

/// A node and the port of its tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerKey {
    pub host: Addr,
    pub port: u16,
}

/// The way to a peer: our address on it, and the interface.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Way {
    pub source: Addr,
    pub ifindex: u32,
    /// The longest packet in one datagram, as far as this node's own routes know; 0: any that instances send.
    pub mtu: u16,
}

#[derive(Clone, Debug)]
struct ServiceRow {
    row: Service,
    /// `None` where an earlier run wrote them.
    candidates: Option<Vec<u32>>,
    /// The slot that one new flow shall try.
    trial: Option<u32>,
}

#[derive(Clone, Debug)]
pub(super) struct Projection {
    capacity: Capacity,
    config: Option<Config>,
    slot_numbers: Numbers<Occupant>,
    /// By number, also of slots that are free: their generation goes on from here.
    slots: Vec<Slot>,
    /// Slots of an earlier run by (instance, namespace) and by (namespace, instance).
    adopted_by_instance: BTreeSet<(Addr, Addr)>,
    adopted_by_namespace: BTreeSet<(Addr, Addr)>,
    peer_numbers: Numbers<PeerKey>,
    peers: BTreeMap<u32, Peer>,
    /// How many slots name the peer.
    peer_uses: HashMap<u32, usize>,
    ways: HashMap<Addr, Way>,
    /// What was measured of the paths to peers, by their numbers.
    paths: HashMap<u32, u16>,
    /// Where no better way is known.
    uplink: Way,
    services: BTreeMap<Addr, ServiceRow>,
    service_ids: HashSet<u32>,
    next_service_id: u32,
    candidates: usize,
    endpoints: BTreeMap<Addr, Endpoint>,
    /// On whose account flows are, by namespace address.
    accounts: Numbers<Addr>,
    /// The configuration's: raised whenever what flows have noted may be wrong.
    epoch: u32,
    changes: Changes,
    /// How often a table was full.
    full: u64,
}

#[derive(Clone, Debug, Default)]
struct Changes {
    config: bool,
    peers: BTreeSet<u32>,
    slots: BTreeSet<u32>,
    services: BTreeSet<Addr>,
    endpoints: BTreeSet<Addr>,
}

impl Projection {
    pub(super) fn with_room(capacity: Capacity) -> Self {
        Self {
            capacity,
            config: None,
            slot_numbers: Numbers::preferring(COUNTED_SLOTS, capacity.slots()),
            slots: vec![Slot::default()],
            adopted_by_instance: BTreeSet::new(),
            adopted_by_namespace: BTreeSet::new(),
            peer_numbers: Numbers::new(MAX_PEERS),
            peers: BTreeMap::new(),
            peer_uses: HashMap::new(),
            ways: HashMap::new(),
            paths: HashMap::new(),
            uplink: Way::default(),
            services: BTreeMap::new(),
            service_ids: HashSet::new(),
            next_service_id: 1,
            candidates: 0,
            endpoints: BTreeMap::new(),
            accounts: Numbers::new(MAX_ENDPOINTS + 1),
            epoch: 0,
            changes: Changes::default(),
            full: 0,
        }
    }

    /// Puts the instance where it is now and returns its slot. It keeps slot and generation while its addresses stay, whatever
    /// node they are on. `None` where a table is full.
    pub(super) fn place(&mut self, key: SlotKey, placement: Placement) -> Option<u32> {
        let Placement { namespace, instance, .. } = placement;
        let peer = match placement.peer {
            Some(peer) => self.peer(peer)?,
            None => 0,
        };
        let Some(number) = self.slot_for(key, namespace, instance) else {
            self.full += 1;
            self.forget_unused_peer(peer);
            return None;
        };
        let old = self.slot(number);
        let same = old.live() && old.namespace == namespace && old.instance == instance;
        let generation = match (same, old.live()) {
            (true, _) => old.generation,
            (false, true) => old.generation.wrapping_add(2),
            (false, false) => old.generation.wrapping_add(1),
        };
        let slot = Slot {
            generation,
            peer,
            namespace,
            instance,
            #[cfg(feature = "other-layout")]
            spare: [0; 2],
        };
        self.write_slot(number, slot);
        self.drop_adopted_in(namespace);
        Some(number)
    }

    /// The instance is gone: its slot's flows choose again.
    pub(super) fn vacate(&mut self, key: &SlotKey) {
        self.vacate_occupant(&Occupant::Known(key.clone()));
    }

    /// Serves an address with these slots, of which the law picks by `policy`. False where a table is full.
    /// `trial`: once, a flow goes there in place of its pick.
    pub(super) fn serve(&mut self, address: Addr, policy: u32, candidates: Vec<u32>, trial: Option<u32>) -> bool {
        let policy = policy | if trial.is_some() { POLICY_TRIAL } else { 0 };
        let old = self.services.get(&address);
        let same = |old: &ServiceRow| {
            old.row.policy == policy && old.candidates.as_ref() == Some(&candidates) && old.trial == trial
        };
        if old.is_some_and(same) {
            return true;
        }
        let before = old.and_then(|old| old.candidates.as_ref()).map_or(0, Vec::len);
        // Half of the candidates: old and new list stand side by side while the row flips.
        let after = self.candidates - before + candidates.len();
        let Ok(count) = u32::try_from(candidates.len()) else { return false };
        let (candidates_fit, is_new) = (after <= self.capacity.candidates() as usize / 2, old.is_none());
        if !candidates_fit || (is_new && self.services.len() >= self.capacity.services() as usize) {
            self.full += 1;
            return false;
        }
        let (id, epoch) = match old {
            Some(old) => (old.row.id, old.row.epoch.wrapping_add(1)),
            None => (self.new_service_id(), 1),
        };
        let first = candidates.first().copied().unwrap_or(0);
        let row = Service { id, epoch, count, policy, first };
        self.candidates = after;
        self.services.insert(address, ServiceRow { row, candidates: Some(candidates), trial });
        self.changes.services.insert(address);
        true
    }

    /// Nobody serves this address, as far as we know.
    pub(super) fn unserve(&mut self, address: Addr) {
        let Some(old) = self.services.remove(&address) else { return };
        self.service_ids.remove(&old.row.id);
        self.candidates -= old.candidates.map_or(0, |candidates| candidates.len());
        self.changes.services.insert(address);
    }

    pub(super) fn serves(&self, address: Addr) -> bool {
        self.services.contains_key(&address)
    }

    /// The slots behind an address, as often as each is in the list.
    pub(super) fn list(&self, address: Addr) -> &[u32] {
        self.services.get(&address).and_then(|service| service.candidates.as_deref()).unwrap_or_default()
    }

    /// False where the table is full.
    pub(super) fn set_endpoint(&mut self, namespace: Addr, endpoint: Endpoint) -> bool {
        if !self.endpoints.contains_key(&namespace) && self.endpoints.len() >= MAX_ENDPOINTS as usize {
            self.full += 1;
            return false;
        }
        let account = self.accounts.take(namespace).and_then(|number| u16::try_from(number).ok()).unwrap_or(0);
        let endpoint = Endpoint { account, ..endpoint };
        if self.endpoints.insert(namespace, endpoint) != Some(endpoint) {
            self.changes.endpoints.insert(namespace);
        }
        true
    }

    pub(super) fn remove_endpoint(&mut self, namespace: Addr) {
        if self.endpoints.remove(&namespace).is_some() {
            self.accounts.release(&namespace);
            self.changes.endpoints.insert(namespace);
        }
    }

    pub(super) fn endpoints(&self) -> impl Iterator<Item = Addr> {
        self.endpoints.keys().copied()
    }

    pub(super) fn endpoint(&self, namespace: Addr) -> Option<&Endpoint> {
        self.endpoints.get(&namespace)
    }

    pub(super) fn set_config(&mut self, config: Config) {
        if self.config != Some(config) {
            self.config = Some(config);
            self.changes.config = true;
        }
    }

    /// The way to peers for which no other is known.
    pub(super) fn set_uplink(&mut self, uplink: Way) {
        self.uplink = uplink;
        self.rewrite_peers();
    }

    /// The ways to some nodes. Those that are no peers any more are forgotten.
    pub(super) fn set_ways(&mut self, ways: impl IntoIterator<Item = (Addr, Way)>) {
        self.ways.extend(ways);
        let hosts: HashSet<Addr> = self.peers.values().map(|peer| peer.host).collect();
        self.ways.retain(|host, _| hosts.contains(host));
        self.rewrite_peers();
    }

    /// Has the peer said hello? An unknown number changes nothing.
    pub(super) fn set_ours(&mut self, number: u32, ours: bool) {
        let Some(old) = self.peers.get(&number).copied() else { return };
        let flags = if ours { old.flags | PEER_OURS } else { old.flags & !PEER_OURS };
        self.changes.config |= flags != old.flags;
        self.write_peer(number, Peer { flags, ..old });
    }

    /// The longest packet on the way to the peer, measured, 0 for any; `None`: as far as the routes know. An unknown number changes nothing.
    pub(super) fn set_path_mtu(&mut self, number: u32, mtu: Option<u16>) {
        let Some(old) = self.peers.get(&number).copied() else { return };
        match mtu {
            Some(mtu) => self.paths.insert(number, mtu),
            None => self.paths.remove(&number),
        };
        self.write_peer(number, Peer { mtu: self.path_mtu(number, old.host), ..old });
    }

    fn path_mtu(&self, number: u32, host: Addr) -> u32 {
        self.paths.get(&number).copied().unwrap_or(self.way(host).mtu).into()
    }

    /// The peer's port for framed packets; `None`: it gets bare ones. An unknown number changes nothing.
    pub(super) fn set_framed(&mut self, number: u32, port: Option<u16>) {
        if let Some(old) = self.peers.get(&number).copied() {
            self.write_peer(number, Peer { framed_port: port.unwrap_or(0).to_be_bytes(), ..old });
        }
    }

    pub(super) fn peers(&self) -> impl Iterator<Item = (u32, &Peer)> {
        self.peers.iter().map(|(number, peer)| (*number, peer))
    }

    /// Slots with an instance in them.
    pub(super) fn live_slots(&self) -> impl Iterator<Item = (u32, Slot)> {
        (0..).zip(&self.slots).filter(|(_, slot)| slot.live()).map(|(number, slot)| (number, *slot))
    }

    /// Number of the peer on which the slot's instance is; 0 for this node.
    pub(super) fn peer_of(&self, slot: u32) -> u32 {
        self.slot(slot).peer
    }

    pub(super) fn counts(&self) -> Counts {
        Counts {
            slots: self.slot_numbers.len(),
            peers: self.peers.len(),
            services: self.services.len(),
            adopted: self.adopted_by_instance.len(),
            full: self.full,
        }
    }

    /// What has changed since the last call.
    pub(super) fn take(&mut self) -> TableDelta {
        let changes = std::mem::take(&mut self.changes);
        self.slot_numbers.settle();
        self.peer_numbers.settle();
        self.accounts.settle();
        let stale = changes.config || !changes.endpoints.is_empty();
        self.epoch = self.epoch.wrapping_add(stale.into());
        let mut delta = TableDelta {
            config: self.config().filter(|_| stale),
            peers: changes
                .peers
                .iter()
                .map(|number| (*number, self.peers.get(number).copied().unwrap_or_default()))
                .collect(),
            slots: changes.slots.iter().map(|number| (*number, self.slot(*number))).collect(),
            ..TableDelta::default()
        };
        for address in changes.services {
            match self.services.get(&address) {
                Some(ServiceRow { row, candidates, trial }) => {
                    delta.trials.extend(trial.map(|slot| (row.id, slot)));
                    delta.services.push((address, *row, candidates.clone().unwrap_or_default()));
                }
                None => delta.services_gone.push(address),
            }
        }
        for address in changes.endpoints {
            match self.endpoints.get(&address) {
                Some(endpoint) => delta.endpoints.push((address, *endpoint)),
                None => delta.endpoints_gone.push(address),
            }
        }
        delta
    }

    fn config(&self) -> Option<Config> {
        self.config.map(|config| Config { epoch: self.epoch, ..config })
    }

    /// Everything there is, but for services whose candidates only the datapath knows (they are of an earlier run).
    pub(super) fn full(&self) -> TableDelta {
        TableDelta {
            config: self.config(),
            peers: self.peers().map(|(number, peer)| (number, *peer)).collect(),
            slots: (1u32..)
                .zip(&self.slots[1..])
                .filter(|(_, slot)| slot.generation != 0)
                .map(|(number, slot)| (number, *slot))
                .collect(),
            endpoints: self.endpoints.iter().map(|(address, endpoint)| (*address, *endpoint)).collect(),
            services: self
                .services
                .iter()
                .filter_map(|(address, service)| Some((*address, service.row, service.candidates.clone()?)))
                .collect(),
            trials: self.services.values().filter_map(|service| Some((service.row.id, service.trial?))).collect(),
            services_gone: Vec::new(),
            endpoints_gone: Vec::new(),
        }
    }

    /// Takes over the rows of an earlier run, so that its flows stay valid. Call it before anything else.
    pub(super) fn adopt(&mut self, snapshot: &Snapshot) {
        for (number, peer) in &snapshot.peers {
            let key = PeerKey { host: peer.host, port: u16::from_be_bytes(peer.port) };
            if !peer.host.is_none() && self.peer_numbers.adopt(key, *number) {
                self.peers.insert(*number, *peer);
                if let Ok(mtu @ 1..) = u16::try_from(peer.mtu)
                    && peer.flags & PEER_OURS != 0
                {
                    self.paths.insert(*number, mtu);
                }
            } else if *peer != Peer::default() {
                self.changes.peers.insert(*number);
            }
        }
        for (address, row) in &snapshot.services {
            if self.services.len() < self.capacity.services() as usize && self.service_ids.insert(row.id) {
                self.services.insert(*address, ServiceRow { row: *row, candidates: None, trial: None });
            } else {
                self.changes.services.insert(*address);
            }
        }
        for (number, slot) in &snapshot.slots {
            self.adopt_slot(*number, *slot);
        }
        self.endpoints = snapshot.endpoints.iter().copied().take(MAX_ENDPOINTS as usize).collect();
        for (namespace, endpoint) in &self.endpoints {
            self.accounts.adopt(*namespace, endpoint.account.into());
        }
        self.epoch = snapshot.epoch;
        let unused: Vec<u32> =
            self.peers.keys().copied().filter(|number| !self.peer_uses.contains_key(number)).collect();
        for number in unused {
            self.forget_unused_peer(number);
        }
    }

    /// A live slot is kept while the service row of its instance address is there; that row is what brings it an owner or its end.
    fn adopt_slot(&mut self, number: u32, slot: Slot) {
        if number == 0 || number >= self.capacity.slots() {
            return;
        }
        if self.slots.len() <= number as usize {
            self.slots.resize(number as usize + 1, Slot::default());
        }
        self.slots[number as usize] = slot;
        if !slot.live() {
            return;
        }
        let Slot { namespace, instance, peer, .. } = slot;
        let kept = (peer == 0 || self.peers.contains_key(&peer))
            && self.services.contains_key(&instance)
            && self.slot_numbers.adopt(Occupant::Adopted { namespace, instance }, number);
        if !kept {
            self.slots[number as usize] = Slot { generation: slot.generation.wrapping_add(1), ..Slot::default() };
            self.changes.slots.insert(number);
            return;
        }
        self.adopted_by_instance.insert((instance, namespace));
        self.adopted_by_namespace.insert((namespace, instance));
        self.use_peer(peer);
    }

    /// Addresses of an earlier run of which nobody has said yet whose they are.
    pub(super) fn unclaimed(&self) -> impl Iterator<Item = Addr> {
        self.services.iter().filter(|(_, service)| service.candidates.is_none()).map(|(address, _)| *address)
    }

    /// The cluster knows nobody with this address: what an earlier run left of it goes.
    pub(super) fn disown(&mut self, address: Addr) {
        if self.services.get(&address).is_some_and(|service| service.candidates.is_none()) {
            self.unserve(address);
            self.drop_adopted_as(address);
        }
    }

    /// Slots of an earlier run whose instance address this is, and that nobody has claimed.
    pub(super) fn drop_adopted_as(&mut self, instance: Addr) {
        let range = (instance, Addr::NONE)..=(instance, Addr([0xff; 16]));
        let gone: Vec<_> = self.adopted_by_instance.range(range).copied().collect();
        for (instance, namespace) in gone {
            self.vacate_occupant(&Occupant::Adopted { namespace, instance });
        }
    }

    fn drop_adopted_in(&mut self, namespace: Addr) {
        let range = (namespace, Addr::NONE)..=(namespace, Addr([0xff; 16]));
        let gone: Vec<_> = self.adopted_by_namespace.range(range).copied().collect();
        for (namespace, instance) in gone {
            self.vacate_occupant(&Occupant::Adopted { namespace, instance });
        }
    }

    /// The slot the instance has, else the one it had in an earlier run, else a new one.
    fn slot_for(&mut self, key: SlotKey, namespace: Addr, instance: Addr) -> Option<u32> {
        let known = Occupant::Known(key);
        let adopted = Occupant::Adopted { namespace, instance };
        if self.slot_numbers.get(&known).is_none() && self.slot_numbers.rename(&adopted, known.clone()) {
            self.adopted_by_instance.remove(&(instance, namespace));
            self.adopted_by_namespace.remove(&(namespace, instance));
        }
        let number = self.slot_numbers.take(known)?;
        if self.slots.len() <= number as usize {
            self.slots.resize(number as usize + 1, Slot::default());
        }
        Some(number)
    }

    fn vacate_occupant(&mut self, occupant: &Occupant) {
        if let Occupant::Adopted { namespace, instance } = occupant {
            self.adopted_by_instance.remove(&(*instance, *namespace));
            self.adopted_by_namespace.remove(&(*namespace, *instance));
        }
        let Some(number) = self.slot_numbers.release(occupant) else { return };
        let generation = self.slot(number).generation.wrapping_add(1);
        self.write_slot(number, Slot { generation, ..Slot::default() });
    }

    pub(super) fn slot(&self, number: u32) -> Slot {
        self.slots.get(number as usize).copied().unwrap_or_default()
    }

    fn write_slot(&mut self, number: u32, slot: Slot) {
        let old = self.slot(number);
        if old == slot {
            return;
        }
        self.slots[number as usize] = slot;
        self.changes.slots.insert(number);
        if slot.live() {
            self.use_peer(slot.peer);
        }
        if old.live() {
            self.leave_peer(old.peer);
        }
    }

    /// The peer's number; a new peer is written. `None` where there are too many.
    fn peer(&mut self, key: PeerKey) -> Option<u32> {
        if let Some(number) = self.peer_numbers.get(&key) {
            return Some(number);
        }
        let Some(number) = self.peer_numbers.take(key) else {
            self.full += 1;
            return None;
        };
        let way = self.way(key.host);
        let peer = Peer {
            host: key.host,
            source: way.source,
            ifindex: way.ifindex,
            port: key.port.to_be_bytes(),
            mtu: self.path_mtu(number, key.host),
            ..Peer::default()
        };
        self.write_peer(number, peer);
        Some(number)
    }

    fn write_peer(&mut self, number: u32, peer: Peer) {
        if self.peers.insert(number, peer) != Some(peer) {
            self.changes.peers.insert(number);
        }
    }

    fn rewrite_peers(&mut self) {
        let peers: Vec<(u32, Peer)> = self.peers().map(|(number, peer)| (number, *peer)).collect();
        for (number, peer) in peers {
            let way = self.way(peer.host);
            let mtu = self.path_mtu(number, peer.host);
            self.write_peer(number, Peer { source: way.source, ifindex: way.ifindex, mtu, ..peer });
        }
    }

    fn way(&self, host: Addr) -> Way {
        let uplink = if self.uplink.source.is_v4() == host.is_v4() { self.uplink } else { Way::default() };
        self.ways.get(&host).copied().unwrap_or(uplink)
    }

    fn use_peer(&mut self, number: u32) {
        if number != 0 {
            *self.peer_uses.entry(number).or_default() += 1;
        }
    }

    fn leave_peer(&mut self, number: u32) {
        if let Some(uses) = self.peer_uses.get_mut(&number) {
            *uses -= 1;
            if *uses == 0 {
                self.peer_uses.remove(&number);
                self.forget_unused_peer(number);
            }
        }
    }

    fn forget_unused_peer(&mut self, number: u32) {
        if number == 0 || self.peer_uses.contains_key(&number) {
            return;
        }
        let Some(peer) = self.peers.remove(&number) else { return };
        self.paths.remove(&number);
        self.changes.peers.insert(number);
        self.peer_numbers.release(&PeerKey { host: peer.host, port: u16::from_be_bytes(peer.port) });
        if !self.peers.values().any(|other| other.host == peer.host) {
            self.ways.remove(&peer.host);
        }
    }

    /// From 1 to as many as there may be: turns and trials have a row for each.
    fn new_service_id(&mut self) -> u32 {
        let after = |id: u32| id % self.capacity.services() + 1;
        let mut id = self.next_service_id;
        while !self.service_ids.insert(id) {
            id = after(id);
        }
        self.next_service_id = after(id);
        id
    }
}

/// How full the tables are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub slots: usize,
    pub peers: usize,
    pub services: usize,
    /// Slots of an earlier run that nobody has claimed yet.
    pub adopted: usize,
    /// How often something had no room.
    pub full: u64,
}
