//! Containers through containerd, without Docker.
//!
//! An instance is one container in a namespace of ours. containerd makes a container with its network namespace before it starts its
//! first process, so nothing has to hold that namespace meanwhile. The container's record is made first and goes last: it names the
//! snapshot, which is thereby kept, carries the description, and is what a restarted daemon adopts or removes. Output goes through
//! [`log`], which lives as long as the container and not as long as the daemon.

mod api;
mod client;
mod exec;
mod handler;
mod holder;
mod image;
mod log;
mod root;
mod running;
mod spec;
mod trial;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio::sync::watch::Receiver;
use tokio::task::{JoinHandle, spawn_blocking};

pub use handler::{Handler, Share, configured, noted};
pub use log::{COMMAND as KEEP_LOG, keep as keep_log};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use {handler::understand as handlers, image::understand as images, spec::understand as documents};

use self::holder::Holder;
use super::registries::Registries;
use super::surroundings::Resolvers;
use super::{Adopted, Exec, Exit, Follow, Runtime, RuntimeError, Sandbox, Session, output, supervised};
use crate::model::{InstanceDetails, InstanceId, InstanceSpec, InstanceUsage, Technology};

/// Ends that may wait to be read.
const EXITS: usize = 256;

/// Where containerd is, and where we keep what it does not.
#[derive(Clone, Debug)]
pub struct Settings {
    pub socket: PathBuf,
    /// containerd's, for everything of ours.
    pub namespace: String,
    /// What a reboot forgets: a directory for each instance.
    pub run: PathBuf,
    pub logs: PathBuf,
    /// Names of the handlers that have made containers.
    pub handlers: PathBuf,
    /// The binary that keeps logs; `None`: this one.
    pub keeper: Option<PathBuf>,
    /// Parent of the control groups.
    pub control_group: String,
    /// Where images come from.
    pub registries: Registries,
}

impl Settings {
    /// Directories below the daemon's own.
    pub fn new(socket: &Path, namespace: &str, run_dir: &Path, state_dir: &Path, control_group: &str) -> Self {
        Self {
            socket: socket.to_owned(),
            namespace: namespace.to_owned(),
            run: run_dir.join("containerd"),
            logs: state_dir.join("logs/containerd"),
            handlers: state_dir.join("containerd/handlers"),
            keeper: None,
            control_group: format!("{control_group}/containerd"),
            registries: Registries::default(),
        }
    }
}

/// Containers of one OCI runtime of this machine's containerd.
#[derive(Debug)]
pub struct ContainerdRuntime {
    holder: Arc<Holder>,
    registries: Registries,
    exits: tokio::sync::Mutex<mpsc::Receiver<Exit>>,
}

impl ContainerdRuntime {
    /// containerd need not be there yet. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// A namespace that containerd would not take, or a binary that cannot be found.
    pub fn new(
        settings: Settings,
        share: impl Into<Share>,
        technology: Technology,
        resolvers: Receiver<Resolvers>,
    ) -> Result<Self, RuntimeError> {
        let (exits, exited) = mpsc::channel(EXITS);
        let registries = settings.registries.clone();
        let holder = Arc::new(Holder::new(settings, share.into(), technology, resolvers, exits)?);
        Ok(Self { holder, registries, exits: tokio::sync::Mutex::new(exited) })
    }

    /// Whether it makes containers, and does not only look after those that are there.
    pub fn makes(&self) -> bool {
        self.holder.share.handler().is_ok()
    }

    /// Whether containers really run here, found out by running one.
    ///
    /// # Errors
    /// What is the matter.
    pub async fn try_out(&self) -> Result<(), RuntimeError> {
        trial::run(&self.holder).await
    }
}

#[async_trait]
impl Runtime for ContainerdRuntime {
    fn technology(&self) -> Technology {
        self.holder.technology.clone()
    }

    async fn prepare(&self, spec: &InstanceSpec) -> Result<Sandbox, RuntimeError> {
        self.holder.share.handler()?;
        spec::check(spec)?;
        let guard = self.holder.lock(&spec.id).await;
        let snapshotter = self.holder.snapshotter().await?;
        let image =
            image::ensure(&self.holder.client, &self.registries, snapshotter, &spec.image, spec.platform.as_deref())
                .await?;
        // From here on a caller that goes away must not leave a request half-way: the task ends it and holds the lock that long.
        let (holder, spec) = (self.holder.clone(), spec.clone());
        finished("prepare", tokio::spawn(async move { holder.make(&spec, &image, snapshotter, &guard).await })).await
    }

    async fn start(&self, instance: &InstanceId) -> Result<(), RuntimeError> {
        let guard = self.holder.lock(instance).await;
        let (holder, instance) = (self.holder.clone(), instance.clone());
        finished("start", tokio::spawn(async move { holder.start(&instance, &guard).await })).await
    }

    async fn stop(&self, instance: &InstanceId, grace: Duration) -> Result<(), RuntimeError> {
        let guard = self.holder.lock(instance).await;
        let (holder, instance) = (self.holder.clone(), instance.clone());
        finished("stop", tokio::spawn(async move { holder.remove(&instance, grace, &guard).await })).await
    }

    async fn adopt(&self) -> Result<Vec<Adopted>, RuntimeError> {
        self.holder.adopt().await
    }

    async fn usage(&self) -> Result<Vec<InstanceUsage>, RuntimeError> {
        self.holder.measure_disks();
        let holder = self.holder.clone();
        let usage = spawn_blocking(move || holder.usage()).await;
        usage.map_err(|error| RuntimeError::Step { step: "usage", reason: error.to_string() })
    }

    async fn logs(&self, instance: &InstanceId, tail: usize) -> Result<Vec<u8>, RuntimeError> {
        self.holder.known(instance).await?;
        let tail = output::tail(&self.holder.log(instance), tail);
        tail.map_err(|error| RuntimeError::Step { step: "logs", reason: error.to_string() })
    }

    async fn inspect(&self, instance: &InstanceId) -> Result<InstanceDetails, RuntimeError> {
        self.holder.inspect(instance).await
    }

    async fn follow(&self, instance: &InstanceId, tail: usize) -> Result<Follow, RuntimeError> {
        self.holder.known(instance).await?;
        let (holder, id) = (self.holder.clone(), instance.clone());
        Ok(supervised::follow(self.holder.log(instance), tail, move || holder.running.has(&id)))
    }

    async fn exec(&self, instance: &InstanceId, exec: Exec) -> Result<Session, RuntimeError> {
        let process = self.holder.beside(instance, &exec).await?;
        let (client, container) = (self.holder.client.clone(), holder::container_name(instance));
        exec::begin(client, container, &self.holder.directory(instance), process, &exec).await
    }

    async fn exited(&self) -> Exit {
        match self.exits.lock().await.recv().await {
            Some(exit) => exit,
            // Whoever tells ends lives as long as `self`.
            None => std::future::pending().await,
        }
    }
}

/// The result of a task that goes on to its end, also when nobody waits for it any more.
async fn finished<T>(step: &'static str, task: JoinHandle<Result<T, RuntimeError>>) -> Result<T, RuntimeError> {
    task.await.unwrap_or_else(|error| Err(RuntimeError::Step { step, reason: error.to_string() }))
}
