//! What the overlay remembers over a reboot, so that it works before the cluster does: the addresses that instances had, because other
//! nodes remember them too, and what the cluster's table said of the services that somebody here uses. The cluster's word replaces
//! all of it as soon as there is one.

use std::collections::BTreeMap;

use super::core::{Core, Effect};
use super::ipam::Exhausted;
use crate::model::{Addresses, InstanceId, Query, ServiceName, TableAnswer};

/// An address for each place in a subnet.
const MOST: usize = 64;

/// What an earlier run knew.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    pub addresses: BTreeMap<InstanceId, Addresses>,
    pub services: Vec<TableAnswer>,
}

/// What the cluster has told, to be remembered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Learned {
    Answer(ServiceName, TableAnswer),
    /// There is no such service, or nobody here uses it any more.
    Forgotten(ServiceName),
}

impl Core {
    /// Takes what was known for what is.
    pub(super) fn recall(&mut self, memory: Memory, out: &mut Vec<Effect>) {
        self.remembered = memory.addresses;
        for answer in memory.services {
            let Some(service) = answer.service.clone() else { continue };
            let outcomes = self.interests.recall(&service, self.now);
            self.pursue(outcomes, out);
            let delta = self.table.update(&answer);
            self.project(delta, out);
        }
    }

    /// An address for the instance: the one it had, else one that nobody else had.
    pub(super) fn lease(&mut self, id: &InstanceId) -> Option<Result<Addresses, Exhausted>> {
        let remembered = &self.remembered;
        let ipam = self.home.ipam()?;
        if let Some(had) = remembered.get(id) {
            // Where it cannot have that one any more it gets another.
            let _ = ipam.adopt(id, *had);
        }
        let kept = |addresses: &Addresses| remembered.values().any(|other| other == addresses);
        let leased = ipam.allocate_beside(id, kept);
        if let Ok(addresses) = leased {
            self.remember(id, addresses);
        }
        Some(leased)
    }

    pub(super) fn remember(&mut self, id: &InstanceId, addresses: Addresses) {
        self.remembered.retain(|other, had| other == id || *had != addresses);
        self.remembered.insert(id.clone(), addresses);
        while self.remembered.len() > MOST {
            let Some(gone) = self.remembered.keys().find(|other| !self.members.contains_key(*other)).cloned() else {
                break;
            };
            self.remembered.remove(&gone);
        }
    }

    /// Has remembered what an answer says.
    pub(super) fn learn(&self, answer: &TableAnswer, out: &mut Vec<Effect>) {
        out.extend(match (&answer.service, &answer.query) {
            (Some(service), _) => Some(Effect::Learn(Learned::Answer(service.clone(), answer.clone()))),
            (None, Some(Query::Name(service))) => Some(Effect::Learn(Learned::Forgotten(service.clone()))),
            (None, _) => None,
        });
    }

    /// Has the addresses remembered, where they have changed.
    pub(super) fn keep_remembered(&mut self, out: &mut Vec<Effect>) {
        if self.remembered != self.remembered_kept {
            self.remembered_kept.clone_from(&self.remembered);
            out.push(Effect::Remember(self.remembered.clone()));
        }
    }
}
