//! Names for workloads: which addresses a service has, asked of the cluster where this node does not know it yet, and where the
//! instances find who answers.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use super::core::{Core, Effect, Waiter};
use super::link::{self, Bridge};
use super::view::Lookup;
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

/// Who waits for which name, and until when. Pure, like the core beside which it stands.
#[derive(Debug, Default)]
pub(super) struct Naming {
    waiting: BTreeMap<ServiceName, Vec<(Waiter, Duration)>>,
    count: usize,
}

/// What a question about a name leads to at once.
#[derive(Debug)]
pub(super) enum Asked {
    Settled(Lookup),
    /// The cluster is asked.
    Waits(Vec<Effect>),
}

impl Naming {
    pub(super) fn look_up(&mut self, core: &mut Core, service: ServiceName, waiter: Waiter, now: Duration) -> Asked {
        if let Some(named) = core.table.named(&service) {
            core.interests.touch(&named.service, now);
            return Asked::Settled(Lookup::Known(named));
        }
        if !core.interests.is_connected() || self.count >= MOST {
            return Asked::Settled(Lookup::Unreachable);
        }
        let (asked, outcomes) = core.interests.look_up(&service, now);
        let mut effects = Vec::new();
        core.pursue(outcomes, &mut effects);
        if !asked {
            return Asked::Settled(Lookup::Unreachable);
        }
        self.waiting.entry(service).or_default().push((waiter, now + PATIENCE));
        self.count += 1;
        Asked::Waits(effects)
    }

    /// The table has taken an answer about these names: who waited for one of them is told.
    pub(super) fn answered(&mut self, core: &Core, names: &[ServiceName]) -> Vec<(Waiter, Lookup)> {
        let mut settled = Vec::new();
        for name in names {
            let waiters = self.waiting.remove(name).unwrap_or_default();
            self.count -= waiters.len();
            if waiters.is_empty() {
                continue;
            }
            // A service without instances is told like one that there is not.
            let lookup = core.table.named(name).map_or(Lookup::Unknown, Lookup::Known);
            settled.extend(waiters.into_iter().map(|(waiter, _)| (waiter, lookup.clone())));
        }
        settled
    }

    /// Those whose patience is over.
    pub(super) fn expire(&mut self, now: Duration) -> Vec<(Waiter, Lookup)> {
        let mut late = Vec::new();
        for waiters in self.waiting.values_mut() {
            late.extend(waiters.extract_if(.., |(_, until)| *until <= now).map(|(waiter, _)| waiter));
        }
        self.waiting.retain(|_, waiters| !waiters.is_empty());
        self.count -= late.len();
        late.into_iter().map(|waiter| (waiter, Lookup::Unreachable)).collect()
    }
}

/// The names that an answer is about. Older clusters do not repeat the question: then only an answer that knows the service is one.
pub(super) fn answered(answer: &TableAnswer) -> Vec<ServiceName> {
    let asked = match &answer.query {
        Some(Query::Name(name)) => Some(name),
        _ => None,
    };
    asked.into_iter().chain(&answer.service).cloned().collect()
}

impl Gateway {
    /// Where the instances of this subnet find this node.
    pub(super) fn new(subnet: Subnet, bridge: Bridge) -> Self {
        let at = link::gateway(subnet);
        Self { subnet, v4: at.v4, v6: at.v6, ifindex: bridge.ifindex }
    }
}

#[cfg(test)]
mod tests {
    use super::super::core::{Event, Remains, Settings};
    use super::super::datapath::Capacity;
    use super::super::hello::Secret;
    use super::super::table::{ServiceNets, Way};
    use super::*;
    use crate::model::{Command, FamilyPair, Policy, Report, SemanticAddress, TableRow};

    #[test]
    fn name_that_is_not_known_waits_for_the_clusters_answer() {
        let (mut core, mut naming) = (connected(), Naming::default());
        assert_eq!(asked(naming.look_up(&mut core, name(), Waiter(1), at(0))), "asks web");
        assert_eq!(asked(naming.look_up(&mut core, name(), Waiter(2), at(0))), "waits", "asked once however many wait");
        let told = answer(Some(name()), vec![row()]);
        let effects = core.handle(Event::Command(Command::Table(told.clone())), at(1));
        let watched = |effect: &Effect| matches!(effect, Effect::Report(Report::InterestAdd(_)));
        assert!(effects.iter().any(watched), "a name in use is watched: {effects:?}");
        let settled = naming.answered(&core, &answered(&told));
        assert_eq!(settled.iter().map(|(waiter, _)| waiter.0).collect::<Vec<_>>(), [1, 2]);
        let Lookup::Known(named) = &settled[0].1 else { panic!("{settled:?}") };
        let labels: Vec<&str> = named.addresses.iter().map(|(label, _)| label.as_str()).collect();
        assert_eq!((&named.service, labels), (&name(), vec!["rr", "instance-7"]));
        core.handle(Event::Command(Command::Disconnected(String::new())), at(2));
        assert_eq!(asked(naming.look_up(&mut core, name(), Waiter(3), at(2))), "known", "what is known stays known");
        assert_eq!(naming.count, 0);
    }

    #[test]
    fn nobody_waits_for_ever() {
        let (mut core, mut naming) = (connected(), Naming::default());
        naming.look_up(&mut core, name(), Waiter(1), at(0));
        let nobody = answer(None, Vec::new());
        core.handle(Event::Command(Command::Table(nobody.clone())), at(1));
        assert_eq!(naming.answered(&core, &answered(&nobody)), [(Waiter(1), Lookup::Unknown)]);
        assert_eq!(asked(naming.look_up(&mut core, name(), Waiter(2), at(1))), "asks web");
        assert_eq!(naming.expire(at(2)), []);
        assert_eq!(naming.expire(at(3)), [(Waiter(2), Lookup::Unreachable)]);
        assert_eq!(naming.answered(&core, &[name()]), [], "answered once");
        core.handle(Event::Command(Command::Disconnected(String::new())), at(4));
        assert_eq!(asked(naming.look_up(&mut core, name(), Waiter(3), at(4))), "unreachable");
        assert_eq!(naming.count, 0);
    }

    #[test]
    fn those_who_wait_are_bounded() {
        let (mut core, mut naming) = (connected(), Naming::default());
        let waits = |asked: &Asked| matches!(asked, Asked::Waits(_));
        let all = (0..5_000).map(|waiter| naming.look_up(&mut core, name(), Waiter(waiter), at(0)));
        assert_eq!(all.filter(waits).count(), MOST);
        assert_eq!(naming.expire(at(9)).len(), MOST);
        assert!(waits(&naming.look_up(&mut core, name(), Waiter(0), at(9))));
    }

    fn asked(asked: Asked) -> String {
        match asked {
            Asked::Settled(Lookup::Known(_)) => "known".into(),
            Asked::Settled(other) => format!("{other:?}").to_ascii_lowercase(),
            Asked::Waits(effects) => match effects.as_slice() {
                [] => "waits".into(),
                [Effect::Report(Report::TableQuery(Query::Name(name)))] => format!("asks {}", name.short()),
                other => format!("{other:?}"),
            },
        }
    }

    fn connected() -> Core {
        let settings = Settings {
            nets: ServiceNets { v4: ([10, 30, 0, 0].into(), 16), v6: ("fdff::".parse().unwrap(), 16) },
            tunnel_port: 50_103,
            relax_source: false,
            capacity: Capacity::USUAL,
            framed_port: None,
            mtu: 1_450,
            address: [192, 0, 2, 1].into(),
            uplink: Way::default(),
            subnet: None,
            drain: Duration::ZERO,
            seed: 7,
            secret: Secret([7; 2]),
        };
        let (mut core, _) = Core::new(settings, Remains::default());
        core.handle(Event::Command(Command::Connected), at(0));
        core
    }

    const fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn name() -> ServiceName {
        "app.ns.web.ns".parse().unwrap()
    }

    fn answer(service: Option<ServiceName>, rows: Vec<TableRow>) -> TableAnswer {
        TableAnswer { query: Some(Query::Name(name())), service, rows }
    }

    fn row() -> TableRow {
        TableRow {
            number: 7,
            namespace: FamilyPair { v4: Some([10, 18, 2, 2].into()), v6: None },
            instance: FamilyPair { v4: Some([10, 30, 0, 1].into()), v6: None },
            host: [192, 0, 2, 2].into(),
            host_port: 50_103,
            weight: 1,
            services: vec![SemanticAddress { policy: Policy::RoundRobin, address: [10, 30, 9, 0].into() }],
        }
    }
}
