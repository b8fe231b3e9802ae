//! The slow path, seen from outside: a TUN device, to which the kernel routes service addresses, the tunnel's socket, and the thread that
//! carries between them. The whole datapath where there is no eBPF.

use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use netmanager_common::abi::{Flow, FlowKey};
use netmanager_common::addr::Addr;
use tokio::sync::{Mutex, mpsc, oneshot};

use super::any::AnyTables;
use super::batch::Batch;
use super::carry::Carrier;
use super::counters::{Count, Counters};
use super::device::TunDevice;
use super::ebpf::BpfTables;
use super::fragments::Fragments;
use super::held::Held;
use super::host::HostFlows;
use super::probe::ProbeSockets;
use super::proxy::{Bell, Proxy, Request};
use super::refusal::Limit;
use super::socket::TunnelSocket;
use super::tables::{MemoryTables, Rows};
use super::{DatapathError, Event, FlowRow, Snapshot, TableDelta, Tally, Underlay};
use crate::notify::FdStore;

/// Requests that may wait for the proxy.
const REQUESTS: usize = 64;
/// Names of what the service manager keeps.
pub(super) const KEPT_DEVICE: &str = "tun";
pub(super) const KEPT_TUNNEL: &str = "tunnel";
pub(super) const KEPT_FRAMED: &str = "framed";
/// Events that may wait for whoever listens.
const EVENTS: usize = 1024;

/// A running proxy, seen from outside.
#[derive(Debug)]
pub(super) struct Proxied {
    /// `None` at its end.
    requests: Option<mpsc::Sender<Request>>,
    bell: Arc<Bell>,
    events: Mutex<mpsc::Receiver<Event>>,
    socket: Arc<TunnelSocket>,
    probes: ProbeSockets,
    counters: Arc<Counters>,
    thread: Option<JoinHandle<()>>,
    /// Of the TUN device.
    ifindex: u32,
}

/// What the proxy reads. Packets wait in it from the moment that it is open, as many as the kernel's queues take.
pub(super) struct Ends {
    device: TunDevice,
    socket: TunnelSocket,
}

impl Ends {
    /// What an earlier run read from, where it was kept and is as wanted; else made anew, and kept from here on.
    ///
    /// # Errors
    /// `Unsupported` where there is no TUN driver or no permission for it.
    pub(super) fn open(underlay: &Underlay, kept: &FdStore) -> Result<Self, DatapathError> {
        let adopted = |fd| TunDevice::adopt(fd, underlay).map_err(|error| error.to_string());
        let device = match taken(kept, KEPT_DEVICE, adopted) {
            Some(device) => device,
            None => {
                let device = TunDevice::open(underlay)?;
                kept.keep(KEPT_DEVICE, device.as_fd());
                device
            }
        };
        // Single datagrams as long as nobody knows who reads them first.
        Ok(Self { device, socket: kept_socket(kept, KEPT_TUNNEL, underlay.tunnel_port, false)? })
    }
}

/// A socket at this port that an earlier run has left under the name; else a new one, kept from here on.
pub(super) fn kept_socket(kept: &FdStore, name: &str, port: u16, merged: bool) -> Result<TunnelSocket, DatapathError> {
    let adopted = |fd| TunnelSocket::adopt(fd, port, merged).map_err(|error| error.to_string());
    if let Some(socket) = taken(kept, name, adopted) {
        return Ok(socket);
    }
    let socket = TunnelSocket::open(port, merged)?;
    kept.keep(name, socket.as_fd());
    Ok(socket)
}

/// What was kept, if it is of use; if not, it is kept no longer.
fn taken<T>(kept: &FdStore, name: &str, adopt: impl FnOnce(OwnedFd) -> Result<T, String>) -> Option<T> {
    match adopt(kept.take(name)?) {
        Ok(adopted) => {
            tracing::info!(name, "goes on with what the service manager has kept; what came meanwhile waits in it");
            Some(adopted)
        }
        Err(reason) => {
            tracing::info!(name, reason, "what the service manager has kept is of no use");
            kept.forget(name);
            None
        }
    }
}

impl Proxied {
    /// Begins to carry, by what waits already.
    ///
    /// # Errors
    /// The proxy's own sockets cannot be made.
    pub(super) fn open(underlay: &Underlay, ends: Ends, tables: AnyTables) -> Result<Self, DatapathError> {
        let Ends { device, socket } = ends;
        // Not where a program at the uplink reads datagrams first.
        socket.merge(matches!(tables, AnyTables::Memory { .. }));
        let ifindex = device.ifindex();
        let socket = Arc::new(socket);
        let counters = Arc::new(Counters::default());
        let (requests, inbox) = mpsc::channel(REQUESTS);
        let (events, outbox) = mpsc::channel(EVENTS);
        let carrier = Carrier {
            tables,
            device,
            socket: socket.clone(),
            counters: counters.clone(),
            events,
            held: Held::default(),
            fragments: Fragments::default(),
            host: HostFlows::new([Addr::v4(underlay.tun_v4.octets()), Addr::v6(underlay.tun_v6.octets())]),
            mtu: underlay.mtu as usize,
            batch: Batch::default(),
            lone: Batch::default(),
            refusals: Limit::default(),
        };
        let probes = ProbeSockets::open().map_err(|error| step("open the sockets for probes", &error))?;
        let bell = Arc::new(Bell::new().map_err(|error| step("make the packet proxy's bell", &error))?);
        let proxy = Proxy::new(carrier, inbox, bell.clone());
        let proxy = proxy.map_err(|error| step("wait for packets", &error.into()))?;
        let thread = thread::Builder::new().name("packets".into()).spawn(move || proxy.run());
        let thread = thread.map_err(|error| step("start the packet proxy", &error))?;
        Ok(Self {
            requests: Some(requests),
            bell,
            events: Mutex::new(outbox),
            socket,
            probes,
            counters,
            thread: Some(thread),
            ifindex,
        })
    }

    pub(super) fn ifindex(&self) -> u32 {
        self.ifindex
    }

    pub(super) async fn apply(&self, delta: TableDelta) -> Result<(), DatapathError> {
        self.ask(|reply| Request::Apply(delta, reply)).await
    }

    pub(super) async fn reconcile(&self, full: TableDelta) -> Result<(), DatapathError> {
        self.ask(|reply| Request::Reconcile(full, reply)).await
    }

    pub(super) async fn snapshot(&self) -> Result<Snapshot, DatapathError> {
        self.ask(Request::Snapshot).await
    }

    pub(super) async fn flows(&self) -> Result<Vec<FlowRow>, DatapathError> {
        self.ask(Request::Flows).await
    }

    pub(super) async fn tallies(&self, slots: Vec<u32>) -> Vec<Tally> {
        let (reply, answer) = oneshot::channel();
        // A proxy that has ended has chosen nobody.
        self.send(Request::Tallies(slots, reply)).await;
        answer.await.unwrap_or_default()
    }

    pub(super) async fn give_up(&self, address: Addr) {
        // A proxy that has ended holds nothing.
        self.send(Request::GiveUp(address)).await;
    }

    /// Takes framed packets by this socket, or no more.
    pub(super) async fn frame(&self, socket: Option<TunnelSocket>) -> Result<(), DatapathError> {
        self.told(|reply| Request::Frame(socket, reply)).await
    }

    /// All rows of tables in memory; [`Self::to_kernel`] brings what comes later.
    pub(super) async fn copy(&self) -> Result<(Rows, Vec<(FlowKey, Flow)>), DatapathError> {
        self.told(Request::Copy).await
    }

    /// Goes on over the kernel's maps.
    pub(super) async fn to_kernel(&self, tables: BpfTables) -> Result<(), DatapathError> {
        self.ask(|reply| Request::ToKernel(Box::new(tables), reply)).await
    }

    /// Goes on over tables in memory, and over the maps where those lack a flow, until [`Self::settled`].
    pub(super) async fn to_memory(&self, tables: MemoryTables) -> Result<(), DatapathError> {
        self.told(|reply| Request::ToMemory(Box::new(tables), reply)).await
    }

    pub(super) async fn adopt(&self, flows: Vec<(FlowKey, Flow)>) {
        self.send(Request::Adopt(flows)).await;
    }

    pub(super) async fn settled(&self) -> Result<(), DatapathError> {
        self.told(Request::Settled).await
    }

    pub(super) async fn event(&self) -> Event {
        self.events.lock().await.recv().await.unwrap_or_else(|| Event::Failed("the packet proxy has ended".into()))
    }

    pub(super) async fn send_control(&self, to: SocketAddr, payload: &[u8]) -> Result<(), DatapathError> {
        self.socket.send(payload, to).map_err(|error| step("send control datagram", &error))
    }

    pub(super) async fn send_whole(&self, to: SocketAddr, payload: &[u8]) -> Result<(), DatapathError> {
        self.probes.send(payload, to).map_err(|error| step("send probe", &error))
    }

    /// Whatever the proxy does with a packet it counts.
    pub(super) fn bustle(&self) -> u64 {
        self.counters.sum()
    }

    pub(super) fn sent(&self) -> u64 {
        // What was too long has found that the path is narrow, or that it was.
        self.counters.count(Count::Sent) + self.counters.count(Count::TooLong)
    }

    pub(super) fn counters(&self) -> Vec<(String, u64)> {
        self.counters.read()
    }

    async fn ask<R>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<R, DatapathError>>) -> Request,
    ) -> Result<R, DatapathError> {
        self.told(request).await?
    }

    async fn told<R>(&self, request: impl FnOnce(oneshot::Sender<R>) -> Request) -> Result<R, DatapathError> {
        let ended = |_| DatapathError::Step { step: "ask the packet proxy", reason: "it has ended".into() };
        let (reply, answer) = oneshot::channel();
        self.send(request(reply)).await;
        answer.await.map_err(ended)
    }

    /// A proxy that has ended drops the request, and with it the answer.
    async fn send(&self, request: Request) {
        if let Some(requests) = &self.requests {
            let _ = requests.send(request).await;
            self.bell.ring();
        }
    }
}

impl Drop for Proxied {
    /// Device and port are free again when it returns.
    fn drop(&mut self) {
        self.requests = None;
        self.bell.ring();
        if let Some(thread) = self.thread.take() {
            // It has told its panic already.
            let _ = thread.join();
        }
    }
}

fn step(step: &'static str, error: &std::io::Error) -> DatapathError {
    DatapathError::Step { step, reason: error.to_string() }
}
