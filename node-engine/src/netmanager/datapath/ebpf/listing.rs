//! The kernel's flows, for people to look at: read beside the slow path, because a full table takes a hundred thousand system calls.

use std::fmt;

use aya::maps::{HashMap, MapData};
use netmanager_common::MAX_FLOWS;
use netmanager_common::abi::{Flow, FlowKey};

use super::maps::open;
use super::pins::Pins;
use crate::netmanager::datapath::flows::now;
use crate::netmanager::datapath::{DatapathError, FlowRow};

/// A handle of its own to the map of flows.
pub(in crate::netmanager::datapath) struct KernelFlows(HashMap<MapData, FlowKey, Flow>);

impl KernelFlows {
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        open(pins, "FLOWS").map(Self)
    }

    /// A walk begins anew where the row it stands on is removed under it: it is bounded, and no flow is told twice.
    pub(in crate::netmanager::datapath) fn read(&self) -> Result<Vec<FlowRow>, DatapathError> {
        let rows = self.rows()?;
        let now = now();
        let mut rows: Vec<FlowRow> = rows.iter().filter_map(|(key, flow)| FlowRow::chosen(key, flow, now)).collect();
        rows.sort_unstable();
        rows.dedup();
        Ok(rows)
    }

    /// All rows. Some may be there twice where others went meanwhile.
    pub(in crate::netmanager::datapath) fn rows(&self) -> Result<Vec<(FlowKey, Flow)>, DatapathError> {
        let walk: Result<_, _> = self.0.iter().take(MAX_FLOWS as usize).collect();
        walk.map_err(|error| DatapathError::Step { step: "read map", reason: format!("FLOWS: {error}") })
    }
}

impl fmt::Debug for KernelFlows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelFlows").finish_non_exhaustive()
    }
}
