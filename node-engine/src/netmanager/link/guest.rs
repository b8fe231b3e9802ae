//! A machine inside an instance's namespace: where a runtime has put a TAP device there, a guest is behind it, with an address that
//! only the namespace knows. It is joined to the instance's wire by translation, so that nobody else need know of it:
//!
//! ```text
//! eth0 (the instance's address)   to it  → 192.168.1.2          tap0 ── virbr0 192.168.1.1/30 ── guest 192.168.1.2
//!                                 from the guest → masquerade
//! ```

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use rtnetlink::{LinkBridge, LinkMessageBuilder, LinkUnspec};

use crate::model::Addresses;
use crate::netns::Netns;

use super::journal::Family;
use super::kernel::Netlink;
use super::nft::{Batch, Expression, Hook, Place};
use super::ports::{TABLE, blocking, refused_by_kernel};
use super::{LinkError, gone, sysctl};

/// By this device a namespace with a guest is known.
const TAP: &str = "tap0";
const BRIDGE: &str = "virbr0";
const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 1);
const GUEST: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 2);
const NETWORK: Ipv4Addr = Ipv4Addr::new(192, 168, 1, 0);
const PREFIX: u8 = 30;

const PREROUTING: &str = "prerouting";
const POSTROUTING: &str = "postrouting";
const DESTINATION_PRIORITY: i32 = -100;
const SOURCE_PRIORITY: i32 = 100;

/// Joins the guest to the namespace's wire, if there is one. Repeatable; all of it ends with the namespace.
pub(super) async fn ensure(
    inside: &Netlink,
    netns: &Arc<Netns>,
    wire: &'static str,
    mtu: u32,
    addresses: Addresses,
) -> Result<(), LinkError> {
    if inside.link(TAP).await?.is_none() {
        return Ok(());
    }
    if inside.link(BRIDGE).await?.is_none() {
        inside.create(BRIDGE, LinkMessageBuilder::<LinkBridge>::new(BRIDGE).build()).await?;
    }
    let bridge = inside.link(BRIDGE).await?.ok_or_else(|| gone(BRIDGE, "the bridge has disappeared"))?;
    inside.set(TAP, LinkUnspec::new_with_name(TAP).mtu(mtu).controller(bridge.index).up().build()).await?;
    inside.add_address(bridge.index, IpAddr::V4(GATEWAY), PREFIX).await?;
    inside.set(BRIDGE, LinkUnspec::new_with_name(BRIDGE).mtu(mtu).up().build()).await?;
    let netns = netns.clone();
    let translated = blocking("write rules of a guest to", move || {
        netns.run(|| sysctl::forward_here().map(|()| translation(wire, addresses.v4).commit()))?
    });
    translated.await?.map_err(|refused| refused_by_kernel(&refused))
}

/// Written anew as a whole: connections that are known already go on as they are.
fn translation(wire: &str, address: Ipv4Addr) -> Batch {
    let family = Family::V4;
    let mut batch = Batch::new();
    batch.table(family, TABLE);
    batch.delete_table(family, TABLE);
    batch.table(family, TABLE);
    batch.nat_chain(family, TABLE, PREROUTING, Hook::Prerouting, DESTINATION_PRIORITY);
    batch.nat_chain(family, TABLE, POSTROUTING, Hook::Postrouting, SOURCE_PRIORITY);
    let to_instance = [
        Expression::In(wire.to_owned()),
        Expression::Destination { network: IpAddr::V4(address), prefix: 32 },
        Expression::TranslateToAddress(IpAddr::V4(GUEST)),
    ];
    batch.rule(family, TABLE, PREROUTING, Place::Last, "to the guest", &to_instance);
    let from_guest = [
        Expression::Source { network: IpAddr::V4(NETWORK), prefix: PREFIX },
        Expression::Out { name: wire.to_owned(), equal: true },
        Expression::Masquerade,
    ];
    batch.rule(family, TABLE, POSTROUTING, Place::Last, "from the guest", &from_guest);
    batch
}
