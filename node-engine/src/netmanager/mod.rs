//! The overlay of this node: gives instances addresses, connects their namespaces, keeps the service table, and projects it
//! into the datapath. Knows neither runtimes nor the cluster's wire: a namespace path comes in, reports go out.

pub mod datapath;
pub mod hello;
pub mod interest;
pub mod ipam;
pub mod lease;
pub mod link;
pub mod table;

use std::path::PathBuf;

use tokio::sync::{mpsc, oneshot};

use crate::model::{Addresses, Command, InstanceId, PortMapping};

/// Handle to the one task that owns the overlay's state. Cheap to clone.
#[derive(Clone, Debug)]
pub struct NetManager {
    requests: mpsc::Sender<Request>,
}

/// What to connect.
#[derive(Clone, Debug)]
pub struct Attachment {
    pub instance: InstanceId,
    pub netns: PathBuf,
    pub ports: Vec<PortMapping>,
}

/// A connected instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    pub instance: InstanceId,
    pub addresses: Addresses,
}

#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error("the cluster has not assigned a subnet to this node yet")]
    NoSubnet,
    #[error("the node's subnet has no free address left ({used} in use)")]
    SubnetFull { used: usize },
    #[error("host port {port} is already mapped to {owner}")]
    PortTaken { port: PortMapping, owner: InstanceId },
    #[error("{step}: {reason}")]
    Link { step: &'static str, reason: String },
    #[error("the network manager has stopped")]
    Stopped,
}

/// What callers may ask of the task behind the handle.
#[derive(Debug)]
pub(crate) enum Request {
    Attach(Attachment, oneshot::Sender<Result<Lease, NetError>>),
    Detach(InstanceId, oneshot::Sender<Result<(), NetError>>),
    Deliver(Command),
    Status(oneshot::Sender<NetStatus>),
}

/// For `status`: where packets go and why.
#[derive(Clone, Debug, Default)]
pub struct NetStatus {
    pub datapath: String,
    /// Why the datapath is not a faster one; empty where it is the fastest.
    pub reason: String,
    pub subnet: Option<crate::model::Subnet>,
    pub uplink: String,
    pub leases: Vec<Lease>,
    pub services: usize,
    pub peers: usize,
    /// Counter name and value, drops and verdicts.
    pub counters: Vec<(String, u64)>,
}

impl NetManager {
    pub(crate) fn new(requests: mpsc::Sender<Request>) -> Self {
        Self { requests }
    }

    /// Gives the instance addresses and connects its namespace, ports included. Repeating it for a namespace that is already
    /// connected returns the same lease; for a new namespace of the same instance it connects that one with the same addresses.
    pub async fn attach(&self, attachment: Attachment) -> Result<Lease, NetError> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::Attach(attachment, reply)).await.map_err(|_| NetError::Stopped)?;
        answer.await.map_err(|_| NetError::Stopped)?
    }

    /// Disconnects the instance and frees its addresses and ports. An unknown instance is a success.
    pub async fn detach(&self, instance: InstanceId) -> Result<(), NetError> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::Detach(instance, reply)).await.map_err(|_| NetError::Stopped)?;
        answer.await.map_err(|_| NetError::Stopped)?
    }

    /// Hands over a command that concerns the network.
    pub async fn deliver(&self, command: Command) -> Result<(), NetError> {
        self.requests.send(Request::Deliver(command)).await.map_err(|_| NetError::Stopped)
    }

    pub async fn status(&self) -> Result<NetStatus, NetError> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::Status(reply)).await.map_err(|_| NetError::Stopped)?;
        answer.await.map_err(|_| NetError::Stopped)
    }
}
