//! The tables of the law in the kernel's maps, reached by system calls: the slow path learns flows where the kernel finds them, and
//! deltas are written where the kernel reads.

use std::convert::Infallible;
use std::fmt;

use aya::Pod;
use aya::maps::{Array, HashMap, Map, MapData, MapError, PerCpuArray};
use netmanager_common::MAX_FLOWS;
use netmanager_common::abi::{CandidateKey, Config, Endpoint, FLOW_SEEN, Flow, FlowKey, Peer, Service, Slot};
use netmanager_common::addr::Addr;
use netmanager_common::frame::TCP;
use netmanager_common::pipeline::{Owned, Tables};
use netmanager_common::verdict::{COUNT_SENT, COUNTERS};

use super::accounts::Accounts;
use super::pins::Pins;
use super::raw::RawMap;
use super::tallies::Tallies;
use crate::netmanager::datapath::counters::kernel_name;
use crate::netmanager::datapath::flows::now;
use crate::netmanager::datapath::projection::{Projection, Write};
use crate::netmanager::datapath::tables::{Random, Rows};
use crate::netmanager::datapath::{Capacity, DatapathError, Snapshot, Tally, pod};

/// The maps that outlive the process, by their names in the object.
pub(super) const PINNED: [&str; 17] = [
    "CONFIG",
    "SERVICES",
    "CANDIDATES",
    "SLOTS",
    "PEERS",
    "ENDPOINTS",
    "FLOWS",
    "CLOCK",
    "OPENED",
    "ALLOWED",
    "HOSTS",
    "NEIGHBOURS",
    "TURNS",
    "CHOSEN",
    "ANSWERS",
    "TRIALS",
    "COUNTERS",
];

/// The maps that are as large as the node wants them; the others are as the object has them.
pub(super) fn sizes(capacity: Capacity) -> [(&'static str, u32); 7] {
    [
        ("SERVICES", capacity.services()),
        ("CANDIDATES", capacity.candidates()),
        ("SLOTS", capacity.slots()),
        ("CHOSEN", capacity.slots()),
        ("ANSWERS", capacity.slots()),
        ("TURNS", capacity.services() + 1),
        ("TRIALS", capacity.services() + 1),
    ]
}

/// The kernel's maps by their pins.
pub(in crate::netmanager::datapath) struct BpfTables {
    config: Array<MapData, Config>,
    services: HashMap<MapData, Addr, Service>,
    candidates: HashMap<MapData, CandidateKey, u32>,
    slots: Array<MapData, Slot>,
    peers: Array<MapData, Peer>,
    hosts: HashMap<MapData, Addr, u32>,
    endpoints: HashMap<MapData, Addr, Endpoint>,
    flows: HashMap<MapData, FlowKey, Flow>,
    turns: Array<MapData, u32>,
    trials: Array<MapData, u32>,
    tallies: Tallies,
    accounts: Accounts,
    random: Random,
    /// Slots and peers again, to be read all at once.
    all: [RawMap; 2],
}

impl BpfTables {
    /// # Errors
    /// A map is missing, or was made with another layout.
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        Ok(Self {
            config: open(pins, "CONFIG")?,
            services: open(pins, "SERVICES")?,
            candidates: open(pins, "CANDIDATES")?,
            slots: open(pins, "SLOTS")?,
            peers: open(pins, "PEERS")?,
            hosts: open(pins, "HOSTS")?,
            endpoints: open(pins, "ENDPOINTS")?,
            flows: open(pins, "FLOWS")?,
            turns: open(pins, "TURNS")?,
            trials: open(pins, "TRIALS")?,
            tallies: Tallies::open(pins)?,
            accounts: Accounts::open(pins)?,
            random: Random::default(),
            all: [raw(pins, "SLOTS")?, raw(pins, "PEERS")?],
        })
    }
}

impl BpfTables {
    /// The row, and that its node is known.
    fn write_peer(&mut self, index: u32, row: &Peer) -> Result<(), DatapathError> {
        let old = self.peers.get(&index, 0).map_or(Addr::NONE, |old| old.host);
        if !row.host.is_none() {
            written("HOSTS", self.hosts.insert(row.host, index, 0))?;
        }
        written("PEERS", self.peers.set(index, row, 0))?;
        // Two peers may be on one node, by two ports.
        if old.is_none() || old == row.host || self.peers.iter().flatten().any(|other| other.host == old) {
            return Ok(());
        }
        written("HOSTS", gone(self.hosts.remove(&old)))
    }

    /// Everything but flows, as it would be written.
    pub(in crate::netmanager::datapath) fn rows(&self) -> Result<Rows, DatapathError> {
        let Snapshot { slots, peers, services, endpoints, .. } = self.snapshot()?;
        let candidates: Vec<(CandidateKey, u32)> = read("CANDIDATES", self.candidates.iter().collect())?;
        let mut writes: Vec<Write> = Vec::new();
        writes.extend(peers.iter().map(|(index, row)| Write::Peer(*index, *row)));
        writes.extend(slots.iter().map(|(index, row)| Write::Slot(*index, *row)));
        writes.extend(endpoints.iter().map(|(address, row)| Write::Endpoint(*address, *row)));
        writes.extend(candidates.iter().map(|(key, slot)| Write::Candidate(*key, *slot)));
        writes.extend(services.iter().map(|(address, row)| Write::Service(*address, *row)));
        let config = self.config.get(&0, 0).ok().filter(|config| !config.service_v4_mask.is_none());
        writes.extend(config.map(Write::Config));
        let turns = services.iter().map(|(_, row)| row.id);
        let turns = turns.map(|id| (id, self.turns.get(&id, 0).unwrap_or(0))).filter(|(_, turn)| *turn != 0).collect();
        let tallies = slots.iter().map(|(slot, _)| *slot).chain([0]).map(|slot| (slot, self.tallies.read(slot)));
        Ok(Rows { writes, turns, tallies: tallies.filter(|(_, tally)| *tally != Tally::default()).collect() })
    }

    /// Takes over the rows of other tables. `slow`: the interface behind which user space reads.
    pub(in crate::netmanager::datapath) fn take_over(&mut self, rows: &Rows, slow: u32) -> Result<(), DatapathError> {
        for write in &rows.writes {
            match *write {
                Write::Config(config) => self.write(&Write::Config(Config { slow_ifindex: slow, ..config }))?,
                ref other => self.write(other)?,
            }
        }
        for (service, turn) in &rows.turns {
            written("TURNS", self.turns.set(*service, turn, 0))?;
        }
        rows.tallies.iter().for_each(|(slot, tally)| self.tallies.put(*slot, tally));
        Ok(())
    }

    pub(super) fn endpoints(&self) -> Result<Vec<(Addr, Endpoint)>, DatapathError> {
        read("ENDPOINTS", self.endpoints.iter().collect())
    }

    /// Flows, in no order; those that cannot be read are left out.
    pub(super) fn some_flows(&self) -> impl Iterator<Item = (FlowKey, Flow)> {
        self.flows.iter().take(MAX_FLOWS as usize).filter_map(Result::ok)
    }

    /// Takes over a flow as it is.
    pub(in crate::netmanager::datapath) fn adopt(&mut self, key: &FlowKey, flow: &Flow) -> Result<(), DatapathError> {
        // It had its place on its account, and keeps it.
        self.accounts.open_row(flow);
        written("FLOWS", self.flows.insert(key, flow, 0))
    }
}

/// `linux/bpf.h`: only where there is a row.
const BPF_EXIST: u64 = 2;

/// A map by its pin. The sizes are those of the map in the kernel, so a pin of another layout is refused.
pub(super) fn open<M: TryFrom<Map, Error = MapError>>(pins: &Pins, name: &'static str) -> Result<M, DatapathError> {
    let path = pins.map(name);
    MapData::from_pin(&path).and_then(Map::from_map_data).and_then(M::try_from).map_err(|error| {
        let reason = format!("{}: {error}; if it was made by another version, uninstall that first", path.display());
        DatapathError::Unsupported { what: "adopt map", reason }
    })
}

impl Tables for BpfTables {
    type Row<T: Copy + 'static> = Owned<T>;

    fn config(&mut self) -> Option<Owned<Config>> {
        self.config.get(&0, 0).ok().filter(|config| !config.service_v4_mask.is_none()).map(Owned)
    }

    fn service(&mut self, address: &Addr) -> Option<Owned<Service>> {
        self.services.get(address, 0).ok().map(Owned)
    }

    fn candidate(&mut self, key: &CandidateKey) -> Option<u32> {
        self.candidates.get(key, 0).ok()
    }

    fn slot(&mut self, index: u32) -> Option<Owned<Slot>> {
        self.slots.get(&index, 0).ok().map(Owned)
    }

    fn peer(&mut self, index: u32) -> Option<Owned<Peer>> {
        self.peers.get(&index, 0).ok().map(Owned)
    }

    fn endpoint(&mut self, address: &Addr) -> Option<Owned<Endpoint>> {
        self.endpoints.get(address, 0).ok().map(Owned)
    }

    fn flow(&mut self, key: &FlowKey) -> Option<Owned<Flow>> {
        self.flows.get(key, 0).ok().map(Owned)
    }

    fn touch(&mut self, key: &FlowKey, flow: &Owned<Flow>, ends: u8) {
        if flow.unanswered() && key.protocol == u32::from(TCP) {
            self.answered(flow.server, ends != 0);
        }
        let state = flow.state | FLOW_SEEN | ends;
        let touched = Flow { seen: now(), state, ..flow.0 };
        if touched != flow.0 {
            // A row that has just gone stays away: BPF_EXIST.
            let _ = self.flows.insert(key, touched, BPF_EXIST);
        }
    }

    fn learn(&mut self, key: &FlowKey, flow: &mut Flow, new: bool) -> bool {
        if new && !self.accounts.open_row(flow) {
            return false;
        }
        flow.seen = now();
        self.flows.insert(key, *flow, 0).is_ok()
    }

    fn forget(&mut self, key: &FlowKey) {
        // Gone already is gone.
        let _ = self.flows.remove(key);
    }

    fn pick(&mut self) -> u32 {
        self.random.next()
    }

    /// The kernel's programs may take the same turn at this moment: then two flows go to the same instance.
    fn turn(&mut self, service: u32) -> u32 {
        let turn = self.turns.get(&service, 0).unwrap_or(0);
        let _ = self.turns.set(service, turn.wrapping_add(1), 0);
        turn
    }

    fn trial(&mut self, service: u32) -> Option<u32> {
        let slot = self.trials.get(&service, 0).ok().filter(|slot| *slot != 0)?;
        let _ = self.trials.set(service, 0, 0);
        Some(slot)
    }

    fn chosen(&mut self, slot: u32, tcp: bool) {
        self.tallies.chosen(slot, tcp);
    }

    fn answered(&mut self, slot: u16, refused: bool) {
        self.tallies.answered(slot.into(), refused);
    }
}

impl Projection for BpfTables {
    fn write(&mut self, write: &Write) -> Result<(), DatapathError> {
        match write {
            Write::Config(row) => written("CONFIG", self.config.set(0, row, 0)),
            Write::Peer(index, row) => self.write_peer(*index, row),
            Write::Slot(index, row) => {
                if self.slots.get(index, 0).is_ok_and(|old| old.generation != row.generation) {
                    self.tallies.clear(*index);
                }
                written("SLOTS", self.slots.set(*index, row, 0))
            }
            Write::Endpoint(key, row) => {
                self.accounts.admit(row.account)?;
                written("ENDPOINTS", self.endpoints.insert(key, row, 0))
            }
            Write::Candidate(key, slot) => written("CANDIDATES", self.candidates.insert(key, slot, 0)),
            Write::Trial(service, slot) => written("TRIALS", self.trials.set(*service, slot, 0)),
            Write::Service(key, row) => written("SERVICES", self.services.insert(key, row, 0)),
            Write::CandidateGone(key) => written("CANDIDATES", gone(self.candidates.remove(key))),
            Write::ServiceGone(key) => written("SERVICES", gone(self.services.remove(key))),
            Write::EndpointGone(key) => written("ENDPOINTS", gone(self.endpoints.remove(key))),
        }
    }

    fn tally(&self, slot: u32) -> Tally {
        self.tallies.read(slot)
    }

    fn snapshot(&self) -> Result<Snapshot, DatapathError> {
        Ok(Snapshot {
            epoch: self.config.get(&0, 0).map_or(0, |config| config.epoch),
            slots: indexed(&self.all[0], |slot: &Slot| slot.generation != 0),
            peers: indexed(&self.all[1], |peer: &Peer| !peer.host.is_none()),
            services: read("SERVICES", self.services.iter().collect())?,
            endpoints: self.endpoints()?,
        })
    }

    fn candidates(&self) -> Result<Vec<CandidateKey>, DatapathError> {
        read("CANDIDATES", self.candidates.keys().collect())
    }
}

pub(super) fn written(map: &'static str, result: Result<(), MapError>) -> Result<(), DatapathError> {
    match result {
        Ok(()) => Ok(()),
        Err(MapError::OutOfBounds { .. }) => Err(DatapathError::Full(map)),
        Err(error) if os_error(&error) == Some(libc::E2BIG) => Err(DatapathError::Full(map)),
        Err(error) => Err(DatapathError::Step { step: "write map", reason: format!("{map}: {}", causes(&error)) }),
    }
}

/// Removing what is not there is a success.
pub(super) fn gone(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(error) if os_error(&error) == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

fn os_error(error: &MapError) -> Option<i32> {
    match error {
        MapError::SyscallError(error) => error.io_error.raw_os_error(),
        _ => None,
    }
}

fn read<T>(map: &'static str, rows: Result<Vec<T>, MapError>) -> Result<Vec<T>, DatapathError> {
    rows.map_err(|error| DatapathError::Step { step: "read map", reason: format!("{map}: {}", causes(&error)) })
}

/// The rows of an array that are in use.
fn indexed<T: Pod>(array: &RawMap, used: impl Fn(&T) -> bool) -> Vec<(u32, T)> {
    let mut rows = Vec::new();
    let Ok(()) = array.each(|index, row| {
        let index = index.try_into().map(u32::from_ne_bytes);
        if let (Ok(index), Some(row)) = (index, pod::row(row))
            && used(&row)
        {
            rows.push((index, row));
        }
        Ok::<(), Infallible>(())
    });
    rows
}

fn raw(pins: &Pins, name: &'static str) -> Result<RawMap, DatapathError> {
    let path = pins.map(name);
    RawMap::open(&path).map_err(|error| DatapathError::Unsupported {
        what: "adopt map",
        reason: format!("{}: {error}", path.display()),
    })
}

pub(super) fn causes(error: &MapError) -> String {
    match error {
        MapError::SyscallError(error) => format!("{}: {}", error.call, error.io_error),
        other => other.to_string(),
    }
}

impl fmt::Debug for BpfTables {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BpfTables").finish_non_exhaustive()
    }
}

/// What the kernel programs counted.
pub(super) struct KernelCounters(PerCpuArray<MapData, u64>);

impl KernelCounters {
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        open(pins, "COUNTERS").map(Self)
    }

    pub(super) fn sent(&self) -> u64 {
        self.0.get(&COUNT_SENT, 0).map_or(0, |cells| cells.iter().sum())
    }

    /// Sums over all CPUs; a counter that cannot be read is left out.
    pub(super) fn read(&self) -> Vec<(&'static str, u64)> {
        let cells = (0..COUNTERS).filter_map(|index| Some((index, kernel_name(index)?)));
        cells.filter_map(|(index, name)| Some((name, self.0.get(&index, 0).ok()?.iter().sum()))).collect()
    }
}

impl fmt::Debug for KernelCounters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelCounters").finish_non_exhaustive()
    }
}
