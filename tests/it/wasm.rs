//! WebAssembly modules: the same network, logs, limits and restarts as containers.

use std::time::Duration;

use lab::cluster::Deploy;
use lab::node::{Datapath, Node};
use lab::process::output;
use lab::topology::{Lab, Plan};
use lab::wait::until_true;
use serde_json::{Value, json};

use crate::alike::{document, inspected, is_adopted, is_held, logs, nothing_is_left, supervisor};

const SETTINGS: &[(&str, &str)] = &[
    ("NODE_ENGINE_WASM", "true"),
    ("NODE_ENGINE_IMAGE_FILES", "true"),
    ("NODE_ENGINE_RESTART_LIMIT", "0"),
    ("NODE_ENGINE_HOST_PATH_VOLUMES", "/run/volumes"),
];
const WORKLOAD: &str = include_str!("../../node-engine/tests/modules/workload.wat");

each_datapath!(a_module_is_a_workload_like_any_other);

fn a_module_is_a_workload_like_any_other(datapath: Datapath) {
    let mut lab = Lab::start(&Plan { settings: SETTINGS, ..Plan::new(2, datapath) }).expect("a laboratory");
    let workload = lab.directory().join("workload.wasm");
    std::fs::write(&workload, wat::parse_str(WORKLOAD).expect("a module")).expect("written");
    let workload = format!("file://{}", workload.display());
    let client = lab.deploy(&Deploy { name: "client", on: Some("node-a"), ..Deploy::default() }, 1).expect("it runs");
    let web = json!({
        "job_name": "app.default.web.default", "virtualization": "wasm", "image": workload, "cmd": ["s"],
        "environment": ["LISTEN_PORTS=80"], "memory": 64, "vcpus": 1,
    });
    lab.cluster.deploy_document(&web, "node-b").expect("deployed");
    let web = lab.cluster.running("web", 1).expect("it runs");
    let announced = output(lab.nodes[1].client().expect("built").args(["status", "--json"])).expect("status");
    assert!(announced.contains("\"wasm\""), "{announced}");

    let to = web[0].service_address(false).expect("a service address");
    let gets = lab.within(&client[0], |client| client.get(to, 20)).expect("answers");
    assert!(gets.failed == 0 && gets.answers.keys().eq(["wasm"]), "{gets:?}");
    assert_eq!(logs(&lab.nodes[1], "web#0"), "serving\n");
    let known = inspected(&lab.nodes[1], "web");
    assert_eq!(known["runtime"]["command"], json!(["workload.wasm", "s"]), "{known:#}");

    let which = |node: &Node| supervisor(node, "wasm", &web[0]);
    is_adopted(&mut lab, &client[0], to, datapath, which);

    lab.cluster.delete("web").expect("deleted");
    let kept = lab.nodes[1].host.directory().join("state/wasm/instances");
    nothing_is_left(&lab.nodes[1], "wasm", &format!("ls /run/netns {}", kept.display()));
    if datapath == Datapath::Ebpf {
        limits_hold(&lab, &workload);
    }
}

fn limits_hold(lab: &Lab, workload: &str) {
    let base = json!({"virtualization": "wasm", "image": workload});
    let deploy = |name: &str, command: &str, more: Value| {
        let mut document = document(name, &base, more);
        document["cmd"] = json!([command]);
        lab.cluster.deploy_document(&document, "node-b").expect("deployed");
    };
    let files = json!({
        "one_shot": true, "added_files": [{"path": "/etc/greeting", "content": "hello\n"}],
        "volumes": [{"volume_id": "data", "csi_driver": "csi.oakestra.io/hostpath", "mount_path": "/mnt/data"}],
    });
    // Modules run as nobody, whom a volume has to let in.
    lab.nodes[1].host.run("mkdir -p -m 777 /run/volumes/data").expect("a volume");
    deploy("files", "f", files);
    lab.cluster.ended("files", "COMPLETED").expect("it has copied its file");
    assert_eq!(lab.nodes[1].host.run("cat /run/volumes/data/copy").expect("kept"), "hello\n");
    let absent = format!("{workload}.not");
    for (name, command, more, reason) in [
        ("bad", "x", json!({}), "exit code 7"),
        ("trap", "t", json!({}), "trap: wasm `unreachable` instruction executed"),
        ("hog", "m", json!({"memory": 32}), "out of memory (limit 32 MiB)"),
        ("kernel", "x", json!({"image": "file:///bin/sh"}), "module: it is no WebAssembly module"),
        ("datagrams", "s", json!({"port": "53:53/udp"}), "WASI preview 1 has no sockets for UDP"),
    ] {
        deploy(name, command, more);
        let detail = lab.cluster.ended(name, "FAILED").expect("its end is told");
        assert!(detail.contains(reason), "{name}: {detail}");
    }
    // What cannot be had now is tried again later, and says meanwhile why it waits.
    deploy("absent", "x", json!({"image": absent}));
    until_true("it says why it waits", Duration::from_secs(30), || {
        let rows = lab.cluster.instances()?;
        Ok(rows.iter().any(|row| row.short() == "absent" && row.detail.contains("No such file")))
    })
    .expect("seen");

    deploy("burn", "c", json!({"vcpus": 1}));
    lab.cluster.running("burn", 1).expect("it runs");
    is_held(&lab.nodes[1], "burn");
}
