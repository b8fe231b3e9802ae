//! A packet in a socket buffer, as the law sees it. With `tunnel.rs`, the only file with packet pointers.

use aya_ebpf::bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR};
use aya_ebpf::helpers::bpf_l4_csum_replace;
use aya_ebpf::programs::TcContext;
use netmanager_common::checksum::Change;
use netmanager_common::frame::{Frame, Header, Ipv4, Ipv6, TCP, Tcp, Udp, mend};

pub const ETH_LEN: usize = 14;
pub const ETH_P_IP: [u8; 2] = [0x08, 0x00];
pub const ETH_P_IPV6: [u8; 2] = [0x86, 0xdd];

/// The headers that the law reads: IP without options, and TCP's fixed part. A byte more would take payload into the linear part of
/// the buffer, and a receiver cannot join such buffers any more: that costs a stream a third of its speed.
const HEADERS_V4_LEN: usize = 20 + 20;
const HEADERS_V6_LEN: usize = 40 + 20;

/// The packet whose IP header lies `BASE` bytes into the buffer.
pub struct SkbFrame<'a, const BASE: usize> {
    context: &'a TcContext,
    /// The transport checksum is complete whatever the kernel believes of the buffer's.
    complete: bool,
}

impl<'a, const BASE: usize> SkbFrame<'a, BASE> {
    /// Makes the headers directly readable where they are not yet: TCP from a local socket has them in the linear part already.
    #[inline(always)]
    pub fn new(context: &'a TcContext, v6: bool) -> Self {
        let headers = if v6 { HEADERS_V6_LEN } else { HEADERS_V4_LEN };
        // A failure shows as a header that is not there.
        let _ = pull(context, BASE + headers);
        Self { context, complete: false }
    }

    /// Makes readable what the IP header says of those after it: of IPv6, and of IPv4 with options, they end later than where
    /// [`Self::new`] has looked. False where the kernel has no memory for that.
    #[inline(always)]
    pub fn pull_transport(&self) -> bool {
        pull_transport(self.context.skb.skb, BASE)
    }

    /// For the packet in a datagram that a socket has sent: a socket knows no partial checksums. The datagram's own may be, if it comes
    /// from this machine, and then the kernel would take the packet's for one, too.
    #[inline(always)]
    pub fn complete(self, complete: bool) -> Self {
        Self { complete, ..self }
    }
}

impl<const BASE: usize> Frame for SkbFrame<'_, BASE> {
    #[inline(always)]
    fn at<T: Header>(&mut self, offset: usize) -> Option<&mut T> {
        header_at(self.context, BASE + offset)
    }

    #[inline(always)]
    fn fix_l4(&mut self, offset: usize, udp: bool, change: Change) -> Option<()> {
        if self.complete {
            let field: &mut [u8; 2] = header_at(self.context, BASE + offset)?;
            mend(field, udp, change);
            return Some(());
        }
        let flags = u64::from(BPF_F_PSEUDO_HDR) | if udp { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 };
        // SAFETY: a valid context; the helper checks the offset against the packet.
        let result = unsafe {
            bpf_l4_csum_replace(self.context.skb.skb, (BASE + offset) as u32, 0, change.wsum().into(), flags)
        };
        (result == 0).then_some(())
    }

    #[inline(always)]
    fn wire_len(&mut self, headers: usize) -> usize {
        // SAFETY: a field of the valid context.
        match unsafe { (*self.context.skb.skb).gso_size } {
            0 => (self.context.len() as usize).saturating_sub(BASE),
            payload => headers + payload as usize,
        }
    }
}

/// Makes so many bytes of the buffer directly readable, or all where it has fewer. False where the kernel has no memory for that.
#[inline(always)]
pub fn pull(context: &TcContext, len: usize) -> bool {
    let wanted = (context.len() as usize).min(len);
    context.data() + wanted <= context.data_end() || context.skb.pull_data(wanted as u32).is_ok()
}

/// Not in line, as the programs have no stack to spare. What is too short for its headers is for the law to refuse.
#[inline(never)]
fn pull_transport(skb: *mut __sk_buff, base: usize) -> bool {
    let context = &TcContext::new(skb);
    // As long as either family's header is at least.
    let Some(&mut Ipv4 { version_ihl, protocol, .. }) = header_at(context, base) else { return true };
    let (ip, protocol) = match (version_ihl >> 4, header_at::<Ipv6>(context, base)) {
        (6, Some(header)) => (size_of::<Ipv6>(), header.next_header),
        _ => (usize::from(version_ihl & 0x0f) * 4, protocol),
    };
    let transport = if protocol == TCP { size_of::<Tcp>() } else { size_of::<Udp>() };
    pull(context, base + ip + transport)
}

/// The header at `offset` bytes into the buffer.
#[expect(
    clippy::mut_from_ref,
    reason = "the context is a handle: the bytes are the packet's, and helpers take the handle shared"
)]
#[inline(always)]
pub fn header_at<T>(context: &TcContext, offset: usize) -> Option<&mut T> {
    let start = context.data() + offset;
    if start + size_of::<T>() > context.data_end() {
        return None;
    }
    // SAFETY: checked against the end of the packet just above (the verifier insists); T is made of bytes. The reference
    // must not outlive a helper call that moves the packet: the verifier refuses a program in which one does.
    Some(unsafe { &mut *(start as *mut T) })
}
