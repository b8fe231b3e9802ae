//! What a node gives to an instance, and what only its configuration can grant.

use lab::cluster::Deploy;
use lab::image::PROBE;
use lab::node::Datapath;
use lab::process::output;
use lab::topology::{Lab, Plan};
use lab::wait::until_true;
use serde_json::{Value, json};
use std::time::Duration;

const SETTINGS: &[(&str, &str)] = &[
    ("NODE_ENGINE_HOST_PATH_VOLUMES", "/run/volumes"),
    ("NODE_ENGINE_PRIVILEGED", "app.default.granted.default"),
    ("NODE_ENGINE_PROCESS", "true"),
    ("NODE_ENGINE_PROCESS_USER", "root"),
];

#[test]
#[ignore = "needs root"]
fn volumes_files_and_privileges_are_given_by_the_node() {
    let lab = Lab::start(&Plan { settings: SETTINGS, ..Plan::new(1, Datapath::Auto) }).expect("a laboratory");
    let deploy = |name: &str, script: &str, more: Value| {
        let mut document = json!({
            "job_name": format!("app.default.{name}.default"), "virtualization": "container", "image": PROBE,
            "cmd": ["/bin/probe", "shell", script], "one_shot": true,
        });
        document.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        lab.cluster.deploy_document(&document, "node-a").expect("deployed");
    };
    let volume =
        |path: &str| json!([{"volume_id": "data", "csi_driver": "csi.oakestra.io/hostpath", "mount_path": path}]);
    let node = &lab.nodes[0];

    // The probe runs a shell where it is told to; what one instance writes the next one reads, whatever runs it.
    let container = json!({"image": PROBE, "volumes": volume("/data"), "added_files": [{"path": "/etc/greeting", "content": "hello\n"}]});
    deploy("writer", "cat /etc/greeting > /data/file", container);
    lab.cluster.ended("writer", "COMPLETED").expect("it has written");
    let process = json!({
        "virtualization": "process", "image": "", "cmd": ["sh", "-c", "test \"$(cat /mnt/file)\" = hello"], "volumes": volume("/mnt"),
    });
    deploy("reader", "", process);
    lab.cluster.ended("reader", "COMPLETED").expect("it has read");
    assert_eq!(node.host.run("cat /run/volumes/data/file").expect("kept"), "hello\n");
    for name in ["writer", "reader"] {
        lab.cluster.delete(name).expect("deleted");
    }
    until_true("nothing is mounted any more", Duration::from_secs(20), || {
        Ok(!node.host.run("cat /proc/self/mounts")?.contains("/csi/publish/"))
    })
    .expect("unmounted");

    for (name, more, reason) in [
        ("refused", json!({"privileged": true}), "runtime.privileged"),
        ("driverless", json!({"volumes": [{"volume_id": "x", "csi_driver": "none"}]}), "has no driver \"none\""),
        ("stored", json!({"storage": 10}), "storage"),
    ] {
        deploy(name, "true", more);
        let detail = lab.cluster.ended(name, "FAILED").expect("it is refused");
        assert!(detail.contains(reason), "{name}: {detail}");
    }
    deploy("granted", "test -e /dev/fuse", json!({"privileged": true}));
    lab.cluster.ended("granted", "COMPLETED").expect("it has the device");
    let log = node.host.log_tail("node-engine.log", 1000);
    for (name, granted) in [("refused", "granted=false"), ("granted", "granted=true")] {
        let line = log
            .lines()
            .find(|line| line.contains("privileges were asked for") && line.contains(&format!("default.{name}.")));
        assert!(line.is_some_and(|line| line.contains(granted)), "{name} in\n{log}");
    }
    let announced = output(node.client().expect("built").args(["status", "--json"])).expect("status");
    assert!(announced.contains("\"process\""), "{announced}");
    lab.deploy(&Deploy { name: "after", ..Deploy::default() }, 1).expect("deploys go on");
}
