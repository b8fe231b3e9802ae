//! What is wanted of one instance, by which command, and how often it may fall before it is given up.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::core::Now;
use super::instance::Ending;
use crate::config::Restarts;
use crate::model::{InstanceSpec, Status};

/// The first restart; each next within the window waits twice as long.
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(super) struct Wish {
    pub(super) spec: Arc<InstanceSpec>,
    /// Of the command that said so; 0 where it was found running.
    pub(super) sequence: u64,
    pub(super) since: Now,
    /// It has ended, and that was told: it is not wanted to run again.
    pub(super) ended: Option<Ending>,
    /// It has run, or was to run before this process: what stands in its way is waited for, and nobody is told to run it elsewhere.
    pub(super) steadfast: bool,
    /// Not before this, after it has fallen.
    pub(super) not_before: Now,
    /// How it ended last, and when.
    pub(super) fell: Option<(Now, String)>,
    restarts: VecDeque<Now>,
}

/// What follows a fall.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Again { delay: Duration, number: usize },
    GivenUp(Ending),
}

impl Wish {
    pub(super) fn new(spec: Arc<InstanceSpec>, sequence: u64, now: Now) -> Self {
        Self {
            spec,
            sequence,
            since: now,
            ended: None,
            steadfast: false,
            not_before: Duration::ZERO,
            fell: None,
            restarts: VecDeque::new(),
        }
    }

    pub(super) fn fallen(&mut self, now: Now, ending: Ending, policy: Restarts) -> Verdict {
        self.fell = Some((now, ending.detail.clone()));
        let counted = self.restarts(now, policy);
        if self.spec.one_shot || ending.status == Status::Completed || policy.limit == 0 {
            return Verdict::GivenUp(ending);
        }
        if counted >= policy.limit as usize {
            let detail =
                format!("{}; given up after {counted} restarts within {} s", ending.detail, policy.window.as_secs());
            return Verdict::GivenUp(Ending { detail, ..ending });
        }
        let delay = FIRST.saturating_mul(1 << counted.min(10)).min(LONGEST);
        self.restarts.push_back(now);
        self.not_before = now + delay;
        Verdict::Again { delay, number: counted + 1 }
    }

    /// Restarts that count now.
    pub(super) fn restarts(&mut self, now: Now, policy: Restarts) -> usize {
        while self.restarts.front().is_some_and(|at| now.saturating_sub(*at) > policy.window) {
            self.restarts.pop_front();
        }
        self.restarts.len()
    }
}
