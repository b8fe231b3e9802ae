//! rtnetlink with our errors: one socket in one network namespace, and the few requests this module makes, each repeatable.
//! What the kernel answers is turned into small plain structs here.

use std::fmt::Display;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::num::NonZeroI32;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use futures_util::{Stream, StreamExt, TryStreamExt};
use netlink_packet_core::{ErrorMessage, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourFlags, NeighbourMessage, NeighbourState};
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteMetric, RouteScope, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};
use rtnetlink::sys::AsyncSocket;
use rtnetlink::{AddressMessageBuilder, Error, Handle, LinkUnspec, RouteMessageBuilder};
use tokio::sync::Mutex;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::LinkError;

/// A list that the kernel cannot give now is asked for again so often, and so much later.
const LIST_TRIES: usize = 20;
const LIST_PAUSE: Duration = Duration::from_millis(5);
/// However busy the machine is.
const ANSWER: Duration = Duration::from_secs(20);
/// Of a socket, in bytes; it takes up memory only while answers wait in it.
const ROOM: usize = 4 << 20;

/// A route socket. The namespace it was opened in is the one it speaks of.
#[derive(Debug)]
pub(super) struct Netlink {
    handle: Handle,
    pump: AbortHandle,
    /// Held while a list is read: the kernel serves one list a socket and refuses another meanwhile.
    listing: Mutex<()>,
}

/// An interface, as far as we care.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LinkState {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) up: bool,
    pub(super) loopback: bool,
    pub(super) mtu: u32,
    pub(super) mac: Option<[u8; 6]>,
    pub(super) kind: Option<InfoKind>,
    pub(super) alias: Option<String>,
    pub(super) controller: Option<u32>,
    /// The other end of a veth: its index in its own namespace, and that namespace's id in ours (none: it is ours).
    pub(super) peer: Option<u32>,
    pub(super) peer_netns: Option<i32>,
}

/// A route, as far as we care.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RouteState {
    pub(super) prefix: u8,
    pub(super) unicast: bool,
    pub(super) table: u32,
    pub(super) interface: Option<u32>,
    pub(super) gateway: Option<IpAddr>,
    pub(super) source: Option<IpAddr>,
    pub(super) priority: u32,
    pub(super) mtu: Option<u32>,
}

impl Netlink {
    /// Opens a socket in the calling thread's namespace. The thread must be inside a runtime.
    pub(super) fn open() -> io::Result<Self> {
        let (mut connection, handle, _) = rtnetlink::new_connection()?;
        make_room(connection.socket_mut().socket_ref());
        Ok(Self::over(handle, tokio::spawn(connection).abort_handle()))
    }

    /// Over a connection that this task moves along.
    pub(super) fn over(handle: Handle, pump: AbortHandle) -> Self {
        Self { handle, pump, listing: Mutex::default() }
    }

    pub(super) async fn link(&self, name: &str) -> Result<Option<LinkState>, LinkError> {
        let found = answered(self.handle.link().get().match_name(name).execute().try_next()).await;
        absent_is_none(found).map_err(|error| failed("look up", name, &error)).map(|link| link.map(LinkState::from))
    }

    pub(super) async fn link_at(&self, index: u32) -> Result<Option<LinkState>, LinkError> {
        let found = answered(self.handle.link().get().match_index(index).execute().try_next()).await;
        absent_is_none(found).map_err(|error| failed("look up", index, &error)).map(|link| link.map(LinkState::from))
    }

    /// An interface of the namespace that has this id in ours; kernels before 4.15 do not tell.
    pub(super) async fn link_in(&self, netns: i32, index: u32) -> Result<Option<LinkState>, LinkError> {
        let mut request = self.handle.link().get().match_index(index);
        request.message_mut().attributes.push(LinkAttribute::IfNetnsId(netns));
        let found = answered(request.execute().try_next()).await;
        absent_is_none(found).map_err(|error| failed("look up", index, &error)).map(|link| link.map(LinkState::from))
    }

    pub(super) async fn links(&self) -> Result<Vec<LinkState>, LinkError> {
        let links = self.list(|| self.handle.link().get().execute()).await;
        Ok(links.map_err(|error| failed("list", "links", &error))?.into_iter().map(LinkState::from).collect())
    }

    /// Reads a whole list, again where it was still busy with one that nobody waits for any more, or changed meanwhile.
    async fn list<T, S>(&self, request: impl Fn() -> S) -> Result<Vec<T>, Error>
    where
        S: Stream<Item = Result<T, Error>>,
    {
        let _alone = self.listing.lock().await;
        for _ in 0..LIST_TRIES {
            match answered(request().try_collect()).await {
                Err(error) if matches!(errno(&error), Some(Errno::EBUSY | Errno::EINTR)) => {
                    tokio::time::sleep(LIST_PAUSE).await;
                }
                result => return result,
            }
        }
        answered(request().try_collect()).await
    }

    pub(super) async fn create(&self, name: &str, link: LinkMessage) -> Result<(), LinkError> {
        answered(self.handle.link().add(link).execute()).await.map_err(|error| failed("create", name, &error))
    }

    pub(super) async fn set(&self, name: &str, link: LinkMessage) -> Result<(), LinkError> {
        answered(self.handle.link().set(link).execute()).await.map_err(|error| failed("set up", name, &error))
    }

    /// Settings of a bridge's port.
    pub(super) async fn set_port(&self, name: &str, port: LinkMessage) -> Result<(), LinkError> {
        answered(self.handle.link().set_port(port).execute()).await.map_err(|error| failed("set up", name, &error))
    }

    pub(super) async fn set_up(&self, link: &LinkState) -> Result<(), LinkError> {
        if link.up {
            return Ok(());
        }
        self.set(&link.name, LinkUnspec::new_with_index(link.index).up().build()).await
    }

    pub(super) async fn set_down(&self, link: &LinkState) -> Result<(), LinkError> {
        if !link.up {
            return Ok(());
        }
        self.set(&link.name, LinkUnspec::new_with_index(link.index).down().build()).await
    }

    /// A link that is not there is a success.
    pub(super) async fn delete(&self, name: &str) -> Result<(), LinkError> {
        let message = LinkUnspec::new_with_name(name).build();
        let deleted = answered(self.handle.link().del_with_message(message).execute()).await;
        absent_is_none(deleted.map(Some)).map_err(|error| failed("delete", name, &error)).map(drop)
    }

    /// Without duplicate address detection: whoever hands out the address knows that it is the only one.
    pub(super) async fn add_address(&self, link: u32, address: IpAddr, prefix: u8) -> Result<(), LinkError> {
        let mut message = address_message(link, address, prefix);
        if address.is_ipv6() {
            message.header.flags |= AddressHeaderFlags::Nodad;
            message.attributes.push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        let mut request = self.handle.address().add(link, address, prefix).replace();
        *request.message_mut() = message;
        answered(request.execute()).await.map_err(|error| failed("add address", address, &error))
    }

    /// An address that is not there is a success.
    pub(super) async fn delete_address(&self, link: u32, address: IpAddr, prefix: u8) -> Result<(), LinkError> {
        let deleted = answered(self.handle.address().del(address_message(link, address, prefix)).execute()).await;
        absent_is_none(deleted.map(Some)).map_err(|error| failed("delete address", address, &error)).map(drop)
    }

    /// Addresses with their prefix lengths; link-local ones are the kernel's own affair and left out.
    pub(super) async fn addresses(&self, link: u32) -> Result<Vec<(IpAddr, u8)>, LinkError> {
        let addresses = self.list(|| self.handle.address().get().set_link_index_filter(link).execute()).await;
        let addresses = addresses.map_err(|error| failed("list addresses of link", link, &error))?;
        Ok(addresses
            .iter()
            .filter(|message| message.header.scope == AddressScope::Universe)
            .filter_map(own_address)
            .collect())
    }

    /// Adds the route or makes it what it should be. One that is there is no change that anybody is told of.
    pub(super) async fn ensure_route(&self, link: u32, destination: IpAddr, prefix: u8) -> Result<(), LinkError> {
        let added = answered(self.handle.route().add(route_message(link, destination, prefix, None)).execute()).await;
        match added {
            Ok(()) => Ok(()),
            // There is one; is it this one?
            Err(error) if errno(&error) == Some(Errno::EEXIST) => match self.route_to(destination).await {
                Ok(route) if route.interface == Some(link) => Ok(()),
                _ => self.replace_route(link, destination, prefix, None).await,
            },
            Err(error) => Err(failed("add route to", format_args!("{destination}/{prefix}"), &error)),
        }
    }

    /// The same by way of a gateway; the kernel tells of it even where nothing changes.
    pub(super) async fn replace_route(
        &self,
        link: u32,
        destination: IpAddr,
        prefix: u8,
        gateway: Option<IpAddr>,
    ) -> Result<(), LinkError> {
        let message = route_message(link, destination, prefix, gateway);
        let added = answered(self.handle.route().add(message).replace().execute()).await;
        added.map_err(|error| failed("add route to", format_args!("{destination}/{prefix}"), &error))
    }

    /// A route that is not there is a success.
    pub(super) async fn delete_route(&self, link: u32, destination: IpAddr, prefix: u8) -> Result<(), LinkError> {
        let deleted = answered(self.handle.route().del(route_message(link, destination, prefix, None)).execute()).await;
        absent_is_none(deleted.map(Some))
            .map_err(|error| failed("delete route to", format_args!("{destination}/{prefix}"), &error))
            .map(drop)
    }

    /// How the kernel would send to this address now.
    pub(super) async fn route_to(&self, address: IpAddr) -> Result<RouteState, LinkError> {
        let prefix = if address.is_ipv4() { 32 } else { 128 };
        let mut message = route_message(0, address, prefix, None);
        message.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::Oif(_)));
        match answered(self.handle.route().get(message).execute().try_next()).await {
            Ok(Some(route)) => Ok(RouteState::from(&route)),
            Ok(None) => Err(LinkError::NoRoute(address)),
            Err(error) => match errno(&error) {
                Some(
                    Errno::ENETUNREACH | Errno::EHOSTUNREACH | Errno::EACCES | Errno::EINVAL | Errno::EAFNOSUPPORT,
                ) => Err(LinkError::NoRoute(address)),
                _ => Err(failed("look up route to", address, &error)),
            },
        }
    }

    pub(super) async fn routes(&self, v6: bool) -> Result<Vec<RouteState>, LinkError> {
        let mut message = RouteMessage::default();
        message.header.address_family = if v6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
        let routes = self.list(|| self.handle.route().get(message.clone()).execute()).await;
        Ok(routes.map_err(|error| failed("list", "routes", &error))?.iter().map(RouteState::from).collect())
    }

    /// All neighbours, of all interfaces.
    pub(super) async fn neighbours(&self) -> Result<Vec<NeighbourMessage>, LinkError> {
        let neighbours = self.list(|| self.handle.neighbours().get().execute()).await;
        neighbours.map_err(|error| failed("list", "neighbours", &error))
    }

    /// A neighbour that is not there is a success.
    pub(super) async fn forget_neighbour(&self, neighbour: NeighbourMessage) -> Result<(), LinkError> {
        let link = neighbour.header.ifindex;
        let forgotten = answered(self.handle.neighbours().del(neighbour).execute()).await;
        absent_is_none(forgotten.map(Some))
            .map_err(|error| failed("forget a neighbour at link", link, &error))
            .map(drop)
    }

    /// Has the kernel ask for the link address, where it does not already.
    pub(super) async fn seek_neighbour(&self, link: u32, address: IpAddr) -> Result<(), LinkError> {
        let request = self.handle.neighbours().add(link, address);
        let sought = answered(request.state(NeighbourState::None).flags(NeighbourFlags::Use).execute()).await;
        match sought {
            // A packet to it came in between.
            Err(error) if errno(&error) == Some(Errno::EEXIST) => Ok(()),
            result => result.map_err(|error| failed("look for neighbour", address, &error)),
        }
    }

    /// The id that our namespace knows the other one by, if it knows it.
    pub(super) async fn netns_id(&self, netns: &impl AsFd) -> Result<Option<i32>, LinkError> {
        let fd = u32::try_from(netns.as_fd().as_raw_fd()).unwrap_or(u32::MAX);
        let mut message = NsidMessage::default();
        message.attributes.push(NsidAttribute::Fd(fd));
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetNsId(message));
        request.header.flags = NLM_F_REQUEST;
        let ask = async {
            let mut answers = self.handle.clone().request(request)?;
            while let Some(answer) = answers.next().await {
                match answer.payload {
                    NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNsId(message)) => {
                        return Ok(message.attributes.iter().find_map(|attribute| match attribute {
                            // -1: no id assigned.
                            NsidAttribute::Id(id) => u32::try_from(*id).is_ok().then_some(*id),
                            _ => None,
                        }));
                    }
                    NetlinkPayload::Error(error) => return Err(Error::NetlinkError(error)),
                    _ => {}
                }
            }
            Ok(None)
        };
        answered(ask).await.map_err(|error| failed("look up", "the namespace's id", &error))
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.pump.abort();
    }
}

/// What the kernel says to a request: it says it at once, or never, where its answer did not fit into the socket's buffer.
async fn answered<T>(request: impl Future<Output = Result<T, Error>>) -> Result<T, Error> {
    timeout(ANSWER, request).await.unwrap_or_else(|_| {
        let mut silence = ErrorMessage::default();
        silence.code = NonZeroI32::new(-(Errno::ETIMEDOUT as i32));
        Err(Error::NetlinkError(silence))
    })
}

/// Room for the answers to some thousand requests at once: on a busy machine a socket's task comes late, and sixty instances of a node
/// that begins were answered all at once. Root may exceed what the system allows otherwise; whoever may not has the usual room.
fn make_room(socket: &impl AsFd) {
    let _ = setsockopt(&socket.as_fd(), sockopt::RcvBufForce, &ROOM);
}

/// What this errno means for something that should be gone, or that we look for.
fn absent_is_none<T>(result: Result<Option<T>, Error>) -> Result<Option<T>, Error> {
    match result {
        Err(error)
            if matches!(errno(&error), Some(Errno::ENODEV | Errno::ESRCH | Errno::EADDRNOTAVAIL | Errno::ENOENT)) =>
        {
            Ok(None)
        }
        other => other,
    }
}

pub(super) fn failed(step: &'static str, object: impl Display, error: &Error) -> LinkError {
    let reason = errno(error).map_or_else(|| error.to_string(), |errno| errno.desc().to_owned());
    LinkError::Kernel { step, object: object.to_string(), reason }
}

fn errno(error: &Error) -> Option<Errno> {
    match error {
        Error::NetlinkError(message) => Some(Errno::from_raw(-message.raw_code())),
        _ => None,
    }
}

fn address_message(link: u32, address: IpAddr, prefix: u8) -> AddressMessage {
    match address {
        IpAddr::V4(v4) => AddressMessageBuilder::<Ipv4Addr>::new().index(link).address(v4, prefix).build(),
        IpAddr::V6(v6) => AddressMessageBuilder::<Ipv6Addr>::new().index(link).address(v6, prefix).build(),
    }
}

/// `IFA_LOCAL` where there is one (IPv4), else `IFA_ADDRESS`.
fn own_address(message: &AddressMessage) -> Option<(IpAddr, u8)> {
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(address) => Some(*address),
        _ => None,
    });
    Some((local.or(address)?, message.header.prefix_len))
}

fn route_message(link: u32, destination: IpAddr, prefix: u8, gateway: Option<IpAddr>) -> RouteMessage {
    let mut message = match destination {
        IpAddr::V4(v4) => {
            RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(v4, prefix).output_interface(link).build()
        }
        IpAddr::V6(v6) => {
            RouteMessageBuilder::<Ipv6Addr>::new().destination_prefix(v6, prefix).output_interface(link).build()
        }
    };
    match gateway {
        Some(gateway) => message.attributes.push(RouteAttribute::Gateway(gateway.into())),
        None if destination.is_ipv4() => message.header.scope = RouteScope::Link,
        None => {}
    }
    message
}

impl From<LinkMessage> for LinkState {
    fn from(message: LinkMessage) -> Self {
        let mut state = Self {
            index: message.header.index,
            name: String::new(),
            up: message.header.flags.contains(LinkFlags::Up),
            loopback: message.header.flags.contains(LinkFlags::Loopback),
            mtu: 0,
            mac: None,
            kind: None,
            alias: None,
            controller: None,
            peer: None,
            peer_netns: None,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => state.name = name,
                LinkAttribute::Mtu(mtu) => state.mtu = mtu,
                LinkAttribute::Address(bytes) => state.mac = bytes.try_into().ok(),
                LinkAttribute::IfAlias(alias) => state.alias = Some(alias),
                LinkAttribute::Controller(index) => state.controller = Some(index),
                LinkAttribute::Link(index) => state.peer = Some(index),
                LinkAttribute::LinkNetNsId(id) => state.peer_netns = Some(id),
                LinkAttribute::LinkInfo(info) => {
                    state.kind = info.into_iter().find_map(|info| match info {
                        LinkInfo::Kind(kind) => Some(kind),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        state
    }
}

impl From<&RouteMessage> for RouteState {
    fn from(message: &RouteMessage) -> Self {
        let address = |address: &RouteAddress| match address {
            RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
            RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
            _ => None,
        };
        let mut state = Self {
            prefix: message.header.destination_prefix_length,
            unicast: message.header.kind == RouteType::Unicast,
            table: u32::from(message.header.table),
            interface: None,
            gateway: None,
            source: None,
            priority: 0,
            mtu: None,
        };
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Table(table) => state.table = *table,
                RouteAttribute::Oif(index) => state.interface = Some(*index),
                RouteAttribute::Gateway(gateway) => state.gateway = address(gateway),
                RouteAttribute::PrefSource(source) => state.source = address(source),
                RouteAttribute::Priority(priority) => state.priority = *priority,
                RouteAttribute::MultiPath(hops) => {
                    if let Some(hop) = hops.first() {
                        state.interface = Some(hop.interface_index);
                        state.gateway = hop.attributes.iter().find_map(|attribute| match attribute {
                            RouteAttribute::Gateway(gateway) => address(gateway),
                            _ => None,
                        });
                    }
                }
                RouteAttribute::Metrics(metrics) => {
                    state.mtu = metrics.iter().find_map(|metric| match metric {
                        RouteMetric::Mtu(mtu) => Some(*mtu),
                        _ => None,
                    });
                }
                _ => {}
            }
        }
        state
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whoever waits for it would wait for ever, and hold up all that comes after.
    #[tokio::test(start_paused = true)]
    async fn an_answer_that_is_lost_is_an_error() {
        let error = answered(std::future::pending::<Result<(), Error>>()).await.expect_err("there is none");
        assert_eq!(errno(&error), Some(Errno::ETIMEDOUT));
        assert!(failed("look up", "eth0", &error).to_string().contains("timed out"), "{error}");
    }
}
