//! Who says that an address is theirs. The newest statement wins; what a service merely remembers loses to any statement.

use std::collections::{BTreeSet, HashMap};

use netmanager_common::addr::Addr;

use crate::model::ServiceName;

/// Which services claim which address, and when they said so.
#[derive(Clone, Debug, Default)]
pub(super) struct Claims {
    by_address: HashMap<Addr, BTreeSet<(u64, ServiceName)>>,
}

impl Claims {
    pub(super) fn insert(&mut self, address: Addr, sequence: u64, service: &ServiceName) {
        self.by_address.entry(address).or_default().insert((sequence, service.clone()));
    }

    pub(super) fn remove(&mut self, address: Addr, sequence: u64, service: &ServiceName) {
        let Some(claimants) = self.by_address.get_mut(&address) else { return };
        claimants.remove(&(sequence, service.clone()));
        if claimants.is_empty() {
            self.by_address.remove(&address);
        }
    }

    pub(super) fn winner(&self, address: Addr) -> Option<&ServiceName> {
        self.by_address.get(&address)?.last().map(|(_, service)| service)
    }

    pub(super) fn claimants(&self, address: Addr) -> impl Iterator<Item = &ServiceName> {
        self.by_address.get(&address).into_iter().flatten().map(|(_, service)| service)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_claim_wins_and_its_end_restores_the_older() {
        let (old, new): (ServiceName, ServiceName) = ("a.a.a.a".parse().unwrap(), "b.b.b.b".parse().unwrap());
        let address = Addr::v4([10, 30, 0, 1]);
        let mut claims = Claims::default();
        assert_eq!(claims.winner(address), None);
        claims.insert(address, 7, &old);
        claims.insert(address, 9, &new);
        assert_eq!(claims.winner(address), Some(&new));
        claims.remove(address, 9, &new);
        assert_eq!(claims.winner(address), Some(&old));
        claims.remove(address, 7, &old);
        assert_eq!(claims.winner(address), None);
        assert!(claims.by_address.is_empty());
    }
}
