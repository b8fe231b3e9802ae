//! Which datapath this machine gets.

use std::fmt;
use std::sync::Arc;

use super::ladder::Ladder;
use super::{Datapath, DatapathError, Underlay};
use crate::config::DatapathChoice;
use crate::notify::FdStore;

/// A datapath at work.
pub struct Chosen {
    pub datapath: Arc<dyn Datapath>,
    /// Why it is not a faster one; empty where it is the fastest.
    pub reason: String,
}

impl fmt::Debug for Chosen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chosen").field("datapath", &self.datapath.name()).field("reason", &self.reason).finish()
    }
}

/// Starts the datapath that was asked for; with `Auto` the fastest that really loads and attaches. Packets flow as soon as tables are
/// applied. `kept`: what the service manager has kept of an earlier run, and shall keep for the next.
///
/// # Errors
/// The one asked for does not work here; with `Auto`, not even TUN does.
pub async fn choose(choice: DatapathChoice, underlay: &Underlay, kept: Arc<FdStore>) -> Result<Chosen, DatapathError> {
    let ladder = Ladder::open(choice, underlay, kept)?;
    let reason = ladder.standing().reason;
    Ok(Chosen { datapath: Arc::new(ladder), reason })
}
