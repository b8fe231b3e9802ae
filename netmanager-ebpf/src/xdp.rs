//! At an uplink whose driver has native XDP: what comes to the tunnel's ports and does not belong is dropped before it costs a buffer.
//! Everything else passes untouched; whether it really belongs is for the programs behind to say.

use aya_ebpf::bindings::xdp_action::{XDP_DROP, XDP_PASS};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use netmanager_common::abi::CONFIG_RELAX_SOURCE;
use netmanager_common::addr::Addr;
use netmanager_common::checksum::Change;
use netmanager_common::frame::{CONTROL_FIRST, Frame, Header, UDP, Udp, Vxlan};
use netmanager_common::pipeline::{Tables, refuses};
use netmanager_common::verdict::DropReason;
use netmanager_common::{FRAMED_CONTROL, FRAMING_LEN};

use crate::maps::{Maps, count, knows};
use crate::skb::{ETH_LEN, ETH_P_IP};
use crate::tunnel::{BARE_LEN, Ethernet, FRAMED_ETHERNET, FRAMED_LEN, Outer};

#[xdp]
pub fn xdp_uplink_ingress(context: XdpContext) -> u32 {
    match judge(&context) {
        None => XDP_PASS,
        Some(reason) => {
            count(reason as u32);
            XDP_DROP
        }
    }
}

/// Why the frame is dropped.
#[inline(always)]
fn judge(context: &XdpContext) -> Option<DropReason> {
    let ethernet: &Ethernet = at(context, 0)?;
    if ethernet.protocol != ETH_P_IP {
        return None;
    }
    let outer: &Outer = at(context, ETH_LEN)?;
    let config = Maps.config()?;
    let whole = outer.ip.version_ihl == 0x45 && outer.ip.fragment[0] & 0x3f == 0 && outer.ip.fragment[1] == 0;
    if !whole || outer.ip.protocol != UDP || outer.ip.destination != config.node.v4_bytes() {
        return None;
    }
    let framed = outer.udp.destination == config.framed_port && config.framed_port != [0, 0];
    if !framed && outer.udp.destination != config.tunnel_port {
        return None;
    }
    let source = Addr::v4(outer.ip.source);
    let relaxed = config.flags & CONFIG_RELAX_SOURCE != 0;
    let len = usize::from(u16::from_be_bytes(outer.udp.len));
    if framed {
        if len < size_of::<Udp>() + FRAMING_LEN || *at::<Vxlan>(context, BARE_LEN)? != Vxlan::OURS {
            return Some(DropReason::Malformed);
        }
        if at::<Ethernet>(context, FRAMED_ETHERNET)?.protocol == FRAMED_CONTROL {
            return stranger(&source, relaxed);
        }
        return refuses(&mut XdpFrame::<FRAMED_LEN>(context), &mut Maps, &source);
    }
    if len <= size_of::<Udp>() {
        return Some(DropReason::Malformed);
    }
    match at::<[u8; 1]>(context, BARE_LEN)?[0] {
        CONTROL_FIRST => stranger(&source, relaxed),
        _ => refuses(&mut XdpFrame::<BARE_LEN>(context), &mut Maps, &source),
    }
}

/// Only nodes that are known are answered.
#[inline(always)]
fn stranger(source: &Addr, relaxed: bool) -> Option<DropReason> {
    (!relaxed && !knows(source)).then_some(DropReason::ForeignSource)
}

/// The packet whose IP header lies `BASE` bytes into the frame.
struct XdpFrame<'a, const BASE: usize>(&'a XdpContext);

impl<const BASE: usize> Frame for XdpFrame<'_, BASE> {
    #[inline(always)]
    fn at<T: Header>(&mut self, offset: usize) -> Option<&mut T> {
        at(self.0, BASE + offset)
    }

    /// Nothing is rewritten here.
    #[inline(always)]
    fn fix_l4(&mut self, _: usize, _: bool, _: Change) -> Option<()> {
        None
    }

    #[inline(always)]
    fn wire_len(&mut self, _: usize) -> usize {
        (self.0.data_end() - self.0.data()).saturating_sub(BASE)
    }
}

#[expect(clippy::mut_from_ref, reason = "the context is a handle: the bytes are the packet's")]
#[inline(always)]
fn at<T>(context: &XdpContext, offset: usize) -> Option<&mut T> {
    let start = context.data() + offset;
    if start + size_of::<T>() > context.data_end() {
        return None;
    }
    // SAFETY: checked against the end of the packet just above (the verifier insists); T is made of bytes, and no helper that moves the
    // packet is called here.
    Some(unsafe { &mut *(start as *mut T) })
}
