//! The wire of an instance: a veth pair from the bridge into its namespace, where it is called `eth0`.
//!
//! The host end is named after a hash of the instance id, since an id does not fit into fifteen characters, and carries the whole id
//! as its alias: `ip link` shows it to people, and a restarted daemon reads it.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, try_join_all};
use netlink_packet_route::link::{InfoData, InfoKind, InfoVeth, LinkAttribute, LinkMessage};
use rtnetlink::{LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVeth};
use tokio::time::{Instant, sleep};
use tracing::{info, warn};

use crate::model::{Addresses, InstanceId, Subnet};
use crate::netns::Netns;

use super::journal::Undo;
use super::kernel::{LinkState, Netlink};
use super::{LinkError, Links, Veth, gateway, gone, guest, stable_hash, stable_mac, sysctl};

/// In every namespace.
const LOOPBACK: u32 = 1;

/// What a workload sees.
const INSTANCE_SIDE: &str = "eth0";
pub(super) const PREFIX: &str = "ne";

/// A bridge that was there is waited for so long.
const REMADE: Duration = Duration::from_secs(3);

/// A super-packet must still fit into 64 KiB with the tunnel's outer headers around it.
const GSO_MAX_SIZE: u32 = 65_000;

/// `ne` and eleven hexadecimal digits.
pub(super) fn host_end(instance: &InstanceId) -> String {
    format!("{PREFIX}{:011x}", stable_hash(&instance.to_string()) >> 20)
}

pub(super) fn is_host_end(link: &LinkState) -> bool {
    link.kind == Some(InfoKind::Veth) && link.name.starts_with(PREFIX) && instance_of(link).is_some()
}

fn instance_of(link: &LinkState) -> Option<InstanceId> {
    link.alias.as_deref()?.parse().ok()
}

impl Links {
    pub(super) async fn attach_veth(
        &self,
        instance: &InstanceId,
        netns: &Path,
        subnet: Subnet,
        addresses: Addresses,
    ) -> Result<Veth, LinkError> {
        let netns = Arc::new(Netns::open(netns).map_err(LinkError::Netns)?);
        let name = host_end(instance);
        let existing = self.own_host_end(instance, &name).await?;
        let fits = match &existing {
            Some(link) => self.leads_into(link, &netns).await?,
            None => false,
        };
        if existing.is_some() && !fits {
            info!(%instance, interface = name, "connected to a namespace that is gone or another: connecting anew");
            self.netlink.delete(&name).await?;
        }
        self.journal().note(Undo::DelLink { name: name.clone() })?;
        let connected = self.connect(instance, &name, &netns, !fits, subnet, addresses).await;
        if connected.is_err() && !fits {
            // The first error is the one to tell; where the undo fails too, the journal keeps the note.
            match self.detach_veth(instance).await {
                Ok(()) => {}
                Err(error) => warn!(%instance, %error, "the interface of a failed attach stays for now"),
            }
        }
        connected
    }

    pub(super) async fn detach_veth(&self, instance: &InstanceId) -> Result<(), LinkError> {
        let name = host_end(instance);
        if self.own_host_end(instance, &name).await?.is_some() {
            self.netlink.delete(&name).await?;
        }
        self.journal().settle(&Undo::DelLink { name })
    }

    pub(super) async fn attached_veths(&self) -> Result<Vec<(InstanceId, Veth)>, LinkError> {
        let attached = self.host_ends(|_| true).await?;
        for (_, veth) in &attached {
            self.journal().note(Undo::DelLink { name: veth.name.clone() })?;
        }
        Ok(attached)
    }

    /// An interface that outlived its bridge is there, and connected to nothing.
    pub(super) async fn connected_veths(&self, bridge: u32) -> Result<Vec<(InstanceId, Veth)>, LinkError> {
        self.host_ends(|link| link.controller == Some(bridge)).await
    }

    async fn host_ends(&self, wanted: impl Fn(&LinkState) -> bool) -> Result<Vec<(InstanceId, Veth)>, LinkError> {
        let mut attached = Vec::new();
        for link in self.netlink.links().await?.into_iter().filter(wanted) {
            let Some(instance) = instance_of(&link).filter(|_| is_host_end(&link)) else { continue };
            let mac = self.mac_of_peer(&link).await.unwrap_or_else(|| stable_mac(&instance.to_string()));
            attached.push((instance, Veth { name: link.name, ifindex: link.index, mac }));
        }
        Ok(attached)
    }

    /// The instance's host end, if it exists. A link of this name that is another's is nobody's to touch.
    async fn own_host_end(&self, instance: &InstanceId, name: &str) -> Result<Option<LinkState>, LinkError> {
        let Some(link) = self.netlink.link(name).await? else { return Ok(None) };
        let ours = match &link.alias {
            Some(alias) => *alias == instance.to_string(),
            // Killed between making and naming it.
            None => self.journal().holds(&Undo::DelLink { name: name.to_owned() }),
        };
        if link.kind == Some(InfoKind::Veth) && ours {
            Ok(Some(link))
        } else {
            Err(LinkError::Foreign(name.to_owned()))
        }
    }

    async fn leads_into(&self, link: &LinkState, netns: &Netns) -> Result<bool, LinkError> {
        Ok(link.peer_netns.is_some() && link.peer_netns == self.netlink.netns_id(netns).await?)
    }

    /// Every step is repeatable but the making of the pair.
    async fn connect(
        &self,
        instance: &InstanceId,
        name: &str,
        netns: &Arc<Netns>,
        create: bool,
        subnet: Subnet,
        addresses: Addresses,
    ) -> Result<Veth, LinkError> {
        let bridge = self.awaited_bridge().await?;
        if create {
            let pair = self.pair(instance, name, netns, bridge.index, true);
            if self.netlink.create(name, pair).await.is_err() {
                // A kernel that refuses the limit on super-packets has another of its own.
                self.netlink.create(name, self.pair(instance, name, netns, bridge.index, false)).await?;
            }
        }
        let host_side = LinkUnspec::new_with_name(name).alias(instance.to_string()).controller(bridge.index).up();
        // An instance that asks for a port it has published itself: where bridged packets pass the IP filter (Docker wants it so), the
        // bridge has to send them out where they came in.
        let port = LinkBridgePort::new(0).name(name).hairpin(true);
        // Sent in this order without waiting in between, which the kernel keeps.
        let ((), (), host, inside) = tokio::try_join!(
            self.netlink.set(name, host_side.build()),
            self.netlink.set_port(name, port.build()),
            self.netlink.link(name),
            enter(netns),
        )?;
        let host = host.ok_or_else(|| gone(name, "the interface has disappeared"))?;
        let instance_side = host.peer.ok_or_else(|| gone(name, "its other end has disappeared"))?;
        let new_mac = create.then(|| stable_mac(&instance.to_string()));
        let mac = furnish(&inside, instance_side, new_mac, subnet, addresses).await?;
        guest::ensure(&inside, netns, INSTANCE_SIDE, self.config.mtu, addresses).await?;
        if create {
            self.forget_neighbours(bridge.index, addresses).await?;
        }
        Ok(Veth { name: host.name, ifindex: host.index, mac })
    }

    /// Where others have just removed the bridge, upkeep makes it anew in a moment.
    async fn awaited_bridge(&self) -> Result<LinkState, LinkError> {
        let name = &self.config.bridge;
        let deadline = Instant::now() + REMADE;
        loop {
            if let Some(bridge) = self.netlink.link(name).await? {
                return Ok(bridge);
            }
            if Instant::now() >= deadline || !self.journal().holds(&Undo::DelLink { name: name.clone() }) {
                return Err(gone(name, "the bridge does not exist yet"));
            }
            sleep(REMADE / 60).await;
        }
    }

    /// Both ends in one request: the instance's end is born inside its namespace. It cannot be born up: at that moment the kernel has
    /// not joined the two yet.
    fn pair(&self, instance: &InstanceId, name: &str, netns: &Netns, bridge: u32, limited: bool) -> LinkMessage {
        let gso = [LinkAttribute::GsoMaxSize(GSO_MAX_SIZE), LinkAttribute::GsoIpv4MaxSize(GSO_MAX_SIZE)];
        let gso = if limited { &gso[..] } else { &[] };
        let mut inner = LinkUnspec::new_with_name(INSTANCE_SIDE)
            .mtu(self.config.mtu)
            .address(stable_mac(&instance.to_string()).to_vec())
            .setns_by_fd(netns.as_fd().as_raw_fd());
        let mut outer =
            LinkMessageBuilder::<LinkVeth>::new(name, INSTANCE_SIDE).mtu(self.config.mtu).controller(bridge);
        for attribute in gso {
            inner = inner.append_extra_attribute(attribute.clone());
            outer = outer.append_extra_attribute(attribute.clone());
        }
        outer.set_info_data(InfoData::Veth(InfoVeth::Peer(inner.build()))).build()
    }

    async fn mac_of_peer(&self, link: &LinkState) -> Option<[u8; 6]> {
        self.netlink.link_in(link.peer_netns?, link.peer?).await.ok()??.mac
    }
}

/// A socket inside the instance's namespace, whose settings are ready for the interface.
async fn enter(netns: &Arc<Netns>) -> Result<Netlink, LinkError> {
    let runtime = tokio::runtime::Handle::current();
    let netns = netns.clone();
    let opened = tokio::task::spawn_blocking(move || {
        netns.run(|| {
            let _context = runtime.enter();
            sysctl::prepare_instance_side(INSTANCE_SIDE)?;
            Netlink::open()
        })
    });
    opened.await.map_err(std::io::Error::other).and_then(|opened| opened?).map_err(LinkError::Netns)
}

/// Addresses, routes and loopback inside the instance's namespace. An interface just made has its MAC from us and nothing else yet;
/// of another we look what it has. Returns the MAC.
async fn furnish(
    inside: &Netlink,
    interface: u32,
    new_mac: Option<[u8; 6]>,
    subnet: Subnet,
    addresses: Addresses,
) -> Result<[u8; 6], LinkError> {
    let gateway = gateway(subnet);
    let mut wanted = vec![(IpAddr::V4(addresses.v4), Subnet::V4_PREFIX, IpAddr::V4(gateway.v4))];
    if sysctl::has_ipv6() {
        wanted.push((IpAddr::V6(addresses.v6), Subnet::V6_PREFIX, IpAddr::V6(gateway.v6)));
    }
    let (mac, present) = match new_mac {
        Some(mac) => (mac, Vec::new()),
        None => {
            let (link, present) = tokio::try_join!(inside.link_at(interface), inside.addresses(interface))?;
            let mac = link.and_then(|link| link.mac);
            (mac.ok_or_else(|| gone(INSTANCE_SIDE, "the interface has left the instance's namespace"))?, present)
        }
    };
    let is_wanted = |address, prefix| wanted.iter().any(|(wanted, length, _)| (*wanted, *length) == (address, prefix));

    let mut steps: Vec<BoxFuture<'_, Result<(), LinkError>>> = Vec::new();
    steps.push(inside.set("lo", LinkUnspec::new_with_index(LOOPBACK).up().build()).boxed());
    steps.push(inside.set(INSTANCE_SIDE, LinkUnspec::new_with_index(interface).up().build()).boxed());
    for (address, prefix) in present.iter().filter(|(address, prefix)| !is_wanted(*address, *prefix)) {
        steps.push(inside.delete_address(interface, *address, *prefix).boxed());
    }
    for (address, prefix, gateway) in &wanted {
        if !present.contains(&(*address, *prefix)) {
            steps.push(inside.add_address(interface, *address, *prefix).boxed());
        }
        let everywhere = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        steps.push(inside.replace_route(interface, everywhere, 0, Some(*gateway)).boxed());
    }
    // All are sent before the first answer is awaited, and the kernel takes them in this order.
    try_join_all(steps).await?;
    Ok(mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_ends_fit_an_interface_name_and_never_change() {
        let instance: InstanceId = "app.default.web.test.instance.0".parse().unwrap();
        let name = host_end(&instance);
        assert_eq!(name.len(), 13);
        // Links of a running node carry these names: a change would orphan them at an upgrade.
        assert_eq!(name, "ne625889eda3d");
        assert_eq!(stable_mac(&instance.to_string())[0] & 3, 2, "locally administered unicast");
        let other: InstanceId = "app.default.web.test.instance.1".parse().unwrap();
        assert_ne!(host_end(&other), name);
    }
}
