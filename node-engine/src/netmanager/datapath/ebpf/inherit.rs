//! Taking over from a program whose rows are laid out otherwise, or whose tables are of another size, while its programs carry packets.
//!
//! ```text
//!   its pins                        ours
//!   maps, programs, links           maps, filled from its but for services; programs, loaded
//!                                   flows that came meanwhile
//!   links at uplinks                links of instances, each updated to our program and then its pin moved
//!                                   flows that came until then: from here on nobody opens any
//!   maps, programs                  the other links
//!                                   a packet through our programs: if that fails, all of it in reverse
//!                                   services: from here on we open flows
//!   HANDED_OVER
//!   nothing
//! ```
//!
//! A flow that neither has a row of is decided by nobody in between: over tables without services our programs leave its packets to the
//! TUN device and the tunnel's socket, which are open by then and keep them until the proxy reads. Those that the other has opened are in
//! our tables before anything comes back on them: that comes by an uplink, or from an instance, whose packets wait as well.
//!
//! Where a daemon dies in between, what there is tells the next one, of whichever version, how far it came: whoever has no links has
//! nothing that is in use, and begins anew; whoever has some goes on with what the other has left. A packet is at each moment the one
//! program's or the other's.

use std::fs;
use std::path::Path;

use aya::maps::{Array, Map, MapData};
use netmanager_common::abi::{FLOW_CACHED, Flow};
use netmanager_common::layout::{FLOWS, SERVICES, TABLES};

use super::layout::{self, Layout, Translation};
use super::pins::Pins;
use super::raw::{ANY, NEW, RawMap};
use crate::netmanager::datapath::{DatapathError, pod};

/// The pinned description, and the longest that there can be.
const DESCRIPTION: &str = "LAYOUT";
const LONGEST: usize = 8_192;
type Text = [u8; LONGEST];

/// What an earlier run has left by another layout.
#[derive(Debug)]
pub(super) struct Inheritance {
    pub(super) from: Pins,
    layout: Layout,
}

/// Leaves the description of our rows beside them.
pub(super) fn describe(pins: &Pins) -> Result<(), DatapathError> {
    let pin = pins.map(DESCRIPTION);
    if pin.exists() {
        return Ok(());
    }
    let own = layout::own();
    let mut text: Text = [0; LONGEST];
    text.get_mut(..own.len()).ok_or_else(|| step("describe rows", "too long"))?.copy_from_slice(own.as_bytes());
    let map = Array::<MapData, Text>::create(1, 0).and_then(|mut map| map.set(0, text, 0).map(|()| map));
    let map = map.map_err(|error| step("describe rows", error))?;
    map.pin(&pin).map_err(|error| step("describe rows", error))
}

/// The layout of these pins: as their description says; what has none is of the third version.
pub(super) fn layout_of(pins: &Pins) -> Option<Layout> {
    let pin = pins.map(DESCRIPTION);
    if !pin.exists() {
        return layout::read(layout::THREE);
    }
    let map = MapData::from_pin(pin).and_then(Map::from_map_data).ok()?;
    let text: Text = Array::<_, Text>::try_from(map).ok()?.get(&0, 0).ok()?;
    let text = String::from_utf8(text.into_iter().take_while(|byte| *byte != 0).collect()).ok()?;
    layout::read(&text)
}

/// What there is to take over, looked at before our own maps are made. What is left of an attempt that was cut short goes.
pub(super) fn find(pins: &Pins) -> Option<Inheritance> {
    let others = pins.others().into_iter().filter(|other| other.in_use() && !other.handed_over());
    let from = others.max_by_key(|other| other.links().len())?;
    let Some(layout) = layout_of(&from) else {
        tracing::warn!(pins = from.name(), "rows of an earlier run are not described: flows begin anew");
        return None;
    };
    if pins.links().is_empty() {
        pins.clear();
    }
    Some(Inheritance { from, layout })
}

impl Inheritance {
    /// Fills our maps, but for services.
    pub(super) fn copy_all(&self, pins: &Pins) -> Result<(), DatapathError> {
        let own = own();
        for table in TABLES.iter().filter(|table| ![FLOWS, SERVICES].contains(&table.name)) {
            copy(&self.from, &self.layout, pins, &own, table.name, |_, _| true)?;
        }
        self.copy_flows(pins)
    }

    /// Copies what our programs need to open flows.
    pub(super) fn copy_services(&self, pins: &Pins) -> Result<(), DatapathError> {
        copy(&self.from, &self.layout, pins, &own(), SERVICES, |_, _| false)
    }

    /// Copies the flows that we have not, or have decided otherwise: the other has seen them first.
    pub(super) fn copy_flows(&self, pins: &Pins) -> Result<(), DatapathError> {
        copy(&self.from, &self.layout, pins, &own(), FLOWS, |theirs, ours| {
            let row = |bytes| pod::row::<Flow>(bytes);
            let (Some(theirs), Some(ours)) = (row(theirs), row(ours)) else { return false };
            theirs.kind != FLOW_CACHED && (theirs.slot, theirs.generation) != (ours.slot, ours.generation)
        })
    }

    /// The way back: flows that only we have seen become the other's.
    pub(super) fn return_flows(&self, pins: &Pins) -> Result<(), DatapathError> {
        copy(pins, &own(), &self.from, &self.layout, FLOWS, |_, _| false)
    }
}

fn own() -> Layout {
    layout::read(&layout::own()).unwrap_or_default()
}

/// Copies the rows of one map. `wins`: whether a row replaces the one that is there.
fn copy(
    from: &Pins,
    from_layout: &Layout,
    to: &Pins,
    to_layout: &Layout,
    name: &'static str,
    wins: impl Fn(&[u8], &[u8]) -> bool,
) -> Result<(), DatapathError> {
    let (Some((from_key, from_value)), Some((to_key, to_value))) = (from_layout.get(name), to_layout.get(name)) else {
        return Ok(());
    };
    let failed = |error: std::io::Error| step("take over rows", format!("{name}: {error}"));
    // A version that has no such map leaves nothing of it.
    if !from.map(name).exists() {
        return Ok(());
    }
    let (source, target) = (open(&from.map(name)).map_err(failed)?, open(&to.map(name)).map_err(failed)?);
    if source.sizes() != (from_key.size, from_value.size) || target.sizes() != (to_key.size, to_value.size) {
        return Err(step("take over rows", format!("{name}: rows are not as long as they are described")));
    }
    let (keys, values) = (Translation::new(from_key, to_key), Translation::new(from_value, to_value));
    let copied = source.each(|key, value| {
        let (key, value) = (keys.of(key), values.of(value));
        if target.array {
            // Tables may be smaller now.
            let there = index(&key).is_some_and(|index| index < target.rows);
            return if there { target.set(&key, &value, ANY) } else { Ok(()) };
        }
        match target.set(&key, &value, NEW) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => match target.get(&key) {
                Some(ours) if wins(&value, &ours) => target.set(&key, &value, ANY),
                _ => Ok(()),
            },
            other => other,
        }
    });
    match copied {
        Err(error) if error.raw_os_error() == Some(libc::E2BIG) => Ok(()),
        other => other.map_err(failed),
    }
}

fn open(pin: &Path) -> std::io::Result<RawMap> {
    RawMap::open(pin)
}

fn index(key: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(key.try_into().ok()?))
}

/// The rows of others are of no use any more.
pub(super) fn forget_others(pins: &Pins) {
    for other in pins.others() {
        // Without this a half-removed one is nobody's inheritance.
        let _ = fs::remove_file(other.map("CONFIG"));
        other.clear();
    }
}

fn step(step: &'static str, reason: impl ToString) -> DatapathError {
    DatapathError::Step { step, reason: reason.to_string() }
}
