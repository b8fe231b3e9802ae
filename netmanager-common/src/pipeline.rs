//! The law itself: [`outbound`] for what an instance on this node sends, [`inbound`] for what comes through the tunnel.
//!
//! Both parse, decide, rewrite, return, in that order. On the wire a packet's source is the sender's instance address and its
//! destination the receiver's namespace address (the invariant of the reference system's overlay); ports, TTL and payload are never
//! touched.

use core::ops::Deref;

use crate::abi::{
    CONFIG_RELAX_SOURCE, CandidateKey, Config, Endpoint, FLOW_CACHED, FLOW_CHOSEN, FLOW_CLOSING, FLOW_HOST, FLOW_REPLY,
    FLOW_RESET, FLOW_SEEN, Flow, FlowKey, Mac, PEER_OURS, POLICY_CLIENT, POLICY_INSTANCE, POLICY_MASK, POLICY_TRIAL,
    POLICY_TURN, Peer, Service, Slot, server,
};
use crate::addr::Addr;
use crate::checksum::Change;
use crate::frame::{Family, Frame, Ipv4, Ipv6, TCP, TCP_SYN, Tcp, UDP};
use crate::mss;
pub use crate::parsed::ends;
use crate::parsed::{Ip, Place, TCP_CHECKSUM, Transport};
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
    /// Notes that a packet of the flow has been seen, and what it says of the flow's end: bits of `FLOW_CLOSING` and `FLOW_RESET`. The
    /// first that answers over TCP ([`Flow::unanswered`]) is counted by [`Self::answered`].
    fn touch(&mut self, key: &FlowKey, flow: &Self::Row<Flow>, ends: u8);
    /// Remembers a flow, seen now; false where its account has no room. `new`: there is no row under this key.
    fn learn(&mut self, key: &FlowKey, flow: &mut Flow, new: bool) -> bool;
    /// Forgets a flow.
    fn forget(&mut self, key: &FlowKey);
    /// A random number.
    fn pick(&mut self) -> u32;
    /// How often this was asked of the service before: whose turn it is.
    fn turn(&mut self, service: u32) -> u32;
    /// Takes the slot that a flow to the service shall try, if none has taken it yet.
    fn trial(&mut self, service: u32) -> Option<u32>;
    /// Counts that the slot was chosen for a new flow, and whether it is TCP, whose answers are counted.
    fn chosen(&mut self, slot: u32, tcp: bool);
    /// Counts that the slot has answered to a TCP connection for which it was chosen, or refused it, or a datagram.
    fn answered(&mut self, slot: u16, refused: bool);
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
    if !is_service(&config, ip.family, &ip.destination) {
        return Ok(Verdict::Pass);
    }
    let transport = match Transport::read(frame, &ip)? {
        Ok(transport) => transport,
        Err(miss) => {
            return refuse_strangers(tables, &Addr::from_words(ip.source), port).map(|()| Verdict::Slow(miss));
        }
    };
    let key = transport.key(&ip);
    // What begins a connection on a row that is there already may have its ports from an earlier one to another address.
    let known = if transport.stage.opens() { None } else { tables.flow(&key) };
    let known = known.filter(|flow| flow.epoch == config.epoch && (port == 0 || flow.port == port));
    let receiver = known.as_ref().and_then(|flow| receiver(tables, flow));
    let mut fresh;
    let (flow, slot): (&Flow, _) = match (&known, receiver) {
        (Some(flow), Some(slot)) => {
            tables.touch(&key, flow, transport.stage.ends());
            (flow, slot)
        }
        _ => {
            if transport.stage.opens() {
                retire(tables, &key, port);
            }
            fresh = Fresh::default();
            fresh.midway = !transport.stage.begins();
            send_first(tables, &key, port, &mut fresh);
            match fresh.outcome {
                Outcome::Ready => {}
                Outcome::Slow(miss) => return Ok(Verdict::Slow(miss)),
                Outcome::Dropped(reason) => return Err(reason),
            }
            (&fresh.flow, tables.slot(fresh.flow.slot).ok_or(DropReason::NoInstance)?)
        }
    };
    carry(frame, tables, &key, &Place::of(&ip), port, &slot, flow)
}

/// What a packet without a valid row leads to. Not in line with the rest: only the first packet of a flow comes here, and what it needs
/// on the stack is the kernel's to have twice.
#[derive(Default)]
struct Fresh {
    flow: Flow,
    /// The packet belongs to a connection that began earlier.
    midway: bool,
    outcome: Outcome,
}

/// Peers of the reference system end with the first packet to this port.
const DEADLY: [u8; 2] = [0xff; 2];

#[derive(Clone, Copy, Default)]
enum Outcome {
    #[default]
    Ready,
    Slow(Miss),
    Dropped(DropReason),
}

/// The instance, if it is still there, and, where it is here, it is known where.
#[inline(always)]
fn receiver<T: Tables>(tables: &mut T, flow: &Flow) -> Option<T::Row<Slot>> {
    tables.slot(flow.slot).filter(|slot| slot.generation == flow.generation && (slot.peer != 0 || flow.ifindex != 0))
}

/// Has the earlier connection on these ports, which one side at least has ended, no instance any more: what begins there now is not the
/// same begun again, and chooses. Not in line, and before [`open`]: in there it would be too much for the verifier, or for the stack.
#[inline(never)]
fn retire(tables: &mut impl Tables, key: &FlowKey, port: u32) {
    let known = tables.flow(key).filter(|flow| flow.kind == FLOW_CHOSEN && (port == 0 || flow.port == port));
    let Some(flow) = known else { return };
    let Some(sender) = tables.endpoint(&key.source) else { return };
    let Some(slot) = tables.slot(flow.slot) else { return };
    let answers = tables.flow(&replies(key, &sender, &slot)).map_or(0, |row| row.state);
    if (flow.state | answers) & FLOW_CLOSING != 0 {
        // Whoever is in a slot has an odd one.
        tables.learn(key, &mut Flow { generation: 0, ..*flow }, false);
    }
}

#[inline(never)]
fn send_first<T: Tables>(tables: &mut T, key: &FlowKey, port: u32, fresh: &mut Fresh) {
    fresh.outcome = match open(tables, key, port, fresh.midway, &mut fresh.flow) {
        Ok(None) => Outcome::Ready,
        Ok(Some(miss)) => Outcome::Slow(miss),
        Err(reason) => Outcome::Dropped(reason),
    };
}

/// Finds out, and remembers, where the flow of an instance here goes.
#[inline(always)]
fn open<T: Tables>(
    tables: &mut T,
    key: &FlowKey,
    port: u32,
    midway: bool,
    flow: &mut Flow,
) -> Result<Option<Miss>, DropReason> {
    let sender = tables.endpoint(&key.source).filter(|sender| port == 0 || sender.ifindex == port);
    let sender = sender.ok_or(DropReason::Spoofed)?;
    if sender.instance.is_none() {
        return Ok(Some(Miss::Endpoint));
    }
    let known = tables.flow(key);
    if known.as_ref().is_some_and(|flow| flow.kind == FLOW_HOST) {
        return Ok(Some(Miss::Host));
    }
    let lost = midway && known.as_ref().is_some_and(|flow| has_gone(tables, flow));
    let Some(service) = tables.service(&key.destination) else {
        return Ok(Some(if lost { Miss::Gone } else { Miss::Service }));
    };
    // Another instance would not know the connection. Behind an instance's own address it is the same one, come back.
    if lost && service.policy != POLICY_INSTANCE {
        return Ok(Some(Miss::Gone));
    }
    let tcp = key.protocol == u32::from(TCP);
    let slot = match target(tables, &service, &sender, known.as_deref(), tcp, flow) {
        Err(DropReason::NoInstance) => return Ok(Some(Miss::Gone)),
        slot => slot?,
    };
    flow.epoch = tables.config().map_or(0, |config| config.epoch);
    flow.port = sender.ifindex;
    flow.account = sender.account;
    if slot.peer == 0 {
        let receiver = tables.endpoint(&slot.namespace).ok_or(DropReason::NoInstance)?;
        (flow.ifindex, flow.mac) = (receiver.ifindex, Mac(receiver.mac));
    } else if !tcp && key.protocol != u32::from(UDP) || key.destination_port == DEADLY {
        let peer = tables.peer(slot.peer).ok_or(DropReason::NoInstance)?;
        if peer.flags & PEER_OURS == 0 {
            return Err(DropReason::PeerProtocol);
        }
    }
    let new = known.is_none();
    // Without branches: each doubles what the verifier looks at.
    flow.state &= !((FLOW_CLOSING | FLOW_RESET) * u8::from(!midway));
    let mut fits = true;
    match flow.kind {
        FLOW_CHOSEN => fits = learn_reply(tables, key, &sender, flow, &slot),
        FLOW_CACHED => forget_reply(tables, key, &sender, &slot),
        _ => {}
    }
    // What is cached only spares the next packet some look-ups.
    let noted = fits && tables.learn(key, flow, new);
    if noted || fits && flow.kind != FLOW_CHOSEN { Ok(None) } else { Err(DropReason::TableFull) }
}

/// Rewrites the packet of a flow and says where it goes.
#[inline(always)]
fn carry(
    frame: &mut impl Frame,
    tables: &mut impl Tables,
    key: &FlowKey,
    place: &Place,
    port: u32,
    slot: &Slot,
    flow: &Flow,
) -> Result<Verdict, DropReason> {
    if slot.peer == 0 {
        rewrite(frame, key, place, &flow.source, &slot.namespace)?;
        return Ok(Verdict::Local { ifindex: flow.ifindex, mac: flow.mac });
    }
    let mtu = match tables.peer(slot.peer) {
        Some(peer) if port == 0 || peer.host.is_v4() => peer.mtu,
        None if port == 0 => 0,
        _ => return Ok(Verdict::Slow(Miss::Underlay)),
    };
    if mtu != 0 && !fits(frame, key, place, port, mtu) {
        return Ok(Verdict::Slow(Miss::Narrow));
    }
    rewrite(frame, key, place, &flow.source, &slot.namespace)?;
    Ok(Verdict::Send { peer: slot.peer })
}

/// May the packet go by a path that takes no longer ones than `mtu`? What begins a connection is made to say what the path takes. Not in
/// line in the kernel's programs, and given what [`rewrite`] is given anyway: so it costs their stacks nothing.
#[cfg_attr(target_arch = "bpf", inline(never))]
#[cfg_attr(not(target_arch = "bpf"), inline(always))]
fn fits(frame: &mut impl Frame, key: &FlowKey, place: &Place, port: u32, mtu: u32) -> bool {
    // UDP's checksum is the end of its header.
    let mut headers = place.l4_checksum + 2;
    if key.protocol == u32::from(TCP) {
        // Masked, as the verifier does not know any more how long an IP header can be.
        let transport = place.l4_checksum.wrapping_sub(TCP_CHECKSUM) & 0x7f;
        let Some(Tcp { offset, flags, .. }) = frame.at(transport).copied() else { return false };
        if flags & TCP_SYN != 0 {
            return frame.clamp_mss(transport, mss::of_packet(place.family, mtu as u16)).is_some();
        }
        headers = transport + usize::from(offset >> 4) * 4;
    }
    let len = frame.wire_len(headers);
    if len <= mtu as usize {
        return true;
    }
    // What may be cut user space sends in several: over IPv4 whatever does not forbid it, over IPv6 what everybody must be able to send.
    port == 0
        && match place.family {
            Family::V4 => frame.at::<Ipv4>(0).is_some_and(|header| header.fragment[0] & 0x40 == 0),
            Family::V6 => len <= LEAST_V6,
        }
}

/// The MTU that every IPv6 link has (RFC 8200 5).
pub const LEAST_V6: usize = 1_280;

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
            let receiver = tables.endpoint(&Addr::from_words(ip.destination));
            return receiver.map(|_| Verdict::Slow(miss)).ok_or(DropReason::NotOurs);
        }
    };
    let key = transport.key(&ip);
    let relaxed = config.flags & CONFIG_RELAX_SOURCE != 0;
    let known = tables.flow(&key);
    let mut fresh;
    let flow: &Flow = match &known {
        Some(flow) if flow.epoch == config.epoch && flow.port == 0 && arrives(tables, flow, relaxed, outer) => {
            tables.touch(&key, flow, transport.stage.ends());
            flow
        }
        _ => {
            fresh = Fresh::default();
            take_first(tables, &key, outer, &mut fresh);
            match fresh.outcome {
                Outcome::Ready => &fresh.flow,
                Outcome::Slow(miss) => return Ok(Verdict::Slow(miss)),
                Outcome::Dropped(reason) => return Err(reason),
            }
        }
    };
    if ip.protocol == TCP && transport.stage.begins() && !admits(frame, tables, &ip, flow) {
        return Ok(Verdict::Slow(Miss::Narrow));
    }
    if !flow.source.is_none() {
        rewrite(frame, &key, &Place::of(&ip), &flow.source, &key.destination)?;
    }
    Ok(Verdict::Local { ifindex: flow.ifindex, mac: flow.mac })
}

/// Does what begins a connection say no more than the path back takes?
#[inline(always)]
fn admits(frame: &mut impl Frame, tables: &mut impl Tables, ip: &Ip, flow: &Flow) -> bool {
    let peer = tables.slot(flow.slot).and_then(|slot| tables.peer(slot.peer));
    let mtu = peer.map_or(0, |peer| peer.mtu);
    mtu == 0 || frame.clamp_mss(ip.transport, mss::of_packet(ip.family, mtu as u16)).is_some()
}

/// Why a packet through the tunnel from `outer` is not even worth a look, if that is certain from its addresses alone: whatever this
/// refuses, [`inbound`] would drop, too. A sender that nobody knows yet is not refused.
#[inline(always)]
pub fn refuses(frame: &mut impl Frame, tables: &mut impl Tables, outer: &Addr) -> Option<DropReason> {
    let ip = match Ip::read(frame) {
        Ok(Some(ip)) => ip,
        Ok(None) => return Some(DropReason::Malformed),
        Err(reason) => return Some(reason),
    };
    let config = tables.config()?;
    if tables.endpoint(&Addr::from_words(ip.destination)).is_none() {
        return Some(DropReason::NotOurs);
    }
    if config.flags & CONFIG_RELAX_SOURCE != 0 {
        return None;
    }
    let sender = tables.service(&Addr::from_words(ip.source))?;
    (!belongs(tables, &sender, outer)).then_some(DropReason::ForeignSource)
}

/// Is the sender still there, on the node that sends in its name?
#[inline(always)]
fn arrives(tables: &mut impl Tables, flow: &Flow, relaxed: bool, outer: &Addr) -> bool {
    let Some(slot) = tables.slot(flow.slot) else { return false };
    slot.generation == flow.generation && (relaxed || sits_at(tables, &slot, outer))
}

#[inline(never)]
fn take_first<T: Tables>(tables: &mut T, key: &FlowKey, outer: &Addr, fresh: &mut Fresh) {
    fresh.outcome = match admit(tables, key, outer, &mut fresh.flow) {
        Ok(None) => Outcome::Ready,
        Ok(Some(miss)) => Outcome::Slow(miss),
        Err(reason) => Outcome::Dropped(reason),
    };
}

/// Finds out, and remembers, whom a flow through the tunnel is for, and whether it may come from `outer`.
#[inline(always)]
fn admit<T: Tables>(tables: &mut T, key: &FlowKey, outer: &Addr, flow: &mut Flow) -> Result<Option<Miss>, DropReason> {
    let receiver = tables.endpoint(&key.destination).ok_or(DropReason::NotOurs)?;
    let Some(config) = tables.config() else { return Err(DropReason::NotOurs) };
    let sender = tables.service(&key.source);
    if config.flags & CONFIG_RELAX_SOURCE == 0 {
        let Some(sender) = &sender else { return Ok(Some(Miss::Source)) };
        if !belongs(tables, sender, outer) {
            return Err(DropReason::ForeignSource);
        }
    }
    let known = tables.flow(key);
    if known.as_ref().is_some_and(|flow| flow.kind == FLOW_HOST) {
        return Ok(Some(Miss::Host));
    }
    flow.epoch = config.epoch;
    (flow.ifindex, flow.mac) = (receiver.ifindex, Mac(receiver.mac));
    flow.account = receiver.account;
    let new = known.is_none();
    // A chosen instance whose own address the cluster did not tell may answer from any.
    let noted = known.or_else(|| tables.flow(&FlowKey { source: Addr::NONE, ..*key }));
    if let Some(noted) = noted
        && noted.kind == FLOW_REPLY
    {
        if noted.unanswered() && key.protocol == u32::from(TCP) {
            tables.answered(noted.server, false);
        }
        (flow.kind, flow.source, flow.server) = (FLOW_REPLY, noted.source, noted.server);
        flow.state = noted.state | FLOW_SEEN;
    }
    if let Some(sender) = sender
        && sender.policy == POLICY_INSTANCE
        && let Some(slot) = tables.slot(sender.first)
        && slot.live()
    {
        (flow.slot, flow.generation) = (sender.first, slot.generation);
        tables.learn(key, flow, new);
    }
    Ok(None)
}

/// The instance that a packet to `service` goes to, and what its flow notes of it: the one that the flow has, else a new choice.
#[inline(always)]
fn target<T: Tables>(
    tables: &mut T,
    service: &Service,
    sender: &Endpoint,
    known: Option<&Flow>,
    tcp: bool,
    flow: &mut Flow,
) -> Result<T::Row<Slot>, DropReason> {
    flow.source = sender.instance;
    if let Some(known) = known
        && let Some(slot) = tables.slot(known.slot)
        && slot.generation == known.generation
        && slot.live()
    {
        (flow.slot, flow.generation, flow.kind, flow.state) = (known.slot, known.generation, known.kind, known.state);
        if known.kind == FLOW_REPLY {
            (flow.source, flow.server) = (known.source, known.server);
        }
        return Ok(slot);
    }
    if service.count == 0 {
        return Err(DropReason::NoInstance);
    }
    if service.policy == POLICY_INSTANCE {
        (flow.slot, flow.kind) = (service.first, FLOW_CACHED);
    } else {
        (flow.slot, flow.kind) = (choose(tables, service, &sender.instance), FLOW_CHOSEN);
    }
    let slot = tables.slot(flow.slot).filter(|slot| slot.live()).ok_or(DropReason::NoInstance)?;
    if flow.kind == FLOW_CHOSEN {
        tables.chosen(flow.slot, tcp && server(flow.slot) != 0);
    }
    flow.generation = slot.generation;
    Ok(slot)
}

/// Is the instance of the flow not there any more?
#[inline(always)]
fn has_gone(tables: &mut impl Tables, flow: &Flow) -> bool {
    tables.slot(flow.slot).is_none_or(|slot| slot.generation != flow.generation)
}

/// The slot that a new flow of `client` to the service gets.
#[inline(always)]
fn choose(tables: &mut impl Tables, service: &Service, client: &Addr) -> u32 {
    if service.policy & POLICY_TRIAL != 0
        && let Some(tried) = tables.trial(service.id)
    {
        return tried;
    }
    if service.count == 1 {
        return service.first;
    }
    let number = match service.policy & POLICY_MASK {
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
    let reply = replies(key, sender, slot);
    let mut row = Flow {
        source: key.destination,
        kind: FLOW_REPLY,
        // Whose client went on has answered, and is not counted again.
        state: flow.state & FLOW_SEEN,
        ifindex: flow.port,
        mac: Mac(sender.mac),
        port: 0,
        server: server(flow.slot),
        ..*flow
    };
    if slot.peer == 0 {
        row.port = flow.ifindex;
        let Some(own) = tables.service(&sender.instance) else { return true };
        let Some(client) = tables.slot(own.first).filter(|client| client.live()) else { return true };
        (row.slot, row.generation) = (own.first, client.generation);
    }
    let new = tables.flow(&reply).is_none();
    tables.learn(&reply, &mut row, new)
}

/// Replies from an instance's own address need no row, and must have none of a service: on the wire, and to the instance, a connection to
/// its own address is the same as an earlier one to its service from the same port.
#[inline(always)]
fn forget_reply(tables: &mut impl Tables, key: &FlowKey, sender: &Endpoint, slot: &Slot) {
    let reply = replies(key, sender, slot);
    if tables.flow(&reply).is_some_and(|noted| noted.kind == FLOW_REPLY) {
        tables.forget(&reply);
    }
}

/// What comes back: from a neighbour as it sends it, from anybody else as it comes through the tunnel.
#[inline(always)]
fn replies(key: &FlowKey, sender: &Endpoint, slot: &Slot) -> FlowKey {
    let (source, destination) =
        if slot.peer == 0 { (slot.namespace, sender.instance) } else { (slot.instance, key.source) };
    FlowKey { source, destination, source_port: key.destination_port, destination_port: key.source_port, ..*key }
}

/// What is not for the slow path either: a source that is not the port's.
#[inline(always)]
fn refuse_strangers(tables: &mut impl Tables, source: &Addr, port: u32) -> Result<(), DropReason> {
    let sender = tables.endpoint(source).filter(|sender| port == 0 || sender.ifindex == port);
    sender.map(drop).ok_or(DropReason::Spoofed)
}

/// May the node at `outer` send in the name of the instance behind `sender`?
#[inline(always)]
pub(crate) fn belongs(tables: &mut impl Tables, sender: &Service, outer: &Addr) -> bool {
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
pub(crate) fn is_service(config: &Config, family: Family, address: &[u32; 4]) -> bool {
    match family {
        // What is before the last word is the same in all.
        Family::V4 => address[3] & config.service_v4_mask.words()[3] == config.service_v4.words()[3],
        Family::V6 => within(address, &config.service_v6.words(), &config.service_v6_mask.words()),
    }
}

#[inline(always)]
const fn within(address: &[u32; 4], network: &[u32; 4], mask: &[u32; 4]) -> bool {
    let ([a, b, c, d], [k, l, m, n], [w, x, y, z]) = (*address, *network, *mask);
    (a & w ^ k) | (b & x ^ l) | (c & y ^ m) | (d & z ^ n) == 0
}

/// Puts new addresses into the packet and mends its checksums. Not in line in the kernel's programs: it has a stack of its own there.
#[cfg_attr(target_arch = "bpf", inline(never))]
#[cfg_attr(not(target_arch = "bpf"), inline(always))]
fn rewrite(
    frame: &mut impl Frame,
    key: &FlowKey,
    place: &Place,
    source: &Addr,
    destination: &Addr,
) -> Result<(), DropReason> {
    let change = Change::of_addresses(place.family, [&key.source, &key.destination], [source, destination]);
    if place.l4_checksum != 0 {
        frame.fix_l4(place.l4_checksum, key.protocol == u32::from(UDP), change).ok_or(DropReason::Malformed)?;
    }
    match place.family {
        Family::V4 => {
            let header = frame.at::<Ipv4>(0).ok_or(DropReason::Malformed)?;
            header.checksum = change.apply(place.ip_checksum);
            header.source = source.v4_bytes();
            header.destination = destination.v4_bytes();
        }
        Family::V6 => {
            let header = frame.at::<Ipv6>(0).ok_or(DropReason::Malformed)?;
            header.source = source.0;
            header.destination = destination.0;
        }
    }
    Ok(())
}
