//! What a person orders: deploy, delete, replicate, move.

use crate::model::{InstanceId, NodeId, Policy, ServiceName};

use super::super::documents::Moved;
use super::super::inventory::{AddressPair, Instance, InstanceUsage, Moment, Phase, Request, Service};
use super::super::schedule;
use super::super::{ClusterApiError, Target};
use super::{Core, number_of};

/// So many services, and instances of one service, may there be.
const MAX_SERVICES: usize = 4096;
const MAX_INSTANCES: u32 = 1000;
/// Each instance is told with all addresses of its service, and the whole must fit a node's limit.
const MAX_ENTRIES: u64 = 5_000;

impl Core {
    /// Adds `replicas` instances of the service, on this node or where there is room. A service that is known takes over the
    /// description for what is started from now on.
    pub(in super::super) fn deploy(
        &mut self,
        request: Request,
        replicas: u32,
        on: Option<&str>,
        job: String,
        now: Moment,
    ) -> Result<Vec<InstanceId>, ClusterApiError> {
        let pin = on.map(|node| self.find_node(node)).transpose()?;
        let name = request.name.clone();
        let known = self.services.contains_key(&name);
        let existing = self.services.get(&name).map_or(0, |service| service.instances.len());
        within("the number of instances of a service", existing as u64 + u64::from(replicas), MAX_INSTANCES.into())?;
        self.ensure_service(request, job)?;
        let added = self.add_instances(&name, replicas, pin.as_ref(), now);
        if added.is_err() && !known {
            self.delete_service(&name);
        }
        added
    }

    /// Takes down all of a service at once, or an instance: where others are ready for what it did, when their peers know.
    pub(in super::super) fn delete(
        &mut self,
        target: &Target,
        now: Moment,
    ) -> Result<Vec<InstanceId>, ClusterApiError> {
        match target {
            Target::Service(name) if self.services.contains_key(name) => Ok(self.delete_service(name)),
            Target::Service(name) => Err(ClusterApiError::UnknownService(name.clone())),
            Target::Instance(id) => {
                let service = self.known_service(&id.service)?;
                if !service.instances.contains_key(&id.number) {
                    return Err(ClusterApiError::UnknownInstance(id.clone()));
                }
                let replacement = service.replacement_of(id.number);
                let gone: Vec<InstanceId> = [Some(id.number), replacement]
                    .into_iter()
                    .flatten()
                    .map(|number| service.instance_id(number))
                    .collect();
                let others = |other: &Instance| other.ready() && gone.iter().all(|id| id.number != other.number);
                let spared = service.instances.values().any(others);
                for id in &gone {
                    if spared { self.retire(id, now) } else { self.remove(id) }
                }
                if self.services.get(&id.service).is_some_and(|service| service.wanted().is_empty()) {
                    self.delete_service(&id.service);
                }
                Ok(gone)
            }
        }
    }

    /// Brings the service to so many instances: new ones get the next numbers, the newest go first.
    pub(in super::super) fn replicate(
        &mut self,
        name: &ServiceName,
        replicas: u32,
        now: Moment,
    ) -> Result<Vec<InstanceId>, ClusterApiError> {
        within("the number of instances of a service", replicas.into(), MAX_INSTANCES.into())?;
        let mut wanted = self.known_service(name)?.wanted();
        let missing = replicas.saturating_sub(u32::try_from(wanted.len()).unwrap_or(u32::MAX));
        self.add_instances(name, missing, None, now)?;
        while wanted.len() > replicas as usize {
            let Some(newest) = wanted.pop() else { break };
            let replacement = self.known_service(name)?.replacement_of(newest);
            for number in [Some(newest), replacement].into_iter().flatten() {
                self.retire(&InstanceId { service: name.clone(), number }, now);
            }
        }
        let service = self.known_service(name)?;
        Ok(service.wanted().into_iter().map(|number| service.instance_id(number)).collect())
    }

    /// Starts a replacement on this node. When it runs and can be reached, the instance goes.
    pub(in super::super) fn move_instance(
        &mut self,
        id: &InstanceId,
        node: &str,
        now: Moment,
    ) -> Result<InstanceId, ClusterApiError> {
        let target = self.find_node(node)?;
        let service = self.known_service(&id.service)?;
        let refuse = |reason: String| ClusterApiError::NoNode { instance: id.clone(), reason };
        let instance =
            service.instances.get(&id.number).filter(|instance| !matches!(instance.phase, Phase::Retiring { .. }));
        let instance = instance.ok_or_else(|| ClusterApiError::UnknownInstance(id.clone()))?;
        if instance.node.as_ref() == Some(&target) {
            return Err(refuse(format!("it is on {node} already")));
        }
        if service.replacement_of(id.number).is_some() || instance.replaces.is_some() {
            return Err(refuse("it is being moved already".into()));
        }
        let known = self.node(&target).ok_or(ClusterApiError::Stopped)?;
        schedule::fits(service, &self.candidate(service, known, now))
            .map_err(|reason| refuse(format!("{} {reason}", known.host)))?;
        let added = self.add_instance(&id.service, Some(&target), Some(id.number), now)?;
        self.place(&added, now);
        Ok(added)
    }

    /// The instance that a move means.
    pub(in super::super) fn which(&self, moved: Moved) -> Result<InstanceId, ClusterApiError> {
        let (name, node) = match moved {
            Moved::Number(id) => return Ok(id),
            Moved::From { service, node } => (service, Some(self.find_node(&node)?)),
            Moved::Only(service) => (service, None),
        };
        let service = self.known_service(&name)?;
        let wanted = service.wanted().into_iter().filter(|number| {
            let at = service.instances.get(number).and_then(|instance| instance.node.as_ref());
            node.is_none() || at == node.as_ref()
        });
        match wanted.collect::<Vec<_>>()[..] {
            [number] => Ok(service.instance_id(number)),
            _ => Err(ClusterApiError::Document {
                reason: format!("it does not say which instance of {name} is to be moved"),
            }),
        }
    }

    fn known_service(&self, name: &ServiceName) -> Result<&Service, ClusterApiError> {
        self.services.get(name).ok_or_else(|| ClusterApiError::UnknownService(name.clone()))
    }

    /// By id or host name.
    fn find_node(&self, name: &str) -> Result<NodeId, ClusterApiError> {
        let found = self.nodes.values().find(|node| node.host == name || node.id.as_str() == name);
        found.map(|node| node.id.clone()).ok_or_else(|| ClusterApiError::UnknownNode {
            node: name.to_owned(),
            known: self.nodes.keys().take(20).cloned().collect(),
        })
    }

    fn ensure_service(&mut self, request: Request, job: String) -> Result<(), ClusterApiError> {
        let refuse = |reason: String| ClusterApiError::Document { reason };
        let name = request.name.clone();
        if let Some(service) = self.services.get_mut(&name) {
            let other_v4 = request.round_robin_v4.filter(|wanted| *wanted != service.round_robin.v4);
            let other_v6 = request.round_robin_v6.filter(|wanted| *wanted != service.round_robin.v6);
            if other_v4.is_some() || other_v6.is_some() {
                return Err(refuse("the service has another round robin address; delete it first".into()));
            }
            service.request = request;
            self.effects.save = true;
            return self.offer(&name);
        }
        within("the number of services", self.services.len() as u64 + 1, MAX_SERVICES as u64)?;
        let v4 = match request.round_robin_v4 {
            Some(wanted) if self.services_v4.claim(number_of(wanted)) => wanted,
            Some(wanted) => {
                return Err(refuse(format!("round robin address {wanted} is taken or outside the service range")));
            }
            None => self.take_v4()?,
        };
        let v6 = match request.round_robin_v6 {
            Some(wanted) if self.round_robin_v6.claim(wanted.into()) => Ok(wanted),
            Some(wanted) => Err(refuse(format!("round robin address {wanted} is taken or outside the service range"))),
            None => self.round_robin_v6.take().map(Into::into).ok_or_else(exhausted),
        };
        let v6 = v6.inspect_err(|_| self.services_v4.free(number_of(v4)))?;
        let service = Service {
            job,
            request,
            round_robin: AddressPair { v4, v6 },
            policies: Default::default(),
            next_number: 0,
            instances: Default::default(),
        };
        self.services.insert(name.clone(), service);
        self.effects.save = true;
        self.offer(&name).inspect_err(|_| drop(self.delete_service(&name)))
    }

    /// Gives the service the addresses of its policies.
    fn offer(&mut self, name: &ServiceName) -> Result<(), ClusterApiError> {
        let service = self.known_service(name)?;
        let missing: Vec<Policy> =
            service.request.policies.iter().copied().filter(|policy| !service.policies.contains_key(policy)).collect();
        for policy in missing {
            let v4 = self.take_v4()?;
            let Some(v6) = self.round_robin_v6.take() else {
                self.services_v4.free(number_of(v4));
                return Err(exhausted());
            };
            if let Some(service) = self.services.get_mut(name) {
                service.policies.insert(policy, AddressPair { v4, v6: v6.into() });
            }
        }
        self.touched.insert(name.clone());
        Ok(())
    }

    fn add_instances(
        &mut self,
        name: &ServiceName,
        count: u32,
        pin: Option<&NodeId>,
        now: Moment,
    ) -> Result<Vec<InstanceId>, ClusterApiError> {
        let service = self.known_service(name)?;
        let entries = (service.instances.len() as u64 + u64::from(count)) * service.addresses().count() as u64;
        within("the number of instances of a service times that of its policies", entries, MAX_ENTRIES)?;
        let mut added = Vec::new();
        for _ in 0..count {
            match self.add_instance(name, pin, None, now) {
                Ok(id) => added.push(id),
                Err(error) => {
                    for id in &added {
                        self.remove(id);
                    }
                    return Err(error);
                }
            }
        }
        for id in &added {
            self.place(id, now);
        }
        Ok(added)
    }

    fn add_instance(
        &mut self,
        name: &ServiceName,
        pin: Option<&NodeId>,
        replaces: Option<u32>,
        now: Moment,
    ) -> Result<InstanceId, ClusterApiError> {
        let v4 = self.take_v4()?;
        let Some(v6) = self.instances_v6.take() else {
            self.services_v4.free(number_of(v4));
            return Err(exhausted());
        };
        let Some(service) = self.services.get_mut(name) else {
            return Err(ClusterApiError::UnknownService(name.clone()));
        };
        let number = service.next_number;
        service.next_number = number.saturating_add(1);
        service.instances.insert(
            number,
            Instance {
                number,
                address: AddressPair { v4, v6: v6.into() },
                phase: Phase::Waiting { retry: now, searched: false },
                detail: String::new(),
                node: None,
                deployed: None,
                pin: pin.cloned(),
                replaces,
                heard: now,
                failures: 0,
                usage: InstanceUsage::default(),
            },
        );
        let id = InstanceId { service: name.clone(), number };
        self.changed(&id);
        Ok(id)
    }

    fn delete_service(&mut self, name: &ServiceName) -> Vec<InstanceId> {
        let Some(service) = self.services.get(name) else { return Vec::new() };
        let gone: Vec<InstanceId> = service.instances.keys().map(|number| service.instance_id(*number)).collect();
        for id in &gone {
            self.remove(id);
        }
        if let Some(service) = self.services.remove(name) {
            for (_, pair) in service.addresses() {
                self.services_v4.free(number_of(pair.v4));
                self.round_robin_v6.free(pair.v6.into());
            }
        }
        self.effects.save = true;
        self.touched.insert(name.clone());
        gone
    }

    fn take_v4(&mut self) -> Result<std::net::Ipv4Addr, ClusterApiError> {
        let number = self.services_v4.take().and_then(|number| u32::try_from(number).ok());
        number.map(Into::into).ok_or_else(exhausted)
    }
}

fn exhausted() -> ClusterApiError {
    ClusterApiError::Limit { what: "the number of service addresses", limit: 254 * 254 }
}

fn within(what: &'static str, number: u64, limit: u64) -> Result<(), ClusterApiError> {
    if number > limit { Err(ClusterApiError::Limit { what, limit }) } else { Ok(()) }
}
