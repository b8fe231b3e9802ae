//! One instance: which step it is in, what has been made for it and must be undone, and why it goes when it goes. At most one effect
//! of an instance is under way at any time, so an answer is never ambiguous.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::core::{Effect, Failure, Hope, Now};
use crate::model::{Addresses, InstanceId, InstanceSpec, Limits, Status, Technology};

/// `CREATING` is repeated this often: the cluster gives up after 30 s of silence.
const CREATING_EVERY: Duration = Duration::from_secs(10);
/// A step whose back-end is away is tried again until the deployment is this old.
const PATIENCE: Duration = Duration::from_secs(60);
const RETRY: Duration = Duration::from_secs(2);
/// Where a back-end answers and cannot: a registry, a full disk.
const RETRY_LONGEST: Duration = Duration::from_secs(8);
/// How long a workload may take to end after it was asked to.
const GRACE: Duration = Duration::from_secs(10);
const GRACE_AT_EXIT: Duration = Duration::from_secs(5);

/// An instance for which something exists, or may exist, in a runtime or in the network.
#[derive(Debug)]
pub(super) struct Instance {
    pub(super) spec: Arc<InstanceSpec>,
    pub(super) phase: Phase,
    /// What to bring up when this one is gone.
    pub(super) next: Option<Arc<InstanceSpec>>,
    pub(super) addresses: Option<Addresses>,
    pub(super) detail: String,
    /// The end of its output, once it has been stopped.
    pub(super) log: Vec<u8>,
    /// An effect is under way.
    pub(super) busy: bool,
    /// What the removal has not undone yet, last made last.
    undo: Vec<Undo>,
    netns: PathBuf,
    /// The network has confirmed the namespace since it was last asked to be sure.
    attached: bool,
    /// An end that was seen before the answer of the start.
    ended: Option<Ending>,
    /// Whatever is in its way is waited for, however long.
    pub(super) steadfast: bool,
    /// Its process is being started again in the sandbox it had.
    pub(super) raised: bool,
    since: Now,
    /// When its phase began.
    pub(super) phase_since: Now,
    said_creating: Now,
    pub(super) retry: Option<Now>,
    attempts: u32,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Preparing,
    Attaching,
    Starting,
    Running,
    /// On its way out; `told` once the cluster has been answered.
    Removing {
        cause: Cause,
        told: bool,
    },
}

impl Phase {
    /// As a person reads it.
    pub(super) fn word(&self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Attaching => "attaching",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Removing { .. } => "stopping",
        }
    }
}

/// Why an instance goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    Deleted,
    /// The same instance was deployed with another description.
    Replaced,
    /// It ended, or could not be brought up.
    Ended(Ending),
}

/// The last word about an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Ending {
    pub(super) status: Status,
    pub(super) detail: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Undo {
    Sandbox,
    Network,
    Process,
}

impl Ending {
    pub(super) fn failed(detail: impl Into<String>) -> Self {
        Self { status: Status::Failed, detail: detail.into() }
    }

    /// What the end of the first process means for the cluster.
    pub(super) fn of_exit(spec: &InstanceSpec, code: i64, out_of_memory: bool, reason: Option<String>) -> Self {
        match (code, out_of_memory, spec.one_shot) {
            (0, _, true) => Self { status: Status::Completed, detail: String::new() },
            (0, _, false) => Self { status: Status::Dead, detail: "ended with exit code 0".into() },
            (_, true, _) => Self::failed(match spec.limits {
                Limits { memory_mib: Some(limit), .. } => format!("out of memory (limit {limit} MiB)"),
                _ => "out of memory".into(),
            }),
            (code, false, _) => Self::failed(reason.unwrap_or_else(|| format!("exit code {code}"))),
        }
    }
}

impl Instance {
    pub(super) fn new(spec: Arc<InstanceSpec>, now: Now) -> Self {
        Self {
            spec,
            phase: Phase::Preparing,
            next: None,
            addresses: None,
            detail: String::new(),
            log: Vec::new(),
            busy: false,
            undo: Vec::new(),
            netns: PathBuf::new(),
            attached: false,
            ended: None,
            steadfast: false,
            raised: false,
            since: now,
            phase_since: now,
            said_creating: now,
            retry: None,
            attempts: 0,
        }
    }

    /// One that ran on while the daemon was away: its network has to be confirmed.
    pub(super) fn adopted(spec: Arc<InstanceSpec>, netns: PathBuf, now: Now) -> Self {
        let undo = vec![Undo::Network, Undo::Process];
        Self { phase: Phase::Running, undo, netns, steadfast: true, ..Self::new(spec, now) }
    }

    /// One of which only remains are left; with what is to be brought up in its place, if anything is.
    pub(super) fn remains(spec: Arc<InstanceSpec>, cause: Cause, next: Option<Arc<InstanceSpec>>, now: Now) -> Self {
        let phase = Phase::Removing { cause, told: false };
        Self { phase, next, undo: vec![Undo::Network, Undo::Process], ..Self::new(spec, now) }
    }

    /// Remains of one whose end was told by an earlier run. Not again: the cluster may run it elsewhere by now.
    pub(super) fn remains_told(spec: Arc<InstanceSpec>, ending: Ending, now: Now) -> Self {
        let phase = Phase::Removing { cause: Cause::Ended(ending), told: true };
        Self { phase, undo: vec![Undo::Network, Undo::Process], ..Self::new(spec, now) }
    }

    pub(super) fn id(&self) -> &InstanceId {
        &self.spec.id
    }

    /// On its way up, or waiting for an earlier copy to go: the cluster wants to hear that.
    fn creating(&self) -> bool {
        match self.phase {
            Phase::Preparing | Phase::Attaching | Phase::Starting => true,
            Phase::Running => false,
            Phase::Removing { .. } => self.next.is_some(),
        }
    }

    pub(super) fn say_creating(&mut self, now: Now, out: &mut Vec<Effect>) {
        self.said_creating = now;
        out.push(Effect::report(self.id(), Status::Creating, &self.detail));
    }

    pub(super) fn repeat_creating(&mut self, now: Now, out: &mut Vec<Effect>) {
        if self.creating() && now.saturating_sub(self.said_creating) >= CREATING_EVERY {
            self.say_creating(now, out);
        }
    }

    /// Asks the network once more; the cluster is told the addresses again with it.
    pub(super) fn confirm_network(&mut self) {
        self.attached = false;
        self.retry = None;
    }

    /// Turns it round: from here on it is only taken down.
    pub(super) fn remove(&mut self, now: Now, cause: Cause, out: &mut Vec<Effect>) {
        if self.busy && self.phase == Phase::Preparing {
            out.push(Effect::CancelPrepare(self.id().clone()));
        }
        self.phase = Phase::Removing { cause, told: false };
        self.phase_since = now;
        self.retry = None;
        self.attempts = 0;
    }

    /// Removes it to bring it up again as it is described.
    pub(super) fn rebuild(&mut self, now: Now, out: &mut Vec<Effect>) {
        self.next = Some(self.spec.clone());
        self.remove(now, Cause::Replaced, out);
    }

    /// Its process has ended and is to be started again where it was: namespace, addresses and flows stay.
    pub(super) fn restart(&mut self, now: Now, delay: Duration, why: String, out: &mut Vec<Effect>) {
        self.enter(now, Phase::Starting);
        self.retry = Some(now + delay);
        (self.steadfast, self.raised) = (true, true);
        self.said_creating = now;
        out.push(Effect::report(self.id(), Status::Creating, &why));
        self.detail = why;
    }

    pub(super) fn prepared(&mut self, now: Now, result: Result<PathBuf, Failure>) -> Option<Ending> {
        self.busy = false;
        if self.phase != Phase::Preparing {
            return None;
        }
        match result {
            Ok(netns) => {
                self.netns = netns;
                self.enter(now, Phase::Attaching);
                None
            }
            Err(failure) => self.failed(now, failure),
        }
    }

    pub(super) fn attached(
        &mut self,
        now: Now,
        result: Result<Addresses, Failure>,
        out: &mut Vec<Effect>,
    ) -> Option<Ending> {
        self.busy = false;
        match (&self.phase, result) {
            (Phase::Attaching, Ok(addresses)) => {
                self.addresses = Some(addresses);
                self.attached = true;
                self.enter(now, Phase::Starting);
            }
            (Phase::Attaching, Err(failure)) => return self.failed(now, failure),
            (Phase::Running, Ok(addresses)) => {
                self.addresses = Some(addresses);
                self.attached = true;
                (self.retry, self.attempts) = (None, 0);
                self.detail.clear();
                out.push(Effect::report(self.id(), Status::Created, ""));
            }
            // What runs is not stopped because its network cannot be confirmed.
            (Phase::Running, Err(failure)) => {
                self.again(now, format!("network: {}", failure.reason), failure.hope);
            }
            (Phase::Preparing | Phase::Starting | Phase::Removing { .. }, _) => {}
        }
        None
    }

    pub(super) fn started(&mut self, now: Now, result: Result<(), Failure>, out: &mut Vec<Effect>) -> Option<Ending> {
        self.busy = false;
        if self.phase != Phase::Starting {
            return None;
        }
        match result {
            Ok(()) => {
                self.enter(now, Phase::Running);
                (self.steadfast, self.raised) = (true, false);
                out.push(Effect::report(self.id(), Status::Created, ""));
                self.ended.take()
            }
            Err(failure) => self.failed(now, failure),
        }
    }

    /// The first process ended. Before the start that is news of an earlier copy, and later it is expected.
    pub(super) fn exited(&mut self, code: i64, out_of_memory: bool, reason: Option<String>) -> Option<Ending> {
        let ending = Ending::of_exit(&self.spec, code, out_of_memory, reason);
        match self.phase {
            Phase::Running => return Some(ending),
            Phase::Starting if self.busy => self.ended = Some(ending),
            Phase::Preparing | Phase::Attaching | Phase::Starting | Phase::Removing { .. } => {}
        }
        None
    }

    /// The answer to the undo that is last in the list.
    pub(super) fn undone(&mut self, now: Now, result: Result<Vec<u8>, Failure>, out: &mut Vec<Effect>) {
        self.busy = false;
        match result {
            Ok(log) => {
                self.undo.pop();
                self.attempts = 0;
                if !log.is_empty() {
                    self.log = log;
                }
            }
            Err(failure) => {
                let first = self.attempts == 0;
                self.again(now, format!("clean-up: {}", failure.reason), failure.hope);
                if first {
                    self.tell_despite(&failure, out);
                }
            }
        }
    }

    /// Everything undone: nothing of it exists any more.
    pub(super) fn gone(&self) -> bool {
        matches!(self.phase, Phase::Removing { .. }) && !self.busy && self.undo.is_empty()
    }

    /// The next effect, if none is under way and it is time.
    pub(super) fn advance(&mut self, now: Now, out: &mut Vec<Effect>) {
        if self.busy || self.retry.is_some_and(|at| at > now) {
            return;
        }
        self.retry = None;
        let id = self.spec.id.clone();
        let effect = match &self.phase {
            Phase::Preparing => {
                self.owe(Undo::Sandbox);
                Effect::Prepare(self.spec.clone())
            }
            Phase::Attaching => {
                self.owe(Undo::Network);
                self.attach()
            }
            Phase::Starting => {
                // Ending the process removes its sandbox with it.
                self.undo.retain(|undo| *undo != Undo::Sandbox);
                self.owe(Undo::Process);
                Effect::Start { instance: id, technology: self.spec.technology.clone() }
            }
            Phase::Running if self.attached => return,
            Phase::Running => self.attach(),
            Phase::Removing { cause, .. } => match self.undo.last() {
                None => return,
                Some(Undo::Network) => Effect::Detach(id),
                Some(Undo::Sandbox) => self.stop(Duration::ZERO, false),
                Some(Undo::Process) => match cause {
                    Cause::Deleted | Cause::Replaced => self.stop(GRACE, false),
                    // Grace costs nothing where the process has ended, and only `Dead` is said of one that has not.
                    Cause::Ended(Ending { status: Status::Dead, .. }) => self.stop(GRACE_AT_EXIT, true),
                    Cause::Ended(_) => self.stop(Duration::ZERO, true),
                },
            },
        };
        self.busy = true;
        out.push(effect);
    }

    fn attach(&self) -> Effect {
        Effect::Attach { instance: self.id().clone(), netns: self.netns.clone(), ports: self.spec.ports.clone() }
    }

    fn stop(&self, grace: Duration, keep_log: bool) -> Effect {
        let technology: Technology = self.spec.technology.clone();
        Effect::Stop { instance: self.id().clone(), technology, grace, keep_log }
    }

    /// Notes what has to be undone, before it is done: a step that fails half-way is undone too.
    fn owe(&mut self, undo: Undo) {
        if !self.undo.contains(&undo) {
            self.undo.push(undo);
        }
    }

    fn enter(&mut self, now: Now, phase: Phase) {
        self.phase = phase;
        self.phase_since = now;
        self.detail.clear();
        self.retry = None;
        self.attempts = 0;
    }

    /// Tries again later, or says that this is the end.
    fn failed(&mut self, now: Now, failure: Failure) -> Option<Ending> {
        let patient = self.steadfast || now.saturating_sub(self.since) < PATIENCE;
        if failure.hope == Hope::None || !patient {
            return Some(Ending::failed(failure.reason));
        }
        self.again(now, failure.reason, failure.hope);
        None
    }

    fn again(&mut self, now: Now, detail: String, hope: Hope) {
        let longest = if hope == Hope::Soon { RETRY } else { RETRY_LONGEST };
        let delay = RETRY.saturating_mul(1 << self.attempts.min(5)).min(longest);
        self.attempts = self.attempts.saturating_add(1);
        self.retry = Some(now + delay);
        self.detail = detail;
    }

    /// The first failure of the clean-up: the end is told with it and not held back until the clean-up succeeds.
    fn tell_despite(&mut self, failure: &Failure, out: &mut Vec<Effect>) {
        let id = self.spec.id.clone();
        let Phase::Removing { cause: Cause::Ended(ending), told } = &mut self.phase else { return };
        ending.detail = match ending.detail.as_str() {
            "" => format!("clean-up: {}", failure.reason),
            detail => format!("{detail}; clean-up: {}", failure.reason),
        };
        if !*told && self.next.is_none() {
            *told = true;
            out.push(Effect::report(&id, ending.status, &ending.detail));
        }
    }
}
