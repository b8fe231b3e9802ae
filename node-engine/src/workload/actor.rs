//! Runs what the core decides. Effects are spawned, at most one for each instance, and come back as events; a panic in one is that
//! effect's failure and nobody else's.

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::core::{Core, Effect, Event, Failure, Found, FoundState, Hope, Output};
use super::outbox::Outbox;
use super::{Note, Request, Setup, WorkloadError};
use crate::config::OnExit;
use crate::fault;
use crate::model::{EventKind, InstanceId, InstanceSpec, InstanceUsage, Report, Status, Technology};
use crate::netmanager::{Attachment, NetError};
use crate::runtime::{Adopted, AdoptedState, Exit, Runtime, RuntimeError};

mod grant;
mod look;
#[cfg(test)]
mod tests;

/// Usage of what runs is reported this often; the cluster gives up an instance after 30 s without.
const TELEMETRY: Duration = Duration::from_secs(2);
/// A runtime that takes longer is reported with the values it gave before.
const USAGE_DEADLINE: Duration = Duration::from_secs(5);
const TICK: Duration = Duration::from_secs(1);
const ADOPT_RETRY: Duration = Duration::from_secs(1);
/// Of an ended instance's output, this much is kept.
const KEPT_LOG: usize = 16 * 1024;
/// No more of an output is handed out at once.
const LONGEST_LOG: usize = 1 << 20;
const EXITS: usize = 256;

/// What a spawned effect comes back with.
enum Answer {
    Event(Event),
    /// `None` for a runtime that did not say.
    Usage(Vec<(Technology, Option<Vec<InstanceUsage>>)>),
    Served,
}

struct Actor {
    core: Core,
    setup: Setup,
    began: Instant,
    outbox: Outbox,
    /// Notes nobody has taken yet: a few for each instance at most.
    notes: VecDeque<Note>,
    steps: JoinSet<Answer>,
    prepares: HashMap<InstanceId, CancellationToken>,
    exits: mpsc::Sender<Exit>,
    silent: mpsc::Sender<(Technology, String)>,
    /// Runtimes that have not said yet what they hold.
    unheard: usize,
    sampling: bool,
    usage: HashMap<Technology, Vec<InstanceUsage>>,
    /// How often each instance was started since the daemon began; what ran before counts as one.
    starts: HashMap<InstanceId, u32>,
    /// Why an instance cannot be removed yet, as it was last told.
    stuck: HashMap<InstanceId, String>,
    drained: Option<oneshot::Sender<()>>,
}

pub(super) async fn run(mut setup: Setup, mut inbox: mpsc::Receiver<Request>) {
    let (exits, mut exited) = mpsc::channel(EXITS);
    let (silent, mut silence) = mpsc::channel(1);
    let technologies = setup.runtimes.iter().map(|runtime| runtime.technology()).collect();
    let (reports, noted, drain) = (setup.reports.clone(), setup.notes.clone(), setup.drain.clone());
    let unheard = setup.runtimes.len();
    let mut actor = Actor {
        core: Core::new(technologies, std::mem::take(&mut setup.plan), setup.restarts),
        setup,
        began: Instant::now(),
        outbox: Outbox::default(),
        notes: VecDeque::new(),
        steps: JoinSet::new(),
        prepares: HashMap::new(),
        stuck: HashMap::new(),
        exits,
        silent,
        unheard,
        sampling: false,
        usage: HashMap::new(),
        starts: HashMap::new(),
        drained: None,
    };
    actor.adopt();
    let mut tick = interval(TICK);
    let mut telemetry = interval(TELEMETRY);
    let mut deadline = None;
    let mut open = true;
    // A control plane that has gone takes no reports any more.
    let mut listening = true;
    while !actor.core.drained() {
        tokio::select! {
            // Ends before answers: a stale end must not meet the instance's next copy.
            biased;
            Some(exit) = exited.recv() => actor.exited(exit),
            Some((technology, reason)) = silence.recv() => actor.event(Event::Silent { technology, reason }),
            Some(answer) = actor.steps.join_next() => match answer {
                Ok(answer) => actor.answered(answer),
                Err(error) => tracing::error!(%error, "a step of a workload ended without an answer"),
            },
            permit = reports.reserve(), if listening && !actor.outbox.is_empty() => match (permit, actor.outbox.pop()) {
                (Ok(permit), Some(report)) => permit.send(report),
                _ => listening = false,
            },
            permit = noted.reserve(), if listening && !actor.notes.is_empty() => match (permit, actor.notes.pop_front()) {
                (Ok(permit), Some(note)) => permit.send(note),
                _ => actor.notes.clear(),
            },
            request = inbox.recv(), if open => match request {
                Some(request) => actor.asked(request),
                None => {
                    open = false;
                    actor.event(Event::Drain { stop: false });
                }
            },
            _ = tick.tick() => actor.event(Event::Tick),
            _ = telemetry.tick() => actor.sample(),
            by = drain.wait(), if deadline.is_none() => deadline = Some(by),
            () = until(deadline), if deadline.is_some() => {
                tracing::warn!("the time to stop is over, workloads are left as they are");
                break;
            }
        }
    }
    actor.finish(deadline).await;
}

fn interval(period: Duration) -> tokio::time::Interval {
    let mut interval = tokio::time::interval(period);
    interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
    interval
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

impl Actor {
    /// Asks every runtime what it holds, until it says.
    fn adopt(&mut self) {
        for runtime in &self.setup.runtimes {
            let (runtime, parse, silent) = (Arc::clone(runtime), self.setup.parse, self.silent.clone());
            self.steps.spawn(async move {
                let technology = runtime.technology();
                let mut told = false;
                loop {
                    match contained(runtime.adopt()).await {
                        Ok(Ok(adopted)) => {
                            let found = adopted.into_iter().map(|adopted| found(&technology, adopted, parse)).collect();
                            return Answer::Event(Event::Adopted { technology, found });
                        }
                        Ok(Err(error)) if !told => {
                            tracing::warn!(%technology, %error, "the runtime does not say what it holds yet");
                            told = true;
                            // Whoever listens has ended: then nobody waits either.
                            let _ = silent.send((technology.clone(), error.to_string())).await;
                        }
                        Ok(Err(_)) => {}
                        Err(panic) => tracing::error!(%technology, panic, "adopting workloads went wrong"),
                    }
                    tokio::time::sleep(ADOPT_RETRY).await;
                }
            });
        }
    }

    /// Every runtime has said what it holds: the network lets go of instances that vanished while nobody watched.
    fn retain(&mut self) {
        let (net, known) = (self.setup.net.clone(), self.core.list().into_iter().map(|info| info.id).collect());
        self.steps.spawn(async move {
            // A network that has ended is the supervisor's business.
            let _ = net.retain(known).await;
            Answer::Served
        });
    }

    /// Hands on the ends a runtime reports. Begins when its instances are adopted: an end of one that the core does not know yet
    /// would be lost.
    fn watch(&mut self, technology: &Technology) {
        let Some(runtime) = self.runtime(technology) else { return };
        let exits = self.exits.clone();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    () = exits.closed() => return,
                    exit = contained(runtime.exited()) => match exit {
                        Ok(exit) => {
                            if exits.send(exit).await.is_err() {
                                return;
                            }
                        }
                        Err(panic) => {
                            tracing::error!(panic, "watching for ends of workloads went wrong");
                            tokio::time::sleep(ADOPT_RETRY).await;
                        }
                    },
                }
            }
        });
    }

    fn asked(&mut self, request: Request) {
        match request {
            Request::Deploy(spec, sequence) => self.event(Event::Deploy(spec, sequence)),
            Request::Explain(instance, reply) => drop(reply.send(self.core.explain(self.began.elapsed(), &instance))),
            Request::Delete(instance) => self.event(Event::Delete(instance)),
            // Whoever asked may have left; that is no fault of ours.
            Request::List(reply) => {
                let _ = reply.send(self.core.list());
            }
            Request::Logs(instance, tail, reply) => self.logs(instance, tail.min(LONGEST_LOG), reply),
            Request::Inspect(instance, reply) => self.inspect(instance, reply),
            Request::Usage(reply) => {
                let _ = reply.send(self.measured());
            }
            Request::Follow(instance, tail, reply) => self.follow(instance, tail, reply),
            Request::Exec(instance, exec, reply) => self.exec(instance, exec, reply),
            Request::Drain(on_exit, reply) => {
                self.drained = Some(reply);
                self.event(Event::Drain { stop: on_exit == OnExit::Stop });
            }
        }
    }

    fn answered(&mut self, answer: Answer) {
        match answer {
            Answer::Event(event) => {
                let adopted = match &event {
                    Event::Adopted { technology, found } => {
                        self.note_adopted(found);
                        Some(technology.clone())
                    }
                    Event::Prepared { instance, .. } => {
                        self.prepares.remove(instance);
                        None
                    }
                    Event::Stopped { instance, result: Err(failure) }
                    | Event::Detached { instance, result: Err(failure) } => {
                        self.stays(instance, &failure.reason);
                        None
                    }
                    Event::Stopped { instance, .. } | Event::Detached { instance, .. } => {
                        self.stuck.remove(instance);
                        None
                    }
                    _ => None,
                };
                self.event(event);
                if let Some(technology) = adopted {
                    self.watch(&technology);
                    self.unheard -= 1;
                    if self.unheard == 0 {
                        self.retain();
                    }
                }
            }
            Answer::Usage(sampled) => self.sampled(sampled),
            Answer::Served => {}
        }
    }

    /// It is tried again until it can be, and told where the reason is another one than before.
    fn stays(&mut self, instance: &InstanceId, reason: &str) {
        if self.stuck.get(instance).is_none_or(|told| told != reason) {
            tracing::warn!(%instance, reason, "this cannot be removed yet, and is tried again");
            self.stuck.insert(instance.clone(), reason.to_owned());
        }
    }

    fn exited(&mut self, exit: Exit) {
        let Exit { instance, code, out_of_memory, reason } = exit;
        let memory = if out_of_memory { ", out of memory" } else { "" };
        let more = reason.as_ref().map(|reason| format!(", {reason}")).unwrap_or_default();
        let kind = if out_of_memory { EventKind::OutOfMemory } else { EventKind::Exited };
        self.setup.events.say_of(&instance, kind, format!("exit code {code}{memory}{more}"));
        self.event(Event::Exited { instance, code, out_of_memory, reason });
    }

    fn event(&mut self, event: Event) {
        for effect in self.core.handle(self.began.elapsed(), event) {
            self.run(effect);
        }
    }

    fn run(&mut self, effect: Effect) {
        match effect {
            Effect::Prepare(spec) => self.prepare(spec),
            Effect::CancelPrepare(instance) => {
                if let Some(token) = self.prepares.get(&instance) {
                    token.cancel();
                }
            }
            Effect::Attach { instance, netns, ports } => {
                let net = self.setup.net.clone();
                let attachment = Attachment { instance: instance.clone(), netns, ports };
                let step = async move { net.attach(attachment).await.map(|lease| lease.addresses) };
                self.spawn("attach", step, |result| Event::Attached { instance, result });
            }
            Effect::Start { instance, technology } => {
                *self.starts.entry(instance.clone()).or_default() += 1;
                let (runtime, id) = (self.runtime(&technology), instance.clone());
                let step = async move { held(runtime)?.start(&id).await };
                self.spawn("start", step, |result| Event::Started { instance, result });
            }
            Effect::Stop { instance, technology, grace, keep_log } => {
                let (runtime, id) = (self.runtime(&technology), instance.clone());
                let step = async move {
                    let runtime = held(runtime)?;
                    // The output is worth keeping, and not worth failing for.
                    let log = if keep_log { runtime.logs(&id, KEPT_LOG).await.unwrap_or_default() } else { Vec::new() };
                    runtime.stop(&id, grace).await.map(|()| log)
                };
                self.spawn("stop", step, |result| Event::Stopped { instance, result });
            }
            Effect::Detach(instance) => {
                let (net, id) = (self.setup.net.clone(), instance.clone());
                self.spawn("detach", async move { net.detach(id).await }, |result| Event::Detached {
                    instance,
                    result,
                });
            }
            Effect::Keep(note) => self.notes.push_back(note),
            Effect::Report { instance, status, detail } => {
                match status {
                    Status::Creating => tracing::debug!(%instance, "creating"),
                    Status::Failed => tracing::warn!(%instance, reason = detail, "workload failed"),
                    _ => tracing::info!(%instance, %status, detail, "workload"),
                }
                if status == Status::Undeployed {
                    self.starts.remove(&instance);
                }
                // It is repeated to the cluster all the while; the event was its beginning.
                if status != Status::Creating {
                    self.setup.events.say_of(&instance, EventKind::Status(status), detail.clone());
                }
                self.outbox.push(Report::Status { instance, status, detail });
            }
        }
    }

    fn note_adopted(&mut self, found: &[Found]) {
        let running = found.iter().filter(|found| matches!(found.state, FoundState::Running { .. }));
        for Found { spec, .. } in running {
            self.starts.insert(spec.id.clone(), 1);
            self.setup.events.say_of(&spec.id, EventKind::Adopted, "");
        }
    }

    fn prepare(&mut self, spec: Arc<InstanceSpec>) {
        self.setup.events.say_of(&spec.id, EventKind::Status(Status::Creating), spec.image.clone());
        let (runtime, instance, token) = (self.runtime(&spec.technology), spec.id.clone(), CancellationToken::new());
        self.prepares.insert(instance.clone(), token.clone());
        let granted = grant::grant(&spec, &self.setup.devices.borrow());
        let step = async move {
            let (runtime, spec) = (held(runtime)?, granted?);
            // Dropping the prepare is allowed at any point; the stop that follows cleans up.
            tokio::select! {
                sandbox = runtime.prepare(&spec) => sandbox.map(|sandbox| sandbox.netns),
                () = token.cancelled() => Err(RuntimeError::Step { step: "prepare", reason: "no longer wanted".into() }),
            }
        };
        self.spawn("prepare", step, |result| Event::Prepared { instance, result });
    }

    fn spawn<T: Send + 'static, E: Into<Failure>>(
        &mut self,
        point: &'static str,
        step: impl Future<Output = Result<T, E>> + Send + 'static,
        event: impl FnOnce(Result<T, Failure>) -> Event + Send + 'static,
    ) {
        let wanted = |reason| Failure { reason, hope: Hope::None };
        let step = async move {
            fault::reach(point, false).await.map_err(wanted)?;
            let made = step.await.map_err(Into::<Failure>::into)?;
            fault::reach(point, true).await.map(|()| made).map_err(wanted)
        };
        self.steps.spawn(async move {
            let result = match contained(step).await {
                Ok(result) => result,
                Err(panic) => Err(Failure { reason: format!("internal error: {panic}"), hope: Hope::None }),
            };
            Answer::Event(event(result))
        });
    }

    fn logs(&mut self, instance: InstanceId, tail: usize, reply: oneshot::Sender<Result<Vec<u8>, WorkloadError>>) {
        let technology = match self.core.output(&instance) {
            Output::Runtime(technology) => technology,
            Output::Kept(log) => {
                let _ = reply.send(Ok(log[log.len().saturating_sub(tail)..].to_vec()));
                return;
            }
            Output::Nowhere => {
                let _ = reply.send(Err(WorkloadError::Unknown(instance)));
                return;
            }
        };
        let runtime = self.runtime(&technology);
        self.steps.spawn(async move {
            let read = async { held(runtime)?.logs(&instance, tail).await };
            if let Ok(result) = contained(read).await {
                let _ = reply.send(result.map_err(WorkloadError::from));
            }
            Answer::Served
        });
    }

    fn sample(&mut self) {
        if std::mem::replace(&mut self.sampling, true) {
            return;
        }
        let runtimes = self.setup.runtimes.clone();
        self.steps.spawn(async move {
            let sampled = runtimes.iter().map(|runtime| async {
                let technology = runtime.technology();
                match tokio::time::timeout(USAGE_DEADLINE, contained(runtime.usage())).await {
                    Ok(Ok(Ok(usage))) => (technology, Some(usage)),
                    failure => {
                        tracing::debug!(%technology, ?failure, "the runtime gives no usage");
                        (technology, None)
                    }
                }
            });
            Answer::Usage(futures_util::future::join_all(sampled).await)
        });
    }

    /// Reports what runs. A runtime that gave no values is reported with those it gave before: what runs must not look lost
    /// because it cannot be measured.
    fn sampled(&mut self, sampled: Vec<(Technology, Option<Vec<InstanceUsage>>)>) {
        self.sampling = false;
        for (technology, usage) in sampled {
            if let Some(usage) = usage {
                self.usage.insert(technology, usage);
            }
        }
        self.outbox.push(Report::Instances(self.measured()));
    }

    fn runtime(&self, technology: &Technology) -> Option<Arc<dyn Runtime>> {
        self.setup.runtimes.iter().find(|runtime| runtime.technology() == *technology).cloned()
    }

    /// Hands over the reports that still wait, and says that all is done.
    async fn finish(mut self, deadline: Option<Instant>) {
        let flush = async {
            while let Some(report) = self.outbox.pop() {
                if self.setup.reports.send(report).await.is_err() {
                    break;
                }
            }
            while let Some(note) = self.notes.pop_front() {
                if self.setup.notes.send(note).await.is_err() {
                    return;
                }
            }
        };
        let deadline = deadline.unwrap_or_else(|| Instant::now() + TELEMETRY);
        if tokio::time::timeout_at(deadline, flush).await.is_err() {
            tracing::warn!("reports were still waiting when the time to stop was over");
        }
        if let Some(drained) = self.drained {
            let _ = drained.send(());
        }
    }
}

fn held(runtime: Option<Arc<dyn Runtime>>) -> Result<Arc<dyn Runtime>, RuntimeError> {
    runtime.ok_or_else(|| RuntimeError::Unavailable("there is no runtime for this technology".into()))
}

fn found(technology: &Technology, adopted: Adopted, parse: fn(&str) -> Option<InstanceSpec>) -> Found {
    let Adopted { instance, document, state } = adopted;
    if state == AdoptedState::Left {
        return Found { spec: nameless(instance, technology.clone(), document), state: FoundState::Left };
    }
    match parse(&document).filter(|spec| spec.id == instance) {
        Some(spec) => {
            let state = match state {
                AdoptedState::Running(sandbox) => FoundState::Running { netns: sandbox.netns },
                AdoptedState::Exited(Exit { code, out_of_memory, reason, .. }) => {
                    FoundState::Exited { code, out_of_memory, reason }
                }
                AdoptedState::Incomplete | AdoptedState::Left => FoundState::Incomplete,
            };
            Found { spec: InstanceSpec { technology: technology.clone(), ..spec }, state }
        }
        None => Found { spec: nameless(instance, technology.clone(), document), state: FoundState::Unreadable },
    }
}

/// A description that says no more than what is to be removed.
fn nameless(id: InstanceId, technology: Technology, document: Arc<str>) -> InstanceSpec {
    InstanceSpec { document, ..InstanceSpec::new(id, technology) }
}

async fn contained<T>(step: impl Future<Output = T>) -> Result<T, String> {
    AssertUnwindSafe(step).catch_unwind().await.map_err(|panic| message(&*panic))
}

fn message(panic: &(dyn Any + Send)) -> String {
    match (panic.downcast_ref::<&str>(), panic.downcast_ref::<String>()) {
        (Some(text), _) => (*text).to_owned(),
        (_, Some(text)) => text.clone(),
        _ => "panic".to_owned(),
    }
}

impl From<RuntimeError> for Failure {
    fn from(error: RuntimeError) -> Self {
        let reason = error.to_string();
        let hope = match error {
            RuntimeError::Unavailable(_) => Hope::Soon,
            RuntimeError::Image { reason, .. } if is_final(&reason) => Hope::None,
            RuntimeError::Image { .. } => Hope::Later,
            RuntimeError::Step { .. } if passes(&reason) => Hope::Later,
            RuntimeError::Refused { .. } | RuntimeError::Unknown(_) | RuntimeError::Step { .. } => Hope::None,
        };
        Self { reason, hope }
    }
}

/// What a machine says that has run out of something, and may have it again. Engines say it in their own letters.
fn passes(reason: &str) -> bool {
    let reason = reason.to_ascii_lowercase();
    ["no space left", "too many open files", "disk quota exceeded"].iter().any(|word| reason.contains(word))
}

/// What a registry says of an image that it will not have in a minute either.
fn is_final(reason: &str) -> bool {
    let reason = reason.to_ascii_lowercase();
    let words =
        ["not found", "manifest unknown", "denied", "unauthorized", "no matching manifest", "invalid reference"];
    words.iter().any(|word| reason.contains(word))
}

impl From<NetError> for Failure {
    fn from(error: NetError) -> Self {
        let hope = if matches!(error, NetError::NoSubnet) { Hope::Soon } else { Hope::None };
        Self { hope, reason: format!("network: {error}") }
    }
}
