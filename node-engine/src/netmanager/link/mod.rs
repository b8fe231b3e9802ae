//! The host's own network objects: bridge, veths, addresses, routes, NAT and published ports, all through netlink. Every change is
//! journaled with its inverse in the run directory before it is made, so that `uninstall` brings the host back as it was, also after
//! a kill at any step. Does not know the service table or the datapath.

mod bridge;
mod changes;
mod framing;
mod guard;
mod guest;
mod journal;
mod kernel;
mod legacy;
mod neighbour;
mod nft;
mod ports;
mod relay;
mod route;
mod sysctl;
#[cfg(test)]
mod tests;
mod veth;

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use netlink_packet_route::link::InfoKind;

use crate::model::{Addresses, InstanceId, PortMapping, Subnet};

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use {
    journal::round_trip as journal_round_trip, legacy::understand as legacy, nft::understand as attributes,
};

use changes::Changes;
use journal::{Journal, Undo};
use kernel::Netlink;

/// Names and sizes of what this node makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkConfig {
    pub bridge: String,
    pub tun: String,
    /// The device that makes the kernel join framed packets.
    pub framing: String,
    /// MTU of bridge and veths.
    pub mtu: u32,
    /// Where the journal of changes lies.
    pub run_dir: PathBuf,
    /// UDP port of the tunnel, here and at the peers.
    pub tunnel_port: u16,
    /// Networks routed to the TUN device.
    pub service_v4: (Ipv4Addr, u8),
    pub service_v6: (Ipv6Addr, u8),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bridge {
    pub ifindex: u32,
    pub mac: [u8; 6],
}

/// A connected namespace, seen from the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Veth {
    /// Host end.
    pub name: String,
    pub ifindex: u32,
    /// MAC of the container end.
    pub mac: [u8; 6],
}

/// How packets to an address leave this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    pub interface: String,
    pub ifindex: u32,
    /// The kernel's preferred source address on this way.
    pub source: IpAddr,
    pub mtu: u32,
}

#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    #[error("{step} {object}: {reason}")]
    Kernel { step: &'static str, object: String, reason: String },
    #[error("no route to {0}")]
    NoRoute(IpAddr),
    #[error("interface {0} exists and is not ours: configure another name or remove it")]
    Foreign(String),
    #[error("{0}")]
    Netns(std::io::Error),
    #[error("journal {path}: {reason}")]
    Journal { path: PathBuf, reason: String },
}

/// Handle to what this node has made on its host. Methods may be called again after a failure, a restart, or when somebody else has
/// changed what they made; two at the same time are safe as long as they concern different instances.
pub struct Links {
    config: LinkConfig,
    netlink: Netlink,
    changes: Changes,
    journal: Mutex<Journal>,
    wanted: Mutex<ports::Wanted>,
    guard: Mutex<guard::Guard>,
    relay: relay::Relay,
    warnings: Mutex<Vec<String>>,
}

impl Links {
    /// Opens netlink in the calling thread's namespace and reads the journal of an earlier run.
    pub async fn open(config: LinkConfig) -> Result<Self, LinkError> {
        let failed = |error: std::io::Error| LinkError::Kernel {
            step: "open",
            object: "netlink".into(),
            reason: error.to_string(),
        };
        Ok(Self {
            netlink: Netlink::open().map_err(failed)?,
            changes: Changes::watch().map_err(failed)?,
            journal: Mutex::new(Journal::open(&config.run_dir)?),
            wanted: Mutex::default(),
            guard: Mutex::default(),
            relay: relay::Relay::default(),
            warnings: Mutex::default(),
            config,
        })
    }

    /// Bridge with the subnet's +1 addresses, forwarding sysctls, NAT to the outside, acceptance in the host's own filter (Docker's
    /// `DOCKER-USER`). Repeatable; a different subnet replaces the old one's addresses and rules. Cheap where nothing is missing, and
    /// puts back what others have flushed: call it again from time to time, and when the container engine has restarted.
    pub async fn ensure_bridge(&self, subnet: Subnet) -> Result<Bridge, LinkError> {
        sysctl::ensure_forwarding(&mut self.journal())?;
        let bridge = self.ensure_bridge_link(subnet).await?;
        self.ensure_nat(subnet).await?;
        sysctl::route_loopback(&self.config.bridge)?;
        self.ensure_guards().await?;
        self.ensure_accepted().await?;
        Ok(bridge)
    }

    /// Addresses of the TUN device and the routes of the service networks to it. The device must exist. Repeatable.
    pub async fn ensure_tun_routes(&self, v4: Ipv4Addr, v6: Ipv6Addr) -> Result<(), LinkError> {
        self.ensure_routes_to_tun(v4, v6).await
    }

    /// Makes the device for framed packets on this UDP port: name and index. It is down where it is new.
    pub async fn ensure_framing(&self, port: u16) -> Result<(String, u32), LinkError> {
        self.ensure_framing_link(port).await
    }

    /// Sets the device for framed packets up.
    pub async fn raise_framing(&self) -> Result<(), LinkError> {
        self.raise_framing_link().await
    }

    /// Sets the device for framed packets down, where there is one: its port is free for others then.
    pub async fn lower_framing(&self) -> Result<(), LinkError> {
        self.lower_framing_link().await
    }

    /// Removes the device for framed packets, if there is one of an earlier run.
    pub async fn remove_framing(&self) -> Result<(), LinkError> {
        self.remove_framing_link().await
    }

    /// veth from the bridge into the namespace, with both addresses, routes, loopback up. Repeatable: what is already connected to
    /// the same namespace (compared by its identity, not its path) is completed and returned; a connection to another namespace is
    /// replaced. Half of it is undone when a step fails.
    pub async fn attach(
        &self,
        instance: &InstanceId,
        netns: &Path,
        subnet: Subnet,
        addresses: Addresses,
    ) -> Result<Veth, LinkError> {
        let veth = self.attach_veth(instance, netns, subnet, addresses).await?;
        self.watch(&[(veth.clone(), addresses)]);
        self.ensure_guard(&veth.name).await?;
        Ok(veth)
    }

    /// Removes the instance's veth. Repeatable.
    pub async fn detach(&self, instance: &InstanceId) -> Result<(), LinkError> {
        self.detach_veth(instance).await?;
        if let Some(addresses) = self.watched(instance)
            && let Some(bridge) = self.netlink.link(&self.config.bridge).await?
        {
            self.forget_neighbours(bridge.index, addresses).await?;
        }
        self.unwatch(instance).await
    }

    /// Veths of an earlier run whose senders are to be checked from now on, at the next `ensure_bridge`.
    pub fn adopt(&self, veths: &[(Veth, Addresses)]) {
        self.watch(veths);
    }

    /// What was dropped because no instance may send it, by reason.
    pub fn counters(&self) -> Vec<(String, u64)> {
        guard::counters()
    }

    /// The instances that are connected now, whoever connected them: for adoption after a restart.
    pub async fn attached(&self) -> Result<Vec<(InstanceId, Veth)>, LinkError> {
        self.attached_veths().await
    }

    /// Those of them whose host end is a port of this bridge.
    pub async fn connected(&self, bridge: &Bridge) -> Result<Vec<(InstanceId, Veth)>, LinkError> {
        self.connected_veths(bridge.ifindex).await
    }

    /// Replaces all published ports of this node in one transaction. An address of the host's own, loopback included, at the host port
    /// leads to the instance, from outside, from instances and from the host itself. `::1` is served by this process, while it runs.
    pub async fn publish(&self, subnet: Subnet, ports: &[(PortMapping, Addresses)]) -> Result<(), LinkError> {
        self.publish_ports(subnet, ports).await
    }

    pub async fn route_to(&self, address: IpAddr) -> Result<Route, LinkError> {
        self.find_route(address).await
    }

    /// The default route's interface, else the first interface that is up and has a global address.
    pub async fn default_route(&self) -> Result<Route, LinkError> {
        self.find_default_route().await
    }

    /// The way out over this interface: its first global address, IPv4 before IPv6. `None` where there is no such interface, or it
    /// has no address.
    pub async fn route_over(&self, name: &str) -> Result<Option<Route>, LinkError> {
        self.find_route_over(name).await
    }

    /// Index of the interface with this name, if there is one.
    pub async fn link_index(&self, name: &str) -> Result<Option<u32>, LinkError> {
        Ok(self.netlink.link(name).await?.map(|link| link.index))
    }

    /// Resolves when links, addresses or routes have changed (coalesced); pends otherwise. A change between two calls is kept for
    /// the next, and cancelling loses none.
    pub async fn changed(&self) {
        self.changes.next().await;
    }

    /// What the last `ensure_bridge` found in the way of traffic and may not change itself, a sentence each.
    pub fn warnings(&self) -> Vec<String> {
        self.warnings.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Undoes everything in the journal, newest first, and removes the TUN device that the datapath keeps over restarts; goes on past
    /// errors and returns them all. What could not be undone stays in the journal for another try; when nothing is left the journal
    /// is deleted.
    pub async fn uninstall(&self) -> Vec<LinkError> {
        let mut errors = Vec::new();
        let undos = self.journal().to_undo();
        for undo in undos {
            let undone = self.undo(&undo).await.and_then(|()| self.journal().settle(&undo));
            errors.extend(undone.err());
        }
        errors.extend(self.remove_tun().await.err());
        errors.extend(self.journal().close().err());
        errors
    }

    async fn remove_tun(&self) -> Result<(), LinkError> {
        match self.netlink.link(&self.config.tun).await? {
            Some(link) if link.kind == Some(InfoKind::Tun) => self.netlink.delete(&link.name).await,
            _ => Ok(()),
        }
    }

    async fn undo(&self, undo: &Undo) -> Result<(), LinkError> {
        match undo {
            Undo::DelLink { name } => self.netlink.delete(name).await,
            Undo::DelAddress { link, address, prefix } => match self.netlink.link(link).await? {
                Some(link) => self.netlink.delete_address(link.index, *address, *prefix).await,
                None => Ok(()),
            },
            Undo::DelRoute { link, destination, prefix } => match self.netlink.link(link).await? {
                Some(link) => self.netlink.delete_route(link.index, *destination, *prefix).await,
                None => Ok(()),
            },
            Undo::RestoreSysctl { path, ours, old } => sysctl::restore(path, ours, old).map_err(|error| {
                LinkError::Kernel { step: "restore", object: path.clone(), reason: error.to_string() }
            }),
            Undo::DelTable { family } => ports::delete_table(*family).await,
            Undo::DelRules { family, table, chain } => bridge::delete_rules(*family, table, chain).await,
        }
    }

    /// Never held across an await.
    fn journal(&self) -> MutexGuard<'_, Journal> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Links {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Links").field("config", &self.config).finish_non_exhaustive()
    }
}

/// Names of what [`Links::counters`] counts.
#[cfg(test)]
pub(super) fn counted() -> impl Iterator<Item = &'static str> {
    guard::REASONS.into_iter().chain([guard::DROP_LOOPBACK, guard::DROP_TUNNEL, guard::DROP_OUTSIDE])
}

fn gone(name: &str, reason: &str) -> LinkError {
    LinkError::Kernel { step: "look up", object: name.to_owned(), reason: reason.to_owned() }
}

/// A stable number for a name (FNV-1a): interface names and MACs are derived from it, and must be the same after an upgrade.
fn stable_hash(name: &str) -> u64 {
    name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// A locally administered unicast address that a name always gets.
fn stable_mac(name: &str) -> [u8; 6] {
    let [a, b, c, d, e, ..] = stable_hash(name).to_be_bytes();
    [0x02, a, b, c, d, e]
}

/// The gateway of a node's subnet: +1 in both families.
pub(super) fn gateway(subnet: Subnet) -> Addresses {
    Addresses {
        v4: Ipv4Addr::from(u32::from(subnet.v4).wrapping_add(1)),
        v6: Ipv6Addr::from(u128::from(subnet.v6).wrapping_add(1)),
    }
}
