//! How long to wait before trying again.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

const FIRST: Duration = Duration::from_secs(1);

/// Doubling waits from one second up to a limit, each shortened by up to half at random, so that the nodes of a cluster that
/// comes back do not all come at once.
#[derive(Debug)]
pub(super) struct Backoff {
    longest: Duration,
    failures: u32,
    random: RandomState,
}

impl Backoff {
    pub(super) fn up_to_a_minute() -> Self {
        Self::up_to_seconds(60)
    }

    pub(super) fn up_to_seconds(seconds: u64) -> Self {
        Self { longest: Duration::from_secs(seconds), failures: 0, random: RandomState::new() }
    }

    /// What was tried worked: the next failure starts anew.
    pub(super) fn reset(&mut self) {
        self.failures = 0;
    }

    /// The wait after one more failure.
    pub(super) fn next(&mut self) -> Duration {
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
pub(super) struct Complaints(Option<String>);

impl Complaints {
    /// True the first time, and whenever it differs from the last one.
    pub(super) fn is_new(&mut self, complaint: &str) -> bool {
        if self.0.as_deref() == Some(complaint) {
            return false;
        }
        self.0 = Some(complaint.to_owned());
        true
    }

    pub(super) fn settle(&mut self) {
        self.0 = None;
    }
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
        let mut complaints = Complaints::default();
        let said: Vec<bool> = ["a", "a", "b", "a", "a"].map(|text| complaints.is_new(text)).into();
        assert_eq!(said, [true, false, true, true, false]);
        complaints.settle();
        assert!(complaints.is_new("a"));
    }
}
