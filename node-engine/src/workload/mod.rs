//! The life of the instances on this node: one task owns them, a pure core decides. It brings an instance through image, sandbox,
//! network and start, undoes what was made when any of that fails, watches for its end, and tells the cluster.
//!
//! It knows the runtimes by their trait and the overlay by its handle; it knows neither the cluster's wire nor how anything is stored:
//! it begins with a [`Plan`] and says by [`Note`]s what the next one is to be.

mod actor;
mod core;
mod explain;
mod instance;
mod outbox;
mod wish;

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use crate::config::{OnExit, Restarts};
use crate::drain::Drain;
use crate::events::Events;
use crate::model::{
    Addresses, Device, InstanceDetails, InstanceId, InstanceSpec, InstanceUsage, Report, Status, Technology,
};
use crate::netmanager::NetManager;
use crate::runtime::{Exec, Follow, Runtime, RuntimeError, Session};

pub use explain::{Explanation, Wanting};

/// Commands that may wait for the task.
const REQUESTS: usize = 256;

/// Handle to the task that owns the instances of this node. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Workload {
    requests: mpsc::Sender<Request>,
}

/// What the task works with.
#[expect(missing_debug_implementations, reason = "runtimes are trait objects")]
pub struct Setup {
    /// One runtime for each technology.
    pub runtimes: Vec<Arc<dyn Runtime>>,
    pub net: NetManager,
    pub reports: mpsc::Sender<Report>,
    pub events: Events,
    /// What is wanted, from an earlier run.
    pub plan: Plan,
    /// Told what the plan of the next run has to take in.
    pub notes: mpsc::Sender<Note>,
    pub restarts: Restarts,
    /// What is attached to the node, to be given to instances that ask for it.
    pub devices: watch::Receiver<Arc<Vec<Device>>>,
    /// Reads back `InstanceSpec::document`.
    pub parse: fn(&str) -> Option<InstanceSpec>,
    pub drain: Drain,
}

/// What is to run on this node.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    pub wanted: Vec<Wanted>,
    /// What is not in it is not wanted. Else, whatever is found running is.
    pub complete: bool,
}

/// An instance of the plan.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub spec: InstanceSpec,
    /// Of the command that wanted it.
    pub sequence: u64,
    /// It has ended and is not to run again.
    pub ended: Option<(Status, String)>,
}

/// What has happened to the plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Note {
    /// What the command of this number wanted has ended, and that is told to the cluster.
    Ended { instance: InstanceId, sequence: u64, status: Status, detail: String },
    /// It runs and was in no plan.
    Found { instance: InstanceId, document: Arc<str> },
    /// It was found, and has been deleted since.
    FoundNoMore(InstanceId),
    /// All that runs has been found.
    LookedAround,
}

/// An instance as a person asks for it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceInfo {
    pub id: InstanceId,
    pub technology: Technology,
    pub image: String,
    /// `preparing`, `attaching`, `starting`, `running`, `stopping`, how it ended (`failed`, `dead`, `completed`), or `absent`: wanted, and
    /// its runtime has not said yet what it holds.
    pub state: &'static str,
    pub addresses: Option<Addresses>,
    /// Why it ended, or what it waits for; empty where there is nothing to say.
    pub detail: String,
}

/// An instance as a person looks at it closely.
#[derive(Debug)]
pub struct InstanceReport {
    pub info: InstanceInfo,
    pub spec: Arc<InstanceSpec>,
    /// How often it was started again since the daemon began.
    pub restarts: u32,
    /// `None` where it does not run or has not been measured yet.
    pub usage: Option<InstanceUsage>,
    /// What the runtime says of it; an instance that ended is unknown to it.
    pub details: Result<InstanceDetails, RuntimeError>,
}

#[derive(Debug, thiserror::Error)]
pub enum WorkloadError {
    #[error("{0} is not on this node")]
    Unknown(InstanceId),
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    #[error("the workload manager has stopped")]
    Stopped,
}

#[derive(Debug)]
enum Request {
    Deploy(Box<InstanceSpec>, u64),
    Delete(InstanceId),
    Explain(InstanceId, oneshot::Sender<Option<Explanation>>),
    List(oneshot::Sender<Vec<InstanceInfo>>),
    Logs(InstanceId, usize, oneshot::Sender<Result<Vec<u8>, WorkloadError>>),
    Inspect(InstanceId, oneshot::Sender<Result<InstanceReport, WorkloadError>>),
    Usage(oneshot::Sender<Vec<InstanceUsage>>),
    Follow(InstanceId, usize, oneshot::Sender<Result<Follow, WorkloadError>>),
    Exec(InstanceId, Exec, oneshot::Sender<Result<Session, WorkloadError>>),
    Drain(OnExit, oneshot::Sender<()>),
}

/// Adopts what the runtimes hold from an earlier run and goes on from there.
pub fn start(setup: Setup) -> (Workload, JoinHandle<()>) {
    let (requests, inbox) = mpsc::channel(REQUESTS);
    (Workload { requests }, tokio::spawn(actor::run(setup, inbox)))
}

impl Workload {
    /// Brings the instance up. Answered by reports; what already runs as described is left alone. `sequence` numbers the command, and is
    /// the same for a repetition of it.
    pub async fn deploy(&self, spec: InstanceSpec, sequence: u64) -> Result<(), WorkloadError> {
        self.send(Request::Deploy(Box::new(spec), sequence)).await
    }

    /// Takes the instance down. Answered by `Undeployed`, also where it is unknown.
    pub async fn delete(&self, instance: InstanceId) -> Result<(), WorkloadError> {
        self.send(Request::Delete(instance)).await
    }

    /// What is wanted of the instance, what is, and what it waits for; `None` where it is neither wanted nor there.
    pub async fn explain(&self, instance: InstanceId) -> Result<Option<Explanation>, WorkloadError> {
        let (reply, answer) = oneshot::channel();
        self.send(Request::Explain(instance, reply)).await?;
        answer.await.map_err(|_| WorkloadError::Stopped)
    }

    /// Every instance on this node, and those that ended lately.
    pub async fn list(&self) -> Result<Vec<InstanceInfo>, WorkloadError> {
        let (reply, answer) = oneshot::channel();
        self.send(Request::List(reply)).await?;
        answer.await.map_err(|_| WorkloadError::Stopped)
    }

    /// The last `tail` bytes of the instance's output; of one that ended lately, what was kept of it.
    pub async fn logs(&self, instance: InstanceId, tail: usize) -> Result<Vec<u8>, WorkloadError> {
        let (reply, answer) = oneshot::channel();
        self.send(Request::Logs(instance, tail, reply)).await?;
        answer.await.map_err(|_| WorkloadError::Stopped)?
    }

    /// Everything that is known of an instance on this node, or of one that ended lately.
    pub async fn inspect(&self, instance: InstanceId) -> Result<InstanceReport, WorkloadError> {
        self.ask(|reply| Request::Inspect(instance, reply)).await?
    }

    /// The last that was measured of everything that runs.
    pub async fn usage(&self) -> Result<Vec<InstanceUsage>, WorkloadError> {
        self.ask(Request::Usage).await
    }

    /// The output of an instance that a runtime holds, from its last `tail` bytes on, as it comes.
    pub async fn follow(&self, instance: InstanceId, tail: usize) -> Result<Follow, WorkloadError> {
        self.ask(|reply| Request::Follow(instance, tail, reply)).await?
    }

    /// Runs one more command in a running instance.
    pub async fn exec(&self, instance: InstanceId, exec: Exec) -> Result<Session, WorkloadError> {
        self.ask(|reply| Request::Exec(instance, exec, reply)).await?
    }

    /// Finishes the step in hand and ends the task; with `OnExit::Stop`, after everything has been taken down.
    pub async fn drain(&self, on_exit: OnExit) -> Result<(), WorkloadError> {
        let (reply, answer) = oneshot::channel();
        self.send(Request::Drain(on_exit, reply)).await?;
        answer.await.map_err(|_| WorkloadError::Stopped)
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T, WorkloadError> {
        let (reply, answer) = oneshot::channel();
        self.send(request(reply)).await?;
        answer.await.map_err(|_| WorkloadError::Stopped)
    }

    async fn send(&self, request: Request) -> Result<(), WorkloadError> {
        self.requests.send(request).await.map_err(|_| WorkloadError::Stopped)
    }
}
