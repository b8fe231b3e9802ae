//! What a person and a scraper learn of a node: its instances from close by, what happens, hardware, sensors, metrics. And what the
//! cluster's broker carries of it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use lab::cluster::{BROKER_PORT, Broker, Deploy, InstanceRow, json};
use lab::node::{Datapath, Node};
use lab::process::{built, capture, output};
use lab::topology::{Lab, Plan};
use lab::wait::until;
use serde_json::Value;

/// An engine of before 23.0 is told the size only after the command has begun.
const AWAITS_SIZE: &str =
    "test -t 0; i=0; while [ $i -lt 100 ] && ! stty size | grep \"33 77\"; do i=$((i+1)); sleep 0.1; done; exit 9";

#[test]
#[ignore = "needs root"]
fn everything_the_node_knows_can_be_asked() {
    let mut lab =
        Lab::prepare(&Plan { broker: Broker::Mosquitto, ..Plan::new(1, Datapath::Tun) }).expect("a laboratory");
    attach_a_thermometer(&mut lab.nodes[0]).expect("a tree of files");
    lab.nodes[0].start_and_join().expect("it joins");
    let deploy = |name, ports| {
        lab.deploy(&Deploy { name, replicas: 1, ports, ..Deploy::default() }, 1).expect("it runs").remove(0)
    };
    let (web, client) = (deploy("web", &["8080:80"]), deploy("client", &[]));
    let service = web.service_address(false).expect("a service address");
    let node = &lab.nodes[0];
    let gets = lab.within(&client, |client| client.get(service, 50)).expect("requests");
    assert_eq!(gets.failed, 0, "{gets:?}");

    inspected(node, &web).expect("inspect");
    measured(node).expect("stats");
    entered(node).expect("exec");
    followed(node, &web).expect("logs -f and events");
    scraped(node).expect("metrics");
    collected(node).expect("metrics for a collector");
    let hardware = say(node, &["hardware"]).expect("hardware");
    for word in ["cpu ", "memory ", "tmp117", "hwmon", "temp1 21.5 °C"] {
        assert!(hardware.contains(word), "no {word} in {hardware}");
    }
    carried(&lab).expect("messages on the broker");
    given(&lab).expect("a device by its name");
    let status = say(node, &["status"]).expect("status");
    let line = status.lines().find(|line| line.starts_with("sent today")).expect("what was sent");
    for purpose in ["information ", "resources ", "job ", "net ", "sensors "] {
        let told = line.split([',', '\u{20}']).any(|word| word == purpose.trim());
        assert!(told && !line.contains(&format!("{purpose}0 B")), "{line}");
    }
}

/// The daemon is told to look for sensors in a tree of files, and to tell of them.
fn attach_a_thermometer(node: &mut Node) -> Result<()> {
    let tree = node.host.directory().join("sys");
    let monitor = tree.join("class/hwmon/hwmon0");
    fs::create_dir_all(&monitor)?;
    fs::write(monitor.join("name"), "tmp117\n")?;
    fs::write(monitor.join("temp1_input"), "21500\n")?;
    // And an accelerometer, whose node is a second /dev/zero.
    let accelerometer = tree.join("bus/iio/devices/iio:device0");
    fs::create_dir_all(&accelerometer)?;
    fs::write(accelerometer.join("name"), "lsm6dso\n")?;
    let devices = node.host.directory().join("dev");
    node.host.shell(&format!("mkdir -p {0}; mknod {0}/iio:device0 c 1 5", devices.display()))?;
    node.set_variable("NODE_ENGINE_DEV_DIR", &devices.to_string_lossy());
    node.set_variable("NODE_ENGINE_SYS_DIR", &tree.to_string_lossy());
    node.set_variable("NODE_ENGINE_SENSORS", "all");
    node.set_variable("NODE_ENGINE_SENSORS_EVERY", "0.5");
    node.set_variable("NODE_ENGINE_METRICS", "127.0.0.1:9640");
    node.set_variable("NODE_ENGINE_OTLP", "http://127.0.0.1:4318");
    node.set_variable("NODE_ENGINE_OTLP_EVERY", "0.5");
    // A killed container is told of at once.
    node.set_variable("NODE_ENGINE_RESTART_LIMIT", "0");
    Ok(())
}

fn inspected(node: &Node, web: &InstanceRow) -> Result<()> {
    let known = ask(node, &["inspect", "web"])?;
    let pid = node.container_pid(web)?;
    assert_eq!(known["runtime"]["pid"], pid, "{known:#}");
    assert_eq!((&known["state"], &known["restarts"]), (&"running".into(), &0.into()), "{known:#}");
    assert_eq!(
        (&known["address_v4"], &known["ports"][0]),
        (&web.address.as_str().into(), &"8080:80/tcp".into()),
        "{known:#}"
    );
    let id = node.host.run(&format!("docker inspect --format {{{{.Id}}}} {}", web.container()))?;
    assert_eq!(known["runtime"]["handle"], id.trim(), "{known:#}");
    let text = say(node, &["inspect", "web#0"])?;
    assert!(text.contains(&format!("pid          {pid}")) && text.contains("8080:80/tcp"), "{text}");
    Ok(())
}

/// The kernel's own counters of the veth's end in the container are what is told.
fn measured(node: &Node) -> Result<()> {
    until("the traffic is counted", Duration::from_secs(15), || {
        let usage = ask(node, &["stats", "web"])?[0].clone();
        let (received, sent) = (usage["received_bytes"].as_u64(), usage["sent_bytes"].as_u64());
        anyhow::ensure!(received > Some(50 * 60) && sent > Some(50 * 60), "{usage:#}");
        anyhow::ensure!(
            usage["memory_bytes"].as_u64() > Some(0) && usage["cpu_seconds"].as_f64() > Some(0.0),
            "{usage:#}"
        );
        Ok(Some(()))
    })?;
    let text = say(node, &["stats"])?;
    assert!(text.starts_with("INSTANCE") && text.lines().count() == 3, "two run: {text}");
    Ok(())
}

fn entered(node: &Node) -> Result<()> {
    let ended = capture(node.client()?.args(["exec", "web", "--", "sh", "-c", "echo out; echo error >&2; exit 7"]))?;
    assert_eq!(ended.status.code(), Some(7), "{ended:?}");
    assert_eq!((ended.stdout.as_slice(), ended.stderr.as_slice()), (&b"out\n"[..], &b"error\n"[..]));

    let mut cat =
        node.client()?.args(["exec", "web", "--", "cat"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let text = "line\n".repeat(200_000);
    let mut input = cat.stdin.take().context("not piped")?;
    let sent = text.clone();
    let feeding = std::thread::spawn(move || input.write_all(sent.as_bytes()));
    let said = cat.wait_with_output()?;
    feeding.join().expect("no panic")?;
    assert!(said.status.success() && said.stdout == text.as_bytes(), "{} bytes came back", said.stdout.len());

    // `script` gives it a terminal, whose size it says.
    let engine = built("node-engine")?;
    let line = format!(
        "stty cols 77 rows 33; {} --socket /run/node-engine/api.sock exec web -- sh -c '{AWAITS_SIZE}'",
        engine.display()
    );
    let ended = capture(node.host.command("script").args(["-qefc", &line, "/dev/null"]))?;
    let said = String::from_utf8_lossy(&ended.stdout).into_owned();
    assert_eq!((ended.status.code(), said.contains("33 77")), (Some(9), true), "{said:?}");

    let refused = capture(node.client()?.args(["exec", "web#7", "--", "true"]))?;
    let complaint = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && complaint.contains("no instance"), "{complaint}");
    Ok(())
}

fn followed(node: &Node, web: &InstanceRow) -> Result<()> {
    let mut logs = node.client()?.args(["logs", "-f", "web"]).stdout(Stdio::piped()).spawn()?;
    let mut lines = BufReader::new(logs.stdout.take().context("not piped")?).lines();
    let first = lines.next().context("it says something")??;
    assert!(first.starts_with("serving as"), "{first}");
    output(node.client()?.args(["exec", "web", "--", "sh", "-c", "echo more > /proc/1/fd/1"]))?;
    assert_eq!(lines.next().context("it says more")??, "more");
    node.host.run(&format!("docker kill {}", web.container()))?;
    assert!(lines.next().is_none(), "it ends with the instance");
    assert!(logs.wait()?.success());

    until("the end is told", Duration::from_secs(20), || {
        let text = say(node, &["events", "--json"])?;
        let events: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        let of_web = events.iter().filter(|event| event["subject"] == "app.default.web.default#0");
        let words: Vec<&str> = of_web.filter_map(|event| event["event"].as_str()).collect();
        anyhow::ensure!(words.starts_with(&["creating", "created", "exec"]), "{words:?}");
        anyhow::ensure!(words.contains(&"exited") && words.contains(&"failed"), "{words:?}");
        Ok(Some(()))
    })
}

fn scraped(node: &Node) -> Result<()> {
    let fetch = "busybox wget -q -O - http://127.0.0.1:9640/metrics";
    let text = node.host.run(fetch)?;
    for name in [
        "node_engine_cluster_connected 1.0",
        "node_engine_instance_network_receive_bytes_total{service=\"app.default.client.default\"",
        "node_engine_sensor_value{sensor=\"tmp117\",channel=\"temp1\",unit=\"celsius\"} 21.5",
        "node_engine_overlay_carried_packets_total{",
    ] {
        assert!(text.contains(name), "no {name} in {text}");
    }
    let complaint = node.host.shell(&format!("{fetch} | promtool check metrics 2>&1"))?;
    assert_eq!(complaint.trim(), "");
    assert!(node.host.run("busybox wget -q -O - http://127.0.0.1:9640/status").is_err(), "metrics and nothing else");
    assert!(say(node, &["metrics"])?.contains("node_engine_build_info{"), "on the socket too");
    Ok(())
}

/// Takes one request over HTTP, and keeps it.
const COLLECTOR: &str = r#"
while read -r line; do
    line=$(printf %s "$line" | tr -d '\r')
    case "$line" in
        POST*) echo "$line" > /run/collected ;;
        [Cc]ontent-[Ll]ength:*) length=${line#*: } ;;
        '') break ;;
    esac
done
head -c $length >> /run/collected
printf 'HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}'"#;

fn collected(node: &Node) -> Result<()> {
    let script = node.host.directory().join("collector.sh");
    fs::write(&script, COLLECTOR)?;
    let listen = format!("timeout 20 busybox nc -l -p 4318 -e sh {}; cat /run/collected", script.display());
    let request = node.host.shell(&listen)?;
    let (head, body) = request.split_once('\n').with_context(|| request.clone())?;
    assert!(head.starts_with("POST") && head.contains("/v1/metrics"), "{head}");
    let told: Value = serde_json::from_str(body).with_context(|| body.to_owned())?;
    let metrics = &told["resourceMetrics"][0]["scopeMetrics"][0]["metrics"];
    let sensor =
        metrics.as_array().context("a list")?.iter().find(|metric| metric["name"] == "node_engine_sensor_value");
    assert_eq!(sensor.context("no sensor")?["gauge"]["dataPoints"][0]["asDouble"], 21.5, "{told}");
    Ok(())
}

/// What goes over the wire has the names and units of the newest generation (protocol 4.1, 4.4), and sensors have topics of their own.
fn carried(lab: &Lab) -> Result<()> {
    let broker = ["-h", "127.0.0.1", "-p", &BROKER_PORT.to_string()].map(str::to_owned);
    let one = |topic: &str| -> Result<Value> {
        let text = output(lab.lan.command("mosquitto_sub").args(&broker).args(["-C", "1", "-W", "30", "-t", topic]))?;
        serde_json::from_str(&text).with_context(|| text)
    };
    let information = one("nodes/+/information")?;
    let number = |name: &str| information[name].as_f64().with_context(|| format!("{name} in {information}"));
    let memory = fs::read_to_string("/proc/meminfo")?;
    let total: f64 =
        memory.lines().next().and_then(|line| line.split_whitespace().nth(1)).context("MemTotal")?.parse()?;
    assert!((1.0..=total / 1024.0).contains(&number("memory")?), "available MiB: {information}");
    for percent in ["cpu_percent", "memory_percent", "gpu_usage", "vram_percent"] {
        assert!((0.0..=100.0).contains(&number(percent)?), "{percent}: {information}");
    }
    assert_eq!(number("vcpus")?, std::thread::available_parallelism()?.get() as f64);
    assert_eq!(information["ip"], "198.18.0.1");

    let resources = one("nodes/+/jobs/resources")?;
    for service in resources["services"].as_array().context("a list")? {
        for text in ["cpu_percent", "memory_percent", "disk", "logs", "job_name", "virtualization"] {
            assert!(service[text].is_string(), "{text}: {service}");
        }
        assert!(
            service["instance"].is_u64()
                && service["cpu_percent"].as_str().is_some_and(|text| text.parse::<f64>().is_ok())
        );
    }

    let sensor = one("nodes/+/sensors/tmp117")?;
    assert_eq!(
        sensor["readings"][0],
        serde_json::json!({"channel": "temp1", "value": 21.5, "unit": "celsius"}),
        "{sensor}"
    );
    assert!(sensor["time"].as_f64() > Some(1.7e9), "{sensor}");
    Ok(())
}

/// Checked at the deployment, and there for the instance.
fn given(lab: &Lab) -> Result<()> {
    let document = |name: &str, device: &str| {
        serde_json::json!({
            "job_name": format!("app.default.{name}.default"), "virtualization": "container", "image": lab::image::PROBE,
            "devices": [device],
        })
    };
    lab.cluster.deploy_document(&document("reads", "lsm6dso"), "node-a")?;
    lab.cluster.running("reads", 1)?;
    let node = &lab.nodes[0];
    let said = say(node, &["exec", "reads", "--", "sh", "-c", "head -c 4 /dev/iio:device0 | od -An -tx1"])?;
    assert_eq!(said.trim(), "00 00 00 00");
    let known = ask(node, &["inspect", "reads"])?;
    assert!(
        known["runtime"]["devices"][0].as_str().is_some_and(|node| node.ends_with("/dev/iio:device0")),
        "{known:#}"
    );
    lab.cluster.deploy_document(&document("lost", "camera7"), "node-a")?;
    let reason = lab.cluster.ended("lost", "FAILED")?;
    assert_eq!(reason, "device: camera7 is not attached to this node; attached: lsm6dso");
    Ok(())
}

fn ask(node: &Node, words: &[&str]) -> Result<Value> {
    json(node.client()?.args(words).arg("--json"))
}

fn say(node: &Node, words: &[&str]) -> Result<String> {
    output(node.client()?.args(words))
}
