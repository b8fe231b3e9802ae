//! An instance reaches the others by their addresses, wherever they run.

use lab::cluster::{Deploy, InstanceRow};
use lab::node::Datapath;
use lab::topology::{Lab, Plan};
use lab::traffic::Flows;

each_datapath!(instances_reach_each_other);

fn instances_reach_each_other(datapath: Datapath) {
    let lab = Lab::start(&Plan::new(2, datapath)).expect("a laboratory");
    let client = one(&lab, "client", "node-a");
    let near = one(&lab, "near", "node-a");
    let far = one(&lab, "far", "node-b");

    for server in [&far, &near] {
        let addresses = [
            server.service_address(false).expect("an IPv4 service address"),
            server.service_address(true).expect("an IPv6 service address"),
            server.own_address().expect("an instance address"),
        ];
        for to in addresses {
            let what = format!("{} at {to}", server.service);
            let gets = lab.within(&client, |client| client.get(to, 20)).expect(&what);
            assert_eq!((gets.failed, gets.answers.len()), (0, 1), "{what}: {gets:?}");
            let echoes = lab.within(&client, |client| client.echo(to, 20, Flows::One)).expect(&what);
            assert_eq!(echoes.received, 20, "{what}: {echoes:?}");
            lab.within(&client, |client| client.ping(to)).expect(&what);
            let stream = lab.within(&client, |client| client.stream(to, 1.0)?.finish()).expect(&what);
            assert!(stream.bytes > 0, "{what}: {stream:?}");
            if to.is_ipv4() {
                // As the reference has it: the server sees the client's instance address.
                let seen = format!("::ffff:{}", client.instance_address);
                assert!(gets.seen_as.contains_key(&seen), "{what}: seen as {:?}, not {seen}", gets.seen_as);
            }
        }
    }
}

fn one(lab: &Lab, name: &str, on: &str) -> InstanceRow {
    lab.deploy(&Deploy { name, on: Some(on), ..Deploy::default() }, 1).expect("it runs").remove(0)
}
