//! From what services say to the rows of the datapath: who claims an address, who has which slot, who is behind which service address.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use netmanager_common::abi::{POLICY_INSTANCE, Slot};
use netmanager_common::addr::Addr;

use super::balance::{Candidate, Choice, sound, with};
use super::claims::Claims;
use super::leaving::Left;
use super::projection::{PeerKey, Placement, SlotKey};
use super::row::{Row, Side};
use super::{Claimed, Entry, ServiceTable, in_subnet, sides};
use crate::model::{InstanceId, Policy, ServiceName, TableRow};

impl ServiceTable {
    /// Brings claims, then slots, then service rows up to date with what these services say.
    pub(super) fn reproject(&mut self, services: BTreeSet<ServiceName>) {
        let mut addresses = BTreeSet::new();
        let mut touched = BTreeSet::new();
        for service in services {
            self.reclaim(&service, &mut addresses, &mut touched);
            touched.insert(service);
        }
        // All arrivals before all departures: a peer that one instance leaves and another joins stays the same peer.
        let mut gone = Vec::new();
        for service in &touched {
            gone.extend(self.place(service, &mut addresses));
            addresses.extend(self.addresses(service));
        }
        for (key, slot) in gone {
            self.part(key, slot);
        }
        for address in addresses {
            self.serve(address, false);
        }
        for service in touched {
            if self.entries.get(&service).is_some_and(Entry::is_empty) {
                self.entries.remove(&service);
            }
        }
    }

    /// Replaces the service's claims. Notes the addresses it gained or lost, and who else claims them.
    fn reclaim(&mut self, service: &ServiceName, addresses: &mut BTreeSet<Addr>, others: &mut BTreeSet<ServiceName>) {
        let after = self.claims_of(service);
        let Some(entry) = self.entries.get_mut(service) else { return };
        let before = std::mem::replace(&mut entry.claimed, after.clone());
        change_claims(&mut self.namespaces, service, &before.namespaces, &after.namespaces, others);
        change_claims(&mut self.semantics, service, &before.semantics, &after.semantics, others);
        addresses.extend(before.semantics.into_keys());
    }

    fn claims_of(&self, service: &ServiceName) -> Claimed {
        let mut claimed = Claimed::default();
        let Some(entry) = self.entries.get(service) else { return claimed };
        claimed.semantics.extend(entry.remembered.keys().map(|address| (*address, 0)));
        claimed.semantics.extend(entry.semantics.keys().map(|address| (*address, entry.sequence)));
        for (row, side) in sides(&entry.rows) {
            if self.admit(service, row, side).is_some() {
                claimed.namespaces.insert(side.namespace, entry.sequence);
                claimed.semantics.insert(side.instance, entry.sequence);
            }
        }
        claimed
    }

    /// Where this row says the instance is: here, or on a peer. `None` where the row cannot be true any more.
    pub(super) fn admit(&self, service: &ServiceName, row: &Row, side: &Side) -> Option<Option<PeerKey>> {
        if let Some(owner) = self.leased.get(&side.namespace) {
            return (owner.service == *service && owner.number == row.number).then_some(None);
        }
        let here = row.host == self.host || self.subnet.is_some_and(|subnet| in_subnet(subnet, side.namespace));
        (!here).then_some(Some(PeerKey { host: row.host, port: row.port }))
    }

    /// The instance is in no row any more. It keeps its flows for a while, unless somebody else has its addresses, or it is not here
    /// where it was.
    fn part(&mut self, key: SlotKey, slot: u32) {
        let Slot { peer, namespace, instance, .. } = self.projection.slot(slot);
        let taken = self.namespaces.winner(namespace).is_some() || self.semantics.winner(instance).is_some();
        let stays = match peer {
            0 => self.leased.get(&namespace) == Some(&key.instance),
            _ => !self.leased.contains_key(&namespace),
        };
        if taken || !stays || self.drain.is_zero() {
            self.projection.vacate(&key);
            return;
        }
        let until = (peer != 0).then(|| self.now + self.drain);
        self.leaving.insert(key, Left { slot, peer, namespace, instance, until });
    }

    /// Nothing is there any more of these.
    pub(super) fn end(&mut self, gone: Vec<SlotKey>) {
        for key in gone {
            let Some(left) = self.leaving.remove(&key) else { continue };
            self.projection.vacate(&key);
            self.serve(left.instance, false);
        }
    }

    /// Writes anew the lists that these slots may be in.
    pub(super) fn choose_again(&mut self, slots: Vec<u32>) {
        let addresses: BTreeSet<Addr> = slots.into_iter().flat_map(|slot| self.watch.addresses(slot)).collect();
        for address in addresses {
            self.serve(address, false);
        }
    }

    /// Gives the service's instances their slots and returns who has to leave. Notes the addresses that somebody else leaves with.
    pub(super) fn place(&mut self, service: &ServiceName, addresses: &mut BTreeSet<Addr>) -> Vec<(SlotKey, u32)> {
        let Some(entry) = self.entries.get(service) else { return Vec::new() };
        let mut wanted: Vec<(SlotKey, Placement)> = Vec::new();
        for (row, side) in sides(&entry.rows) {
            let Some(peer) = self.admit(service, row, side) else { continue };
            let wins = self.namespaces.winner(side.namespace) == Some(service)
                && self.semantics.winner(side.instance) == Some(service);
            if wins {
                let instance = InstanceId { service: service.clone(), number: row.number };
                let key = SlotKey { instance, is_v4: side.namespace.is_v4() };
                wanted.push((key, Placement { namespace: side.namespace, instance: side.instance, peer }));
            }
        }
        let mut slots = BTreeMap::new();
        for (key, placement) in wanted {
            self.leaving.remove(&key);
            for address in [placement.namespace, placement.instance] {
                if let Some(left) = self.leaving.at(address).map(|(key, _)| key.clone()) {
                    addresses.extend(self.leaving.remove(&left).map(|left| left.instance));
                    self.projection.vacate(&left);
                }
            }
            if let Some(slot) = self.projection.place(key.clone(), placement) {
                slots.insert(key, slot);
            }
        }
        let Some(entry) = self.entries.get_mut(service) else { return Vec::new() };
        let mut before = std::mem::replace(&mut entry.slots, slots);
        before.retain(|key, _| !entry.slots.contains_key(key));
        before.into_iter().collect()
    }

    /// Writes or removes the row of one service address. `measured`: there are new figures.
    pub(super) fn serve(&mut self, address: Addr, measured: bool) {
        let Some(entry) = self.semantics.winner(address).and_then(|winner| self.entries.get(winner)) else {
            self.choices.remove(&address);
            self.watch.set(address, []);
            // What comes from who leaves is still believed.
            match self.leaving.at(address).filter(|(_, left)| left.instance == address).map(|(_, left)| left.slot) {
                Some(slot) if self.projection.serve(address, POLICY_INSTANCE, vec![slot], None) => {}
                _ => self.projection.unserve(address),
            }
            return;
        };
        let instance = sides(&entry.rows).find(|(_, side)| side.instance == address).map(|(row, _)| row.number);
        let served = if let Some(number) = instance {
            self.choices.remove(&address);
            self.watch.set(address, []);
            self.projection.serve(address, POLICY_INSTANCE, entry.slots_of(address, number), None)
        } else {
            let policy = entry.policy(address).unwrap_or(Policy::RoundRobin);
            let candidates = self.candidates(entry, address);
            self.watch.set(address, candidates.iter().map(|one| one.slot));
            let (candidates, trial) = sound(candidates, |slot| self.health.standing(slot));
            let (chosen_by, choice) = self.choices.entry(address).or_insert_with(|| (policy, Choice::default()));
            if *chosen_by != policy {
                (*chosen_by, *choice) = (policy, Choice::default());
            }
            let trial = trial.filter(|trial| choice.clone().list(policy, &with(&candidates, *trial), false).has(trial));
            let trial = trial.map(|trial| trial.slot);
            let list = choice.list(policy, &candidates, measured);
            self.projection.serve(address, list.pick, list.slots, trial)
                // A list in which each stands more than once may have no room where a plain one has.
                || self.projection.serve(address, list.pick, candidates.iter().map(|one| one.slot).collect(), trial)
        };
        if !served {
            self.projection.unserve(address);
        }
        self.projection.drop_adopted_as(address);
    }

    /// Who may be chosen behind an address, in the order of their numbers.
    pub(super) fn candidates(&self, entry: &Entry, address: Addr) -> Vec<Candidate> {
        let weights: HashMap<u32, u32> = entry.rows.iter().map(|row| (row.number, row.weight)).collect();
        let fits = entry.slots.iter().filter(|(key, _)| key.is_v4 == address.is_v4());
        let candidate = |(key, slot): (&SlotKey, &u32)| {
            let peer = self.projection.peer_of(*slot);
            Candidate {
                number: key.instance.number,
                slot: *slot,
                peer,
                weight: weights.get(&key.instance.number).copied().unwrap_or(TableRow::DEFAULT_WEIGHT),
                rtt: self.figures.rtts.get(&peer).copied(),
                flows: self.figures.flows.get(slot).copied().unwrap_or(0),
                busy: self.figures.busy.get(&peer).copied(),
            }
        };
        fits.map(candidate).collect()
    }
}

fn change_claims(
    claims: &mut Claims,
    service: &ServiceName,
    before: &BTreeMap<Addr, u64>,
    after: &BTreeMap<Addr, u64>,
    others: &mut BTreeSet<ServiceName>,
) {
    for (address, rank) in before {
        claims.remove(*address, *rank, service);
    }
    for (address, rank) in after {
        claims.insert(*address, *rank, service);
    }
    for address in before.keys().chain(after.keys()) {
        others.extend(claims.claimants(*address).cloned());
    }
}
