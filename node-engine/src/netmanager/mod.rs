//! The overlay of this node: gives instances addresses, connects their namespaces, keeps the service table, and projects it
//! into the datapath. Knows neither runtimes nor the cluster's wire: a namespace path comes in, reports go out.

mod actor;
mod connect;
mod core;
pub mod datapath;
mod framing;
pub mod hello;
mod home;
pub mod interest;
pub mod ipam;
pub mod lease;
pub mod link;
mod memory;
pub mod naming;
mod outbox;
mod path;
pub mod table;
pub mod view;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

pub use self::memory::{Learned, Memory};
use self::naming::Gateway;
use self::view::{Choice, CounterView, FlowView, Lookup, Page, PeerView, ServiceView};
use crate::config::{DatapathChoice, NetworkConfig};
use crate::drain::Drain;
use crate::model::{Addresses, Command, InstanceId, NodeId, PortMapping, Report, ServiceName, Subnet};
use crate::notify::FdStore;

/// Requests that may wait for the task.
const REQUESTS: usize = 256;
/// Address of every node's TUN device; it is never seen on a wire.
const TUN_V4: Ipv4Addr = Ipv4Addr::new(10, 19, 1, 254);
const TUN_V6: Ipv6Addr = Ipv6Addr::new(0xfcef, 0, 0, 0, 0, 0, 0xdead, 0xbeef);

/// Handle to the one task that owns the overlay's state. Cheap to clone.
#[derive(Clone, Debug)]
pub struct NetManager {
    requests: mpsc::Sender<Request>,
    gateway: watch::Receiver<Option<Gateway>>,
}

/// What the overlay is made of.
#[derive(Debug)]
pub struct Setup {
    pub config: NetworkConfig,
    /// Address of the cluster: the way there is the way to the peers, unless another uplink is configured.
    pub cluster: Option<IpAddr>,
    /// Where the journal of the host's changes and the leases lie.
    pub run_dir: PathBuf,
    /// The subnet an earlier run was assigned, and under which node id.
    pub subnet: Option<(NodeId, Subnet)>,
    /// What else an earlier run knew, from before a reboot perhaps.
    pub memory: Memory,
    pub reports: mpsc::Sender<Report>,
    /// Told what the cluster tells of services, to be kept over reboots.
    pub learns: mpsc::Sender<Learned>,
    /// Shown the addresses that instances have and had, to be kept over reboots.
    pub leased: watch::Sender<BTreeMap<InstanceId, Addresses>>,
    /// Told each subnet the cluster assigns, to be kept over reboots.
    pub subnets: mpsc::Sender<(NodeId, Subnet)>,
    /// What the service manager has kept of an earlier run, and shall keep.
    pub kept: Arc<FdStore>,
    /// To begin when the last workload has finished: until then instances come and go.
    pub drain: Drain,
}

/// Opens links and datapath, adopts what an earlier run left, and goes on from there. The handle is ready at once; instances wait
/// for a subnet where there is none. The end takes nothing down: what is connected stays connected, and the next start adopts it.
///
/// # Errors
/// There is no way to the peers, or neither links nor datapath can be had on this host.
pub async fn start(setup: Setup) -> Result<(NetManager, JoinHandle<anyhow::Result<()>>), NetError> {
    let (requests, inbox) = mpsc::channel(REQUESTS);
    let (gateway, shown) = watch::channel(None);
    let task = actor::start(setup, inbox, gateway).await?;
    Ok((NetManager { requests, gateway: shown }, task))
}

/// Names and sizes of what this node makes on its host.
pub fn link_config(config: &NetworkConfig, run_dir: &Path, mtu: u32) -> link::LinkConfig {
    link::LinkConfig {
        bridge: config.bridge.clone(),
        tun: config.tun.clone(),
        framing: framing::DEVICE.into(),
        mtu,
        run_dir: run_dir.to_owned(),
        tunnel_port: config.tunnel_port,
        service_v4: config.service_v4,
        service_v6: config.service_v6,
    }
}

/// Where the datapath's programs and maps are pinned.
pub fn pin_dir(config: &NetworkConfig) -> PathBuf {
    config.bpffs.join("node-engine")
}

/// What to connect.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    #[error("the instance was disconnected, or connected to another namespace, meanwhile")]
    Cancelled,
    #[error("this node has no way to its peers: {0}; configure network.uplink and network.public_ip")]
    NoUplink(String),
    #[error("no datapath works here: {0}")]
    NoDatapath(String),
    /// Packets are carried as before, and by the version before.
    #[error("{0}")]
    WentBack(String),
    #[error("the datapath stays as it is: {0}")]
    Stays(String),
    #[error("the network manager has stopped")]
    Stopped,
}

/// What callers may ask of the task behind the handle.
#[derive(Debug)]
pub(crate) enum Request {
    Attach(Attachment, oneshot::Sender<Result<Lease, NetError>>),
    Detach(InstanceId, oneshot::Sender<Result<(), NetError>>),
    Deliver(Command),
    Retain(Vec<InstanceId>),
    Status(oneshot::Sender<NetStatus>),
    Services(Choice, oneshot::Sender<Result<Page<ServiceView>, NetError>>),
    Flows(Choice, oneshot::Sender<Result<Page<FlowView>, NetError>>),
    Peers(oneshot::Sender<Vec<PeerView>>),
    Switch(DatapathChoice, oneshot::Sender<Result<(), NetError>>),
    LookUp(ServiceName, oneshot::Sender<Lookup>),
    NameOf(IpAddr, oneshot::Sender<Option<(ServiceName, String)>>),
}

/// For `status`: where packets go and why.
#[derive(Clone, Debug, Default)]
pub struct NetStatus {
    /// The rung on which the datapath stands.
    pub datapath: String,
    /// Why the datapath is not a faster one; empty where it is the fastest.
    pub reason: String,
    pub subnet: Option<Subnet>,
    pub uplink: String,
    /// This node's address towards its peers.
    pub address: Option<IpAddr>,
    pub leases: Vec<Lease>,
    pub services: usize,
    pub peers: usize,
    /// What on this host is in the way of traffic and not ours to change, a sentence each.
    pub warnings: Vec<String>,
    /// Counter name and value, drops and verdicts.
    pub counters: Vec<(String, u64)>,
}

impl NetManager {
    /// For tests of whoever uses it: whatever answers the requests, and no bridge.
    #[cfg(test)]
    pub(crate) fn new(requests: mpsc::Sender<Request>) -> Self {
        Self { requests, gateway: watch::channel(None).1 }
    }

    /// Where instances find this node, as it is and as it changes.
    pub fn gateway(&self) -> watch::Receiver<Option<Gateway>> {
        self.gateway.clone()
    }

    /// The addresses of a service. Asks the cluster where this node does not know it, for a few seconds at most.
    pub async fn look_up(&self, service: ServiceName) -> Result<Lookup, NetError> {
        self.ask(|reply| Request::LookUp(service, reply)).await
    }

    /// Whose address this is, as far as this node knows: a service, and the label of what the address means.
    pub async fn name_of(&self, address: IpAddr) -> Result<Option<(ServiceName, String)>, NetError> {
        self.ask(|reply| Request::NameOf(address, reply)).await
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

    /// Disconnects every instance that is not in the list: said once after a start, when it is known which instances still exist.
    pub async fn retain(&self, instances: Vec<InstanceId>) -> Result<(), NetError> {
        self.requests.send(Request::Retain(instances)).await.map_err(|_| NetError::Stopped)
    }

    /// The services this node knows, for people to look at.
    pub async fn services(&self, choice: Choice) -> Result<Page<ServiceView>, NetError> {
        self.ask(|reply| Request::Services(choice, reply)).await?
    }

    /// The flows that leave this node's instances, for people to look at.
    pub async fn flows(&self, choice: Choice) -> Result<Page<FlowView>, NetError> {
        self.ask(|reply| Request::Flows(choice, reply)).await?
    }

    /// Goes on by another datapath, while packets flow.
    pub async fn switch(&self, choice: DatapathChoice) -> Result<(), NetError> {
        self.ask(|reply| Request::Switch(choice, reply)).await?
    }

    /// The other nodes this one knows.
    pub async fn peers(&self) -> Result<Vec<PeerView>, NetError> {
        self.ask(Request::Peers).await
    }

    /// All counters, with what they mean.
    pub async fn counters(&self) -> Result<Vec<CounterView>, NetError> {
        Ok(self.status().await?.counters.into_iter().map(CounterView::new).collect())
    }

    pub async fn status(&self) -> Result<NetStatus, NetError> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::Status(reply)).await.map_err(|_| NetError::Stopped)?;
        answer.await.map_err(|_| NetError::Stopped)
    }

    async fn ask<T>(&self, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T, NetError> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(request(reply)).await.map_err(|_| NetError::Stopped)?;
        answer.await.map_err(|_| NetError::Stopped)
    }
}
