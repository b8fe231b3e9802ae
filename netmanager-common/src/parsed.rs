//! What the law reads of a packet: addresses, ports, where in its connection it stands, and where its checksums lie.

use crate::abi::{FLOW_CLOSING, FLOW_RESET, FlowKey};
use crate::addr::Addr;
use crate::frame::{
    Echo, Family, Frame, ICMP, ICMPV6, Ipv4, Ipv6, TCP, TCP_ACK, TCP_FIN, TCP_RST, TCP_SYN, Tcp, UDP, Udp,
};
use crate::icmp;
use crate::verdict::{DropReason, Miss};

/// What the law needs of an IP header. Addresses by the word: the kernel's programs keep it in registers, and have few.
pub(crate) struct Ip {
    pub(crate) family: Family,
    pub(crate) source: [u32; 4],
    pub(crate) destination: [u32; 4],
    pub(crate) protocol: u8,
    /// Where the transport header begins.
    pub(crate) transport: usize,
    pub(crate) fragment: bool,
    /// IPv4 header checksum; unused in IPv6.
    pub(crate) checksum: [u8; 2],
}

impl Ip {
    /// `None`: not an IP packet.
    #[inline(always)]
    pub(crate) fn read(frame: &mut impl Frame) -> Result<Option<Self>, DropReason> {
        match frame.at::<[u8; 1]>(0).ok_or(DropReason::Malformed)?[0] >> 4 {
            4 => Self::read_v4(frame).map(Some),
            6 => Self::read_v6(frame).map(Some),
            _ => Ok(None),
        }
    }

    #[inline(always)]
    fn read_v4(frame: &mut impl Frame) -> Result<Self, DropReason> {
        let header = frame.at::<Ipv4>(0).ok_or(DropReason::Malformed)?;
        let transport = usize::from(header.version_ihl & 0x0f) * 4;
        if transport < size_of::<Ipv4>() || usize::from(u16::from_be_bytes(header.total_len)) < transport {
            return Err(DropReason::Malformed);
        }
        let mapped = |address| [0, 0, 0xffff_u32.to_be(), u32::from_ne_bytes(address)];
        Ok(Self {
            family: Family::V4,
            source: mapped(header.source),
            destination: mapped(header.destination),
            protocol: header.protocol,
            transport,
            // more fragments, or an offset; "don't fragment" is no fragment
            fragment: u16::from_be_bytes(header.fragment) & 0x3fff != 0,
            checksum: header.checksum,
        })
    }

    #[inline(always)]
    fn read_v6(frame: &mut impl Frame) -> Result<Self, DropReason> {
        let header = frame.at::<Ipv6>(0).ok_or(DropReason::Malformed)?;
        Ok(Self {
            family: Family::V6,
            source: Addr(header.source).words(),
            destination: Addr(header.destination).words(),
            protocol: header.next_header,
            transport: size_of::<Ipv6>(),
            fragment: header.next_header == 44,
            checksum: [0; 2],
        })
    }
}

/// What the law needs of a transport header.
pub(crate) struct Transport {
    /// The sender's port; the identifier of an echo request, 0 of a reply.
    pub(crate) source: [u8; 2],
    /// The receiver's port; the identifier of an echo reply, 0 of a request.
    pub(crate) destination: [u8; 2],
    pub(crate) stage: Stage,
}

/// Where in its connection a packet stands, as TCP's flags. A number and no choice: of each branch the verifier looks at both sides to the
/// very end.
#[derive(Clone, Copy)]
pub(crate) struct Stage(u8);

impl Stage {
    /// What has no connection always begins.
    const NONE: Self = Self(TCP_SYN | TCP_ACK);

    /// TCP's first word of all.
    #[inline(always)]
    pub(crate) const fn opens(self) -> bool {
        self.0 & (TCP_SYN | TCP_ACK | TCP_FIN | TCP_RST) == TCP_SYN
    }

    #[inline(always)]
    pub(crate) const fn begins(self) -> bool {
        self.0 & (TCP_SYN | TCP_FIN | TCP_RST) == TCP_SYN
    }

    #[inline(always)]
    pub(crate) const fn ends(self) -> u8 {
        ends(self.0)
    }
}

/// What TCP's flags say of their direction's end, as bits of a flow's state. Without branches, as [`Stage`].
#[inline(always)]
pub const fn ends(flags: u8) -> u8 {
    ((flags & TCP_FIN) * FLOW_CLOSING) | ((flags & TCP_RST) / TCP_RST * (FLOW_CLOSING | FLOW_RESET))
}

impl Transport {
    #[inline(always)]
    pub(crate) fn read(frame: &mut impl Frame, ip: &Ip) -> Result<Result<Self, Miss>, DropReason> {
        if ip.fragment {
            return Ok(Err(Miss::Fragment));
        }
        match (ip.family, ip.protocol) {
            (_, TCP) => {
                let Tcp { source, destination, flags, .. } = *frame.at(ip.transport).ok_or(DropReason::Malformed)?;
                Ok(Ok(Self { source, destination, stage: Stage(flags) }))
            }
            (_, UDP) => {
                let Udp { source, destination, .. } = *frame.at(ip.transport).ok_or(DropReason::Malformed)?;
                Ok(Ok(Self { source, destination, stage: Stage::NONE }))
            }
            (Family::V4, ICMP) | (Family::V6, ICMPV6) => Self::read_icmp(frame, ip),
            // Hop-by-hop, routing, ESP, AH, destination options, mobility: something may follow that is ours.
            (Family::V6, 0 | 43 | 50 | 51 | 60 | 135) => Ok(Err(Miss::Header)),
            _ => Err(DropReason::Protocol),
        }
    }

    #[inline(always)]
    fn read_icmp(frame: &mut impl Frame, ip: &Ip) -> Result<Result<Self, Miss>, DropReason> {
        let echo = *frame.at::<Echo>(ip.transport).ok_or(DropReason::Malformed)?;
        let none = [0; 2];
        let (source, destination) = match (ip.family, echo.kind) {
            (Family::V4, 8) | (Family::V6, 128) => (echo.id, none),
            (Family::V4, 0) | (Family::V6, 129) => (none, echo.id),
            (family, kind) if icmp::is_error(family, kind) => return Ok(Err(Miss::Error)),
            _ => return Err(DropReason::Protocol),
        };
        Ok(Ok(Self { source, destination, stage: Stage::NONE }))
    }

    #[inline(always)]
    pub(crate) fn key(&self, ip: &Ip) -> FlowKey {
        FlowKey {
            source: Addr::from_words(ip.source),
            destination: Addr::from_words(ip.destination),
            source_port: self.source,
            destination_port: self.destination,
            protocol: ip.protocol.into(),
        }
    }
}

/// What has to be mended in a packet.
pub(crate) struct Place {
    pub(crate) family: Family,
    /// Where the checksum that covers the pseudo-header lies; 0: there is none (ICMP's does not).
    pub(crate) l4_checksum: usize,
    pub(crate) ip_checksum: [u8; 2],
}

/// Where the checksum lies in TCP's header.
pub(crate) const TCP_CHECKSUM: usize = 16;

impl Place {
    #[inline(always)]
    pub(crate) fn of(ip: &Ip) -> Self {
        let covered = match ip.protocol {
            TCP => TCP_CHECKSUM,
            UDP => 6,
            ICMPV6 => 2,
            _ => 0,
        };
        let l4_checksum = if covered == 0 { 0 } else { ip.transport + covered };
        Self { family: ip.family, l4_checksum, ip_checksum: ip.checksum }
    }
}
