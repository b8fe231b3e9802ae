//! Plain commands of a node's own system, where the node allows them: the same network, logs, limits and restarts as containers.

use std::time::{Duration, Instant};

use lab::cluster::{Deploy, InstanceRow, json as json_of};
use lab::node::{Datapath, Node};
use lab::process::{built, capture, output};
use lab::topology::{Lab, Plan};
use lab::wait::until_true;
use serde_json::json;

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
        limits_hold(&lab);
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

    let known: serde_json::Value =
        json_of(node.client().expect("built").args(["inspect", "web", "--json"])).expect("JSON");
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
        let known: serde_json::Value = json_of(node.client()?.args(["inspect", "web", "--json"]))?;
        let usage = &known["usage"];
        Ok(usage["received_bytes"].as_u64() > Some(500) && usage["cpu_seconds"].as_f64() > Some(0.0))
    })
    .expect("seen");
}

fn limits_hold(lab: &Lab) {
    let command = |name: &str, script: &str, more: serde_json::Value| {
        let mut document = json!({
            "job_name": format!("app.default.{name}.default"), "virtualization": "process",
            "cmd": ["sh", "-c", script],
        });
        document.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
        lab.cluster.deploy_document(&document, "node-b").expect("deployed");
    };
    command("once", "echo done", json!({"one_shot": true}));
    lab.cluster.ended("once", "COMPLETED").expect("its end is told");
    command("bad", "exit 3", json!({}));
    assert_eq!(lab.cluster.ended("bad", "FAILED").expect("its end is told"), "exit code 3");
    command("hog", "tail /dev/zero", json!({"memory": 32}));
    assert_eq!(lab.cluster.ended("hog", "FAILED").expect("it is killed"), "out of memory (limit 32 MiB)");
    command("none", "true", json!({"image": "/no/such/program"}));
    let reason = lab.cluster.ended("none", "FAILED").expect("it is refused");
    assert!(reason.contains("\"/no/such/program\" is not an executable file of this node"), "{reason}");

    command("burn", "for i in 1 2 3 4; do while :; do :; done & done; wait", json!({"vcpus": 1}));
    let burn = lab.cluster.running("burn", 1).expect("it runs");
    let cpu = |node: &Node| -> f64 {
        let script = "cat /sys/fs/cgroup/cpuacct/$0/cpuacct.usage || sed -n 's/usage_usec \\(.*\\)/\\1000/p' /sys/fs/cgroup/$0/cpu.stat";
        let group = format!("{}/process/{}", node.host.group(), burn[0].container());
        let said = output(node.host.command("sh").args(["-c", script, &group])).expect("its control group");
        said.trim().parse::<f64>().expect("nanoseconds") / 1e9
    };
    let (began, used) = (Instant::now(), cpu(&lab.nodes[1]));
    until_true("it has used a second", Duration::from_secs(60), || Ok(cpu(&lab.nodes[1]) - used > 1.0))
        .expect("it burns");
    let share = (cpu(&lab.nodes[1]) - used) / began.elapsed().as_secs_f64();
    assert!(share < 1.15, "four loops got {share:.2} CPUs where one is allowed");
}

fn logs(node: &Node, instance: &str) -> String {
    output(node.client().expect("built").args(["logs", instance])).expect("logs")
}

fn supervisor(node: &Node, instance: &InstanceRow) -> String {
    node.host.run(&format!("cat /run/node-engine/process/{}/alive", instance.container())).expect("a supervisor")
}

/// Directories, namespaces and control groups of processes on this node.
fn left(node: &Node) -> anyhow::Result<String> {
    node.host
        .shell(&format!(
            "ls /run/node-engine/process /run/netns; find /sys/fs/cgroup -path '*{}/process/*' -type d",
            node.host.group()
        ))
        .map(|listed| listed.lines().filter(|line| !line.is_empty() && !line.ends_with(':')).collect())
}
