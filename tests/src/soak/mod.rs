//! Two nodes and a cluster, traffic that never ends, services that come, go and move at random, and every few seconds a fault. After
//! each, within a bound, all is as it ought to be and nothing else is there; at the end the hosts are as they were found.
//!
//! A run is a seed: it makes the same choices again, though not at the same microsecond.

mod chance;
mod check;
mod fault;
pub mod line;
mod load;
mod memory;
mod model;
pub mod steps;
mod tally;
pub mod undo;

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::cluster::{Deploy, InstanceRow};
use crate::node::Datapath;
use crate::snapshot::Snapshot;
use crate::topology::{Lab, Plan};
use crate::traffic::{ECHO, HTTP, SINK, socket};
use crate::wait::until_true;

use chance::Chance;
use check::{Known, Seen, Sight};
pub use fault::Kind;
pub use load::Counts;
use load::Load;
pub use memory::MOST_GROWTH;
use memory::Memory;
use model::{Model, Operation};
use tally::{Outcome, Tally};

/// Services that are there all the while, where they are, and in this order.
const STAYING: [&str; 2] = ["client", "steady"];
/// An operation may take so much longer than a fault: images are there, but an instance that moves or goes drains for ten seconds,
/// and Docker waits ten for a program that does not listen to SIGTERM.
const OPERATION: Duration = Duration::from_secs(30);
/// What is not well after its bound is waited for, to tell late from never.
const LATE: Duration = Duration::from_secs(60);
/// Where nothing is done all is well, but for what still follows from the last fault.
const QUIET: Duration = Duration::from_secs(5);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(100);
/// Traffic is watched for so long at least.
const WATCH: Duration = Duration::from_millis(350);

/// What is wanted of a run.
#[derive(Clone, Debug)]
pub struct Options {
    pub length: Duration,
    pub seed: u64,
    pub datapath: Datapath,
    /// This fault alone, nothing deployed meanwhile, and datagrams as fast as they are answered.
    pub only: Option<Kind>,
    /// It ends after so many faults, if that is sooner.
    pub times: Option<u32>,
    /// Tell of every look that finds something amiss, not only of those that come too late.
    pub verbose: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            length: Duration::from_secs(600),
            seed: 1,
            datapath: Datapath::Ebpf,
            only: None,
            times: None,
            verbose: false,
        }
    }
}

/// What a run has found.
#[derive(Debug)]
pub struct Report {
    pub seed: u64,
    pub faults: u32,
    /// What was not as it ought to be, a sentence each.
    pub broken: Vec<String>,
}

impl Report {
    /// An error where an invariant broke.
    pub fn verdict(&self) -> Result<()> {
        if self.broken.is_empty() {
            return Ok(());
        }
        bail!("seed {}: {} invariants broke:\n{}", self.seed, self.broken.len(), self.broken.join("\n"))
    }
}

struct Soak<'a> {
    options: &'a Options,
    lab: Lab,
    begin: Instant,
    chance: Chance,
    model: Model,
    known: Known,
    loads: Vec<Load>,
    tally: Tally,
    operations: u32,
    memory: BTreeMap<String, Memory>,
    /// Faults that are still to come before any comes again.
    deck: Vec<Kind>,
    broken: Vec<String>,
}

/// Runs it, and prints what happens.
pub fn run(options: &Options) -> Result<Report> {
    println!("soak: seed {}, {:?} on {}", options.seed, options.length, options.datapath.name());
    let mut lab = Lab::prepare(&Plan::new(2, options.datapath))?;
    let before = lab.nodes.iter().map(|node| Snapshot::take(&node.host)).collect::<Result<Vec<_>>>()?;
    for node in &mut lab.nodes {
        node.start()?;
    }
    for node in &mut lab.nodes {
        node.joined()?;
    }
    let mut soak = Soak {
        options,
        lab,
        begin: Instant::now(),
        chance: Chance::new(options.seed),
        model: Model::default(),
        known: Known::default(),
        loads: Vec::new(),
        tally: Tally::default(),
        operations: 0,
        memory: BTreeMap::new(),
        deck: Vec::new(),
        broken: Vec::new(),
    };
    if let Err(error) = soak.go(&before) {
        soak.breaks(format!("{error:#}"));
    }
    soak.conclude();
    Ok(Report { seed: options.seed, faults: soak.tally.faults(), broken: soak.broken })
}

impl Soak<'_> {
    fn go(&mut self, before: &[Snapshot]) -> Result<()> {
        self.set_up()?;
        let most = self.options.times.unwrap_or(u32::MAX);
        while self.begin.elapsed() < self.options.length && self.tally.faults() < most {
            self.round()?;
        }
        self.wind_up(before)
    }

    /// What stays, and traffic to it.
    fn set_up(&mut self) -> Result<()> {
        for (name, on) in STAYING.into_iter().zip(["node-a", "node-b"]) {
            // A flow that is moved to the other of two is noticed: its connection is reset.
            let two = self.options.only.is_some_and(Kind::ends_the_daemon) && name == STAYING[1];
            let replicas = if two { 2 } else { 1 };
            self.lab.deploy(&Deploy { name, on: Some(on), replicas, ..Deploy::default() }, replicas as usize)?;
        }
        self.model.adopt(self.lab.cluster.instances()?);
        let rows: Vec<InstanceRow> = self.model.rows().cloned().collect();
        let one = |name: &str| rows.iter().find(|row| row.short() == name).context("it does not run");
        let (client, steady) = (one(STAYING[0])?, one(STAYING[1])?);
        self.settle(None, OPERATION, Instant::now())?;

        let host = &self.lab.nodes[0].host;
        let pid = self.lab.nodes[0].container_pid(client)?;
        let to = |port, v6| -> Result<String> { Ok(socket(steady.service_address(v6)?, port)) };
        let (flows, rate) = if self.options.only.is_some() { ("1000", "0") } else { ("64", "500") };
        let length = (self.options.length + Duration::from_secs(3_600)).as_secs().to_string();
        let requests = Load::start(host, pid, "requests", &["pulse", &to(HTTP, true)?, "20"])?;
        let stream = Load::start(host, pid, "stream", &["stream", &to(SINK, false)?, &length, "20"])?;
        let datagrams = Load::start(host, pid, "datagrams", &["flows", &to(ECHO, false)?, flows, rate])?;
        self.loads = vec![requests, stream, datagrams];
        self.say("traffic runs");
        Ok(())
    }

    /// An operation, a fault, or the one amid the other.
    fn round(&mut self) -> Result<()> {
        let calm = self.options.only.is_some();
        thread::sleep(Duration::from_millis(500 + if calm { 0 } else { 500 * self.chance.below(4) as u64 }));
        // What comes late by itself is not the next fault's.
        self.settle(None, QUIET, Instant::now()).context("without a cause")?;
        let operation = if calm { None } else { self.model.choose(&mut self.chance) };
        let amid = self.chance.once_in(2);
        if let Some(operation) = &operation {
            operation.ask(&self.lab.cluster).with_context(|| format!("{operation} was refused"))?;
            self.operations += 1;
            if !amid {
                let took = self.settle(Some(operation), OPERATION, Instant::now())?;
                self.say(&format!("{operation}: done in {:.1} s", took.as_secs_f64()));
            }
        }
        let under_way = operation.filter(|_| amid);
        let (kind, node) = self.draw();
        let before: Vec<Counts> = self.loads.iter().map(Load::counts).collect();
        for load in &self.loads {
            load.silence();
        }
        let struck = fault::strike(&mut self.lab, kind, node, &mut self.chance)
            .with_context(|| format!("{kind} on {}", self.lab.nodes[node].host.name()))?;
        let bound = kind.bound() + if under_way.is_some() { OPERATION } else { Duration::ZERO };
        let what = match &under_way {
            Some(operation) => format!("{} amid {operation}", struck.what),
            None => struck.what,
        };
        let healed = self.settle(under_way.as_ref(), bound, struck.over).with_context(|| what.clone())?;
        let lost: Vec<Counts> =
            self.loads.iter().zip(before).map(|(load, before)| load.counts().since(before)).collect();
        let silences: Vec<Duration> = self.loads.iter().map(Load::silence).collect();
        let outcome = Outcome {
            healed,
            amid: under_way.is_some(),
            requests_lost: lost[0].lost,
            datagrams_lost: lost[2].lost,
            datagrams_doubled: lost[2].doubled,
            silence: silences[2],
            stall: silences[1],
        };
        self.say(&format!(
            "{what}: well after {:.1} s; requests {} of {} lost, datagrams {} of {} lost, {} doubled, silent {} ms, stream stalled {} ms",
            healed.as_secs_f64(),
            lost[0].lost,
            lost[0].good + lost[0].lost,
            lost[2].lost,
            lost[2].good + lost[2].lost,
            lost[2].doubled,
            silences[2].as_millis(),
            silences[1].as_millis(),
        ));
        self.tally.add(kind, &outcome);
        Ok(())
    }

    /// Every kind of fault comes before any comes again. The one daemon is ended in the first half only and the other one in the
    /// second, so that each has a life that is long enough to grow in.
    fn draw(&mut self) -> (Kind, usize) {
        if let Some(kind) = self.options.only {
            return (kind, self.tally.faults() as usize % 2);
        }
        if self.deck.is_empty() {
            self.deck = Kind::ALL.to_vec();
        }
        let kind = self.deck.swap_remove(self.chance.below(self.deck.len()));
        let node = self.chance.below(2);
        let second_half = self.begin.elapsed() > self.options.length / 2;
        (kind, if kind.ends_the_daemon() { usize::from(!second_half) } else { node })
    }

    /// Waits until all is well, for what the model says and this operation; complains where it takes longer than it may.
    fn settle(&mut self, operation: Option<&Operation>, bound: Duration, from: Instant) -> Result<Duration> {
        let mut late = false;
        let mut told = Vec::new();
        loop {
            let looked = self.look(operation);
            if let Err(complaints) = &looked
                && self.options.verbose
                && told != *complaints
            {
                told.clone_from(complaints);
                self.say(&format!("  amiss after {:.1} s: {}", from.elapsed().as_secs_f64(), complaints.join("; ")));
            }
            match looked {
                Ok(Sight { rows, hosts }) => {
                    let took = from.elapsed();
                    if late {
                        self.say(&format!("well after all, after {:.1} s", took.as_secs_f64()));
                    }
                    self.model.adopt(rows);
                    self.known.adopt(&hosts);
                    self.remember(&hosts);
                    return Ok(took);
                }
                Err(complaints) if from.elapsed() > bound && !late => {
                    late = true;
                    self.breaks(format!("not well within {bound:?}: {}", complaints.join("; ")));
                }
                Err(complaints) if from.elapsed() > bound + LATE => {
                    bail!("never well again: {}", complaints.join("; "));
                }
                Err(_) => thread::sleep(PAUSE),
            }
        }
    }

    /// Everything there is, and traffic meanwhile.
    fn look(&mut self, operation: Option<&Operation>) -> Result<Sight, Vec<String>> {
        let begin = Instant::now();
        let before: Vec<Counts> = self.loads.iter().map(Load::counts).collect();
        let seen = check::look(&self.lab, &self.model, &self.known, operation)?;
        thread::sleep(WATCH.saturating_sub(begin.elapsed()));
        let mut complaints = Vec::new();
        for (load, before) in self.loads.iter_mut().zip(before) {
            let since = load.counts().since(before);
            complaints.extend(load.still_runs().err().map(|error| error.to_string()));
            if since.good == 0 || since.lost > 0 {
                complaints.push(format!("{}: {} answered, {} lost", load.name(), since.good, since.lost));
            }
        }
        if complaints.is_empty() { Ok(seen) } else { Err(complaints) }
    }

    fn remember(&mut self, seen: &BTreeMap<String, Seen>) {
        for node in &self.lab.nodes {
            let Some(pid) = seen.get(node.host.name()).map(|seen| seen.daemon) else { continue };
            let status = node.host.run(&format!("cat /proc/{pid}/status")).unwrap_or_default();
            self.memory.entry(node.host.name().to_owned()).or_default().add(self.begin.elapsed(), pid, &status);
        }
    }

    /// Ends the traffic, takes everything down, and gives the hosts back.
    fn wind_up(&mut self, before: &[Snapshot]) -> Result<()> {
        let mut datagrams = Counts::default();
        for load in std::mem::take(&mut self.loads) {
            let name = load.name();
            datagrams = load.counts();
            match load.finish() {
                Ok(sum) => self.say(&format!("{name} in all: {sum}")),
                Err(error) => self.breaks(format!("{error:#}")),
            }
        }
        let overflows = self.overflows()?;
        self.say(&format!("of the datagrams and echoes {overflows} were lost to full buffers of sockets"));
        // Programs that carry on by themselves lose nothing.
        let by_itself = self.options.datapath == Datapath::Ebpf && self.options.only.is_some_and(Kind::ends_the_daemon);
        if by_itself && (datagrams.lost > overflows || datagrams.doubled > 0) {
            self.broken.push(format!("{} datagrams were lost and {} doubled", datagrams.lost, datagrams.doubled));
        }
        let services: std::collections::BTreeSet<String> =
            self.model.rows().map(|row| row.short().to_owned()).collect();
        for service in services {
            self.lab.cluster.delete(&service)?;
        }
        for node in &self.lab.nodes {
            until_true("no container is left", Duration::from_secs(40), || {
                Ok(node.host.run("docker ps --all --quiet")?.trim().is_empty())
            })
            .with_context(|| node.log())?;
            // A file of Docker's that nothing is mounted on any more may stay for as long as Docker likes.
            until_true("no network namespace is left", Duration::from_secs(20), || {
                let left = node
                    .host
                    .shell("grep ' - nsfs ' /proc/1/mountinfo || true; readlink /proc/[0-9]*/ns/net | sort -u")?;
                Ok(left.lines().count() == 1)
            })?;
        }
        for node in &mut self.lab.nodes {
            let ended = node.terminate()?;
            ensure!(ended.success(), "a daemon ended with {ended}");
        }
        for (node, before) in self.lab.nodes.iter().zip(before) {
            node.uninstall()?;
            let left = before.difference(&Snapshot::take(&node.host)?);
            if !left.is_empty() {
                let name = node.host.name();
                self.broken.push(format!("{name} is not as it was found: {}", left.join("; ")));
            }
            if node.log_has("panicked") {
                self.broken.push(format!("{} has panicked", node.host.name()));
            }
        }
        self.say("uninstalled");
        Ok(())
    }

    /// What probes were too slow to read, which no network lost.
    fn overflows(&self) -> Result<u64> {
        let mut all = 0;
        for row in self.model.rows().filter(|row| STAYING.contains(&row.short())) {
            let node = self.lab.node(&row.node)?;
            let text = node.host.run(&format!("cat /proc/{}/net/snmp", node.container_pid(row)?))?;
            let mut lines = text.lines().filter_map(|line| line.strip_prefix("Udp: ")).map(str::split_whitespace);
            let (names, counts) = lines.next().zip(lines.next()).context("no counters of UDP")?;
            let count = names.zip(counts).find(|(name, _)| *name == "RcvbufErrors").context("no RcvbufErrors")?.1;
            all += count.parse::<u64>()?;
        }
        Ok(all)
    }

    fn conclude(&mut self) {
        let run = self.begin.elapsed();
        let (faults, operations) = (self.tally.faults(), self.operations);
        println!(
            "\n{faults} faults and {operations} operations within {:.0} s, seed {}\n{}",
            run.as_secs_f64(),
            self.options.seed,
            self.tally.table()
        );
        for (name, memory) in &self.memory {
            let (text, too_much) = memory.report(name, run);
            println!("{text}");
            if too_much {
                self.broken.push(text);
            }
        }
        println!("{} invariants broke", self.broken.len());
    }

    fn say(&self, text: &str) {
        println!("{:7.1} s  {text}", self.begin.elapsed().as_secs_f64());
    }

    fn breaks(&mut self, what: String) {
        self.say(&format!("BROKEN: {what}"));
        for node in &self.lab.nodes {
            println!("{}", node.log());
        }
        println!("{}", self.lab.cluster.log());
        self.broken.push(what);
    }
}

impl Counts {
    fn since(self, before: Self) -> Self {
        Self {
            good: self.good.saturating_sub(before.good),
            lost: self.lost.saturating_sub(before.lost),
            doubled: self.doubled.saturating_sub(before.doubled),
        }
    }
}
