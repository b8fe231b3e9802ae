//! Containers of Podman, whose service speaks as Docker does.

use std::process::{Child, Stdio};
use std::time::Duration;

use lab::cluster::Deploy;
use lab::image;
use lab::node::{Datapath, Node};
use lab::process::output;
use lab::topology::{Lab, Plan};
use lab::wait::{until, until_true};
use serde_json::json;

const SOCKET: &str = "/run/podman/podman.sock";

#[test]
#[ignore = "needs root"]
fn containers_of_podman_are_like_those_of_docker() {
    let mut lab = Lab::prepare(&Plan::new(2, Datapath::Auto)).expect("a laboratory");
    let service = start_podman(&lab.nodes[1]);
    lab.nodes[1].set("NODE_ENGINE_DOCKER_HOST", &format!("unix://{SOCKET}"));
    for node in &mut lab.nodes {
        node.start_and_join().expect("in the cluster");
    }
    let client = lab.deploy(&Deploy { name: "client", on: Some("node-a"), ..Deploy::default() }, 1).expect("it runs");
    let web = lab.deploy(&Deploy { name: "web", on: Some("node-b"), ..Deploy::default() }, 1).expect("it runs");
    let to = web[0].service_address(false).expect("a service address");
    let gets = lab.within(&client[0], |client| client.get(to, 20)).expect("answers");
    assert_eq!(gets.failed, 0, "{gets:?}");
    let log = output(lab.nodes[1].client().expect("built").args(["logs", "web#0"])).expect("logs");
    assert!(log.contains("serving as"), "{log}");

    let before = containers(&lab.nodes[1]);
    assert_eq!(before.lines().count(), 2, "a sandbox and the workload: {before}");
    lab.nodes[1].kill().expect("killed");
    lab.nodes[1].start_and_join().expect("back in the cluster");
    lab.cluster.running("web", 1).expect("reported again");
    assert_eq!(containers(&lab.nodes[1]), before, "the same containers");
    let gets = lab.within(&client[0], |client| client.get(to, 20)).expect("answers");
    assert_eq!(gets.failed, 0, "{gets:?}");

    for (name, script, memory, status, detail) in [
        ("once", "exit 0", 64, "COMPLETED", ""),
        ("hog", "tail /dev/zero", 32, "FAILED", "out of memory (limit 32 MiB)"),
    ] {
        let document = json!({
            "job_name": format!("app.default.{name}.default"), "virtualization": "docker", "image": image::PROBE,
            "cmd": ["shell", script], "memory": memory, "one_shot": name == "once",
        });
        lab.cluster.deploy_document(&document, "node-b").expect("deployed");
        assert_eq!(lab.cluster.ended(name, status).expect("its end is told"), detail, "{name}");
        lab.cluster.delete(name).expect("deleted");
    }
    lab.cluster.delete("web").expect("deleted");
    until_true("no container is left", Duration::from_secs(30), || Ok(containers(&lab.nodes[1]).is_empty()))
        .expect("everything is gone");
    drop(service);
}

struct Service(Child);

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// With its storage in memory: an overlay cannot be the upper layer of another one.
fn start_podman(node: &Node) -> Service {
    node.host.shell("mkdir -p /run/podman /run/store && mount -t tmpfs tmpfs /run/store").expect("a place");
    let mut command = node.host.command("podman");
    command.args(["--root", "/run/store/root", "--runroot", "/run/store/run", "--cgroup-manager", "cgroupfs"]);
    command.args(["--storage-driver", "overlay", "system", "service", "--time=0", &format!("unix://{SOCKET}")]);
    let service =
        Service(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("podman"));
    until("podman answers", Duration::from_secs(30), || {
        output(node.host.command("podman").args(["--url", &format!("unix://{SOCKET}"), "version"])).map(Some)
    })
    .expect("it answers");
    image::load_into_podman(&node.host, SOCKET).expect("the image");
    service
}

fn containers(node: &Node) -> String {
    let mut podman = node.host.command("podman");
    output(podman.args(["--url", &format!("unix://{SOCKET}"), "ps", "--all", "--quiet", "--no-trunc"])).expect("a list")
}
