//! Packets larger than the wire's, and checksums somebody else completes: what the TUN device's header says of a packet
//! (`struct virtio_net_hdr`, <linux/virtio_net.h>), and how to make ordinary packets of it.
//!
//! A checksum is *partial* where its field holds only the sum of the pseudo-header, for a device to complete. The kernel leaves it so on
//! every packet that has not met a wire yet; also on what comes through the tunnel from a node on the same machine.

use netmanager_common::checksum::{Change, fold};
use netmanager_common::frame::{Frame, Header, SliceFrame, TCP, UDP};

/// Length of the header before each packet on the TUN device.
pub(super) const HEADER: usize = 10;

const NEEDS_CHECKSUM: u8 = 1;
const ORDINARY: u8 = 0;
const TCP_V4: u8 = 1;
const TCP_V6: u8 = 4;
const UDP_BOTH: u8 = 5;
/// Of a TCP super-packet: its first segment alone keeps CWR.
const ECN: u8 = 0x80;

const FIN: u8 = 0x01;
const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// What is still to be done to a packet before it is one for the wire. The default is nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Offload {
    flags: u8,
    kind: u8,
    headers_len: u16,
    /// Payload of a segment.
    segment: u16,
    /// Where the transport header begins, and in it the checksum.
    start: u16,
    field: u16,
}

impl Offload {
    pub(super) fn decode(bytes: [u8; HEADER]) -> Self {
        let [flags, kind, a, b, c, d, e, f, g, h] = bytes;
        let number = |low, high| u16::from_ne_bytes([low, high]);
        Self { flags, kind, headers_len: number(a, b), segment: number(c, d), start: number(e, f), field: number(g, h) }
    }

    pub(super) fn encode(&self) -> [u8; HEADER] {
        let ([a, b], [c, d]) = (self.headers_len.to_ne_bytes(), self.segment.to_ne_bytes());
        let ([e, f], [g, h]) = (self.start.to_ne_bytes(), self.field.to_ne_bytes());
        [self.flags, self.kind, a, b, c, d, e, f, g, h]
    }

    /// What a packet out of the tunnel needs, whose checksum the sender may have left partial. `mtu` is the TUN device's.
    pub(super) fn received(packet: &[u8], mtu: usize) -> Self {
        let Some(layout) = Layout::read(packet) else { return Self::default() };
        let pseudo = fold(layout.pseudo(packet));
        // Zero has two forms in one's complement.
        if layout.checksum(packet).is_none_or(|field| field % 0xffff != pseudo % 0xffff) {
            return Self::default();
        }
        let partial = Self {
            flags: NEEDS_CHECKSUM,
            headers_len: layout.headers_len as u16,
            start: layout.ip_len as u16,
            field: layout.field as u16,
            ..Self::default()
        };
        // It has skipped segmentation as it has skipped the checksum.
        let too_large = layout.protocol == TCP && packet.len() > mtu && mtu > layout.headers_len;
        let segment = if too_large { (mtu - layout.headers_len) as u16 } else { return partial };
        Self { kind: if layout.v6 { TCP_V6 } else { TCP_V4 }, segment, ..partial }
    }

    /// Is the checksum partial?
    pub(super) fn partial(&self) -> bool {
        self.flags & NEEDS_CHECKSUM != 0
    }

    /// Is the packet many in one?
    pub(super) fn many(&self) -> bool {
        self.kind != ORDINARY
    }

    /// Completes a partial checksum. `None` where the header does not fit the packet.
    pub(super) fn complete(&self, packet: &mut [u8]) -> Option<()> {
        let start = usize::from(self.start);
        let field = start + usize::from(self.field);
        // The field already holds the sum of the pseudo-header.
        let sum = !fold(sum(0, packet.get(start..)?));
        let bytes = packet.get_mut(field..field + 2)?;
        bytes.copy_from_slice(&if sum == 0 { [0xff; 2] } else { sum.to_be_bytes() });
        Some(())
    }

    /// Splits a super-packet into ordinary ones, side by side in `out`, all but the last of the length that is returned. `None` where
    /// the packet is none, or of a kind that was not asked for.
    pub(super) fn split(&self, packet: &[u8], out: &mut Vec<u8>) -> Option<usize> {
        let layout = Layout::read(packet)?;
        let kind_fits = match self.kind & !ECN {
            TCP_V4 => layout.protocol == TCP && !layout.v6,
            TCP_V6 => layout.protocol == TCP && layout.v6,
            UDP_BOTH => layout.protocol == UDP,
            _ => false,
        };
        let size = usize::from(self.segment);
        if !kind_fits || size == 0 || packet.len() <= layout.headers_len {
            return None;
        }
        let (headers, payload) = packet.split_at(layout.headers_len);
        let last = (payload.len() - 1) / size;
        out.clear();
        for (index, chunk) in payload.chunks(size).enumerate() {
            let begin = out.len();
            out.extend_from_slice(headers);
            out.extend_from_slice(chunk);
            layout.finish(&mut out[begin..], index, index * size, index == last);
        }
        Some(layout.headers_len + size)
    }
}

/// A packet whose checksum may be partial, as the law sees it.
#[derive(Debug)]
pub(super) struct PacketFrame<'a> {
    slice: SliceFrame<'a>,
    partial: bool,
}

impl<'a> PacketFrame<'a> {
    pub(super) fn new(packet: &'a mut [u8], offload: &Offload) -> Self {
        Self { slice: SliceFrame::new(packet), partial: offload.partial() }
    }
}

impl Frame for PacketFrame<'_> {
    fn at<T: Header>(&mut self, offset: usize) -> Option<&mut T> {
        self.slice.at(offset)
    }

    fn fix_l4(&mut self, offset: usize, udp: bool, change: Change) -> Option<()> {
        if !self.partial {
            return self.slice.fix_l4(offset, udp, change);
        }
        // The sum itself and not its complement.
        let field = self.slice.at::<[u8; 2]>(offset)?;
        *field = change.apply(field.map(|byte| !byte)).map(|byte| !byte);
        Some(())
    }
}

/// Where things are in a TCP or UDP packet that is no fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Layout {
    v6: bool,
    protocol: u8,
    ip_len: usize,
    headers_len: usize,
    /// The checksum in the transport header.
    field: usize,
}

impl Layout {
    /// `packet` is exactly as long as its IP header says.
    fn read(packet: &[u8]) -> Option<Self> {
        let (v6, protocol, ip_len) = match packet.first()? >> 4 {
            4 if u16::from_be_bytes([*packet.get(6)?, *packet.get(7)?]) & 0x3fff == 0 => {
                (false, *packet.get(9)?, usize::from(packet[0] & 0x0f) * 4)
            }
            6 => (true, *packet.get(6)?, 40),
            _ => return None,
        };
        let (transport_len, field) = match protocol {
            TCP => (usize::from(packet.get(ip_len + 12)? >> 4) * 4, 16),
            UDP => (8, 6),
            _ => return None,
        };
        let headers_len = ip_len + transport_len;
        let fits = ip_len >= 20 && transport_len >= field + 2 && packet.len() >= headers_len;
        fits.then_some(Self { v6, protocol, ip_len, headers_len, field })
    }

    /// The transport checksum's field; `None` where UDP has none.
    fn checksum(&self, packet: &[u8]) -> Option<u16> {
        let at = self.ip_len + self.field;
        let field = number(packet, at) as u16;
        (self.protocol == TCP || field != 0).then_some(field)
    }

    /// The sum of the pseudo-header (RFC 9293 3.1, RFC 8200 8.1).
    fn pseudo(&self, packet: &[u8]) -> u32 {
        let addresses = if self.v6 { &packet[8..40] } else { &packet[12..20] };
        let len = (packet.len() - self.ip_len) as u32;
        u32::from(fold(sum(u32::from(self.protocol), addresses))) + (len >> 16) + (len & 0xffff)
    }

    /// Makes a copy of the super-packet's headers those of its segment at `offset` of the payload.
    fn finish(&self, packet: &mut [u8], index: usize, offset: usize, last: bool) {
        let len = packet.len();
        if self.v6 {
            packet[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
        } else {
            packet[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            let id = u16::from_be_bytes([packet[4], packet[5]]).wrapping_add(index as u16);
            packet[4..6].copy_from_slice(&id.to_be_bytes());
            packet[10..12].fill(0);
            let header = !fold(sum(0, &packet[..self.ip_len]));
            packet[10..12].copy_from_slice(&header.to_be_bytes());
        }
        let transport = &mut packet[self.ip_len..];
        if self.protocol == UDP {
            transport[4..6].copy_from_slice(&((len - self.ip_len) as u16).to_be_bytes());
        } else {
            let first = u32::from_be_bytes([transport[4], transport[5], transport[6], transport[7]]);
            transport[4..8].copy_from_slice(&first.wrapping_add(offset as u32).to_be_bytes());
            let only_first = if index == 0 { 0 } else { CWR };
            let only_last = if last { 0 } else { FIN | PSH };
            transport[13] &= !(only_first | only_last);
        }
        transport[self.field..self.field + 2].fill(0);
        let checksum = !fold(sum(self.pseudo(packet), &packet[self.ip_len..]));
        let checksum = if checksum == 0 { 0xffff } else { checksum };
        let at = self.ip_len + self.field;
        packet[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    }
}

/// How many of the packets, from the first, can be given to the kernel as one TCP super-packet (what its own GRO would merge), and what
/// it then needs. One alone needs nothing.
pub(super) fn run<'a>(mut packets: impl Iterator<Item = &'a [u8]>) -> (usize, Offload) {
    let Some((first, layout)) = packets.next().and_then(|first| Some((first, mergeable(first)?))) else {
        return (1, Offload::default());
    };
    let size = first.len() - layout.headers_len;
    let mut total = first.len();
    let mut count = 1;
    let mut closed = size == 0 || first[layout.ip_len + 13] & PSH != 0;
    while !closed
        && let Some(next) = packets.next()
        && follows(first, next, &layout, (total - layout.headers_len) as u32)
        && next.len() <= first.len()
        && total + next.len() - layout.headers_len <= usize::from(u16::MAX)
    {
        count += 1;
        total += next.len() - layout.headers_len;
        closed = next.len() < first.len() || next[layout.ip_len + 13] & PSH != 0;
    }
    if count == 1 {
        return (1, Offload::default());
    }
    let offload = Offload {
        flags: NEEDS_CHECKSUM,
        kind: if layout.v6 { TCP_V6 } else { TCP_V4 },
        headers_len: layout.headers_len as u16,
        segment: size as u16,
        start: layout.ip_len as u16,
        field: layout.field as u16,
    };
    (count, offload)
}

/// Makes the first packet of a run the head of the super-packet: `payload` is what follows it. Where `push` is set the last one had it.
pub(super) fn lead(first: &mut [u8], offload: &Offload, payload: usize, push: bool) {
    let Some(layout) = Layout::read(first) else { return };
    let len = first.len() + payload;
    if layout.v6 {
        first[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
    } else {
        first[2..4].copy_from_slice(&(len as u16).to_be_bytes());
        first[10..12].fill(0);
        let header = !fold(sum(0, &first[..layout.ip_len]));
        first[10..12].copy_from_slice(&header.to_be_bytes());
    }
    if push {
        first[layout.ip_len + 13] |= PSH;
    }
    let pseudo = fold(layout.pseudo(first) + payload as u32);
    let at = usize::from(offload.start + offload.field);
    first[at..at + 2].copy_from_slice(&pseudo.to_be_bytes());
}

/// Does the packet ask the receiver to hand over what it has?
pub(super) fn pushes(packet: &[u8], offload: &Offload) -> bool {
    packet.get(usize::from(offload.start) + 13).is_some_and(|flags| flags & PSH != 0)
}

/// Length of the headers that every packet of the run repeats.
pub(super) fn repeated(offload: &Offload) -> usize {
    usize::from(offload.headers_len)
}

/// Data of an established TCP connection, whole and unharmed, without IP options.
fn mergeable(packet: &[u8]) -> Option<Layout> {
    let layout = Layout::read(packet)?;
    let claimed = if layout.v6 { 40 + number(packet, 4) } else { number(packet, 2) };
    let plain = layout.protocol == TCP
        && claimed == packet.len()
        && (layout.v6 || layout.ip_len == 20)
        // ACK, and perhaps PSH
        && packet[layout.ip_len + 13] & !PSH == 0x10;
    (plain && fold(sum(layout.pseudo(packet), &packet[layout.ip_len..])) == 0xffff).then_some(layout)
}

/// The 16-bit number at this place of a header.
fn number(packet: &[u8], at: usize) -> usize {
    usize::from(u16::from_be_bytes([packet[at], packet[at + 1]]))
}

/// Is `next` the same connection's next data, `sent` bytes after the first, all else equal?
fn follows(first: &[u8], next: &[u8], layout: &Layout, sent: u32) -> bool {
    let Some(other) = mergeable(next) else { return false };
    let tcp = |packet: &[u8]| packet[layout.ip_len..].first_chunk::<20>().copied().unwrap_or_default();
    let sequence = |tcp: [u8; 20]| u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
    let same_ip = if layout.v6 {
        // version, class, flow label; hop limit and addresses
        first[..4] == next[..4] && first[7..40] == next[7..40]
    } else {
        // version, length, service; flags; TTL, protocol; addresses
        first[..2] == next[..2] && first[6..10] == next[6..10] && first[12..20] == next[12..20]
    };
    if other != *layout || !same_ip || next.len() == layout.headers_len {
        return false;
    }
    let (a, b) = (tcp(first), tcp(next));
    a[..4] == b[..4]
        && a[8..13] == b[8..13]
        // window; options are beyond the urgent pointer
        && a[14..16] == b[14..16]
        && first[layout.ip_len + 18..layout.headers_len] == next[layout.ip_len + 18..layout.headers_len]
        && sequence(b) == sequence(a).wrapping_add(sent)
}

/// The one's complement sum of `bytes`, added to `seed`. Four bytes at a time: a super-packet has many.
fn sum(seed: u32, bytes: &[u8]) -> u32 {
    let (words, rest) = bytes.as_chunks::<4>();
    let mut sum = words.iter().fold(u64::from(seed), |sum, word| sum + u64::from(u32::from_be_bytes(*word)));
    let mut tail = [0; 4];
    tail[..rest.len()].copy_from_slice(rest);
    sum += u64::from(u32::from_be_bytes(tail));
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    u32::from(fold(sum as u32))
}

/// Takes a packet apart as the TUN device's header claims it is, and runs together whatever came of it, for the fuzzer. The first
/// bytes are that header.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn round_trip(bytes: &[u8]) {
    let Some((header, packet)) = bytes.split_first_chunk::<HEADER>() else { return };
    let offload = Offload::decode(*header);
    let mut segments = Vec::new();
    if let Some(stride) = offload.split(packet, &mut segments) {
        assert!(stride > 0 && !segments.is_empty(), "what is split has parts");
        let (count, again) = run(segments.chunks(stride));
        assert!(count > 0);
        let mut first = segments[..stride.min(segments.len())].to_vec();
        let rest = segments.len() - first.len();
        if count > 1 {
            lead(&mut first, &again, rest, pushes(&segments, &again));
        }
    }
    let mut packet = packet.to_vec();
    let _ = offload.complete(&mut packet);
    let _ = Offload::received(&packet, 1450);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MTU: usize = 1450;

    #[test]
    fn the_header_is_read_as_it_is_written() {
        let offload = Offload { flags: 1, kind: 4, headers_len: 72, segment: 1378, start: 40, field: 16 };
        assert_eq!(Offload::decode(offload.encode()), offload);
    }

    proptest! {
        #[test]
        fn what_is_split_can_be_run_together_again(v6: bool, len in 1..40_000_usize, push: bool) {
            let (packet, offload) = super_packet(v6, len, push);
            let mut segments = Vec::new();
            let stride = offload.split(&packet, &mut segments).unwrap();
            prop_assert_eq!(stride, offload.headers_len as usize + offload.segment as usize);
            let pieces: Vec<&[u8]> = segments.chunks(stride).collect();
            for piece in &pieces {
                prop_assert!(mergeable(piece).is_some(), "headers or checksum are wrong");
                prop_assert_eq!(Offload::received(piece, MTU), Offload::default());
            }
            let payload: Vec<u8> = pieces.iter().flat_map(|p| p[stride - 1000..].to_vec()).collect();
            prop_assert!(payload == packet[offload.headers_len as usize..], "payload has changed");

            let (count, again) = run(pieces.iter().copied());
            prop_assert_eq!(count, pieces.len());
            if count > 1 {
                prop_assert_eq!(again, offload);
                let mut first = pieces[0].to_vec();
                let rest = packet.len() - first.len();
                lead(&mut first, &again, rest, pushes(pieces[count - 1], &again));
                prop_assert_eq!(&first[..], &packet[..first.len()]);
            }
        }

        #[test]
        fn a_partial_checksum_is_found_completed_and_followed(v6: bool, len in 0..1300_usize, udp: bool) {
            let mut packet = partial_packet(v6, udp, len);
            let offload = Offload::received(&packet, MTU);
            prop_assert!(offload.partial() && !offload.many());
            prop_assert!(follows_the_law(&mut packet, &offload));
            offload.complete(&mut packet).unwrap();
            prop_assert!(!Offload::received(&packet, MTU).partial());
            let layout = Layout::read(&packet).unwrap();
            prop_assert_eq!(fold(sum(layout.pseudo(&packet), &packet[layout.ip_len..])), 0xffff);
        }

        #[test]
        fn no_input_panics(packet in proptest::collection::vec(any::<u8>(), 0..200), header: [u8; HEADER], version in 0..3_u8) {
            let mut packet = packet;
            if let (Some(first), 1..) = (packet.first_mut(), version) {
                *first = if version == 1 { 0x45 } else { 0x60 };
            }
            let offload = Offload::decode(header);
            let _ = offload.split(&packet, &mut Vec::new());
            let _ = offload.complete(&mut packet.clone());
            let _ = Offload::received(&packet, 100);
            let _ = run([&packet[..], &packet[..]].into_iter());
        }
    }

    #[test]
    fn an_uncut_packet_from_the_same_machine_is_one_of_many() {
        let (packet, offload) = super_packet(false, 20_000, true);
        let found = Offload::received(&packet, MTU);
        assert_eq!(found, Offload { segment: (MTU - 52) as u16, ..offload });
    }

    #[test]
    fn a_run_ends_where_the_connection_or_the_data_does() {
        let (packet, offload) = super_packet(false, 5_000, false);
        let mut segments = Vec::new();
        let stride = offload.split(&packet, &mut segments).unwrap();
        let pieces: Vec<&[u8]> = segments.chunks(stride).collect();
        assert_eq!(run(pieces.iter().copied()).0, 5);

        let spoil = |at: usize, byte: usize| {
            let mut pieces: Vec<Vec<u8>> = pieces.iter().map(|piece| piece.to_vec()).collect();
            pieces[at][byte] ^= 1;
            run(pieces.iter().map(Vec::as_slice)).0
        };
        assert_eq!(spoil(2, 60), 2, "a damaged packet goes alone, for the receiver to refuse");
        assert_eq!(spoil(3, 19), 3, "another destination");
        assert_eq!(spoil(1, 22), 1, "another port");
        let missing: Vec<&[u8]> = [&pieces[..2], &pieces[3..]].concat();
        assert_eq!(run(missing.into_iter()).0, 2, "a gap");
    }

    /// A TCP super-packet of 1,000-byte segments, with a timestamp option, as the kernel hands it over.
    fn super_packet(v6: bool, len: usize, push: bool) -> (Vec<u8>, Offload) {
        let mut packet = headers(v6, TCP, 32, len);
        let ip_len = packet.len() - 32;
        packet[ip_len + 13] = if push { 0x18 } else { 0x10 };
        packet.extend((0..len).map(|i| (i * 7) as u8));
        let layout = Layout::read(&packet).unwrap();
        let pseudo = fold(layout.pseudo(&packet));
        packet[ip_len + 16..ip_len + 18].copy_from_slice(&pseudo.to_be_bytes());
        let kind = if v6 { TCP_V6 } else { TCP_V4 };
        let headers_len = layout.headers_len as u16;
        (packet, Offload { flags: 1, kind, headers_len, segment: 1000, start: ip_len as u16, field: 16 })
    }

    fn partial_packet(v6: bool, udp: bool, len: usize) -> Vec<u8> {
        let (protocol, transport_len, field) = if udp { (UDP, 8, 6) } else { (TCP, 32, 16) };
        let mut packet = headers(v6, protocol, transport_len, len);
        let ip_len = packet.len() - transport_len;
        packet.extend((0..len).map(|i| (i * 11 + 3) as u8));
        let layout = Layout::read(&packet).unwrap();
        let pseudo = fold(layout.pseudo(&packet));
        packet[ip_len + field..ip_len + field + 2].copy_from_slice(&pseudo.to_be_bytes());
        packet
    }

    fn headers(v6: bool, protocol: u8, transport_len: usize, len: usize) -> Vec<u8> {
        let mut packet = vec![0; if v6 { 40 } else { 20 }];
        if v6 {
            packet[0] = 0x60;
            packet[4..6].copy_from_slice(&((transport_len + len) as u16).to_be_bytes());
            packet[6..8].copy_from_slice(&[protocol, 63]);
            packet[8..40].copy_from_slice(&[0xfd; 32]);
        } else {
            packet[0] = 0x45;
            packet[2..4].copy_from_slice(&((20 + transport_len + len) as u16).to_be_bytes());
            packet[6..10].copy_from_slice(&[0x40, 0, 63, protocol]);
            packet[12..20].copy_from_slice(&[10, 30, 0, 1, 10, 18, 0, 66]);
            let header = !fold(sum(0, &packet));
            packet[10..12].copy_from_slice(&header.to_be_bytes());
        }
        let mut transport = vec![0; transport_len];
        transport[..4].copy_from_slice(&[0x98, 0x6e, 0, 80]);
        if protocol == TCP {
            transport[4..8].copy_from_slice(&0xffff_f000_u32.to_be_bytes());
            transport[12] = (transport_len as u8 / 4) << 4;
            transport[13] = 0x10;
            transport[20..22].copy_from_slice(&[1, 1]);
        } else {
            transport[4..6].copy_from_slice(&((8 + len) as u16).to_be_bytes());
        }
        packet.extend(transport);
        packet
    }

    /// Gives the packet other addresses the way the law does, and asks whether its checksum is still the partial one.
    fn follows_the_law(packet: &mut [u8], offload: &Offload) -> bool {
        let v6 = packet[0] >> 4 == 6;
        let range = if v6 { 8..40 } else { 12..20 };
        let at = usize::from(offload.start + offload.field);
        let mut new = packet[range.clone()].to_vec();
        new.iter_mut().enumerate().for_each(|(i, byte)| *byte = byte.wrapping_mul(3).wrapping_add(i as u8));
        let mut frame = PacketFrame::new(packet, offload);
        if v6 {
            let old = [0xfd; 32];
            frame.fix_l4(at, false, Change::of::<32>(&old, new[..].try_into().unwrap())).unwrap();
        } else {
            let old = [10, 30, 0, 1, 10, 18, 0, 66];
            frame.fix_l4(at, false, Change::of::<8>(&old, new[..].try_into().unwrap())).unwrap();
        }
        packet[range].copy_from_slice(&new);
        Offload::received(packet, MTU).partial()
    }
}
