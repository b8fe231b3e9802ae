//! Instances that are not in the table any more and still have flows: nobody is sent there anew, and whoever is there already stays until
//! the time is over, or until it is known that nothing is there. Pure: time is an argument.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use netmanager_common::addr::Addr;

use super::projection::SlotKey;
use crate::model::{InstanceId, ServiceName};

/// An instance that leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Left {
    pub(super) slot: u32,
    /// Number of the node it is on; 0 for this one.
    pub(super) peer: u32,
    pub(super) namespace: Addr,
    pub(super) instance: Addr,
    /// `None`: as long as it is connected here.
    pub(super) until: Option<Duration>,
}

#[derive(Clone, Debug, Default)]
pub(super) struct Leaving {
    by_key: BTreeMap<SlotKey, Left>,
    /// By namespace and by instance address.
    by_address: HashMap<Addr, SlotKey>,
}

impl Leaving {
    pub(super) fn insert(&mut self, key: SlotKey, left: Left) {
        self.remove(&key);
        self.by_address.insert(left.namespace, key.clone());
        self.by_address.insert(left.instance, key.clone());
        self.by_key.insert(key, left);
    }

    pub(super) fn remove(&mut self, key: &SlotKey) -> Option<Left> {
        let left = self.by_key.remove(key)?;
        for address in [left.namespace, left.instance] {
            if self.by_address.get(&address) == Some(key) {
                self.by_address.remove(&address);
            }
        }
        Some(left)
    }

    /// Who leaves with this address, as its namespace's or as its own.
    pub(super) fn at(&self, address: Addr) -> Option<(&SlotKey, &Left)> {
        self.by_key.get_key_value(self.by_address.get(&address)?)
    }

    /// The instance's, one for each family.
    pub(super) fn of(&self, instance: &InstanceId) -> Vec<SlotKey> {
        let keys = [true, false].map(|is_v4| SlotKey { instance: instance.clone(), is_v4 });
        keys.into_iter().filter(|key| self.by_key.contains_key(key)).collect()
    }

    pub(super) fn of_service<'a>(
        &'a self,
        service: &'a ServiceName,
    ) -> impl Iterator<Item = (&'a SlotKey, &'a Left)> + 'a {
        self.by_key.iter().filter(move |(key, _)| key.instance.service == *service)
    }

    pub(super) fn all(&self) -> impl Iterator<Item = (&SlotKey, &Left)> {
        self.by_key.iter()
    }

    /// Those whose time is over.
    pub(super) fn due(&self, now: Duration) -> Vec<SlotKey> {
        let over = |left: &Left| left.until.is_some_and(|until| until <= now);
        self.by_key.iter().filter(|(_, left)| over(left)).map(|(key, _)| key.clone()).collect()
    }
}
