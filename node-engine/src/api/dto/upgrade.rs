//! What `upgrade --check` says.

use serde::Serialize;

/// What would change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Upgrade {
    /// Of the program that was asked.
    pub version: String,
    /// Of the daemon that runs, if one answers.
    pub running: Option<String>,
    /// What carries packets now, as the daemon says.
    pub datapath: Option<String>,
    pub layout: Layout,
    pub programs: Vec<Program>,
    /// What is odd about the configuration, or wrong.
    pub settings: Vec<String>,
    pub store: String,
    /// No packet and no flow would be lost.
    pub hitless: bool,
    /// Why not.
    pub hindrances: Vec<String>,
}

/// Of the tables in the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Layout {
    /// Absent where nothing is pinned.
    pub pinned: Option<String>,
    pub own: String,
    /// By table, how rows differ.
    pub changes: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Program {
    pub name: String,
    /// `same`, `replaced`, `new` or `refused`.
    pub change: String,
    /// Why it is refused.
    pub reason: String,
}
