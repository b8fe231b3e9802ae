//! The cluster's state for people.

use crate::api::dto::{ClusterInstance, ClusterNode};
use crate::model::PortMapping;

use super::core::Core;
use super::inventory::{Instance, Moment, Node, Phase, Service};

pub(super) fn nodes(core: &Core, now: Moment) -> Vec<ClusterNode> {
    core.nodes.values().map(|node| self::node(core, node, now)).collect()
}

pub(super) fn instances(core: &Core) -> Vec<ClusterInstance> {
    let all = core.services.values().flat_map(|service| service.instances.values().map(move |one| (service, one)));
    all.map(|(service, instance)| self::instance(core, service, instance)).collect()
}

fn node(core: &Core, node: &Node, now: Moment) -> ClusterNode {
    let everywhere = core.services.values().flat_map(|service| service.instances.values());
    let here = |instance: &&Instance| {
        instance.node.as_ref() == Some(&node.id) && !matches!(instance.phase, Phase::Completed | Phase::Waiting { .. })
    };
    ClusterNode {
        id: node.id.to_string(),
        name: node.host.clone(),
        address: text(node.facts.address),
        architecture: node.facts.architecture.clone().unwrap_or_default(),
        active: Core::is_fresh(node, now),
        seen_seconds: now.saturating_sub(node.seen.unwrap_or_default()).as_secs(),
        cpu_percent: node.facts.cpu_percent.unwrap_or_default(),
        cpus: node.facts.vcpus.and_then(|cpus| u32::try_from(cpus).ok()).unwrap_or_default(),
        memory_percent: node.facts.memory_percent.unwrap_or_default(),
        memory_mib: node.facts.memory_available_mib.unwrap_or_default(),
        instances: everywhere.filter(here).count(),
        subnet: text(node.subnet.map(|subnet| subnet.v4)),
    }
}

fn instance(core: &Core, service: &Service, instance: &Instance) -> ClusterInstance {
    let node = instance.node.as_ref().and_then(|id| core.node(id));
    ClusterInstance {
        service: service.request.name.to_string(),
        number: instance.number,
        image: service.request.image.clone(),
        node: node.map(|node| node.host.clone()).unwrap_or_default(),
        status: instance.phase.word().into(),
        detail: instance.detail.clone(),
        address: text(instance.deployed.map(|deployed| deployed.namespace_v4)),
        instance_address: instance.address.v4.to_string(),
        service_addresses: vec![service.round_robin.v4.to_string(), service.round_robin.v6.to_string()],
        policies: service
            .policies
            .iter()
            .map(|(policy, pair)| (policy.label().to_owned(), vec![pair.v4.to_string(), pair.v6.to_string()]))
            .collect(),
        ports: service.request.ports.iter().map(PortMapping::to_string).collect(),
    }
}

fn text(value: Option<impl ToString>) -> String {
    value.map(|value| value.to_string()).unwrap_or_default()
}
