//! A small kernel in a virtual machine: its own address behind the instance's, its console as the log, adopted after a restart.

use std::time::Duration;

use lab::cluster::{Deploy, InstanceRow};
use lab::guest;
use lab::node::Datapath;
use lab::process::output;
use lab::topology::{Lab, Plan};
use lab::wait::{until, until_true};
use serde_json::json;

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
    let log = output(lab.nodes[1].client().expect("built").args(["logs", "web#0"])).expect("logs");
    assert!(log.contains("guest serves"), "{log}");

    let before = supervisor(&lab, &web[0]);
    lab.nodes[1].kill().expect("killed");
    lab.nodes[1].start_and_join().expect("back in the cluster");
    lab.cluster.running("web", 1).expect("reported again");
    assert_eq!(supervisor(&lab, &web[0]), before, "the same machine");
    until("the guest answers", BOOT, || page(&lab, "words").map(Some)).expect("it still answers");

    lab.cluster.delete("web").expect("deleted");
    until_true("nothing is left of it", Duration::from_secs(30), || Ok(left(&lab)?.is_empty()))
        .unwrap_or_else(|error| panic!("{error:#}: {:?}", left(&lab)));

    let mut once = json!({
        "job_name": "app.default.once.default", "virtualization": "unikernel", "memory": 128, "one_shot": true,
        "image": format!("{archive}#sha256={}", "0".repeat(64)), "cmd": ["end"],
    });
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
}

fn supervisor(lab: &Lab, instance: &InstanceRow) -> String {
    let file = format!("/run/node-engine/unikernel/{}/alive", instance.container());
    lab.nodes[1].host.run(&format!("cat {file}")).expect("a supervisor")
}

/// Directories and namespaces of guests on this node.
fn left(lab: &Lab) -> anyhow::Result<String> {
    let host = &lab.nodes[1].host;
    let unpacked = host.directory().join("state/unikernel/instances");
    let listed = host.shell(&format!("ls /run/node-engine/unikernel /run/netns {}", unpacked.display()))?;
    Ok(listed.lines().filter(|line| !line.is_empty() && !line.ends_with(':')).collect())
}
