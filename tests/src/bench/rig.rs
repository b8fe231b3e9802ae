//! Two nodes as namespaces joined by a veth "wire", a container namespace on each: the same shape for every mode, each in its own
//! namespaces, so that no mode pays for another's programs and rules.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::case::Ground;

/// How super-packets cross the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wire {
    /// Unsegmented, as between containers of one machine.
    Pass,
    /// Segmented by the sender, aggregated by the receiver's GRO: what a real network card does.
    Seg,
}

impl Wire {
    pub fn name(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Seg => "seg",
        }
    }
}

/// One side of the wire.
#[derive(Clone, Debug)]
pub struct Side {
    pub node: String,
    pub container: String,
    /// Address on the wire.
    pub underlay: &'static str,
    pub gateway: &'static str,
    pub address: &'static str,
    /// The subnet of its containers.
    pub subnet: &'static str,
    /// Host end of the container's veth.
    pub port: &'static str,
}

impl Side {
    pub fn container_netns(&self) -> PathBuf {
        netns(&self.container)
    }

    pub fn node_netns(&self) -> PathBuf {
        netns(&self.node)
    }

    pub fn container_address(&self) -> IpAddr {
        self.address.parse().expect("a constant of this file")
    }
}

/// Two sides; the namespaces go when this is dropped.
#[derive(Debug)]
pub struct Rig {
    pub sides: [Side; 2],
}

pub const UPLINK: &str = "uplink0";
pub const BRIDGE: &str = "br0";
/// What the kernel's VXLAN, and our own framing, put around a packet.
pub const VXLAN: u32 = 50;
const PORT: &str = "port0";
const SECOND_PORT: &str = "port1";

impl Rig {
    /// Namespaces, wire, bridges and containers; nothing leads across yet. `mtu`: the containers'.
    pub fn new(name: &str, ground: Ground, mtu: u32) -> Result<Self> {
        let prefix = prefix(name);
        let side = |which: &str, underlay, gateway, address, subnet| Side {
            node: format!("{prefix}-{which}"),
            container: format!("{prefix}-c{which}"),
            underlay,
            gateway,
            address,
            subnet,
            port: PORT,
        };
        let rig = Self {
            sides: [
                side("a", "192.0.2.1", "10.18.0.1", "10.18.0.2", "10.18.0.0/26"),
                side("b", "192.0.2.2", "10.18.0.65", "10.18.0.66", "10.18.0.64/26"),
            ],
        };
        for side in &rig.sides {
            rig.node(side)?;
        }
        let [a, b] = &rig.sides;
        let wire = ground.mtu.to_string();
        ip(&[
            "-n", &a.node, "link", "add", UPLINK, "mtu", &wire, "type", "veth", "peer", UPLINK, "mtu", &wire, "netns",
            &b.node,
        ])?;
        for side in &rig.sides {
            ip(&["-n", &side.node, "addr", "add", &format!("{}/24", side.underlay), "dev", UPLINK])?;
            shape(&side.node, UPLINK, ground.wire)?;
            ip(&["-n", &side.node, "link", "set", UPLINK, "up"])?;
            rig.bridge(side, mtu)?;
            rig.container(side, mtu)?;
        }
        Ok(rig)
    }

    /// One node with both containers on its bridge, and an uplink that leads nowhere.
    pub fn on_one_node(name: &str, mtu: u32) -> Result<Self> {
        let prefix = prefix(name);
        let side = |container: &str, address, port| Side {
            node: format!("{prefix}-a"),
            container: format!("{prefix}-{container}"),
            underlay: "192.0.2.1",
            gateway: "10.18.0.1",
            address,
            subnet: "10.18.0.0/26",
            port,
        };
        let rig = Self { sides: [side("ca", "10.18.0.2", PORT), side("cb", "10.18.0.3", SECOND_PORT)] };
        let [a, b] = &rig.sides;
        rig.node(a)?;
        rig.bridge(a, mtu)?;
        ip(&["-n", &a.node, "link", "add", UPLINK, "type", "veth", "peer", "nowhere"])?;
        ip(&["-n", &a.node, "addr", "add", &format!("{}/24", a.underlay), "dev", UPLINK])?;
        ip(&["-n", &a.node, "link", "set", UPLINK, "up"])?;
        for side in [a, b] {
            rig.container(side, mtu)?;
        }
        Ok(rig)
    }

    fn node(&self, side: &Side) -> Result<()> {
        ip(&["netns", "add", &side.node])?;
        ip(&["-n", &side.node, "link", "set", "lo", "up"])?;
        sysctl(&side.node, "net/ipv4/ip_forward", "1")
    }

    fn bridge(&self, side: &Side, mtu: u32) -> Result<()> {
        ip(&["-n", &side.node, "link", "add", BRIDGE, "mtu", &mtu.to_string(), "type", "bridge"])?;
        ip(&["-n", &side.node, "addr", "add", &format!("{}/26", side.gateway), "dev", BRIDGE])?;
        ip(&["-n", &side.node, "link", "set", BRIDGE, "up"])
    }

    fn container(&self, side: &Side, mtu: u32) -> Result<()> {
        let mtu = mtu.to_string();
        ip(&["netns", "add", &side.container])?;
        ip(&["-n", &side.container, "link", "set", "lo", "up"])?;
        let inner = ["type", "veth", "peer", "eth0", "mtu", &mtu, "netns", &side.container];
        ip(&[&["-n", &side.node, "link", "add", side.port, "mtu", &mtu][..], &inner].concat())?;
        ip(&["-n", &side.node, "link", "set", side.port, "master", BRIDGE, "up"])?;
        ip(&["-n", &side.container, "addr", "add", &format!("{}/26", side.address), "dev", "eth0"])?;
        ip(&["-n", &side.container, "link", "set", "eth0", "up"])?;
        ip(&["-n", &side.container, "route", "add", "default", "via", side.gateway])
    }

    pub fn is_one_node(&self) -> bool {
        self.sides[0].node == self.sides[1].node
    }

    /// A veth from container to container, no node in between: the limit.
    pub fn direct(&self, ground: Ground) -> Result<IpAddr> {
        let [a, b] = &self.sides;
        let mtu = ground.mtu.to_string();
        ip(&[
            "-n",
            &a.container,
            "link",
            "add",
            "direct0",
            "mtu",
            &mtu,
            "type",
            "veth",
            "peer",
            "direct0",
            "mtu",
            &mtu,
            "netns",
            &b.container,
        ])?;
        for (side, address) in [(a, "10.99.0.1/24"), (b, "10.99.0.2/24")] {
            ip(&["-n", &side.container, "addr", "add", address, "dev", "direct0"])?;
            shape(&side.container, "direct0", ground.wire)?;
            ip(&["-n", &side.container, "link", "set", "direct0", "up"])?;
        }
        Ok("10.99.0.2".parse()?)
    }

    /// Plain routing between the two bridges.
    pub fn route(&self) -> Result<IpAddr> {
        let [a, b] = &self.sides;
        ip(&["-n", &a.node, "route", "add", b.subnet, "via", b.underlay])?;
        ip(&["-n", &b.node, "route", "add", a.subnet, "via", a.underlay])?;
        Ok(b.container_address())
    }

    /// The kernel's VXLAN, routed, as common container networks have it.
    pub fn vxlan(&self, ground: Ground) -> Result<IpAddr> {
        let mtu = (ground.mtu - VXLAN).to_string();
        for (side, other, own, far) in [(0, 1, "10.19.0.1", "10.19.0.2"), (1, 0, "10.19.0.2", "10.19.0.1")] {
            let (side, other) = (&self.sides[side], &self.sides[other]);
            let (local, remote) = (side.underlay, other.underlay);
            let device =
                ["type", "vxlan", "id", "1", "dstport", "8472", "local", local, "remote", remote, "dev", UPLINK];
            ip(&[&["-n", &side.node, "link", "add", "vxlan0", "mtu", &mtu][..], &device].concat())?;
            ip(&["-n", &side.node, "addr", "add", &format!("{own}/24"), "dev", "vxlan0"])?;
            ip(&["-n", &side.node, "link", "set", "vxlan0", "up"])?;
            ip(&["-n", &side.node, "route", "add", other.subnet, "via", far, "dev", "vxlan0", "onlink"])?;
        }
        Ok(self.sides[1].container_address())
    }

    /// `services` service addresses by DNAT on the client's node, the last of them ours: what kube-proxy does.
    pub fn dnat(&self, services: u32) -> Result<IpAddr> {
        let mut rules = String::from("*nat\n");
        let backend = self.sides[1].address;
        let address = |number: u32| format!("10.30.{}.{}", number / 250, number % 250 + 1);
        for number in 0..services {
            let to = if number + 1 == services { backend.to_owned() } else { format!("10.18.77.{}", number % 250 + 1) };
            for protocol in ["tcp", "udp"] {
                rules += &format!(
                    "-A PREROUTING -d {}/32 -p {protocol} -m {protocol} --dport 5201 -j DNAT --to-destination {to}:5201\n",
                    address(number)
                );
            }
        }
        rules += "COMMIT\n";
        let file = std::env::temp_dir().join(format!("{}.rules", self.sides[0].node));
        std::fs::write(&file, rules)?;
        let path = file.to_str().context("the temporary directory's name is not text")?;
        let result = run(&["ip", "netns", "exec", &self.sides[0].node, "iptables-restore", path]);
        std::fs::remove_file(&file)?;
        result?;
        Ok(address(services - 1).parse()?)
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        for side in &self.sides {
            for netns in [&side.container, &side.node] {
                let _ = ip(&["netns", "del", netns]);
            }
        }
    }
}

/// Of all namespaces of a rig.
fn prefix(name: &str) -> String {
    format!("bench{}-{name}", std::process::id())
}

fn netns(name: &str) -> PathBuf {
    PathBuf::from("/run/netns").join(name)
}

/// Segmentation before the wire and aggregation behind it, or neither.
fn shape(netns: &str, device: &str, wire: Wire) -> Result<()> {
    match wire {
        Wire::Pass => Ok(()),
        Wire::Seg => {
            run(&["ip", "netns", "exec", netns, "ethtool", "-K", device, "tso", "off", "gso", "off", "gro", "on"])
        }
    }
}

fn sysctl(netns: &str, key: &str, value: &str) -> Result<()> {
    let write = format!("echo {value} > /proc/sys/{key}");
    run(&["ip", "netns", "exec", netns, "sh", "-c", &write])
}

/// `ip` with these arguments.
pub fn ip(arguments: &[&str]) -> Result<()> {
    run(&[&["ip"], arguments].concat())
}

/// A command that must succeed.
pub fn run(command: &[&str]) -> Result<()> {
    let output =
        Command::new(command[0]).args(&command[1..]).output().with_context(|| format!("cannot run {}", command[0]))?;
    if !output.status.success() {
        bail!("{}: {}", command.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
