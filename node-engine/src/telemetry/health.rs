//! How the machine bears its work: pressure, heat, voltage, wear. Read from the kernel's small files; what this machine does not tell
//! is absent.

use super::clock;
use super::devices;
use super::roots::{Roots, entries, number, text};
use crate::model::{Device, DeviceKind, NodeHealth, Pressure, Unit, Wear};

/// Temperatures and storage devices that are told of at most.
const MOST: usize = 64;

/// Bits of the firmware's word about throttling (Raspberry Pi, `vcgencmd get_throttled`).
const UNDER_VOLTAGE: u64 = 1 << 0;
const CAPPED: u64 = 1 << 1;
const THROTTLED: u64 = 1 << 2;
const SOFT_LIMIT: u64 = 1 << 3;

/// What devices have to be asked for.
pub(super) fn of_hardware(roots: &Roots, devices: &[Device]) -> NodeHealth {
    let firmware = firmware_word(roots);
    let bits = |bits: u64| firmware.map(|word| word & bits != 0);
    NodeHealth {
        temperatures: temperatures(devices),
        throttle_events: throttle_events(roots),
        throttled: bits(CAPPED | THROTTLED | SOFT_LIMIT),
        under_voltage: bits(UNDER_VOLTAGE).or_else(|| voltage_alarm(roots)),
        wear: wear(roots),
        ..NodeHealth::default()
    }
}

/// With what the kernel knows by itself.
pub(super) fn of_kernel(roots: &Roots, hardware: NodeHealth) -> NodeHealth {
    NodeHealth {
        load: load(roots),
        pressures: ["cpu", "memory", "io"].into_iter().filter_map(|resource| pressure(roots, resource)).collect(),
        clock: clock::read(),
        ..hardware
    }
}

fn load(roots: &Roots) -> Option<[f64; 3]> {
    let text = text(roots.proc.join("loadavg"))?;
    let mut numbers = text.split(' ').map(str::parse);
    let mut next = || numbers.next()?.ok();
    Some([next()?, next()?, next()?])
}

/// `some avg10=0.12 avg60=… avg300=… total=345`, and the same for `full`, which a resource may lack.
fn pressure(roots: &Roots, resource: &'static str) -> Option<Pressure> {
    let text = text(roots.proc.join("pressure").join(resource))?;
    let line = |kind: &str| text.lines().find_map(|line| line.strip_prefix(kind));
    let value = |line: &str, name: &str| -> Option<String> {
        line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('=')).map(str::to_owned)
    };
    let read = |line: &str| Some((value(line, "avg10")?.parse().ok()?, value(line, "total")?.parse().ok()?));
    let (some_percent, some_microseconds) = read(line("some ")?)?;
    let (full_percent, full_microseconds) = line("full ").and_then(read).unwrap_or_default();
    Some(Pressure { resource, some_percent, full_percent, some_microseconds, full_microseconds })
}

/// Of the machine itself. Thermometers on a wire (which older kernels have among the hardware monitors alone) measure something else, and
/// take the better part of a second each.
fn temperatures(devices: &[Device]) -> Vec<(String, f64)> {
    let own = devices
        .iter()
        .filter(|device| device.kind != DeviceKind::OneWire && !device.name.starts_with(devices::W1_MONITOR));
    let told = own.flat_map(|device| {
        let readings = devices::read_those(device, |channel| channel.unit == Unit::Celsius);
        readings.into_iter().map(|reading| match reading.channel.as_str() {
            "temperature" => (device.name.clone(), reading.value),
            channel => (format!("{} {channel}", device.name), reading.value),
        })
    });
    told.take(MOST).collect()
}

/// The CPUs of one package share their heat; each package counts once.
fn throttle_events(roots: &Roots) -> Option<u64> {
    let mut packages = std::collections::BTreeMap::new();
    let is_cpu = |name: &str| name.strip_prefix("cpu").is_some_and(|rest| rest.parse::<u32>().is_ok());
    for (_, path) in entries(roots.sys.join("devices/system/cpu")).into_iter().filter(|(name, _)| is_cpu(name)) {
        if let Some(events) = number::<u64>(path.join("thermal_throttle/package_throttle_count")) {
            let package = number::<i64>(path.join("topology/physical_package_id")).unwrap_or(0);
            packages.insert(package, events);
        }
    }
    (!packages.is_empty()).then(|| packages.values().sum())
}

fn firmware_word(roots: &Roots) -> Option<u64> {
    let word = text(roots.sys.join("devices/platform/soc/soc:firmware/get_throttled"))?;
    u64::from_str_radix(word.trim_start_matches("0x"), 16).ok()
}

/// The voltage monitor of later Raspberry Pis.
fn voltage_alarm(roots: &Roots) -> Option<bool> {
    let monitors = entries(roots.sys.join("class/hwmon"));
    let (_, monitor) = monitors.iter().find(|(_, path)| text(path.join("name")).as_deref() == Some("rpi_volt"))?;
    number::<u8>(monitor.join("in0_lcrit_alarm")).map(|alarm| alarm != 0)
}

/// Embedded flash tells tenths of its life (JEDEC eMMC 5.0, UFS 2.1); of its two kinds of memory the worse one counts.
fn wear(roots: &Roots) -> Vec<Wear> {
    let devices = entries(roots.sys.join("block")).into_iter().filter_map(|(name, path)| {
        let hex = |word: &str| u32::from_str_radix(word.trim_start_matches("0x"), 16).ok();
        let emmc =
            || -> Option<Vec<u32>> { text(path.join("device/life_time"))?.split_whitespace().map(hex).collect() };
        let ufs = || -> Option<Vec<u32>> {
            let part = |part: &str| hex(&text(path.join("device/../../../health_descriptor").join(part))?);
            Some(vec![part("life_time_estimation_a")?, part("life_time_estimation_b")?])
        };
        // 0 is not known, 1 is up to 10 percent, 11 is beyond the end.
        let tenths = emmc().or_else(ufs)?.into_iter().max().filter(|tenths| *tenths > 0)?;
        let urgent = text(path.join("device/pre_eol_info")).and_then(|word| hex(&word)).is_some_and(|word| word >= 2);
        Some(Wear { device: name, used_percent: f64::from(tenths) * 10.0, urgent })
    });
    devices.take(MOST).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_and_load_are_those_of_this_machine() {
        let health = of_kernel(&Roots::default(), NodeHealth::default());
        let load = health.load.expect("every Linux tells its load");
        assert!(load.iter().all(|load| (0.0..100_000.0).contains(load)), "{load:?}");
        let told =
            ["cpu", "memory", "io"].iter().filter(|name| std::fs::read(format!("/proc/pressure/{name}")).is_ok());
        assert_eq!(health.pressures.len(), told.count(), "{health:?}");
        for pressure in &health.pressures {
            assert!((0.0..=100.0).contains(&pressure.some_percent), "{pressure:?}");
            assert!(pressure.full_microseconds <= pressure.some_microseconds, "{pressure:?}");
        }
        assert!(health.clock.is_some());
    }

    #[test]
    fn heat_voltage_and_wear_are_read_from_a_board_that_tells_them() {
        let roots = devices::fixture();
        let health = of_kernel(&roots, of_hardware(&roots, &devices::scan(&roots)));
        let wire = health.temperatures.iter().find(|(name, _)| name.starts_with("w1"));
        assert_eq!(wire, None, "what hangs on a wire is not the machine's heat");
        assert_eq!((health.throttled, health.under_voltage), (Some(true), Some(true)));
        assert_eq!(health.throttle_events, Some(7), "once a package");
        assert_eq!(health.wear, [Wear { device: "mmcblk0".into(), used_percent: 30.0, urgent: false }]);
        assert!(health.temperatures.contains(&("cpu-thermal".into(), 61.322)), "{:?}", health.temperatures);
        assert_eq!(health.load, Some([0.5, 0.25, 0.1]));
        let io = health.pressures.iter().find(|pressure| pressure.resource == "io").expect("io");
        assert_eq!((io.some_percent, io.full_microseconds), (1.5, 900));
        assert_eq!(health.pressures.len(), 2, "no file, no pressure: {:?}", health.pressures);
    }
}
