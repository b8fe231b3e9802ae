//! `cargo xtask soak`: its options, as pairs of a name and a value.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use lab::load;
use lab::node::Datapath;
use lab::soak::{self, Options};

/// No faults under traffic: the daemon dies, and what it has made is undone; or it fails at a step, or dies at any moment, and puts
/// that right.
const UNDO: &str = "undo";
const STEPS: &str = "steps";
const MOMENTS: &str = "moments";
/// No fault at all: as many instances as a node takes.
const LOAD: &str = "load";

pub(crate) fn run(options: &[&str]) -> Result<()> {
    let verbose = options.contains(&"--verbose");
    let options: Vec<&str> = options.iter().copied().filter(|option| *option != "--verbose").collect();
    let (pairs, []) = options.as_chunks::<2>() else { bail!("an option without a value: {options:?}") };
    let mut wanted = Options { verbose, ..Options::default() };
    let mut run: fn(&Options) -> Result<soak::Report> = soak::run;
    let (mut full, mut daemon) = (false, None);
    for [name, value] in pairs {
        let number = || value.parse::<u64>().with_context(|| format!("{name} {value}: not a number"));
        match *name {
            "--minutes" => wanted.length = Duration::from_secs(60 * number()?),
            "--seconds" => wanted.length = Duration::from_secs(number()?),
            "--seed" => wanted.seed = number()?,
            "--only" if *value == UNDO => run = soak::undo::run,
            "--only" if *value == STEPS => run = |options| soak::steps::run(options, soak::steps::cases()),
            "--only" if *value == MOMENTS => run = soak::steps::moments,
            "--only" if *value == LOAD => full = true,
            "--daemon" => daemon = Some(value.into()),
            "--only" => wanted.only = Some(value.parse()?),
            "--times" => wanted.times = Some(u32::try_from(number()?)?),
            "--datapath" => {
                let known = [Datapath::Ebpf, Datapath::Tun];
                wanted.datapath = known
                    .into_iter()
                    .find(|datapath| datapath.name() == *value)
                    .with_context(|| format!("no datapath {value}: ebpf or tun"))?;
            }
            _ => bail!("no option {name}"),
        }
    }
    if full {
        let short = load::run(&load::Options { daemon, datapath: wanted.datapath, ..load::Options::default() })?;
        return if short == 0 { Ok(()) } else { bail!("{short} goals were not reached") };
    }
    run(&wanted)?.verdict()
}
