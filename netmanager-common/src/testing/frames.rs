//! Random frames.

use super::std::vec::Vec;

use super::packets::ECHOED;
use super::*;
use crate::frame::{TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN};

/// Random frames that look enough like traffic to reach every branch: a seeded generator, the same on every machine.
#[derive(Clone, Debug)]
pub struct Frames {
    state: u64,
    /// Who has opened a connection last: the sender, whether by IPv6, and the ports.
    opened: Option<(Pair, bool, u16, u16)>,
}

impl Frames {
    pub fn new(seed: u64) -> Self {
        Self { state: seed | 1, opened: None }
    }

    /// xorshift64*, Vigna 2016.
    fn next(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 33) as usize % bound
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    /// A direction and a packet for it: well-formed, odd, mutated, or cut.
    pub fn frame(&mut self) -> (Direction, Vec<u8>) {
        const SENDERS: [Pair; 8] = [CLIENT, CLIENT, WEB, WEB, NEWBORN, NEIGHBOUR, OUTSIDE, DB0];
        const TARGETS: [Pair; 14] = [
            DB_SERVICE,
            TURN_SERVICE,
            STICKY_SERVICE,
            TRIED_SERVICE,
            WEB_SERVICE,
            WEB_SERVICE,
            EMPTY_SERVICE,
            UNKNOWN_SERVICE,
            DB0_INSTANCE,
            DB1_INSTANCE,
            DB2_INSTANCE,
            DB3_INSTANCE,
            CLIENT_INSTANCE,
            OUTSIDE,
        ];
        const SOURCES: [Pair; 9] = [
            DB0_INSTANCE,
            DB0_INSTANCE,
            DB1_INSTANCE,
            DB1_INSTANCE,
            DB2_INSTANCE,
            DB3_INSTANCE,
            WEB_INSTANCE,
            UNKNOWN_SERVICE,
            DB_SERVICE,
        ];
        const RECEIVERS: [Pair; 6] = [CLIENT, CLIENT, WEB, WEB, NEWBORN, DB0];

        if self.below(8) == 0
            && let Some((client, v6, port, called)) = self.opened
        {
            // Who was called may answer, or refuse.
            let (server, node) = self.of(&[(DB0_INSTANCE, OURS), (DB1_INSTANCE, UPSTREAM)]);
            let flags = self.of(&[TCP_SYN | TCP_ACK, TCP_RST | TCP_ACK]);
            let answer = packet(server.of(v6), client.of(v6), Payload::Segment(called, port, flags));
            return (Direction::Inbound(node), answer);
        }
        let v6 = self.below(2) == 1;
        let payload = self.payload();
        let (direction, source, destination) = if self.below(2) == 0 {
            (Direction::Outbound(PORT), self.of(&SENDERS), self.of(&TARGETS))
        } else {
            (Direction::Inbound(self.of(&[OURS, OURS, UPSTREAM, NARROW])), self.of(&SOURCES), self.of(&RECEIVERS))
        };
        if let (Direction::Outbound(_), Payload::Tcp(port, called)) = (direction, payload) {
            self.opened = Some((source, v6, port, called));
        }
        let mut packet = packet(source.of(v6), destination.of(v6), payload);
        if !v6 && self.below(8) == 0 {
            packet = with_options(&packet);
        }
        if self.below(16) == 0 {
            packet = self.fragment(packet);
        }
        if self.below(16) == 0 {
            let at = packet.len().min(if v6 { 40 } else { 20 } + self.of(&[2, 6, 16]));
            let odd = self.of(&[[0, 0], [0xff, 0xff], [self.state as u8, 7]]);
            packet[at..].iter_mut().zip(odd).for_each(|(byte, odd)| *byte = odd);
        }
        if self.below(4) == 0 {
            for _ in 0..=self.below(3) {
                let at = self.below(packet.len().min(64));
                packet[at] = self.next() as u8;
            }
        }
        if self.below(16) == 0 {
            packet.truncate(self.below(packet.len()));
        }
        (direction, packet)
    }

    /// A fragment like one of the packet's.
    fn fragment(&mut self, mut packet: Vec<u8>) -> Vec<u8> {
        let field: u16 = self.of(&[0x2000, 0x00b9, 0x20b9, 0x0001, 0x6000]);
        if packet[0] >> 4 == 4 {
            packet[6..8].copy_from_slice(&field.to_be_bytes());
            return packet;
        }
        let (len, next) = (packet.len() - 40 + 8, packet[6]);
        let more = u8::from(field & 0x2000 != 0);
        packet.splice(40..40, [next, 0, 0, (field as u8 & !7) | more, 1, 2, 3, 4]);
        packet[4..6].copy_from_slice(&(len as u16).to_be_bytes());
        packet[6] = 44;
        packet
    }

    fn payload(&mut self) -> Payload {
        // Few ports, so that flows meet again.
        let (low, high) = (self.of(&[53, 80, 443]), self.of(&[40_000, 40_001, 50_000]));
        let (source, destination) = if self.below(2) == 0 { (low, high) } else { (high, low) };
        match self.below(16) {
            0..=2 => Payload::Tcp(source, destination),
            3..=5 => {
                let flags =
                    self.of(&[TCP_ACK, TCP_SYN | TCP_ACK, TCP_RST | TCP_ACK, TCP_FIN | TCP_ACK, ECHOED | TCP_ACK]);
                Payload::Segment(source, destination, flags)
            }
            6..=9 => Payload::Udp(source, destination),
            10 => Payload::UdpBare(source, destination),
            11 | 12 => Payload::EchoRequest(source),
            13 if self.below(2) == 0 => Payload::Message(self.below(14) as u8),
            13 => Payload::EchoReply(source),
            14 => Payload::Other(self.of(&[0, 43, 44, 50, 51, 60, 135])),
            _ => Payload::Other(self.next() as u8),
        }
    }
}
