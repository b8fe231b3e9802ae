//! The decisions of the overlay: events in, effects out. Owns the service table, addresses, interests and connections; knows no
//! clock, no kernel and no cluster. Effects of one instance are one at a time, and all else that has an order is in the order of
//! the effects.

mod announce;
mod exchange;
mod peers;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use netmanager_common::abi::{CONFIG_RELAX_SOURCE, Config, Mac, PEER_OURS, Peer};
use netmanager_common::addr::Addr;

use super::connect::Member;
use super::datapath::{Capacity, Event as DatapathEvent, Snapshot, TableDelta};
use super::hello::{Greetings, Secret};
use super::home::{Home, News};
use super::interest::{Interests, Outcome};
use super::lease::{KeptLease, Leases};
use super::link::{Bridge, Veth};
use super::memory::{Learned, Memory};
use super::path::Paths;
use super::table::{Figures, ServiceNets, ServiceTable, Way};
use super::{Lease, NetStatus};
use crate::model::{
    Addresses, Command, FamilyPair, InstanceId, NodeId, Query, Report, ServiceName, Subnet, TableAnswer,
};

pub(super) use self::exchange::{Effect, Event, Published, Waiter};

/// What this node made on its host is looked after so often.
const UPKEEP: Duration = Duration::from_secs(10);
/// And no sooner than this after the last time, whatever changes.
const UPKEEP_PAUSE: Duration = Duration::from_millis(500);
/// Addresses of an earlier run that nobody has claimed are asked for so often.
const INQUIRY: Duration = Duration::from_secs(45);
/// So long an instance's packets wait for its own address.
const OWN_PATIENCE: Duration = Duration::from_secs(5);

/// What the core has to know from the start.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    pub(super) nets: ServiceNets,
    pub(super) tunnel_port: u16,
    pub(super) relax_source: bool,
    /// How much the datapath's tables hold.
    pub(super) capacity: Capacity,
    /// Where the datapath takes framed packets; `None`: it takes and sends none.
    pub(super) framed_port: Option<u16>,
    /// The longest packet that instances send.
    pub(super) mtu: u16,
    /// This node's address towards its peers, and the way there.
    pub(super) address: IpAddr,
    pub(super) uplink: Way,
    /// The subnet that was assigned, and to which node id.
    pub(super) subnet: Option<(NodeId, Subnet)>,
    /// Whoever vanishes from the table keeps the flows it has for so long.
    pub(super) drain: Duration,
    /// A random number.
    pub(super) seed: u64,
    pub(super) secret: Secret,
}

/// What an earlier run left.
#[derive(Clone, Debug, Default)]
pub(super) struct Remains {
    pub(super) leases: Leases,
    pub(super) veths: Vec<(InstanceId, Veth)>,
    pub(super) snapshot: Snapshot,
    pub(super) memory: Memory,
}

#[derive(Debug)]
pub(super) struct Core {
    pub(super) now: Duration,
    settings: Settings,
    seed: u64,
    host: Addr,
    connected: bool,
    pub(super) home: Home,
    pub(super) members: BTreeMap<InstanceId, Member>,
    pub(super) table: ServiceTable,
    pub(super) interests: Interests,
    /// Services whose instances are announced after the answer that is waited for, and until when.
    unannounced: BTreeMap<ServiceName, Duration>,
    greetings: Greetings,
    figures: Figures,
    paths: Paths,
    /// Instances whose service is watched because of them.
    pub(super) held: BTreeSet<InstanceId>,
    bridge: Option<Bridge>,
    /// The subnet whose upkeep runs.
    pub(super) upkeep: Option<Subnet>,
    /// What upkeep said last; the same again is no news.
    upkeep_failure: Option<String>,
    last_upkeep: Duration,
    host_changed: bool,
    /// Who waits for the change of ports under way, and what it makes.
    pub(super) publishing: Option<(Vec<InstanceId>, Published)>,
    pub(super) publish_next: Vec<InstanceId>,
    pub(super) ports_in_force: Option<Published>,
    /// Namespace addresses whose packets wait for their own instance address, and until when.
    own_waits: BTreeMap<Addr, Duration>,
    /// Nodes to which a way was asked for.
    ways: BTreeSet<Addr>,
    next_inquiry: Duration,
    /// Rows of an earlier run were adopted, and the datapath may hold more than the table knows.
    adopted: bool,
    apply_failed: bool,
    /// What a restart must know may have changed.
    pub(super) dirty: bool,
    kept: Leases,
    /// Addresses that instances have or had, and that nobody else gets as long as there are others.
    pub(super) remembered: BTreeMap<InstanceId, Addresses>,
    pub(super) remembered_kept: BTreeMap<InstanceId, Addresses>,
    unwanted_answers: u64,
}

impl Core {
    /// Begins where an earlier run ended.
    pub(super) fn new(settings: Settings, remains: Remains) -> (Self, Vec<Effect>) {
        let host = Addr::from(settings.address);
        let in_use = remains.leases.subnet.filter(|_| !remains.leases.leases.is_empty());
        let mut core = Self {
            now: Duration::ZERO,
            seed: settings.seed,
            host,
            connected: false,
            home: Home::new(settings.nets, settings.subnet.clone(), in_use),
            members: BTreeMap::new(),
            table: ServiceTable::new(settings.nets, host).with_room(settings.capacity),
            interests: Interests::new(),
            unannounced: BTreeMap::new(),
            greetings: Greetings::new(settings.secret, settings.framed_port),
            figures: Figures::default(),
            paths: Paths::new(settings.secret, settings.mtu),
            held: BTreeSet::new(),
            bridge: None,
            upkeep: None,
            upkeep_failure: None,
            last_upkeep: Duration::ZERO,
            host_changed: false,
            publishing: None,
            publish_next: Vec::new(),
            ports_in_force: None,
            own_waits: BTreeMap::new(),
            ways: BTreeSet::new(),
            next_inquiry: Duration::ZERO,
            adopted: remains.snapshot != Snapshot::default(),
            apply_failed: false,
            dirty: true,
            kept: Leases::default(),
            remembered: BTreeMap::new(),
            remembered_kept: remains.memory.addresses.clone(),
            unwanted_answers: 0,
            settings,
        };
        let mut out = Vec::new();
        core.table.set_drain(core.settings.drain);
        core.adopt(remains, &mut out);
        (core, out)
    }

    pub(super) fn handle(&mut self, event: Event, now: Duration) -> Vec<Effect> {
        let mut out = Vec::new();
        self.now = now;
        self.table.set_now(now);
        match event {
            Event::Attach(attachment, waiter) => self.attach(attachment, waiter, &mut out),
            Event::Detach(instance, waiter) => self.detach(&instance, Some(waiter), &mut out),
            Event::Retain(instances) => self.retain(&instances, &mut out),
            Event::Command(command) => self.command(command, &mut out),
            Event::Datapath(event) => self.datapath(event, &mut out),
            Event::Stepped { instance, step, result } => self.stepped(&instance, step, result, &mut out),
            Event::Published(result) => self.published(result, &mut out),
            Event::Kept(result) => self.upkept(result, &mut out),
            Event::Uplink { address, way } => self.uplink(address, way, &mut out),
            Event::Ways(ways) => {
                let delta = self.table.set_ways(ways.into_iter().map(|(host, way)| (Addr::from(host), way)));
                self.project(delta, &mut out);
            }
            Event::Tallied(tallies) => {
                let delta = self.table.observe(&tallies);
                self.project(delta, &mut out);
            }
            Event::Flows(flows) => {
                self.figures.flows = flows;
                self.weigh(&mut out);
            }
            Event::HostChanged => {
                self.host_changed = true;
                self.look_after_host(&mut out);
            }
            Event::ApplyFailed => self.apply_failed = true,
            Event::PathsDue => {
                let news = self.paths.tick(self.now);
                self.hear_paths(news, &mut out);
            }
            Event::Tick => self.tick(&mut out),
        }
        self.keep_leases(&mut out);
        self.keep_remembered(&mut out);
        out
    }

    /// What the core knows of the status.
    pub(super) fn status(&self) -> NetStatus {
        let leases = self.members.iter().filter(|(_, member)| member.connected());
        let (counts, refusals) = (self.table.counts(), self.table.refusals());
        let ours = self.table.peers().filter(|(_, peer)| peer.flags & PEER_OURS != 0).count();
        let counters = [
            ("peers_ours", ours as u64),
            ("table_full", counts.full),
            ("table_refused_range", refusals.range),
            ("table_refused_duplicate", refusals.duplicate),
            ("table_refused_stale", refusals.stale),
            ("table_unwanted_answers", self.unwanted_answers),
            ("query_refused", self.interests.refused()),
        ];
        NetStatus {
            subnet: self.home.subnet(),
            address: Some(self.host.into()),
            leases: leases
                .filter_map(|(id, member)| Some(Lease { instance: id.clone(), addresses: member.addresses? }))
                .collect(),
            services: counts.services,
            peers: counts.peers,
            counters: counters.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
            ..NetStatus::default()
        }
    }

    /// Keeps what an earlier run connected and still is, and takes down the rest.
    fn adopt(&mut self, remains: Remains, out: &mut Vec<Effect>) {
        let Remains { leases, veths, snapshot, memory } = remains;
        let delta = self.table.adopt(&snapshot);
        self.project(delta, out);
        let adopted: Vec<(u32, Peer)> = self.table.peers().map(|(number, peer)| (number, *peer)).collect();
        for (number, peer) in adopted {
            self.meet(number, &peer, out);
        }
        let delta = self.table.set_uplink(self.settings.uplink);
        self.project(delta, out);
        let delta = self.table.set_node(self.host, self.home.subnet());
        self.project(delta, out);
        let mut leases: BTreeMap<InstanceId, KeptLease> =
            leases.leases.into_iter().map(|lease| (lease.instance.clone(), lease)).collect();
        for (id, veth) in veths {
            let lease = leases.remove(&id);
            match lease.filter(|lease| self.home.ipam().is_some_and(|ipam| ipam.adopt(&id, lease.addresses).is_ok())) {
                Some(lease) => self.readmit(&lease, veth, out),
                // Made just before the end of the earlier run, or its lease is lost: whoever wants it attaches it again.
                None => out.push(Effect::DetachVeth(id)),
            }
        }
        let delta = self.table.drop_foreign_endpoints();
        self.project(delta, out);
        self.home.settle();
        self.recall(memory, out);
        self.look_after_host(out);
        if self.home.subnet().is_some() {
            // Also where nobody publishes any more: what the earlier run published goes.
            self.publish_all(out);
        }
        self.keep_leases(out);
    }

    fn readmit(&mut self, lease: &KeptLease, veth: Veth, out: &mut Vec<Effect>) {
        let member = Member::adopted(lease, veth);
        if let Some(local) = member.local(&lease.instance, lease.own) {
            let delta = self.table.attach(local);
            self.project(delta, out);
        }
        self.members.insert(lease.instance.clone(), member);
        self.hold(&lease.instance, out);
        self.renew(&lease.instance, out);
    }

    fn retain(&mut self, instances: &[InstanceId], out: &mut Vec<Effect>) {
        let gone: Vec<InstanceId> = self.members.keys().filter(|id| !instances.contains(id)).cloned().collect();
        for id in gone {
            self.detach(&id, None, out);
        }
        self.remembered.retain(|id, _| instances.contains(id));
    }

    fn command(&mut self, command: Command, out: &mut Vec<Effect>) {
        match command {
            Command::Registered(identity) => {
                let news = self.home.registered(&identity, self.host);
                self.hear_home(news, out);
            }
            Command::Connected => {
                self.connected = true;
                self.home.set_connected(true);
                self.ask_for_subnet(out);
                // The cluster may have been restarted without its memory.
                self.announce_after_answers();
                let outcomes = self.interests.connected(self.now);
                self.pursue(outcomes, out);
                self.inquire(out);
            }
            Command::Disconnected(_) => {
                self.connected = false;
                self.unannounced.clear();
                self.home.set_connected(false);
                self.interests.disconnected();
            }
            Command::Subnet(subnet) => {
                let news = self.home.answered(subnet, self.host);
                self.hear_home(news, out);
            }
            Command::Table(answer) => self.answer(&answer, out),
            Command::ServiceChanged(service) => {
                let outcomes = self.interests.changed(&service, self.now);
                self.pursue(outcomes, out);
            }
            // Of others.
            Command::Deploy(..) | Command::Delete(..) | Command::Trouble(_) => {}
        }
    }

    fn answer(&mut self, answer: &TableAnswer, out: &mut Vec<Effect>) {
        if !self.interests.wants(answer) {
            self.unwanted_answers += 1;
            return;
        }
        let delta = self.table.update(answer);
        self.project(delta, out);
        self.learn(answer, out);
        let jitter = self.random();
        let outcomes = {
            let table = &self.table;
            self.interests.answered(answer, jitter, self.now, |address| table.serves(address.into()))
        };
        self.pursue(outcomes, out);
        self.announce_answered(answer, out);
        self.dirty |= !self.held.is_empty();
        self.release_own_waits(answer, out);
        if self.adopted && self.table.unclaimed().is_empty() {
            self.adopted = false;
            out.push(Effect::Reconcile(self.table.full()));
        }
    }

    /// What waited for an own address goes on by the change of tables; where this answer does not tell it, it is given up.
    fn release_own_waits(&mut self, answer: &TableAnswer, out: &mut Vec<Effect>) {
        let table = &self.table;
        let about = |address: &Addr| {
            let owner = table.owner(*address);
            match &answer.query {
                Some(Query::Name(name)) => owner == Some(name),
                _ => owner.is_some() && owner == answer.service.as_ref(),
            }
        };
        let (done, waiting): (BTreeMap<_, _>, BTreeMap<_, _>) =
            std::mem::take(&mut self.own_waits).into_iter().partition(|(address, _)| about(address));
        self.own_waits = waiting;
        out.extend(done.into_keys().filter(|address| !table.knows_own(*address)).map(Effect::GiveUp));
    }

    fn datapath(&mut self, event: DatapathEvent, out: &mut Vec<Effect>) {
        match event {
            DatapathEvent::UnknownService(address) => {
                if let Some(owner) = self.table.owner(address).cloned() {
                    self.interests.touch(&owner, self.now);
                }
                let outcomes = self.interests.miss(address.into(), self.now);
                self.pursue(outcomes, out);
            }
            DatapathEvent::UnknownEndpoint(address) => match self.table.owner(address).cloned() {
                Some(service) if !self.table.knows_own(address) => {
                    self.own_waits.insert(address, self.now + OWN_PATIENCE);
                    let outcomes = self.interests.changed(&service, self.now);
                    self.pursue(outcomes, out);
                }
                // Told meanwhile.
                Some(_) => {}
                None => out.push(Effect::GiveUp(address)),
            },
            DatapathEvent::Control { from, payload } => {
                let table = &self.table;
                let greetings = self.greetings.receive(from, &payload, |address| table.hosts(address), self.now);
                self.greet(greetings, out);
                let news = self.paths.receive(from, &payload, self.now);
                self.hear_paths(news, out);
                self.greet_who_is_due(out);
            }
            // The actor's.
            DatapathEvent::Lost(_) | DatapathEvent::Failed(_) => {}
        }
    }

    fn tick(&mut self, out: &mut Vec<Effect>) {
        self.ask_for_subnet(out);
        self.expire_waiting(out);
        let jitter = self.random();
        let outcomes = self.interests.tick(jitter, self.now);
        self.pursue(outcomes, out);
        self.announce_unanswered(out);
        let delta = self.table.tick();
        self.project(delta, out);
        let left = self.table.left().into_iter().map(|peer| (peer, self.table.leaving_at(peer))).collect();
        self.greetings.ask(left, self.now);
        self.measure(out);
        self.greet_who_is_due(out);
        for id in self.due_for_own_address() {
            let outcomes = self.interests.changed(&id.service, self.now);
            self.pursue(outcomes, out);
        }
        let now = self.now;
        let late: Vec<Addr> =
            self.own_waits.extract_if(.., |_, until| *until <= now).map(|(address, _)| address).collect();
        out.extend(late.into_iter().map(Effect::GiveUp));
        if self.connected && self.next_inquiry <= self.now {
            self.inquire(out);
        }
        self.look_after_host(out);
    }

    /// Asks whose the addresses of an earlier run are.
    fn inquire(&mut self, out: &mut Vec<Effect>) {
        self.next_inquiry = self.now + INQUIRY;
        for address in self.table.unclaimed() {
            let outcomes = self.interests.inquire(address.into(), self.now);
            self.pursue(outcomes, out);
        }
    }

    fn ask_for_subnet(&mut self, out: &mut Vec<Effect>) {
        if self.home.asks(self.now) {
            out.push(Effect::Report(Report::SubnetRequest));
        }
    }

    fn hear_home(&mut self, news: News, out: &mut Vec<Effect>) {
        match news {
            News::Nothing => {}
            News::Assigned(node, subnet) => out.push(Effect::SaveSubnet(node, subnet)),
            News::Refused(refused) => out.push(Effect::Warn(refused.to_string())),
        }
        self.settle_home(out);
        self.ask_for_subnet(out);
    }

    /// Moves into the newest subnet where that is possible.
    pub(super) fn settle_home(&mut self, out: &mut Vec<Effect>) {
        if self.home.settle() {
            (self.bridge, self.ports_in_force, self.dirty) = (None, None, true);
            let delta = self.table.set_node(self.host, self.home.subnet());
            self.project(delta, out);
            self.proceed_all(out);
            self.start_upkeep(out);
        }
    }

    /// Is there a bridge? Where not, it is being made.
    pub(super) fn bridge_ready(&mut self, out: &mut Vec<Effect>) -> bool {
        if self.bridge.is_none() {
            self.start_upkeep(out);
        }
        self.bridge.is_some()
    }

    /// Own address, bridge, routes and veths: whatever is missing is made again.
    fn look_after_host(&mut self, out: &mut Vec<Effect>) {
        let since = self.now.saturating_sub(self.last_upkeep);
        let due = since >= UPKEEP || (self.host_changed && since >= UPKEEP_PAUSE);
        let first = self.last_upkeep.is_zero();
        if self.upkeep.is_some() || !(due || first) {
            return;
        }
        if std::mem::take(&mut self.host_changed) {
            self.ways = self.table.peers().map(|(_, peer)| peer.host).collect();
            let hosts: Vec<IpAddr> = self.ways.iter().map(|host| IpAddr::from(*host)).collect();
            if !hosts.is_empty() {
                out.push(Effect::FindWays(hosts));
            }
        }
        if std::mem::take(&mut self.apply_failed) {
            // Services of an earlier run that nobody has claimed yet stay as they are.
            out.push(Effect::Apply(self.table.full()));
        }
        out.push(Effect::FindUplink);
        self.start_upkeep(out);
        self.last_upkeep = self.now.max(Duration::from_nanos(1));
    }

    fn start_upkeep(&mut self, out: &mut Vec<Effect>) {
        if let Some(subnet) = self.home.subnet().filter(|_| self.upkeep.is_none()) {
            self.upkeep = Some(subnet);
            self.looking();
            out.push(Effect::Upkeep(subnet));
        }
    }

    fn upkept(&mut self, result: Result<(Bridge, Vec<(InstanceId, u32)>), String>, out: &mut Vec<Effect>) {
        if self.upkeep.take() != self.home.subnet() {
            // The node has moved meanwhile.
            self.start_upkeep(out);
            return;
        }
        match result {
            Ok((bridge, present)) => {
                if self.bridge.is_some_and(|old| old.ifindex != bridge.ifindex) {
                    out.push(Effect::Warn("others have removed the bridge; it is made anew".into()));
                }
                (self.bridge, self.upkeep_failure) = (Some(bridge), None);
                let delta = self.table.set_config(self.config(bridge.mac));
                self.project(delta, out);
                self.repair(&present, out);
                // A change of ports that failed may have left any of them.
                if self.ports_in_force.is_none() && self.publishing.is_none() {
                    self.publish_all(out);
                }
                self.proceed_all(out);
            }
            Err(reason) => {
                if self.bridge.is_none() {
                    self.dismiss_waiting(&reason, out);
                }
                if self.upkeep_failure.replace(reason.clone()).as_ref() != Some(&reason) {
                    out.push(Effect::Warn(format!("the host's side of the overlay is not whole: {reason}")));
                }
            }
        }
    }

    fn config(&self, gateway_mac: [u8; 6]) -> Config {
        let ServiceNets { v4, v6 } = self.settings.nets;
        let mut service_v4_mask = Addr::v4((u32::MAX.checked_shl(32 - u32::from(v4.1)).unwrap_or(0)).to_be_bytes());
        service_v4_mask.0[..12].fill(0xff);
        Config {
            service_v4: v4.0.into(),
            service_v4_mask,
            service_v6: v6.0.into(),
            service_v6_mask: Addr::v6((u128::MAX.checked_shl(128 - u32::from(v6.1)).unwrap_or(0)).to_be_bytes()),
            // Behind a NAT peers know another address than the one their packets arrive at.
            node: self.settings.uplink.source,
            gateway_mac: Mac(gateway_mac),
            tunnel_port: self.settings.tunnel_port.to_be_bytes(),
            framed_port: self.settings.framed_port.unwrap_or(0).to_be_bytes(),
            _pad: [0; 2],
            slow_ifindex: 0,
            flags: if self.settings.relax_source { CONFIG_RELAX_SOURCE } else { 0 },
            // The table's to count.
            epoch: 0,
        }
    }

    fn uplink(&mut self, address: IpAddr, way: Way, out: &mut Vec<Effect>) {
        self.settings.uplink = way;
        let delta = self.table.set_uplink(way);
        self.project(delta, out);
        if let Some(bridge) = self.bridge {
            let delta = self.table.set_config(self.config(bridge.mac));
            self.project(delta, out);
        }
        let host = Addr::from(address);
        if host != self.host {
            self.host = host;
            let delta = self.table.set_node(host, self.home.subnet());
            self.project(delta, out);
            self.announce(None, out);
        }
    }

    /// Has a change of tables carried out, and meets or forgets the peers in it.
    pub(super) fn project(&mut self, delta: TableDelta, out: &mut Vec<Effect>) {
        if delta == TableDelta::default() {
            return;
        }
        let peers = delta.peers.clone();
        let went = peers.iter().any(|(_, peer)| peer.host.is_none());
        out.push(Effect::Apply(delta));
        for (number, peer) in peers {
            if peer.host.is_none() {
                self.greetings.forget(number);
                self.paths.forget(number);
            } else {
                self.meet(number, &peer, out);
            }
        }
        self.greet_who_is_due(out);
        if went {
            let present: BTreeSet<Addr> = self.table.peers().map(|(_, peer)| peer.host).collect();
            self.ways.retain(|host| present.contains(host));
        }
    }

    /// Turns what the interests want into reports, and forgets what they let go.
    pub(super) fn pursue(&mut self, outcomes: Vec<Outcome>, out: &mut Vec<Effect>) {
        for outcome in outcomes {
            match outcome {
                Outcome::Ask(query) => out.push(Effect::Report(Report::TableQuery(query))),
                Outcome::Add(service) => out.push(Effect::Report(Report::InterestAdd(service))),
                Outcome::Remove(service) => {
                    let delta = self.table.remove(&service);
                    self.project(delta, out);
                    out.push(Effect::Learn(Learned::Forgotten(service.clone())));
                    out.push(Effect::Report(Report::InterestRemove(service)));
                }
                Outcome::GiveUp(address) => out.push(Effect::GiveUp(address.into())),
            }
        }
    }

    /// Has written down what a restart must know, where it has changed.
    fn keep_leases(&mut self, out: &mut Vec<Effect>) {
        if !std::mem::take(&mut self.dirty) {
            return;
        }
        let own = |id: &InstanceId| -> FamilyPair { self.table.own(id) };
        let leases = self.members.iter().filter_map(|(id, member)| member.kept(id, own(id))).collect();
        let leases = Leases { subnet: self.home.subnet(), leases };
        if leases != self.kept {
            self.kept = leases.clone();
            out.push(Effect::KeepLeases(leases));
        }
    }

    /// Random enough to keep periods out of step.
    fn random(&mut self) -> u64 {
        self.seed = self.seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        self.seed >> 33
    }
}
