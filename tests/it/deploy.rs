//! What is deployed runs, is reported, and goes when it is deleted.

use std::time::Duration;

use lab::cluster::Deploy;
use lab::node::Datapath;
use lab::topology::{Lab, Plan};
use lab::wait::until_true;

each_datapath!(deploy_runs_and_is_reported);

fn deploy_runs_and_is_reported(datapath: Datapath) {
    let lab = Lab::start(&Plan::new(1, datapath)).expect("a laboratory");
    let node = &lab.nodes[0];
    let network = node.status().expect("the daemon answers").network.expect("it has a network");
    assert_eq!(network.datapath, datapath.name(), "because {}", network.reason);

    let web = lab.deploy(&Deploy { name: "web", replicas: 2, ..Deploy::default() }, 2).expect("both run");
    for instance in &web {
        assert_eq!(instance.node, "node-a");
        let inspected = node.host.run(&format!("docker inspect {}", instance.container())).expect("Docker knows it");
        assert!(inspected.contains(r#""Running": true"#), "{inspected}");
    }
    assert_ne!(web[0].address, web[1].address);
    assert_eq!(node.status().expect("the daemon answers").running, 2);

    lab.cluster.delete("web#0").expect("deleted");
    let rest = lab.cluster.running("web", 1).expect("the other one stays");
    assert_eq!(rest[0].number, web[1].number);
    lab.cluster.delete("web").expect("deleted");
    until_true("no container is left", Duration::from_secs(20), || {
        Ok(node.host.run("docker ps --all --quiet")?.trim().is_empty() && node.status()?.running == 0)
    })
    .expect("everything is gone");
}
