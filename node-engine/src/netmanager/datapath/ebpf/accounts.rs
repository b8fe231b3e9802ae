//! Keeps the kernel's flow table: the clock its rows are dated by, the removal of rows whose time is over, and how many each account may
//! open. A thread of its own, as walking a large map takes a while.

use std::collections::HashMap as Counts;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use aya::maps::{Array, HashMap, MapData};
use netmanager_common::abi::{Flow, FlowKey, Slot};
use tracing::warn;

use super::maps::{gone, open, written};
use super::pins::Pins;
use crate::netmanager::datapath::DatapathError;
use crate::netmanager::datapath::flows::{Rows, account, expired, limit, now};

/// The clock's step.
const TICK: Duration = Duration::from_secs(1);
/// Between two walks of the table lie at least this, and a hundred times what the last one took.
const WALK: Duration = Duration::from_secs(5);

/// Rows that each account has opened, and may have opened.
pub(super) struct Accounts {
    opened: Array<MapData, u64>,
    allowed: Array<MapData, u64>,
}

impl Accounts {
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        Ok(Self { opened: open(pins, "OPENED")?, allowed: open(pins, "ALLOWED")? })
    }

    /// One more row on the flow's account; false where that is exhausted. The kernel's programs do the same.
    pub(super) fn open_row(&mut self, flow: &Flow) -> bool {
        let account = account(flow);
        let opened = self.opened.get(&account, 0).unwrap_or(0);
        if flow.account != 0 && opened >= self.allowed.get(&account, 0).unwrap_or(0) {
            return false;
        }
        self.opened.set(account, opened + 1, 0).is_ok()
    }

    /// An account that has never been used may begin; how far it may go is set by the next walk.
    pub(super) fn admit(&mut self, number: u16) -> Result<(), DatapathError> {
        for (account, cached) in [(2 * u32::from(number), false), (2 * u32::from(number) + 1, true)] {
            if number != 0 && self.allowed.get(&account, 0).is_ok_and(|allowed| allowed == 0) {
                self.grant(account, 0, limit(cached, 0) / 8)?;
            }
        }
        Ok(())
    }

    fn grant(&mut self, account: u32, rows: u64, limit: u64) -> Result<(), DatapathError> {
        let opened = self.opened.get(&account, 0).unwrap_or(0);
        let allowed = opened.saturating_sub(rows).saturating_add(limit);
        if self.allowed.get(&account, 0).is_ok_and(|before| before == allowed) {
            return Ok(());
        }
        written("ALLOWED", self.allowed.set(account, allowed, 0))
    }
}

/// The thread that keeps the table, until dropped.
#[derive(Debug)]
pub(super) struct Keeper {
    /// Its end is the thread's sign to stop.
    _running: Sender<()>,
}

impl Keeper {
    pub(super) fn start(pins: &Pins) -> Result<Self, DatapathError> {
        let mut table = FlowTable::open(pins)?;
        table.tick()?;
        let (running, stop) = channel();
        thread::Builder::new()
            .name("flows".into())
            .spawn(move || table.keep(&stop))
            .map_err(|error| DatapathError::Step { step: "start flow keeper", reason: error.to_string() })?;
        Ok(Self { _running: running })
    }
}

struct FlowTable {
    flows: HashMap<MapData, FlowKey, Flow>,
    slots: Array<MapData, Slot>,
    clock: Array<MapData, u32>,
    accounts: Accounts,
    /// Rows of each account that has any, and what it had opened by then.
    known: Counts<u32, (u64, u64)>,
}

impl FlowTable {
    fn open(pins: &Pins) -> Result<Self, DatapathError> {
        Ok(Self {
            flows: open(pins, "FLOWS")?,
            slots: open(pins, "SLOTS")?,
            clock: open(pins, "CLOCK")?,
            accounts: Accounts::open(pins)?,
            known: Counts::new(),
        })
    }

    fn keep(&mut self, stop: &Receiver<()>) {
        let mut next_walk = Instant::now();
        let mut complained = false;
        while stop.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
            let done = self.tick().and_then(|()| {
                let started = Instant::now();
                if started >= next_walk {
                    self.walk()?;
                    next_walk = started + WALK.max(started.elapsed() * 100);
                }
                self.share_out()
            });
            if let Err(error) = &done
                && !complained
            {
                warn!(%error, "the kernel's flow table cannot be kept");
            }
            complained = done.is_err();
        }
    }

    fn tick(&mut self) -> Result<(), DatapathError> {
        written("CLOCK", self.clock.set(0, now(), 0))
    }

    /// Removes what is over, and counts what is left.
    fn walk(&mut self) -> Result<(), DatapathError> {
        let time = now();
        let mut over = Vec::new();
        let mut counts: Counts<u32, u64> = Counts::new();
        let keys: Vec<FlowKey> = self.flows.keys().filter_map(Result::ok).collect();
        for key in keys {
            let Ok(flow) = self.flows.get(&key, 0) else { continue };
            if expired(&key, &flow, time, self) {
                over.push(key);
            } else {
                *counts.entry(account(&flow)).or_default() += 1;
            }
        }
        for key in over {
            written("FLOWS", gone(self.flows.remove(&key)))?;
        }
        for account in self.known.keys() {
            counts.entry(*account).or_default();
        }
        let opened = |account: &u32| self.accounts.opened.get(account, 0).unwrap_or(0);
        self.known = counts.iter().map(|(account, rows)| (*account, (*rows, opened(account)))).collect();
        Ok(())
    }

    /// Twice what is free, for each, counting what was opened since the last walk.
    fn share_out(&mut self) -> Result<(), DatapathError> {
        let rows: Vec<(u32, u64)> = self
            .known
            .iter()
            .map(|(account, (rows, before))| {
                let opened = self.accounts.opened.get(account, 0).unwrap_or(*before);
                (*account, rows + opened.saturating_sub(*before))
            })
            .collect();
        for cached in [false, true] {
            let kind = || rows.iter().filter(|(account, _)| (account & 1 == 1) == cached);
            let used = kind().map(|(_, rows)| rows).sum();
            for (account, rows) in kind() {
                self.accounts.grant(*account, *rows, limit(cached, used))?;
            }
        }
        Ok(())
    }
}

impl Rows for FlowTable {
    fn row(&self, key: &FlowKey) -> Option<Flow> {
        self.flows.get(key, 0).ok()
    }

    fn slot(&self, index: u32) -> Option<Slot> {
        self.slots.get(&index, 0).ok()
    }
}
