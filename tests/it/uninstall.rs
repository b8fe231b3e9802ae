//! `uninstall` gives the host back as it was found.

use std::time::Duration;

use lab::cluster::Deploy;
use lab::node::Datapath;
use lab::snapshot::Snapshot;
use lab::soak::{Options, undo};
use lab::topology::{Lab, Plan};

each_datapath!(uninstall_leaves_the_host_as_found);

fn uninstall_leaves_the_host_as_found(datapath: Datapath) {
    let mut lab = Lab::prepare(&Plan::new(2, datapath)).expect("a laboratory");
    let before: Vec<Snapshot> =
        lab.nodes.iter().map(|node| Snapshot::take(&node.host).expect("a look at the host")).collect();
    for node in &mut lab.nodes {
        node.start_and_join().expect("in the cluster");
    }
    for (name, on) in [("client", "node-a"), ("web", "node-b")] {
        let deploy = Deploy { name, on: Some(on), ports: &["8080:80", "5007:7/udp"], ..Deploy::default() };
        lab.deploy(&deploy, 1).expect("it runs");
    }
    let client = lab.cluster.running("client", 1).expect("it runs").remove(0);
    let to = lab.cluster.running("web", 1).expect("it runs")[0].service_address(false).expect("a service address");
    assert_eq!(lab.within(&client, |client| client.get(to, 5)).expect("answers").failed, 0);
    let during = Snapshot::take(&lab.nodes[0].host).expect("a look at the host");
    assert!(!before[0].difference(&during).is_empty(), "the snapshot sees nothing");

    // One stops in order, the other one dies: either way there is all to undo.
    lab.nodes[0].terminate().expect("it ends");
    lab.nodes[1].kill().expect("it dies");
    for (node, before) in lab.nodes.iter().zip(&before) {
        node.uninstall().expect("everything is undone");
        let left = before.difference(&Snapshot::take(&node.host).expect("a look at the host"));
        assert!(left.is_empty(), "{} is not as it was:\n{}", node.host.name(), left.join("\n"));
    }
}

#[test]
#[ignore = "needs root"]
fn what_a_daemon_has_made_that_died_at_any_moment_is_undone() {
    let options = Options { length: Duration::from_secs(20), seed: 3, times: Some(9), ..Options::default() };
    let report = undo::run(&options).expect("a laboratory");
    report.verdict().expect("the host is as it was found");
    assert!(report.faults >= 3, "{report:?}");
}
