//! What becomes of one packet in user space: the law decides, and what it decides is done. Neither reads nor waits; see `proxy.rs`.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use netmanager_common::abi::{Config, Peer};
use netmanager_common::addr::Addr;
use netmanager_common::frame::{UDP, Vxlan};
use netmanager_common::icmp;
use netmanager_common::pipeline::{inbound, outbound};
use netmanager_common::verdict::{DropReason, Miss, Verdict};
use netmanager_common::{FRAMING_LEN, OUTER_LEN_V4};
use tokio::sync::mpsc;

use super::batch::Batch;
use super::counters::{Count, Counters};
use super::device::TunDevice;
use super::flows::now;
use super::fragments::{Fragments, is_fragment};
use super::held::{Held, Outcome, Packet};
use super::host::{self, HostFlows};
use super::merge;
use super::offload::{Offload, PacketFrame};
use super::projection::Projection;
use super::refusal::Limit;
use super::socket::TunnelSocket;
use super::{Event, TableDelta};

/// Packets merged into one for the TUN device; the kernel merges no more datagrams than this into one.
const RUN: usize = 64;
/// So much of a control datagram is passed on; what is beyond it only makes the datagram long.
const CONTROL: usize = 1_024;

/// Where a packet came from.
#[derive(Clone, Copy, Debug)]
pub(super) enum Origin {
    /// An instance on this node, by way of the TUN device.
    Instance,
    /// The host itself, in the name of an instance.
    Host,
    /// The node at this address.
    Node(Addr),
}

/// Carries packets between the TUN device and the tunnel socket, by the tables.
pub(super) struct Carrier<T> {
    pub(super) tables: T,
    pub(super) device: TunDevice,
    pub(super) socket: Arc<TunnelSocket>,
    pub(super) counters: Arc<Counters>,
    pub(super) events: mpsc::Sender<Event>,
    pub(super) held: Held<(Origin, Offload)>,
    pub(super) fragments: Fragments,
    pub(super) host: HostFlows,
    /// The TUN device's.
    pub(super) mtu: usize,
    /// What waits to be sent to peers.
    pub(super) batch: Batch,
    /// For what does not wait.
    pub(super) lone: Batch,
    /// How many senders are told that nobody is there.
    pub(super) refusals: Limit,
}

impl<T: Projection> Carrier<T> {
    /// A packet from the TUN device, at `at` of the buffer: of an instance, or of the host itself. What goes to a peer waits for
    /// [`Self::flush`]; until then the buffer is not to be written. True where something waits.
    pub(super) fn take_in(&mut self, buffer: &mut [u8], at: Range<usize>, offload: &Offload) -> bool {
        let peer = self.decide(&mut buffer[at.clone()], offload);
        peer.is_some_and(|peer| self.send(buffer, at, peer, offload))
    }

    /// A packet that was read in pieces.
    pub(super) fn take_in_whole(&mut self, packet: &mut [u8], offload: &Offload) {
        if let Some(peer) = self.decide(packet, offload) {
            self.send_alone(packet, peer, offload);
        }
    }

    /// The peer to which a packet from the TUN device goes; everything else is done.
    fn decide(&mut self, packet: &mut [u8], offload: &Offload) -> Option<u32> {
        if !source(packet).is_some_and(|source| self.host.is_own(&source)) {
            return self.carry(packet, Origin::Instance, offload);
        }
        if icmp::reports(packet) {
            self.carry_error(packet, Origin::Host);
            return None;
        }
        if is_fragment(packet) {
            self.join(packet, Origin::Host);
            return None;
        }
        if self.host.lend(packet, offload, now()).is_none() {
            self.counters.add(Count::Host, 1);
            return None;
        }
        self.carry(packet, Origin::Host, offload)
    }

    /// Sends what waits to be sent.
    pub(super) fn flush(&mut self, buffer: &[u8]) {
        let (sent, refused) = self.batch.flush(buffer, &self.socket);
        self.counters.add(Count::Sent, sent);
        self.counters.add(Count::Send, refused);
    }

    /// When [`Self::expire`] has something to do next.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.held.next_deadline().into_iter().chain(self.fragments.next_deadline()).min()
    }

    /// Drops what has waited too long.
    pub(super) fn expire(&mut self, now: Instant) {
        self.counters.add(Count::Expired, self.held.expire(now));
        self.counters.add(Count::Fragment, self.fragments.expire(now));
    }

    /// Takes in datagrams of one sender. What the kernel would merge is merged: it costs the TUN device and everything behind it no more
    /// than one packet.
    pub(super) fn receive(&mut self, mut datagrams: &mut [u8], stride: usize, from: SocketAddr, framed: bool) {
        // What was merged before the socket asked for single ones comes without a word about it: as long as it says is the first.
        let silent = !framed && stride >= datagrams.len();
        let stride = if silent { whole(datagrams).map_or(stride, |first| first.len()) } else { stride };
        while !datagrams.is_empty() {
            let (count, offload) = match datagrams.len() > stride {
                true => {
                    let packets = datagrams.chunks(stride).take(RUN).map(|datagram| inner(datagram, framed));
                    merge::run(packets, self.device.udp_gso())
                }
                false => (1, Offload::default()),
            };
            let (now, later) = datagrams.split_at_mut((count * stride).min(datagrams.len()));
            match count {
                1 => self.receive_one(now, from, framed),
                _ => self.receive_run(now, stride, from, &offload, if framed { FRAMING_LEN } else { 0 }),
            }
            datagrams = later;
        }
    }

    fn receive_one(&mut self, datagram: &mut [u8], from: SocketAddr, framed: bool) {
        let skipped = datagram.len() - inner(datagram, framed).len();
        let datagram = &mut datagram[skipped..];
        match datagram.first().map(|byte| byte >> 4) {
            Some(4 | 6) => match whole(datagram) {
                Some(packet) => {
                    let offload = Offload::received(packet, self.mtu);
                    self.carry_in(packet, Origin::Node(from.ip().into()), &offload);
                }
                None => self.counters.add(Count::Garbage, 1),
            },
            Some(_) => {
                let payload = datagram[..datagram.len().min(CONTROL)].to_vec();
                if self.events.try_send(Event::Control { from, payload }).is_err() {
                    self.counters.add(Count::Control, 1);
                }
            }
            None => self.counters.add(Count::Garbage, 1),
        }
    }

    /// Several packets of one connection, as one. Only the first goes through the law: it decides by what they have in common.
    fn receive_run(&mut self, packets: &mut [u8], stride: usize, from: SocketAddr, offload: &Offload, skip: usize) {
        let (first, rest) = packets.split_at_mut(stride);
        let first = &mut first[skip..];
        let outer = from.ip().into();
        let verdict = inbound(&mut PacketFrame::new(first, &Offload::default()), &mut self.tables, &outer);
        if !matches!(verdict, Ok(Verdict::Local { .. })) {
            // Nothing was rewritten; each is held or dropped, and counted, on its own.
            for packet in packets.chunks_mut(stride) {
                self.carry_in(&mut packet[skip..], Origin::Node(outer), &Offload::default());
            }
            return;
        }
        let repeated = merge::repeated(offload);
        let count = 1 + rest.len().div_ceil(stride);
        let header = offload.encode();
        let mut slices = [IoSlice::new(&[]); RUN + 1];
        let mut payload = 0;
        let mut push = false;
        for (slice, packet) in slices[2..].iter_mut().zip(rest.chunks(stride)) {
            let packet = packet.get(skip..).unwrap_or_default();
            let data = packet.get(repeated..).unwrap_or_default();
            *slice = IoSlice::new(data);
            payload += data.len();
            push |= merge::pushes(packet, offload);
        }
        merge::lead(first, offload, payload, push);
        slices[0] = IoSlice::new(&header);
        slices[1] = IoSlice::new(first);
        let written = self.device.send_vectored(&slices[..=count]).is_ok();
        self.counters.add(if written { Count::Received } else { Count::Write }, count as u64);
    }

    /// A packet that is in no buffer: what goes to a peer is sent at once.
    pub(super) fn carry_whole(&mut self, packet: &mut [u8], origin: Origin, offload: &Offload) {
        if let Some(peer) = self.carry(packet, origin, offload) {
            self.send_alone(packet, peer, offload);
        }
    }

    /// A packet from a peer: none of those goes to another.
    fn carry_in(&mut self, packet: &mut [u8], origin: Origin, offload: &Offload) {
        if self.carry(packet, origin, offload).is_some() {
            self.counters.add(Count::Send, 1);
        }
    }

    /// Decides over a packet and does what was decided, but for sending it to a peer: that one's number is returned.
    fn carry(&mut self, packet: &mut [u8], origin: Origin, offload: &Offload) -> Option<u32> {
        let lent = if matches!(origin, Origin::Host) { host::key(packet) } else { None };
        let mut frame = PacketFrame::new(packet, offload);
        let verdict = match origin {
            Origin::Instance | Origin::Host => outbound(&mut frame, &mut self.tables, 0),
            Origin::Node(outer) => inbound(&mut frame, &mut self.tables, &outer),
        };
        if let (Some((key, ends)), Ok(Verdict::Send { .. } | Verdict::Local { .. })) = (lent, &verdict) {
            host::mark(&mut self.tables, &key, ends);
        }
        match verdict {
            Ok(Verdict::Send { peer }) => return Some(peer),
            Ok(Verdict::Local { .. }) => self.deliver(packet, origin, offload),
            Ok(Verdict::Slow(Miss::Service)) => self.hold(destination(packet), packet, origin, *offload),
            Ok(Verdict::Slow(Miss::Endpoint | Miss::Source)) => self.hold(source(packet), packet, origin, *offload),
            Ok(Verdict::Slow(Miss::Fragment)) => self.join(packet, origin),
            Ok(Verdict::Slow(Miss::Header)) => self.counters.add(Count::Header, 1),
            Ok(Verdict::Slow(Miss::Host)) => match self.host.give_back(packet, &mut self.tables, offload, now()) {
                Some(()) => self.deliver(packet, origin, offload),
                None => self.counters.add(Count::Host, 1),
            },
            Ok(Verdict::Slow(Miss::Narrow)) => self.refuse_long(packet, origin),
            Ok(Verdict::Slow(Miss::Error)) => self.carry_error(packet, origin),
            Ok(Verdict::Slow(Miss::Gone)) => {
                self.counters.dropped(DropReason::NoInstance);
                self.refuse(packet, origin, offload);
            }
            // Asked only of the kernel; from here every underlay is reached.
            Ok(Verdict::Slow(Miss::Underlay)) => self.counters.add(Count::Send, 1),
            Ok(Verdict::Pass) => self.forward(packet),
            Err(reason) => self.counters.dropped(reason),
        }
        None
    }

    pub(super) fn send_alone(&mut self, packet: &mut [u8], peer: u32, offload: &Offload) {
        let len = packet.len();
        std::mem::swap(&mut self.batch, &mut self.lone);
        self.send(packet, 0..len, peer, offload);
        self.flush(packet);
        std::mem::swap(&mut self.batch, &mut self.lone);
    }

    /// No packet of the overlay's; but the kernel's programs, where they do not know the way to a peer and cannot ask, leave datagrams
    /// here that are ready to be sent: the socket can.
    fn forward(&mut self, packet: &[u8]) {
        let datagram = self.tables.config().and_then(|config| ready(packet, &config));
        let Some((peer, payload)) = datagram else { return self.counters.add(Count::NotService, 1) };
        let sent = self.socket.try_send_many(&[IoSlice::new(payload)], 1, payload.len(), &peer);
        self.counters.add(if sent == 1 { Count::Sent } else { Count::Send }, 1);
    }

    /// Puts the packet at `at` of the buffer among what waits to be sent. False, and counted, where it cannot be.
    fn send(&mut self, buffer: &mut [u8], at: Range<usize>, number: u32, offload: &Offload) -> bool {
        let Some(peer) = self.batch.peer(number).or_else(|| self.tables.peer(number).map(|peer| *peer)) else {
            self.counters.add(Count::Send, 1);
            return false;
        };
        let added = if offload.many() {
            self.batch.add_many(number, &peer, (buffer, at), offload)
        } else if !offload.partial() || offload.complete(&mut buffer[at.clone()]).is_some() {
            self.batch.add(number, &peer, at);
            Some(())
        } else {
            None
        };
        if added.is_none() {
            self.counters.add(Count::Header, 1);
        }
        added.is_some()
    }

    /// Into the TUN device: the kernel knows the way to an instance on this node.
    pub(super) fn deliver(&mut self, packet: &[u8], origin: Origin, offload: &Offload) {
        let delivered = match origin {
            Origin::Instance | Origin::Host => Count::Local,
            Origin::Node(_) => Count::Received,
        };
        let written = self.write(packet, offload);
        self.counters.add(if written { delivered } else { Count::Write }, 1);
    }

    pub(super) fn write(&mut self, packet: &[u8], offload: &Offload) -> bool {
        if packet.len() > self.mtu && !offload.many() && packet.first().is_some_and(|first| first >> 4 == 6) {
            return self.write_cut(packet, offload);
        }
        self.device.send_vectored(&[IoSlice::new(&offload.encode()), IoSlice::new(packet)]).is_ok()
    }

    pub(super) fn hold(&mut self, address: Option<Addr>, packet: &[u8], origin: Origin, offload: Offload) {
        let Some(address) = address else {
            return self.counters.add(Count::Garbage, 1);
        };
        let sender = match origin {
            Origin::Node(outer) => outer,
            Origin::Instance | Origin::Host => source(packet).unwrap_or(Addr::NONE),
        };
        let (outcome, crowded_out) = self.held.hold(address, sender, (origin, offload), packet, Instant::now());
        self.counters.add(Count::HeldFull, crowded_out);
        match outcome {
            Outcome::Ask => {
                self.counters.add(Count::Held, 1);
                self.ask(address, origin);
            }
            Outcome::Waits => self.counters.add(Count::Held, 1),
            Outcome::GivenUp => {
                self.counters.add(Count::GivenUp, 1);
                self.refuse_unknown(address, &mut packet.to_vec(), origin, &offload);
            }
            Outcome::Refused => self.counters.add(Count::HeldFull, 1),
        }
    }

    fn ask(&mut self, address: Addr, origin: Origin) {
        // Of an instance on this node only its own row can be missing where its address is the one that is unknown.
        let own = matches!(origin, Origin::Instance | Origin::Host) && self.tables.endpoint(&address).is_some();
        let event = if own { Event::UnknownEndpoint(address) } else { Event::UnknownService(address) };
        if self.events.try_send(event).is_err() {
            // Nobody is told, so nobody will answer: let the next packet ask again.
            let dropped = self.held.release(&address).len() as u64;
            self.counters.add(Count::HeldFull, dropped);
        }
    }

    /// Lets what waited for the rows of this change run through the law again.
    pub(super) fn resume(&mut self, delta: &TableDelta) {
        let services = delta.services.iter().map(|(address, ..)| address);
        let endpoints = delta.endpoints.iter().map(|(address, _)| address);
        for address in services.chain(endpoints) {
            let packets: VecDeque<Packet<(Origin, Offload)>> = self.held.release(address);
            for Packet { origin: (origin, offload), mut bytes, .. } in packets {
                self.carry_whole(&mut bytes, origin, &offload);
            }
        }
    }
}

/// What a datagram carries: itself, or what is in framing. Nothing where the framing is not ours.
pub(super) fn inner(datagram: &[u8], framed: bool) -> &[u8] {
    if !framed {
        return datagram;
    }
    let (vxlan, rest) = datagram.split_at_checked(size_of::<Vxlan>()).unwrap_or_default();
    let ours = vxlan[..4.min(vxlan.len())] == Vxlan::OURS.flags && vxlan.get(4..) == Some(&Vxlan::OURS.vni[..]);
    rest.get(FRAMING_LEN - size_of::<Vxlan>()..).filter(|_| ours).unwrap_or_default()
}

/// The packet as long as its header says; `None` where there is less of it, or no header.
pub(super) fn whole(bytes: &mut [u8]) -> Option<&mut [u8]> {
    let field = |at: usize| Some(usize::from(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?])));
    let len = match bytes.first()? >> 4 {
        4 => field(2)?,
        6 => 40 + field(4)?,
        _ => return None,
    };
    bytes.get_mut(..len).filter(|packet| !packet.is_empty())
}

/// The payload of a tunnel datagram from this node, and to whom it goes.
pub(super) fn ready<'a>(packet: &'a [u8], config: &Config) -> Option<(Peer, &'a [u8])> {
    let (headers, payload) = packet.split_first_chunk::<OUTER_LEN_V4>()?;
    let tunnelled = headers[0] == 0x45 && headers[9] == UDP && source(packet)? == config.node;
    let peer = Peer { host: destination(packet)?, port: [headers[22], headers[23]], ..Peer::default() };
    (tunnelled && peer.port != [0, 0]).then_some((peer, payload))
}

pub(super) fn source(packet: &[u8]) -> Option<Addr> {
    address(packet, 12, 8)
}

pub(super) fn destination(packet: &[u8]) -> Option<Addr> {
    address(packet, 16, 24)
}

/// The address at one of two offsets, by family.
fn address(packet: &[u8], v4: usize, v6: usize) -> Option<Addr> {
    match packet.first()? >> 4 {
        4 => packet.get(v4..v4 + 4)?.try_into().map(Addr::v4).ok(),
        6 => packet.get(v6..v6 + 16)?.try_into().map(Addr::v6).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_is_as_long_as_its_header_says() {
        let mut packet = [0_u8; 64];
        packet[0] = 0x45;
        packet[3] = 40;
        assert_eq!(whole(&mut packet).map(|p| p.len()), Some(40), "padding is cut");
        packet[3] = 65;
        assert_eq!(whole(&mut packet), None, "more claimed than there is");
        packet[0] = 0x60;
        packet[5] = 24;
        assert_eq!(whole(&mut packet).map(|p| p.len()), Some(64));
        packet[5] = 25;
        assert_eq!(whole(&mut packet), None);
        for short in 0..6 {
            assert_eq!(whole(&mut [0x45, 0, 0, 0, 0, 0][..short]), None, "{short} bytes");
            assert_eq!(whole(&mut [0x60, 0, 0, 0, 0, 0][..short]), None, "{short} bytes");
        }
    }

    #[test]
    fn addresses_are_where_the_families_have_them() {
        let mut packet = [0_u8; 40];
        packet[0] = 0x45;
        packet[12..20].copy_from_slice(&[10, 0, 0, 1, 10, 0, 0, 2]);
        assert_eq!(
            (source(&packet), destination(&packet)),
            (Some(Addr::v4([10, 0, 0, 1])), Some(Addr::v4([10, 0, 0, 2])))
        );
        packet[0] = 0x60;
        packet[8..24].fill(1);
        packet[24..40].fill(2);
        assert_eq!((source(&packet), destination(&packet)), (Some(Addr::v6([1; 16])), Some(Addr::v6([2; 16]))));
        assert_eq!(source(&packet[..23]), None);
    }
}
