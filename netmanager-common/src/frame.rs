//! Where the bytes of a packet are. The law reads and writes headers through [`Frame`]; each shell implements it over what it
//! has: a socket buffer in the kernel, a byte slice in user space.

use crate::abi::{Mac, Macs};
use crate::checksum::Change;
use crate::{FRAMED_CONTROL, FRAMED_VNI, FRAMING_LEN};

/// A packet, seen from its IP header. Whatever lies before it (Ethernet, an outer tunnel header) is the shell's business.
pub trait Frame {
    /// The header at `offset` bytes from the start of the IP header; `None` where the packet is too short.
    ///
    /// Borrows the frame mutably, so that no header outlives a call that may move the packet.
    fn at<T: Header>(&mut self, offset: usize) -> Option<&mut T>;

    /// Mends the transport checksum field at `offset` after a change of the pseudo-header. `udp`: the field is UDP's, where 0 means "none" and stays.
    ///
    /// The shell does it because only the shell knows whether the checksum is complete or partial (to be completed by a device).
    fn fix_l4(&mut self, offset: usize, udp: bool, change: Change) -> Option<()>;

    /// Length of the longest packet that this one becomes on the wire, where its headers have this length: a super-packet becomes many.
    fn wire_len(&mut self, headers: usize) -> usize;

    /// Lowers the largest segment that the TCP header at `offset` says its sender takes ([`crate::mss`]). `None` where the shell leaves
    /// that to user space.
    fn clamp_mss(&mut self, _offset: usize, _limit: u16) -> Option<()> {
        None
    }
}

/// A header as it lies on the wire.
///
/// In the kernel's programs headers count as aligned to words, or each of their bytes would take a register and a load of its own. They
/// are on machines that need it: the kernel puts IP headers there (`NET_IP_ALIGN`); the others read words anywhere.
///
/// # Safety
/// Implementors are `repr(C)` or `repr(transparent)`, consist of `u8` arrays only (alignment 1 in user space, no padding), and accept
/// any bytes.
pub unsafe trait Header: Copy {}

/// RFC 791, without options.
#[repr(C)]
#[cfg_attr(target_arch = "bpf", repr(align(4)))]
#[derive(Clone, Copy, Debug)]
pub struct Ipv4 {
    pub version_ihl: u8,
    pub tos: u8,
    pub total_len: [u8; 2],
    pub id: [u8; 2],
    /// Flags and fragment offset.
    pub fragment: [u8; 2],
    pub ttl: u8,
    pub protocol: u8,
    pub checksum: [u8; 2],
    pub source: [u8; 4],
    pub destination: [u8; 4],
}

/// RFC 8200, without extension headers.
#[repr(C)]
#[cfg_attr(target_arch = "bpf", repr(align(4)))]
#[derive(Clone, Copy, Debug)]
pub struct Ipv6 {
    pub version_class_flow: [u8; 4],
    pub payload_len: [u8; 2],
    pub next_header: u8,
    pub hop_limit: u8,
    pub source: [u8; 16],
    pub destination: [u8; 16],
}

/// RFC 9293, without options.
#[repr(C)]
#[cfg_attr(target_arch = "bpf", repr(align(4)))]
#[derive(Clone, Copy, Debug)]
pub struct Tcp {
    pub source: [u8; 2],
    pub destination: [u8; 2],
    pub sequence: [u8; 4],
    pub acknowledgment: [u8; 4],
    pub offset: u8,
    pub flags: u8,
    pub window: [u8; 2],
    pub checksum: [u8; 2],
    pub urgent: [u8; 2],
}

pub const TCP_FIN: u8 = 1;
pub const TCP_SYN: u8 = 2;
pub const TCP_RST: u8 = 4;
pub const TCP_ACK: u8 = 16;

/// RFC 768.
#[repr(C)]
#[cfg_attr(target_arch = "bpf", repr(align(4)))]
#[derive(Clone, Copy, Debug)]
pub struct Udp {
    pub source: [u8; 2],
    pub destination: [u8; 2],
    pub len: [u8; 2],
    pub checksum: [u8; 2],
}

/// ICMP and ICMPv6 echo.
#[repr(C)]
#[cfg_attr(target_arch = "bpf", repr(align(4)))]
#[derive(Clone, Copy, Debug)]
pub struct Echo {
    pub kind: u8,
    pub code: u8,
    pub checksum: [u8; 2],
    pub id: [u8; 2],
    pub sequence: [u8; 2],
}

macro_rules! headers {
    ($($name:ty = $size:literal),* $(,)?) => {
        $(
            const _: () = assert!(size_of::<$name>() == $size);
            #[cfg(not(target_arch = "bpf"))]
            const _: () = assert!(align_of::<$name>() == 1);
            // SAFETY: repr(C) or an array, bytes only: alignment 1 and no padding, asserted above; any bytes are valid.
            unsafe impl Header for $name {}
        )*
    };
}

headers! { Ipv4 = 20, Ipv6 = 40, Tcp = 20, Udp = 8, Echo = 8, [u8; 1] = 1, [u8; 2] = 2 }

/// RFC 7348. An Ethernet header follows.
#[repr(C)]
#[cfg_attr(target_arch = "bpf", repr(align(4)))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vxlan {
    pub flags: [u8; 4],
    pub vni: [u8; 4],
}

impl Vxlan {
    /// What every framed packet of ours has.
    pub const OURS: Self = {
        let [_, a, b, c] = FRAMED_VNI.to_be_bytes();
        Self { flags: [8, 0, 0, 0], vni: [a, b, c, 0] }
    };
}

/// The link addresses in framing are nobody's: the receiver writes its own.
pub const FRAMED_MACS: Macs =
    Macs { destination: Mac([2, 0x6e, 0x65, 0, 0, 2]), source: Mac([2, 0x6e, 0x65, 0, 0, 1]) };

/// What stands before a control datagram in framing.
pub const fn control_framing() -> [u8; FRAMING_LEN] {
    let Vxlan { flags: [a, b, c, d], vni: [e, f, g, h] } = Vxlan::OURS;
    let (Mac([i, j, k, l, m, n]), Mac([o, p, q, r, s, t])) = (FRAMED_MACS.destination, FRAMED_MACS.source);
    let [u, v] = FRAMED_CONTROL;
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u, v]
}

/// With this byte a bare control datagram begins, which is no packet of either family.
pub const CONTROL_FIRST: u8 = 0x9e;

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMP: u8 = 1;
pub const ICMPV6: u8 = 58;

/// A whole IP packet in a byte slice, its checksums complete.
#[derive(Debug)]
pub struct SliceFrame<'a>(&'a mut [u8]);

impl<'a> SliceFrame<'a> {
    /// `packet` begins with the IP header.
    pub fn new(packet: &'a mut [u8]) -> Self {
        Self(packet)
    }

    pub fn bytes(&self) -> &[u8] {
        self.0
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.0
    }
}

impl Frame for SliceFrame<'_> {
    fn at<T: Header>(&mut self, offset: usize) -> Option<&mut T> {
        let bytes = self.0.get_mut(offset..)?.get_mut(..size_of::<T>())?;
        // SAFETY: the slice is exactly as long as T, T has alignment 1 and accepts any bytes (contract of Header), and the
        // reference borrows the slice mutably for as long as it lives.
        Some(unsafe { &mut *bytes.as_mut_ptr().cast::<T>() })
    }

    fn fix_l4(&mut self, offset: usize, udp: bool, change: Change) -> Option<()> {
        mend(self.at(offset)?, udp, change);
        Some(())
    }

    fn wire_len(&mut self, _: usize) -> usize {
        self.0.len()
    }
}

/// A complete transport checksum after a change. `udp`: 0 means "none" and stays.
#[inline(always)]
pub fn mend(field: &mut [u8; 2], udp: bool, change: Change) {
    if udp && *field == [0, 0] {
        return;
    }
    *field = change.apply(*field);
    if udp && *field == [0, 0] {
        *field = [0xff, 0xff];
    }
}

/// The address bytes that a header holds, by family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}
