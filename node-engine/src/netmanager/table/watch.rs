//! Slots that are worth watching: those of addresses behind which there is a choice.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use netmanager_common::addr::Addr;

#[derive(Clone, Debug, Default)]
pub(super) struct Watch {
    slots: HashMap<Addr, Vec<u32>>,
    addresses: BTreeMap<u32, BTreeSet<Addr>>,
}

impl Watch {
    /// Behind the address there is a choice between these; between fewer than two there is none.
    pub(super) fn set(&mut self, address: Addr, slots: impl IntoIterator<Item = u32>) {
        let slots: Vec<u32> = slots.into_iter().collect();
        if self.slots.get(&address).is_some_and(|old| *old == slots) {
            return;
        }
        for slot in self.slots.remove(&address).unwrap_or_default() {
            if let Some(addresses) = self.addresses.get_mut(&slot) {
                addresses.remove(&address);
                if addresses.is_empty() {
                    self.addresses.remove(&slot);
                }
            }
        }
        if slots.len() > 1 {
            for slot in &slots {
                self.addresses.entry(*slot).or_default().insert(address);
            }
            self.slots.insert(address, slots);
        }
    }

    /// The next slots after this one, so many at most; from the first again where there are no more.
    pub(super) fn next(&self, after: u32, limit: usize) -> Vec<u32> {
        let behind = self.addresses.range(after.saturating_add(1)..);
        behind.chain(self.addresses.range(..=after)).map(|(slot, _)| *slot).take(limit).collect()
    }

    pub(super) fn contains(&self, slot: u32) -> bool {
        self.addresses.contains_key(&slot)
    }

    pub(super) fn addresses(&self, slot: u32) -> impl Iterator<Item = Addr> {
        self.addresses.get(&slot).into_iter().flatten().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_there_is_no_choice_nobody_is_watched() {
        let (a, b) = (Addr::v4([10, 30, 0, 1]), Addr::v4([10, 30, 0, 2]));
        let mut watch = Watch::default();
        watch.set(a, [1]);
        assert_eq!(watch.next(0, 9), [0; 0]);
        watch.set(a, [1, 2]);
        watch.set(b, [2, 3]);
        assert_eq!(watch.next(0, 9), [1, 2, 3]);
        assert_eq!(watch.next(1, 2), [2, 3]);
        assert_eq!(watch.next(2, 2), [3, 1], "and round");
        assert_eq!(watch.addresses(2).collect::<Vec<_>>(), [a, b]);
        watch.set(a, []);
        assert_eq!(watch.next(0, 9), [2, 3]);
        assert!(!watch.contains(1) && watch.contains(2));
        watch.set(b, [3]);
        assert_eq!((watch.next(0, 9), watch.slots.len(), watch.addresses.len()), (vec![], 0, 0));
    }
}
