//! What a node costs its machine while nothing happens on it: a real node of the lab, its overlay carrying, two containers running,
//! a peer it has spoken with.

mod idle;

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::cluster::{Broker, Deploy};
use crate::node::Datapath;
use crate::topology::{Lab, Plan};
pub use idle::Sample;
pub(crate) use idle::count_what_the_protocol_sends;

/// What is promised of a figure; a run that exceeds it fails.
#[derive(Debug)]
pub(crate) struct Limit {
    pub(crate) name: &'static str,
    pub(crate) unit: &'static str,
    pub(crate) most: f64,
}

/// The one table of limits, in the order of [`Figures::values`].
const LIMITS: [Limit; 6] = [
    Limit { name: "stripped binary", unit: "MB", most: 12.0 },
    Limit { name: "ready after a start", unit: "s", most: 1.0 },
    Limit { name: "memory (PSS)", unit: "MB", most: 15.0 },
    Limit { name: "CPU, of one core", unit: "%", most: 0.2 },
    Limit { name: "written to disk a day", unit: "MB", most: 2.0 },
    Limit { name: "sent a day beyond the protocol", unit: "MB", most: 1.0 },
];

const MB: f64 = 1e6;
const DAY: f64 = 24.0 * 3600.0;

/// How thorough a run is.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// From the last thing that happened to the begin of the watch.
    pub settle: Duration,
    pub watch: Duration,
    /// Starts of the daemon, of which the fastest counts: the others tell of the machine's other work.
    pub starts: usize,
}

impl Effort {
    pub const FULL: Self = Self { settle: Duration::from_secs(15), watch: Duration::from_secs(60), starts: 5 };
    /// For continuous integration.
    pub const SHORT: Self = Self { settle: Duration::from_secs(5), watch: Duration::from_secs(20), starts: 3 };
}

/// What was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Figures {
    pub binary_bytes: u64,
    pub ready: Duration,
    pub idle: Sample,
    pub watched: Duration,
}

/// Measures this daemon. It should be one as it is handed out: figures of another build say nothing.
pub fn measure(program: &Path, datapath: Datapath, effort: Effort) -> Result<Figures> {
    let mut plan = Plan::new(2, datapath);
    plan.broker = Broker::Mosquitto;
    let mut lab = Lab::prepare(&plan)?;
    // A file of its own, so that no page of it is shared with the other daemons of this machine: a node has one.
    let own = lab.directory().join("node-engine");
    fs::copy(program, &own).with_context(|| format!("cannot copy {}", program.display()))?;
    lab.nodes[0].set_program(own.clone());
    for node in &mut lab.nodes {
        node.start()?;
    }
    for node in &mut lab.nodes {
        node.joined()?;
    }
    acquaint(&lab)?;

    let mut ready = Duration::MAX;
    for _ in 0..effort.starts {
        lab.nodes[0].terminate()?;
        ready = ready.min(idle::start_to_ready(&mut lab.nodes[0], 2)?);
    }
    let node = &lab.nodes[0];
    ensure!(
        node.status()?.network.is_some_and(|network| network.datapath == datapath.name()),
        "the node does not carry by {}",
        datapath.name()
    );
    count_what_the_protocol_sends(node)?;
    thread::sleep(effort.settle);
    let before = Sample::take(node)?;
    thread::sleep(effort.watch);
    let idle = Sample::take(node)?.since(&before);
    let binary_bytes = fs::metadata(&own).context("the daemon's file is gone")?.len();
    Ok(Figures { binary_bytes, ready, idle, watched: effort.watch })
}

/// Two instances on the first node that have spoken with one on the other.
fn acquaint(lab: &Lab) -> Result<()> {
    let clients = lab.deploy(&Deploy { name: "client", on: Some("node-a"), replicas: 2, ..Deploy::default() }, 2)?;
    let web = lab.deploy(&Deploy { name: "web", on: Some("node-b"), ..Deploy::default() }, 1)?;
    for client in &clients {
        let gets = lab.within(client, |container| container.get(web[0].service_address(false)?, 10))?;
        ensure!(gets.failed == 0, "{} of {} requests failed: {}", gets.failed, gets.requests, gets.error);
    }
    Ok(())
}

impl Figures {
    /// In the units and the order of [`LIMITS`].
    fn values(&self) -> [f64; LIMITS.len()] {
        let daily = |bytes: u64| bytes as f64 / MB * DAY / self.watched.as_secs_f64();
        [
            self.binary_bytes as f64 / MB,
            self.ready.as_secs_f64(),
            self.idle.pss as f64 / MB,
            self.idle.cpu.as_secs_f64() / self.watched.as_secs_f64() * 100.0,
            daily(self.idle.written),
            daily(self.idle.sent),
        ]
    }

    /// A line for each figure with its limit, and how many exceed theirs.
    pub fn report(&self) -> (String, usize) {
        report(&LIMITS, self.values())
    }
}

/// A line for each value with its limit, and how many exceed theirs.
pub(crate) fn report<const N: usize>(limits: &[Limit; N], values: [f64; N]) -> (String, usize) {
    let mut text = String::new();
    let mut exceeded = 0;
    for (Limit { name, unit, most }, value) in limits.iter().zip(values) {
        let verdict = if value <= *most { "" } else { "  TOO MUCH" };
        exceeded += usize::from(value > *most);
        let _ = writeln!(text, "{name:32} {value:8.2} {unit:3} of {most:5.1}{verdict}");
    }
    (text, exceeded)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODEST: Figures = Figures {
        binary_bytes: 11_000_000,
        ready: Duration::from_millis(400),
        idle: Sample { pss: 9_000_000, cpu: Duration::from_millis(60), written: 0, sent: 300 },
        watched: Duration::from_secs(60),
    };

    #[test]
    fn a_figure_beyond_its_limit_is_told() {
        let (text, exceeded) = MODEST.report();
        assert_eq!(exceeded, 0, "{text}");
        assert!(text.contains("CPU, of one core                     0.10 %   of   0.2\n"), "{text}");
        assert!(text.contains("sent a day beyond the protocol       0.43 MB  of   1.0\n"), "{text}");

        let idle = Sample { written: 4096, ..MODEST.idle };
        let (text, exceeded) = Figures { idle, ready: Duration::from_millis(1_100), ..MODEST }.report();
        assert_eq!(exceeded, 2, "{text}");
        assert!(text.contains("5.90 MB  of   2.0  TOO MUCH\n"), "{text}");
    }
}
