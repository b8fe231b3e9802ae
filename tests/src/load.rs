//! What a full node costs its machine, and what is the daemon's own part of a deployment: as many instances as a node has addresses
//! for, their telemetry at the usual pace, a restart that finds them again, and all of it twice, to tell growth that has an end from
//! growth that has none.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use crate::cluster::{Broker, Deploy};
use crate::footprint::{self, Limit, Sample};
use crate::image::PROBE;
use crate::node::{Datapath, Node};
use crate::topology::{Lab, Plan};
use crate::wait::until;

/// What is wanted of a run.
#[derive(Clone, Debug)]
pub struct Options {
    /// The daemon to measure, where it is not the one of this build.
    pub daemon: Option<PathBuf>,
    /// A node has 62 addresses, one of which is the bridge's. With Docker each instance is two containers.
    pub instances: u32,
    pub watch: Duration,
    pub datapath: Datapath,
}

impl Default for Options {
    fn default() -> Self {
        Self { daemon: None, instances: 60, watch: Duration::from_secs(30), datapath: Datapath::Ebpf }
    }
}

/// Deployments that are timed, beside as many of the runtime alone.
const TIMED: usize = 9;
/// Questions of each kind that are asked of a full node.
const QUESTIONS: usize = 100;
/// How long a full node may take to come up, or to be empty again: the machine may be a small one, and have others' work.
const PATIENCE: Duration = Duration::from_secs(400);
/// What else is on the way has come when this is over.
const SETTLE: Duration = Duration::from_secs(5);
/// The service that fills the node.
const MANY: &str = "many";

const GOALS: [Limit; 4] = [
    Limit { name: "a deployment over `docker run`", unit: "%", most: 15.0 },
    Limit { name: "CPU with telemetry, of one core", unit: "%", most: 25.0 },
    Limit { name: "found again after a restart", unit: "s", most: 5.0 },
    Limit { name: "more memory the second time", unit: "MB", most: 2.0 },
];

struct Load {
    lab: Lab,
    begin: Instant,
    instances: u32,
}

/// Measures it, printing as it goes; gives how many goals were not reached.
pub fn run(options: &Options) -> Result<usize> {
    let mut plan = Plan::new(1, options.datapath);
    plan.broker = Broker::Mosquitto;
    plan.settings = &[("NODE_ENGINE_REPORTS", "full")];
    let mut lab = Lab::prepare(&plan)?;
    if let Some(daemon) = &options.daemon {
        lab.nodes[0].set_program(daemon.clone());
    }
    lab.nodes[0].start_and_join()?;
    footprint::count_what_the_protocol_sends(&lab.nodes[0])?;
    let mut load = Load { lab, begin: Instant::now(), instances: options.instances };
    load.say("joined")?;

    let over = load.share()?;
    load.fill()?;
    let before = load.sample()?;
    thread::sleep(options.watch);
    let cpu = load.sample()?.since(&before).cpu.as_secs_f64() / options.watch.as_secs_f64() * 100.0;
    load.say(&format!("watched for {} s: {cpu:.1} % of a core", options.watch.as_secs()))?;
    load.ask()?;
    let adopted = load.restart()?;

    // The first time fills what is kept; what the second adds to that would be added by each that follows.
    let mut heights = Vec::new();
    for _ in 0..3 {
        load.empty()?;
        heights.push(load.sample()?.pss as f64 / 1e6);
        load.fill()?;
        load.ask()?;
    }
    load.empty()?;
    heights.push(load.sample()?.pss as f64 / 1e6);
    let grown = heights[heights.len() - 1] - heights[1];

    let (text, short) = footprint::report(&GOALS, [over, cpu, adopted.as_secs_f64(), grown]);
    println!("\n{text}");
    Ok(short)
}

/// A line of `events --json`.
#[derive(Debug, Deserialize)]
struct Event {
    time_ms: u64,
    event: String,
    subject: String,
}

impl Load {
    fn node(&self) -> &Node {
        &self.lab.nodes[0]
    }

    fn sample(&self) -> Result<Sample> {
        Sample::take(self.node())
    }

    fn say(&self, what: &str) -> Result<()> {
        let pid = self.node().status()?.pid;
        let status = self.node().host.run(&format!("cat /proc/{pid}/status"))?;
        let kibibytes = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<f64>().ok()
        };
        let (all, own) = (kibibytes("VmRSS:"), kibibytes("RssAnon:"));
        let mebibytes = |value: Option<f64>| value.unwrap_or_default() / 1024.0;
        println!(
            "{:7.1} s  RSS {:5.1} MiB, {:5.1} without pages of files: {what}",
            self.begin.elapsed().as_secs_f64(),
            mebibytes(all),
            mebibytes(own)
        );
        Ok(())
    }

    /// By how many percent a deployment takes longer than `docker run`, by medians; they alternate.
    fn share(&self) -> Result<f64> {
        let host = &self.node().host;
        let (mut alone, mut ours) = (Vec::new(), Vec::new());
        for turn in 0..TIMED {
            let began = Instant::now();
            host.run(&format!("docker run --detach --name alone --network none {PROBE}"))?;
            alone.push(began.elapsed());
            host.run("docker rm --force alone")?;
            let name = format!("one{turn}");
            self.lab.deploy(&Deploy { name: &name, ..Deploy::default() }, 1)?;
            ours.push(self.took(&name)?);
            self.lab.cluster.delete(&name)?;
            self.left(0)?;
        }
        let (alone, ours) = (median(&mut alone), median(&mut ours));
        let over = (ours.as_secs_f64() / alone.as_secs_f64() - 1.0) * 100.0;
        self.say(&format!("docker run {alone:.0?}, a deployment {ours:.0?}, of {TIMED} each"))?;
        Ok(over)
    }

    /// From the moment that the node begins with the instance until it runs.
    fn took(&self, name: &str) -> Result<Duration> {
        let text = self.node().client()?.args(["events", "--json", "--past", "64"]).output().context("no events")?;
        let mut moments = BTreeMap::new();
        for line in String::from_utf8_lossy(&text.stdout).lines() {
            let event: Event = serde_json::from_str(line).with_context(|| format!("an event: {line}"))?;
            if event.subject.contains(name) {
                moments.entry(event.event).or_insert(event.time_ms);
            }
        }
        let of = |kind: &str| moments.get(kind).copied().with_context(|| format!("no {kind} of {name}: {moments:?}"));
        Ok(Duration::from_millis(of("created")? - of("creating")?))
    }

    /// So many containers are left on the node.
    fn left(&self, count: usize) -> Result<()> {
        let mut left = String::new();
        until(&format!("{count} containers are left"), PATIENCE, || {
            left = self.node().host.shell("docker ps --all --format '{{.Names}} {{.Status}}'")?;
            Ok((left.lines().count() == count).then_some(()))
        })
        .with_context(|| format!("{}{left}", self.node().log()))
    }

    fn fill(&self) -> Result<()> {
        let began = Instant::now();
        self.lab.cluster.deploy(&Deploy { name: MANY, replicas: self.instances, ..Deploy::default() })?;
        self.all_run()?;
        let rate = f64::from(self.instances) / began.elapsed().as_secs_f64();
        thread::sleep(SETTLE);
        self.say(&format!("{} instances run, {rate:.1} a second", self.instances))
    }

    fn all_run(&self) -> Result<()> {
        until("all run", PATIENCE, || Ok((self.node().status()?.running == self.instances as usize).then_some(())))
            .with_context(|| self.node().log())
    }

    fn empty(&self) -> Result<()> {
        self.lab.cluster.delete(MANY)?;
        self.left(0)?;
        thread::sleep(SETTLE);
        self.say("nothing runs")
    }

    /// Looks at everything, and runs commands in an instance.
    fn ask(&self) -> Result<()> {
        for turn in 0..QUESTIONS {
            let instance = format!("{MANY}#{}", self.first()? + turn as u32 % self.instances);
            for words in [&["inspect", &instance][..], &["exec", &instance, "--", "/bin/true"], &["logs", &instance]] {
                let said = self.node().client()?.args(words).output().context("no answer")?;
                ensure!(said.status.success(), "{words:?}: {}", String::from_utf8_lossy(&said.stderr));
            }
        }
        self.say(&format!("inspect, exec and logs, {QUESTIONS} times each"))
    }

    /// The lowest number there is: those of before are not given again.
    fn first(&self) -> Result<u32> {
        self.lab.cluster.instances()?.iter().map(|row| row.number).min().context("nothing runs")
    }

    /// The daemon ends and begins; gives how long it takes until it has found all again, with the processes they had.
    fn restart(&mut self) -> Result<Duration> {
        let processes = "docker inspect --format '{{.Id}} {{.State.Pid}}' $(docker ps --quiet) | sort";
        let before = self.node().host.shell(processes)?;
        self.lab.nodes[0].terminate()?;
        let began = Instant::now();
        self.lab.nodes[0].start()?;
        self.all_run()?;
        let took = began.elapsed();
        ensure!(self.node().host.shell(processes)? == before, "containers are not those of before");
        self.say(&format!("a restart found all again after {:.1} s, by their processes", took.as_secs_f64()))?;
        Ok(took)
    }
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_falls_short_is_told() {
        let (text, short) = footprint::report(&GOALS, [14.0, 25.0, 5.1, 0.0]);
        assert_eq!(short, 1, "{text}");
        assert!(text.contains("found again after a restart          5.10 s   of   5.0  TOO MUCH\n"), "{text}");
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&mut [3, 1, 2].map(Duration::from_secs)), Duration::from_secs(2));
    }
}
