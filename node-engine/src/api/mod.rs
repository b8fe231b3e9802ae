//! The local API: JSON over HTTP on the unix socket `<run-dir>/api.sock`, for the owner of the machine alone. The command line is
//! its client.
//!
//! It asks two traits and knows nothing behind them: the node ([`NodeApi`]), and, where this process is a cluster too, the cluster
//! ([`ClusterApi`]). It decides nothing.

pub mod client;
pub mod collector;
pub mod dto;
mod exec;
mod few;
mod look;
pub mod metrics;
mod routes;
mod selector;
mod socket;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc;

use crate::config::DatapathChoice;
use crate::drain::Drain;
use crate::model::{Event, InstanceId};
use crate::runtime::{Exec, Follow, Session};
use crate::standalone::ClusterApi;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn understand(text: &str) {
    routes::understand(text);
}

pub use selector::{InvalidSelector, Selector};
pub use socket::{OwnerListener, RunLock, SocketError};

/// A request's body is at most this long; a deploy description is a few thousand bytes.
pub const LARGEST_BODY: usize = 64 * 1024;
/// What is asked is answered within this time, or with an error.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// What a person may ask of the node.
#[async_trait]
pub trait NodeApi: Send + Sync {
    async fn status(&self) -> dto::Status;

    /// The instances on this node, and those that ended lately.
    async fn instances(&self) -> Result<Vec<dto::Instance>, NodeApiError>;

    /// What is wanted of the instance, what is, and why they differ.
    async fn explain(&self, instance: InstanceId) -> Result<dto::Explanation, NodeApiError>;

    /// The last `tail` bytes of the instance's output.
    async fn logs(&self, instance: InstanceId, tail: usize) -> Result<Vec<u8>, NodeApiError>;

    /// Everything that is known of an instance.
    async fn inspect(&self, _instance: InstanceId) -> Result<dto::look::Inspection, NodeApiError> {
        Err(NodeApiError::NoNode)
    }

    /// What each running instance uses.
    async fn stats(&self) -> Result<Vec<dto::look::Usage>, NodeApiError> {
        Err(NodeApiError::NoNode)
    }

    /// The instance's output from its last `tail` bytes on, as it comes.
    async fn follow(&self, _instance: InstanceId, _tail: usize) -> Result<Follow, NodeApiError> {
        Err(NodeApiError::NoNode)
    }

    /// Runs one more command in a running instance.
    async fn exec(&self, _instance: InstanceId, _exec: Exec) -> Result<Session, NodeApiError> {
        Err(NodeApiError::NoNode)
    }

    /// The last `past` of what happened on this node, and what happens from now on.
    async fn events(&self, _past: usize) -> Result<mpsc::Receiver<Event>, NodeApiError> {
        Err(NodeApiError::NoNode)
    }

    /// What the machine is made of and what is attached to it.
    async fn hardware(&self) -> Result<dto::hardware::Hardware, NodeApiError> {
        Err(NodeApiError::NoNode)
    }

    /// Everything that becomes metrics.
    async fn metrics(&self) -> Result<crate::metrics::Snapshot, NodeApiError> {
        Err(NodeApiError::NoNode)
    }

    /// The flows of the instances on this node.
    async fn flows(&self, choice: NetChoice) -> Result<dto::net::Page<dto::net::Flow>, NodeApiError>;

    /// The services this node knows.
    async fn services(&self, choice: NetChoice) -> Result<dto::net::Page<dto::net::Service>, NodeApiError>;

    /// The other nodes this one knows.
    async fn peers(&self) -> Result<Vec<dto::net::Peer>, NodeApiError>;

    /// Goes on by another datapath, while packets flow; by which, then.
    async fn switch(&self, choice: DatapathChoice) -> Result<dto::net::Datapath, NodeApiError>;

    /// What was carried, dropped, refused.
    async fn counters(&self) -> Result<Vec<dto::net::Counter>, NodeApiError>;
}

/// Which rows of a table of the overlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetChoice {
    /// Full or short name of a service.
    pub service: Option<String>,
    /// The same of an instance, and its number where one is meant.
    pub instance: Option<(String, Option<u32>)>,
    pub limit: usize,
}

#[derive(Debug, thiserror::Error)]
pub enum NodeApiError {
    #[error("no instance {0} on this node")]
    UnknownInstance(InstanceId),
    /// The process is a cluster and nothing else.
    #[error("this process runs no instances itself: it was started with --no-node")]
    NoNode,
    /// It cannot be done to this instance, or not now.
    #[error("{what}: {reason}")]
    Refused { what: &'static str, reason: String },
    #[error("{what}: {reason}")]
    Unavailable { what: &'static str, reason: String },
}

/// What the routes need.
#[derive(Clone)]
pub struct Api {
    pub node: Arc<dyn NodeApi>,
    /// `None`: this node belongs to the cluster of that name, and only that cluster deploys.
    pub cluster: Result<Arc<dyn ClusterApi>, String>,
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Api").field("cluster", &self.cluster.as_ref().map(|_| "here")).finish_non_exhaustive()
    }
}

/// Answers on the listener until the drain has begun and what was asked before is answered.
///
/// # Errors
/// If the listener fails for good.
pub async fn serve(listener: OwnerListener, api: Api, drain: Drain) -> std::io::Result<()> {
    let begun = drain.clone();
    let serving = axum::serve(listener, routes::router(api, drain.clone())).with_graceful_shutdown(async move {
        begun.wait().await;
    });
    tokio::select! {
        ended = std::future::IntoFuture::into_future(serving) => ended,
        () = overdue(drain) => Ok(()),
    }
}

/// A client that never ends its request must not hold up the end.
async fn overdue(drain: Drain) {
    let deadline = drain.wait().await;
    tokio::time::sleep_until(deadline).await;
}

#[cfg(test)]
mod tests;
