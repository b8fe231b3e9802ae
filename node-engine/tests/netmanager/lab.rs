//! Two nodes joined by a wire, all of them network namespaces, each with a whole network manager; and a cluster that lives in the
//! test: it gives subnets and addresses, keeps the service table, and tells of changes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Command as Process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use node_engine::config::{DatapathChoice, NetworkConfig};
use node_engine::drain::Drain;
use node_engine::model::{
    Addresses, Command, FamilyPair, Generation, InstanceId, NodeId, NodeIdentity, Policy, PortMapping, Query, Report,
    SemanticAddress, ServiceName, Subnet, TableAnswer, TableRow,
};
use node_engine::netmanager::{
    Attachment, Learned, Lease, Memory, NetError, NetManager, Setup, datapath, pin_dir, start,
};
use node_engine::netns::{self, Netns};
use tokio::sync::{mpsc, oneshot, watch};

pub const PATIENCE: Duration = Duration::from_secs(15);
const WIRE: &str = "wire";

pub struct Lab {
    pub nodes: [Node; 2],
    pub cluster: Arc<Mutex<Cluster>>,
    _scratch: tempfile::TempDir,
}

pub struct Node {
    index: usize,
    pub name: String,
    pub address: Ipv4Addr,
    config: NetworkConfig,
    pub run_dir: PathBuf,
    cluster: Arc<Mutex<Cluster>>,
    running: Option<Running>,
    instances: Vec<String>,
    /// What the node was told to keep over a reboot, and whether there was one.
    kept: Arc<Mutex<Kept>>,
    rebooted: bool,
}

#[derive(Clone, Default)]
struct Kept {
    subnet: Option<(NodeId, Subnet)>,
    addresses: BTreeMap<InstanceId, Addresses>,
    services: BTreeMap<ServiceName, TableAnswer>,
}

struct Running {
    net: NetManager,
    drain: Drain,
    thread: JoinHandle<()>,
}

/// What a cluster keeps, and how it reaches the nodes that are connected.
#[derive(Default)]
pub struct Cluster {
    rows: BTreeMap<ServiceName, Vec<TableRow>>,
    numbers: BTreeMap<InstanceId, u8>,
    subnets: BTreeMap<usize, Subnet>,
    connected: BTreeMap<usize, NetManager>,
    interested: BTreeSet<(usize, ServiceName)>,
    pub queries: usize,
}

impl Lab {
    pub fn new(choice: DatapathChoice) -> Self {
        static SERIAL: AtomicU32 = AtomicU32::new(0);
        let scratch = tempfile::tempdir().expect("scratch directory");
        let id = format!("nm-{}-{}", std::process::id(), SERIAL.fetch_add(1, Ordering::Relaxed));
        let cluster = Arc::new(Mutex::new(Cluster::default()));
        let nodes = [0, 1].map(|index| {
            let name = format!("{id}-{}", ["a", "b"][index]);
            netns::ensure(&name).expect("a node's namespace: are you root?");
            let dir = scratch.path().join(index.to_string());
            Node {
                index,
                name,
                address: Ipv4Addr::new(198, 18, 78, 1 + u8::try_from(index).unwrap()),
                config: NetworkConfig {
                    datapath: choice,
                    uplink: Some(WIRE.into()),
                    bpffs: dir.join("bpf"),
                    ..NetworkConfig::default()
                },
                run_dir: dir.join("run"),
                cluster: cluster.clone(),
                running: None,
                instances: Vec::new(),
                kept: Arc::default(),
                rebooted: false,
            }
        });
        let [a, b] = [&nodes[0].name, &nodes[1].name];
        ip(&["-n", a, "link", "add", WIRE, "type", "veth", "peer", "name", WIRE, "netns", b]);
        for node in &nodes {
            ip(&["-n", &node.name, "link", "set", "lo", "up"]);
            ip(&["-n", &node.name, "addr", "add", &format!("{}/24", node.address), "dev", WIRE]);
            ip(&["-n", &node.name, "link", "set", WIRE, "up"]);
        }
        Self { nodes, cluster, _scratch: scratch }
    }

    /// Both nodes run and are connected.
    pub async fn up(choice: DatapathChoice) -> Self {
        let mut lab = Self::new(choice);
        for node in &mut lab.nodes {
            node.start().await;
            node.connect().await;
        }
        lab
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            if let Some(Running { net, drain, thread }) = node.running.take() {
                self.cluster.lock().unwrap().connected.remove(&node.index);
                drop(net);
                drain.begin();
                let _ = thread.join();
            }
            let pins = pin_dir(&node.config);
            let _ = node.netns().run(|| datapath::uninstall(&pins));
            for instance in &node.instances {
                let _ = netns::remove(instance);
            }
            let _ = netns::remove(&node.name);
        }
    }
}

impl Node {
    pub fn netns(&self) -> Netns {
        Netns::open(&Path::new(netns::NAMED).join(&self.name)).expect("the node's namespace")
    }

    /// Starts the network manager on a thread inside the node's namespace, where all its tasks stay.
    pub async fn start(&mut self) {
        let (reports, reported) = mpsc::channel(64);
        let (subnets, mut assigned) = mpsc::channel(4);
        let (learns, mut learned) = mpsc::channel(64);
        let (leased, mut addresses) = watch::channel(BTreeMap::new());
        let known = self.kept.lock().unwrap().clone();
        let known = if self.rebooted { known } else { Kept::default() };
        let drain = Drain::new(Duration::from_secs(5));
        let setup = Setup {
            config: self.config.clone(),
            cluster: None,
            run_dir: self.run_dir.clone(),
            subnet: known.subnet,
            memory: Memory { addresses: known.addresses, services: known.services.into_values().collect() },
            reports,
            learns,
            leased,
            subnets,
            kept: std::sync::Arc::default(),
            drain: drain.clone(),
        };
        let netns = self.netns();
        let (started, ready) = oneshot::channel();
        let thread = thread::spawn(move || {
            let main = || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
                runtime.block_on(async {
                    let (net, task) = start(setup).await.expect("the network manager starts");
                    assert!(started.send(net).is_ok(), "the test waits");
                    task.await.expect("no panic").expect("no failure");
                });
            };
            netns.run(main).expect("enter the node's namespace");
        });
        let net = ready.await.expect("the node's thread has ended");
        tokio::spawn(serve(self.index, self.address, self.cluster.clone(), reported));
        let kept = self.kept.clone();
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    Some(subnet) = assigned.recv() => kept.lock().unwrap().subnet = Some(subnet),
                    Some(learned) = learned.recv() => match learned {
                        Learned::Answer(service, answer) => drop(kept.lock().unwrap().services.insert(service, answer)),
                        Learned::Forgotten(service) => drop(kept.lock().unwrap().services.remove(&service)),
                    },
                    Ok(()) = addresses.changed() => {
                        kept.lock().unwrap().addresses = addresses.borrow_and_update().clone();
                    }
                    else => return,
                }
            }
        });
        self.running = Some(Running { net, drain, thread });
    }

    /// The control plane reaches the cluster.
    pub async fn connect(&self) {
        let net = self.net();
        self.cluster.lock().unwrap().connected.insert(self.index, net.clone());
        let identity = NodeIdentity {
            id: format!("node{}", self.index).parse().unwrap(),
            broker_port: 1883,
            generation: Generation::G4,
            subnet: None,
        };
        net.deliver(Command::Registered(identity)).await.unwrap();
        net.deliver(Command::Connected).await.unwrap();
    }

    /// Ends it, and whatever a reboot forgets is gone; comes up again on its own.
    pub async fn reboot(&mut self) {
        self.stop().await;
        let pins = pin_dir(&self.config);
        let left = self.netns().run(|| datapath::uninstall(&pins)).expect("enter the node's namespace");
        assert!(left.is_empty(), "{left:?}");
        for link in self.veths().into_iter().chain([self.config.bridge.clone(), self.config.tun.clone()]) {
            let _ = Process::new("ip").args(["-n", &self.name, "link", "delete", &link]).output();
        }
        self.nft("flush ruleset");
        std::fs::remove_dir_all(&self.run_dir).expect("the run directory is forgotten");
        self.rebooted = true;
        self.start().await;
    }

    /// What `nft` says in the node's namespace.
    pub fn nft(&self, words: &str) -> String {
        let path = Path::new(netns::NAMED).join(&self.name);
        let mut command = Process::new("nsenter");
        command.arg(format!("--net={}", path.display())).arg("nft").args(words.split(' '));
        let output = command.output().expect("nft is installed");
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Ends the network manager, which leaves everything in force.
    pub async fn stop(&mut self) {
        let Running { net, drain, thread } = self.running.take().expect("it runs");
        self.cluster.lock().unwrap().connected.remove(&self.index);
        drop(net);
        drain.begin();
        tokio::task::spawn_blocking(|| thread.join()).await.unwrap().expect("the node's thread panicked");
    }

    pub fn net(&self) -> NetManager {
        self.running.as_ref().expect("it runs").net.clone()
    }

    /// A namespace of its own for the instance, connected.
    pub async fn deploy(&mut self, service: &str, number: u32, ports: Vec<PortMapping>) -> Instance {
        let id = id(service, number);
        let name = format!("{}-{service}{number}", self.name);
        netns::ensure(&name).expect("an instance's namespace");
        self.instances.push(name.clone());
        let path = Path::new(netns::NAMED).join(&name);
        self.cluster.lock().unwrap().register(&id);
        let attachment = Attachment { instance: id.clone(), netns: path.clone(), ports };
        let begin = Instant::now();
        let lease = self.attach(attachment).await.expect("attached");
        let took = begin.elapsed();
        Instance { id, netns: Netns::open(&path).unwrap(), path, lease, took }
    }

    pub async fn attach(&self, attachment: Attachment) -> Result<Lease, NetError> {
        tokio::time::timeout(Duration::from_secs(25), self.net().attach(attachment)).await.expect("an answer")
    }

    /// Names of the node's links that belong to instances.
    pub fn veths(&self) -> Vec<String> {
        let links = output(&["-n", &self.name, "-o", "link", "show", "type", "veth"]);
        let names = links.lines().filter_map(|line| line.split(": ").nth(1)?.split('@').next().map(str::to_owned));
        names.filter(|name| name.starts_with("ne")).collect()
    }
}

/// A namespace with a workload's addresses.
pub struct Instance {
    pub id: InstanceId,
    pub netns: Netns,
    pub path: PathBuf,
    pub lease: Lease,
    /// The attachment.
    pub took: Duration,
}

impl Cluster {
    /// The semantic addresses of a service.
    pub fn service(short: &str) -> [IpAddr; 2] {
        let number = short.bytes().map(u16::from).sum::<u16>();
        let [high, low] = number.to_be_bytes();
        [Ipv4Addr::new(10, 30, 100 + high, low).into(), Ipv6Addr::new(0xfdff, 0x2000, 0, 0, 0, 0, 0, number).into()]
    }

    /// The instance addresses of a registered instance.
    pub fn instance(&self, id: &InstanceId) -> [IpAddr; 2] {
        let number = self.numbers[id];
        [Ipv4Addr::new(10, 30, 0, number).into(), Ipv6Addr::new(0xfdff, 0, 0, 0, 0, 0, 0, number.into()).into()]
    }

    fn register(&mut self, id: &InstanceId) {
        let next = u8::try_from(self.numbers.len()).unwrap();
        self.numbers.entry(id.clone()).or_insert(next);
    }

    /// The instance is gone, as far as the cluster knows.
    pub fn forget(&mut self, id: &InstanceId) -> Vec<(NetManager, Command)> {
        let rows = self.rows.entry(id.service.clone()).or_default();
        rows.retain(|row| row.number != id.number);
        self.tell(&id.service)
    }

    fn tell(&self, service: &ServiceName) -> Vec<(NetManager, Command)> {
        let nodes = self.interested.iter().filter(|(_, other)| other == service);
        let nets = nodes.filter_map(|(node, _)| self.connected.get(node).cloned());
        nets.map(|net| (net, Command::ServiceChanged(service.clone()))).collect()
    }

    fn hear(&mut self, node: usize, address: Ipv4Addr, report: Report) -> Vec<(NetManager, Command)> {
        let Some(net) = self.connected.get(&node).cloned() else { return Vec::new() };
        match report {
            Report::SubnetRequest => {
                let number = u8::try_from(node).unwrap();
                let subnet = *self.subnets.entry(node).or_insert(Subnet {
                    v4: Ipv4Addr::new(10, 18, 0, 64 * number),
                    v6: Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, u16::from(number) << 8),
                });
                vec![(net, Command::Subnet(subnet))]
            }
            Report::Deployed { instance, addresses } => {
                let [v4, v6] = self.instance(&instance);
                let row = TableRow {
                    number: instance.number,
                    namespace: FamilyPair { v4: Some(addresses.v4), v6: Some(addresses.v6) },
                    instance: pair([v4, v6]),
                    host: address.into(),
                    host_port: 50103,
                    weight: 1,
                    services: Self::service(instance.service.short())
                        .map(|address| SemanticAddress { policy: Policy::RoundRobin, address })
                        .to_vec(),
                };
                let rows = self.rows.entry(instance.service.clone()).or_default();
                if rows.contains(&row) {
                    return Vec::new();
                }
                rows.retain(|other| other.number != row.number);
                rows.push(row);
                self.tell(&instance.service)
            }
            Report::TableQuery(query) => {
                self.queries += 1;
                let means = |rows: &[TableRow], address: IpAddr| {
                    rows.iter().any(|row| {
                        row.services.iter().any(|service| service.address == address)
                            || row.instance.v4.map(IpAddr::from) == Some(address)
                            || row.instance.v6.map(IpAddr::from) == Some(address)
                    })
                };
                let service = match &query {
                    Query::Name(name) => self.rows.contains_key(name).then(|| name.clone()),
                    Query::Address(address) => {
                        self.rows.iter().find(|(_, rows)| means(rows, *address)).map(|(name, _)| name.clone())
                    }
                };
                let rows = service.as_ref().and_then(|service| self.rows.get(service)).cloned().unwrap_or_default();
                vec![(net, Command::Table(TableAnswer { query: Some(query), service, rows }))]
            }
            Report::InterestAdd(service) => {
                self.interested.insert((node, service));
                Vec::new()
            }
            Report::InterestRemove(service) => {
                self.interested.remove(&(node, service));
                Vec::new()
            }
            other => panic!("{other:?} is not the overlay's to say"),
        }
    }
}

async fn serve(node: usize, address: Ipv4Addr, cluster: Arc<Mutex<Cluster>>, mut reports: mpsc::Receiver<Report>) {
    while let Some(report) = reports.recv().await {
        let commands = cluster.lock().unwrap().hear(node, address, report);
        deliver(commands).await;
    }
}

pub async fn deliver(commands: Vec<(NetManager, Command)>) {
    for (net, command) in commands {
        // A node may stop meanwhile.
        let _ = net.deliver(command).await;
    }
}

pub fn id(service: &str, number: u32) -> InstanceId {
    InstanceId { service: format!("app.ns.{service}.ns").parse().unwrap(), number }
}

fn pair([v4, v6]: [IpAddr; 2]) -> FamilyPair {
    match (v4, v6) {
        (IpAddr::V4(v4), IpAddr::V6(v6)) => FamilyPair { v4: Some(v4), v6: Some(v6) },
        _ => FamilyPair::default(),
    }
}

pub fn ip(args: &[&str]) {
    output(args);
}

fn output(args: &[&str]) -> String {
    let output = Process::new("ip").args(args).output().expect("iproute2 is installed");
    assert!(output.status.success(), "ip {}: {}", args.join(" "), String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Waits until it is so.
pub async fn until(what: &str, mut so: impl AsyncFnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so().await {
        assert!(Instant::now() < deadline, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
