//! Which datapath this machine gets.

use std::fmt;
use std::sync::Arc;

use super::ebpf::{Ebpf, retire};
use super::{Datapath, DatapathError, Tun, Underlay};
use crate::config::DatapathChoice;

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

/// Starts the datapath that was asked for; with `Auto` eBPF where it really loads and attaches, else TUN. Packets flow as soon as
/// tables are applied.
///
/// # Errors
/// The one asked for does not work here; with `Auto`, not even TUN does.
pub async fn choose(choice: DatapathChoice, underlay: &Underlay) -> Result<Chosen, DatapathError> {
    match choice {
        DatapathChoice::Ebpf => Ok(Chosen { datapath: Arc::new(Ebpf::open(underlay)?), reason: String::new() }),
        DatapathChoice::Tun => tun(underlay, "chosen by configuration".into()),
        DatapathChoice::Auto => match Ebpf::open(underlay) {
            Ok(ebpf) => Ok(Chosen { datapath: Arc::new(ebpf), reason: String::new() }),
            Err(error) => tun(underlay, error.to_string()),
        },
    }
}

fn tun(underlay: &Underlay, reason: String) -> Result<Chosen, DatapathError> {
    let tun = Tun::open(underlay)?;
    // Programs of an earlier run would go on by tables that nobody keeps any more.
    for error in retire(&underlay.pin_dir) {
        tracing::warn!(%error, "what an earlier eBPF datapath left could not be removed");
    }
    Ok(Chosen { datapath: Arc::new(tun), reason })
}
