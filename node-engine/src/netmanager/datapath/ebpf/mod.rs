//! The datapath in the kernel: programs at each instance's veth and at the uplink, over pinned maps. What they leave alone goes to the
//! TUN device or the tunnel socket, where the proxy carries it over the same maps.
//!
//! Everything is pinned: a daemon that ends, however it ends, leaves programs at work; the next one adopts the maps and replaces the
//! programs in place. The only module that speaks to aya.

mod accounts;
mod filter;
mod hooks;
mod listing;
mod maps;
mod pins;
mod reason;
mod tallies;

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use aya::EbpfLoader;
use aya::include_bytes_aligned;
use netmanager_common::addr::Addr;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

use self::accounts::Keeper;
use self::hooks::{Hook, Hooks};
use self::listing::KernelFlows;
use self::maps::{BpfTables, KernelCounters};
use self::pins::Pins;
pub(super) use self::pins::retire;
pub use self::pins::uninstall;
use self::reason::unsupported;
use self::tallies::Tallies;
use super::tun::Proxied;
use super::{Datapath, DatapathError, Event, FlowRow, Port, Snapshot, TableDelta, Tally, Underlay};

/// The programs of `netmanager-ebpf`; empty where the build had none.
const OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/netmanager"));

/// Carries packets in the kernel.
#[derive(Debug)]
pub struct Ebpf {
    hooks: Mutex<Hooks>,
    /// Interfaces with the program for what peers send.
    uplinks: Mutex<BTreeSet<u32>>,
    counters: KernelCounters,
    flows: Arc<KernelFlows>,
    tallies: Arc<Tallies>,
    proxied: Proxied,
    _keeper: Keeper,
}

impl Ebpf {
    /// Loads the programs, adopts or makes the maps, takes the uplink, and starts the slow path.
    ///
    /// # Errors
    /// `Unsupported` with the reason where the kernel, its configuration or the caller's privileges do not allow it. What was made
    /// until then stays pinned, for the next attempt or [`uninstall`].
    pub fn open(underlay: &Underlay) -> Result<Self, DatapathError> {
        if OBJECT.is_empty() {
            let reason = "no eBPF object in this build: run cargo xtask build-ebpf".into();
            return Err(DatapathError::Unsupported { what: "load programs", reason });
        }
        // Kernels before 5.11 count maps against this limit. Where it may not be raised it may still suffice.
        let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);

        let pins = Pins::ensure(&underlay.pin_dir, underlay.capacity)?;
        let mut loader = EbpfLoader::new();
        for (map, rows) in maps::sizes(underlay.capacity) {
            loader.map_max_entries(map, rows);
        }
        for map in maps::PINNED {
            loader.map_pin_path(map, pins.map(map));
        }
        let programs = loader.load(OBJECT).map_err(|error| unsupported("load programs", &error))?;
        let tables = BpfTables::open(&pins)?;
        let counters = KernelCounters::open(&pins)?;
        let keeper = Keeper::start(&pins)?;
        let flows = Arc::new(KernelFlows::open(&pins)?);
        let tallies = Arc::new(Tallies::open(&pins)?);
        let mut hooks = Hooks::load(programs, pins, underlay.xdp)?;

        hooks.attach_uplink(&Port { name: underlay.uplink.clone(), ifindex: underlay.uplink_ifindex })?;
        let uplinks = BTreeSet::from([underlay.uplink_ifindex]);
        hooks.sweep(&uplinks);
        // Last: whoever falls back to TUN needs device and port for itself.
        let proxied = Proxied::open(underlay, tables, false)?;
        let (hooks, uplinks) = (Mutex::new(hooks), Mutex::new(uplinks));
        Ok(Self { hooks, uplinks, counters, flows, tallies, proxied, _keeper: keeper })
    }

    fn hooks(&self) -> MutexGuard<'_, Hooks> {
        self.hooks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The delta with the one thing that only the datapath knows: where its slow path reads.
    fn completed(&self, delta: &TableDelta) -> TableDelta {
        let mut delta = delta.clone();
        if let Some(config) = &mut delta.config {
            config.slow_ifindex = self.proxied.ifindex();
        }
        delta
    }
}

#[async_trait]
impl Datapath for Ebpf {
    fn name(&self) -> &'static str {
        "ebpf"
    }

    async fn attach(&self, port: &Port) -> Result<(), DatapathError> {
        self.hooks().attach(Hook::Veth, port)
    }

    async fn detach(&self, port: &Port) -> Result<(), DatapathError> {
        self.hooks().detach(Hook::Veth, port)
    }

    async fn follow(&self, uplinks: &BTreeSet<u32>) -> Result<(), DatapathError> {
        let mut present = self.uplinks.lock().unwrap_or_else(PoisonError::into_inner);
        if *present == *uplinks {
            return Ok(());
        }
        let mut hooks = self.hooks();
        for ifindex in uplinks.difference(&present) {
            // One that has gone meanwhile has nothing to take in.
            if let Ok(name) = nix::net::if_::if_indextoname(*ifindex) {
                let name = name.to_string_lossy().into_owned();
                hooks.attach_uplink(&Port { name, ifindex: *ifindex })?;
            }
        }
        hooks.sweep(uplinks);
        present.clone_from(uplinks);
        Ok(())
    }

    async fn take_framed(&self, device: &Port) -> Result<(), DatapathError> {
        self.hooks().attach(Hook::Framing, device)
    }

    async fn snapshot(&self) -> Result<Snapshot, DatapathError> {
        self.proxied.snapshot().await
    }

    async fn reconcile(&self, full: &TableDelta) -> Result<(), DatapathError> {
        self.proxied.reconcile(self.completed(full)).await
    }

    async fn apply(&self, delta: &TableDelta) -> Result<(), DatapathError> {
        self.proxied.apply(self.completed(delta)).await
    }

    async fn event(&self) -> Event {
        self.proxied.event().await
    }

    async fn give_up(&self, address: Addr) {
        self.proxied.give_up(address).await;
    }

    async fn send_control(&self, to: SocketAddr, payload: &[u8]) -> Result<(), DatapathError> {
        self.proxied.send_control(to, payload).await
    }

    async fn send_whole(&self, to: SocketAddr, payload: &[u8]) -> Result<(), DatapathError> {
        self.proxied.send_whole(to, payload).await
    }

    async fn flows(&self) -> Result<Vec<FlowRow>, DatapathError> {
        let flows = Arc::clone(&self.flows);
        let read = tokio::task::spawn_blocking(move || flows.read()).await;
        read.map_err(|error| DatapathError::Step { step: "read flows", reason: error.to_string() })?
    }

    async fn tallies(&self, slots: Vec<u32>) -> Vec<Tally> {
        let tallies = Arc::clone(&self.tallies);
        let read = move || slots.into_iter().map(|slot| tallies.read(slot)).collect();
        // A runtime that ends asks no more.
        tokio::task::spawn_blocking(read).await.unwrap_or_default()
    }

    /// The kernel's and the slow path's together: a packet that took both ways is `slow` in one and something else in the other.
    fn counters(&self) -> Vec<(String, u64)> {
        let mut counters = self.proxied.counters();
        for (name, value) in self.counters.read() {
            match counters.iter_mut().find(|(other, _)| other == name) {
                Some((_, sum)) => *sum += value,
                None => counters.push((name.to_owned(), value)),
            }
        }
        counters
    }
}
