//! The core by rows: events in, effects out.

use std::net::Ipv4Addr;

use netmanager_common::abi::{Endpoint, Peer};

use super::*;
use crate::model::{NodeIdentity, Policy, PortMapping, Protocol, SemanticAddress, ServiceName, TableRow};
use crate::netmanager::connect::{Made, Step};
use crate::netmanager::hello::{Hello, Kind};
use crate::netmanager::{Attachment, NetError};

mod random;

#[test]
fn attach_waits_for_the_subnet_and_goes_step_by_step() {
    let mut lab = Lab::new();
    assert_eq!(lab.effects(Event::Attach(attachment(0, "/ns/a"), Waiter(1))), [] as [&str; 0]);
    assert_eq!(lab.command(Command::Registered(identity("one"))), [] as [&str; 0]);
    assert_eq!(lab.command(Command::Connected), ["report SubnetRequest"]);
    assert_eq!(lab.command(Command::Subnet(subnet(0))), ["save one 10.18.0.0", "upkeep", "leases 0"]);
    assert_eq!(lab.keep(&[]), ["apply config", "publish ", "veth web.0 /ns/a 10.18.0.2", "leases 1"]);
    assert_eq!(lab.effects(Event::Published(Ok(()))), [] as [&str; 0]);
    assert_eq!(lab.effects(veth_made(0, 7)), ["apply config endpoints", "settle web.0", "leases 1"]);
    assert_eq!(lab.effects(stepped(0, Step::Endpoint)), ["carry web.0 7"]);
    assert_eq!(lab.effects(stepped(0, Step::Carry)), ["publish 8080"]);
    assert_eq!(
        lab.effects(Event::Published(Ok(()))),
        [
            "attached 1 10.18.0.2",
            "report Deployed web.0 10.18.0.2",
            "report InterestAdd web",
            "report TableQuery Name web"
        ]
    );
    assert_eq!(lab.core.status().leases.len(), 1);
}

#[test]
fn attach_without_a_subnet_ends_after_twenty_seconds() {
    let mut lab = Lab::new();
    lab.effects(Event::Attach(attachment(0, "/ns/a"), Waiter(1)));
    assert_eq!(lab.at(19, Event::Tick), ["find uplink"]);
    assert_eq!(lab.at(20, Event::Tick), [format!("attached 1 {}", NetError::NoSubnet)]);
    assert!(lab.core.members.is_empty());
}

#[test]
fn failed_step_is_undone_with_all_before_it() {
    let steps = [Step::Veth, Step::Endpoint, Step::Carry, Step::Ports];
    let undos = ["unveth web.0", "settle web.0", "release web.0 7", "publish "];
    for (place, step) in steps.into_iter().enumerate().filter(|(_, step)| *step != Step::Endpoint) {
        let mut lab = Lab::ready();
        lab.effects(Event::Attach(attachment(0, "/ns/a"), Waiter(1)));
        for done in &steps[..place] {
            lab.effects(if *done == Step::Veth { veth_made(0, 7) } else { stepped(0, *done) });
        }
        let mut effects = match step {
            Step::Ports => lab.effects(Event::Published(Err("broken".into()))),
            step => lab.effects(Event::Stepped { instance: id(0), step, result: Err("broken".into()) }),
        };
        for undo in (0..=place).rev() {
            assert!(effects.contains(&undos[undo].to_owned()), "{step:?}: {effects:?} has no {}", undos[undo]);
            effects = match steps[undo] {
                Step::Ports => lab.effects(Event::Published(Ok(()))),
                step => lab.effects(stepped(0, step)),
            };
        }
        assert!(effects[0].starts_with("attached 1 ") && effects[0].ends_with("broken"), "{effects:?}");
        assert!(lab.core.members.is_empty());
        assert_eq!(lab.core.home.ipam().unwrap().used(), 0);
        assert_eq!(lab.core.status().leases, []);
    }
}

#[test]
fn what_goes_wrong_in_undoing_is_told_too_and_keeps_the_address() {
    let mut lab = Lab::ready();
    lab.effects(Event::Attach(attachment(0, "/ns/a"), Waiter(1)));
    lab.effects(veth_made(0, 7));
    lab.effects(stepped(0, Step::Endpoint));
    lab.effects(Event::Stepped { instance: id(0), step: Step::Carry, result: Err("no program".into()) });
    lab.effects(stepped(0, Step::Carry));
    lab.effects(stepped(0, Step::Endpoint));
    let effects = lab.effects(Event::Stepped { instance: id(0), step: Step::Veth, result: Err("busy".into()) });
    assert_eq!(effects[0], "attached 1 attach the datapath: no program; then, undoing it: connect the namespace: busy");
    assert_eq!(lab.core.home.ipam().unwrap().used(), 1, "its veth may still have the address");
    assert_eq!(lab.effects(Event::Detach(id(0), Waiter(2))), ["unveth web.0"], "another detach tries again");
    assert_eq!(lab.effects(stepped(0, Step::Veth)), ["detached 2", "leases 0"]);
    assert_eq!(lab.core.home.ipam().unwrap().used(), 0);
}

#[test]
fn taken_port_is_refused_before_anything_is_touched() {
    let mut lab = Lab::ready();
    lab.up(0);
    let taken = format!("attached 9 {}", NetError::PortTaken { port: port(8080), owner: id(0) });
    assert_eq!(lab.effects(Event::Attach(attachment(1, "/ns/b"), Waiter(9))), [taken]);
    let udp = PortMapping { protocol: Protocol::Udp, ..port(8080) };
    let effects = lab.effects(Event::Attach(Attachment { ports: vec![udp], ..attachment(1, "/ns/b") }, Waiter(10)));
    assert_eq!(effects[0], "veth web.1 /ns/b 10.18.0.3", "the other protocol's port is free");
    let twice = Attachment { ports: vec![port(1), port(1)], ..attachment(2, "/ns/c") };
    assert!(lab.effects(Event::Attach(twice, Waiter(11)))[0].contains("already mapped to"));
}

#[test]
fn attaching_again_returns_the_same_lease_in_any_namespace() {
    let mut lab = Lab::ready();
    lab.up(0);
    assert_eq!(lab.effects(Event::Attach(attachment(0, "/ns/b"), Waiter(5)))[0], "veth web.0 /ns/b 10.18.0.2");
    assert_eq!(lab.effects(veth_made(0, 8))[..2], ["apply config endpoints", "settle web.0"]);
    assert_eq!(lab.effects(stepped(0, Step::Endpoint)), ["carry web.0 8 for 7"]);
    let effects = lab.effects(stepped(0, Step::Carry));
    assert_eq!(effects[0], "attached 5 10.18.0.2", "ports are in force already");
    assert!(!effects.iter().any(|effect| effect.contains("InterestAdd")), "{effects:?}");
}

#[test]
fn failed_reattachment_leaves_what_was_up() {
    let mut lab = Lab::ready();
    lab.up(0);
    lab.effects(Event::Attach(attachment(0, "/ns/gone"), Waiter(5)));
    let failed = Event::Stepped { instance: id(0), step: Step::Veth, result: Err("no such file".into()) };
    assert_eq!(lab.effects(failed)[0], "attached 5 connect the namespace: no such file");
    assert_eq!(lab.core.status().leases.len(), 1);
    let (_, endpoint) = lab.endpoints().remove(0);
    assert_eq!(endpoint.ifindex, 7);
}

#[test]
fn detach_overtakes_an_attach_under_way() {
    let mut lab = Lab::ready();
    lab.effects(Event::Attach(attachment(0, "/ns/a"), Waiter(1)));
    assert_eq!(lab.effects(Event::Detach(id(0), Waiter(2))), [] as [&str; 0]);
    assert_eq!(lab.effects(veth_made(0, 7)), ["unveth web.0", "leases 1"]);
    let effects = lab.effects(stepped(0, Step::Veth));
    assert_eq!(effects, [format!("attached 1 {}", NetError::Cancelled), "detached 2".into(), "leases 0".into()]);
    assert_eq!(lab.effects(Event::Detach(id(0), Waiter(3))), ["detached 3"], "an unknown instance is a success");
}

#[test]
fn attach_to_another_namespace_overtakes_the_one_under_way() {
    let mut lab = Lab::ready();
    lab.effects(Event::Attach(attachment(0, "/ns/a"), Waiter(1)));
    lab.effects(Event::Attach(attachment(0, "/ns/a"), Waiter(2)));
    lab.effects(Event::Attach(attachment(0, "/ns/b"), Waiter(3)));
    let effects = lab.effects(veth_made(0, 7));
    assert_eq!(effects[..2], [1, 2].map(|waiter| format!("attached {waiter} {}", NetError::Cancelled)));
    assert_eq!(effects[2], "veth web.0 /ns/b 10.18.0.2");
    lab.effects(veth_made(0, 8));
    lab.effects(stepped(0, Step::Endpoint));
    lab.effects(stepped(0, Step::Carry));
    assert_eq!(lab.effects(Event::Published(Ok(())))[0], "attached 3 10.18.0.2");
}

#[test]
fn lost_veth_is_made_again_in_the_same_namespace_only() {
    let mut lab = Lab::ready();
    lab.up(0);
    assert_eq!(lab.keep(&[(0, 7)]), [] as [&str; 0]);
    let told = "warn others have removed the interface of app.ns.web.ns.instance.0; it is connected again";
    assert_eq!(lab.keep(&[]), ["veth web.0 /ns/0 10.18.0.2 if 77"]);
    let failed = Event::Stepped { instance: id(0), step: Step::Veth, result: Err("another namespace".into()) };
    assert_eq!(lab.effects(failed), [] as [&str; 0], "who has ended has lost nothing");
    assert_eq!(lab.keep(&[])[0], "veth web.0 /ns/0 10.18.0.2 if 77", "next time again");
    assert_eq!(lab.effects(veth_made(0, 9))[0], told);
    assert_eq!(lab.effects(stepped(0, Step::Endpoint)), ["carry web.0 9 for 7"]);
}

#[test]
fn who_was_connected_during_a_look_is_not_missed_by_it() {
    let mut lab = Lab::ready();
    lab.core.start_upkeep(&mut Vec::new());
    lab.up(0);
    let present = |present: &[(InstanceId, u32)]| Event::Kept(Ok((BRIDGE, present.to_vec())));
    assert_eq!(lab.effects(present(&[])), [] as [&str; 0], "the look may be older");
    lab.core.start_upkeep(&mut Vec::new());
    assert_eq!(lab.effects(present(&[]))[0], "veth web.0 /ns/0 10.18.0.2 if 77", "the next is not");
}

#[test]
fn restart_adopts_leases_with_a_veth_and_removes_the_rest() {
    let mut lab = Lab::ready();
    lab.up(0);
    lab.up(1);
    let leases = lab.core.kept.clone();
    assert_eq!(leases.leases.len(), 2);
    let remains = Remains { leases, veths: vec![(id(0), veth(7)), (id(5), veth(12))], ..Remains::default() };
    let (core, effects) = Core::new(settings(None), remains);
    let mut lab = Lab { core, now: Duration::ZERO };
    assert_eq!(
        words(&effects),
        [
            "apply endpoints",
            "report InterestAdd web",
            "report TableQuery Name web",
            "veth web.0 /ns/0 10.18.0.2 if 77",
            "unveth web.5",
            "find uplink",
            "upkeep",
            "publish 8080",
            "leases 1"
        ]
        .into_iter()
        .filter(|effect| !effect.contains("TableQuery"))
        .collect::<Vec<_>>(),
        "questions wait for the broker"
    );
    assert_eq!(lab.core.status().leases.len(), 1);
    assert_eq!(lab.core.home.subnet(), Some(subnet(0)), "of the leases, although none was kept");
    lab.effects(veth_made(0, 7));
    lab.effects(stepped(0, Step::Endpoint));
    let effects = lab.effects(stepped(0, Step::Carry));
    assert_eq!(effects, [] as [&str; 0], "waits for the publication under way");
    assert_eq!(lab.effects(Event::Published(Ok(()))), [] as [&str; 0], "nobody is there to hear of it");
    assert_eq!(lab.command(Command::Connected), ["report InterestAdd web", "report TableQuery Name web"]);
    let answered = lab.command(Command::Table(answer(Some(Query::Name(name())), &[])));
    assert_eq!(answered, ["report Deployed web.0 10.18.0.2"]);
    assert_eq!(lab.effects(Event::Retain(vec![]))[0], "publish ", "an instance that is not there any more goes");
}

#[test]
fn miss_is_asked_answered_and_applied() {
    let mut lab = Lab::ready();
    let vip = ip("10.30.9.0");
    assert_eq!(lab.datapath(DatapathEvent::UnknownService(vip)), ["report TableQuery Address 10.30.9.0"]);
    assert_eq!(lab.datapath(DatapathEvent::UnknownService(vip)), [] as [&str; 0]);
    let effects = lab.command(Command::Table(answer(Some(Query::Address(vip.into())), &[row(0, 2)])));
    assert_eq!(
        effects,
        ["apply peers slots services", "ways 192.0.2.2", "control 192.0.2.2:50103", "report InterestAdd web"]
    );
    let way = Way { source: ip("192.0.2.1"), ifindex: 3, mtu: 0 };
    assert_eq!(lab.effects(Event::Ways(vec![("192.0.2.2".parse().unwrap(), way)])), ["apply peers"]);
    assert_eq!(lab.command(Command::ServiceChanged(name())), ["report TableQuery Name web"]);
    let unknown = ip("10.30.9.9");
    lab.datapath(DatapathEvent::UnknownService(unknown));
    let nobody = TableAnswer { query: Some(Query::Address(unknown.into())), service: None, rows: vec![] };
    assert_eq!(lab.command(Command::Table(nobody.clone())), ["give up 10.30.9.9"]);
    assert_eq!(lab.command(Command::Table(nobody)), [] as [&str; 0], "unasked");
}

#[test]
fn instance_that_sends_before_it_knows_its_address_is_asked_for_and_answered() {
    let mut lab = Lab::ready();
    lab.up(0);
    let answered = lab.command(Command::Table(answer(Some(Query::Name(name())), &[])));
    assert_eq!(answered, [] as [&str; 0], "the cluster does not know it yet");
    let own = ip("10.18.0.2");
    assert_eq!(lab.datapath(DatapathEvent::UnknownEndpoint(own)), ["report TableQuery Name web"]);
    let effects = lab.command(Command::Table(answer(Some(Query::Name(name())), &[])));
    assert_eq!(effects, ["give up 10.18.0.2"]);
    lab.datapath(DatapathEvent::UnknownEndpoint(own));
    let effects = lab.command(Command::Table(answer(Some(Query::Name(name())), &[local_row(0)])));
    assert_eq!(effects, ["apply config slots endpoints services", "leases 1"], "no word of giving up");
    assert_eq!(lab.datapath(DatapathEvent::UnknownEndpoint(own)), [] as [&str; 0]);
    assert_eq!(lab.datapath(DatapathEvent::UnknownEndpoint(ip("10.18.0.9"))), ["give up 10.18.0.9"]);
}

#[test]
fn own_address_is_asked_for_until_it_is_known() {
    let mut lab = Lab::ready();
    lab.up(0);
    lab.command(Command::Table(answer(Some(Query::Name(name())), &[])));
    let mut asked = Vec::new();
    for second in 1..40 {
        if lab.at(second, Event::Tick).contains(&"report TableQuery Name web".to_owned()) {
            asked.push(second);
            lab.command(Command::Table(answer(Some(Query::Name(name())), &[])));
        }
    }
    assert_eq!(asked, [1, 3, 7, 15, 31]);
    lab.command(Command::Table(answer(Some(Query::Name(name())), &[local_row(0)])));
}

#[test]
fn peer_that_answers_a_hello_is_ours() {
    let mut lab = Lab::ready();
    lab.datapath(DatapathEvent::UnknownService(ip("10.30.9.0")));
    let rows = answer(Some(Query::Address(ip("10.30.9.0").into())), &[row(0, 2)]);
    let effects = lab.core.handle(Event::Command(Command::Table(rows)), lab.now);
    let hello = effects.iter().find_map(|effect| match effect {
        Effect::SendControl(to, payload) => Some((*to, Hello::decode(payload).unwrap())),
        _ => None,
    });
    let (from, hello) = hello.unwrap();
    assert_eq!(hello.options, [(1, 50_104_u16.to_be_bytes().to_vec())]);
    let payload = Hello { kind: Kind::Answer, ..hello }.encode();
    let effects = lab.datapath(DatapathEvent::Control { from, payload: payload.clone() });
    assert_eq!(effects, ["apply config peers", "control 192.0.2.2:50104"], "it is asked whether framed packets arrive");
    assert_eq!(lab.peers()[0].1.flags, PEER_OURS);
    let stranger = "198.51.100.9:50103".parse().unwrap();
    assert_eq!(lab.datapath(DatapathEvent::Control { from: stranger, payload }), [] as [&str; 0]);

    // And its path is measured: nothing longer than 700 bytes is answered.
    assert_eq!(lab.effects(Event::PathsDue), ["whole 192.0.2.2:50103 1500"]);
    for _ in 0..40 {
        lab.core.travels();
        lab.now = lab.core.paths_due().expect("it is never done with");
        for effect in lab.core.handle(Event::PathsDue, lab.now) {
            let Effect::SendWhole(_, payload) = effect else { continue };
            if payload.len() + 28 <= 700 {
                let probe = Hello::decode(&payload).unwrap();
                let payload = Hello::answer_to(&probe).encode();
                lab.datapath(DatapathEvent::Control { from, payload });
            }
        }
    }
    assert!((646..=650).contains(&lab.peers()[0].1.mtu), "{:?}", lab.peers());
}

#[test]
fn new_address_is_announced_and_what_is_said_to_be_there_is_stale() {
    let mut lab = Lab::ready();
    lab.up(0);
    let way = Way { source: ip("192.0.2.99"), ifindex: 2, mtu: 0 };
    let effects = lab.effects(Event::Uplink { address: "192.0.2.99".parse().unwrap(), way });
    assert_eq!(effects, ["apply config", "report Deployed web.0 10.18.0.2"]);
    let effects = lab.effects(Event::Uplink { address: "192.0.2.99".parse().unwrap(), way });
    assert_eq!(effects, [] as [&str; 0]);
}

#[test]
fn reconnection_repeats_everything_the_cluster_may_have_forgotten() {
    let mut lab = Lab::ready();
    lab.up(0);
    lab.command(Command::Disconnected(String::new()));
    let effects = lab.command(Command::Connected);
    assert_eq!(effects, ["report InterestAdd web", "report TableQuery Name web"]);
    let answered = answer(Some(Query::Name(name())), &[]);
    assert_eq!(lab.command(Command::Table(answered.clone())), ["report Deployed web.0 10.18.0.2"]);
    assert_eq!(lab.command(Command::Table(answered)), [] as [&str; 0], "once");
}

/// A service manager that was restarted knows no service before it is asked for it, and may die of a notice of one.
#[test]
fn instances_are_announced_after_the_answer_about_their_service() {
    const DEPLOYED: &str = "report Deployed web.0 10.18.0.2";
    let announces = |effects: &[String]| effects.iter().filter(|effect| *effect == DEPLOYED).count();
    let reconnected = || {
        let mut lab = Lab::ready();
        lab.up(0);
        lab.command(Command::Disconnected(String::new()));
        assert_eq!(announces(&lab.command(Command::Connected)), 0);
        lab
    };
    // Also where the cluster knows no such service.
    let mut lab = reconnected();
    let nobody = TableAnswer { query: Some(Query::Name(name())), service: None, rows: vec![] };
    assert_eq!(announces(&lab.command(Command::Table(nobody))), 1);

    // And where it says nothing.
    let mut lab = reconnected();
    let at: Vec<u64> = (1..20).filter(|second| announces(&lab.at(*second, Event::Tick)) > 0).collect();
    assert_eq!(at, [5]);

    // An instance whose connection is renewed meanwhile is announced with the others.
    let mut lab = reconnected();
    lab.core.renew(&id(0), &mut Vec::new());
    lab.effects(veth_made(0, 7));
    lab.effects(stepped(0, Step::Endpoint));
    assert_eq!(announces(&lab.effects(stepped(0, Step::Carry))), 0);
    assert!(lab.core.members[&id(0)].up());
    assert_eq!(announces(&lab.command(Command::Table(answer(Some(Query::Name(name())), &[])))), 1);

    // The first word of an instance waits for nothing: that it runs must not be heard before.
    let mut lab = Lab::ready();
    lab.command(Command::Disconnected(String::new()));
    lab.effects(Event::Attach(Attachment { ports: vec![], ..attachment(0, "/ns/0") }, Waiter(0)));
    lab.effects(veth_made(0, 7));
    lab.effects(stepped(0, Step::Endpoint));
    assert_eq!(announces(&lab.effects(stepped(0, Step::Carry))), 1);
    lab.command(Command::Connected);
    assert_eq!(announces(&lab.command(Command::Table(answer(Some(Query::Name(name())), &[])))), 1, "and again");

    // What is not waited for any more is not announced, and nor is who has gone.
    let mut lab = reconnected();
    lab.command(Command::Disconnected(String::new()));
    assert_eq!((1..20).map(|second| announces(&lab.at(second, Event::Tick))).sum::<usize>(), 0);
    let mut lab = reconnected();
    lab.down(0);
    assert_eq!(announces(&lab.command(Command::Table(answer(Some(Query::Name(name())), &[])))), 0);
}

#[test]
fn new_node_id_gets_its_own_subnet_when_the_last_instance_has_gone() {
    let mut lab = Lab::ready();
    lab.up(0);
    assert_eq!(lab.command(Command::Registered(identity("two"))), ["report SubnetRequest"]);
    assert_eq!(lab.command(Command::Subnet(subnet(64))), ["save two 10.18.0.64"]);
    assert_eq!(lab.core.home.subnet(), Some(subnet(0)));
    lab.down(0);
    assert_eq!(lab.core.home.subnet(), Some(subnet(64)));
    assert_eq!(lab.effects(Event::Attach(attachment(0, "/ns/a"), Waiter(5))), [] as [&str; 0]);
    assert_eq!(lab.keep(&[])[1], "veth web.0 /ns/a 10.18.0.66", "when the bridge has moved");
}

#[test]
fn bridge_that_cannot_be_made_fails_who_waits_for_it() {
    let mut lab = Lab::new();
    lab.command(Command::Registered(identity("one")));
    lab.command(Command::Connected);
    lab.command(Command::Subnet(subnet(0)));
    lab.effects(Event::Attach(attachment(0, "/ns/a"), Waiter(1)));
    let effects = lab.effects(Event::Kept(Err("no bridges here".into())));
    assert_eq!(effects[0], "attached 1 make the bridge: no bridges here");
    assert!(effects[1].starts_with("warn "));
    assert_eq!(lab.effects(Event::Attach(attachment(0, "/ns/a"), Waiter(2))), ["upkeep"], "the next one tries again");
    let effects = lab.effects(Event::Kept(Err("no bridges here".into())));
    assert_eq!(effects, ["attached 2 make the bridge: no bridges here"], "no news twice");
}

#[test]
fn tables_of_an_earlier_run_are_asked_about_and_then_made_exact() {
    let mut lab = Lab::ready();
    lab.datapath(DatapathEvent::UnknownService(ip("10.30.9.0")));
    lab.command(Command::Table(answer(Some(Query::Address(ip("10.30.9.0").into())), &[row(0, 2)])));
    let full = lab.core.table.full();
    let snapshot = Snapshot {
        epoch: 1,
        slots: full.slots.clone(),
        peers: full.peers.clone(),
        services: full.services.iter().map(|(address, row, _)| (*address, *row)).collect(),
        endpoints: vec![],
    };
    let (core, effects) = Core::new(settings(Some("one")), Remains { snapshot, ..Remains::default() });
    assert_eq!(words(&effects)[0], "ways 192.0.2.2", "peers are met again");
    let mut lab = Lab { core, now: Duration::ZERO };
    lab.command(Command::Registered(identity("one")));
    let effects = lab.command(Command::Connected);
    assert_eq!(effects.len(), 2, "{effects:?}");
    let answer = answer(Some(Query::Address(ip("10.30.9.0").into())), &[row(0, 2)]);
    let effects = lab.command(Command::Table(answer));
    assert!(effects.contains(&"reconcile".to_owned()), "{effects:?}");
    assert_eq!(lab.core.table.full().slots, full.slots);
    assert_eq!(lab.core.table.full().peers, full.peers);
}

struct Lab {
    core: Core,
    now: Duration,
}

const BRIDGE: Bridge = Bridge { ifindex: 4, mac: [2, 0, 0, 0, 0, 9] };

impl Lab {
    /// Nothing is known yet.
    fn new() -> Self {
        let (core, effects) = Core::new(settings(None), Remains::default());
        assert_eq!(words(&effects), ["find uplink", "leases 0"].into_iter().take(1).collect::<Vec<_>>());
        Self { core, now: Duration::ZERO }
    }

    /// Registered, connected, with subnet and bridge.
    fn ready() -> Self {
        let (core, _) = Core::new(settings(Some("one")), Remains::default());
        let mut lab = Self { core, now: Duration::ZERO };
        lab.command(Command::Registered(identity("one")));
        lab.command(Command::Connected);
        lab.keep(&[]);
        lab.effects(Event::Published(Ok(())));
        lab
    }

    /// Connects an instance whose veth has index 7 + number. Only the first has a port.
    fn up(&mut self, number: u32) {
        let ports = if number == 0 { vec![port(8080)] } else { vec![] };
        let netns = format!("/ns/{number}");
        self.effects(Event::Attach(Attachment { ports, ..attachment(number, &netns) }, Waiter(number.into())));
        self.effects(veth_made(number, 7 + number));
        self.effects(stepped(number, Step::Endpoint));
        self.effects(stepped(number, Step::Carry));
        self.effects(Event::Published(Ok(())));
        assert!(self.core.members[&id(number)].up());
    }

    fn down(&mut self, number: u32) {
        self.effects(Event::Detach(id(number), Waiter(0)));
        self.effects(Event::Published(Ok(())));
        self.effects(stepped(number, Step::Carry));
        self.effects(stepped(number, Step::Endpoint));
        self.effects(stepped(number, Step::Veth));
        assert!(!self.core.members.contains_key(&id(number)));
    }

    /// The host was looked after, and these veths were there.
    fn keep(&mut self, present: &[(u32, u32)]) -> Vec<String> {
        self.core.upkeep = self.core.home.subnet();
        let present = present.iter().map(|(number, ifindex)| (id(*number), *ifindex)).collect();
        self.effects(Event::Kept(Ok((BRIDGE, present))))
    }

    fn effects(&mut self, event: Event) -> Vec<String> {
        words(&self.core.handle(event, self.now))
    }

    fn at(&mut self, second: u64, event: Event) -> Vec<String> {
        self.now = Duration::from_secs(second);
        self.effects(event)
    }

    fn command(&mut self, command: Command) -> Vec<String> {
        self.effects(Event::Command(command))
    }

    fn datapath(&mut self, event: DatapathEvent) -> Vec<String> {
        self.effects(Event::Datapath(event))
    }

    fn endpoints(&self) -> Vec<(Addr, Endpoint)> {
        self.core.table.full().endpoints
    }

    fn peers(&self) -> Vec<(u32, Peer)> {
        self.core.table.full().peers
    }
}

/// What matters of each effect, in words. What is only to be remembered has tests of its own.
fn words(effects: &[Effect]) -> Vec<String> {
    effects.iter().filter(|effect| !matches!(effect, Effect::Remember(_) | Effect::Learn(_))).map(word).collect()
}

fn word(effect: &Effect) -> String {
    let short = |id: &InstanceId| format!("{}.{}", id.service.short(), id.number);
    match effect {
        Effect::AttachVeth { instance, netns, inode, addresses, .. } => {
            let only = inode.map_or(String::new(), |inode| format!(" if {inode}"));
            format!("veth {} {} {}{only}", short(instance), netns.display(), addresses.v4)
        }
        Effect::DetachVeth(instance) => format!("unveth {}", short(instance)),
        Effect::Carry { instance, port, replaces } => {
            let old = replaces.as_ref().map_or(String::new(), |port| format!(" for {}", port.ifindex));
            format!("carry {} {}{old}", short(instance), port.ifindex)
        }
        Effect::Release { instance, port } => format!("release {} {}", short(instance), port.ifindex),
        Effect::Settle(instance) => format!("settle {}", short(instance)),
        Effect::Publish(_, ports) => {
            let ports: Vec<String> = ports.iter().map(|(port, _)| port.host.to_string()).collect();
            format!("publish {}", ports.join(","))
        }
        Effect::Upkeep(_) => "upkeep".into(),
        Effect::FindUplink => "find uplink".into(),
        Effect::FindWays(hosts) => {
            let hosts: Vec<String> = hosts.iter().map(IpAddr::to_string).collect();
            format!("ways {}", hosts.join(","))
        }
        Effect::Apply(delta) => {
            let parts = [
                ("config", delta.config.is_some()),
                ("peers", !delta.peers.is_empty()),
                ("slots", !delta.slots.is_empty()),
                ("endpoints", !delta.endpoints.is_empty() || !delta.endpoints_gone.is_empty()),
                ("services", !delta.services.is_empty() || !delta.services_gone.is_empty()),
            ];
            let parts: Vec<&str> = parts.into_iter().filter(|(_, there)| *there).map(|(name, _)| name).collect();
            format!("apply {}", parts.join(" "))
        }
        Effect::Reconcile(_) => "reconcile".into(),
        Effect::GiveUp(address) => format!("give up {}", IpAddr::from(*address)),
        Effect::SendControl(to, _) => format!("control {to}"),
        Effect::SendWhole(to, payload) => format!("whole {to} {}", payload.len() + 28),
        Effect::Report(report) => format!("report {}", report_word(report)),
        Effect::SaveSubnet(node, subnet) => format!("save {node} {}", subnet.v4),
        Effect::KeepLeases(leases) => format!("leases {}", leases.leases.len()),
        Effect::Attached(waiter, Ok(lease)) => format!("attached {} {}", waiter.0, lease.addresses.v4),
        Effect::Attached(waiter, Err(error)) => format!("attached {} {error}", waiter.0),
        Effect::Detached(waiter, Ok(())) => format!("detached {}", waiter.0),
        Effect::Detached(waiter, Err(error)) => format!("detached {} {error}", waiter.0),
        Effect::Warn(sentence) => format!("warn {sentence}"),
        Effect::Remember(_) | Effect::Learn(_) => unreachable!("left out"),
    }
}

fn report_word(report: &Report) -> String {
    match report {
        Report::Deployed { instance, addresses } => {
            format!("Deployed {}.{} {}", instance.service.short(), instance.number, addresses.v4)
        }
        Report::TableQuery(Query::Name(name)) => format!("TableQuery Name {}", name.short()),
        Report::TableQuery(Query::Address(address)) => format!("TableQuery Address {address}"),
        Report::InterestAdd(name) => format!("InterestAdd {}", name.short()),
        Report::InterestRemove(name) => format!("InterestRemove {}", name.short()),
        Report::SubnetRequest => "SubnetRequest".into(),
        other => panic!("{other:?} is not the overlay's to say"),
    }
}

fn settings(kept: Option<&str>) -> Settings {
    Settings {
        nets: ServiceNets { v4: (Ipv4Addr::new(10, 30, 0, 0), 16), v6: ("fdff::".parse().unwrap(), 16) },
        tunnel_port: 50103,
        relax_source: false,
        capacity: Capacity::USUAL,
        framed_port: Some(50104),
        mtu: 1_450,
        address: "192.0.2.1".parse().unwrap(),
        uplink: Way { source: ip("192.0.2.1"), ifindex: 2, mtu: 0 },
        subnet: kept.map(|node| (node.parse().unwrap(), subnet(0))),
        drain: Duration::from_secs(10),
        seed: 1,
        secret: Secret([1; 2]),
    }
}

fn subnet(offset: u8) -> Subnet {
    Subnet { v4: Ipv4Addr::new(10, 18, 0, offset), v6: format!("fc00::{:x}00", offset / 64).parse().unwrap() }
}

fn identity(node: &str) -> NodeIdentity {
    NodeIdentity {
        id: node.parse().unwrap(),
        broker_port: 1883,
        subnet: None,
        generation: crate::model::Generation::G4,
    }
}

fn name() -> ServiceName {
    "app.ns.web.ns".parse().unwrap()
}

fn id(number: u32) -> InstanceId {
    InstanceId { service: name(), number }
}

fn port(host: u16) -> PortMapping {
    PortMapping { host, container: 80, protocol: Protocol::Tcp }
}

fn attachment(number: u32, netns: &str) -> Attachment {
    Attachment { instance: id(number), netns: netns.into(), ports: vec![port(8080)] }
}

fn veth(ifindex: u32) -> Veth {
    Veth { name: format!("ne{ifindex}"), ifindex, mac: [2, 0, 0, 0, 0, 1] }
}

fn veth_made(number: u32, ifindex: u32) -> Event {
    let result = Ok(Made::Veth { veth: veth(ifindex), inode: 77 });
    Event::Stepped { instance: id(number), step: Step::Veth, result }
}

fn stepped(number: u32, step: Step) -> Event {
    Event::Stepped { instance: id(number), step, result: Ok(Made::Done) }
}

fn ip(text: &str) -> Addr {
    text.parse::<IpAddr>().unwrap().into()
}

fn answer(query: Option<Query>, rows: &[TableRow]) -> TableAnswer {
    TableAnswer { query, service: Some(name()), rows: rows.to_vec() }
}

/// Instance `number` + 20 on node 192.0.2.`host`.
fn row(number: u32, host: u8) -> TableRow {
    let offset = 20 + u8::try_from(number).unwrap();
    TableRow {
        number: number + 20,
        namespace: FamilyPair { v4: Some([10, 18, host, offset].into()), v6: None },
        instance: FamilyPair { v4: Some([10, 30, 0, offset].into()), v6: None },
        host: [192, 0, 2, host].into(),
        host_port: 50103,
        weight: 1,
        services: vec![SemanticAddress { policy: Policy::RoundRobin, address: ip("10.30.9.0").into() }],
    }
}

/// The first instance on this node.
fn local_row(number: u32) -> TableRow {
    TableRow {
        number,
        namespace: FamilyPair { v4: Some([10, 18, 0, 2].into()), v6: None },
        instance: FamilyPair { v4: Some([10, 30, 0, 2].into()), v6: None },
        ..row(number, 1)
    }
}
