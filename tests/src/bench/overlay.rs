//! Our datapaths on a rig: tables by hand, no cluster, no daemon. Each side lives on a thread in its node's namespace.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::Command;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use netmanager_common::abi::{Config, Endpoint, Mac, PEER_OURS, POLICY_ANY, POLICY_INSTANCE, Peer, Service, Slot};
use netmanager_common::addr::Addr;
use netmanager_common::{TUNNEL_PORT, framed_port};
use node_engine::config::{DatapathChoice, XdpChoice};
use node_engine::netmanager::datapath::{self, Port, TableDelta, Underlay};
use tokio::sync::oneshot;

use super::rig::{BRIDGE, PORT, Rig, Side, UPLINK, ip};

const TUN: &str = "tun0";
const FRAMING: &str = "framing";
/// Instance addresses of the two containers, and the address of the service that the second one is.
const INSTANCES: [Ipv4Addr; 2] = [Ipv4Addr::new(10, 30, 0, 2), Ipv4Addr::new(10, 30, 0, 3)];
const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 30, 50, 2);
const PATIENCE: Duration = Duration::from_secs(10);

/// What kind of overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Programs in the kernel, packets framed: between nodes of ours.
    Framed,
    /// Programs in the kernel, bare packets: towards a node of the reference system.
    Bare,
    Tun,
}

/// Both nodes' datapaths, until dropped.
#[derive(Debug)]
pub struct Overlay {
    sides: Vec<(oneshot::Sender<()>, JoinHandle<()>)>,
    pins: PathBuf,
}

impl Overlay {
    /// Connects the rig's containers. `services` is how many service addresses there are, ours among them.
    ///
    /// # Errors
    /// Where the datapath does not start on this machine.
    pub fn new(rig: &Rig, kind: Kind, services: u32) -> Result<Self> {
        let pins = std::env::temp_dir().join(format!("{}-pins", rig.sides[0].node));
        let mut overlay = Self { sides: Vec::new(), pins };
        for which in [0, 1] {
            overlay.start(rig, which, kind, services)?;
        }
        Ok(overlay)
    }

    /// What the client connects to.
    pub fn service(&self) -> IpAddr {
        SERVICE.into()
    }

    /// The server's own instance address: the same way without a choice.
    pub fn instance(&self) -> IpAddr {
        INSTANCES[1].into()
    }

    fn start(&mut self, rig: &Rig, which: usize, kind: Kind, services: u32) -> Result<()> {
        let (side, other) = (rig.sides[which].clone(), rig.sides[1 - which].clone());
        let pins = self.pins.join(which.to_string());
        let (stop, stopped) = oneshot::channel();
        let (ready, started) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let result = run(&side, &other, which, kind, services, pins, stopped, &ready);
            if let Err(error) = result {
                let _ = ready.send(Err(error));
            }
        });
        self.sides.push((stop, thread));
        started.recv_timeout(PATIENCE).map_err(|_| anyhow!("the datapath did not start"))?
    }
}

impl Drop for Overlay {
    fn drop(&mut self) {
        for (stop, thread) in self.sides.drain(..) {
            let _ = stop.send(());
            let _ = thread.join();
        }
        for side in ["0", "1"] {
            let _ = datapath::uninstall(&self.pins.join(side));
        }
        let _ = std::fs::remove_dir_all(&self.pins);
    }
}

#[expect(clippy::too_many_arguments, reason = "the whole of a side, in one place")]
fn run(
    side: &Side,
    other: &Side,
    which: usize,
    kind: Kind,
    services: u32,
    pins: PathBuf,
    stopped: oneshot::Receiver<()>,
    ready: &std::sync::mpsc::Sender<Result<()>>,
) -> Result<()> {
    let netns = std::fs::File::open(side.node_netns())?;
    nix::sched::setns(netns.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let underlay = underlay(side, pins)?;
        let choice = if kind == Kind::Tun { DatapathChoice::Tun } else { DatapathChoice::Ebpf };
        let datapath = datapath::choose(choice, &underlay).await.map_err(|error| anyhow!("{error}"))?.datapath;
        let _ = ip(&["-n", &side.node, "link", "set", TUN, "up"]);
        let _ = ip(&["-n", &side.node, "route", "add", "10.30.0.0/16", "dev", TUN]);
        let port = Port { name: PORT.to_owned(), ifindex: ifindex(&side.node, PORT)? };
        let framed_port = framed_port(TUNNEL_PORT).filter(|_| kind == Kind::Framed);
        if let Some(number) = framed_port {
            let number = number.to_string();
            ip(&["-n", &side.node, "link", "add", FRAMING, "type", "vxlan", "external", "dstport", &number])?;
            let device = Port { name: FRAMING.to_owned(), ifindex: ifindex(&side.node, FRAMING)? };
            datapath.take_framed(&device).await.map_err(|error| anyhow!("{error}"))?;
            ip(&["-n", &side.node, "link", "set", FRAMING, "up"])?;
        }
        datapath
            .apply(&tables(side, other, which, services, framed_port, &port)?)
            .await
            .map_err(|error| anyhow!("{error}"))?;
        datapath.attach(&port).await.map_err(|error| anyhow!("{error}"))?;
        let _ = ready.send(Ok(()));
        let _ = stopped.await;
        datapath.detach(&port).await.map_err(|error| anyhow!("{error}"))
    })
}

fn underlay(side: &Side, pin_dir: PathBuf) -> Result<Underlay> {
    Ok(Underlay {
        uplink: UPLINK.to_owned(),
        uplink_ifindex: ifindex(&side.node, UPLINK)?,
        address: side.underlay.parse()?,
        tunnel_port: TUNNEL_PORT,
        tun_name: TUN.to_owned(),
        tun_v4: Ipv4Addr::new(10, 19, 1, 254),
        tun_v6: Ipv6Addr::new(0xfcef, 0, 0, 0, 0, 0, 0xdead, 0xbeef),
        mtu: 1450,
        service_v4: (Ipv4Addr::new(10, 30, 0, 0), 16),
        service_v6: (Ipv6Addr::new(0xfdff, 0, 0, 0, 0, 0, 0, 0), 16),
        pin_dir,
        xdp: XdpChoice::Off,
    })
}

/// The projection that a network manager would make: the local container, the remote one, and the services.
fn tables(
    side: &Side,
    other: &Side,
    which: usize,
    services: u32,
    framed_port: Option<u16>,
    port: &Port,
) -> Result<TableDelta> {
    let address = |text: &str| -> Result<Addr> { Ok(Addr::from(text.parse::<IpAddr>()?)) };
    let (here, there) = (INSTANCES[which], INSTANCES[1 - which]);
    let framed_port = framed_port.unwrap_or(0).to_be_bytes();
    let config = Config {
        service_v4: address("10.30.0.0")?,
        service_v4_mask: Addr((u128::MAX << 16).to_be_bytes()),
        service_v6: address("fdff::")?,
        service_v6_mask: Addr((u128::MAX << 112).to_be_bytes()),
        node: address(side.underlay)?,
        gateway_mac: Mac(mac(&side.node, BRIDGE)?),
        tunnel_port: TUNNEL_PORT.to_be_bytes(),
        framed_port,
        _pad: [0; 2],
        slow_ifindex: ifindex(&side.node, TUN).unwrap_or(0),
        flags: 0,
        epoch: 1,
    };
    let peer = Peer {
        host: address(other.underlay)?,
        source: address(side.underlay)?,
        ifindex: ifindex(&side.node, UPLINK)?,
        port: TUNNEL_PORT.to_be_bytes(),
        framed_port,
        flags: PEER_OURS,
    };
    let slot = |peer, side: &Side, instance: Ipv4Addr| -> Result<Slot> {
        Ok(Slot { generation: 1, peer, namespace: address(side.address)?, instance: instance.into() })
    };
    let instance = |number| Service { id: number, epoch: 1, count: 1, policy: POLICY_INSTANCE, first: number };
    let serves = if which == 1 { 1 } else { 2 };
    let mut rows = vec![(here.into(), instance(1), vec![1]), (there.into(), instance(2), vec![2])];
    for number in 0..services {
        let name = if number == 0 { SERVICE } else { Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 30, 64, 0)) + number) };
        let row = Service { id: 10 + number, epoch: 1, count: 1, policy: POLICY_ANY, first: serves };
        rows.push((name.into(), row, vec![serves]));
    }
    Ok(TableDelta {
        config: Some(config),
        peers: vec![(1, peer)],
        slots: vec![(1, slot(0, side, here)?), (2, slot(1, other, there)?)],
        endpoints: vec![(
            address(side.address)?,
            Endpoint { instance: here.into(), ifindex: port.ifindex, mac: mac(&side.container, "eth0")?, account: 1 },
        )],
        services: rows,
        ..TableDelta::default()
    })
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
