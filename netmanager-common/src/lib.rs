//! The law of a packet: what the overlay does to a frame, written once for the kernel and for user space.
//!
//! `no_std`, no allocation, no dependencies. The eBPF programs and the TUN proxy are two thin shells that give the law a
//! [`frame::Frame`] (where the bytes are) and [`pipeline::Tables`] (where the tables are) and turn its
//! [`verdict::Verdict`] into an action.
#![no_std]

pub mod abi;
pub mod addr;
pub mod checksum;
pub mod frame;
pub mod icmp;
pub mod layout;
pub mod mss;
mod parsed;
pub mod pipeline;
pub mod policy;
#[cfg(feature = "testing")]
pub mod testing;
pub mod verdict;

/// Version of the layout of everything pinned (maps, programs, links). Part of the pin directory's name.
pub const ABI_VERSION: u32 = if cfg!(feature = "other-layout") { 1_000_003 } else { 3 };

/// UDP port of the tunnel where nothing else is configured.
pub const TUNNEL_PORT: u16 = 50103;

/// UDP port on which a node of ours takes framed packets (VXLAN, RFC 7348), where its tunnel port is this one: the next.
///
/// `None`: there is no port after the last.
pub const fn framed_port(tunnel_port: u16) -> Option<u16> {
    tunnel_port.checked_add(1)
}

/// What a framed packet has between UDP and its own IP header: VXLAN and Ethernet.
pub const FRAMING_LEN: usize = 8 + 14;
/// The network identifier of all framed packets.
pub const FRAMED_VNI: u32 = 0x6e_65_01;
/// The Ethernet type of control datagrams in framing: IEEE's first for local experiments.
pub const FRAMED_CONTROL: [u8; 2] = [0x88, 0xb5];

/// Outer IPv4 and UDP header around a bare inner packet.
pub const OUTER_LEN_V4: usize = 28;
/// Outer IPv6 and UDP header around a bare inner packet.
pub const OUTER_LEN_V6: usize = 48;

pub const MAX_SERVICES: u32 = 65_536;
pub const MAX_CANDIDATES: u32 = 262_144;
pub const MAX_SLOTS: u32 = 65_536;
pub const MAX_PEERS: u32 = 4_096;
pub const MAX_ENDPOINTS: u32 = 1_024;
/// Rows of flows: a flow to a semantic address has two, one for each direction.
pub const MAX_FLOWS: u32 = 262_144;
/// Accounts of flows, two for each endpoint: what must be remembered, and what is only cached.
pub const MAX_ACCOUNTS: u32 = 2 * (MAX_ENDPOINTS + 1);
