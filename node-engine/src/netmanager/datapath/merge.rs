//! Packets that the kernel's own receiver would join (GRO), joined: a run of a connection's data, or of datagrams of one flow, costs the
//! TUN device and everything behind it no more than one packet.

use netmanager_common::checksum::fold;
use netmanager_common::frame::{TCP, UDP};

use super::offload::{Layout, NEEDS_CHECKSUM, Offload, PSH, TCP_V4, TCP_V6, UDP_BOTH, number, sum};

/// How many of the packets, from the first, can be given to the kernel as one super-packet, and what it then needs. One alone needs
/// nothing. `datagrams`: the kernel takes those of UDP, too.
pub(super) fn run<'a>(mut packets: impl Iterator<Item = &'a [u8]>, datagrams: bool) -> (usize, Offload) {
    let Some((first, layout)) = packets.next().and_then(|first| Some((first, mergeable(first, datagrams)?))) else {
        return (1, Offload::default());
    };
    let size = first.len() - layout.headers_len;
    let mut total = first.len();
    let mut count = 1;
    let mut closed = size == 0 || last_of_run(first, &layout);
    while !closed
        && let Some(next) = packets.next()
        && follows(first, next, &layout, (total - layout.headers_len) as u32)
        && next.len() <= first.len()
        && total + next.len() - layout.headers_len <= usize::from(u16::MAX)
    {
        count += 1;
        total += next.len() - layout.headers_len;
        closed = next.len() < first.len() || last_of_run(next, &layout);
    }
    if count == 1 {
        return (1, Offload::default());
    }
    let offload = Offload {
        flags: NEEDS_CHECKSUM,
        kind: match (layout.protocol, layout.v6) {
            (UDP, _) => UDP_BOTH,
            (_, true) => TCP_V6,
            (_, false) => TCP_V4,
        },
        headers_len: layout.headers_len as u16,
        segment: size as u16,
        start: layout.ip_len as u16,
        field: layout.field as u16,
        joined: false,
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
    if layout.protocol == UDP {
        let at = layout.ip_len + 4;
        first[at..at + 2].copy_from_slice(&((len - layout.ip_len) as u16).to_be_bytes());
    } else if push {
        first[layout.ip_len + 13] |= PSH;
    }
    let pseudo = fold(layout.pseudo(first) + payload as u32);
    let at = usize::from(offload.start + offload.field);
    first[at..at + 2].copy_from_slice(&pseudo.to_be_bytes());
}

/// Does the packet ask the receiver to hand over what it has?
pub(super) fn pushes(packet: &[u8], offload: &Offload) -> bool {
    offload.kind != UDP_BOTH && packet.get(usize::from(offload.start) + 13).is_some_and(|flags| flags & PSH != 0)
}

/// Length of the headers that every packet of the run repeats.
pub(super) fn repeated(offload: &Offload) -> usize {
    usize::from(offload.headers_len)
}

/// Data of an established TCP connection, or a datagram, whole and unharmed, without IP options.
pub(super) fn mergeable(packet: &[u8], datagrams: bool) -> Option<Layout> {
    let layout = Layout::read(packet)?;
    let claimed = if layout.v6 { 40 + number(packet, 4) } else { number(packet, 2) };
    let plain = claimed == packet.len() && (layout.v6 || layout.ip_len == 20);
    let fits = match layout.protocol {
        // ACK, and perhaps PSH
        TCP => packet[layout.ip_len + 13] & !PSH == 0x10,
        UDP => {
            datagrams
                && number(packet, layout.ip_len + 4) == packet.len() - layout.ip_len
                && layout.checksum(packet).is_some()
        }
        _ => false,
    };
    (plain && fits && fold(sum(layout.pseudo(packet), &packet[layout.ip_len..])) == 0xffff).then_some(layout)
}

/// Does what follows belong to another run?
fn last_of_run(packet: &[u8], layout: &Layout) -> bool {
    layout.protocol == TCP && packet[layout.ip_len + 13] & PSH != 0
}

/// Is `next` the same connection's next data, `sent` bytes after the first, all else equal?
fn follows(first: &[u8], next: &[u8], layout: &Layout, sent: u32) -> bool {
    let Some(other) = mergeable(next, true) else { return false };
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
    if layout.protocol == UDP {
        return first[layout.ip_len..layout.ip_len + 4] == next[layout.ip_len..layout.ip_len + 4];
    }
    let (a, b) = (tcp(first), tcp(next));
    a[..4] == b[..4]
        && a[8..13] == b[8..13]
        // window; options are beyond the urgent pointer
        && a[14..16] == b[14..16]
        && first[layout.ip_len + 18..layout.headers_len] == next[layout.ip_len + 18..layout.headers_len]
        && sequence(b) == sequence(a).wrapping_add(sent)
}
