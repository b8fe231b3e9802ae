//! The law itself: [`outbound`] for what an instance on this node sends, [`inbound`] for what comes through the tunnel.
//!
//! Both parse, decide, rewrite, return, in that order. On the wire a packet's source is the sender's instance address and its
//! destination the receiver's namespace address (the invariant of the reference system's overlay); ports, TTL and payload are never
//! touched.

use core::ops::Deref;

use crate::abi::{
    CONFIG_RELAX_SOURCE, CandidateKey, Config, Endpoint, FLOW_CACHED, FLOW_CHOSEN, FLOW_HOST, FLOW_REPLY, FLOW_SEEN,
    Flow, FlowKey, PEER_OURS, POLICY_CLIENT, POLICY_INSTANCE, POLICY_TURN, Peer, Service, Slot,
};
use crate::addr::Addr;
use crate::checksum;
use crate::frame::{
    Echo, Family, Frame, ICMP, ICMPV6, Ipv4, Ipv6, TCP, TCP_FIN, TCP_RST, Tcp, UDP, Udp, pair_v4, pair_v6,
};
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
    /// Notes that a packet of the flow has been seen, and whether it closes the flow.
    fn touch(&mut self, key: &FlowKey, flow: &Self::Row<Flow>, closes: bool);
    /// Remembers a flow, seen now; false where its account has no room. `new`: there is no row under this key.
    fn learn(&mut self, key: &FlowKey, flow: &Flow, new: bool) -> bool;
    /// A random number.
    fn pick(&mut self) -> u32;
    /// How often this was asked of the service before: whose turn it is.
    fn turn(&mut self, service: u32) -> u32;
    /// Counts that the slot was chosen for a new flow.
    fn chosen(&mut self, slot: u32);
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
    let transport = match Transport::read(frame, &ip)? {
        Ok(transport) => transport,
        Err(miss) => return refuse_strangers(tables, &ip, port).map(|()| Verdict::Slow(miss)),
    };
    let key = transport.key(&ip);
    let known = tables.flow(&key);
    if let Some(flow) = &known
        && flow.epoch == config.epoch
        && (port == 0 || flow.port == port)
        && let Some(slot) = tables.slot(flow.slot)
        && slot.generation == flow.generation
        && (slot.peer != 0 || flow.ifindex != 0)
    {
        tables.touch(&key, flow, transport.closes);
        return carry(frame, tables, &ip, &transport, port, &slot, flow);
    }

    let sender = tables.endpoint(&ip.source).filter(|sender| port == 0 || sender.ifindex == port);
    let sender = sender.ok_or(DropReason::Spoofed)?;
    if sender.instance.is_none() {
        return Ok(Verdict::Slow(Miss::Endpoint));
    }
    if known.as_ref().is_some_and(|flow| flow.kind == FLOW_HOST) {
        return Ok(Verdict::Slow(Miss::Host));
    }
    let Some(service) = tables.service(&ip.destination) else { return Ok(Verdict::Slow(Miss::Service)) };
    let (mut flow, slot) = target(tables, &service, &sender, known.as_deref())?;
    flow.epoch = config.epoch;
    flow.port = sender.ifindex;
    flow.account = sender.account;
    if slot.peer == 0 {
        let receiver = tables.endpoint(&slot.namespace).ok_or(DropReason::NoInstance)?;
        (flow.ifindex, flow.mac) = (receiver.ifindex, receiver.mac);
    }
    if transport.is_echo() && slot.peer != 0 {
        let peer = tables.peer(slot.peer).ok_or(DropReason::NoInstance)?;
        if peer.flags & PEER_OURS == 0 {
            return Err(DropReason::PeerProtocol);
        }
    }
    let fits = match flow.kind {
        FLOW_CHOSEN => learn_reply(tables, &key, &sender, &flow, &slot) && tables.learn(&key, &flow, known.is_none()),
        // It only spares the next packet some look-ups.
        _ => {
            tables.learn(&key, &flow, known.is_none());
            true
        }
    };
    if !fits {
        return Err(DropReason::TableFull);
    }
    carry(frame, tables, &ip, &transport, port, &slot, &flow)
}

/// Rewrites the packet of a flow and says where it goes.
#[inline(always)]
fn carry(
    frame: &mut impl Frame,
    tables: &mut impl Tables,
    ip: &Ip,
    transport: &Transport,
    port: u32,
    slot: &Slot,
    flow: &Flow,
) -> Result<Verdict, DropReason> {
    if slot.peer == 0 {
        let verdict = Verdict::Local { ifindex: flow.ifindex, mac: flow.mac };
        return rewrite(frame, ip, transport, &flow.source, &slot.namespace).map(|()| verdict);
    }
    if port != 0 && tables.peer(slot.peer).is_none_or(|peer| !peer.host.is_v4()) {
        return Ok(Verdict::Slow(Miss::Underlay));
    }
    rewrite(frame, ip, transport, &flow.source, &slot.namespace)?;
    Ok(Verdict::Send { peer: slot.peer })
}

/// Decides over a packet that came through the tunnel from `outer`, and rewrites it where the verdict is `Local`.
///
/// # Errors
/// The reason for which the packet must be dropped.
#[inline(always)]
pub fn inbound(frame: &mut impl Frame, tables: &mut impl Tables, outer: &Addr) -> Result<Verdict, DropReason> {
    let Some(ip) = Ip::read(frame)? else { return Err(DropReason::Malformed) };
    let Some(config) = tables.config() else { return Err(DropReason::NotOurs) };
    let transport = match Transport::read(frame, &ip)? {
        Ok(transport) => transport,
        Err(miss) => {
            let receiver = tables.endpoint(&ip.destination);
            return receiver.map(|_| Verdict::Slow(miss)).ok_or(DropReason::NotOurs);
        }
    };
    let relaxed = config.flags & CONFIG_RELAX_SOURCE != 0;
    let key = transport.key(&ip);
    let known = tables.flow(&key);
    if let Some(flow) = &known
        && flow.epoch == config.epoch
        && flow.port == 0
        && let Some(slot) = tables.slot(flow.slot)
        && slot.generation == flow.generation
        && (relaxed || sits_at(tables, &slot, outer))
    {
        tables.touch(&key, flow, transport.closes);
        if !flow.source.is_none() {
            rewrite(frame, &ip, &transport, &flow.source, &ip.destination)?;
        }
        return Ok(Verdict::Local { ifindex: flow.ifindex, mac: flow.mac });
    }

    let receiver = tables.endpoint(&ip.destination).ok_or(DropReason::NotOurs)?;
    let sender = tables.service(&ip.source);
    if !relaxed {
        let Some(sender) = &sender else { return Ok(Verdict::Slow(Miss::Source)) };
        if !belongs(tables, sender, outer) {
            return Err(DropReason::ForeignSource);
        }
    }
    if known.as_ref().is_some_and(|flow| flow.kind == FLOW_HOST) {
        return Ok(Verdict::Slow(Miss::Host));
    }
    let mut flow = Flow {
        epoch: config.epoch,
        ifindex: receiver.ifindex,
        mac: receiver.mac,
        account: receiver.account,
        ..Flow::default()
    };
    // A chosen instance whose own address the cluster did not tell may answer from any.
    let noted = match &known {
        Some(known) => Some((known.kind, known.source, known.state)),
        None => tables.flow(&FlowKey { source: Addr::NONE, ..key }).map(|flow| (flow.kind, flow.source, flow.state)),
    };
    if let Some((FLOW_REPLY, service, state)) = noted {
        (flow.kind, flow.source, flow.state) = (FLOW_REPLY, service, state | FLOW_SEEN);
    }
    if let Some(sender) = sender
        && let Some(slot) = tables.slot(sender.first)
        && slot.live()
        && sender.policy == POLICY_INSTANCE
    {
        (flow.slot, flow.generation) = (sender.first, slot.generation);
        tables.learn(&key, &flow, known.is_none());
    }
    if !flow.source.is_none() {
        rewrite(frame, &ip, &transport, &flow.source, &ip.destination)?;
    }
    Ok(Verdict::Local { ifindex: flow.ifindex, mac: flow.mac })
}

/// The instance that a packet to `service` goes to, and what its flow notes of it: the one that the flow has, else a new choice.
#[inline(always)]
fn target<T: Tables>(
    tables: &mut T,
    service: &Service,
    sender: &Endpoint,
    known: Option<&Flow>,
) -> Result<(Flow, T::Row<Slot>), DropReason> {
    if let Some(known) = known
        && let Some(slot) = tables.slot(known.slot)
        && slot.generation == known.generation
        && slot.live()
    {
        let source = if known.kind == FLOW_REPLY { known.source } else { sender.instance };
        let Flow { slot: number, generation, kind, state, .. } = *known;
        return Ok((Flow { slot: number, generation, source, kind, state, ..Flow::default() }, slot));
    }
    if service.count == 0 {
        return Err(DropReason::NoInstance);
    }
    let (number, kind) = if service.policy == POLICY_INSTANCE {
        (service.first, FLOW_CACHED)
    } else {
        (choose(tables, service, &sender.instance), FLOW_CHOSEN)
    };
    let slot = tables.slot(number).filter(|slot| slot.live()).ok_or(DropReason::NoInstance)?;
    if kind == FLOW_CHOSEN {
        tables.chosen(number);
    }
    let generation = slot.generation;
    Ok((Flow { slot: number, generation, source: sender.instance, kind, ..Flow::default() }, slot))
}

/// The slot that a new flow of `client` to the service gets.
#[inline(always)]
fn choose(tables: &mut impl Tables, service: &Service, client: &Addr) -> u32 {
    if service.count == 1 {
        return service.first;
    }
    let number = match service.policy {
        POLICY_TURN => tables.turn(service.id),
        POLICY_CLIENT => policy::cell(client),
        _ => tables.pick(),
    };
    let index = policy::index(number, service.count);
    let candidate = CandidateKey { service: service.id, epoch: service.epoch, index };
    // The list of this epoch may just have been replaced: the first candidate of the row in hand is still good.
    tables.candidate(&candidate).unwrap_or(service.first)
}

/// Notes under which service address the client of `flow` expects its replies: those of a neighbour as it sends them, those of
/// anybody else as they come through the tunnel.
#[inline(always)]
fn learn_reply(tables: &mut impl Tables, key: &FlowKey, sender: &Endpoint, flow: &Flow, slot: &Slot) -> bool {
    let mut reply = FlowKey {
        source: slot.instance,
        destination: key.source,
        source_port: key.destination_port,
        destination_port: key.source_port,
        ..*key
    };
    let mut row = Flow {
        source: key.destination,
        kind: FLOW_REPLY,
        state: 0,
        ifindex: flow.port,
        mac: sender.mac,
        port: 0,
        ..*flow
    };
    if slot.peer == 0 {
        (reply.source, reply.destination) = (slot.namespace, sender.instance);
        row.port = flow.ifindex;
        let Some(own) = tables.service(&sender.instance) else { return true };
        let Some(client) = tables.slot(own.first).filter(|client| client.live()) else { return true };
        (row.slot, row.generation) = (own.first, client.generation);
    }
    let new = tables.flow(&reply).is_none();
    tables.learn(&reply, &row, new)
}

/// What is not for the slow path either: a source that is not the port's.
#[inline(always)]
fn refuse_strangers(tables: &mut impl Tables, ip: &Ip, port: u32) -> Result<(), DropReason> {
    let sender = tables.endpoint(&ip.source).filter(|sender| port == 0 || sender.ifindex == port);
    sender.map(drop).ok_or(DropReason::Spoofed)
}

/// May the node at `outer` send in the name of the instance behind `sender`?
#[inline(always)]
fn belongs(tables: &mut impl Tables, sender: &Service, outer: &Addr) -> bool {
    sender.policy == POLICY_INSTANCE
        && sender.count != 0
        && tables.slot(sender.first).is_some_and(|slot| slot.live() && sits_at(tables, &slot, outer))
}

/// Is this the node of the instance?
#[inline(always)]
fn sits_at(tables: &mut impl Tables, slot: &Slot, outer: &Addr) -> bool {
    slot.peer != 0 && tables.peer(slot.peer).is_some_and(|peer| peer.host == *outer)
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
    /// TCP that says FIN or RST.
    closes: bool,
}

impl Transport {
    #[inline(always)]
    fn read(frame: &mut impl Frame, ip: &Ip) -> Result<Result<Self, Miss>, DropReason> {
        if ip.fragment {
            return Ok(Err(Miss::Fragment));
        }
        match (ip.family, ip.protocol) {
            (_, TCP) => {
                let Tcp { source, destination, flags, .. } = *frame.at(ip.transport).ok_or(DropReason::Malformed)?;
                Ok(Ok(Self { protocol: TCP, source, destination, closes: flags & (TCP_FIN | TCP_RST) != 0 }))
            }
            (_, UDP) => {
                let Udp { source, destination, .. } = *frame.at(ip.transport).ok_or(DropReason::Malformed)?;
                Ok(Ok(Self { protocol: UDP, source, destination, closes: false }))
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
        Ok(Self { protocol: ip.protocol, source, destination, closes: false })
    }

    #[inline(always)]
    fn key(&self, ip: &Ip) -> FlowKey {
        FlowKey {
            source: ip.source,
            destination: ip.destination,
            source_port: self.source,
            destination_port: self.destination,
            protocol: self.protocol,
            _pad: [0; 3],
        }
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
