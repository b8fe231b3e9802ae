//! Decides the life of instances: events in, effects out. No I/O and no clock; whoever calls says how late it is.
//!
//! Commands that arrive before a runtime has said what it holds from an earlier run wait for that, so that nothing is brought up
//! beside a copy that still runs.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::InstanceInfo;
use super::instance::{Cause, Ending, Instance, Phase};
use crate::model::{Addresses, InstanceId, InstanceSpec, PortMapping, Status, Technology};

#[cfg(test)]
mod tests;

/// Time since the task began.
pub(super) type Now = Duration;

/// Commands wait this long for a runtime that does not say what it holds.
const HOLD: Duration = Duration::from_secs(30);
/// Commands that may wait for it.
const HELD: usize = 1024;
/// Ended instances that are remembered.
const ENDED: usize = 64;

/// What happened.
#[derive(Debug)]
pub(super) enum Event {
    /// A runtime said what it holds from an earlier run.
    Adopted {
        technology: Technology,
        found: Vec<Found>,
    },
    Deploy(Box<InstanceSpec>),
    Delete(InstanceId),
    Prepared {
        instance: InstanceId,
        result: Result<PathBuf, Failure>,
    },
    Attached {
        instance: InstanceId,
        result: Result<Addresses, Failure>,
    },
    Started {
        instance: InstanceId,
        result: Result<(), Failure>,
    },
    /// With the end of its output, where that was asked for.
    Stopped {
        instance: InstanceId,
        result: Result<Vec<u8>, Failure>,
    },
    Detached {
        instance: InstanceId,
        result: Result<(), Failure>,
    },
    Exited {
        instance: InstanceId,
        code: i64,
        out_of_memory: bool,
    },
    /// The daemon ends: everything stays as it is, or is taken down.
    Drain {
        stop: bool,
    },
    Tick,
}

/// An instance from an earlier run.
#[derive(Clone, Debug)]
pub(super) struct Found {
    pub(super) spec: InstanceSpec,
    pub(super) state: FoundState,
}

#[derive(Clone, Debug)]
pub(super) enum FoundState {
    Running {
        netns: PathBuf,
    },
    Exited {
        code: i64,
        out_of_memory: bool,
    },
    Incomplete,
    /// It runs or not, but its description cannot be read any more.
    Unreadable,
}

/// Why a step did not succeed, and whether it may at another time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) reason: String,
    pub(super) transient: bool,
}

/// What is to be done. All but `CancelPrepare` and `Report` are answered by an event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    Prepare(Arc<InstanceSpec>),
    /// The prepare under way is not wanted any more; it still answers.
    CancelPrepare(InstanceId),
    Attach {
        instance: InstanceId,
        netns: PathBuf,
        ports: Vec<PortMapping>,
    },
    Start {
        instance: InstanceId,
        technology: Technology,
    },
    Stop {
        instance: InstanceId,
        technology: Technology,
        grace: Duration,
        keep_log: bool,
    },
    Detach(InstanceId),
    Report {
        instance: InstanceId,
        status: Status,
        detail: String,
    },
}

impl Effect {
    pub(super) fn report(instance: &InstanceId, status: Status, detail: &str) -> Self {
        Self::Report { instance: instance.clone(), status, detail: detail.to_owned() }
    }
}

/// Where an instance's output is.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Output {
    Runtime(Technology),
    Kept(Vec<u8>),
    Nowhere,
}

/// The instances of this node.
#[derive(Debug)]
pub(super) struct Core {
    technologies: Vec<Technology>,
    unadopted: BTreeSet<Technology>,
    held: VecDeque<Event>,
    live: BTreeMap<InstanceId, Instance>,
    ended: VecDeque<Ended>,
    draining: Option<Draining>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Draining {
    Leave,
    Stop,
}

#[derive(Debug)]
struct Ended {
    spec: Arc<InstanceSpec>,
    ending: Ending,
    log: Vec<u8>,
}

impl Core {
    /// A core for a node that runs these technologies, none of which has said yet what it holds.
    pub(super) fn new(technologies: Vec<Technology>) -> Self {
        Self {
            unadopted: technologies.iter().cloned().collect(),
            technologies,
            held: VecDeque::new(),
            live: BTreeMap::new(),
            ended: VecDeque::new(),
            draining: None,
        }
    }

    pub(super) fn handle(&mut self, now: Now, event: Event) -> Vec<Effect> {
        let mut out = Vec::new();
        match event {
            Event::Adopted { technology, found } => self.adopted(now, &technology, found, &mut out),
            Event::Deploy(_) | Event::Delete(_) if self.waits(now) => self.held.push_back(event),
            Event::Deploy(spec) => self.deploy(now, spec, &mut out),
            Event::Delete(instance) => self.delete(now, &instance, &mut out),
            Event::Prepared { instance, result } => {
                self.with(now, &instance, &mut out, |instance, out| instance.prepared(now, result, out));
            }
            Event::Attached { instance, result } => {
                self.with(now, &instance, &mut out, |instance, out| instance.attached(now, result, out));
            }
            Event::Started { instance, result } => {
                self.with(now, &instance, &mut out, |instance, out| instance.started(now, result, out));
            }
            Event::Stopped { instance, result } => {
                self.with(now, &instance, &mut out, |instance, out| instance.undone(now, result, out));
            }
            Event::Detached { instance, result } => {
                let result = result.map(|()| Vec::new());
                self.with(now, &instance, &mut out, |instance, out| instance.undone(now, result, out));
            }
            Event::Exited { instance, code, out_of_memory } => {
                self.with(now, &instance, &mut out, |instance, out| instance.exited(code, out_of_memory, out));
            }
            Event::Drain { stop } => self.drain(now, stop, &mut out),
            Event::Tick => self.tick(now, &mut out),
        }
        out
    }

    /// Nothing is left to wait for before the daemon may end.
    pub(super) fn drained(&self) -> bool {
        match self.draining {
            None => false,
            Some(Draining::Leave) => self.live.values().all(|instance| !instance.busy),
            Some(Draining::Stop) => self.live.is_empty(),
        }
    }

    /// Its process runs, as far as is known.
    pub(super) fn runs(&self, instance: &InstanceId) -> bool {
        self.live.get(instance).is_some_and(|instance| instance.phase == Phase::Running)
    }

    pub(super) fn list(&self) -> Vec<InstanceInfo> {
        let live = self.live.values().map(|instance| InstanceInfo {
            id: instance.id().clone(),
            technology: instance.spec.technology.clone(),
            image: instance.spec.image.clone(),
            state: match instance.phase {
                Phase::Preparing => "preparing",
                Phase::Attaching => "attaching",
                Phase::Starting => "starting",
                Phase::Running => "running",
                Phase::Removing { .. } => "stopping",
            },
            addresses: instance.addresses,
            detail: instance.detail.clone(),
        });
        let ended = self.ended.iter().map(|ended| InstanceInfo {
            id: ended.spec.id.clone(),
            technology: ended.spec.technology.clone(),
            image: ended.spec.image.clone(),
            state: match ended.ending.status {
                Status::Completed => "completed",
                Status::Dead => "dead",
                _ => "failed",
            },
            addresses: None,
            detail: ended.ending.detail.clone(),
        });
        live.chain(ended).collect()
    }

    /// One of those in the list, and what it was asked to be.
    pub(super) fn look(&self, id: &InstanceId) -> Option<(InstanceInfo, Arc<InstanceSpec>)> {
        let info = self.list().into_iter().find(|info| info.id == *id)?;
        let live = self.live.get(id).map(|instance| &instance.spec);
        let spec = live.or_else(|| self.ended.iter().find(|ended| ended.spec.id == *id).map(|ended| &ended.spec))?;
        Some((info, spec.clone()))
    }

    pub(super) fn output(&self, instance: &InstanceId) -> Output {
        if let Some(instance) = self.live.get(instance) {
            return Output::Runtime(instance.spec.technology.clone());
        }
        match self.ended.iter().find(|ended| ended.spec.id == *instance) {
            Some(ended) => Output::Kept(ended.log.clone()),
            None => Output::Nowhere,
        }
    }

    fn waits(&self, now: Now) -> bool {
        !self.unadopted.is_empty() && now < HOLD && self.held.len() < HELD
    }

    fn deploy(&mut self, now: Now, spec: Box<InstanceSpec>, out: &mut Vec<Effect>) {
        if self.draining.is_some() {
            return;
        }
        let id = spec.id.clone();
        let Some(instance) = self.live.get_mut(&id) else { return self.begin(now, *spec, out) };
        match &mut instance.phase {
            Phase::Removing { cause, told } => {
                // The delete is answered before the cluster hears of the new copy, never after.
                if *cause == Cause::Deleted && !*told {
                    *told = true;
                    out.push(Effect::report(&id, Status::Undeployed, ""));
                }
                instance.next = Some(spec);
                instance.say_creating(now, out);
            }
            Phase::Running if same_request(&instance.spec, &spec) => {
                instance.confirm_network();
                self.step(now, &id, out);
            }
            _ if same_request(&instance.spec, &spec) => instance.say_creating(now, out),
            _ => {
                instance.next = Some(spec);
                instance.remove(Cause::Replaced, out);
                instance.say_creating(now, out);
                self.step(now, &id, out);
            }
        }
    }

    fn delete(&mut self, now: Now, id: &InstanceId, out: &mut Vec<Effect>) {
        self.ended.retain(|ended| ended.spec.id != *id);
        let Some(instance) = self.live.get_mut(id) else {
            return out.push(Effect::report(id, Status::Undeployed, ""));
        };
        instance.next = None;
        match &mut instance.phase {
            // The clean-up goes on as it is; only its last word changes.
            Phase::Removing { cause, told } => {
                *cause = Cause::Deleted;
                *told = false;
            }
            _ => instance.remove(Cause::Deleted, out),
        }
        self.step(now, id, out);
    }

    fn begin(&mut self, now: Now, spec: InstanceSpec, out: &mut Vec<Effect>) {
        let id = spec.id.clone();
        self.ended.retain(|ended| ended.spec.id != id);
        if !self.technologies.contains(&spec.technology) {
            let detail = self.not_available(&spec.technology);
            out.push(Effect::report(&id, Status::Failed, &detail));
            return self.remember(Ended { spec: Arc::new(spec), ending: Ending::failed(detail), log: Vec::new() });
        }
        let mut instance = Instance::new(spec, now);
        instance.say_creating(now, out);
        self.live.insert(id.clone(), instance);
        self.step(now, &id, out);
    }

    fn not_available(&self, technology: &Technology) -> String {
        let runs: Vec<_> = self.technologies.iter().map(Technology::as_str).collect();
        match runs.as_slice() {
            [] => format!("this node runs no workloads; {:?} is not available here", technology.as_str()),
            runs => format!("this node runs {}; {:?} is not available here", runs.join(", "), technology.as_str()),
        }
    }

    fn adopted(&mut self, now: Now, technology: &Technology, found: Vec<Found>, out: &mut Vec<Effect>) {
        self.unadopted.remove(technology);
        for Found { spec, state } in found {
            let id = spec.id.clone();
            if self.live.contains_key(&id) {
                // A deployment that would not wait: its own prepare has removed what was found here.
                continue;
            }
            let instance = match state {
                FoundState::Running { netns } => Instance::adopted(spec, netns, now),
                FoundState::Exited { code, out_of_memory } => {
                    let ending = Ending::of_exit(&spec, code, out_of_memory);
                    Instance::remains(spec, ending, now)
                }
                FoundState::Incomplete => {
                    Instance::remains(spec, Ending::failed("the node restarted while it was being deployed"), now)
                }
                FoundState::Unreadable => {
                    let ending = Ending::failed("its description cannot be read back after a restart of the node");
                    Instance::remains(spec, ending, now)
                }
            };
            self.live.insert(id.clone(), instance);
            if self.draining == Some(Draining::Stop) {
                self.dismiss(&id, out);
            }
            self.step(now, &id, out);
        }
        if self.unadopted.is_empty() {
            self.release(now, out);
        }
    }

    /// Handles the commands that waited.
    fn release(&mut self, now: Now, out: &mut Vec<Effect>) {
        for event in std::mem::take(&mut self.held) {
            match event {
                Event::Deploy(spec) => self.deploy(now, spec, out),
                Event::Delete(instance) => self.delete(now, &instance, out),
                _ => {}
            }
        }
    }

    fn drain(&mut self, now: Now, stop: bool, out: &mut Vec<Effect>) {
        self.draining = Some(if stop { Draining::Stop } else { Draining::Leave });
        self.held.clear();
        if stop {
            for id in self.ids() {
                self.dismiss(&id, out);
                self.step(now, &id, out);
            }
        }
    }

    /// Takes down what is not on its way out already.
    fn dismiss(&mut self, id: &InstanceId, out: &mut Vec<Effect>) {
        let Some(instance) = self.live.get_mut(id) else { return };
        instance.next = None;
        if !matches!(instance.phase, Phase::Removing { .. }) {
            let ending = Ending { status: Status::Dead, detail: "the node shuts down".into() };
            instance.remove(Cause::Ended(ending), out);
        }
    }

    fn tick(&mut self, now: Now, out: &mut Vec<Effect>) {
        if !self.held.is_empty() && !self.waits(now) {
            self.release(now, out);
        }
        for id in self.ids() {
            if self.draining.is_none()
                && let Some(instance) = self.live.get_mut(&id)
            {
                instance.repeat_creating(now, out);
            }
            self.step(now, &id, out);
        }
    }

    fn with(
        &mut self,
        now: Now,
        id: &InstanceId,
        out: &mut Vec<Effect>,
        change: impl FnOnce(&mut Instance, &mut Vec<Effect>),
    ) {
        if let Some(instance) = self.live.get_mut(id) {
            change(instance, out);
            self.step(now, id, out);
        }
    }

    /// The next effect of an instance; where it is gone, its last word and its successor.
    fn step(&mut self, now: Now, id: &InstanceId, out: &mut Vec<Effect>) {
        let Some(instance) = self.live.get_mut(id) else { return };
        if self.draining != Some(Draining::Leave) {
            instance.advance(now, out);
        }
        if instance.gone()
            && let Some(instance) = self.live.remove(id)
        {
            self.finish(now, instance, out);
        }
    }

    fn finish(&mut self, now: Now, instance: Instance, out: &mut Vec<Effect>) {
        let Instance { spec, phase: Phase::Removing { cause, told }, next, log, .. } = instance else { return };
        match cause {
            Cause::Deleted if !told => out.push(Effect::report(&spec.id, Status::Undeployed, "")),
            Cause::Deleted | Cause::Replaced => {}
            Cause::Ended(ending) if next.is_none() => {
                if !told {
                    out.push(Effect::report(&spec.id, ending.status, &ending.detail));
                }
                self.remember(Ended { spec, ending, log });
            }
            Cause::Ended(_) => {}
        }
        if let Some(next) = next
            && self.draining.is_none()
        {
            self.begin(now, *next, out);
        }
    }

    fn remember(&mut self, ended: Ended) {
        if self.ended.len() == ENDED {
            self.ended.pop_front();
        }
        self.ended.push_back(ended);
    }

    fn ids(&self) -> Vec<InstanceId> {
        self.live.keys().cloned().collect()
    }
}

/// Whether two descriptions ask for the same. The document is not compared: it carries what the cluster knows about all instances
/// at the moment, and that differs from message to message.
fn same_request(a: &InstanceSpec, b: &InstanceSpec) -> bool {
    let plain = |spec: &InstanceSpec| InstanceSpec { document: "".into(), ..spec.clone() };
    plain(a) == plain(b)
}
