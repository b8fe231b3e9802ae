//! Which metrics there are.

use super::{Family, Kind, MOST_INSTANCES, MOST_READINGS, Snapshot};
use crate::model::{GpuUsage, InstanceUsage, Purpose};

const MIB: f64 = 1_048_576.0;

type Labels = Vec<(&'static str, String)>;

pub(super) fn of(snapshot: &Snapshot) -> Vec<Family> {
    let mut families = daemon(snapshot);
    families.extend(machine(snapshot));
    families.extend(health(snapshot));
    families.extend(gpus(&snapshot.usage.gpus));
    families.extend(instances(snapshot));
    families.extend(overlay(snapshot));
    families
}

fn daemon(snapshot: &Snapshot) -> Vec<Family> {
    let build = vec![("version", snapshot.version.to_owned()), ("architecture", snapshot.architecture.clone())];
    let process = &snapshot.process;
    let sent = |value: fn(&Snapshot, Purpose) -> u64| {
        Purpose::ALL
            .map(|purpose| (vec![("purpose", purpose.word().to_owned())], value(snapshot, purpose) as f64))
            .into()
    };
    vec![
        gauge("build_info", "Version of the daemon, in the labels; always 1", vec![(build, 1.0)]),
        one("start_time_seconds", "When the daemon began, in seconds since 1970", snapshot.started_seconds),
        one(
            "cluster_connected",
            "Whether the broker of the cluster is connected",
            f64::from(u8::from(snapshot.connected)),
        ),
        counter(
            "sent_bytes",
            "Bytes of topics and payloads sent to the cluster, by purpose",
            sent(|snapshot, purpose| snapshot.sent.total(purpose).bytes),
        ),
        counter(
            "sent_messages",
            "Messages sent to the cluster, by purpose",
            sent(|snapshot, purpose| snapshot.sent.total(purpose).messages),
        ),
        counter(
            "reports_dropped",
            "Reports to the cluster that were given up: void by a newer one or a lost connection, or without room",
            bare(snapshot.sent.dropped as f64),
        ),
        counter(
            "events",
            "What has happened on this node since the daemon began, by kind, as `node-engine events` shows it",
            snapshot
                .events
                .iter()
                .map(|(kind, count)| (vec![("kind", kind.word().to_owned())], *count as f64))
                .collect(),
        ),
        counter("process_cpu_seconds", "CPU time that the daemon itself has used", bare(process.cpu_seconds)),
        one("process_resident_memory_bytes", "Memory that the daemon itself holds", process.resident_bytes as f64),
        one("process_open_fds", "Files that the daemon itself has open", process.open_files as f64),
    ]
}

fn machine(snapshot: &Snapshot) -> Vec<Family> {
    let usage = &snapshot.usage;
    // What nobody can fill may be full for ever.
    let disk = |value: fn(&crate::model::DiskUsage) -> u64| {
        let sample = |disk: &crate::model::DiskUsage| {
            let labels = vec![
                ("device", disk.device.clone()),
                ("mountpoint", disk.mount_point.clone()),
                ("fstype", disk.file_system.clone()),
            ];
            (labels, value(disk) as f64)
        };
        usage.disks.iter().filter(|disk| !disk.read_only).map(sample).collect::<Vec<_>>()
    };
    let network = |value: fn(&crate::model::NetworkUsage) -> u64| {
        let sample =
            |network: &crate::model::NetworkUsage| (label("device", &network.interface), value(network) as f64);
        usage.networks.iter().map(sample).collect::<Vec<_>>()
    };
    vec![
        one("cpu_usage_ratio", "Share of all CPUs that is used", usage.cpu_percent / 100.0),
        one("cpus", "Logical CPUs", f64::from(usage.cpus_logical)),
        one("memory_bytes", "Memory in all", usage.memory_total_mib as f64 * MIB),
        one(
            "memory_available_bytes",
            "Memory that can be had without swapping",
            usage.memory_available_mib as f64 * MIB,
        ),
        one("uptime_seconds", "Since the machine came up", usage.uptime_seconds as f64),
        gauge("filesystem_size_bytes", "Size of a file system", disk(|disk| disk.total_bytes)),
        gauge("filesystem_avail_bytes", "What of a file system is left", disk(|disk| disk.available_bytes)),
        counter("network_receive_bytes", "Received at an interface", network(|network| network.received_bytes)),
        counter("network_transmit_bytes", "Sent at an interface", network(|network| network.sent_bytes)),
    ]
}

fn health(snapshot: &Snapshot) -> Vec<Family> {
    let health = &snapshot.usage.health;
    let truth = |truth: Option<bool>| truth.map(|truth| f64::from(u8::from(truth)));
    let load = |index: usize| maybe(health.load.map(|load| load[index]));
    let pressure = |value: fn(&crate::model::Pressure) -> u64| {
        let sample =
            |pressure: &crate::model::Pressure| (label("resource", pressure.resource), value(pressure) as f64 / 1e6);
        health.pressures.iter().map(sample).collect::<Vec<_>>()
    };
    let temperatures = health.temperatures.iter().map(|(sensor, value)| (label("sensor", sensor), *value)).collect();
    let wear = health.wear.iter().map(|wear| (label("device", &wear.device), wear.used_percent / 100.0)).collect();
    let readings = snapshot.samples.iter().flat_map(|sample| {
        sample.readings.iter().map(|reading| {
            let labels = vec![
                ("sensor", sample.device.clone()),
                ("channel", reading.channel.clone()),
                ("unit", reading.unit.word().to_owned()),
            ];
            (labels, reading.value)
        })
    });
    vec![
        gauge("load1", "Tasks that run or wait, mean of a minute", load(0)),
        gauge("load5", "Tasks that run or wait, mean of five minutes", load(1)),
        gauge("load15", "Tasks that run or wait, mean of a quarter of an hour", load(2)),
        counter(
            "pressure_waiting_seconds",
            "Time in which some task waited for the resource",
            pressure(|pressure| pressure.some_microseconds),
        ),
        counter(
            "pressure_stalled_seconds",
            "Time in which all tasks waited for the resource",
            pressure(|pressure| pressure.full_microseconds),
        ),
        gauge("temperature_celsius", "What a thermometer says", temperatures),
        counter(
            "cpu_throttle_events",
            "How often heat has slowed down CPUs",
            maybe(health.throttle_events.map(|n| n as f64)),
        ),
        gauge(
            "cpu_throttled",
            "Whether heat or want of voltage holds the clock down now",
            maybe(truth(health.throttled)),
        ),
        gauge("under_voltage", "Whether the supply voltage is too low now", maybe(truth(health.under_voltage))),
        gauge("storage_life_used_ratio", "How much of its life a storage device has used", wear),
        gauge(
            "clock_offset_seconds",
            "The clock minus its reference",
            maybe(health.clock.map(|clock| clock.offset_seconds)),
        ),
        gauge(
            "clock_synchronised",
            "Whether something disciplines the clock",
            maybe(truth(health.clock.map(|clock| clock.synchronised))),
        ),
        gauge(
            "clock_max_error_seconds",
            "How far off the clock may be",
            maybe(health.clock.map(|clock| clock.error_seconds)),
        ),
        gauge("sensor_value", "What a sensor says, in the unit of its label", readings.take(MOST_READINGS).collect()),
    ]
}

fn gpus(gpus: &[GpuUsage]) -> Vec<Family> {
    let each = |value: fn(&GpuUsage) -> f64| {
        let sample = |(index, gpu): (usize, &GpuUsage)| {
            (vec![("gpu", index.to_string()), ("name", gpu.name.clone()), ("driver", gpu.driver.clone())], value(gpu))
        };
        gpus.iter().enumerate().map(sample).collect::<Vec<_>>()
    };
    vec![
        gauge("gpu_usage_ratio", "Share of a GPU that is used", each(|gpu| gpu.usage_percent / 100.0)),
        gauge("gpu_memory_bytes", "Memory of a GPU", each(|gpu| gpu.memory_total_mib as f64 * MIB)),
        gauge("gpu_memory_used_bytes", "Used memory of a GPU", each(|gpu| gpu.memory_used_mib as f64 * MIB)),
        gauge("gpu_temperature_celsius", "Temperature of a GPU", each(|gpu| gpu.temperature_celsius)),
    ]
}

fn instances(snapshot: &Snapshot) -> Vec<Family> {
    let states = snapshot.states.iter().map(|(state, count)| (label("state", *state), *count as f64)).collect();
    let each = |value: fn(&InstanceUsage) -> Option<f64>| {
        let sample = |usage: &InstanceUsage| {
            // `instance` is the scraped target's own label.
            let labels = vec![
                ("service", usage.instance.service.to_string()),
                ("number", usage.instance.number.to_string()),
                ("technology", usage.technology.to_string()),
            ];
            Some((labels, value(usage)?))
        };
        snapshot.instances.iter().take(MOST_INSTANCES).filter_map(sample).collect::<Vec<_>>()
    };
    vec![
        gauge("instances", "Instances on this node, by state", states),
        counter(
            "instance_cpu_seconds",
            "CPU time of an instance",
            each(|usage| seconds(usage.counters.cpu_nanoseconds)),
        ),
        counter(
            "instance_cpu_throttled_seconds",
            "Time in which an instance's limit held it down",
            each(|usage| seconds(usage.counters.throttled_nanoseconds)),
        ),
        gauge(
            "instance_memory_bytes",
            "Memory of an instance, without cache",
            each(|usage| Some(usage.memory_bytes as f64)),
        ),
        gauge(
            "instance_memory_limit_bytes",
            "Memory that an instance may use, where that is limited",
            each(|usage| number(usage.counters.memory_limit_bytes)),
        ),
        counter(
            "instance_oom_kills",
            "Processes of an instance that were killed for want of memory",
            each(|usage| number(usage.counters.out_of_memory_kills)),
        ),
        gauge(
            "instance_processes",
            "Processes and threads of an instance",
            each(|usage| number(usage.counters.processes)),
        ),
        gauge(
            "instance_layer_bytes",
            "Size of an instance's writable layer",
            each(|usage| Some(usage.disk_bytes as f64)),
        ),
        counter(
            "instance_read_bytes",
            "Read from disks by an instance",
            each(|usage| number(usage.counters.read_bytes)),
        ),
        counter(
            "instance_written_bytes",
            "Written to disks by an instance",
            each(|usage| number(usage.counters.written_bytes)),
        ),
        counter(
            "instance_network_receive_bytes",
            "Received at an instance's interfaces",
            each(|usage| number(usage.counters.received_bytes)),
        ),
        counter(
            "instance_network_receive_packets",
            "Packets received at an instance's interfaces",
            each(|usage| number(usage.counters.received_packets)),
        ),
        counter(
            "instance_network_transmit_bytes",
            "Sent at an instance's interfaces",
            each(|usage| number(usage.counters.sent_bytes)),
        ),
        counter(
            "instance_network_transmit_packets",
            "Packets sent at an instance's interfaces",
            each(|usage| number(usage.counters.sent_packets)),
        ),
    ]
}

fn overlay(snapshot: &Snapshot) -> Vec<Family> {
    let of = |kind: &str, name: &'static str| {
        let known = snapshot.counters.iter().filter(|(of, ..)| *of == kind);
        known.map(|(_, reason, value)| (label(name, reason), *value as f64)).collect::<Vec<_>>()
    };
    vec![
        one("overlay_services", "Services in this node's table", snapshot.services as f64),
        one("overlay_peers", "Nodes in this node's table", snapshot.peers as f64),
        counter("overlay_carried_packets", "Packets carried, by verdict", of("carried", "verdict")),
        counter("overlay_dropped_packets", "Packets dropped, by reason", of("dropped", "reason")),
        counter("overlay_refused", "What of the overlay's control was refused, by reason", of("refused", "reason")),
        gauge("overlay_level", "Fill of the overlay's tables", of("level", "table")),
    ]
}

fn seconds(nanoseconds: Option<u64>) -> Option<f64> {
    nanoseconds.map(|nanoseconds| nanoseconds as f64 / 1e9)
}

fn number(number: Option<u64>) -> Option<f64> {
    number.map(|number| number as f64)
}

fn label(name: &'static str, value: impl Into<String>) -> Labels {
    vec![(name, value.into())]
}

fn bare(value: f64) -> Vec<(Labels, f64)> {
    vec![(Vec::new(), value)]
}

fn maybe(value: Option<f64>) -> Vec<(Labels, f64)> {
    value.map(bare).unwrap_or_default()
}

fn one(name: &'static str, help: &'static str, value: f64) -> Family {
    gauge(name, help, bare(value))
}

fn gauge(name: &'static str, help: &'static str, samples: Vec<(Labels, f64)>) -> Family {
    Family { name, help, kind: Kind::Gauge, samples }
}

fn counter(name: &'static str, help: &'static str, samples: Vec<(Labels, f64)>) -> Family {
    Family { name, help, kind: Kind::Counter, samples }
}
