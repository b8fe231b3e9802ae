//! Which datapath a node gets and why, and that it may change while packets flow.

use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use lab::cluster::{Deploy, json};
use lab::host::Host;
use lab::node::{Datapath, Node, StatusNetwork};
use lab::process::output;
use lab::topology::{Lab, Plan};
use lab::traffic::{ECHO, Flows, socket};
use lab::wait::{until, until_true};
use netmanager_common::ABI_VERSION;

const LIMIT: Duration = Duration::from_secs(20);
const SWITCHES: usize = 50;
const CONNECTIONS: usize = 1_000;

/// Each cause has its rung and its own words.
#[test]
#[ignore = "needs root"]
fn a_node_without_ebpf_says_why() {
    let mut lab = Lab::prepare(&Plan::new(1, Datapath::Auto)).expect("a laboratory");
    let node = &mut lab.nodes[0];
    let without = |capabilities| ["setpriv", "--bounding-set", capabilities, "--inh-caps", capabilities];
    let all = "-bpf,-sys_admin";
    for (wrapper, rung, reason) in [
        (&[][..], "ebpf", ""),
        (
            &["confine", "--error", "EPERM"],
            "tun",
            "bpf(2) refused: operation not permitted (a seccomp filter is in the way)",
        ),
        (&["confine", "--error", "ENOSYS"], "tun", "bpf(2) is not there: a seccomp filter hides it"),
        // Programs, and with them the verifier.
        (&["confine", "--error", "EINVAL", "--commands", "5"], "tun", "load programs: "),
        // Links, and programs at TCX: a kernel before 6.6.
        (&["confine", "--error", "EINVAL", "--commands", "28,8"], "ebpf", "TCX at eth0: "),
        (&without(all), "tun", "bpf(2) refused: operation not permitted (CAP_BPF missing)"),
        // It refuses offsets into packets that it does not know in advance.
        (&without("-perfmon,-sys_admin"), "tun", "the kernel's verifier refused a program: "),
    ] {
        node.set_wrapper(wrapper);
        node.start().expect("started");
        let network = network(node);
        assert!(
            network.datapath == rung
                && network.reason.starts_with(reason)
                && reason.is_empty() == network.reason.is_empty(),
            "{wrapper:?}: {} because {:?}",
            network.datapath,
            network.reason
        );
        node.kill().expect("killed");
    }
}

/// Fifty times from one to the other under a stream, datagrams, a hundred open connections, and new ones: none is lost.
#[test]
#[ignore = "needs root"]
fn the_datapath_changes_under_load() {
    let lab = Lab::start(&Plan::new(2, Datapath::Auto)).expect("a laboratory");
    let deploy =
        |name, on| lab.deploy(&Deploy { name, on: Some(on), ..Deploy::default() }, 1).expect("it runs").remove(0);
    let (client, web) = (deploy("client", "node-a"), deploy("web", "node-b"));
    let to = web.service_address(false).expect("a service address");
    let name = client.container();
    let container = lab.nodes[0].container(&name);
    let change = |turn: usize| {
        let node = &lab.nodes[turn / 2 % 2];
        let wanted = if turn.is_multiple_of(2) { "tun" } else { "ebpf" };
        let said = output(node.client().expect("a client").args(["net", "datapath", wanted])).expect("it changes");
        assert!(said.starts_with(wanted), "{said}");
    };
    let undisturbed = container.rr_udp(to, 5.0).expect("it runs");
    let (rate, changes) = thread::scope(|scope| {
        let asking = scope.spawn(|| container.rr_udp(to, 20.0).expect("it runs"));
        let changes = (0..SWITCHES).take_while(|_| !asking.is_finished()).inspect(|turn| change(*turn)).count();
        (asking.join().expect("answers"), changes)
    });
    println!("{changes} switches: {rate:?}, undisturbed {undisturbed:?}");
    assert!(changes > 10 && rate.failed == 0, "{changes}: {rate:?}");
    if !changes.is_multiple_of(2) {
        change(changes);
    }

    let mut stream = lab.within(&client, |client| client.stream(to, 600.0)).expect("a stream");
    let mut held = Held::open(&lab.nodes[0].host, &name, &socket(to, ECHO), 100);
    for turn in 0..SWITCHES {
        change(turn);
        held.all_answer(&format!("after {turn} switches"));
        stream.advances(Duration::from_secs(2)).expect("the stream goes on");
        if turn % 10 < 2 {
            let gets = container.get(to, 20).expect("it runs");
            assert_eq!(gets.failed, 0, "new connections: {gets:?}");
            let echoes = container.echo(to, 50, Flows::Many).expect("it runs");
            assert_eq!(echoes.received, echoes.sent, "datagrams");
        }
    }
    held.end();
    let stall = stream.longest_stall();
    println!("{SWITCHES} switches, longest stall of the stream {stall:?}");
    assert!(stall < Duration::from_millis(1_000), "{stall:?}");
}

/// A program that somebody takes away is put back; where it goes again, the node does without.
#[test]
#[ignore = "needs root"]
fn a_program_that_is_taken_away_is_not_missed() {
    let lab = Lab::start(&Plan::new(2, Datapath::Auto)).expect("a laboratory");
    let deploy =
        |name, on| lab.deploy(&Deploy { name, on: Some(on), ..Deploy::default() }, 1).expect("it runs").remove(0);
    let (client, web) = (deploy("client", "node-a"), deploy("web", "node-b"));
    let to = web.service_address(false).expect("a service address");
    let mut stream = lab.within(&client, |client| client.stream(to, 120.0)).expect("a stream");
    let node = &lab.nodes[1];
    let eth0: u32 =
        node.host.run("cat /sys/class/net/eth0/ifindex").expect("it is there").trim().parse().expect("a number");
    let before = links(&node.host, eth0).expect("programs are there");
    detach(&node.host, eth0);
    // Between the one and the other there is none.
    let back = || Ok(links(&node.host, eth0).is_ok_and(|now| now.iter().zip(&before).all(|(now, then)| now != then)));
    until_true("other links are in their place", LIMIT, back).expect("in time");
    stream.advances(Duration::from_secs(2)).expect("the stream goes on");
    assert_eq!(network(node).datapath, "ebpf");

    detach(&node.host, eth0);
    until_true("the node does without", LIMIT, || Ok(network(node).datapath == "tun")).expect("in time");
    let reason = network(node).reason;
    assert!(reason.contains("again and again"), "{reason}");
    stream.advances(Duration::from_secs(2)).expect("the stream goes on");
    output(node.client().expect("a client").args(["net", "datapath", "auto"])).expect("it may come back");
    assert_eq!(network(node).datapath, "ebpf");
    stream.advances(Duration::from_secs(2)).expect("the stream goes on");
    let stall = stream.longest_stall();
    assert!(stall < Duration::from_millis(1_000), "{stall:?}");
}

/// Flows without eBPF outlive the daemon: a killed one breaks none of a thousand connections.
#[test]
#[ignore = "needs root"]
fn a_thousand_connections_outlive_a_daemon_without_ebpf() {
    let mut lab = Lab::start(&Plan::new(2, Datapath::Tun)).expect("a laboratory");
    let client = lab.deploy(&Deploy { name: "client", on: Some("node-a"), ..Deploy::default() }, 1).expect("it runs");
    let web = lab.deploy(&Deploy { name: "web", replicas: 3, ..Deploy::default() }, 3).expect("they run");
    let to = web[0].service_address(false).expect("a service address");
    let name = client[0].container();
    let mut held = Held::open(&lab.nodes[0].host, &name, &socket(to, ECHO), CONNECTIONS);

    for node in &mut lab.nodes {
        node.kill().expect("killed");
        node.start().expect("started again");
    }
    // Not the cluster, and nobody's answer: what the daemon finds is enough.
    held.all_answer("without the cluster");
    for node in &mut lab.nodes {
        node.joined().expect("back in the cluster");
    }
    held.all_answer("with the cluster");
    held.end();
}

/// Connections of a container that stay open, each of which is asked for an answer now and then.
struct Held {
    count: usize,
    probe: Child,
    asks: ChildStdin,
    says: Lines<BufReader<ChildStdout>>,
}

impl Held {
    fn open(host: &Host, container: &str, to: &str, count: usize) -> Self {
        let mut command = host.command("docker");
        command.args(["exec", "--interactive", container, "probe", "hold", to, &count.to_string()]);
        let mut probe = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it starts");
        let asks = probe.stdin.take().expect("piped");
        let mut says = BufReader::new(probe.stdout.take().expect("piped")).lines();
        assert_eq!(says.next().expect("it says").expect("a line"), "open");
        let mut held = Self { count, probe, asks, says };
        held.all_answer("at the begin");
        held
    }

    fn all_answer(&mut self, when: &str) {
        writeln!(self.asks, "all").expect("it listens");
        let said = self.says.next().expect("it answers").expect("a line");
        assert_eq!(said, format!("{{\"open\":{},\"broken\":0}}", self.count), "{when}");
    }

    fn end(mut self) {
        drop(self.asks);
        assert!(self.probe.wait().expect("it ends").success());
    }
}

fn network(node: &Node) -> StatusNetwork {
    let up = || Ok(node.status()?.network.filter(|network| !network.datapath.is_empty()));
    until("the daemon answers", LIMIT, up).expect("in time")
}

const PINS: [&str; 2] = ["uplink", "framed"];

/// Numbers of the kernel's links at an uplink: what comes bare, what comes framed.
fn links(host: &Host, ifindex: u32) -> Result<Vec<u64>> {
    let link = |hook| {
        let link: serde_json::Value =
            json(&mut bpftool(host, &["--json", "link", "show", "pinned", &pin(hook, ifindex)]))?;
        link["id"].as_u64().context("a link has no number")
    };
    PINS.into_iter().map(link).collect()
}

fn detach(host: &Host, ifindex: u32) {
    for hook in PINS {
        output(&mut bpftool(host, &["link", "detach", "pinned", &pin(hook, ifindex)])).expect("detached");
    }
}

fn pin(hook: &str, ifindex: u32) -> String {
    format!("/sys/fs/bpf/node-engine/v{ABI_VERSION}/links/{hook}_{ifindex}")
}

fn bpftool(host: &Host, arguments: &[&str]) -> std::process::Command {
    let mut command = host.command("bpftool");
    command.args(arguments);
    command
}
