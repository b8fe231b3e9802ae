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
    pub gateway_mac: Mac,
    /// UDP port of the tunnel, network order.
    pub tunnel_port: [u8; 2],
    /// UDP port of framed packets, network order; 0: none are taken.
    pub framed_port: [u8; 2],
    pub _pad: [u8; 2],
    /// Where the slow path reads: the TUN device's ifindex, 0 if there is none.
    pub slow_ifindex: u32,
    /// Bits of `CONFIG_*`.
    pub flags: u32,
    /// Raised after every change of this row, of an endpoint, or of what a peer takes: what a flow has noted of them is void then.
    pub epoch: u32,
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
/// Any of the list, by chance, for each flow.
pub const POLICY_ANY: u32 = 1;
/// One of the list after the other, for each flow.
pub const POLICY_TURN: u32 = 2;
/// By the client's own address: the same of the list for the same client, on every node.
pub const POLICY_CLIENT: u32 = 3;
/// The bits of the policy that say which.
pub const POLICY_MASK: u32 = 0xff;
/// Added to a policy: the next new flow is a trial for the slot in the service's row of `TRIALS`, if it is still there.
pub const POLICY_TRIAL: u32 = 0x100;

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
    #[cfg(feature = "other-layout")]
    pub spare: [u32; 2],
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
    /// Its port for framed packets, network order; 0: it takes bare ones only.
    pub framed_port: [u8; 2],
    /// Bits of `PEER_*`.
    pub flags: u32,
    /// The longest packet that gets there in one datagram; 0: any that instances send does.
    pub mtu: u32,
}

/// How a peer's frames leave, found out by the kernel's own tables and trusted for a moment. Index: peer number.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Neighbour {
    /// Of which peer it is: the last word of its address.
    pub host: [u8; 4],
    /// The clock's jiffies (lower half) when it has to be asked for again.
    pub until: u32,
    /// All zero: the kernel did not know it.
    pub macs: Macs,
}

impl Neighbour {
    #[inline(always)]
    pub fn found(&self) -> bool {
        self.macs.destination != Mac::default()
    }
}

/// A link address, aligned so that the kernel's programs copy it by words.
#[repr(C, align(2))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Macs {
    pub destination: Mac,
    pub source: Mac,
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
    /// Index into the accounts of flows; 0: none, it opens as many as there is room for.
    pub account: u16,
}

/// Key of a flow in one direction, as its packets arrive: from an instance here, or through the tunnel.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// A namespace address here, or the instance address of who sends from elsewhere.
    pub source: Addr,
    /// A service address, or a namespace address here.
    pub destination: Addr,
    /// Network order; an echo request's identifier, 0 of a reply.
    pub source_port: [u8; 2],
    /// Network order; an echo reply's identifier, 0 of a request.
    pub destination_port: [u8; 2],
    /// The IP protocol's number, native order: a whole word, as clearing three bytes costs the kernel's programs a loop.
    pub protocol: u32,
}

/// All that the next packet of a flow needs. Void once the slot's generation or the configuration's epoch differs; then what it notes
/// of ports is read again, and its instance stays while that lives.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    #[cfg(feature = "other-layout")]
    pub spare: u32,
    /// Who gets the packets of an instance here; who sends those that come through the tunnel.
    pub slot: u32,
    pub generation: u32,
    /// The configuration's, when `port`, `ifindex` and `mac` were read.
    pub epoch: u32,
    /// The interface by which the packets must come in; 0: the tunnel.
    pub port: u32,
    /// Where they are delivered, and the receiver's MAC; 0: not here.
    pub ifindex: u32,
    pub mac: Mac,
    /// On whose account the row is: the endpoint's that opened the flow.
    pub account: u16,
    /// The source address that the receiver sees; [`Addr::NONE`]: the one that the packet has.
    pub source: Addr,
    /// When a packet was last seen: the `CLOCK`'s seconds.
    pub seen: u32,
    /// One of `FLOW_*`.
    pub kind: u8,
    /// Bits of `FLOW_SEEN`, `FLOW_CLOSING` and `FLOW_RESET`.
    pub state: u8,
    /// Of what comes back: the slot that was chosen ([`server`]).
    pub server: u16,
}

impl Flow {
    /// Will the next packet on this row be the first that answers, and that is counted?
    #[inline(always)]
    pub const fn unanswered(&self) -> bool {
        self.kind == FLOW_REPLY && self.state & FLOW_SEEN == 0 && self.server != 0
    }
}

/// Slots whose answers are counted; larger tables have more.
pub const COUNTED_SLOTS: u32 = u16::MAX as u32 + 1;
const _: () = assert!(crate::MAX_SLOTS <= COUNTED_SLOTS, "the usual tables' slots are all counted");

/// The slot as a flow notes who answers it; 0 where it is not counted.
#[inline(always)]
pub const fn server(slot: u32) -> u16 {
    if slot < COUNTED_SLOTS { slot as u16 } else { 0 }
}

/// What became of the TCP connections for which a slot was chosen. Index: slot number; slot 0 has the sums of `asked` and of what ICMP refused.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    /// It was chosen for so many.
    pub asked: u32,
    /// The first thing that came back was anything but the end,
    pub answered: u32,
    /// or was the end.
    pub refused: u32,
}

/// A packet came on an existing row; on that of replies: somebody has answered.
pub const FLOW_SEEN: u8 = 1;
/// TCP has said FIN or RST in this direction.
pub const FLOW_CLOSING: u8 = 2;
/// It was RST: the other direction is over, too.
pub const FLOW_RESET: u8 = 4;

/// Can be found out anew at any time: it only saves look-ups.
pub const FLOW_CACHED: u8 = 0;
/// An instance was chosen, and stays.
pub const FLOW_CHOSEN: u8 = 1;
/// What comes back on a chosen flow, and regains its service address.
pub const FLOW_REPLY: u8 = 2;
/// What comes back to the host itself on a flow in an instance's name: only user space knows whose it is.
pub const FLOW_HOST: u8 = 3;

macro_rules! layouts {
    ($($name:ident = $size:expr),* $(,)?) => {
        $(
            const _: () = assert!(size_of::<$name>() == $size, concat!(stringify!($name), " has changed its layout"));
            const _: () = assert!(align_of::<$name>() <= 4);
            #[cfg(feature = "aya")]
            // SAFETY: repr(C), integers and byte arrays only, no padding the compiler put in (sizes are asserted above).
            unsafe impl aya::Pod for $name {}
        )*
    };
}

/// What the rows of a test's other layout have more.
const WIDER: [usize; 2] = if cfg!(feature = "other-layout") { [8, 4] } else { [0; 2] };

layouts! {
    Addr = 16, Config = 104, Service = 20, CandidateKey = 12, Slot = 40 + WIDER[0], Peer = 48, Neighbour = 20, Endpoint = 28, FlowKey = 40,
    Flow = 52 + WIDER[1], Answers = 12,
}
