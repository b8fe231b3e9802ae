//! What is attached to this machine, as the kernel describes it below `/sys`. No device is opened to find it: opening some of them
//! changes their state (a serial line resets what hangs on it).

mod buses;
mod classes;
#[cfg(test)]
mod fixture;
mod iio;
pub mod watch;

use std::collections::BTreeMap;

use super::roots::{Roots, number};
use crate::model::{Channel, Device, DeviceKind, Reading, Unit};

pub(super) use classes::W1_MONITOR;

/// Devices, and channels of one, that are told of at most.
const MOST_DEVICES: usize = 256;
const MOST_CHANNELS: usize = 64;

/// Everything attached, by name.
pub fn scan(roots: &Roots) -> Vec<Device> {
    let found = [
        iio::devices(roots),
        classes::hwmon(roots),
        classes::thermal(roots),
        classes::one_wire(roots),
        classes::power(roots),
        classes::cameras(roots),
        classes::can(roots),
        classes::gpio(roots),
        buses::serial(roots),
        buses::i2c(roots),
        buses::spi(roots),
        buses::usb(roots),
    ];
    named(found.into_iter().flatten())
}

/// The list with one more, which no description of the kernel's leads to.
pub(super) fn with(extra: Option<&Device>, mut devices: Vec<Device>) -> Vec<Device> {
    devices.extend(extra.cloned());
    devices
}

/// The values of a device; those that cannot be read now are left out.
pub fn read(device: &Device) -> Vec<Reading> {
    read_those(device, |_| true)
}

/// The values of some channels; nobody asks the device for the others.
pub(super) fn read_those(device: &Device, wanted: impl Fn(&Channel) -> bool) -> Vec<Reading> {
    let readings = device.channels.iter().filter(|channel| wanted(channel)).filter_map(|channel| {
        let raw: f64 = number(&channel.path)?;
        let value = (raw + channel.offset) * channel.scale;
        value.is_finite().then(|| Reading { channel: channel.name.clone(), unit: channel.unit, value })
    });
    readings.collect()
}

/// Names that are unique and plain. Of several that would be called the same, each but the first gets a number.
fn named(found: impl Iterator<Item = Device>) -> Vec<Device> {
    let mut taken: BTreeMap<String, usize> = BTreeMap::new();
    let mut devices: Vec<Device> = found
        .take(MOST_DEVICES)
        .map(|mut device| {
            let plain = plain(&device.name);
            let count = taken.entry(plain.clone()).or_default();
            *count += 1;
            device.name = if *count == 1 { plain } else { format!("{plain}-{count}") };
            device.channels.truncate(MOST_CHANNELS);
            device
        })
        .collect();
    devices.sort_by(|left, right| left.name.cmp(&right.name));
    devices
}

/// Fit for a topic and a label.
fn plain(name: &str) -> String {
    let letter = |letter: char| match letter.to_ascii_lowercase() {
        letter @ ('a'..='z' | '0'..='9' | '.' | '_' | '-') => letter,
        _ => '-',
    };
    let plain: String = name.chars().take(64).map(letter).collect();
    if plain.is_empty() { "unnamed".into() } else { plain }
}

fn channel(name: impl Into<String>, unit: Unit, path: std::path::PathBuf, scale: f64) -> Channel {
    Channel { name: name.into(), unit, path, offset: 0.0, scale }
}

fn device(kind: DeviceKind, name: impl Into<String>, description: impl Into<String>) -> Device {
    Device { name: name.into(), kind, description: description.into(), ..Device::default() }
}

#[cfg(test)]
pub(super) use fixture::fixture;
#[cfg(test)]
mod tests;
