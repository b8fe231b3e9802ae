//! The tables that the slow path works on at the moment: its own, or the kernel's. They change under way, and no flow notices.

use netmanager_common::abi::{CandidateKey, Config, Endpoint, Flow, FlowKey, Peer, Service, Slot};
use netmanager_common::addr::Addr;
use netmanager_common::pipeline::{Owned, Tables};

use super::ebpf::BpfTables;
use super::projection::{Projection, Write};
use super::tables::MemoryTables;
use super::{DatapathError, FlowRow, Snapshot, Tally};

#[derive(Debug)]
pub(super) enum AnyTables {
    Memory {
        own: Box<MemoryTables>,
        /// The kernel's, of the time before: whatever flow is not copied yet is found there.
        earlier: Option<Box<BpfTables>>,
    },
    Kernel(Box<BpfTables>),
}

impl AnyTables {
    pub(super) fn memory(own: MemoryTables) -> Self {
        Self::Memory { own: Box::new(own), earlier: None }
    }
}

/// Asks whichever tables there are.
macro_rules! whichever {
    ($tables:ident, $any:ident => $ask:expr) => {
        match $tables {
            Self::Memory { own: $any, .. } => $ask,
            Self::Kernel($any) => $ask,
        }
    };
}

impl Tables for AnyTables {
    type Row<T: Copy + 'static> = Owned<T>;

    fn config(&mut self) -> Option<Owned<Config>> {
        whichever!(self, tables => tables.config())
    }

    fn service(&mut self, address: &Addr) -> Option<Owned<Service>> {
        whichever!(self, tables => tables.service(address))
    }

    fn candidate(&mut self, key: &CandidateKey) -> Option<u32> {
        whichever!(self, tables => tables.candidate(key))
    }

    fn slot(&mut self, index: u32) -> Option<Owned<Slot>> {
        whichever!(self, tables => tables.slot(index))
    }

    fn peer(&mut self, index: u32) -> Option<Owned<Peer>> {
        whichever!(self, tables => tables.peer(index))
    }

    fn endpoint(&mut self, address: &Addr) -> Option<Owned<Endpoint>> {
        whichever!(self, tables => tables.endpoint(address))
    }

    fn flow(&mut self, key: &FlowKey) -> Option<Owned<Flow>> {
        match self {
            Self::Memory { own, earlier } => own.flow(key).or_else(|| {
                let flow = earlier.as_mut()?.flow(key)?;
                own.flows_mut().adopt(*key, *flow);
                Some(flow)
            }),
            Self::Kernel(tables) => tables.flow(key),
        }
    }

    fn touch(&mut self, key: &FlowKey, flow: &Owned<Flow>, ends: u8) {
        whichever!(self, tables => tables.touch(key, flow, ends));
    }

    fn learn(&mut self, key: &FlowKey, flow: &mut Flow, new: bool) -> bool {
        whichever!(self, tables => tables.learn(key, flow, new))
    }

    fn forget(&mut self, key: &FlowKey) {
        whichever!(self, tables => tables.forget(key));
    }

    fn pick(&mut self) -> u32 {
        whichever!(self, tables => tables.pick())
    }

    fn turn(&mut self, service: u32) -> u32 {
        whichever!(self, tables => tables.turn(service))
    }

    fn trial(&mut self, service: u32) -> Option<u32> {
        whichever!(self, tables => tables.trial(service))
    }

    fn chosen(&mut self, slot: u32, tcp: bool) {
        whichever!(self, tables => tables.chosen(slot, tcp));
    }

    fn answered(&mut self, slot: u16, refused: bool) {
        whichever!(self, tables => tables.answered(slot, refused));
    }
}

impl Projection for AnyTables {
    fn write(&mut self, write: &Write) -> Result<(), DatapathError> {
        whichever!(self, tables => tables.write(write))
    }

    fn snapshot(&self) -> Result<Snapshot, DatapathError> {
        whichever!(self, tables => tables.snapshot())
    }

    fn tally(&self, slot: u32) -> Tally {
        whichever!(self, tables => tables.tally(slot))
    }

    fn candidates(&self) -> Result<Vec<CandidateKey>, DatapathError> {
        whichever!(self, tables => tables.candidates())
    }

    fn flow_rows(&self) -> Result<Vec<FlowRow>, DatapathError> {
        whichever!(self, tables => tables.flow_rows())
    }
}
