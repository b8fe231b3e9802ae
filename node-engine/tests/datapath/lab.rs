//! Two nodes joined by a wire, each with a bridge and two instances, all of them network namespaces; on each node a real datapath.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::pin::Pin;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use netmanager_common::abi::{Config, Endpoint, Mac, Peer, Service, Slot};
use netmanager_common::addr::Addr;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt};
use node_engine::config::{DatapathChoice, XdpChoice};
use node_engine::netmanager::datapath::{
    Capacity, Chosen, Datapath, Event, Port, TableDelta, Underlay, choose, uninstall,
};
use node_engine::netns::{self, Netns};
use tokio::sync::{mpsc, oneshot};

pub const TUNNEL_PORT: u16 = 50_103;
pub const MTU: u32 = 1450;
pub const PATIENCE: Duration = Duration::from_secs(10);
const WIRE: &str = "wire";
const BRIDGE: &str = "bridge";
const TUN: &str = "tun";
const FRAMING: &str = "framing";

/// Policies of `netmanager_common::abi`, where the tests name them.
pub use netmanager_common::abi::{POLICY_ANY, POLICY_INSTANCE};

/// An instance: where it is and what it is called.
pub struct Instance {
    pub netns: Netns,
    name: String,
    pub namespace: [IpAddr; 2],
    pub instance: [IpAddr; 2],
    port: Port,
    mac: [u8; 6],
}

impl Instance {
    /// Runs `f` inside the instance's namespace.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        self.netns.run(f).expect("enter an instance's namespace")
    }
}

type Job = Box<dyn FnOnce(Arc<dyn Datapath>) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

/// A node. Its datapath runs on a thread of its own, inside its namespace.
pub struct Node {
    pub name: String,
    pub address: IpAddr,
    pub instances: Vec<Instance>,
    pub underlay: Underlay,
    gateway_mac: [u8; 6],
    running: Option<Running>,
}

struct Running {
    jobs: mpsc::Sender<Job>,
    thread: JoinHandle<()>,
}

pub struct Lab {
    pub nodes: [Node; 2],
    /// Where the pins are; goes with the lab.
    _scratch: tempfile::TempDir,
}

impl Lab {
    pub fn new() -> Self {
        Self::with_underlay(["198.18.77.1".parse().unwrap(), "198.18.77.2".parse().unwrap()])
    }

    /// The nodes know each other by these addresses, all of them on the wire.
    pub fn with_underlay(addresses: [IpAddr; 2]) -> Self {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let scratch = tempfile::tempdir().expect("scratch directory");
        let id = format!("dp-{}-{}", std::process::id(), SERIAL.fetch_add(1, Ordering::Relaxed));
        let names = [format!("{id}-a"), format!("{id}-b")];
        for name in &names {
            netns::ensure(name).expect("a node's namespace: are you root?");
        }
        ip(&["-n", &names[0], "link", "add", WIRE, "type", "veth", "peer", "name", WIRE, "netns", &names[1]]);
        let [a, b] = &names;
        let nodes = [Node::build(a, 0, addresses[0], scratch.path()), Node::build(b, 1, addresses[1], scratch.path())];
        Self { nodes, _scratch: scratch }
    }

    /// Starts the datapaths and brings everything but services into their tables.
    pub async fn start(&mut self, choice: DatapathChoice) {
        self.start_each([choice; 2]).await;
    }

    pub async fn start_each(&mut self, choices: [DatapathChoice; 2]) {
        for (index, choice) in choices.into_iter().enumerate() {
            self.nodes[index].start(choice).await;
            let delta = self.base(index);
            self.nodes[index].reconcile(delta).await;
            self.nodes[index].attach_all().await;
        }
    }

    /// Configuration, peers, slots and endpoints of node `index`. Peer 1 is the other node; slots 1 and 2 are the other node's
    /// instances in IPv4, 3 and 4 in IPv6, 5 to 8 its own likewise.
    pub fn base(&self, index: usize) -> TableDelta {
        let (own, other) = (&self.nodes[index], &self.nodes[1 - index]);
        let remote = slots(other, 1, 1);
        let local = slots(own, 5, 0);
        let endpoints = own.instances.iter().flat_map(|instance| {
            (0..2).map(|family| {
                let row = Endpoint {
                    instance: instance.instance[family].into(),
                    ifindex: instance.port.ifindex,
                    mac: instance.mac,
                    account: 0,
                };
                (instance.namespace[family].into(), row)
            })
        });
        TableDelta {
            config: Some(own.config()),
            peers: vec![(
                1,
                Peer {
                    host: other.address.into(),
                    source: own.address.into(),
                    ifindex: own.underlay.uplink_ifindex,
                    port: TUNNEL_PORT.to_be_bytes(),
                    ..Peer::default()
                },
            )],
            slots: remote.into_iter().chain(local).collect(),
            endpoints: endpoints.collect(),
            ..TableDelta::default()
        }
    }

    /// Rows for the instance addresses of both nodes' instances, as node `index` sees them.
    pub fn instance_rows(&self, index: usize) -> TableDelta {
        let mut delta = TableDelta::default();
        for (first, node) in [(1, &self.nodes[1 - index]), (5, &self.nodes[index])] {
            for (number, slot) in slots(node, first, 0) {
                let row = Service { id: 100 + number, epoch: 1, count: 1, policy: POLICY_INSTANCE, first: number };
                delta.services.push((slot.instance, row, vec![number]));
            }
        }
        delta
    }

    /// Both nodes take framed packets and send them to each other.
    pub async fn frame(&self) {
        for node in &self.nodes {
            let port = (TUNNEL_PORT + 1).to_string();
            ip(&["-n", &node.name, "link", "add", FRAMING, "type", "vxlan", "external", "dstport", &port]);
            let device = Port { name: FRAMING.into(), ifindex: link(&node.name, FRAMING).0 };
            node.call(|datapath| async move { datapath.take_framed(&device).await })
                .await
                .expect("take framed packets");
            ip(&["-n", &node.name, "link", "set", FRAMING, "up"]);
        }
        self.frame_peers().await;
    }

    /// As after every change of the peers' rows.
    pub async fn frame_peers(&self) {
        for (index, node) in self.nodes.iter().enumerate() {
            let framed_port = (TUNNEL_PORT + 1).to_be_bytes();
            let TableDelta { config, peers, .. } = self.base(index);
            let config = config.map(|config| Config { framed_port, ..config });
            let peers = peers.into_iter().map(|(number, peer)| (number, Peer { framed_port, ..peer })).collect();
            node.apply(TableDelta { config, peers, ..TableDelta::default() }).await;
        }
    }

    /// Everything node `index` knows where the first instance of the second node is behind these services.
    pub fn full(&self, index: usize, services: [IpAddr; 2]) -> TableDelta {
        let mut full = self.base(index);
        full.services = self.instance_rows(index).services;
        for (id, (address, slot)) in (1..).zip(services.into_iter().zip([1, 3])) {
            // On the second node it is its own instance.
            let slot = if index == 0 { slot } else { slot + 4 };
            full.services.extend(service(address, id, 1, &[slot]).services);
        }
        full
    }
}

/// What a node's wire brings, from now on, as far as the kernel keeps it.
pub struct Sniffer(OwnedFd);

impl Sniffer {
    pub fn new(node: &Node) -> Self {
        let open = || {
            let flags = SockFlag::SOCK_NONBLOCK;
            let sniffer = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll).expect("AF_PACKET");
            setsockopt(&sniffer, sockopt::BindToDevice, &WIRE.into()).expect("bind to the wire");
            sniffer
        };
        Self(node.netns().run(open).expect("enter the node's namespace"))
    }

    /// How many UDP datagrams over IPv4 have come for this port.
    pub fn count(&self, port: u16) -> usize {
        let mut frame = [0; 64];
        let mut count = 0;
        while let Ok(len) = recv(self.0.as_raw_fd(), &mut frame, MsgFlags::MSG_TRUNC) {
            count += usize::from(
                len > 42 && frame[12..14] == [8, 0] && frame[23] == 17 && frame[36..38] == port.to_be_bytes(),
            );
        }
        count
    }
}

impl Sniffer {
    /// Packets in datagrams for the tunnel's port, by whether they are fragments: whole ones, and fragments.
    pub fn inner(&self) -> (usize, usize) {
        let mut frame = [0; 128];
        let (mut whole, mut fragments) = (0, 0);
        while let Ok(len) = recv(self.0.as_raw_fd(), &mut frame, MsgFlags::MSG_TRUNC) {
            let first = frame[20] & 0x1f == 0 && frame[21] == 0;
            let ours = len > 90 && frame[12..14] == [8, 0] && frame[23] == 17 && first;
            if ours && frame[36..38] == TUNNEL_PORT.to_be_bytes() {
                let inner = &frame[42..];
                let fragment = if inner[0] >> 4 == 4 { inner[6] & 0x3f != 0 || inner[7] != 0 } else { inner[6] == 44 };
                *(if fragment { &mut fragments } else { &mut whole }) += 1;
            }
        }
        (whole, fragments)
    }
}

/// A service row over these slots.
pub fn service(address: IpAddr, id: u32, epoch: u32, slots: &[u32]) -> TableDelta {
    let row = Service {
        id,
        epoch,
        count: slots.len() as u32,
        policy: POLICY_ANY,
        first: slots.first().copied().unwrap_or(0),
    };
    TableDelta { services: vec![(address.into(), row, slots.to_vec())], ..TableDelta::default() }
}

fn slots(node: &Node, first: u32, peer: u32) -> Vec<(u32, Slot)> {
    let by_family = (0..2).flat_map(|family| node.instances.iter().map(move |instance| (instance, family)));
    let rows = by_family.map(|(instance, family)| Slot {
        generation: 1,
        peer,
        namespace: instance.namespace[family].into(),
        instance: instance.instance[family].into(),
    });
    (first..).zip(rows).collect()
}

impl Drop for Lab {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            if let Some(running) = node.running.take() {
                drop(running.jobs);
                let _ = running.thread.join();
            }
            let errors = Netns::open(&Path::new(netns::NAMED).join(&node.name))
                .and_then(|netns| netns.run(|| uninstall(&node.underlay.pin_dir)));
            if !thread::panicking() {
                let errors = errors.expect("enter the node's namespace");
                assert!(errors.is_empty(), "uninstall has left something: {errors:?}");
            }
            for instance in &node.instances {
                let _ = netns::remove(&instance.name);
            }
            let _ = netns::remove(&node.name);
        }
    }
}

impl Node {
    fn build(name: &str, number: u8, address: IpAddr, scratch: &Path) -> Self {
        let netns = Netns::open(&Path::new(netns::NAMED).join(name)).expect("the node's namespace");
        netns.run(forward).expect("enter a node's namespace");
        let at = |args: &[&str]| ip(&[&["-n", name], args].concat());
        let prefix = if address.is_ipv4() { 24 } else { 64 };
        at(&["link", "set", "lo", "up"]);
        at(&["addr", "add", &format!("{address}/{prefix}"), "dev", WIRE]);
        at(&["link", "set", WIRE, "up"]);
        at(&["link", "add", BRIDGE, "mtu", &MTU.to_string(), "type", "bridge"]);
        let gateway = [Ipv4Addr::new(10, 18, number, 1).to_string(), format!("fc00::{number}:1")];
        at(&["addr", "add", &format!("{}/24", gateway[0]), "dev", BRIDGE]);
        at(&["addr", "add", &format!("{}/112", gateway[1]), "dev", BRIDGE, "nodad"]);
        at(&["link", "set", BRIDGE, "up"]);

        let instances = (1..3).map(|i| connect(name, &gateway, number, i)).collect();
        let (uplink_ifindex, _) = link(name, WIRE);
        let underlay = Underlay {
            uplink: WIRE.into(),
            uplink_ifindex,
            address,
            tunnel_port: TUNNEL_PORT,
            tun_name: TUN.into(),
            tun_v4: Ipv4Addr::new(10, 19, 1, 254),
            tun_v6: "fcef::dead:beef".parse().unwrap(),
            mtu: MTU,
            service_v4: (Ipv4Addr::new(10, 30, 0, 0), 16),
            service_v6: ("fdff::".parse().unwrap(), 16),
            capacity: Capacity::USUAL,
            pin_dir: scratch.join(format!("bpf-{number}")),
            xdp: XdpChoice::Off,
            table_dir: scratch.join(format!("tables-{number}")),
        };
        let (_, gateway_mac) = link(name, BRIDGE);
        Self { name: name.into(), address, instances, underlay, gateway_mac, running: None }
    }

    fn config(&self) -> Config {
        let mask_v6 = Ipv6Addr::from(!0_u128 << 112);
        let mask_v4 = Ipv6Addr::from(!0_u128 << 16);
        Config {
            service_v4: self.underlay.service_v4.0.into(),
            service_v4_mask: mask_v4.into(),
            service_v6: self.underlay.service_v6.0.into(),
            service_v6_mask: mask_v6.into(),
            node: self.address.into(),
            gateway_mac: Mac(self.gateway_mac),
            tunnel_port: TUNNEL_PORT.to_be_bytes(),
            framed_port: [0; 2],
            _pad: [0; 2],
            slow_ifindex: 0,
            flags: 0,
            epoch: 1,
        }
    }

    /// Starts the datapath and gives the TUN device its addresses, which bring the routes.
    pub async fn start(&mut self, choice: DatapathChoice) {
        self.try_start(choice).await.expect("no datapath");
    }

    pub async fn try_start(&mut self, choice: DatapathChoice) -> Result<(), String> {
        let (jobs, mut inbox) = mpsc::channel::<Job>(16);
        let (started, start) = oneshot::channel::<Result<(), String>>();
        let (name, underlay) = (self.name.clone(), self.underlay.clone());
        let thread = thread::spawn(move || {
            let netns = Netns::open(&Path::new(netns::NAMED).join(name)).expect("the node's namespace");
            let main = || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                runtime.block_on(async {
                    let datapath = match choose(choice, &underlay, Arc::default()).await {
                        Ok(Chosen { datapath, .. }) => datapath,
                        Err(error) => return started.send(Err(error.to_string())).expect("the test waits"),
                    };
                    started.send(Ok(())).expect("the test waits");
                    while let Some(job) = inbox.recv().await {
                        tokio::spawn(job(datapath.clone()));
                    }
                });
            };
            netns.run(main).expect("enter the node's namespace");
        });
        start.await.expect("the node's thread has ended")?;
        self.running = Some(Running { jobs, thread });
        for (family, address) in [("-4", "10.19.1.254/12"), ("-6", "fcef::dead:beef/7")] {
            let nodad: &[&str] = if family == "-6" { &["nodad"] } else { &[] };
            ip(&[&["-n", &self.name, family, "addr", "replace", address, "dev", TUN], nodad].concat());
        }
        Ok(())
    }

    /// Ends the datapath's thread without a word to the datapath, as a killed process would.
    pub async fn stop(&mut self) {
        if let Some(running) = self.running.take() {
            drop(running.jobs);
            tokio::task::spawn_blocking(|| running.thread.join()).await.unwrap().expect("the node's thread panicked");
        }
    }

    /// Runs `job` on the node's thread.
    pub async fn call<R, F>(&self, job: impl FnOnce(Arc<dyn Datapath>) -> F + Send + 'static) -> R
    where
        R: Send + 'static,
        F: Future<Output = R> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(|datapath| {
            let work = job(datapath);
            Box::pin(async move {
                let _ = reply.send(work.await);
            })
        });
        let running = self.running.as_ref().expect("the node was started");
        assert!(running.jobs.send(job).await.is_ok(), "the node's thread has ended");
        tokio::time::timeout(PATIENCE, answer).await.expect("the node does not answer").expect("the job panicked")
    }

    pub async fn apply(&self, delta: TableDelta) {
        self.call(|datapath| async move { datapath.apply(&delta).await }).await.expect("apply");
    }

    pub async fn reconcile(&self, full: TableDelta) {
        self.call(|datapath| async move { datapath.reconcile(&full).await }).await.expect("reconcile");
    }

    pub async fn event(&self) -> Event {
        self.call(|datapath| async move { datapath.event().await }).await
    }

    pub async fn counter(&self, name: &'static str) -> u64 {
        let counters = self.call(|datapath| async move { datapath.counters() }).await;
        counters.into_iter().find(|(other, _)| other == name).map_or(0, |(_, value)| value)
    }

    pub async fn counters(&self) -> Vec<(String, u64)> {
        let counters = self.call(|datapath| async move { datapath.counters() }).await;
        counters.into_iter().filter(|(_, value)| *value != 0).collect()
    }

    pub async fn attach_all(&self) {
        for instance in &self.instances {
            let port = instance.port.clone();
            self.call(|datapath| async move { datapath.attach(&port).await }).await.expect("attach");
        }
    }

    pub async fn detach_all(&self) {
        for instance in &self.instances {
            let port = instance.port.clone();
            self.call(|datapath| async move { datapath.detach(&port).await }).await.expect("detach");
        }
    }

    pub fn netns(&self) -> Netns {
        Netns::open(&Path::new(netns::NAMED).join(&self.name)).expect("the node's namespace")
    }
}

/// An instance's namespace on the node's bridge.
fn connect(node: &str, gateway: &[String; 2], number: u8, i: u8) -> Instance {
    let name = format!("{node}{i}");
    let host = format!("host{i}");
    netns::ensure(&name).expect("an instance's namespace");
    let mtu = MTU.to_string();
    ip(&[
        "-n", node, "link", "add", &host, "mtu", &mtu, "type", "veth", "peer", "name", "eth0", "mtu", &mtu, "netns",
        &name,
    ]);
    ip(&["-n", node, "link", "set", &host, "master", BRIDGE, "up"]);
    let namespace = [
        IpAddr::V4(Ipv4Addr::new(10, 18, number, i + 1)),
        IpAddr::V6(format!("fc00::{number}:{}", i + 1).parse().unwrap()),
    ];
    let instance =
        [IpAddr::V4(Ipv4Addr::new(10, 30, number, i)), IpAddr::V6(format!("fdff::{number}:{i}").parse().unwrap())];
    let at = |args: &[&str]| ip(&[&["-n", &name], args].concat());
    at(&["addr", "add", &format!("{}/24", namespace[0]), "dev", "eth0"]);
    at(&["addr", "add", &format!("{}/112", namespace[1]), "dev", "eth0", "nodad"]);
    at(&["link", "set", "lo", "up"]);
    at(&["link", "set", "eth0", "up"]);
    at(&["-4", "route", "add", "default", "via", &gateway[0]]);
    at(&["-6", "route", "add", "default", "via", &gateway[1]]);
    let (ifindex, _) = link(node, &host);
    let (_, mac) = link(&name, "eth0");
    Instance {
        netns: Netns::open(&Path::new(netns::NAMED).join(&name)).expect("the instance's namespace"),
        name,
        namespace,
        instance,
        port: Port { name: host, ifindex },
        mac,
    }
}

/// This thread's namespace forwards, and does not spend a second on duplicate addresses.
fn forward() {
    for (key, value) in [
        ("ipv4/ip_forward", "1"),
        ("ipv6/conf/all/forwarding", "1"),
        ("ipv6/conf/default/accept_dad", "0"),
        ("ipv6/conf/all/accept_dad", "0"),
    ] {
        std::fs::write(Path::new("/proc/sys/net").join(key), value).expect(key);
    }
}

/// Index and MAC address.
fn link(netns: &str, name: &str) -> (u32, [u8; 6]) {
    let output = output(&["-n", netns, "-j", "link", "show", "dev", name]);
    let links: serde_json::Value = serde_json::from_slice(&output).expect("ip speaks JSON");
    let mut mac = [0; 6];
    for (byte, text) in mac.iter_mut().zip(links[0]["address"].as_str().expect("a MAC address").split(':')) {
        *byte = u8::from_str_radix(text, 16).expect("a MAC address");
    }
    (links[0]["ifindex"].as_u64().expect("an index") as u32, mac)
}

/// What `ip` says of an interface.
pub fn shown(node: &Node, name: &str) -> String {
    String::from_utf8_lossy(&output(&["-n", &node.name, "-d", "link", "show", "dev", name])).into_owned()
}

pub fn ip(args: &[&str]) {
    output(args);
}

fn output(args: &[&str]) -> Vec<u8> {
    let output = Command::new("ip").args(args).output().expect("run ip");
    assert!(output.status.success(), "ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Asks until the answer is yes; panics with `what` when patience ends.
pub async fn until<F: Future<Output = bool>>(what: &str, mut ask: impl FnMut() -> F) {
    let deadline = Instant::now() + PATIENCE;
    while !ask().await {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Runs blocking traffic beside the nodes' threads.
pub async fn blocking<T: Send + 'static>(f: impl FnOnce() -> io::Result<T> + Send + 'static) -> T {
    let done = tokio::task::spawn_blocking(f).await.expect("the traffic panicked");
    done.expect("traffic")
}

pub fn addr(text: &str) -> Addr {
    text.parse::<IpAddr>().expect("an address").into()
}
