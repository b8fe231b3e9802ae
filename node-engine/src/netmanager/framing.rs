//! Whether this node takes framed packets, and the device that makes its kernel join them.

use std::net::IpAddr;

use super::datapath::{Datapath, Port};
use super::link::Links;

/// Name of the device.
pub(super) const DEVICE: &str = "edge-framing";

/// Takes framed packets on `port` from now on, where this node can: only the kernel's programs know framing, and only over IPv4.
/// `None`, and said why, where it cannot: then its peers send bare packets, as to any node of the reference system.
pub(super) async fn begin(links: &Links, datapath: &dyn Datapath, port: Option<u16>, source: IpAddr) -> Option<u16> {
    let port = port.filter(|_| source.is_ipv4() && datapath.name() == "ebpf");
    let refused = match port {
        Some(port) => match keep(links, datapath, port).await {
            Ok(()) => return Some(port),
            Err(error) => Some(error),
        },
        None => None,
    };
    if let Some(reason) = refused {
        tracing::info!(reason, "packets between nodes travel bare");
    }
    if let Err(error) = links.remove_framing().await {
        tracing::warn!(%error, "the device for framed packets stays until it is removed by hand");
    }
    None
}

/// Makes the device where it is missing, and closes it before it is up.
pub(super) async fn keep(links: &Links, datapath: &dyn Datapath, port: u16) -> Result<(), String> {
    let (name, ifindex) = links.ensure_framing(port).await.map_err(|error| error.to_string())?;
    datapath.take_framed(&Port { name, ifindex }).await.map_err(|error| error.to_string())?;
    links.raise_framing().await.map_err(|error| error.to_string())
}
