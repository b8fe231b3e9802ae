//! `cargo xtask vm`: each kernel is booted once, and a table says how it went.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use lab::emulator::smoke::{self, Programs, Surroundings};
use lab::emulator::{Kernel, Machine};

pub(crate) fn run(machine: &str, options: &[&str]) -> Result<()> {
    let machine: Machine = machine.parse()?;
    let (pairs, []) = options.as_chunks::<2>() else { bail!("an option without a value: {options:?}") };
    let all = |name: &str| {
        pairs.iter().filter(|[option, _]| *option == name).map(|[_, value]| PathBuf::from(value)).collect()
    };
    let one = |name: &str| -> Result<PathBuf> {
        let values: Vec<PathBuf> = all(name);
        values.into_iter().next().with_context(|| format!("{name} is missing"))
    };
    let programs =
        Programs { daemon: one("--daemon")?, busybox: one("--busybox")?, probe: one("--probe")?, tests: all("--test") };
    let mut rows = Vec::new();
    let kernels: Vec<PathBuf> = all("--kernel");
    let outside = Surroundings::start()?;
    for (directory, number) in kernels.into_iter().zip(50..) {
        let name = directory.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        println!("== {name}");
        let row = smoke::run(&outside, machine, &Kernel { directory }, &programs, number).with_context(|| name)?;
        println!("{}", smoke::table(std::slice::from_ref(&row)));
        for failure in &row.failures {
            println!("{failure}\n");
        }
        rows.push(row);
    }
    println!("{}", smoke::table(&rows));
    let failed = rows.iter().filter(|row| !row.failures.is_empty()).count();
    if failed > 0 {
        bail!("{failed} of {} kernels failed", rows.len());
    }
    Ok(())
}
