//! The one task that owns the manager's state. It takes in what nodes say and people order, lets time pass, keeps what outlives
//! a restart, and only then answers and publishes. It never waits for the broker.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use serde_json::json;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::api::dto::{ClusterInstance, ClusterNode};
use crate::drain::Drain;
use crate::model::{InstanceId, NodeId, Query, ServiceName, Subnet};

use super::client::{COMMAND, Heard, RESULT, Said};
use super::core::{Core, Table};
use super::documents::{self, Moved, Order};
use super::inventory::{Moment, NodeFacts};
use super::keeping::{Due, Keeping, News};
use super::saved::{self, SaveError, Saved};
use super::{ClusterApi, ClusterApiError, Target, reports, views};

/// Messages waiting to be published while the broker is slow or away. Beyond that the oldest are dropped and counted: deploys,
/// deletes and queries are repeated by their own timers.
const MAX_WAITING: usize = 16 * 1024;

/// Events taken in before one save.
const BATCH: usize = 64;

const TICK: Duration = Duration::from_secs(1);

/// What is asked of the manager.
#[derive(Debug)]
pub(super) enum Request {
    Register { host: String, facts: NodeFacts, reply: oneshot::Sender<Result<Registered, Refused>> },
    Order { order: Order, reply: oneshot::Sender<Result<Vec<InstanceId>, ClusterApiError>> },
    Nodes(oneshot::Sender<Vec<ClusterNode>>),
    Instances(oneshot::Sender<Vec<ClusterInstance>>),
    Services(oneshot::Sender<Vec<ServiceName>>),
    Table { query: Query, reply: oneshot::Sender<Table> },
}

/// What a registration gives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Registered {
    pub(super) id: NodeId,
    /// Only where subnets come with the registration.
    pub(super) subnet: Option<Subnet>,
}

/// Why a node is not taken in.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    #[error(transparent)]
    Register(#[from] super::core::RegisterError),
    #[error(transparent)]
    Save(#[from] Arc<SaveError>),
    #[error("no randomness for a new id")]
    Random(#[source] std::io::Error),
    #[error("the cluster manager has stopped")]
    Stopped,
}

/// Asks the manager. Cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Manager {
    requests: mpsc::Sender<Request>,
    pub(super) cluster: Arc<str>,
}

impl Manager {
    pub(super) fn new(requests: mpsc::Sender<Request>, cluster: &NodeId) -> Self {
        Self { requests, cluster: cluster.as_str().into() }
    }

    pub(super) async fn register(&self, host: String, facts: NodeFacts) -> Result<Registered, Refused> {
        let (reply, answer) = oneshot::channel();
        let sent = self.requests.send(Request::Register { host, facts, reply }).await;
        sent.map_err(|_| Refused::Stopped)?;
        answer.await.map_err(|_| Refused::Stopped)?
    }

    pub(super) async fn table(&self, query: Query) -> Option<Table> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(Request::Table { query, reply }).await.ok()?;
        answer.await.ok()
    }

    pub(super) async fn order(&self, order: Order) -> Result<Vec<InstanceId>, ClusterApiError> {
        let (reply, answer) = oneshot::channel();
        self.ask(Request::Order { order, reply }, answer).await?
    }

    async fn ask<T>(&self, request: Request, answer: oneshot::Receiver<T>) -> Result<T, ClusterApiError> {
        self.requests.send(request).await.map_err(|_| ClusterApiError::Stopped)?;
        answer.await.map_err(|_| ClusterApiError::Stopped)
    }
}

#[async_trait]
impl ClusterApi for Manager {
    async fn deploy(
        &self,
        document: Vec<u8>,
        replicas: Option<u32>,
        on: Option<String>,
    ) -> Result<Vec<InstanceId>, ClusterApiError> {
        let refuse = |reason: String| ClusterApiError::Document { reason };
        let other = |command: &str| refuse(format!("it orders to {command}, which `node-engine {command}` does"));
        let (request, said, place) = match documents::order(&document, &self.cluster)? {
            Order::Deploy { request, replicas, on } => (request, replicas, on),
            Order::Delete(_) => return Err(other("delete")),
            Order::Replicate { .. } => return Err(other("replicate")),
            Order::Move { .. } => return Err(other("move")),
        };
        let replicas = replicas.unwrap_or(said);
        if replicas == 0 {
            return Err(refuse(
                "0 replicas are nothing to deploy; `node-engine replicate` takes instances away".into(),
            ));
        }
        self.order(Order::Deploy { request, replicas, on: on.or(place) }).await
    }

    async fn delete(&self, target: Target) -> Result<Vec<InstanceId>, ClusterApiError> {
        self.order(Order::Delete(target)).await
    }

    async fn replicate(&self, service: ServiceName, replicas: u32) -> Result<Vec<InstanceId>, ClusterApiError> {
        self.order(Order::Replicate { service, replicas }).await
    }

    async fn move_instance(&self, instance: InstanceId, node: String) -> Result<InstanceId, ClusterApiError> {
        let order = Order::Move { instance: Moved::Number(instance), node };
        self.order(order).await?.pop().ok_or(ClusterApiError::Stopped)
    }

    async fn nodes(&self) -> Result<Vec<ClusterNode>, ClusterApiError> {
        let (reply, answer) = oneshot::channel();
        self.ask(Request::Nodes(reply), answer).await
    }

    async fn instances(&self) -> Result<Vec<ClusterInstance>, ClusterApiError> {
        let (reply, answer) = oneshot::channel();
        self.ask(Request::Instances(reply), answer).await
    }

    async fn services(&self) -> Result<Vec<ServiceName>, ClusterApiError> {
        let (reply, answer) = oneshot::channel();
        self.ask(Request::Services(reply), answer).await
    }
}

pub(super) struct Actor {
    pub(super) core: Core,
    pub(super) saved: Saved,
    pub(super) requests: mpsc::Receiver<Request>,
    pub(super) heard: mpsc::Receiver<Heard>,
    pub(super) said: mpsc::Sender<Said>,
    /// Subnets come with the registration, as in the first generation.
    pub(super) subnet_with_registration: bool,
}

/// An answer that waits for the save.
type Answer = Box<dyn FnOnce(Result<(), Arc<SaveError>>) + Send>;

enum Event {
    Asked(Request),
    Heard(Heard),
    Tick,
}

struct Turn {
    started: Instant,
    waiting: VecDeque<Said>,
    dropped: u64,
    answers: Vec<Answer>,
    keeping: Keeping,
}

impl Actor {
    /// Runs until the stop begins, and then keeps the state once more.
    pub(super) async fn run(mut self, stop: Drain) -> Result<(), SaveError> {
        let mut turn = Turn {
            started: Instant::now(),
            waiting: VecDeque::new(),
            dropped: 0,
            answers: Vec::new(),
            keeping: Keeping::new(),
        };
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            let event = tokio::select! {
                _ = stop.wait() => break,
                permit = self.said.reserve(), if !turn.waiting.is_empty() => {
                    let (Ok(permit), Some(said)) = (permit, turn.waiting.pop_front()) else { break };
                    permit.send(said);
                    continue;
                }
                Some(request) = self.requests.recv() => Event::Asked(request),
                Some(heard) = self.heard.recv() => Event::Heard(heard),
                _ = ticks.tick() => Event::Tick,
            };
            match event {
                Event::Asked(request) => self.take_request(request, &mut turn),
                Event::Heard(heard) => self.take_heard(&heard, &mut turn),
                Event::Tick => self.core.tick(turn.now()),
            }
            self.take_waiting(&mut turn);
            self.settle(&mut turn).await;
        }
        let text = saved::text(&self.core);
        self.saved.store(&text)
    }

    /// More of what has come already, so that one save serves many.
    fn take_waiting(&mut self, turn: &mut Turn) {
        for _ in 0..BATCH {
            if let Ok(request) = self.requests.try_recv() {
                self.take_request(request, turn);
            } else if let Ok(heard) = self.heard.try_recv() {
                self.take_heard(&heard, turn);
            } else {
                return;
            }
        }
    }

    /// Saves, answers, and queues what is to be published, in this order: an id or a subnet that could be forgotten is not given.
    async fn settle(&mut self, turn: &mut Turn) {
        let effects = self.core.take_effects();
        if effects.save {
            turn.keeping.changed();
        }
        let kept = self.keep(turn).await;
        for answer in turn.answers.drain(..) {
            answer(kept.clone());
        }
        for message in effects.messages {
            if kept.is_err() && matches!(message, super::core::Message::Subnet { .. }) {
                continue;
            }
            let (topic, payload) = documents::publication(&message, self.core.cluster_id.as_str());
            turn.say(Said { topic, payload });
        }
    }

    /// Saves what is not on the disk, where it is time to. An error may be that of a try before.
    async fn keep(&self, turn: &mut Turn) -> Result<(), Arc<SaveError>> {
        match turn.keeping.due(!turn.answers.is_empty(), Instant::now()) {
            Due::Nothing => return Ok(()),
            Due::Wait(error) => return Err(error),
            Due::Save => {}
        }
        let kept = self.save().await.map_err(Arc::new);
        match (turn.keeping.tried(&kept, Instant::now()), &kept) {
            (News::WorksAgain, _) => tracing::info!("the cluster's state is kept again"),
            (News::Fails, Err(error)) => {
                let error: &SaveError = error;
                tracing::error!(
                    error = error as &dyn std::error::Error,
                    "the cluster's state cannot be kept, trying again for ever"
                );
            }
            (News::Nothing, Err(error)) => tracing::debug!(%error, "the cluster's state cannot be kept"),
            (News::Nothing | News::Fails, Ok(())) => {}
        }
        kept
    }

    async fn save(&self) -> Result<(), SaveError> {
        let (text, saved) = (saved::text(&self.core), self.saved.clone());
        match tokio::task::spawn_blocking(move || saved.store(&text)).await {
            Ok(result) => result,
            Err(error) => Err(SaveError::Task(error)),
        }
    }

    fn take_heard(&mut self, heard: &Heard, turn: &mut Turn) {
        if heard.topic == COMMAND {
            return self.take_command(&heard.payload, turn);
        }
        if let Err(error) = reports::hear(&mut self.core, &heard.topic, &heard.payload, turn.now()) {
            tracing::debug!(topic = heard.topic, %error, "a message is passed over");
        }
    }

    /// A common message from the wire; what came of it is published.
    fn take_command(&mut self, payload: &[u8], turn: &mut Turn) {
        let order = documents::order(payload, self.core.cluster_id.as_str());
        let result = match order.and_then(|order| self.carry_out(order, turn.now())) {
            Ok(instances) => {
                let instances: Vec<String> = instances.iter().map(InstanceId::to_string).collect();
                json!({ "ok": true, "instances": instances })
            }
            Err(error) => json!({ "ok": false, "error": error.to_string() }),
        };
        turn.say(Said { topic: RESULT.into(), payload: result.to_string() });
    }

    fn take_request(&mut self, request: Request, turn: &mut Turn) {
        // Whoever has gone away needs no answer.
        match request {
            Request::Register { host, facts, reply } => {
                let result = self.register(&host, facts);
                turn.answers.push(Box::new(move |kept| {
                    let result = result.and_then(|registered| kept.map(|()| registered).map_err(Refused::from));
                    let _ = reply.send(result);
                }));
            }
            Request::Order { order, reply } => {
                let result = self.carry_out(order, turn.now());
                turn.answers.push(Box::new(move |kept| {
                    let result = result.and_then(|done| kept.map(|()| done).map_err(ClusterApiError::from));
                    let _ = reply.send(result);
                }));
            }
            Request::Nodes(reply) => drop(reply.send(views::nodes(&self.core, turn.now()))),
            Request::Instances(reply) => drop(reply.send(views::instances(&self.core))),
            Request::Services(reply) => drop(reply.send(self.core.services.keys().cloned().collect())),
            Request::Table { query, reply } => drop(reply.send(self.core.table(query))),
        }
    }

    fn register(&mut self, host: &str, facts: NodeFacts) -> Result<Registered, Refused> {
        let id = self.core.register(host, facts, super::random_id().map_err(Refused::Random)?)?;
        let subnet = if self.subnet_with_registration { self.core.assign_subnet(&id) } else { None };
        tracing::info!(node = host, %id, "a node has registered");
        Ok(Registered { id, subnet })
    }

    fn carry_out(&mut self, order: Order, now: Moment) -> Result<Vec<InstanceId>, ClusterApiError> {
        match order {
            Order::Deploy { request, replicas, on } => {
                let job = super::random_id().map_err(ClusterApiError::Random)?;
                self.core.deploy(*request, replicas, on.as_deref(), job.to_string(), now)
            }
            Order::Delete(target) => self.core.delete(&target, now),
            Order::Replicate { service, replicas } => self.core.replicate(&service, replicas, now),
            Order::Move { instance, node } => {
                let instance = self.core.which(instance)?;
                self.core.move_instance(&instance, &node, now).map(|replacement| vec![replacement])
            }
        }
    }
}

impl Turn {
    fn now(&self) -> Moment {
        self.started.elapsed()
    }

    fn say(&mut self, said: Said) {
        if self.waiting.len() >= MAX_WAITING {
            self.waiting.pop_front();
            self.dropped += 1;
            if self.dropped.is_power_of_two() {
                tracing::warn!(dropped = self.dropped, "the broker is too slow; the oldest messages are dropped");
            }
        }
        self.waiting.push_back(said);
    }
}
