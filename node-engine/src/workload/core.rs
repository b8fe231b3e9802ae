//! Decides the life of instances: events in, effects out. No I/O and no clock; whoever calls says how late it is.
//!
//! What is wanted and what is are two lists. Whatever happens, and once a second, the second is driven towards the first: what is wanted
//! and not there is brought up, what fell is raised again, what is there and not wanted is taken down.
//!
//! Commands that arrive before a runtime has said what it holds from an earlier run wait for that, so that nothing is brought up
//! beside a copy that still runs.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::instance::{Cause, Ending, Instance, Phase};
use super::wish::{Verdict, Wish};
use super::{InstanceInfo, Note, Plan};
use crate::config::Restarts;
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
    /// A runtime does not say what it holds, and why.
    Silent {
        technology: Technology,
        reason: String,
    },
    /// With the number of the command that wants it.
    Deploy(Box<InstanceSpec>, u64),
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
        reason: Option<String>,
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
        reason: Option<String>,
    },
    Incomplete,
    /// It runs or not, but its description cannot be read any more.
    Unreadable,
    /// No more of it than what its node had given it.
    Left,
}

/// Why a step did not succeed, and whether it may at another time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    pub(super) reason: String,
    pub(super) hope: Hope,
}

/// When to try again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hope {
    /// It will be the same another time.
    None,
    /// The back-end is away; asking again costs nothing.
    Soon,
    /// The back-end tried, and could not now.
    Later,
}

/// What is to be done. All but `CancelPrepare`, `Keep` and `Report` are answered by an event.
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
    /// To be kept over a restart.
    Keep(Note),
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
    pub(super) technologies: Vec<Technology>,
    pub(super) unadopted: BTreeSet<Technology>,
    /// Why a runtime does not say what it holds.
    pub(super) silent: BTreeMap<Technology, String>,
    pub(super) policy: Restarts,
    held: VecDeque<Event>,
    /// What is wanted, and what was until it ended.
    pub(super) wishes: BTreeMap<InstanceId, Wish>,
    /// What is found and not wished for is not wanted.
    complete: bool,
    pub(super) live: BTreeMap<InstanceId, Instance>,
    ended: VecDeque<Ended>,
    /// What the node had given to instances that their runtimes have lost.
    left: Vec<InstanceSpec>,
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
    pub(super) fn new(technologies: Vec<Technology>, plan: Plan, policy: Restarts) -> Self {
        let mut core = Self {
            unadopted: technologies.iter().cloned().collect(),
            technologies,
            silent: BTreeMap::new(),
            policy,
            held: VecDeque::new(),
            wishes: BTreeMap::new(),
            complete: plan.complete,
            live: BTreeMap::new(),
            ended: VecDeque::new(),
            left: Vec::new(),
            draining: None,
        };
        for wanted in plan.wanted {
            let (id, spec) = (wanted.spec.id.clone(), Arc::new(wanted.spec));
            let mut wish = Wish::new(spec.clone(), wanted.sequence, Duration::ZERO);
            wish.steadfast = true;
            if let Some((status, detail)) = wanted.ended {
                let ending = Ending { status, detail };
                wish.ended = Some(ending.clone());
                core.remember(Ended { spec, ending, log: Vec::new() });
            }
            core.wishes.insert(id, wish);
        }
        core
    }

    pub(super) fn handle(&mut self, now: Now, event: Event) -> Vec<Effect> {
        let mut out = Vec::new();
        if matches!(event, Event::Deploy(..) | Event::Delete(_)) && !self.waits(now) {
            // None overtakes those that have waited.
            self.release(now, &mut out);
        }
        match event {
            Event::Adopted { technology, found } => self.adopted(now, &technology, found, &mut out),
            Event::Silent { technology, reason } => drop(self.silent.insert(technology, reason)),
            Event::Deploy(..) if self.waits(now) => self.held.push_back(event),
            Event::Delete(ref instance) if self.waits(now) => {
                self.wishes.remove(instance);
                self.held.push_back(event);
            }
            Event::Deploy(spec, sequence) => self.deploy(now, spec, sequence, &mut out),
            Event::Delete(instance) => self.delete(now, &instance, &mut out),
            Event::Prepared { instance, result } => {
                self.with(now, &instance, &mut out, |instance, _| instance.prepared(now, result));
            }
            Event::Attached { instance, result } => {
                self.with(now, &instance, &mut out, |instance, out| instance.attached(now, result, out));
            }
            Event::Started { instance, result } => {
                self.with(now, &instance, &mut out, |instance, out| instance.started(now, result, out));
            }
            Event::Stopped { instance, result } => {
                self.with(now, &instance, &mut out, |instance, out| {
                    instance.undone(now, result, out);
                    None
                });
            }
            Event::Detached { instance, result } => {
                let result = result.map(|()| Vec::new());
                self.with(now, &instance, &mut out, |instance, out| {
                    instance.undone(now, result, out);
                    None
                });
            }
            Event::Exited { instance, code, out_of_memory, reason } => {
                self.with(now, &instance, &mut out, |instance, _| instance.exited(code, out_of_memory, reason));
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
            state: instance.phase.word(),
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
        let absent = self.wishes.values().filter(|wish| wish.ended.is_none() && !self.live.contains_key(&wish.spec.id));
        let absent = absent.map(|wish| InstanceInfo {
            id: wish.spec.id.clone(),
            technology: wish.spec.technology.clone(),
            image: wish.spec.image.clone(),
            state: "absent",
            addresses: None,
            detail: self.reasons(Duration::ZERO, Some(wish), None).join("; "),
        });
        live.chain(ended).chain(absent).collect()
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

    fn deploy(&mut self, now: Now, spec: Box<InstanceSpec>, sequence: u64, out: &mut Vec<Effect>) {
        if self.draining.is_some() {
            return;
        }
        let (id, spec) = (spec.id.clone(), Arc::<InstanceSpec>::from(spec));
        match self.wishes.get_mut(&id) {
            Some(wish) if wish.sequence == sequence && wish.ended.is_none() => wish.spec = spec.clone(),
            _ => drop(self.wishes.insert(id.clone(), Wish::new(spec.clone(), sequence, now))),
        }
        let Some(instance) = self.live.get_mut(&id) else { return self.begin(now, spec, out) };
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
                instance.remove(now, Cause::Replaced, out);
                instance.say_creating(now, out);
                self.step(now, &id, out);
            }
        }
    }

    fn delete(&mut self, now: Now, id: &InstanceId, out: &mut Vec<Effect>) {
        if self.wishes.remove(id).is_some_and(|wish| wish.sequence == 0) {
            // Whoever keeps the plan may hear of it only after the command.
            out.push(Effect::Keep(Note::FoundNoMore(id.clone())));
        }
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
            _ => instance.remove(now, Cause::Deleted, out),
        }
        self.step(now, id, out);
    }

    fn begin(&mut self, now: Now, spec: Arc<InstanceSpec>, out: &mut Vec<Effect>) {
        let id = spec.id.clone();
        self.ended.retain(|ended| ended.spec.id != id);
        if !self.technologies.contains(&spec.technology) {
            let ending = Ending::failed(self.not_available(&spec.technology));
            self.note_end(&id, &ending, out);
            out.push(Effect::report(&id, Status::Failed, &ending.detail));
            return self.remember(Ended { spec, ending, log: Vec::new() });
        }
        let mut instance = Instance::new(spec, now);
        if let Some(wish) = self.wishes.get(&id) {
            instance.steadfast = wish.steadfast;
            instance.retry = Some(wish.not_before).filter(|at| *at > now);
        }
        instance.say_creating(now, out);
        self.live.insert(id.clone(), instance);
        self.step(now, &id, out);
    }

    /// Brings up whatever is wanted and not there, as far as it is known what is there.
    fn reconcile(&mut self, now: Now, out: &mut Vec<Effect>) {
        if self.draining.is_some() {
            return;
        }
        let missing = |(id, wish): &(&InstanceId, &Wish)| {
            wish.ended.is_none() && !self.live.contains_key(*id) && !self.unadopted.contains(&wish.spec.technology)
        };
        let missing: Vec<Arc<InstanceSpec>> =
            self.wishes.iter().filter(missing).map(|(_, wish)| wish.spec.clone()).collect();
        for spec in missing {
            self.begin(now, spec, out);
        }
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
        self.silent.remove(technology);
        for Found { spec, state } in found {
            let id = spec.id.clone();
            if matches!(state, FoundState::Left) {
                self.left.push(spec);
                continue;
            }
            if self.live.contains_key(&id) {
                // A deployment that would not wait: its own prepare has removed what was found here.
                continue;
            }
            let instance = self.take_over(now, Arc::new(spec), state, out);
            self.live.insert(id.clone(), instance);
            if self.draining == Some(Draining::Stop) {
                self.dismiss(now, &id, out);
            }
            self.step(now, &id, out);
        }
        self.reconcile(now, out);
        if self.unadopted.is_empty() {
            self.clear_up(now, out);
            if !std::mem::replace(&mut self.complete, true) {
                out.push(Effect::Keep(Note::LookedAround));
            }
            self.release(now, out);
        }
    }

    /// Takes away what is left of instances that nobody has or wants. The cluster hears nothing of it: it may run them elsewhere.
    fn clear_up(&mut self, now: Now, out: &mut Vec<Effect>) {
        for spec in std::mem::take(&mut self.left) {
            let id = spec.id.clone();
            // Whoever has it, or brings it up, has taken over what is there.
            let wanted = self.wishes.get(&id).is_some_and(|wish| wish.ended.is_none());
            if wanted || self.live.contains_key(&id) {
                continue;
            }
            self.live.insert(id.clone(), Instance::remains(Arc::new(spec), Cause::Replaced, None, now));
            self.step(now, &id, out);
        }
    }

    /// What becomes of an instance that an earlier run has left.
    fn take_over(&mut self, now: Now, found: Arc<InstanceSpec>, state: FoundState, out: &mut Vec<Effect>) -> Instance {
        let unwanted = |event: &Event| matches!(event, Event::Delete(id) if *id == found.id);
        let readable = !matches!(state, FoundState::Unreadable) && !self.held.iter().any(unwanted);
        if !self.wishes.contains_key(&found.id) && !self.complete && readable {
            // What was wanted is not known (any more): what is there says it.
            out.push(Effect::Keep(Note::Found { instance: found.id.clone(), document: found.document.clone() }));
            let mut wish = Wish::new(found.clone(), 0, now);
            wish.steadfast = true;
            self.wishes.insert(found.id.clone(), wish);
        }
        let Some(wish) = self.wishes.get(&found.id) else {
            let cause = match state {
                FoundState::Unreadable if !self.complete => {
                    Cause::Ended(Ending::failed("its description cannot be read back after a restart of the node"))
                }
                // It was deleted, and the deletion did not come to its end.
                _ => Cause::Deleted,
            };
            return Instance::remains(found, cause, None, now);
        };
        if let Some(ending) = &wish.ended {
            return Instance::remains_told(found, ending.clone(), now);
        }
        match state {
            FoundState::Running { netns } if same_request(&found, &wish.spec) => {
                Instance::adopted(wish.spec.clone(), netns, now)
            }
            // It did its work, or could not, while nobody watched.
            FoundState::Exited { code, out_of_memory, reason } if wish.spec.one_shot => {
                let ending = Ending::of_exit(&wish.spec, code, out_of_memory, reason);
                Instance::remains(found, Cause::Ended(ending), None, now)
            }
            FoundState::Running { .. }
            | FoundState::Exited { .. }
            | FoundState::Incomplete
            | FoundState::Left
            | FoundState::Unreadable => Instance::remains(found, Cause::Replaced, Some(wish.spec.clone()), now),
        }
    }

    /// Handles the commands that waited.
    fn release(&mut self, now: Now, out: &mut Vec<Effect>) {
        for event in std::mem::take(&mut self.held) {
            match event {
                Event::Deploy(spec, sequence) => self.deploy(now, spec, sequence, out),
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
                self.dismiss(now, &id, out);
                self.step(now, &id, out);
            }
        }
    }

    /// Takes down what is not on its way out already.
    fn dismiss(&mut self, now: Now, id: &InstanceId, out: &mut Vec<Effect>) {
        let Some(instance) = self.live.get_mut(id) else { return };
        instance.next = None;
        if !matches!(instance.phase, Phase::Removing { .. }) {
            let ending = Ending { status: Status::Dead, detail: "the node shuts down".into() };
            instance.remove(now, Cause::Ended(ending), out);
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
        self.reconcile(now, out);
    }

    fn with(
        &mut self,
        now: Now,
        id: &InstanceId,
        out: &mut Vec<Effect>,
        change: impl FnOnce(&mut Instance, &mut Vec<Effect>) -> Option<Ending>,
    ) {
        let Some(instance) = self.live.get_mut(id) else { return };
        let fell = change(instance, out);
        if instance.steadfast
            && let Some(wish) = self.wishes.get_mut(id)
        {
            wish.steadfast = true;
        }
        if let Some(ending) = fell {
            self.fell(now, id, ending, out);
        }
        self.step(now, id, out);
    }

    /// An instance ended, or could not be brought up: it is raised again, or that is told.
    fn fell(&mut self, now: Now, id: &InstanceId, ending: Ending, out: &mut Vec<Effect>) {
        let Some(instance) = self.live.get_mut(id) else { return };
        let wish = self.wishes.get_mut(id).filter(|_| instance.steadfast && self.draining.is_none());
        let Some(wish) = wish else { return instance.remove(now, Cause::Ended(ending), out) };
        if instance.raised && instance.phase == Phase::Starting {
            // Its sandbox has gone with it, or its runtime keeps none: that is the same fall still.
            return instance.rebuild(now, out);
        }
        let (ran, detail) = (instance.phase == Phase::Running, ending.detail.clone());
        match wish.fallen(now, ending, self.policy) {
            Verdict::GivenUp(ending) => instance.remove(now, Cause::Ended(ending), out),
            Verdict::Again { delay, number } => {
                let why = format!("{detail}; restart {number} of {} in {} s", self.policy.limit, delay.as_secs());
                if ran {
                    instance.restart(now, delay, why, out);
                } else {
                    instance.rebuild(now, out);
                    out.push(Effect::report(id, Status::Creating, &why));
                }
            }
        }
    }

    /// The next effect of an instance; where it is gone, its last word and its successor.
    fn step(&mut self, now: Now, id: &InstanceId, out: &mut Vec<Effect>) {
        let Some(instance) = self.live.get_mut(id) else { return };
        if self.draining != Some(Draining::Leave) {
            instance.advance(now, out);
        }
        if let Phase::Removing { cause: Cause::Ended(ending), told: true } = &instance.phase
            && instance.next.is_none()
        {
            let ending = ending.clone();
            self.note_end(id, &ending, out);
        }
        let Some(instance) = self.live.get(id) else { return };
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
                self.note_end(&spec.id, &ending, out);
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
            self.begin(now, next, out);
        }
    }

    /// That it ended outlives the process, so that the next one does not begin it again.
    fn note_end(&mut self, id: &InstanceId, ending: &Ending, out: &mut Vec<Effect>) {
        let Some(wish) = self.wishes.get_mut(id).filter(|wish| wish.ended.is_none()) else { return };
        wish.ended = Some(ending.clone());
        out.push(Effect::Keep(Note::Ended {
            instance: id.clone(),
            sequence: wish.sequence,
            status: ending.status,
            detail: ending.detail.clone(),
        }));
    }

    fn remember(&mut self, ended: Ended) {
        self.ended.retain(|earlier| earlier.spec.id != ended.spec.id);
        if self.ended.len() == ENDED
            && let Some(Ended { spec, .. }) = self.ended.pop_front()
            && self.wishes.get(&spec.id).is_some_and(|wish| wish.ended.is_some())
        {
            self.wishes.remove(&spec.id);
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
    // Nor is what an earlier version made of the same command: what runs by it is not ended for that.
    let plain = |spec: &InstanceSpec| InstanceSpec { document: "".into(), beside_entrypoint: false, ..spec.clone() };
    plain(a) == plain(b)
}
