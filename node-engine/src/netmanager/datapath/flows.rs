//! A bounded map from flows to what is known of them, with second-chance eviction and a share per source: one instance that opens
//! flow after flow pushes out its own flows, not those of others.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

use netmanager_common::abi::{FlowKey, ReplyKey};
use netmanager_common::addr::Addr;

/// The most that one source may hold of the whole.
const SHARE: usize = 8;

/// A key that says on whose account its entry is.
pub(super) trait Account: Copy + Eq + Hash {
    fn account(&self) -> Addr;
}

impl Account for FlowKey {
    fn account(&self) -> Addr {
        self.source
    }
}

impl Account for ReplyKey {
    fn account(&self) -> Addr {
        self.client
    }
}

#[derive(Debug)]
pub(super) struct Flows<K, V> {
    entries: HashMap<K, Entry<V>>,
    /// The keys of each account, oldest first.
    accounts: HashMap<Addr, VecDeque<K>>,
    limit: usize,
}

#[derive(Debug)]
struct Entry<V> {
    value: V,
    /// Read since it was last passed over.
    used: bool,
}

impl<K: Account, V: Copy> Flows<K, V> {
    pub(super) fn new(limit: usize) -> Self {
        Self { entries: HashMap::new(), accounts: HashMap::new(), limit }
    }

    pub(super) fn get(&mut self, key: &K) -> Option<V> {
        let entry = self.entries.get_mut(key)?;
        entry.used = true;
        Some(entry.value)
    }

    pub(super) fn insert(&mut self, key: K, value: V) {
        if let Some(entry) = self.entries.get_mut(&key) {
            *entry = Entry { value, used: true };
            return;
        }
        let account = key.account();
        let own = self.accounts.get(&account).map_or(0, VecDeque::len);
        if own >= (self.limit / SHARE).max(1) {
            self.evict(account);
        } else if self.entries.len() >= self.limit
            && let Some(fullest) = self.accounts.iter().max_by_key(|(_, keys)| keys.len()).map(|(account, _)| *account)
        {
            self.evict(fullest);
        }
        self.entries.insert(key, Entry { value, used: false });
        self.accounts.entry(account).or_default().push_back(key);
    }

    /// Removes the account's oldest entry that was not read since it was last passed over.
    fn evict(&mut self, account: Addr) {
        let Some(keys) = self.accounts.get_mut(&account) else { return };
        while let Some(key) = keys.pop_front() {
            match self.entries.get_mut(&key) {
                Some(entry) if entry.used => {
                    entry.used = false;
                    keys.push_back(key);
                }
                _ => {
                    self.entries.remove(&key);
                    break;
                }
            }
        }
        if keys.is_empty() {
            self.accounts.remove(&account);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: usize = 64;

    #[test]
    fn what_is_used_outlives_what_is_not() {
        let mut flows = Flows::new(LIMIT);
        for port in 0..8 {
            flows.insert(key(1, port), port);
        }
        assert_eq!(flows.get(&key(1, 0)), Some(0));
        flows.insert(key(1, 8), 8);
        assert_eq!(flows.get(&key(1, 0)), Some(0), "was read");
        assert_eq!(flows.get(&key(1, 1)), None, "the oldest that nobody read");
    }

    #[test]
    fn a_flood_of_flows_evicts_only_its_own() {
        let mut flows = Flows::new(LIMIT);
        for port in 0..8 {
            flows.insert(key(1, port), port);
        }
        for port in 0..10_000 {
            flows.insert(key(2, port), port);
        }
        assert!((0..8).all(|port| flows.get(&key(1, port)).is_some()));
    }

    #[test]
    fn never_more_than_the_limit() {
        let mut flows = Flows::new(LIMIT);
        for source in 0..100 {
            for port in 0..20 {
                flows.insert(key(source, port), port);
                assert!(flows.entries.len() <= LIMIT);
                assert_eq!(flows.entries.len(), flows.accounts.values().map(VecDeque::len).sum::<usize>());
            }
        }
        assert_eq!(flows.get(&key(99, 19)), Some(19), "the newest has got in");
    }

    fn key(source: u8, port: u16) -> FlowKey {
        FlowKey { source: Addr::v4([10, 18, 0, source]), source_port: port.to_be_bytes(), ..FlowKey::default() }
    }
}
