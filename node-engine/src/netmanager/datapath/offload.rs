//! Packets larger than the wire's, and checksums somebody else completes: what the TUN device's header says of a packet
//! (`struct virtio_net_hdr`, <linux/virtio_net.h>), and how to make ordinary packets of it.
//!
//! A checksum is *partial* where its field holds only the sum of the pseudo-header, for a device to complete. The kernel leaves it so on
//! every packet that has not met a wire yet; also on what comes through the tunnel from a node on the same machine.

use std::ops::Range;

use netmanager_common::checksum::{Change, fold};
use netmanager_common::frame::{Frame, Header, SliceFrame, TCP, UDP};
use netmanager_common::mss;

#[cfg(any(test, feature = "fuzzing"))]
use super::merge;

/// Length of the header before each packet on the TUN device.
pub(super) const HEADER: usize = 10;

pub(super) const NEEDS_CHECKSUM: u8 = 1;
const ORDINARY: u8 = 0;
pub(super) const TCP_V4: u8 = 1;
pub(super) const TCP_V6: u8 = 4;
pub(super) const UDP_BOTH: u8 = 5;
/// Of a TCP super-packet: its first segment alone keeps CWR.
const ECN: u8 = 0x80;

const FIN: u8 = 0x01;
pub(super) const PSH: u8 = 0x08;
const CWR: u8 = 0x80;

/// What is still to be done to a packet before it is one for the wire. The default is nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Offload {
    pub(super) flags: u8,
    pub(super) kind: u8,
    pub(super) headers_len: u16,
    /// Payload of a segment.
    pub(super) segment: u16,
    /// Where the transport header begins, and in it the checksum.
    pub(super) start: u16,
    pub(super) field: u16,
    /// Its sender has sent it in fragments, so it may travel in several pieces again. Nothing that the kernel is told.
    pub(super) joined: bool,
}

impl Offload {
    /// Of a packet that was put together of fragments.
    pub(super) fn joined() -> Self {
        Self { joined: true, ..Self::default() }
    }

    pub(super) fn decode(bytes: [u8; HEADER]) -> Self {
        let [flags, kind, a, b, c, d, e, f, g, h] = bytes;
        let number = |low, high| u16::from_ne_bytes([low, high]);
        Self {
            flags,
            kind,
            headers_len: number(a, b),
            segment: number(c, d),
            start: number(e, f),
            field: number(g, h),
            joined: false,
        }
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

    /// How a super-packet is taken apart. `None` where it is none, or of a kind that was not asked for.
    pub(super) fn cut(&self, packet: &[u8]) -> Option<Cut> {
        let layout = Layout::read(packet)?;
        let kind_fits = match self.kind & !ECN {
            TCP_V4 => layout.protocol == TCP && !layout.v6,
            TCP_V6 => layout.protocol == TCP && layout.v6,
            UDP_BOTH => layout.protocol == UDP,
            _ => false,
        };
        let size = usize::from(self.segment);
        (kind_fits && size != 0 && packet.len() > layout.headers_len).then_some(Cut { layout, size, len: packet.len() })
    }
}

/// Where a super-packet is cut.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    layout: Layout,
    /// Payload of all segments but the last, which may have less.
    size: usize,
    /// Of the whole packet.
    len: usize,
}

/// One of the ordinary packets that a super-packet becomes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    index: usize,
    /// In the super-packet.
    pub(super) payload: Range<usize>,
    last: bool,
}

impl Cut {
    pub(super) fn headers_len(&self) -> usize {
        self.layout.headers_len
    }

    pub(super) fn segments(&self) -> impl Iterator<Item = Segment> + use<> {
        let Self { layout: Layout { headers_len, .. }, size, len } = *self;
        (headers_len..len).step_by(size).enumerate().map(move |(index, start)| {
            let end = (start + size).min(len);
            Segment { index, payload: start..end, last: end == len }
        })
    }

    /// Makes a copy of the super-packet's headers those of its segment.
    pub(super) fn finish(&self, headers: &mut [u8], packet: &[u8], segment: &Segment) {
        let layout = &self.layout;
        let payload = &packet[segment.payload.clone()];
        let len = headers.len() + payload.len();
        if layout.v6 {
            headers[4..6].copy_from_slice(&((len - 40) as u16).to_be_bytes());
        } else {
            headers[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            let id = u16::from_be_bytes([headers[4], headers[5]]).wrapping_add(segment.index as u16);
            headers[4..6].copy_from_slice(&id.to_be_bytes());
            headers[10..12].fill(0);
            let header = !fold(sum(0, &headers[..layout.ip_len]));
            headers[10..12].copy_from_slice(&header.to_be_bytes());
        }
        let transport = &mut headers[layout.ip_len..];
        if layout.protocol == UDP {
            transport[4..6].copy_from_slice(&((len - layout.ip_len) as u16).to_be_bytes());
        } else {
            let first = u32::from_be_bytes([transport[4], transport[5], transport[6], transport[7]]);
            let offset = segment.index * self.size;
            transport[4..8].copy_from_slice(&first.wrapping_add(offset as u32).to_be_bytes());
            let only_first = if segment.index == 0 { 0 } else { CWR };
            let only_last = if segment.last { 0 } else { FIN | PSH };
            transport[13] &= !(only_first | only_last);
        }
        transport[layout.field..layout.field + 2].fill(0);
        // Transport headers are of an even length, so that the payload's sum can be added to theirs.
        let sum_of_headers = sum(layout.pseudo_of(headers, len), &headers[layout.ip_len..]);
        let checksum = !fold(sum(sum_of_headers, payload));
        let checksum = if checksum == 0 { 0xffff } else { checksum };
        let at = layout.ip_len + layout.field;
        headers[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
    }
}

/// A packet whose checksum may be partial, as the law sees it.
#[derive(Debug)]
pub(super) struct PacketFrame<'a> {
    slice: SliceFrame<'a>,
    partial: bool,
    /// Payload of each of many; 0: it is one.
    segment: u16,
    joined: bool,
}

impl<'a> PacketFrame<'a> {
    pub(super) fn new(packet: &'a mut [u8], offload: &Offload) -> Self {
        let segment = if offload.many() { offload.segment } else { 0 };
        Self { slice: SliceFrame::new(packet), partial: offload.partial(), segment, joined: offload.joined }
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

    fn wire_len(&mut self, headers: usize) -> usize {
        match self.segment {
            // Its pieces were as short as its sender was told.
            0 if self.joined => headers,
            0 => self.slice.bytes().len(),
            segment => headers + usize::from(segment),
        }
    }

    fn clamp_mss(&mut self, offset: usize, limit: u16) -> Option<()> {
        mss::clamp(self.slice.bytes_mut().get_mut(offset..)?, limit, !self.partial);
        Some(())
    }
}

/// Where things are in a TCP or UDP packet that is no fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) v6: bool,
    pub(super) protocol: u8,
    pub(super) ip_len: usize,
    pub(super) headers_len: usize,
    /// The checksum in the transport header.
    pub(super) field: usize,
}

impl Layout {
    /// `packet` is exactly as long as its IP header says.
    pub(super) fn read(packet: &[u8]) -> Option<Self> {
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
    pub(super) fn checksum(&self, packet: &[u8]) -> Option<u16> {
        let at = self.ip_len + self.field;
        let field = number(packet, at) as u16;
        (self.protocol == TCP || field != 0).then_some(field)
    }

    /// The sum of the pseudo-header (RFC 9293 3.1, RFC 8200 8.1).
    pub(super) fn pseudo(&self, packet: &[u8]) -> u32 {
        self.pseudo_of(packet, packet.len())
    }

    /// Where the packet is `len` long, of which its headers are at hand.
    pub(super) fn pseudo_of(&self, headers: &[u8], len: usize) -> u32 {
        let addresses = if self.v6 { &headers[8..40] } else { &headers[12..20] };
        let len = (len - self.ip_len) as u32;
        u32::from(fold(sum(u32::from(self.protocol), addresses))) + (len >> 16) + (len & 0xffff)
    }
}

/// The 16-bit number at this place of a header.
pub(super) fn number(packet: &[u8], at: usize) -> usize {
    usize::from(u16::from_be_bytes([packet[at], packet[at + 1]]))
}

/// The one's complement sum of `bytes`, added to `seed`; an odd last byte counts as its high half. In the machine's own order, which
/// gives the same sums as the wire's (RFC 1071, 2(B)), and by words into several sums at a time: a super-packet has many.
pub(super) fn sum(seed: u32, bytes: &[u8]) -> u32 {
    let (blocks, rest) = bytes.as_chunks::<32>();
    let mut sums = [0_u64; 8];
    for block in blocks {
        let (words, _) = block.as_chunks::<4>();
        for (sum, word) in sums.iter_mut().zip(words) {
            *sum += u64::from(u32::from_ne_bytes(*word));
        }
    }
    let (words, rest) = rest.as_chunks::<4>();
    let mut tail = [0; 4];
    tail[..rest.len()].copy_from_slice(rest);
    let words = words.iter().chain([&tail]).map(|word| u64::from(u32::from_ne_bytes(*word)));
    let sum = sums.into_iter().chain(words).sum::<u64>();
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    u32::from(fold(seed)) + u32::from(u16::from_be_bytes(fold(sum as u32).to_ne_bytes()))
}

/// Takes a packet apart as the TUN device's header claims it is, and runs together whatever came of it, for the fuzzer. The first
/// bytes are that header.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn round_trip(bytes: &[u8]) {
    let Some((header, packet)) = bytes.split_first_chunk::<HEADER>() else { return };
    let offload = Offload::decode(*header);
    if let Some((segments, stride)) = split(packet, &offload) {
        assert!(stride > 0 && !segments.is_empty(), "what is split has parts");
        let (count, again) = merge::run(segments.chunks(stride), true);
        assert!(count > 0);
        let mut first = segments[..stride.min(segments.len())].to_vec();
        let rest = segments.len() - first.len();
        if count > 1 {
            merge::lead(&mut first, &again, rest, merge::pushes(&segments, &again));
        }
    }
    let mut packet = packet.to_vec();
    let _ = offload.complete(&mut packet);
    let _ = Offload::received(&packet, 1450);
}

/// All segments, side by side, and the length of all but the last.
#[cfg(any(test, feature = "fuzzing"))]
fn split(packet: &[u8], offload: &Offload) -> Option<(Vec<u8>, usize)> {
    let cut = offload.cut(packet)?;
    let mut out = Vec::new();
    for segment in cut.segments() {
        let begin = out.len();
        out.extend_from_slice(&packet[..cut.headers_len()]);
        cut.finish(&mut out[begin..], packet, &segment);
        out.extend_from_slice(&packet[segment.payload]);
    }
    Some((out, cut.headers_len() + usize::from(offload.segment)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::merge::{lead, mergeable, pushes, run};
    use super::*;

    const MTU: usize = 1450;

    #[test]
    fn the_header_is_read_as_it_is_written() {
        let offload =
            Offload { flags: 1, kind: 4, headers_len: 72, segment: 1378, start: 40, field: 16, joined: false };
        assert_eq!(Offload::decode(offload.encode()), offload);
    }

    proptest! {
        #[test]
        fn what_is_split_can_be_run_together_again(v6: bool, udp: bool, len in 1..40_000_usize, push: bool) {
            let (packet, offload) = super_packet(v6, udp, len, push);
            let (segments, stride) = split(&packet, &offload).unwrap();
            let pieces: Vec<&[u8]> = segments.chunks(stride).collect();
            for piece in &pieces {
                prop_assert!(mergeable(piece, true).is_some(), "headers or checksum are wrong");
                prop_assert_eq!(Offload::received(piece, MTU), Offload::default());
            }
            let payload: Vec<u8> = pieces.iter().flat_map(|p| p[stride - 1000..].to_vec()).collect();
            prop_assert!(payload == packet[offload.headers_len as usize..], "payload has changed");

            let (count, again) = run(pieces.iter().copied(), true);
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
            if let Some(cut) = offload.cut(&packet) {
                let _ = cut.segments().count();
                let _ = split(&packet, &offload);
            }
            let _ = offload.complete(&mut packet.clone());
            let _ = Offload::received(&packet, 100);
            let _ = run([&packet[..], &packet[..]].into_iter(), true);
        }
    }

    #[test]
    fn a_sum_is_that_of_the_definition() {
        let bytes: Vec<u8> = (0..1_500).map(|i| (i * 37 + 11) as u8).collect();
        for range in [0..0, 0..1, 0..2, 3..34, 1..1_500, 0..1_499, 0..64, 7..8] {
            let expected = netmanager_common::checksum::sum(0xfff0, &bytes[range.clone()]);
            assert_eq!(fold(sum(0xfff0, &bytes[range.clone()])), fold(expected), "{range:?}");
        }
    }

    #[test]
    fn an_uncut_packet_from_the_same_machine_is_one_of_many() {
        let (packet, offload) = super_packet(false, false, 20_000, true);
        let found = Offload::received(&packet, MTU);
        assert_eq!(found, Offload { segment: (MTU - 52) as u16, ..offload });
    }

    #[test]
    fn a_run_ends_where_the_connection_or_the_data_does() {
        let (packet, offload) = super_packet(false, false, 5_000, false);
        let (segments, stride) = split(&packet, &offload).unwrap();
        let pieces: Vec<&[u8]> = segments.chunks(stride).collect();
        assert_eq!(run(pieces.iter().copied(), true).0, 5);

        let spoil = |at: usize, byte: usize| {
            let mut pieces: Vec<Vec<u8>> = pieces.iter().map(|piece| piece.to_vec()).collect();
            pieces[at][byte] ^= 1;
            run(pieces.iter().map(Vec::as_slice), true).0
        };
        assert_eq!(spoil(2, 60), 2, "a damaged packet goes alone, for the receiver to refuse");
        assert_eq!(spoil(3, 19), 3, "another destination");
        assert_eq!(spoil(1, 22), 1, "another port");
        let missing: Vec<&[u8]> = [&pieces[..2], &pieces[3..]].concat();
        assert_eq!(run(missing.into_iter(), true).0, 2, "a gap");
    }

    /// A super-packet of 1,000-byte segments, as the kernel hands it over; of TCP, with a timestamp option.
    fn super_packet(v6: bool, udp: bool, len: usize, push: bool) -> (Vec<u8>, Offload) {
        let (protocol, transport_len, field) = if udp { (UDP, 8, 6) } else { (TCP, 32, 16) };
        let mut packet = headers(v6, protocol, transport_len, len);
        let ip_len = packet.len() - transport_len;
        if !udp {
            packet[ip_len + 13] = if push { 0x18 } else { 0x10 };
        }
        packet.extend((0..len).map(|i| (i * 7) as u8));
        let layout = Layout::read(&packet).unwrap();
        let pseudo = fold(layout.pseudo(&packet));
        packet[ip_len + field..ip_len + field + 2].copy_from_slice(&pseudo.to_be_bytes());
        let kind = match (udp, v6) {
            (true, _) => UDP_BOTH,
            (false, true) => TCP_V6,
            (false, false) => TCP_V4,
        };
        let headers_len = layout.headers_len as u16;
        let (start, field) = (ip_len as u16, field as u16);
        (packet, Offload { flags: 1, kind, headers_len, segment: 1000, start, field, joined: false })
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
