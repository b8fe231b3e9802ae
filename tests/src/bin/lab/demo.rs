//! What the engine does, shown on one machine: two nodes and their cluster, a web server and a client, both datapaths, a crash.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lab::cluster::{Deploy, InstanceRow};
use lab::node::Datapath;
use lab::process::output;
use lab::topology::{Lab, Plan};
use lab::traffic::Rate;

/// Of each measurement.
const SECONDS: f64 = 2.0;

pub(crate) fn run() -> Result<()> {
    let before = machine()?;
    let directory = show()?;
    step("Cleaning up");
    let left: Vec<String> = machine()?.difference(&before).cloned().collect();
    if directory.exists() || !left.is_empty() {
        bail!("left behind: {} {}", directory.display(), left.join(", "));
    }
    say("hosts, containers, interfaces and files are gone; this machine is as it was");
    step("Where to look next");
    say("README.md to use it, ARCHITECTURE.md for how it is built, `cargo xtask test` to see it tested");
    say("`target/debug/node-engine --help`, and `node-engine standalone` for a cluster of one machine");
    Ok(())
}

/// The demonstration; gives the directory that it used.
fn show() -> Result<std::path::PathBuf> {
    step("Two machines, a cluster, a switch between them (all simulated, each machine with its own dockerd)");
    let begin = Instant::now();
    let mut lab = Lab::start(&Plan::new(2, Datapath::Auto))?;
    let directory = lab.directory().to_owned();
    say(&format!("up after {:.1} s", begin.elapsed().as_secs_f64()));
    for row in lab.cluster.nodes()? {
        let node = lab.node(&row.name)?;
        let network = node.status()?.network.context("the node has no network")?;
        say(&format!("{} registered as {} and got {} and {}", row.name, row.id, network.subnet_v4, network.subnet_v6));
    }

    step("Deploying `web` on node-b and `client` on node-a");
    let begin = Instant::now();
    let web = deploy(&lab, "web", "node-b")?;
    let client = deploy(&lab, "client", "node-a")?;
    say(&format!("running after {:.1} s", begin.elapsed().as_secs_f64()));
    let to = web.service_address(false)?;
    say(&format!("web answers at {} ({} inside node-b)", web.service_addresses.join(" and "), web.address));

    step(&format!("client asks http://{to}/ and the same over IPv6"));
    for to in [to, web.service_address(true)?] {
        let gets = lab.within(&client, |client| client.get(to, 10))?;
        ensure!(gets.failed == 0, "{} of {} requests failed: {}", gets.failed, gets.requests, gets.error);
        let (who, count) = gets.answers.first_key_value().context("nobody answered")?;
        say(&format!("{to}: {count} answers from {who}"));
    }

    step("Requests a second by service address (connect, ask, read, close; one after the other)");
    if cfg!(debug_assertions) {
        say(
            "this is a debug build: the kernel's path does not care, the TUN path is several times slower than it can be",
        );
    }
    let best = measure(&lab, &client, to)?;
    if best == "ebpf" {
        for node in &mut lab.nodes {
            node.terminate()?;
            node.set_datapath(Datapath::Tun);
            node.start()?;
        }
        for node in &mut lab.nodes {
            node.joined()?;
        }
        say("the daemons were restarted with --datapath tun; the containers ran on");
        measure(&lab, &client, to)?;
        for node in &mut lab.nodes {
            node.terminate()?;
            node.set_datapath(Datapath::Auto);
            node.start()?;
        }
        for node in &mut lab.nodes {
            node.joined()?;
        }
    }

    step("kill -9 of both daemons during a transfer");
    let mut stream = lab.within(&client, |client| client.stream(to, 6.0))?;
    for node in &mut lab.nodes {
        node.kill()?;
    }
    if best == "ebpf" {
        let moved = stream.advances(Duration::from_secs(5))?;
        say(&format!("no daemon runs, {} MiB have arrived and more arrives", moved >> 20));
    }
    for node in &mut lab.nodes {
        node.start()?;
    }
    for node in &mut lab.nodes {
        node.joined()?;
    }
    let streamed = stream.finish()?;
    say(&format!(
        "started again: the same connection ended after {} MiB, every block in order, longest pause {} ms",
        streamed.bytes >> 20,
        streamed.longest_stall_ms
    ));
    Ok(directory)
}

fn deploy(lab: &Lab, name: &str, on: &str) -> Result<InstanceRow> {
    let mut rows = lab.deploy(&Deploy { name, on: Some(on), ..Deploy::default() }, 1)?;
    rows.pop().context("nothing was deployed")
}

/// Measures over the datapath there is, and gives its name.
fn measure(lab: &Lab, client: &InstanceRow, to: IpAddr) -> Result<String> {
    let network = lab.nodes[0].status()?.network.context("the node has no network")?;
    let connect: Rate = lab.within(client, |client| client.connect(to, SECONDS))?;
    let rr: Rate = lab.within(client, |client| client.rr_tcp(to, SECONDS))?;
    let why = if network.reason.is_empty() { "the fastest there is".to_owned() } else { network.reason };
    say(&format!(
        "{:5} {:>8.0} requests/s, {:>8.0} round trips/s on one connection ({why})",
        network.datapath, connect.rate, rr.rate
    ));
    Ok(network.datapath)
}

/// What of ours could be left on this machine: interfaces, and what our directories hold.
fn machine() -> Result<BTreeSet<String>> {
    let mut found = BTreeSet::new();
    for line in output(Command::new("ip").args(["-oneline", "link", "show"]))?.lines() {
        found.extend(line.split(": ").nth(1).map(|name| format!("interface {name}")));
    }
    for path in ["/run/node-engine", "/var/lib/node-engine", "/sys/fs/bpf/node-engine"] {
        found.extend(Path::new(path).exists().then(|| path.to_owned()));
    }
    Ok(found)
}

fn step(text: &str) {
    println!("\n== {text}");
}

fn say(text: &str) {
    println!("   {text}");
}
