//! `cargo xtask bench`: measures the overlay beside what there is without it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use lab::bench::load::Case;
use lab::bench::rig::Wire;
use lab::bench::{Plan, run};

#[derive(Debug, Parser)]
struct Arguments {
    /// A first look: fewer rounds, one wire, the main cases
    #[arg(long)]
    quick: bool,
    /// Write the whole run as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    #[arg(long)]
    rounds: Option<usize>,
    /// Milliseconds of each measurement
    #[arg(long)]
    time: Option<u64>,
    /// `pass` or `seg`; both by default
    #[arg(long)]
    wire: Vec<String>,
    /// Names of cases; all by default
    #[arg(long)]
    case: Vec<String>,
    /// Names of modes; all by default
    #[arg(long)]
    mode: Vec<String>,
    /// How many services there are
    #[arg(long)]
    services: Option<u32>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let mut plan = if arguments.quick { Plan::quick() } else { Plan::full() };
    plan.rounds = arguments.rounds.unwrap_or(plan.rounds);
    plan.time = arguments.time.map_or(plan.time, Duration::from_millis);
    plan.services = arguments.services.unwrap_or(plan.services);
    plan.modes = arguments.mode;
    if !arguments.wire.is_empty() {
        plan.wires = [Wire::Pass, Wire::Seg]
            .into_iter()
            .filter(|wire| arguments.wire.iter().any(|name| name == wire.name()))
            .collect();
    }
    if !arguments.case.is_empty() {
        plan.cases =
            Case::ALL.into_iter().filter(|case| arguments.case.iter().any(|name| name == case.name())).collect();
    }
    let report = run(&plan)?;
    println!("{}", report.table());
    for (pair, cases) in report.ratios() {
        let cases: Vec<_> = cases.iter().map(|(case, ratio)| format!("{case} {ratio:.2}")).collect();
        println!("{pair:<18} {}", cases.join("  "));
    }
    if let Some(path) = arguments.json {
        std::fs::write(&path, report.json()).with_context(|| format!("cannot write {}", path.display()))?;
        println!("written to {}", path.display());
    }
    Ok(())
}
