//! A service address means any of the service's instances, and a flow stays with the one it got.

use lab::cluster::Deploy;
use lab::node::Datapath;
use lab::topology::{Lab, Plan};
use lab::traffic::Flows;

each_datapath!(all_instances_answer_and_a_flow_stays);

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
        // Uniform choice leaves one of three out of 60 tries once in ten billion runs.
        let gets = lab.within(&client[0], |client| client.get(to, 60)).expect("answers");
        assert_eq!((gets.failed, gets.answers.len()), (0, 3), "{gets:?}");
        let one = lab.within(&client[0], |client| client.echo(to, 50, Flows::One)).expect("echoes");
        assert_eq!((one.received, one.answers.len()), (50, 1), "one flow, one instance: {one:?}");
        let many = lab.within(&client[0], |client| client.echo(to, 50, Flows::Many)).expect("echoes");
        assert_eq!((many.received, many.answers.len()), (50, 3), "many flows, all instances: {many:?}");
    }
}
