//! The law itself: [`outbound`] for what an instance on this node sends, [`inbound`] for what comes through the tunnel.
//!
//! Both parse, decide, rewrite, return, in that order. On the wire a packet's source is the sender's instance address and its
//! destination the receiver's namespace address (the invariant of the reference system's overlay); ports, TTL and payload are never
//! touched.

use core::ops::Deref;

use crate::abi::{
    CONFIG_RELAX_SOURCE, CandidateKey, Config, Endpoint, Flow, FlowKey, PEER_OURS, POLICY_INSTANCE, Peer, Reply,
    ReplyKey, Service, Slot,
};
use crate::addr::Addr;
use crate::checksum;
use crate::frame::{Echo, Family, Frame, ICMP, ICMPV6, Ipv4, Ipv6, Ports, TCP, UDP, pair_v4, pair_v6};
use crate::policy;
use crate::verdict::{DropReason, Miss, Verdict};

/// Where the tables are.
///
/// A row is a reference where the table is the kernel's (its stack is 512 bytes, a copy of every row would not fit) and an owned
/// copy elsewhere ([`Owned`]).
pub trait Tables {
    type Row<T: Copy + 'static>: Deref<Target = T>;

    /// `None` until the node is configured: then nothing is a service address.
    fn config(&mut self) -> Option<Self::Row<Config>>;
    fn service(&mut self, address: &Addr) -> Option<Self::Row<Service>>;
    fn candidate(&mut self, key: &CandidateKey) -> Option<u32>;
    fn slot(&mut self, index: u32) -> Option<Self::Row<Slot>>;
    fn peer(&mut self, index: u32) -> Option<Self::Row<Peer>>;
    fn endpoint(&mut self, address: &Addr) -> Option<Self::Row<Endpoint>>;
    fn flow(&mut self, key: &FlowKey) -> Option<Self::Row<Flow>>;
    /// Remembers a flow; false where there is no room.
    fn learn(&mut self, key: &FlowKey, flow: &Flow) -> bool;
    fn reply(&mut self, key: &ReplyKey) -> Option<Self::Row<Reply>>;
    /// Remembers how a reply regains its service address; false where there is no room.
    fn learn_reply(&mut self, key: &ReplyKey, reply: &Reply) -> bool;
    /// A random number.
    fn pick(&mut self) -> u32;
}

/// A row by value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Owned<T>(pub T);

impl<T> Deref for Owned<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.0
    }
}

/// Decides over a packet that came from an instance on this node, and rewrites it where the verdict is `Send` or `Local`.
///
/// `port` is the interface it came in by; 0 on the slow path, which reads them all from one TUN device.
///
/// # Errors
/// The reason for which the packet must be dropped.
#[inline(always)]
pub fn outbound(frame: &mut impl Frame, tables: &mut impl Tables, port: u32) -> Result<Verdict, DropReason> {
    let Some(ip) = Ip::read(frame)? else { return Ok(Verdict::Pass) };
    let Some(config) = tables.config() else { return Ok(Verdict::Pass) };
    if !is_service(&config, &ip.destination) {
        return Ok(Verdict::Pass);
    }
    let sender = tables.endpoint(&ip.source).ok_or(DropReason::Spoofed)?;
    if port != 0 && sender.ifindex != port {
        return Err(DropReason::Spoofed);
    }
    if sender.instance.is_none() {
        return Ok(Verdict::Slow(Miss::Endpoint));
    }
    let transport = match Transport::read(frame, &ip)? {
        Ok(transport) => transport,
        Err(miss) => return Ok(Verdict::Slow(miss)),
    };
    let Some(service) = tables.service(&ip.destination) else { return Ok(Verdict::Slow(Miss::Service)) };
    let target = target(tables, &ip, &transport, &service)?;

    if target.peer == 0 {
        return deliver_local(frame, tables, &ip, &transport, &sender, &target);
    }
    let peer = tables.peer(target.peer).ok_or(DropReason::NoInstance)?;
    if transport.is_echo() && peer.flags & PEER_OURS == 0 {
        return Err(DropReason::PeerProtocol);
    }
    if port != 0 && !peer.host.is_v4() {
        return Ok(Verdict::Slow(Miss::Underlay));
    }
    rewrite(frame, &ip, &transport, &sender.instance, &target.namespace)?;
    Ok(Verdict::Send { peer: target.peer })
}

/// Decides over a packet that came through the tunnel from `outer`, and rewrites it where the verdict is `Local`.
///
/// # Errors
/// The reason for which the packet must be dropped.
#[inline(always)]
pub fn inbound(frame: &mut impl Frame, tables: &mut impl Tables, outer: &Addr) -> Result<Verdict, DropReason> {
    let Some(ip) = Ip::read(frame)? else { return Err(DropReason::Malformed) };
    let receiver = tables.endpoint(&ip.destination).ok_or(DropReason::NotOurs)?;
    let transport = match Transport::read(frame, &ip)? {
        Ok(transport) => transport,
        Err(miss) => return Ok(Verdict::Slow(miss)),
    };
    if tables.config().is_none_or(|config| config.flags & CONFIG_RELAX_SOURCE == 0) {
        let Some(sender) = tables.service(&ip.source) else { return Ok(Verdict::Slow(Miss::Source)) };
        if !belongs(tables, &sender, outer) {
            return Err(DropReason::ForeignSource);
        }
    }
    if let Some(service) = regain(tables, &ip.destination, &ip.source, &transport) {
        rewrite(frame, &ip, &transport, &service, &ip.destination)?;
    }
    Ok(Verdict::Local { ifindex: receiver.ifindex, mac: receiver.mac })
}

/// The instance that a packet to `service` goes to: the one its flow has, else a new choice that is remembered.
#[inline(always)]
fn target<T: Tables>(
    tables: &mut T,
    ip: &Ip,
    transport: &Transport,
    service: &Service,
) -> Result<T::Row<Slot>, DropReason> {
    if service.count == 0 {
        return Err(DropReason::NoInstance);
    }
    if service.policy == POLICY_INSTANCE {
        return tables.slot(service.first).filter(|slot| slot.live()).ok_or(DropReason::NoInstance);
    }
    let key = FlowKey {
        source: ip.source,
        service: ip.destination,
        source_port: transport.source,
        service_port: transport.destination,
        protocol: transport.protocol,
        _pad: [0; 3],
    };
    if let Some(flow) = tables.flow(&key)
        && let Some(slot) = tables.slot(flow.slot)
        && slot.generation == flow.generation
    {
        return Ok(slot);
    }
    let index = policy::choose(service, tables.pick());
    let candidate = CandidateKey { service: service.id, epoch: service.epoch, index };
    // The list of this epoch may just have been replaced: the first candidate of the row in hand is still good.
    let number = tables.candidate(&candidate).unwrap_or(service.first);
    let slot = tables.slot(number).filter(|slot| slot.live()).ok_or(DropReason::NoInstance)?;

    let reply = Reply { service: ip.destination, peer: slot.instance };
    let learned =
        tables.learn(&key, &Flow { slot: number, generation: slot.generation }) && learn_reply(tables, &key, &reply);
    if learned { Ok(slot) } else { Err(DropReason::TableFull) }
}

/// Notes under which service address the client of `flow` expects its replies. The common row names no peer; it is passed over only
/// where another service already uses the same pair of ports.
#[inline(always)]
fn learn_reply(tables: &mut impl Tables, flow: &FlowKey, reply: &Reply) -> bool {
    let mut key = ReplyKey {
        client: flow.source,
        peer: Addr::NONE,
        client_port: flow.source_port,
        service_port: flow.service_port,
        protocol: flow.protocol,
        _pad: [0; 3],
    };
    if tables.reply(&key).is_some_and(|other| other.peer != reply.peer) {
        key.peer = reply.peer;
    }
    tables.learn_reply(&key, reply)
}

/// The service address under which `client` knows what came from `source`; `None` where it is no reply.
#[inline(always)]
fn regain(tables: &mut impl Tables, client: &Addr, source: &Addr, transport: &Transport) -> Option<Addr> {
    let mut key = ReplyKey {
        client: *client,
        peer: Addr::NONE,
        client_port: transport.destination,
        service_port: transport.source,
        protocol: transport.protocol,
        _pad: [0; 3],
    };
    let reply = tables.reply(&key)?;
    // A chosen instance whose own address the cluster did not tell may answer from any.
    if reply.peer.is_none() || reply.peer == *source {
        return Some(reply.service);
    }
    key.peer = *source;
    tables.reply(&key).map(|reply| reply.service)
}

/// Carries a packet straight to another instance on this node: both translations in one rewrite.
#[inline(always)]
fn deliver_local(
    frame: &mut impl Frame,
    tables: &mut impl Tables,
    ip: &Ip,
    transport: &Transport,
    sender: &Endpoint,
    target: &Slot,
) -> Result<Verdict, DropReason> {
    let receiver = tables.endpoint(&target.namespace).ok_or(DropReason::NoInstance)?;
    let source = regain(tables, &target.namespace, &sender.instance, transport).unwrap_or(sender.instance);
    rewrite(frame, ip, transport, &source, &target.namespace)?;
    Ok(Verdict::Local { ifindex: receiver.ifindex, mac: receiver.mac })
}

/// May the node at `outer` send in the name of the instance behind `sender`?
#[inline(always)]
fn belongs(tables: &mut impl Tables, sender: &Service, outer: &Addr) -> bool {
    sender.policy == POLICY_INSTANCE
        && sender.count != 0
        && tables
            .slot(sender.first)
            .filter(|slot| slot.live())
            .and_then(|slot| tables.peer(slot.peer))
            .is_some_and(|peer| peer.host == *outer)
}

/// Is the address one of those that mean a service?
#[inline(always)]
fn is_service(config: &Config, address: &Addr) -> bool {
    let [service_v4, v4_mask, service_v6, v6_mask] =
        [config.service_v4, config.service_v4_mask, config.service_v6, config.service_v6_mask]
            .map(|part| u128::from_ne_bytes(part.0));
    let address = u128::from_ne_bytes(address.0);
    address & v4_mask == service_v4 || address & v6_mask == service_v6
}

/// What the law needs of an IP header.
struct Ip {
    family: Family,
    source: Addr,
    destination: Addr,
    protocol: u8,
    /// Where the transport header begins.
    transport: usize,
    fragment: bool,
    /// IPv4 header checksum; unused in IPv6.
    checksum: [u8; 2],
}

impl Ip {
    /// `None`: not an IP packet.
    #[inline(always)]
    fn read(frame: &mut impl Frame) -> Result<Option<Self>, DropReason> {
        match frame.at::<[u8; 1]>(0).ok_or(DropReason::Malformed)?[0] >> 4 {
            4 => Self::read_v4(frame).map(Some),
            6 => Self::read_v6(frame).map(Some),
            _ => Ok(None),
        }
    }

    #[inline(always)]
    fn read_v4(frame: &mut impl Frame) -> Result<Self, DropReason> {
        let header = *frame.at::<Ipv4>(0).ok_or(DropReason::Malformed)?;
        let transport = usize::from(header.version_ihl & 0x0f) * 4;
        if transport < size_of::<Ipv4>() || usize::from(u16::from_be_bytes(header.total_len)) < transport {
            return Err(DropReason::Malformed);
        }
        Ok(Self {
            family: Family::V4,
            source: Addr::v4(header.source),
            destination: Addr::v4(header.destination),
            protocol: header.protocol,
            transport,
            // more fragments, or an offset; "don't fragment" is no fragment
            fragment: u16::from_be_bytes(header.fragment) & 0x3fff != 0,
            checksum: header.checksum,
        })
    }

    #[inline(always)]
    fn read_v6(frame: &mut impl Frame) -> Result<Self, DropReason> {
        let header = *frame.at::<Ipv6>(0).ok_or(DropReason::Malformed)?;
        Ok(Self {
            family: Family::V6,
            source: Addr::v6(header.source),
            destination: Addr::v6(header.destination),
            protocol: header.next_header,
            transport: size_of::<Ipv6>(),
            fragment: header.next_header == 44,
            checksum: [0; 2],
        })
    }
}

/// What the law needs of a transport header.
struct Transport {
    protocol: u8,
    /// The sender's port; the identifier of an echo request, 0 of a reply.
    source: [u8; 2],
    /// The receiver's port; the identifier of an echo reply, 0 of a request.
    destination: [u8; 2],
}

impl Transport {
    #[inline(always)]
    fn read(frame: &mut impl Frame, ip: &Ip) -> Result<Result<Self, Miss>, DropReason> {
        if ip.fragment {
            return Ok(Err(Miss::Fragment));
        }
        match (ip.family, ip.protocol) {
            (_, TCP | UDP) => {
                let ports = *frame.at::<Ports>(ip.transport).ok_or(DropReason::Malformed)?;
                Ok(Ok(Self { protocol: ip.protocol, source: ports.source, destination: ports.destination }))
            }
            (Family::V4, ICMP) | (Family::V6, ICMPV6) => Self::read_echo(frame, ip).map(Ok),
            // Hop-by-hop, routing, ESP, AH, destination options, mobility: something may follow that is ours.
            (Family::V6, 0 | 43 | 50 | 51 | 60 | 135) => Ok(Err(Miss::Header)),
            _ => Err(DropReason::Protocol),
        }
    }

    #[inline(always)]
    fn read_echo(frame: &mut impl Frame, ip: &Ip) -> Result<Self, DropReason> {
        let echo = *frame.at::<Echo>(ip.transport).ok_or(DropReason::Malformed)?;
        let none = [0; 2];
        let (source, destination) = match (ip.family, echo.kind) {
            (Family::V4, 8) | (Family::V6, 128) => (echo.id, none),
            (Family::V4, 0) | (Family::V6, 129) => (none, echo.id),
            _ => return Err(DropReason::Protocol),
        };
        Ok(Self { protocol: ip.protocol, source, destination })
    }

    #[inline(always)]
    fn is_echo(&self) -> bool {
        !matches!(self.protocol, TCP | UDP)
    }

    /// Where the checksum that covers the pseudo-header lies; `None` for ICMP, whose checksum does not.
    #[inline(always)]
    fn checksum_offset(&self) -> Option<usize> {
        match self.protocol {
            TCP => Some(16),
            UDP => Some(6),
            ICMPV6 => Some(2),
            _ => None,
        }
    }
}

/// Puts new addresses into the packet and mends its checksums.
#[inline(always)]
fn rewrite(
    frame: &mut impl Frame,
    ip: &Ip,
    transport: &Transport,
    source: &Addr,
    destination: &Addr,
) -> Result<(), DropReason> {
    let udp = transport.protocol == UDP;
    match ip.family {
        Family::V4 => {
            let (old, new) = (pair_v4(&ip.source, &ip.destination), pair_v4(source, destination));
            if let Some(offset) = transport.checksum_offset() {
                frame.fix_l4(ip.transport + offset, udp, &old, &new).ok_or(DropReason::Malformed)?;
            }
            let header = frame.at::<Ipv4>(0).ok_or(DropReason::Malformed)?;
            header.checksum = checksum::update(ip.checksum, &old, &new);
            header.source = source.v4_bytes();
            header.destination = destination.v4_bytes();
        }
        Family::V6 => {
            let (old, new) = (pair_v6(&ip.source, &ip.destination), pair_v6(source, destination));
            if let Some(offset) = transport.checksum_offset() {
                frame.fix_l4(ip.transport + offset, udp, &old, &new).ok_or(DropReason::Malformed)?;
            }
            let header = frame.at::<Ipv6>(0).ok_or(DropReason::Malformed)?;
            header.source = source.0;
            header.destination = destination.0;
        }
    }
    Ok(())
}
