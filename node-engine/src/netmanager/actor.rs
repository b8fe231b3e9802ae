//! Runs what the core decides. Nothing blocks its loop: effects are spawned and come back as events, changes of the datapath's
//! tables through one lane that keeps their order. Ends with an error when the datapath does, and takes nothing down at its end.

mod start;

use std::any::Any;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::future::Future;
use std::net::IpAddr;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::anyhow;
use futures_util::FutureExt;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

use self::start::find_uplink;
pub(super) use self::start::start;
use super::connect::{Made, Step};
use super::core::{Core, Effect, Event, Remains, Waiter};
use super::datapath::{Datapath, DatapathError, Event as DatapathEvent, FlowRow, TableDelta, Tally};
use super::framing;
use super::lease::Leases;
use super::link::{Bridge, LinkError, Links, Route, Veth};
use super::naming::{self, Asked, Gateway, Naming};
use super::outbox::Outbox;
use super::table::Way;
use super::view::{Choice, FlowView, Lookup, Page, ServiceView};
use super::{Lease, NetError, NetStatus, Request, Setup, TUN_V4, TUN_V6};
use crate::backoff::Complaints;
use crate::config::DatapathChoice;
use crate::fault;
use crate::model::{Addresses, Command, InstanceId, Policy, Report, Subnet};
use crate::netns;

const TICK: Duration = Duration::from_secs(1);
/// What became of flows is looked at so often, for so many slots at a time.
const SAMPLE: Duration = Duration::from_millis(250);
const SAMPLE_SLOTS: usize = 4_096;
/// Flows are counted so often where somebody chooses by their number.
const COUNT: Duration = Duration::from_secs(2);
/// Changes that may wait for the datapath before nothing more is listened to.
const LANE: usize = 1_024;
/// Outer IP, UDP and VXLAN headers with the inner Ethernet header, on an IPv4 and on an IPv6 underlay.
const OVERHEAD_V4: u32 = 50;
const OVERHEAD_V6: u32 = 70;
/// IPv6 does not work on less.
const SMALLEST_MTU: u32 = 1_280;
/// An uplink that has been another interface so often in a row is another.
const MOVED: u32 = 3;

/// What a spawned effect comes back with.
enum Answer {
    Event(Event),
    Uplink(Route),
    /// The datapath does not take in what comes by the new uplink.
    Unfollowed(Route, String),
    /// The lane has done what it had.
    Lane(Vec<Event>),
    /// Or not: which, and why.
    LeasesKept(Result<(), (Leases, String)>),
    Looked(Look, Result<Vec<FlowRow>, DatapathError>, Vec<(u32, Tally)>),
    /// How many connections had been asked for, and what became of those of some slots.
    Sampled(u32, Vec<(u32, Tally)>),
    Counted(Result<Vec<FlowRow>, DatapathError>),
    Nothing,
}

/// What somebody looks at beside the flows, which are read for it, and who.
enum Look {
    Flows(Choice, oneshot::Sender<Result<Page<FlowView>, NetError>>),
    Services(Choice, oneshot::Sender<Result<Page<ServiceView>, NetError>>),
}

/// A change for the datapath, in order with others.
#[derive(Debug)]
enum Change {
    Apply(TableDelta),
    Reconcile(TableDelta),
    GiveUp(netmanager_common::addr::Addr),
    Settle(InstanceId),
}

/// Which way to the peers is wanted.
#[derive(Clone, Debug)]
struct Wish {
    uplink: Option<String>,
    cluster: Option<IpAddr>,
}

struct Actor {
    core: Core,
    setup: Setup,
    wish: Wish,
    links: Arc<Links>,
    datapath: Arc<dyn Datapath>,
    uplink: Route,
    framed_port: Option<u16>,
    /// Of the instances' links.
    mtu: u32,
    began: Instant,
    outbox: Outbox,
    work: JoinSet<Answer>,
    attaching: BTreeMap<Waiter, oneshot::Sender<Result<Lease, NetError>>>,
    detaching: BTreeMap<Waiter, oneshot::Sender<Result<(), NetError>>>,
    looking_up: BTreeMap<Waiter, oneshot::Sender<Lookup>>,
    naming: Naming,
    bridge: Option<Bridge>,
    gateway: watch::Sender<Option<Gateway>>,
    next_waiter: u64,
    lane: VecDeque<Change>,
    lane_runs: bool,
    sampling: bool,
    /// How many connections had been asked for when that was last looked at, and the last slot that was.
    sampled: (u32, u32),
    /// The datapath's bustle when that was last looked at, and whether it had been the same before.
    bustle: (u64, bool),
    /// How many packets the kernel had sent to peers at the last tick.
    sent: u64,
    counting: bool,
    lease_file: PathBuf,
    /// The newest leases, where they are not in the file yet.
    leases: Option<Leases>,
    writing: bool,
    /// Why they could not be written.
    unkept: Complaints,
    moved: u32,
    failure: Option<anyhow::Error>,
}

/// Puts back whatever is missing, and says which veths are there.
async fn upkeep(
    links: Arc<Links>,
    datapath: Arc<dyn Datapath>,
    framed_port: Option<u16>,
    subnet: Subnet,
) -> Result<(Bridge, Vec<(InstanceId, u32)>), String> {
    if let Some(port) = framed_port {
        framing::keep(&links, datapath.as_ref(), port).await?;
    }
    let work = async {
        let bridge = links.ensure_bridge(subnet).await?;
        links.ensure_tun_routes(TUN_V4, TUN_V6).await?;
        let present = links.connected(&bridge).await?.into_iter().map(|(id, veth)| (id, veth.ifindex)).collect();
        Ok((bridge, present))
    };
    work.await.map_err(|error: LinkError| error.to_string())
}

impl Actor {
    async fn run(mut self, mut inbox: mpsc::Receiver<Request>) -> anyhow::Result<()> {
        let (links, datapath) = (Arc::clone(&self.links), Arc::clone(&self.datapath));
        let (reports, drain) = (self.setup.reports.clone(), self.setup.drain.clone());
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut sample = tokio::time::interval(SAMPLE);
        sample.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut count = tokio::time::interval(COUNT);
        count.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // A control plane that has gone takes no reports any more.
        let mut listening = true;
        let mut open = true;
        while self.failure.is_none() {
            let room = self.lane.len() < LANE;
            let paths = self.core.paths_due().map(|due| self.began + due);
            tokio::select! {
                Some(answer) = self.work.join_next() => self.answered(answer),
                permit = reports.reserve(), if listening && !self.outbox.is_empty() => match (permit, self.outbox.pop()) {
                    (Ok(permit), Some(report)) => permit.send(report),
                    _ => listening = false,
                },
                request = inbox.recv(), if open && room => match request {
                    Some(request) => self.asked(request),
                    None => open = false,
                },
                event = datapath.event(), if room => match event {
                    DatapathEvent::Failed(reason) => self.failure = Some(anyhow!("the datapath has failed: {reason}")),
                    DatapathEvent::Lost(reason) => self.switch(DatapathChoice::Tun, reason, None),
                    event => self.event(Event::Datapath(event)),
                },
                () = links.changed() => self.event(Event::HostChanged),
                _ = tick.tick() => self.tick(),
                _ = sample.tick() => self.sample(),
                _ = count.tick() => self.count(),
                () = tokio::time::sleep_until(paths.unwrap_or(self.began)), if paths.is_some() && room => self.event(Event::PathsDue),
                deadline = drain.wait() => return self.finish(deadline).await,
            }
        }
        // The first failure is the one to tell; nothing is taken down, so the next start adopts all of it.
        self.failure.map_or(Ok(()), Err)
    }

    /// Lets the steps in hand end, so that nothing is half there, and what is to be kept be kept.
    async fn finish(mut self, deadline: Instant) -> anyhow::Result<()> {
        while !self.work.is_empty() {
            match tokio::time::timeout_at(deadline, self.work.join_next()).await {
                Ok(Some(answer)) => self.answered(answer),
                Ok(None) => break,
                Err(_) => return Err(anyhow!("{} steps of the overlay have not ended in time", self.work.len())),
            }
        }
        while let Some(report) = self.outbox.pop() {
            if tokio::time::timeout_at(deadline, self.setup.reports.send(report)).await.is_err() {
                break;
            }
        }
        Ok(())
    }

    fn asked(&mut self, request: Request) {
        match request {
            Request::Attach(attachment, reply) => {
                let waiter = self.waiter();
                self.attaching.insert(waiter, reply);
                self.event(Event::Attach(attachment, waiter));
            }
            Request::Detach(instance, reply) => {
                let waiter = self.waiter();
                self.detaching.insert(waiter, reply);
                self.event(Event::Detach(instance, waiter));
            }
            Request::Deliver(command) => self.event(Event::Command(command)),
            Request::Retain(instances) => self.event(Event::Retain(instances)),
            Request::Status(reply) => {
                // Whoever asked may have gone.
                let _ = reply.send(self.status());
            }
            Request::Flows(choice, reply) => self.look(Look::Flows(choice, reply)),
            Request::Services(choice, reply) => self.look(Look::Services(choice, reply)),
            Request::LookUp(service, reply) => {
                let waiter = self.waiter();
                self.looking_up.insert(waiter, reply);
                match self.naming.look_up(&mut self.core, service, waiter, self.began.elapsed()) {
                    Asked::Settled(lookup) => self.looked_up(waiter, lookup),
                    Asked::Waits(effects) => self.run_all(effects),
                }
            }
            Request::NameOf(address, reply) => drop(reply.send(self.core.table.name_of(address))),
            Request::Peers(reply) => drop(reply.send(self.core.table.peer_views())),
            Request::Switch(choice, reply) => self.switch(choice, "chosen by hand".into(), Some(reply)),
        }
    }

    /// Beside everything else: changes of tables and interfaces wait for it, packets do not.
    fn switch(&mut self, choice: DatapathChoice, why: String, reply: Option<oneshot::Sender<Result<(), NetError>>>) {
        let (links, datapath, port) = (Arc::clone(&self.links), Arc::clone(&self.datapath), self.framed_port);
        self.work.spawn(async move {
            let switched = framing::switch(&links, datapath.as_ref(), port, choice, &why).await;
            if let Err(reason) = &switched {
                tracing::warn!(reason, "the datapath was to change");
            }
            // Whoever asked may have gone.
            reply.map(|reply| reply.send(switched.map_err(NetError::Stays)));
            Answer::Nothing
        });
    }

    /// Flows are read beside everything else; there may be very many.
    fn look(&mut self, look: Look) {
        let datapath = Arc::clone(&self.datapath);
        let slots = match &look {
            Look::Services(choice, _) => self.core.table.slots(choice),
            Look::Flows(..) => Vec::new(),
        };
        self.work.spawn(async move {
            let tallies = datapath.tallies(slots.clone()).await;
            Answer::Looked(look, datapath.flows().await, slots.into_iter().zip(tallies).collect())
        });
    }

    fn tick(&mut self) {
        let sent = self.datapath.sent();
        if std::mem::replace(&mut self.sent, sent) != sent {
            self.core.travels();
        }
        self.event(Event::Tick);
        self.write_leases();
    }

    /// Where there is a choice, who answers and who does not. Nothing is read while nobody begins a connection.
    fn sample(&mut self) {
        let ails = self.core.table.ails();
        if self.sampling || (self.still() && !ails) {
            return;
        }
        let (before, last) = self.sampled;
        let slots = self.core.table.watched(last, SAMPLE_SLOTS);
        if slots.is_empty() {
            return;
        }
        self.sampling = true;
        let datapath = Arc::clone(&self.datapath);
        self.work.spawn(async move {
            let sums = datapath.tallies(vec![0]).await;
            let asked = sums.first().map_or(before, |sum| sum.answers.asked.wrapping_add(sum.answers.refused));
            if asked == before && !ails {
                return Answer::Sampled(asked, Vec::new());
            }
            let tallies = datapath.tallies(slots.clone()).await;
            Answer::Sampled(asked, slots.into_iter().zip(tallies).collect())
        });
    }

    /// Nothing has come of anything since the last look but one: what is counted after it is noted may be missed by one.
    fn still(&mut self) -> bool {
        let (before, same) = self.bustle;
        let bustle = self.datapath.bustle();
        self.bustle = (bustle, bustle == before);
        same && bustle == before
    }

    fn sampled(&mut self, asked: u32, tallies: Vec<(u32, Tally)>) {
        self.sampling = false;
        self.sampled = (asked, tallies.last().map_or(self.sampled.1, |(slot, _)| *slot));
        if !tallies.is_empty() {
            self.event(Event::Tallied(tallies));
        }
    }

    /// Where the choice is by the number of flows, how many each has.
    fn count(&mut self) {
        if !self.counting && self.core.table.uses(Policy::Underutilised) {
            self.counting = true;
            let datapath = Arc::clone(&self.datapath);
            self.work.spawn(async move { Answer::Counted(datapath.flows().await) });
        }
    }

    fn counted(&mut self, flows: Result<Vec<FlowRow>, DatapathError>) {
        self.counting = false;
        match flows {
            Ok(rows) => {
                let mut flows = HashMap::new();
                rows.iter().for_each(|row| *flows.entry(row.slot).or_default() += 1);
                self.event(Event::Flows(flows));
            }
            Err(error) => tracing::debug!(%error, "flows cannot be counted"),
        }
    }

    fn show(&self, look: Look, flows: Result<Vec<FlowRow>, DatapathError>, tallies: &[(u32, Tally)]) {
        let table = &self.core.table;
        let flows = flows.map_err(|error| NetError::Link { step: "read the flows", reason: error.to_string() });
        // Whoever asked may have gone.
        match look {
            Look::Flows(choice, reply) => drop(reply.send(flows.map(|flows| table.flow_views(&choice, flows)))),
            Look::Services(choice, reply) => {
                drop(reply.send(flows.map(|flows| table.service_views(&choice, &flows, tallies))));
            }
        }
    }

    fn looked_up(&mut self, waiter: Waiter, lookup: Lookup) {
        if let Some(reply) = self.looking_up.remove(&waiter) {
            // Whoever asked may have gone.
            let _ = reply.send(lookup);
        }
    }

    fn waiter(&mut self) -> Waiter {
        self.next_waiter += 1;
        Waiter(self.next_waiter)
    }

    fn answered(&mut self, answer: Result<Answer, tokio::task::JoinError>) {
        match answer {
            Ok(Answer::Event(event)) => self.event(event),
            Ok(Answer::Uplink(uplink)) => self.found_uplink(uplink),
            Ok(Answer::Unfollowed(uplink, reason)) => self.lost_uplink(&uplink, &reason),
            Ok(Answer::Lane(events)) => {
                self.lane_runs = false;
                events.into_iter().for_each(|event| self.event(event));
                self.run_lane();
            }
            Ok(Answer::LeasesKept(written)) => self.wrote_leases(written),
            Ok(Answer::Looked(look, flows, tallies)) => self.show(look, flows, &tallies),
            Ok(Answer::Sampled(asked, tallies)) => self.sampled(asked, tallies),
            Ok(Answer::Counted(flows)) => self.counted(flows),
            Ok(Answer::Nothing) => {}
            Err(error) => self.failure = Some(anyhow!("a step of the overlay ended without an answer: {error}")),
        }
    }

    fn event(&mut self, event: Event) {
        let told = match &event {
            Event::Command(Command::Table(answer)) => naming::answered(answer),
            _ => Vec::new(),
        };
        if let Event::Kept(Ok((bridge, _))) = &event {
            self.bridge = Some(*bridge);
        }
        let now = self.began.elapsed();
        let effects = self.core.handle(event, now);
        self.run_all(effects);
        let mut settled = self.naming.answered(&self.core, &told);
        settled.extend(self.naming.expire(now));
        settled.into_iter().for_each(|(waiter, lookup)| self.looked_up(waiter, lookup));
        let gateway = self.core.home.subnet().zip(self.bridge).map(|(subnet, bridge)| Gateway::new(subnet, bridge));
        self.gateway.send_if_modified(|shown| std::mem::replace(shown, gateway) != gateway);
    }

    fn run_all(&mut self, effects: Vec<Effect>) {
        for effect in effects {
            self.perform(effect);
        }
        self.run_lane();
    }

    fn perform(&mut self, effect: Effect) {
        let (links, datapath) = (Arc::clone(&self.links), Arc::clone(&self.datapath));
        match effect {
            Effect::AttachVeth { instance, netns, inode, subnet, addresses } => {
                let id = instance.clone();
                let work = async move {
                    let found = netns::identity(&netns).map_err(|error| error.to_string())?.inode();
                    if inode.is_some_and(|inode| inode != found) {
                        return Err(format!("{} leads to another namespace now", netns.display()));
                    }
                    let veth = links.attach(&id, &netns, subnet, addresses).await.map_err(|error| error.to_string())?;
                    Ok(Made::Veth { veth, inode: found })
                };
                self.step(instance, Step::Veth, work);
            }
            Effect::DetachVeth(instance) => {
                let id = instance.clone();
                let work =
                    async move { links.detach(&id).await.map(|()| Made::Done).map_err(|error| error.to_string()) };
                self.step(instance, Step::Veth, work);
            }
            Effect::Carry { instance, port, replaces } => {
                let work = async move {
                    if let Some(old) = replaces {
                        datapath.detach(&old).await.map_err(|error| error.to_string())?;
                    }
                    datapath.attach(&port).await.map(|()| Made::Done).map_err(|error| error.to_string())
                };
                self.step(instance, Step::Carry, work);
            }
            Effect::Release { instance, port } => {
                let work = async move { datapath.detach(&port).await.map(|()| Made::Done).map_err(|e| e.to_string()) };
                self.step(instance, Step::Carry, work);
            }
            Effect::Settle(instance) => self.lane.push_back(Change::Settle(instance)),
            Effect::Apply(delta) => self.lane.push_back(Change::Apply(delta)),
            Effect::Reconcile(full) => self.lane.push_back(Change::Reconcile(full)),
            Effect::GiveUp(address) => self.lane.push_back(Change::GiveUp(address)),
            Effect::Publish(subnet, ports) => {
                let work = async move { links.publish(subnet, &ports).await.map_err(|error| error.to_string()) };
                self.spawn(reaching("ports", work), Event::Published);
            }
            Effect::Upkeep(subnet) => self.spawn(upkeep(links, datapath, self.framed_port, subnet), Event::Kept),
            Effect::FindUplink => self.look_for_uplink(),
            Effect::FindWays(hosts) => {
                let mtu = self.mtu;
                let work = async move {
                    let mut ways = Vec::with_capacity(hosts.len());
                    for host in hosts {
                        // Without a route to it the uplink is as good a guess as any.
                        ways.extend(links.route_to(host).await.ok().map(|route| (host, way(&route, mtu))));
                    }
                    Ok(ways)
                };
                self.spawn(work, |ways| Event::Ways(ways.unwrap_or_default()));
            }
            Effect::SendControl(to, payload) => {
                self.work.spawn(async move {
                    if let Err(error) = datapath.send_control(to, &payload).await {
                        tracing::debug!(%to, %error, "a control datagram was not sent");
                    }
                    Answer::Nothing
                });
            }
            Effect::SendWhole(to, payload) => {
                self.work.spawn(async move {
                    // Too long for the first link is an answer, too: none comes.
                    if let Err(error) = datapath.send_whole(to, &payload).await {
                        tracing::trace!(%to, %error, "a probe was not sent");
                    }
                    Answer::Nothing
                });
            }
            Effect::Report(report) => self.report(report),
            Effect::SaveSubnet(node, subnet) => {
                tracing::info!(%node, v4 = %subnet.v4, v6 = %subnet.v6, "the cluster assigned a subnet");
                if self.setup.subnets.try_send((node, subnet)).is_err() {
                    tracing::warn!("nobody keeps the subnet, the next start asks for another");
                }
            }
            Effect::KeepLeases(leases) => {
                self.leases = Some(leases);
                self.write_leases();
            }
            Effect::Remember(addresses) => drop(self.setup.leased.send_replace(addresses)),
            Effect::Learn(learned) => {
                if let Err(error) = self.setup.learns.try_send(learned) {
                    // The next answer says it again.
                    tracing::debug!(%error, "an answer of the cluster's table is not remembered");
                }
            }
            Effect::Attached(waiter, result) => {
                if let Some(reply) = self.attaching.remove(&waiter) {
                    let _ = reply.send(result);
                }
            }
            Effect::Detached(waiter, result) => {
                if let Some(reply) = self.detaching.remove(&waiter) {
                    let _ = reply.send(result);
                }
            }
            Effect::Warn(sentence) => tracing::warn!("{sentence}"),
        }
    }

    fn report(&mut self, report: Report) {
        match &report {
            Report::Deployed { instance, addresses } => {
                tracing::info!(%instance, v4 = %addresses.v4, v6 = %addresses.v6, "connected");
            }
            other => tracing::debug!(?other, "report"),
        }
        self.outbox.push(report);
    }

    /// Does what waits for the datapath, in order.
    fn run_lane(&mut self) {
        if self.lane_runs || self.lane.is_empty() {
            return;
        }
        self.lane_runs = true;
        let changes: Vec<Change> = self.lane.drain(..).collect();
        let datapath = Arc::clone(&self.datapath);
        self.work.spawn(async move {
            let mut events = Vec::new();
            for change in changes {
                let result = match change {
                    Change::Apply(delta) => datapath.apply(&delta).await,
                    Change::Reconcile(full) => datapath.reconcile(&full).await,
                    Change::GiveUp(address) => {
                        datapath.give_up(address).await;
                        Ok(())
                    }
                    Change::Settle(instance) => {
                        events.push(Event::Stepped { instance, step: Step::Endpoint, result: Ok(Made::Done) });
                        Ok(())
                    }
                };
                if let Err(error) = result {
                    tracing::warn!(%error, "the datapath did not take a change of its tables");
                    events.push(Event::ApplyFailed);
                }
            }
            Answer::Lane(events)
        });
    }

    /// One write at a time, of the newest.
    fn write_leases(&mut self) {
        if self.writing {
            return;
        }
        let Some(leases) = self.leases.take() else { return };
        self.writing = true;
        let file = self.lease_file.clone();
        self.work.spawn_blocking(move || {
            Answer::LeasesKept(leases.write(&file).map_err(|error| (leases, error.to_string())))
        });
    }

    /// What could not be written is tried again at the next tick, if there is nothing newer by then.
    fn wrote_leases(&mut self, written: Result<(), (Leases, String)>) {
        self.writing = false;
        match written {
            Ok(()) => {
                if self.unkept.settle() {
                    tracing::info!("leases are kept again");
                }
                self.write_leases();
            }
            Err((leases, reason)) => {
                if self.unkept.is_new(&reason, tokio::time::Instant::now()) {
                    tracing::warn!(reason, "leases cannot be kept: a restart would connect instances anew");
                }
                self.leases.get_or_insert(leases);
            }
        }
    }

    fn look_for_uplink(&mut self) {
        let (links, wish, datapath) = (Arc::clone(&self.links), self.wish.clone(), Arc::clone(&self.datapath));
        let mut uplinks: BTreeSet<u32> = self.core.table.peers().map(|(_, peer)| peer.ifindex).collect();
        uplinks.remove(&0);
        self.work.spawn(async move {
            // No way to the peers now: the old one is as good as any until there is one again.
            let Ok(uplink) = find_uplink(&links, &wish).await else { return Answer::Nothing };
            uplinks.insert(uplink.ifindex);
            match datapath.follow(&uplinks).await {
                Ok(()) => Answer::Uplink(uplink),
                Err(error) => Answer::Unfollowed(uplink, error.to_string()),
            }
        });
    }

    /// The datapath cannot go where the peers are now. It may be able to later; if not, a new start finds another.
    fn lost_uplink(&mut self, uplink: &Route, reason: &str) {
        self.moved += 1;
        if self.moved >= MOVED {
            let (old, new) = (&self.uplink.interface, &uplink.interface);
            self.failure = Some(anyhow!("the way to the peers has moved from {old} to {new}, starting anew: {reason}"));
        }
    }

    /// Our own address may have changed, and with it what peers are told.
    fn found_uplink(&mut self, uplink: Route) {
        self.moved = 0;
        let public = self.setup.config.public_ip;
        let (before, address) = (public.unwrap_or(self.uplink.source), public.unwrap_or(uplink.source));
        if before != address {
            tracing::info!(%before, %address, "this node's address towards its peers has changed");
            // Before the instances are announced under it.
            self.report(Report::Address(address));
        }
        let way = way(&uplink, self.mtu);
        self.uplink = uplink;
        self.event(Event::Uplink { address, way });
    }

    fn step(
        &mut self,
        instance: InstanceId,
        step: Step,
        work: impl Future<Output = Result<Made, String>> + Send + 'static,
    ) {
        let point = match step {
            Step::Veth => "veth",
            Step::Carry => "carry",
            // These are no work of their own: a change of tables, and the ports of all instances at once.
            Step::Endpoint => "endpoint",
            Step::Ports => "ports",
        };
        self.spawn(reaching(point, work), move |result| Event::Stepped { instance, step, result });
    }

    fn spawn<T: Send + 'static>(
        &mut self,
        work: impl Future<Output = Result<T, String>> + Send + 'static,
        event: impl FnOnce(Result<T, String>) -> Event + Send + 'static,
    ) {
        self.work.spawn(async move {
            let result = AssertUnwindSafe(work).catch_unwind().await;
            Answer::Event(event(result.unwrap_or_else(|panic| Err(format!("internal error: {}", words(&*panic))))))
        });
    }

    fn status(&self) -> NetStatus {
        let mut status = self.core.status();
        status.counters.push(("report_lost".into(), self.outbox.lost()));
        status.counters.extend(self.datapath.counters());
        status.counters.extend(self.links.counters());
        let standing = self.datapath.standing();
        NetStatus {
            datapath: standing.rung.into(),
            reason: standing.reason,
            uplink: self.uplink.interface.clone(),
            warnings: self.links.warnings(),
            ..status
        }
    }
}

/// The veths of an earlier run with the addresses that belong to them.
fn known_veths(remains: &Remains) -> Vec<(Veth, Addresses)> {
    let addresses =
        |id: &InstanceId| remains.leases.leases.iter().find(|lease| lease.instance == *id).map(|lease| lease.addresses);
    remains.veths.iter().filter_map(|(id, veth)| Some((veth.clone(), addresses(id)?))).collect()
}

/// `mtu`: of the instances' links.
fn way(route: &Route, mtu: u32) -> Way {
    let room = route.mtu.saturating_sub(if route.source.is_ipv4() { OVERHEAD_V4 } else { OVERHEAD_V6 });
    let narrow = u16::try_from(room).ok().filter(|room| u32::from(*room) < mtu);
    Way { source: route.source.into(), ifindex: route.ifindex, mtu: narrow.unwrap_or(0) }
}

/// The work, where no test wants it to fail before it is done, or then.
async fn reaching<T>(point: &str, work: impl Future<Output = Result<T, String>>) -> Result<T, String> {
    fault::reach(point, false).await?;
    let made = work.await?;
    fault::reach(point, true).await.map(|()| made)
}

fn step(step: &'static str, error: &impl ToString) -> NetError {
    NetError::Link { step, reason: error.to_string() }
}

/// What a panic said.
fn words(panic: &(dyn Any + Send)) -> &str {
    let literal = panic.downcast_ref::<&str>().copied();
    literal.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no words")
}
