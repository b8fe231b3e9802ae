//! What the machine is made of, as tables.

use super::ask::dash;
use super::table::{bytes, list, mebibytes, percent, table};
use crate::api::dto::hardware::{Device, Disk, Gpu, Hardware, Network, Reading};

pub(super) fn hardware(known: &Hardware) -> String {
    let cpu = &known.cpu;
    let physical = if cpu.physical == 0 { String::new() } else { format!(", {} cores", cpu.physical) };
    let fastest = cpu.max_mhz.map(|mhz| format!(", up to {mhz:.0} MHz")).unwrap_or_default();
    let summary = list(&[
        ("machine", known.machine.clone()),
        ("firmware", known.firmware.clone()),
        ("cpu", format!("{} ({}), {} CPUs{physical}{fastest}", dash(&cpu.model), cpu.architecture, cpu.logical)),
        ("memory", bytes(known.memory_bytes)),
    ]);
    let parts = [
        (known.gpus.is_empty(), gpus(&known.gpus)),
        (known.disks.is_empty(), disks(&known.disks)),
        (known.networks.is_empty(), networks(&known.networks)),
        (known.devices.is_empty(), devices(&known.devices)),
    ];
    let parts = parts.into_iter().filter(|(empty, _)| !empty).map(|(_, text)| format!("\n{text}"));
    std::iter::once(summary).chain(parts).collect()
}

fn gpus(known: &[Gpu]) -> String {
    let row = |gpu: &Gpu| {
        let memory = match (gpu.memory_used_mib, gpu.memory_total_mib) {
            (Some(used), Some(total)) => format!("{} of {}", mebibytes(used), mebibytes(total)),
            _ => "-".into(),
        };
        [
            gpu.name.clone(),
            dash(&gpu.vendor),
            dash(&gpu.driver),
            dash(&gpu.place),
            dash(&gpu.id),
            gpu.usage_percent.map_or_else(|| "-".into(), percent),
            memory,
            gpu.temperature_celsius.map_or_else(|| "-".into(), |value| format!("{value:.0} °C")),
        ]
    };
    table(
        ["DISPLAY", "VENDOR", "DRIVER", "PLACE", "ID", "USED", "MEMORY", "HEAT"],
        &known.iter().map(row).collect::<Vec<_>>(),
    )
}

fn disks(known: &[Disk]) -> String {
    let row = |disk: &Disk| {
        let mut kind = if disk.rotational { "spinning".to_owned() } else { "solid".to_owned() };
        if disk.removable {
            kind.push_str(", removable");
        }
        [
            disk.name.clone(),
            bytes(disk.size_bytes),
            kind,
            disk.life_used_percent.map_or_else(|| "-".into(), percent),
            dash(&disk.model),
        ]
    };
    table(["DISK", "SIZE", "KIND", "WORN", "MODEL"], &known.iter().map(row).collect::<Vec<_>>())
}

fn networks(known: &[Network]) -> String {
    let row = |network: &Network| {
        [
            network.name.clone(),
            dash(&network.state),
            network.speed_mbit.map_or_else(|| "-".into(), |speed| format!("{speed} Mbit/s")),
            network.mtu.to_string(),
            dash(&network.address),
            dash(&network.driver),
        ]
    };
    table(["NETWORK", "STATE", "SPEED", "MTU", "ADDRESS", "DRIVER"], &known.iter().map(row).collect::<Vec<_>>())
}

fn devices(known: &[Device]) -> String {
    let row = |device: &Device| {
        [
            device.name.clone(),
            device.kind.clone(),
            dash(&device.description),
            dash(&device.id),
            dash(&device.nodes.join(" ")),
            dash(&device.readings.iter().map(reading).collect::<Vec<_>>().join(", ")),
        ]
    };
    table(["DEVICE", "KIND", "DESCRIPTION", "ID", "NODES", "READS"], &known.iter().map(row).collect::<Vec<_>>())
}

fn reading(reading: &Reading) -> String {
    let unit = match reading.unit.as_str() {
        "celsius" => " °C",
        "volts" => " V",
        "amperes" => " A",
        "watts" => " W",
        "joules" => " J",
        "percent" => " %",
        "pascals" => " Pa",
        "lux" => " lx",
        "metres" => " m",
        "metres_per_second" => " m/s",
        "metres_per_second_squared" => " m/s²",
        "radians_per_second" => " rad/s",
        "teslas" => " T",
        "degrees" => "°",
        "hertz" => " Hz",
        "ohms" => " Ω",
        "1" => "",
        other => &format!(" {other}"),
    };
    let digits = match reading.value.abs() {
        1000.0.. => 0,
        0.0..0.01 => 6,
        _ => 3,
    };
    let number = format!("{:.digits$}", reading.value);
    let number = if number.contains('.') { number.trim_end_matches('0').trim_end_matches('.') } else { &number };
    format!("{} {number}{unit}", reading.channel)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_there_is_has_a_table() {
        let known = Hardware { memory_bytes: 1 << 30, ..Hardware::default() };
        assert_eq!(hardware(&known), "cpu     - (), 0 CPUs\nmemory  1.0 GiB\n");
        let gpu = Gpu { name: "Radeon RX 6600".into(), usage_percent: Some(37.0), ..Gpu::default() };
        let text = hardware(&Hardware { gpus: vec![gpu], ..known });
        assert!(text.contains("\nDISPLAY ") && text.contains("Radeon RX 6600") && text.contains("37%"), "{text}");
        assert!(!text.contains("DISK"), "{text}");
    }

    #[test]
    fn readings_are_short_and_have_units() {
        let one =
            |channel: &str, value, unit: &str| reading(&Reading { channel: channel.into(), value, unit: unit.into() });
        assert_eq!(one("temp", 21.34, "celsius"), "temp 21.34 °C");
        assert_eq!(one("pressure", 101_325.4, "pascals"), "pressure 101325 Pa");
        assert_eq!(one("fan1", 1200.0, "rpm"), "fan1 1200 rpm");
        assert_eq!(one("state", 0.0, "1"), "state 0");
        assert_eq!(one("x", 100.0, "volts"), "x 100 V");
        assert_eq!(one("magn_x", 0.0001, "teslas"), "magn_x 0.0001 T");
        assert_eq!(one("x", -3.5, "celsius"), "x -3.5 °C");
    }
}
