//! Our datapaths on a rig: tables by hand, no cluster, no daemon. Each side lives on a thread in its node's namespace.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Command;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use netmanager_common::abi::{Config, Endpoint, Mac, PEER_OURS, POLICY_ANY, POLICY_INSTANCE, Peer, Service, Slot};
use netmanager_common::addr::Addr;
use netmanager_common::{TUNNEL_PORT, framed_port};
use node_engine::config::{DatapathChoice, XdpChoice};
use node_engine::netmanager::datapath::{self, Capacity, Datapath, Port, TableDelta, Underlay};
use tokio::sync::mpsc;

use super::rig::{BRIDGE, Rig, Side, UPLINK, VXLAN, ip};

const TUN: &str = "tun0";
const FRAMING: &str = "framing";
/// Instance addresses of the two containers.
const INSTANCES: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 30, 0, 2), Ipv4Addr::new(10, 30, 0, 3)];
/// The first of the service addresses.
const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 30, 50, 2);
/// So many of the services are the second container; the others are instances on a node that is not there.
pub const OURS: u32 = 1_000;
/// The slot of the first of those instances.
const FIRST_SLOT: u32 = 10;
const PATIENCE: Duration = Duration::from_secs(60);

/// How large the tables are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    pub services: u32,
    /// Instances beside the two containers.
    pub instances: u32,
}

impl Sizes {
    pub fn of_services(services: u32) -> Self {
        Self { services, instances: 0 }
    }

    /// What a node is configured with for them.
    fn capacity(self) -> Capacity {
        let slots = self.services.max(FIRST_SLOT + self.instances).next_power_of_two();
        Capacity::of(slots).unwrap_or_default()
    }
}

/// What kind of overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Programs in the kernel, packets framed: between nodes of ours.
    Framed,
    /// Programs in the kernel, bare packets: towards a node of the reference system.
    Bare,
    Tun,
}

/// The nodes' datapaths, until dropped.
#[derive(Debug)]
pub struct Overlay {
    sides: Vec<Running>,
    pins: PathBuf,
}

#[derive(Debug)]
struct Running {
    orders: mpsc::UnboundedSender<Order>,
    thread: JoinHandle<()>,
}

/// Changes of the tables, and who waits until they are made.
type Order = (Vec<TableDelta>, std::sync::mpsc::Sender<Result<Duration>>);

impl Overlay {
    /// Connects the rig's containers. `mtu`: the wire's.
    ///
    /// # Errors
    /// Where the datapath does not start on this machine.
    pub fn new(rig: &Rig, kind: Kind, sizes: Sizes, mtu: u32) -> Result<Self> {
        let pins = std::env::temp_dir().join(format!("{}-pins", rig.sides[0].node));
        let mut overlay = Self { sides: Vec::new(), pins };
        let nodes = if rig.is_one_node() { &[0][..] } else { &[0, 1] };
        for which in nodes {
            overlay.start(rig, *which, kind, sizes, mtu)?;
        }
        Ok(overlay)
    }

    /// What the client connects to.
    pub fn service(&self) -> IpAddr {
        SERVICE.into()
    }

    /// So many services that are all the server.
    pub fn services(&self, count: u32) -> Vec<IpAddr> {
        (0..count.min(OURS)).map(|number| service(number).into()).collect()
    }

    /// The server's own instance address: the same way without a choice.
    pub fn instance(&self) -> IpAddr {
        INSTANCES[1].into()
    }

    /// Applies these changes on the first node, one after the other; how long that took.
    ///
    /// # Errors
    /// Where one is refused.
    pub fn apply(&self, deltas: Vec<TableDelta>) -> Result<Duration> {
        let (done, answer) = std::sync::mpsc::channel();
        let _ = self.sides[0].orders.send((deltas, done));
        answer.recv().map_err(|_| anyhow!("the datapath has ended"))?
    }

    fn start(&mut self, rig: &Rig, which: usize, kind: Kind, sizes: Sizes, mtu: u32) -> Result<()> {
        let node = Node {
            sides: rig.sides.clone(),
            which,
            kind,
            sizes,
            mtu: mtu - VXLAN,
            pins: self.pins.join(which.to_string()),
        };
        let (orders, received) = mpsc::unbounded_channel();
        let (ready, started) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let result = node.run(received, &ready);
            if let Err(error) = result {
                let _ = ready.send(Err(error));
            }
        });
        self.sides.push(Running { orders, thread });
        started.recv_timeout(PATIENCE).map_err(|_| anyhow!("the datapath did not start"))?
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        for Running { orders, thread } in self.sides.drain(..) {
            drop(orders);
            let _ = thread.join();
        }
        for side in ["0", "1"] {
            let _ = datapath::uninstall(&self.pins.join(side));
        }
        let _ = std::fs::remove_dir_all(&self.pins);
    }
}

/// One node of the overlay.
struct Node {
    sides: [Side; 2],
    which: usize,
    kind: Kind,
    sizes: Sizes,
    /// The containers'.
    mtu: u32,
    pins: PathBuf,
}

impl Node {
    /// Carries until nobody can give orders any more.
    fn run(
        &self,
        mut orders: mpsc::UnboundedReceiver<Order>,
        ready: &std::sync::mpsc::Sender<Result<()>>,
    ) -> Result<()> {
        let side = &self.sides[self.which];
        let netns = std::fs::File::open(side.node_netns())?;
        nix::sched::setns(netns.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let underlay = self.underlay()?;
            let choice = if self.kind == Kind::Tun { DatapathChoice::Tun } else { DatapathChoice::Ebpf };
            let datapath = datapath::choose(choice, &underlay, std::sync::Arc::default())
                .await
                .map_err(|error| anyhow!("{error}"))?
                .datapath;
            let _ = ip(&["-n", &side.node, "link", "set", TUN, "up"]);
            let _ = ip(&["-n", &side.node, "route", "add", "10.30.0.0/15", "dev", TUN]);
            if self.kind != Kind::Tun {
                self.take_framed(&*datapath).await?;
            }
            datapath.apply(&self.tables()?).await?;
            for port in self.ports()? {
                datapath.attach(&port).await?;
            }
            let _ = ready.send(Ok(()));
            while let Some((deltas, done)) = orders.recv().await {
                let begin = Instant::now();
                let mut result = Ok(());
                for delta in &deltas {
                    result = datapath.apply(delta).await;
                    if result.is_err() {
                        break;
                    }
                }
                let _ = done.send(result.map(|()| begin.elapsed()).map_err(Into::into));
            }
            for port in self.ports()? {
                datapath.detach(&port).await?;
            }
            Ok(())
        })
    }

    fn framed_port(&self) -> Option<u16> {
        framed_port(TUNNEL_PORT).filter(|_| self.kind == Kind::Framed)
    }

    /// A node of ours takes framed packets also where its peer does not.
    async fn take_framed(&self, datapath: &dyn Datapath) -> Result<()> {
        let node = &self.sides[self.which].node;
        let port = framed_port(TUNNEL_PORT).context("the tunnel's port is the last")?.to_string();
        ip(&["-n", node, "link", "add", FRAMING, "type", "vxlan", "external", "dstport", &port])?;
        let device = Port { name: FRAMING.to_owned(), ifindex: ifindex(node, FRAMING)? };
        datapath.take_framed(&device).await?;
        ip(&["-n", node, "link", "set", FRAMING, "up"])?;
        ip(&["-n", node, "link", "set", FRAMING, "master", BRIDGE])?;
        let silent = ["learning", "off", "flood", "off", "bcast_flood", "off", "mcast_flood", "off"];
        ip(&[&["-n", node, "link", "set", FRAMING, "type", "bridge_slave"][..], &silent].concat())
    }

    /// The containers that are on this node.
    fn here(&self) -> impl Iterator<Item = (usize, &Side)> {
        let node = &self.sides[self.which].node;
        self.sides.iter().enumerate().filter(move |(_, side)| side.node == *node)
    }

    fn ports(&self) -> Result<Vec<Port>> {
        let port = |(_, side): (usize, &Side)| {
            Ok(Port { name: side.port.to_owned(), ifindex: ifindex(&side.node, side.port)? })
        };
        self.here().map(port).collect()
    }

    fn underlay(&self) -> Result<Underlay> {
        let side = &self.sides[self.which];
        Ok(Underlay {
            uplink: UPLINK.to_owned(),
            uplink_ifindex: ifindex(&side.node, UPLINK)?,
            address: side.underlay.parse()?,
            tunnel_port: TUNNEL_PORT,
            tun_name: TUN.to_owned(),
            tun_v4: Ipv4Addr::new(10, 19, 1, 254),
            tun_v6: Ipv6Addr::new(0xfcef, 0, 0, 0, 0, 0, 0xdead, 0xbeef),
            mtu: self.mtu,
            service_v4: (Ipv4Addr::new(10, 30, 0, 0), 15),
            service_v6: (Ipv6Addr::new(0xfdff, 0, 0, 0, 0, 0, 0, 0), 16),
            capacity: self.sizes.capacity(),
            pin_dir: self.pins.clone(),
            table_dir: self.pins.with_extension("tables"),
            xdp: XdpChoice::Off,
        })
    }

    /// The projection that a network manager would make: the containers here, those elsewhere, and the services.
    fn tables(&self) -> Result<TableDelta> {
        let mut services: Vec<(Addr, Service, Vec<u32>)> = Vec::new();
        for (number, name) in [1, 2].into_iter().zip(INSTANCES) {
            let row = Service { id: number, epoch: 1, count: 1, policy: POLICY_INSTANCE, first: number };
            services.push((name.into(), row, vec![number]));
        }
        services.extend((0..self.sizes.services).map(|number| self.service_row(number)));
        let (mut slots, mut endpoints) = (Vec::new(), Vec::new());
        for (number, (side, instance)) in (1..).zip(self.sides.iter().zip(INSTANCES)) {
            let (namespace, here) = (address(side.address)?, side.node == self.sides[self.which].node);
            slots.push((number, Slot { generation: 1, peer: (!here).into(), namespace, instance: instance.into() }));
            if here {
                let ifindex = ifindex(&side.node, side.port)?;
                let mac = mac(&side.container, "eth0")?;
                endpoints
                    .push((namespace, Endpoint { instance: instance.into(), ifindex, mac, account: number as u16 }));
            }
        }
        slots.extend((0..self.sizes.instances).map(|number| (FIRST_SLOT + number, absent(number))));
        Ok(TableDelta {
            config: Some(self.config()?),
            peers: vec![(1, self.peer()?), (2, Peer { host: Addr::v4([192, 0, 2, 99]), ..self.peer()? })],
            slots,
            endpoints,
            services,
            ..TableDelta::default()
        })
    }

    fn config(&self) -> Result<Config> {
        let side = &self.sides[self.which];
        Ok(Config {
            service_v4: address("10.30.0.0")?,
            service_v4_mask: Addr((u128::MAX << 17).to_be_bytes()),
            service_v6: address("fdff::")?,
            service_v6_mask: Addr((u128::MAX << 112).to_be_bytes()),
            node: address(side.underlay)?,
            gateway_mac: Mac(mac(&side.node, BRIDGE)?),
            tunnel_port: TUNNEL_PORT.to_be_bytes(),
            framed_port: self.framed_port().unwrap_or(0).to_be_bytes(),
            _pad: [0; 2],
            slow_ifindex: ifindex(&side.node, TUN).unwrap_or(0),
            flags: 0,
            epoch: 1,
        })
    }

    /// The other node.
    fn peer(&self) -> Result<Peer> {
        let (side, other) = (&self.sides[self.which], &self.sides[1 - self.which]);
        Ok(Peer {
            host: address(other.underlay)?,
            source: address(side.underlay)?,
            ifindex: ifindex(&side.node, UPLINK)?,
            port: TUNNEL_PORT.to_be_bytes(),
            framed_port: self.framed_port().unwrap_or(0).to_be_bytes(),
            flags: PEER_OURS,
            mtu: 0,
        })
    }

    /// A service that is the second container, or one of instances elsewhere: each of those has its share.
    fn service_row(&self, number: u32) -> (Addr, Service, Vec<u32>) {
        let Sizes { services, instances } = self.sizes;
        let share = instances / services.saturating_sub(OURS).max(1);
        let candidates: Vec<u32> = if number < OURS || share == 0 {
            vec![2]
        } else {
            (0..share).map(|index| FIRST_SLOT + (number - OURS) * share + index).collect()
        };
        let count = candidates.len() as u32;
        let row = Service { id: 10 + number, epoch: 1, count, policy: POLICY_ANY, first: candidates[0] };
        (service(number).into(), row, candidates)
    }
}

/// An instance on a node that is not there.
pub fn absent(number: u32) -> Slot {
    let address = |network: u32| Addr::from(Ipv4Addr::from(network + number));
    Slot { generation: 1, peer: 2, namespace: address(0x0a40_0000), instance: address(0x0a80_0000) }
}

/// The address of a service, by its number.
fn service(number: u32) -> Ipv4Addr {
    if number == 0 { SERVICE } else { Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 30, 64, 0)) + number) }
}

fn address(text: &str) -> Result<Addr> {
    Ok(Addr::from(text.parse::<IpAddr>()?))
}

fn ifindex(netns: &str, device: &str) -> Result<u32> {
    read(netns, device, "ifindex")?.trim().parse().with_context(|| format!("ifindex of {device}"))
}

fn mac(netns: &str, device: &str) -> Result<[u8; 6]> {
    let text = read(netns, device, "address")?;
    let mut bytes = [0; 6];
    for (byte, part) in bytes.iter_mut().zip(text.trim().split(':')) {
        *byte = u8::from_str_radix(part, 16).with_context(|| format!("MAC of {device}: {text}"))?;
    }
    Ok(bytes)
}

fn read(netns: &str, device: &str, attribute: &str) -> Result<String> {
    let path = format!("/sys/class/net/{device}/{attribute}");
    let output = Command::new("ip").args(["netns", "exec", netns, "cat", &path]).output()?;
    if !output.status.success() {
        return Err(anyhow!("{path} in {netns}: {}", String::from_utf8_lossy(&output.stderr).trim()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
