//! What every technology has to do alike.

use std::time::{Duration, Instant};

use lab::cluster::{InstanceRow, json as json_of};
use lab::node::{Datapath, Node};
use lab::process::output;
use lab::topology::Lab;
use lab::wait::until_true;
use serde_json::{Value, json};

/// A job document: `base` says what runs it, `more` adds members or replaces them.
pub fn document(name: &str, base: &Value, more: Value) -> Value {
    let mut document = base.clone();
    let members = document.as_object_mut().expect("an object");
    members.insert("job_name".into(), format!("app.default.{name}.default").into());
    if let Value::Object(more) = more {
        members.extend(more);
    }
    document
}

/// What `inspect` says of it.
pub fn inspected(node: &Node, instance: &str) -> Value {
    json_of(node.client().expect("built").args(["inspect", instance, "--json"])).expect("JSON")
}

pub fn logs(node: &Node, instance: &str) -> String {
    output(node.client().expect("built").args(["logs", instance])).expect("logs")
}

/// Whoever looks after an instance for this binary.
pub fn supervisor(node: &Node, technology: &str, instance: &InstanceRow) -> String {
    node.host.run(&format!("cat /run/node-engine/{technology}/{}/alive", instance.container())).expect("a supervisor")
}

/// The first process of an instance, or who looks after it, is the same after the daemon of `node-b` was killed and has come back; and
/// `client` reaches it there: all the while, where the kernel carries packets. `which` says whom it is.
pub fn is_adopted(
    lab: &mut Lab,
    client: &InstanceRow,
    to: std::net::IpAddr,
    datapath: Datapath,
    which: impl Fn(&Node) -> String,
) {
    let before = which(&lab.nodes[1]);
    lab.nodes[1].kill().expect("killed");
    if datapath == Datapath::Ebpf {
        let gets = lab.within(client, |client| client.get(to, 5)).expect("answers");
        assert_eq!(gets.failed, 0, "it runs on without the daemon: {gets:?}");
    }
    lab.nodes[1].start_and_join().expect("back in the cluster");
    lab.cluster.running("web", 1).expect("reported again");
    assert_eq!(which(&lab.nodes[1]), before, "the same process");
    let gets = lab.within(client, |client| client.get(to, 20)).expect("answers");
    assert_eq!(gets.failed, 0, "{gets:?}");
}

/// What is told of it where the technology knows.
pub const OUT_OF_MEMORY: &str = "out of memory (limit 32 MiB)";
/// The services whose limits [`limits_hold`] looks at.
pub const LIMITED: [&str; 4] = ["once", "bad", "hog", "burn"];

/// On `node-b`, each end of a script is told as what it was, and no more memory or processors are had than are allowed. `shell` is the
/// command that takes a script, `killed` what is told of one that has taken more than the 32 MiB that it may.
pub fn limits_hold(lab: &Lab, base: &Value, shell: &[&str], killed: &str) {
    let node = &lab.nodes[1];
    for (name, script, more) in [
        ("once", "echo done", json!({"one_shot": true})),
        ("bad", "exit 3", json!({})),
        ("hog", "tail /dev/zero", json!({"memory": 32})),
        ("burn", "echo burning; for i in 1 2 3 4; do while :; do :; done & done; wait", json!({"vcpus": 1})),
    ] {
        let mut document = document(name, base, more);
        document["cmd"] = shell.iter().copied().chain([script]).collect();
        lab.cluster.deploy_document(&document, node.host.name()).expect("deployed");
    }
    lab.cluster.ended("once", "COMPLETED").expect("its end is told");
    assert_eq!(lab.cluster.ended("bad", "FAILED").expect("its end is told"), "exit code 3");
    assert_eq!(lab.cluster.ended("hog", "FAILED").expect("it is killed"), killed);
    lab.cluster.running("burn", 1).expect("it runs");
    until_true("its output is kept", Duration::from_secs(10), || Ok(logs(node, "burn#0") == "burning\n"))
        .expect("kept");
    is_held(node, "burn");
}

/// It wants more than one CPU and gets one, by the kernel's count.
pub fn is_held(node: &Node, instance: &str) {
    let pid = inspected(node, instance)["runtime"]["pid"].as_u64().expect("its process");
    let (began, used) = (Instant::now(), cpu(node, pid));
    until_true("it has used a second", Duration::from_secs(60), || Ok(cpu(node, pid) - used > 1.0)).expect("it burns");
    let share = (cpu(node, pid) - used) / began.elapsed().as_secs_f64();
    assert!(share < 1.15, "{instance} got {share:.2} CPUs where one is allowed");
}

/// Seconds of CPU that the control group of this process has used.
fn cpu(node: &Node, pid: u64) -> f64 {
    let script = r"
        group=$(sed -n 's/^[0-9]*:[^:]*cpuacct[^:]*://p' /proc/$0/cgroup)
        [ -z $group ] || exec cat /sys/fs/cgroup/cpuacct$group/cpuacct.usage
        group=$(sed -n 's/^0:://p' /proc/$0/cgroup)
        sed -n 's/usage_usec \(.*\)/\1000/p' /sys/fs/cgroup$group/cpu.stat";
    let said = output(node.host.command("sh").args(["-c", script, &pid.to_string()])).expect("its control group");
    said.trim().parse::<f64>().expect("nanoseconds") / 1e9
}

/// Waits until this node has no directory and no control group of instances of a technology any more, and `listed`, a script, lists nothing.
pub fn nothing_is_left(node: &Node, technology: &str, listed: &str) {
    let script = format!(
        "ls /run/node-engine/{technology}; find /sys/fs/cgroup -path '*{}/{technology}/*' -type d; {listed}",
        node.host.group()
    );
    let left = || -> anyhow::Result<Vec<String>> {
        let listed = node.host.shell(&script)?;
        Ok(listed.lines().filter(|line| !line.is_empty() && !line.ends_with(':')).map(str::to_owned).collect())
    };
    until_true("nothing is left of it", Duration::from_secs(30), || Ok(left()?.is_empty()))
        .unwrap_or_else(|error| panic!("{error:#}: {:?}", left()));
}
