use std::collections::{BTreeMap, BTreeSet};
use std::time::UNIX_EPOCH;

use super::*;
use crate::model::{
    Clock, DeviceKind, DiskUsage, GpuUsage, InstanceCounters, NetworkUsage, NodeHealth, Pressure, Purpose, Reading,
    Technology, Unit, Wear,
};

/// One of everything, so that every family has a series.
fn everything() -> Snapshot {
    let mut sent = Sent::default();
    sent.add(Purpose::Job, 10, 1);
    sent.dropped = 4;
    let counters = InstanceCounters {
        cpu_nanoseconds: Some(1_500_000_000),
        throttled_nanoseconds: Some(1),
        memory_peak_bytes: Some(1),
        memory_limit_bytes: Some(1),
        out_of_memory_kills: Some(1),
        processes: Some(1),
        read_bytes: Some(1),
        written_bytes: Some(1),
        received_bytes: Some(1),
        received_packets: Some(1),
        sent_bytes: Some(1),
        sent_packets: Some(1),
        dropped_packets: Some(1),
    };
    Snapshot {
        version: "1.2.3",
        architecture: "amd64".into(),
        started_seconds: 1_700_000_000.5,
        connected: true,
        usage: NodeUsage {
            cpu_percent: 12.5,
            cpus_logical: 4,
            memory_total_mib: 2048,
            memory_available_mib: 1024,
            disks: vec![DiskUsage { device: "/dev/vda".into(), mount_point: "/".into(), ..DiskUsage::default() }],
            networks: vec![NetworkUsage { interface: "eth0".into(), received_bytes: 7, ..NetworkUsage::default() }],
            gpus: vec![GpuUsage { name: "a \"fast\"\\one\n".into(), driver: "nvidia".into(), ..GpuUsage::default() }],
            health: NodeHealth {
                load: Some([0.5, 0.25, 0.1]),
                pressures: vec![Pressure {
                    resource: "cpu",
                    some_percent: 1.0,
                    full_percent: 0.0,
                    some_microseconds: 2_500_000,
                    full_microseconds: 0,
                }],
                temperatures: vec![("cpu".into(), 45.5)],
                throttle_events: Some(3),
                throttled: Some(false),
                under_voltage: Some(true),
                wear: vec![Wear { device: "mmcblk0".into(), used_percent: 30.0, urgent: false }],
                clock: Some(Clock { offset_seconds: -0.001, synchronised: true, error_seconds: 0.5 }),
            },
            ..NodeUsage::default()
        },
        states: vec![("running", 1), ("failed", 0)],
        instances: vec![InstanceUsage {
            instance: "app.default.web.test.instance.0".parse().unwrap(),
            technology: Technology::Container,
            cpu_percent: 1.0,
            memory_bytes: 4096,
            memory_percent: 0.1,
            disk_bytes: 1,
            log_tail: String::new(),
            counters,
        }],
        services: 2,
        peers: 1,
        counters: vec![
            ("carried", "sent".into(), 5),
            ("dropped", "drop_unknown".into(), 6),
            ("refused", "query_refused".into(), 7),
            ("level", "flows".into(), 8),
        ],
        sent,
        events: vec![(EventKind::OutOfMemory, 2)],
        samples: vec![Sample {
            device: "bme280".into(),
            kind: DeviceKind::Iio,
            time: UNIX_EPOCH,
            readings: vec![Reading { channel: "temp".into(), unit: Unit::Celsius, value: 21.5 }],
        }],
        process: Process { cpu_seconds: 1.5, resident_bytes: 1 << 20, open_files: 30 },
    }
}

/// Name → kind, by the `# TYPE` lines, and the names of series.
fn exported(text: &str) -> (BTreeMap<String, String>, BTreeSet<String>) {
    let kinds = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' '));
    let series = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split(['{', ' ']).next());
    (
        kinds.map(|(name, kind)| (name.to_owned(), kind.to_owned())).collect(),
        series.filter(|name| !name.is_empty()).map(str::to_owned).collect(),
    )
}

#[test]
fn series_say_what_the_snapshot_does_in_base_units() {
    let text = encode(&everything(), Format::Prometheus);
    for line in [
        r#"node_engine_build_info{version="1.2.3",architecture="amd64"} 1.0"#,
        "node_engine_cpu_usage_ratio 0.125",
        "node_engine_memory_bytes 2147483648.0",
        r#"node_engine_network_receive_bytes_total{device="eth0"} 7.0"#,
        r#"node_engine_pressure_waiting_seconds_total{resource="cpu"} 2.5"#,
        r#"node_engine_storage_life_used_ratio{device="mmcblk0"} 0.3"#,
        r#"node_engine_instance_cpu_seconds_total{service="app.default.web.test",number="0",technology="docker"} 1.5"#,
        r#"node_engine_overlay_dropped_packets_total{reason="drop_unknown"} 6.0"#,
        r#"node_engine_sent_bytes_total{purpose="job"} 10.0"#,
        "node_engine_reports_dropped_total 4.0",
        r#"node_engine_events_total{kind="out-of-memory"} 2.0"#,
        r#"node_engine_sensor_value{sensor="bme280",channel="temp",unit="celsius"} 21.5"#,
        r#"node_engine_gpu_usage_ratio{gpu="0",name="a \"fast\"\\one\n",driver="nvidia"} 0.0"#,
    ] {
        assert!(text.lines().any(|known| known == line), "{line} is not in\n{text}");
    }
}

/// The rules that `promtool check metrics` applies, and those of the formats.
#[test]
fn names_follow_the_conventions() {
    let all = families::of(&everything());
    let names: BTreeSet<&str> = all.iter().map(|family| family.name).collect();
    assert_eq!(names.len(), all.len(), "a name is used once");
    for family in &all {
        assert!(!family.samples.is_empty(), "{} has no series in the test's snapshot", family.name);
        let plain = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '_';
        assert!(family.name.chars().all(plain), "{}", family.name);
        assert!(!family.help.is_empty() && !family.help.ends_with('.'), "{}", family.help);
        for unit in
            ["_ms", "milliseconds", "_mib", "kilobytes", "percent", "fahrenheit", "_count", "_sum", "_bucket", "_total"]
        {
            assert!(!family.name.ends_with(unit), "{} ends with {unit}", family.name);
        }
        let (labels, _) = &family.samples[0];
        for (label, _) in labels {
            assert!(!["instance", "job", "le", "quantile"].contains(label), "{} has a label {label}", family.name);
        }
        let mut sets = BTreeSet::new();
        assert!(
            family.samples.iter().all(|(labels, _)| sets.insert(labels.clone())),
            "{} has a series twice",
            family.name
        );
    }
}

#[test]
fn both_formats_are_whole() {
    let snapshot = everything();
    let (kinds, series) = exported(&encode(&snapshot, Format::Prometheus));
    for (name, kind) in &kinds {
        assert_eq!(kind == "counter", name.ends_with("_total"), "{name} {kind}");
        assert!(series.contains(name), "{name} has no series");
    }
    assert_eq!(kinds.len(), series.len());
    let newer = encode(&snapshot, Format::OpenMetrics);
    assert!(newer.ends_with("# EOF\n"));
    assert_eq!(exported(&newer).1, series, "the same series in both");
    assert!(encode(&Snapshot::default(), Format::OpenMetrics).ends_with("# EOF\n"));
}

#[test]
fn the_number_of_series_is_bounded() {
    let mut snapshot = everything();
    let one = snapshot.instances[0].clone();
    snapshot.instances = (0..2 * MOST_INSTANCES as u32)
        .map(|number| {
            let mut usage = one.clone();
            usage.instance.number = number;
            usage
        })
        .collect();
    let reading = snapshot.samples[0].readings[0].clone();
    snapshot.samples[0].readings = vec![reading; 2 * MOST_READINGS];
    let text = encode(&snapshot, Format::Prometheus);
    let count = |name: &str| text.lines().filter(|line| line.starts_with(&format!("{name}{{"))).count();
    assert_eq!(count("node_engine_instance_memory_bytes"), MOST_INSTANCES);
    assert_eq!(count("node_engine_sensor_value"), MOST_READINGS);
}

#[test]
fn a_file_system_that_nobody_can_fill_has_no_series() {
    let mut snapshot = everything();
    let root = snapshot.usage.disks[0].clone();
    snapshot.usage.disks.push(DiskUsage { mount_point: "/sysroot".into(), read_only: true, ..root });
    let text = encode(&snapshot, Format::Prometheus);
    let told: Vec<&str> = text.lines().filter(|line| line.starts_with("node_engine_filesystem_avail_bytes{")).collect();
    assert!(told.len() == 1 && told[0].contains(r#"mountpoint="/""#), "{told:?}");
}

#[test]
fn a_scraper_gets_the_format_it_asks_for() {
    let newest = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3,*/*;q=0.1";
    assert_eq!(Format::accepted(newest), Format::OpenMetrics);
    for older in ["text/plain", "*/*", ""] {
        assert_eq!(Format::accepted(older), Format::Prometheus);
    }
}

/// What a collector is told is what a scraper reads: each series with the same name, labels and value.
#[test]
fn a_collector_is_told_the_same() {
    let now = UNIX_EPOCH + std::time::Duration::from_millis(1_500);
    let told: serde_json::Value = serde_json::from_str(&otlp::encode(&everything(), "edge-1", "", now)).unwrap();
    let resource = &told["resourceMetrics"][0];
    let attribute = |name: &str, value: &str| serde_json::json!({"key": name, "value": {"stringValue": value}});
    let about = ["service.name", "service.version", "host.name"].into_iter().zip(["node-engine", "1.2.3", "edge-1"]);
    let about: Vec<_> = about.map(|(name, value)| attribute(name, value)).collect();
    assert_eq!(resource["resource"]["attributes"], serde_json::Value::from(about), "what is not known is not said");
    let mut series = Vec::new();
    for metric in resource["scopeMetrics"][0]["metrics"].as_array().unwrap() {
        let (ending, kind) = if metric["sum"].is_object() { ("_total", "sum") } else { ("", "gauge") };
        if kind == "sum" {
            assert_eq!(
                (&metric["sum"]["isMonotonic"], &metric["sum"]["aggregationTemporality"]),
                (&true.into(), &2.into())
            );
        }
        for point in metric[kind]["dataPoints"].as_array().unwrap() {
            assert_eq!(point["timeUnixNano"], "1500000000");
            let labels = point["attributes"].as_array().unwrap().iter();
            let labels: Vec<_> = labels
                .map(|label| format!("{}={}", label["key"].as_str().unwrap(), label["value"]["stringValue"]))
                .collect();
            let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
            let name = metric["name"].as_str().unwrap();
            series.push(format!("{name}{ending}{labels} {:?}", point["asDouble"].as_f64().unwrap()));
        }
    }
    let text = encode(&everything(), Format::Prometheus);
    let scraped: BTreeSet<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    assert_eq!(series.iter().map(String::as_str).collect::<BTreeSet<_>>(), scraped);
}

/// The dashboard and the alert rules ask for what there is.
#[test]
fn what_is_shipped_asks_for_names_that_are_exported() {
    let (_, series) = exported(&encode(&everything(), Format::Prometheus));
    for (file, text) in [
        ("dashboard", include_str!("../../../docs/monitoring/grafana-dashboard.json")),
        ("alerts", include_str!("../../../docs/monitoring/alerts.yml")),
    ] {
        let word = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
        let asked: BTreeSet<&str> =
            text.split(|letter| !word(letter)).filter(|name| name.starts_with("node_engine_")).collect();
        assert!(asked.len() >= 8, "{file} asks for {asked:?}");
        for name in asked {
            assert!(series.contains(name), "{file} asks for {name}, which is not exported");
        }
    }
    let dashboard: serde_json::Value =
        serde_json::from_str(include_str!("../../../docs/monitoring/grafana-dashboard.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let asks = |panel: &&serde_json::Value| panel["targets"].as_array().is_some_and(|targets| !targets.is_empty());
    assert_eq!(panels.iter().filter(asks).count(), panels.len(), "a panel without a question");
}

/// A cluster deletes what has failed: only the events still tell of it.
#[test]
fn alert_rules_ask_for_kinds_of_events_that_there_are() {
    let rules = include_str!("../../../docs/monitoring/alerts.yml");
    let kinds = rules.split("kind=").skip(1).filter_map(|rest| rest.split('"').nth(1));
    let asked: BTreeSet<&str> = kinds.flat_map(|kinds| kinds.split('|')).collect();
    let told = EventKind::ALL.map(EventKind::word);
    for kind in &asked {
        assert!(told.contains(kind), "nothing is ever {kind}");
    }
    for kind in ["failed", "dead", "exited", "out-of-memory"] {
        assert!(asked.contains(kind), "{kind} is not among {asked:?}");
    }
}

/// Prometheus' own tool, where it is installed, reads both files and the exposition, and the rules tell of what they are for.
#[test]
#[ignore = "needs promtool (package prometheus)"]
fn prometheus_itself_finds_nothing_to_complain_about() {
    use std::io::Write;
    use std::process::{Command, Stdio};
    let mut check = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool is installed by `cargo xtask setup`");
    check.stdin.take().unwrap().write_all(encode(&everything(), Format::Prometheus).as_bytes()).unwrap();
    let said = check.wait_with_output().unwrap();
    let complaint = format!("{}{}", String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    assert!(said.status.success() && complaint.trim().is_empty(), "{complaint}");
    for (what, file) in [("check", "/../docs/monitoring/alerts.yml"), ("test", "/tests/fixtures/alerts.yml")] {
        let file = format!("{}{file}", env!("CARGO_MANIFEST_DIR"));
        let said = Command::new("promtool").args([what, "rules", file.as_str()]).output().unwrap();
        let complaint = format!("{}{}", String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
        assert!(said.status.success(), "{complaint}");
    }
}
