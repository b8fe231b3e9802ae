//! The law in user space: one task that reads the TUN device and the tunnel socket, decides by the tables, and holds what waits for an
//! address. The whole of the TUN datapath, and the slow path of the eBPF datapath.

use std::collections::VecDeque;
use std::future::pending;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use netmanager_common::addr::Addr;
use netmanager_common::icmp;
use netmanager_common::pipeline::{inbound, outbound};
use netmanager_common::verdict::{Miss, Verdict};
use tokio::sync::{mpsc, oneshot};
use tun_rs::AsyncDevice;

use super::counters::{Count, Counters};
use super::flows::now;
use super::fragments::{Fragments, is_fragment};
use super::held::{Held, Outcome, Packet};
use super::host::{self, HostFlows};
use super::offload::{self, Offload, PacketFrame};
use super::projection::Projection;
use super::socket::{Received, TunnelSocket};
use super::{DatapathError, Event, FlowRow, Snapshot, TableDelta};

/// Packets taken from one side before the other gets its turn.
const BATCH: usize = 64;
/// The largest packet there is.
const PACKET: usize = 65_535;
/// Packets merged into one for the TUN device; the kernel merges no more datagrams than this into one.
const RUN: usize = 64;
/// The largest control datagram that is passed on.
const CONTROL: usize = 1_500;

/// What the proxy is asked from outside.
#[derive(Debug)]
pub(super) enum Request {
    Apply(TableDelta, oneshot::Sender<Result<(), DatapathError>>),
    Reconcile(TableDelta, oneshot::Sender<Result<(), DatapathError>>),
    Snapshot(oneshot::Sender<Result<Snapshot, DatapathError>>),
    Flows(oneshot::Sender<Result<Vec<FlowRow>, DatapathError>>),
    Choices(Vec<u32>, oneshot::Sender<Vec<u64>>),
    GiveUp(Addr),
}

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

pub(super) struct Proxy<T> {
    pub(super) tables: T,
    pub(super) device: AsyncDevice,
    pub(super) socket: Arc<TunnelSocket>,
    pub(super) counters: Arc<Counters>,
    pub(super) events: mpsc::Sender<Event>,
    pub(super) held: Held<(Origin, Offload)>,
    pub(super) fragments: Fragments,
    pub(super) host: HostFlows,
    /// The TUN device's.
    pub(super) mtu: usize,
    /// Where super-packets are taken apart.
    pub(super) segments: Vec<u8>,
}

impl<T: Projection> Proxy<T> {
    /// Carries packets until the other end of `requests` is gone. What ends it early is the last event.
    pub(super) async fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        if let Err(reason) = self.carry_all(&mut requests).await {
            // Whoever listens learns it also by the closed channel, should this one be full.
            let _ = self.events.try_send(Event::Failed(reason));
        }
    }

    async fn carry_all(&mut self, requests: &mut mpsc::Receiver<Request>) -> Result<(), String> {
        let mut buffer = vec![0; offload::HEADER + PACKET];
        let mut control = TunnelSocket::control_buffer();
        // The first writes rely on readiness that is known only after it was waited for.
        self.device.writable().await.map_err(|error| format!("TUN device: {error}"))?;
        self.socket.writable().await.map_err(|error| format!("tunnel socket: {error}"))?;
        loop {
            let deadline = self.held.next_deadline().into_iter().chain(self.fragments.next_deadline()).min();
            tokio::select! {
                request = requests.recv() => match request {
                    Some(request) => self.answer(request),
                    None => return Ok(()),
                },
                ready = self.device.readable() => {
                    ready.map_err(|error| format!("TUN device: {error}"))?;
                    self.drain_device(&mut buffer).map_err(|error| format!("TUN device: {error}"))?;
                }
                ready = self.socket.readable() => {
                    ready.map_err(|error| format!("tunnel socket: {error}"))?;
                    self.drain_socket(&mut buffer, &mut control);
                }
                () = sleep_until(deadline) => {
                    let now = Instant::now();
                    self.counters.add(Count::Expired, self.held.expire(now));
                    self.counters.add(Count::Fragment, self.fragments.expire(now));
                }
            }
        }
    }

    fn drain_device(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        for _ in 0..BATCH {
            match self.device.try_recv(buffer) {
                Ok(len) => match buffer[..len].split_first_chunk_mut::<{ offload::HEADER }>() {
                    Some((header, packet)) => self.take_in(packet, Offload::decode(*header)),
                    None => self.counters.add(Count::Garbage, 1),
                },
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // EIO: the device is down, which may pass. Anything else: it is gone.
                Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A packet from the TUN device: of an instance, or of the host itself.
    pub(super) fn take_in(&mut self, packet: &mut [u8], offload: Offload) {
        if !source(packet).is_some_and(|source| self.host.is_own(&source)) {
            return self.carry(packet, Origin::Instance, offload);
        }
        if icmp::reports(packet) {
            return self.carry_error(packet, Origin::Host);
        }
        if is_fragment(packet) {
            return self.join(packet, Origin::Host);
        }
        match self.host.lend(packet, &offload, now()) {
            Some(()) => self.carry(packet, Origin::Host, offload),
            None => self.counters.add(Count::Host, 1),
        }
    }

    fn drain_socket(&mut self, buffer: &mut [u8], control: &mut [u8]) {
        for _ in 0..BATCH {
            match self.socket.try_recv(buffer, control) {
                Ok(Received { len: 0, .. }) => self.counters.add(Count::Garbage, 1),
                Ok(Received { len, stride, from }) => self.receive(&mut buffer[..len], stride, from),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // An ICMP error for something sent earlier; the socket is as good as before.
                Err(_) => {}
            }
        }
    }

    /// Takes in datagrams of one sender. What the kernel would merge is merged: it costs the TUN device and everything behind it no more
    /// than one packet.
    fn receive(&mut self, mut datagrams: &mut [u8], stride: usize, from: SocketAddr) {
        while !datagrams.is_empty() {
            let (count, offload) = match datagrams.len() > stride {
                true => offload::run(datagrams.chunks(stride).take(RUN)),
                false => (1, Offload::default()),
            };
            let (now, later) = datagrams.split_at_mut((count * stride).min(datagrams.len()));
            match count {
                1 => self.receive_one(now, from),
                _ => self.receive_run(now, stride, from, &offload),
            }
            datagrams = later;
        }
    }

    fn receive_one(&mut self, datagram: &mut [u8], from: SocketAddr) {
        match datagram.first().map(|byte| byte >> 4) {
            Some(4 | 6) => match whole(datagram) {
                Some(packet) => {
                    let offload = Offload::received(packet, self.mtu);
                    self.carry(packet, Origin::Node(from.ip().into()), offload);
                }
                None => self.counters.add(Count::Garbage, 1),
            },
            Some(_) if datagram.len() <= CONTROL => {
                if self.events.try_send(Event::Control { from, payload: datagram.to_vec() }).is_err() {
                    self.counters.add(Count::Control, 1);
                }
            }
            _ => self.counters.add(Count::Garbage, 1),
        }
    }

    /// Several packets of one connection, as one. Only the first goes through the law: it decides by what they have in common.
    fn receive_run(&mut self, packets: &mut [u8], stride: usize, from: SocketAddr, offload: &Offload) {
        let (first, rest) = packets.split_at_mut(stride);
        let outer = from.ip().into();
        let verdict = inbound(&mut PacketFrame::new(first, &Offload::default()), &mut self.tables, &outer);
        if !matches!(verdict, Ok(Verdict::Local { .. })) {
            // Nothing was rewritten; each is held or dropped, and counted, on its own.
            for packet in packets.chunks_mut(stride) {
                self.carry(packet, Origin::Node(outer), Offload::default());
            }
            return;
        }
        let repeated = offload::repeated(offload);
        let count = 1 + rest.len().div_ceil(stride);
        let header = offload.encode();
        let mut slices = [IoSlice::new(&[]); RUN + 1];
        let mut payload = 0;
        let mut push = false;
        for (slice, packet) in slices[2..].iter_mut().zip(rest.chunks(stride)) {
            let data = packet.get(repeated..).unwrap_or_default();
            *slice = IoSlice::new(data);
            payload += data.len();
            push |= offload::pushes(packet, offload);
        }
        offload::lead(first, offload, payload, push);
        slices[0] = IoSlice::new(&header);
        slices[1] = IoSlice::new(first);
        let written = self.device.try_send_vectored(&slices[..=count]).is_ok();
        self.counters.add(if written { Count::Received } else { Count::Write }, count as u64);
    }

    /// Decides over a packet and does what was decided.
    pub(super) fn carry(&mut self, packet: &mut [u8], origin: Origin, offload: Offload) {
        let lent = if matches!(origin, Origin::Host) { host::key(packet) } else { None };
        let mut frame = PacketFrame::new(packet, &offload);
        let verdict = match origin {
            Origin::Instance | Origin::Host => outbound(&mut frame, &mut self.tables, 0),
            Origin::Node(outer) => inbound(&mut frame, &mut self.tables, &outer),
        };
        if let (Some((key, closes)), Ok(Verdict::Send { .. } | Verdict::Local { .. })) = (lent, &verdict) {
            host::mark(&mut self.tables, &key, closes);
        }
        match verdict {
            Ok(Verdict::Send { peer }) => self.send(packet, peer, &offload),
            Ok(Verdict::Local { .. }) => self.deliver(packet, origin, &offload),
            Ok(Verdict::Slow(Miss::Service)) => self.hold(destination(packet), packet, origin, offload),
            Ok(Verdict::Slow(Miss::Endpoint | Miss::Source)) => self.hold(source(packet), packet, origin, offload),
            Ok(Verdict::Slow(Miss::Fragment)) => self.join(packet, origin),
            Ok(Verdict::Slow(Miss::Header)) => self.counters.add(Count::Header, 1),
            Ok(Verdict::Slow(Miss::Host)) => match self.host.give_back(packet, &offload, now()) {
                Some(()) => self.deliver(packet, origin, &offload),
                None => self.counters.add(Count::Host, 1),
            },
            Ok(Verdict::Slow(Miss::Error)) => self.carry_error(packet, origin),
            // Asked only of the kernel; from here every underlay is reached.
            Ok(Verdict::Slow(Miss::Underlay)) => self.counters.add(Count::Send, 1),
            Ok(Verdict::Pass) => self.counters.add(Count::NotService, 1),
            Err(reason) => self.counters.dropped(reason),
        }
    }

    pub(super) fn send(&mut self, packet: &mut [u8], peer: u32, offload: &Offload) {
        let Some(peer) = self.tables.peer(peer) else {
            return self.counters.add(Count::Send, 1);
        };
        let (sent, refused) = if offload.many() {
            match offload.split(packet, &mut self.segments) {
                Some(stride) => self.socket.try_send_many(&self.segments, stride, &peer),
                None => return self.counters.add(Count::Header, 1),
            }
        } else {
            let ready = !offload.partial() || offload.complete(packet).is_some();
            let sent = ready && self.socket.try_send(packet, &peer).is_ok();
            (u64::from(sent), u64::from(!sent))
        };
        self.counters.add(Count::Sent, sent);
        self.counters.add(Count::Send, refused);
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
        self.device.try_send_vectored(&[IoSlice::new(&offload.encode()), IoSlice::new(packet)]).is_ok()
    }

    pub(super) fn hold(&mut self, address: Option<Addr>, packet: &[u8], origin: Origin, offload: Offload) {
        let Some(address) = address else {
            return self.counters.add(Count::Garbage, 1);
        };
        let (outcome, crowded_out) = self.held.hold(address, (origin, offload), packet, Instant::now());
        self.counters.add(Count::HeldFull, crowded_out);
        match outcome {
            Outcome::Ask => {
                self.counters.add(Count::Held, 1);
                self.ask(address, origin);
            }
            Outcome::Waits => self.counters.add(Count::Held, 1),
            Outcome::GivenUp => self.counters.add(Count::GivenUp, 1),
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

    fn answer(&mut self, request: Request) {
        match request {
            Request::Apply(delta, reply) => {
                let done = self.tables.apply(&delta);
                self.host.observe(&delta, false);
                let _ = reply.send(done);
                self.resume(&delta);
            }
            Request::Reconcile(full, reply) => {
                let done = self.tables.reconcile(&full);
                self.host.observe(&full, true);
                let _ = reply.send(done);
                self.resume(&full);
            }
            Request::Snapshot(reply) => drop(reply.send(self.tables.snapshot())),
            Request::Flows(reply) => drop(reply.send(self.tables.flow_rows())),
            Request::Choices(slots, reply) => {
                drop(reply.send(slots.into_iter().map(|slot| self.tables.choices(slot)).collect()));
            }
            Request::GiveUp(address) => {
                let dropped = self.held.give_up(address, Instant::now());
                self.counters.add(Count::GivenUp, dropped);
            }
        }
    }

    /// Lets what waited for the rows of this change run through the law again.
    fn resume(&mut self, delta: &TableDelta) {
        let services = delta.services.iter().map(|(address, ..)| address);
        let endpoints = delta.endpoints.iter().map(|(address, _)| address);
        for address in services.chain(endpoints) {
            let packets: VecDeque<Packet<(Origin, Offload)>> = self.held.release(address);
            for mut packet in packets {
                let (origin, offload) = packet.origin;
                self.carry(&mut packet.bytes, origin, offload);
            }
        }
    }
}

/// The packet as long as its header says; `None` where there is less of it, or no header.
fn whole(bytes: &mut [u8]) -> Option<&mut [u8]> {
    let field = |at: usize| Some(usize::from(u16::from_be_bytes([*bytes.get(at)?, *bytes.get(at + 1)?])));
    let len = match bytes.first()? >> 4 {
        4 => field(2)?,
        6 => 40 + field(4)?,
        _ => return None,
    };
    bytes.get_mut(..len).filter(|packet| !packet.is_empty())
}

pub(super) fn source(packet: &[u8]) -> Option<Addr> {
    address(packet, 12, 8)
}

fn destination(packet: &[u8]) -> Option<Addr> {
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

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => pending().await,
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
