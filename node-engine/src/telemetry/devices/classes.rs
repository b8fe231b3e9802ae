//! Devices of the kernel's classes: each a directory of small files.

use std::path::Path;

use super::super::roots::{Roots, entries, link, number, text};
use super::{channel, device};
use crate::model::{Channel, Device, DeviceKind, Unit};

/// Link type of CAN interfaces (if_arp.h).
const ARPHRD_CAN: u32 = 280;

/// What the kernel calls each hardware monitor that is a thermometer on a wire (w1_therm).
pub(in crate::telemetry) const W1_MONITOR: &str = "w1_slave_temp";

/// Prefix of a hardware monitor's files, what it measures, and how many base units its unit is (kernel document hwmon/sysfs-interface).
const HWMON: [(&str, Unit, f64); 8] = [
    ("temp", Unit::Celsius, 1e-3),
    ("in", Unit::Volts, 1e-3),
    ("curr", Unit::Amperes, 1e-3),
    ("power", Unit::Watts, 1e-6),
    ("energy", Unit::Joules, 1e-6),
    ("fan", Unit::RevolutionsPerMinute, 1.0),
    ("humidity", Unit::Percent, 1e-3),
    ("freq", Unit::Hertz, 1.0),
];

pub(super) fn hwmon(roots: &Roots) -> Vec<Device> {
    let monitors = entries(roots.sys.join("class/hwmon")).into_iter().filter_map(|(entry, path)| {
        let name = text(path.join("name")).unwrap_or(entry);
        if is_told_by_its_wire(&path, &name) {
            return None;
        }
        let driver = link(path.join("device/driver")).filter(|driver| *driver != name);
        let description = driver.map_or_else(|| name.clone(), |driver| format!("{name} ({driver})"));
        Some(Device { channels: monitored(&path), ..device(DeviceKind::Hwmon, name, description) })
    });
    monitors.filter(|monitor| !monitor.channels.is_empty()).collect()
}

/// The thermometer on a wire is told of as such; to read it twice would take twice the better part of a second. Older kernels read it
/// here alone.
fn is_told_by_its_wire(monitor: &Path, name: &str) -> bool {
    name == W1_MONITOR && monitor.join("device/temperature").exists()
}

fn monitored(monitor: &Path) -> Vec<Channel> {
    let channels = entries(monitor).into_iter().filter_map(|(file, path)| {
        let name = file.strip_suffix("_input").or_else(|| file.strip_suffix("_average"))?;
        let stem = name.trim_end_matches(|letter: char| letter.is_ascii_digit());
        let (_, unit, scale) = HWMON.iter().find(|(prefix, ..)| *prefix == stem)?;
        // An average stands in where there is no momentary value.
        if file.ends_with("_average") && monitor.join(format!("{name}_input")).exists() {
            return None;
        }
        let label = text(monitor.join(format!("{name}_label"))).unwrap_or_else(|| name.to_owned());
        Some(channel(label, *unit, path, *scale))
    });
    channels.collect()
}

/// Zones whose hardware monitor tells the same are told by both: the zone's type says what is meant.
pub(super) fn thermal(roots: &Roots) -> Vec<Device> {
    let zones = entries(roots.sys.join("class/thermal")).into_iter().filter_map(|(entry, path)| {
        entry.starts_with("thermal_zone").then_some(())?;
        let name = text(path.join("type")).unwrap_or_else(|| entry.clone());
        let temperature = channel("temperature", Unit::Celsius, path.join("temp"), 1e-3);
        Some(Device {
            channels: vec![temperature],
            ..device(DeviceKind::Thermal, &name, format!("thermal zone {name}"))
        })
    });
    zones.collect()
}

/// Thermometers have a file `temperature`; other slaves are told of without values (kernel document w1/slaves/w1_therm).
pub(super) fn one_wire(roots: &Roots) -> Vec<Device> {
    let slaves = entries(roots.sys.join("bus/w1/devices")).into_iter().filter_map(|(entry, path)| {
        let family = entry.split_once('-').map(|(family, _)| family).filter(|family| family.len() == 2)?;
        let kind = match family {
            "10" => "thermometer DS18S20",
            "22" => "thermometer DS1822",
            "28" => "thermometer DS18B20",
            "3b" => "thermometer DS1825",
            "42" => "thermometer DS28EA00",
            "26" => "battery monitor DS2438",
            "29" => "switch DS2408",
            _ => "1-Wire device",
        };
        let file = path.join("temperature");
        let temperature = file.exists().then(|| channel("temperature", Unit::Celsius, file, 1e-3));
        Some(Device {
            id: entry.clone(),
            channels: temperature.into_iter().collect(),
            ..device(DeviceKind::OneWire, format!("w1-{entry}"), kind)
        })
    });
    slaves.collect()
}

/// Batteries and mains (kernel document power/power_supply_class): micro-units, tenths of a degree.
pub(super) fn power(roots: &Roots) -> Vec<Device> {
    const FILES: [(&str, Unit, f64); 6] = [
        ("capacity", Unit::Percent, 1.0),
        ("voltage_now", Unit::Volts, 1e-6),
        ("current_now", Unit::Amperes, 1e-6),
        ("power_now", Unit::Watts, 1e-6),
        ("temp", Unit::Celsius, 0.1),
        ("online", Unit::One, 1.0),
    ];
    let supplies = entries(roots.sys.join("class/power_supply")).into_iter().map(|(entry, path)| {
        let words = ["type", "manufacturer", "model_name"].map(|file| text(path.join(file)).unwrap_or_default());
        let channels = FILES.iter().filter(|(file, ..)| path.join(file).exists());
        Device {
            channels: channels.map(|(file, unit, scale)| channel(*file, *unit, path.join(file), *scale)).collect(),
            ..device(DeviceKind::Power, entry, joined(&words))
        }
    });
    supplies.collect()
}

pub(super) fn cameras(roots: &Roots) -> Vec<Device> {
    let cameras = entries(roots.sys.join("class/video4linux")).into_iter().filter_map(|(entry, path)| {
        // A camera has further nodes for its metadata; the first is the one that gives pictures.
        let first = number::<u32>(path.join("index")).unwrap_or(0) == 0;
        (first && entry.starts_with("video")).then(|| Device {
            id: usb_id(&path.join("device")),
            nodes: vec![roots.dev.join(&entry)],
            ..device(DeviceKind::Camera, &entry, text(path.join("name")).unwrap_or_default())
        })
    });
    cameras.collect()
}

/// A CAN bus is a network interface: there is no node to give away.
pub(super) fn can(roots: &Roots) -> Vec<Device> {
    let interfaces = entries(roots.sys.join("class/net")).into_iter().filter_map(|(entry, path)| {
        (number(path.join("type")) == Some(ARPHRD_CAN)).then_some(())?;
        let driver = link(path.join("device/driver")).unwrap_or_else(|| "virtual".into());
        let state = text(path.join("operstate")).unwrap_or_default();
        Some(device(DeviceKind::Can, entry, format!("CAN bus ({driver}), {state}")))
    });
    interfaces.collect()
}

pub(super) fn gpio(roots: &Roots) -> Vec<Device> {
    let chips = entries(roots.sys.join("bus/gpio/devices")).into_iter().filter_map(|(entry, path)| {
        entry.starts_with("gpiochip").then(|| Device {
            nodes: vec![roots.dev.join(&entry)],
            ..device(DeviceKind::Gpio, &entry, text(path.join("label")).unwrap_or_else(|| "GPIO chip".into()))
        })
    });
    chips.collect()
}

/// `vendor:product:serial` of the USB device that this is, or is part of; empty where it is none.
pub(super) fn usb_id(device: &Path) -> String {
    let Some(device) = usb_device(device) else { return String::new() };
    let part = |file: &str| text(device.join(file));
    let (Some(vendor), Some(product)) = (part("idVendor"), part("idProduct")) else { return String::new() };
    match part("serial") {
        Some(serial) => format!("{vendor}:{product}:{serial}"),
        None => format!("{vendor}:{product}"),
    }
}

/// The directory of the USB device, at most a few levels above one of its parts.
pub(super) fn usb_device(part: &Path) -> Option<std::path::PathBuf> {
    let part = part.canonicalize().ok()?;
    part.ancestors().take(6).find(|directory| directory.join("idVendor").exists()).map(Path::to_owned)
}

pub(super) fn joined(words: &[String]) -> String {
    words.iter().filter(|word| !word.is_empty()).cloned().collect::<Vec<_>>().join(" ")
}
