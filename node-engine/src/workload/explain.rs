//! What is wanted of an instance, what is, and what stands between the two: for `node-engine explain`.

use std::time::Duration;

use super::core::{Core, Now};
use super::instance::{Cause, Instance, Phase};
use super::wish::Wish;
use crate::config::Restarts;
use crate::model::{Addresses, InstanceId, Status, Technology};

/// Everything that is known of one instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    pub id: InstanceId,
    pub technology: Technology,
    pub image: String,
    pub wanted: Wanting,
    /// Number of the command that says so; 0 where it was found running.
    pub sequence: u64,
    /// So long it has been wanted as far as this process knows.
    pub wanted_for: Duration,
    /// `absent`, or as in a list of instances.
    pub state: &'static str,
    /// So long it has been so; nothing where it is absent.
    pub state_for: Option<Duration>,
    pub addresses: Option<Addresses>,
    /// What it waits for or why it goes, a sentence each.
    pub reasons: Vec<String>,
    /// When the next attempt is made.
    pub next_try: Option<Duration>,
    /// Restarts within the window, how many there may be, and the window.
    pub restarts: usize,
    pub policy: Restarts,
    /// How it ended last, and how long ago.
    pub fell: Option<(Duration, String)>,
}

/// What the node was told to make of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wanting {
    /// It shall run.
    Run,
    /// It has ended so, and is not to run again unless it is deployed anew.
    Ended(Status, String),
    /// It shall not be there.
    Nothing,
}

impl Core {
    pub(super) fn explain(&mut self, now: Now, id: &InstanceId) -> Option<Explanation> {
        let restarts = self.wishes.get_mut(id).map(|wish| wish.restarts(now, self.policy)).unwrap_or_default();
        let (wish, live) = (self.wishes.get(id), self.live.get(id));
        let spec = wish.map(|wish| &wish.spec).or(live.map(|live| &live.spec))?;
        let ago = |then: Now| now.saturating_sub(then);
        Some(Explanation {
            id: id.clone(),
            technology: spec.technology.clone(),
            image: spec.image.clone(),
            wanted: match wish.map(|wish| &wish.ended) {
                None => Wanting::Nothing,
                Some(None) => Wanting::Run,
                Some(Some(ending)) => Wanting::Ended(ending.status, ending.detail.clone()),
            },
            sequence: wish.map_or(0, |wish| wish.sequence),
            wanted_for: wish.map_or(Duration::ZERO, |wish| ago(wish.since)),
            state: live.map_or("absent", |live| live.phase.word()),
            state_for: live.map(|live| ago(live.phase_since)),
            addresses: live.and_then(|live| live.addresses),
            reasons: self.reasons(now, wish, live),
            next_try: live.and_then(|live| live.retry).map(|at| at.saturating_sub(now)),
            restarts,
            policy: self.policy,
            fell: wish.and_then(|wish| wish.fell.as_ref()).map(|(then, why)| (ago(*then), why.clone())),
        })
    }

    pub(super) fn reasons(&self, now: Now, wish: Option<&Wish>, live: Option<&Instance>) -> Vec<String> {
        let mut reasons = Vec::new();
        let Some(live) = live else {
            let Some(wish) = wish.filter(|wish| wish.ended.is_none()) else { return reasons };
            let technology = &wish.spec.technology;
            if self.unadopted.contains(technology) {
                let why = self.silent.get(technology).map_or("it was only just asked", String::as_str);
                reasons.push(format!("the runtime for {technology} does not say what it holds: {why}"));
            }
            return reasons;
        };
        if !live.detail.is_empty() {
            reasons.push(live.detail.clone());
        }
        let doing = match &live.phase {
            Phase::Preparing if live.busy => "the runtime fetches the image and makes a sandbox",
            Phase::Attaching if live.busy => "the network connects it; it needs the node's subnet and bridge",
            Phase::Starting if live.busy => "the runtime starts its process",
            Phase::Running if live.busy => "it runs; the network confirms its namespace",
            Phase::Removing { .. } if live.busy && live.next.is_some() => "its earlier copy is taken down first",
            Phase::Removing { .. } if live.busy => "it is taken down",
            _ => "",
        };
        if !doing.is_empty() {
            reasons.push(format!("{doing} (for {} s)", now.saturating_sub(live.phase_since).as_secs()));
        }
        if let Phase::Removing { cause, .. } = &live.phase {
            reasons.push(match cause {
                Cause::Deleted => "it was deleted".into(),
                Cause::Replaced => "it is made anew".into(),
                Cause::Ended(ending) => format!("it ended: {}", ending.detail),
            });
        }
        reasons
    }
}
