//! What must hold before a change is looked at.

use anyhow::Result;

use crate::process::{self, cargo};
use crate::{ebpf, setup, tidy};

pub(crate) fn run() -> Result<()> {
    setup::linters()?;
    process::run(cargo().args(["fmt", "--all", "--check"]))?;
    tidy::run()?;
    process::run(
        cargo()
            .args(["clippy", "--workspace", "--exclude", "netmanager-ebpf", "--all-targets"])
            .args(["--", "-D", "warnings"]),
    )?;
    ebpf::clippy()
}
