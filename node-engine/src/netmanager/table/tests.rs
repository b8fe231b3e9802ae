//! The table seen from outside: answers and leases in, deltas out, applied to a datapath of plain maps.

mod choosing;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netmanager_common::abi::{PEER_OURS, POLICY_INSTANCE, POLICY_TURN, Service, Slot};
use proptest::prelude::*;

use super::*;
use crate::model::{SemanticAddress, TableRow};
use crate::netmanager::datapath::FlowRow;
use crate::netmanager::view::Choice;

const HOST: Addr = Addr::v4([192, 0, 2, 1]);

#[test]
fn remote_instances_are_projected_in_both_families() {
    let mut lab = Lab::new();
    let delta = lab.update(&answer("web", &[row(0, 2), row(1, 3)]));
    assert_eq!((delta.peers.len(), delta.slots.len(), delta.services.len()), (2, 4, 6));
    let any = lab.service("10.30.9.0");
    assert_eq!((any.policy, any.count), (POLICY_TURN, 2));
    assert_eq!(lab.candidates("10.30.9.0"), ["10.18.2.2", "10.18.3.3"]);
    assert_eq!(lab.candidates("fdff:2000::9:0"), ["fc00::2:2", "fc00::3:3"]);
    let one = lab.service("10.30.0.3");
    assert_eq!((one.policy, one.count, one.first), (POLICY_INSTANCE, 1, lab.slot_of("10.18.3.3").0));
    let slot = lab.slot_of("10.18.2.2").1;
    assert_eq!(lab.peers[&slot.peer].host, addr("192.0.2.2"));
    assert_eq!(lab.peers[&slot.peer].port, 50103u16.to_be_bytes());
    assert!(
        lab.update(&answer("web", &[row(0, 2), row(1, 3)])) == TableDelta::default(),
        "the same again is no change"
    );
}

#[test]
fn only_what_changed_is_in_the_delta() {
    let mut lab = Lab::new();
    lab.update(&answer("web", &[row(0, 2), row(1, 3)]));
    let before = lab.service("10.30.9.0");
    let delta = lab.update(&answer("web", &[row(0, 2), row(1, 3), row(2, 3)]));
    assert_eq!(delta.peers, [], "the node is known already");
    assert_eq!(delta.slots.len(), 2);
    assert_eq!(delta.services.len(), 4, "two service addresses and two instance addresses");
    let after = lab.service("10.30.9.0");
    assert_eq!((after.id, after.epoch, after.count), (before.id, before.epoch + 1, 3));
}

#[test]
fn node_that_changes_its_address_keeps_slots() {
    let mut lab = Lab::new();
    lab.update(&answer("web", &[row(0, 2)]));
    let (number, slot) = lab.slot_of("10.18.2.2");
    let moved = TableRow { host: [192, 0, 2, 77].into(), ..row(0, 2) };
    let delta = lab.update(&answer("web", &[moved]));
    let (again, after) = lab.slot_of("10.18.2.2");
    assert_eq!((number, slot.generation), (again, after.generation));
    assert_ne!(slot.peer, after.peer);
    assert_eq!(lab.peers[&after.peer].host, addr("192.0.2.77"));
    assert!(delta.services.is_empty());
    assert!(!lab.peers.contains_key(&slot.peer), "the old address is no peer any more");
}

#[test]
fn instance_that_goes_raises_the_generation_for_its_flows_only() {
    let mut lab = Lab::new();
    lab.update(&answer("web", &[row(0, 2), row(1, 3)]));
    let (gone, before) = lab.slot_of("10.18.2.2");
    let (stays, other) = lab.slot_of("10.18.3.3");
    lab.update(&answer("web", &[row(1, 3)]));
    assert_eq!(lab.slots[&gone], Slot { generation: before.generation + 1, ..Slot::default() });
    assert_eq!(lab.slots[&stays], other);
    assert!(!lab.table.serves(addr("10.30.0.2")), "its instance address means nobody");
    lab.update(&answer("web", &[TableRow { number: 5, ..row(0, 2) }, row(1, 3)]));
    assert_ne!(lab.slot_of("10.18.2.2").0, gone, "a freed number is not the next to be given");
}

#[test]
fn same_instance_in_a_new_namespace_is_another_one() {
    let mut lab = Lab::new();
    lab.update(&answer("web", &[row(0, 2)]));
    let (number, before) = lab.slot_of("10.18.2.2");
    let again = TableRow { namespace: row(0, 4).namespace, host: row(0, 4).host, ..row(0, 2) };
    lab.update(&answer("web", &[again]));
    let (same, after) = lab.slot_of("10.18.4.2");
    assert_eq!((number, before.generation + 2), (same, after.generation));
}

#[test]
fn service_without_instances_keeps_its_address_until_the_cluster_forgets_it() {
    let mut lab = Lab::new();
    lab.update(&answer("web", &[row(0, 2)]));
    lab.update(&answer("web", &[]));
    assert_eq!(lab.service("10.30.9.0").count, 0);
    assert!(!lab.table.serves(addr("10.30.0.2")));
    lab.update(&answer("web", &[]));
    assert_eq!(lab.service("10.30.9.0").count, 0, "also when it is said twice");
    lab.update(&unknown(Query::Name(name("web"))));
    assert!(!lab.table.serves(addr("10.30.9.0")));
    assert!(lab.table.entries.is_empty());
}

#[test]
fn local_instance_is_one_by_lease_not_by_host() {
    let mut lab = Lab::new();
    lab.attach(local("web", 0, 1));
    let endpoint = lab.endpoints[&addr("10.18.1.2")];
    assert_eq!((endpoint.instance, endpoint.ifindex), (Addr::NONE, 7));
    lab.update(&answer("web", &[TableRow { host: [192, 0, 2, 99].into(), ..row(0, 1) }]));
    assert_eq!(lab.slot_of("10.18.1.2").1.peer, 0);
    assert_eq!(lab.endpoints[&addr("10.18.1.2")].instance, addr("10.30.0.2"));
    assert_eq!(lab.endpoints[&addr("fc00::1:2")].instance, addr("fdff::2"));
    assert!(lab.peers.is_empty());
    lab.update(&unknown(Query::Name(name("web"))));
    assert_eq!(lab.endpoints[&addr("10.18.1.2")].instance, addr("10.30.0.2"), "it goes on being able to send");
    lab.detach("web", 0);
    assert!(lab.endpoints.is_empty());
}

#[test]
fn rows_before_the_lease_wait_for_it() {
    let mut lab = Lab::new();
    lab.update(&answer("web", &[row(0, 1), row(1, 2)]));
    assert_eq!(lab.candidates("10.30.9.0"), ["10.18.2.3"], "said to be here, and is not");
    assert_eq!(lab.table.refusals().stale, 2);
    lab.attach(local("web", 0, 1));
    assert_eq!(lab.candidates("10.30.9.0"), ["10.18.1.2", "10.18.2.3"]);
    assert_eq!(lab.endpoints[&addr("10.18.1.2")].instance, addr("10.30.0.2"));
    lab.detach("web", 0);
    assert_eq!(lab.candidates("10.30.9.0"), ["10.18.2.3"]);
}

#[test]
fn nobody_else_gets_a_leased_address() {
    let mut lab = Lab::new();
    lab.attach(local("web", 0, 1));
    lab.update(&answer("web", &[row(0, 1)]));
    let thief = TableRow { namespace: row(0, 1).namespace, ..row(7, 5) };
    lab.update(&answer("bad", &[thief]));
    assert_eq!(lab.slot_of("10.18.1.2").1.instance, addr("10.30.0.2"));
    assert!(!lab.table.serves(addr("10.30.0.9")));
}

#[test]
fn newest_claim_to_an_address_wins() {
    let mut lab = Lab::new();
    lab.update(&answer("old", &[row(0, 2)]));
    let recycled = TableRow { services: vec![rr("10.30.8.0")], ..row(0, 2) };
    lab.update(&answer("new", &[recycled]));
    assert_eq!(lab.candidates("10.30.8.0"), ["10.18.2.2"]);
    assert_eq!(lab.service("10.30.9.0").count, 0, "the old one has lost its only instance");
    assert_eq!(lab.table.owner(addr("10.30.0.2")), Some(&name("new")));
    lab.remove("new");
    assert_eq!(lab.candidates("10.30.9.0"), ["10.18.2.2"], "and has it back when the claim ends");
}

#[test]
fn remembered_claim_loses_to_a_statement() {
    let mut lab = Lab::new();
    lab.update(&answer("a", &[row(0, 2)]));
    lab.update(&answer("b", &[row(1, 3)]));
    assert_eq!(lab.candidates("10.30.9.0"), ["10.18.3.3"]);
    lab.update(&answer("b", &[]));
    assert_eq!(lab.candidates("10.30.9.0"), ["10.18.2.2"]);
}

#[test]
fn policies_become_numbers() {
    let mut lab = Lab::new();
    let closest = SemanticAddress { policy: Policy::Closest, address: ip("fdff:1000::1") };
    lab.update(&answer("web", &[TableRow { services: vec![rr("10.30.9.0"), closest], ..row(0, 2) }]));
    assert_eq!(lab.service("10.30.9.0").policy, POLICY_TURN);
    assert_eq!(lab.service("fdff:1000::1").policy, POLICY_TURN);
    assert_eq!(lab.candidates("fdff:1000::1"), ["fc00::2:2"]);
}

#[test]
fn ways_and_hellos_change_the_peer_alone() {
    let mut lab = Lab::new();
    lab.apply(|table| table.set_uplink(Way { source: HOST, ifindex: 2, mtu: 0 }));
    lab.update(&answer("web", &[row(0, 2), TableRow { host: ip("2001:db8::3"), ..row(1, 3) }]));
    let v4 = lab.slot_of("10.18.2.2").1.peer;
    let v6 = lab.slot_of("10.18.3.3").1.peer;
    assert_eq!((lab.peers[&v4].source, lab.peers[&v4].ifindex), (HOST, 2));
    assert_eq!(lab.peers[&v6].source, Addr::NONE, "no way in this family yet");
    let way = Way { source: addr("2001:db8::1"), ifindex: 3, mtu: 0 };
    let delta = lab.apply(|table| table.set_ways([(addr("2001:db8::3"), way)]));
    assert_eq!((delta.peers.len(), delta.slots.len(), delta.services.len()), (1, 0, 0));
    assert_eq!((lab.peers[&v6].source, lab.peers[&v6].ifindex), (way.source, 3));
    lab.apply(|table| table.set_ours(v6, true));
    assert_eq!(lab.peers[&v6].flags, PEER_OURS);
    assert_eq!(lab.apply(|table| table.set_ours(v6, true)), TableDelta::default());
    assert_eq!(lab.apply(|table| table.set_ours(999, true)), TableDelta::default());
    lab.apply(|table| table.set_ours(v6, false));
    assert_eq!(lab.peers[&v6].flags, 0);
}

#[test]
fn a_path_is_as_wide_as_measured_or_as_routes_say() {
    let mut lab = Lab::new();
    lab.update(&answer("web", &[row(0, 2)]));
    let peer = lab.slot_of("10.18.2.2").1.peer;
    let narrow = |mtu| Way { source: HOST, ifindex: 2, mtu };
    lab.apply(|table| table.set_ways([(addr("192.0.2.2"), narrow(1_350))]));
    assert_eq!(lab.peers[&peer].mtu, 1_350);
    lab.apply(|table| table.set_ours(peer, true));
    let delta = lab.apply(|table| table.set_path_mtu(peer, Some(650)));
    assert_eq!((lab.peers[&peer].mtu, delta.peers.len(), delta.config), (650, 1, None), "flows note nothing of it");
    assert_eq!(lab.table.path_mtu(peer), Some(650));
    lab.apply(|table| table.set_ways([(addr("192.0.2.2"), narrow(1_300))]));
    assert_eq!(lab.peers[&peer].mtu, 650, "what was measured counts");
    lab.restart();
    assert_eq!(lab.table.path_mtu(peer), Some(650), "and outlives the daemon");
    lab.apply(|table| table.set_path_mtu(peer, Some(0)));
    assert_eq!(lab.peers[&peer].mtu, 0);
    lab.apply(|table| table.set_path_mtu(peer, None));
    assert_eq!(lab.apply(|table| table.set_path_mtu(999, Some(1))), TableDelta::default());
}

#[test]
fn own_host_address_decides_what_is_stale() {
    let mut lab = Lab::new();
    lab.update(&answer("web", &[row(0, 2)]));
    lab.apply(|table| table.set_node(addr("192.0.2.2"), None));
    assert_eq!(lab.service("10.30.9.0").count, 0);
    lab.apply(|table| table.set_node(HOST, None));
    assert_eq!(lab.candidates("10.30.9.0"), ["10.18.2.2"]);
    let subnet = Subnet { v4: Ipv4Addr::new(10, 18, 2, 0), v6: "fc00::2:0".parse().unwrap() };
    lab.apply(|table| table.set_node(HOST, Some(subnet)));
    assert_eq!(lab.service("10.30.9.0").count, 0, "in our subnet, and not leased");
}

#[test]
fn restart_keeps_what_flows_depend_on() {
    let mut lab = Lab::new();
    lab.attach(local("web", 0, 1));
    lab.update(&answer("web", &[row(0, 1), row(1, 2)]));
    lab.update(&answer("db", &[TableRow { services: vec![rr("10.30.8.0")], ..row(3, 3) }]));
    lab.update(&answer("gone", &[TableRow { services: vec![rr("10.30.7.0")], ..row(4, 4) }]));
    let ours = lab.slot_of("10.18.2.3").1.peer;
    lab.apply(|table| table.set_ours(ours, true));

    let before = lab.clone();
    lab.restart();
    assert_eq!(lab.without_endpoints(), before.without_endpoints(), "nothing is touched before anybody is heard");
    lab.attach(Local { own: FamilyPair::default(), ..local("web", 0, 1) });
    lab.apply(ServiceTable::drop_foreign_endpoints);
    assert_eq!(lab.endpoints, before.endpoints, "the own address is kept too");
    let unclaimed: BTreeSet<_> = lab.table.unclaimed().into_iter().collect();
    assert!(unclaimed.contains(&addr("10.30.8.0")) && unclaimed.contains(&addr("fdff::2")));

    lab.update(&answer("web", &[row(0, 1), row(1, 2)]));
    lab.update(&answer("db", &[TableRow { services: vec![rr("10.30.8.0")], ..row(3, 3) }]));
    for namespace in ["10.18.1.2", "10.18.2.3", "fc00::2:3", "10.18.3.5", "fc00::3:5"] {
        assert_eq!(lab.slot_of(namespace), before.slot_of(namespace), "{namespace}");
    }
    assert_eq!(lab.service("10.30.9.0").id, before.service("10.30.9.0").id);
    assert_eq!(lab.peers, before.peers, "numbers and hellos");

    for address in lab.table.unclaimed() {
        lab.update(&unknown(Query::Address(address.into())));
    }
    assert_eq!(lab.table.counts().adopted, 0);
    assert!(!lab.slots.values().any(|slot| slot.namespace == addr("10.18.4.6")));
    assert!(!lab.services.contains_key(&addr("10.30.7.0")));
    assert!(!lab.peers.values().any(|peer| peer.host == addr("192.0.2.4")));
    lab.check();
}

#[test]
fn garbage_in_a_snapshot_is_not_adopted() {
    let slot = Slot { generation: 5, peer: 3, namespace: addr("10.18.2.2"), instance: addr("10.30.0.2") };
    let service = Service { id: 1, epoch: 1, count: 1, policy: POLICY_INSTANCE, first: 1 };
    let snapshot = Snapshot {
        epoch: 1,
        slots: vec![
            (0, slot),
            (1, slot),
            (u32::MAX, slot),
            (2, Slot { peer: 0, ..slot }),
            (3, Slot { peer: 0, ..slot }),
        ],
        peers: vec![(0, Peer { host: HOST, ..Peer::default() }), (3, Peer::default())],
        services: vec![(addr("10.30.0.2"), service), (addr("10.30.0.3"), service)],
        endpoints: vec![],
    };
    let mut table = ServiceTable::new(nets(), HOST);
    let delta = table.adopt(&snapshot);
    assert_eq!(
        delta.slots.iter().map(|(number, slot)| (*number, slot.generation)).collect::<Vec<_>>(),
        [(1, 6), (3, 6)]
    );
    assert_eq!(delta.services_gone, [addr("10.30.0.3")], "two rows cannot share an id");
    assert_eq!(table.counts().adopted, 1);
}

#[test]
fn full_table_is_counted_and_heals() {
    let mut lab = Lab::new();
    for host in 0..=MAX_PEERS_TESTED {
        let [_, _, high, low] = host.to_be_bytes();
        let row = TableRow {
            number: host,
            namespace: FamilyPair { v4: Some([10, 20, high, low].into()), v6: None },
            instance: FamilyPair { v4: Some([10, 30, high, low].into()), v6: None },
            host: [198, 18, high, low].into(),
            host_port: 1,
            weight: 1,
            services: vec![],
        };
        lab.update(&answer(&format!("s{host}"), &[row]));
    }
    assert!(lab.table.counts().full > 0);
    assert_eq!(lab.table.counts().peers, netmanager_common::MAX_PEERS as usize - 1);
    lab.check();
    lab.remove("s0");
    let last = [10, 20, 16, 0].into();
    let row = TableRow {
        number: 4096,
        namespace: FamilyPair { v4: Some(last), v6: None },
        instance: FamilyPair { v4: Some([10, 30, 16, 0].into()), v6: None },
        host: [198, 18, 16, 0].into(),
        host_port: 1,
        weight: 1,
        services: vec![],
    };
    lab.update(&answer("s4096", &[row]));
    assert!(lab.slots.values().any(|slot| slot.namespace == Addr::from(last)));
}

const MAX_PEERS_TESTED: u32 = netmanager_common::MAX_PEERS;

#[derive(Clone, Debug)]
enum Step {
    Answer(u8, Vec<TableRow>, bool),
    Unknown(u8),
    Remove(u8),
    Attach(u8, u32, u8),
    Detach(u8, u32),
    Host(u8),
    Ours(u32, bool),
    Restart,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
    #[test]
    fn projection_depends_on_the_final_state_alone(steps in prop::collection::vec(step(), 1..40)) {
        let mut lab = Lab::new();
        for step in &steps {
            lab.step(step);
            lab.check();
        }
        if steps.iter().any(|step| matches!(step, Step::Restart)) {
            lab.finish_restart();
        }
        let fresh = lab.replayed();
        prop_assert_eq!(lab.meaning(), fresh.meaning());
        for address in lab.services.keys().filter(|address| !fresh.services.contains_key(address)) {
            prop_assert_eq!(lab.services[address].0.count, 0, "only a remembered address may be left");
        }
    }

    #[test]
    fn restart_loses_no_slot_that_is_still_there(steps in prop::collection::vec(step(), 1..30)) {
        let mut lab = Lab::new();
        for step in &steps {
            lab.step(&apart(step));
        }
        lab.finish_restart();
        let before = lab.clone();
        lab.restart();
        lab.check();
        lab.finish_restart();
        prop_assert_eq!(&lab.slots, &before.slots);
        prop_assert_eq!(&lab.peers, &before.peers);
        let ids = |lab: &Lab| lab.services.iter().filter(|(_, (row, _))| row.count > 0).map(|(a, (row, _))| (*a, row.id)).collect::<Vec<_>>();
        prop_assert_eq!(ids(&lab), ids(&before));
    }
}

fn step() -> impl Strategy<Value = Step> {
    let service = 0u8..4;
    prop_oneof![
        6 => (service.clone(), prop::collection::vec(any_row(), 0..5), any::<bool>()).prop_map(|(s, rows, by)| Step::Answer(s, rows, by)),
        1 => service.clone().prop_map(Step::Unknown),
        1 => service.clone().prop_map(Step::Remove),
        2 => (service.clone(), 0u32..4, 0u8..4).prop_map(|(s, n, host)| Step::Attach(s, n, host)),
        1 => (service, 0u32..4).prop_map(|(s, n)| Step::Detach(s, n)),
        1 => (1u8..4).prop_map(Step::Host),
        1 => (0u32..5, any::<bool>()).prop_map(|(n, ours)| Step::Ours(n, ours)),
        1 => Just(Step::Restart),
    ]
}

/// Few addresses, so that they clash.
fn any_row() -> impl Strategy<Value = TableRow> {
    (0u32..4, 1u8..5, 0u8..4, 0u8..4, 0u8..3, any::<(bool, bool)>()).prop_map(
        |(number, host, namespace, instance, service, (v4, v6))| TableRow {
            number,
            namespace: FamilyPair {
                v4: v4.then_some([10, 18, host, namespace].into()),
                v6: v6.then(|| Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, host.into(), namespace.into())),
            },
            instance: FamilyPair {
                v4: Some([10, 30, 0, instance].into()),
                v6: Some(Ipv6Addr::new(0xfdff, 0, 0, 0, 0, 0, 0, instance.into())),
            },
            host: [192, 0, 2, host].into(),
            host_port: 50103,
            weight: 1,
            services: vec![
                rr(&format!("10.30.0.{}", service + 2)),
                SemanticAddress {
                    policy: if service == 0 { Policy::Closest } else { Policy::RoundRobin },
                    address: ip(&format!("fdff:2000::{service}")),
                },
            ],
        },
    )
}

/// The same step with addresses of the service's own: services that contradict each other need not survive a restart whole.
fn apart(step: &Step) -> Step {
    let Step::Answer(service, rows, _) = step else { return step.clone() };
    let own = |mut row: TableRow| {
        row.namespace.v4 = row.namespace.v4.map(|v4| Ipv4Addr::from_bits(v4.to_bits() + 16 * u32::from(*service)));
        row.namespace.v6 = row.namespace.v6.map(|v6| Ipv6Addr::from_bits(v6.to_bits() + 16 * u128::from(*service)));
        row.instance.v4 = row.instance.v4.map(|v4| Ipv4Addr::from_bits(v4.to_bits() + 16 * u32::from(*service)));
        row.instance.v6 = row.instance.v6.map(|v6| Ipv6Addr::from_bits(v6.to_bits() + 16 * u128::from(*service)));
        row.services = vec![rr(&format!("10.30.7.{service}")), rr(&format!("fdff:2000::{service}"))];
        row
    };
    Step::Answer(*service, rows.iter().cloned().map(own).collect(), false)
}

/// A table and a datapath that applies its deltas.
#[derive(Clone, Debug)]
struct Lab {
    table: ServiceTable,
    slots: BTreeMap<u32, Slot>,
    peers: BTreeMap<u32, Peer>,
    services: BTreeMap<Addr, (Service, Vec<u32>)>,
    endpoints: BTreeMap<Addr, Endpoint>,
    /// Last answers, oldest first, and what is connected: the state that the projection should depend on alone.
    answers: Vec<TableAnswer>,
    locals: BTreeMap<InstanceId, Local>,
    host: Addr,
}

impl Lab {
    fn new() -> Self {
        Self {
            table: ServiceTable::new(nets(), HOST),
            slots: BTreeMap::new(),
            peers: BTreeMap::new(),
            services: BTreeMap::new(),
            endpoints: BTreeMap::new(),
            answers: Vec::new(),
            locals: BTreeMap::new(),
            host: HOST,
        }
    }

    fn update(&mut self, answer: &TableAnswer) -> TableDelta {
        let service = answer.service.clone().or(match &answer.query {
            Some(Query::Name(name)) => Some(name.clone()),
            _ => None,
        });
        if let Some(service) = service {
            self.answers.retain(|old| old.service.as_ref() != Some(&service));
            if answer.service.is_some() {
                self.answers.push(answer.clone());
            }
        }
        self.apply(|table| table.update(answer))
    }

    fn remove(&mut self, service: &str) {
        self.answers.retain(|old| old.service.as_ref() != Some(&name(service)));
        self.apply(|table| table.remove(&name(service)));
    }

    fn attach(&mut self, local: Local) {
        self.locals.retain(|_, other| other.addresses != local.addresses);
        self.locals.insert(local.instance.clone(), local.clone());
        self.apply(|table| table.attach(local));
    }

    fn detach(&mut self, service: &str, number: u32) {
        let instance = InstanceId { service: name(service), number };
        self.locals.remove(&instance);
        self.apply(|table| table.detach(&instance));
    }

    fn apply(&mut self, change: impl FnOnce(&mut ServiceTable) -> TableDelta) -> TableDelta {
        let delta = change(&mut self.table);
        for (number, peer) in &delta.peers {
            match *peer == Peer::default() {
                true => self.peers.remove(number),
                false => self.peers.insert(*number, *peer),
            };
        }
        for (number, slot) in &delta.slots {
            let before = self.slots.insert(*number, *slot).unwrap_or_default();
            assert!(slot.generation >= before.generation, "generations only rise");
            let same = (before.namespace, before.instance) == (slot.namespace, slot.instance);
            assert_eq!(same && before.live(), before.generation == slot.generation);
        }
        for (address, row, candidates) in &delta.services {
            let before = self.services.insert(*address, (*row, candidates.clone()));
            assert!(
                before.is_none_or(|(old, _)| old.id != row.id || old.epoch < row.epoch),
                "a list is never rewritten in place"
            );
        }
        for (address, endpoint) in &delta.endpoints {
            self.endpoints.insert(*address, *endpoint);
        }
        self.services.retain(|address, _| !delta.services_gone.contains(address));
        self.endpoints.retain(|address, _| !delta.endpoints_gone.contains(address));
        delta
    }

    fn step(&mut self, step: &Step) {
        let names = ["a", "b", "c", "d"];
        match step {
            Step::Answer(service, rows, by_address) => {
                let query = by_address.then(|| Query::Address(ip(&format!("10.30.0.{service}"))));
                self.update(&TableAnswer { query, ..answer(names[usize::from(*service)], rows) });
            }
            Step::Unknown(service) => drop(self.update(&unknown(Query::Name(name(names[usize::from(*service)]))))),
            Step::Remove(service) => self.remove(names[usize::from(*service)]),
            Step::Attach(service, number, offset) => {
                let mut local = local(names[usize::from(*service)], *number, 1);
                local.addresses.v4 = [10, 18, 1, *offset].into();
                local.addresses.v6 = Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 1, (*offset).into());
                self.attach(local);
            }
            Step::Detach(service, number) => self.detach(names[usize::from(*service)], *number),
            Step::Host(host) => {
                self.host = Addr::v4([192, 0, 2, *host]);
                let host = self.host;
                self.apply(|table| table.set_node(host, None));
            }
            Step::Ours(number, ours) => drop(self.apply(|table| table.set_ours(*number, *ours))),
            Step::Restart => self.restart(),
        }
    }

    /// A new table adopts what the datapath has. Leases are known again at once, answers are not.
    fn restart(&mut self) {
        let snapshot = Snapshot {
            epoch: 1,
            slots: self.slots.clone().into_iter().collect(),
            peers: self.peers.clone().into_iter().collect(),
            services: self.services.iter().map(|(address, (row, _))| (*address, *row)).collect(),
            endpoints: self.endpoints.clone().into_iter().collect(),
        };
        self.table = ServiceTable::new(nets(), self.host);
        self.apply(|table| table.adopt(&snapshot));
        for local in self.locals.clone().into_values() {
            self.apply(|table| table.attach(local));
        }
        self.apply(ServiceTable::drop_foreign_endpoints);
    }

    /// The cluster answers everything again, and knows nothing of the rest.
    fn finish_restart(&mut self) {
        for answer in self.answers.clone() {
            self.apply(|table| table.update(&TableAnswer { query: None, ..answer }));
        }
        for address in self.table.unclaimed() {
            self.apply(|table| table.update(&unknown(Query::Address(address.into()))));
        }
    }

    /// What a table that only ever saw the final state would project.
    fn replayed(&self) -> Self {
        let mut fresh = Self::new();
        fresh.host = self.host;
        fresh.apply(|table| table.set_node(self.host, None));
        for answer in &self.answers {
            fresh.update(answer);
        }
        for local in self.locals.values() {
            fresh.attach(Local { own: self.table.own(&local.instance), ..local.clone() });
        }
        fresh
    }

    /// The projection without its numbers.
    fn meaning(&self) -> impl PartialEq + std::fmt::Debug + use<> {
        let place = |number: &u32| {
            let slot = &self.slots[number];
            let peer = (slot.peer != 0).then(|| (self.peers[&slot.peer].host, self.peers[&slot.peer].port));
            (slot.namespace, slot.instance, peer)
        };
        let slots: BTreeSet<_> =
            self.slots.iter().filter(|(_, slot)| slot.live()).map(|(number, _)| place(number)).collect();
        let peers: BTreeSet<_> = self.peers.values().map(|peer| (peer.host, peer.port)).collect();
        let services: BTreeMap<_, _> = self
            .services
            .iter()
            .filter(|(_, (row, _))| row.count > 0)
            .map(|(address, (row, list))| (*address, (row.policy, list.iter().map(place).collect::<Vec<_>>())))
            .collect();
        let endpoints: BTreeMap<_, _> =
            self.endpoints.iter().map(|(a, e)| (*a, (e.instance, e.ifindex, e.mac))).collect();
        (slots, peers, services, endpoints)
    }

    fn without_endpoints(&self) -> impl PartialEq + std::fmt::Debug + use<> {
        (self.slots.clone(), self.peers.clone(), self.services.clone())
    }

    /// What holds at every moment.
    fn check(&self) {
        let live: Vec<_> = self.slots.iter().filter(|(_, slot)| slot.live()).collect();
        let distinct: BTreeSet<_> = live.iter().map(|(_, slot)| slot.namespace).collect();
        assert_eq!(distinct.len(), live.len(), "two instances share a namespace address");
        assert!(
            live.iter().all(|(number, slot)| **number != 0 && (slot.peer == 0 || self.peers.contains_key(&slot.peer)))
        );
        let ids: BTreeSet<_> = self.services.values().map(|(row, _)| row.id).collect();
        assert_eq!(ids.len(), self.services.len());
        for (address, (row, list)) in &self.services {
            if self.table.unclaimed().contains(address) {
                continue;
            }
            assert_eq!(row.count as usize, list.len());
            assert_eq!(row.first, list.first().copied().unwrap_or(0));
            for slot in list {
                assert!(self.slots[slot].live());
                assert_eq!(self.slots[slot].namespace.is_v4(), address.is_v4());
            }
            if row.policy == POLICY_INSTANCE && row.count == 1 {
                assert_eq!(self.slots[&row.first].instance, *address);
            }
        }
        let full = self.table.full();
        assert_eq!(full.peers.into_iter().collect::<BTreeMap<_, _>>(), self.peers);
        assert_eq!(full.slots.into_iter().collect::<BTreeMap<_, _>>(), self.slots);
        assert_eq!(full.endpoints.into_iter().collect::<BTreeMap<_, _>>(), self.endpoints);
        assert_eq!(full.services.len() + self.table.unclaimed().len(), self.services.len());
    }

    fn service(&self, address: &str) -> Service {
        self.services[&addr(address)].0
    }

    fn candidates(&self, address: &str) -> Vec<String> {
        self.services[&addr(address)]
            .1
            .iter()
            .map(|slot| IpAddr::from(self.slots[slot].namespace).to_string())
            .collect()
    }

    fn slot_of(&self, namespace: &str) -> (u32, Slot) {
        let found = self.slots.iter().find(|(_, slot)| slot.live() && slot.namespace == addr(namespace));
        found.map(|(number, slot)| (*number, *slot)).unwrap_or_else(|| panic!("no slot for {namespace}"))
    }
}

#[test]
fn people_see_names_in_place_of_numbers() {
    let mut table = ServiceTable::new(nets(), addr("192.0.2.1"));
    table.attach(local("client", 3, 1));
    table.update(&answer("web", &[row(0, 2), row(1, 3)]));
    let flow = |service: &str, slot: u32, generation: u32| FlowRow {
        source: addr("10.18.1.77"),
        service: addr(service),
        source_port: 40_000,
        service_port: 80,
        protocol: 6,
        slot,
        generation,
        idle: None,
    };
    let client = local("client", 3, 1).addresses.v4;
    let slot = table.projection.live_slots().find(|(_, slot)| slot.namespace == addr("10.18.3.3")).expect("a slot").0;
    let flows = vec![
        FlowRow { source: client.into(), ..flow("10.30.9.0", slot, 1) },
        FlowRow { source: client.into(), source_port: 7, ..flow("10.30.9.0", slot, 3) },
        flow("10.30.77.77", 9_999, 1),
    ];
    let all = Choice { limit: 10, ..Choice::default() };
    let page = table.flow_views(&all, flows.clone());
    assert_eq!((page.total, page.rows.len()), (3, 3));
    let named = page.rows.iter().find(|flow| flow.row.source_port == 40_000 && flow.client.is_some()).expect("named");
    assert_eq!(named.client, Some(InstanceId { service: name("client"), number: 3 }));
    assert_eq!((named.service.clone(), named.policy), (Some(name("web")), "rr"));
    assert_eq!(named.chosen, Some(InstanceId { service: name("web"), number: 1 }));
    assert_eq!(named.node, Some(ip("192.0.2.3")));
    let void = page.rows.iter().find(|flow| flow.row.source_port == 7).expect("there");
    assert_eq!((void.chosen.clone(), void.node), (None, None), "another generation is another instance");
    assert_eq!(page.rows[0].service, None, "nobody knows it");

    let of = |instance: &str, number| Choice { instance: Some((instance.into(), number)), ..all.clone() };
    for (choice, total) in [
        (Choice { service: Some("web".into()), ..all.clone() }, 2),
        (Choice { service: Some("app.ns.web.ns".into()), ..all.clone() }, 2),
        (Choice { service: Some("we".into()), ..all.clone() }, 0),
        (of("client", Some(3)), 2),
        (of("client", Some(4)), 0),
        (of("web", Some(1)), 1),
        (of("web", None), 1),
    ] {
        assert_eq!(table.flow_views(&choice, flows.clone()).total, total, "{choice:?}");
    }
    let one = table.flow_views(&Choice { limit: 1, ..all.clone() }, flows.clone());
    assert_eq!((one.total, one.rows.len()), (3, 1));

    let web = Choice { service: Some("web".into()), ..all.clone() };
    let services = table.service_views(&web, &flows, &[]);
    assert_eq!(services.rows.len(), 1);
    let service = &services.rows[0];
    let addresses: Vec<_> = service.addresses.iter().map(|known| (known.policy, known.address)).collect();
    assert_eq!(addresses, [("rr", ip("10.30.9.0")), ("rr", ip("fdff:2000::9:0"))]);
    assert_eq!(service.flows, 2);
    let nodes: Vec<_> = service.instances.iter().map(|instance| (instance.number, instance.node)).collect();
    assert_eq!(nodes, [(0, Some(ip("192.0.2.2"))), (1, Some(ip("192.0.2.3")))]);
    assert_eq!(service.instances[1].namespace.len(), 2);

    let peers = table.peer_views();
    let slots: Vec<_> = peers.iter().map(|peer| (peer.address.to_string(), peer.slots, peer.ours)).collect();
    assert_eq!(slots, [("192.0.2.2:50103".into(), 2, false), ("192.0.2.3:50103".into(), 2, false)]);
}

fn nets() -> ServiceNets {
    ServiceNets { v4: (Ipv4Addr::new(10, 30, 0, 0), 16), v6: ("fdff::".parse().unwrap(), 16) }
}

fn name(short: &str) -> ServiceName {
    format!("app.ns.{short}.ns").parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn addr(text: &str) -> Addr {
    ip(text).into()
}

fn rr(address: &str) -> SemanticAddress {
    SemanticAddress { policy: Policy::RoundRobin, address: ip(address) }
}

/// Instance `number` on node `host`: 10.18.host.number+2, 10.30.0.number+2, node 192.0.2.host.
fn row(number: u32, host: u8) -> TableRow {
    let offset = u8::try_from(number).unwrap() + 2;
    TableRow {
        number,
        namespace: FamilyPair {
            v4: Some([10, 18, host, offset].into()),
            v6: Some(Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, host.into(), offset.into())),
        },
        instance: FamilyPair {
            v4: Some([10, 30, 0, offset].into()),
            v6: Some(Ipv6Addr::new(0xfdff, 0, 0, 0, 0, 0, 0, offset.into())),
        },
        host: [192, 0, 2, host].into(),
        host_port: 50103,
        weight: 1,
        services: vec![rr("10.30.9.0"), rr("fdff:2000::9:0")],
    }
}

fn local(service: &str, number: u32, host: u8) -> Local {
    let FamilyPair { v4, v6 } = row(number, host).namespace;
    Local {
        instance: InstanceId { service: name(service), number },
        addresses: Addresses { v4: v4.unwrap(), v6: v6.unwrap() },
        ifindex: 7,
        mac: [2, 0, 0, 0, 0, 1],
        own: FamilyPair::default(),
    }
}

fn answer(service: &str, rows: &[TableRow]) -> TableAnswer {
    TableAnswer { query: Some(Query::Name(name(service))), service: Some(name(service)), rows: rows.to_vec() }
}

fn unknown(query: Query) -> TableAnswer {
    TableAnswer { query: Some(query), service: None, rows: Vec::new() }
}
