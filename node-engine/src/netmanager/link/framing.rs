//! The device that makes the kernel join framed packets: a VXLAN device bound to their port. It carries nothing itself.

use netlink_packet_route::link::InfoKind;
use rtnetlink::{LinkBridgePort, LinkMessageBuilder, LinkUnspec, LinkVxlan};

use super::journal::Undo;
use super::kernel::LinkState;
use super::{LinkError, Links, sysctl};

/// On the device, for people.
const ALIAS: &str = "node-engine: lets the kernel join framed packets";

impl Links {
    /// Makes the device, still down where it is new: nothing may come out of it before a program there drops it. Its name and index.
    pub(super) async fn ensure_framing_link(&self, port: u16) -> Result<(String, u32), LinkError> {
        let name = &self.config.framing;
        let undo = Undo::DelLink { name: name.clone() };
        let existing = self.netlink.link(name).await?;
        if existing.as_ref().is_some_and(|link| link.kind != Some(InfoKind::Vxlan) || !self.journal().holds(&undo)) {
            return Err(LinkError::Foreign(name.clone()));
        }
        if let Some(link) = existing {
            return Ok((link.name, link.index));
        }
        self.journal().note(undo)?;
        let device = LinkMessageBuilder::<LinkVxlan>::new(name).collect_metadata(true).port(port);
        self.netlink.create(name, device.build()).await?;
        let link = self.netlink.link(name).await?.ok_or_else(|| LinkError::Kernel {
            step: "look up",
            object: name.clone(),
            reason: "the device has disappeared".into(),
        })?;
        self.netlink.set(name, LinkUnspec::new_with_name(name).alias(ALIAS).build()).await?;
        sysctl::silence(name)?;
        Ok((link.name, link.index))
    }

    pub(super) async fn raise_framing_link(&self) -> Result<(), LinkError> {
        match self.netlink.link(&self.config.framing).await? {
            Some(link) => {
                self.netlink.set_up(&link).await?;
                self.lend_room(&link).await
            }
            None => Ok(()),
        }
    }

    /// Makes the device a port of the bridge, over which nothing goes. Its only effect: the bridge tells its other ports how much room this
    /// one needs before a packet, and what instances send has room for the outer headers from the start. Without it each of their datagrams
    /// is copied on its way. There is no other way to ask a veth for it.
    async fn lend_room(&self, device: &LinkState) -> Result<(), LinkError> {
        let Some(bridge) = self.netlink.link(&self.config.bridge).await? else { return Ok(()) };
        if device.controller == Some(bridge.index) {
            return Ok(());
        }
        self.netlink
            .set(&device.name, LinkUnspec::new_with_index(device.index).controller(bridge.index).build())
            .await?;
        let silent = LinkBridgePort::new(device.index).learning(false).flood(false).bcast_flood(false);
        self.netlink.set_port(&device.name, silent.mcast_flood(false).build()).await
    }

    /// Sets the device down: its port is free then.
    pub(super) async fn lower_framing_link(&self) -> Result<(), LinkError> {
        match self.netlink.link(&self.config.framing).await? {
            Some(link) => self.netlink.set_down(&link).await,
            None => Ok(()),
        }
    }

    /// Removes the device of an earlier run.
    pub(super) async fn remove_framing_link(&self) -> Result<(), LinkError> {
        let undo = Undo::DelLink { name: self.config.framing.clone() };
        if self.journal().holds(&undo) {
            self.netlink.delete(&self.config.framing).await?;
            self.journal().settle(&undo)?;
        }
        Ok(())
    }
}
