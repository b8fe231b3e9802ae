//! Names for workloads: which addresses a service has, asked of the cluster where this node does not know it yet, and where the
//! instances find who answers.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use super::core::{Core, Effect, Waiter};
use super::link;
use super::view::{Lookup, Named};
use crate::model::{Query, ServiceName, Subnet, TableAnswer};

/// So long somebody who looks up a name waits for the cluster.
const PATIENCE: Duration = Duration::from_secs(2);
/// More than so many who wait are told at once that nobody knows.
const MOST: usize = 1_024;

/// The bridge's own addresses, where the instances send what is not for their neighbours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gateway {
    /// Of the instances.
    pub subnet: Subnet,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    /// The bridge's; another after it was made anew.
    pub ifindex: u32,
}

/// Who waits for which name, and until when.
#[derive(Debug, Default)]
pub(super) struct NameWaits {
    waiting: BTreeMap<ServiceName, Vec<(Waiter, Duration)>>,
    count: usize,
}

impl NameWaits {
    fn push(&mut self, service: ServiceName, waiter: Waiter, until: Duration) {
        self.waiting.entry(service).or_default().push((waiter, until));
        self.count += 1;
    }

    fn take(&mut self, service: &ServiceName) -> Vec<Waiter> {
        let waiters = self.waiting.remove(service).unwrap_or_default();
        self.count -= waiters.len();
        waiters.into_iter().map(|(waiter, _)| waiter).collect()
    }

    fn late(&mut self, now: Duration) -> Vec<Waiter> {
        let mut late = Vec::new();
        for waiters in self.waiting.values_mut() {
            late.extend(waiters.extract_if(.., |(_, until)| *until <= now).map(|(waiter, _)| waiter));
        }
        self.waiting.retain(|_, waiters| !waiters.is_empty());
        self.count -= late.len();
        late
    }
}

impl Core {
    /// Where the instances find this node; `None` until there is a bridge.
    pub(super) fn gateway(&self) -> Option<Gateway> {
        let (bridge, subnet) = (self.bridge?, self.home.subnet()?);
        let at = link::gateway(subnet);
        Some(Gateway { subnet, v4: at.v4, v6: at.v6, ifindex: bridge.ifindex })
    }

    pub(super) fn look_up(&mut self, service: ServiceName, waiter: Waiter, out: &mut Vec<Effect>) {
        if let Some(named) = self.table.named(&service) {
            self.interests.touch(&named.service, self.now);
            out.push(Effect::LookedUp(waiter, Lookup::Known(named)));
            return;
        }
        if !self.connected || self.names.count >= MOST {
            out.push(Effect::LookedUp(waiter, Lookup::Unreachable));
            return;
        }
        let (asked, outcomes) = self.interests.look_up(&service, self.now);
        self.pursue(outcomes, out);
        if asked {
            self.names.push(service, waiter, self.now + PATIENCE);
        } else {
            out.push(Effect::LookedUp(waiter, Lookup::Unreachable));
        }
    }

    /// Older clusters do not repeat the question: then only an answer that knows the service is one to it.
    pub(super) fn release_name_waits(&mut self, answer: &TableAnswer, out: &mut Vec<Effect>) {
        let asked = match &answer.query {
            Some(Query::Name(name)) => Some(name),
            _ => None,
        };
        for name in asked.into_iter().chain(&answer.service) {
            let waiters = self.names.take(name);
            if waiters.is_empty() {
                continue;
            }
            let empty = || answer.service.clone().map(|service| Named { service, addresses: Vec::new() });
            let lookup = self.table.named(name).or_else(empty).map_or(Lookup::Unknown, Lookup::Known);
            out.extend(waiters.into_iter().map(|waiter| Effect::LookedUp(waiter, lookup.clone())));
        }
    }

    pub(super) fn expire_name_waits(&mut self, out: &mut Vec<Effect>) {
        let late = self.names.late(self.now);
        out.extend(late.into_iter().map(|waiter| Effect::LookedUp(waiter, Lookup::Unreachable)));
    }
}
