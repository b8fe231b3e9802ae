//! A daemon that dies at any moment – while it sets the host up, while instances come or go – and an `uninstall` that may die as well,
//! leave what the next `uninstall` undoes: after each time the host is as it was found.

use std::fmt;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::chance::Chance;
use super::{Options, Report};
use crate::cluster::Deploy;
use crate::node::{Datapath, Node};
use crate::snapshot::Snapshot;
use crate::topology::{Lab, Plan};

/// A daemon has set the host up within this time, and an instance comes or goes within the other.
const START: usize = 600;
const INSTANCE: usize = 1_500;
/// An `uninstall` that is cut short.
const UNDO: usize = 400;

/// What is under way when the daemon dies.
#[derive(Clone, Copy, Debug)]
enum Amid {
    Start,
    Deploy,
    Delete,
}

impl fmt::Display for Amid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Start => "its start",
            Self::Deploy => "a deployment",
            Self::Delete => "a deletion",
        })
    }
}

/// Runs it, and prints what happens. The datapath is another one each time.
pub fn run(options: &Options) -> Result<Report> {
    println!("undo: seed {}, {:?}", options.seed, options.length);
    let mut lab = Lab::prepare(&Plan::new(1, Datapath::Ebpf))?;
    let before = Snapshot::take(&lab.nodes[0].host)?;
    let mut chance = Chance::new(options.seed);
    let (begin, most) = (Instant::now(), options.times.unwrap_or(u32::MAX));
    let mut report = Report { seed: options.seed, faults: 0, broken: Vec::new() };
    while begin.elapsed() < options.length && report.faults < most {
        let number = report.faults;
        lab.nodes[0].set_datapath(if number.is_multiple_of(2) { Datapath::Ebpf } else { Datapath::Tun });
        let amid = [Amid::Start, Amid::Deploy, Amid::Delete][number as usize % 3];
        let what =
            cut_short(&mut lab, amid, number, &mut chance).with_context(|| format!("number {number}, {amid}"))?;
        let mut left = undo(&lab.nodes[0], &before, &mut chance)?;
        let what_is_left = left.iter().map(|one| format!("\n    {one}")).collect::<String>();
        println!("{:>4.0} s  {what}: {} left{what_is_left}", begin.elapsed().as_secs_f64(), left.len());
        if !left.is_empty() {
            left.insert(0, format!("number {number}, {what}:"));
            report.broken.push(left.join("\n    "));
        }
        report.faults += 1;
    }
    println!("undo: {} times, {} not undone", report.faults, report.broken.len());
    Ok(report)
}

/// Has the daemon die amid it, at a moment of chance.
fn cut_short(lab: &mut Lab, amid: Amid, number: u32, chance: &mut Chance) -> Result<String> {
    let name = format!("undo{number}");
    let deploy = Deploy { name: &name, ports: &["8080:80"], ..Deploy::default() };
    let within = match amid {
        Amid::Start => {
            lab.nodes[0].start()?;
            START
        }
        Amid::Deploy => {
            lab.nodes[0].start_and_join()?;
            lab.cluster.deploy(&deploy)?;
            INSTANCE
        }
        Amid::Delete => {
            lab.nodes[0].start_and_join()?;
            lab.deploy(&deploy, 1)?;
            lab.cluster.delete(&name)?;
            INSTANCE
        }
    };
    let moment = chance.below(within);
    thread::sleep(Duration::from_millis(moment as u64));
    lab.nodes[0].kill_at_once()?;
    if matches!(amid, Amid::Deploy) {
        // The next daemon has nothing to do with it.
        lab.cluster.delete(&name)?;
    }
    Ok(format!("killed {moment} ms after {amid} began"))
}

/// What is other than it was before, after it was undone.
fn undo(node: &Node, before: &Snapshot, chance: &mut Chance) -> Result<Vec<String>> {
    if chance.once_in(2) {
        node.uninstall_cut_short(Duration::from_millis(chance.below(UNDO) as u64))?;
    }
    node.uninstall()?;
    Ok(before.difference(&Snapshot::take(&node.host)?))
}
