//! How long to wait before trying again, and what to say meanwhile.

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use tokio::time::Instant;

use crate::wire::json::head;

const FIRST: Duration = Duration::from_secs(1);

/// Failures that take turns are each said so often.
const LATELY: Duration = Duration::from_secs(600);
/// So many complaints are remembered.
const MOST: usize = 16;
/// So much of a text tells what it is about.
const LONGEST: usize = 256;

/// Doubling waits from one second up to a limit, each shortened by up to half at random, so that the nodes of a cluster that
/// comes back do not all come at once.
#[derive(Debug)]
pub(crate) struct Backoff {
    longest: Duration,
    failures: u32,
    random: RandomState,
}

impl Backoff {
    pub(crate) fn up_to_a_minute() -> Self {
        Self::up_to_seconds(60)
    }

    pub(crate) fn up_to_seconds(seconds: u64) -> Self {
        Self { longest: Duration::from_secs(seconds), failures: 0, random: RandomState::new() }
    }

    /// What was tried worked: the next failure starts anew.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }

    /// The wait after one more failure.
    pub(crate) fn next(&mut self) -> Duration {
        let dice = self.random.hash_one(self.failures);
        let wait = wait(self.failures, self.longest, dice);
        self.failures = self.failures.saturating_add(1);
        wait
    }
}

/// Between half and all of the doubled wait, as `dice` falls.
fn wait(failures: u32, longest: Duration, dice: u64) -> Duration {
    let full = FIRST.saturating_mul(1 << failures.min(10)).min(longest);
    let share = (dice % 1000) as u32;
    full / 2 + full / 2 * share / 1000
}

/// Remembers what was complained about, so that a failure that repeats is said once.
#[derive(Debug, Default)]
pub(crate) struct Complaints {
    /// What was said, and when; the last of it at the end.
    said: VecDeque<(String, Instant)>,
}

impl Complaints {
    /// True the first time, and whenever it differs from the one that was said last, unless it was said a short while ago.
    pub(crate) fn is_new(&mut self, complaint: &str, now: Instant) -> bool {
        let last = self.said.back().is_some_and(|(last, _)| *last == complaint);
        let lately = |when: Instant| now.saturating_duration_since(when) < LATELY;
        if last || self.said.iter().any(|(said, when)| *said == complaint && lately(*when)) {
            return false;
        }
        self.said.retain(|(said, _)| *said != complaint);
        if self.said.len() == MOST {
            self.said.pop_front();
        }
        self.said.push_back((complaint.to_owned(), now));
        true
    }

    /// All is well: whatever comes next is news. Was something complained about?
    pub(crate) fn settle(&mut self) -> bool {
        !std::mem::take(&mut self.said).is_empty()
    }
}

/// What two texts about the same failure have in common: not their numbers, some of which are others with every try (ports, ages).
pub(crate) fn outline(text: &str) -> String {
    let mut outline = String::new();
    for letter in head(text, LONGEST).chars() {
        match letter {
            '0'..='9' if outline.ends_with('#') => {}
            '0'..='9' => outline.push('#'),
            other => outline.push(other),
        }
    }
    outline
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_minute_and_differ() {
        for (failures, low, high) in
            [(0, 500, 1000), (1, 1000, 2000), (3, 4000, 8000), (6, 30_000, 60_000), (99, 30_000, 60_000)]
        {
            for dice in [0, 500, 999, u64::MAX] {
                let wait = wait(failures, Duration::from_secs(60), dice).as_millis();
                assert!((low..=high).contains(&wait), "{failures} {dice}: {wait}");
            }
        }
        let minute = Duration::from_secs(60);
        assert_ne!(wait(3, minute, 1), wait(3, minute, 2));
        assert!(wait(9, Duration::from_secs(4), 999) <= Duration::from_secs(4));
        let mut backoff = Backoff::up_to_a_minute();
        for _ in 0..10 {
            backoff.next();
        }
        assert!(backoff.next() >= Duration::from_secs(30));
        backoff.reset();
        assert!(backoff.next() <= Duration::from_secs(1));
    }

    #[test]
    fn a_repeated_complaint_is_said_once() {
        let (mut complaints, begin) = (Complaints::default(), Instant::now());
        let mut said = |texts: &[&str], minute: u64| -> Vec<bool> {
            let now = begin + Duration::from_secs(60 * minute);
            texts.iter().map(|text| complaints.is_new(text, now)).collect()
        };
        assert_eq!(said(&["a", "a", "b", "b"], 0), [true, false, true, false]);
        assert_eq!(said(&["a", "b", "a"], 1), [false; 3], "they take turns");
        assert_eq!(said(&["c"], 2), [true], "a third one is news all the same");
        assert_eq!(
            said(&["a", "a"], 11),
            [true, false],
            "so that the last one that was said is not long the wrong one"
        );
        assert_eq!(said(&["a"], 500), [false], "it is the same still");
        complaints.settle();
        assert!(complaints.is_new("a", begin));
    }

    #[test]
    fn complaints_that_never_end_are_bounded() {
        let (mut complaints, now) = (Complaints::default(), Instant::now());
        for number in 0..10 * MOST {
            assert!(complaints.is_new(&number.to_string(), now));
        }
        assert_eq!(complaints.said.len(), MOST);
    }

    #[test]
    fn an_outline_has_no_numbers_and_an_end() {
        assert_eq!(outline("expired 1234567 s ago: os error 5"), "expired # s ago: os error #");
        assert_eq!(outline(&"x".repeat(10 * LONGEST)).len(), LONGEST);
    }
}
