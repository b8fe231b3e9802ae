//! The slow path's own thread: reads the TUN device and the tunnel socket, and has each packet carried by the tables that it owns. The
//! whole of the TUN datapath, and what the eBPF datapath leaves to user space.
//!
//! A thread and not a task: a packet's way through a reactor costs more system calls than the packet.

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use netmanager_common::abi::{Flow, FlowKey};
use netmanager_common::addr::Addr;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{mpsc, oneshot};

use super::any::AnyTables;
use super::carry::Carrier;
use super::counters::Count;
use super::ebpf::BpfTables;
use super::offload::{self, Offload};
use super::projection::Projection;
use super::socket::{Received, TunnelSocket};
use super::tables::{MemoryTables, Rows};
use super::{DatapathError, Event, FlowRow, Snapshot, TableDelta, Tally};

/// Packets taken from one side before the other gets its turn.
const BATCH: usize = 64;
/// The largest packet there is.
const PACKET: usize = 65_535;
/// What is read from the TUN device before it is sent on: several super-packets, or very many small packets.
const BUFFER: usize = 4 * (offload::HEADER + PACKET);

/// What the proxy is asked from outside.
#[derive(Debug)]
pub(super) enum Request {
    Apply(TableDelta, oneshot::Sender<Result<(), DatapathError>>),
    Reconcile(TableDelta, oneshot::Sender<Result<(), DatapathError>>),
    Snapshot(oneshot::Sender<Result<Snapshot, DatapathError>>),
    Flows(oneshot::Sender<Result<Vec<FlowRow>, DatapathError>>),
    Tallies(Vec<u32>, oneshot::Sender<Vec<Tally>>),
    GiveUp(Addr),
    /// Takes framed packets from this socket, or no more.
    Frame(Option<TunnelSocket>, oneshot::Sender<()>),
    /// All rows, of tables in memory; which flows come from then on is noted.
    Copy(oneshot::Sender<(Rows, Vec<(FlowKey, Flow)>)>),
    /// Goes on over the kernel's maps, with what has come since the copy.
    ToKernel(Box<BpfTables>, oneshot::Sender<Result<(), DatapathError>>),
    /// Goes on over tables in memory; flows that are not there are looked for in the maps, until [`Request::Settled`].
    ToMemory(Box<MemoryTables>, oneshot::Sender<()>),
    Adopt(Vec<(FlowKey, Flow)>),
    Settled(oneshot::Sender<()>),
}

/// Says to the thread that there are requests, or that nobody is left to make any.
#[derive(Debug)]
pub(super) struct Bell(EventFd);

impl Bell {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?))
    }

    pub(super) fn ring(&self) {
        // Full: it rings already.
        let _ = self.0.write(1);
    }

    fn quiet(&self) {
        let _ = self.0.read();
    }
}

/// What the thread waits for.
const DEVICE: u64 = 0;
const SOCKET: u64 = 1;
const BELL: u64 = 2;
const FRAMED: u64 = 3;

pub(super) struct Proxy {
    carrier: Carrier<AnyTables>,
    /// For framed packets, where no kernel program takes them.
    framed: Option<TunnelSocket>,
    poll: Epoll,
    requests: mpsc::Receiver<Request>,
    bell: Arc<Bell>,
    /// What was read from the TUN device, until it is sent.
    outgoing: Vec<u8>,
    incoming: Vec<u8>,
    control: Vec<u8>,
}

impl Proxy {
    pub(super) fn new(
        carrier: Carrier<AnyTables>,
        requests: mpsc::Receiver<Request>,
        bell: Arc<Bell>,
    ) -> nix::Result<Self> {
        let poll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        poll.add(&carrier.device, readable(DEVICE))?;
        poll.add(carrier.socket.as_fd(), readable(SOCKET))?;
        poll.add(bell.0.as_fd(), readable(BELL))?;
        Ok(Self {
            carrier,
            framed: None,
            poll,
            requests,
            bell,
            outgoing: vec![0; BUFFER],
            incoming: vec![0; PACKET],
            control: TunnelSocket::control_buffer(),
        })
    }

    /// Carries packets until the other end of `requests` is gone. What ends it early is the last event.
    pub(super) fn run(mut self) {
        if let Err(reason) = self.carry_all() {
            // Whoever listens learns it also by the closed channel, should this one be full.
            let _ = self.carrier.events.try_send(Event::Failed(reason));
        }
    }

    fn carry_all(&mut self) -> Result<(), String> {
        let mut ready = [EpollEvent::empty(); 4];
        loop {
            let deadline = self.carrier.next_deadline();
            let count = match self.poll.wait(&mut ready, until(deadline)) {
                Err(nix::errno::Errno::EINTR) => 0,
                other => other.map_err(|error| format!("epoll: {error}"))?,
            };
            for event in &ready[..count] {
                match event.data() {
                    DEVICE => self.drain_device().map_err(|error| format!("TUN device: {error}"))?,
                    SOCKET => drop(self.drain_socket(false)),
                    FRAMED => drop(self.drain_socket(true)),
                    _ => {
                        if !self.answer_all() {
                            return Ok(());
                        }
                    }
                }
            }
            if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
                self.carrier.expire(Instant::now());
            }
        }
    }

    fn drain_device(&mut self) -> io::Result<()> {
        let mut begin = 0;
        let mut result = Ok(());
        for _ in 0..BATCH {
            if self.outgoing.len() - begin < offload::HEADER + PACKET {
                self.carrier.flush(&self.outgoing);
                begin = 0;
            }
            match self.carrier.device.recv(&mut self.outgoing[begin..]) {
                Ok(len) => match self.outgoing[begin..begin + len].first_chunk::<{ offload::HEADER }>() {
                    Some(header) => {
                        let offload = Offload::decode(*header);
                        if self.carrier.take_in(&mut self.outgoing, begin + offload::HEADER..begin + len, &offload) {
                            begin += len;
                        }
                    }
                    None => self.carrier.counters.add(Count::Garbage, 1),
                },
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // EIO: the device is down, which may pass. Anything else: it is gone.
                Err(error) if error.raw_os_error() == Some(libc::EIO) => break,
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        self.carrier.flush(&self.outgoing);
        result
    }

    /// False where nothing is left.
    fn drain_socket(&mut self, framed: bool) -> bool {
        for _ in 0..BATCH {
            let socket = if framed { self.framed.as_ref() } else { Some(&*self.carrier.socket) };
            let Some(socket) = socket else { return false };
            match socket.try_recv(&mut self.incoming, &mut self.control) {
                Ok(Received { len: 0, .. }) => self.carrier.counters.add(Count::Garbage, 1),
                Ok(Received { len, stride, from }) => {
                    self.carrier.receive(&mut self.incoming[..len], stride, from, framed);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
                // An ICMP error for something sent earlier; the socket is as good as before.
                Err(_) => {}
            }
        }
        true
    }

    /// False where nobody is left to ask.
    fn answer_all(&mut self) -> bool {
        self.bell.quiet();
        loop {
            match self.requests.try_recv() {
                Ok(request) => self.answer(request),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn answer(&mut self, request: Request) {
        match request {
            Request::Apply(delta, reply) => {
                let done = self.carrier.tables.apply(&delta);
                self.carrier.host.observe(&delta, false);
                let _ = reply.send(done);
                self.carrier.resume(&delta);
            }
            Request::Reconcile(full, reply) => {
                let done = self.carrier.tables.reconcile(&full);
                self.carrier.host.observe(&full, true);
                let _ = reply.send(done);
                self.carrier.resume(&full);
            }
            Request::Snapshot(reply) => drop(reply.send(self.carrier.tables.snapshot())),
            Request::Flows(reply) => drop(reply.send(self.carrier.tables.flow_rows())),
            Request::Tallies(slots, reply) => {
                drop(reply.send(slots.into_iter().map(|slot| self.carrier.tables.tally(slot)).collect()));
            }
            Request::GiveUp(address) => {
                self.carrier.give_up(address);
            }
            Request::Frame(socket, reply) => {
                self.frame(socket);
                let _ = reply.send(());
            }
            Request::Copy(reply) => {
                if let AnyTables::Memory { own, .. } = &mut self.carrier.tables {
                    own.flows_mut().note_news();
                    let _ = reply.send((own.rows(), own.flows().iter().collect()));
                }
            }
            Request::ToKernel(tables, reply) => drop(reply.send(self.move_to_kernel(tables))),
            Request::ToMemory(own, reply) => {
                let before = std::mem::replace(&mut self.carrier.tables, AnyTables::memory(*own));
                if let (AnyTables::Kernel(maps), AnyTables::Memory { earlier, .. }) = (before, &mut self.carrier.tables)
                {
                    *earlier = Some(maps);
                }
                self.carrier.socket.merge(true);
                let _ = reply.send(());
            }
            Request::Adopt(flows) => {
                if let AnyTables::Memory { own, .. } = &mut self.carrier.tables {
                    flows.into_iter().for_each(|(key, flow)| own.flows_mut().adopt(key, flow));
                }
            }
            Request::Settled(reply) => {
                if let AnyTables::Memory { earlier, .. } = &mut self.carrier.tables {
                    *earlier = None;
                }
                let _ = reply.send(());
            }
        }
    }

    fn frame(&mut self, socket: Option<TunnelSocket>) {
        // What has come would go with the socket; programs take what comes from now on.
        (0..BATCH).find(|_| !self.drain_socket(true));
        if let Some(before) = self.framed.take() {
            // Closing it would do the same; a descriptor that is shared by mistake would not.
            let _ = self.poll.delete(before.as_fd());
        }
        if let Some(socket) = socket
            && self.poll.add(socket.as_fd(), readable(FRAMED)).is_ok()
        {
            self.framed = Some(socket);
        }
    }

    fn move_to_kernel(&mut self, mut tables: Box<BpfTables>) -> Result<(), DatapathError> {
        if let AnyTables::Memory { own, .. } = &mut self.carrier.tables {
            own.flows_mut().news().iter().try_for_each(|(key, flow)| tables.adopt(key, flow))?;
        }
        self.carrier.socket.merge(false);
        self.carrier.tables = AnyTables::Kernel(tables);
        Ok(())
    }
}

fn readable(data: u64) -> EpollEvent {
    EpollEvent::new(EpollFlags::EPOLLIN, data)
}

/// Rounded up, so that what is due is over.
fn until(deadline: Option<Instant>) -> EpollTimeout {
    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
    left.and_then(|left| EpollTimeout::try_from(left).ok()).unwrap_or(EpollTimeout::NONE)
}
