//! The moment at which programs of an earlier run give way to ours, and the way back where ours do not carry.

use std::fs;

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::SchedClassifierLink;
use aya::programs::{ProgramInfo, SchedClassifier};

use super::hooks::{Hook, Hooks, classifier, replace_link};
use super::inherit::{self, Inheritance};
use super::maps::BpfTables;
use super::pins::Pins;
use super::reason::reason;
use super::{filter, raw, trial};
use crate::netmanager::datapath::DatapathError;

impl Hooks {
    /// Has every link of an earlier run lead to our programs, and tries those out.
    ///
    /// # Errors
    /// They do not carry packets as the law says. Then the links lead to the programs of before, over the maps of before.
    pub(super) fn carry_on(
        &mut self,
        inheritance: Option<&Inheritance>,
        tables: &mut BpfTables,
    ) -> Result<(), DatapathError> {
        let own = self.pins.clone();
        let all: Vec<Pins> = std::iter::once(own.clone()).chain(own.others()).collect();
        // Again: loading takes the verifier a while. What is left then is a few milliseconds.
        told(inheritance.map_or(Ok(()), |from| from.copy_flows(&own)));
        // Only what instances send opens flows.
        let mut links: usize = all.iter().map(|from| self.take_links(from, true)).sum();
        if let Some(from) = inheritance {
            raw::all_have_ended();
            told(from.copy_flows(&own));
        }
        links += all.iter().map(|from| self.take_links(from, false)).sum::<usize>();
        let tried = trial::run(&mut self.programs, tables);
        // The same programs over the same rows would be no better: the rows are about to be written anew.
        let same = inheritance.is_none() && Hook::ALL.into_iter().all(|hook| self.same_as_before(hook));
        if let (true, Err(reason)) = (same, &tried) {
            tracing::warn!(reason, "packets of flows under way are not carried as they should be");
        }
        let Err(reason) = tried.or_else(|reason| if same { Ok(()) } else { Err(reason) }) else {
            if let Some(inheritance) = inheritance {
                told(inheritance.copy_services(&own));
                told(inheritance.from.hand_over());
                tracing::info!(
                    from = inheritance.from.name(),
                    to = own.name(),
                    links,
                    "took over the tables of another layout"
                );
            }
            self.forget_programs_before();
            inherit::forget_others(&own);
            return Ok(());
        };
        if links == 0 {
            return Err(DatapathError::Refused(format!("the programs do not carry packets: {reason}")));
        }
        self.go_back(inheritance);
        Err(DatapathError::WentBack(reason))
    }

    /// The number of links that lead to our programs now and are pinned as ours: those of instances, or the others.
    fn take_links(&mut self, from: &Pins, instances: bool) -> usize {
        let mut taken = 0;
        let pins = from.links().into_iter().filter(|pin| (Hook::of_pin(pin) == Some(Hook::Veth)) == instances);
        for pin in pins {
            let path = from.link(&pin);
            let replaced = match Hook::of_pin(&pin) {
                Some(hook) => classifier(&mut self.programs, hook).is_ok_and(|program| replace_link(program, &path)),
                None => filter::take(&mut self.programs, &pin, &path),
            };
            let moved = replaced && (path == self.pins.link(&pin) || fs::rename(&path, self.pins.link(&pin)).is_ok());
            taken += usize::from(moved);
        }
        taken
    }

    fn go_back(&mut self, inheritance: Option<&Inheritance>) {
        let own = self.pins.clone();
        let to = inheritance.map_or(&own, |from| &from.from);
        if let Some(from) = inheritance {
            told(from.return_flows(&own));
        }
        for pin in own.links() {
            let (path, target) = (own.link(&pin), to.link(&pin));
            let returned = Hook::of_pin(&pin).ok_or_else(|| "its program is not kept".to_owned()).and_then(|hook| {
                let program =
                    if inheritance.is_some() { to.program(hook.program()) } else { to.program_before(hook.program()) };
                lead(&program, &path)
            });
            if let Err(reason) = returned {
                tracing::warn!(pin, reason, "a program of before is not at its place again");
                let _ = fs::remove_file(&path);
            } else if path != target {
                let _ = fs::rename(&path, target);
            }
        }
        match inheritance {
            Some(from) => {
                told(from.return_flows(&own));
                own.clear();
            }
            None => self.restore_programs_before(),
        }
    }

    fn same_as_before(&self, hook: Hook) -> bool {
        let tag = |pin| ProgramInfo::from_pin(pin).ok().map(|info| info.tag());
        let [ours, before] = [self.pins.program(hook.program()), self.pins.program_before(hook.program())].map(tag);
        ours.is_some() && ours == before
    }

    fn forget_programs_before(&self) {
        for hook in Hook::ALL {
            let _ = fs::remove_file(self.pins.program_before(hook.program()));
        }
    }

    fn restore_programs_before(&self) {
        for hook in Hook::ALL {
            let _ = fs::rename(self.pins.program_before(hook.program()), self.pins.program(hook.program()));
        }
    }
}

/// Updates the pinned link to the pinned program.
fn lead(program: &std::path::Path, link: &std::path::Path) -> Result<(), String> {
    let mut program = SchedClassifier::from_pin(program).map_err(|error| reason(&error))?;
    let link = PinnedLink::from_pin(link).map_err(|error| reason(&error))?;
    let link = SchedClassifierLink::try_from(FdLink::from(link)).map_err(|error| reason(&error))?;
    let id = program.attach_to_link(link).map_err(|error| reason(&error))?;
    program.take_link(id).map(drop).map_err(|error| reason(&error))
}

/// Packets go on whatever could not be copied; flows may begin anew.
pub(super) fn told(done: Result<(), DatapathError>) {
    if let Err(error) = done {
        tracing::warn!(%error, "not everything of an earlier run could be taken over");
    }
}
