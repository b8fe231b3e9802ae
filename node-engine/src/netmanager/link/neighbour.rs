//! Whoever was looked for over an interface without a carrier is looked for anew as soon as it has one. The kernel asks once a second
//! and forgets all neighbours with the carrier, so that packets would wait for its next question for up to a second. And an address that
//! is given to another instance leads to that one at once, not when the kernel doubts what it has heard of the one before.

use std::collections::BTreeMap;
use std::net::IpAddr;

use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::model::Addresses;

use super::kernel::Netlink;
use super::{LinkError, Links, sysctl};

/// Which interfaces have a carrier.
#[derive(Debug, Default)]
pub(super) struct Carriers {
    known: BTreeMap<u32, bool>,
}

impl Carriers {
    /// The interface that has a carrier now and had none, or was unknown.
    pub(super) fn raised(&mut self, news: &NetlinkMessage<RouteNetlinkMessage>) -> Option<u32> {
        match &news.payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) => {
                let (index, carrier) = (link.header.index, has_carrier(link));
                let before = self.known.insert(index, carrier);
                (carrier && before != Some(true)).then_some(index)
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link)) => {
                self.known.remove(&link.header.index);
                None
            }
            _ => None,
        }
    }
}

fn has_carrier(link: &LinkMessage) -> bool {
    link.header.flags.contains(LinkFlags::Up | LinkFlags::LowerUp)
}

impl Netlink {
    /// Has the kernel begin again with every neighbour that has not answered yet: how many.
    pub(super) async fn seek_anew(&self, link: u32) -> Result<usize, LinkError> {
        let mut sought = 0;
        for neighbour in self.neighbours().await? {
            let Some(address) = unanswered(&neighbour, link) else { continue };
            // One that is being looked for already is not asked for sooner by being asked for again.
            self.forget_neighbour(neighbour).await?;
            self.seek_neighbour(link, address).await?;
            sought += 1;
        }
        Ok(sought)
    }
}

impl Links {
    /// Whoever had these addresses on the bridge has them no longer.
    pub(super) async fn forget_neighbours(&self, bridge: u32, addresses: Addresses) -> Result<(), LinkError> {
        let v6 = sysctl::has_ipv6().then_some(IpAddr::V6(addresses.v6));
        for address in [Some(IpAddr::V4(addresses.v4)), v6].into_iter().flatten() {
            self.netlink.forget_neighbour(neighbour(bridge, address)).await?;
        }
        Ok(())
    }
}

fn neighbour(link: u32, address: IpAddr) -> NeighbourMessage {
    let (family, destination) = match address {
        IpAddr::V4(v4) => (AddressFamily::Inet, NeighbourAddress::Inet(v4)),
        IpAddr::V6(v6) => (AddressFamily::Inet6, NeighbourAddress::Inet6(v6)),
    };
    let mut neighbour = NeighbourMessage::default();
    (neighbour.header.family, neighbour.header.ifindex) = (family, link);
    neighbour.attributes.push(NeighbourAttribute::Destination(destination));
    neighbour
}

fn unanswered(neighbour: &NeighbourMessage, link: u32) -> Option<IpAddr> {
    let header = &neighbour.header;
    let waits = matches!(header.state, NeighbourState::Incomplete | NeighbourState::Failed);
    if header.ifindex != link || !waits || header.flags.contains(NeighbourFlags::Proxy) {
        return None;
    }
    neighbour.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(index: u32, flags: LinkFlags) -> LinkMessage {
        let mut link = LinkMessage::default();
        (link.header.index, link.header.flags) = (index, flags);
        link
    }

    #[test]
    fn a_carrier_is_told_once_each_time_it_comes() {
        let mut carriers = Carriers::default();
        let mut raised = |index, flags| carriers.raised(&RouteNetlinkMessage::NewLink(link(index, flags)).into());
        let up = LinkFlags::Up | LinkFlags::LowerUp;
        for (flags, told) in [
            (LinkFlags::Up, None),
            (up, Some(3)),
            (up, None),
            (LinkFlags::LowerUp, None),
            (up, Some(3)),
            (LinkFlags::Up, None),
            (up, Some(3)),
        ] {
            assert_eq!(raised(3, flags), told, "{flags:?}");
        }
        assert_eq!(raised(4, up), Some(4), "another");
        assert_eq!(carriers.raised(&RouteNetlinkMessage::DelLink(link(3, up)).into()), None);
        assert_eq!(carriers.known.keys().collect::<Vec<_>>(), [&4], "none is kept that is gone");
    }
}
