//! Takes back everything that node-engine has made on this machine, in the reverse of the order in which it is made.

use crate::config::Config;

pub(super) async fn run(_config: &Config, _purge: bool) -> anyhow::Result<()> {
    Ok(())
}
