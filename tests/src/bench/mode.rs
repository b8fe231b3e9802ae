//! The ways for packets that are compared, each in namespaces of its own.

use anyhow::{Context, Result, bail};

use super::case::{Case, Ends, Ground, Sample};
use super::cores;
use super::load::measure;
use super::overlay::{Kind, Overlay, Sizes};
use super::rig::{Rig, VXLAN};
use super::vpn::{self, Vpn};

/// Between two nodes.
pub const ACROSS: [&str; 9] =
    ["direct", "routed", "vxlan", "vxlan+dnat", "ebpf", "ebpf-bare", "ebpf-instance", "tun", "wireguard-go"];
/// Between two containers of one node.
pub const WITHIN: [&str; 2] = ["bridge", "local"];

/// What each of them is.
pub fn meaning(mode: &str) -> &'static str {
    match mode {
        "direct" => "one veth from container to container, no node between them: the limit",
        "routed" => "plain routing between the two nodes' bridges, no overlay",
        "vxlan" => "the kernel's VXLAN, routed",
        "vxlan+dnat" => "the same, by service address through the DNAT rules of 1,000 services",
        "ebpf" => "node-engine, by service address",
        "ebpf-bare" => "node-engine towards a peer of the reference system: bare IP in UDP",
        "ebpf-instance" => "node-engine, by the instance's own address",
        "tun" => "node-engine without eBPF, by service address",
        "wireguard-go" => "a VPN in user space; it encrypts",
        "bridge" => "two containers on one plain bridge",
        "local" => "the same two by service address, node-engine",
        _ => "",
    }
}

/// A way for packets, ready to be measured.
#[derive(Debug)]
pub struct Mode {
    pub name: &'static str,
    ends: Ends,
    vpn: Option<Vpn>,
    // In this order: the overlay needs the rig until it is gone.
    _overlay: Option<Overlay>,
    _rig: Rig,
}

impl Mode {
    /// # Errors
    /// Where it cannot be built on this machine.
    pub fn new(name: &'static str, ground: Ground, services: u32) -> Result<Self> {
        Self::build(name, ground, services).with_context(|| format!("cannot set up {name}"))
    }

    /// Ours with tables of this size; it is measured through as many services as there are of ours.
    ///
    /// # Errors
    /// As [`Mode::new`].
    pub fn of_size(name: &'static str, sizes: Sizes) -> Result<Self> {
        let rig = Rig::new(name, Ground::PASS, Ground::USUAL_MTU - VXLAN)?;
        let overlay = Overlay::new(&rig, Kind::Framed, sizes, Ground::USUAL_MTU)?;
        let [client, server] = &rig.sides;
        let targets = overlay.services(sizes.services);
        let ends = Ends { client: client.container_netns(), server: server.container_netns(), targets };
        Ok(Self { name, ends, vpn: None, _overlay: Some(overlay), _rig: rig })
    }

    fn build(name: &'static str, ground: Ground, services: u32) -> Result<Self> {
        let within = WITHIN.contains(&name);
        let mtu = match name {
            "direct" | "routed" | "bridge" => ground.mtu,
            "wireguard-go" => ground.mtu - vpn::OVERHEAD,
            _ => ground.mtu - VXLAN,
        };
        let rig = if within { Rig::on_one_node(name, mtu)? } else { Rig::new(name, ground, mtu)? };
        let container = rig.sides[1].container_address();
        let (mut overlay, mut vpn) = (None, None);
        let target = match name {
            "direct" => rig.direct(ground)?,
            "routed" => rig.route()?,
            "vxlan" => rig.vxlan(ground)?,
            "vxlan+dnat" => {
                rig.vxlan(ground)?;
                rig.dnat(services)?
            }
            "bridge" => container,
            "wireguard-go" => {
                vpn = Some(Vpn::new(&rig)?);
                container
            }
            "ebpf" | "ebpf-bare" | "ebpf-instance" | "tun" | "local" => {
                let kind = match name {
                    "tun" => Kind::Tun,
                    "ebpf-bare" => Kind::Bare,
                    _ => Kind::Framed,
                };
                let made = overlay.insert(Overlay::new(&rig, kind, Sizes::of_services(services), ground.mtu)?);
                if name == "ebpf-instance" { made.instance() } else { made.service() }
            }
            _ => bail!("there is no mode {name}"),
        };
        let [client, server] = &rig.sides;
        let ends = Ends { client: client.container_netns(), server: server.container_netns(), targets: vec![target] };
        Ok(Self { name, ends, vpn, _overlay: overlay, _rig: rig })
    }

    /// Runs a case once.
    ///
    /// # Errors
    /// Where the two ends do not reach each other.
    pub fn measure(&self, case: Case, time: std::time::Duration) -> Result<Sample> {
        let others = self.vpn.as_ref().map(Vpn::processes).unwrap_or_default();
        cores::pin(case.cores(), &others)?;
        measure(case, &self.ends, time).with_context(|| format!("mode {}", self.name))
    }
}
