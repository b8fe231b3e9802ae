//! What the law promises of ICMP errors: whoever sent the packet that one is about understands it.

use netmanager_common::abi::{FLOW_HOST, Flow, FlowKey};
use netmanager_common::addr::Addr;
use netmanager_common::frame::SliceFrame;
use netmanager_common::icmp::{self, Cause, MAX_LEN, Message};
use netmanager_common::pipeline;
use netmanager_common::testing::*;
use netmanager_common::verdict::{DropReason, Miss, Verdict};
use proptest::prelude::*;

const CAUSES: [Cause; 3] = [Cause::Port, Cause::Host, Cause::TooBig(1_200)];
const TO_CLIENT: Result<Verdict, DropReason> = Ok(Verdict::Local { ifindex: PORT, mac: CLIENT_MAC });
const TO_WEB: Result<Verdict, DropReason> = Ok(Verdict::Local { ifindex: PORT, mac: WEB_MAC });

fn payloads() -> [Payload; 4] {
    [Payload::Tcp(40_000, 80), Payload::Udp(40_000, 80), Payload::UdpBare(40_000, 80), Payload::EchoRequest(9)]
}

/// The same from the other end.
fn back(payload: Payload) -> Payload {
    match payload {
        Payload::Tcp(a, b) => Payload::Tcp(b, a),
        Payload::Udp(a, b) => Payload::Udp(b, a),
        Payload::UdpBare(a, b) => Payload::UdpBare(b, a),
        Payload::EchoRequest(id) => Payload::EchoReply(id),
        other => other,
    }
}

/// The error about this packet, as whoever it is for would send it.
fn error(source: Addr, destination: Addr, payload: Payload, cause: Cause) -> Vec<u8> {
    let mut out = [0; MAX_LEN];
    icmp::answer(&packet(source, destination, payload), cause, &mut out).expect("there is an error about it").to_vec()
}

fn send(world: &mut World, source: Addr, destination: Addr, payload: Payload) -> Result<Verdict, DropReason> {
    pipeline::outbound(&mut SliceFrame::new(&mut packet(source, destination, payload)), world, PORT)
}

fn take(world: &mut World, source: Addr, destination: Addr, payload: Payload) -> Result<Verdict, DropReason> {
    pipeline::inbound(&mut SliceFrame::new(&mut packet(source, destination, payload)), world, &OURS)
}

fn each(mut check: impl FnMut(bool, Payload, Cause)) {
    for v6 in [false, true] {
        for payload in payloads() {
            for cause in CAUSES {
                check(v6, payload, cause);
            }
        }
    }
}

#[test]
fn errors_are_whole_and_say_what_they_should() {
    each(|v6, payload, cause| {
        let bytes = error(CLIENT.of(v6), DB_SERVICE.of(v6), payload, cause);
        assert!(checksums_hold(&bytes), "{payload:?} {cause:?}");
        assert!(icmp::reports(&bytes));
        assert_eq!(addresses(&bytes), (DB_SERVICE.of(v6), CLIENT.of(v6)));
        let about = Message::read(&bytes).expect("it is one").about;
        assert_eq!((about.source, about.destination), (CLIENT.of(v6), DB_SERVICE.of(v6)));
        let at = if v6 { 40 } else { 20 };
        let (kind, mtu) = ([bytes[at], bytes[at + 1]], [bytes[at + 6], bytes[at + 7]]);
        match (cause, v6) {
            (Cause::Port, false) => assert_eq!(kind, [3, 3]),
            (Cause::Host, false) => assert_eq!(kind, [3, 1]),
            (Cause::TooBig(is), false) => assert_eq!((kind, mtu), ([3, 4], is.to_be_bytes())),
            (Cause::Port, true) => assert_eq!(kind, [1, 4]),
            (Cause::Host, true) => assert_eq!(kind, [1, 3]),
            (Cause::TooBig(is), true) => assert_eq!((kind, mtu), ([2, 0], is.to_be_bytes())),
        }
    });
}

#[test]
fn an_error_is_no_longer_than_passes_everywhere() {
    for (v6, limit) in [(false, 576), (true, MAX_LEN)] {
        let mut long = packet(CLIENT.of(v6), DB_SERVICE.of(v6), Payload::Tcp(1, 2));
        long.resize(9_000, 7);
        let mut out = [0; MAX_LEN];
        let bytes = icmp::answer(&long, Cause::TooBig(1_000), &mut out).expect("one").to_vec();
        assert_eq!(bytes.len(), limit);
        assert!(checksums_hold(&bytes));
    }
}

#[test]
fn nothing_is_said_about_errors_and_later_fragments() {
    let mut out = [0; MAX_LEN];
    for v6 in [false, true] {
        let about_error = error(CLIENT.of(v6), WEB.of(v6), Payload::Udp(1, 2), Cause::Port);
        assert_eq!(icmp::answer(&about_error, Cause::Host, &mut out), None);
    }
    let mut fragment = packet(CLIENT.v4(), WEB.v4(), Payload::Udp(1, 2));
    fragment[7] = 0xb9;
    assert_eq!(icmp::answer(&fragment, Cause::Host, &mut out), None);
    let mut fragment = packet(CLIENT.v6(), WEB.v6(), Payload::Other(44));
    (fragment[40], fragment[43]) = (17, 8);
    assert_eq!(icmp::answer(&fragment, Cause::Host, &mut out), None);
    assert_eq!(icmp::answer(&[], Cause::Host, &mut out), None);
}

/// The sender of a request understands what comes back from a node of ours about it, byte by byte as if no overlay were between.
#[test]
fn a_client_understands_an_error_through_the_tunnel() {
    each(|v6, payload, cause| {
        for service in [DB_SERVICE, DB0_INSTANCE] {
            let mut world = World::sample();
            send(&mut world, CLIENT.of(v6), service.of(v6), payload).expect("carried");
            let mut bytes = error(CLIENT.of(v6), DB0_INSTANCE.of(v6), payload, cause);
            assert_eq!(icmp::inbound(&mut bytes, &mut world, &OURS), TO_CLIENT, "{payload:?}");
            assert_eq!(bytes, error(CLIENT.of(v6), service.of(v6), payload, cause), "{payload:?} {cause:?}");
        }
    });
}

/// And what a server here says of a request goes out in the form that the above takes in.
#[test]
fn a_servers_error_goes_to_the_clients_node() {
    each(|v6, payload, cause| {
        let mut world = World::sample();
        take(&mut world, DB0_INSTANCE.of(v6), WEB.of(v6), payload).expect("delivered");
        let flows = world.flows.clone();
        let mut bytes = error(DB0_INSTANCE.of(v6), WEB.of(v6), payload, cause);
        assert_eq!(icmp::outbound(&mut bytes, &mut world, false), Ok(Verdict::Send { peer: 1 }));
        assert_eq!(bytes, error(DB0.of(v6), WEB_INSTANCE.of(v6), payload, cause), "{payload:?} {cause:?}");
        assert_eq!(world.flows, flows, "an error opens no flow");
    });
}

/// The other way round: a client refuses a reply, and the server is told.
#[test]
fn a_server_understands_a_clients_error() {
    each(|v6, payload, cause| {
        let mut world = World::sample();
        send(&mut world, CLIENT.of(v6), DB_SERVICE.of(v6), payload).expect("carried");
        let mut bytes = error(DB_SERVICE.of(v6), CLIENT.of(v6), back(payload), cause);
        assert_eq!(icmp::outbound(&mut bytes, &mut world, false), Ok(Verdict::Send { peer: 1 }));
        assert_eq!(bytes, error(DB0.of(v6), CLIENT_INSTANCE.of(v6), back(payload), cause));

        let mut world = World::sample();
        take(&mut world, DB0_INSTANCE.of(v6), WEB.of(v6), payload).expect("delivered");
        send(&mut world, WEB.of(v6), DB0_INSTANCE.of(v6), back(payload)).expect("answered");
        let mut bytes = error(WEB.of(v6), DB0_INSTANCE.of(v6), back(payload), cause);
        let as_sent = bytes.clone();
        assert_eq!(icmp::inbound(&mut bytes, &mut world, &OURS), TO_WEB);
        assert_eq!(bytes, as_sent, "it knows the client by this address");
    });
}

#[test]
fn neighbours_understand_each_others_errors() {
    each(|v6, payload, cause| {
        for service in [WEB_SERVICE, WEB_INSTANCE] {
            let mut world = World::sample();
            send(&mut world, CLIENT.of(v6), service.of(v6), payload).expect("delivered");
            let mut bytes = error(CLIENT_INSTANCE.of(v6), WEB.of(v6), payload, cause);
            assert_eq!(icmp::outbound(&mut bytes, &mut world, false), TO_CLIENT);
            let understood = if service.0 == WEB_SERVICE.0 { service } else { WEB_INSTANCE };
            assert_eq!(bytes, error(CLIENT.of(v6), understood.of(v6), payload, cause));
        }
    });
}

/// A router, which this node is to its instances, has no address that a peer could know.
#[test]
fn what_the_node_itself_notices_is_said_in_the_instances_name() {
    each(|v6, payload, cause| {
        let mut world = World::sample();
        take(&mut world, DB0_INSTANCE.of(v6), WEB.of(v6), payload).expect("delivered");
        let mut from_router = error(DB0_INSTANCE.of(v6), WEB.of(v6), payload, cause);
        let outer = if v6 { 8..24 } else { 12..16 };
        let source = OUTSIDE.of(v6);
        from_router[outer].copy_from_slice(if v6 { &source.0 } else { &source.0[12..] });
        seal(&mut from_router);
        assert_eq!(icmp::outbound(&mut from_router.clone(), &mut world, false), Err(DropReason::Spoofed));
        assert_eq!(icmp::outbound(&mut from_router, &mut world, true), Ok(Verdict::Send { peer: 1 }));
        assert_eq!(from_router, error(DB0.of(v6), WEB_INSTANCE.of(v6), payload, cause));
    });
}

#[test]
fn upstream_peers_get_nothing_but_tcp_and_udp() {
    each(|v6, payload, cause| {
        if matches!(payload, Payload::EchoRequest(_)) {
            return;
        }
        let mut world = World { pick: 1, ..World::sample() };
        send(&mut world, CLIENT.of(v6), DB_SERVICE.of(v6), payload).expect("carried to db#1");
        let given = error(DB_SERVICE.of(v6), CLIENT.of(v6), back(payload), cause);
        let mut bytes = given.clone();
        assert_eq!(icmp::outbound(&mut bytes, &mut world, false), Err(DropReason::PeerProtocol));
        assert_eq!(bytes, given);
    });
}

#[test]
fn nobody_is_told_of_what_he_has_not_sent() {
    each(|v6, payload, cause| {
        let mut world = World::sample();
        let mut bytes = error(CLIENT.of(v6), DB0_INSTANCE.of(v6), payload, cause);
        assert_eq!(icmp::inbound(&mut bytes, &mut world, &OURS), Err(DropReason::NoFlow));
        let mut bytes = error(DB_SERVICE.of(v6), CLIENT.of(v6), back(payload), cause);
        assert_eq!(icmp::outbound(&mut bytes, &mut world, false), Err(DropReason::NoFlow), "nobody is chosen for it");

        send(&mut world, CLIENT.of(v6), DB_SERVICE.of(v6), payload).expect("carried");
        let about = |payload| error(CLIENT.of(v6), DB0_INSTANCE.of(v6), payload, cause);
        let refused = |bytes: &mut Vec<u8>, from| icmp::inbound(bytes, &mut World { ..world.clone() }, &from);
        assert_eq!(refused(&mut about(payload), UPSTREAM), Err(DropReason::ForeignSource));
        assert_eq!(refused(&mut about(Payload::Udp(7, 7)), OURS), Err(DropReason::NoFlow), "other ports");
        let mut stranger = error(CLIENT.of(v6), UNKNOWN_SERVICE.of(v6), payload, cause);
        assert_eq!(refused(&mut stranger, OURS), Ok(Verdict::Slow(Miss::Source)));
        let mut elsewhere = error(DB1.of(v6), DB0_INSTANCE.of(v6), payload, cause);
        assert_eq!(refused(&mut elsewhere, OURS), Err(DropReason::NotOurs));
        let mut damaged = about(payload);
        *damaged.last_mut().unwrap() ^= 1;
        assert_eq!(refused(&mut damaged, OURS), Err(DropReason::Malformed));
        let mut cut = about(payload);
        cut.pop();
        assert_eq!(refused(&mut cut, OURS), Err(DropReason::Malformed));
    });
}

#[test]
fn the_hosts_own_flows_are_its_own() {
    let mut world = World::sample();
    let key = FlowKey {
        source: DB0_INSTANCE.v4(),
        destination: CLIENT.v4(),
        source_port: 80_u16.to_be_bytes(),
        destination_port: 61_000_u16.to_be_bytes(),
        protocol: 17,
    };
    world.flows.insert(key, Flow { kind: FLOW_HOST, port: u32::MAX, ..Flow::default() });
    let mut bytes = error(CLIENT.v4(), DB0_INSTANCE.v4(), Payload::Udp(61_000, 80), Cause::Port);
    assert_eq!(icmp::inbound(&mut bytes, &mut world, &OURS), Ok(Verdict::Slow(Miss::Host)));
}

#[test]
fn a_port_in_an_error_is_changed_with_its_checksums() {
    each(|v6, payload, cause| {
        let mut bytes = error(CLIENT.of(v6), WEB.of(v6), payload, cause);
        let message = Message::read(&bytes).expect("an error");
        message.put_port(&mut bytes, icmp::Port::Source, 4_711_u16.to_be_bytes());
        let other = match payload {
            Payload::Tcp(_, b) => Payload::Tcp(4_711, b),
            Payload::Udp(_, b) => Payload::Udp(4_711, b),
            Payload::UdpBare(_, b) => Payload::UdpBare(4_711, b),
            _ => Payload::EchoRequest(4_711),
        };
        assert_eq!(bytes, error(CLIENT.of(v6), WEB.of(v6), other, cause), "{payload:?}");
    });
}

proptest! {
    #[test]
    fn no_input_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200), version in 0..3_u8, kind in 0..14_u8) {
        let mut bytes = bytes;
        if version > 0 && bytes.len() > 48 {
            bytes[0] = if version == 1 { 0x45 } else { 0x60 };
            bytes[if version == 1 { 9 } else { 6 }] = if version == 1 { 1 } else { 58 };
            bytes[if version == 1 { 20 } else { 40 }] = kind;
            let len = bytes.len() as u16 - if version == 1 { 0 } else { 40 };
            let at = if version == 1 { 2 } else { 4 };
            bytes[at..at + 2].copy_from_slice(&len.to_be_bytes());
            seal(&mut bytes);
        }
        let mut world = World::sample();
        let _ = icmp::outbound(&mut bytes.clone(), &mut world, true);
        let _ = icmp::inbound(&mut bytes.clone(), &mut world, &OURS);
        let _ = icmp::answer(&bytes, Cause::Host, &mut [0; MAX_LEN]);
    }

    /// An error cut anywhere, with any packet in it.
    #[test]
    fn no_quote_panics(seed: u64, cut in 0..120_usize, host: bool) {
        let mut world = World::sample();
        let mut frames = Frames::new(seed);
        for _ in 0..40 {
            let (_, quoted) = frames.frame();
            let mut out = [0; MAX_LEN];
            let Some(bytes) = icmp::answer(&quoted, Cause::Port, &mut out) else { continue };
            let mut bytes = bytes[..bytes.len().min(cut)].to_vec();
            if bytes.len() > 48 {
                let len = bytes.len() as u16;
                if bytes[0] >> 4 == 4 {
                    bytes[2..4].copy_from_slice(&len.to_be_bytes());
                } else {
                    bytes[4..6].copy_from_slice(&(len - 40).to_be_bytes());
                }
                seal(&mut bytes);
            }
            for result in [icmp::outbound(&mut bytes.clone(), &mut world, host), icmp::inbound(&mut bytes, &mut world, &OURS)] {
                let _ = result;
            }
        }
    }
}

/// Mends the checksums of an ICMP message without options.
fn seal(bytes: &mut [u8]) {
    use netmanager_common::checksum::{fold, sum};
    let v6 = bytes[0] >> 4 == 6;
    let at = if v6 { 40 } else { 20 };
    bytes[at + 2..at + 4].fill(0);
    let seed = if v6 { sum(58 + (bytes.len() - at) as u32, &bytes[8..40]) } else { 0 };
    let message = !fold(sum(seed, &bytes[at..]));
    bytes[at + 2..at + 4].copy_from_slice(&message.to_be_bytes());
    if !v6 {
        bytes[10..12].fill(0);
        let header = !fold(sum(0, &bytes[..20]));
        bytes[10..12].copy_from_slice(&header.to_be_bytes());
    }
}
