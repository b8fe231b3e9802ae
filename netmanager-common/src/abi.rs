//! Keys and values of the maps that kernel and user space share: integers and byte arrays, explicit padding, no enums.
//! Addresses and ports are in network byte order as on the wire; everything else is native. A change of any layout here is a
//! change of [`crate::ABI_VERSION`].

use crate::addr::Addr;

/// The one row of the `CONFIG` array: what the law must know of this node.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Service addresses: IPv4 network and mask as mapped addresses (mask bytes 0..12 are 0xff), then IPv6.
    pub service_v4: Addr,
    pub service_v4_mask: Addr,
    pub service_v6: Addr,
    pub service_v6_mask: Addr,
    /// This node's address towards its peers: the only outer destination that the kernel program takes in.
    pub node: Addr,
    /// Source MAC of frames given to instances: the bridge's.
    pub gateway_mac: [u8; 6],
    /// UDP port of the tunnel, network order.
    pub tunnel_port: [u8; 2],
    /// Where the slow path reads: the TUN device's ifindex, 0 if there is none.
    pub slow_ifindex: u32,
    /// Bits of `CONFIG_*`.
    pub flags: u32,
}

/// Accept any inner source from any outer source (senders behind NAT).
pub const CONFIG_RELAX_SOURCE: u32 = 1;

/// What a semantic address means. Key: its [`Addr`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Row id, stable while the address lives.
    pub id: u32,
    /// Which generation of its candidate list is valid: the list is written whole under a new epoch, then this row flips.
    pub epoch: u32,
    /// Candidates; 0 means nobody answers (a known service without instances).
    pub count: u32,
    /// One of `POLICY_*`.
    pub policy: u32,
    /// The slot of the first candidate: the only one where `count` is 1.
    pub first: u32,
}

/// Exactly one instance: no flow is kept for it.
pub const POLICY_INSTANCE: u32 = 0;
/// Any instance, chosen anew for each flow.
pub const POLICY_ANY: u32 = 1;
/// The closest instance.
pub const POLICY_CLOSEST: u32 = 2;

/// Key of `CANDIDATES`; its value is a slot number (`u32`).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct CandidateKey {
    pub service: u32,
    pub epoch: u32,
    pub index: u32,
}

/// An instance in one family. Index: slot number. Slot 0 is never used.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// Raised whenever the slot gets another instance or loses the one it had; odd while an instance is in it.
    pub generation: u32,
    /// Index into `PEERS`; 0 for an instance on this node.
    pub peer: u32,
    /// Where packets go: the instance's address in its namespace.
    pub namespace: Addr,
    /// The address the instance sends from on the wire.
    pub instance: Addr,
}

impl Slot {
    /// Is there an instance in the slot?
    #[inline(always)]
    pub const fn live(&self) -> bool {
        self.generation & 1 == 1
    }
}

/// Another node. Index: peer number. Peer 0 is never used.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Peer {
    /// The node's address: outer destination, and the only outer source accepted from it.
    pub host: Addr,
    /// Outer source towards it: this node's address on the way there.
    pub source: Addr,
    /// Interface towards it.
    pub ifindex: u32,
    /// Its tunnel port, network order.
    pub port: [u8; 2],
    pub _pad: [u8; 2],
    /// Bits of `PEER_*`.
    pub flags: u32,
}

/// The peer has said hello: it is one of ours, and takes more than TCP and UDP.
pub const PEER_OURS: u32 = 1;

/// An instance on this node. Key: its namespace [`Addr`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// Its own instance address in this family; [`Addr::NONE`] until the cluster has told it.
    pub instance: Addr,
    /// Host end of its veth.
    pub ifindex: u32,
    /// MAC of the container end.
    pub mac: [u8; 6],
    pub _pad: [u8; 2],
}

/// Key of a flow from an instance on this node to a semantic address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// Namespace address of the sender.
    pub source: Addr,
    /// The semantic address it uses.
    pub service: Addr,
    /// Network order; an echo's identifier for ICMP.
    pub source_port: [u8; 2],
    /// Network order; 0 for ICMP.
    pub service_port: [u8; 2],
    pub protocol: u8,
    pub _pad: [u8; 3],
}

/// The instance a flow has chosen; void once the slot's generation differs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    pub slot: u32,
    pub generation: u32,
}

/// Key under which a reply regains the service address its client used. `peer` is [`Addr::NONE`] in the first row of a
/// port pair, and the replying instance's address where a second service shares the same ports.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct ReplyKey {
    /// Namespace address of the client.
    pub client: Addr,
    pub peer: Addr,
    pub client_port: [u8; 2],
    pub service_port: [u8; 2],
    pub protocol: u8,
    pub _pad: [u8; 3],
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    /// The address the client thinks it talks to.
    pub service: Addr,
    /// Who really answers: the chosen instance's instance address.
    pub peer: Addr,
}

macro_rules! layouts {
    ($($name:ident = $size:literal),* $(,)?) => {
        $(
            const _: () = assert!(size_of::<$name>() == $size, concat!(stringify!($name), " has changed its layout"));
            const _: () = assert!(align_of::<$name>() <= 4);
            #[cfg(feature = "aya")]
            // SAFETY: repr(C), integers and byte arrays only, no padding the compiler put in (sizes are asserted above).
            unsafe impl aya::Pod for $name {}
        )*
    };
}

layouts! {
    Addr = 16, Config = 96, Service = 20, CandidateKey = 12, Slot = 40, Peer = 44, Endpoint = 28, FlowKey = 40, Flow = 8,
    ReplyKey = 40, Reply = 32,
}
