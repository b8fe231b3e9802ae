//! A daemon that dies, fails, panics or is kept waiting at each step of a deployment and of a deletion: afterwards there is what the
//! cluster has, once, and nothing else; and when that is deleted, nothing at all.

use std::fmt;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::chance::Chance;
use super::{Options, Report, check};
use crate::cluster::Deploy;
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
/// A point that is not reached within this time is not on the way.
const REACHED: Duration = Duration::from_secs(15);

struct Case {
    deletes: bool,
    point: String,
    act: &'static str,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {} of a {}", self.act, self.point, if self.deletes { "deletion" } else { "deployment" })
    }
}

fn cases() -> Vec<Case> {
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

/// Runs all of them once, in an order of chance, and prints what happens.
pub fn run(options: &Options) -> Result<Report> {
    println!("steps: seed {}, {:?}", options.seed, options.length);
    let mut lab = Lab::prepare(&Plan::new(1, options.datapath))?;
    let fault = lab.directory().join("fault");
    lab.nodes[0].set("LAB_FAULT", &fault.to_string_lossy());
    lab.nodes[0].start_and_join()?;
    let mut chance = Chance::new(options.seed);
    let mut cases = cases();
    let (begin, most) = (Instant::now(), options.times.unwrap_or(u32::MAX));
    let mut report = Report { seed: options.seed, faults: 0, broken: Vec::new() };
    let mut unreached = 0;
    while !cases.is_empty() && begin.elapsed() < options.length && report.faults < most {
        let case = cases.swap_remove(chance.below(cases.len()));
        let done = strike(&mut lab, &case, report.faults, &fault).with_context(|| format!("{case}"));
        let said = match &done {
            Ok(Some(took)) => format!("well after {:.1} s", took.as_secs_f64()),
            Ok(None) => "not on the way".to_owned(),
            Err(error) => format!("{error:#}"),
        };
        println!("{:>5.0} s  {case}: {said}", begin.elapsed().as_secs_f64());
        unreached += u32::from(matches!(done, Ok(None)));
        report.faults += 1;
        if done.is_err() {
            println!("{}", lab.nodes[0].log());
            report.broken.push(said);
            // What comes next is not to suffer from it.
            let name = name(report.faults - 1);
            let _ = fs::remove_file(&fault);
            let _ = lab.cluster.delete(&name);
            if well(&lab, &name, Some(0), PATIENCE, Instant::now()).is_err() {
                break;
            }
        }
    }
    println!("steps: {} times, {unreached} not on the way, {} not well", report.faults, report.broken.len());
    Ok(report)
}

fn name(number: u32) -> String {
    format!("step{number}")
}

/// How long it took until all was well; `None` where the point is not on the way.
fn strike(lab: &mut Lab, case: &Case, number: u32, fault: &Path) -> Result<Option<Duration>> {
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
    let reached = fs::remove_file(fault).is_err();
    let mut bound = PATIENCE;
    if reached && case.act == "kill" {
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
    Ok(reached.then_some(took))
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
