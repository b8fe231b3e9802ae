//! What a runtime of supervised commands does, whatever the command: make the surroundings, start, watch, stop, adopt, measure.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{ChildStdin, ChildStdout, Command};
use tokio::sync::{OwnedMutexGuard, mpsc};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_util::task::AbortOnDropHandle;

use super::launch::Order;
use super::place::{Place, Process, State, write_private};
use super::supervisor::{ASK, FORCE, GO, READY};
use super::watch::Watch;
use super::{Home, Launch};
use super::{exec, follow};
use crate::model::{InstanceDetails, InstanceId, InstanceSpec, InstanceUsage, Limits, Technology};
use crate::netns;
use crate::runtime::cgroup::{self, Groups, Sample};
use crate::runtime::interfaces;
use crate::runtime::output::{self, TAIL};
use crate::runtime::{Adopted, AdoptedState, Exec, Exit, Follow, RuntimeError, Sandbox, Session};

/// Ends that may wait to be read.
const EXITS: usize = 256;
/// Of output, twice this much is kept.
const LOG_LIMIT: u64 = 5 << 20;
/// What a supervisor may take to answer; a machine under load is slow to start a process.
const ANSWER: Duration = Duration::from_secs(20);
/// What has been killed is gone within it, unless it hangs in the kernel.
const GONE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(20);
/// How often ends are looked for that the kernel did not tell of: it may have no watch to give, or lose what it had to tell.
const LOOK: Duration = Duration::from_secs(2);

/// The supervised instances of one technology.
#[derive(Debug)]
pub(in crate::runtime) struct Keeper {
    inner: Arc<Inner>,
    exits: tokio::sync::Mutex<mpsc::Receiver<Exit>>,
    _watch: AbortOnDropHandle<()>,
}

#[derive(Debug)]
struct Inner {
    technology: Technology,
    home: Home,
    groups: Groups,
    watch: Watch,
    /// One change of an instance at a time, also when whoever asked for it has lost interest.
    locks: Mutex<HashMap<InstanceId, Weak<tokio::sync::Mutex<()>>>>,
    /// Supervisors that wait for the word.
    waiting: Mutex<HashMap<InstanceId, Supervisor>>,
    /// Instances whose end is to be told.
    running: Mutex<HashMap<InstanceId, Running>>,
}

#[derive(Clone, Copy, Debug)]
struct Running {
    /// When it was last measured.
    sampled: Option<(Instant, Sample)>,
    /// Looked up once: a look may read of every process of this machine.
    command: Option<Process>,
}

#[derive(Debug)]
struct Supervisor {
    word: ChildStdin,
    says: Lines<BufReader<ChildStdout>>,
}

impl Keeper {
    /// Must be called inside a tokio runtime.
    pub(in crate::runtime) fn new(technology: Technology, home: Home) -> Self {
        let groups = Groups::below(&format!("{}/{technology}", home.control_group));
        let inner = Arc::new(Inner {
            technology,
            groups,
            home,
            watch: Watch::default(),
            locks: Mutex::default(),
            waiting: Mutex::default(),
            running: Mutex::default(),
        });
        let (exits, exited) = mpsc::channel(EXITS);
        let watch = tokio::spawn(watch(inner.clone(), exits));
        Self { inner, exits: tokio::sync::Mutex::new(exited), _watch: AbortOnDropHandle::new(watch) }
    }

    /// What this kernel cannot limit.
    pub(in crate::runtime) fn unlimited(&self) -> Vec<&'static str> {
        self.inner.groups.missing()
    }

    /// Makes the place of a new instance, with its network namespace. What was there of this name is removed first.
    pub(in crate::runtime) async fn make(&self, spec: &InstanceSpec) -> Result<Sandbox, RuntimeError> {
        let guard = self.inner.lock(&spec.id).await;
        let (inner, id, document) = (self.inner.clone(), spec.id.clone(), spec.document.clone());
        finished(
            "prepare",
            tokio::spawn(async move {
                inner.remove(&id, Duration::ZERO, &guard).await?;
                spawn_blocking(move || inner.make(&id, &document)).await.map_err(joined("prepare"))?
            }),
        )
        .await
    }

    /// Brings up the supervisor of an instance whose place has been made.
    pub(in crate::runtime) async fn supervise(
        &self,
        instance: &InstanceId,
        launch: Launch,
        limits: Limits,
    ) -> Result<(), RuntimeError> {
        let guard = self.inner.lock(instance).await;
        let (inner, id) = (self.inner.clone(), instance.clone());
        finished(
            "prepare",
            tokio::spawn(async move {
                let _guard = guard;
                let (made, of) = (inner.clone(), id.clone());
                spawn_blocking(move || made.write(&of, launch, limits)).await.map_err(joined("prepare"))??;
                let supervisor = inner.summon(&id).await?;
                lock(&inner.waiting).insert(id, supervisor);
                Ok(())
            }),
        )
        .await
    }

    pub(in crate::runtime) async fn start(&self, instance: &InstanceId) -> Result<(), RuntimeError> {
        self.begin(instance, true).await
    }

    /// Waits for the end of a command that was asked to end by other means; not for ever.
    pub(in crate::runtime) async fn until_ended(&self, instance: &InstanceId, patience: Duration) {
        ended(&self.inner.place(instance), patience).await;
    }

    /// Runs a command that ends by itself with the code `good`, as a trial of everything a workload needs.
    pub(in crate::runtime) async fn trial(
        &self,
        spec: &InstanceSpec,
        launch: Launch,
        good: i64,
        limit: Duration,
    ) -> Result<(), RuntimeError> {
        let run = async {
            self.make(spec).await?;
            self.supervise(&spec.id, launch, spec.limits).await?;
            self.begin(&spec.id, false).await?;
            let place = self.inner.place(&spec.id);
            loop {
                match place.state() {
                    State::Ended(ended) if ended.code == good => return Ok(()),
                    State::Ended(ended) => {
                        let said = self.logs(&spec.id, TAIL).await?;
                        let reason = format!("exit code {}: {}", ended.code, output::text(&said).trim());
                        return Err(RuntimeError::Step { step: "trial", reason });
                    }
                    State::Running | State::Incomplete => sleep(POLL).await,
                }
            }
        };
        let result = timeout(limit, run).await.unwrap_or_else(|_| {
            Err(RuntimeError::Step { step: "trial", reason: format!("it does not end within {limit:?}") })
        });
        self.stop(&spec.id, Duration::ZERO).await?;
        result
    }

    async fn begin(&self, instance: &InstanceId, tell: bool) -> Result<(), RuntimeError> {
        let guard = self.inner.lock(instance).await;
        let (inner, id) = (self.inner.clone(), instance.clone());
        finished(
            "start",
            tokio::spawn(async move {
                let _guard = guard;
                inner.begin(&id, tell).await
            }),
        )
        .await
    }

    pub(in crate::runtime) async fn stop(&self, instance: &InstanceId, grace: Duration) -> Result<(), RuntimeError> {
        let guard = self.inner.lock(instance).await;
        let (inner, id) = (self.inner.clone(), instance.clone());
        finished("stop", tokio::spawn(async move { inner.remove(&id, grace, &guard).await })).await
    }

    pub(in crate::runtime) async fn adopt(&self) -> Result<Vec<Adopted>, RuntimeError> {
        let inner = self.inner.clone();
        spawn_blocking(move || inner.adopt()).await.map_err(joined("adopt"))?.map_err(step("adopt"))
    }

    pub(in crate::runtime) async fn usage(&self) -> Result<Vec<InstanceUsage>, RuntimeError> {
        let inner = self.inner.clone();
        spawn_blocking(move || inner.usage()).await.map_err(joined("usage"))
    }

    pub(in crate::runtime) async fn logs(&self, instance: &InstanceId, tail: usize) -> Result<Vec<u8>, RuntimeError> {
        if !self.inner.place(instance).directory().exists() {
            return Err(RuntimeError::Unknown(instance.clone()));
        }
        output::tail(&self.inner.log(instance), tail).map_err(step("logs"))
    }

    /// How long its output is, as far as it is kept.
    pub(in crate::runtime) fn log_length(&self, instance: &InstanceId) -> u64 {
        output::length(&self.inner.log(instance))
    }

    pub(in crate::runtime) async fn inspect(&self, instance: &InstanceId) -> Result<InstanceDetails, RuntimeError> {
        let (inner, id) = (self.inner.clone(), instance.clone());
        spawn_blocking(move || inner.inspect(&id)).await.map_err(joined("inspect"))?
    }

    /// Runs one more command in the namespaces and the control group of one that runs, as its user.
    pub(in crate::runtime) fn exec(&self, instance: &InstanceId, exec: &Exec) -> Result<Session, RuntimeError> {
        let place = self.inner.place(instance);
        if !place.directory().exists() {
            return Err(RuntimeError::Unknown(instance.clone()));
        }
        if place.state() != State::Running {
            return Err(RuntimeError::Refused { what: "exec", reason: format!("{instance} does not run") });
        }
        exec::begin(&self.inner.home.supervisor, &place, exec).map_err(step("start the command"))
    }

    /// Ends when the command has.
    pub(in crate::runtime) async fn follow(&self, instance: &InstanceId, tail: usize) -> Result<Follow, RuntimeError> {
        let place = self.inner.place(instance);
        if !place.directory().exists() {
            return Err(RuntimeError::Unknown(instance.clone()));
        }
        let log = self.inner.log(instance);
        Ok(follow::output(log, tail, move || place.state() == State::Running))
    }

    pub(in crate::runtime) async fn exited(&self) -> Exit {
        match self.exits.lock().await.recv().await {
            Some(exit) => exit,
            // The watch ends only when `self` does.
            None => std::future::pending().await,
        }
    }
}

impl Inner {
    fn place(&self, instance: &InstanceId) -> Place {
        Place::new(self.home.run.join(instance.to_string()))
    }

    fn log(&self, instance: &InstanceId) -> PathBuf {
        self.home.logs.join(format!("{instance}.log"))
    }

    fn make(&self, instance: &InstanceId, document: &str) -> Result<Sandbox, RuntimeError> {
        let place = self.place(instance);
        private_directory(place.directory()).map_err(step("make its directory"))?;
        write_private(&place.document(), document.as_bytes()).map_err(step("keep its description"))?;
        let netns = netns::ensure(&instance.to_string()).map_err(step("make its network namespace"))?;
        Ok(Sandbox { netns })
    }

    fn write(&self, instance: &InstanceId, launch: Launch, limits: Limits) -> Result<(), RuntimeError> {
        private_directory(&self.home.logs).map_err(step("make a directory for logs"))?;
        let group = self.groups.make(&instance.to_string(), limits).map_err(step("make its control group"))?;
        let order = Order {
            launch,
            netns: pinned(instance),
            groups: group.directories().into_iter().map(Path::to_owned).collect(),
            memory_events: group.memory_events().unwrap_or_default(),
            log: self.log(instance),
            log_limit: LOG_LIMIT,
        };
        order.write(&self.place(instance).launch()).map_err(step("keep its command"))
    }

    /// Starts a supervisor and waits until all is ready for the command.
    async fn summon(&self, instance: &InstanceId) -> Result<Supervisor, RuntimeError> {
        let mut command = Command::new(&self.home.supervisor);
        command.args(["supervise", "supervisor"]).arg(self.place(instance).directory()).env_clear();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
        let mut child = command.spawn().map_err(step("start its supervisor"))?;
        let (Some(word), Some(says)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(RuntimeError::Step { step: "start its supervisor", reason: "it has no pipes".into() });
        };
        let mut supervisor = Supervisor { word, says: BufReader::new(says).lines() };
        supervisor.expect(READY).await?;
        // Collected by tokio when it ends.
        drop(child);
        Ok(supervisor)
    }

    async fn begin(&self, instance: &InstanceId, tell: bool) -> Result<(), RuntimeError> {
        let place = self.place(instance);
        let waiting = lock(&self.waiting).remove(instance);
        let mut supervisor = match (waiting, place.state()) {
            (Some(supervisor), _) => supervisor,
            (None, State::Running) => return Ok(()),
            (None, State::Incomplete) => return Err(RuntimeError::Unknown(instance.clone())),
            // It is raised again where it was.
            (None, State::Ended(_)) => {
                ended(&place, GONE).await;
                place.forget_end().map_err(step("forget how it ended"))?;
                self.summon(instance).await?
            }
        };
        if tell {
            // Before the start: a command may end before the supervisor has answered.
            self.watch(&place, instance);
            self.note_running(instance);
        }
        let go = async {
            supervisor.word.write_all(format!("{GO}\n").as_bytes()).await.map_err(step("start"))?;
            supervisor.expect(GO).await
        };
        let started = go.await;
        if started.is_err() {
            lock(&self.running).remove(instance);
        }
        started
    }

    /// What cannot be watched is looked at now and then.
    fn watch(&self, place: &Place, instance: &InstanceId) {
        if let Err(error) = self.watch.add(&place.alive(), instance) {
            tracing::warn!(%error, %instance, "the kernel will not tell of its end, which is looked for every {LOOK:?}");
        }
    }

    fn note_running(&self, instance: &InstanceId) {
        let sample = self.groups.named(&instance.to_string()).sample().ok();
        let running = Running { sampled: sample.map(|sample| (Instant::now(), sample)), command: None };
        lock(&self.running).insert(instance.clone(), running);
    }

    /// Ends what runs and removes what was made. Repeatable.
    async fn remove(
        self: &Arc<Self>,
        instance: &InstanceId,
        grace: Duration,
        _guard: &OwnedMutexGuard<()>,
    ) -> Result<(), RuntimeError> {
        // From here on its end is no news. A supervisor that waits for the word ends when its pipe does.
        lock(&self.running).remove(instance);
        lock(&self.waiting).remove(instance);
        let place = self.place(instance);
        if !place.directory().exists() {
            return Ok(());
        }
        if !grace.is_zero() && place.started() {
            signal(&place, ASK);
            ended(&place, grace).await;
        }
        signal(&place, FORCE);
        if !ended(&place, GONE).await {
            signal(&place, Signal::SIGKILL);
            ended(&place, GONE).await;
        }
        let (inner, instance) = (self.clone(), instance.clone());
        spawn_blocking(move || inner.clear(&instance)).await.map_err(joined("stop"))?
    }

    /// The directory goes last: while it is there, a stop is tried again.
    fn clear(&self, instance: &InstanceId) -> Result<(), RuntimeError> {
        self.groups.named(&instance.to_string()).remove().map_err(step("remove its control group"))?;
        netns::remove(&instance.to_string()).map_err(step("remove its network namespace"))?;
        output::remove(&self.log(instance)).map_err(step("remove its log"))?;
        match fs::remove_dir_all(self.place(instance).directory()) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(step("remove its directory")(error)),
            _ => Ok(()),
        }
    }

    fn adopt(&self) -> io::Result<Vec<Adopted>> {
        let entries = match fs::read_dir(&self.home.run) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other?,
        };
        let mut adopted = Vec::new();
        for entry in entries {
            let name = entry?.file_name();
            let Some(instance) = name.to_str().and_then(|name| name.parse::<InstanceId>().ok()) else {
                tracing::warn!(?name, directory = %self.home.run.display(), "this is not of ours and left alone");
                continue;
            };
            adopted.push(self.adopt_one(instance)?);
        }
        let known = |log: &str| adopted.iter().any(|one: &Adopted| log.starts_with(&format!("{}.", one.instance)));
        for log in fs::read_dir(&self.home.logs).into_iter().flatten().flatten() {
            // Of a run before the last reboot.
            if log.file_name().to_str().is_some_and(|name| !known(name)) {
                let _ = fs::remove_file(log.path());
            }
        }
        Ok(adopted)
    }

    fn adopt_one(&self, instance: InstanceId) -> io::Result<Adopted> {
        let place = self.place(&instance);
        let document = fs::read_to_string(place.document()).unwrap_or_default().into();
        if place.supervisor().is_some() && place.started() {
            // Before looking: an end between the look and the note would be told by nobody.
            self.watch(&place, &instance);
            self.note_running(&instance);
        }
        let state = match place.state() {
            State::Running => AdoptedState::Running(Sandbox { netns: pinned(&instance) }),
            State::Incomplete => AdoptedState::Incomplete,
            State::Ended(ended) => {
                lock(&self.running).remove(&instance);
                let (code, out_of_memory) = (ended.code, ended.out_of_memory);
                AdoptedState::Exited(Exit { instance: instance.clone(), code, out_of_memory, reason: None })
            }
        };
        Ok(Adopted { instance, document, state })
    }

    fn inspect(&self, instance: &InstanceId) -> Result<InstanceDetails, RuntimeError> {
        let place = self.place(instance);
        if !place.directory().exists() {
            return Err(RuntimeError::Unknown(instance.clone()));
        }
        // Before the supervisor has its order there is nothing to tell of the command.
        let launch = Order::read(&place.launch()).map(|order| order.launch).unwrap_or_default();
        let (group, state) = (self.groups.named(&instance.to_string()), place.state());
        let ended = match state {
            State::Ended(ended) => Some(ended),
            State::Running | State::Incomplete => None,
        };
        let supervisor = place.supervisor().map(|pid| pid.to_string()).unwrap_or_default();
        Ok(InstanceDetails {
            handle: format!("supervisor {supervisor}").trim_end().to_owned(),
            pid: place.command().filter(|_| state == State::Running),
            command: std::iter::once(launch.program.display().to_string()).chain(launch.arguments).collect(),
            environment: launch
                .environment
                .iter()
                .map(|entry| entry.split('=').next().unwrap_or_default().into())
                .collect(),
            working_directory: launch.directory.display().to_string(),
            user: launch.user.map(|(user, group)| format!("{user}:{group}")).unwrap_or_default(),
            cpus: group.cpus(),
            memory_bytes: group.counters().memory_limit_bytes,
            exit_code: ended.map(|ended| ended.code),
            out_of_memory: ended.is_some_and(|ended| ended.out_of_memory),
            ..InstanceDetails::default()
        })
    }

    /// Usage since the call before. A command whose group has gone is about to be told as ended and is left out.
    fn usage(&self) -> Vec<InstanceUsage> {
        let (cpus, memory) = (cgroup::online_cpus(), cgroup::total_memory_bytes());
        // Measuring takes long, and whoever starts or stops an instance must not wait for it.
        let running: Vec<_> = lock(&self.running).iter().map(|(id, running)| (id.clone(), *running)).collect();
        let usage = running.into_iter().filter_map(|(instance, running)| {
            let group = self.groups.named(&instance.to_string());
            let (now, sample) = (Instant::now(), group.sample().ok()?);
            let noted = running.command.filter(|command| command.lives());
            let command = noted.or_else(|| Process::of(self.place(&instance).command()?));
            if let Some(still) = lock(&self.running).get_mut(&instance) {
                *still = Running { sampled: Some((now, sample)), command };
            }
            let (before, log) = (running.sampled, self.log(&instance));
            Some(InstanceUsage {
                instance,
                technology: self.technology.clone(),
                cpu_percent: before.map_or(0.0, |before| cgroup::cpu_percent(before, (now, sample), cpus)),
                memory_bytes: sample.memory_bytes,
                memory_percent: cgroup::percent(sample.memory_bytes as f64, memory as f64),
                disk_bytes: output::length(&log),
                log_tail: output::text(&output::tail(&log, TAIL).unwrap_or_default()),
                counters: interfaces::count(command.map(|command| command.pid.into()), group.counters()),
            })
        });
        usage.collect()
    }

    async fn lock(&self, instance: &InstanceId) -> OwnedMutexGuard<()> {
        let one = {
            let mut locks = lock(&self.locks);
            locks.retain(|_, lock| lock.strong_count() > 0);
            let one = locks.get(instance).and_then(Weak::upgrade).unwrap_or_default();
            locks.insert(instance.clone(), Arc::downgrade(&one));
            one
        };
        one.lock_owned().await
    }
}

impl Supervisor {
    async fn expect(&mut self, word: &str) -> Result<(), RuntimeError> {
        let failed = |reason: String| RuntimeError::Step { step: "supervisor", reason };
        match timeout(ANSWER, self.says.next_line()).await {
            Ok(Ok(Some(said))) if said == word => Ok(()),
            Ok(Ok(Some(said))) => Err(failed(said.strip_prefix("failed: ").unwrap_or(&said).to_owned())),
            Ok(Ok(None)) => Err(failed("it ended without a word".into())),
            Ok(Err(error)) => Err(failed(error.to_string())),
            Err(_) => Err(failed(format!("it does not answer within {ANSWER:?}"))),
        }
    }
}

/// Tells each end once: whoever takes the instance from the running ones tells it. Runs until it is aborted.
async fn watch(inner: Arc<Inner>, exits: mpsc::Sender<Exit>) {
    let (mut looks, mut hears) = (interval(LOOK), true);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let perhaps: Vec<InstanceId> = tokio::select! {
            closed = inner.watch.closed(), if hears => closed.unwrap_or_else(|error| {
                tracing::error!(%error, "the kernel tells of no ends any more, which are looked for every {LOOK:?}");
                hears = false;
                Vec::new()
            }),
            _ = looks.tick() => lock(&inner.running).keys().cloned().collect(),
        };
        for instance in perhaps {
            let State::Ended(ended) = inner.place(&instance).state() else { continue };
            if lock(&inner.running).remove(&instance).is_some() {
                let exit = Exit { instance, code: ended.code, out_of_memory: ended.out_of_memory, reason: None };
                // The receiver lives as long as this task; a full queue makes the events wait in the kernel's.
                let _ = exits.send(exit).await;
            }
        }
    }
}

/// To the supervisor, if there is one. Gone meanwhile is what was wanted.
fn signal(place: &Place, signal: Signal) {
    if let Some(supervisor) = place.supervisor() {
        let _ = kill(supervisor, signal);
    }
}

/// Waits until no supervisor is left.
async fn ended(place: &Place, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    while place.supervisor().is_some() {
        if Instant::now() >= deadline {
            return false;
        }
        sleep(POLL).await;
    }
    true
}

fn pinned(instance: &InstanceId) -> PathBuf {
    Path::new(netns::NAMED).join(instance.to_string())
}

fn private_directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Nothing panics while one of these is held, and a poisoned map is still a map.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn step(step: &'static str) -> impl Fn(io::Error) -> RuntimeError {
    move |error| RuntimeError::Step { step, reason: error.to_string() }
}

fn joined(step: &'static str) -> impl Fn(tokio::task::JoinError) -> RuntimeError {
    move |error| RuntimeError::Step { step, reason: error.to_string() }
}

/// The result of a task that goes on to its end, also when nobody waits for it any more.
async fn finished<T>(step: &'static str, task: JoinHandle<Result<T, RuntimeError>>) -> Result<T, RuntimeError> {
    task.await.unwrap_or_else(|error| Err(joined(step)(error)))
}
