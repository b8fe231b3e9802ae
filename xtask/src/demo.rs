//! `cargo xtask demo`: prepares what the lab needs and lets it show a cluster on this machine.

use anyhow::Result;

use crate::process;
use crate::{ebpf, setup, test};

pub(crate) fn run() -> Result<()> {
    test::require_root()?;
    setup::everything()?;
    ebpf::build()?;
    test::build_programs()?;
    process::run(test::lab().arg("demo"))
}
