//! What became of the flows for which each slot was chosen, in the kernel's maps. Whoever reads has a handle of its own, so that many
//! slots are read beside the slow path.

use std::fmt;

use aya::maps::{Array, MapData};
use netmanager_common::abi::Answers;

use super::maps::open;
use super::pins::Pins;
use crate::netmanager::datapath::{DatapathError, Tally};

pub(in crate::netmanager::datapath) struct Tallies {
    chosen: Array<MapData, u64>,
    answers: Array<MapData, Answers>,
}

impl Tallies {
    pub(super) fn open(pins: &Pins) -> Result<Self, DatapathError> {
        Ok(Self { chosen: open(pins, "CHOSEN")?, answers: open(pins, "ANSWERS")? })
    }

    pub(in crate::netmanager::datapath) fn read(&self, slot: u32) -> Tally {
        Tally { chosen: self.chosen.get(&slot, 0).unwrap_or(0), answers: self.answers(slot) }
    }

    /// Connections that were asked for, and refused, whoever was chosen.
    pub(in crate::netmanager::datapath) fn asked(&self) -> u64 {
        let Answers { asked, refused, .. } = self.answers(0);
        u64::from(asked.wrapping_add(refused))
    }

    /// The kernel's programs may count at this moment, too: then two count as one.
    pub(super) fn chosen(&mut self, slot: u32, tcp: bool) {
        let chosen = self.chosen.get(&slot, 0).unwrap_or(0);
        let _ = self.chosen.set(slot, chosen + 1, 0);
        if tcp {
            for index in [0, slot] {
                let answers = self.answers(index);
                let _ = self.answers.set(index, Answers { asked: answers.asked.wrapping_add(1), ..answers }, 0);
            }
        }
    }

    pub(super) fn answered(&mut self, slot: u32, refused: bool) {
        let mut answers = self.answers(slot);
        let count = if refused { &mut answers.refused } else { &mut answers.answered };
        *count = count.wrapping_add(1);
        let _ = self.answers.set(slot, answers, 0);
    }

    /// What other tables have counted.
    pub(super) fn put(&mut self, slot: u32, tally: &Tally) {
        let _ = self.chosen.set(slot, tally.chosen, 0);
        let _ = self.answers.set(slot, tally.answers, 0);
    }

    /// Another instance is in the slot, or none.
    pub(super) fn clear(&mut self, slot: u32) {
        let _ = self.chosen.set(slot, 0, 0);
        let _ = self.answers.set(slot, Answers::default(), 0);
    }

    fn answers(&self, slot: u32) -> Answers {
        self.answers.get(&slot, 0).unwrap_or_default()
    }
}

impl fmt::Debug for Tallies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tallies").finish_non_exhaustive()
    }
}
