//! Who does not answer: read off the flows that were sent there, without a question to anybody. An instance that refuses a connection, or
//! leaves one without an answer while it answers no other, is passed over; after a while, twice as long each time, one flow tries it
//! again. Pure: counts and time are arguments.

use std::collections::HashMap;
use std::time::Duration;

use crate::netmanager::datapath::Tally;

/// So long a connection may be without an answer, beside two round trips.
const PATIENCE: Duration = Duration::from_millis(450);
/// The first pause before a trial, and the longest.
const FIRST_PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Who has been well for so long has a clean slate.
const STEADY: Duration = Duration::from_secs(60);

/// How an instance stands with this node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    Well,
    /// It is passed over until then, for this reason.
    PassedOver(Fault, Duration),
    /// The next flow will try it, or has begun to.
    Trial(Fault),
}

/// What it did wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    Refuses,
    Silent,
}

impl Fault {
    pub const fn words(self) -> &'static str {
        match self {
            Self::Refuses => "refuses connections",
            Self::Silent => "does not answer",
        }
    }
}

/// Of each slot that is watched.
#[derive(Clone, Debug, Default)]
pub(super) struct Health {
    records: HashMap<u32, Record>,
}

#[derive(Clone, Debug)]
struct Record {
    tally: Tally,
    standing: Standing,
    /// Since when.
    since: Duration,
    /// Faults in a row.
    faults: u32,
    /// Since when nothing was answered, though somebody has asked.
    waiting: Option<Duration>,
    /// The trial's flow has begun, and whether it is a connection.
    tried: Option<(Duration, bool)>,
}

impl Health {
    pub(super) fn standing(&self, slot: u32) -> Standing {
        self.records.get(&slot).map_or(Standing::Well, |record| record.standing)
    }

    /// Forgets all other slots.
    pub(super) fn retain(&mut self, watched: impl Fn(u32) -> bool) {
        self.records.retain(|slot, _| watched(*slot));
    }

    /// New counts of a slot whose answers take this round trip. True where it stands otherwise now.
    pub(super) fn observe(&mut self, slot: u32, tally: Tally, rtt: Duration, now: Duration) -> bool {
        let Some(record) = self.records.get_mut(&slot) else {
            self.records.insert(slot, Record::new(tally, now));
            return false;
        };
        let before = record.standing;
        record.observe(tally, PATIENCE + 2 * rtt, now);
        record.standing != before
    }

    /// Slots whose pause is over and whose trial begins, or begins anew.
    pub(super) fn tick(&mut self, now: Duration) -> Vec<u32> {
        let mut due = Vec::new();
        for (slot, record) in &mut self.records {
            match record.standing {
                Standing::PassedOver(fault, until) if until <= now => {
                    (record.standing, record.since, record.tried) = (Standing::Trial(fault), now, None);
                    due.push(*slot);
                }
                // Perhaps its flow was counted for another, at the same moment.
                Standing::Trial(fault)
                    if record.tried.is_none() && now.saturating_sub(record.since) >= LONGEST_PAUSE =>
                {
                    (record.standing, record.since) = (Standing::PassedOver(fault, now), now);
                    due.push(*slot);
                }
                Standing::Well if now.saturating_sub(record.since) >= STEADY => record.faults = 0,
                _ => {}
            }
        }
        due
    }

    /// Is there anybody whose standing changes with time alone?
    pub(super) fn ails(&self) -> bool {
        self.records.values().any(|record| record.standing != Standing::Well || record.waiting.is_some())
    }
}

impl Record {
    /// What was before the watch is no concern of it.
    const fn new(tally: Tally, now: Duration) -> Self {
        Self { tally, standing: Standing::Well, since: now, faults: 0, waiting: None, tried: None }
    }

    fn observe(&mut self, tally: Tally, patience: Duration, now: Duration) {
        if tally.chosen < self.tally.chosen {
            // The slot has another instance.
            *self = Self::new(tally, now);
            return;
        }
        let (old, new) = (self.tally, tally);
        self.tally = tally;
        let grown = |count: fn(&Tally) -> u32| count(&new).wrapping_sub(count(&old));
        let (asked, answered, refused) =
            (grown(|one| one.answers.asked), grown(|one| one.answers.answered), grown(|one| one.answers.refused));
        if answered > 0 {
            self.waiting = None;
        }
        if asked > answered.saturating_add(refused) {
            self.waiting.get_or_insert(now);
        }
        let silent = self.waiting.is_some_and(|since| now.saturating_sub(since) >= patience);
        match self.standing {
            Standing::Well if answered == 0 && refused > 0 => self.fail(Fault::Refuses, now),
            Standing::Well if silent => self.fail(Fault::Silent, now),
            Standing::Well => {}
            Standing::PassedOver(..) | Standing::Trial(_) if answered > 0 => self.recover(now),
            Standing::PassedOver(..) => {}
            Standing::Trial(_) if refused > 0 => self.fail(Fault::Refuses, now),
            Standing::Trial(fault) => {
                if new.chosen > old.chosen && self.tried.is_none() {
                    self.tried = Some((now, asked > 0));
                }
                match self.tried {
                    Some((since, connection)) if now.saturating_sub(since) >= patience => match connection {
                        true => self.fail(Fault::Silent, now),
                        // Datagrams may go unanswered, and would have been refused by now.
                        false if fault == Fault::Refuses => self.recover(now),
                        false => self.fail(fault, now),
                    },
                    _ => {}
                }
            }
        }
    }

    fn fail(&mut self, fault: Fault, now: Duration) {
        let pause = FIRST_PAUSE.saturating_mul(1 << self.faults.min(8)).min(LONGEST_PAUSE);
        self.faults = self.faults.saturating_add(1);
        (self.standing, self.since, self.tried) = (Standing::PassedOver(fault, now + pause), now, None);
        self.waiting = None;
    }

    fn recover(&mut self, now: Duration) {
        (self.standing, self.since, self.tried) = (Standing::Well, now, None);
        self.waiting = None;
    }
}

#[cfg(test)]
mod tests {
    use netmanager_common::abi::Answers;

    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// A slot under watch, sampled four times a second.
    struct Watched {
        health: Health,
        tally: Tally,
        now: Duration,
        rtt: Duration,
    }

    impl Watched {
        fn new() -> Self {
            let mut watched = Self { health: Health::default(), tally: Tally::default(), now: ms(0), rtt: ms(0) };
            watched.sample(0, 0, 0);
            watched
        }

        /// So many new connections, of which so many are answered and refused.
        fn sample(&mut self, asked: u32, answered: u32, refused: u32) -> Standing {
            self.now += ms(250);
            self.tally.chosen += u64::from(asked);
            let Answers { asked: a, answered: b, refused: c } = &mut self.tally.answers;
            (*a, *b, *c) = (a.wrapping_add(asked), b.wrapping_add(answered), c.wrapping_add(refused));
            self.health.tick(self.now);
            self.health.observe(7, self.tally, self.rtt, self.now);
            self.health.standing(7)
        }

        /// Samples without anything until the trial, and how long that took.
        fn until_trial(&mut self) -> Duration {
            let begin = self.now;
            while !matches!(self.sample(0, 0, 0), Standing::Trial(_)) {
                assert!(self.now < begin + ms(60_000), "no trial");
            }
            self.now - begin
        }
    }

    #[test]
    fn who_refuses_is_passed_over_at_once() {
        let mut one = Watched::new();
        assert_eq!(one.sample(5, 5, 0), Standing::Well);
        let Standing::PassedOver(Fault::Refuses, until) = one.sample(3, 0, 3) else { panic!("it refuses") };
        assert_eq!(until, one.now + FIRST_PAUSE);
    }

    #[test]
    fn who_is_silent_is_passed_over_within_a_second() {
        let mut one = Watched::new();
        one.sample(4, 4, 0);
        let begin = one.now;
        assert_eq!(one.sample(1, 0, 0), Standing::Well);
        assert_eq!(one.sample(0, 0, 0), Standing::Well);
        assert!(matches!(one.sample(0, 0, 0), Standing::PassedOver(Fault::Silent, _)));
        assert!(one.now - begin < ms(1_000));
    }

    #[test]
    fn a_long_way_is_waited_for() {
        let mut one = Watched { rtt: ms(600), ..Watched::new() };
        for _ in 0..4 {
            // Each answer comes 600 ms after the question.
            for (asked, answered) in [(1, 0), (0, 0), (0, 1)] {
                assert_eq!(one.sample(asked, answered, 0), Standing::Well);
            }
        }
    }

    #[test]
    fn what_gets_lost_among_answers_is_no_fault() {
        let mut one = Watched::new();
        for round in 0..40 {
            assert_eq!(one.sample(10, if round % 3 == 0 { 9 } else { 10 }, 0), Standing::Well, "{round}");
        }
        // Somebody knocks at a port that nobody has opened, while others are served.
        for _ in 0..10 {
            assert_eq!(one.sample(3, 2, 1), Standing::Well);
        }
        // What was lost then is not held against it now.
        for _ in 0..10 {
            assert_eq!(one.sample(0, 0, 0), Standing::Well);
        }
    }

    #[test]
    fn a_trial_brings_it_back_or_makes_the_next_pause_longer() {
        let mut one = Watched::new();
        one.sample(1, 0, 1);
        let mut pauses = Vec::new();
        for _ in 0..7 {
            pauses.push(one.until_trial().as_millis());
            assert!(matches!(one.sample(1, 0, 1), Standing::PassedOver(Fault::Refuses, _)));
        }
        assert_eq!(pauses, [1_000, 2_000, 4_000, 8_000, 16_000, 30_000, 30_000]);
        one.until_trial();
        assert_eq!(one.sample(1, 1, 0), Standing::Well);
        // Lately ill: the next fault counts on.
        one.sample(1, 0, 1);
        assert_eq!(one.until_trial(), ms(30_000));
        one.sample(1, 1, 0);
        for _ in 0..4 * 61 {
            one.sample(1, 1, 0);
        }
        one.sample(1, 0, 1);
        assert_eq!(one.until_trial(), ms(1_000), "long ago");
    }

    #[test]
    fn a_trial_waits_for_its_flow_and_for_its_answer() {
        let mut one = Watched::new();
        one.sample(1, 0, 1);
        one.until_trial();
        for _ in 0..40 {
            assert_eq!(one.sample(0, 0, 0), Standing::Trial(Fault::Refuses), "nobody has tried yet");
        }
        assert_eq!(one.sample(1, 0, 0), Standing::Trial(Fault::Refuses));
        assert_eq!(one.sample(0, 0, 0), Standing::Trial(Fault::Refuses));
        assert!(matches!(one.sample(0, 0, 0), Standing::PassedOver(Fault::Silent, _)));
        one.until_trial();
        one.sample(1, 0, 0);
        assert_eq!(one.sample(0, 1, 0), Standing::Well);
    }

    #[test]
    fn a_datagram_that_is_not_refused_is_enough_where_refusal_was_the_fault() {
        let mut one = Watched::new();
        one.sample(0, 0, 1);
        one.until_trial();
        one.tally.chosen += 1;
        assert_eq!(one.sample(0, 0, 0), Standing::Trial(Fault::Refuses));
        assert_eq!(one.sample(0, 0, 0), Standing::Trial(Fault::Refuses));
        assert_eq!(one.sample(0, 0, 0), Standing::Well);
    }

    #[test]
    fn a_late_answer_counts() {
        let mut one = Watched::new();
        one.sample(1, 0, 0);
        one.sample(0, 0, 0);
        assert!(matches!(one.sample(0, 0, 0), Standing::PassedOver(Fault::Silent, _)));
        assert_eq!(one.sample(0, 1, 0), Standing::Well, "its first segment had been lost");
    }

    #[test]
    fn counts_wrap_and_begin_anew() {
        let mut one = Watched::new();
        one.tally.answers = Answers { asked: u32::MAX, answered: u32::MAX, refused: 0 };
        one.health.retain(|_| false);
        one.sample(0, 0, 0);
        assert_eq!(one.sample(3, 3, 0), Standing::Well);
        for _ in 0..5 {
            assert_eq!(one.sample(0, 0, 0), Standing::Well);
        }
        one.tally = Tally::default();
        assert_eq!(one.sample(0, 0, 0), Standing::Well, "another instance is in the slot");
        assert_eq!(one.sample(1, 1, 0), Standing::Well);
    }

    #[test]
    fn what_was_before_the_watch_is_no_concern() {
        let mut health = Health::default();
        let tally = Tally { chosen: 9, answers: Answers { asked: 9, answered: 2, refused: 3 } };
        for step in 0..10 {
            assert!(!health.observe(7, tally, ms(0), ms(250 * step)));
        }
        assert_eq!(health.standing(7), Standing::Well);
        assert!(!health.ails());
    }
}
