//! `cargo xtask soak`: its options, as pairs of a name and a value.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use lab::node::Datapath;
use lab::soak::{self, Options};

/// No faults under traffic: the daemon dies, and what it has made is undone; or it fails at a step, and puts that right.
const UNDO: &str = "undo";
const STEPS: &str = "steps";

pub(crate) fn run(options: &[&str]) -> Result<()> {
    let verbose = options.contains(&"--verbose");
    let options: Vec<&str> = options.iter().copied().filter(|option| *option != "--verbose").collect();
    let (pairs, []) = options.as_chunks::<2>() else { bail!("an option without a value: {options:?}") };
    let mut wanted = Options { verbose, ..Options::default() };
    let mut run: fn(&Options) -> Result<soak::Report> = soak::run;
    for [name, value] in pairs {
        let number = || value.parse::<u64>().with_context(|| format!("{name} {value}: not a number"));
        match *name {
            "--minutes" => wanted.length = Duration::from_secs(60 * number()?),
            "--seconds" => wanted.length = Duration::from_secs(number()?),
            "--seed" => wanted.seed = number()?,
            "--only" if *value == UNDO => run = soak::undo::run,
            "--only" if *value == STEPS => run = soak::steps::run,
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
    run(&wanted)?.verdict()
}
