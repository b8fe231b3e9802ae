//! The embedded cluster: a broker and a manager in one process, for one machine, a handful of machines, and tests. It speaks the
//! cluster's side of the wire, so that a node cannot tell it from a cluster of its own kind; the local API reaches it through
//! [`ClusterApi`]. It does not run workloads and knows no runtime.
//!
//! As in the reference system, the ports of the cluster are open: who reaches them can register a node, read the tables and
//! publish commands. They listen on every address because other machines name this one as their cluster; a machine that is its
//! whole cluster sets [`StandaloneConfig::listen`] to a loopback address, one among others to the address of a private network.

mod address;
mod core;
mod inventory;
mod saved;
mod schedule;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::task::JoinHandle;

use crate::api::dto::{ClusterInstance, ClusterNode};
use crate::model::{InstanceId, ServiceName};

pub use address::AddressPlan;

/// What the embedded cluster listens on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StandaloneConfig {
    /// The address that registration and embedded broker listen on.
    pub listen: IpAddr,
    /// Registration of second and later generations.
    pub http_port: u16,
    /// Registration of the first generation, Socket.IO.
    pub socketio_port: u16,
    /// Port of the embedded broker.
    pub broker_port: u16,
    /// A broker that somebody else runs, in place of the embedded one: host and port.
    pub broker: Option<(String, u16)>,
    /// Where the manager keeps nodes, subnets and desired instances over a restart.
    pub state_dir: PathBuf,
    /// Where addresses are handed out from.
    pub addresses: AddressPlan,
}

impl StandaloneConfig {
    /// The ports and ranges of the reference system, on every address, with an embedded broker.
    pub fn new(state_dir: PathBuf) -> Self {
        Self {
            listen: Ipv4Addr::UNSPECIFIED.into(),
            http_port: 10100,
            socketio_port: 10000,
            broker_port: 10003,
            broker: None,
            state_dir,
            addresses: AddressPlan::default(),
        }
    }
}

/// A started embedded cluster.
pub struct Standalone {
    pub cluster: Arc<dyn ClusterApi>,
    /// The task that runs broker and manager; it ends after the drain began, or with the error that ended it.
    pub task: JoinHandle<anyhow::Result<()>>,
}

impl fmt::Debug for Standalone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Standalone").finish_non_exhaustive()
    }
}

/// What is asked of the cluster that this process is. The local API calls it for the command line.
#[async_trait]
pub trait ClusterApi: Send + Sync {
    /// Deploys `replicas` instances of the service that the JSON document describes, on the named node or where there is room.
    /// Instances of the service that exist already stay; the new ones get the next numbers. Returns the new instances.
    async fn deploy(
        &self,
        document: Vec<u8>,
        replicas: u32,
        on: Option<String>,
    ) -> Result<Vec<InstanceId>, ClusterApiError>;

    /// Takes down one instance or a whole service. Returns what was taken down; an unknown target is an error.
    async fn delete(&self, target: Target) -> Result<Vec<InstanceId>, ClusterApiError>;

    /// Brings the service to exactly `replicas` instances. Returns the instances there are then.
    async fn replicate(&self, service: ServiceName, replicas: u32) -> Result<Vec<InstanceId>, ClusterApiError>;

    /// Runs the instance on the named node (id or host name) in place of where it runs. A replacement comes up there under the
    /// next number of the service, and only when it runs and is reachable is the old instance taken down, so that the service
    /// answers all the while. Returns the replacement.
    async fn move_instance(&self, instance: InstanceId, node: String) -> Result<InstanceId, ClusterApiError>;

    async fn nodes(&self) -> Result<Vec<ClusterNode>, ClusterApiError>;

    async fn instances(&self) -> Result<Vec<ClusterInstance>, ClusterApiError>;
}

/// What is to be taken down.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    Service(ServiceName),
    Instance(InstanceId),
}

/// Callers turn these into an answer that says whose turn it is: the description's author, the person who typed a name, or the
/// one who has to add a node.
#[derive(Debug, thiserror::Error)]
pub enum ClusterApiError {
    #[error("the description is refused: {reason}")]
    Document { reason: String },
    #[error("no service {0} in this cluster")]
    UnknownService(ServiceName),
    #[error("no instance {0} in this cluster")]
    UnknownInstance(InstanceId),
    #[error("no node {node} in this cluster (nodes: {})", list(.known))]
    UnknownNode { node: String, known: Vec<String> },
    /// No registered node can take the instance now.
    #[error("no node can run {instance}: {reason}")]
    NoNode { instance: InstanceId, reason: String },
    #[error("{what} is at most {limit}")]
    Limit { what: &'static str, limit: u64 },
    #[error("the cluster manager has stopped")]
    Stopped,
}

fn list(known: &[String]) -> String {
    if known.is_empty() { "none has registered yet".into() } else { known.join(", ") }
}
