//! A daemon that dies, fails, panics or is kept waiting at each step of a deployment and of a deletion: afterwards there is what the
//! cluster has, once, and nothing else; and when that is deleted, nothing at all.

use std::fmt;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::chance::Chance;
use super::{Options, Report, check};
use crate::cluster::{Deploy, json};
use crate::topology::{Lab, Plan};

/// Effects in the order of a deployment, as the daemon names them; each before it is done, and done and not known to be.
const DEPLOY: [&str; 7] = ["stored", "prepare", "attach", "veth", "carry", "ports", "start"];
const DELETE: [&str; 5] = ["stored", "stop", "detach", "veth", "ports"];
const ACTS: [&str; 4] = ["kill", "error", "panic", "delay"];

/// A daemon that has died is started again and has put everything right within this time, which counts from its start.
const BOUND: Duration = Duration::from_secs(5);
/// What a container is given to end, and those of the lab do not end before.
const GRACE: Duration = Duration::from_secs(10);
/// What has not died may first find out: a container is given ten seconds to end, and a deployment that failed is repeated.
const PATIENCE: Duration = Duration::from_secs(40);
/// A daemon is killed at most so many milliseconds after it was told something.
const WITHIN: usize = 2_500;
/// A point that is not reached within this time is not on the way.
const REACHED: Duration = Duration::from_secs(15);

/// Where a daemon is disturbed, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    pub deletes: bool,
    pub point: String,
    /// One of `kill`, `error`, `panic`, `delay`.
    pub act: &'static str,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {} of a {}", self.act, self.point, if self.deletes { "deletion" } else { "deployment" })
    }
}

/// All there are.
pub fn cases() -> Vec<Case> {
    let points = |deletes: bool| {
        let names = if deletes { DELETE.as_slice() } else { DEPLOY.as_slice() };
        names.iter().flat_map(move |name| {
            // What is on the disk is done.
            let done = (*name != "stored").then(|| format!("{name}-done"));
            [Some((*name).to_owned()), done].into_iter().flatten().map(move |point| (deletes, point))
        })
    };
    let all = points(false).chain(points(true));
    all.flat_map(|(deletes, point)| ACTS.map(|act| Case { deletes, point: point.clone(), act })).collect()
}

/// Runs these once, in an order of chance, and prints what happens.
pub fn run(options: &Options, mut cases: Vec<Case>) -> Result<Report> {
    println!("steps: seed {}, {:?}", options.seed, options.length);
    let mut lab = Lab::prepare(&Plan::new(1, options.datapath))?;
    let fault = lab.directory().join("fault");
    lab.nodes[0].set("LAB_FAULT", &fault.to_string_lossy());
    lab.nodes[0].start_and_join()?;
    let mut chance = Chance::new(options.seed);
    let (begin, most) = (Instant::now(), options.times.unwrap_or(u32::MAX));
    let mut report = Report { seed: options.seed, faults: 0, broken: Vec::new() };
    while !cases.is_empty() && begin.elapsed() < options.length && report.faults < most {
        let case = cases.swap_remove(chance.below(cases.len()));
        let done = strike(&mut lab, &case, report.faults, &fault).with_context(|| format!("{case}"));
        let _ = fs::remove_file(&fault);
        if !told(&lab, &mut report, &format!("{:>5.0} s  {case}", begin.elapsed().as_secs_f64()), done) {
            break;
        }
    }
    println!("steps: {} times, {} not well", report.faults, report.broken.len());
    Ok(report)
}

/// Kills the daemon at a moment of chance after it was told to deploy or to delete, again and again, and prints what happens.
pub fn moments(options: &Options) -> Result<Report> {
    println!("moments: seed {}, {:?}", options.seed, options.length);
    let mut lab = Lab::start(&Plan::new(1, options.datapath))?;
    let mut chance = Chance::new(options.seed);
    let (begin, most) = (Instant::now(), options.times.unwrap_or(u32::MAX));
    let mut report = Report { seed: options.seed, faults: 0, broken: Vec::new() };
    while begin.elapsed() < options.length && report.faults < most {
        let (deletes, moment) = (chance.below(2) == 1, Duration::from_millis(chance.below(WITHIN) as u64));
        let what =
            format!("killed {} ms into a {}", moment.as_millis(), if deletes { "deletion" } else { "deployment" });
        let done = interrupt(&mut lab, deletes, moment, report.faults).with_context(|| what.clone());
        if !told(&lab, &mut report, &format!("{:>5.0} s  {what}", begin.elapsed().as_secs_f64()), done) {
            break;
        }
    }
    println!("moments: {} times, {} not well", report.faults, report.broken.len());
    Ok(report)
}

/// Prints and counts what came of one. False where the next could not be told from it.
fn told(lab: &Lab, report: &mut Report, what: &str, done: Result<Duration>) -> bool {
    let said = match &done {
        Ok(took) => format!("well after {:.1} s", took.as_secs_f64()),
        Err(error) => format!("{error:#}"),
    };
    println!("{what}: {said}");
    report.faults += 1;
    if done.is_ok() {
        return true;
    }
    println!("{}", lab.nodes[0].log());
    report.broken.push(said);
    // What comes next is not to suffer from it.
    let name = name(report.faults - 1);
    let _ = lab.cluster.delete(&name);
    well(lab, &name, Some(0), PATIENCE, Instant::now()).is_ok()
}

fn interrupt(lab: &mut Lab, deletes: bool, moment: Duration, number: u32) -> Result<Duration> {
    let name = name(number);
    let deploy = Deploy { name: &name, ports: &["8080:80"], ..Deploy::default() };
    if deletes {
        lab.deploy(&deploy, 1)?;
        well(lab, &name, Some(1), PATIENCE, Instant::now())?;
        lab.cluster.delete(&name)?;
    } else {
        lab.cluster.deploy(&deploy)?;
    }
    thread::sleep(moment);
    lab.nodes[0].kill()?;
    lab.nodes[0].start()?;
    let from = Instant::now();
    let took =
        if deletes { well(lab, &name, Some(0), BOUND + GRACE, from)? } else { well(lab, &name, None, BOUND, from)? };
    if !deletes {
        lab.cluster.delete(&name)?;
        well(lab, &name, Some(0), PATIENCE, Instant::now())?;
    }
    Ok(took)
}

fn name(number: u32) -> String {
    // Of one length: none is part of another.
    format!("step{number:03}")
}

/// How long it took until all was well.
fn strike(lab: &mut Lab, case: &Case, number: u32, fault: &Path) -> Result<Duration> {
    let name = name(number);
    let deploy = Deploy { name: &name, ports: &["8080:80"], ..Deploy::default() };
    if case.deletes {
        lab.deploy(&deploy, 1)?;
        well(lab, &name, Some(1), PATIENCE, Instant::now())?;
    }
    fs::write(fault, format!("{} {}\n", case.point, case.act)).context("cannot write the fault")?;
    if case.deletes {
        lab.cluster.delete(&name)?;
    } else {
        lab.cluster.deploy(&deploy)?;
    }
    let asked = Instant::now();
    while fault.exists() && asked.elapsed() < REACHED {
        thread::sleep(Duration::from_millis(10));
    }
    ensure!(fs::remove_file(fault).is_err(), "the daemon does not come by this point within {REACHED:?}");
    let mut bound = PATIENCE;
    if case.act == "kill" {
        lab.nodes[0].ends()?;
        lab.nodes[0].start()?;
        let stops = case.deletes && ["stored", "stop"].contains(&case.point.as_str());
        bound = if stops { BOUND + GRACE } else { BOUND };
    }
    let from = Instant::now();
    // What the cluster has been told to have failed it may try again or not.
    let took = well(lab, &name, if case.deletes { Some(0) } else { None }, bound, from)?;
    if !case.deletes {
        lab.cluster.delete(&name)?;
        well(lab, &name, Some(0), PATIENCE, Instant::now())?;
    }
    Ok(took)
}

/// Waits until the node has what the cluster has, and the cluster so many of this service; `None`: as many as it likes, that neither
/// come nor go.
fn well(lab: &Lab, name: &str, count: Option<usize>, bound: Duration, from: Instant) -> Result<Duration> {
    // Even where it takes too long it is waited for, to tell late from never.
    let mut late = None;
    loop {
        let amiss = amiss(lab, name, count).unwrap_or_else(|error| vec![format!("{error:#}")]);
        let took = from.elapsed();
        match (amiss.is_empty(), late) {
            (true, None) => return Ok(took),
            (true, Some(what)) => anyhow::bail!("well after {took:?} only: {what}"),
            (false, _) if took > bound + PATIENCE => anyhow::bail!("never well again: {}", amiss.join("; ")),
            (false, None) if took > bound => late = Some(amiss.join("; ")),
            (false, before) => {
                late = before;
                thread::sleep(Duration::from_millis(100));
            }
        }
    }
}

fn amiss(lab: &Lab, name: &str, count: Option<usize>) -> Result<Vec<String>> {
    let rows = lab.cluster.instances()?;
    let of_it: Vec<_> = rows.iter().filter(|row| row.short() == name).collect();
    let mut amiss = check::alone(&lab.nodes[0], &rows)?;
    let settled = of_it.iter().all(|row| ["RUNNING", "FAILED", "DEAD"].contains(&row.status.as_str()));
    if !settled || count.is_some_and(|count| of_it.len() != count) {
        amiss.push(format!("the cluster has {of_it:?}"));
    }
    if count == Some(0) {
        // What it goes on to do would meet the next fault.
        let known: Vec<serde_json::Value> = json(lab.nodes[0].client()?.args(["ps", "--local", "--json"]))?;
        amiss.extend(
            known.iter().filter(|known| known.to_string().contains(name)).map(|known| format!("the node has {known}")),
        );
    }
    Ok(amiss)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_point_has_every_act() {
        let cases = cases();
        assert_eq!(cases.len(), ACTS.len() * (2 * (DEPLOY.len() + DELETE.len()) - 2));
        assert!(cases.iter().any(|case| case.to_string() == "kill at veth-done of a deployment"));
        assert!(!cases.iter().any(|case| case.point == "stored-done"));
    }
}
