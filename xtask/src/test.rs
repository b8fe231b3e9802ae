//! Every test there is, counted.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;

use crate::cross::Target;
use crate::process::{self, cargo, root};
use crate::{build, ebpf, setup};

/// What to run; everything by default.
#[derive(Debug, Default)]
pub(crate) struct Selection {
    pub(crate) scenario: Option<String>,
    /// Every scenario of the overlay, on this rung alone.
    pub(crate) rung: Option<Rung>,
    pub(crate) unit: bool,
    /// Tests of faults as often, and for as long, as they are meant to be.
    pub(crate) full: bool,
    /// Of another machine, in an emulator of its processor: the tests beside the code that need no more than a user's rights.
    pub(crate) target: Option<Target>,
}

/// What a node may stand on, as `node-engine --datapath` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Rung {
    Ebpf,
    EbpfPlain,
    Tun,
}

/// The scenarios on this rung are in modules of this name.
const PLAIN: &str = "::plain::";
/// Scenarios that are tried on the middle rung, too, whenever everything is: its programs are the first rung's but for two helpers.
const PLAIN_AS_WELL: [&str; 3] = ["overlay::plain::", "miss::plain::", "restart::plain::a_killed"];

impl Rung {
    const fn module(self) -> &'static str {
        match self {
            Self::Ebpf => "::ebpf::",
            Self::EbpfPlain => PLAIN,
            Self::Tun => "::tun::",
        }
    }
}

/// What tests of faults ask how often or how long; without an answer they are as short as every run can bear.
const FULL: [(&str, &str); 6] = [
    ("NODE_ENGINE_TEST_AWAY_HOURS", "72"),
    ("NODE_ENGINE_TEST_AWAY", "300"),
    ("NODE_ENGINE_TEST_CUTS", "200"),
    ("NODE_ENGINE_TEST_DAMAGES", "10000"),
    ("NODE_ENGINE_TEST_REPORTS", "200000"),
    ("NODE_ENGINE_TEST_ROUNDS", "20"),
];

/// Sums of libtest's result lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
}

pub(crate) fn run(selection: &Selection) -> Result<()> {
    let tally = match selection.target.filter(|target| !target.is_native()) {
        Some(target) => emulated(target)?,
        None => everything(selection)?,
    };
    println!("{} passed, {} failed, {} skipped", tally.passed, tally.failed, tally.skipped);
    if tally.failed > 0 {
        // The count is the last line for whoever reads only that; the exit code says the rest.
        std::process::exit(1);
    }
    if tally.passed == 0 {
        bail!("no test ran");
    }
    Ok(())
}

fn everything(selection: &Selection) -> Result<Tally> {
    require_root()?;
    setup::everything()?;
    ebpf::build()?;
    build_programs()?;

    let mut tally = Tally::default();
    if selection.scenario.is_none() && selection.rung.is_none() {
        tally.add(unit_tests(selection.full)?);
    }
    if !selection.unit {
        match (&selection.scenario, selection.rung) {
            (Some(name), _) => tally.add(scenarios(&[name])?),
            (None, Some(rung)) => tally.add(scenarios(&[rung.module()])?),
            (None, None) => {
                tally.add(scenarios(&["--skip", PLAIN])?);
                let plain = scenarios(&PLAIN_AS_WELL)?;
                ensure!(
                    plain.passed + plain.failed >= PLAIN_AS_WELL.len() as u64,
                    "not every one of {PLAIN_AS_WELL:?} ran"
                );
                tally.add(plain);
            }
        }
    }
    Ok(tally)
}

/// The tests beside the code, built for another machine.
fn emulated(target: Target) -> Result<Tally> {
    let emulator = target.emulator().with_context(|| format!("nothing emulates {target}"))?;
    setup::emulators(&[(emulator, "qemu-user-static")])?;
    ebpf::build()?;
    let toolchain = build::toolchain(target)?;
    let tests = |verb: &[&str]| {
        let mut command = toolchain.cargo("test");
        command.args(["--package", "netmanager-common", "--package", "node-engine", "--lib"]).args(verb);
        command
    };
    process::run(&mut tests(&["--no-run"]))?;
    counted(&mut tests(&["--no-fail-fast", "--offline"]))
}

pub(crate) fn require_root() -> Result<()> {
    if !process::is_root() {
        bail!("network namespaces and Docker need the superuser: run this as root (`cargo test` alone does not)");
    }
    Ok(())
}

/// The daemon with the eBPF object in it, and the lab's own programs.
pub(crate) fn build_programs() -> Result<()> {
    process::run(cargo().args(["build", "--package", "node-engine", "--package", "lab", "--bins"]))
}

/// Runs the `lab` program of this build.
pub(crate) fn lab() -> Command {
    let mut command = Command::new(root().join("target/debug/lab"));
    command.current_dir(root());
    command
}

/// The tests beside the code, those that need root included, inside a simulated host: its own interfaces, mounts, processes and
/// dockerd, so that whatever a test leaves or breaks is gone with it.
fn unit_tests(full: bool) -> Result<Tally> {
    let build = |verb: &[&str]| {
        let mut command = cargo();
        command.args(["test", "--workspace", "--exclude", "lab", "--exclude", "netmanager-ebpf"]).args(verb);
        command
    };
    process::run(&mut build(&["--no-run"]))?;
    let tests = build(&["--no-fail-fast", "--offline", "--", "--include-ignored", "--test-threads", "1"]);
    let mut command = lab();
    command.args(["host-run", "--"]).arg(tests.get_program()).args(tests.get_args());
    command.env("NODE_ENGINE_TEST_DOCKER", "/var/run/docker.sock");
    command.envs(FULL.into_iter().filter(|_| full));
    counted(&mut command)
}

/// The lab's tests whose names contain one of these.
fn scenarios(filter: &[&str]) -> Result<Tally> {
    let mut command = cargo();
    command.args(["test", "--package", "lab", "--no-fail-fast", "--"]).args(filter);
    command.args(["--include-ignored", "--test-threads", "1"]);
    counted(&mut command)
}

/// Runs tests, shows what they print, and sums their result lines. A test program that dies without one counts as a failure.
fn counted(command: &mut Command) -> Result<Tally> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot start {name}"))?;
    let output = child.stdout.take().context("the tests' output is not piped")?;
    let mut tally = Tally::default();
    for line in BufReader::new(output).split(b'\n') {
        let line = line.context("cannot read the tests' output")?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        if let Some(result) = Tally::parse(&line) {
            tally.add(result);
        }
    }
    let status = child.wait().with_context(|| format!("cannot wait for {name}"))?;
    if !status.success() && tally.failed == 0 {
        eprintln!("a test program ended with {status} and no result");
        tally.failed += 1;
    }
    Ok(tally)
}

impl Tally {
    /// `test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 3 filtered out; finished in 0.02s`
    fn parse(line: &str) -> Option<Self> {
        let rest = line.trim_start().strip_prefix("test result: ")?;
        let counts = rest.split_once(". ")?.1;
        let count =
            |what: &str| counts.split(';').find_map(|part| part.trim().strip_suffix(what)?.trim().parse::<u64>().ok());
        Some(Self { passed: count("passed")?, failed: count("failed")?, skipped: count("ignored")? })
    }

    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_are_summed() {
        let mut tally = Tally::default();
        for line in [
            "running 3 tests",
            "test result: ok. 12 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.02s",
            "test result: FAILED. 2 passed; 3 failed; 0 ignored; 0 measured; 7 filtered out; finished in 1.50s",
            "test result: nonsense",
        ] {
            if let Some(result) = Tally::parse(line) {
                tally.add(result);
            }
        }
        assert_eq!(tally, Tally { passed: 14, failed: 3, skipped: 1 });
    }

    #[test]
    fn a_program_that_dies_is_a_failure() {
        let dies = counted(Command::new("sh").args(["-c", "echo running 1 test; exit 101"])).expect("sh runs");
        assert_eq!(dies, Tally { passed: 0, failed: 1, skipped: 0 });
    }
}
