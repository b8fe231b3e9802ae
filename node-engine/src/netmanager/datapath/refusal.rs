//! What a sender is told where nobody is there: a reset to TCP (RFC 9293 3.5.2), unreachable to UDP and echo requests (RFC 792, RFC 4443).
//! It comes from the address that the sender has called.

use std::collections::HashMap;
use std::time::Instant;

use netmanager_common::addr::Addr;
use netmanager_common::checksum::{fold, sum};
use netmanager_common::frame::{ICMP, ICMPV6, TCP, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, UDP};
use netmanager_common::icmp::{self, Cause};

use super::carry::{Carrier, Origin, destination, source};
use super::counters::Count;
use super::held::Packet;
use super::offload::Offload;
use super::projection::Projection;

impl<T: Projection> Carrier<T> {
    /// Tells the sender that nobody is there, where it is one of this node and does not ask all the time.
    pub(super) fn refuse(&mut self, packet: &mut [u8], origin: Origin, offload: &Offload) {
        let Some(sender) = source(packet) else { return };
        match origin {
            Origin::Node(_) => return,
            Origin::Instance => {}
            // It shall read of its own packet, not of the one in an instance's name.
            Origin::Host if self.host.take_back(packet, offload).is_some() => {}
            Origin::Host => return,
        }
        if let Some(refusal) = of(packet)
            && self.refusals.admit(sender, Instant::now())
        {
            let written = self.write(&refusal, &Offload::default());
            self.counters.add(if written { Count::Told } else { Count::Write }, 1);
        }
    }

    /// Nobody has this address: whoever has sent there is told. Whose own address is not known yet may try again.
    pub(super) fn refuse_unknown(&mut self, address: Addr, packet: &mut [u8], origin: Origin, offload: &Offload) {
        if destination(packet) == Some(address) {
            self.refuse(packet, origin, offload);
        }
    }

    /// Nobody has this address: what waits for it is dropped.
    pub(super) fn give_up(&mut self, address: Addr) {
        let packets = self.held.give_up(address, Instant::now());
        self.counters.add(Count::GivenUp, packets.len() as u64);
        for Packet { origin: (origin, offload), mut bytes, .. } in packets {
            self.refuse_unknown(address, &mut bytes, origin, &offload);
        }
    }
}

/// The answer to this packet; `None` where none may be given: to a reset, an error, a fragment, or what is no packet.
pub(super) fn of(packet: &[u8]) -> Option<Vec<u8>> {
    let called = Called::read(packet)?;
    match called.protocol {
        TCP => called.reset(),
        UDP => unreachable(packet, Cause::Port),
        ICMP if !called.v6 && *called.transport.first()? == 8 => unreachable(packet, Cause::Host),
        ICMPV6 if called.v6 && *called.transport.first()? == 128 => unreachable(packet, Cause::Host),
        _ => None,
    }
}

fn unreachable(packet: &[u8], cause: Cause) -> Option<Vec<u8>> {
    icmp::answer(packet, cause, &mut [0; icmp::MAX_LEN]).map(<[u8]>::to_vec)
}

/// A whole packet that nobody takes.
struct Called<'a> {
    v6: bool,
    protocol: u8,
    transport: &'a [u8],
    sender: &'a [u8],
    receiver: &'a [u8],
}

impl<'a> Called<'a> {
    fn read(packet: &'a [u8]) -> Option<Self> {
        let (version, words) = (packet.first()? >> 4, usize::from(packet[0] & 15));
        let (protocol, header, sender, receiver) = match version {
            6 => (*packet.get(6)?, 40, packet.get(8..24)?, packet.get(24..40)?),
            4 if words >= 5 && u16::from_be_bytes([*packet.get(6)?, *packet.get(7)?]) & 0x3fff == 0 => {
                (*packet.get(9)?, words * 4, packet.get(12..16)?, packet.get(16..20)?)
            }
            _ => return None,
        };
        Some(Self { v6: version == 6, protocol, transport: packet.get(header..)?, sender, receiver })
    }

    fn reset(&self) -> Option<Vec<u8>> {
        let header = self.transport.first_chunk::<20>()?;
        let [a, b, c, d, sequence @ ..] = *header;
        let (offset, flags) = (usize::from(header[12] >> 4) * 4, header[13]);
        if flags & TCP_RST != 0 {
            return None;
        }
        let [s0, s1, s2, s3, k0, k1, k2, k3, ..] = sequence;
        let (reset, sequence, acknowledged) = if flags & TCP_ACK != 0 {
            (TCP_RST, [k0, k1, k2, k3], [0; 4])
        } else {
            let taken = self.transport.len().checked_sub(offset)? as u32;
            let marks = u32::from(flags & TCP_SYN != 0) + u32::from(flags & TCP_FIN != 0);
            let next = u32::from_be_bytes([s0, s1, s2, s3]).wrapping_add(taken).wrapping_add(marks);
            (TCP_RST | TCP_ACK, [0; 4], next.to_be_bytes())
        };
        let mut segment = vec![c, d, a, b];
        segment.extend(sequence);
        segment.extend(acknowledged);
        segment.extend([0x50, reset, 0, 0, 0, 0, 0, 0]);
        let sum = !fold(sum(self.pseudo_sum(segment.len()), &segment));
        segment[16..18].copy_from_slice(&sum.to_be_bytes());
        Some(self.back(&segment))
    }

    /// From the address that was called to who has called it.
    fn back(&self, payload: &[u8]) -> Vec<u8> {
        let mut packet = if self.v6 {
            let [a, b] = (payload.len() as u16).to_be_bytes();
            vec![0x60, 0, 0, 0, a, b, TCP, 64]
        } else {
            let [a, b] = (payload.len() as u16 + 20).to_be_bytes();
            vec![0x45, 0, a, b, 0, 0, 0x40, 0, 64, TCP, 0, 0]
        };
        packet.extend(self.receiver);
        packet.extend(self.sender);
        if !self.v6 {
            let sum = !fold(sum(0, &packet));
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        packet.extend(payload);
        packet
    }

    fn pseudo_sum(&self, len: usize) -> u32 {
        let [a, b] = (len as u16).to_be_bytes();
        sum(sum(sum(0, self.receiver), self.sender), &[0, TCP, a, b])
    }
}

/// Answers to one sender: so many a second, and at once after a silence.
const RATE: f64 = 100.0;
const BURST: f64 = 100.0;
/// Senders that are remembered: more than a node has instances.
const SENDERS: usize = 2_048;

/// How many answers each sender may still have.
#[derive(Debug, Default)]
pub(super) struct Limit(HashMap<Addr, (f64, Instant)>);

impl Limit {
    /// May this sender be answered once more?
    pub(super) fn admit(&mut self, sender: Addr, now: Instant) -> bool {
        if self.0.len() >= SENDERS && !self.0.contains_key(&sender) {
            // Whoever has all its answers again is as good as forgotten.
            self.0.retain(|_, (left, at)| *left + refill(*at, now) < BURST);
            if self.0.len() >= SENDERS {
                return false;
            }
        }
        let (left, at) = self.0.entry(sender).or_insert((BURST, now));
        (*left, *at) = ((*left + refill(*at, now)).min(BURST), now);
        let admitted = *left >= 1.0;
        *left -= if admitted { 1.0 } else { 0.0 };
        admitted
    }
}

fn refill(since: Instant, now: Instant) -> f64 {
    now.saturating_duration_since(since).as_secs_f64() * RATE
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use netmanager_common::testing::*;

    use super::*;

    fn answer(v6: bool, payload: Payload) -> Option<Vec<u8>> {
        of(&packet(CLIENT.of(v6), EMPTY_SERVICE.of(v6), payload))
    }

    #[test]
    fn a_connection_is_reset_as_its_ends_would() {
        // The sample's segments: sequence number 9, acknowledgment 0, twenty bytes of data.
        for (flags, reset, sequence, acknowledged) in [
            (TCP_SYN, TCP_RST | TCP_ACK, 0_u32, 30_u32),
            (TCP_FIN, TCP_RST | TCP_ACK, 0, 30),
            (0, TCP_RST | TCP_ACK, 0, 29),
            (TCP_ACK, TCP_RST, 0, 0),
        ] {
            for v6 in [false, true] {
                let mut called = packet(CLIENT.of(v6), EMPTY_SERVICE.of(v6), Payload::Segment(40_000, 80, flags));
                let at = if v6 { 40 } else { 20 };
                if flags & TCP_ACK != 0 {
                    called[at + 8..at + 12].copy_from_slice(&7_u32.to_be_bytes());
                }
                let sequence = if flags & TCP_ACK != 0 { 7 } else { sequence };
                let answer = of(&called).expect("an answer");
                assert_eq!(addresses(&answer), (EMPTY_SERVICE.of(v6), CLIENT.of(v6)));
                assert!(checksums_hold(&answer));
                let tcp = &answer[at..];
                assert_eq!(tcp[..4], [80_u16.to_be_bytes(), 40_000_u16.to_be_bytes()].concat());
                assert_eq!(tcp[4..8], sequence.to_be_bytes());
                assert_eq!(tcp[8..12], acknowledged.to_be_bytes());
                assert_eq!((tcp[13], tcp.len()), (reset, 20));
            }
        }
    }

    #[test]
    fn datagrams_and_echoes_are_unreachable_and_quoted() {
        for (v6, payload, kind, code) in [
            (false, Payload::Udp(5_000, 53), 3, 3),
            (false, Payload::UdpBare(5_000, 53), 3, 3),
            (false, Payload::EchoRequest(7), 3, 1),
            (true, Payload::Udp(5_000, 53), 1, 4),
            (true, Payload::EchoRequest(7), 1, 3),
        ] {
            let called = packet(CLIENT.of(v6), EMPTY_SERVICE.of(v6), payload);
            let answer = of(&called).expect("an answer");
            assert_eq!(addresses(&answer), (EMPTY_SERVICE.of(v6), CLIENT.of(v6)));
            assert!(checksums_hold(&answer), "{payload:?}");
            let message = &answer[if v6 { 40 } else { 20 }..];
            assert_eq!((message[0], message[1], &message[8..]), (kind, code, &called[..]), "{payload:?}");
        }
    }

    #[test]
    fn answers_are_not_answered() {
        for v6 in [false, true] {
            for payload in [
                Payload::Segment(1, 2, TCP_RST),
                Payload::Segment(1, 2, TCP_RST | TCP_ACK),
                Payload::EchoReply(1),
                Payload::Other(47),
            ] {
                assert_eq!(answer(v6, payload), None, "{payload:?}");
            }
            let error = answer(v6, Payload::Udp(1, 2)).expect("an error");
            assert_eq!(of(&error), None, "an error is not told of an error");
        }
        let mut fragment = packet(CLIENT.v4(), EMPTY_SERVICE.v4(), Payload::Udp(1, 2));
        fragment[6] = 0x20;
        assert_eq!(of(&fragment), None);
        let whole = packet(CLIENT.v4(), EMPTY_SERVICE.v4(), Payload::Tcp(1, 2));
        for cut in 0..whole.len() {
            let _ = of(&whole[..cut]);
        }
    }

    #[test]
    fn who_asks_all_the_time_is_answered_now_and_then() {
        let (mut limit, start) = (Limit::default(), Instant::now());
        let greedy = (0..10_000).filter(|_| limit.admit(CLIENT.v4(), start)).count();
        assert_eq!(greedy, BURST as usize);
        assert!(limit.admit(WEB.v4(), start), "another has its own");
        let later = start + Duration::from_millis(500);
        assert_eq!((0..10_000).filter(|_| limit.admit(CLIENT.v4(), later)).count(), 50);
        for i in 0..2 * SENDERS as u32 {
            limit.admit(Addr::v4(i.to_be_bytes()), later);
        }
        assert!(limit.0.len() <= SENDERS);
        assert!(limit.admit(Addr::v4([9; 4]), later + Duration::from_secs(2)), "and they are forgotten");
    }
}
