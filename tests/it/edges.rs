//! The edges of the overlay on a node: what its own processes reach, what an instance reaches of the node and of itself, and what
//! no instance may send.

use std::process::{Child, Stdio};
use std::time::Duration;

use lab::cluster::{Deploy, InstanceRow};
use lab::host::Host;
use lab::lan::{CLUSTER, CLUSTER_V6, address, address_v6};
use lab::node::Datapath;
use lab::process::{built, output};
use lab::topology::{Lab, Plan};
use lab::traffic::{Echoes, Flows, Gets, parse};
use lab::wait::until_true;

each_datapath!(a_node_and_its_instances_meet_at_every_address);

fn a_node_and_its_instances_meet_at_every_address(datapath: Datapath) {
    let lab = Lab::start(&Plan::new(2, datapath)).expect("a laboratory");
    let ports = ["8080:80", "5007:7/udp"];
    let web = one(&lab, &Deploy { name: "web", on: Some("node-a"), ports: &ports, ..Deploy::default() });
    let client = one(&lab, &Deploy { name: "client", on: Some("node-a"), ..Deploy::default() });
    let node = &lab.nodes[0];

    // Published ports: from the node itself by every address it has, loopback included.
    for to in ["127.0.0.1".to_owned(), "[::1]".to_owned(), address(1), format!("[{}]", address_v6(1))] {
        let gets = get(&node.host, &format!("{to}:8080"), 10);
        assert_eq!((gets.failed, gets.answers.len()), (0, 1), "{to}: {gets:?}");
        assert_eq!(echo(&node.host, &format!("{to}:5007"), 10).received, 10, "{to}");
        if to.starts_with("127") || to.starts_with("[::1") {
            continue;
        }
        // And from instances on the same node, the published one included, by the node's address.
        for from in [&client, &web] {
            let said =
                lab.within(from, |from| output(&mut from.command(&["probe", "get", &format!("{to}:8080"), "5"])));
            let gets: Gets = parse(&said.expect("it runs")).expect("a result");
            assert_eq!(gets.failed, 0, "{to} from {}: {gets:?}", from.service);
            let said =
                lab.within(from, |from| output(&mut from.command(&["probe", "udp", &format!("{to}:5007"), "5"])));
            let echoes: Echoes = parse(&said.expect("it runs")).expect("a result");
            assert_eq!(echoes.received, 5, "{to} from {}: {echoes:?}", from.service);
        }
    }

    // A service that calls itself, by the address of all and by its own.
    for to in
        [web.service_address(false), web.service_address(true), web.own_address()].map(|to| to.expect("an address"))
    {
        let gets = lab.within(&web, |web| web.get(to, 10)).expect("it runs");
        assert_eq!((gets.failed, gets.answers.len()), (0, 1), "itself at {to}: {gets:?}");
        let echoes = lab.within(&web, |web| web.echo(to, 10, Flows::Many)).expect("it runs");
        assert_eq!(echoes.received, 10, "itself at {to}: {echoes:?}");
        lab.within(&web, |web| web.ping(to)).expect("itself answers");
        let stream = lab.within(&web, |web| web.stream(to, 0.5)?.finish()).expect("it runs");
        assert!(stream.bytes > 0, "itself at {to}: {stream:?}");
    }

    // The node itself, by service address: an instance elsewhere, one here, and the only one that can speak for it.
    let far = one(&lab, &Deploy { name: "far", on: Some("node-b"), ..Deploy::default() });
    for server in [&far, &web, &client] {
        let addresses = [server.service_address(false), server.service_address(true), server.own_address()];
        for to in addresses.map(|to| to.expect("an address")) {
            let at = |port: u16| if to.is_ipv6() { format!("[{to}]:{port}") } else { format!("{to}:{port}") };
            let gets = get(&node.host, &at(80), 20);
            assert_eq!((gets.failed, gets.answers.len()), (0, 1), "{to}: {gets:?}");
            assert_eq!(echo(&node.host, &at(7), 20).received, 20, "{to}");
            let said = output(node.host.command(built("probe").expect("built")).args(["stream", &at(9), "0.5"]));
            assert!(said.expect("it runs").contains("mbit_per_second"), "{to}");
            let ping = if to.is_ipv6() { "ping -6" } else { "ping" };
            node.host.run(&format!("{ping} -c1 -W3 {to}")).expect("it answers");
        }
    }
    // An instance is not disturbed by what is done in its name.
    let to = far.service_address(false).expect("an address");
    let gets = lab.within(&client, |client| client.get(to, 20)).expect("it runs");
    assert_eq!((gets.failed, gets.answers.len()), (0, 1), "{gets:?}");

    // The way out, under the node's address.
    let _outside = Outside::serve(&lab);
    for (to, seen) in
        [(CLUSTER.to_owned(), format!("::ffff:{}", address(1))), (format!("[{CLUSTER_V6}]"), address_v6(1))]
    {
        let said =
            lab.within(&client, |client| output(&mut client.command(&["probe", "get", &format!("{to}:80"), "5"])));
        let gets: Gets = parse(&said.expect("it runs")).expect("a result");
        assert_eq!(gets.failed, 0, "{to}: {gets:?}");
        assert!(gets.seen_as.len() == 1 && gets.seen_as.contains_key(&seen), "{to}: seen as {:?}", gets.seen_as);
    }

    // The tunnel of no node is within reach, and the try is counted.
    let before = node.counter("drop_to_tunnel").expect("a counter");
    for to in [address(1), address(2), address_v6(1), address_v6(2)] {
        for port in [50_103, 50_104] {
            let to = if to.contains(':') { format!("[{to}]:{port}") } else { format!("{to}:{port}") };
            lab.within(&client, |client| output(&mut client.command(&["probe", "say", &to, "forged"]))).expect("sent");
        }
    }
    assert_eq!(node.counter("drop_to_tunnel").expect("a counter") - before, 8);

    // Another's address as source: neither to a service nor anywhere else.
    let forger = node.container_pid(&client).expect("it runs");
    let within_forger = format!("nsenter --net=/proc/{forger}/ns/net ip");
    for (forged, family, to) in [
        (web.address.clone(), "", address(2)),
        ("8.8.8.8".to_owned(), "", address(2)),
        ("8.8.8.8".to_owned(), "", web.service_address(false).expect("an address").to_string()),
        ("2001:db8::8".to_owned(), "-6 ", address_v6(2)),
        ("2001:db8::8".to_owned(), "-6 ", web.service_address(true).expect("an address").to_string()),
    ] {
        let counted = || {
            let names = ["drop_spoofed", "drop_spoofed_source"];
            names.map(|name| node.counter(name).expect("a counter")).iter().sum::<u64>()
        };
        let before = counted();
        let ip = |words: &str| node.host.run(&format!("{within_forger} {family}{words}")).expect("ip");
        let nodad = if family.is_empty() { "" } else { " nodad" };
        ip(&format!("addr add {forged} dev lo{nodad}"));
        let at = if to.contains(':') { format!("[{to}]:7") } else { format!("{to}:7") };
        let from = if forged.contains(':') { format!("[{forged}]:0") } else { format!("{forged}:0") };
        for _ in 0..5 {
            lab.within(&client, |client| output(&mut client.command(&["probe", "say", &at, "forged", &from])))
                .expect("sent");
        }
        ip(&format!("addr del {forged} dev lo"));
        assert!(counted() - before >= 5, "from {forged} to {to}");
    }
}

fn one(lab: &Lab, deploy: &Deploy<'_>) -> InstanceRow {
    lab.deploy(deploy, 1).expect("it runs").remove(0)
}

/// Somebody beyond the cluster, who serves.
struct Outside(Child);

impl Outside {
    fn serve(lab: &Lab) -> Self {
        let mut command = lab.lan.command(built("probe").expect("built"));
        let serving = command.args(["serve", "outside"]).stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        let outside = Self(serving.expect("started"));
        until_true("the outside serves", Duration::from_secs(5), || {
            let get = output(lab.lan.command(built("probe")?).args(["get", &format!("{CLUSTER}:80"), "1"]))?;
            Ok(parse::<Gets>(&get)?.failed == 0)
        })
        .expect("in time");
        outside
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn get(host: &Host, to: &str, count: u32) -> Gets {
    let said = output(host.command(built("probe").expect("built")).args(["get", to, &count.to_string()]));
    parse(&said.expect("it runs")).expect("a result")
}

fn echo(host: &Host, to: &str, count: u32) -> Echoes {
    let said = output(host.command(built("probe").expect("built")).args(["udp", to, &count.to_string()]));
    parse(&said.expect("it runs")).expect("a result")
}
