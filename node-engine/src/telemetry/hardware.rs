//! What this machine is made of, for people to look at: what `lshw` shows of it, from the kernel's own description. Made when somebody
//! asks; nothing is kept.

use std::fs;
use std::path::Path;

use sysinfo::System;

use super::devices;
use super::gpu::{self, Card};
use super::roots::{Roots, entries, link, number, text};
use crate::model::{Device, GpuUsage, Reading};

/// Where a list of PCI ids may be; below `/sys` for trees that stand for a machine.
const PCI_IDS: [&str; 3] = ["/usr/share/misc/pci.ids", "/usr/share/hwdata/pci.ids", "/usr/share/pci.ids"];
/// Sectors are 512 bytes here, whatever the device's own are.
const SECTOR: u64 = 512;

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Hardware {
    pub machine: String,
    pub firmware: String,
    pub cpu: Cpu,
    pub memory_bytes: u64,
    pub disks: Vec<Disk>,
    pub networks: Vec<Network>,
    pub gpus: Vec<Gpu>,
    /// With what each says now.
    pub devices: Vec<(Device, Vec<Reading>)>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cpu {
    pub model: String,
    pub architecture: String,
    pub logical: u32,
    pub physical: u32,
    /// The fastest that any of them may run.
    pub max_mhz: Option<f64>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Disk {
    pub name: String,
    pub model: String,
    pub size_bytes: u64,
    pub rotational: bool,
    pub removable: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Network {
    pub name: String,
    pub driver: String,
    pub address: String,
    pub state: String,
    pub mtu: u32,
    /// `None` where there is no link, or it has no speed.
    pub speed_mbit: Option<u32>,
}

/// A card, and what it does where its driver tells.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gpu {
    pub name: String,
    pub vendor: String,
    pub driver: String,
    /// PCI slot or platform name; empty where only the driver's library tells of it.
    pub place: String,
    pub id: String,
    pub usage: Option<GpuUsage>,
}

/// Looks at everything. Blocks: some of the files ask the hardware.
pub fn look(roots: &Roots) -> Hardware {
    let found = devices::scan(roots);
    let usage = gpu::Gpus::open(roots.clone()).sample();
    Hardware {
        machine: machine(roots),
        firmware: dmi(roots, &["bios_vendor", "bios_version"]),
        cpu: cpu(roots),
        memory_bytes: memory(roots),
        disks: disks(roots),
        networks: networks(roots),
        gpus: gpus(roots, gpu::cards(roots), usage),
        devices: found.into_iter().map(|device| (device.clone(), devices::read(&device))).collect(),
    }
}

fn machine(roots: &Roots) -> String {
    let board = text(roots.proc.join("device-tree/model"));
    board.unwrap_or_else(|| dmi(roots, &["sys_vendor", "product_name"]))
}

fn dmi(roots: &Roots, files: &[&str]) -> String {
    let words = files.iter().filter_map(|file| text(roots.sys.join("class/dmi/id").join(file)));
    words.collect::<Vec<_>>().join(" ")
}

fn cpu(roots: &Roots) -> Cpu {
    let info = fs::read_to_string(roots.proc.join("cpuinfo")).unwrap_or_default();
    let value = |name: &str| {
        info.lines().find_map(|line| {
            let (key, value) = line.split_once(':')?;
            (key.trim() == name).then(|| value.trim().to_owned())
        })
    };
    let model = ["model name", "Model", "Hardware", "cpu model", "Processor"].iter().find_map(|name| value(name));
    let logical =
        info.lines().filter(|line| line.split(':').next().is_some_and(|key| key.trim() == "processor")).count();
    let cpus = entries(roots.sys.join("devices/system/cpu"));
    let fastest =
        cpus.iter().filter_map(|(_, path)| number::<f64>(path.join("cpufreq/cpuinfo_max_freq"))).reduce(f64::max);
    Cpu {
        model: model.unwrap_or_default(),
        architecture: std::env::consts::ARCH.into(),
        logical: u32::try_from(logical).unwrap_or(u32::MAX),
        physical: u32::try_from(System::physical_core_count().unwrap_or(0)).unwrap_or(u32::MAX),
        max_mhz: fastest.map(|kilohertz| kilohertz / 1000.0),
    }
}

fn memory(roots: &Roots) -> u64 {
    let info = fs::read_to_string(roots.proc.join("meminfo")).unwrap_or_default();
    let total =
        info.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse::<u64>().ok());
    total.unwrap_or(0).saturating_mul(1024)
}

/// Those that hold something: no loops and RAM disks without a medium.
fn disks(roots: &Roots) -> Vec<Disk> {
    let disks = entries(roots.sys.join("block")).into_iter().filter_map(|(name, path)| {
        let size_bytes = number::<u64>(path.join("size"))?.saturating_mul(SECTOR);
        let virtual_one = ["loop", "ram", "zram", "dm-", "md"].iter().any(|prefix| name.starts_with(prefix));
        (size_bytes > 0 && !virtual_one).then(|| {
            let words =
                ["vendor", "model", "name"].map(|file| text(path.join("device").join(file)).unwrap_or_default());
            Disk {
                model: words.into_iter().filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" "),
                size_bytes,
                rotational: number::<u8>(path.join("queue/rotational")) == Some(1),
                removable: number::<u8>(path.join("removable")) == Some(1),
                name,
            }
        })
    });
    disks.collect()
}

/// Those of hardware: a bridge, a veth, a tunnel has no device.
fn networks(roots: &Roots) -> Vec<Network> {
    let networks = entries(roots.sys.join("class/net")).into_iter().filter_map(|(name, path)| {
        path.join("device").exists().then(|| Network {
            driver: link(path.join("device/driver")).unwrap_or_default(),
            address: text(path.join("address")).unwrap_or_default(),
            state: text(path.join("operstate")).unwrap_or_default(),
            mtu: number(path.join("mtu")).unwrap_or(0),
            // -1 where there is none.
            speed_mbit: number(path.join("speed")),
            name,
        })
    });
    networks.collect()
}

/// Cards with their usage, matched by driver in the order in which both are told; then usage of what is no card.
fn gpus(roots: &Roots, cards: Vec<Card>, mut usage: Vec<GpuUsage>) -> Vec<Gpu> {
    let mut gpus: Vec<Gpu> = cards
        .into_iter()
        .map(|card| {
            let same = |gpu: &GpuUsage| gpu.driver.split(' ').next() == Some(card.driver.as_str());
            let found = usage.iter().position(same).map(|at| usage.remove(at));
            let name = gpu::name(roots, &card);
            Gpu { name, vendor: card.vendor, driver: card.driver, place: card.place, id: card.id, usage: found }
        })
        .collect();
    gpus.extend(usage.into_iter().map(|gpu| Gpu {
        name: gpu.name.clone(),
        driver: gpu.driver.clone(),
        usage: Some(gpu),
        ..Gpu::default()
    }));
    gpus
}

/// The name of `vendor:device` in the list of PCI ids that Linux distributions carry, if this machine has one.
pub(super) fn pci_name(roots: &Roots, id: &str) -> Option<String> {
    let own = roots.sys.join("share/misc/pci.ids");
    let list = PCI_IDS.iter().map(Path::new).chain([own.as_path()]).rev().find_map(|path| fs::read(path).ok())?;
    let list = String::from_utf8_lossy(&list);
    let (vendor, device) = id.split_once(':')?;
    let mut lines = list.lines().skip_while(|line| line.split_once("  ").is_none_or(|(id, _)| id != vendor)).skip(1);
    // Devices are indented once, and what is built into them twice.
    lines
        .by_ref()
        .take_while(|line| line.starts_with('\t') || line.is_empty() || line.starts_with('#'))
        .find_map(|line| line.strip_prefix('\t')?.strip_prefix(device)?.strip_prefix("  "))
        .map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::devices::fixture;
    use super::*;

    #[test]
    fn a_board_is_told_whole() {
        let fixture = fixture();
        let hardware = look(&fixture);
        assert_eq!(hardware.machine, "NVIDIA Jetson AGX Xavier");
        assert_eq!((hardware.cpu.model.as_str(), hardware.cpu.logical), ("ARMv8 Processor rev 0 (v8l)", 2));
        assert_eq!((hardware.cpu.max_mhz, hardware.memory_bytes), (Some(2265.6), 32_686_080 * 1024));
        let disks: Vec<_> =
            hardware.disks.iter().map(|disk| (disk.name.as_str(), disk.model.as_str(), disk.rotational)).collect();
        assert_eq!(disks, [("mmcblk0", "SD32G", false), ("sda", "ATA WDC WD10EZEX", true)]);
        assert_eq!(hardware.disks[1].size_bytes, 1_000_204_886_016);
        let networks: Vec<_> =
            hardware.networks.iter().map(|net| (net.name.as_str(), net.driver.as_str(), net.speed_mbit)).collect();
        assert_eq!(networks, [("can0", "mcp251x", None), ("eth0", "e1000e", Some(1000))]);
        let gpus: Vec<_> =
            hardware.gpus.iter().map(|gpu| (gpu.name.as_str(), gpu.place.as_str(), gpu.usage.is_some())).collect();
        assert_eq!(
            gpus,
            [
                ("Radeon RX 6600", "0000:03:00.0", true),
                ("UHD Graphics 620", "0000:00:02.0", true),
                ("GPU of NVIDIA Jetson AGX Xavier", "", true),
            ]
        );
        assert!(hardware.devices.iter().any(|(device, readings)| device.name == "bme280" && readings.len() == 3));
    }

    #[test]
    fn this_machine_is_told_as_the_kernel_has_it() {
        let hardware = look(&Roots::default());
        let cpus =
            fs::read_to_string("/proc/cpuinfo").unwrap().lines().filter(|line| line.starts_with("processor")).count();
        assert_eq!(hardware.cpu.logical as usize, cpus);
        assert!(hardware.memory_bytes > 64 << 20);
        for disk in &hardware.disks {
            assert!(Path::new("/sys/block").join(&disk.name).exists() && disk.size_bytes > 0, "{disk:?}");
        }
    }
}
