//! A service address means any of the service's instances, and a flow stays with the one it got.

use std::time::Duration;

use lab::cluster::Deploy;
use lab::node::Datapath;
use lab::topology::{Lab, Plan};
use lab::traffic::Flows;
use lab::wait::until_true;

each_datapath!(all_instances_answer_and_a_flow_stays, each_policy_chooses_as_it_says);

fn all_instances_answer_and_a_flow_stays(datapath: Datapath) {
    let lab = Lab::start(&Plan::new(3, datapath)).expect("a laboratory");
    let client = lab.deploy(&Deploy { name: "client", on: Some("node-a"), ..Deploy::default() }, 1).expect("it runs");
    for (number, node) in ["node-a", "node-b", "node-c"].into_iter().enumerate() {
        let deploy = Deploy { name: "web", on: Some(node), ..Deploy::default() };
        lab.deploy(&deploy, number + 1).expect("it runs");
    }
    let web = lab.cluster.running("web", 3).expect("they run");
    for v6 in [false, true] {
        let to = web[0].service_address(v6).expect("a service address");
        until_true("all three are ready, and each has its turn", Duration::from_secs(20), || {
            let gets = lab.within(&client[0], |client| client.get(to, 6))?;
            assert_eq!(gets.failed, 0, "{gets:?}");
            Ok(gets.answers.len() == 3)
        })
        .expect("seen");
        let one = lab.within(&client[0], |client| client.echo(to, 50, Flows::One)).expect("echoes");
        assert_eq!((one.received, one.answers.len()), (50, 1), "one flow, one instance: {one:?}");
        let many = lab.within(&client[0], |client| client.echo(to, 50, Flows::Many)).expect("echoes");
        assert_eq!((many.received, many.answers.len()), (50, 3), "many flows, all instances: {many:?}");
    }
}

/// Two instances on the client's node, one on another; each policy behind an address of its own.
fn each_policy_chooses_as_it_says(datapath: Datapath) {
    let lab = Lab::start(&Plan::new(2, datapath)).expect("a laboratory");
    let policies = ["random", "closest", "underutilised", "sticky", "weighted", "local", "failover"];
    let deploy = |name, on, replicas, in_all| {
        let deploy = Deploy { name, on: Some(on), replicas, policies: &policies, ..Deploy::default() };
        lab.deploy(&Deploy { weights: &["0=2", "1=8"], ..deploy }, in_all).expect("it runs")
    };
    let clients = [deploy("client", "node-a", 1, 1).remove(0), deploy("other", "node-b", 1, 1).remove(0)];
    deploy("web", "node-a", 2, 2);
    let web = deploy("web", "node-b", 1, 3);
    let get = |client: usize, policy: &str, v6, count| {
        let to = web[0].policy_address(policy, v6).expect("an address");
        let gets = lab.within(&clients[client], |client| client.get(to, count)).expect("it runs");
        assert_eq!(gets.failed, 0, "{policy}: {gets:?}");
        gets.answers
    };
    for v6 in [false, true] {
        until_true("all three take part", Duration::from_secs(20), || Ok(get(0, "random", v6, 40).len() == 3))
            .expect("seen");
        for policy in ["closest", "local"] {
            assert_eq!(get(0, policy, v6, 12).len(), 2, "{policy}: those on the client's node");
        }
        assert_eq!(get(1, "local", v6, 12).len(), 1);
        assert_eq!(get(1, "closest", v6, 12), get(1, "closest", v6, 12), "the one on its node");
        assert_eq!(get(0, "failover", v6, 12).len(), 1);
        assert_eq!(get(0, "failover", v6, 12), get(1, "failover", v6, 12), "all prefer the same");
        for client in [0, 1] {
            assert_eq!(get(client, "sticky", v6, 12).len(), 1, "a client sticks to one");
        }
        // 2, 8 and 1: of 22 in a row each gets its exact share.
        let mut shares: Vec<u64> = get(0, "weighted", v6, 22).into_values().collect();
        shares.sort_unstable();
        assert_eq!(shares, [2, 4, 16]);
        assert_eq!(get(0, "underutilised", v6, 60).len(), 3);
    }
}
