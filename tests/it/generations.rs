//! Clusters of other generations, and other brokers.

use std::time::Duration;

use lab::cluster::{Broker, Deploy};
use lab::node::Datapath;
use lab::topology::{Lab, Plan};

/// The embedded cluster gives such nodes their subnet with the registration, as the first generation did.
#[test]
#[ignore = "needs root"]
fn a_first_generation_cluster_is_joined_by_socket_io() {
    let plan = Plan {
        options: &["--generation", "g1"],
        cluster_options: &["--first-generation"],
        ..Plan::new(2, Datapath::Auto)
    };
    let lab = Lab::start(&plan).expect("a laboratory");
    let subnets: Vec<String> = lab
        .nodes
        .iter()
        .map(|node| {
            let status = node.status().expect("it answers");
            assert_eq!(status.cluster.generation, "g1");
            status.network.expect("it has a network").subnet_v4
        })
        .collect();
    assert_ne!(subnets[0], subnets[1]);
}

/// As it was for a few months: Socket.IO registers, jobs are reported as to the first generation, the overlay is the second's. The
/// embedded cluster does not read those reports; it goes by what the nodes list as running.
#[test]
#[ignore = "needs root"]
fn a_cluster_between_the_generations_is_joined_by_socket_io() {
    let plan = Plan { options: &["--generation", "g1"], ..Plan::new(2, Datapath::Auto) };
    let lab = Lab::start(&plan).expect("a laboratory");
    for node in &lab.nodes {
        assert_eq!(node.status().expect("it answers").cluster.generation, "g1b");
    }
    serves(&lab);
}

#[test]
#[ignore = "needs root"]
fn a_real_broker_may_die_and_come_back() {
    let plan = Plan { broker: Broker::Mosquitto, ..Plan::new(2, Datapath::Auto) };
    let mut lab = Lab::start(&plan).expect("a laboratory");
    serves(&lab);
    lab.cluster.restart_broker(&lab.lan).expect("killed and started again");
    lab.deploy(&Deploy { name: "after", on: Some("node-b"), ..Deploy::default() }, 1).expect("deploys go on");
    for node in &mut lab.nodes {
        lab::wait::until_true("it is connected again", Duration::from_secs(30), || {
            Ok(node.status()?.cluster.connected)
        })
        .expect("connected");
    }
    lab.cluster.running("web", 1).expect("nothing was redeployed or forgotten");
}

fn serves(lab: &Lab) {
    let client = lab.deploy(&Deploy { name: "client", on: Some("node-a"), ..Deploy::default() }, 1).expect("it runs");
    let web = lab.deploy(&Deploy { name: "web", on: Some("node-b"), ..Deploy::default() }, 1).expect("it runs");
    let to = web[0].service_address(false).expect("a service address");
    let gets = lab.within(&client[0], |client| client.get(to, 10)).expect("answers");
    assert_eq!(gets.failed, 0, "{gets:?}");
}
