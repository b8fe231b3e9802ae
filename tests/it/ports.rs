//! A published port is reached from outside, and only while its instance is there.

use std::time::Duration;

use lab::cluster::Deploy;
use lab::node::Datapath;
use lab::process::{built, output};
use lab::topology::{Lab, Plan};
use lab::traffic::{Echoes, Gets, parse};
use lab::wait::until_true;

each_datapath!(published_ports_are_reached_from_outside);

fn published_ports_are_reached_from_outside(datapath: Datapath) {
    let lab = Lab::start(&Plan::new(2, datapath)).expect("a laboratory");
    let ports = ["8080:80", "5007:7/udp"];
    lab.deploy(&Deploy { name: "web", on: Some("node-b"), ports: &ports, ..Deploy::default() }, 1).expect("it runs");

    let outside = |words: &[&str]| output(lab.lan.command(built("probe")?).args(words));
    for to in ["198.18.0.2", "[fd00:198:18::2]"] {
        let gets: Gets = parse(&outside(&["get", &format!("{to}:8080"), "10"]).expect("it runs")).expect("a result");
        assert_eq!((gets.failed, gets.answers.len()), (0, 1), "{to}: {gets:?}");
        let echoes = outside(&["udp", &format!("{to}:5007"), "10"]).expect("it runs");
        let echoes: Echoes = parse(&echoes).expect("a result");
        assert_eq!(echoes.received, 10, "{to}: {echoes:?}");
    }
    let gets = output(lab.nodes[0].host.command(built("probe").expect("built")).args(["get", "198.18.0.2:8080", "5"]));
    let gets: Gets = parse(&gets.expect("it runs")).expect("a result");
    assert_eq!(gets.failed, 0, "from another node: {gets:?}");
    let own = output(lab.nodes[1].host.command(built("probe").expect("built")).args(["get", "198.18.0.2:8080", "5"]));
    let own: Gets = parse(&own.expect("it runs")).expect("a result");
    assert_eq!(own.failed, 0, "from the node itself: {own:?}");

    lab.cluster.delete("web").expect("deleted");
    until_true("the port is closed", Duration::from_secs(20), || {
        let gets: Gets = parse(&outside(&["get", "198.18.0.2:8080", "1"])?)?;
        Ok(gets.failed == 1 && gets.error.contains("refused"))
    })
    .expect("closed");
}
