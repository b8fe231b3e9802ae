//! Puts the outer headers on a packet and takes them off: bare IP in UDP, as the reference system speaks it, or framed as VXLAN for
//! nodes of ours, whose kernels can then join the packets of a stream before anybody looks at them.

use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::bindings::{
    BPF_F_ADJ_ROOM_DECAP_L3_IPV6, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L4_UDP, BPF_F_ADJ_ROOM_FIXED_GSO,
};
use aya_ebpf::helpers::bpf_get_prandom_u32;
use aya_ebpf::programs::TcContext;
use netmanager_common::abi::{Macs, PEER_OURS, Peer};
use netmanager_common::checksum;
use netmanager_common::frame::{FRAMED_MACS, Ipv4, UDP, Udp, Vxlan};
use netmanager_common::{FRAMING_LEN, OUTER_LEN_V4};

use crate::maps::plain;
use crate::skb::{ETH_LEN, ETH_P_IP, header_at};

#[repr(C, align(2))]
#[derive(Clone, Copy)]
pub struct Ethernet {
    pub macs: Macs,
    pub protocol: [u8; 2],
}

/// What is between the Ethernet header and a bare inner packet.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Outer {
    pub ip: Ipv4,
    pub udp: Udp,
}

/// Where a bare inner packet begins.
pub const BARE_LEN: usize = ETH_LEN + size_of::<Outer>();

/// Where the Ethernet header in framing is, and the packet after it.
pub const FRAMED_ETHERNET: usize = BARE_LEN + size_of::<Vxlan>();
pub const FRAMED_LEN: usize = FRAMED_ETHERNET + ETH_LEN;
const _: () = assert!(FRAMED_LEN - BARE_LEN == FRAMING_LEN);

/// `BPF_F_ADJ_ROOM_ENCAP_L2(14)` and what says that it is Ethernet; kernels before 5.14 do not know the latter.
const ENCAP_L2: u64 = 14 << 56;
const ENCAP_L2_ETH: u64 = 1 << 6;

/// The packet could not be resized.
pub struct Unfit;

/// Wraps the packet for `peer`. Without `macs` they are left to the neighbour table.
#[inline(always)]
pub fn push(context: &TcContext, peer: &Peer, macs: Option<Macs>, protocol: [u8; 2]) -> Result<(), Unfit> {
    // Kernels without the newer helpers do not know the flag either that tells them of the inner Ethernet header.
    let framed = peer.framed_port != [0, 0] && !plain();
    let hash = flow_hash(context, protocol);
    let inner_len = context.len() as usize - ETH_LEN;
    let flags = u64::from(BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP);
    let (room, flags, port) = if framed {
        (OUTER_LEN_V4 + FRAMING_LEN, flags | ENCAP_L2 | ENCAP_L2_ETH, peer.framed_port)
    } else {
        (OUTER_LEN_V4, flags, peer.port)
    };
    let done = context.skb.adjust_room(room as i32, BPF_ADJ_ROOM_MAC, flags);
    if done.is_err() {
        // An old kernel refuses what it does not know before it touches the packet. It takes the inner headers for Ethernet all the same.
        context.skb.adjust_room(room as i32, BPF_ADJ_ROOM_MAC, flags & !ENCAP_L2_ETH).map_err(|_| Unfit)?;
    }

    if framed {
        *header_at(context, BARE_LEN).ok_or(Unfit)? = Vxlan::OURS;
        *header_at(context, FRAMED_ETHERNET).ok_or(Unfit)? = Ethernet { macs: FRAMED_MACS, protocol };
    }
    let ethernet: &mut Ethernet = header_at(context, 0).ok_or(Unfit)?;
    ethernet.protocol = ETH_P_IP;
    if let Some(macs) = macs {
        ethernet.macs = macs;
    }
    // How wide the path to a peer of the reference system is nobody knows, so whoever must may cut its packets; that takes numbers.
    let (id, fragment) = if peer.flags & PEER_OURS != 0 {
        ([0; 2], [0x40, 0])
    } else {
        // SAFETY: a helper without arguments.
        ((unsafe { bpf_get_prandom_u32() } as u16).to_ne_bytes(), [0; 2])
    };
    let outer: &mut Outer = header_at(context, ETH_LEN).ok_or(Unfit)?;
    outer.ip = Ipv4 {
        version_ihl: 0x45,
        tos: 0,
        total_len: ((inner_len + room) as u16).to_be_bytes(),
        id,
        fragment,
        ttl: 64,
        protocol: UDP,
        checksum: [0; 2],
        source: peer.source.v4_bytes(),
        destination: peer.host.v4_bytes(),
    };
    outer.ip.checksum = header_checksum(&outer.ip);
    outer.udp = Udp {
        // The upper quarter of the ports, by flow: so that receivers and links spread flows, not packets.
        source: (0xc000 | (hash >> 18) as u16).to_be_bytes(),
        destination: port,
        len: ((inner_len + room - size_of::<Ipv4>()) as u16).to_be_bytes(),
        checksum: [0; 2],
    };
    Ok(())
}

/// The same for all packets of a flow. The socket's own where it has one, which changes when the way does not work; asking the kernel for
/// one would have it take the packet apart again each time.
#[inline(always)]
fn flow_hash(context: &TcContext, protocol: [u8; 2]) -> u32 {
    // SAFETY: a field of the valid context.
    let known = unsafe { (*context.skb.skb).hash };
    if known != 0 {
        return known;
    }
    // Both addresses' last words, and the ports.
    let places = if protocol == ETH_P_IP { [12, 16, 20] } else { [20, 36, 40] };
    let word = |place: usize| header_at::<u32>(context, ETH_LEN + place).map_or(0, |word| *word);
    let [source, destination, ports] = places.map(word);
    (source ^ destination.rotate_left(16) ^ ports.rotate_left(8)).wrapping_mul(0x9e37_79b1)
}

/// Takes the framing out of a datagram and leaves the rest to the tunnel's socket, which gets it as if it had come bare.
#[inline(always)]
pub fn unframe(context: &TcContext, tunnel_port: [u8; 2]) -> Result<(), Unfit> {
    let mut outer = *header_at::<Outer>(context, ETH_LEN).ok_or(Unfit)?;
    let len = u16::from_be_bytes(outer.udp.len).wrapping_sub(FRAMING_LEN as u16);
    let flags = u64::from(BPF_F_ADJ_ROOM_FIXED_GSO);
    context.skb.adjust_room(-(FRAMING_LEN as i32), BPF_ADJ_ROOM_MAC, flags).map_err(|_| Unfit)?;
    outer.udp = Udp { destination: tunnel_port, len: len.to_be_bytes(), checksum: [0; 2], ..outer.udp };
    outer.ip.total_len = len.wrapping_add(size_of::<Ipv4>() as u16).to_be_bytes();
    outer.ip.checksum = [0; 2];
    outer.ip.checksum = header_checksum(&outer.ip);
    *header_at(context, ETH_LEN).ok_or(Unfit)? = outer;
    Ok(())
}

/// Unwraps the packet, `len` bytes of headers. `v6`: the inner packet is IPv6. True where the buffer now knows its own protocol; kernels before 6.3
/// cannot be told that it changed, and then only a real transmission sets it right.
#[inline(always)]
pub fn pop(context: &TcContext, len: usize, v6: bool) -> Result<bool, Unfit> {
    let len = -(len as i32);
    if !v6 {
        let flags = u64::from(BPF_F_ADJ_ROOM_FIXED_GSO);
        return context.skb.adjust_room(len, BPF_ADJ_ROOM_MAC, flags).map(|()| true).map_err(|_| Unfit);
    }
    let flags = u64::from(BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_DECAP_L3_IPV6);
    if context.skb.adjust_room(len, BPF_ADJ_ROOM_MAC, flags).is_ok() {
        return Ok(true);
    }
    let flags = u64::from(BPF_F_ADJ_ROOM_FIXED_GSO);
    context.skb.adjust_room(len, BPF_ADJ_ROOM_MAC, flags).map(|()| false).map_err(|_| Unfit)
}

/// RFC 1071 over a header without options.
#[inline(always)]
fn header_checksum(header: &Ipv4) -> [u8; 2] {
    let word = |pair: [u8; 2]| u32::from(u16::from_be_bytes(pair));
    let [a, b, c, d] = header.source;
    let [e, f, g, h] = header.destination;
    let sum = word([header.version_ihl, header.tos])
        + word(header.total_len)
        + word(header.id)
        + word(header.fragment)
        + word([header.ttl, header.protocol])
        + word([a, b])
        + word([c, d])
        + word([e, f])
        + word([g, h]);
    (!checksum::fold(sum)).to_be_bytes()
}
