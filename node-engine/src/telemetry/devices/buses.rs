//! What hangs on buses and serial lines.

use std::path::Path;

use super::super::roots::{Roots, entries, link, number, text};
use super::classes::{joined, usb_device, usb_id};
use super::device;
use crate::model::{Device, DeviceKind};

/// Class of hubs (USB class codes).
const HUB: &str = "09";

pub(super) fn serial(roots: &Roots) -> Vec<Device> {
    let lines = entries(roots.sys.join("class/tty")).into_iter().filter_map(|(entry, path)| {
        // Consoles and pseudo-terminals have no device; a port of type 0 is one that was looked for and not found.
        path.join("device").exists().then_some(())?;
        (number::<u32>(path.join("type")) != Some(0)).then_some(())?;
        let driver = link(path.join("device/driver")).unwrap_or_default();
        let name = usb_device(&path.join("device")).map(|usb| usb_name(&usb)).filter(|name| !name.is_empty());
        Some(Device {
            id: usb_id(&path.join("device")),
            nodes: vec![roots.dev.join(&entry)],
            ..device(DeviceKind::Serial, &entry, name.unwrap_or_else(|| format!("serial line ({driver})")))
        })
    });
    lines.collect()
}

/// Adapters, each with what is known to hang on it.
pub(super) fn i2c(roots: &Roots) -> Vec<Device> {
    let all = entries(roots.sys.join("bus/i2c/devices"));
    let adapters = all.iter().filter_map(|(entry, path)| {
        let number = entry.strip_prefix("i2c-")?;
        let clients = all.iter().filter(|(other, _)| other.split_once('-').is_some_and(|(bus, _)| bus == number));
        let clients: Vec<String> = clients
            .map(|(address, path)| format!("{}@{}", text(path.join("name")).unwrap_or_default(), tail(address)))
            .collect();
        let name = text(path.join("name")).unwrap_or_else(|| "I2C adapter".into());
        let clients = if clients.is_empty() { String::new() } else { format!(" with {}", clients.join(", ")) };
        let node = roots.dev.join(entry);
        Some(Device {
            nodes: if node.exists() { vec![node] } else { Vec::new() },
            ..device(DeviceKind::I2c, entry, format!("{name}{clients}"))
        })
    });
    adapters.collect()
}

fn tail(address: &str) -> &str {
    address.rsplit('-').next().unwrap_or(address)
}

pub(super) fn spi(roots: &Roots) -> Vec<Device> {
    let slaves = entries(roots.sys.join("bus/spi/devices")).into_iter().filter_map(|(entry, path)| {
        let place = entry.strip_prefix("spi")?;
        let kind = text(path.join("modalias")).map(|alias| alias.trim_start_matches("spi:").to_owned());
        let node = roots.dev.join(format!("spidev{place}"));
        Some(Device {
            nodes: if node.exists() { vec![node] } else { Vec::new() },
            ..device(DeviceKind::Spi, &entry, kind.unwrap_or_else(|| "SPI device".into()))
        })
    });
    slaves.collect()
}

/// Everything on USB but hubs. What a driver has made of it (a serial line, a camera) is told of there as well, with the same id.
pub(super) fn usb(roots: &Roots) -> Vec<Device> {
    let devices = entries(roots.sys.join("bus/usb/devices")).into_iter().filter_map(|(entry, path)| {
        // With a colon it is an interface of a device.
        (!entry.contains(':') && text(path.join("bDeviceClass")).is_some_and(|class| class != HUB)).then_some(())?;
        let (bus, address): (u32, u32) = (number(path.join("busnum"))?, number(path.join("devnum"))?);
        Some(Device {
            id: usb_id(&path),
            nodes: vec![roots.dev.join(format!("bus/usb/{bus:03}/{address:03}"))],
            ..device(DeviceKind::Usb, format!("usb-{entry}"), usb_name(&path))
        })
    });
    devices.collect()
}

fn usb_name(device: &Path) -> String {
    joined(&["manufacturer", "product"].map(|file| text(device.join(file)).unwrap_or_default()))
}
