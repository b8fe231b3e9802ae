//! ICMP errors: the law of one about a packet of a flow, and how one is made. Only user space comes here, so it works on byte slices.
//!
//! An error is read as a packet of the flow that goes the other way than the packet in it, and is given the addresses that such a packet
//! gets. The packet in it gets the same ones, mirrored:
//!
//! ```text
//! what a packet of the flow goes through       a → b          becomes  c → d
//! an error about a packet of the other way     a → b [b → a]  becomes  c → d [d → c]
//! ```
//!
//! Whoever noticed, an instance or a node on the way, it is said in the name of the address that the packet in it was for: routers of
//! the overlay have no addresses that anybody could see.

use crate::abi::{
    CONFIG_RELAX_SOURCE, Endpoint, FLOW_HOST, FLOW_REPLY, Flow, FlowKey, Mac, PEER_OURS, POLICY_INSTANCE, Slot,
};
use crate::addr::Addr;
use crate::checksum::{self, Change};
use crate::frame::{Family, ICMP, ICMPV6, TCP, UDP, mend};
use crate::pipeline::{Tables, belongs, is_service};
use crate::verdict::{DropReason, Miss, Verdict};

/// The longest error that [`answer`] makes: what IPv6 guarantees to pass everywhere.
pub const MAX_LEN: usize = 1_280;
/// And over IPv4 (RFC 1812 4.3.2.3).
const MAX_LEN_V4: usize = 576;
const V4_LEN: usize = 20;
const V6_LEN: usize = 40;
/// Of the ICMP header itself.
const HEADER: usize = 8;

/// Does a message of this type say that something is wrong with a packet? Redirects and source quench are for nobody.
#[inline(always)]
pub const fn is_error(family: Family, kind: u8) -> bool {
    match family {
        // Destination unreachable, time exceeded, parameter problem.
        Family::V4 => matches!(kind, 3 | 11 | 12),
        // Destination unreachable, packet too big, time exceeded, parameter problem.
        Family::V6 => matches!(kind, 1..=4),
    }
}

/// Is the packet such a message?
pub fn reports(packet: &[u8]) -> bool {
    let Some(ip) = Ip::read(packet) else { return false };
    let protocol = if ip.family == Family::V4 { ICMP } else { ICMPV6 };
    ip.protocol == protocol && packet.get(ip.transport).is_some_and(|kind| is_error(ip.family, *kind))
}

/// What is wrong with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Nobody takes packets on its port.
    Port,
    /// Who it is for is not there.
    Host,
    /// It is longer than the longest that gets through, which has this length.
    TooBig(u16),
}

impl Cause {
    /// Type, code, and the last four bytes of the header (RFC 792, RFC 1191, RFC 4443).
    const fn say(self, family: Family) -> ([u8; 2], [u8; 4]) {
        let none = [0; 4];
        match (self, family) {
            (Self::Port, Family::V4) => ([3, 3], none),
            (Self::Host, Family::V4) => ([3, 1], none),
            (Self::TooBig(mtu), Family::V4) => {
                let [a, b] = mtu.to_be_bytes();
                ([3, 4], [0, 0, a, b])
            }
            (Self::Port, Family::V6) => ([1, 4], none),
            (Self::Host, Family::V6) => ([1, 3], none),
            (Self::TooBig(mtu), Family::V6) => {
                let [a, b] = mtu.to_be_bytes();
                ([2, 0], [0, 0, a, b])
            }
        }
    }
}

/// Makes the error about `packet` for its sender, in the name of the address that it was for. `packet` is as its sender sent it. `None`
/// where there must be none: about an error, or about a fragment that is not the first (RFC 1122 3.2.2, RFC 4443 2.4).
pub fn answer<'a>(packet: &[u8], cause: Cause, out: &'a mut [u8; MAX_LEN]) -> Option<&'a [u8]> {
    let ip = Ip::read(packet)?;
    if ip.later_fragment || reports(packet) {
        return None;
    }
    let (at, limit, protocol) = match ip.family {
        Family::V4 => (V4_LEN, MAX_LEN_V4, ICMP),
        Family::V6 => (V6_LEN, MAX_LEN, ICMPV6),
    };
    let quoted = packet.get(..packet.len().min(limit - at - HEADER))?;
    let len = at + HEADER + quoted.len();
    let (kind, rest) = cause.say(ip.family);
    let out = &mut out[..len];
    out[at..at + 2].copy_from_slice(&kind);
    out[at + 2..at + 4].fill(0);
    out[at + 4..at + HEADER].copy_from_slice(&rest);
    out[at + HEADER..].copy_from_slice(quoted);
    match ip.family {
        Family::V4 => {
            // Internetwork control; not to be fragmented, so that it needs no identification (RFC 6864).
            out[..12].copy_from_slice(&[0x45, 0xc0, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0, 0]);
            out[2..4].copy_from_slice(&(len as u16).to_be_bytes());
            out[12..16].copy_from_slice(&ip.destination.v4_bytes());
            out[16..20].copy_from_slice(&ip.source.v4_bytes());
            let header = !checksum::fold(checksum::sum(0, &out[..V4_LEN]));
            out[10..12].copy_from_slice(&header.to_be_bytes());
        }
        Family::V6 => {
            out[..8].copy_from_slice(&[0x60, 0, 0, 0, 0, 0, protocol, 64]);
            out[4..6].copy_from_slice(&((len - V6_LEN) as u16).to_be_bytes());
            out[8..24].copy_from_slice(&ip.destination.0);
            out[24..40].copy_from_slice(&ip.source.0);
        }
    }
    seal(out, ip.family, at);
    Some(out)
}

/// Decides over an error that an instance on this node sends, or (`host`) the node itself, and rewrites it where the verdict is `Send` or
/// `Local`.
///
/// # Errors
/// The reason for which it must be dropped.
pub fn outbound(packet: &mut [u8], tables: &mut impl Tables, host: bool) -> Result<Verdict, DropReason> {
    let error = Message::read(packet)?;
    let Some(config) = tables.config() else { return Ok(Verdict::Pass) };
    if !is_service(&config, error.family, &error.destination.words()) {
        return Ok(Verdict::Pass);
    }
    // The instance that did not want the packet.
    let own = error.about.destination;
    let sender = tables.endpoint(&own).filter(|_| host || error.source == own).ok_or(DropReason::Spoofed)?;
    if let Some(flow) = tables.flow(&error.mirrored()) {
        error.count(packet, tables, &flow);
    }
    let (slot, source) = match route(tables, &error.mirrored(), &sender)? {
        Route::To(slot, source) => (slot, source),
        Route::Host => return Ok(Verdict::Slow(Miss::Host)),
    };
    let verdict = if slot.peer == 0 {
        let receiver = tables.endpoint(&slot.namespace).ok_or(DropReason::NoInstance)?;
        Verdict::Local { ifindex: receiver.ifindex, mac: Mac(receiver.mac) }
    } else {
        let peer = tables.peer(slot.peer).ok_or(DropReason::NoInstance)?;
        if peer.flags & PEER_OURS == 0 {
            return Err(DropReason::PeerProtocol);
        }
        Verdict::Send { peer: slot.peer }
    };
    error.rewrite(packet, &source, &slot.namespace);
    Ok(verdict)
}

/// Where a flow leads.
enum Route {
    To(Slot, Addr),
    /// To the node itself, by user space's own tables.
    Host,
}

/// Where packets of `key` go, and under which source address. An error opens no flow and chooses nobody.
fn route(tables: &mut impl Tables, key: &FlowKey, sender: &Endpoint) -> Result<Route, DropReason> {
    if let Some(flow) = tables.flow(key)
        && flow.port != 0
    {
        if flow.kind == FLOW_HOST {
            return Ok(Route::Host);
        }
        if let Some(slot) = tables.slot(flow.slot)
            && slot.generation == flow.generation
            && slot.live()
        {
            return Ok(Route::To(*slot, flow.source));
        }
    }
    let service = tables.service(&key.destination).ok_or(DropReason::NoFlow)?;
    if service.policy != POLICY_INSTANCE || service.count == 0 || sender.instance.is_none() {
        return Err(DropReason::NoFlow);
    }
    let slot = tables.slot(service.first).filter(|slot| slot.live()).ok_or(DropReason::NoFlow)?;
    Ok(Route::To(*slot, sender.instance))
}

/// Decides over an error that came through the tunnel from `outer`, and rewrites it where the verdict is `Local`.
///
/// # Errors
/// The reason for which it must be dropped.
pub fn inbound(packet: &mut [u8], tables: &mut impl Tables, outer: &Addr) -> Result<Verdict, DropReason> {
    let error = Message::read(packet)?;
    let receiver = tables.endpoint(&error.destination).ok_or(DropReason::NotOurs)?;
    let Some(config) = tables.config() else { return Err(DropReason::NotOurs) };
    if error.source != error.about.destination {
        return Err(DropReason::Malformed);
    }
    if config.flags & CONFIG_RELAX_SOURCE == 0 {
        let Some(sender) = tables.service(&error.source) else { return Ok(Verdict::Slow(Miss::Source)) };
        if !belongs(tables, &sender, outer) {
            return Err(DropReason::ForeignSource);
        }
    }
    let key = error.mirrored();
    let noted = tables.flow(&key).or_else(|| tables.flow(&FlowKey { source: Addr::NONE, ..key }));
    let source = match noted {
        Some(flow) if flow.kind == FLOW_HOST => return Ok(Verdict::Slow(Miss::Host)),
        Some(flow) if flow.kind == FLOW_REPLY => {
            error.count(packet, tables, &flow);
            flow.source
        }
        Some(_) => error.source,
        // Nothing has come back on the flow yet, and nobody chose an instance for it.
        None if tables.flow(&error.about).is_some() => error.source,
        None => return Err(DropReason::NoFlow),
    };
    error.rewrite(packet, &source, &error.destination);
    Ok(Verdict::Local { ifindex: receiver.ifindex, mac: Mac(receiver.mac) })
}

/// An error, and where things are in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    family: Family,
    pub source: Addr,
    pub destination: Addr,
    /// Where the ICMP header begins.
    at: usize,
    /// The flow of the packet in it, as that packet has it.
    pub about: FlowKey,
    /// Where the transport header of the packet in it begins.
    transport: usize,
}

impl Message {
    /// Reads one that is whole, unharmed, and sent to whoever sent the packet in it.
    ///
    /// # Errors
    /// What it is not.
    pub fn read(packet: &[u8]) -> Result<Self, DropReason> {
        let ip = Ip::read(packet).ok_or(DropReason::Malformed)?;
        let kind = *packet.get(ip.transport).ok_or(DropReason::Malformed)?;
        let protocol = if ip.family == Family::V4 { ICMP } else { ICMPV6 };
        if ip.protocol != protocol || !is_error(ip.family, kind) {
            return Err(DropReason::Protocol);
        }
        let quoted = packet.get(ip.transport + HEADER..).ok_or(DropReason::Malformed)?;
        if ip.len != packet.len() || sum(packet, ip.family, ip.transport) != 0xffff {
            return Err(DropReason::Malformed);
        }
        let inner = Ip::read(quoted).ok_or(DropReason::Malformed)?;
        if inner.family != ip.family || inner.source != ip.destination {
            return Err(DropReason::Malformed);
        }
        if inner.later_fragment {
            return Err(DropReason::NoFlow);
        }
        let about = inner.flow(quoted)?;
        let transport = ip.transport + HEADER + inner.transport;
        let Ip { family, source, destination, transport: at, .. } = ip;
        Ok(Self { family, source, destination, at, about, transport })
    }

    /// Who says that a first packet cannot be delivered refuses, and that is counted; also in the sum, as a datagram is not asked for there.
    fn count(&self, packet: &[u8], tables: &mut impl Tables, flow: &Flow) {
        let unreachable = match (self.family, packet.get(self.at..self.at + 2)) {
            (Family::V4, Some([3, code])) => *code != 4,
            (Family::V6, Some([1, _])) => true,
            _ => false,
        };
        if unreachable && flow.unanswered() {
            tables.answered(flow.server, true);
            tables.answered(0, true);
        }
    }

    /// The flow that the error takes its way by.
    pub fn mirrored(&self) -> FlowKey {
        let FlowKey { source, destination, source_port, destination_port, protocol } = self.about;
        FlowKey {
            source: destination,
            destination: source,
            source_port: destination_port,
            destination_port: source_port,
            protocol,
        }
    }

    /// Puts in new addresses, mirrored for the packet in it. `packet` is the one that this was read of.
    pub fn rewrite(&self, packet: &mut [u8], source: &Addr, destination: &Addr) {
        let (outer, inner) = (0, self.at + HEADER);
        let about = [&self.about.source, &self.about.destination];
        let change = Change::of_addresses(self.family, about, [destination, source]);
        put(packet, self.family, inner, [destination, source], change);
        // ICMP's own covers no addresses.
        if self.about.protocol != u32::from(ICMP) {
            self.mend_quoted(packet, change);
        }
        let change = Change::of_addresses(self.family, [&self.source, &self.destination], [source, destination]);
        put(packet, self.family, outer, [source, destination], change);
        seal(packet, self.family, self.at);
    }
}

/// A port of the packet in an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Port {
    Source,
    Destination,
}

impl Message {
    /// Gives the packet in the error another port; an echo has an identifier in place of both. `packet` is the one that this was read of.
    pub fn put_port(&self, packet: &mut [u8], which: Port, port: [u8; 2]) {
        let at = self.transport
            + match (self.about.protocol as u8, which) {
                (ICMP | ICMPV6, _) => 4,
                (_, Port::Source) => 0,
                (_, Port::Destination) => 2,
            };
        let Some(place) = packet.get_mut(at..).and_then(<[u8]>::first_chunk_mut) else { return };
        let change = Change::of::<2>(place, &port);
        *place = port;
        self.mend_quoted(packet, change);
        seal(packet, self.family, self.at);
    }

    /// Mends the transport checksum of the packet in the error, where it is there.
    fn mend_quoted(&self, packet: &mut [u8], change: Change) {
        let field = match self.about.protocol as u8 {
            TCP => 16,
            UDP => 6,
            _ => 2,
        };
        if let Some(field) = packet.get_mut(self.transport + field..).and_then(<[u8]>::first_chunk_mut) {
            mend(field, self.about.protocol == u32::from(UDP), change);
        }
    }
}

/// Puts addresses into the IP header at `at`, and mends its checksum.
fn put(packet: &mut [u8], family: Family, at: usize, [source, destination]: [&Addr; 2], change: Change) {
    let header = &mut packet[at..];
    match family {
        Family::V4 => {
            let sum = change.apply([header[10], header[11]]);
            header[10..12].copy_from_slice(&sum);
            header[12..16].copy_from_slice(&source.v4_bytes());
            header[16..20].copy_from_slice(&destination.v4_bytes());
        }
        Family::V6 => {
            header[8..24].copy_from_slice(&source.0);
            header[24..40].copy_from_slice(&destination.0);
        }
    }
}

/// Writes the checksum of the message at `at`.
fn seal(packet: &mut [u8], family: Family, at: usize) {
    packet[at + 2..at + 4].fill(0);
    let sum = !sum(packet, family, at);
    packet[at + 2..at + 4].copy_from_slice(&sum.to_be_bytes());
}

/// What the message sums up to, `0xffff` where its checksum is right.
fn sum(packet: &[u8], family: Family, at: usize) -> u16 {
    let message = packet.get(at..).unwrap_or_default();
    let seed = match family {
        Family::V4 => 0,
        Family::V6 => checksum::sum(u32::from(ICMPV6) + message.len() as u32, packet.get(8..40).unwrap_or_default()),
    };
    checksum::fold(checksum::sum(seed, message))
}

/// What is read of an IP header. Of what is quoted in an error most may be missing.
struct Ip {
    family: Family,
    source: Addr,
    destination: Addr,
    protocol: u8,
    transport: usize,
    /// As the header says.
    len: usize,
    /// A fragment without a transport header.
    later_fragment: bool,
}

impl Ip {
    fn read(packet: &[u8]) -> Option<Self> {
        match packet.first()? >> 4 {
            4 => Self::read_v4(packet.first_chunk()?),
            6 => Self::read_v6(packet),
            _ => None,
        }
    }

    fn read_v4(header: &[u8; V4_LEN]) -> Option<Self> {
        let transport = usize::from(header[0] & 0x0f) * 4;
        let [.., a, b, c, d, e, f, g, h] = *header;
        Some(Self {
            family: Family::V4,
            source: Addr::v4([a, b, c, d]),
            destination: Addr::v4([e, f, g, h]),
            protocol: header[9],
            transport,
            len: u16::from_be_bytes([header[2], header[3]]).into(),
            later_fragment: u16::from_be_bytes([header[6], header[7]]) & 0x1fff != 0,
        })
        .filter(|_| transport >= V4_LEN)
    }

    fn read_v6(packet: &[u8]) -> Option<Self> {
        let header: &[u8; V6_LEN] = packet.first_chunk()?;
        let (mut protocol, mut transport, mut later_fragment) = (header[6], V6_LEN, false);
        if protocol == 44 {
            let fragment: &[u8; 8] = packet.get(V6_LEN..)?.first_chunk()?;
            (protocol, transport) = (fragment[0], V6_LEN + 8);
            later_fragment = u16::from_be_bytes([fragment[2], fragment[3]]) & 0xfff8 != 0;
        }
        Some(Self {
            family: Family::V6,
            source: Addr::v6(*header[8..].first_chunk()?),
            destination: Addr::v6(*header[24..].first_chunk()?),
            protocol,
            transport,
            len: V6_LEN + usize::from(u16::from_be_bytes([header[4], header[5]])),
            later_fragment,
        })
    }

    /// The key of the packet's flow. `packet` may be cut off after the first eight bytes of its transport header.
    fn flow(&self, packet: &[u8]) -> Result<FlowKey, DropReason> {
        let transport: &[u8; 8] =
            packet.get(self.transport..).and_then(<[u8]>::first_chunk).ok_or(DropReason::Malformed)?;
        let [a, b, c, d, id @ .., _, _] = *transport;
        let none = [0; 2];
        let (source_port, destination_port) = match (self.family, self.protocol, a) {
            (_, TCP | UDP, _) => ([a, b], [c, d]),
            (Family::V4, ICMP, 8) | (Family::V6, ICMPV6, 128) => (id, none),
            (Family::V4, ICMP, 0) | (Family::V6, ICMPV6, 129) => (none, id),
            _ => return Err(DropReason::Protocol),
        };
        Ok(FlowKey {
            source: self.source,
            destination: self.destination,
            source_port,
            destination_port,
            protocol: self.protocol.into(),
        })
    }
}
