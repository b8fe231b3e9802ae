//! A real sample of this machine on the wire: names, types and units are those of each generation (protocol 4.1, 4.2, 4.4).

use std::net::IpAddr;

use serde_json::{Map, Value};

use super::*;
use crate::config::{Generation, TelemetryConfig};
use crate::model::{GpuUsage, InstanceCounters, InstanceUsage};
use crate::telemetry;
use crate::wire::node::{compact_information, compact_resources, information, resources};

const IP: &str = "192.0.2.11";

async fn real_sample() -> NodeUsage {
    let (reports, _heard) = mpsc::channel(16);
    let drain = Drain::new(Duration::from_secs(1));
    let setup = telemetry::Setup {
        config: TelemetryConfig::default(),
        reports,
        pace: watch::channel(Duration::from_secs(3600)).1,
        events: Events::default(),
        drain: drain.clone(),
    };
    let started = telemetry::start(setup).await.unwrap();
    let usage = started.usage.borrow().clone();
    drain.begin();
    usage
}

fn members(text: &str) -> Map<String, Value> {
    serde_json::from_str(text).unwrap()
}

fn said(generation: Generation, usage: &NodeUsage) -> Map<String, Value> {
    members(&information(generation, usage, Some(IP.parse::<IpAddr>().unwrap())))
}

fn number(members: &Map<String, Value>, name: &str) -> f64 {
    members.get(name).and_then(Value::as_f64).unwrap_or_else(|| panic!("no number {name} in {members:?}"))
}

#[tokio::test]
async fn the_newest_generation_gets_its_names_and_units() {
    let mut usage = real_sample().await;
    let sent = said(Generation::G4, &usage);
    let kib = |name: &str| -> f64 {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap();
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    };
    let (total, available) = (kib("MemTotal:") / 1024.0, kib("MemAvailable:") / 1024.0);
    // `memory` is what is available, in MiB; `memory_percent` what is used. Others use this machine meanwhile.
    assert!((number(&sent, "memory") - available).abs() < total / 4.0, "{sent:?} and {available} MiB");
    assert!((number(&sent, "memory_percent") - 100.0 * (1.0 - available / total)).abs() < 25.0, "{sent:?}");
    assert_eq!(sent["vcpus"].as_u64(), Some(u64::from(usage.cpus_logical)), "logical CPUs in all, a whole number");
    assert_eq!(sent["vcpus"].as_u64(), Some(std::thread::available_parallelism().unwrap().get() as u64));
    assert!((0.0..=100.0).contains(&number(&sent, "cpu_percent")), "{sent:?}");
    assert_eq!(sent["ip"], IP);
    // Static members are left out rather than sent empty: a cluster stores empty texts over what the registration said.
    for absent in ["id", "host", "port", "architecture", "virtualization"] {
        assert!(!sent.contains_key(absent), "{absent} in {sent:?}");
    }
    if let Some(root) = sent.get("disk_info") {
        let percent: f64 = root["/"].as_str().expect("a text").parse().expect("of a number");
        assert!((0.0..=100.0).contains(&percent), "{root}");
    }
    for (name, interface) in sent.get("network_info").and_then(Value::as_object).into_iter().flatten() {
        assert!(name.starts_with("interface_"), "{name}");
        serde_json::from_str::<Value>(interface.as_str().expect("a text")).expect("of JSON");
    }
    assert_eq!((&sent["vgpus"], sent["gpu_driver"].is_string()), (&usage.gpus.len().into(), true));

    let gpu = |used, heat| GpuUsage {
        name: "x".into(),
        driver: "nvidia 550".into(),
        usage_percent: 50.0,
        memory_total_mib: 8192,
        memory_used_mib: used,
        temperature_celsius: heat,
    };
    usage.gpus = vec![gpu(2048, 40.0), gpu(4096, 60.0)];
    let sent = said(Generation::G4, &usage);
    assert_eq!((number(&sent, "vgpus"), number(&sent, "gpu_usage"), number(&sent, "gpu_temp")), (2.0, 50.0, 60.0));
    assert_eq!((number(&sent, "vram"), number(&sent, "vram_percent")), (16_384.0, 37.5), "MiB in all, percent used");
    assert_eq!(sent["gpu_driver"], "nvidia 550");
}

#[tokio::test]
async fn older_generations_mean_other_things_by_the_same_names() {
    let usage = real_sample().await;
    let (older, newer) = (said(Generation::G2, &usage), said(Generation::G4, &usage));
    // As near as JSON keeps numbers.
    let near = |left: f64, right: f64| (left - right).abs() < 1e-9;
    assert!(near(number(&older, "memory"), usage.memory_percent), "percent used, where the newest has MiB");
    assert_eq!(number(&newer, "memory"), usage.memory_available_mib as f64);
    assert_eq!(number(&older, "memory_free_in_MB"), usage.memory_available_mib as f64);
    assert!(near(number(&older, "cpu"), usage.cpu_percent));
    assert_eq!(number(&older, "free_cores"), f64::from(usage.cpus_logical), "a total in spite of its name");
    for (old, new) in [("gpu_cores", "vgpus"), ("gpu_mem_used", "vram_percent"), ("gpu_tot_mem", "vram")] {
        assert_eq!(older[old], newer[new], "{old} is {new}");
    }
    let first = said(Generation::G1, &usage);
    let names: Vec<&str> = first.keys().map(String::as_str).collect();
    assert_eq!(names, ["cpu", "free_cores", "ip", "memory", "memory_free_in_MB"]);
    let free = f64::from(usage.cpus_logical) * (1.0 - usage.cpu_percent / 100.0);
    assert!((number(&first, "free_cores") - free).abs() < 1e-9, "here it is what is free");
}

#[tokio::test]
async fn compact_frames_say_the_same_in_fewer_bytes() {
    let usage = real_sample().await;
    let ip = Some(IP.parse().unwrap());
    for (generation, names) in [
        (Generation::G2, vec!["cpu", "free_cores", "ip", "memory", "memory_free_in_MB"]),
        (Generation::G4, vec!["cpu_percent", "ip", "memory", "memory_percent", "vcpus"]),
    ] {
        let (whole, compact) = (information(generation, &usage, ip), compact_information(generation, &usage, ip));
        assert!(compact.len() * 2 < whole.len(), "{} and {} bytes", compact.len(), whole.len());
        let (whole, compact) = (members(&whole), members(&compact));
        let told: Vec<&str> = compact
            .keys()
            .map(String::as_str)
            .filter(|name| !name.starts_with("gpu") && !name.starts_with('v') || *name == "vcpus")
            .collect();
        assert_eq!(told, names);
        for name in names.iter().filter(|name| **name != "ip") {
            assert!((number(&compact, name) - number(&whole, name)).abs() <= 0.05, "{name}");
        }
    }
    let running = InstanceUsage {
        instance: WEB.parse().unwrap(),
        technology: Technology::Container,
        cpu_percent: 1.26,
        memory_bytes: 0,
        memory_percent: 0.34,
        disk_bytes: 5,
        log_tail: "hello".into(),
        counters: InstanceCounters::default(),
    };
    let whole = members(&resources(std::slice::from_ref(&running))[0]);
    let whole = &whole["services"][0];
    assert_eq!((&whole["cpu_percent"], &whole["memory"]), (&"1.260000".into(), &"0.340000".into()), "texts");
    let compact = compact_resources(Generation::G4, std::slice::from_ref(&running));
    assert_eq!(
        members(&compact[0])["services"][0],
        serde_json::json!({
            "job_name": "app.default.web.default", "instance": 0, "virtualization": "docker",
            "cpu_percent": "1.3", "memory_percent": "0.3", "disk": "5", "logs": "hello",
        })
    );
    assert_eq!(compact_resources(Generation::G4, &[]), resources(&[]), "none is said in the same words");
}
