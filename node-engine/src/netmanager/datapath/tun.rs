//! The slow path, seen from outside: a TUN device, to which the kernel routes service addresses, the tunnel's socket, and the thread that
//! carries between them. The whole datapath where there is no eBPF.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use netmanager_common::abi::{Flow, FlowKey};
use netmanager_common::addr::Addr;
use tokio::sync::{Mutex, mpsc, oneshot};
use tun_rs::{DeviceBuilder, SyncDevice};

use super::any::AnyTables;
use super::batch::Batch;
use super::carry::Carrier;
use super::counters::{Count, Counters};
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

/// Requests that may wait for the proxy.
const REQUESTS: usize = 64;
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
    device: SyncDevice,
    socket: TunnelSocket,
}

impl Ends {
    /// Makes or adopts the TUN device, and binds the tunnel's port.
    ///
    /// # Errors
    /// `Unsupported` where there is no TUN driver or no permission for it.
    pub(super) fn open(underlay: &Underlay) -> Result<Self, DatapathError> {
        let device = open_device(underlay)?;
        // Single datagrams as long as nobody knows who reads them first.
        Ok(Self { device, socket: TunnelSocket::open(underlay.tunnel_port, false)? })
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
        let ifindex = device.if_index().map_err(|error| step("find TUN device", &error))?;
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

/// Makes the device, or takes over the one of an earlier run: it is persistent, so that its index, addresses and routes outlive the
/// process and a restart is a matter of opening it.
fn open_device(underlay: &Underlay) -> Result<SyncDevice, DatapathError> {
    let mtu = u16::try_from(underlay.mtu).map_err(|_| DatapathError::Step {
        step: "make TUN device",
        reason: format!("MTU {} is too large", underlay.mtu),
    })?;
    let builder = DeviceBuilder::new().name(&underlay.tun_name).mtu(mtu).enable(true).with(|options| {
        options.offload(true);
    });
    let device = builder.build_sync().map_err(|error| DatapathError::Unsupported {
        what: "make TUN device",
        reason: match error.raw_os_error() {
            _ if !Path::new("/dev/net/tun").exists() => "/dev/net/tun is missing: load the kernel module tun".into(),
            Some(libc::EPERM) => "not permitted: CAP_NET_ADMIN is needed".into(),
            Some(libc::EBUSY) => format!("{} is in use by another process", underlay.tun_name),
            _ => format!("{}: {error}", underlay.tun_name),
        },
    })?;
    device.persist().map_err(|error| step("keep TUN device", &error))?;
    device.set_nonblocking(true).map_err(|error| step("read TUN device without waiting", &error))?;
    Ok(device)
}

fn step(step: &'static str, error: &std::io::Error) -> DatapathError {
    DatapathError::Step { step, reason: error.to_string() }
}
