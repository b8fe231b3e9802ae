//! `cargo xtask soak`: what survives, and what it costs.

use anyhow::{Context, Result};
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
    /// docker-stop, docker-kill, cluster, uplink, filter, veth, bridge, datagrams, commands; or upgrade: daemons whose rows
    /// in the kernel are laid out otherwise take over from each other; docker-hang (a minute), docker-away (two); descriptors: the
    /// daemon gets no more; line-loses-5, line-loses-30, line-doubles, line-delays, line-crawls, line-mute, line-deaf, line-half-open:
    /// between a node and the broker. Or undo: a daemon that dies while it sets up or deploys, and what it has made is undone; or
    /// steps: it dies, fails, panics and waits at each step of a deployment and of a deletion; moments: it dies at any moment of
    /// either; or load: no fault, but as many instances as a node takes
    #[arg(long)]
    only: Option<String>,
    /// The daemon of `--only load`, where it is not this build's: as it is handed out, say
    #[arg(long)]
    daemon: Option<std::path::PathBuf>,
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
    if options.only.as_deref() == Some("upgrade") {
        other_layout()?;
    }
    test::build_programs()?;
    let mut command = test::lab();
    command.args(["soak", "--minutes", &options.minutes.to_string(), "--seed", &options.seed.to_string()]);
    command.args(["--datapath", &options.datapath]);
    if let Some(only) = &options.only {
        command.args(["--only", only]);
    }
    if let Some(daemon) = &options.daemon {
        command.arg("--daemon").arg(daemon);
    }
    if let Some(times) = options.times {
        command.args(["--times", &times.to_string()]);
    }
    process::run(command.args(options.verbose.then_some("--verbose")))
}

/// The daemon of another version, as far as rows are concerned, beside the usual one.
fn other_layout() -> Result<()> {
    let object = ebpf::build_other_layout()?;
    let mut command = process::cargo();
    command.args(["build", "--package", "node-engine", "--bins", "--features", "other-layout"]);
    process::run(command.env("NODE_ENGINE_EBPF_OBJECT", object))?;
    let programs = process::root().join("target/debug");
    std::fs::copy(programs.join("node-engine"), programs.join("node-engine-other")).context("keep the other daemon")?;
    Ok(())
}
