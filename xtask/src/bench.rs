//! `cargo xtask bench`: what an optimised daemon costs, as ratios to plain routing measured in the same run.

use anyhow::Result;

use crate::process::{self, cargo, root};
use crate::{ebpf, setup, test};

pub(crate) fn run(arguments: &[String]) -> Result<()> {
    test::require_root()?;
    setup::everything()?;
    ebpf::build()?;
    // Figures of a debug build would say nothing about the proxy.
    process::run(cargo().args(["build", "--release", "--package", "lab", "--bin", "bench"]))?;
    let mut command = std::process::Command::new(root().join("target/release/bench"));
    process::run(command.current_dir(root()).args(arguments))
}
