//! Packets by kind, with correct checksums, and whether those of a packet are.

use super::std::vec;
use super::std::vec::Vec;

use crate::addr::Addr;
use crate::checksum;
use crate::frame::{ICMP, ICMPV6, TCP, TCP_SYN, UDP};

/// What a packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    /// What begins a connection, saying that segments of up to 1,460 bytes are taken.
    Tcp(u16, u16),
    /// TCP with these flags, and the options that are usual with them.
    Segment(u16, u16, u8),
    Udp(u16, u16),
    /// UDP over IPv4 without a checksum.
    UdpBare(u16, u16),
    EchoRequest(u16),
    EchoReply(u16),
    /// An ICMP message of this type.
    Message(u8),
    /// Any other protocol.
    Other(u8),
}

/// A whole packet with correct checksums and 20 bytes of data.
pub fn packet(source: Addr, destination: Addr, payload: Payload) -> Vec<u8> {
    let v6 = !source.is_v4();
    let mut transport = transport(v6, payload);
    let protocol = match payload {
        Payload::Tcp(..) | Payload::Segment(..) => TCP,
        Payload::Udp(..) | Payload::UdpBare(..) => UDP,
        Payload::EchoRequest(_) | Payload::EchoReply(_) | Payload::Message(_) => {
            if v6 {
                ICMPV6
            } else {
                ICMP
            }
        }
        Payload::Other(protocol) => protocol,
    };
    if let Some(field) = checksum_field(v6, protocol)
        && !matches!(payload, Payload::UdpBare(..))
    {
        let seed =
            if !v6 && protocol == ICMP { 0 } else { pseudo_sum(&source, &destination, protocol, transport.len()) };
        let sum = !checksum::fold(checksum::sum(seed, &transport));
        transport[field..field + 2].copy_from_slice(&sum.to_be_bytes());
    }
    let mut packet = if v6 {
        header_v6(source, destination, protocol, transport.len())
    } else {
        header_v4(source, destination, protocol, transport.len())
    };
    packet.extend(transport);
    packet
}

/// Flags of TCP (RFC 3168): it asks for explicit congestion notification; it has been told of congestion.
const ASKS: u8 = 0xc0;
pub(super) const ECHOED: u8 = 0x40;

fn transport(v6: bool, payload: Payload) -> Vec<u8> {
    let mut bytes = match payload {
        Payload::Tcp(source, destination) => {
            return transport(v6, Payload::Segment(source, destination, ASKS | TCP_SYN));
        }
        Payload::Segment(source, destination, flags) => {
            let mut header = [source.to_be_bytes(), destination.to_be_bytes()].concat();
            // At the beginning: segment size, selective acknowledgement, timestamps, window scale. Then timestamps, and a gap that selective
            // acknowledgement tells of.
            let options: &[u8] = if flags & TCP_SYN != 0 {
                &[2, 4, 0x05, 0xb4, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7]
            } else {
                &[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2, 1, 1, 5, 10, 0, 0, 0, 20, 0, 0, 0, 40]
            };
            header.extend([0, 0, 0, 9, 0, 0, 0, 0, (20 + options.len() as u8) << 2, flags, 0xff, 0xff, 0, 0, 0, 0]);
            header.extend(options);
            header
        }
        Payload::Udp(source, destination) | Payload::UdpBare(source, destination) => {
            [source.to_be_bytes(), destination.to_be_bytes(), [0, 28], [0, 0]].concat()
        }
        Payload::EchoRequest(id) => [[if v6 { 128 } else { 8 }, 0], [0, 0], id.to_be_bytes(), [0, 1]].concat(),
        Payload::EchoReply(id) => [[if v6 { 129 } else { 0 }, 0], [0, 0], id.to_be_bytes(), [0, 1]].concat(),
        Payload::Message(kind) => vec![kind, 0, 0, 0, 0, 0, 0, 0],
        Payload::Other(_) => vec![0; 8],
    };
    bytes.extend(b"twenty bytes of data");
    bytes
}

fn header_v4(source: Addr, destination: Addr, protocol: u8, len: usize) -> Vec<u8> {
    let mut header = vec![0x45, 0, 0, 0, 0x12, 0x34, 0x40, 0, 64, protocol, 0, 0];
    header[2..4].copy_from_slice(&((len + 20) as u16).to_be_bytes());
    header.extend(source.v4_bytes());
    header.extend(destination.v4_bytes());
    let sum = !checksum::fold(checksum::sum(0, &header));
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header
}

fn header_v6(source: Addr, destination: Addr, protocol: u8, len: usize) -> Vec<u8> {
    let mut header = vec![0x60, 0, 0, 0, 0, 0, protocol, 64];
    header[4..6].copy_from_slice(&(len as u16).to_be_bytes());
    header.extend(source.0);
    header.extend(destination.0);
    header
}

/// Where the checksum lies in the transport header.
fn checksum_field(v6: bool, protocol: u8) -> Option<usize> {
    match (v6, protocol) {
        (_, TCP) => Some(16),
        (_, UDP) => Some(6),
        (false, ICMP) | (true, ICMPV6) => Some(2),
        _ => None,
    }
}

fn pseudo_sum(source: &Addr, destination: &Addr, protocol: u8, len: usize) -> u32 {
    // A mapped address sums up as its IPv4 bytes do: 0xffff is the one's complement zero.
    let sum = checksum::sum(checksum::sum(0, &source.0), &destination.0);
    checksum::sum(sum, &[0, protocol, (len >> 8) as u8, len as u8])
}

/// Are all checksums of this packet right? A UDP checksum of 0 over IPv4 counts as right; a packet cut short does not.
pub fn checksums_hold(packet: &[u8]) -> bool {
    hold(packet).unwrap_or(false)
}

/// `None`: something is cut off.
fn hold(packet: &[u8]) -> Option<bool> {
    let v6 = packet.first()? >> 4 == 6;
    let (header, protocol) =
        if v6 { (40, *packet.get(6)?) } else { (usize::from(packet.first()? & 15) * 4, *packet.get(9)?) };
    let transport = packet.get(header..).filter(|_| header >= 20)?;
    if !v6 && checksum::fold(checksum::sum(0, &packet[..header])) != 0xffff {
        return Some(false);
    }
    let (source, destination) = addresses(packet);
    let Some(field) = checksum_field(v6, protocol) else { return Some(true) };
    let sum = transport.get(field..field + 2)?;
    if !v6 && protocol == UDP && sum == [0, 0] {
        return Some(true);
    }
    let seed = if protocol == ICMP { 0 } else { pseudo_sum(&source, &destination, protocol, transport.len()) };
    Some(checksum::fold(checksum::sum(seed, transport)) == 0xffff)
}

/// Source and destination of a packet that has a whole IP header.
pub fn addresses(packet: &[u8]) -> (Addr, Addr) {
    let take = |from: usize, len: usize| {
        let mut bytes = [0; 16];
        bytes[..len].copy_from_slice(&packet[from..from + len]);
        if len == 4 { Addr::v4([bytes[0], bytes[1], bytes[2], bytes[3]]) } else { Addr::v6(bytes) }
    };
    if packet[0] >> 4 == 6 { (take(8, 16), take(24, 16)) } else { (take(12, 4), take(16, 4)) }
}

/// The packet with four bytes of IPv4 options (no-operation).
pub fn with_options(packet: &[u8]) -> Vec<u8> {
    let mut longer = packet[..20].to_vec();
    longer.extend([1, 1, 1, 1]);
    longer.extend(&packet[20..]);
    longer[0] = 0x46;
    let total = longer.len() as u16;
    longer[2..4].copy_from_slice(&total.to_be_bytes());
    longer[10..12].fill(0);
    let sum = !checksum::fold(checksum::sum(0, &longer[..24]));
    longer[10..12].copy_from_slice(&sum.to_be_bytes());
    longer
}
