//! What becomes of a frame, and why one is dropped.

use crate::abi::Mac;

/// What the shell has to do with a frame that the law has looked at (and, for `Send` and `Local`, rewritten).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Carry the packet to this peer (index into `PEERS`).
    Send { peer: u32 },
    /// Give the packet to the instance behind this port.
    Local { ifindex: u32, mac: Mac },
    /// The law lacks something; the slow path may get it and ask again.
    Slow(Miss),
    /// None of the overlay's business: the kernel's ordinary path.
    Pass,
}

/// What the law lacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Miss {
    /// No row for the destination, a service address.
    Service = 0,
    /// The sender on this node does not know its own instance address yet.
    Endpoint = 1,
    /// No row for the inner source, so nobody can say whether the sender may use it.
    Source = 2,
    /// A fragment: to be reassembled first.
    Fragment = 3,
    /// IPv6 extension headers, or a header beyond what the law reads.
    Header = 4,
    /// The way to the peer is IPv6, which only user space sends (its outer checksum is not optional).
    Underlay = 5,
    /// For the host itself, which has its flows in an instance's name.
    Host = 6,
    /// An ICMP error: only user space reads the packet in it ([`crate::icmp`]).
    Error = 7,
    /// Nobody is there any more: the service has no instance, or that of an established connection has gone. The sender is to be told.
    Gone = 8,
    /// The path to the peer takes no packet as long as this one, or a connection begins of which both ends must hear that.
    Narrow = 9,
}

/// Why a frame is dropped. The discriminant is its index in the counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum DropReason {
    /// Too short for the headers it claims, or lengths that contradict each other.
    Malformed = 0,
    /// A protocol the overlay does not carry.
    Protocol = 1,
    /// A container used a source address that is not its own.
    Spoofed = 2,
    /// The service is known and has no instance (in this family).
    NoInstance = 3,
    /// The inner destination is no instance on this node.
    NotOurs = 4,
    /// The outer source is not the node of the inner source.
    ForeignSource = 5,
    /// The peer takes only TCP and UDP, and neither to port 65535.
    PeerProtocol = 6,
    /// A table was full.
    TableFull = 7,
    /// The outer header could not be put on or taken off.
    Tunnel = 8,
    /// An ICMP error about a packet of no flow.
    NoFlow = 9,
}

impl DropReason {
    pub const ALL: [Self; 10] = [
        Self::Malformed,
        Self::Protocol,
        Self::Spoofed,
        Self::NoInstance,
        Self::NotOurs,
        Self::ForeignSource,
        Self::PeerProtocol,
        Self::TableFull,
        Self::Tunnel,
        Self::NoFlow,
    ];

    /// Counter name, the same in `status` and in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Malformed => "drop_malformed",
            Self::Protocol => "drop_protocol",
            Self::Spoofed => "drop_spoofed",
            Self::NoInstance => "drop_no_instance",
            Self::NotOurs => "drop_not_ours",
            Self::ForeignSource => "drop_foreign_source",
            Self::PeerProtocol => "drop_peer_protocol",
            Self::TableFull => "drop_table_full",
            Self::Tunnel => "drop_tunnel",
            Self::NoFlow => "drop_no_flow",
        }
    }
}

/// Counters that are no drops, after [`DropReason::ALL`] in the `COUNTERS` array.
pub const COUNT_SENT: u32 = 16;
pub const COUNT_LOCAL: u32 = 17;
pub const COUNT_SLOW: u32 = 18;
pub const COUNT_RECEIVED: u32 = 19;
/// Length of the `COUNTERS` array.
pub const COUNTERS: u32 = 24;
