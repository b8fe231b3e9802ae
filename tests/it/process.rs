//! Plain commands of a node's own system, where the node allows them: the same network, logs, limits and restarts as containers.

use std::time::Duration;

use lab::cluster::Deploy;
use lab::node::{Datapath, Node};
use lab::process::{built, capture};
use lab::topology::{Lab, Plan};
use lab::wait::until_true;
use serde_json::json;

use crate::alike::{OUT_OF_MEMORY, document, inspected, is_adopted, limits_hold, logs, nothing_is_left, supervisor};

const SETTINGS: &[(&str, &str)] =
    &[("NODE_ENGINE_PROCESS", "true"), ("NODE_ENGINE_PROCESS_USER", "root"), ("NODE_ENGINE_RESTART_LIMIT", "0")];
/// The size is told when the command has begun.
const AWAITS_SIZE: &str =
    "test -t 0; i=0; while [ $i -lt 100 ] && ! stty size | grep \"33 77\"; do i=$((i+1)); sleep 0.1; done; exit 9";

each_datapath!(a_process_is_a_workload_like_any_other);

fn a_process_is_a_workload_like_any_other(datapath: Datapath) {
    let mut lab = Lab::start(&Plan { settings: SETTINGS, ..Plan::new(2, datapath) }).expect("a laboratory");
    let client = lab.deploy(&Deploy { name: "client", on: Some("node-a"), ..Deploy::default() }, 1).expect("it runs");
    let serve = format!("echo hello from $HOSTNAME $A; exec {} serve", built("probe").expect("built").display());
    let web = json!({
        "job_name": "app.default.web.default", "virtualization": "process", "image": "/bin/sh", "cmd": ["-c", serve],
        "environment": ["A=b"], "memory": 64, "vcpus": 1,
    });
    lab.cluster.deploy_document(&web, "node-b").expect("deployed");
    let web = lab.cluster.running("web", 1).expect("it runs");

    let to = web[0].service_address(false).expect("a service address");
    let gets = lab.within(&client[0], |client| client.get(to, 20)).expect("answers");
    assert_eq!(gets.failed, 0, "{gets:?}");
    let log = logs(&lab.nodes[1], "web#0");
    assert!(log.starts_with("hello from instance-0 b\n"), "{log}");
    looked_at(&lab.nodes[1]);

    let which = |node: &Node| supervisor(node, "process", &web[0]);
    is_adopted(&mut lab, &client[0], to, datapath, which);

    lab.cluster.delete("web").expect("deleted");
    nothing_is_left(&lab.nodes[1], "process", "ls /run/netns");
    if datapath == Datapath::Ebpf {
        let base = json!({"virtualization": "process"});
        limits_hold(&lab, &base, &["sh", "-c"], OUT_OF_MEMORY);
        let none = document("none", &base, json!({"image": "/no/such/program"}));
        lab.cluster.deploy_document(&none, "node-b").expect("deployed");
        let reason = lab.cluster.ended("none", "FAILED").expect("it is refused");
        assert!(reason.contains("\"/no/such/program\" is not an executable file of this node"), "{reason}");
    }
}

/// A person sees of it what there is to see of a container, and gets in.
fn looked_at(node: &Node) {
    let ask = |words: &[&str]| capture(node.client().expect("built").args(words)).expect("it runs");
    let ended = ask(&["exec", "web", "--", "sh", "-c", "hostname; echo $A $$; echo error >&2; exit 7"]);
    let said = String::from_utf8_lossy(&ended.stdout).into_owned();
    assert!(ended.status.code() == Some(7) && said.starts_with("instance-0\nb "), "{ended:?}");
    let pid: u32 = said.trim().rsplit(' ').next().and_then(|word| word.parse().ok()).expect("its process id");
    assert!(pid < 100 && ended.stderr == b"error\n", "in the namespace of the instance: {ended:?}");
    let engine = built("node-engine").expect("built");
    let line = format!(
        "stty cols 77 rows 33; {} --socket /run/node-engine/api.sock exec web -- sh -c '{AWAITS_SIZE}'",
        engine.display()
    );
    let ended = capture(node.host.command("script").args(["-qefc", &line, "/dev/null"])).expect("it runs");
    let said = String::from_utf8_lossy(&ended.stdout).into_owned();
    assert_eq!((ended.status.code(), said.contains("33 77")), (Some(9), true), "{said:?}");

    let known = inspected(node, "web");
    assert_eq!(
        (&known["runtime"]["cpus"], &known["runtime"]["memory_bytes"]),
        (&json!(1.0), &json!(64 << 20)),
        "{known:#}"
    );
    assert_eq!(
        (&known["runtime"]["command"][0], &known["runtime"]["environment"][0]),
        (&json!("/bin/sh"), &json!("A"))
    );
    let pid = known["runtime"]["pid"].as_u64().expect("its process");
    let comm = node.host.run(&format!("cat /proc/{pid}/comm")).expect("it runs");
    assert_eq!(comm.trim(), "probe", "{known:#}");
    // What it uses is measured every few seconds.
    until_true("what it received is counted", Duration::from_secs(15), || {
        let usage = &inspected(node, "web")["usage"];
        Ok(usage["received_bytes"].as_u64() > Some(500) && usage["cpu_seconds"].as_f64() > Some(0.0))
    })
    .expect("seen");
}
