//! What outlives the process: who this node is to its cluster ([`Store`]), and what is to run on it ([`Desired`]).
//!
//! The first is some hundred bytes of text that a person may look at. The second changes with every command, a thousand times a second
//! where it must, and is a database. Either is whole after a power cut at any moment, and neither is ever a reason not to start: what
//! cannot be read is kept aside, and made again from what the cluster, the runtimes and the network still know.

mod book;
mod database;
mod desired;
mod identity;
mod record;

use std::path::{Path, PathBuf};

pub use book::{Order, Verdict};
pub use desired::{Desired, Fact};
pub use identity::{Identity, State, Store, StoreError};
pub use record::{Fate, Given, Record};

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use {identity::round_trip as state_round_trip, record::round_trip as record_round_trip};

/// Corrupt files kept aside.
const MOST_ASIDE: u32 = 9;

/// `<name>.corrupt-<n>`, the first that is free; the last is replaced when all are taken.
fn free_name_aside(path: &Path) -> PathBuf {
    let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let name = |number| path.with_file_name(format!("{file}.corrupt-{number}"));
    (1..MOST_ASIDE).map(name).find(|aside| !aside.exists()).unwrap_or_else(|| name(MOST_ASIDE))
}
