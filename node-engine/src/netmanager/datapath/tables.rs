//! The tables of the law in this process's memory.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, RandomState};
use std::io;
use std::path::Path;

use aya::Pod;
use netmanager_common::abi::{Answers, CandidateKey, Config, Endpoint, Flow, FlowKey, Peer, Service, Slot};
use netmanager_common::addr::Addr;
use netmanager_common::frame::TCP;
use netmanager_common::pipeline::{Owned, Tables};
use netmanager_common::{MAX_ENDPOINTS, MAX_PEERS};

use super::flows::{Flows, now};
use super::projection::{Projection, Write};
use super::sheet::{self, Sheet};
use super::{Capacity, DatapathError, FlowRow, Snapshot, Tally};

/// Rows under the same limits as the kernel's maps.
#[derive(Debug, Default)]
pub(super) struct MemoryTables {
    config: Sheet<u32, Config>,
    services: Sheet<Addr, Service>,
    candidates: Sheet<CandidateKey, u32>,
    slots: Sheet<u32, Slot>,
    peers: Sheet<u32, Peer>,
    endpoints: Sheet<Addr, Endpoint>,
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

    /// With the rows that an earlier run has left there, which are kept from now on.
    pub(super) fn open(root: &Path, capacity: Capacity) -> io::Result<Self> {
        let directory = sheet::ensure_directory(root, capacity)?;
        let mut tables = Self {
            config: Sheet::open(&directory, "config")?,
            services: Sheet::open(&directory, "services")?,
            candidates: Sheet::open(&directory, "candidates")?,
            slots: Sheet::open(&directory, "slots")?,
            peers: Sheet::open(&directory, "peers")?,
            endpoints: Sheet::open(&directory, "endpoints")?,
            flows: Flows::open(&directory)?,
            ..Self::with_room(capacity)
        };
        // A list that long was never written, and somebody would walk it.
        let absurd = |(address, row): (Addr, Service)| (row.count > capacity.candidates()).then_some(address);
        let absurd: Vec<Addr> = tables.services.iter().filter_map(absurd).collect();
        for address in &absurd {
            tables.services.remove(address);
        }
        Ok(tables)
    }

    pub(super) fn flows(&self) -> &Flows {
        &self.flows
    }

    pub(super) fn flows_mut(&mut self) -> &mut Flows {
        &mut self.flows
    }

    /// Everything but flows, as it would be written.
    pub(super) fn rows(&self) -> Rows {
        let mut writes: Vec<Write> = Vec::new();
        writes.extend(self.peers.iter().map(|(index, row)| Write::Peer(index, row)));
        writes.extend(self.slots.iter().map(|(index, row)| Write::Slot(index, row)));
        writes.extend(self.endpoints.iter().map(|(address, row)| Write::Endpoint(address, row)));
        writes.extend(self.candidates.iter().map(|(key, slot)| Write::Candidate(key, slot)));
        writes.extend(self.services.iter().map(|(address, row)| Write::Service(address, row)));
        writes.extend(self.config.iter().map(|(_, row)| Write::Config(row)));
        let turns = self.turns.iter().map(|(service, turn)| (*service, *turn)).collect();
        let tallies = self.tallies.iter().map(|(slot, tally)| (*slot, *tally)).collect();
        Rows { writes, turns, tallies }
    }

    /// Takes over the rows of other tables.
    pub(super) fn take_over(&mut self, rows: &Rows) -> Result<(), DatapathError> {
        rows.writes.iter().try_for_each(|write| self.write(write))?;
        self.turns.extend(rows.turns.iter().copied());
        self.tallies.extend(rows.tallies.iter().copied());
        Ok(())
    }
}

/// All that tables hold, but for flows.
#[derive(Clone, Debug, Default)]
pub(super) struct Rows {
    /// In an order that never leaves a packet with half of what it needs.
    pub(super) writes: Vec<Write>,
    /// By service: whose turn it is.
    pub(super) turns: Vec<(u32, u32)>,
    /// By slot: what became of those that it was chosen for.
    pub(super) tallies: Vec<(u32, Tally)>,
}

impl Tables for MemoryTables {
    type Row<T: Copy + 'static> = Owned<T>;

    fn config(&mut self) -> Option<Owned<Config>> {
        self.config.get(&0).map(Owned)
    }

    fn service(&mut self, address: &Addr) -> Option<Owned<Service>> {
        self.services.get(address).map(Owned)
    }

    fn candidate(&mut self, key: &CandidateKey) -> Option<u32> {
        self.candidates.get(key)
    }

    fn slot(&mut self, index: u32) -> Option<Owned<Slot>> {
        self.slots.get(&index).map(Owned)
    }

    fn peer(&mut self, index: u32) -> Option<Owned<Peer>> {
        self.peers.get(&index).map(Owned)
    }

    fn endpoint(&mut self, address: &Addr) -> Option<Owned<Endpoint>> {
        self.endpoints.get(address).map(Owned)
    }

    fn flow(&mut self, key: &FlowKey) -> Option<Owned<Flow>> {
        self.flows.get(key).map(Owned)
    }

    fn touch(&mut self, key: &FlowKey, flow: &Owned<Flow>, ends: u8) {
        if flow.unanswered() && key.protocol == u32::from(TCP) {
            self.answered(flow.server, ends != 0);
        }
        self.flows.touch(key, ends, now());
    }

    fn learn(&mut self, key: &FlowKey, flow: &mut Flow, _: bool) -> bool {
        self.flows.learn(*key, *flow, now(), &self.slots)
    }

    fn forget(&mut self, key: &FlowKey) {
        self.flows.forget(key);
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
            Write::Config(config) => self.config.insert(0, config),
            Write::Peer(index, peer) => put(&mut self.peers, index, peer, MAX_PEERS, "PEERS")?,
            Write::Slot(index, slot) => {
                if self.slots.get(&index).is_some_and(|old| old.generation != slot.generation) {
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
            epoch: self.config.get(&0).map_or(0, |config| config.epoch),
            slots: indexed(&self.slots, |slot| slot.generation != 0),
            peers: indexed(&self.peers, |peer| !peer.host.is_none()),
            services: self.services.iter().collect(),
            endpoints: self.endpoints.iter().collect(),
        })
    }

    fn candidates(&self) -> Result<Vec<CandidateKey>, DatapathError> {
        Ok(self.candidates.iter().map(|(key, _)| key).collect())
    }

    fn flow_rows(&self) -> Result<Vec<FlowRow>, DatapathError> {
        let now = now();
        Ok(self.flows.iter().filter_map(|(key, flow)| FlowRow::chosen(&key, &flow, now)).collect())
    }
}

/// A row of what the kernel has as an array: an index beyond its end is refused.
fn put<V: Pod>(
    rows: &mut Sheet<u32, V>,
    index: u32,
    row: V,
    limit: u32,
    name: &'static str,
) -> Result<(), DatapathError> {
    if index >= limit {
        return Err(DatapathError::Full(name));
    }
    rows.insert(index, row);
    Ok(())
}

fn insert<K: Pod + Eq + Hash, V: Pod>(
    rows: &mut Sheet<K, V>,
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

/// The rows of an array that are in use, in order.
fn indexed<V: Pod>(rows: &Sheet<u32, V>, used: impl Fn(&V) -> bool) -> Vec<(u32, V)> {
    let mut rows: Vec<(u32, V)> = rows.iter().filter(|(_, row)| used(row)).collect();
    rows.sort_unstable_by_key(|(index, _)| *index);
    rows
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
