//! What is done with the containers of one OCI runtime: made, started, watched, removed, found again.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tokio::sync::watch::Receiver;
use tokio::sync::{OnceCell, OwnedMutexGuard, mpsc};
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;

use super::api::containers::{self, Container, Listed, One};
use super::api::snapshots::{self, Mounts, Snapshot};
use super::api::tasks::{self, Created, Ended, Kill, Process, Status as State, Which};
use super::api::{Any, Empty, Named, Names};
use super::client::{Client, away, gone, not_found};
use super::image::{self, Image};
use super::running::Running;
use super::spec::{self, Order};
use super::{Settings, Share, handler, log, root};
use crate::model::{InstanceDetails, InstanceId, InstanceSpec, InstanceUsage, Mount, Technology};
use crate::runtime::cgroup::{self, Groups};
use crate::runtime::output::{self, TAIL};
use crate::runtime::surroundings::{self, Resolvers};
use crate::runtime::{Adopted, AdoptedState, Exec, Exit, RuntimeError, Sandbox, interfaces};

const LABEL_INSTANCE: &str = "node-engine.instance";
const LABEL_HANDLER: &str = "node-engine.handler";
const LABEL_IMAGE: &str = "node-engine.image";
const LABEL_STOP_SIGNAL: &str = "node-engine.stop-signal";
/// Labels are short; a description need not be.
const DOCUMENT: &str = "node-engine.document";
const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
/// containerd takes no longer name.
const LONGEST_NAME: usize = 76;
/// What has been killed is gone within it, unless it hangs in the kernel.
const GONE: Duration = Duration::from_secs(10);
/// Between attempts to reach a containerd that is away.
const RETRY: Duration = Duration::from_millis(500);
/// The code of a container that has gone without saying: as if killed.
const KILLED: i64 = 137;

#[derive(Debug)]
pub(super) struct Holder {
    pub(super) client: Client,
    pub(super) technology: Technology,
    pub(super) running: Running,
    settings: Settings,
    pub(super) share: Share,
    keeper: PathBuf,
    groups: Groups,
    /// The kernel counts swap.
    swap: bool,
    snapshotter: OnceCell<&'static str>,
    resolvers: Receiver<Resolvers>,
    exits: mpsc::Sender<Exit>,
    /// One change of an instance at a time, also when whoever asked for it has lost interest.
    locks: Mutex<HashMap<InstanceId, Weak<tokio::sync::Mutex<()>>>>,
}

impl Holder {
    pub(super) fn new(
        settings: Settings,
        share: Share,
        technology: Technology,
        resolvers: Receiver<Resolvers>,
        exits: mpsc::Sender<Exit>,
    ) -> Result<Self, RuntimeError> {
        let keeper = match &settings.keeper {
            Some(keeper) => keeper.clone(),
            None => log::own_path().map_err(step("find this program"))?,
        };
        let groups = Groups::below(&settings.control_group);
        Ok(Self {
            client: Client::new(&settings.socket, &settings.namespace)?,
            technology,
            running: Running::default(),
            swap: groups.limits_swap(),
            groups,
            share,
            keeper,
            snapshotter: OnceCell::new(),
            resolvers,
            exits,
            locks: Mutex::default(),
            settings,
        })
    }

    /// The answer holds as long as this daemon.
    pub(super) async fn snapshotter(&self) -> Result<&'static str, RuntimeError> {
        self.snapshotter.get_or_try_init(|| image::snapshotter(&self.client)).await.copied()
    }

    pub(super) fn directory(&self, instance: &InstanceId) -> PathBuf {
        self.settings.run.join(instance.to_string())
    }

    pub(super) fn log(&self, instance: &InstanceId) -> PathBuf {
        self.settings.logs.join(format!("{instance}.log"))
    }

    /// Container and namespace, nothing of it running.
    pub(super) async fn make(
        &self,
        spec: &InstanceSpec,
        image: &Image,
        snapshotter: &str,
        guard: &OwnedMutexGuard<()>,
    ) -> Result<Sandbox, RuntimeError> {
        spec::command(spec, &image.config)?;
        self.remove(&spec.id, Duration::ZERO, guard).await?;
        let servers = surroundings::name_servers(&self.resolvers).await;
        let files = self.surroundings(spec, &servers)?;
        let name = container_name(&spec.id);
        let snapshot = Snapshot { snapshotter: snapshotter.into(), key: name.clone(), ..Snapshot::default() };
        let record = Container {
            image: image.name.clone(),
            snapshotter: snapshotter.into(),
            snapshot_key: name,
            ..self.record(spec)?
        };
        let labels = [
            (LABEL_IMAGE, image.digest.clone()),
            (LABEL_STOP_SIGNAL, image.config.stop_signal.clone().unwrap_or_default()),
        ];
        let record = with_labels(record, labels);
        handler::note(&self.settings.handlers, &self.share.handler()?.name).map_err(step("note its handler"))?;
        // Before its snapshot, which is kept because a record names it.
        self.change(containers::CREATE, record.clone(), &[], "create the container").await?;
        let prepare = Snapshot { parent: image.root.clone(), ..snapshot };
        let Mounts { mounts } = self.ask("prepare the root file system", snapshots::PREPARE, prepare).await?;
        let looked = mounts.clone();
        let accounts = spawn_blocking(move || root::accounts(&looked)).await.map_err(joined("look for accounts"))?;
        let control_group = self.control_group(&spec.id);
        let order = Order { spec, image: &image.config, control_group: &control_group, swap: self.swap, files: &files };
        let document = order.document(&accounts)?;
        let record = Container { spec: Some(Any { type_url: SPEC.into(), value: document }), ..record };
        self.change(containers::UPDATE, record, &["spec"], "describe the container").await?;
        self.create_task(&spec.id, mounts).await
    }

    /// A container without an image, on a directory of this node: as the others in everything else.
    pub(super) async fn make_plain(&self, spec: &InstanceSpec, directory: &Path) -> Result<Sandbox, RuntimeError> {
        let files = self.surroundings(spec, &[])?;
        let accounts = root::accounts(&[]);
        let (image, control_group) = (image::Process::default(), self.control_group(&spec.id));
        let order = Order { spec, image: &image, control_group: &control_group, swap: self.swap, files: &files };
        let document = order.document(&accounts)?;
        let described = Some(Any { type_url: SPEC.into(), value: document });
        let record = Container { spec: described, ..self.record(spec)? };
        self.change(containers::CREATE, record, &[], "create the container").await?;
        let mount = snapshots::Mount {
            kind: "bind".into(),
            source: directory.to_string_lossy().into_owned(),
            options: vec!["rbind".into(), "rw".into()],
            ..snapshots::Mount::default()
        };
        self.create_task(&spec.id, vec![mount]).await
    }

    fn control_group(&self, instance: &InstanceId) -> String {
        format!("{}/{}", self.settings.control_group, instance)
    }

    /// What is said of every container. containerd wants a document, also before there is one.
    fn record(&self, spec: &InstanceSpec) -> Result<Container, RuntimeError> {
        let handler = self.share.handler()?;
        let document = Any { type_url: DOCUMENT.into(), value: spec.document.as_bytes().to_vec() };
        let record = Container {
            id: container_name(&spec.id),
            runtime: Some(handler.runtime()),
            spec: Some(Any { type_url: SPEC.into(), value: b"{}".to_vec() }),
            extensions: HashMap::from([(DOCUMENT.to_owned(), document)]),
            ..Container::default()
        };
        let labels = [(LABEL_INSTANCE, spec.id.to_string()), (LABEL_HANDLER, handler.name.clone())];
        Ok(with_labels(record, labels))
    }

    /// Files that are the node's to write and every container's to find.
    fn surroundings(&self, spec: &InstanceSpec, servers: &[String]) -> Result<Vec<Mount>, RuntimeError> {
        let name = surroundings::host_name(&spec.id);
        let resolver: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
        let own = format!("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{name}\n");
        let known = surroundings::known_hosts().into_iter().map(|(address, name)| format!("{address}\t{name}\n"));
        let hosts: String = std::iter::once(own).chain(known).collect();
        let directory = self.directory(&spec.id);
        let written = || -> io::Result<Vec<Mount>> {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.settings.logs)?;
            let files = [("resolv.conf", resolver), ("hosts", hosts), ("hostname", format!("{name}\n"))];
            let write = |(file, text): (&str, String)| {
                let source = directory.join(file);
                fs::write(&source, text)?;
                Ok(Mount { source, target: format!("/etc/{file}"), read_only: false })
            };
            files.into_iter().map(write).collect()
        };
        written().map_err(step("write its surroundings"))
    }

    async fn create_task(&self, instance: &InstanceId, root: Vec<snapshots::Mount>) -> Result<Sandbox, RuntimeError> {
        let output = log::address(&self.keeper, &self.log(instance));
        let order = tasks::Create { container: container_name(instance), root, stdout: output.clone(), stderr: output };
        let Created { pid } = self.ask("create its process", tasks::CREATE, order).await?;
        Ok(netns(pid))
    }

    /// Starts what was created. What runs is left as it is; what has run has lost its namespace and is to be made anew.
    pub(super) async fn start(
        self: &Arc<Self>,
        instance: &InstanceId,
        _guard: &OwnedMutexGuard<()>,
    ) -> Result<(), RuntimeError> {
        let name = container_name(instance);
        let process = self.process(&name).await?.ok_or_else(|| RuntimeError::Unknown(instance.clone()))?;
        match process.status() {
            State::Created => {}
            State::Running | State::Paused | State::Pausing => {
                if !self.running.has(instance) {
                    // Its start was asked for, and the answer lost.
                    self.watch(instance, process.pid);
                }
                return Ok(());
            }
            State::Stopped | State::Unknown => {
                let reason = format!("it has ended (exit code {})", process.code);
                return Err(RuntimeError::Step { step: "start its process", reason });
            }
        }
        // Before the start: it may end before the call returns.
        self.watch(instance, process.pid);
        let started = self.ask("start its process", tasks::START, which(&name)).await;
        started.map(|_: Created| ()).inspect_err(|_| drop(self.running.take(instance)))
    }

    /// Ends what runs and removes what was made, whatever state it is in. Repeatable.
    pub(super) async fn remove(
        &self,
        instance: &InstanceId,
        grace: Duration,
        _guard: &OwnedMutexGuard<()>,
    ) -> Result<(), RuntimeError> {
        // From here on its end is no news.
        drop(self.running.take(instance));
        let name = container_name(instance);
        if let Some(record) = self.container(instance).await? {
            self.end(&name, &record, grace).await?;
            self.take_away("remove its process", tasks::DELETE, which(&name)).await?;
            if !record.snapshot_key.is_empty() {
                let (snapshotter, key) = (record.snapshotter, record.snapshot_key);
                let snapshot = Snapshot { snapshotter, key, ..Snapshot::default() };
                self.take_away("remove its root file system", snapshots::REMOVE, snapshot).await?;
            }
            self.clear(instance).await?;
            // The record goes last: while it is there, a stop is tried again.
            return self.take_away("remove the container", containers::DELETE, Named { name }).await;
        }
        self.clear(instance).await
    }

    async fn clear(&self, instance: &InstanceId) -> Result<(), RuntimeError> {
        let (group, log, directory) =
            (self.groups.named(&instance.to_string()), self.log(instance), self.directory(instance));
        let cleared = spawn_blocking(move || {
            group.remove().map_err(step("remove its control group"))?;
            output::remove(&log).map_err(step("remove its log"))?;
            match fs::remove_dir_all(directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(step("remove its directory")(error)),
                _ => Ok(()),
            }
        });
        cleared.await.map_err(joined("stop"))?
    }

    /// Asks its processes to end, as the image says how, and after the grace makes them.
    async fn end(&self, name: &str, record: &Container, grace: Duration) -> Result<(), RuntimeError> {
        let Some(process) = self.process(name).await? else { return Ok(()) };
        if process.status() == State::Stopped {
            return Ok(());
        }
        if process.status() == State::Running && !grace.is_zero() {
            let signal = stop_signal(record.labels.get(LABEL_STOP_SIGNAL).map_or("", String::as_str));
            self.kill(name, signal).await?;
            if timeout(grace, self.ended(name)).await.is_ok() {
                return Ok(());
            }
        }
        self.kill(name, Signal::SIGKILL).await?;
        match timeout(GONE, self.ended(name)).await {
            Ok(_) => Ok(()),
            Err(_) => {
                Err(RuntimeError::Step { step: "stop", reason: format!("it was killed and is there {GONE:?} later") })
            }
        }
    }

    async fn kill(&self, name: &str, signal: Signal) -> Result<(), RuntimeError> {
        let signal = (signal as i32).cast_unsigned();
        let order = Kill { container: name.to_owned(), exec: String::new(), signal };
        self.take_away("signal its process", tasks::KILL, order).await
    }

    /// Its exit code once it has ended; `None` for one that is not known any more.
    async fn ended(&self, name: &str) -> Option<i64> {
        loop {
            match self.client.call_and_wait::<_, Ended>(tasks::WAIT, which(name)).await {
                Ok(ended) => return Some(ended.code.into()),
                Err(status) if away(&status) => sleep(RETRY).await,
                Err(status) => {
                    tracing::debug!(name, %status, "it has ended without a code");
                    return None;
                }
            }
        }
    }

    /// From now on it is measured, and its end told.
    fn watch(self: &Arc<Self>, instance: &InstanceId, pid: u32) {
        self.running.add(instance, pid, || {
            let (holder, instance) = (self.clone(), instance.clone());
            AbortOnDropHandle::new(tokio::spawn(async move {
                let code = holder.ended(&container_name(&instance)).await.unwrap_or(KILLED);
                let out_of_memory = holder.out_of_memory(&instance, code);
                // Kept until all is told: this task ends with it.
                if let Some(_workload) = holder.running.take(&instance) {
                    // The receiver lives as long as the runtime; a full queue makes this wait.
                    let _ = holder.exits.send(Exit { instance, code, out_of_memory, reason: None }).await;
                }
            }))
        });
    }

    /// The control group is there until the process is removed.
    fn out_of_memory(&self, instance: &InstanceId, code: i64) -> bool {
        let events = self.groups.named(&instance.to_string()).memory_events();
        code != 0 && events.is_some_and(|events| cgroup::out_of_memory_kills(&events) > 0)
    }

    pub(super) async fn adopt(self: &Arc<Self>) -> Result<Vec<Adopted>, RuntimeError> {
        let filter = Names { names: vec![format!("labels.\"{LABEL_INSTANCE}\"")] };
        let Listed { containers } = self.ask("list containers", containers::LIST, filter).await?;
        let mut adopted = Vec::new();
        for record in containers {
            let label = |name: &str| record.labels.get(name).map_or("", String::as_str);
            if !self.share.has(label(LABEL_HANDLER)) {
                continue;
            }
            let Ok(instance) = label(LABEL_INSTANCE).parse::<InstanceId>() else {
                tracing::warn!(id = record.id, "a container with our label and no instance is left alone");
                continue;
            };
            let document = record.extensions.get(DOCUMENT).map(|document| String::from_utf8_lossy(&document.value));
            let document = document.unwrap_or_default().into();
            let state = self.adopt_one(&instance, &record.id).await?;
            adopted.push(Adopted { instance, document, state });
        }
        Ok(adopted)
    }

    async fn adopt_one(self: &Arc<Self>, instance: &InstanceId, name: &str) -> Result<AdoptedState, RuntimeError> {
        let Some(process) = self.process(name).await? else { return Ok(AdoptedState::Incomplete) };
        Ok(match process.status() {
            State::Running | State::Paused | State::Pausing => {
                if !self.running.has(instance) {
                    self.watch(instance, process.pid);
                }
                AdoptedState::Running(netns(process.pid))
            }
            State::Stopped => {
                drop(self.running.take(instance));
                let code = process.code.into();
                let out_of_memory = self.out_of_memory(instance, code);
                AdoptedState::Exited(Exit { instance: instance.clone(), code, out_of_memory, reason: None })
            }
            State::Created | State::Unknown => AdoptedState::Incomplete,
        })
    }

    /// Has containerd say how much of a disk containers use, in the background.
    pub(super) fn measure_disks(self: &Arc<Self>) {
        for instance in self.running.stale() {
            let holder = self.clone();
            tokio::spawn(async move {
                let Ok(Some(record)) = holder.container(&instance).await else { return };
                let (snapshotter, key) = (record.snapshotter, record.snapshot_key);
                let snapshot = Snapshot { snapshotter, key, ..Snapshot::default() };
                match holder.client.call::<_, snapshots::Usage>(snapshots::USAGE, snapshot).await {
                    Ok(usage) => holder.running.set_disk(&instance, usage.bytes.try_into().unwrap_or(0)),
                    Err(error) => tracing::debug!(%instance, %error, "its disk cannot be measured"),
                }
            });
        }
    }

    /// Usage since the call before. A container whose group has gone is about to be told as ended and is left out.
    pub(super) fn usage(&self) -> Vec<InstanceUsage> {
        let (cpus, memory) = (cgroup::online_cpus(), cgroup::total_memory_bytes());
        self.running.each(|(instance, workload)| {
            let (now, cgroup) = (Instant::now(), workload.cgroup.as_ref());
            // Of one whose group was not found nothing is counted but packets.
            let sample = match cgroup {
                Some(cgroup) => Some((now, cgroup.sample().ok()?)),
                None => None,
            };
            let before = std::mem::replace(&mut workload.sampled, sample);
            let memory_bytes = sample.map_or(0, |(_, sample)| sample.memory_bytes);
            let counters = cgroup.map(cgroup::Cgroup::counters).unwrap_or_default();
            let log = self.log(instance);
            Some(InstanceUsage {
                instance: instance.clone(),
                technology: self.technology.clone(),
                cpu_percent: before.zip(sample).map_or(0.0, |(before, now)| cgroup::cpu_percent(before, now, cpus)),
                memory_bytes,
                memory_percent: cgroup::percent(memory_bytes as f64, memory as f64),
                disk_bytes: workload.disk_bytes,
                log_tail: output::text(&output::tail(&log, TAIL).unwrap_or_default()),
                counters: interfaces::count(Some(workload.pid.into()), counters),
            })
        })
    }

    pub(super) async fn inspect(&self, instance: &InstanceId) -> Result<InstanceDetails, RuntimeError> {
        let record = self.known(instance).await?;
        let process = self.process(&record.id).await?.unwrap_or_default();
        let (running, stopped) = (process.status() == State::Running, process.status() == State::Stopped);
        let code = stopped.then(|| i64::from(process.code));
        Ok(InstanceDetails {
            handle: record.id.clone(),
            image_id: record.labels.get(LABEL_IMAGE).cloned().unwrap_or_default(),
            pid: Some(process.pid).filter(|pid| running && *pid > 0),
            exit_code: code,
            out_of_memory: code.is_some_and(|code| self.out_of_memory(instance, code)),
            ..spec::details(described(&record))
        })
    }

    /// The process document of one more command.
    pub(super) async fn beside(&self, instance: &InstanceId, exec: &Exec) -> Result<Vec<u8>, RuntimeError> {
        let record = self.known(instance).await?;
        Ok(spec::beside(described(&record), &exec.command, exec.terminal.is_some()))
    }

    pub(super) async fn known(&self, instance: &InstanceId) -> Result<Container, RuntimeError> {
        self.container(instance).await?.ok_or_else(|| RuntimeError::Unknown(instance.clone()))
    }

    /// The container of this instance, if there is one and it is ours.
    async fn container(&self, instance: &InstanceId) -> Result<Option<Container>, RuntimeError> {
        let named = Named { name: container_name(instance) };
        let found = match self.client.call::<_, One>(containers::GET, named).await {
            Ok(found) => found.container,
            Err(status) if not_found(&status) => None,
            Err(status) => return Err(self.client.failed("look for the container", &status)),
        };
        let owner = instance.to_string();
        Ok(found.filter(|found| found.labels.get(LABEL_INSTANCE) == Some(&owner)))
    }

    /// A container's first process, if it was created.
    async fn process(&self, name: &str) -> Result<Option<Process>, RuntimeError> {
        match self.client.call::<_, tasks::Got>(tasks::GET, which(name)).await {
            Ok(got) => Ok(got.process),
            Err(status) if not_found(&status) => Ok(None),
            Err(status) => Err(self.client.failed("look for its process", &status)),
        }
    }

    async fn change(
        &self,
        call: &'static str,
        record: Container,
        members: &[&str],
        step: &'static str,
    ) -> Result<(), RuntimeError> {
        let names = members.iter().map(|&name| name.to_owned()).collect::<Vec<_>>();
        let members = (!names.is_empty()).then_some(Names { names });
        self.ask(step, call, One { container: Some(record), members }).await.map(|_: One| ())
    }

    async fn ask<Q, A>(&self, step: &'static str, call: &'static str, question: Q) -> Result<A, RuntimeError>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        self.client.call(call, question).await.map_err(|status: Status| self.client.failed(step, &status))
    }

    async fn take_away<Q: prost::Message + 'static>(
        &self,
        step: &'static str,
        call: &'static str,
        question: Q,
    ) -> Result<(), RuntimeError> {
        let answer = gone(self.client.call::<_, Empty>(call, question).await);
        answer.map(drop).map_err(|status| self.client.failed(step, &status))
    }

    pub(super) async fn lock(&self, instance: &InstanceId) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| lock.strong_count() > 0);
            let lock = locks.get(instance).and_then(Weak::upgrade).unwrap_or_default();
            locks.insert(instance.clone(), Arc::downgrade(&lock));
            lock
        };
        lock.lock_owned().await
    }
}

/// The instance's name where containerd takes it, else one that is made from it.
pub(super) fn container_name(instance: &InstanceId) -> String {
    let name = instance.to_string();
    if name.len() <= LONGEST_NAME { name } else { image::sha256(&name) }
}

fn which(name: &str) -> Which {
    Which { container: name.to_owned(), exec: String::new() }
}

fn netns(pid: u32) -> Sandbox {
    Sandbox { netns: format!("/proc/{pid}/ns/net").into() }
}

fn with_labels<const N: usize>(mut record: Container, labels: [(&str, String); N]) -> Container {
    record.labels.extend(labels.map(|(name, value)| (name.to_owned(), value)));
    record
}

fn described(record: &Container) -> &[u8] {
    record.spec.as_ref().map(|spec| spec.value.as_slice()).unwrap_or_default()
}

/// By name or number, as an image says it.
fn stop_signal(text: &str) -> Signal {
    let named = Signal::from_str(text).or_else(|_| Signal::from_str(&format!("SIG{text}"))).ok();
    named.or_else(|| Signal::try_from(text.parse::<i32>().ok()?).ok()).unwrap_or(Signal::SIGTERM)
}

fn step(step: &'static str) -> impl Fn(io::Error) -> RuntimeError {
    move |error| RuntimeError::Step { step, reason: error.to_string() }
}

fn joined(step: &'static str) -> impl Fn(tokio::task::JoinError) -> RuntimeError {
    move |error| RuntimeError::Step { step, reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_containerd_takes() {
        let short: InstanceId = "app.default.web.test.instance.0".parse().expect("an id");
        assert_eq!(container_name(&short), short.to_string());
        let part = "a".repeat(30);
        let long: InstanceId = format!("{part}.{part}.{part}.{part}.instance.0").parse().expect("an id");
        assert_eq!(container_name(&long).len(), 64);
        assert_ne!(container_name(&long), container_name(&InstanceId { number: 1, ..long.clone() }));
    }

    #[test]
    fn an_image_says_how_it_is_stopped() {
        for (text, signal) in [
            ("", Signal::SIGTERM),
            ("SIGQUIT", Signal::SIGQUIT),
            ("INT", Signal::SIGINT),
            ("3", Signal::SIGQUIT),
            ("nonsense", Signal::SIGTERM),
            ("-1", Signal::SIGTERM),
        ] {
            assert_eq!(stop_signal(text), signal, "{text}");
        }
    }
}
