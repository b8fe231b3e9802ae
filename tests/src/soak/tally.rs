//! What became of each kind of fault.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use super::fault::Kind;

/// One fault.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Outcome {
    /// From its end until all was seen to be well.
    pub(super) healed: Duration,
    /// Was an operation under way?
    pub(super) amid: bool,
    pub(super) requests_lost: u64,
    pub(super) datagrams_lost: u64,
    pub(super) datagrams_doubled: u64,
    /// The longest time without an echo, and without progress of the stream.
    pub(super) silence: Duration,
    pub(super) stall: Duration,
}

#[derive(Debug, Default)]
struct Row {
    times: u32,
    calm: Duration,
    amid: Duration,
    requests_lost: u64,
    datagrams_lost: u64,
    datagrams_doubled: u64,
    silence: Duration,
    stall: Duration,
}

#[derive(Debug, Default)]
pub(super) struct Tally {
    rows: BTreeMap<Kind, Row>,
}

impl Tally {
    pub(super) fn add(&mut self, kind: Kind, outcome: &Outcome) {
        let row = self.rows.entry(kind).or_default();
        row.times += 1;
        let worst = if outcome.amid { &mut row.amid } else { &mut row.calm };
        *worst = outcome.healed.max(*worst);
        row.requests_lost += outcome.requests_lost;
        row.datagrams_lost += outcome.datagrams_lost;
        row.datagrams_doubled += outcome.datagrams_doubled;
        row.silence = row.silence.max(outcome.silence);
        row.stall = row.stall.max(outcome.stall);
    }

    pub(super) fn faults(&self) -> u32 {
        self.rows.values().map(|row| row.times).sum()
    }

    pub(super) fn table(&self) -> String {
        let mut text = format!(
            "{:12} {:>5} {:>7} {:>9} {:>9} {:>8} {:>9} {:>7} {:>10} {:>9}\n",
            "FAULT", "TIMES", "BOUND", "HEALED", "AMID", "REQUESTS", "DATAGRAMS", "DOUBLED", "SILENCE", "STALL"
        );
        for (kind, row) in &self.rows {
            let seconds =
                |time: Duration| if time.is_zero() { "-".into() } else { format!("{:.2} s", time.as_secs_f64()) };
            let _ = writeln!(
                text,
                "{kind:12} {:>5} {:>7} {:>9} {:>9} {:>8} {:>9} {:>7} {:>7} ms {:>6} ms",
                row.times,
                format!("{} s", kind.bound().as_secs()),
                seconds(row.calm),
                seconds(row.amid),
                row.requests_lost,
                row.datagrams_lost,
                row.datagrams_doubled,
                row.silence.as_millis(),
                row.stall.as_millis()
            );
        }
        text + "HEALED: worst time from the end of the fault until all was seen to be well; AMID: the same where an operation was under \
                way.\nREQUESTS and DATAGRAMS lost, echoes DOUBLED, the longest SILENCE of echoes and STALL of the stream: from the \
                fault's begin until then."
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_is_kept_and_losses_are_summed() {
        let mut tally = Tally::default();
        let outcome = Outcome { healed: Duration::from_millis(1_200), datagrams_lost: 3, ..Outcome::default() };
        tally.add(Kind::Kill, &outcome);
        tally.add(Kind::Kill, &Outcome { healed: Duration::from_millis(800), datagrams_lost: 4, ..outcome });
        tally.add(Kind::Kill, &Outcome { healed: Duration::from_secs(9), amid: true, ..Outcome::default() });
        let table = tally.table();
        let row: Vec<&str> = table.lines().nth(1).unwrap().split_whitespace().collect();
        assert_eq!(row[..10], ["kill", "3", "5", "s", "1.20", "s", "9.00", "s", "0", "7"], "{table}");
        assert_eq!(tally.faults(), 3);
    }
}
