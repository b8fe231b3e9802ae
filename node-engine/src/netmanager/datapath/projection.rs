//! From a [`TableDelta`] to single writes, in the order that never leaves a packet with a half-written row. The same plan drives the
//! tables in memory and those in the kernel.

use std::collections::HashSet;

use netmanager_common::abi::{CandidateKey, Config, Endpoint, Peer, Service, Slot};
use netmanager_common::addr::Addr;
use netmanager_common::pipeline::Tables;

use super::{DatapathError, FlowRow, Snapshot, TableDelta, Tally};

/// One change of one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Write {
    Config(Config),
    Peer(u32, Peer),
    Slot(u32, Slot),
    Endpoint(Addr, Endpoint),
    Candidate(CandidateKey, u32),
    /// By a service's id, the slot to try.
    Trial(u32, u32),
    Service(Addr, Service),
    CandidateGone(CandidateKey),
    ServiceGone(Addr),
    EndpointGone(Addr),
}

/// Tables that are written by deltas only.
pub(super) trait Projection: Tables {
    /// Makes one change. Removing what is not there is a success.
    fn write(&mut self, write: &Write) -> Result<(), DatapathError>;

    fn snapshot(&self) -> Result<Snapshot, DatapathError>;

    /// Of the flows that the slot was chosen for since its instance came.
    fn tally(&self, slot: u32) -> Tally;

    /// Every candidate's key, also of lists that no service row names any more.
    fn candidates(&self) -> Result<Vec<CandidateKey>, DatapathError>;

    /// The flows that are remembered now; none where somebody else lists them.
    fn flow_rows(&self) -> Result<Vec<FlowRow>, DatapathError> {
        Ok(Vec::new())
    }

    /// Applies the delta. A row that cannot be written does not keep the others from it; the first error is returned.
    fn apply(&mut self, delta: &TableDelta) -> Result<(), DatapathError> {
        let groups = plan(delta, |address| self.service(address).map(|row| *row));
        let mut result = Ok(());
        for group in groups {
            // Later writes of a group rely on the earlier ones: a service row on its candidates.
            let done = group.iter().try_for_each(|write| self.write(write));
            result = result.and(done);
        }
        result
    }

    /// Applies the delta and removes what it does not name.
    fn reconcile(&mut self, full: &TableDelta) -> Result<(), DatapathError> {
        let applied = self.apply(full);
        let surplus = surplus(full, &self.snapshot()?);
        let removed = self.apply(&surplus);

        let named: HashSet<CandidateKey> = full.services.iter().flat_map(|(_, row, _)| list(row)).collect();
        let mut result = applied.and(removed);
        for key in self.candidates()? {
            if !named.contains(&key) {
                result = result.and(self.write(&Write::CandidateGone(key)));
            }
        }
        result
    }
}

/// The writes of a delta, in order; a group is abandoned at its first failure. `current` is the row a service has now.
fn plan(delta: &TableDelta, mut current: impl FnMut(&Addr) -> Option<Service>) -> Vec<Vec<Write>> {
    let one = |write| vec![write];
    let (live, dead): (Vec<_>, Vec<_>) = delta.slots.iter().copied().partition(|(_, slot)| slot.live());

    let mut groups = Vec::new();
    let (gone, peers): (Vec<_>, Vec<_>) = delta.peers.iter().copied().partition(|(_, peer)| peer.host.is_none());
    groups.extend(peers.into_iter().map(|(index, peer)| one(Write::Peer(index, peer))));
    groups.extend(live.into_iter().map(|(index, slot)| one(Write::Slot(index, slot))));
    groups.extend(delta.endpoints.iter().map(|(address, row)| one(Write::Endpoint(*address, *row))));
    // Before the rows that say that there is something to try.
    groups.extend(delta.trials.iter().map(|(service, slot)| one(Write::Trial(*service, *slot))));
    for (address, row, slots) in &delta.services {
        groups.push(replace(*address, *row, slots, current(address)));
    }
    for address in &delta.services_gone {
        let mut group = one(Write::ServiceGone(*address));
        group.extend(current(address).iter().flat_map(list).map(Write::CandidateGone));
        groups.push(group);
    }
    // A slot loses its instance after the rows that led to it: a new flow must not meet an empty slot while another would do.
    groups.extend(dead.into_iter().map(|(index, slot)| one(Write::Slot(index, slot))));
    groups.extend(delta.endpoints_gone.iter().map(|address| one(Write::EndpointGone(*address))));
    // A peer goes after the slots that named it: an instance whose node has changed its address is never without one.
    groups.extend(gone.into_iter().map(|(index, peer)| one(Write::Peer(index, peer))));
    // Its epoch tells flows to read the other rows again: they must be there by then.
    groups.extend(delta.config.map(Write::Config).map(one));
    groups
}

/// The new list whole, then the row that makes it valid, then the old list away.
fn replace(address: Addr, row: Service, slots: &[u32], old: Option<Service>) -> Vec<Write> {
    let mut writes: Vec<Write> = list(&row).zip(slots).map(|(key, slot)| Write::Candidate(key, *slot)).collect();
    writes.push(Write::Service(address, row));
    let valid: HashSet<CandidateKey> = list(&row).collect();
    writes.extend(old.iter().flat_map(list).filter(|key| !valid.contains(key)).map(Write::CandidateGone));
    writes
}

/// The keys of a service's candidates.
fn list(row: &Service) -> impl Iterator<Item = CandidateKey> + use<> {
    let Service { id, epoch, count, .. } = *row;
    (0..count).map(move |index| CandidateKey { service: id, epoch, index })
}

/// What the tables hold beyond `full`, as removals.
fn surplus(full: &TableDelta, held: &Snapshot) -> TableDelta {
    let services: HashSet<&Addr> = full.services.iter().map(|(address, ..)| address).collect();
    let endpoints: HashSet<&Addr> = full.endpoints.iter().map(|(address, _)| address).collect();
    let slots: HashSet<u32> = full.slots.iter().map(|(index, _)| *index).collect();
    let empty = |slot: &Slot| Slot { generation: slot.generation.wrapping_add(1), ..Slot::default() };
    TableDelta {
        services_gone: held.services.iter().map(|(address, _)| *address).filter(|a| !services.contains(a)).collect(),
        endpoints_gone: held.endpoints.iter().map(|(address, _)| *address).filter(|a| !endpoints.contains(a)).collect(),
        slots: held
            .slots
            .iter()
            .filter(|(index, slot)| slot.live() && !slots.contains(index))
            .map(|(index, slot)| (*index, empty(slot)))
            .collect(),
        ..TableDelta::default()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tables::MemoryTables;
    use super::*;

    const A: Addr = Addr::v4([10, 30, 0, 1]);
    const B: Addr = Addr::v4([10, 30, 0, 2]);

    #[test]
    fn every_prefix_of_a_plan_leaves_whole_services() {
        let mut tables = MemoryTables::default();
        tables.apply(&delta(A, 1, &[1, 2, 3])).unwrap();

        let next = delta(A, 2, &[4, 5]);
        for write in plan(&next, |address| tables.service(address).map(|row| *row)).concat() {
            tables.write(&write).unwrap();
            let row = *tables.service(&A).unwrap();
            let slots: Vec<u32> =
                list(&row).map(|key| tables.candidate(&key).expect("a candidate is missing")).collect();
            assert!(slots == [1, 2, 3] || slots == [4, 5], "{slots:?} after {write:?}");
            assert!(slots.iter().all(|slot| tables.slot(*slot).is_some_and(|slot| slot.live())));
        }
        assert_eq!(tables.candidates().unwrap().len(), 2, "the old list is away");
    }

    #[test]
    fn the_same_delta_twice_changes_nothing() {
        let mut tables = MemoryTables::default();
        let change = delta(A, 1, &[1, 2]);
        tables.apply(&change).unwrap();
        let before = (tables.snapshot().unwrap(), sorted(tables.candidates().unwrap()));
        tables.apply(&change).unwrap();
        assert_eq!(before, (tables.snapshot().unwrap(), sorted(tables.candidates().unwrap())));
    }

    #[test]
    fn removals_come_last_and_slots_after_services() {
        let mut change = delta(A, 1, &[1]);
        change.slots.push((9, Slot { generation: 4, ..Slot::default() }));
        change.services_gone.push(B);
        change.endpoints_gone.push(B);
        change.peers = vec![(1, Peer::default()), (2, Peer { host: B, ..Peer::default() })];
        let writes = plan(&change, |_| None).concat();
        let at = |wanted: &dyn Fn(&Write) -> bool| writes.iter().position(wanted).expect("not planned");
        let order = [
            at(&|w| matches!(w, Write::Peer(2, _))),
            at(&|w| matches!(w, Write::Slot(1, _))),
            at(&|w| matches!(w, Write::Candidate(..))),
            at(&|w| matches!(w, Write::Service(..))),
            at(&|w| matches!(w, Write::ServiceGone(_))),
            at(&|w| matches!(w, Write::Slot(9, _))),
            at(&|w| matches!(w, Write::EndpointGone(_))),
            at(&|w| matches!(w, Write::Peer(1, _))),
        ];
        assert!(order.is_sorted(), "{writes:#?}");
    }

    #[test]
    fn reconcile_leaves_only_what_is_named() {
        let mut tables = MemoryTables::default();
        tables.apply(&delta(A, 1, &[1, 2])).unwrap();
        tables.apply(&delta(B, 1, &[7])).unwrap();
        tables.write(&Write::Endpoint(B, Endpoint::default())).unwrap();
        let orphan = CandidateKey { service: 99, epoch: 1, index: 0 };
        tables.write(&Write::Candidate(orphan, 7)).unwrap();

        let full = delta(A, 2, &[1]);
        tables.reconcile(&full).unwrap();

        let snapshot = tables.snapshot().unwrap();
        assert_eq!(snapshot.services.iter().map(|(address, _)| *address).collect::<Vec<_>>(), [A]);
        assert_eq!(snapshot.endpoints, []);
        let generations: Vec<(u32, u32)> =
            snapshot.slots.iter().map(|(index, slot)| (*index, slot.generation)).collect();
        assert_eq!(generations, [(1, 1), (2, 2), (7, 2)], "slots that nobody names have lost their instance");
        assert_eq!(tables.candidates().unwrap(), [CandidateKey { service: 1, epoch: 2, index: 0 }]);
    }

    #[test]
    fn a_row_that_does_not_fit_keeps_no_other_out() {
        let mut tables = MemoryTables::default();
        let mut change = delta(A, 1, &[1]);
        change.peers.push((u32::MAX, Peer::default()));
        assert!(matches!(tables.apply(&change), Err(DatapathError::Full("PEERS"))));
        assert!(tables.service(&A).is_some());
    }

    fn delta(address: Addr, epoch: u32, slots: &[u32]) -> TableDelta {
        let id = u32::from(address.0[15]);
        let row = Service { id, epoch, count: slots.len() as u32, policy: 1, first: slots[0] };
        TableDelta {
            slots: slots.iter().map(|slot| (*slot, Slot { generation: 1, ..Slot::default() })).collect(),
            services: vec![(address, row, slots.to_vec())],
            ..TableDelta::default()
        }
    }

    fn sorted(mut keys: Vec<CandidateKey>) -> Vec<CandidateKey> {
        keys.sort_by_key(|key| (key.service, key.epoch, key.index));
        keys
    }
}
