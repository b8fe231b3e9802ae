//! CPU, memory, disks and networks of the machine.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::net::IpAddr;

use nix::ifaddrs::getifaddrs;
use sysinfo::{CpuRefreshKind, Disks, MINIMUM_CPU_UPDATE_INTERVAL, MemoryRefreshKind, RefreshKind, System};

use super::SensorError;
use crate::model::{DiskUsage, NetworkUsage, NodeFacts, NodeUsage, Technology};
use crate::net_dev::{self, Passed};

/// Disks and interfaces that one report carries at most: it has to fit one wire message.
const MOST_DISKS: usize = 32;
const MOST_NETWORKS: usize = 32;

const MIB: u64 = 1 << 20;

/// The open sensors. CPU usage is what was used since the sample before.
#[derive(Debug)]
pub(super) struct Host {
    system: System,
}

impl Host {
    /// Opens the sensors; waits as long as a first value for CPU usage takes.
    pub(super) fn open() -> Result<Self, SensorError> {
        let kinds = RefreshKind::nothing()
            .with_cpu(CpuRefreshKind::nothing().with_usage())
            .with_memory(MemoryRefreshKind::nothing().with_ram());
        let system = System::new_with_specifics(kinds).map_err(unreadable("cpu and memory"))?;
        std::thread::sleep(MINIMUM_CPU_UPDATE_INTERVAL);
        Ok(Self { system })
    }

    pub(super) fn sample(&mut self) -> NodeUsage {
        self.system.refresh_cpu_usage();
        self.system.refresh_memory_specifics(MemoryRefreshKind::nothing().with_ram());
        let total = self.system.total_memory();
        let available = self.system.available_memory().min(total);
        NodeUsage {
            cpu_percent: f64::from(self.system.global_cpu_usage()).clamp(0.0, 100.0),
            cpus_logical: count(self.system.cpus().len()),
            memory_percent: if total == 0 { 0.0 } else { 100.0 * (total - available) as f64 / total as f64 },
            memory_available_mib: available / MIB,
            memory_total_mib: total / MIB,
            uptime_seconds: System::uptime().unwrap_or(0),
            networks: networks(),
            ..NodeUsage::default()
        }
    }
}

pub(super) fn disks(disks: &Disks) -> Vec<DiskUsage> {
    distinct(disks.iter().map(|disk| DiskUsage {
        device: disk.name().to_string_lossy().into_owned(),
        mount_point: disk.mount_point().to_string_lossy().into_owned(),
        file_system: disk.file_system().to_string_lossy().into_owned(),
        total_bytes: disk.total_space(),
        available_bytes: disk.available_space(),
        read_only: disk.is_read_only(),
    }))
}

/// One entry a device: a device that is mounted many times (bind mounts) is reported at its first mount point, and at the first where it can
/// be written. The roots of containers come and go, and what they take is on a device that is told of.
fn distinct(disks: impl Iterator<Item = DiskUsage>) -> Vec<DiskUsage> {
    let mut seen = HashSet::new();
    let of_container = |disk: &DiskUsage| disk.file_system == "overlay" && disk.mount_point != "/";
    disks
        .filter(|disk| disk.total_bytes > 0 && !of_container(disk))
        .filter(|disk| seen.insert((disk.device.clone(), disk.read_only)))
        .take(MOST_DISKS)
        .collect()
}

/// Interfaces with an address of their own, which leaves out the host ends of containers' veths. What passed is read from the one file
/// that has it of all: there are many interfaces, and this is done all the time.
fn networks() -> Vec<NetworkUsage> {
    let mut networks: BTreeMap<String, NetworkUsage> = BTreeMap::new();
    for interface in getifaddrs().into_iter().flatten() {
        let v4 = interface.address.as_ref().and_then(|address| address.as_sockaddr_in());
        let v6 = interface.address.as_ref().and_then(|address| address.as_sockaddr_in6());
        let address = v4.map(|v4| v4.ip().into()).or_else(|| v6.map(|v6| v6.ip().into()));
        if let Some(address) = address.filter(is_own) {
            networks.entry(interface.interface_name).or_default().addresses.push(address);
        }
    }
    let table = fs::read_to_string("/proc/net/dev").unwrap_or_default();
    let counted: HashMap<&str, Passed> = net_dev::interfaces(&table).collect();
    let found = networks.into_iter().take(MOST_NETWORKS).map(|(interface, network)| {
        let Passed { received, sent } = counted.get(interface.as_str()).copied().unwrap_or_default();
        NetworkUsage { interface, received_bytes: received.bytes, sent_bytes: sent.bytes, ..network }
    });
    found.collect()
}

fn is_own(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !v4.is_loopback(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    }
}

pub(super) fn facts(node_name: &str, technologies: Vec<Technology>) -> NodeFacts {
    NodeFacts {
        host: node_name.to_owned(),
        announced_port: None,
        kernel_version: System::kernel_version().unwrap_or_default(),
        os_version: System::long_os_version().unwrap_or_default(),
        architecture: go_architecture(std::env::consts::ARCH).to_owned(),
        boot_time_seconds: System::boot_time().unwrap_or(0),
        cpus_physical: count(System::physical_core_count().unwrap_or(0)),
        cpus_logical: count(std::thread::available_parallelism().map_or(1, usize::from)),
        technologies,
        volume_drivers: Vec::new(),
    }
}

/// The name Go has for an architecture, which is what schedulers compare.
fn go_architecture(rust: &str) -> &str {
    match rust {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        "powerpc64" => "ppc64",
        "loongarch64" => "loong64",
        other => other,
    }
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn unreadable<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> SensorError {
    move |error| SensorError { what, reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sample_agrees_with_proc() {
        let usage = Host::open().unwrap().sample();
        assert!((0.0..=100.0).contains(&usage.cpu_percent), "{usage:?}");
        assert!((0.0..=100.0).contains(&usage.memory_percent), "{usage:?}");

        let total_kib = meminfo("MemTotal:");
        assert_eq!(usage.memory_total_mib, total_kib / 1024);
        let available_mib = meminfo("MemAvailable:") / 1024;
        let apart = usage.memory_available_mib.abs_diff(available_mib);
        assert!(apart <= usage.memory_total_mib / 4, "{} and {available_mib} MiB", usage.memory_available_mib);

        let stat = std::fs::read_to_string("/proc/stat").unwrap();
        let cpus = stat.lines().filter(|line| line.starts_with("cpu") && !line.starts_with("cpu ")).count();
        assert_eq!(usage.cpus_logical as usize, cpus);

        let uptime = std::fs::read_to_string("/proc/uptime").unwrap();
        let uptime: f64 = uptime.split(' ').next().unwrap().parse().unwrap();
        assert!((usage.uptime_seconds as f64 - uptime).abs() < 60.0, "{} and {uptime} s", usage.uptime_seconds);
    }

    #[test]
    fn disks_are_reported_once_a_device_and_hold_what_they_can() {
        let told = disks(&Disks::new_with_refreshed_list().unwrap());
        assert!(!told.is_empty());
        let devices: HashSet<_> = told.iter().map(|disk| (&disk.device, disk.read_only)).collect();
        assert_eq!(devices.len(), told.len(), "{told:?}");
        for disk in &told {
            assert!(disk.available_bytes <= disk.total_bytes, "{disk:?}");
        }
    }

    #[test]
    fn roots_of_containers_are_no_disks_and_that_of_the_machine_is() {
        let disk = |(device, mount_point, file_system, read_only): (&str, &str, &str, bool)| DiskUsage {
            device: device.into(),
            mount_point: mount_point.into(),
            file_system: file_system.into(),
            total_bytes: 1,
            available_bytes: 0,
            read_only,
        };
        let told = |mounts: &[(&str, &str, &str, bool)]| -> Vec<String> {
            distinct(mounts.iter().copied().map(disk)).into_iter().map(|disk| disk.mount_point).collect()
        };
        assert_eq!(
            told(&[
                ("/dev/sda2", "/", "ext4", false),
                ("/dev/sda2", "/var/lib", "ext4", false),
                ("overlay", "/var/lib/docker/overlay2/a/merged", "overlay", false),
                ("/dev/sda1", "/boot", "vfat", false),
            ]),
            ["/", "/boot"]
        );
        // An image that is booted, and what is written beside it.
        assert_eq!(
            told(&[
                ("overlay", "/", "overlay", true),
                ("/dev/sda3", "/sysroot", "ext4", true),
                ("/dev/sda3", "/var", "ext4", false),
                ("overlay", "/var/lib/docker/overlay2/a/merged", "overlay", false),
            ]),
            ["/", "/sysroot", "/var"]
        );
    }

    #[test]
    fn networks_have_an_address_of_their_own() {
        for network in Host::open().unwrap().sample().networks {
            assert!(network.addresses.iter().all(is_own), "{network:?}");
            assert!(std::path::Path::new("/sys/class/net").join(&network.interface).exists(), "{network:?}");
        }
    }

    #[test]
    fn facts_are_those_of_uname() {
        let facts = facts("edge-1", vec![Technology::Container]);
        assert_eq!(facts.host, "edge-1");
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        assert_eq!(facts.kernel_version, release.trim());
        assert!(facts.cpus_logical >= 1);
        assert!(facts.boot_time_seconds > 1_000_000_000, "{facts:?}");
        assert_eq!(facts.technologies, [Technology::Container]);
    }

    #[test]
    fn architectures_are_named_as_in_go() {
        for (rust, go) in [("x86_64", "amd64"), ("aarch64", "arm64"), ("arm", "arm"), ("riscv64", "riscv64")] {
            assert_eq!(go_architecture(rust), go);
        }
    }

    fn meminfo(key: &str) -> u64 {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap();
        let line = text.lines().find(|line| line.starts_with(key)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}
