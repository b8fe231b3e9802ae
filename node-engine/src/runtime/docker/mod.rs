//! Containers through the Docker daemon.
//!
//! An instance is two containers: a *sandbox*, which does nothing but hold the network namespace, and the *workload*, which joins it
//! (docs/adr/0006-sandbox-container.md). Both carry the instance and its description as labels; nothing else is kept, so a restarted
//! daemon adopts what it finds. Containers without our labels are never touched, whatever their name.

mod client;
mod container;
mod details;
mod engine;
mod exec;
mod image;
mod refresh;
mod running;
#[cfg(test)]
mod tests;
mod watch;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bollard::Docker;
use bollard::models::{ContainerInspectResponse, ContainerSummary};
use bollard::query_parameters::{
    CreateContainerOptions, ListContainersOptions, RemoveContainerOptions, StopContainerOptions,
};
use tokio::sync::watch::Receiver;
use tokio::sync::{OwnedMutexGuard, mpsc};
use tokio_util::task::AbortOnDropHandle;

use self::client::{Client, not_found, settled};
use self::container::{
    LABEL_DOCUMENT, LABEL_INSTANCE, LABEL_ROLE, ROLE_SANDBOX, ROLE_WORKLOAD, sandbox_name, workload_name,
};
use self::running::Running;
use super::cgroup::{self, Cgroup};
use super::registries::Registries;
use super::surroundings::{self, Resolvers};
use super::{Adopted, AdoptedState, Exec, Exit, Follow, Runtime, RuntimeError, Sandbox, Session, pause};
use crate::model::{InstanceDetails, InstanceId, InstanceSpec, InstanceUsage, Technology};

/// Ends that may wait to be read.
const EXITS: usize = 256;
/// A container that is being removed by someone else is waited for this long.
const REMOVAL: Duration = Duration::from_secs(10);
const REMOVAL_POLL: Duration = Duration::from_millis(100);
const TRIAL: Duration = Duration::from_secs(30);

/// The Docker daemon of this machine.
#[derive(Debug)]
pub struct DockerRuntime {
    inner: Arc<Inner>,
    exits: tokio::sync::Mutex<mpsc::Receiver<Exit>>,
    _watch: AbortOnDropHandle<()>,
}

#[derive(Debug)]
struct Inner {
    client: Client,
    running: Running,
    /// One change of an instance at a time, also when whoever asked for it has lost interest.
    locks: Mutex<HashMap<InstanceId, Weak<tokio::sync::Mutex<()>>>>,
    refreshing: tokio::sync::Mutex<()>,
    /// One import of the sandbox image at a time: each makes another image and would leave the one before without a name.
    importing: tokio::sync::Mutex<()>,
    /// Where the node answers names for workloads.
    resolvers: Receiver<Resolvers>,
    registries: Registries,
}

impl DockerRuntime {
    /// The daemon at `host` (`unix:///path`), else at the platform's socket. It need not be there yet. Must be called inside a tokio
    /// runtime.
    ///
    /// # Errors
    /// `Refused` for an address that is not a local socket.
    pub fn new(
        host: Option<&str>,
        resolvers: Receiver<Resolvers>,
        registries: Registries,
    ) -> Result<Self, RuntimeError> {
        let inner = Arc::new(Inner {
            client: Client::new(host)?,
            running: Running::default(),
            locks: Mutex::default(),
            refreshing: tokio::sync::Mutex::default(),
            importing: tokio::sync::Mutex::default(),
            resolvers,
            registries,
        });
        let (exits, exited) = mpsc::channel(EXITS);
        let watch = tokio::spawn(watch::run(inner.clone(), exits));
        Ok(Self { inner, exits: tokio::sync::Mutex::new(exited), _watch: AbortOnDropHandle::new(watch) })
    }

    /// Whether a daemon answers now.
    ///
    /// # Errors
    /// What is the matter, and what to do about it.
    pub async fn ping(&self) -> Result<(), RuntimeError> {
        let docker = self.inner.client.get().await?;
        let answered = docker.ping().await;
        answered.map(drop).map_err(|error| {
            self.inner.client.forget();
            self.inner.client.failed("ping", error)
        })
    }

    /// Whether containers run here: found out by running one, unless it is Docker itself that answers.
    ///
    /// # Errors
    /// What is the matter, and what to do about it.
    pub async fn works(&self) -> Result<(), RuntimeError> {
        self.ping().await?;
        if self.inner.client.engine().is_plain_docker() {
            return Ok(());
        }
        let spec = InstanceSpec {
            image: image::PAUSE.into(),
            command: vec![pause::PATH.into()],
            ..InstanceSpec::new(trial(), Technology::Container)
        };
        let run = async {
            self.inner.make(&spec, self.inner.lock(&spec.id).await).await?;
            self.start(&spec.id).await
        };
        let tried = tokio::time::timeout(TRIAL, run).await;
        let stopped = self.stop(&spec.id, Duration::ZERO).await;
        let refused = |reason| RuntimeError::Refused { what: "trial container", reason };
        match tried {
            Ok(Ok(())) => stopped,
            Ok(Err(error @ RuntimeError::Unavailable(_))) => Err(error),
            Ok(Err(error)) => Err(refused(error.to_string())),
            Err(_) => Err(refused(format!("it does not run within {TRIAL:?}"))),
        }
    }

    /// There is a socket, whether or not somebody answers at it.
    pub fn is_installed(&self) -> bool {
        self.inner.client.socket().exists()
    }

    /// Removes the image that sandboxes are made from: the last thing of ours that Docker holds when every instance is stopped.
    /// Repeatable.
    ///
    /// # Errors
    /// If a container still uses it.
    pub async fn remove_sandbox_image(&self) -> Result<(), RuntimeError> {
        let _alone = self.inner.importing.lock().await;
        image::remove_pause(&self.inner.client).await
    }
}

#[async_trait]
impl Runtime for DockerRuntime {
    fn technology(&self) -> Technology {
        Technology::Container
    }

    async fn prepare(&self, spec: &InstanceSpec) -> Result<Sandbox, RuntimeError> {
        let guard = self.inner.lock(&spec.id).await;
        let (client, registries) = (&self.inner.client, &self.inner.registries);
        let image = image::ensure(client, registries, &spec.image, spec.platform.as_deref()).await?;
        // From here on a caller that goes away must not leave a request half-way: the task ends it and holds the lock that long.
        let (inner, spec) = (self.inner.clone(), InstanceSpec { image, ..spec.clone() });
        let made = tokio::spawn(async move { inner.make(&spec, guard).await });
        made.await.unwrap_or_else(|error| Err(RuntimeError::Step { step: "prepare", reason: error.to_string() }))
    }

    async fn start(&self, instance: &InstanceId) -> Result<(), RuntimeError> {
        let guard = self.inner.lock(instance).await;
        let (inner, instance) = (self.inner.clone(), instance.clone());
        let started = tokio::spawn(async move { inner.start(&instance, guard).await });
        started.await.unwrap_or_else(|error| Err(RuntimeError::Step { step: "start", reason: error.to_string() }))
    }

    async fn stop(&self, instance: &InstanceId, grace: Duration) -> Result<(), RuntimeError> {
        let guard = self.inner.lock(instance).await;
        let (inner, instance) = (self.inner.clone(), instance.clone());
        let stopped = tokio::spawn(async move { inner.remove(&instance, grace, &guard).await });
        stopped.await.unwrap_or_else(|error| Err(RuntimeError::Step { step: "stop", reason: error.to_string() }))
    }

    async fn adopt(&self) -> Result<Vec<Adopted>, RuntimeError> {
        let listed = self.inner.list().await?;
        let mut found: BTreeMap<InstanceId, Vec<ContainerSummary>> = BTreeMap::new();
        for container in listed {
            let labels = container.labels.as_ref();
            match labels.and_then(|labels| labels.get(LABEL_INSTANCE)).and_then(|label| label.parse().ok()) {
                Some(instance) => found.entry(instance).or_default().push(container),
                None => {
                    tracing::warn!(names = ?container.names, "a container with our label and no instance is left alone");
                }
            }
        }
        let mut adopted = Vec::with_capacity(found.len());
        for (instance, containers) in found {
            adopted.push(self.inner.adopt(instance, containers).await?);
        }
        Ok(adopted)
    }

    async fn usage(&self) -> Result<Vec<InstanceUsage>, RuntimeError> {
        refresh::begin(&self.inner);
        let inner = self.inner.clone();
        let usage = tokio::task::spawn_blocking(move || inner.running.usage()).await;
        usage.map_err(|error| RuntimeError::Step { step: "usage", reason: error.to_string() })
    }

    async fn logs(&self, instance: &InstanceId, tail: usize) -> Result<Vec<u8>, RuntimeError> {
        let docker = self.inner.client.get().await?;
        let id = self.inner.workload_id(&docker, instance).await?;
        let log = refresh::log_tail(&docker, &id, tail).await;
        log.map_err(|error| self.inner.client.failed("logs", error))
    }

    async fn inspect(&self, instance: &InstanceId) -> Result<InstanceDetails, RuntimeError> {
        let docker = self.inner.client.get().await?;
        let container = self.inner.ours(&docker, instance, &workload_name(instance)).await?;
        container.map(details::of).ok_or_else(|| RuntimeError::Unknown(instance.clone()))
    }

    async fn follow(&self, instance: &InstanceId, tail: usize) -> Result<Follow, RuntimeError> {
        let docker = self.inner.client.get().await?;
        let id = self.inner.workload_id(&docker, instance).await?;
        exec::follow(self.inner.clone(), id, tail).await
    }

    async fn exec(&self, instance: &InstanceId, exec: Exec) -> Result<Session, RuntimeError> {
        let docker = self.inner.client.get().await?;
        let id = self.inner.workload_id(&docker, instance).await?;
        exec::begin(self.inner.clone(), &id, exec).await
    }

    async fn exited(&self) -> Exit {
        match self.exits.lock().await.recv().await {
            Some(exit) => exit,
            // The watch ends only when `self` does, or by a bug that its own panic has told.
            None => std::future::pending().await,
        }
    }
}

impl Inner {
    /// Sandbox up, workload created, nothing of it running.
    async fn make(&self, spec: &InstanceSpec, guard: OwnedMutexGuard<()>) -> Result<Sandbox, RuntimeError> {
        {
            let _one = self.importing.lock().await;
            image::ensure_pause(&self.client).await?;
        }
        self.remove(&spec.id, Duration::ZERO, &guard).await?;
        let docker = self.client.get().await?;
        let sandbox = sandbox_name(&spec.id);
        self.create(&docker, &sandbox, "", container::sandbox(spec, surroundings::name_servers(&self.resolvers).await))
            .await?;
        let start = async {
            let started = docker.start_container(&sandbox, None).await;
            started.map_err(|error| self.client.failed("start the sandbox", error))?;
            let pid = self.ours(&docker, &spec.id, &sandbox).await?.as_ref().and_then(running_pid);
            pid.ok_or_else(|| RuntimeError::Step { step: "sandbox", reason: "it ended at once".into() })
        };
        // Docker takes a third of a deployment for either, and they do not need each other yet.
        let mut workload = container::workload(spec, &sandbox, cgroup::online_cpus());
        if self.client.engine().podman {
            // Docker takes over the sandbox's, and refuses to be told.
            workload.hostname = Some(surroundings::host_name(&spec.id));
        }
        let (name, platform) = (workload_name(&spec.id), spec.platform.as_deref().unwrap_or_default());
        let (pid, created) = tokio::join!(start, self.create(&docker, &name, platform, workload));
        created?;
        let pid = pid?;
        Ok(netns(pid))
    }

    async fn create(
        &self,
        docker: &Docker,
        name: &str,
        platform: &str,
        body: bollard::models::ContainerCreateBody,
    ) -> Result<(), RuntimeError> {
        let options = CreateContainerOptions { name: Some(name.into()), platform: platform.into() };
        match docker.create_container(Some(options), body).await {
            Ok(created) => {
                for warning in created.warnings {
                    tracing::debug!(name, warning, "created with a warning");
                }
                Ok(())
            }
            // The description asks for what this Docker cannot do.
            Err(bollard::errors::Error::DockerResponseServerError { status_code: 400 | 409, message }) => {
                Err(RuntimeError::Refused { what: "container", reason: message })
            }
            Err(error) => Err(self.client.failed("create the container", error)),
        }
    }

    async fn start(&self, instance: &InstanceId, _guard: OwnedMutexGuard<()>) -> Result<(), RuntimeError> {
        let docker = self.client.get().await?;
        let unknown = || RuntimeError::Unknown(instance.clone());
        let name = workload_name(instance);
        let id = self.ours(&docker, instance, &name).await?.and_then(|container| container.id).ok_or_else(unknown)?;
        // Before the start: a workload may end before the call returns.
        self.running.expect_start(&id, instance);
        if let Err(error) = docker.start_container(&id, None).await {
            self.running.take(&id);
            return Err(if not_found(&error) { unknown() } else { self.client.failed("start the container", error) });
        }
        self.running.started(&id);
        if let Some(started) = self.ours(&docker, instance, &name).await?
            && let Some(pid) = running_pid(&started)
        {
            self.measure(&id, pid, started.log_path);
        }
        Ok(())
    }

    /// Removes both containers, whatever state they are in.
    async fn remove(
        &self,
        instance: &InstanceId,
        grace: Duration,
        _guard: &OwnedMutexGuard<()>,
    ) -> Result<(), RuntimeError> {
        let docker = self.client.get().await?;
        for name in [workload_name(instance), sandbox_name(instance)] {
            let Some(container) = self.ours(&docker, instance, &name).await? else { continue };
            let Some(id) = container.id.as_deref() else { continue };
            // An end that was asked for is not told.
            self.running.take(id);
            if !grace.is_zero() && name == workload_name(instance) && running_pid(&container).is_some() {
                let seconds = i32::try_from(grace.as_secs().max(1)).unwrap_or(i32::MAX);
                let options = StopContainerOptions { signal: None, t: Some(seconds) };
                match docker.stop_container(id, Some(options)).await {
                    Err(error) if !not_found(&error) => return Err(self.client.failed("stop the container", error)),
                    _ => {}
                }
            }
            self.remove_container(&docker, id).await?;
        }
        Ok(())
    }

    async fn remove_container(&self, docker: &Docker, id: &str) -> Result<(), RuntimeError> {
        let options = RemoveContainerOptions { force: true, v: true, link: false };
        let error = match docker.remove_container(id, Some(options)).await {
            Ok(()) => return Ok(()),
            Err(error) if not_found(&error) => return Ok(()),
            Err(error) => error,
        };
        if !matches!(error, bollard::errors::Error::DockerResponseServerError { status_code: 409, .. }) {
            return Err(self.client.failed("remove the container", error));
        }
        // Somebody else removes it already.
        let deadline = Instant::now() + REMOVAL;
        while Instant::now() < deadline {
            match settled(|| docker.inspect_container(id, None)).await {
                Err(error) if not_found(&error) => return Ok(()),
                _ => tokio::time::sleep(REMOVAL_POLL).await,
            }
        }
        Err(self.client.failed("remove the container", error))
    }

    /// The container of this name, if there is one and it is this instance's.
    async fn ours(
        &self,
        docker: &Docker,
        instance: &InstanceId,
        name: &str,
    ) -> Result<Option<ContainerInspectResponse>, RuntimeError> {
        let found = match settled(|| docker.inspect_container(name, None)).await {
            Ok(found) => found,
            Err(error) if not_found(&error) => return Ok(None),
            Err(error) => return Err(self.client.failed("look for the container", error)),
        };
        let labels = found.config.as_ref().and_then(|config| config.labels.as_ref());
        let owner = labels.and_then(|labels| labels.get(LABEL_INSTANCE));
        let ours = owner.is_some_and(|owner| *owner == instance.to_string());
        Ok(ours.then_some(found))
    }

    /// Container id of the instance's workload.
    async fn workload_id(&self, docker: &Docker, instance: &InstanceId) -> Result<String, RuntimeError> {
        let container = self.ours(docker, instance, &workload_name(instance)).await?;
        container.and_then(|container| container.id).ok_or_else(|| RuntimeError::Unknown(instance.clone()))
    }

    async fn list(&self) -> Result<Vec<ContainerSummary>, RuntimeError> {
        let docker = self.client.get().await?;
        let options = ListContainersOptions {
            all: true,
            filters: Some(HashMap::from([("label".into(), vec![LABEL_INSTANCE.into()])])),
            ..ListContainersOptions::default()
        };
        let listed = settled(|| docker.list_containers(Some(options.clone()))).await;
        listed.map_err(|error| self.client.failed("list containers", error))
    }

    async fn adopt(&self, instance: InstanceId, containers: Vec<ContainerSummary>) -> Result<Adopted, RuntimeError> {
        let label = |container: &ContainerSummary, name: &str| {
            container.labels.as_ref().and_then(|labels| labels.get(name)).cloned().unwrap_or_default()
        };
        let document = containers.first().map(|first| label(first, LABEL_DOCUMENT)).unwrap_or_default().into();
        let of_role = |role: &str| {
            let container = containers.iter().find(|container| label(container, LABEL_ROLE) == role);
            container.and_then(|container| container.id.as_deref())
        };
        let state = match of_role(ROLE_WORKLOAD) {
            Some(id) => self.adopt_workload(&instance, id, of_role(ROLE_SANDBOX)).await?,
            None => AdoptedState::Incomplete,
        };
        Ok(Adopted { instance, document, state })
    }

    async fn adopt_workload(
        &self,
        instance: &InstanceId,
        id: &str,
        sandbox: Option<&str>,
    ) -> Result<AdoptedState, RuntimeError> {
        let docker = self.client.get().await?;
        // Before looking: an end between the look and the note would be told by nobody.
        self.running.expect(id, instance);
        let found = match settled(|| docker.inspect_container(id, None)).await {
            Ok(found) => found,
            Err(error) => {
                self.running.take(id);
                return if not_found(&error) {
                    Ok(AdoptedState::Incomplete)
                } else {
                    Err(self.client.failed("inspect the container", error))
                };
            }
        };
        if let Some(pid) = running_pid(&found) {
            self.measure(id, pid, found.log_path);
            // A workload that is started again has another process, and another program may get the number of its first. Only where the
            // sandbox is gone the namespace is the workload's alone.
            let holder = match sandbox {
                Some(sandbox) => settled(|| docker.inspect_container(sandbox, None)).await.ok(),
                None => None,
            };
            return Ok(AdoptedState::Running(netns(holder.as_ref().and_then(running_pid).unwrap_or(pid))));
        }
        // Where the watch was faster its end is told twice, here first; by then it is known as ended.
        self.running.take(id);
        let state = found.state.unwrap_or_default();
        Ok(match (state.started_at.as_deref(), state.exit_code) {
            // Docker writes the year 1 for what was never started.
            (Some(started), Some(code)) if !started.starts_with("0001-") => {
                let out_of_memory = state.oom_killed.unwrap_or(false);
                AdoptedState::Exited(watch::exit(self, instance.clone(), code, out_of_memory))
            }
            _ => AdoptedState::Incomplete,
        })
    }

    fn measure(&self, container: &str, pid: i64, log_path: Option<String>) {
        let cgroup = match Cgroup::of(pid) {
            Ok(cgroup) if cgroup.is_of(container) => Some(cgroup),
            Ok(_) => {
                tracing::warn!(
                    container,
                    "it has no control group of its own: its limits do not hold, its usage is not known"
                );
                None
            }
            Err(error) => {
                tracing::warn!(container, pid, %error, "its usage cannot be measured");
                None
            }
        };
        self.running.measure(container, pid, cgroup, log_path.map(PathBuf::from));
    }

    async fn lock(&self, instance: &InstanceId) -> OwnedMutexGuard<()> {
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

/// No cluster names an instance so: it would have to be the name of a service of its own.
fn trial() -> InstanceId {
    "node.engine.trial.docker.instance.0".parse().expect("a name of four parts and a number")
}

fn running_pid(container: &ContainerInspectResponse) -> Option<i64> {
    let state = container.state.as_ref()?;
    state.pid.filter(|pid| state.running == Some(true) && *pid > 0)
}

fn netns(pid: i64) -> Sandbox {
    Sandbox { netns: format!("/proc/{pid}/ns/net").into() }
}
