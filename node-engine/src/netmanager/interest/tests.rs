use super::*;
use crate::model::{FamilyPair, Policy, SemanticAddress, TableRow};

const VIP: &str = "10.30.9.0";

#[test]
fn one_question_however_many_wait() {
    let mut interests = connected();
    assert_eq!(interests.miss(ip(VIP), at(0)), [ask_address(VIP)]);
    assert_eq!(interests.miss(ip(VIP), at(1)), []);
    let answer = answer(Some(Query::Address(ip(VIP))), Some("web"));
    assert!(interests.wants(&answer));
    assert_eq!(interests.answered(&answer, 0, at(2), |_| true), [Outcome::Add(name("web"))]);
    assert!(interests.watches(&name("web")));
}

#[test]
fn unanswered_question_is_repeated_once_and_given_up() {
    let mut interests = connected();
    interests.miss(ip(VIP), at(0));
    assert_eq!(interests.tick(0, at(4)), []);
    assert_eq!(interests.tick(0, at(5)), [ask_address(VIP)]);
    assert_eq!(interests.tick(0, at(9)), []);
    assert_eq!(interests.tick(0, at(10)), [Outcome::GiveUp(ip(VIP))]);
    assert_eq!(interests.miss(ip(VIP), at(11)), [Outcome::GiveUp(ip(VIP))], "not asked again at once");
    assert_eq!(interests.miss(ip(VIP), at(12)), [ask_address(VIP)]);
}

#[test]
fn unknown_address_is_given_up_and_not_asked_for_two_seconds() {
    let mut interests = connected();
    interests.miss(ip(VIP), at(0));
    let unknown = answer(Some(Query::Address(ip(VIP))), None);
    assert_eq!(interests.answered(&unknown, 0, at(1), |_| false), [Outcome::GiveUp(ip(VIP))]);
    assert_eq!(interests.miss(ip(VIP), at(2)), [Outcome::GiveUp(ip(VIP))]);
    assert_eq!(interests.miss(ip(VIP), at(3)), [ask_address(VIP)]);
    assert_eq!(interests.watched(), 0);
}

#[test]
fn service_that_does_not_serve_the_address_is_watched_all_the_same() {
    let mut interests = connected();
    interests.miss(ip(VIP), at(0));
    let empty = answer(Some(Query::Address(ip(VIP))), Some("web"));
    let outcomes = interests.answered(&empty, 0, at(1), |_| false);
    assert_eq!(outcomes, [Outcome::Add(name("web")), Outcome::GiveUp(ip(VIP))]);
    assert_eq!(interests.changed(&name("web"), at(2)), [ask_name("web")], "it hears when an instance comes");
}

#[test]
fn answer_without_its_question_is_matched_by_what_it_says() {
    let mut interests = connected();
    interests.miss(ip(VIP), at(0));
    interests.miss(ip("10.30.0.1"), at(0));
    interests.miss(ip("10.30.0.77"), at(0));
    let full = TableAnswer { rows: vec![row()], ..answer(None, Some("web")) };
    assert!(interests.wants(&full));
    assert_eq!(interests.answered(&full, 0, at(1), |_| true), [Outcome::Add(name("web"))]);
    let late = [Outcome::Ask(Query::Address(ip("10.30.0.77")))];
    assert_eq!(interests.tick(0, at(5)), late, "only what it does not answer is asked again");
}

#[test]
fn answer_nobody_asked_for_is_unwanted() {
    let mut interests = connected();
    let unasked = TableAnswer { rows: vec![row()], ..answer(Some(Query::Name(name("web"))), Some("web")) };
    assert!(!interests.wants(&unasked));
    assert_eq!(interests.answered(&unasked, 0, at(0), |_| true), []);
    assert!(!interests.watches(&name("web")));
    assert_eq!(interests.changed(&name("web"), at(0)), []);
}

#[test]
fn service_with_an_instance_here_is_refreshed_for_ever() {
    let mut interests = connected();
    assert_eq!(interests.hold(&name("web"), at(0)), [Outcome::Add(name("web")), ask_name("web")]);
    let mut asked = Vec::new();
    for second in 1..3_600 {
        let outcomes = interests.tick(0, at(second));
        if outcomes == [ask_name("web")] {
            asked.push(second);
            interests.answered(&answer(Some(Query::Name(name("web"))), Some("web")), 0, at(second), |_| true);
        } else {
            assert_eq!(outcomes, []);
        }
        if second == 1 {
            interests.answered(&answer(Some(Query::Name(name("web"))), Some("web")), 0, at(1), |_| true);
        }
    }
    assert_eq!(asked[..3], [46, 91, 136]);
    assert_eq!(asked.len(), 79);
    interests.release(&name("web"), at(3_600));
    let last = (3_600..).find(|second| interests.tick(0, at(*second)).contains(&Outcome::Remove(name("web"))));
    assert_eq!(last, Some(4_200), "ten minutes after its last use");
    assert!(!interests.watches(&name("web")));
}

#[test]
fn use_prolongs_and_refresh_does_not() {
    let mut interests = connected();
    interests.miss(ip(VIP), at(0));
    interests.answered(&answer(Some(Query::Address(ip(VIP))), Some("web")), 0, at(0), |_| true);
    interests.touch(&name("web"), at(300));
    let removed = (1..).find(|second| {
        let outcomes = interests.tick(0, at(*second));
        if outcomes.contains(&ask_name("web")) {
            interests.answered(&answer(Some(Query::Name(name("web"))), Some("web")), 0, at(*second), |_| true);
        }
        outcomes.contains(&Outcome::Remove(name("web")))
    });
    assert_eq!(removed, Some(900));
}

#[test]
fn idle_service_stays_while_an_instance_here_may_use_it() {
    let mut interests = connected();
    interests.hold(&name("client"), at(0));
    interests.miss(ip(VIP), at(0));
    interests.answered(&answer(Some(Query::Address(ip(VIP))), Some("web")), 0, at(0), |_| true);
    let mut asked = Vec::new();
    for second in 1..7_200 {
        for outcome in interests.tick(0, at(second)) {
            match outcome {
                Outcome::Ask(Query::Name(service)) => {
                    if service == name("web") {
                        asked.push(second);
                    }
                    interests.answered(&answer(None, Some(service.short())), 0, at(second), |_| true);
                }
                other => panic!("{other:?} at {second}"),
            }
        }
    }
    assert_eq!(asked.iter().filter(|second| **second <= 600).count(), 13);
    assert_eq!(asked.windows(2).last(), Some(&[6750, 7110][..]), "it is asked for less often");
    interests.release(&name("client"), at(7_200));
    let outcomes = interests.tick(0, at(7_200));
    assert!(outcomes.contains(&Outcome::Remove(name("web"))), "nobody is left to use it");
}

#[test]
fn of_too_many_idle_services_the_oldest_go() {
    let mut interests = Interests::new();
    interests.hold(&name("client"), at(0));
    for number in 0..1_030u32 {
        let service = name(&format!("s{number}"));
        interests.hold(&service, at(0));
        interests.release(&service, at(u64::from(number)));
    }
    let outcomes = interests.tick(0, at(3_000));
    let removed: Vec<_> = (0..6).map(|number| Outcome::Remove(name(&format!("s{number}")))).collect();
    assert_eq!(outcomes, removed);
}

#[test]
fn name_that_was_looked_up_is_watched_if_it_exists() {
    let mut interests = connected();
    assert_eq!(interests.look_up(&name("web"), at(0)), (true, vec![ask_name("web")]));
    assert_eq!(interests.look_up(&name("web"), at(1)), (true, vec![]));
    let known = TableAnswer { rows: vec![row()], ..answer(Some(Query::Name(name("web"))), Some("web")) };
    assert_eq!(interests.answered(&known, 0, at(2), |_| true), [Outcome::Add(name("web"))]);

    assert_eq!(interests.look_up(&name("none"), at(3)), (true, vec![ask_name("none")]));
    let unknown = answer(Some(Query::Name(name("none"))), Some("none"));
    assert_eq!(interests.answered(&unknown, 0, at(4), |_| true), []);
    assert!(interests.watches(&name("web")) && !interests.watches(&name("none")));
}

#[test]
fn change_during_a_question_asks_once_more() {
    let mut interests = connected();
    interests.hold(&name("web"), at(0));
    assert_eq!(interests.changed(&name("web"), at(1)), []);
    assert_eq!(interests.changed(&name("web"), at(1)), []);
    let reply = answer(Some(Query::Name(name("web"))), Some("web"));
    assert_eq!(interests.answered(&reply, 0, at(2), |_| true), [ask_name("web")]);
    assert_eq!(interests.answered(&reply, 0, at(3), |_| true), []);
}

#[test]
fn everything_is_asked_anew_on_reconnection() {
    let mut interests = Interests::new();
    assert_eq!(interests.hold(&name("web"), at(0)), [Outcome::Add(name("web"))]);
    assert_eq!(interests.miss(ip(VIP), at(3)), [], "a packet may wait for the broker");
    let outcomes = interests.connected(at(4));
    assert_eq!(outcomes, [Outcome::Add(name("web")), ask_name("web"), ask_address(VIP)]);
    interests.disconnected();
    assert_eq!(interests.tick(0, at(9)), []);
    assert_eq!(interests.tick(0, at(14)), [Outcome::GiveUp(ip(VIP))]);
    assert_eq!(interests.connected(at(60)), [Outcome::Add(name("web")), ask_name("web")]);
}

#[test]
fn services_with_an_instance_here_are_asked_for_first() {
    let mut interests = connected();
    for number in 0..200u32 {
        interests.recall(&name(&format!("s{number}")), at(0));
    }
    interests.hold(&name("web"), at(0));
    interests.answered(&answer(Some(Query::Name(name("web"))), Some("web")), 0, at(1), |_| true);
    interests.disconnected();
    let outcomes = interests.connected(at(60));
    let asked: Vec<_> = outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Ask(_))).collect();
    assert_eq!((asked[0], asked.len()), (&ask_name("web"), 100));
}

#[test]
fn questions_are_rationed_and_none_is_lost() {
    let mut interests = connected();
    let asked = (0..500u32)
        .flat_map(|number| interests.hold(&name(&format!("s{number}")), at(0)))
        .filter(|outcome| matches!(outcome, Outcome::Ask(_)))
        .count();
    assert_eq!(asked, 100);
    let later: Vec<usize> = (1..=10).map(|second| interests.tick(0, at(second)).len()).collect();
    assert_eq!(later, [50, 50, 50, 50, 50, 50, 50, 50, 50, 50]);
}

#[test]
fn scan_of_addresses_has_a_bound() {
    let mut interests = Interests::new();
    let addresses = (0..5_000u32).map(|number| IpAddr::from(std::net::Ipv4Addr::from_bits(0x0a1e_0000 + number)));
    let given_up = addresses.flat_map(|address| interests.miss(address, at(0))).count();
    assert_eq!(given_up, 5_000 - MAX_OPEN);
    assert_eq!(interests.refused(), 904);
    assert_eq!(interests.tick(0, at(5)).len(), MAX_OPEN, "without a broker all of them are given up in time");
    assert!(interests.queue.pop().is_none() && interests.open.is_empty());
}

#[test]
fn who_scans_addresses_keeps_no_name_back() {
    let mut interests = connected();
    let scanned = (0..1_000u32).map(|number| IpAddr::from(std::net::Ipv4Addr::from_bits(0x0a1e_0000 + number)));
    let asked = scanned.flat_map(|address| interests.miss(address, at(0))).count();
    assert_eq!(asked, 100);
    assert_eq!(interests.look_up(&name("web"), at(0)), (true, vec![]), "it has to wait for the next second");
    assert_eq!(interests.tick(0, at(1))[0], ask_name("web"));
    let names = (0..1_000).map(|number| name(&format!("s{number}")));
    names.for_each(|service| drop(interests.look_up(&service, at(1))));
    let of_addresses = |outcome: &&Outcome| matches!(outcome, Outcome::Ask(Query::Address(_)));
    assert_eq!(interests.tick(0, at(2)).iter().filter(of_addresses).count(), 25, "nor the other way round");
}

#[test]
fn a_question_has_its_time_from_when_it_is_asked() {
    let mut interests = connected();
    let address = |number: u32| IpAddr::from(std::net::Ipv4Addr::from_bits(0x0a1e_0000 + number));
    for number in 0..450 {
        interests.miss(address(number), at(0));
    }
    let mut asked_last = None;
    for second in 1..=8 {
        for outcome in interests.tick(0, at(second)) {
            assert_ne!(outcome, Outcome::GiveUp(address(449)), "after {second} seconds");
            asked_last = asked_last.or((outcome == Outcome::Ask(Query::Address(address(449)))).then_some(second));
        }
    }
    assert!(asked_last.is_some_and(|second| second > 5), "{asked_last:?}");
}

#[test]
fn nobody_waits_for_what_is_only_inquired() {
    let mut interests = connected();
    assert_eq!(interests.inquire(ip(VIP), at(0)), [ask_address(VIP)]);
    assert_eq!(interests.tick(0, at(5)), [ask_address(VIP)]);
    assert_eq!(interests.tick(0, at(10)), []);
    assert_eq!(interests.inquire(ip(VIP), at(11)), [ask_address(VIP)]);
    assert_eq!(interests.answered(&answer(Some(Query::Address(ip(VIP))), None), 0, at(12), |_| false), []);
}

fn connected() -> Interests {
    let mut interests = Interests::new();
    assert_eq!(interests.connected(at(0)), []);
    interests
}

const fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn name(short: &str) -> ServiceName {
    format!("app.ns.{short}.ns").parse().unwrap()
}

fn ask_address(address: &str) -> Outcome {
    Outcome::Ask(Query::Address(ip(address)))
}

fn ask_name(short: &str) -> Outcome {
    Outcome::Ask(Query::Name(name(short)))
}

fn answer(query: Option<Query>, service: Option<&str>) -> TableAnswer {
    TableAnswer { query, service: service.map(name), rows: Vec::new() }
}

fn row() -> TableRow {
    TableRow {
        number: 0,
        namespace: FamilyPair { v4: Some([10, 18, 2, 2].into()), v6: None },
        instance: FamilyPair { v4: Some([10, 30, 0, 1].into()), v6: None },
        host: [192, 0, 2, 2].into(),
        host_port: 50103,
        weight: 1,
        services: vec![SemanticAddress { policy: Policy::RoundRobin, address: ip(VIP) }],
    }
}
