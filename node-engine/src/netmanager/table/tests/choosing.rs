//! Who is chosen no more: because it leaves, or because it does not answer.

use std::time::Duration;

use netmanager_common::abi::{Answers, POLICY_TRIAL};

use super::*;
use crate::netmanager::view::State;

const DRAIN: Duration = Duration::from_secs(10);

fn at(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

fn lab() -> Lab {
    let mut lab = Lab::new();
    lab.table.set_drain(DRAIN);
    lab
}

impl Lab {
    fn tick(&mut self, now: Duration) -> TableDelta {
        self.table.set_now(now);
        self.apply(ServiceTable::tick)
    }

    fn observe(&mut self, now: Duration, tallies: &[(u32, [u32; 3])]) -> TableDelta {
        self.table.set_now(now);
        let tally = |[asked, answered, refused]: [u32; 3]| Tally {
            chosen: asked.into(),
            answers: Answers { asked, answered, refused },
        };
        let tallies: Vec<_> = tallies.iter().map(|(slot, counts)| (*slot, tally(*counts))).collect();
        self.apply(|table| table.observe(&tallies))
    }
}

#[test]
fn who_vanishes_gets_no_new_flows_and_keeps_its_old_ones_for_a_while() {
    let mut lab = lab();
    lab.update(&answer("web", &[row(0, 2), row(1, 3)]));
    let (number, before) = lab.slot_of("10.18.2.2");
    lab.tick(at(1_000));
    lab.update(&answer("web", &[row(1, 3)]));
    assert_eq!(lab.candidates("10.30.9.0"), ["10.18.3.3"]);
    assert_eq!(lab.slots[&number], before, "what it has is valid");
    assert!(lab.peers.contains_key(&before.peer));
    let own = lab.service("10.30.0.2");
    assert_eq!((own.policy, own.first), (POLICY_INSTANCE, number), "its answers are believed");
    assert_eq!(lab.table.left(), [before.peer].into());
    assert_eq!(lab.table.leaving_at(before.peer).len(), 2);
    let web = Choice { service: Some("web".into()), limit: 9, ..Choice::default() };
    let views = lab.table.service_views(&web, &[], &[]);
    assert_eq!(views.rows[0].instances[0].state, State::Draining(Some(DRAIN)));

    lab.tick(at(10_999));
    assert_eq!(lab.slots[&number], before);
    lab.tick(at(11_000));
    assert_eq!(lab.slots[&number].generation, before.generation + 1);
    assert!(!lab.table.serves(addr("10.30.0.2")) && !lab.peers.contains_key(&before.peer));
    assert_eq!(lab.table.left(), [].into());
}

#[test]
fn who_comes_back_in_time_has_lost_nothing() {
    let mut lab = lab();
    lab.update(&answer("web", &[row(0, 2)]));
    let before = lab.slot_of("10.18.2.2");
    lab.update(&answer("web", &[]));
    assert_eq!(lab.service("10.30.9.0").count, 0);
    lab.update(&answer("web", &[row(0, 2)]));
    assert_eq!(lab.slot_of("10.18.2.2"), before);
    assert_eq!(lab.candidates("10.30.9.0"), ["10.18.2.2"]);
    lab.tick(at(60_000));
    assert_eq!(lab.slot_of("10.18.2.2"), before, "and is not on its way out any more");
}

#[test]
fn its_node_ends_it_at_once_and_nobody_elses() {
    let mut lab = lab();
    lab.update(&answer("web", &[row(0, 2), row(1, 3)]));
    let (number, before) = lab.slot_of("10.18.2.2");
    let other = lab.slot_of("10.18.3.3").1.peer;
    lab.update(&answer("web", &[row(1, 3)]));
    let namespaces = [addr("10.18.2.2"), addr("10.18.3.3")];
    lab.apply(|table| table.gone(other, &namespaces));
    assert_eq!(lab.slots[&number], before, "it is not the other's to end");
    lab.apply(|table| table.gone(before.peer, &namespaces));
    assert!(!lab.slots[&number].live());
    assert!(lab.slot_of("10.18.3.3").1.live(), "who is in the table stays");
}

#[test]
fn whose_addresses_somebody_else_has_is_gone() {
    let mut lab = lab();
    lab.update(&answer("web", &[row(0, 2)]));
    let (number, _) = lab.slot_of("10.18.2.2");
    lab.update(&answer("web", &[]));
    assert!(lab.slots[&number].live());
    let next = TableRow { number: 3, instance: row(3, 2).instance, ..row(0, 2) };
    lab.update(&answer("web", &[next]));
    assert!(!lab.slots[&number].live(), "another instance is at its namespace address");
    assert!(!lab.table.serves(addr("10.30.0.2")));
    assert_eq!(lab.candidates("10.30.9.0"), ["10.18.2.2"]);

    lab.update(&answer("db", &[row(7, 4)]));
    let (number, _) = lab.slot_of("10.18.4.9");
    lab.update(&answer("db", &[]));
    lab.update(&answer("web", &[row(7, 5)]));
    assert!(!lab.slots[&number].live(), "its own address is another's");
    assert_eq!(lab.service("10.30.0.9").first, lab.slot_of("10.18.5.9").0);
}

#[test]
fn who_is_here_leaves_when_it_is_disconnected() {
    let mut lab = lab();
    lab.attach(local("web", 0, 1));
    lab.update(&answer("web", &[row(0, 1), row(1, 3)]));
    let (number, before) = lab.slot_of("10.18.1.2");
    lab.update(&answer("web", &[row(1, 3)]));
    assert_eq!(lab.candidates("10.30.9.0"), ["10.18.3.3"]);
    lab.tick(at(3_600_000));
    assert_eq!(lab.slots[&number], before, "it may take its time to end");
    assert!(lab.table.hosts(addr("10.18.1.2")));
    lab.detach("web", 0);
    assert!(!lab.slots[&number].live() && !lab.table.hosts(addr("10.18.1.2")));

    lab.attach(local("web", 0, 1));
    lab.update(&answer("web", &[row(0, 1), row(1, 3)]));
    let (number, _) = lab.slot_of("10.18.1.2");
    lab.detach("web", 0);
    assert!(!lab.slots[&number].live(), "what is not here any more has nothing to keep");
}

#[test]
fn what_nobody_is_interested_in_is_forgotten_at_once() {
    let mut lab = lab();
    lab.update(&answer("web", &[row(0, 2)]));
    let (number, _) = lab.slot_of("10.18.2.2");
    lab.remove("web");
    assert!(!lab.slots[&number].live());
    assert!(lab.peers.is_empty() && lab.services.is_empty());
}

#[test]
fn who_refuses_is_passed_over_and_tried_by_one_flow() {
    let mut lab = lab();
    lab.update(&answer("web", &[row(0, 2), row(1, 3), row(2, 4)]));
    let slot = |lab: &Lab, namespace| lab.slot_of(namespace).0;
    let (a, b, c) = (slot(&lab, "10.18.2.2"), slot(&lab, "10.18.3.3"), slot(&lab, "10.18.4.4"));
    assert!(lab.table.watched(0, 99).contains(&b));
    lab.observe(at(250), &[(a, [0, 0, 0]), (b, [0, 0, 0]), (c, [0, 0, 0])]);
    lab.observe(at(500), &[(a, [2, 2, 0]), (b, [1, 0, 1]), (c, [1, 1, 0])]);
    assert_eq!(lab.candidates("10.30.9.0"), ["10.18.2.2", "10.18.4.4"]);
    assert_eq!(lab.candidates("fdff:2000::9:0").len(), 3, "the other family answers");
    assert!(lab.table.ails());

    let delta = lab.tick(at(1_500));
    let row = lab.service("10.30.9.0");
    assert_eq!((row.policy, row.count), (POLICY_TURN | POLICY_TRIAL, 2));
    assert_eq!(delta.trials, [(row.id, b)]);
    assert_eq!(lab.tick(at(1_600)), TableDelta::default(), "once");
    let full = lab.table.full();
    assert!(full.trials.contains(&(row.id, b)));

    lab.observe(at(1_750), &[(a, [5, 5, 0]), (b, [2, 1, 1]), (c, [1, 1, 0])]);
    assert_eq!(lab.candidates("10.30.9.0"), ["10.18.2.2", "10.18.3.3", "10.18.4.4"]);
    assert_eq!(lab.service("10.30.9.0").policy, POLICY_TURN);
}

#[test]
fn nobody_is_passed_over_where_nobody_would_be_left() {
    let mut lab = lab();
    lab.update(&answer("web", &[row(0, 2), row(1, 3)]));
    let (a, b) = (lab.slot_of("10.18.2.2").0, lab.slot_of("10.18.3.3").0);
    lab.observe(at(250), &[(a, [0, 0, 0]), (b, [0, 0, 0])]);
    lab.observe(at(500), &[(a, [1, 0, 1]), (b, [0, 0, 0])]);
    assert_eq!(lab.candidates("10.30.9.0"), ["10.18.3.3"]);
    lab.observe(at(750), &[(a, [1, 0, 1]), (b, [1, 0, 1])]);
    assert_eq!(lab.candidates("10.30.9.0"), ["10.18.2.2", "10.18.3.3"]);
    lab.update(&answer("web", &[row(1, 3)]));
    assert_eq!(lab.table.watched(0, 99), [0; 0], "there is no choice any more");
    lab.tick(at(800));
    assert!(!lab.table.ails(), "and nobody to wait for");
}

#[test]
fn who_weighs_nothing_gets_no_new_flows() {
    let mut lab = lab();
    let light = TableRow { weight: 0, ..row(1, 3) };
    lab.update(&answer("web", &[row(0, 2), light.clone()]));
    assert_eq!(lab.candidates("10.30.9.0"), ["10.18.2.2"]);
    assert_eq!(lab.service("10.30.0.3").count, 1, "whoever means it gets it");
    lab.update(&answer("web", &[light]));
    assert_eq!(lab.candidates("10.30.9.0"), ["10.18.3.3"], "nobody else is there");
}

#[test]
fn people_see_who_gets_new_flows_and_why_not() {
    let mut lab = lab();
    lab.update(&answer("web", &[row(0, 2), row(1, 3)]));
    let (a, b) = (lab.slot_of("10.18.2.2").0, lab.slot_of("10.18.3.3").0);
    lab.observe(at(250), &[(a, [0, 0, 0]), (b, [0, 0, 0])]);
    lab.observe(at(500), &[(a, [1, 0, 1]), (b, [3, 3, 0])]);
    let web = Choice { service: Some("web".into()), limit: 9, ..Choice::default() };
    assert_eq!(lab.table.slots(&web).len(), 4);
    assert_eq!(lab.table.slots(&Choice { limit: 9, ..Choice::default() }), [0; 0], "of all there may be very many");
    let answers = Answers { asked: 3, answered: 3, refused: 0 };
    let tallies = [(b, Tally { chosen: 5, answers })];
    let views = lab.table.service_views(&web, &[], &tallies);
    let service = &views.rows[0];
    let v4 = service.addresses.iter().find(|known| known.address == ip("10.30.9.0")).unwrap();
    assert_eq!((v4.policy, &v4.candidates[..]), ("rr", &[(1, 100.0)][..]));
    let v6 = service.addresses.iter().find(|known| known.address.is_ipv6()).unwrap();
    assert_eq!(v6.candidates, [(0, 50.0), (1, 50.0)]);
    let [first, second] = &service.instances[..] else { panic!("two instances") };
    assert_eq!(first.state, State::PassedOver("refuses connections", Some(at(1_000))));
    assert_eq!((second.state, first.picks), (State::Well, None));
    let picks = second.picks.unwrap();
    assert_eq!((picks.chosen, picks.answered, picks.refused), (5, 3, 0));
}
