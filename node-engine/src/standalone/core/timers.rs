//! What time and failures bring: silence, redeploys with back-off, retirement, moves that end.

use std::sync::Arc;
use std::time::Duration;

use crate::model::{InstanceId, NodeId};

use super::super::inventory::{Instance, Moment, Node, Phase, Service};
use super::super::schedule::{self, Candidate};
use super::{Core, DeployOrder, Message};

/// An instance that its node has not spoken of for so long is lost.
const SILENCE: Duration = Duration::from_secs(30);

/// An instance that ran for so long has put its failures behind it.
pub(super) const STEADY: Duration = Duration::from_secs(60);

/// After the first failure; doubled with each further one. The first pause lets the delete overtake the next deploy, which goes by
/// another topic.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// How often a waiting instance looks for a node.
const SEARCH: Duration = Duration::from_secs(2);

/// A search looks at every node and what is on it; in a full cluster many search for ever.
const SEARCHES_A_TICK: usize = 64;

/// A node that comes back says within this time what still runs on it.
const COME_BACK: Duration = Duration::from_secs(5);

/// From the notice that an instance is gone to its end, so that the peers have asked for the new table.
const RETIREMENT: Duration = Duration::from_secs(1);

/// A replacement runs for so long before it takes over: a program needs a moment until it listens.
const READY: Duration = Duration::from_secs(2);

/// A replacement that failed so often is given up, and what it should have replaced stays.
const MOVE_ATTEMPTS: u32 = 3;

impl Core {
    /// To be called about once a second.
    pub(in super::super) fn tick(&mut self, now: Moment) {
        self.repeat_orders(now);
        let mut searching = Vec::new();
        for id in self.instances() {
            let Some(instance) = self.instance_mut(&id) else { continue };
            match instance.phase {
                Phase::Retiring { delete } if now >= delete => self.remove(&id),
                phase if phase.placed() && now.saturating_sub(instance.heard) >= SILENCE => self.lost(&id, now),
                phase => searching.extend(phase.retry().filter(|retry| now >= *retry).map(|retry| (retry, id))),
            }
        }
        // Who has waited longest is first, so that nobody starves.
        searching.sort();
        for (_, id) in searching.into_iter().take(SEARCHES_A_TICK) {
            self.place(&id, now);
        }
        for id in self.instances() {
            self.finish_move(&id, now);
        }
    }

    fn instances(&self) -> Vec<InstanceId> {
        let all = self.services.values().map(|service| (service, service.instances.keys()));
        all.flat_map(|(service, numbers)| numbers.map(|number| service.instance_id(*number))).collect()
    }

    /// Finds a node for the instance and sends it there, or says why not and looks again later.
    pub(super) fn place(&mut self, id: &InstanceId, now: Moment) {
        let Some(service) = self.services.get(&id.service) else { return };
        let Some(instance) = service.instances.get(&id.number) else { return };
        let choice = schedule::choose(service, instance, self.candidates(service, now));
        let Some(instance) = self.instance_mut(id) else { return };
        let node = match choice {
            Ok(node) => node,
            Err(reason) => {
                let retry = now + SEARCH;
                instance.detail = reason;
                instance.failures += u32::from(instance.replaces.is_some());
                if let Phase::Lost { .. } = instance.phase {
                    instance.phase = Phase::Lost { retry };
                } else {
                    instance.phase = Phase::Waiting { retry, searched: true };
                    instance.node = None;
                }
                return;
            }
        };
        let was_lost = matches!(instance.phase, Phase::Lost { .. });
        let left = instance.node.replace(node.clone()).filter(|left| was_lost && *left != node);
        instance.phase = Phase::Scheduled;
        instance.detail.clear();
        instance.deployed = None;
        instance.heard = now;
        if let Some(left) = left {
            self.send_delete(left, id);
        }
        self.send_deploy(node, id);
        self.changed(id);
    }

    pub(super) fn candidates<'a>(
        &'a self,
        service: &'a Service,
        now: Moment,
    ) -> impl Iterator<Item = Candidate<'a>> + 'a {
        self.nodes.values().map(move |node| self.candidate(service, node, now))
    }

    pub(super) fn candidate<'a>(&'a self, service: &Service, node: &'a Node, now: Moment) -> Candidate<'a> {
        let (mut instances, mut of_this_service, mut port_taken) = (0, 0, false);
        for other in self.services.values() {
            let here = other.instances.values().filter(|instance| occupies(instance, &node.id)).count();
            instances += here;
            if other.request.name == service.request.name {
                of_this_service += here;
            }
            port_taken |= here > 0 && share_a_port(service, other);
        }
        Candidate { node, fresh: Self::is_fresh(node, now), instances, of_this_service, port_taken }
    }

    pub(super) fn progress(&mut self, id: &InstanceId, phase: Phase, detail: String, now: Moment) {
        let Some(instance) = self.instance_mut(id) else { return };
        instance.phase = phase;
        instance.detail = detail;
        instance.heard = now;
        self.changed(id);
    }

    /// Its node reported an end it should not have had.
    pub(super) fn failed(
        &mut self,
        id: &InstanceId,
        detail: String,
        phase: impl FnOnce(Option<Moment>) -> Phase,
        now: Moment,
    ) {
        let Some(service) = self.services.get_mut(&id.service) else { return };
        let one_shot = service.request.one_shot;
        let Some(instance) = service.instances.get_mut(&id.number) else { return };
        instance.failures = instance.failures.saturating_add(1);
        instance.phase = phase((!one_shot).then(|| now + pause(instance.failures)));
        instance.detail = detail;
        instance.deployed = None;
        instance.heard = now;
        if let Some(node) = instance.node.clone() {
            self.send_delete(node, id);
        }
        self.changed(id);
    }

    pub(super) fn completed(&mut self, id: &InstanceId, detail: String, now: Moment) {
        self.progress(id, Phase::Completed, detail, now);
        if let Some(instance) = self.instance_mut(id) {
            instance.deployed = None;
        }
    }

    pub(super) fn undeployed(&mut self, id: &InstanceId, detail: String, now: Moment) {
        self.progress(id, Phase::Undeployed { retry: now + COME_BACK }, detail, now);
        if let Some(instance) = self.instance_mut(id) {
            instance.deployed = None;
        }
    }

    /// A node that fell silent speaks again: what was lost with it waits a moment for being listed.
    pub(super) fn node_is_back(&mut self, node: &NodeId, now: Moment) {
        let instances = self.services.values_mut().flat_map(|service| service.instances.values_mut());
        for instance in instances.filter(|instance| instance.node.as_ref() == Some(node)) {
            if let Phase::Lost { retry } = &mut instance.phase {
                *retry = (*retry).max(now + COME_BACK);
            }
        }
        self.back.insert(node.clone(), now);
    }

    /// Deploys of which a node has said nothing since before it was heard again: with the broker, or with the node's session, they may
    /// be lost. Not at once, as the same words of the node may answer them.
    fn repeat_orders(&mut self, now: Moment) {
        let back = std::mem::take(&mut self.back);
        if back.is_empty() {
            return;
        }
        for id in self.instances() {
            let Some(instance) = self.instance_mut(&id) else { continue };
            let Some((node, since)) = instance.node.as_ref().and_then(|node| back.get_key_value(node)) else {
                continue;
            };
            if instance.phase == Phase::Scheduled && instance.heard < *since {
                instance.heard = now;
                self.send_deploy(node.clone(), &id);
            }
        }
    }

    /// Starts the end of an instance that is not needed any more.
    pub(super) fn retire(&mut self, id: &InstanceId, now: Moment) {
        let Some(instance) = self.instance_mut(id) else { return };
        let running = instance.node.is_some() && instance.reachable().is_some();
        instance.phase = Phase::Retiring { delete: now + RETIREMENT };
        instance.replaces = None;
        self.changed(id);
        if !running {
            self.remove(id);
        }
    }

    /// The end of an instance: its node is told, its addresses are free.
    pub(super) fn remove(&mut self, id: &InstanceId) {
        let Some(service) = self.services.get_mut(&id.service) else { return };
        let Some(instance) = service.instances.remove(&id.number) else { return };
        let virtualization = service.request.virtualization.clone();
        self.services_v4.free(super::number_of(instance.address.v4));
        self.instances_v6.free(instance.address.v6.into());
        if let Some(node) = instance.node {
            self.push_delete(node, id.clone(), virtualization);
        }
        self.changed(id);
    }

    /// A node says nothing of the instance. One that speaks of others has it no more; one that is silent altogether may come
    /// back with it.
    fn lost(&mut self, id: &InstanceId, now: Moment) {
        let node = self.instance_mut(id).and_then(|instance| instance.node.clone());
        let fresh = node.and_then(|node| self.node(&node)).is_some_and(|node| Self::is_fresh(node, now));
        let detail = "no word of it for 30 seconds".to_owned();
        if fresh {
            return self.failed(id, detail, |retry| Phase::Failed { retry }, now);
        }
        let Some(instance) = self.instance_mut(id) else { return };
        instance.phase = Phase::Lost { retry: now };
        instance.detail = detail;
        self.changed(id);
    }

    /// A replacement that runs and can be reached ends what it replaces; one that cannot come up ends itself.
    fn finish_move(&mut self, id: &InstanceId, now: Moment) {
        let Some(service) = self.services.get(&id.service) else { return };
        let Some(instance) = service.instances.get(&id.number) else { return };
        let Some(replaced) = instance.replaces else { return };
        let steady = |since| now.saturating_sub(since) >= READY;
        let runs =
            matches!(instance.phase, Phase::Running { since } if steady(since)) && instance.reachable().is_some();
        let hopeless = instance.failures >= MOVE_ATTEMPTS;
        if runs || !service.instances.contains_key(&replaced) {
            if let Some(instance) = self.instance_mut(id) {
                instance.replaces = None;
                instance.pin = None;
            }
            self.retire(&InstanceId { number: replaced, ..id.clone() }, now);
            self.changed(id);
        } else if hopeless {
            tracing::warn!(instance = %id, "the replacement did not come up; the old instance stays");
            self.remove(id);
        }
    }

    fn send_delete(&mut self, node: NodeId, id: &InstanceId) {
        let Some(service) = self.services.get(&id.service) else { return };
        let virtualization = service.request.virtualization.clone();
        self.push_delete(node, id.clone(), virtualization);
    }

    fn send_deploy(&mut self, node: NodeId, id: &InstanceId) {
        let generation = self.count_order();
        let Some(service) = self.services.get(&id.service) else { return };
        let facts = self.node(&node).map(|node| (node.facts.address, node.facts.port.clone()));
        let (host, port) = facts.unwrap_or_default();
        let order = DeployOrder {
            node,
            instance: id.clone(),
            job: service.job.clone(),
            document: Arc::clone(&service.request.document),
            round_robin: service.round_robin,
            next_number: service.next_number,
            host,
            port,
            generation,
        };
        self.effects.messages.push(Message::Deploy(Box::new(order)));
    }
}

fn pause(failures: u32) -> Duration {
    FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(16)).min(LONGEST_PAUSE)
}

fn occupies(instance: &Instance, node: &NodeId) -> bool {
    instance.node.as_ref() == Some(node) && !matches!(instance.phase, Phase::Completed | Phase::Waiting { .. })
}

fn share_a_port(one: &Service, other: &Service) -> bool {
    let ports = &other.request.ports;
    one.request
        .ports
        .iter()
        .any(|port| ports.iter().any(|taken| taken.host == port.host && taken.protocol == port.protocol))
}
