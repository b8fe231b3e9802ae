//! Ways out: which interface and source address lead to an address, and the service networks' routes to the TUN device.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_route::link::InfoKind;

use super::journal::Undo;
use super::kernel::{LinkState, RouteState};
use super::{LinkError, Links, Route, sysctl, veth};

const MAIN_TABLE: u32 = 254;

impl Links {
    pub(super) async fn ensure_routes_to_tun(&self, v4: Ipv4Addr, v6: Ipv6Addr) -> Result<(), LinkError> {
        let tun = self.netlink.link(&self.config.tun).await?.ok_or_else(|| LinkError::Kernel {
            step: "look up",
            object: self.config.tun.clone(),
            reason: "the TUN device does not exist yet".into(),
        })?;
        sysctl::settle_own_interface(&tun.name)?;
        let mut wanted = vec![(IpAddr::V4(v4), 32, IpAddr::V4(self.config.service_v4.0), self.config.service_v4.1)];
        if sysctl::has_ipv6() {
            wanted.push((IpAddr::V6(v6), 128, IpAddr::V6(self.config.service_v6.0), self.config.service_v6.1));
        }
        let present = self.netlink.addresses(tun.index).await?;
        for (address, host, _, _) in &wanted {
            if !present.contains(&(*address, *host)) {
                self.journal().note(Undo::DelAddress { link: tun.name.clone(), address: *address, prefix: *host })?;
                self.netlink.add_address(tun.index, *address, *host).await?;
            }
        }
        self.netlink.set_up(&tun).await?;
        for (_, _, network, prefix) in wanted {
            self.journal().note(Undo::DelRoute { link: tun.name.clone(), destination: network, prefix })?;
            self.netlink.ensure_route(tun.index, network, prefix).await?;
        }
        Ok(())
    }

    pub(super) async fn find_route(&self, address: IpAddr) -> Result<Route, LinkError> {
        let route = self.netlink.route_to(address).await?;
        let link = match route.interface {
            Some(index) => self.netlink.link_at(index).await?,
            None => None,
        };
        let link = link.ok_or(LinkError::NoRoute(address))?;
        let source = match route.source {
            Some(source) => source,
            None => self.first_address(&link, address.is_ipv6()).await?.ok_or(LinkError::NoRoute(address))?,
        };
        Ok(Route {
            ifindex: link.index,
            source,
            mtu: route.mtu.map_or(link.mtu, |mtu| mtu.min(link.mtu)),
            interface: link.name,
        })
    }

    pub(super) async fn find_route_over(&self, name: &str) -> Result<Option<Route>, LinkError> {
        let Some(link) = self.netlink.link(name).await? else { return Ok(None) };
        let v4 = self.first_address(&link, false).await?;
        let source = match v4 {
            Some(v4) => Some(v4),
            None => self.first_address(&link, true).await?,
        };
        Ok(source.map(|source| Route { interface: link.name, ifindex: link.index, source, mtu: link.mtu }))
    }

    pub(super) async fn find_default_route(&self) -> Result<Route, LinkError> {
        for v6 in [false, true] {
            if v6 && !sysctl::has_ipv6() {
                continue;
            }
            let mut defaults: Vec<RouteState> = self.netlink.routes(v6).await?;
            defaults.retain(|route| route.prefix == 0 && route.unicast && route.table == MAIN_TABLE);
            defaults.sort_by_key(|route| route.priority);
            for route in defaults {
                if let Some(route) = self.resolve_default(&route, v6).await? {
                    return Ok(route);
                }
            }
        }
        self.first_connected().await?.ok_or(LinkError::NoRoute(Ipv4Addr::UNSPECIFIED.into()))
    }

    async fn resolve_default(&self, route: &RouteState, v6: bool) -> Result<Option<Route>, LinkError> {
        let link = match route.interface {
            Some(index) => self.netlink.link_at(index).await?,
            None => None,
        };
        let Some(link) = link.filter(|link| !self.is_ours(link)) else { return Ok(None) };
        let mut source = route.source;
        // The kernel knows which of several addresses belongs with this gateway, unless the gateway needs an interface named with it.
        if let (None, Some(gateway)) = (source, route.gateway) {
            source = self
                .netlink
                .route_to(gateway)
                .await
                .ok()
                .filter(|way| way.interface == Some(link.index))
                .and_then(|way| way.source);
            source = source.filter(|source| !matches!(source, IpAddr::V6(v6) if v6.is_unicast_link_local()));
        }
        if source.is_none() {
            source = self.first_address(&link, v6).await?;
        }
        Ok(source.map(|source| Route {
            ifindex: link.index,
            source,
            mtu: route.mtu.map_or(link.mtu, |mtu| mtu.min(link.mtu)),
            interface: link.name,
        }))
    }

    /// Without a default route: a plain interface before a bridge, IPv4 before IPv6.
    async fn first_connected(&self) -> Result<Option<Route>, LinkError> {
        let mut links = self.netlink.links().await?;
        links.retain(|link| link.up && !link.loopback && !self.is_ours(link));
        links.sort_by_key(|link| (link.kind == Some(InfoKind::Bridge), link.index));
        for v6 in [false, true] {
            for link in &links {
                if let Some(source) = self.first_address(link, v6).await? {
                    return Ok(Some(Route {
                        interface: link.name.clone(),
                        ifindex: link.index,
                        source,
                        mtu: link.mtu,
                    }));
                }
            }
        }
        Ok(None)
    }

    async fn first_address(&self, link: &LinkState, v6: bool) -> Result<Option<IpAddr>, LinkError> {
        let addresses = self.netlink.addresses(link.index).await?;
        Ok(addresses.into_iter().map(|(address, _)| address).find(|address| address.is_ipv6() == v6))
    }

    fn is_ours(&self, link: &LinkState) -> bool {
        link.name == self.config.bridge || link.name == self.config.tun || veth::is_host_end(link)
    }
}
