//! Which node gets an instance: one that is fresh, has the technology and the room; among those the one that has fewest instances
//! of the service, then fewest of all, then the least to do.

use crate::model::NodeId;

use super::inventory::{Instance, Node, Service};

/// A node that may be chosen, with what is on it.
#[derive(Debug)]
pub(super) struct Candidate<'a> {
    pub(super) node: &'a Node,
    pub(super) fresh: bool,
    pub(super) instances: usize,
    pub(super) of_this_service: usize,
    /// Another instance on it publishes one of the service's host ports.
    pub(super) port_taken: bool,
}

/// The node for `instance`, or why there is none.
pub(super) fn choose<'a>(
    service: &Service,
    instance: &Instance,
    candidates: impl Iterator<Item = Candidate<'a>>,
) -> Result<NodeId, String> {
    let mut reasons = Vec::new();
    let mut best: Option<Candidate<'a>> = None;
    for candidate in candidates {
        if instance.pin.as_ref().is_some_and(|pin| *pin != candidate.node.id) {
            continue;
        }
        if let Err(reason) = fits(service, &candidate) {
            reasons.push(format!("{} {reason}", candidate.node.host));
            continue;
        }
        if best.as_ref().is_none_or(|best| weight(&candidate) < weight(best)) {
            best = Some(candidate);
        }
    }
    match best {
        Some(candidate) => Ok(candidate.node.id.clone()),
        None if reasons.is_empty() => Err("no node has registered that may run it".into()),
        None => {
            let more = reasons.len().saturating_sub(4);
            reasons.truncate(4);
            let more = if more > 0 { format!("; and {more} more") } else { String::new() };
            Err(format!("{}{more}", reasons.join("; ")))
        }
    }
}

/// Whether this very node can take the instance now; the error says what it lacks, after the node's name.
pub(super) fn fits(service: &Service, candidate: &Candidate<'_>) -> Result<(), String> {
    let Candidate { node, fresh, .. } = candidate;
    let needs = &service.request.needs;
    let facts = &node.facts;
    if !needs.nodes.is_empty() && !needs.nodes.iter().any(|name| *name == node.host || name == node.id.as_str()) {
        return Err("is not among the nodes asked for".into());
    }
    if !fresh {
        return Err("has not reported for a while".into());
    }
    let technology = service.technology();
    if !facts.technologies.contains(&technology) {
        return Err(format!("does not run {technology}"));
    }
    // Towards a node that does not say what it has, nothing is assumed.
    let lacks = |have: Option<u64>, need: u64| have.is_some_and(|have| have < need);
    if lacks(facts.memory_available_mib, needs.memory_mib) {
        return Err(format!("has less than {} MiB of memory left", needs.memory_mib));
    }
    if lacks(facts.vcpus, needs.vcpus) {
        return Err(format!("has less than {} CPUs", needs.vcpus));
    }
    if facts.vgpus.unwrap_or(0) < needs.vgpus {
        return Err(format!("has less than {} GPUs", needs.vgpus));
    }
    let other_architecture = facts
        .architecture
        .as_ref()
        .is_some_and(|have| !needs.architectures.is_empty() && !needs.architectures.contains(have));
    if other_architecture {
        return Err(format!("is not {}", needs.architectures.join(" or ")));
    }
    Ok(())
}

/// Less is better. The host name decides between equals, so that the same state gives the same choice.
fn weight<'a>(candidate: &Candidate<'a>) -> (bool, usize, usize, u64, &'a str) {
    let busy = candidate.node.facts.cpu_percent.map_or(50, |percent| percent.clamp(0.0, 100.0) as u64 / 10);
    (candidate.port_taken, candidate.of_this_service, candidate.instances, busy, &candidate.node.host)
}
