//! What is asked of the engine under each kernel: every program past its verifier, the law's cases and random frames in the kernel,
//! real packets through the datapaths, and a node that joins a cluster.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use serde_json::json;

use super::{Guest, Initrd, Kernel, Machine};
use crate::cluster::{Deploy, InstanceRow};
use crate::lan;
use crate::node::{Datapath, Status};
use crate::process::{output, root};
use crate::topology::{Lab, Plan};
use crate::traffic::{ECHO, Echoes, Flows, Gets, HTTP, parse, socket};
use crate::wait::until;

/// Of the tests with real packets those that meet everything a kernel may lack; in an emulator they take their time.
const PACKETS: [&str; 4] = [
    "a_service_is_reached_across_nodes",
    "the_first_packet_of_an_unknown_address_is_not_lost",
    "a_restart_breaks_no_connection",
    "framing_carries_what_bare_datagrams_do",
];
/// The rung that every kernel has.
const TUN: &str = "tun";
/// The object that the daemon carries, too.
const OBJECT: &str = "target/ebpf/bpfel-unknown-none/release/netmanager";
const TESTS: Duration = Duration::from_secs(420);

/// What goes into the guests.
#[derive(Clone, Debug)]
pub struct Programs {
    pub daemon: PathBuf,
    pub busybox: PathBuf,
    pub probe: PathBuf,
    /// Programs of the test suite.
    pub tests: Vec<PathBuf>,
}

/// One kernel's line.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    pub kernel: String,
    /// Each program with what the verifier said.
    pub programs: Vec<(String, String)>,
    pub rung: String,
    /// Why it is not a faster one.
    pub reason: String,
    /// Tests that passed.
    pub passed: u64,
    /// Bytes of the joined daemon, where the kernel counts them.
    pub memory: Option<u64>,
    pub failures: Vec<String>,
}

/// The cluster and the node that the guests meet.
#[derive(Debug)]
pub struct Surroundings {
    lab: Lab,
    web: InstanceRow,
}

impl Surroundings {
    /// A node of this machine, with a container that serves.
    pub fn start() -> Result<Self> {
        let lab = Lab::start(&Plan::new(1, Datapath::Auto))?;
        let web = lab.deploy(&Deploy { name: "web", on: Some("node-a"), ..Deploy::default() }, 1)?;
        let web = web.into_iter().next().context("nothing was deployed")?;
        Ok(Self { lab, web })
    }
}

/// Says how long each step took: an emulator's time is most of a run's.
struct Clock(Instant);

impl Clock {
    fn start() -> Self {
        Self(Instant::now())
    }

    fn lap(&mut self, what: &str) {
        println!("   {what}: {:.0} s", std::mem::replace(&mut self.0, Instant::now()).elapsed().as_secs_f64());
    }
}

/// Boots this kernel as guest number `number` and tries everything; what goes wrong in the guest is in the row.
pub fn run(outside: &Surroundings, machine: Machine, kernel: &Kernel, programs: &Programs, number: u8) -> Result<Row> {
    let initrd = outside.lab.directory().join("initrd");
    pack(machine, kernel, programs)?.write(&initrd)?;
    let mut clock = Clock::start();
    let mut guest = Guest::boot(machine, kernel, &initrd, &outside.lab.lan, number)?;
    clock.lap("booted");
    let mut row = Row {
        kernel: guest.release.clone(),
        programs: Vec::new(),
        rung: "none".to_owned(),
        reason: String::new(),
        passed: 0,
        memory: None,
        failures: Vec::new(),
    };
    for program in &programs.tests {
        let name = name_of(program)?;
        tests(&mut guest, &name, &mut row)?;
        clock.lap(&name);
    }
    let name = format!("guest{number}");
    let outcome = join(&mut guest, outside, &name, &mut row).and_then(|()| {
        clock.lap("joined");
        carry(&mut guest, outside, &name, "first").with_context(|| format!("on {}", row.rung))?;
        clock.lap(&row.rung);
        if row.rung != TUN {
            guest.shell("node-engine net datapath tun")?;
            let network = status(&mut guest)?.network;
            ensure!(network.as_ref().is_some_and(|network| network.datapath == TUN), "it carries by {network:?}");
            carry(&mut guest, outside, &name, "second").context("on tun")?;
            clock.lap(TUN);
        }
        Ok(())
    });
    if let Err(error) = outcome {
        let log = guest.shell("tail -n 20 /var/log/node-engine").unwrap_or_default();
        row.failures.push(format!("the node: {error:#}\n{log}"));
    }
    Ok(row)
}

fn pack(machine: Machine, kernel: &Kernel, programs: &Programs) -> Result<Initrd> {
    let mut initrd = Initrd::new(&programs.busybox, kernel)?;
    let mut put = |program: &Path, to: &str| initrd.program(machine.strip(), program, to);
    if machine == Machine::Amd64 {
        let ip = output(std::process::Command::new("sh").args(["-c", "command -v ip"]))?;
        put(&std::fs::canonicalize(ip.trim())?, "usr/sbin/ip")?;
    }
    put(&programs.daemon, "usr/sbin/node-engine")?;
    put(&programs.probe, "usr/bin/probe")?;
    for program in &programs.tests {
        put(program, &format!("tests/{}", name_of(program)?))?;
    }
    initrd.copy(&root().join(OBJECT), "tests/netmanager")?;
    Ok(initrd)
}

/// Runs a program of the test suite and takes down what it says of the programs.
fn tests(guest: &mut Guest, name: &str, row: &mut Row) -> Result<()> {
    // Emulated, and built without optimisation: as many frames as fit into a minute.
    let environment = "NODE_ENGINE_EBPF_OBJECT=/tests/netmanager NODE_ENGINE_FRAMES=2000";
    let filter = if name == "datapath" { PACKETS.join(" ") } else { String::new() };
    let line = format!("cd /tmp; {environment} /tests/{name} --include-ignored --nocapture --test-threads 1 {filter}");
    let ended = guest.run(&line, TESTS)?;
    for line in &ended.lines {
        if let Some((program, said)) = line.split_once("program ").and_then(|(_, line)| line.split_once(": ")) {
            row.programs.push((program.to_owned(), said.to_owned()));
        }
        if let Some(rest) = line.strip_prefix("test result: ") {
            let passed = rest.split_once(". ").and_then(|(_, counts)| counts.split(' ').next()?.parse::<u64>().ok());
            row.passed += passed.unwrap_or(0);
        }
    }
    if ended.code != 0 {
        let tail = ended.lines[ended.lines.len().saturating_sub(25)..].join("\n");
        row.failures.push(format!("{name} ended with {}:\n{tail}", ended.code));
    }
    Ok(())
}

/// The daemon joins the cluster on the other side of the wire, on the fastest rung that it finds.
fn join(guest: &mut Guest, outside: &Surroundings, name: &str, row: &mut Row) -> Result<()> {
    // A board without a container engine runs plain commands.
    let environment = "NODE_ENGINE_PROCESS=true NODE_ENGINE_PROCESS_USER=root";
    let daemon = format!("{environment} node-engine --cluster {} --name {name} --uplink eth0", lan::CLUSTER);
    guest.shell(&format!("{daemon} >/var/log/node-engine 2>&1 &"))?;
    let status = until("the guest joins the cluster", Duration::from_secs(90), || {
        let status = status(guest)?;
        let carries = status.network.as_ref().is_some_and(|network| !network.subnet_v4.is_empty());
        Ok((status.cluster.connected && carries).then_some(status))
    })?;
    let known = outside.lab.cluster.nodes()?.into_iter().any(|node| node.name == name && node.active);
    ensure!(known, "the cluster does not know the guest");
    if let Some(network) = status.network {
        row.rung = network.datapath;
        row.reason = network.reason;
    }
    let rollup = guest.run(&format!("cat /proc/{}/smaps_rollup", status.pid), Duration::from_secs(30))?;
    let pss =
        rollup.lines.iter().find_map(|line| line.strip_prefix("Pss:")?.split_whitespace().next()?.parse::<u64>().ok());
    row.memory = pss.map(|kib| kib * 1024);
    Ok(())
}

fn status(guest: &mut Guest) -> Result<Status> {
    let said = guest.run("node-engine status --json", Duration::from_secs(30))?;
    serde_json::from_str(&said.lines.join("\n")).with_context(|| format!("the guest's daemon says {:?}", said.lines))
}

/// TCP and UDP by service address, from a process in a namespace of the guest to a container outside, and back.
fn carry(guest: &mut Guest, outside: &Surroundings, name: &str, service: &str) -> Result<()> {
    let service = format!("{service}{name}");
    let document = json!({
        "job_name": format!("app.default.{service}.default"), "virtualization": "process", "image": "/usr/bin/probe", "cmd": ["serve"],
    });
    outside.lab.cluster.deploy_document(&document, name)?;
    let rows = outside.lab.cluster.running(&service, 1)?;
    let own = rows.first().context("nothing was deployed")?;

    let there = outside.web.service_address(false)?;
    let inside = |guest: &mut Guest, words: &str| -> Result<String> {
        // The one before it may take its time to go, and this one to become what it runs.
        let alone = "for i in $(seq 150); do set -- $(pidof probe); [ $# = 1 ] && break; sleep .2; done";
        guest.shell(&format!("{alone}; nsenter -t $1 -n probe {words}"))
    };
    let gets: Gets = parse(&inside(guest, &format!("get {} 20", socket(there, HTTP)))?)?;
    ensure!(gets.failed == 0, "from the guest: {} of {} requests failed: {}", gets.failed, gets.requests, gets.error);
    let echoes: Echoes = parse(&inside(guest, &format!("udp {} 50", socket(there, ECHO)))?)?;
    ensure!(echoes.received == echoes.sent, "from the guest: {echoes:?}");

    let here = own.service_address(false)?;
    let gets = outside.lab.within(&outside.web, |web| web.get(here, 20))?;
    ensure!(gets.failed == 0, "to the guest: {} of {} requests failed: {}", gets.failed, gets.requests, gets.error);
    let echoes = outside.lab.within(&outside.web, |web| web.echo(here, 50, Flows::One))?;
    ensure!(echoes.received == echoes.sent, "to the guest: {echoes:?}");
    outside.lab.cluster.delete(&service)
}

/// The test's name, without what the build added.
fn name_of(program: &Path) -> Result<String> {
    let name = program.file_name().and_then(|name| name.to_str()).context("a program without a name")?;
    Ok(name.rsplit_once('-').map_or(name, |(name, _)| name).to_owned())
}

/// The rows as a table, kernels down and programs across.
pub fn table(rows: &[Row]) -> String {
    let mut names: Vec<&str> = rows.iter().flat_map(|row| row.programs.iter().map(|(name, _)| name.as_str())).collect();
    names.sort_unstable();
    names.dedup();
    let mut text = format!("| kernel | {} | rung | tests | memory |\n", names.join(" | "));
    let _ = writeln!(text, "|{}", "---|".repeat(names.len() + 4));
    for row in rows {
        let said =
            |name: &str| row.programs.iter().find(|(other, _)| other == name).map_or("–", |(_, said)| said.as_str());
        let cells: Vec<&str> = names.iter().map(|name| said(name)).collect();
        let rung = if row.reason.is_empty() { row.rung.clone() } else { format!("{} ({})", row.rung, row.reason) };
        let memory = row.memory.map_or_else(|| "–".to_owned(), |bytes| format!("{:.1} MB", bytes as f64 / 1e6));
        let tests = if row.failures.is_empty() { format!("{} passed", row.passed) } else { "FAILED".to_owned() };
        let _ = writeln!(text, "| {} | {} | {rung} | {tests} | {memory} |", row.kernel, cells.join(" | "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_line_for_each_kernel() {
        let row = |kernel: &str, failures: &[&str]| Row {
            kernel: kernel.to_owned(),
            programs: vec![("tc_b".into(), "12 verified".into()), ("tc_a".into(), "refused".into())],
            rung: "tun".into(),
            reason: "no bpf".into(),
            passed: 7,
            memory: Some(9_500_000),
            failures: failures.iter().map(|&text| text.to_owned()).collect(),
        };
        let text = table(&[row("5.10", &[]), row("6.1", &["x"])]);
        let expected = "| kernel | tc_a | tc_b | rung | tests | memory |\n|---|---|---|---|---|---|\n\
                        | 5.10 | refused | 12 verified | tun (no bpf) | 7 passed | 9.5 MB |\n\
                        | 6.1 | refused | 12 verified | tun (no bpf) | FAILED | 9.5 MB |\n";
        assert_eq!(text, expected);
        assert_eq!(name_of(Path::new("/deps/kernel_equals_law-12ab")).unwrap(), "kernel_equals_law");
    }
}
