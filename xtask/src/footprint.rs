//! `cargo xtask footprint`: what the daemon, as it is handed out, costs a machine on which nothing happens.

use anyhow::Result;

use crate::cross::Target;
use crate::process::{self, cargo};
use crate::{build, setup, test};

pub(crate) fn run(short: bool) -> Result<()> {
    test::require_root()?;
    setup::everything()?;
    let daemon = build::run(Target::own()?, true)?;
    process::run(cargo().args(["build", "--package", "node-engine", "--package", "lab", "--bins"]))?;
    process::run(test::lab().arg("footprint").arg(daemon).args(short.then_some("--short")))
}
