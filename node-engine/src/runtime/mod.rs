//! Back-ends that run workloads. A runtime knows containers, not the cluster and not the overlay: it prepares a sandbox with
//! a network namespace, and whoever called connects that namespace before the first process of the workload runs.
//!
//! Everything a runtime makes carries the instance id and the description, so that a restarted daemon adopts it.

mod cgroup;
pub mod containerd;
pub mod docker;
mod fetch;
mod fetched;
pub mod furnished;
mod interfaces;
pub mod memory;
mod output;
mod pause;
pub mod process;
pub mod registries;
pub mod session;
pub mod supervised;
mod surroundings;
pub mod unikernel;
mod unsupported;
mod user;
pub mod volumes;
pub mod wasm;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

pub use session::{Exec, Follow, Session};
pub use surroundings::Resolvers;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use {fetch::understand as places, user::understand as accounts};

use crate::model::{InstanceDetails, InstanceId, InstanceSpec, InstanceUsage, Technology};

/// Removes the control groups of the daemon's own that nothing is in.
pub(crate) fn remove_empty_groups(parent: &str) {
    cgroup::Groups::below(parent).remove_empty();
}

/// What runs instances of one technology.
///
/// Every method may be called again after a failure or a restart; `stop` undoes `prepare` and `start` in any half-done state.
#[async_trait]
pub trait Runtime: Send + Sync {
    /// What this runtime runs, as announced to the cluster.
    fn technology(&self) -> Technology;

    /// Makes everything the instance needs (image, namespace, container) and runs nothing of it yet. May be dropped at any point:
    /// a `stop` that follows undoes whatever was made, also what is still being made.
    async fn prepare(&self, spec: &InstanceSpec) -> Result<Sandbox, RuntimeError>;

    /// Starts the workload's first process in the prepared sandbox. Starting what runs changes nothing.
    async fn start(&self, instance: &InstanceId) -> Result<(), RuntimeError>;

    /// Ends the instance, forcibly after `grace`, and removes what `prepare` made. An unknown instance is a success.
    async fn stop(&self, instance: &InstanceId, grace: Duration) -> Result<(), RuntimeError>;

    /// Everything of ours that this runtime holds: found again after a restart.
    async fn adopt(&self) -> Result<Vec<Adopted>, RuntimeError>;

    /// Usage of every running instance.
    async fn usage(&self) -> Result<Vec<InstanceUsage>, RuntimeError>;

    /// The last `tail` bytes of the instance's output.
    async fn logs(&self, instance: &InstanceId, tail: usize) -> Result<Vec<u8>, RuntimeError>;

    /// What the runtime knows of an instance that it holds, in whatever state it is.
    async fn inspect(&self, instance: &InstanceId) -> Result<InstanceDetails, RuntimeError>;

    /// The instance's output, from its last `tail` bytes on, as it comes. Ends with the instance.
    async fn follow(&self, instance: &InstanceId, tail: usize) -> Result<Follow, RuntimeError>;

    /// Runs one more command in a running instance: in its namespaces and under its limits.
    ///
    /// # Errors
    /// `Refused` where the instance does not run, or where this technology has no room for a second command.
    async fn exec(&self, _instance: &InstanceId, _exec: Exec) -> Result<Session, RuntimeError> {
        let reason = format!("{} runs one program alone and no command beside it", self.technology());
        Err(RuntimeError::Refused { what: "exec", reason })
    }

    /// The next exit of an instance that `stop` did not ask for; pends until there is one. Each is told once. Survives a restart of
    /// the back-end: what ended meanwhile is told afterwards. Dropping the future loses nothing.
    async fn exited(&self) -> Exit;
}

/// A prepared instance: its network namespace exists, none of its processes runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sandbox {
    /// A path that opens the namespace, such as `/proc/<pid>/ns/net`.
    pub netns: PathBuf,
}

/// An instance found at start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adopted {
    pub instance: InstanceId,
    /// `InstanceSpec::document` as it was given to `prepare`.
    pub document: Arc<str>,
    pub state: AdoptedState,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AdoptedState {
    Running(Sandbox),
    /// It ended while nobody watched.
    Exited(Exit),
    /// Prepared and never started, or only half there: to be removed.
    Incomplete,
    /// The runtime has lost it, and what it got from the node is still there. Its document is lost as well.
    Left,
}

/// The end of an instance's first process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exit {
    pub instance: InstanceId,
    pub code: i64,
    pub out_of_memory: bool,
    /// What there is to say beyond the code, where the runtime knows.
    pub reason: Option<String>,
}

/// Callers act on these differently: a refused description is final, an absent back-end may come back.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    #[error("{what}: {reason}")]
    Refused { what: &'static str, reason: String },
    #[error("image {image} cannot be pulled: {reason}")]
    Image { image: String, reason: String },
    #[error("{0} is unknown to the runtime")]
    Unknown(InstanceId),
    #[error("the runtime does not answer: {0}")]
    Unavailable(String),
    #[error("{step}: {reason}")]
    Step { step: &'static str, reason: String },
}
