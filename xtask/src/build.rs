//! `cargo xtask build`: the daemon as it is handed out, for this machine or another.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cross::{Target, Toolchain, directory};
use crate::process;
use crate::{ebpf, elf, setup};

/// The profile of what is handed out.
pub(crate) const PROFILE: &str = "dist";

/// Builds the daemon with the eBPF object in it, installing what is missing, and says where it is and how large.
pub(crate) fn run(target: Target, release: bool) -> Result<PathBuf> {
    ebpf::build()?;
    let toolchain = toolchain(target)?;
    let profile = if release { PROFILE } else { "dev" };
    let mut build = toolchain.cargo("build");
    build.args(["--package", "node-engine", "--bins", "--profile", profile]);
    process::run(&mut build)?;
    let binary = binary(target, release);
    println!("{}", describe(&binary)?);
    Ok(binary)
}

/// The toolchain for the target, installed if need be.
pub(crate) fn toolchain(target: Target) -> Result<Toolchain> {
    setup::cross(target)?;
    Toolchain::find(target)
}

/// Where the daemon for a target is.
pub(crate) fn binary(target: Target, release: bool) -> PathBuf {
    directory().join(target.triple()).join(if release { PROFILE } else { "debug" }).join("node-engine")
}

fn describe(binary: &Path) -> Result<String> {
    let size = fs::metadata(binary).with_context(|| format!("{} was not built", binary.display()))?.len();
    let linkage = if elf::is_static(binary)? { "static" } else { "dynamic" };
    Ok(format!("{}: {:.2} MB, {linkage}", binary.display(), size as f64 / 1e6))
}
