//! WebAssembly modules: the same network, logs, limits and restarts as containers.

use std::time::{Duration, Instant};

use lab::cluster::{Deploy, InstanceRow, json as json_of};
use lab::node::{Datapath, Node};
use lab::process::output;
use lab::topology::{Lab, Plan};
use lab::wait::until_true;
use serde_json::{Value, json};

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
    let log = output(lab.nodes[1].client().expect("built").args(["logs", "web#0"])).expect("logs");
    assert_eq!(log, "serving\n");
    let known: Value = json_of(lab.nodes[1].client().expect("built").args(["inspect", "web", "--json"])).expect("JSON");
    assert_eq!(known["runtime"]["command"], json!(["workload.wasm", "s"]), "{known:#}");

    let before = supervisor(&lab.nodes[1], &web[0]);
    lab.nodes[1].kill().expect("killed");
    let gets = lab.within(&client[0], |client| client.get(to, 5)).expect("answers");
    assert!(datapath == Datapath::Tun || gets.failed == 0, "it runs on without the daemon: {gets:?}");
    lab.nodes[1].start_and_join().expect("back in the cluster");
    lab.cluster.running("web", 1).expect("reported again");
    assert_eq!(supervisor(&lab.nodes[1], &web[0]), before, "the same process");
    let gets = lab.within(&client[0], |client| client.get(to, 20)).expect("answers");
    assert_eq!(gets.failed, 0, "{gets:?}");

    lab.cluster.delete("web").expect("deleted");
    until_true("nothing is left of it", Duration::from_secs(20), || Ok(left(&lab.nodes[1])?.is_empty()))
        .unwrap_or_else(|error| panic!("{error:#}: {:?}", left(&lab.nodes[1])));
    if datapath == Datapath::Ebpf {
        limits_hold(&lab, &workload);
    }
}

fn limits_hold(lab: &Lab, workload: &str) {
    let deploy = |name: &str, command: &str, more: Value| {
        let mut document = json!({
            "job_name": format!("app.default.{name}.default"), "virtualization": "wasm", "image": workload,
            "cmd": [command],
        });
        document.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
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
    let burn = lab.cluster.running("burn", 1).expect("it runs");
    let cpu = |node: &Node| -> f64 {
        let script = "cat /sys/fs/cgroup/cpuacct/$0/cpuacct.usage || sed -n 's/usage_usec \\(.*\\)/\\1000/p' /sys/fs/cgroup/$0/cpu.stat";
        let group = format!("{}/wasm/{}", node.host.group(), burn[0].container());
        let said = output(node.host.command("sh").args(["-c", script, &group])).expect("its control group");
        said.trim().parse::<f64>().expect("nanoseconds") / 1e9
    };
    let (began, used) = (Instant::now(), cpu(&lab.nodes[1]));
    until_true("it has used a second", Duration::from_secs(60), || Ok(cpu(&lab.nodes[1]) - used > 1.0))
        .expect("it burns");
    let share = (cpu(&lab.nodes[1]) - used) / began.elapsed().as_secs_f64();
    assert!(share < 1.15, "a loop got {share:.2} CPUs where one is allowed");
}

fn supervisor(node: &Node, instance: &InstanceRow) -> String {
    node.host.run(&format!("cat /run/node-engine/wasm/{}/alive", instance.container())).expect("a supervisor")
}

/// Directories, namespaces and control groups of modules on this node.
fn left(node: &Node) -> anyhow::Result<String> {
    let kept = node.host.directory().join("state/wasm/instances");
    node.host
        .shell(&format!(
            "ls /run/node-engine/wasm /run/netns {}; find /sys/fs/cgroup -path '*{}/wasm/*' -type d",
            kept.display(),
            node.host.group()
        ))
        .map(|listed| listed.lines().filter(|line| !line.is_empty() && !line.ends_with(':')).collect())
}
