//! Instances find services by name: through the resolver that every container has, on their own node, also while the cluster is away.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use lab::cluster::{Deploy, InstanceRow, json};
use lab::node::{Datapath, Node};
use lab::process::{built, output};
use lab::topology::{Lab, Plan};
use lab::wait::until;
use serde::Deserialize;

each_datapath!(services_have_names);

const NO_ERROR: u8 = 0;
const SERVER_FAILURE: u8 = 2;
const NO_SUCH_NAME: u8 = 3;

fn services_have_names(datapath: Datapath) {
    let mut lab = Lab::prepare(&Plan::new(2, datapath)).expect("a laboratory");
    let upstream = give_resolver(&lab.nodes[0]).expect("a resolver of the host");
    for node in &mut lab.nodes {
        node.start().expect("started");
    }
    for node in &mut lab.nodes {
        node.joined().expect("joined");
    }
    let deploy =
        |name, on| lab.deploy(&Deploy { name, on: Some(on), ..Deploy::default() }, 1).expect("it runs").remove(0);
    let client = deploy("client", "node-a");
    let web = deploy("web", "node-b");
    let (v4, v6) = (web.service_address(false).expect("v4"), web.service_address(true).expect("v6"));

    // Never heard of on this node: the question waits for the cluster.
    let first = lookup(&lab, &client, "web.default.default.app.edge", "A").expect("an answer");
    assert_eq!((first.code, first.addresses.as_slice()), (NO_ERROR, &[v4][..]), "{first:?}");
    let gateway = first.server;
    let subnet = lab.nodes[0].status().expect("status").network.expect("a network").subnet_v4;
    let base: IpAddr = subnet.split('/').next().unwrap_or_default().parse().expect("an address");
    let (IpAddr::V4(base), IpAddr::V4(at)) = (base, gateway) else { panic!("{gateway} in {subnet}") };
    assert_eq!(at.to_bits(), base.to_bits() + 1, "the node's own address answers");

    for (name, kind, code, addresses) in [
        ("web.default.default.app.edge", "AAAA", NO_ERROR, vec![v6]),
        ("rr.web.default.default.app.edge", "A", NO_ERROR, vec![v4]),
        ("instance-0.web.default.default.app.edge", "A", NO_ERROR, vec![web.own_address().expect("an address")]),
        ("instance-9.web.default.default.app.edge", "A", NO_SUCH_NAME, vec![]),
        ("nobody.default.default.app.edge", "A", NO_SUCH_NAME, vec![]),
        ("www.example.test", "A", NO_ERROR, vec!["203.0.113.7".parse().expect("an address")]),
        ("other.example.test", "A", NO_SUCH_NAME, vec![]),
    ] {
        let answer = lookup(&lab, &client, name, kind).expect(name);
        let found = (answer.code, answer.addresses.as_slice());
        assert_eq!(found, (code, addresses.as_slice()), "{name} {kind}: {answer:?}");
        assert_eq!(answer.server, gateway, "{name}");
    }
    // The name's address is one that answers, and has the name.
    let gets = lab.within(&client, |client| client.get(first.addresses[0], 5)).expect("answers");
    assert_eq!(gets.failed, 0, "{gets:?}");
    let reverse = lab.within(&client, |client| output(&mut client.command(&["nslookup", &v4.to_string()])));
    assert!(reverse.as_ref().is_ok_and(|text| text.contains("web.default.default.app.edge")), "{reverse:?}");

    // Nobody but containers is answered, not even the host.
    let ask = format!("busybox timeout 3 busybox nslookup web.default.default.app.edge {gateway}");
    let outside = lab.nodes[0].host.run(&ask);
    assert!(outside.is_err(), "{outside:?}");

    // Without the host's resolver and without the cluster: names of others fail at once, our own go on.
    lab.nodes[0].host.run(&format!("kill -9 {upstream}")).expect("killed");
    lab.lan.set_link(1, false).expect("unplugged");
    let own = lookup(&lab, &client, "web.default.default.app.edge", "A").expect("an answer");
    assert_eq!((own.code, own.addresses.as_slice()), (NO_ERROR, &[v4][..]), "{own:?}");
    let foreign = lookup(&lab, &client, "www.example.test", "A").expect("an answer");
    assert_eq!(foreign.code, SERVER_FAILURE, "{foreign:?}");
    assert!(foreign.ms < 1_000, "{foreign:?}");
    lab.lan.set_link(1, true).expect("plugged in");

    // A daemon that has been away answers again without anybody's help, in the container that was there all the time.
    lab.nodes[0].kill().expect("killed");
    assert!(lookup(&lab, &client, "web.default.default.app.edge", "A").is_err(), "nobody is there to answer");
    lab.nodes[0].start().expect("started");
    let again = until("names are answered again", Duration::from_secs(30), || {
        let answer = lookup(&lab, &client, "web.default.default.app.edge", "A")?;
        Ok((answer.code == NO_ERROR).then_some(answer))
    });
    assert_eq!(again.expect("an answer").addresses, [v4]);
}

#[derive(Debug, Deserialize)]
struct Answer {
    code: u8,
    addresses: Vec<IpAddr>,
    server: IpAddr,
    ms: u64,
}

fn lookup(lab: &Lab, from: &InstanceRow, name: &str, kind: &str) -> Result<Answer> {
    lab.within(from, |client| json(&mut client.command(&["probe", "lookup", name, kind])))
}

/// A resolver on the host's loopback, and a resolv.conf that names it. Gives the resolver's process id on the host.
fn give_resolver(node: &Node) -> Result<u32> {
    let conf = node.host.directory().join("resolv.conf");
    std::fs::write(&conf, "nameserver 127.0.0.1\n").context("cannot write resolv.conf")?;
    // A file of the host's own over the machine's, in the host's own mounts.
    node.host.shell(&format!("mount --bind {} $(readlink -f /etc/resolv.conf)", conf.display()))?;
    let (probe, log) = (built("probe")?, node.host.directory().join("nameserver.log"));
    let begin = format!(
        "{} nameserver 127.0.0.1 www.example.test 203.0.113.7 < /dev/null > {} 2>&1 & echo $!",
        probe.display(),
        log.display()
    );
    let pid = node.host.shell(&begin)?.trim().parse().context("no process id")?;
    until("the name server listens", Duration::from_secs(10), || {
        let listening = node.host.run("ss -Hlun")?;
        if listening.contains("127.0.0.1:53 ") {
            return Ok(Some(()));
        }
        bail!("{listening}")
    })?;
    Ok(pid)
}
