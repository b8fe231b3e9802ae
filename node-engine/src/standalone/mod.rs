//! The embedded cluster: a broker and a manager in one process, for one machine, a handful of machines, and tests. It speaks the
//! cluster's side of the wire, so that a node cannot tell it from a cluster of its own kind; the local API reaches it through
//! [`ClusterApi`]. It does not run workloads and knows no runtime.
//!
//! Nodes register over HTTP or Socket.IO and then talk to the manager through the broker. Orders come from the local API, or as
//! common messages on the topic `cluster/command`, which is answered on `cluster/command/result`. A broker that somebody else
//! runs has to be reachable under the name by which nodes know the cluster: a registration gives only its port.
//!
//! Of the first generation it has the registration (with a subnet, where so configured) and the tables over HTTP. Its workers do
//! not say what runs on them, so instances placed on them are taken for lost after a while.
//!
//! As in the reference system, the ports of the cluster are open: who reaches them can register a node, read the tables and
//! publish commands. They listen on every address because other machines name this one as their cluster; a machine that is its
//! whole cluster sets [`StandaloneConfig::listen`] to a loopback address, one among others to the address of a private network.

mod actor;
mod address;
mod broker;
mod client;
mod core;
mod documents;
mod http;
mod inventory;
mod keeping;
mod reports;
mod saved;
mod schedule;
mod socketio;
mod views;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::{fmt, fmt::Write};

use anyhow::Context;
use async_trait::async_trait;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Duration, timeout};

use crate::api::dto::{ClusterInstance, ClusterNode};
use crate::drain::Drain;
use crate::model::{InstanceId, NodeId, ServiceName};

use actor::{Actor, Manager};
use broker::Broker;
use saved::Saved;

pub use address::AddressPlan;
pub use broker::BrokerError;
pub use saved::SaveError;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use {
    documents::round_trip as documents_round_trip, reports::understand as messages,
    saved::round_trip as saved_round_trip, socketio::understand as greetings,
};

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
    /// Socket.IO registrations are answered with the node's subnet, as by a cluster of the first generation.
    pub first_generation: bool,
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
            first_generation: false,
        }
    }
}

/// A started embedded cluster.
pub struct Standalone {
    pub cluster: Arc<dyn ClusterApi>,
    /// Where registration over HTTP listens.
    pub http: SocketAddr,
    /// Where registration over Socket.IO listens.
    pub socketio: SocketAddr,
    /// Port of the broker, which nodes find on this machine.
    pub broker_port: u16,
    /// The task that runs broker and manager; it ends after the drain began, or with the error that ended it.
    pub task: JoinHandle<anyhow::Result<()>>,
}

/// Why the embedded cluster does not start.
#[derive(Debug, thiserror::Error)]
pub enum StandaloneError {
    #[error(transparent)]
    Broker(#[from] BrokerError),
    #[error("registration cannot listen on {address}: another program may have the port")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Save(#[from] SaveError),
    #[error("no randomness for ids")]
    Random(#[source] io::Error),
    #[error("the broker {address} took no subscription within 15 seconds: is it running?")]
    Subscribe { address: String },
}

/// How long the broker may take to accept the manager at the start.
const SUBSCRIBED: Duration = Duration::from_secs(15);

/// Room for what is under way between the tasks.
const QUEUE: usize = 1024;

impl Standalone {
    /// Returns when nodes can register and are heard. Port 0 takes a free one.
    ///
    /// # Errors
    /// Where a port is taken, the state directory is unusable, or an external broker does not answer.
    pub async fn start(config: StandaloneConfig, drain: Drain) -> Result<Self, StandaloneError> {
        let saved = Saved::in_directory(&config.state_dir)?;
        let new_id = random_id().map_err(StandaloneError::Random)?;
        let core =
            saved.load(config.addresses.clone(), new_id, |document| documents::request(document.as_bytes()).ok());
        let http = listen(config.listen, config.http_port).await?;
        let socketio = listen(config.listen, config.socketio_port).await?;
        let (broker, (host, port)) = match config.broker.clone() {
            Some(external) => (None, external),
            None => {
                let broker = Broker::start(SocketAddr::new(config.listen, config.broker_port)).await?;
                let local = broker.local();
                (Some(broker), (local.ip().to_string(), local.port()))
            }
        };

        let (requests, request_queue) = mpsc::channel(QUEUE);
        let (hear, heard) = mpsc::channel(QUEUE);
        let (said, say) = mpsc::channel(64);
        let (subscribed, mut is_subscribed) = watch::channel(false);
        let manager = Manager::new(requests, &core.cluster_id);
        let client_id = format!("cluster-{}", core.cluster_id);
        let client = client::start(&client_id, (host.clone(), port), hear, say, subscribed);
        let subscribed = timeout(SUBSCRIBED, is_subscribed.wait_for(|subscribed| *subscribed)).await;
        if !matches!(subscribed, Ok(Ok(_))) {
            return Err(StandaloneError::Subscribe { address: format!("{host}:{port}") });
        }

        let door = http::Door { manager: manager.clone(), broker_port: port };
        let addresses = (http.1, socketio.1);
        let mut servers = JoinSet::new();
        for (listener, router) in [(http.0, http::router(door.clone())), (socketio.0, socketio::router(door))] {
            let service = router.into_make_service_with_connect_info::<SocketAddr>();
            servers.spawn(async move { axum::serve(listener, service).await });
        }
        let actor = Actor {
            core,
            saved,
            requests: request_queue,
            heard,
            said,
            subnet_with_registration: config.first_generation,
        };
        let task = tokio::spawn(run(actor, servers, client, broker, drain));
        tracing::info!(http = %addresses.0, socketio = %addresses.1, broker = %format_args!("{host}:{port}"), "the embedded cluster is ready");
        Ok(Self { cluster: Arc::new(manager), http: addresses.0, socketio: addresses.1, broker_port: port, task })
    }
}

/// Supervises the parts: when the manager has ended, the rest goes with it; a part that ends unasked ends all.
async fn run(
    actor: Actor,
    mut servers: JoinSet<io::Result<()>>,
    mut client: JoinSet<()>,
    broker: Option<Broker>,
    drain: Drain,
) -> anyhow::Result<()> {
    let manager = actor.run(drain);
    let result = tokio::select! {
        ended = manager => ended.context("the cluster's state cannot be kept"),
        ended = servers.join_next() => Err(anyhow::anyhow!("registration ended unasked: {ended:?}")),
        ended = client.join_next() => Err(anyhow::anyhow!("the connection to the broker ended unasked: {ended:?}")),
    };
    // Whoever starts the next one finds the ports free.
    servers.shutdown().await;
    client.shutdown().await;
    if let Some(broker) = broker {
        broker.stop().await;
    }
    result
}

async fn listen(ip: IpAddr, port: u16) -> Result<(TcpListener, SocketAddr), StandaloneError> {
    let address = SocketAddr::new(ip, port);
    let failed = |source| StandaloneError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok((listener, address))
}

/// 24 hexadecimal digits, the form of every id of the reference.
fn random_id() -> io::Result<NodeId> {
    let mut bytes = [0; 12];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    let mut text = String::with_capacity(24);
    for byte in bytes {
        write!(text, "{byte:02x}").expect("a text takes everything");
    }
    Ok(text.parse().expect("24 hexadecimal digits are a node id"))
}

impl fmt::Debug for Standalone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Standalone").finish_non_exhaustive()
    }
}

/// What is asked of the cluster that this process is. The local API calls it for the command line.
#[async_trait]
pub trait ClusterApi: Send + Sync {
    /// Deploys `replicas` instances (or else as many as the document says, or one) of the service that the JSON document describes, on
    /// the named node or where there is room. Instances of the service that exist already stay; the new ones get the next numbers.
    /// Returns the new instances. A document that orders something else is an error.
    async fn deploy(
        &self,
        document: Vec<u8>,
        replicas: Option<u32>,
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

    /// Every service, also one without instances.
    async fn services(&self) -> Result<Vec<ServiceName>, ClusterApiError>;
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
    /// It was done, and a restart of the manager may forget it.
    #[error(transparent)]
    Save(#[from] Arc<SaveError>),
    #[error("no randomness for a new id")]
    Random(#[source] io::Error),
    #[error("the cluster manager has stopped")]
    Stopped,
}

fn list(known: &[String]) -> String {
    if known.is_empty() { "none has registered yet".into() } else { known.join(", ") }
}
