//! The kernel's side of the datapath: programs at each instance's veth and at the uplink, over pinned maps. What they leave alone goes to
//! the TUN device or the tunnel socket, where the proxy carries it over the same maps.
//!
//! Everything is pinned: a daemon that ends, however it ends, leaves programs at work; the next one adopts the maps and replaces the
//! programs in place. The only module that speaks to aya about programs and maps.

mod accounts;
mod filter;
mod handover;
mod hooks;
mod inherit;
mod layout;
mod listing;
mod maps;
mod outlook;
mod pins;
mod raw;
mod reason;
mod tallies;
mod trial;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aya::maps::MapType;
use aya::sys::is_map_supported;
use aya::{EbpfLoader, include_bytes_aligned};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

use self::accounts::Keeper;
use self::hooks::Hooks;
pub(super) use self::hooks::{Hook, interface};
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use self::layout::understand as layouts;
pub(super) use self::listing::KernelFlows;
pub(super) use self::maps::BpfTables;
use self::maps::KernelCounters;
pub use self::outlook::{Change, Outlook, outlook};
use self::pins::Pins;
pub use self::pins::uninstall;
pub(super) use self::pins::{populated, retire, version_name};
use self::reason::unsupported;
use self::tallies::Tallies;
use super::{DatapathError, Port, Underlay};

/// The programs of `netmanager-ebpf`; empty where the build had none.
const OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/netmanager"));

fn present(object: &[u8]) -> Result<(), DatapathError> {
    if object.is_empty() {
        return Err(DatapathError::Refused("no eBPF object in this build: run cargo xtask build-ebpf".into()));
    }
    Ok(())
}

/// The maps of an earlier run, without its programs: all that is wanted where user space carries on.
pub(super) fn inherited(underlay: &Underlay) -> Result<(BpfTables, KernelFlows), DatapathError> {
    let pins = Pins::ensure(&underlay.pin_dir, underlay.capacity)?;
    Ok((BpfTables::open(&pins)?, KernelFlows::open(&pins)?))
}

/// Loaded programs and the maps they share with the proxy.
#[derive(Debug)]
pub(super) struct Kernel {
    hooks: Mutex<Hooks>,
    counters: KernelCounters,
    flows: Arc<KernelFlows>,
    tallies: Arc<Tallies>,
    _keeper: Keeper,
}

impl Kernel {
    /// Loads the programs, and adopts or makes the maps. Nothing is attached. `plain`: without the helpers that came after Linux 5.9.
    ///
    /// # Errors
    /// `Unsupported` with the reason where the kernel, its configuration or the caller's privileges do not allow it. What was made
    /// until then stays pinned, for the next attempt or [`uninstall`].
    pub(super) fn load(underlay: &Underlay, plain: bool) -> Result<(Self, BpfTables), DatapathError> {
        present(OBJECT)?;
        // Asked first: where maps of an earlier run are there, it is late that a missing right is missed, and told in other words.
        is_map_supported(MapType::Array).map_err(|error| unsupported("make maps", &error))?;
        // Kernels before 5.11 count maps against this limit. Where it may not be raised it may still suffice.
        let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);

        let pins = Pins::ensure(&underlay.pin_dir, underlay.capacity)?;
        let inheritance = inherit::find(&pins);
        pins.make()?;
        // Where an attempt was cut short after the first link, our maps are in use already.
        let empty = pins.links().is_empty();
        let mut loader = EbpfLoader::new();
        for (map, rows) in maps::sizes(underlay.capacity) {
            loader.map_max_entries(map, rows);
        }
        for map in maps::PINNED {
            loader.map_pin_path(map, pins.map(map));
        }
        let plain_word = u64::from(plain);
        loader.override_global("PLAIN", &plain_word, true);
        let programs = loader.load(OBJECT).map_err(|error| unsupported("load programs", &error))?;
        let mut tables = BpfTables::open(&pins)?;
        let counters = KernelCounters::open(&pins)?;
        inherit::describe(&pins)?;
        if let Some(inheritance) = inheritance.as_ref().filter(|_| empty) {
            handover::told(inheritance.copy_all(&pins));
        }
        let keeper = Keeper::start(&pins)?;
        let flows = Arc::new(KernelFlows::open(&pins)?);
        let tallies = Arc::new(Tallies::open(&pins)?);
        let mut hooks = Hooks::load(programs, pins, underlay.xdp)?;
        hooks.carry_on(inheritance.as_ref(), &mut tables)?;
        Ok((Self { hooks: Mutex::new(hooks), counters, flows, tallies, _keeper: keeper }, tables))
    }

    pub(super) fn attach(&self, hook: Hook, port: &Port) -> Result<(), DatapathError> {
        self.hooks().attach(hook, port)
    }

    pub(super) fn attach_uplink(&self, port: &Port) -> Result<(), DatapathError> {
        self.hooks().attach_uplink(port)
    }

    pub(super) fn detach(&self, hook: Hook, port: &Port) -> Result<(), DatapathError> {
        self.hooks().detach(hook, port)
    }

    pub(super) fn detach_all(&self) -> Result<(), DatapathError> {
        self.hooks().detach_all()
    }

    pub(super) fn sweep(&self, uplinks: &BTreeSet<u32>) {
        self.hooks().sweep(uplinks);
    }

    /// Where programs were put.
    pub(super) fn attached(&self) -> Vec<(Hook, Port)> {
        self.hooks().attached()
    }

    /// Does the program run there, be it that it was taken off?
    pub(super) fn runs(&self, hook: Hook, port: &Port) -> bool {
        self.hooks().sits(hook, port) == Some(true)
    }

    /// Is the program where it was put?
    pub(super) fn holds(&self, hook: Hook, ifindex: u32) -> bool {
        self.hooks().holds(hook, ifindex)
    }

    /// Why some programs are not where the newest kernels have them.
    pub(super) fn refused(&self) -> Option<String> {
        self.hooks().refused()
    }

    /// Another handle to the maps.
    pub(super) fn tables(&self) -> Result<BpfTables, DatapathError> {
        BpfTables::open(self.hooks().pins())
    }

    pub(super) fn sent(&self) -> u64 {
        self.counters.sent()
    }

    pub(super) fn counters(&self) -> Vec<(&'static str, u64)> {
        self.counters.read()
    }

    pub(super) fn tallies(&self) -> Arc<Tallies> {
        Arc::clone(&self.tallies)
    }

    pub(super) fn flows(&self) -> Arc<KernelFlows> {
        Arc::clone(&self.flows)
    }

    fn hooks(&self) -> MutexGuard<'_, Hooks> {
        self.hooks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_without_programs_says_so() {
        let text = present(&[]).expect_err("nothing to load").to_string();
        assert_eq!(text, "no eBPF object in this build: run cargo xtask build-ebpf");
        assert!(present(&[0]).is_ok());
    }
}
