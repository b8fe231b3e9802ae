//! A reference cluster: registration and broker session as one task.
//!
//! Two machines run side by side. *Registration* happens at first, when the cluster says it does not know this node, and when
//! the broker was away so long that the cluster may have forgotten it. The *link* connects whenever an identity is known, and
//! again for ever. What the node says goes through the [`Outbox`], what the cluster says through `inbox`; both are bounded, and
//! reports are taken in at any time, so that nobody who reports ever waits for the network.

mod hears;
mod says;

use std::collections::{BTreeSet, VecDeque};
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use futures_util::StreamExt;
use futures_util::future::{BoxFuture, FutureExt, join_all};
use futures_util::stream::FuturesUnordered;
use rustls::ClientConfig;
use tokio::sync::mpsc::{Receiver, Sender};
use tokio::sync::watch;
use tokio::time::{Instant, Sleep, sleep_until};
use tracing::{debug, info, warn};

use super::ControlPlane;
use super::encode::{Encoder, Message};
use super::exception::Exception;
use super::mqtt::{Address, Link, LinkEvent, Outcome, SILENCE, Unacknowledged, WINDOW};
use super::outbox::{Outbox, Ticket};
use super::register::{RegisterError, Registrar, Registration, http_client};
use super::tls::client_config;
use crate::backoff::{Backoff, Complaints, outline};
use crate::config::{ClusterConfig, ReportChoice};
use crate::drain::Drain;
use crate::model::{
    Command, Generation, InstanceId, NodeFacts, NodeIdentity, NodeUsage, Query, Report, Sent, ServiceName, TableAnswer,
};
use crate::wire::ToNode;
use crate::wire::json::{excerpt, head};

/// An outage after which the cluster may have forgotten the node.
const LONG_OUTAGE: Duration = Duration::from_secs(10);

/// While the broker stays away and the cluster manager does not, this lies between two registrations.
const REPEAT: Duration = Duration::from_secs(60);

/// A connection that ends sooner does not end the waiting: an oversized message may come again with every subscription, or
/// another node of the same name may take the connection over.
pub(crate) const STABLE: Duration = Duration::from_secs(10);

/// So many such connections in a row are no accident.
pub(crate) const SHORT_LIVED: u32 = 3;

/// So much of an error is told to whoever asks how things stand.
const LONGEST_TROUBLE: usize = 1024;

/// A try costs a handshake, and everything the cluster says meanwhile is lost: the longest wait is short.
const LONGEST_RECONNECT: u64 = 5;

/// Commands nobody has taken yet. While there are more, nothing is read from the broker.
const MAX_INBOX: usize = 1024;

/// Services watched at once, and topics in one subscription.
const MAX_INTERESTS: usize = 65_536;
const TOPICS_A_PACKET: usize = 64;

/// Overlay questions to a first-generation cluster on their way at once.
const MAX_QUESTIONS: usize = 16;

/// What is told of this node.
#[derive(Clone, Debug)]
pub struct Node {
    pub facts: NodeFacts,
    /// A first sample, for the registration.
    pub usage: NodeUsage,
    /// This node's address as its peers see it; `None`: the one packets to the cluster leave from.
    pub address: Option<IpAddr>,
    /// The overlay's address, for where `address` is not given and the cluster is on this machine.
    pub overlay_address: Option<IpAddr>,
    pub tunnel_port: u16,
    /// The jobs of the instances that are here from an earlier run.
    pub jobs: Vec<(InstanceId, String)>,
    /// Those of them that it has connected, and told the cluster of.
    pub announced: Vec<InstanceId>,
}

/// The control plane of a reference cluster of any generation.
#[derive(Clone, Debug)]
pub struct Cluster {
    config: ClusterConfig,
    node: Node,
    /// How long a broker may acknowledge nothing and say nothing.
    pub(super) silence: Duration,
    reports: ReportChoice,
    sent: watch::Sender<Sent>,
}

impl Cluster {
    pub fn new(config: ClusterConfig, node: Node) -> Self {
        Self { config, node, silence: SILENCE, reports: ReportChoice::Full, sent: watch::Sender::default() }
    }

    /// How much is told of how the node fares, and who is shown how many bytes that took.
    pub fn telling(self, reports: ReportChoice, sent: watch::Sender<Sent>) -> Self {
        Self { reports, sent, ..self }
    }
}

#[async_trait]
impl ControlPlane for Cluster {
    async fn run(
        self: Box<Self>,
        commands: Sender<Command>,
        reports: Receiver<Report>,
        stop: Drain,
    ) -> anyhow::Result<()> {
        let tls = self.config.mqtt_tls.as_ref().map(client_config).transpose()?;
        let registrar = Registrar {
            http: http_client(self.config.tls)?,
            cluster: self.config,
            facts: self.node.facts,
            public_address: self.node.address,
            overlay_address: self.node.overlay_address,
            tunnel_port: self.node.tunnel_port,
        };
        let mut session = Session::new(registrar, self.node.usage, tls, self.silence);
        session.exception = Exception::new(self.reports);
        session.encoder.compact = self.reports == ReportChoice::Changes;
        for (instance, job) in &self.node.jobs {
            session.encoder.deploying(instance, job);
        }
        for instance in &self.node.announced {
            session.encoder.announced(instance);
        }
        session.sent = self.sent;
        session.run(commands, reports, stop).await;
        Ok(())
    }
}

/// Everything that can happen to a session.
enum Event {
    Report(Option<Report>),
    /// There is room for the oldest command; `false`: nobody takes commands any more.
    Delivered(bool),
    Link(LinkEvent),
    Done(Done),
    Registered(Result<Registration, RegisterError>),
    /// Where packets to the cluster leave from now.
    Address(Option<IpAddr>),
    Answer(Query, Result<TableAnswer, String>),
    Timer,
    Stop(Instant),
}

/// An operation on the broker that came to its end.
enum Done {
    Published(Ticket, Outcome),
    /// The topics a node always hears.
    SubscribedOwn(Outcome),
    Subscribed(Outcome),
    Unsubscribed(Outcome),
}

/// A message of quality 1.
struct Received {
    ticket: u64,
    receipt: Unacknowledged,
    /// It has been handled, or is on the disk.
    settled: bool,
}

struct Session {
    registrar: Registrar,
    usage: NodeUsage,
    tls: Option<Arc<ClientConfig>>,
    silence: Duration,

    identity: Option<NodeIdentity>,
    registering: Option<BoxFuture<'static, Result<Registration, RegisterError>>>,
    register_at: Option<Instant>,
    /// It is only due if the broker stays away until then.
    register_if_absent: bool,
    registered_at: Option<Instant>,
    register_backoff: Backoff,
    register_complaints: Complaints,

    locating: Option<BoxFuture<'static, Option<IpAddr>>>,
    link: Option<Link>,
    connect_at: Option<Instant>,
    up_since: Option<Instant>,
    /// When the last connection was lost.
    lost_at: Option<Instant>,
    /// The broker hears and answers: `Connected` was said.
    connected: bool,
    link_backoff: Backoff,
    link_complaints: Complaints,
    /// Connections in a row that were not stable.
    short_lived: u32,
    /// What was told last of why there is no connection.
    trouble: String,
    operations: FuturesUnordered<BoxFuture<'static, Done>>,
    /// When the broker was last heard while something was outstanding.
    heard_at: Instant,

    interests: BTreeSet<ServiceName>,
    /// Subscriptions to make, and to end.
    subscribe: VecDeque<Vec<String>>,
    /// Subscriptions the broker has not confirmed yet, besides the node's own.
    subscribing: usize,
    unsubscribe: VecDeque<String>,

    encoder: Encoder,
    exception: Exception,
    outbox: Outbox,
    sent: watch::Sender<Sent>,
    inbox: VecDeque<Command>,
    /// Messages whose arrival the broker has not been told, in the order of their arrival, which is the order in which it has to be told.
    /// Those of a connection that is lost are void with it.
    received: VecDeque<Received>,
    next_ticket: u64,
    /// Overlay questions to a first-generation cluster.
    questions: VecDeque<Query>,
    answers: FuturesUnordered<BoxFuture<'static, (Query, Result<TableAnswer, String>)>>,

    reports_over: bool,
    commands_over: bool,
    deadline: Option<Instant>,
}

impl Session {
    fn new(registrar: Registrar, usage: NodeUsage, tls: Option<Arc<ClientConfig>>, silence: Duration) -> Self {
        let now = Instant::now();
        let encoder = Encoder::new(registrar.tunnel_port);
        Self {
            registrar,
            usage,
            tls,
            silence,
            identity: None,
            registering: None,
            register_at: Some(now),
            register_if_absent: false,
            registered_at: None,
            register_backoff: Backoff::up_to_a_minute(),
            register_complaints: Complaints::default(),
            locating: None,
            link: None,
            connect_at: None,
            up_since: None,
            lost_at: None,
            connected: false,
            link_backoff: Backoff::up_to_seconds(LONGEST_RECONNECT),
            link_complaints: Complaints::default(),
            short_lived: 0,
            trouble: String::new(),
            operations: FuturesUnordered::new(),
            heard_at: now,
            interests: BTreeSet::new(),
            subscribe: VecDeque::new(),
            subscribing: 0,
            unsubscribe: VecDeque::new(),
            encoder,
            exception: Exception::new(ReportChoice::Full),
            outbox: Outbox::default(),
            sent: watch::Sender::default(),
            inbox: VecDeque::new(),
            received: VecDeque::new(),
            next_ticket: 0,
            questions: VecDeque::new(),
            answers: FuturesUnordered::new(),
            reports_over: false,
            commands_over: false,
            deadline: None,
        }
    }

    async fn run(mut self, commands: Sender<Command>, mut reports: Receiver<Report>, stop: Drain) {
        let mut timer = Box::pin(sleep_until(Instant::now()));
        while !self.is_over() {
            self.advance();
            self.count_dropped();
            match self.next(&commands, &mut reports, &stop, &mut timer).await {
                Event::Report(Some(report)) => self.report(report),
                Event::Report(None) => self.reports_over = true,
                Event::Delivered(true) => {}
                Event::Delivered(false) => {
                    self.commands_over = true;
                    self.inbox.clear();
                }
                Event::Link(LinkEvent::Up) => self.up(),
                Event::Link(LinkEvent::Message { topic, payload, receipt }) => {
                    let receipt = self.message(&topic, &payload, receipt);
                    self.acknowledge(receipt);
                }
                Event::Link(LinkEvent::TooLong { topic, size, receipt }) => {
                    self.heard_at = Instant::now();
                    self.acknowledge(receipt);
                    warn!(topic = excerpt(topic.as_bytes()), size, "a message longer than any that is read");
                }
                Event::Link(LinkEvent::Down(reason)) => self.down(&reason),
                Event::Done(done) => self.done(done),
                Event::Registered(result) => self.registered(result),
                Event::Address(address) => self.located(address),
                Event::Answer(query, answer) => self.answered(&query, answer),
                Event::Timer => {}
                Event::Stop(deadline) => {
                    self.deadline = Some(deadline);
                    self.inbox.clear();
                }
            }
        }
        let left = self.deadline.map_or(Duration::ZERO, |deadline| deadline - Instant::now());
        if let Some(link) = self.link.take().filter(|_| self.up_since.is_some()) {
            link.close(left.min(Duration::from_secs(1))).await;
        }
    }

    fn count_dropped(&self) {
        let dropped = self.outbox.dropped;
        self.sent.send_if_modified(|sent| std::mem::replace(&mut sent.dropped, dropped) != dropped);
    }

    /// Told to stop, and nothing left to say or nobody to say it to.
    fn is_over(&self) -> bool {
        let Some(deadline) = self.deadline else { return false };
        let said = self.reports_over && (self.outbox.is_empty() || self.up_since.is_none());
        said || Instant::now() >= deadline
    }

    async fn next(
        &mut self,
        commands: &Sender<Command>,
        reports: &mut Receiver<Report>,
        stop: &Drain,
        timer: &mut Pin<Box<Sleep>>,
    ) -> Event {
        timer.as_mut().reset(self.wake_at());
        let stopping = self.deadline.is_some();
        let link = async {
            match &mut self.link {
                Some(link) => link.event().await,
                None => std::future::pending().await,
            }
        };
        let registering = async {
            match &mut self.registering {
                Some(registering) => registering.await,
                None => std::future::pending().await,
            }
        };
        let locating = async {
            match &mut self.locating {
                Some(locating) => locating.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            deadline = stop.wait(), if !stopping => Event::Stop(deadline),
            permit = commands.reserve(), if !self.inbox.is_empty() => match (permit, self.inbox.pop_front()) {
                (Ok(permit), Some(command)) => {
                    permit.send(command);
                    Event::Delivered(true)
                }
                _ => Event::Delivered(false),
            },
            report = reports.recv(), if !self.reports_over => Event::Report(report),
            Some(done) = self.operations.next() => Event::Done(done),
            event = link, if self.inbox.len() < MAX_INBOX => Event::Link(event),
            result = registering => {
                self.registering = None;
                Event::Registered(result)
            }
            address = locating => {
                self.locating = None;
                Event::Address(address)
            }
            Some((query, answer)) = self.answers.next() => Event::Answer(query, answer),
            () = timer => Event::Timer,
        }
    }

    /// When something has to be looked at again by the clock.
    fn wake_at(&self) -> Instant {
        let silent = (!self.operations.is_empty()).then(|| self.heard_at + self.silence);
        // Whoever stops begins nothing any more.
        let begins = [self.register_at, self.connect_at].map(|due| due.filter(|_| self.deadline.is_none()));
        let stable = self.up_since.filter(|_| self.short_lived > 0).map(|since| since + STABLE);
        let due = [begins[0], begins[1], stable, silent, self.deadline];
        due.into_iter().flatten().min().unwrap_or_else(|| Instant::now() + Duration::from_secs(3600))
    }

    /// Begins whatever is due.
    fn advance(&mut self) {
        let now = Instant::now();
        self.settle(now);
        if self.deadline.is_none() {
            if self.registering.is_none() && self.register_at.is_some_and(|due| due <= now) {
                self.register_at = None;
                self.registering = Some(self.registrar.clone().register(self.usage.clone()).boxed());
            }
            if self.link.is_none() && self.connect_at.is_some_and(|due| due <= now) {
                self.connect();
            }
            self.ask_first_generation();
        }
        if self.inbox.len() >= MAX_INBOX {
            // The broker is not listened to, so its silence means nothing.
            self.heard_at = now;
        }
        if !self.operations.is_empty() && now >= self.heard_at + self.silence {
            self.down("the broker acknowledges nothing and says nothing");
        }
        if self.up_since.is_some() {
            self.send();
        }
    }

    // --- registration

    fn registered(&mut self, result: Result<Registration, RegisterError>) {
        let registration = match result {
            Ok(registration) => registration,
            Err(error) => {
                let wait = self.register_backoff.next();
                if self.register_complaints.is_new(&error.cause(), Instant::now()) {
                    warn!(%error, "registration failed, trying again for ever");
                } else {
                    debug!(%error, ?wait, "registration failed");
                }
                self.trouble(&error.to_string());
                self.register_at = Some(Instant::now() + wait);
                return;
            }
        };
        self.register_backoff.reset();
        self.register_complaints.settle();
        self.registered_at = Some(Instant::now());
        let Registration { identity, address } = registration;
        info!(id = %identity.id, generation = ?identity.generation, ?address, "registered");
        let same = self.identity.as_ref() == Some(&identity);
        self.encoder.generation = identity.generation;
        self.encoder.address = address;
        self.identity = Some(identity.clone());
        if !same && self.link.is_some() {
            self.drop_link("the cluster gave this node another id");
        }
        let subnet = identity.subnet;
        self.tell(Command::Registered(identity));
        if let Some(subnet) = subnet {
            self.tell(Command::Subnet(subnet));
        }
        match &self.link {
            // The cluster may have lost everything about this node: what was asked once is asked again.
            Some(_) if self.connected => self.tell(Command::Connected),
            Some(_) => {}
            // A wait that is running goes on: the broker is not there just because the cluster manager is.
            None if same && self.connect_at.is_some() => {}
            None => self.connect_at = Some(Instant::now()),
        }
    }

    fn register_again(&mut self, wait: Duration) {
        if self.registering.is_none() && (self.register_at.is_none() || self.register_if_absent) {
            self.register_at = Some(Instant::now() + wait);
            self.register_if_absent = false;
        }
    }

    /// A node that moved to another network registers anew: its peers hear of its address from the cluster.
    fn located(&mut self, address: Option<IpAddr>) {
        if address.is_some() && address != self.encoder.address {
            info!(?address, before = ?self.encoder.address, "this node's address changed, registering again");
            self.register_again(Duration::ZERO);
        }
    }

    /// The way to the peers is under another address now. What goes out from here on says so; the connection to the broker is under the
    /// old one, and would only be missed much later.
    fn renumbered(&mut self, address: IpAddr) {
        if self.registrar.public_address.is_some() {
            self.registrar.public_address = Some(address);
        }
        self.registrar.overlay_address = Some(address);
        self.located(Some(address));
        self.encoder.address = Some(address);
        if self.link.is_some() {
            self.down("this node's address changed");
        }
    }

    // --- the link

    fn connect(&mut self) {
        self.connect_at = None;
        let Some(identity) = &self.identity else { return };
        self.link = Some(Link::open(&Address {
            host: self.registrar.cluster.host.clone(),
            port: identity.broker_port,
            client_id: format!("{}-ne", identity.id),
            tls: self.tls.clone(),
        }));
    }

    fn up(&mut self) {
        let now = Instant::now();
        let Some(identity) = self.identity.clone() else { return };
        if self.short_lived < SHORT_LIVED {
            info!(id = %identity.id, dropped = self.outbox.dropped, "connected to the broker");
        } else {
            debug!(id = %identity.id, dropped = self.outbox.dropped, "connected to the broker");
        }
        self.up_since = Some(now);
        self.heard_at = now;
        self.exception.forget();
        if std::mem::take(&mut self.register_if_absent) {
            self.register_at = None;
        }
        if self.lost_at.take().is_some_and(|lost| now - lost > LONG_OUTAGE) {
            self.register_again(Duration::ZERO);
        }
        let registrar = self.registrar.clone();
        self.locating = Some(async move { registrar.own_address().await }.boxed());
        self.unsubscribe.clear();
        self.subscribe.clear();
        if watches(identity.generation) {
            let topics: Vec<String> = self.interests.iter().map(updates_topic).collect();
            self.subscribe.extend(topics.chunks(TOPICS_A_PACKET).map(<[String]>::to_vec));
        }
        let own = ToNode::subscriptions(&identity.id, identity.generation);
        match self.link.as_ref().map(|link| link.subscribe(own)) {
            Some(Ok(subscribed)) => self.operate(subscribed.map(Done::SubscribedOwn).boxed()),
            Some(Err(error)) => self.down(&error.to_string()),
            None => {}
        }
    }

    fn down(&mut self, reason: &str) {
        let now = Instant::now();
        self.settle(now);
        let short = self.up_since.is_some_and(|since| now - since < STABLE);
        self.short_lived = self.short_lived.saturating_add(u32::from(short));
        if short && self.short_lived == SHORT_LIVED {
            warn!(
                reason,
                node = self.registrar.facts.host,
                "connections to the broker end soon: another node may have this name; give each its own (`node_name`)"
            );
        } else if self.link_complaints.is_new(&outline(reason), now) {
            warn!(reason, "no connection to the broker, trying again for ever");
        } else {
            debug!(reason, "no connection to the broker");
        }
        let lost_at = *self.lost_at.get_or_insert(now);
        self.drop_link(reason);
        self.trouble(reason);
        self.connect_at = Some(now + self.link_backoff.next());
        // The broker may have moved, or come back to a cluster that has forgotten this node.
        let forgotten = lost_at + LONG_OUTAGE;
        let due = self.registered_at.map_or(forgotten, |last| forgotten.max(last + REPEAT));
        if self.registering.is_none() && self.register_at.is_none() {
            self.register_at = Some(due);
            self.register_if_absent = true;
        }
    }

    /// What goes wrong after a stable connection is news, and worth a try at once.
    fn settle(&mut self, now: Instant) {
        if self.up_since.is_none_or(|since| now - since < STABLE) {
            return;
        }
        self.link_backoff.reset();
        self.link_complaints.settle();
        if std::mem::take(&mut self.short_lived) >= SHORT_LIVED {
            info!("the connection to the broker lasts again");
        }
    }

    fn drop_link(&mut self, reason: &str) {
        self.link = None;
        self.up_since = None;
        self.operations.clear();
        self.received.clear();
        self.subscribing = 0;
        for report in self.outbox.in_flight() {
            self.encoder.unheard(report);
        }
        self.outbox.lost();
        if std::mem::take(&mut self.connected) {
            head(reason, LONGEST_TROUBLE).clone_into(&mut self.trouble);
            self.tell(Command::Disconnected(self.trouble.clone()));
        }
    }

    /// Tells what is in the way of a connection, where it is something else than before.
    fn trouble(&mut self, error: &str) {
        let error = head(error, LONGEST_TROUBLE);
        if self.trouble == error {
            return;
        }
        error.clone_into(&mut self.trouble);
        // Only the last of it matters to whoever comes late.
        match self.inbox.back_mut() {
            Some(Command::Trouble(last)) => error.clone_into(last),
            _ => self.tell(Command::Trouble(error.to_owned())),
        }
    }

    fn operate(&mut self, operation: BoxFuture<'static, Done>) {
        if self.operations.is_empty() {
            self.heard_at = Instant::now();
        }
        self.operations.push(operation);
    }

    /// Hands the link as much as it takes. Questions about the service table wait for the subscriptions before them: a change
    /// that falls between the answer and the subscription would be heard of by nobody.
    fn send(&mut self) {
        while self.operations.len() < WINDOW {
            let Some(link) = &self.link else { return };
            let operation = if let Some(topics) = self.subscribe.pop_front() {
                link.subscribe(topics).map(|done| {
                    self.subscribing += 1;
                    done.map(Done::Subscribed).boxed()
                })
            } else if let Some(topic) = self.unsubscribe.pop_front() {
                link.unsubscribe(topic).map(|done| done.map(Done::Unsubscribed).boxed())
            } else if let Some((ticket, report)) = self.outbox.take(self.subscribing == 0) {
                let Some(node) = self.identity.as_ref().map(|identity| &identity.id) else { return };
                let messages = self.encoder.messages(node, &report);
                if messages.is_empty() {
                    self.outbox.delivered(ticket);
                    continue;
                }
                count(&self.sent, &messages);
                let published: Result<Vec<_>, _> =
                    messages.into_iter().map(|message| link.publish(message.topic, message.text)).collect();
                published.map(|parts| {
                    let worst = |parts: Vec<Outcome>| {
                        parts.into_iter().find(|part| *part != Outcome::Acknowledged).unwrap_or(Outcome::Acknowledged)
                    };
                    join_all(parts).map(move |parts| Done::Published(ticket, worst(parts))).boxed()
                })
            } else {
                return;
            };
            match operation {
                Ok(operation) => self.operate(operation),
                Err(error) => return self.down(&error.to_string()),
            }
        }
    }

    fn done(&mut self, done: Done) {
        let (Done::Published(_, outcome)
        | Done::SubscribedOwn(outcome)
        | Done::Subscribed(outcome)
        | Done::Unsubscribed(outcome)) = &done;
        match outcome {
            Outcome::Acknowledged => {}
            Outcome::Refused => warn!("the broker refuses a subscription of this node: check its access rules"),
            // The link's own word of its end follows; what was not acknowledged is sent again after that.
            Outcome::Lost => return,
        }
        self.heard_at = Instant::now();
        match done {
            Done::Published(ticket, _) => self.outbox.delivered(ticket),
            Done::SubscribedOwn(_) => {
                self.connected = true;
                self.tell(Command::Connected);
            }
            Done::Subscribed(_) => self.subscribing = self.subscribing.saturating_sub(1),
            Done::Unsubscribed(_) => {}
        }
    }
}

/// What is sent again after a lost connection costs again.
fn count(sent: &watch::Sender<Sent>, messages: &[Message]) {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let day = since.as_secs() / 86_400;
    sent.send_modify(|sent| {
        for message in messages {
            sent.add(message.purpose, message.topic.len() + message.text.len(), day);
        }
    });
}

/// First-generation clusters announce no changes.
fn watches(generation: Generation) -> bool {
    match generation {
        Generation::G1 => false,
        Generation::G1b | Generation::G2 | Generation::G4 => true,
    }
}

fn updates_topic(service: &ServiceName) -> String {
    format!("jobs/{service}/updates_available")
}

#[cfg(test)]
mod tests;
