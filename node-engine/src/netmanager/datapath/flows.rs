//! When a flow's rows may go, and how many an account may have. Rows are never pushed out by others: a table that fills up refuses new
//! flows, and those of the greediest first.
//!
//! Each account may have twice as many rows as are free (Choudhury and Hahne, "Dynamic queue length thresholds", 1998): one alone gets
//! two thirds of the table, two get two fifths each, and there is always something left for who comes next.

use std::collections::HashMap;
use std::io;
use std::path::Path;

use netmanager_common::MAX_FLOWS;
use netmanager_common::abi::{
    FLOW_CACHED, FLOW_CHOSEN, FLOW_CLOSING, FLOW_HOST, FLOW_REPLY, FLOW_RESET, FLOW_SEEN, Flow, FlowKey, Slot,
};
use netmanager_common::frame::{TCP, UDP};

use super::sheet::Sheet;

/// Rows that must be remembered, and rows that only spare look-ups: neither takes room from the other.
pub(super) const REMEMBERED: u64 = MAX_FLOWS as u64 / 4 * 3;
pub(super) const CACHED: u64 = MAX_FLOWS as u64 / 4;

/// Seconds of silence after which a flow is over: RFC 5382 asks for two hours and four minutes of an established connection, RFC 4787
/// for two minutes of UDP. A connection that nobody has answered, or that is over, is not worth that; of one that only one side has
/// ended the other may have much to say yet: RFC 5382 asks for four minutes.
const TCP_ESTABLISHED: u32 = 2 * 3600 + 4 * 60;
const TCP_OPENING: u32 = 60;
const TCP_HALF_CLOSED: u32 = 4 * 60;
const TCP_CLOSED: u32 = 30;
const UDP_SILENCE: u32 = 180;
const ECHO_SILENCE: u32 = 30;
/// Found out anew at once should it be needed again.
const CACHED_SILENCE: u32 = 60;

/// The index of an account's row counters.
pub(super) fn account(flow: &Flow) -> u32 {
    2 * u32::from(flow.account) + u32::from(flow.kind == FLOW_CACHED)
}

/// How many rows an account may have where `used` rows of the kind are in use by all.
pub(super) fn limit(cached: bool, used: u64) -> u64 {
    2 * (if cached { CACHED } else { REMEMBERED }).saturating_sub(used)
}

/// Where rows are looked up.
pub(super) trait Rows {
    fn row(&self, key: &FlowKey) -> Option<Flow>;
    fn slot(&self, index: u32) -> Option<Slot>;
}

/// May the row go at `now`? A chosen flow and its replies live and die together.
pub(super) fn expired(key: &FlowKey, flow: &Flow, now: u32, rows: &impl Rows) -> bool {
    let silence = now.saturating_sub(flow.seen);
    match flow.kind {
        FLOW_CACHED => silence >= CACHED_SILENCE,
        _ if silence < ECHO_SILENCE => false,
        _ => {
            let other = pair(key, flow, rows).and_then(|key| rows.row(&key)).filter(|other| other.kind != flow.kind);
            let silence = other.map_or(silence, |other| silence.min(now.saturating_sub(other.seen)));
            silence >= patience(key.protocol as u8, flow, other.as_ref())
        }
    }
}

fn patience(protocol: u8, flow: &Flow, other: Option<&Flow>) -> u32 {
    // A host's row has what both sides have said.
    let other = other.map_or(0, |other| other.state & !(FLOW_CLOSING * u8::from(other.kind == FLOW_HOST)));
    match protocol {
        TCP => ending(flow.state, other).unwrap_or(match (flow.state | other) & FLOW_SEEN {
            0 => TCP_OPENING,
            _ => TCP_ESTABLISHED,
        }),
        UDP => UDP_SILENCE,
        _ => ECHO_SILENCE,
    }
}

/// How long a connection is kept by what its sides have said of its end; `None`: they have said nothing.
pub(super) fn ending(one: u8, other: u8) -> Option<u32> {
    let (any, both) = (one | other, one & other);
    if any & FLOW_RESET != 0 || both & FLOW_CLOSING != 0 {
        Some(TCP_CLOSED)
    } else {
        (any & FLOW_CLOSING != 0).then_some(TCP_HALF_CLOSED)
    }
}

/// The row of the other direction.
fn pair(key: &FlowKey, flow: &Flow, rows: &impl Rows) -> Option<FlowKey> {
    let slot = rows.slot(flow.slot).filter(|slot| slot.generation == flow.generation)?;
    let back = FlowKey { source_port: key.destination_port, destination_port: key.source_port, ..*key };
    match (flow.kind, flow.port, flow.ifindex) {
        // its replies come by the tunnel, or from a neighbour
        (FLOW_CHOSEN, _, 0) => Some(FlowKey { source: slot.instance, destination: key.source, ..back }),
        (FLOW_CHOSEN, ..) => Some(FlowKey { source: slot.namespace, destination: flow.source, ..back }),
        (FLOW_REPLY, 0, _) => Some(FlowKey { source: key.destination, destination: flow.source, ..back }),
        (FLOW_REPLY, ..) => Some(FlowKey { source: slot.namespace, destination: flow.source, ..back }),
        _ => None,
    }
}

/// Flows in this process's memory.
#[derive(Debug, Default)]
pub(super) struct Flows {
    rows: Sheet<FlowKey, Flow>,
    /// Rows by account, and in sum: those that must be remembered, those that are cached.
    counts: HashMap<u32, u64>,
    used: [u64; 2],
    last_sweep: u32,
    /// Keys learnt since somebody began to copy the rows.
    news: Option<Vec<FlowKey>>,
}

/// Seconds between two sweeps, however many flows want in.
const SWEEP: u32 = 5;
/// By how much a flow's time in the file may be behind.
const BEHIND: u32 = 10;

impl Flows {
    /// With the rows of an earlier run, which are kept from now on.
    pub(super) fn open(directory: &Path) -> io::Result<Self> {
        let mut flows = Self { rows: Sheet::open(directory, "flows")?, ..Self::default() };
        let rows: Vec<Flow> = flows.rows.iter().map(|(_, flow)| flow).collect();
        rows.iter().for_each(|flow| flows.count(flow));
        Ok(flows)
    }

    pub(super) fn get(&self, key: &FlowKey) -> Option<Flow> {
        self.rows.get(key)
    }

    pub(super) fn touch(&mut self, key: &FlowKey, ends: u8, now: u32) {
        self.rows.change(key, |flow| {
            let state = flow.state | FLOW_SEEN | ends;
            // Every so many seconds of its life: cheap, and the same for all of a pair.
            let keep = state != flow.state || now / BEHIND != flow.seen / BEHIND;
            (flow.seen, flow.state) = (now, state);
            keep
        });
    }

    /// All rows, in no order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (FlowKey, Flow)> {
        self.rows.iter()
    }

    /// False where there is no room for it; then what was there stays. A row on the same account takes the place that it has.
    pub(super) fn learn(&mut self, key: FlowKey, flow: Flow, now: u32, slots: &Sheet<u32, Slot>) -> bool {
        if now.saturating_sub(self.last_sweep) >= SWEEP {
            self.sweep(now, slots);
        }
        let number = account(&flow);
        let cached = number & 1;
        let replaces = self.get(&key).is_some_and(|present| account(&present) == number);
        let used = self.used[cached as usize];
        if !replaces && self.counts.get(&number).copied().unwrap_or(0) >= limit(cached == 1, used) {
            return false;
        }
        self.forget(&key);
        self.adopt(key, Flow { seen: now, ..flow });
        true
    }

    /// Takes over a row as it is, unless there is a newer one.
    pub(super) fn adopt(&mut self, key: FlowKey, flow: Flow) {
        if self.rows.contains_key(&key) {
            return;
        }
        self.rows.insert(key, flow);
        self.count(&flow);
        if let Some(news) = &mut self.news {
            news.push(key);
        }
    }

    /// From now on, which rows come is noted.
    pub(super) fn note_news(&mut self) {
        self.news = Some(Vec::new());
    }

    /// What has come since, as it is now.
    pub(super) fn news(&mut self) -> Vec<(FlowKey, Flow)> {
        let keys = self.news.take().unwrap_or_default();
        keys.into_iter().filter_map(|key| Some((key, self.get(&key)?))).collect()
    }

    fn count(&mut self, flow: &Flow) {
        let account = account(flow);
        *self.counts.entry(account).or_default() += 1;
        self.used[(account & 1) as usize] += 1;
    }

    fn sweep(&mut self, now: u32, slots: &Sheet<u32, Slot>) {
        self.last_sweep = now;
        let view = View { rows: &self.rows, slots };
        let gone: Vec<FlowKey> =
            self.rows.iter().filter(|(key, flow)| expired(key, flow, now, &view)).map(|(key, _)| key).collect();
        for key in &gone {
            self.forget(key);
        }
    }

    pub(super) fn forget(&mut self, key: &FlowKey) {
        let Some(flow) = self.rows.remove(key) else { return };
        let account = account(&flow);
        self.used[(account & 1) as usize] -= 1;
        if let Some(count) = self.counts.get_mut(&account) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&account);
            }
        }
    }
}

struct View<'a> {
    rows: &'a Sheet<FlowKey, Flow>,
    slots: &'a Sheet<u32, Slot>,
}

impl Rows for View<'_> {
    fn row(&self, key: &FlowKey) -> Option<Flow> {
        self.rows.get(key)
    }

    fn slot(&self, index: u32) -> Option<Slot> {
        self.slots.get(&index)
    }
}

/// The clock of flows: seconds that pass while the machine sleeps not, the same for every process since boot.
pub(super) fn now() -> u32 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC_COARSE)
        .map_or(0, |time| u32::try_from(time.tv_sec()).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use netmanager_common::addr::Addr;

    use super::*;

    const SLOT: Slot =
        Slot { generation: 1, peer: 1, namespace: Addr::v4([10, 18, 1, 2]), instance: Addr::v4([10, 30, 0, 9]) };

    #[test]
    fn a_greedy_account_is_refused_and_another_is_not() {
        let (mut flows, slots) = (Flows::default(), slots());
        let greedy = Flow { account: 1, ..chosen() };
        let taken = (0..MAX_FLOWS).take_while(|port| flows.learn(key(*port), greedy, 1, &slots)).count() as u64;
        assert_eq!(taken, REMEMBERED / 3 * 2);
        assert!(flows.learn(key(0), greedy, 1, &slots), "a row that is there is replaced");
        let modest = Flow { account: 2, ..chosen() };
        let others = (MAX_FLOWS..).take_while(|port| flows.learn(key(*port), modest, 1, &slots)).count() as u64;
        assert!(others > 10_000, "only {others}");
        assert!(flows.get(&key(5)).is_some(), "nothing was pushed out");
        let cached = Flow { kind: FLOW_CACHED, ..greedy };
        assert!(flows.learn(key(3 * MAX_FLOWS), cached, 1, &slots), "what is cached has its own room");
    }

    #[test]
    fn a_flow_that_is_there_is_not_lost_for_want_of_room() {
        let (mut flows, slots) = (Flows::default(), slots());
        let [one, other] = [1, 2].map(|account| Flow { account, ..chosen() });
        // What each of two may have when they share the table, and one of them more than that.
        let alone = (0..MAX_FLOWS).take_while(|port| flows.learn(key(*port), one, 1, &slots)).count() as u64;
        let shared = (MAX_FLOWS..).take_while(|port| flows.learn(key(*port), other, 1, &slots)).count() as u64;
        assert!(alone > limit(false, alone + shared) + 1);
        assert!(!flows.learn(key(MAX_FLOWS / 2 + MAX_FLOWS), one, 2, &slots), "there is no room for more");
        assert!(flows.learn(key(0), Flow { epoch: 9, ..one }, 2, &slots), "nor is more wanted");
        assert_eq!(flows.get(&key(0)).map(|flow| (flow.epoch, flow.seen)), Some((9, 2)));
        assert!(!flows.learn(key(MAX_FLOWS), one, 2, &slots), "another's place is none");
        assert_eq!(flows.get(&key(MAX_FLOWS)).map(|flow| flow.account), Some(2), "and nobody has lost it");
        assert_eq!(flows.used[0], alone + shared);
    }

    #[test]
    fn both_directions_of_a_flow_end_together() {
        const RESET: u8 = FLOW_CLOSING | FLOW_RESET;
        for (protocol, answered, [there_ends, back_ends], patience) in [
            (UDP, true, [0, 0], 180),
            (UDP, false, [0, 0], 180),
            (TCP, true, [0, 0], 7_440),
            (TCP, false, [0, 0], 60),
            // A client that has asked its question, and waits for the answer.
            (TCP, true, [FLOW_CLOSING, 0], 240),
            (TCP, true, [0, FLOW_CLOSING], 240),
            (TCP, true, [FLOW_CLOSING; 2], 30),
            (TCP, true, [RESET, 0], 30),
            (TCP, true, [0, RESET], 30),
            (1, true, [0, 0], 30),
        ] {
            let (mut flows, slots) = (Flows::default(), slots());
            let there = FlowKey { protocol: protocol.into(), ..key(7) };
            let back = FlowKey {
                source: SLOT.instance,
                destination: there.source,
                source_port: there.destination_port,
                destination_port: there.source_port,
                ..there
            };
            let reply = Flow { kind: FLOW_REPLY, source: there.destination, ifindex: 4, port: 0, ..chosen() };
            assert!(flows.learn(there, chosen(), 100, &slots) && flows.learn(back, reply, 100, &slots));
            if answered {
                flows.touch(&there, there_ends, 110);
                flows.touch(&back, back_ends, 110);
            }
            let last = if answered { 110 } else { 100 };
            flows.sweep(last + patience - 1, &slots);
            assert!(
                flows.get(&there).is_some() && flows.get(&back).is_some(),
                "{protocol} {answered} {there_ends} {back_ends}"
            );
            flows.sweep(last + patience, &slots);
            assert!(
                flows.get(&there).is_none() && flows.get(&back).is_none(),
                "{protocol} {answered} {there_ends} {back_ends}"
            );
            assert!(flows.counts.is_empty());
        }
    }

    /// What comes back to the host is seen on a row of another kind.
    #[test]
    fn a_flow_of_the_host_lives_by_its_answers() {
        let (mut flows, slots) = (Flows::default(), slots());
        let there = key(7);
        let (source_port, destination_port) = (there.destination_port, there.source_port);
        let back = FlowKey { source: SLOT.instance, destination: there.source, source_port, destination_port, ..there };
        let row = Flow { kind: FLOW_HOST, port: u32::MAX, source: there.destination, ..chosen() };
        assert!(flows.learn(there, chosen(), 100, &slots) && flows.learn(back, row, 100, &slots));
        flows.touch(&back, 0, 270);
        flows.sweep(449, &slots);
        assert!(flows.get(&there).is_some() && flows.get(&back).is_some());
        flows.sweep(450, &slots);
        assert!(flows.get(&there).is_none() && flows.get(&back).is_none());
    }

    #[test]
    fn flows_outlive_their_table() {
        let (scratch, slots) = (tempfile::tempdir().unwrap(), slots());
        let mut flows = Flows::open(scratch.path()).unwrap();
        assert!((0..100).all(|port| flows.learn(key(port), chosen(), 50, &slots)));
        flows.touch(&key(3), FLOW_CLOSING, 51);
        let mut again = Flows::open(scratch.path()).unwrap();
        assert_eq!(again.iter().count(), 100);
        assert_eq!(again.get(&key(3)).map(|flow| flow.state), Some(FLOW_SEEN | FLOW_CLOSING));
        assert_eq!(again.counts, flows.counts);
        again.note_news();
        again.adopt(key(3), chosen());
        assert!(again.learn(key(500), chosen(), 52, &slots));
        assert_eq!(again.news().into_iter().map(|(key, _)| key).collect::<Vec<_>>(), [key(500)]);
    }

    fn slots() -> Sheet<u32, Slot> {
        let mut slots = Sheet::default();
        slots.insert(1, SLOT);
        slots
    }

    fn chosen() -> Flow {
        Flow { slot: 1, generation: 1, kind: FLOW_CHOSEN, port: 4, ..Flow::default() }
    }

    fn key(port: u32) -> FlowKey {
        let [a, b, c, d] = port.to_be_bytes();
        FlowKey {
            source: Addr::v4([10, 18, a, b]),
            destination: Addr::v4([10, 30, 50, 1]),
            source_port: [c, d],
            destination_port: [0, 80],
            protocol: UDP.into(),
        }
    }
}
