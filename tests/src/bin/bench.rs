//! `cargo xtask bench`: measures the overlay beside what there is without it.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Parser;
use lab::bench::case::{Case, Ground};
use lab::bench::mode::{ACROSS, WITHIN, meaning};
use lab::bench::report::Report;
use lab::bench::rig::Wire;
use lab::bench::{Plan, plot, readme, run, table};

#[derive(Debug, Parser)]
#[command(about = "Measures the overlay beside what there is without it", after_help = modes_in_words())]
struct Arguments {
    /// A first look, in under a minute: fewer rounds, one wire, the main cases
    #[arg(long)]
    quick: bool,
    /// Write the whole run as JSON
    #[arg(long)]
    json: Option<PathBuf>,
    /// Write a picture of the run
    #[arg(long)]
    svg: Option<PathBuf>,
    /// Put the run's table into README.md and its picture into docs/, below this directory
    #[arg(long)]
    readme: Option<PathBuf>,
    #[arg(long)]
    rounds: Option<usize>,
    /// Milliseconds of each measurement
    #[arg(long)]
    time: Option<u64>,
    /// `pass` (super-packets cross the wire whole) or `seg` (cut and joined, as by a network card); both by default
    #[arg(long)]
    wire: Vec<String>,
    /// 1500 or 9000; both by default
    #[arg(long)]
    mtu: Option<u32>,
    /// Names of cases; all by default
    #[arg(long)]
    case: Vec<String>,
    /// Names of modes; all by default
    #[arg(long)]
    mode: Vec<String>,
    /// How many services there are
    #[arg(long)]
    services: Option<u32>,
    /// Only how large everything may become
    #[arg(long)]
    scale: bool,
    /// Only the programs by themselves
    #[arg(long)]
    programs: bool,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let mut report = Report::default();
    // What was measured before something failed took its time, too.
    let ran = run(&plan(&arguments)?, &mut report);
    println!("{}", table::text(&report));
    for (path, text) in [(&arguments.json, report.json()), (&arguments.svg, plot::svg(&report))] {
        if let Some(path) = path {
            std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
            println!("written to {}", path.display());
        }
    }
    ran?;
    if let Some(root) = &arguments.readme {
        readme::write(root, &report)?;
        println!("written to README.md and docs/ of {}", root.display());
    }
    Ok(())
}

fn plan(arguments: &Arguments) -> Result<Plan> {
    let mut plan = if arguments.quick { Plan::quick() } else { Plan::full() };
    plan.rounds = arguments.rounds.unwrap_or(plan.rounds);
    plan.time = arguments.time.map_or(plan.time, Duration::from_millis);
    plan.services = arguments.services.unwrap_or(plan.services);
    if !arguments.mode.is_empty() {
        plan.modes = chosen("mode", &arguments.mode, plan.modes, |mode| mode)?;
    }
    if !arguments.wire.is_empty() {
        let wires = chosen("wire", &arguments.wire, vec![Wire::Pass, Wire::Seg], |wire| wire.name())?;
        plan.grounds = [Ground::PASS, Ground::SEG, Ground::PASS_JUMBO, Ground::SEG_JUMBO].to_vec();
        plan.grounds.retain(|ground| wires.contains(&ground.wire));
    }
    if let Some(mtu) = arguments.mtu {
        plan.grounds.retain(|ground| ground.mtu == mtu);
        if plan.grounds.is_empty() {
            bail!("nothing is measured at an MTU of {mtu}: {} or 9000", Ground::USUAL_MTU);
        }
    }
    if !arguments.case.is_empty() {
        plan.cases = chosen("case", &arguments.case, Case::ALL.to_vec(), |case| case.name())?;
    }
    // Who asks for a part does not wait for the rest.
    let part = arguments.scale || arguments.programs;
    let narrowed = !(arguments.mode.is_empty() && arguments.wire.is_empty() && arguments.case.is_empty());
    if part {
        plan.grounds.clear();
    }
    if part || narrowed {
        (plan.scale, plan.programs) = (arguments.scale, arguments.programs);
    }
    Ok(plan)
}

/// Those of `all` that are named; a name that is none of them is an error.
fn chosen<T: Copy>(what: &str, names: &[String], all: Vec<T>, name: impl Fn(T) -> &'static str) -> Result<Vec<T>> {
    if let Some(wrong) = names.iter().find(|given| all.iter().all(|one| name(*one) != given.as_str())) {
        let known: Vec<_> = all.iter().map(|one| name(*one)).collect();
        bail!("there is no {what} {wrong}: {}", known.join(", "));
    }
    Ok(all.into_iter().filter(|one| names.iter().any(|given| given == name(*one))).collect())
}

fn modes_in_words() -> String {
    let modes = ACROSS.into_iter().chain(WITHIN);
    let lines: Vec<_> = modes.map(|mode| format!("  {mode:<14} {}", meaning(mode))).collect();
    format!("Modes:\n{}", lines.join("\n"))
}
