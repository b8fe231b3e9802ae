//! Commands that this binary looks after itself, without a container engine: each in namespaces and a control group of its own, with its
//! output in a bounded log, watched by a small process that outlives the daemon ([`supervisor`]). Runtimes say what to run; everything
//! that makes it a workload (network, logs, limits, its end, its adoption after a restart) is here.

mod enter;
mod exec;
mod follow;
mod init;
mod keeper;
mod launch;
mod place;
mod records;
mod supervisor;
mod watch;

pub use launch::Launch;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use launch::round_trip;
pub use supervisor::run;

pub(super) use follow::output as follow;
pub(super) use keeper::Keeper;
pub(super) use records::Records;

use std::path::PathBuf;

/// Where supervised instances of one technology are kept.
#[derive(Clone, Debug)]
pub struct Home {
    /// What a reboot forgets: a directory for each instance.
    pub run: PathBuf,
    /// Logs.
    pub logs: PathBuf,
    /// The binary that supervises: this one.
    pub supervisor: PathBuf,
    /// Parent of the control groups.
    pub control_group: String,
}

impl Home {
    /// Directories of `technology` below the daemon's own.
    pub fn new(run_dir: &std::path::Path, state_dir: &std::path::Path, technology: &str, control_group: &str) -> Self {
        Self {
            run: run_dir.join(technology),
            logs: state_dir.join("logs").join(technology),
            supervisor: supervisor::OWN.into(),
            control_group: control_group.to_owned(),
        }
    }
}
