//! Containers of Podman, whose service speaks as Docker does.

use std::process::{Child, Stdio};
use std::time::Duration;

use lab::cluster::Deploy;
use lab::image;
use lab::node::{Datapath, Node};
use lab::process::{capture, output};
use lab::topology::{Lab, Plan};
use lab::wait::{until, until_true};
use serde_json::json;

use crate::alike::{LIMITED, is_adopted, limits_hold, logs};

const SETTINGS: &[(&str, &str)] = &[("NODE_ENGINE_RESTART_LIMIT", "0")];
const SOCKET: &str = "/run/podman/podman.sock";

#[test]
#[ignore = "needs root"]
fn containers_of_podman_are_like_those_of_docker() {
    let mut lab = Lab::prepare(&Plan { settings: SETTINGS, ..Plan::new(2, Datapath::Auto) }).expect("a laboratory");
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
    let log = logs(&lab.nodes[1], "web#0");
    assert!(log.starts_with("serving as"), "{log}");
    let ended =
        capture(lab.nodes[1].client().expect("built").args(["exec", "web", "--", "sh", "-c", "hostname; exit 7"]));
    let ended = ended.expect("it runs");
    assert_eq!((ended.status.code(), &ended.stdout[..]), (Some(7), &b"instance-0\n"[..]), "{ended:?}");

    assert_eq!(containers(&lab.nodes[1]).lines().count(), 2, "a sandbox and the workload");
    is_adopted(&mut lab, &client[0], to, Datapath::Auto, containers);
    let base = json!({"virtualization": "docker", "image": image::PROBE});
    limits_hold(
        &lab,
        &base,
        &["/bin/probe", "shell"],
        "exit code 137: killed, maybe for want of memory, which Podman does not tell",
    );
    for service in LIMITED.into_iter().chain(["web"]) {
        lab.cluster.delete(service).expect("deleted");
    }
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
    // crun, its usual one, refuses hybrid control groups.
    let line = "--runtime runc --root /run/store/root --runroot /run/store/run --cgroup-manager cgroupfs --storage-driver overlay";
    let mut command = node.host.command("podman");
    command.args(line.split(' ')).args(["system", "service", "--time=0", &format!("unix://{SOCKET}")]);
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
