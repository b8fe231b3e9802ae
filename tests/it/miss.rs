//! The first packet to an address that the node does not know yet waits for the cluster's answer; nobody else does.

use std::net::IpAddr;
use std::time::Instant;

use lab::cluster::Deploy;
use lab::node::Datapath;
use lab::topology::{Lab, Plan};
use lab::traffic::Flows;

each_datapath!(the_first_packet_is_not_lost);

fn the_first_packet_is_not_lost(datapath: Datapath) {
    let mut lab = Lab::start(&Plan::new(2, datapath)).expect("a laboratory");
    let client = lab.deploy(&Deploy { name: "client", on: Some("node-a"), ..Deploy::default() }, 1).expect("it runs");
    for name in ["webfour", "websix"] {
        let v6 = name == "websix";
        let web = lab.deploy(&Deploy { name, on: Some("node-b"), ..Deploy::default() }, 1).expect("it runs");
        let to = web[0].service_address(v6).expect("a service address");
        let echoes = lab.within(&client[0], |client| client.echo(to, 5, Flows::One)).expect("echoes");
        assert_eq!(echoes.received, 5, "to {to}, never used before: {echoes:?}");
    }

    let web = lab.cluster.running("webfour", 1).expect("it runs");
    let known = web[0].service_address(false).expect("a service address");
    let nobody: IpAddr = "10.30.200.200".parse().expect("an address");
    std::thread::scope(|scope| {
        let lost = scope.spawn(|| lab.within(&client[0], |client| client.echo(nobody, 100, Flows::Many)));
        let begin = Instant::now();
        let gets = lab.within(&client[0], |client| client.get(known, 50)).expect("answers");
        assert_eq!(gets.failed, 0, "others' misses hold nobody up: {gets:?}");
        assert!(gets.seconds < 5.0, "{gets:?} after {:?}", begin.elapsed());
        let lost = lost.join().expect("no panic").expect("the probe ends");
        assert_eq!(lost.received, 0);
    });
    for node in &mut lab.nodes {
        node.still_runs().expect("it lives");
    }
}
