//! The connection of one instance: the steps that make it, in order, and the same steps backwards where one fails or the instance
//! goes. At most one step of an instance is under way. What is asked meanwhile waits for it.

use std::path::PathBuf;
use std::time::Duration;

use super::core::{Core, Effect, Published, Waiter};
use super::datapath::Port;
use super::lease::KeptLease;
use super::link::Veth;
use super::table::Local;
use super::{Attachment, Lease, NetError};
use crate::model::{Addresses, FamilyPair, InstanceId, PortMapping};

/// So long an instance waits for the node's subnet.
const PATIENCE: Duration = Duration::from_secs(20);
/// The first repetition of the question for an instance's own address; each next waits twice as long.
const OWN_FIRST: Duration = Duration::from_secs(1);
const OWN_LAST: Duration = Duration::from_secs(16);

/// What makes a connection, in this order. The tables know the instance before its first packet can be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Step {
    /// veth, addresses and routes.
    Veth,
    /// Its row in the datapath's tables.
    Endpoint,
    /// The datapath at its veth.
    Carry,
    /// Its published ports.
    Ports,
}

impl Step {
    const ALL: [Self; 4] = [Self::Veth, Self::Endpoint, Self::Carry, Self::Ports];

    const fn name(self) -> &'static str {
        match self {
            Self::Veth => "connect the namespace",
            Self::Endpoint => "write the datapath's tables",
            Self::Carry => "attach the datapath",
            Self::Ports => "publish ports",
        }
    }
}

/// What a step came back with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Made {
    Veth { veth: Veth, inode: u64 },
    Done,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// For subnet and bridge.
    Waiting {
        until: Duration,
    },
    Doing(Step),
    Up,
    Undoing(Step),
    /// Could not be undone; its address stays taken. Another detach tries again.
    Stuck,
}

/// One instance and its connection.
#[derive(Clone, Debug)]
pub(super) struct Member {
    netns: PathBuf,
    inode: u64,
    ports: Vec<PortMapping>,
    pub(super) addresses: Option<Addresses>,
    /// The cluster was told, in this run or an earlier one.
    pub(super) announced: bool,
    veth: Option<Veth>,
    /// The veth the datapath is attached to.
    carried: Option<Port>,
    stage: Stage,
    /// Steps in force.
    done: Vec<Step>,
    /// It was up before the steps under way: their failure leaves it as it is.
    was_up: bool,
    /// It is up, and its last renewal was not whole.
    shaky: bool,
    /// Its veth was made while somebody looked for veths, who may have looked before.
    unseen: bool,
    /// It is up, and was found without its veth.
    lost: bool,
    waiters: Vec<Waiter>,
    /// A detach that waits for the step under way.
    leave: Option<Vec<Waiter>>,
    /// An attach that waits for what is under way.
    rejoin: Option<(Attachment, Vec<Waiter>)>,
    /// Why it is being undone, and what went wrong with that.
    failure: Option<(Step, String)>,
    errors: Vec<String>,
    stuck: Vec<Step>,
    /// When to ask for its own address again, and how long to wait after that.
    own: Option<(Duration, Duration)>,
}

impl Member {
    fn new(netns: PathBuf, ports: Vec<PortMapping>, now: Duration) -> Self {
        Self {
            netns,
            inode: 0,
            ports,
            addresses: None,
            announced: false,
            veth: None,
            carried: None,
            stage: Stage::Waiting { until: now + PATIENCE },
            done: Vec::new(),
            was_up: false,
            shaky: false,
            unseen: false,
            lost: false,
            waiters: Vec::new(),
            leave: None,
            rejoin: None,
            failure: None,
            errors: Vec::new(),
            stuck: Vec::new(),
            own: None,
        }
    }

    /// Found connected at start.
    pub(super) fn adopted(lease: &KeptLease, veth: Veth) -> Self {
        let mut member = Self::new(lease.netns.clone(), lease.ports.clone(), Duration::ZERO);
        member.carried = Some(Port { name: veth.name.clone(), ifindex: veth.ifindex });
        (member.addresses, member.inode, member.veth) = (Some(lease.addresses), lease.inode, Some(veth));
        (member.stage, member.done, member.announced) = (Stage::Up, Step::ALL.to_vec(), true);
        member
    }

    /// Nothing of it is under way.
    pub(super) fn up(&self) -> bool {
        self.stage == Stage::Up
    }

    /// Its network works, if it is not being renewed just now.
    pub(super) fn connected(&self) -> bool {
        self.up() || (self.was_up && matches!(self.stage, Stage::Doing(_)))
    }

    /// What a restart has to know; nothing where it has no address yet.
    pub(super) fn kept(&self, instance: &InstanceId, own: FamilyPair) -> Option<KeptLease> {
        Some(KeptLease {
            instance: instance.clone(),
            addresses: self.addresses?,
            own,
            ports: self.ports.clone(),
            inode: self.inode,
            netns: self.netns.clone(),
        })
    }

    /// The published ports, where publishing is a step in force or under way.
    pub(super) fn published(&self) -> Published {
        let publishes = self.done.contains(&Step::Ports) || self.stage == Stage::Doing(Step::Ports);
        let addresses = self.addresses.filter(|_| publishes);
        addresses.map_or_else(Published::new, |addresses| self.ports.iter().map(|port| (*port, addresses)).collect())
    }

    pub(super) fn local(&self, instance: &InstanceId, own: FamilyPair) -> Option<Local> {
        let veth = self.veth.as_ref()?;
        Some(Local {
            instance: instance.clone(),
            addresses: self.addresses?,
            ifindex: veth.ifindex,
            mac: veth.mac,
            own,
        })
    }
}

impl Core {
    pub(super) fn attach(&mut self, attachment: Attachment, waiter: Waiter, out: &mut Vec<Effect>) {
        let id = attachment.instance.clone();
        if let Some(error) = self.port_conflict(&attachment) {
            out.push(Effect::Attached(waiter, Err(error)));
            return;
        }
        let Some(member) = self.members.get_mut(&id) else {
            let mut member = Member::new(attachment.netns, attachment.ports, self.now);
            member.waiters.push(waiter);
            self.members.insert(id.clone(), member);
            self.proceed(&id, out);
            return;
        };
        let same = member.netns == attachment.netns && member.ports == attachment.ports;
        match member.stage {
            Stage::Waiting { .. } | Stage::Doing(_) if same && member.leave.is_none() => {
                // The newest attach counts: one that waited for another namespace is overtaken.
                for overtaken in member.rejoin.take().map(|(_, waiters)| waiters).unwrap_or_default() {
                    out.push(Effect::Attached(overtaken, Err(NetError::Cancelled)));
                }
                member.waiters.push(waiter);
            }
            Stage::Waiting { .. } | Stage::Doing(_) | Stage::Undoing(_) => {
                match &mut member.rejoin {
                    Some((waiting, waiters)) if *waiting == attachment => waiters.push(waiter),
                    rejoin => {
                        let overtaken = rejoin.replace((attachment, vec![waiter]));
                        for waiter in overtaken.map(|(_, waiters)| waiters).unwrap_or_default() {
                            out.push(Effect::Attached(waiter, Err(NetError::Cancelled)));
                        }
                    }
                }
                if matches!(member.stage, Stage::Waiting { .. }) {
                    self.turn(&id, out);
                }
            }
            Stage::Up | Stage::Stuck => {
                (member.netns, member.ports) = (attachment.netns, attachment.ports);
                member.waiters.push(waiter);
                member.was_up = member.up();
                self.begin(&id, false, out);
            }
        }
    }

    pub(super) fn detach(&mut self, id: &InstanceId, waiter: Option<Waiter>, out: &mut Vec<Effect>) {
        let Some(member) = self.members.get_mut(id) else {
            out.extend(waiter.map(|waiter| Effect::Detached(waiter, Ok(()))));
            return;
        };
        if let Some((_, waiters)) = member.rejoin.take() {
            out.extend(waiters.into_iter().map(|waiter| Effect::Attached(waiter, Err(NetError::Cancelled))));
        }
        member.leave.get_or_insert_default().extend(waiter);
        match member.stage {
            Stage::Doing(_) | Stage::Undoing(_) => {}
            Stage::Waiting { .. } | Stage::Up | Stage::Stuck => self.undo(id, out),
        }
    }

    /// A step of the instance has ended.
    pub(super) fn stepped(&mut self, id: &InstanceId, step: Step, result: Result<Made, String>, out: &mut Vec<Effect>) {
        let Some(member) = self.members.get_mut(id) else { return };
        match (member.stage, result) {
            (Stage::Doing(doing), Ok(made)) if doing == step => {
                if let Made::Veth { veth, inode } = made {
                    // Said only now: a namespace that ended has taken its veth along, and nobody else did.
                    if std::mem::take(&mut member.lost) {
                        let same = member.veth.as_ref().is_some_and(|before| before.ifindex == veth.ifindex);
                        let what = if same { "taken the bridge from" } else { "removed the interface of" };
                        out.push(Effect::Warn(format!("others have {what} {id}; it is connected again")));
                    }
                    (member.veth, member.inode, member.unseen) = (Some(veth), inode, self.upkeep.is_some());
                    self.dirty = true;
                }
                if !member.done.contains(&step) {
                    member.done.push(step);
                }
                if member.leave.is_some() || member.rejoin.is_some() {
                    self.turn(id, out);
                } else {
                    self.advance(id, Some(step), out);
                }
            }
            (Stage::Doing(doing), Err(reason)) if doing == step => {
                if member.was_up && member.leave.is_none() {
                    (member.stage, member.shaky) = (Stage::Up, true);
                    let error = |_| NetError::Link { step: step.name(), reason: reason.clone() };
                    let waiters = std::mem::take(&mut member.waiters);
                    out.extend(waiters.into_iter().map(|waiter| Effect::Attached(waiter, Err(error(())))));
                    if member.rejoin.is_some() {
                        self.turn(id, out);
                    }
                } else {
                    // What failed may be half there, and every undo is repeatable.
                    if !member.done.contains(&step) {
                        member.done.push(step);
                    }
                    member.failure = Some((step, reason));
                    self.undo(id, out);
                }
            }
            (Stage::Undoing(undoing), result) if undoing == step => {
                if let Err(reason) = result {
                    member.errors.push(format!("{}: {reason}", step.name()));
                    member.stuck.push(step);
                }
                self.undo(id, out);
            }
            // A step nobody waits for any more.
            _ => {}
        }
    }

    /// Goes on with every instance that waited for subnet or bridge, or gives it up.
    pub(super) fn proceed_all(&mut self, out: &mut Vec<Effect>) {
        let waiting = |member: &Member| matches!(member.stage, Stage::Waiting { .. });
        let ids: Vec<InstanceId> = self.members.iter().filter(|(_, m)| waiting(m)).map(|(id, _)| id.clone()).collect();
        for id in ids {
            self.proceed(&id, out);
        }
    }

    pub(super) fn expire_waiting(&mut self, out: &mut Vec<Effect>) {
        let now = self.now;
        let late = |member: &Member| matches!(member.stage, Stage::Waiting { until } if until <= now);
        let ids: Vec<InstanceId> = self.members.iter().filter(|(_, m)| late(m)).map(|(id, _)| id.clone()).collect();
        for id in ids {
            self.dismiss(&id, || NetError::NoSubnet, out);
        }
    }

    /// The bridge cannot be made: nobody can be connected now.
    pub(super) fn dismiss_waiting(&mut self, reason: &str, out: &mut Vec<Effect>) {
        let waiting = |member: &Member| matches!(member.stage, Stage::Waiting { .. });
        let ids: Vec<InstanceId> = self.members.iter().filter(|(_, m)| waiting(m)).map(|(id, _)| id.clone()).collect();
        for id in ids {
            self.dismiss(&id, || NetError::Link { step: "make the bridge", reason: reason.to_owned() }, out);
        }
    }

    /// Connects anew what has lost its veth, has it under another index, or has it at no bridge, where it is still in the same
    /// namespace. `present` is what the last look found at the bridge.
    pub(super) fn repair(&mut self, present: &[(InstanceId, u32)], out: &mut Vec<Effect>) {
        let whole = |id: &InstanceId, member: &Member| {
            let ifindex = member.veth.as_ref().map(|veth| veth.ifindex);
            present.iter().any(|(other, index)| other == id && Some(*index) == ifindex)
        };
        let broken = |(id, member): &(&InstanceId, &Member)| {
            member.up() && (member.shaky || (!member.unseen && !whole(id, member)))
        };
        let ids: Vec<InstanceId> = self.members.iter().filter(broken).map(|(id, _)| id.clone()).collect();
        for id in ids {
            if let Some(member) = self.members.get_mut(&id) {
                member.lost = !member.unseen && !whole(&id, member);
            }
            self.renew(&id, out);
        }
    }

    /// A look for veths begins: it sees all that have been made.
    pub(super) fn looking(&mut self) {
        self.members.values_mut().for_each(|member| member.unseen = false);
    }

    /// Runs the steps of a connection that is up once more, in the namespace it has.
    pub(super) fn renew(&mut self, id: &InstanceId, out: &mut Vec<Effect>) {
        if let Some(member) = self.members.get_mut(id).filter(|member| member.up()) {
            member.was_up = true;
            self.begin(id, true, out);
        }
    }

    /// Services of instances that still do not know their own address, and whose time to ask again has come.
    pub(super) fn due_for_own_address(&mut self) -> Vec<InstanceId> {
        let now = self.now;
        let mut due = Vec::new();
        for (id, member) in &mut self.members {
            let Some((next, wait)) = member.own else { continue };
            if self.table.own(id) != FamilyPair::default() {
                member.own = None;
            } else if next <= now {
                member.own = Some((now + wait, (wait * 2).min(OWN_LAST)));
                due.push(id.clone());
            }
        }
        due
    }

    /// Begins as soon as there are subnet and bridge.
    fn proceed(&mut self, id: &InstanceId, out: &mut Vec<Effect>) {
        let ready = self.bridge_ready(out);
        if !ready || !self.members.contains_key(id) {
            return;
        }
        match self.lease(id) {
            None => {}
            Some(Ok(addresses)) => {
                if let Some(member) = self.members.get_mut(id) {
                    member.addresses = Some(addresses);
                }
                self.begin(id, false, out);
            }
            Some(Err(full)) => self.dismiss(id, || NetError::SubnetFull { used: full.used }, out),
        }
    }

    /// Ends the waiting of an instance of which nothing was made.
    fn dismiss(&mut self, id: &InstanceId, error: impl Fn() -> NetError, out: &mut Vec<Effect>) {
        let Some(member) = self.members.remove(id) else { return };
        out.extend(member.waiters.into_iter().map(|waiter| Effect::Attached(waiter, Err(error()))));
    }

    /// The first step. With `same_namespace`, only where the path still leads to the namespace it led to.
    fn begin(&mut self, id: &InstanceId, same_namespace: bool, out: &mut Vec<Effect>) {
        let subnet = self.home.subnet();
        let Some((member, subnet)) = self.members.get_mut(id).zip(subnet) else { return };
        let Some(addresses) = member.addresses else { return };
        member.stage = Stage::Doing(Step::Veth);
        member.stuck.clear();
        self.dirty = true;
        out.push(Effect::AttachVeth {
            instance: id.clone(),
            netns: member.netns.clone(),
            inode: if same_namespace { Some(member.inode) } else { None },
            subnet,
            addresses,
        });
    }

    /// The step after `after`.
    fn advance(&mut self, id: &InstanceId, after: Option<Step>, out: &mut Vec<Effect>) {
        let next = Step::ALL.into_iter().find(|step| Some(*step) > after);
        let Some(member) = self.members.get_mut(id) else { return };
        let Some(step) = next else {
            self.complete(id, out);
            return;
        };
        member.stage = Stage::Doing(step);
        match step {
            Step::Veth => self.begin(id, false, out),
            Step::Endpoint => {
                let local = member.local(id, self.table.own(id));
                if let Some(local) = local {
                    let delta = self.table.attach(local);
                    self.project(delta, out);
                }
                out.push(Effect::Settle(id.clone()));
            }
            Step::Carry => {
                let port = member.veth.as_ref().map(|veth| Port { name: veth.name.clone(), ifindex: veth.ifindex });
                let replaces = member.carried.clone().filter(|carried| Some(carried) != port.as_ref());
                member.carried.clone_from(&port);
                match port {
                    Some(port) => out.push(Effect::Carry { instance: id.clone(), port, replaces }),
                    None => self.advance(id, Some(step), out),
                }
            }
            Step::Ports => self.publish(id, out),
        }
    }

    /// Everything is in force.
    fn complete(&mut self, id: &InstanceId, out: &mut Vec<Effect>) {
        let Some(member) = self.members.get_mut(id) else { return };
        let Some(addresses) = member.addresses else { return };
        (member.stage, member.was_up, member.shaky) = (Stage::Up, false, false);
        let lease = Lease { instance: id.clone(), addresses };
        let waiters = std::mem::take(&mut member.waiters);
        out.extend(waiters.into_iter().map(|waiter| Effect::Attached(waiter, Ok(lease.clone()))));
        self.announce_one(id, addresses, out);
        self.hold(id, out);
    }

    /// What was asked during the last step: another namespace, or the end.
    fn turn(&mut self, id: &InstanceId, out: &mut Vec<Effect>) {
        let Some(member) = self.members.get_mut(id) else { return };
        if member.leave.is_some() {
            self.undo(id, out);
            return;
        }
        let Some((attachment, waiters)) = member.rejoin.take() else { return };
        let overtaken = std::mem::replace(&mut member.waiters, waiters);
        out.extend(overtaken.into_iter().map(|waiter| Effect::Attached(waiter, Err(NetError::Cancelled))));
        (member.netns, member.ports) = (attachment.netns, attachment.ports);
        if !matches!(member.stage, Stage::Waiting { .. }) {
            self.begin(id, false, out);
        }
    }

    /// The newest step in force that is still to be undone; then the end.
    fn undo(&mut self, id: &InstanceId, out: &mut Vec<Effect>) {
        let Some(member) = self.members.get_mut(id) else { return };
        member.done.sort_unstable();
        let Some(step) = member.done.pop() else {
            self.end(id, out);
            return;
        };
        member.stage = Stage::Undoing(step);
        match step {
            Step::Ports => self.publish(id, out),
            Step::Carry => match member.carried.take() {
                Some(port) => out.push(Effect::Release { instance: id.clone(), port }),
                None => self.undo(id, out),
            },
            Step::Endpoint => {
                let delta = self.table.detach(id);
                self.project(delta, out);
                out.push(Effect::Settle(id.clone()));
            }
            Step::Veth => out.push(Effect::DetachVeth(id.clone())),
        }
    }

    /// Nothing of it is in force any more, or what is cannot be undone.
    fn end(&mut self, id: &InstanceId, out: &mut Vec<Effect>) {
        let Some(member) = self.members.get_mut(id) else { return };
        self.dirty = true;
        let errors = std::mem::take(&mut member.errors).join("; ");
        let waiters = std::mem::take(&mut member.waiters);
        let failure = member.failure.take();
        for waiter in waiters {
            let error = match &failure {
                Some((step, reason)) if errors.is_empty() => {
                    NetError::Link { step: step.name(), reason: reason.clone() }
                }
                Some((step, reason)) => {
                    NetError::Link { step: step.name(), reason: format!("{reason}; then, undoing it: {errors}") }
                }
                None => NetError::Cancelled,
            };
            out.push(Effect::Attached(waiter, Err(error)));
        }
        for waiter in member.leave.take().unwrap_or_default() {
            let result = match errors.is_empty() {
                true => Ok(()),
                false => Err(NetError::Link { step: "disconnect", reason: errors.clone() }),
            };
            out.push(Effect::Detached(waiter, result));
        }
        let rejoin = member.rejoin.take();
        if member.stuck.contains(&Step::Veth) {
            // Its veth still has the address, so nobody else may get it.
            member.done = std::mem::take(&mut member.stuck);
            (member.stage, member.was_up) = (Stage::Stuck, false);
        } else {
            self.members.remove(id);
            self.release(id);
            if let Some(ipam) = self.home.ipam() {
                ipam.free(id);
            }
            self.settle_home(out);
        }
        if let Some((attachment, waiters)) = rejoin {
            for waiter in waiters {
                self.attach(attachment.clone(), waiter, out);
            }
        }
    }

    /// The instance's service is watched, and asked for until the cluster tells the instance its own address.
    pub(super) fn hold(&mut self, id: &InstanceId, out: &mut Vec<Effect>) {
        let Some(member) = self.members.get_mut(id) else { return };
        if self.held.insert(id.clone()) {
            member.own = Some((self.now + OWN_FIRST, OWN_FIRST * 2));
            let outcomes = self.interests.hold(&id.service, self.now);
            self.pursue(outcomes, out);
        }
    }

    /// The instance's service has one user less.
    fn release(&mut self, id: &InstanceId) {
        if self.held.remove(id) {
            self.interests.release(&id.service, self.now);
        }
    }

    /// Publishes the ports of all members as they are meant to be now; the instance's step ends with that. One change at a time:
    /// each replaces all ports of the node.
    fn publish(&mut self, id: &InstanceId, out: &mut Vec<Effect>) {
        self.publish_next.push(id.clone());
        if self.publishing.is_none() {
            self.publish_all(out);
        }
    }

    pub(super) fn publish_all(&mut self, out: &mut Vec<Effect>) {
        let Some(subnet) = self.home.subnet() else { return };
        let ports: Published = self.members.values().flat_map(Member::published).collect();
        let ids = std::mem::take(&mut self.publish_next);
        self.publishing = Some((ids, ports.clone()));
        if self.ports_in_force.as_ref() == Some(&ports) {
            self.published(Ok(()), out);
        } else {
            out.push(Effect::Publish(subnet, ports));
        }
    }

    /// The ports are published, or not. All who waited for it go on; what they ask for meanwhile becomes one change.
    pub(super) fn published(&mut self, result: Result<(), String>, out: &mut Vec<Effect>) {
        let Some((ids, ports)) = self.publishing.as_mut().map(std::mem::take) else { return };
        self.ports_in_force = result.is_ok().then_some(ports);
        for id in ids {
            self.stepped(&id, Step::Ports, result.clone().map(|()| Made::Done), out);
        }
        self.publishing = None;
        if !self.publish_next.is_empty() {
            self.publish_all(out);
        }
    }

    fn port_conflict(&self, attachment: &Attachment) -> Option<NetError> {
        let id = &attachment.instance;
        let same = |a: &PortMapping, b: &PortMapping| a.host == b.host && a.protocol == b.protocol;
        for (place, port) in attachment.ports.iter().enumerate() {
            if attachment.ports[..place].iter().any(|other| same(other, port)) {
                return Some(NetError::PortTaken { port: *port, owner: id.clone() });
            }
            let others = self.members.iter().filter(|(other, _)| *other != id);
            let wanted = |member: &Member| {
                let waiting = member.rejoin.iter().flat_map(|(attachment, _)| &attachment.ports);
                member.ports.iter().chain(waiting).any(|other| same(other, port))
            };
            if let Some((owner, _)) = others.into_iter().find(|(_, member)| wanted(member)) {
                return Some(NetError::PortTaken { port: *port, owner: owner.clone() });
            }
        }
        None
    }
}
