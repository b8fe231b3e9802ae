//! The overlay's datapath in the kernel: a thin shell around `netmanager-common`.
//!
//! `tc_veth_ingress` sits at the host end of each instance's veth and sees what the instance sends; `tc_uplink_ingress` sits at the
//! uplink and takes in what peers send to the tunnel port; before it, where the driver has XDP, `xdp_uplink_ingress` drops what does not belong. What the law does not want goes on to the kernel's ordinary path, or to the
//! TUN device behind which user space runs the same law.
#![no_std]
#![no_main]

mod maps;
mod neighbour;
mod skb;
mod tunnel;
mod xdp;

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::{bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use netmanager_common::FRAMED_CONTROL;
use netmanager_common::abi::{Config, Mac, Macs};
use netmanager_common::addr::Addr;
use netmanager_common::frame::{Ipv6, UDP, Udp, Vxlan};
use netmanager_common::pipeline::{Tables, inbound, outbound};
use netmanager_common::verdict::{COUNT_LOCAL, COUNT_RECEIVED, COUNT_SENT, COUNT_SLOW, DropReason, Verdict};

use crate::maps::{Maps, count, plain};
use crate::neighbour::next_hop;
use crate::skb::{ETH_LEN, ETH_P_IP, ETH_P_IPV6, SkbFrame, header_at, pull};
use crate::tunnel::{BARE_LEN, Ethernet, FRAMED_ETHERNET, FRAMED_LEN, Outer, pop, push, unframe};

/// Not ours: the next program, or the kernel's ordinary path.
const PASS: i32 = TC_ACT_UNSPEC;

/// What an instance on this node sends.
#[classifier]
pub fn tc_veth_ingress(context: TcContext) -> i32 {
    let protocol = protocol(&context);
    if protocol != ETH_P_IP && protocol != ETH_P_IPV6 {
        return PASS;
    }
    let mut frame = SkbFrame::<ETH_LEN>::new(&context, protocol == ETH_P_IPV6);
    // What it cannot have shows as a header that is not there.
    let _ = frame.pull_transport();
    match outbound(&mut frame, &mut Maps, ifindex(&context)) {
        Ok(Verdict::Send { peer }) => send(context.skb.skb, peer, protocol),
        Ok(Verdict::Local { ifindex, mac }) => {
            count(COUNT_LOCAL);
            deliver(&context, ifindex, mac, protocol, true)
        }
        Ok(Verdict::Slow(_)) => slow(),
        Ok(Verdict::Pass) => PASS,
        Err(reason) => dropped(reason),
    }
}

/// What peers send to this node bare.
#[classifier]
pub fn tc_uplink_ingress(context: TcContext) -> i32 {
    match destination(&context) {
        Some((port, config)) if port == config.tunnel_port => take_in::<BARE_LEN>(&context),
        _ => PASS,
    }
}

/// What peers send to this node framed. A program of its own: both would not fit on one stack.
#[classifier]
pub fn tc_framed_ingress(context: TcContext) -> i32 {
    match destination(&context) {
        Some((port, config)) if port == config.framed_port && port != [0, 0] => {}
        _ => return PASS,
    }
    if !pull(&context, FRAMED_LEN) {
        return PASS;
    }
    let whole = header_at::<Vxlan>(&context, BARE_LEN).is_some_and(|vxlan| *vxlan == Vxlan::OURS);
    let Some(framed) = header_at::<Ethernet>(&context, FRAMED_ETHERNET).filter(|_| whole) else {
        return dropped(DropReason::Malformed);
    };
    let action = if framed.protocol == FRAMED_CONTROL { PASS } else { take_in::<FRAMED_LEN>(&context) };
    if action == PASS { socket(context.skb.skb) } else { action }
}

/// What comes out of the device that only makes the kernel join framed packets: nobody has addressed the host there.
#[classifier]
pub fn tc_framing_ingress(_: TcContext) -> i32 {
    dropped(DropReason::NotOurs)
}

/// The port of a whole UDP datagram to this node.
#[inline(always)]
fn destination(context: &TcContext) -> Option<([u8; 2], &'static Config)> {
    if protocol(context) != ETH_P_IP {
        return None;
    }
    // The stack pulls as much of whatever comes.
    if !pull(context, BARE_LEN) {
        return None;
    }
    let outer = header_at::<Outer>(context, ETH_LEN)?;
    let config = Maps.config()?;
    let ours = outer.ip.version_ihl == 0x45
        && outer.ip.protocol == UDP
        && outer.ip.fragment[0] & 0x3f == 0
        && outer.ip.fragment[1] == 0
        && outer.ip.destination == config.node.v4_bytes();
    ours.then_some((outer.udp.destination, config))
}

/// Takes in the packet that begins after `INNER` bytes.
#[inline(always)]
fn take_in<const INNER: usize>(context: &TcContext) -> i32 {
    let Some(outer) = header_at::<Outer>(context, ETH_LEN) else { return PASS };
    let source = Addr::v4(outer.ip.source);
    let datagram_len = u16::from_be_bytes(outer.udp.len);
    // `tunnel::push` writes none, a socket always does.
    let complete = outer.udp.checksum != [0, 0];
    let mut frame = SkbFrame::<INNER>::new(context, false).complete(complete);
    // The socket reads it in pieces, too.
    if !frame.pull_transport() {
        count(COUNT_SLOW);
        return PASS;
    }
    let (inner_protocol, inner_len) = match header_at::<[u8; 6]>(context, INNER) {
        Some([first, _, a, b, ..]) if *first >> 4 == 4 => (ETH_P_IP, u16::from_be_bytes([*a, *b])),
        Some([first, _, _, _, a, b]) if *first >> 4 == 6 => {
            (ETH_P_IPV6, u16::from_be_bytes([*a, *b]).wrapping_add(size_of::<Ipv6>() as u16))
        }
        // Nothing, or a control datagram: for the socket.
        _ => return PASS,
    };
    // Several datagrams in one buffer, as a sender's UDP_SEGMENT or a card's UDP GRO leaves them: the socket takes them apart. Lengths
    // wrap together where the super-packet of one connection is as large as can be. The kernel leaves the outer length of what it has
    // joined as it was, and so does a card's.
    let whole = datagram_len == inner_len.wrapping_add((INNER - BARE_LEN + size_of::<Udp>()) as u16);
    if !whole && INNER == BARE_LEN {
        count(COUNT_SLOW);
        return PASS;
    }
    match inbound(&mut frame, &mut Maps, &source) {
        Ok(Verdict::Local { ifindex, mac }) => {
            count(COUNT_RECEIVED);
            match pop(context, INNER - ETH_LEN, inner_protocol == ETH_P_IPV6) {
                Ok(known) => deliver(context, ifindex, mac, inner_protocol, known),
                Err(_) => dropped(DropReason::Tunnel),
            }
        }
        // The socket of the slow path gets it, outer header and all.
        Ok(Verdict::Slow(_)) => {
            count(COUNT_SLOW);
            PASS
        }
        Ok(Verdict::Send { .. } | Verdict::Pass) => PASS,
        Err(reason) => dropped(reason),
    }
}

/// A framed datagram, for the socket that takes bare ones.
#[inline(never)]
fn socket(skb: *mut __sk_buff) -> i32 {
    let Some(config) = Maps.config() else { return PASS };
    match unframe(&TcContext::new(skb), config.tunnel_port) {
        Ok(()) => PASS,
        Err(_) => dropped(DropReason::Tunnel),
    }
}

/// Not in line with the law, so that it has the stack to itself.
#[inline(never)]
fn send(skb: *mut __sk_buff, number: u32, protocol: [u8; 2]) -> i32 {
    let context = &TcContext::new(skb);
    let Some(peer) = Maps.peer(number) else { return dropped(DropReason::NoInstance) };
    let macs = next_hop(context, number, peer);
    if push(context, peer, macs, protocol).is_err() {
        return dropped(DropReason::Tunnel);
    }
    count(COUNT_SENT);
    if macs.is_some() {
        // SAFETY: plain numbers.
        unsafe { bpf_redirect(peer.ifindex, 0) as i32 }
    } else if plain() {
        // Outer headers and all: user space takes them off and has its socket send the rest, which makes the kernel look for the peer.
        slow()
    } else {
        // SAFETY: no parameters are passed, so there is nothing to point to.
        unsafe { bpf_redirect_neigh(peer.ifindex, core::ptr::null_mut(), 0, 0) as i32 }
    }
}

/// Straight into the instance's namespace. `known`: the buffer's protocol is right, so it need not pass the device again.
#[inline(always)]
fn deliver(context: &TcContext, ifindex: u32, mac: Mac, protocol: [u8; 2], known: bool) -> i32 {
    let Some(config) = Maps.config() else { return dropped(DropReason::NotOurs) };
    let Some(ethernet) = header_at::<Ethernet>(context, 0) else { return dropped(DropReason::Malformed) };
    *ethernet = Ethernet { macs: Macs { destination: mac, source: config.gateway_mac }, protocol };
    if known && !plain() {
        // SAFETY: plain numbers.
        unsafe { bpf_redirect_peer(ifindex, 0) as i32 }
    } else {
        // SAFETY: plain numbers.
        unsafe { bpf_redirect(ifindex, 0) as i32 }
    }
}

/// To the TUN device, past bridge and packet filter; by the ordinary path where there is none yet.
#[inline(always)]
fn slow() -> i32 {
    count(COUNT_SLOW);
    match Maps.config().map_or(0, |config| config.slow_ifindex) {
        0 => PASS,
        // SAFETY: plain numbers.
        ifindex => unsafe { bpf_redirect(ifindex, 0) as i32 },
    }
}

#[inline(always)]
fn dropped(reason: DropReason) -> i32 {
    count(reason as u32);
    TC_ACT_SHOT
}

/// The buffer's protocol, in network order.
#[inline(always)]
fn protocol(context: &TcContext) -> [u8; 2] {
    // SAFETY: a field of the valid context.
    (unsafe { (*context.skb.skb).protocol } as u16).to_ne_bytes()
}

/// The interface the packet came in by.
#[inline(always)]
fn ifindex(context: &TcContext) -> u32 {
    // SAFETY: a field of the valid context.
    unsafe { (*context.skb.skb).ifindex }
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // Nothing on the path panics; the verifier would refuse the loop.
    loop {}
}
