//! The whole of what a change must pass, in the order in which it is likeliest to fail.

use anyhow::Result;

use crate::{demo, ebpf, lint, setup, test};

pub(crate) fn run() -> Result<()> {
    setup::everything()?;
    ebpf::build()?;
    lint::run()?;
    demo::run()?;
    test::run(&test::Selection::default())
}
