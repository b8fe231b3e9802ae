//! Containers through containerd, beside Docker and on the containerd that Docker brings: the same network, logs, limits and restarts.

use std::time::Duration;

use lab::cluster::Deploy;
use lab::image;
use lab::node::{Datapath, Node};
use lab::process::capture;
use lab::topology::{Lab, Plan};
use lab::wait::until_true;
use serde_json::json;

use crate::alike::{LIMITED, OUT_OF_MEMORY, document, inspected, is_adopted, limits_hold, nothing_is_left};

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
        "cmd": ["/bin/probe", "serve"], "environment": ["A=b"], "memory": 64, "vcpus": 1,
    });
    lab.cluster.deploy_document(&web, "node-b").expect("deployed");
    let web = lab.cluster.running("web", 1).expect("it runs");

    let to = web[0].service_address(false).expect("a service address");
    let gets = lab.within(&client[0], |client| client.get(to, 20)).expect("answers");
    assert_eq!(gets.failed, 0, "{gets:?}");
    looked_at(&lab.nodes[1]);

    let which = |node: &Node| inspected(node, "web")["runtime"]["pid"].to_string();
    is_adopted(&mut lab, &client[0], to, datapath, which);
    if datapath == Datapath::Ebpf {
        let base = json!({"virtualization": "containerd", "image": image::PROBE});
        limits_hold(&lab, &base, &["/bin/probe", "shell"], OUT_OF_MEMORY);
        let full = document("full", &base, json!({"storage": 5}));
        lab.cluster.deploy_document(&full, "node-b").expect("deployed");
        let reason = lab.cluster.ended("full", "FAILED").expect("it is refused");
        assert!(reason.contains("containerd does not bound what a container writes"), "{reason}");
        for service in LIMITED {
            lab.cluster.delete(service).expect("deleted");
        }
    }
    lab.cluster.delete("web").expect("deleted");
    let ctr = format!("ctr --address {SOCKET} --namespace edge");
    let listed = format!("{ctr} containers ls -q; {ctr} tasks ls -q; {ctr} snapshots ls | grep Active || true");
    nothing_is_left(&lab.nodes[1], "containerd", &listed);
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
    let known = inspected(node, "web");
    let runtime = &known["runtime"];
    assert_eq!((&runtime["cpus"], &runtime["memory_bytes"]), (&json!(1.0), &json!(64 << 20)), "{known:#}");
    assert_eq!(runtime["command"], json!(["/bin/probe", "serve"]), "{known:#}");
    // What it uses is measured every few seconds.
    until_true("what it received is counted", Duration::from_secs(15), || {
        let usage = &inspected(node, "web")["usage"];
        Ok(usage["received_bytes"].as_u64() > Some(500) && usage["cpu_seconds"].as_f64() > Some(0.0))
    })
    .expect("seen");
}
