//! Hands each command of the cluster to the part that it concerns, and keeps what has to outlive the process: who the cluster says this
//! node is, and what is to run on it.
//!
//! An order is kept before it is carried out and before it is acknowledged. Orders that wait are kept together, so that a disk that
//! needs some milliseconds for a commit takes thousands of orders a second.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio::task;
use tokio::time::MissedTickBehavior;

use super::link::ClusterLink;
use crate::drain::Drain;
use crate::events::Events;
use crate::model::{Addresses, Command, EventKind, InstanceId, InstanceSpec, NodeId, Receipt, Report, Status, Subnet};
use crate::netmanager::{Learned, NetManager};
use crate::store::{Desired, Fact, Given, Identity, Order, Store, StoreError, Verdict};
use crate::telemetry;
use crate::workload::{Note, Workload};

/// Commands, or facts, that are kept in one commit.
const BATCH: usize = 256;
/// What the disk did not take is offered to it again so often.
const RETRY: Duration = Duration::from_secs(2);

/// Where commands go.
#[derive(Debug)]
pub(super) struct Router {
    pub(super) cluster: String,
    pub(super) workload: Workload,
    pub(super) net: NetManager,
    pub(super) store: Store,
    pub(super) desired: Arc<Mutex<Desired>>,
    pub(super) link: watch::Sender<ClusterLink>,
    pub(super) pace: watch::Sender<Duration>,
    /// Shown why the disk does not take what is wanted; empty where it does.
    pub(super) kept: watch::Sender<String>,
    pub(super) reports: mpsc::Sender<Report>,
    pub(super) events: Events,
    pub(super) sources: Sources,
}

/// What is to be kept, by who says it.
#[derive(Debug)]
pub(super) struct Sources {
    /// Subnets that the network has begun to use.
    pub(super) assigned: mpsc::Receiver<(NodeId, Subnet)>,
    /// What the cluster's table told the network.
    pub(super) learned: mpsc::Receiver<Learned>,
    /// The addresses of all instances here.
    pub(super) addresses: watch::Receiver<BTreeMap<InstanceId, Addresses>>,
    /// What became of instances.
    pub(super) notes: mpsc::Receiver<Note>,
}

/// An order, and what is due when it is kept.
struct Kept {
    action: Action,
    order: Order,
    ticket: Option<u64>,
}

enum Action {
    Deploy(Box<InstanceSpec>),
    Delete,
}

impl Router {
    /// Until the drain begins, or the control plane has ended; what becomes of workloads is kept until they have ended.
    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>, drain: Drain) -> anyhow::Result<()> {
        let mut retry = tokio::time::interval(RETRY);
        retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut batch, mut notes, mut learned) = (Vec::new(), Vec::new(), Vec::new());
        let (mut noting, mut learning, mut addressing, mut commanded) = (true, true, true, true);
        loop {
            tokio::select! {
                _ = drain.wait() => break,
                Some((node, subnet)) = self.sources.assigned.recv() => {
                    self.keep(move |store| store.keep_subnet(&node, subnet)).await;
                }
                count = self.sources.notes.recv_many(&mut notes, BATCH), if noting => {
                    noting = count > 0;
                    self.facts(notes.drain(..).map(noted).collect()).await;
                }
                count = self.sources.learned.recv_many(&mut learned, BATCH), if learning => {
                    learning = count > 0;
                    self.facts(learned.drain(..).map(told).collect()).await;
                }
                changed = self.sources.addresses.changed(), if addressing => {
                    addressing = changed.is_ok();
                    let addresses = self.sources.addresses.borrow_and_update().clone();
                    self.facts(vec![Fact::Addresses(addresses)]).await;
                }
                count = commands.recv_many(&mut batch, BATCH), if commanded => {
                    // Whoever ended the control plane says so; this is no end of its own.
                    commanded = count > 0;
                    let taken = self.take(std::mem::take(&mut batch)).await;
                    // What came with the stop is kept; where nobody was left to carry it out, the next start does.
                    if drain.begun() {
                        break;
                    }
                    taken?;
                }
                _ = retry.tick() => {
                    self.on_disk(Desired::retry).await;
                    self.look_at_link();
                }
            }
        }
        // Who waits for the reports' end waits for nobody who cannot report any more.
        drop(self.reports);
        while self.sources.notes.recv_many(&mut notes, BATCH).await > 0 {
            let (desired, facts) = (self.desired.clone(), notes.drain(..).map(noted).collect());
            blocking(desired, move |desired| desired.facts(facts)).await;
        }
        Ok(())
    }

    /// Orders that follow on each other are kept together.
    async fn take(&mut self, commands: Vec<Command>) -> anyhow::Result<()> {
        let mut orders = Vec::new();
        for command in commands {
            match command {
                Command::Deploy(spec, receipt) => {
                    let (instance, document) = (spec.id.clone(), Some(spec.document.clone()));
                    orders.push(self.order(Action::Deploy(spec), instance, document, receipt));
                }
                Command::Delete(instance, receipt) => {
                    orders.push(self.order(Action::Delete, instance, None, receipt));
                }
                other => {
                    self.carry_out(std::mem::take(&mut orders)).await?;
                    self.route(other).await?;
                }
            }
        }
        self.carry_out(orders).await
    }

    fn order(&self, action: Action, instance: InstanceId, document: Option<Arc<str>>, receipt: Receipt) -> Kept {
        let given = self.link.borrow().node.clone().zip(receipt.generation);
        let given = given.map(|(node, generation)| Given { node, generation });
        Kept { action, order: Order { instance, document, given }, ticket: receipt.ticket }
    }

    async fn carry_out(&mut self, orders: Vec<Kept>) -> anyhow::Result<()> {
        if orders.is_empty() {
            return Ok(());
        }
        let asked: Vec<Order> = orders.iter().map(|kept| kept.order.clone()).collect();
        let verdicts = self.on_disk(move |desired| desired.orders(&asked)).await;
        let mut verdicts = verdicts.into_iter().flatten();
        for Kept { action, order, ticket } in orders {
            let instance = order.instance;
            let lost = || Verdict::Refused("the task that keeps it has failed".into());
            match (verdicts.next().unwrap_or_else(lost), action) {
                (Verdict::New(sequence) | Verdict::Same(sequence), Action::Deploy(spec)) => {
                    self.workload.deploy(*spec, sequence).await?;
                }
                // Taking down is right also where it cannot be kept that it was.
                (Verdict::New(_) | Verdict::Same(_) | Verdict::Refused(_), Action::Delete) => {
                    self.workload.delete(instance).await?;
                }
                (Verdict::Refused(reason), Action::Deploy(_)) => {
                    let detail = format!("not accepted: {reason}");
                    self.say(Report::Status { instance, status: Status::Failed, detail }).await;
                }
                (verdict @ (Verdict::Over | Verdict::Old), _) => {
                    tracing::info!(%instance, ?verdict, "an order that came before is repeated, and not carried out again");
                }
            }
            if let Some(ticket) = ticket {
                self.say(Report::Stored(ticket)).await;
            }
        }
        Ok(())
    }

    async fn route(&mut self, command: Command) -> anyhow::Result<()> {
        match &command {
            Command::Registered(identity) => {
                self.link.send_modify(|link| {
                    link.node = Some(identity.id.clone());
                    link.generation = Some(identity.generation);
                });
                self.pace.send_replace(telemetry::pace(Some(identity.generation)));
                let identity = Identity { cluster: self.cluster.clone(), node: identity.id.clone() };
                self.keep(move |store| store.keep_identity(identity)).await;
            }
            Command::Connected => self.connected(),
            Command::Disconnected(reason) => self.disconnected(reason),
            Command::Trouble(error) => {
                self.link.send_modify(|link| link.last_error.clone_from(error));
                return Ok(());
            }
            Command::Deploy(..)
            | Command::Delete(..)
            | Command::Subnet(_)
            | Command::Table(_)
            | Command::ServiceChanged(_) => {}
        }
        Ok(self.net.deliver(command).await?)
    }

    fn connected(&self) {
        let mut news = false;
        self.link.send_modify(|link| news = link.made(Instant::now()));
        if news {
            self.events.say(EventKind::ClusterConnected, self.cluster.clone(), "");
        }
    }

    fn disconnected(&self, reason: &str) {
        let mut news = None;
        self.link.send_modify(|link| news = link.lost(reason, Instant::now()));
        if let Some(detail) = news {
            self.events.say(EventKind::ClusterLost, self.cluster.clone(), detail);
        }
    }

    fn look_at_link(&self) {
        if self.link.send_if_modified(|link| link.lasts(Instant::now())) {
            self.events.say(EventKind::ClusterConnected, self.cluster.clone(), "it lasts again");
        }
    }

    /// A control plane that has ended hears nothing more, and the supervisor knows.
    async fn say(&self, report: Report) {
        let _ = self.reports.send(report).await;
    }

    async fn facts(&self, facts: Vec<Fact>) {
        if !facts.is_empty() {
            self.on_disk(move |desired| desired.facts(facts)).await;
        }
    }

    async fn on_disk<T: Send + 'static>(&self, work: impl FnOnce(&mut Desired) -> T + Send + 'static) -> Option<T> {
        let work = |desired: &mut Desired| (work(desired), desired.behind().unwrap_or_default().to_owned());
        let (done, behind) = blocking(self.desired.clone(), work).await?;
        self.kept.send_if_modified(|kept| {
            *kept != behind && {
                *kept = behind;
                true
            }
        });
        Some(done)
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

async fn blocking<T: Send + 'static>(
    desired: Arc<Mutex<Desired>>,
    work: impl FnOnce(&mut Desired) -> T + Send + 'static,
) -> Option<T> {
    // Memory leads and each change of it is whole, so a lock that a panic has poisoned guards as good a state as any.
    let done = task::spawn_blocking(move || work(&mut desired.lock().unwrap_or_else(PoisonError::into_inner))).await;
    done.inspect_err(|error| tracing::error!(%error, "keeping the desired state went wrong")).ok()
}

fn noted(note: Note) -> Fact {
    match note {
        Note::Ended { instance, sequence, status, detail } => Fact::Ended { instance, sequence, status, detail },
        Note::Found { instance, document } => Fact::Found { instance, document },
        Note::FoundNoMore(instance) => Fact::FoundNoMore(instance),
        Note::LookedAround => Fact::LookedAround,
    }
}

fn told(learned: Learned) -> Fact {
    match learned {
        Learned::Answer(service, answer) => Fact::Service(service, Some(answer)),
        Learned::Forgotten(service) => Fact::Service(service, None),
    }
}
