//! What answers in its own time: devices on slow buses, GPU drivers, file systems whose server may be gone. It is asked beside
//! everything else, and until it has answered, what it said last stands: a node that says nothing for half a minute is taken for dead.

use std::time::Duration;

use sysinfo::{DiskRefreshKind, Disks};
use tokio::sync::watch;
use tokio::task::{self, JoinError, JoinHandle};
use tokio::time::timeout;

use super::devices::watch::Inventory;
use super::gpu::Gpus;
use super::roots::Roots;
use super::{health, host};
use crate::model::{DiskUsage, GpuUsage, NodeHealth};

/// Whoever is well answers much sooner.
const PATIENCE: Duration = Duration::from_millis(500);

/// What was said last.
#[derive(Clone, Debug, Default)]
pub(super) struct Known {
    pub(super) disks: Vec<DiskUsage>,
    pub(super) gpus: Vec<GpuUsage>,
    /// What the kernel knows without asking is not in it.
    pub(super) health: NodeHealth,
}

#[derive(Debug)]
pub(super) struct Slow {
    /// `None` while it is asked.
    sources: Option<Sources>,
    asked: Option<JoinHandle<(Sources, Known)>>,
    known: Known,
    silent: bool,
}

#[derive(Debug)]
struct Sources {
    roots: Roots,
    devices: watch::Receiver<Inventory>,
    /// Opened when first asked, which may take its time, too.
    disks: Option<Disks>,
    gpus: Option<Gpus>,
}

impl Slow {
    pub(super) fn new(roots: Roots, devices: watch::Receiver<Inventory>) -> Self {
        let sources = Sources { roots, devices, disks: None, gpus: None };
        Self { sources: Some(sources), asked: None, known: Known::default(), silent: false }
    }

    /// Asks where nothing is asked yet, and waits a moment for the answer.
    pub(super) async fn ask(&mut self) -> Result<&Known, JoinError> {
        if let Some(mut sources) = self.sources.take() {
            self.asked = Some(task::spawn_blocking(move || {
                let known = sources.look();
                (sources, known)
            }));
        }
        let Some(asked) = &mut self.asked else { return Ok(&self.known) };
        match timeout(PATIENCE, asked).await {
            Ok(answer) => {
                self.asked = None;
                let (sources, known) = answer?;
                (self.sources, self.known) = (Some(sources), known);
                if std::mem::take(&mut self.silent) {
                    tracing::info!("sensors, GPUs and file systems have answered again");
                }
            }
            Err(_) if !self.silent => {
                self.silent = true;
                tracing::warn!(
                    "a sensor, a GPU or a mounted file system does not answer at once: what was known of them last is told meanwhile"
                );
            }
            Err(_) => {}
        }
        Ok(&self.known)
    }
}

impl Sources {
    fn look(&mut self) -> Known {
        if self.disks.is_none() {
            self.disks = Disks::new().map_err(|error| tracing::warn!(%error, "disks cannot be read")).ok();
        }
        let disks = self.disks.as_mut().map(|disks| {
            disks.refresh_specifics(true, DiskRefreshKind::nothing().with_storage());
            host::disks(disks)
        });
        let gpus = self.gpus.get_or_insert_with(|| Gpus::open(self.roots.clone())).sample();
        let devices = self.devices.borrow().clone();
        Known { disks: disks.unwrap_or_default(), gpus, health: health::of_hardware(&self.roots, &devices) }
    }
}
