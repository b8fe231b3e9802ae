//! Whether this node takes framed packets, and the device that makes its kernel join them.

use std::net::IpAddr;

use super::datapath::{Datapath, Port};
use super::link::Links;
use crate::config::DatapathChoice;

/// Name of the device.
pub(super) const DEVICE: &str = "edge-framing";

/// Takes framed packets on `port` from now on, and offers it to peers, where this node's kernel joins them: only over IPv4, and only
/// where programs in the kernel take them. `None`, and said why, where it does not: then its peers send bare packets, as to any node of
/// the reference system. Those of a peer that has not heard of it yet are taken all the same.
pub(super) async fn begin(links: &Links, datapath: &dyn Datapath, port: Option<u16>, source: IpAddr) -> Option<u16> {
    let port = port.filter(|_| source.is_ipv4());
    let refused = match port.filter(|_| datapath.joins_framed()) {
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
    if let Some(port) = port
        && let Err(error) = datapath.take_framed_at(port).await
    {
        tracing::debug!(%error, "framed packets are lost until peers know that none are taken");
    }
    None
}

/// Sees to it that framed packets are taken: by programs, with the device where it is missing, closed before it is up; or by user space.
pub(super) async fn keep(links: &Links, datapath: &dyn Datapath, port: u16) -> Result<(), String> {
    if !datapath.joins_framed() {
        links.lower_framing().await.map_err(|error| error.to_string())?;
        return datapath.take_framed_at(port).await.map_err(|error| error.to_string());
    }
    datapath.take_framed_at(port).await.map_err(|error| error.to_string())?;
    let (name, ifindex) = links.ensure_framing(port).await.map_err(|error| error.to_string())?;
    datapath.take_framed(&Port { name, ifindex }).await.map_err(|error| error.to_string())?;
    links.raise_framing().await.map_err(|error| error.to_string())
}

/// Changes the datapath while packets flow. The port for framed packets has one owner: the device gives it up before the datapath may
/// want it, and gets it back from a datapath that does not.
pub(super) async fn switch(
    links: &Links,
    datapath: &dyn Datapath,
    port: Option<u16>,
    choice: DatapathChoice,
    why: &str,
) -> Result<(), String> {
    if port.is_some() {
        links.lower_framing().await.map_err(|error| error.to_string())?;
    }
    let switched = datapath.switch(choice, why).await.map_err(|error| error.to_string());
    match port {
        Some(port) => switched.and(keep(links, datapath, port).await),
        None => switched,
    }
}
