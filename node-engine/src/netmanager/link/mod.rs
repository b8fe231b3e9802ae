//! The host's own network objects: bridge, veths, addresses, routes, NAT and published ports, all through netlink. Every change is
//! journaled with its inverse in the run directory before it is made, so that `uninstall` brings the host back as it was, also after
//! a kill at any step. Does not know the service table or the datapath.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use crate::model::{Addresses, InstanceId, PortMapping, Subnet};

/// Names and sizes of what this node makes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkConfig {
    pub bridge: String,
    pub tun: String,
    /// MTU of bridge and veths.
    pub mtu: u32,
    /// Where the journal of changes lies.
    pub run_dir: PathBuf,
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
    #[error("journal {path}: {reason}")]
    Journal { path: PathBuf, reason: String },
}

#[expect(dead_code, reason = "skeleton: the signatures that link/ implements")]
trait LinkSignatures: Sized {
    /// Opens netlink and reads the journal of an earlier run.
    async fn open(config: LinkConfig) -> Result<Self, LinkError>;
    /// Bridge with the subnet's +1 addresses, forwarding sysctls, NAT to the outside, acceptance in the host's own filter (Docker's
    /// `DOCKER-USER`). Repeatable; a different subnet replaces the old one's addresses and rules.
    async fn ensure_bridge(&self, subnet: Subnet) -> Result<Bridge, LinkError>;
    /// Addresses of the TUN device and the routes of the service networks to it. Repeatable.
    async fn ensure_tun_routes(&self, v4: Ipv4Addr, v6: Ipv6Addr) -> Result<(), LinkError>;
    /// veth from the bridge into the namespace, with both addresses, routes, loopback up. Repeatable: what is already connected to
    /// the same namespace (compared by inode) is returned as it is.
    async fn attach(
        &self,
        instance: &InstanceId,
        netns: &Path,
        subnet: Subnet,
        addresses: Addresses,
    ) -> Result<Veth, LinkError>;
    /// Removes the instance's veth. Repeatable.
    async fn detach(&self, instance: &InstanceId) -> Result<(), LinkError>;
    /// Replaces all published ports of this node in one transaction.
    async fn publish(&self, subnet: Subnet, ports: &[(PortMapping, Addresses)]) -> Result<(), LinkError>;
    async fn route_to(&self, address: IpAddr) -> Result<Route, LinkError>;
    /// The default route's interface, else the first interface that is up and has a global address.
    async fn default_route(&self) -> Result<Route, LinkError>;
    /// Resolves when links, addresses or routes have changed (coalesced); pends otherwise.
    async fn changed(&self);
    /// Undoes everything in the journal, newest first; goes on past errors and returns them all.
    async fn uninstall(&self) -> Vec<LinkError>;
}
