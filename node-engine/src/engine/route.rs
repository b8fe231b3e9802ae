//! Hands each command of the cluster to the part that it concerns, and keeps who the cluster says this node is.

use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task;

use crate::config::Generation;
use crate::drain::Drain;
use crate::events::Events;
use crate::model::{Command, EventKind, NodeId, Subnet};
use crate::netmanager::NetManager;
use crate::store::{Identity, Store, StoreError};
use crate::telemetry;
use crate::workload::Workload;

/// How things stand with the cluster.
#[derive(Clone, Debug)]
pub(super) struct ClusterLink {
    pub(super) node: Option<NodeId>,
    pub(super) generation: Option<Generation>,
    pub(super) connected: bool,
    /// When it became so.
    pub(super) since: Instant,
}

impl ClusterLink {
    pub(super) fn new(node: Option<NodeId>, generation: Option<Generation>) -> Self {
        Self { node, generation, connected: false, since: Instant::now() }
    }

    fn now(&mut self, connected: bool) {
        if self.connected != connected {
            self.connected = connected;
            self.since = Instant::now();
        }
    }
}

/// Where commands go.
#[derive(Debug)]
pub(super) struct Router {
    pub(super) cluster: String,
    pub(super) workload: Workload,
    pub(super) net: NetManager,
    pub(super) store: Store,
    pub(super) link: watch::Sender<ClusterLink>,
    pub(super) pace: watch::Sender<Duration>,
    /// Subnets that the network has begun to use, to be kept.
    pub(super) assigned: mpsc::Receiver<(NodeId, Subnet)>,
    pub(super) events: Events,
}

impl Router {
    /// Until the drain begins, or the control plane has ended.
    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>, drain: Drain) -> anyhow::Result<()> {
        loop {
            let command = tokio::select! {
                _ = drain.wait() => return Ok(()),
                Some((node, subnet)) = self.assigned.recv() => {
                    self.keep(move |store| store.keep_subnet(&node, subnet)).await;
                    continue;
                }
                command = commands.recv() => command,
            };
            let Some(command) = command else {
                // Whoever ended the control plane says so; this is no end of its own.
                drain.wait().await;
                return Ok(());
            };
            self.route(command).await?;
        }
    }

    async fn route(&mut self, command: Command) -> anyhow::Result<()> {
        match command {
            Command::Deploy(spec) => return Ok(self.workload.deploy(*spec).await?),
            Command::Delete(instance) => return Ok(self.workload.delete(instance).await?),
            Command::Registered(ref identity) => {
                self.link.send_modify(|link| {
                    link.node = Some(identity.id.clone());
                    link.generation = Some(identity.generation);
                });
                self.pace.send_replace(telemetry::pace(Some(identity.generation)));
                let identity = Identity { cluster: self.cluster.clone(), node: identity.id.clone() };
                self.keep(move |store| store.keep_identity(identity)).await;
            }
            Command::Connected => self.connected(true),
            Command::Disconnected => self.connected(false),
            Command::Subnet(_) | Command::Table(_) | Command::ServiceChanged(_) => {}
        }
        Ok(self.net.deliver(command).await?)
    }

    fn connected(&mut self, connected: bool) {
        if self.link.borrow().connected != connected {
            let kind = if connected { EventKind::ClusterConnected } else { EventKind::ClusterLost };
            self.events.say(kind, self.cluster.clone(), "");
        }
        self.link.send_modify(|link| link.now(connected));
    }

    /// What cannot be kept is asked of the cluster again after a restart: a full disk must not end the daemon.
    async fn keep(&mut self, change: impl FnOnce(&mut Store) -> Result<(), StoreError> + Send + 'static) {
        let mut store = self.store.clone();
        match task::spawn_blocking(move || change(&mut store).map(|()| store)).await {
            Ok(Ok(store)) => self.store = store,
            Ok(Err(error)) => tracing::warn!(%error, "the node's identity is not kept over a restart"),
            Err(error) => tracing::error!(%error, "keeping the node's identity went wrong"),
        }
    }
}
