//! How packets between two nodes are wrapped: agreed by themselves, changed while they flow.

use std::time::Duration;

use anyhow::{Context, Result};
use lab::cluster::{Deploy, json};
use lab::node::{Datapath, Node};
use lab::topology::{Lab, Plan};
use lab::wait::until_true;

const LIMIT: Duration = Duration::from_secs(20);

/// Two nodes of ours agree on framing; a filter on the way, and a neighbour that comes back without eBPF, cost no connection.
#[test]
#[ignore = "needs root"]
fn nodes_agree_on_framing_and_fall_back() {
    let mut lab = Lab::start(&Plan::new(2, Datapath::Ebpf)).expect("a laboratory");
    let deploy =
        |name, on| lab.deploy(&Deploy { name, on: Some(on), ..Deploy::default() }, 1).expect("it runs").remove(0);
    let (client, web) = (deploy("client", "node-a"), deploy("web", "node-b"));
    let to = web.service_address(false).expect("a service address");
    assert_eq!(lab.within(&client, |client| client.get(to, 5)).expect("it runs").failed, 0);
    framed(&lab.nodes[0], true);
    framed(&lab.nodes[1], true);
    let link = lab.nodes[1].host.run("ip -d link show edge-framing").expect("the device is there");
    assert!(link.contains("vxlan") && link.contains("50104"), "{link}");

    let mut stream = lab.within(&client, |client| client.stream(to, 60.0)).expect("a stream");
    stream.advances(Duration::from_secs(3)).expect("it flows framed");

    // Somebody drops them on their way out of the node.
    let host = &lab.nodes[0].host;
    host.run("nft add table netdev way").expect("a table");
    host.run("nft add chain netdev way out { type filter hook egress device eth0 priority 0 ; }").expect("a chain");
    host.run("nft add rule netdev way out udp dport 50104 drop").expect("a filter");
    framed(&lab.nodes[0], false);
    stream.advances(Duration::from_secs(15)).expect("it flows bare");
    lab.nodes[0].host.run("nft delete table netdev way").expect("no filter");

    lab.nodes[1].kill().expect("killed");
    lab.nodes[1].set_datapath(Datapath::Tun);
    lab.nodes[1].start_and_join().expect("back without eBPF");
    stream.advances(Duration::from_secs(15)).expect("it flows to a node that takes no framed packets");
    framed(&lab.nodes[1], false);
    assert!(lab.nodes[1].host.run("ip link show edge-framing").is_err(), "a node without eBPF needs no such device");

    lab.nodes[1].kill().expect("killed");
    lab.nodes[1].set_datapath(Datapath::Ebpf);
    lab.nodes[1].start_and_join().expect("back with eBPF");
    framed(&lab.nodes[1], true);
    framed(&lab.nodes[0], true);
    stream.advances(Duration::from_secs(15)).expect("it flows framed again");
    let gets = lab.within(&client, |client| client.get(to, 20)).expect("it runs");
    assert_eq!(gets.failed, 0, "{gets:?}");
}

fn framed(node: &Node, wanted: bool) {
    let agreed = || -> Result<bool> {
        let peers: serde_json::Value = json(node.client()?.args(["net", "peers", "--json"]))?;
        let peer = peers.get(0).context("no peer")?;
        Ok((peer["framing"] == "VXLAN") == wanted)
    };
    until_true(if wanted { "packets are framed" } else { "packets are bare" }, LIMIT, agreed).expect("in time");
}
