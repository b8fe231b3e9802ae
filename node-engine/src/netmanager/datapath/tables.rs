//! The tables of the law in this process's memory.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

use netmanager_common::abi::{Answers, CandidateKey, Config, Endpoint, Flow, FlowKey, Peer, Service, Slot};
use netmanager_common::addr::Addr;
use netmanager_common::frame::TCP;
use netmanager_common::pipeline::{Owned, Tables};
use netmanager_common::{MAX_ENDPOINTS, MAX_PEERS};

use super::flows::{Flows, now};
use super::projection::{Projection, Write};
use super::{Capacity, DatapathError, FlowRow, Snapshot, Tally};

/// Rows under the same limits as the kernel's maps.
#[derive(Debug, Default)]
pub(super) struct MemoryTables {
    config: Option<Config>,
    services: HashMap<Addr, Service>,
    candidates: HashMap<CandidateKey, u32>,
    slots: Vec<Slot>,
    peers: Vec<Peer>,
    endpoints: HashMap<Addr, Endpoint>,
    flows: Flows,
    random: Random,
    turns: HashMap<u32, u32>,
    tallies: HashMap<u32, Tally>,
    trials: HashMap<u32, u32>,
    capacity: Capacity,
}

impl MemoryTables {
    pub(super) fn with_room(capacity: Capacity) -> Self {
        Self { capacity, ..Self::default() }
    }
}

impl Tables for MemoryTables {
    type Row<T: Copy + 'static> = Owned<T>;

    fn config(&mut self) -> Option<Owned<Config>> {
        self.config.map(Owned)
    }

    fn service(&mut self, address: &Addr) -> Option<Owned<Service>> {
        self.services.get(address).copied().map(Owned)
    }

    fn candidate(&mut self, key: &CandidateKey) -> Option<u32> {
        self.candidates.get(key).copied()
    }

    fn slot(&mut self, index: u32) -> Option<Owned<Slot>> {
        self.slots.get(index as usize).copied().map(Owned)
    }

    fn peer(&mut self, index: u32) -> Option<Owned<Peer>> {
        self.peers.get(index as usize).copied().map(Owned)
    }

    fn endpoint(&mut self, address: &Addr) -> Option<Owned<Endpoint>> {
        self.endpoints.get(address).copied().map(Owned)
    }

    fn flow(&mut self, key: &FlowKey) -> Option<Owned<Flow>> {
        self.flows.get(key).map(Owned)
    }

    fn touch(&mut self, key: &FlowKey, flow: &Owned<Flow>, closes: bool) {
        if flow.unanswered() && key.protocol == u32::from(TCP) {
            self.answered(flow.server, closes);
        }
        self.flows.touch(key, closes, now());
    }

    fn learn(&mut self, key: &FlowKey, flow: &mut Flow, _: bool) -> bool {
        self.flows.learn(*key, *flow, now(), &self.slots)
    }

    fn pick(&mut self) -> u32 {
        self.random.next()
    }

    fn turn(&mut self, service: u32) -> u32 {
        let turn = self.turns.entry(service).or_default();
        *turn = turn.wrapping_add(1);
        turn.wrapping_sub(1)
    }

    fn trial(&mut self, service: u32) -> Option<u32> {
        self.trials.remove(&service)
    }

    fn chosen(&mut self, slot: u32, tcp: bool) {
        self.tallies.entry(slot).or_default().chosen += 1;
        if tcp {
            for index in [0, slot] {
                let asked = &mut self.tallies.entry(index).or_default().answers.asked;
                *asked = asked.wrapping_add(1);
            }
        }
    }

    fn answered(&mut self, slot: u16, refused: bool) {
        let Answers { answered, refused: refusals, .. } = &mut self.tallies.entry(slot.into()).or_default().answers;
        let count = if refused { refusals } else { answered };
        *count = count.wrapping_add(1);
    }
}

impl Projection for MemoryTables {
    fn write(&mut self, write: &Write) -> Result<(), DatapathError> {
        match *write {
            Write::Config(config) => self.config = Some(config),
            Write::Peer(index, peer) => put(&mut self.peers, index, peer, MAX_PEERS, "PEERS")?,
            Write::Slot(index, slot) => {
                if self.slots.get(index as usize).is_some_and(|old| old.generation != slot.generation) {
                    self.tallies.remove(&index);
                }
                put(&mut self.slots, index, slot, self.capacity.slots(), "SLOTS")?;
            }
            Write::Endpoint(address, row) => insert(&mut self.endpoints, address, row, MAX_ENDPOINTS, "ENDPOINTS")?,
            Write::Candidate(key, slot) => {
                insert(&mut self.candidates, key, slot, self.capacity.candidates(), "CANDIDATES")?;
            }
            Write::Trial(service, 0) => drop(self.trials.remove(&service)),
            Write::Trial(service, slot) => drop(self.trials.insert(service, slot)),
            Write::Service(address, row) => {
                insert(&mut self.services, address, row, self.capacity.services(), "SERVICES")?;
            }
            Write::CandidateGone(key) => drop(self.candidates.remove(&key)),
            Write::ServiceGone(address) => drop(self.services.remove(&address)),
            Write::EndpointGone(address) => drop(self.endpoints.remove(&address)),
        }
        Ok(())
    }

    fn tally(&self, slot: u32) -> Tally {
        self.tallies.get(&slot).copied().unwrap_or_default()
    }

    fn snapshot(&self) -> Result<Snapshot, DatapathError> {
        Ok(Snapshot {
            epoch: self.config.map_or(0, |config| config.epoch),
            slots: indexed(&self.slots).filter(|(_, slot)| slot.generation != 0).collect(),
            peers: indexed(&self.peers).filter(|(_, peer)| !peer.host.is_none()).collect(),
            services: self.services.iter().map(|(address, row)| (*address, *row)).collect(),
            endpoints: self.endpoints.iter().map(|(address, row)| (*address, *row)).collect(),
        })
    }

    fn candidates(&self) -> Result<Vec<CandidateKey>, DatapathError> {
        Ok(self.candidates.keys().copied().collect())
    }

    fn flow_rows(&self) -> Result<Vec<FlowRow>, DatapathError> {
        let now = now();
        Ok(self.flows.iter().filter_map(|(key, flow)| FlowRow::chosen(key, flow, now)).collect())
    }
}

fn put<T: Copy + Default>(
    rows: &mut Vec<T>,
    index: u32,
    row: T,
    limit: u32,
    name: &'static str,
) -> Result<(), DatapathError> {
    if index >= limit {
        return Err(DatapathError::Full(name));
    }
    let index = index as usize;
    if rows.len() <= index {
        rows.resize(index + 1, T::default());
    }
    rows[index] = row;
    Ok(())
}

fn insert<K: Eq + std::hash::Hash, V>(
    rows: &mut HashMap<K, V>,
    key: K,
    row: V,
    limit: u32,
    name: &'static str,
) -> Result<(), DatapathError> {
    if rows.len() >= limit as usize && !rows.contains_key(&key) {
        return Err(DatapathError::Full(name));
    }
    rows.insert(key, row);
    Ok(())
}

fn indexed<T: Copy>(rows: &[T]) -> impl Iterator<Item = (u32, T)> {
    (0..).zip(rows.iter().copied())
}

/// Random enough to spread flows over instances: xorshift64* (Vigna 2016), seeded by the process.
#[derive(Debug)]
pub(super) struct Random(u64);

impl Default for Random {
    fn default() -> Self {
        Self(RandomState::new().hash_one(0) | 1)
    }
}

impl Random {
    pub(super) fn next(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn picks_spread_evenly() {
        let mut random = Random::default();
        let mut counts = [0_u32; 8];
        for _ in 0..80_000 {
            counts[(random.next() % 8) as usize] += 1;
        }
        assert!(counts.iter().all(|count| (9_000..11_000).contains(count)), "{counts:?}");
    }

    #[test]
    fn limits_are_those_of_the_kernel() {
        let mut tables = MemoryTables::default();
        let address = |i: u32| Addr::v4(i.to_be_bytes());
        for i in 0..MAX_ENDPOINTS {
            tables.write(&Write::Endpoint(address(i), Endpoint::default())).unwrap();
        }
        let full = tables.write(&Write::Endpoint(address(MAX_ENDPOINTS), Endpoint::default()));
        assert!(matches!(full, Err(DatapathError::Full("ENDPOINTS"))));
        tables.write(&Write::Endpoint(address(0), Endpoint::default())).expect("a row that is there is replaced");
        tables.write(&Write::EndpointGone(address(1))).unwrap();
        tables.write(&Write::Endpoint(address(MAX_ENDPOINTS), Endpoint::default())).expect("there is room again");
    }
}
