//! Industrial I/O (kernel document ABI/testing/sysfs-bus-iio): raw values with offset and scale, in units of their own.

use std::path::{Path, PathBuf};

use super::super::roots::{Roots, entries, number, text};
use crate::model::{Channel, Device, DeviceKind, Unit};

/// What a kind of channel measures, and how many base units its unit is.
const KINDS: [(&str, Unit, f64); 18] = [
    ("temp", Unit::Celsius, 1e-3),
    ("voltage", Unit::Volts, 1e-3),
    ("altvoltage", Unit::Volts, 1e-3),
    ("current", Unit::Amperes, 1e-3),
    ("power", Unit::Watts, 1e-3),
    ("energy", Unit::Joules, 1.0),
    ("resistance", Unit::Ohms, 1.0),
    ("accel", Unit::MetresPerSecondSquared, 1.0),
    ("gravity", Unit::MetresPerSecondSquared, 1.0),
    ("anglvel", Unit::RadiansPerSecond, 1.0),
    // Gauss.
    ("magn", Unit::Teslas, 1e-4),
    // Kilopascals.
    ("pressure", Unit::Pascals, 1e3),
    ("humidityrelative", Unit::Percent, 1e-3),
    ("illuminance", Unit::Lux, 1.0),
    ("distance", Unit::Metres, 1.0),
    ("concentration", Unit::Percent, 1.0),
    ("proximity", Unit::One, 1.0),
    ("intensity", Unit::One, 1.0),
];

pub(super) fn devices(roots: &Roots) -> Vec<Device> {
    let devices = entries(roots.sys.join("bus/iio/devices")).into_iter().filter_map(|(entry, path)| {
        entry.starts_with("iio:device").then_some(())?;
        let name = text(path.join("name")).unwrap_or_else(|| entry.clone());
        let node = roots.dev.join(&entry);
        Some(Device {
            name: name.clone(),
            kind: DeviceKind::Iio,
            description: text(path.join("label")).unwrap_or(name),
            id: String::new(),
            nodes: if node.exists() { vec![node] } else { Vec::new() },
            channels: channels(&path),
        })
    });
    devices.collect()
}

/// Each `in_<channel>_raw` or `in_<channel>_input`.
fn channels(device: &Path) -> Vec<Channel> {
    let channels = entries(device).into_iter().filter_map(|(file, path)| {
        let name = file.strip_prefix("in_")?;
        let (name, processed) = match (name.strip_suffix("_input"), name.strip_suffix("_raw")) {
            (Some(name), _) => (name, true),
            (None, Some(name)) => (name, false),
            (None, None) => return None,
        };
        let (_, unit, factor) = KINDS.iter().find(|(kind, ..)| is_of_kind(name, kind))?;
        // A processed value stands beside the raw one it was made of.
        if !processed && device.join(format!("in_{name}_input")).exists() {
            return None;
        }
        let (offset, scale) = if processed {
            (0.0, 1.0)
        } else {
            (of(device, name, "offset").unwrap_or(0.0), of(device, name, "scale").unwrap_or(1.0))
        };
        Some(Channel { name: name.to_owned(), unit: *unit, path, offset, scale: scale * factor })
    });
    channels.collect()
}

/// `accel_x` and `voltage3` are of the kinds `accel` and `voltage`.
fn is_of_kind(name: &str, kind: &str) -> bool {
    name.strip_prefix(kind)
        .is_some_and(|rest| rest.chars().next().is_none_or(|next| next == '_' || next.is_ascii_digit()))
}

/// Of the channel itself, else of all channels of its kind.
fn of(device: &Path, name: &str, what: &str) -> Option<f64> {
    let kind = name.split('_').next().unwrap_or(name).trim_end_matches(|letter: char| letter.is_ascii_digit());
    let file = |name: &str| -> PathBuf { device.join(format!("in_{name}_{what}")) };
    number(file(name)).or_else(|| number(file(kind)))
}
