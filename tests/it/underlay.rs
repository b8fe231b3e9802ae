//! What lies under the overlay: networks of IPv6 alone, several of them, and addresses that change.

use std::time::Duration;

use lab::cluster::{Deploy, InstanceRow};
use lab::lan::{CLUSTER_V6, address};
use lab::node::Datapath;
use lab::topology::{Lab, Plan};
use lab::traffic::Flows;

each_datapath!(an_ipv6_underlay_carries_a_whole_cluster, a_node_takes_its_flows_along_to_another_address);

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

fn a_node_takes_its_flows_along_to_another_address(datapath: Datapath) {
    let lab = Lab::start(&Plan::new(2, datapath)).expect("a laboratory");
    let client = one(&lab, "client", "node-a");
    let far = one(&lab, "far", "node-b");
    let moving = &lab.nodes[1].host;
    let to = far.service_address(false).expect("an address");
    assert_eq!(lab.within(&client, |client| client.get(to, 5)).expect("it runs").failed, 0);
    let mut stream = lab.within(&client, |client| client.stream(to, 25.0)).expect("a stream");
    stream.advances(Duration::from_secs(3)).expect("it flows");

    // Another lease.
    moving.run(&format!("ip addr del {}/24 dev eth0", address(2))).expect("the old one goes");
    moving.run("ip addr add 198.18.0.42/24 dev eth0").expect("another address");
    moving.run("ip route replace default via 198.18.0.254").expect("the way out");
    stream.advances(Duration::from_secs(20)).expect("it flows to the other address");

    // Another interface by the same name, with another address.
    moving.run("ip link del eth0").expect("unplugged");
    lab.lan.plug(moving, 43).expect("plugged in again");
    stream.advances(Duration::from_secs(20)).expect("it flows by the other interface");
    let last = stream.finish().expect("to its end");
    assert!(last.bytes > 0);

    for to in [to, far.service_address(true).expect("an address")] {
        let gets = lab.within(&client, |client| client.get(to, 20)).expect("it runs");
        assert_eq!((gets.failed, gets.answers.len()), (0, 1), "{to}: {gets:?}");
        let back = lab.within(&far, |far| far.get(client.service_address(to.is_ipv6())?, 20)).expect("it runs");
        assert_eq!(back.failed, 0, "back from {to}: {back:?}");
    }
}

fn one(lab: &Lab, name: &str, on: &str) -> InstanceRow {
    lab.deploy(&Deploy { name, on: Some(on), ..Deploy::default() }, 1).expect("it runs").remove(0)
}
