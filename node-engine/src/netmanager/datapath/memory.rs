//! A datapath without packets: keeps the tables, remembers what it was told, and says what a test wants it to say.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use netmanager_common::addr::Addr;
use netmanager_common::frame::SliceFrame;
use netmanager_common::pipeline::{inbound, outbound};
use netmanager_common::verdict::{DropReason, Verdict};
use tokio::sync::mpsc;

use super::projection::Projection;
use super::tables::MemoryTables;
use super::{Datapath, DatapathError, Event, FlowRow, Port, Snapshot, TableDelta, Tally};

/// The fake. What it is told is visible at once, under the limits and in the order of the real ones.
#[derive(Debug)]
pub struct Memory {
    state: Mutex<State>,
    events: mpsc::UnboundedSender<Event>,
    inbox: tokio::sync::Mutex<mpsc::UnboundedReceiver<Event>>,
}

#[derive(Debug, Default)]
struct State {
    tables: MemoryTables,
    ports: BTreeSet<(String, u32)>,
    deltas: Vec<TableDelta>,
    given_up: Vec<Addr>,
    control: Vec<(SocketAddr, Vec<u8>)>,
}

impl Default for Memory {
    fn default() -> Self {
        let (events, inbox) = mpsc::unbounded_channel();
        Self { state: Mutex::default(), events, inbox: tokio::sync::Mutex::new(inbox) }
    }
}

impl Memory {
    /// What [`Datapath::event`] says next.
    pub fn emit(&self, event: Event) {
        // The receiver lives as long as this.
        let _ = self.events.send(event);
    }

    /// Every delta that was applied or reconciled, oldest first.
    pub fn deltas(&self) -> Vec<TableDelta> {
        self.state().deltas.clone()
    }

    /// Names of the attached ports.
    pub fn ports(&self) -> Vec<String> {
        self.state().ports.iter().map(|(name, _)| name.clone()).collect()
    }

    /// Addresses that were given up.
    pub fn given_up(&self) -> Vec<Addr> {
        self.state().given_up.clone()
    }

    /// Control datagrams that were sent.
    pub fn control(&self) -> Vec<(SocketAddr, Vec<u8>)> {
        self.state().control.clone()
    }

    /// What the law decides over a packet that an instance behind port `ifindex` sends, under the tables as they stand.
    ///
    /// # Errors
    /// The reason for which it would be dropped.
    pub fn outbound(&self, packet: &mut [u8], ifindex: u32) -> Result<Verdict, DropReason> {
        outbound(&mut SliceFrame::new(packet), &mut self.state().tables, ifindex)
    }

    /// What the law decides over a packet that the node at `outer` sends.
    ///
    /// # Errors
    /// The reason for which it would be dropped.
    pub fn inbound(&self, packet: &mut [u8], outer: &Addr) -> Result<Verdict, DropReason> {
        inbound(&mut SliceFrame::new(packet), &mut self.state().tables, outer)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Datapath for Memory {
    fn name(&self) -> &'static str {
        "memory"
    }

    async fn attach(&self, port: &Port) -> Result<(), DatapathError> {
        self.state().ports.insert((port.name.clone(), port.ifindex));
        Ok(())
    }

    async fn detach(&self, port: &Port) -> Result<(), DatapathError> {
        self.state().ports.remove(&(port.name.clone(), port.ifindex));
        Ok(())
    }

    async fn snapshot(&self) -> Result<Snapshot, DatapathError> {
        self.state().tables.snapshot()
    }

    async fn reconcile(&self, full: &TableDelta) -> Result<(), DatapathError> {
        let mut state = self.state();
        state.deltas.push(full.clone());
        state.tables.reconcile(full)
    }

    async fn apply(&self, delta: &TableDelta) -> Result<(), DatapathError> {
        let mut state = self.state();
        state.deltas.push(delta.clone());
        state.tables.apply(delta)
    }

    async fn event(&self) -> Event {
        match self.inbox.lock().await.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }

    async fn give_up(&self, address: Addr) {
        self.state().given_up.push(address);
    }

    async fn send_control(&self, to: SocketAddr, payload: &[u8]) -> Result<(), DatapathError> {
        self.state().control.push((to, payload.to_vec()));
        Ok(())
    }

    async fn send_whole(&self, to: SocketAddr, payload: &[u8]) -> Result<(), DatapathError> {
        self.send_control(to, payload).await
    }

    async fn flows(&self) -> Result<Vec<FlowRow>, DatapathError> {
        self.state().tables.flow_rows()
    }

    async fn tallies(&self, slots: Vec<u32>) -> Vec<Tally> {
        let state = self.state();
        slots.into_iter().map(|slot| state.tables.tally(slot)).collect()
    }

    fn bustle(&self) -> u64 {
        self.state().tables.tally(0).answers.asked.into()
    }

    fn sent(&self) -> u64 {
        0
    }

    fn counters(&self) -> Vec<(String, u64)> {
        Vec::new()
    }
}
