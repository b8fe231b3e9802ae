//! GPUs as the kernel describes them: `/sys/class/drm` of AMD, Intel and others, and the board's own GPU of NVIDIA Jetsons.

use std::collections::BTreeMap;
use std::path::Path;

use super::super::hardware::pci_name;
use super::super::roots::{Roots, entries, link, number, text};
use crate::model::GpuUsage;

const MIB: u64 = 1 << 20;
/// PCI vendors.
const AMD: &str = "0x1002";
const INTEL: &str = "0x8086";
const NVIDIA: &str = "0x10de";

/// A display or render device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(in crate::telemetry) struct Card {
    /// Such as `card0`.
    pub(in crate::telemetry) entry: String,
    pub(in crate::telemetry) vendor: String,
    /// `1002:73bf` on PCI; empty elsewhere.
    pub(in crate::telemetry) id: String,
    pub(in crate::telemetry) driver: String,
    /// PCI slot or platform name.
    pub(in crate::telemetry) place: String,
    pub(in crate::telemetry) name: String,
}

pub(in crate::telemetry) fn cards(roots: &Roots) -> Vec<Card> {
    let cards = entries(roots.sys.join("class/drm")).into_iter().filter_map(|(entry, path)| {
        // Beside the cards there are their connectors, `card0-HDMI-A-1`, and render nodes.
        entry.strip_prefix("card")?.parse::<u32>().ok()?;
        let device = path.join("device");
        let part = |file: &str| text(device.join(file)).map(|text| text.trim_start_matches("0x").to_owned());
        let id = part("vendor").zip(part("device")).map(|(vendor, device)| format!("{vendor}:{device}"));
        let driver = link(device.join("driver")).unwrap_or_default();
        let vendor = match text(device.join("vendor")).as_deref() {
            Some(AMD) => "AMD",
            Some(INTEL) => "Intel",
            Some(NVIDIA) => "NVIDIA",
            _ => "",
        };
        let place = link(&device).unwrap_or_default();
        let name = text(device.join("product_name")).unwrap_or_default();
        Some(Card { entry, vendor: vendor.into(), id: id.unwrap_or_default(), driver, place, name })
    });
    cards.collect()
}

pub(super) fn sample(roots: &Roots, names: &mut BTreeMap<String, String>) -> Vec<GpuUsage> {
    let mut gpus: Vec<GpuUsage> = cards(roots)
        .into_iter()
        .filter_map(|mut card| {
            let key = format!("{} {}", card.place, card.id);
            card.name = names.entry(key).or_insert_with(|| name(roots, &card)).clone();
            let device = roots.sys.join("class/drm").join(&card.entry).join("device");
            match card.vendor.as_str() {
                "AMD" => Some(amd(&card, &device)),
                "Intel" => Some(intel(&card, &device)),
                _ => None,
            }
        })
        .collect();
    gpus.extend(jetson(roots));
    gpus
}

/// Kernel document gpu/amdgpu/driver-misc.
fn amd(card: &Card, device: &Path) -> GpuUsage {
    let memory = |file: &str| number::<u64>(device.join(file)).unwrap_or(0) / MIB;
    GpuUsage {
        name: card.name.clone(),
        driver: card.driver.clone(),
        usage_percent: number(device.join("gpu_busy_percent")).unwrap_or(0.0),
        memory_total_mib: memory("mem_info_vram_total"),
        memory_used_mib: memory("mem_info_vram_used"),
        temperature_celsius: temperature(device),
    }
}

/// Neither i915 nor xe tells how busy it is without performance counters; the share of its clock stands for it. It uses the
/// machine's memory and has none of its own, unless it is a card, whose driver does not tell it here.
fn intel(card: &Card, device: &Path) -> GpuUsage {
    let drm = device.join("drm").join(&card.entry);
    let clock = |file: &str| -> Option<f64> {
        number(drm.join(format!("gt_{file}_freq_mhz")))
            .or_else(|| number(device.join(format!("tile0/gt0/freq0/{file}_freq"))))
    };
    let usage = match (clock("act"), clock("min"), clock("max")) {
        (Some(now), Some(least), Some(most)) if most > least => 100.0 * (now - least).max(0.0) / (most - least),
        _ => 0.0,
    };
    GpuUsage {
        name: card.name.clone(),
        driver: card.driver.clone(),
        usage_percent: usage.clamp(0.0, 100.0),
        memory_total_mib: 0,
        memory_used_mib: 0,
        temperature_celsius: temperature(device),
    }
}

/// The GPU of a Jetson shares the board's memory; its load is in thousandths.
fn jetson(roots: &Roots) -> Option<GpuUsage> {
    let places =
        ["devices/gpu.0", "devices/platform/gpu.0", "devices/platform/17000000.gpu", "devices/platform/57000000.gpu"];
    let device = places.iter().map(|place| roots.sys.join(place)).find(|device| device.join("load").exists())?;
    let load: f64 = number(device.join("load"))?;
    let memory = |name: &str| -> u64 {
        let text = std::fs::read_to_string(roots.proc.join("meminfo")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
    };
    let zones = entries(roots.sys.join("class/thermal"));
    let zone = zones
        .iter()
        .find(|(_, zone)| text(zone.join("type")).is_some_and(|kind| kind.to_ascii_lowercase().starts_with("gpu")));
    let board = text(roots.proc.join("device-tree/model")).unwrap_or_else(|| "NVIDIA Jetson".into());
    Some(GpuUsage {
        name: format!("GPU of {board}"),
        driver: link(device.join("driver")).unwrap_or_else(|| "nvgpu".into()),
        usage_percent: (load / 10.0).clamp(0.0, 100.0),
        memory_total_mib: memory("MemTotal"),
        memory_used_mib: memory("MemTotal").saturating_sub(memory("MemAvailable")),
        temperature_celsius: zone.and_then(|(_, zone)| number::<f64>(zone.join("temp"))).unwrap_or(0.0) / 1000.0,
    })
}

fn temperature(device: &Path) -> f64 {
    let monitors = entries(device.join("hwmon"));
    let millis = monitors.iter().find_map(|(_, monitor)| number::<f64>(monitor.join("temp1_input")));
    millis.unwrap_or(0.0) / 1000.0
}

/// What it calls itself, else what the machine's list of PCI ids calls it, else what there is to call it by.
pub(in crate::telemetry) fn name(roots: &Roots, card: &Card) -> String {
    if !card.name.is_empty() {
        return card.name.clone();
    }
    let listed = Some(card.id.as_str()).filter(|id| !id.is_empty()).and_then(|id| pci_name(roots, id));
    listed.unwrap_or_else(|| match (card.vendor.as_str(), card.id.as_str()) {
        ("", _) | (_, "") => card.driver.clone(),
        (vendor, id) => format!("{vendor} GPU {id}"),
    })
}

#[cfg(test)]
mod tests {
    use super::super::super::devices::fixture;
    use super::*;

    #[test]
    fn cards_of_each_maker_tell_what_they_do() {
        let mut names = BTreeMap::new();
        let gpus = sample(&fixture(), &mut names);
        assert_eq!(names.len(), 2, "looked up once");
        let told: Vec<_> = gpus
            .iter()
            .map(|gpu| {
                (
                    gpu.driver.as_str(),
                    gpu.usage_percent,
                    gpu.memory_total_mib,
                    gpu.memory_used_mib,
                    gpu.temperature_celsius,
                )
            })
            .collect();
        assert_eq!(
            told,
            [
                ("amdgpu", 37.0, 8176, 1024, 54.0),
                ("i915", 50.0, 0, 0, 0.0),
                ("gv11b", 45.0, 31_920, 31_920 - 16_000, 48.5),
            ]
        );
        assert_eq!(gpus[0].name, "Radeon RX 6600");
        assert_eq!(gpus[1].name, "UHD Graphics 620", "from the list of PCI ids");
        assert_eq!(gpus[2].name, "GPU of NVIDIA Jetson AGX Xavier");
    }

    #[test]
    fn a_machine_without_cards_has_none() {
        let dir = tempfile::tempdir().unwrap();
        let roots = Roots { sys: dir.path().into(), proc: dir.path().into(), dev: dir.path().into() };
        assert_eq!(sample(&roots, &mut BTreeMap::new()), []);
        assert_eq!(cards(&roots), []);
    }
}
