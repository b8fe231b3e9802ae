//! Puts the outer IPv4 and UDP header on a packet and takes it off: bare IP in UDP, as the reference system speaks it.

use aya_ebpf::bindings::bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
use aya_ebpf::bindings::{
    BPF_F_ADJ_ROOM_DECAP_L3_IPV6, BPF_F_ADJ_ROOM_ENCAP_L3_IPV4, BPF_F_ADJ_ROOM_ENCAP_L4_UDP, BPF_F_ADJ_ROOM_FIXED_GSO,
};
use aya_ebpf::helpers::bpf_get_hash_recalc;
use aya_ebpf::programs::TcContext;
use netmanager_common::OUTER_LEN_V4;
use netmanager_common::abi::{Macs, Peer};
use netmanager_common::checksum;
use netmanager_common::frame::{Ipv4, UDP, Udp};

use crate::skb::{ETH_LEN, ETH_P_IP, header_at};

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Ethernet {
    pub destination: [u8; 6],
    pub source: [u8; 6],
    pub protocol: [u8; 2],
}

/// Everything before the inner packet on the wire.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Outer {
    pub ethernet: Ethernet,
    pub ip: Ipv4,
    pub udp: Udp,
}

/// The packet could not be resized.
pub struct Unfit;

/// Wraps the packet for `peer`. Without `macs` they are left to the neighbour table.
#[inline(always)]
pub fn push(context: &TcContext, peer: &Peer, macs: Option<Macs>) -> Result<(), Unfit> {
    // SAFETY: a valid context.
    let hash = unsafe { bpf_get_hash_recalc(context.skb.skb) };
    let inner_len = context.len() as usize - ETH_LEN;
    let flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4 | BPF_F_ADJ_ROOM_ENCAP_L4_UDP;
    context.skb.adjust_room(OUTER_LEN_V4 as i32, BPF_ADJ_ROOM_MAC, u64::from(flags)).map_err(|_| Unfit)?;

    let outer: &mut Outer = header_at(context, 0).ok_or(Unfit)?;
    outer.ethernet.protocol = ETH_P_IP;
    if let Some(macs) = macs {
        (outer.ethernet.destination, outer.ethernet.source) = (macs.destination, macs.source);
    }
    outer.ip = Ipv4 {
        version_ihl: 0x45,
        tos: 0,
        total_len: ((inner_len + OUTER_LEN_V4) as u16).to_be_bytes(),
        id: [0; 2],
        fragment: [0x40, 0],
        ttl: 64,
        protocol: UDP,
        checksum: [0; 2],
        source: peer.source.v4_bytes(),
        destination: peer.host.v4_bytes(),
    };
    outer.ip.checksum = header_checksum(&outer.ip);
    outer.udp = Udp {
        // The upper quarter of the ports, by flow: so that receivers and links spread flows, not packets.
        source: (0xc000 | (hash as u16 & 0x3fff)).to_be_bytes(),
        destination: peer.port,
        len: ((inner_len + size_of::<Udp>()) as u16).to_be_bytes(),
        checksum: [0; 2],
    };
    Ok(())
}

/// Unwraps the packet. `v6`: the inner packet is IPv6. True where the buffer now knows its own protocol; kernels before 6.3
/// cannot be told that it changed, and then only a real transmission sets it right.
#[inline(always)]
pub fn pop(context: &TcContext, v6: bool) -> Result<bool, Unfit> {
    let len = -(OUTER_LEN_V4 as i32);
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
