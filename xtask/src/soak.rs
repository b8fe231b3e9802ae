//! `cargo xtask soak`: what survives, and what it costs.

use anyhow::Result;
use clap::Args;

use crate::process;
use crate::{ebpf, setup, test};

#[derive(Debug, Args)]
pub(crate) struct Options {
    /// How long
    #[arg(long, default_value_t = 10)]
    minutes: u32,
    /// The same seed makes the same choices
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// ebpf or tun
    #[arg(long, default_value = "ebpf")]
    datapath: String,
    /// This fault alone, with nothing deployed meanwhile and datagrams as fast as they are answered: kill, terminate, pause,
    /// docker-stop, docker-kill, cluster, uplink, filter, veth, bridge, datagrams, commands; or undo: a daemon that dies while it
    /// sets up or deploys, and what it has made is undone
    #[arg(long)]
    only: Option<String>,
    /// End after so many faults, if that is sooner
    #[arg(long)]
    times: Option<u32>,
    /// Tell of every look that finds something amiss, not only of those that come too late
    #[arg(long, short)]
    verbose: bool,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    test::require_root()?;
    setup::everything()?;
    ebpf::build()?;
    test::build_programs()?;
    let mut command = test::lab();
    command.args(["soak", "--minutes", &options.minutes.to_string(), "--seed", &options.seed.to_string()]);
    command.args(["--datapath", &options.datapath]);
    if let Some(only) = &options.only {
        command.args(["--only", only]);
    }
    if let Some(times) = options.times {
        command.args(["--times", &times.to_string()]);
    }
    process::run(command.args(options.verbose.then_some("--verbose")))
}
