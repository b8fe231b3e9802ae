//! What the law promises, without a kernel and without root.

use netmanager_common::abi::{Answers, COUNTED_SLOTS, Endpoint, FLOW_CLOSING, Mac, PEER_OURS, Slot};
use netmanager_common::addr::Addr;
use netmanager_common::frame::{SliceFrame, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN};
use netmanager_common::pipeline::{inbound, outbound};
use netmanager_common::testing::*;
use netmanager_common::verdict::{DropReason, Miss, Verdict};
use proptest::prelude::*;

fn judge(world: &mut World, direction: Direction, packet: &mut [u8]) -> Result<Verdict, DropReason> {
    let mut frame = SliceFrame::new(packet);
    match direction {
        Direction::Outbound(port) => outbound(&mut frame, world, port),
        Direction::Inbound(outer) => inbound(&mut frame, world, &outer),
    }
}

#[test]
fn every_case_of_the_table_holds() {
    for case in cases() {
        let mut world = World::sample();
        world.pick = case.pick;
        let mut packet = case.packet.clone();
        assert_eq!(judge(&mut world, case.direction, &mut packet), case.verdict, "{}", case.name);
        match case.rewritten {
            None => assert_eq!(packet, case.packet, "{}: the packet must stay", case.name),
            Some(expected) => {
                assert_eq!(addresses(&packet), expected, "{}", case.name);
                assert!(checksums_hold(&packet), "{}: checksums", case.name);
                assert_only_addresses_and_checksums_changed(&case.packet, &packet, case.name);
            }
        }
    }
}

fn assert_only_addresses_and_checksums_changed(before: &[u8], after: &[u8], name: &str) {
    assert_eq!(before.len(), after.len(), "{name}");
    let v6 = before[0] >> 4 == 6;
    let header = if v6 { 40 } else { usize::from(before[0] & 15) * 4 };
    let protocol = if v6 { before[6] } else { before[9] };
    let transport_sum = header
        + match protocol {
            6 => 16,
            17 => 6,
            _ => 2,
        };
    for (at, (old, new)) in before.iter().zip(after).enumerate() {
        let may_change = if v6 { (8..40).contains(&at) } else { (10..20).contains(&at) }
            || (transport_sum..transport_sum + 2).contains(&at);
        assert!(may_change || old == new, "{name}: byte {at} changed");
    }
}

#[test]
fn reply_regains_service_address() {
    for v6 in [false, true] {
        for (there, back) in [
            (Payload::Tcp(40_000, 80), Payload::Tcp(80, 40_000)),
            (Payload::Udp(5_000, 53), Payload::Udp(53, 5_000)),
            (Payload::EchoRequest(9), Payload::EchoReply(9)),
        ] {
            let mut world = World::sample();
            let mut request = packet(CLIENT.of(v6), DB_SERVICE.of(v6), there);
            let sent = judge(&mut world, Direction::Outbound(PORT), &mut request);
            assert_eq!(sent, Ok(Verdict::Send { peer: 1 }));

            let mut reply = packet(DB0_INSTANCE.of(v6), CLIENT.of(v6), back);
            let received = judge(&mut world, Direction::Inbound(OURS), &mut reply);
            assert_eq!(received, Ok(Verdict::Local { ifindex: PORT, mac: CLIENT_MAC }));
            assert_eq!(addresses(&reply), (DB_SERVICE.of(v6), CLIENT.of(v6)), "{there:?}");
            assert!(checksums_hold(&reply));
        }
    }
}

#[test]
fn local_reply_regains_service_address() {
    for v6 in [false, true] {
        let mut world = World::sample();
        let mut request = packet(CLIENT.of(v6), WEB_SERVICE.of(v6), Payload::Tcp(40_000, 80));
        judge(&mut world, Direction::Outbound(PORT), &mut request).expect("delivered here");
        assert_eq!(addresses(&request), (CLIENT_INSTANCE.of(v6), WEB.of(v6)));

        let mut reply = packet(WEB.of(v6), CLIENT_INSTANCE.of(v6), Payload::Tcp(80, 40_000));
        let verdict = judge(&mut world, Direction::Outbound(PORT), &mut reply);
        assert_eq!(verdict, Ok(Verdict::Local { ifindex: PORT, mac: CLIENT_MAC }));
        assert_eq!(addresses(&reply), (WEB_SERVICE.of(v6), CLIENT.of(v6)));
        assert!(checksums_hold(&reply));
    }
}

#[test]
fn two_services_on_the_same_ports_keep_their_replies_apart() {
    let mut world = World::sample();
    let ports = Payload::Tcp(40_000, 80);
    for service in [DB_SERVICE, WEB_SERVICE] {
        judge(&mut world, Direction::Outbound(PORT), &mut packet(CLIENT.v4(), service.v4(), ports)).expect("carried");
    }
    let mut from_db = packet(DB0_INSTANCE.v4(), CLIENT.v4(), Payload::Tcp(80, 40_000));
    judge(&mut world, Direction::Inbound(OURS), &mut from_db).expect("delivered");
    assert_eq!(addresses(&from_db).0, DB_SERVICE.v4());
    let mut from_web = packet(WEB.v4(), CLIENT_INSTANCE.v4(), Payload::Tcp(80, 40_000));
    judge(&mut world, Direction::Outbound(PORT), &mut from_web).expect("delivered");
    assert_eq!(addresses(&from_web).0, WEB_SERVICE.v4());
}

/// On the wire both are one: what counts is which began last.
#[test]
fn a_port_used_before_by_service_address_reaches_the_instance_by_its_own() {
    for v6 in [false, true] {
        let elsewhere = (DB_SERVICE, DB0_INSTANCE, (DB0_INSTANCE, CLIENT), Direction::Inbound(OURS));
        let here = (WEB_SERVICE, WEB_INSTANCE, (WEB, CLIENT_INSTANCE), Direction::Outbound(PORT));
        for (service, instance, (from, to), way) in [elsewhere, here] {
            let mut world = World::sample();
            for asked in [service, instance, service, service, instance, instance, service] {
                let mut request = packet(CLIENT.of(v6), asked.of(v6), Payload::Tcp(40_000, 80));
                judge(&mut world, Direction::Outbound(PORT), &mut request).expect("carried");
                for flags in [TCP_SYN | TCP_ACK, TCP_ACK, TCP_FIN | TCP_ACK] {
                    let mut segment =
                        packet(CLIENT.of(v6), asked.of(v6), Payload::Segment(40_000, 80, flags & !TCP_SYN));
                    judge(&mut world, Direction::Outbound(PORT), &mut segment).expect("carried");
                    let mut answer = packet(from.of(v6), to.of(v6), Payload::Segment(80, 40_000, flags));
                    judge(&mut world, way, &mut answer).expect("delivered");
                    assert_eq!(addresses(&answer), (asked.of(v6), CLIENT.of(v6)), "{flags:#x}");
                    assert!(checksums_hold(&answer));
                }
            }
        }
    }
}

/// Else its rows were swept with those of what has ended.
#[test]
fn a_connection_from_a_port_of_one_that_ended_is_not_taken_for_ending() {
    for v6 in [false, true] {
        let mut world = World::sample();
        let mut send = |flags| {
            let mut segment = packet(CLIENT.of(v6), DB_SERVICE.of(v6), Payload::Segment(40_000, 80, flags));
            judge(&mut world, Direction::Outbound(PORT), &mut segment).expect("carried");
            let mut answer = packet(DB0_INSTANCE.of(v6), CLIENT.of(v6), Payload::Segment(80, 40_000, flags | TCP_ACK));
            let ending = |world: &World| world.flows.values().filter(|flow| flow.state & FLOW_CLOSING != 0).count();
            let before = ending(&world);
            judge(&mut world, Direction::Inbound(OURS), &mut answer).expect("delivered");
            (before, ending(&world))
        };
        assert_eq!(send(TCP_SYN), (0, 0));
        assert_eq!(send(TCP_FIN).1, 2);
        assert_eq!(send(TCP_SYN).1, 0);
    }
}

/// Else a client that has few ports, and uses them again and again, never hears of another instance.
#[test]
fn a_connection_from_a_port_of_one_that_ended_chooses_anew() {
    for v6 in [false, true] {
        for (ours, flags) in [(true, TCP_FIN), (true, TCP_RST), (false, TCP_FIN), (false, TCP_RST)] {
            let mut world = World::sample();
            let there = |world: &mut World, flags| {
                let mut segment = packet(CLIENT.of(v6), DB_SERVICE.of(v6), Payload::Segment(40_000, 80, flags));
                judge(world, Direction::Outbound(PORT), &mut segment)
            };
            let back = |world: &mut World, flags| {
                let mut segment = packet(DB0_INSTANCE.of(v6), CLIENT.of(v6), Payload::Segment(80, 40_000, flags));
                judge(world, Direction::Inbound(OURS), &mut segment).expect("delivered");
            };
            assert_eq!(there(&mut world, TCP_SYN), Ok(Verdict::Send { peer: 1 }));
            world.pick = 1;
            assert_eq!(there(&mut world, TCP_SYN), Ok(Verdict::Send { peer: 1 }), "it is sent again");
            back(&mut world, TCP_SYN | TCP_ACK);
            assert_eq!(there(&mut world, TCP_SYN), Ok(Verdict::Send { peer: 1 }), "the answer was lost");
            match ours {
                true => assert_eq!(there(&mut world, flags | TCP_ACK), Ok(Verdict::Send { peer: 1 })),
                false => back(&mut world, flags | TCP_ACK),
            }
            assert_eq!(there(&mut world, TCP_ACK), Ok(Verdict::Send { peer: 1 }), "what is left of it");
            assert_eq!(there(&mut world, TCP_SYN), Ok(Verdict::Send { peer: 2 }), "{ours} {flags}");
            world.pick = 0;
            assert_eq!(there(&mut world, TCP_SYN), Ok(Verdict::Send { peer: 2 }), "it is sent again");
            let counts = [3, 4].map(|slot| world.chosen[&if v6 { slot + 10 } else { slot }]);
            assert_eq!(counts, [1, 1]);
        }
    }
}

/// A neighbour's answers are on a row of another kind.
#[test]
fn who_was_refused_by_a_neighbour_chooses_anew() {
    let mut world = World::sample();
    let mut call = |port| {
        let mut request = packet(CLIENT.v4(), TURN_SERVICE.v4(), Payload::Tcp(port, 80));
        let verdict = judge(&mut world, Direction::Outbound(PORT), &mut request);
        let mut refusal = packet(WEB.v4(), CLIENT_INSTANCE.v4(), Payload::Segment(80, port, TCP_RST | TCP_ACK));
        if let Ok(Verdict::Local { .. }) = verdict {
            judge(&mut world, Direction::Outbound(PORT), &mut refusal).expect("delivered");
        }
        verdict
    };
    assert_eq!(call(40_001), Ok(Verdict::Send { peer: 2 }));
    assert!(matches!(call(40_000), Ok(Verdict::Local { .. })));
    assert_eq!(call(40_000), Ok(Verdict::Send { peer: 1 }));
}

#[test]
fn a_stranger_on_the_same_ports_is_not_taken_for_the_service() {
    let mut world = World::sample();
    let mut request = packet(CLIENT.v4(), DB_SERVICE.v4(), Payload::Udp(5_000, 5_000));
    judge(&mut world, Direction::Outbound(PORT), &mut request).expect("carried to db#0");
    let mut stranger = packet(DB1_INSTANCE.v4(), CLIENT.v4(), Payload::Udp(5_000, 5_000));
    judge(&mut world, Direction::Inbound(UPSTREAM), &mut stranger).expect("delivered");
    assert_eq!(addresses(&stranger).0, DB1_INSTANCE.v4());
}

#[test]
fn a_flow_stays_with_its_instance_until_that_goes() {
    let mut world = World::sample();
    let request = packet(CLIENT.v4(), DB_SERVICE.v4(), Payload::Tcp(40_000, 80));
    let to = |world: &mut World| judge(world, Direction::Outbound(PORT), &mut request.clone());
    assert_eq!(to(&mut world), Ok(Verdict::Send { peer: 1 }));
    world.pick = 1;
    assert_eq!(to(&mut world), Ok(Verdict::Send { peer: 1 }), "an established flow is never moved");

    let gone = Slot { generation: 2, ..world.slots[&3] };
    world.slots.insert(3, gone);
    assert_eq!(to(&mut world), Ok(Verdict::Send { peer: 2 }), "its instance is gone: it chooses again");
    world.slots.insert(3, Slot { generation: 3, ..gone });
    assert_eq!(to(&mut world), Ok(Verdict::Send { peer: 2 }), "another instance in the old slot does not draw it back");
}

#[test]
fn a_connection_whose_instance_has_gone_is_not_another_ones() {
    for v6 in [false, true] {
        for (service, semantic) in [(DB_SERVICE, true), (DB0_INSTANCE, false)] {
            let mut world = World::sample();
            let ports = Payload::Tcp(40_000, 80);
            let mut first = packet(CLIENT.of(v6), service.of(v6), ports);
            assert_eq!(judge(&mut world, Direction::Outbound(PORT), &mut first), Ok(Verdict::Send { peer: 1 }));
            let send = |world: &mut World, mut segment: Vec<u8>| judge(world, Direction::Outbound(PORT), &mut segment);
            let later = || packet(CLIENT.of(v6), service.of(v6), Payload::Segment(40_000, 80, TCP_ACK));
            assert_eq!(send(&mut world, later()), Ok(Verdict::Send { peer: 1 }));

            let slot = if v6 { 13 } else { 3 };
            world.slots.insert(slot, Slot { generation: 2, ..Slot::default() });
            world.services.remove(&DB0_INSTANCE.of(v6));
            world.pick = 1;
            assert_eq!(send(&mut world, later()), Ok(Verdict::Slow(Miss::Gone)), "of {service:?}");
            assert_eq!(send(&mut world, later()), Ok(Verdict::Slow(Miss::Gone)), "as long as it is tried");

            // A connection of the same ports that begins now is a new one.
            let new = send(&mut world, packet(CLIENT.of(v6), service.of(v6), ports));
            match semantic {
                true => assert_eq!(new, Ok(Verdict::Send { peer: 2 })),
                false => assert_eq!(new, Ok(Verdict::Slow(Miss::Service))),
            }
        }
    }
}

#[test]
fn what_no_connection_binds_chooses_again() {
    for payload in [Payload::Udp(5_000, 53), Payload::EchoRequest(7)] {
        let mut world = World::sample();
        let mut first = packet(CLIENT.v4(), DB_SERVICE.v4(), payload);
        judge(&mut world, Direction::Outbound(PORT), &mut first).expect("carried");
        world.slots.insert(3, Slot { generation: 2, ..Slot::default() });
        world.peers.get_mut(&2).unwrap().flags = PEER_OURS;
        world.pick = 1;
        let mut next = packet(CLIENT.v4(), DB_SERVICE.v4(), payload);
        assert_eq!(judge(&mut world, Direction::Outbound(PORT), &mut next), Ok(Verdict::Send { peer: 2 }));
    }
}

#[test]
fn a_client_that_has_gone_is_not_answered_in_silence() {
    let mut world = World::sample();
    let mut request = packet(DB0_INSTANCE.v4(), WEB.v4(), Payload::Tcp(40_000, 80));
    judge(&mut world, Direction::Inbound(OURS), &mut request).expect("delivered");
    let mut answer = packet(WEB.v4(), DB0_INSTANCE.v4(), Payload::Tcp(80, 40_000));
    assert_eq!(judge(&mut world, Direction::Outbound(PORT), &mut answer), Ok(Verdict::Send { peer: 1 }));
    world.slots.insert(3, Slot { generation: 2, ..Slot::default() });
    world.services.remove(&DB0_INSTANCE.v4());
    let mut more = packet(WEB.v4(), DB0_INSTANCE.v4(), Payload::Segment(80, 40_000, TCP_ACK));
    assert_eq!(judge(&mut world, Direction::Outbound(PORT), &mut more), Ok(Verdict::Slow(Miss::Gone)));
}

/// First answers of TCP connections, here and elsewhere, by whether they are refusals.
#[test]
fn who_answers_and_who_refuses_is_counted_once() {
    let cases = [(DB_SERVICE, 3, DB0_INSTANCE, CLIENT, true), (WEB_SERVICE, 1, WEB, CLIENT_INSTANCE, false)];
    for (service, slot, from, to, remote) in cases {
        for (flags, answered, refused) in [(TCP_SYN | TCP_ACK, 1, 0), (TCP_RST | TCP_ACK, 0, 1)] {
            let mut world = World::sample();
            let mut request = packet(CLIENT.v4(), service.v4(), Payload::Tcp(40_000, 80));
            for _ in 0..2 {
                judge(&mut world, Direction::Outbound(PORT), &mut request.clone()).expect("carried");
            }
            let direction = if remote { Direction::Inbound(OURS) } else { Direction::Outbound(PORT) };
            for _ in 0..3 {
                let mut answer = packet(from.v4(), to.v4(), Payload::Segment(80, 40_000, flags));
                judge(&mut world, direction, &mut answer).expect("delivered");
            }
            let expected = Answers { asked: 1, answered, refused };
            assert_eq!(world.answers[&slot], expected, "{service:?} {flags}");
            assert_eq!(world.answers[&0].asked, 1);
            // Datagrams prove nothing.
            request = packet(CLIENT.v4(), service.v4(), Payload::Udp(40_000, 80));
            judge(&mut world, Direction::Outbound(PORT), &mut request).expect("carried");
            judge(&mut world, direction, &mut packet(from.v4(), to.v4(), Payload::Udp(80, 40_000))).expect("delivered");
            assert_eq!((world.answers[&slot], world.chosen[&slot]), (expected, 2));
        }
    }
}

/// Else they were another slot's, whose number has the same last bits.
#[test]
fn answers_of_a_slot_beyond_the_counted_ones_are_nobodys() {
    let mut world = World::sample();
    let far = COUNTED_SLOTS + 1;
    world.slots.insert(far, world.slots[&3]);
    let service = world.services.get_mut(&DB_SERVICE.v4()).unwrap();
    (service.count, service.first) = (1, far);
    for flags in [TCP_SYN | TCP_ACK, TCP_RST | TCP_ACK] {
        let mut request = packet(CLIENT.v4(), DB_SERVICE.v4(), Payload::Tcp(40_000, 80));
        judge(&mut world, Direction::Outbound(PORT), &mut request).expect("carried");
        let mut answer = packet(DB0_INSTANCE.v4(), CLIENT.v4(), Payload::Segment(80, 40_000, flags));
        judge(&mut world, Direction::Inbound(OURS), &mut answer).expect("delivered");
        assert_eq!(addresses(&answer).0, DB_SERVICE.v4());
    }
    assert_eq!((world.chosen[&far], world.answers.len()), (1, 0), "{:?}", world.answers);
}

#[test]
fn a_trial_is_one_flow() {
    let mut world = World::sample();
    let mut peers = Vec::new();
    for port in 0..4 {
        let request = packet(CLIENT.v4(), TRIED_SERVICE.v4(), Payload::Tcp(40_000 + port, 80));
        for _ in 0..2 {
            peers.push(judge(&mut world, Direction::Outbound(PORT), &mut request.clone()));
        }
    }
    let to = |peer| Ok(Verdict::Send { peer });
    assert_eq!(peers, [to(2), to(2), to(1), to(1), to(1), to(1), to(1), to(1)]);
}

#[test]
fn a_moved_node_keeps_its_flows() {
    let mut world = World::sample();
    let mut request = packet(CLIENT.v4(), DB_SERVICE.v4(), Payload::Tcp(40_000, 80));
    judge(&mut world, Direction::Outbound(PORT), &mut request.clone()).expect("carried");
    let slot = world.slots[&3];
    world.slots.insert(3, Slot { peer: 2, ..slot });
    world.pick = 1;
    assert_eq!(judge(&mut world, Direction::Outbound(PORT), &mut request), Ok(Verdict::Send { peer: 2 }));
}

#[test]
fn every_instance_is_chosen() {
    let mut world = World::sample();
    let mut seen = std::collections::HashSet::new();
    for port in 0..64 {
        world.pick = u32::from(port).wrapping_mul(0x9e37_79b9);
        let mut request = packet(CLIENT.v4(), DB_SERVICE.v4(), Payload::Tcp(40_000 + port, 80));
        seen.insert(format!("{:?}", judge(&mut world, Direction::Outbound(PORT), &mut request)));
    }
    assert_eq!(seen.len(), 2, "{seen:?}");
}

#[test]
fn turns_are_taken_one_after_the_other() {
    let mut world = World::sample();
    let mut verdicts = Vec::new();
    for port in 0..6 {
        let request = packet(CLIENT.v4(), TURN_SERVICE.v4(), Payload::Tcp(40_000 + port, 80));
        let verdict = judge(&mut world, Direction::Outbound(PORT), &mut request.clone());
        assert_eq!(
            judge(&mut world, Direction::Outbound(PORT), &mut request.clone()),
            verdict,
            "a flow takes one turn"
        );
        verdicts.push(verdict);
    }
    let web = Ok(Verdict::Local { ifindex: PORT, mac: WEB_MAC });
    let round = [Ok(Verdict::Send { peer: 2 }), web, Ok(Verdict::Send { peer: 1 })];
    assert_eq!(verdicts, [round, round].concat());
    assert_eq!(world.chosen, [(1, 2), (3, 2), (4, 2)].into());
}

#[test]
fn a_client_always_gets_the_same() {
    for client in [CLIENT, WEB] {
        let mut seen = std::collections::HashSet::new();
        for port in 0..32 {
            let mut world = World::sample();
            world.pick = u32::from(port);
            let mut request = packet(client.v4(), STICKY_SERVICE.v4(), Payload::Udp(40_000 + port, 80 + port));
            seen.insert(format!("{:?}", judge(&mut world, Direction::Outbound(PORT), &mut request)));
        }
        assert_eq!(seen.len(), 1, "{seen:?}");
    }
}

#[test]
fn clients_are_spread_over_the_cells_and_all_nodes_agree_on_them() {
    use netmanager_common::policy::{cell, index};
    // Part of what nodes of different versions must agree on.
    assert_eq!(cell(&Addr::v4([10, 30, 0, 2])), 0xd98ace95);
    assert_eq!(cell(&CLIENT_INSTANCE.v6()), 0xfa644349);
    let mut counts = [0_u32; 16];
    for client in 0..16_000_u32 {
        let [.., a, b] = client.to_be_bytes();
        counts[index(cell(&Addr::v4([10, 30, a, b])), 16) as usize] += 1;
    }
    assert!(counts.iter().all(|count| (850..1_150).contains(count)), "{counts:?}");
}

#[test]
fn relaxed_nodes_take_senders_behind_nat() {
    let mut world = relaxed();
    let mut foreign = packet(DB0_INSTANCE.v4(), WEB.v4(), Payload::Tcp(1, 2));
    assert!(matches!(judge(&mut world, Direction::Inbound(UPSTREAM), &mut foreign), Ok(Verdict::Local { .. })));
}

#[test]
fn nothing_is_a_service_before_the_node_is_configured() {
    let mut world = World::sample();
    world.config = Default::default();
    world.config.service_v4 = Addr([0xff; 16]);
    world.config.service_v6 = Addr([0xff; 16]);
    let mut request = packet(CLIENT.v4(), DB_SERVICE.v4(), Payload::Tcp(1, 2));
    assert_eq!(judge(&mut world, Direction::Outbound(PORT), &mut request), Ok(Verdict::Pass));
}

#[test]
fn random_frames_reach_every_verdict() {
    let mut world = World::sample();
    let mut frames = Frames::new(1);
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..20_000 {
        let (direction, mut packet) = frames.frame();
        seen.insert(match judge(&mut world, direction, &mut packet) {
            Ok(Verdict::Send { .. }) => "send".to_owned(),
            Ok(Verdict::Local { .. }) => "local".to_owned(),
            other => format!("{other:?}"),
        });
    }
    for expected in [
        "send".to_owned(),
        "local".to_owned(),
        format!("{:?}", Ok::<_, DropReason>(Verdict::Pass)),
        format!("{:?}", Ok::<_, DropReason>(Verdict::Slow(Miss::Source))),
        format!("{:?}", Ok::<_, DropReason>(Verdict::Slow(Miss::Fragment))),
        format!("{:?}", Err::<Verdict, _>(DropReason::ForeignSource)),
        format!("{:?}", Err::<Verdict, _>(DropReason::Malformed)),
        format!("{:?}", Err::<Verdict, _>(DropReason::Spoofed)),
    ] {
        assert!(seen.contains(&expected), "{expected} not among {seen:?}");
    }
}

proptest! {
    #[test]
    fn no_input_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), outer in any::<[u8; 4]>(), way in any::<bool>()) {
        let mut packet = bytes;
        let direction = if way { Direction::Outbound(PORT) } else { Direction::Inbound(Addr::v4(outer)) };
        let _ = judge(&mut World::sample(), direction, &mut packet);
    }

    #[test]
    fn checksums_stay_valid(seed in any::<u64>(), pick in any::<u32>()) {
        let mut world = World::sample();
        world.pick = pick;
        let mut frames = Frames::new(seed);
        for _ in 0..50 {
            let (direction, mut packet) = frames.frame();
            let held = checksums_hold(&packet);
            if let Ok(Verdict::Send { .. } | Verdict::Local { .. }) = judge(&mut world, direction, &mut packet) {
                prop_assert!(!held || checksums_hold(&packet), "{packet:02x?}");
            }
        }
    }

    #[test]
    fn a_refused_packet_is_left_as_it_was(seed in any::<u64>()) {
        let mut world = World::sample();
        let mut frames = Frames::new(seed);
        for _ in 0..50 {
            let (direction, packet) = frames.frame();
            let mut after = packet.clone();
            if matches!(judge(&mut world, direction, &mut after), Ok(Verdict::Slow(_) | Verdict::Pass)) {
                prop_assert_eq!(&packet, &after);
            }
        }
    }

    #[test]
    fn a_choice_is_always_a_candidate(count in 1_u32..1000, random in any::<u32>()) {
        prop_assert!(netmanager_common::policy::index(random, count) < count);
    }
}

#[test]
fn what_a_flow_has_noted_is_read_again_in_a_new_epoch() {
    for v6 in [false, true] {
        let mut world = World::sample();
        world.pick = 1;
        let request = packet(CLIENT.of(v6), DB_SERVICE.of(v6), Payload::Tcp(40_000, 80));
        let to = |world: &mut World| judge(world, Direction::Outbound(PORT), &mut request.clone());
        assert_eq!(to(&mut world), Ok(Verdict::Send { peer: 2 }));
        let mut answer = packet(DB1_INSTANCE.of(v6), CLIENT.of(v6), Payload::Tcp(80, 40_000));
        let reply = answer.clone();
        judge(&mut world, Direction::Inbound(UPSTREAM), &mut answer).expect("delivered");

        let moved = Endpoint { ifindex: 9, mac: [2; 6], ..world.endpoints[&CLIENT.of(v6)] };
        world.endpoints.insert(CLIENT.of(v6), moved);
        world.config.epoch += 1;
        world.pick = 0;
        assert_eq!(to(&mut world), Err(DropReason::Spoofed), "its port is another now");
        assert_eq!(
            judge(&mut world, Direction::Outbound(9), &mut request.clone()),
            Ok(Verdict::Send { peer: 2 }),
            "the flow keeps its instance"
        );
        let mut answer = reply;
        let verdict = judge(&mut world, Direction::Inbound(UPSTREAM), &mut answer);
        assert_eq!(verdict, Ok(Verdict::Local { ifindex: 9, mac: Mac([2; 6]) }));
        assert_eq!(addresses(&answer).0, DB_SERVICE.of(v6), "and its service address");

        world.endpoints.remove(&CLIENT.of(v6));
        world.config.epoch += 1;
        assert_eq!(judge(&mut world, Direction::Outbound(9), &mut request.clone()), Err(DropReason::Spoofed));
        let verdict = judge(&mut world, Direction::Inbound(UPSTREAM), &mut answer.clone());
        assert_eq!(verdict, Err(DropReason::NotOurs));
    }
}

#[test]
fn a_full_table_refuses_new_flows_and_carries_what_needs_none() {
    let mut world = World::sample();
    let to = |world: &mut World, destination: Pair, port| {
        let mut request = packet(CLIENT.v4(), destination.v4(), Payload::Tcp(port, 80));
        judge(world, Direction::Outbound(PORT), &mut request)
    };
    assert_eq!(to(&mut world, DB_SERVICE, 1), Ok(Verdict::Send { peer: 1 }));
    world.room = Some(world.flows.len());
    assert_eq!(to(&mut world, DB_SERVICE, 1), Ok(Verdict::Send { peer: 1 }), "it has its rows");
    assert_eq!(to(&mut world, DB_SERVICE, 2), Err(DropReason::TableFull));
    assert_eq!(to(&mut world, DB1_INSTANCE, 3), Ok(Verdict::Send { peer: 2 }), "nothing must be remembered");
    let mut request = packet(DB0_INSTANCE.v4(), WEB.v4(), Payload::Tcp(7, 80));
    assert!(judge(&mut world, Direction::Inbound(OURS), &mut request).is_ok());
}

#[test]
fn a_peer_sends_only_as_what_came_by_the_tunnel() {
    // A row of what an instance here sends is none for a peer that forges the same addresses.
    let mut world = relaxed();
    let mut request = packet(CLIENT.v4(), WEB_SERVICE.v4(), Payload::Tcp(40_000, 80));
    let mut forged = request.clone();
    judge(&mut world, Direction::Outbound(PORT), &mut request).expect("delivered here");
    let verdict = judge(&mut world, Direction::Inbound(OURS), &mut forged);
    assert_eq!(verdict, Err(DropReason::NotOurs));
}
