//! The guest's end of the wire.

use std::io;
use std::path::Path;

use tun_rs::{DeviceBuilder, Layer};

use crate::netns;

/// The network recognises a namespace with a guest in it by this device, joins the two, and translates between their addresses.
pub(super) const DEVICE: &str = "tap0";

/// Makes the device inside the namespace, to stay until that ends.
pub(super) fn ensure(netns: &Path) -> io::Result<()> {
    netns::within(netns, || {
        let device = DeviceBuilder::new().name(DEVICE).layer(Layer::L2).enable(true).build_sync()?;
        device.persist()
    })?
}
