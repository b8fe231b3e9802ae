//! Containers through containerd, beside Docker and on the containerd that Docker brings: the same network, logs, limits and restarts.

use std::time::{Duration, Instant};

use lab::cluster::{Deploy, InstanceRow, json as json_of};
use lab::image;
use lab::node::{Datapath, Node};
use lab::process::{capture, output};
use lab::topology::{Lab, Plan};
use lab::wait::until_true;
use serde_json::json;

const SOCKET: &str = "/run/docker/containerd/containerd.sock";
const SETTINGS: &[(&str, &str)] = &[
    ("NODE_ENGINE_CONTAINERD", SOCKET),
    ("NODE_ENGINE_CONTAINERD_NAMESPACE", "edge"),
    ("NODE_ENGINE_RESTART_LIMIT", "0"),
];

each_datapath!(a_container_without_docker_is_a_workload_like_any_other);

fn a_container_without_docker_is_a_workload_like_any_other(datapath: Datapath) {
    let mut lab = Lab::start(&Plan { settings: SETTINGS, ..Plan::new(2, datapath) }).expect("a laboratory");
    image::load_into_containerd(&lab.nodes[1].host, SOCKET, "edge").expect("the image is there");
    let client = lab.deploy(&Deploy { name: "client", on: Some("node-a"), ..Deploy::default() }, 1).expect("it runs");
    let web = json!({
        "job_name": "app.default.web.default", "virtualization": "containerd", "image": image::PROBE,
        "cmd": ["serve"], "environment": ["A=b"], "memory": 64, "vcpus": 1,
    });
    lab.cluster.deploy_document(&web, "node-b").expect("deployed");
    let web = lab.cluster.running("web", 1).expect("it runs");

    let to = web[0].service_address(false).expect("a service address");
    let gets = lab.within(&client[0], |client| client.get(to, 20)).expect("answers");
    assert_eq!(gets.failed, 0, "{gets:?}");
    looked_at(&lab.nodes[1]);

    let before = pid(&lab.nodes[1]);
    lab.nodes[1].kill().expect("killed");
    let gets = lab.within(&client[0], |client| client.get(to, 5)).expect("answers");
    assert!(datapath == Datapath::Tun || gets.failed == 0, "it runs on without the daemon: {gets:?}");
    lab.nodes[1].start_and_join().expect("back in the cluster");
    lab.cluster.running("web", 1).expect("reported again");
    assert_eq!(pid(&lab.nodes[1]), before, "the same process");
    let gets = lab.within(&client[0], |client| client.get(to, 20)).expect("answers");
    assert_eq!(gets.failed, 0, "{gets:?}");
    if datapath == Datapath::Ebpf {
        limits_hold(&lab);
    }

    for service in ["web", "once", "bad", "hog", "burn"].iter().take(if datapath == Datapath::Ebpf { 5 } else { 1 }) {
        lab.cluster.delete(service).expect("deleted");
    }
    until_true("nothing is left of them", Duration::from_secs(20), || Ok(left(&lab.nodes[1])?.is_empty()))
        .unwrap_or_else(|error| panic!("{error:#}: {:?}", left(&lab.nodes[1])));
}

/// A person sees of it what there is to see of a container of Docker's, and gets in.
fn looked_at(node: &Node) {
    let ask = |words: &[&str]| capture(node.client().expect("built").args(words)).expect("it runs");
    let ended = ask(&["exec", "web", "--", "sh", "-c", "hostname; echo $A $PPID; echo error >&2; exit 7"]);
    let said = String::from_utf8_lossy(&ended.stdout).into_owned();
    assert_eq!(
        (ended.status.code(), said.as_str(), &ended.stderr[..]),
        (Some(7), "instance-0\nb 0\n", &b"error\n"[..])
    );
    let known: serde_json::Value =
        json_of(node.client().expect("built").args(["inspect", "web", "--json"])).expect("JSON");
    let runtime = &known["runtime"];
    assert_eq!((&runtime["cpus"], &runtime["memory_bytes"]), (&json!(1.0), &json!(64 << 20)), "{known:#}");
    assert_eq!(runtime["command"], json!(["/bin/probe", "serve"]), "{known:#}");
    // What it uses is measured every few seconds.
    until_true("what it received is counted", Duration::from_secs(15), || {
        let known: serde_json::Value = json_of(node.client()?.args(["inspect", "web", "--json"]))?;
        let usage = &known["usage"];
        Ok(usage["received_bytes"].as_u64() > Some(500) && usage["cpu_seconds"].as_f64() > Some(0.0))
    })
    .expect("seen");
}

fn limits_hold(lab: &Lab) {
    // By the image's entry point, which ends with 1 where the script fails.
    let shell = |name: &str, script: &str, more: serde_json::Value| {
        let mut document = json!({
            "job_name": format!("app.default.{name}.default"), "virtualization": "containerd", "image": image::PROBE,
            "cmd": ["shell", script],
        });
        document.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        lab.cluster.deploy_document(&document, "node-b").expect("deployed");
    };
    shell("once", "echo done", json!({"one_shot": true}));
    lab.cluster.ended("once", "COMPLETED").expect("its end is told");
    shell("bad", "exit 3", json!({}));
    assert_eq!(lab.cluster.ended("bad", "FAILED").expect("its end is told"), "exit code 1");
    shell("hog", "tail /dev/zero", json!({"memory": 32}));
    assert_eq!(lab.cluster.ended("hog", "FAILED").expect("it is killed"), "out of memory (limit 32 MiB)");
    shell("full", "true", json!({"storage": 5}));
    let reason = lab.cluster.ended("full", "FAILED").expect("it is refused");
    assert!(reason.contains("containerd does not bound what a container writes"), "{reason}");

    shell("burn", "echo burning; for i in 1 2 3 4; do while :; do :; done & done; wait", json!({"vcpus": 1}));
    let burn = lab.cluster.running("burn", 1).expect("it runs");
    until_true("its output is kept", Duration::from_secs(10), || {
        Ok(output(lab.nodes[1].client()?.args(["logs", "burn#0"]))? == "burning\n")
    })
    .expect("kept");
    let (began, used) = (Instant::now(), cpu(&lab.nodes[1], &burn[0]));
    until_true("it has used a second", Duration::from_secs(60), || Ok(cpu(&lab.nodes[1], &burn[0]) - used > 1.0))
        .expect("it burns");
    let share = (cpu(&lab.nodes[1], &burn[0]) - used) / began.elapsed().as_secs_f64();
    assert!(share < 1.15, "four loops got {share:.2} CPUs where one is allowed");
}

/// Seconds of CPU that an instance has used.
fn cpu(node: &Node, instance: &InstanceRow) -> f64 {
    let script = "cat /sys/fs/cgroup/cpuacct/$0/cpuacct.usage || sed -n 's/usage_usec \\(.*\\)/\\1000/p' /sys/fs/cgroup/$0/cpu.stat";
    let group = format!("{}/containerd/{}", node.host.group(), instance.container());
    let said = output(node.host.command("sh").args(["-c", script, &group])).expect("its control group");
    said.trim().parse::<f64>().expect("nanoseconds") / 1e9
}

fn pid(node: &Node) -> u64 {
    let known: serde_json::Value =
        json_of(node.client().expect("built").args(["inspect", "web", "--json"])).expect("JSON");
    known["runtime"]["pid"].as_u64().expect("its process")
}

/// Containers, snapshots, directories and control groups of instances on this node.
fn left(node: &Node) -> anyhow::Result<String> {
    let ctr = format!("ctr --address {SOCKET} --namespace edge");
    node.host
        .shell(&format!(
            "{ctr} containers ls -q; {ctr} tasks ls -q; {ctr} snapshots ls | grep Active || true
             ls /run/node-engine/containerd; find /sys/fs/cgroup -path '*{}/containerd/*' -type d",
            node.host.group()
        ))
        .map(|listed| listed.lines().filter(|line| !line.is_empty()).collect())
}
