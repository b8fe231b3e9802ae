//! The underlay takes shorter packets than instances send, says nothing of it, and changes while they are sent.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::cluster::{Deploy, json};
use lab::node::{Datapath, Node};
use lab::topology::{Lab, Plan};
use lab::wait::until_true;

/// So much of a transfer under each of the path's sizes.
const LEG: u64 = 100 << 20;
const LIMIT: Duration = Duration::from_secs(60);
/// What is around an instance's packet at most.
const OVERHEAD: u64 = 50;

each_datapath!(a_transfer_goes_on_whatever_the_path_takes);

fn a_transfer_goes_on_whatever_the_path_takes(datapath: Datapath) {
    let lab = Lab::start(&Plan::new(2, datapath)).expect("a laboratory");
    let deploy =
        |name, on| lab.deploy(&Deploy { name, on: Some(on), ..Deploy::default() }, 1).expect("it runs").remove(0);
    let (client, far) = (deploy("client", "node-a"), deploy("far", "node-b"));
    for node in &lab.nodes {
        // As with a real card: no packet is on the wire that is many.
        node.host.run("ethtool -K eth0 tso off gso off tx-udp-segmentation off").expect("taken apart before the wire");
        // And nobody is told what went wrong.
        node.host.run("nft add table netdev quiet").expect("a table");
        let chain = "{ type filter hook ingress device eth0 priority -100 ; }";
        node.host.run(&format!("nft add chain netdev quiet in {chain}")).expect("a chain");
        node.host.run("nft add rule netdev quiet in meta l4proto icmp drop").expect("a rule");
        node.host.run("nft add rule netdev quiet in icmpv6 type { 1, 2, 3, 4 } drop").expect("a rule");
    }
    let to = far.service_address(false).expect("a service address");
    assert_eq!(lab.within(&client, |client| client.get(to, 5)).expect("it runs").failed, 0);

    let mut stream = lab.within(&client, |client| client.stream(to, 600.0)).expect("a stream");
    for takes in [1_500, 1_400, 1_280, 700, 1_500] {
        lab.lan.ip(&format!("link set p2 mtu {takes}")).expect("another path");
        let begin = Instant::now();
        stream.carries(LEG, LIMIT).unwrap_or_else(|error| panic!("underlay MTU {takes}: {error:#}"));
        println!("{datapath:?}, underlay MTU {takes}: 100 MiB in {:.1} s", begin.elapsed().as_secs_f64());
        for node in &lab.nodes {
            found(node, takes);
        }
        for to in [to, far.service_address(true).expect("a service address")] {
            // A connection that begins now, and datagrams.
            let begin = Instant::now();
            let gets = lab.within(&client, |client| client.get(to, 5)).expect("it runs");
            assert_eq!(gets.failed, 0, "underlay MTU {takes}, {to}: {gets:?}");
            assert!(begin.elapsed() < Duration::from_secs(10), "underlay MTU {takes}, {to}: {gets:?}");
        }
    }
    stream.stop();
}

/// The node knows what the path takes.
fn found(node: &Node, takes: u64) {
    let agreed = || -> Result<bool> {
        let peers: serde_json::Value = json(node.client()?.args(["net", "peers", "--json"]))?;
        let peer = peers.get(0).context("no peer")?;
        ensure!(peer["ours"] == true, "{peer}");
        let path = peer["path_mtu"].as_u64();
        // The switch lets four bytes more through: it makes room for a tag.
        let fits = |path: u64| (takes - 4..=takes + 4).contains(&(path + OVERHEAD));
        Ok(if takes == 1_500 { path.is_none() } else { path.is_some_and(fits) })
    };
    until_true(&format!("{} knows that {takes} bytes go through", node.host.name()), LIMIT, agreed).expect("in time");
}
