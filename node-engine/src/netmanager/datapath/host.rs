//! Flows of the node itself: its own processes, not its instances, that call a service address. Pure; time is an argument.
//!
//! On the wire a packet's source must be an instance address that the cluster knows, or no peer answers it. The host has none, so it
//! borrows one of an instance on this node, with a port of its own choice from above those that kernels give to clients:
//!
//! ```text
//! host:40000 → service:80      as    instance:61234 → service:80      through the law, to wherever it chooses
//! back: service:80 → instance:61234, of a row that says FLOW_HOST     as    service:80 → host:40000, into the TUN device
//! ```
//!
//! The port follows from the flow, so that a restarted daemon finds the same one for a flow whose rows are still in the kernel.

use std::collections::{BTreeMap, HashMap};

use netmanager_common::abi::{FLOW_CHOSEN, FLOW_HOST, Flow, FlowKey, Slot, server};
use netmanager_common::addr::Addr;
use netmanager_common::checksum::Change;
use netmanager_common::frame::{Frame, ICMP, ICMPV6, TCP, UDP};
use netmanager_common::icmp;
use netmanager_common::pipeline::{Tables, ends};

use super::TableDelta;
use super::flows::ending;
use super::offload::{Offload, PacketFrame};

/// Borrowed ports: above what Linux gives to clients by default (32768 to 60999), and without 65535, which peers of the reference
/// system do not survive.
const FIRST: u16 = 61_000;
const PORTS: u16 = u16::MAX - FIRST;
/// Ports tried for one flow.
const TRIES: u16 = 64;
const FLOWS: usize = 4_096;
/// Seconds of silence, as the tables of flows have them.
const TCP_SILENCE: u32 = 7_440;
const OTHER_SILENCE: u32 = 180;

/// In whose name the host speaks, and for which of its flows.
#[derive(Debug)]
pub(super) struct HostFlows {
    /// The TUN device's addresses: what the kernel takes as source on its way to a service.
    own: [Addr; 2],
    /// Instances here that know their own address, by namespace address.
    identities: BTreeMap<Addr, Addr>,
    /// By the flow as the host sees it.
    flows: HashMap<FlowKey, Borrowed>,
    /// By what comes back: the same flow.
    back: HashMap<Back, FlowKey>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Borrowed {
    namespace: Addr,
    port: [u8; 2],
    seen: u32,
    /// What the host, and who answers it, have said of the end.
    ends: [u8; 2],
    answered: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Back {
    v6: bool,
    port: [u8; 2],
    service_port: [u8; 2],
    protocol: u8,
}

impl HostFlows {
    pub(super) fn new(own: [Addr; 2]) -> Self {
        Self { own, identities: BTreeMap::new(), flows: HashMap::new(), back: HashMap::new() }
    }

    pub(super) fn is_own(&self, source: &Addr) -> bool {
        self.own.contains(source)
    }

    /// Learns of instances here, and forgets the flows in the name of those that go. `full`: there are no others.
    pub(super) fn observe(&mut self, delta: &TableDelta, full: bool) {
        let before = self.identities.clone();
        if full {
            self.identities.clear();
        }
        for (namespace, endpoint) in &delta.endpoints {
            match endpoint.instance.is_none() {
                true => self.identities.remove(namespace),
                false => self.identities.insert(*namespace, endpoint.instance),
            };
        }
        for namespace in &delta.endpoints_gone {
            self.identities.remove(namespace);
        }
        if self.identities != before {
            let (identities, back) = (&self.identities, &mut self.back);
            self.flows.retain(|key, flow| {
                let stays = before.get(&flow.namespace) == identities.get(&flow.namespace);
                if !stays {
                    back.remove(&answer(key, flow.port));
                }
                stays
            });
        }
    }

    /// Makes a packet of the host one of an instance's. `None` where there is no instance to speak for it, no room, or no packet that the
    /// overlay carries.
    pub(super) fn lend(&mut self, packet: &mut [u8], offload: &Offload, now: u32) -> Option<()> {
        let Read { key, at, ends } = Read::packet(packet)?;
        let flow = match self.flows.get(&key).copied() {
            Some(flow) => flow,
            None => self.borrow(&key, now)?,
        };
        let [own, others] = flow.ends;
        self.flows.insert(key, Borrowed { seen: now, ends: [own | ends, others], ..flow });
        // An echo's identifier is in the place of both ports.
        let ports = if is_echo(&key) { at + 4 } else { at };
        rewrite(packet, offload, at, (&flow.namespace, &key.destination), (ports, flow.port))
    }

    /// Makes a packet for an instance one for the host again. `None` where the host knows nothing of it.
    pub(super) fn give_back(
        &mut self,
        packet: &mut [u8],
        tables: &mut impl Tables,
        offload: &Offload,
        now: u32,
    ) -> Option<()> {
        let Read { key, at, ends } = Read::packet(packet)?;
        let back = Back {
            v6: !key.source.is_v4(),
            port: key.destination_port,
            service_port: key.source_port,
            protocol: key.protocol as u8,
        };
        let own = *self.back.get(&back)?;
        if let Some(flow) = self.flows.get_mut(&own) {
            flow.seen = now;
            flow.ends[1] |= ends;
            let first = !std::mem::replace(&mut flow.answered, true);
            let counts = first && key.protocol == u32::from(TCP);
            // Nobody else sees what comes back, and without its row it would be an instance's.
            if let Some(row) = tables.flow(&key).filter(|row| row.kind == FLOW_HOST) {
                if counts && row.server != 0 {
                    tables.answered(row.server, ends != 0);
                }
                tables.touch(&key, &row, ends);
            }
        }
        let port = if is_echo(&key) { at + 4 } else { at + 2 };
        rewrite(packet, offload, at, (&own.destination, &own.source), (port, own.source_port))
    }

    /// Makes an error for an instance one for the host, whose packet it is about. `None` where the host has sent no such packet.
    pub(super) fn give_back_error(&self, packet: &mut [u8]) -> Option<()> {
        let error = icmp::Message::read(packet).ok()?;
        let FlowKey { source_port, destination_port, protocol, .. } = error.about;
        let v6 = !error.source.is_v4();
        let back = Back { v6, port: source_port, service_port: destination_port, protocol: protocol as u8 };
        let own = self.back.get(&back)?;
        error.rewrite(packet, &own.destination, &own.source);
        error.put_port(packet, icmp::Port::Source, own.source_port);
        Some(())
    }

    /// Makes an error of the host about what came back to it one of the instance's. `None` where it has no such flow.
    pub(super) fn lend_error(&self, packet: &mut [u8]) -> Option<()> {
        let error = icmp::Message::read(packet).ok()?;
        let flow = self.flows.get(&error.mirrored())?;
        error.rewrite(packet, &flow.namespace, &error.destination);
        error.put_port(packet, icmp::Port::Destination, flow.port);
        Some(())
    }

    /// Makes a lent packet one of the host again.
    pub(super) fn take_back(&self, packet: &mut [u8], offload: &Offload) -> Option<()> {
        let Read { key, at, .. } = Read::packet(packet)?;
        let own = *self.back.get(&answer(&key, key.source_port))?;
        let port = if is_echo(&key) { at + 4 } else { at };
        rewrite(packet, offload, at, (&own.source, &own.destination), (port, own.source_port))
    }

    fn borrow(&mut self, key: &FlowKey, now: u32) -> Option<Borrowed> {
        let v4 = key.source.is_v4();
        let namespace = *self.identities.keys().find(|namespace| namespace.is_v4() == v4)?;
        if self.flows.len() >= FLOWS {
            self.sweep(now);
        }
        if self.flows.len() >= FLOWS {
            return None;
        }
        let begin = hash(key) % PORTS;
        let ports = (0..TRIES).map(|next| (FIRST + (begin + next) % PORTS).to_be_bytes());
        let port = ports.into_iter().find(|port| !self.back.contains_key(&answer(key, *port)))?;
        self.back.insert(answer(key, port), *key);
        Some(Borrowed { namespace, port, seen: now, ends: [0; 2], answered: false })
    }

    fn sweep(&mut self, now: u32) {
        let back = &mut self.back;
        self.flows.retain(|key, flow| {
            let [own, others] = flow.ends;
            let patience = match key.protocol as u8 {
                TCP => ending(own, others).unwrap_or(TCP_SILENCE),
                _ => OTHER_SILENCE,
            };
            let stays = now.saturating_sub(flow.seen) < patience;
            if !stays {
                back.remove(&answer(key, flow.port));
            }
            stays
        });
    }
}

/// Of a lent packet, before the law has it: the key of its flow, and what it says of the flow's end.
pub(super) fn key(packet: &[u8]) -> Option<(FlowKey, u8)> {
    Read::packet(packet).map(|read| (read.key, read.ends))
}

/// Has the answers of a lent flow brought to user space, wherever they arrive.
pub(super) fn mark(tables: &mut impl Tables, key: &FlowKey, ends: u8) {
    let Some(flow) = tables.flow(key) else { return };
    let Some(slot) = tables.slot(flow.slot) else { return };
    let back = answers(key, &flow, &slot);
    let present = tables.flow(&back);
    match &present {
        Some(row) if row.kind == FLOW_HOST => tables.touch(&back, row, ends),
        _ => {
            let mut row = Flow {
                slot: flow.slot,
                generation: flow.generation,
                epoch: flow.epoch,
                // No packet comes in by it: the row alone delivers nothing.
                port: u32::MAX,
                account: flow.account,
                source: key.destination,
                kind: FLOW_HOST,
                server: if flow.kind == FLOW_CHOSEN { server(flow.slot) } else { 0 },
                ..Flow::default()
            };
            tables.learn(&back, &mut row, present.is_none());
        }
    }
}

/// The key under which answers come: through the tunnel, or from a neighbour.
fn answers(key: &FlowKey, flow: &Flow, slot: &Slot) -> FlowKey {
    let (source, destination) =
        if slot.peer == 0 { (slot.namespace, flow.source) } else { (slot.instance, key.source) };
    FlowKey { source, destination, source_port: key.destination_port, destination_port: key.source_port, ..*key }
}

fn answer(key: &FlowKey, port: [u8; 2]) -> Back {
    Back { v6: !key.source.is_v4(), port, service_port: key.destination_port, protocol: key.protocol as u8 }
}

fn is_echo(key: &FlowKey) -> bool {
    !matches!(key.protocol as u8, TCP | UDP)
}

/// Always the same for the same flow (FNV-1a).
fn hash(key: &FlowKey) -> u16 {
    let bytes = key.source.0.iter().chain(&key.destination.0).chain(&key.source_port).chain(&key.destination_port);
    let hash = bytes
        .chain([&(key.protocol as u8)])
        .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    (hash >> 16) as u16 ^ hash as u16
}

/// What has to be known of a packet.
struct Read {
    key: FlowKey,
    /// Where the transport header begins.
    at: usize,
    /// Bits of `FLOW_CLOSING` and `FLOW_RESET`.
    ends: u8,
}

impl Read {
    /// TCP, UDP and echoes; `None` for fragments and anything else.
    fn packet(packet: &[u8]) -> Option<Self> {
        let (source, destination, protocol, at) = match packet.first()? >> 4 {
            // Five words at least: a shorter header would have the ports among its addresses.
            4 if packet[0] & 0x0f >= 5 && u16::from_be_bytes([*packet.get(6)?, *packet.get(7)?]) & 0x3fff == 0 => {
                let at = usize::from(packet[0] & 0x0f) * 4;
                let [a, b] = [12, 16].map(|at| packet.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()));
                (Addr::v4(a?), Addr::v4(b?), *packet.get(9)?, at)
            }
            6 => {
                let [a, b] = [8, 24].map(|at| packet.get(at..at + 16).and_then(|bytes| bytes.try_into().ok()));
                (Addr::v6(a?), Addr::v6(b?), *packet.get(6)?, 40)
            }
            _ => return None,
        };
        let two = |at: usize| packet.get(at..at + 2).and_then(|bytes| bytes.try_into().ok());
        let none = [0; 2];
        let (source_port, destination_port, ends) = match (protocol, packet.get(at)?) {
            (TCP, _) => (two(at)?, two(at + 2)?, ends(*packet.get(at + 13)?)),
            (UDP, _) => (two(at)?, two(at + 2)?, 0),
            (ICMP, 8) | (ICMPV6, 128) => (two(at + 4)?, none, 0),
            (ICMP, 0) | (ICMPV6, 129) => (none, two(at + 4)?, 0),
            _ => return None,
        };
        let key = FlowKey { source, destination, source_port, destination_port, protocol: protocol.into() };
        Some(Self { key, at, ends })
    }
}

/// Puts in new addresses and a port (or identifier) and mends the checksums.
fn rewrite(
    packet: &mut [u8],
    offload: &Offload,
    at: usize,
    (source, destination): (&Addr, &Addr),
    (place, port): (usize, [u8; 2]),
) -> Option<()> {
    let v6 = packet.first()? >> 4 == 6;
    let protocol = *packet.get(if v6 { 6 } else { 9 })?;
    let udp = protocol == UDP;
    let (field, pseudo) = match protocol {
        TCP => (at + 16, true),
        UDP => (at + 6, true),
        ICMPV6 => (at + 2, true),
        _ => (at + 2, false),
    };
    if v6 {
        let old: [u8; 32] = packet.get(8..40)?.try_into().ok()?;
        let mut new = [0; 32];
        new[..16].copy_from_slice(&source.0);
        new[16..].copy_from_slice(&destination.0);
        PacketFrame::new(packet, offload).fix_l4(field, udp, Change::of(&old, &new))?;
        packet.get_mut(8..40)?.copy_from_slice(&new);
    } else {
        let old: [u8; 8] = packet.get(12..20)?.try_into().ok()?;
        let mut new = [0; 8];
        new[..4].copy_from_slice(&source.v4_bytes());
        new[4..].copy_from_slice(&destination.v4_bytes());
        if pseudo {
            PacketFrame::new(packet, offload).fix_l4(field, udp, Change::of(&old, &new))?;
        }
        let header = packet.get_mut(10..12)?;
        let checksum = Change::of(&old, &new).apply([header[0], header[1]]);
        header.copy_from_slice(&checksum);
        packet.get_mut(12..20)?.copy_from_slice(&new);
    }
    let old: [u8; 2] = packet.get(place..place + 2)?.try_into().ok()?;
    // The pseudo-header, all that a partial checksum holds, has no ports.
    if !offload.partial() {
        PacketFrame::new(packet, offload).fix_l4(field, udp, Change::of(&old, &port))?;
    }
    packet.get_mut(place..place + 2)?.copy_from_slice(&port);
    Some(())
}

#[cfg(test)]
mod tests {
    use netmanager_common::frame::SliceFrame;
    use netmanager_common::pipeline::{inbound, outbound};
    use netmanager_common::testing::*;
    use netmanager_common::verdict::{DropReason, Miss, Verdict};

    use super::*;

    const TUN: Pair = Pair([10, 19, 1, 254], 0xfcef, 0xbeef);

    /// Only the client may speak for the host.
    fn flows(world: &World) -> HostFlows {
        let mut flows = HostFlows::new([TUN.v4(), TUN.v6()]);
        let delta = TableDelta {
            endpoints: [CLIENT.v4(), CLIENT.v6()].map(|address| (address, world.endpoints[&address])).to_vec(),
            ..TableDelta::default()
        };
        flows.observe(&delta, true);
        flows
    }

    fn port(packet: &[u8]) -> u16 {
        u16::from_be_bytes(Read::packet(packet).unwrap().key.source_port)
    }

    fn read_tcp(packet: &[u8]) -> bool {
        Read::packet(packet).unwrap().key.protocol == u32::from(TCP)
    }

    /// Sends as the proxy does; gives what would be on the wire.
    fn send(flows: &mut HostFlows, world: &mut World, to: Addr, what: Payload) -> (Vec<u8>, Verdict) {
        let source = TUN.of(!to.is_v4());
        let mut sent = packet(source, to, what);
        flows.lend(&mut sent, &Offload::default(), 1).expect("lent");
        let (key, ends) = key(&sent).unwrap();
        let verdict = outbound(&mut SliceFrame::new(&mut sent), world, 0).expect("carried");
        mark(world, &key, ends);
        assert!(checksums_hold(&sent));
        (sent, verdict)
    }

    #[test]
    fn the_host_calls_a_service_and_is_answered() {
        for v6 in [false, true] {
            for kind in [
                (|a, b| Payload::Tcp(a, b)) as fn(u16, u16) -> Payload,
                |a, b| Payload::Udp(a, b),
                |a, b| if b == 80 { Payload::EchoRequest(a) } else { Payload::EchoReply(b) },
            ] {
                // On another node, on this one, and the very instance that speaks for the host.
                for (service, remote) in [(DB_SERVICE, true), (WEB_SERVICE, false), (CLIENT_INSTANCE, false)] {
                    let mut world = World::sample();
                    let mut flows = flows(&world);
                    let (sent, verdict) = send(&mut flows, &mut world, service.of(v6), kind(40_000, 80));
                    let borrowed = port(&sent);
                    assert!((FIRST..u16::MAX).contains(&borrowed), "{borrowed}");
                    let (source, destination) = addresses(&sent);
                    assert_eq!(source, CLIENT_INSTANCE.of(v6));

                    let answer = kind(80, borrowed);
                    let mut back = match remote {
                        true => packet(DB0_INSTANCE.of(v6), CLIENT.of(v6), answer),
                        false => packet(destination, CLIENT_INSTANCE.of(v6), answer),
                    };
                    assert_eq!(matches!(verdict, Verdict::Send { .. }), remote);
                    for port in [PORT, 0] {
                        let decided = match remote {
                            true => inbound(&mut SliceFrame::new(&mut back), &mut world, &OURS),
                            false => outbound(&mut SliceFrame::new(&mut back), &mut world, port),
                        };
                        assert_eq!(decided, Ok(Verdict::Slow(Miss::Host)), "in the kernel and here");
                    }
                    if remote {
                        let strange = inbound(&mut SliceFrame::new(&mut back), &mut world, &UPSTREAM);
                        assert_eq!(strange, Err(DropReason::ForeignSource));
                    }
                    flows.give_back(&mut back, &mut world, &Offload::default(), 2).expect("the host asked for it");
                    if read_tcp(&back) {
                        let slot = if service.of(v6) == CLIENT_INSTANCE.of(v6) { 0 } else { 1 };
                        let answered: u32 = world.answers.values().map(|answers| answers.answered).sum();
                        assert_eq!(answered, slot, "an own address is no choice: {service:?}");
                    }
                    assert_eq!(addresses(&back), (service.of(v6), TUN.of(v6)));
                    assert!(checksums_hold(&back));
                    let read = Read::packet(&back).unwrap().key;
                    assert_eq!(read.destination_port, 40_000_u16.to_be_bytes());
                }
            }
        }
    }

    /// Else the rows of a flow that only comes back are swept, and the next packet is delivered to the instance.
    #[test]
    fn what_comes_back_keeps_its_row() {
        for (service, source, destination, remote) in
            [(DB_SERVICE, DB0_INSTANCE, CLIENT, true), (WEB_SERVICE, WEB, CLIENT_INSTANCE, false)]
        {
            let mut world = World::sample();
            let mut flows = flows(&world);
            let (sent, _) = send(&mut flows, &mut world, service.v4(), Payload::Udp(40_000, 80));
            world.now = 170;
            let mut back = packet(source.v4(), destination.v4(), Payload::Udp(80, port(&sent)));
            let decided = match remote {
                true => inbound(&mut SliceFrame::new(&mut back), &mut world, &OURS),
                false => outbound(&mut SliceFrame::new(&mut back), &mut world, PORT),
            };
            assert_eq!(decided, Ok(Verdict::Slow(Miss::Host)));
            flows.give_back(&mut back, &mut world, &Offload::default(), 170).expect("the host asked for it");
            let seen = |kind| world.flows.values().find(|flow| flow.kind == kind).map(|flow| flow.seen);
            assert_eq!((seen(FLOW_CHOSEN), seen(FLOW_HOST)), (Some(0), Some(170)));
        }
    }

    #[test]
    fn what_was_lent_can_be_taken_back() {
        let world = World::sample();
        for v6 in [false, true] {
            for kind in [Payload::Tcp(40_000, 80), Payload::Udp(40_000, 80), Payload::EchoRequest(7)] {
                let mut flows = flows(&world);
                let sent = packet(TUN.of(v6), EMPTY_SERVICE.of(v6), kind);
                let mut lent = sent.clone();
                flows.lend(&mut lent, &Offload::default(), 1).expect("lent");
                assert_ne!(lent, sent);
                flows.take_back(&mut lent, &Offload::default()).expect("the host has sent it");
                assert_eq!(lent, sent);
            }
        }
    }

    #[test]
    fn a_configuration_that_changes_takes_no_flow_from_the_host() {
        let mut world = World::sample();
        let mut flows = flows(&world);
        let (sent, _) = send(&mut flows, &mut world, DB_SERVICE.v4(), Payload::Tcp(40_000, 80));
        world.config.epoch += 1;
        let (again, _) = send(&mut flows, &mut world, DB_SERVICE.v4(), Payload::Tcp(40_000, 80));
        assert_eq!((port(&sent), addresses(&sent)), (port(&again), addresses(&again)));
        let mut back = packet(DB0_INSTANCE.v4(), CLIENT.v4(), Payload::Tcp(80, port(&sent)));
        assert_eq!(inbound(&mut SliceFrame::new(&mut back), &mut world, &OURS), Ok(Verdict::Slow(Miss::Host)));
    }

    #[test]
    fn a_restarted_process_finds_the_same_port_again() {
        let mut world = World::sample();
        let ports: Vec<u16> = (0..2)
            .map(|_| port(&send(&mut flows(&world.clone()), &mut world, DB_SERVICE.v4(), Payload::Udp(5, 53)).0))
            .collect();
        assert_eq!(ports[0], ports[1]);
    }

    #[test]
    fn flows_are_bounded_and_go_with_their_instance() {
        let world = World::sample();
        let mut flows = flows(&world);
        let lend = |flows: &mut HostFlows, from: u16, to: u16, now| {
            flows.lend(&mut packet(TUN.v4(), DB_SERVICE.v4(), Payload::Udp(from, to)), &Offload::default(), now)
        };
        let taken = (0..2 * FLOWS as u16).filter(|from| lend(&mut flows, *from, from % 50, 1).is_some()).count();
        assert_eq!(taken, FLOWS);
        assert!(lend(&mut flows, 60_000, 1, 1 + OTHER_SILENCE).is_some(), "what was silent makes room");
        assert_eq!((flows.flows.len(), flows.back.len()), (1, 1));

        flows.observe(&TableDelta { endpoints_gone: vec![CLIENT.v4()], ..TableDelta::default() }, false);
        assert_eq!((flows.flows.len(), flows.back.len()), (0, 0));
        assert!(lend(&mut flows, 60_000, 1, 200).is_none(), "nobody speaks for the host");
    }

    #[test]
    fn any_bytes_are_survived() {
        let mut world = World::sample();
        let mut flows = flows(&world);
        let whole = packet(TUN.v4(), DB_SERVICE.v4(), Payload::Tcp(1, 2));
        for cut in 0..whole.len() {
            let mut part = whole[..cut].to_vec();
            let _ = (
                flows.lend(&mut part.clone(), &Offload::default(), 1),
                flows.take_back(&mut part.clone(), &Offload::default()),
                flows.give_back(&mut part, &mut world, &Offload::default(), 1),
            );
        }
        let mut frames = Frames::new(5);
        for _ in 0..20_000 {
            let (_, mut bytes) = frames.frame();
            let _ = (
                flows.lend(&mut bytes.clone(), &Offload::default(), 1),
                flows.take_back(&mut bytes.clone(), &Offload::default()),
                flows.give_back(&mut bytes, &mut world, &Offload::default(), 1),
            );
        }
    }
}
