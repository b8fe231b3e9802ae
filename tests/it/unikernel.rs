//! A small kernel in a virtual machine: its own address behind the instance's, its console as the log, adopted after a restart.

use std::time::Duration;

use lab::cluster::Deploy;
use lab::guest;
use lab::node::Datapath;
use lab::process::output;
use lab::topology::{Lab, Plan};
use lab::wait::{until, until_true};
use serde_json::{Value, json};

use crate::alike::{document, is_held, logs, nothing_is_left, supervisor};

const SETTINGS: &[(&str, &str)] = &[("NODE_ENGINE_UNIKERNEL", "true"), ("NODE_ENGINE_IMAGE_FILES", "true")];
/// Without the processor's help a guest boots slowly, on a machine under load more so.
const BOOT: Duration = Duration::from_secs(120);

#[test]
#[ignore = "needs root"]
fn a_guest_answers_on_its_service_address() {
    let archive = guest::archive().expect("a guest made of a kernel from Debian's archive");
    let archive = format!("file://{}", archive.display());
    let plan = Plan { settings: SETTINGS, ..Plan::new(2, Datapath::Auto) };
    let mut lab = Lab::start(&plan).expect("a laboratory");
    let client = lab.deploy(&Deploy { name: "client", on: Some("node-a"), ..Deploy::default() }, 1).expect("it runs");
    let other = if cfg!(target_arch = "x86_64") { ["arm64", "amd64"] } else { ["amd64", "arm64"] };
    let web = json!({
        "job_name": "app.default.web.default", "virtualization": "unikernel", "memory": 192, "vcpus": 1,
        "vm_images": ["file:///no/such/archive", archive], "arch": other, "cmd": ["stay", "two words"],
    });
    lab.cluster.deploy_document(&web, "node-b").expect("deployed");
    let web = lab.cluster.running("web", 1).expect("it runs");

    let to = web[0].service_address(false).expect("a service address");
    let page = |lab: &Lab, name: &str| {
        let ask = format!("printf 'GET /{name} HTTP/1.0\\r\\n\\r\\n' | nc -w 5 {to} 80 | sed '1,/^.$/d'");
        let text = lab.within(&client[0], |client| output(&mut client.command(&["sh", "-c", &ask])))?;
        anyhow::ensure!(!text.is_empty(), "no page");
        Ok(text)
    };
    let words = until("the guest answers", BOOT, || page(&lab, "words").map(Some)).expect("it answers");
    assert_eq!(words, "stay two words\n");
    assert_eq!(page(&lab, "shared").expect("it answers"), "from the shared directory\n");
    assert_eq!(page(&lab, "processors").expect("it answers"), "1\n");
    let memory: u32 = page(&lab, "memory").expect("it answers").trim().parse().expect("a number");
    assert!((100_000..192 * 1024).contains(&memory), "{memory} KiB");
    let log = logs(&lab.nodes[1], "web#0");
    assert!(log.contains("guest serves"), "{log}");

    let before = supervisor(&lab.nodes[1], "unikernel", &web[0]);
    lab.nodes[1].kill().expect("killed");
    lab.nodes[1].start_and_join().expect("back in the cluster");
    lab.cluster.running("web", 1).expect("reported again");
    assert_eq!(supervisor(&lab.nodes[1], "unikernel", &web[0]), before, "the same machine");
    until("the guest answers", BOOT, || page(&lab, "words").map(Some)).expect("it still answers");

    lab.cluster.delete("web").expect("deleted");
    let unpacked = lab.nodes[1].host.directory().join("state/unikernel/instances");
    nothing_is_left(&lab.nodes[1], "unikernel", &format!("ls /run/netns {}", unpacked.display()));

    let base = json!({"virtualization": "unikernel", "image": archive, "memory": 128});
    let end = json!({"one_shot": true, "cmd": ["end"], "image": format!("{archive}#sha256={}", "0".repeat(64))});
    let mut once = document("once", &base, end);
    lab.cluster.deploy_document(&once, "node-b").expect("deployed");
    // What cannot be had now is tried again later, and says meanwhile why it waits.
    until_true("it is refused", Duration::from_secs(60), || {
        let rows = lab.cluster.instances()?;
        Ok(rows.iter().any(|row| row.short() == "once" && row.detail.contains("its digest is sha256=")))
    })
    .expect("seen");
    lab.cluster.delete("once").expect("deleted");
    once["image"] = json!(archive);
    lab.cluster.deploy_document(&once, "node-b").expect("deployed");
    lab.cluster.ended("once", "COMPLETED").expect("it switches itself off");
    limits_hold(&lab, &base);
    refused_with_a_reason(&lab, &base);
}

/// No more memory or processors are had than the machine was given.
fn limits_hold(lab: &Lab, base: &Value) {
    let deploy = |name: &str| {
        let more = json!({"cmd": [name], "vcpus": 1, "one_shot": true});
        lab.cluster.deploy_document(&document(name, base, more), "node-b").expect("deployed");
    };
    // It panics, and its machine starts anew, which is an end.
    deploy("hog");
    let ended = until("its end is told", BOOT, || {
        let rows = lab.cluster.instances()?;
        Ok(rows.into_iter().find(|row| row.short() == "hog" && row.status == "FAILED").map(|row| row.detail))
    });
    assert_eq!(ended.expect("it is told"), "out of memory (limit 128 MiB)");
    deploy("burn");
    lab.cluster.running("burn", 1).expect("it runs");
    until_true("it burns", BOOT, || Ok(logs(&lab.nodes[1], "burn#0").contains("guest serves"))).expect("it has booted");
    is_held(&lab.nodes[1], "burn");
    lab.cluster.delete("burn").expect("deleted");
}

fn refused_with_a_reason(lab: &Lab, base: &Value) {
    for (name, more, reason) in [
        ("files", json!({"added_files": [{"path": "/etc/x", "content": "x"}]}), "has no volumes or added files"),
        ("stored", json!({"storage": 10}), "storage: what unikernel writes is not limited"),
        ("given", json!({"devices": ["vendor.example/toy=0"]}), "devices: vendor.example/toy=0 cannot be given"),
    ] {
        lab.cluster.deploy_document(&document(name, base, more), "node-b").expect("deployed");
        let detail = lab.cluster.ended(name, "FAILED").expect("it is refused");
        assert!(detail.contains(reason), "{name}: {detail}");
    }
}
