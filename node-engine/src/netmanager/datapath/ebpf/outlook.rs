//! What a start of this program would change in the kernel, without changing it.

use std::path::Path;

use aya::EbpfLoader;
use aya::programs::ProgramInfo;

use super::hooks::{Hook, classifier};
use super::inherit::layout_of;
use super::layout::{self, differences};
use super::pins::Pins;
use super::reason::{reason, unsupported};
use super::{OBJECT, maps, present};
use crate::netmanager::datapath::Capacity;

/// What is pinned, and what would be.
#[derive(Clone, Debug, Default)]
pub struct Outlook {
    /// The layout that carries packets now; `None` where none does.
    pub pinned: Option<String>,
    pub own: String,
    /// How rows differ; `None` where those that are pinned are not described.
    pub rows: Option<Vec<String>>,
    pub programs: Vec<(&'static str, Change)>,
}

/// What becomes of a program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Same,
    Replaced,
    /// None is pinned.
    New,
    /// The kernel does not take it, for this reason.
    Refused(String),
}

/// Looks at the pins, and has the verifier look at our programs.
pub fn outlook(pin_dir: &Path, capacity: Capacity) -> Outlook {
    let own = Pins::at(pin_dir, capacity);
    let candidates = own.others().into_iter().chain([own.clone()]);
    let pinned = candidates.filter(|pins| pins.in_use() && !pins.handed_over()).max_by_key(|pins| pins.links().len());
    let rows = match &pinned {
        Some(pins) => {
            layout_of(pins).map(|theirs| differences(&theirs, &layout::read(&layout::own()).unwrap_or_default()))
        }
        None => Some(Vec::new()),
    };
    Outlook {
        own: own.name().to_owned(),
        rows,
        programs: Hook::ALL.into_iter().map(|hook| hook.program()).zip(changes(pinned.as_ref())).collect(),
        pinned: pinned.map(|pins| pins.name().to_owned()),
    }
}

fn changes(pinned: Option<&Pins>) -> Vec<Change> {
    let loaded = present(OBJECT).map_err(|error| error.to_string()).and_then(|()| {
        let mut loader = EbpfLoader::new();
        // Nothing is kept in them.
        for map in maps::PINNED {
            loader.map_max_entries(map, 1);
        }
        loader.load(OBJECT).map_err(|error| unsupported("load programs", &error).to_string())
    });
    let mut programs = match loaded {
        Ok(programs) => programs,
        Err(reason) => return Hook::ALL.map(|_| Change::Refused(reason.clone())).into(),
    };
    let mut change = |hook: Hook| {
        let ours = classifier(&mut programs, hook).map_err(|error| error.to_string()).and_then(|program| {
            program.load().map_err(|error| unsupported("load programs", &error).to_string())?;
            program.info().map(|info| info.tag()).map_err(|error| reason(&error))
        });
        let theirs = pinned.and_then(|pins| ProgramInfo::from_pin(pins.program(hook.program())).ok());
        match (ours, theirs.map(|info| info.tag())) {
            (Err(reason), _) => Change::Refused(reason),
            (Ok(_), None) => Change::New,
            (Ok(ours), Some(theirs)) if ours == theirs => Change::Same,
            (Ok(_), Some(_)) => Change::Replaced,
        }
    };
    Hook::ALL.into_iter().map(&mut change).collect()
}
