//! What lies under the overlay: networks of IPv6 alone, several of them, and addresses that change.

use std::time::Duration;

use lab::cluster::{Deploy, InstanceRow};
use lab::lan::{CLUSTER_V6, address};
use lab::node::Datapath;
use lab::topology::{Lab, Plan};
use lab::traffic::Flows;

each_datapath!(an_ipv6_underlay_carries_a_whole_cluster);

fn an_ipv6_underlay_carries_a_whole_cluster(datapath: Datapath) {
    let plan = Plan { cluster_options: &["--listen", "::"], ..Plan::new(2, datapath) };
    let mut lab = Lab::prepare(&plan).expect("a laboratory");
    for node in &mut lab.nodes {
        node.host.run(&format!("ip addr del {}/24 dev eth0", address(node.number))).expect("it has no IPv4");
        node.set_cluster(&format!("[{CLUSTER_V6}]"));
        node.start().expect("started");
    }
    for node in &mut lab.nodes {
        node.joined().expect("it joins");
    }
    let client = one(&lab, "client", "node-a");
    let far = one(&lab, "far", "node-b");
    for to in
        [far.service_address(false), far.service_address(true), far.own_address()].map(|to| to.expect("an address"))
    {
        let gets = lab.within(&client, |client| client.get(to, 20)).expect("it runs");
        assert_eq!((gets.failed, gets.answers.len()), (0, 1), "{to}: {gets:?}");
        let echoes = lab.within(&client, |client| client.echo(to, 20, Flows::Many)).expect("it runs");
        assert_eq!(echoes.received, 20, "{to}: {echoes:?}");
        let stream = lab.within(&client, |client| client.stream(to, 1.0)?.finish()).expect("it runs");
        assert!(stream.bytes > 0, "{to}: {stream:?}");
        assert!(stream.longest_stall_ms < Duration::from_secs(2).as_millis() as u64, "{to}: {stream:?}");
    }
}

fn one(lab: &Lab, name: &str, on: &str) -> InstanceRow {
    lab.deploy(&Deploy { name, on: Some(on), ..Deploy::default() }, 1).expect("it runs").remove(0)
}
