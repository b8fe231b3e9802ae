//! The datapath as the rest of the daemon sees it: one of several rungs, the fastest that works here, and any of them at any time.
//!
//! ```text
//! ebpf         programs by TCX (clsact where an interface refuses it), redirects straight into namespaces     every rung below
//! ebpf-plain   the same programs without the helpers that kernels before 5.10 have not                       works without the
//! tun          no program; the kernel's routes bring everything to the TUN device                             ones above
//! ```
//!
//! What carries on a rung is what holds on the one below: the proxy runs on all of them, over the kernel's maps while there are programs
//! and over tables in memory else. So a change of rung, while packets flow, is: copy the rows, have the proxy go on over the copy, put
//! programs on or take them off. At no moment is there a packet that neither a program nor the proxy would carry, and both read the same
//! flows.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex as Lock, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use netmanager_common::addr::Addr;
use tokio::sync::{Mutex, mpsc};

use super::any::AnyTables;
use super::ebpf::{self, Hook, Kernel, KernelFlows, retire};
use super::sheet;
use super::tables::MemoryTables;
use super::tun::{Ends, KEPT_DEVICE, KEPT_FRAMED, KEPT_TUNNEL, Proxied, kept_socket};
use super::watch::{self, Gone};
use super::{Datapath, DatapathError, Event, FlowRow, Port, Snapshot, Standing, TableDelta, Tally, Underlay};
use crate::config::DatapathChoice;
use crate::notify::FdStore;

/// A program that has been put back and goes again within this time is not wanted there.
const AGAIN: Duration = Duration::from_secs(10);
/// Flows that the proxy takes over between two packets.
const CHUNK: usize = 256;
/// Milliseconds for which programs are waited for that were taken off and still run.
const LINGERING: usize = 200;
/// Programs that can be missed at a time.
const ALARMS: usize = 16;

/// Where the datapath stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rung {
    Redirect,
    Plain,
    Tun,
}

impl Rung {
    const fn name(self) -> &'static str {
        match self {
            Self::Redirect => "ebpf",
            Self::Plain => "ebpf-plain",
            Self::Tun => "tun",
        }
    }

    /// What may be tried for this choice, the fastest first.
    const fn of(choice: DatapathChoice) -> &'static [Self] {
        match choice {
            DatapathChoice::Auto => &[Self::Redirect, Self::Plain, Self::Tun],
            DatapathChoice::Ebpf => &[Self::Redirect, Self::Plain],
            DatapathChoice::EbpfPlain => &[Self::Plain],
            DatapathChoice::Tun => &[Self::Tun],
        }
    }
}

/// Carries packets by whatever rung it stands on.
#[derive(Debug)]
pub struct Ladder {
    underlay: Underlay,
    /// What is read from by the next start, too.
    kept: Arc<FdStore>,
    proxied: Proxied,
    /// Whoever changes tables, hooks or rung, one at a time.
    state: Mutex<State>,
    /// The kernel's side, for those that only look.
    kernel: RwLock<Option<Arc<Kernel>>>,
    standing: Lock<(Rung, String)>,
    /// What the kernel's side had counted when it was left.
    counted: Lock<BTreeMap<&'static str, u64>>,
    /// The programs that had to be put back, and when.
    lost: Lock<BTreeMap<(Hook, u32), Instant>>,
    gone: Mutex<mpsc::Receiver<Gone>>,
    alarm: mpsc::Sender<Gone>,
}

/// What a rung must know of the others.
#[derive(Debug, Default)]
struct State {
    ports: BTreeMap<u32, Port>,
    uplinks: BTreeSet<u32>,
    /// The device that makes the kernel join framed packets.
    framing: Option<Port>,
    /// Where framed packets come in.
    framed_port: Option<u16>,
    /// A socket of the proxy's takes them.
    framed_here: bool,
}

impl Ladder {
    /// Begins to carry on the fastest rung of those that may be tried.
    ///
    /// # Errors
    /// None of them works; the error says why of each.
    pub fn open(choice: DatapathChoice, underlay: &Underlay, kept: Arc<FdStore>) -> Result<Self, DatapathError> {
        let (alarm, gone) = mpsc::channel(ALARMS);
        let mut refusals = Vec::new();
        // First: what programs leave alone while they are exchanged waits there.
        let mut ends = Some(Ends::open(underlay, &kept)?);
        for rung in Rung::of(choice) {
            let (kernel, tables) = match rung {
                Rung::Redirect | Rung::Plain => match begin(underlay, *rung == Rung::Plain) {
                    Ok((kernel, tables)) => (Some(Arc::new(kernel)), tables),
                    // Nothing else is tried over programs that work.
                    Err(error @ DatapathError::WentBack(_)) => {
                        // The version before may not know that they are kept, and could not open them again.
                        [KEPT_DEVICE, KEPT_TUNNEL, KEPT_FRAMED].iter().for_each(|name| kept.forget(name));
                        return Err(error);
                    }
                    Err(error) => {
                        refusals.push(error);
                        continue;
                    }
                },
                Rung::Tun => (None, AnyTables::memory(remembered(underlay))),
            };
            let Some(ends) = ends.take() else { break };
            let proxied = Proxied::open(underlay, ends, tables)?;
            match &kernel {
                Some(kernel) => {
                    watch::start(kernel, &alarm)?;
                    // The kernel takes framed packets, by a device at the port of the socket that took them on TUN.
                    kept.forget_rest();
                }
                // Programs of an earlier run would go on by tables that nobody keeps any more.
                None => report(retire(&underlay.pin_dir)),
            }
            let reason = match (choice, *rung) {
                (DatapathChoice::Tun, _) => "chosen by configuration".into(),
                (DatapathChoice::EbpfPlain, _) => "chosen by configuration".into(),
                _ => joined(&refusals),
            };
            return Ok(Self {
                underlay: underlay.clone(),
                kept,
                proxied,
                state: Mutex::new(State { uplinks: BTreeSet::from([underlay.uplink_ifindex]), ..State::default() }),
                kernel: RwLock::new(kernel),
                standing: Lock::new((*rung, reason)),
                counted: Lock::default(),
                lost: Lock::default(),
                gone: Mutex::new(gone),
                alarm,
            });
        }
        Err(DatapathError::Refused(joined(&refusals)))
    }

    fn kernel(&self) -> Option<Arc<Kernel>> {
        self.kernel.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn put_kernel(&self, kernel: Option<Arc<Kernel>>) {
        *self.kernel.write().unwrap_or_else(PoisonError::into_inner) = kernel;
    }

    fn stand(&self, rung: Rung, reason: String) {
        tracing::info!(rung = rung.name(), reason, "the datapath has changed");
        *locked(&self.standing) = (rung, reason);
    }

    /// The delta with the one thing that only the datapath knows: where its slow path reads.
    fn completed(&self, delta: &TableDelta) -> TableDelta {
        let mut delta = delta.clone();
        if let Some(config) = &mut delta.config {
            config.slow_ifindex = self.proxied.ifindex();
        }
        delta
    }

    /// Up: copies the rows into the kernel's maps, has the proxy go on over them, and puts the programs on.
    async fn climb(&self, state: &mut State, plain: bool) -> Result<(), DatapathError> {
        let underlay = self.underlay.clone();
        // Loading takes the verifier a while; the proxy carries on meanwhile.
        let (kernel, mut tables) = blocking("load programs", move || Kernel::load(&underlay, plain)).await?;
        let (rows, flows) = self.proxied.copy().await?;
        let slow = self.proxied.ifindex();
        let tables = blocking("copy tables", move || {
            tables.take_over(&rows, slow)?;
            flows.iter().try_for_each(|(key, flow)| tables.adopt(key, flow))?;
            Ok(tables)
        })
        .await?;
        let kernel = Arc::new(kernel);
        self.proxied.to_kernel(tables).await?;
        self.put_kernel(Some(Arc::clone(&kernel)));
        let hooked = hook_all(&kernel, state);
        if let Err(error) = hooked {
            self.descend(state, &kernel).await?;
            return Err(error);
        }
        forget_sheets(&self.underlay);
        if state.framed_here {
            self.proxied.frame(None).await?;
            let kept = Arc::clone(&self.kept);
            blocking("free the port of framed packets", move || {
                kept.forget(KEPT_FRAMED);
                Ok(())
            })
            .await?;
            state.framed_here = false;
        }
        watch::start(&kernel, &self.alarm)
    }

    /// Down: takes the programs off, and has the proxy go on over a copy of the rows. Flows follow; until each is there, it is looked
    /// for in the maps.
    async fn descend(&self, state: &mut State, kernel: &Arc<Kernel>) -> Result<(), DatapathError> {
        let (maps, underlay) = (kernel.tables()?, self.underlay.clone());
        let memory = blocking("copy tables", move || {
            forget_sheets(&underlay);
            let mut memory = open_sheets(&underlay);
            memory.take_over(&maps.rows()?)?;
            Ok(memory)
        })
        .await?;
        self.listen(state).await;
        let attached = kernel.attached();
        kernel.detach_all()?;
        // The kernel lets go of a program some time after its pin. Until then it learns flows, of which nobody would come to know.
        for _ in 0..LINGERING {
            if !attached.iter().any(|(hook, port)| kernel.runs(*hook, port)) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        self.proxied.to_memory(memory).await?;
        let flows = kernel.flows();
        let flows = blocking("copy flows", move || flows.rows()).await?;
        for chunk in flows.chunks(CHUNK) {
            self.proxied.adopt(chunk.to_vec()).await;
        }
        self.proxied.settled().await?;
        let mut counted = locked(&self.counted);
        for (name, value) in kernel.counters() {
            *counted.entry(name).or_default() += value;
        }
        drop(counted);
        self.put_kernel(None);
        report(retire(&self.underlay.pin_dir));
        Ok(())
    }

    /// Takes framed packets by a socket of the proxy's, where somebody may send them.
    async fn listen(&self, state: &mut State) {
        let Some(port) = state.framed_port.filter(|_| !state.framed_here) else { return };
        match kept_socket(&self.kept, KEPT_FRAMED, port, true) {
            Ok(socket) => state.framed_here = self.proxied.frame(Some(socket)).await.is_ok(),
            Err(error) => tracing::warn!(%error, "framed packets are lost until peers know that none are taken"),
        }
    }

    /// Puts a program back that the kernel has taken away. `Some`: it cannot be, or it goes again and again.
    fn mend(&self, gone: &Gone) -> Option<Event> {
        let kernel = self.kernel()?;
        let Gone { hook, port } = gone;
        // Told twice, or taken off on purpose meanwhile.
        if kernel.holds(*hook, port.ifindex) {
            return None;
        }
        let before = locked(&self.lost).insert((*hook, port.ifindex), Instant::now());
        let reason = match kernel.attach(*hook, port) {
            Ok(()) if before.is_none_or(|before| before.elapsed() > AGAIN) => {
                tracing::warn!(interface = port.name, "the kernel had taken a program away; it was put back");
                return None;
            }
            Ok(()) => format!("the kernel takes away the program at {} again and again", port.name),
            Err(error) => format!("the kernel has taken away the program at {}: {error}", port.name),
        };
        Some(Event::Lost(reason))
    }
}

#[async_trait]
impl Datapath for Ladder {
    fn name(&self) -> &'static str {
        match locked(&self.standing).0 {
            Rung::Redirect | Rung::Plain => "ebpf",
            Rung::Tun => "tun",
        }
    }

    fn standing(&self) -> Standing {
        let (rung, mut reason) = locked(&self.standing).clone();
        // Each interface has its own way to the same programs.
        let refused = self.kernel().and_then(|kernel| kernel.refused());
        if let Some(refused) = refused {
            reason = if reason.is_empty() { refused } else { format!("{reason}; {refused}") };
        }
        Standing { rung: rung.name(), reason }
    }

    async fn switch(&self, choice: DatapathChoice, why: &str) -> Result<(), DatapathError> {
        let mut state = self.state.lock().await;
        let mut refusals = Vec::new();
        for rung in Rung::of(choice) {
            if locked(&self.standing).0 == *rung {
                return Ok(());
            }
            let changed = match rung {
                Rung::Redirect | Rung::Plain => {
                    if let Some(kernel) = self.kernel() {
                        self.descend(&mut state, &kernel).await?;
                        self.stand(Rung::Tun, "on the way to another rung".into());
                    }
                    let climbed = self.climb(&mut state, *rung == Rung::Plain).await;
                    if climbed.is_err() && self.kernel().is_none() {
                        report(retire(&self.underlay.pin_dir));
                    }
                    climbed
                }
                Rung::Tun => match self.kernel() {
                    Some(kernel) => self.descend(&mut state, &kernel).await,
                    None => Ok(()),
                },
            };
            match changed {
                Ok(()) => {
                    let reason = if refusals.is_empty() { why.to_owned() } else { joined(&refusals) };
                    self.stand(*rung, if *rung == Rung::Redirect { String::new() } else { reason });
                    return Ok(());
                }
                Err(error) => refusals.push(error),
            }
        }
        let reason = joined(&refusals);
        self.stand(locked(&self.standing).0, reason.clone());
        Err(DatapathError::Refused(reason))
    }

    /// An interface that takes no program is carried by the TUN device: the kernel's routes bring what the instance sends.
    async fn attach(&self, port: &Port) -> Result<(), DatapathError> {
        let mut state = self.state.lock().await;
        state.ports.insert(port.ifindex, port.clone());
        self.kernel().map_or(Ok(()), |kernel| kernel.attach(Hook::Veth, port))
    }

    async fn detach(&self, port: &Port) -> Result<(), DatapathError> {
        let mut state = self.state.lock().await;
        state.ports.remove(&port.ifindex);
        self.kernel().map_or(Ok(()), |kernel| kernel.detach(Hook::Veth, port))
    }

    async fn follow(&self, uplinks: &BTreeSet<u32>) -> Result<(), DatapathError> {
        let mut state = self.state.lock().await;
        if state.uplinks == *uplinks {
            return Ok(());
        }
        if let Some(kernel) = self.kernel() {
            for ifindex in uplinks.difference(&state.uplinks) {
                hook_uplink(&kernel, *ifindex)?;
            }
            kernel.sweep(uplinks);
        }
        state.uplinks.clone_from(uplinks);
        Ok(())
    }

    fn joins_framed(&self) -> bool {
        self.kernel().is_some()
    }

    async fn take_framed(&self, device: &Port) -> Result<(), DatapathError> {
        let mut state = self.state.lock().await;
        state.framing = Some(device.clone());
        self.kernel().map_or(Ok(()), |kernel| kernel.attach(Hook::Framing, device))
    }

    async fn take_framed_at(&self, port: u16) -> Result<(), DatapathError> {
        let mut state = self.state.lock().await;
        state.framed_port = Some(port);
        if self.kernel().is_none() && !state.framed_here {
            let socket = kept_socket(&self.kept, KEPT_FRAMED, port, true)?;
            self.proxied.frame(Some(socket)).await?;
            state.framed_here = true;
        }
        Ok(())
    }

    async fn snapshot(&self) -> Result<Snapshot, DatapathError> {
        self.proxied.snapshot().await
    }

    async fn reconcile(&self, full: &TableDelta) -> Result<(), DatapathError> {
        let _state = self.state.lock().await;
        self.proxied.reconcile(self.completed(full)).await
    }

    async fn apply(&self, delta: &TableDelta) -> Result<(), DatapathError> {
        let _state = self.state.lock().await;
        self.proxied.apply(self.completed(delta)).await
    }

    async fn event(&self) -> Event {
        loop {
            let mut gone = self.gone.lock().await;
            tokio::select! {
                event = self.proxied.event() => return event,
                // There is always a sender: our own.
                Some(gone) = gone.recv() => if let Some(event) = self.mend(&gone) {
                    return event;
                },
            }
        }
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
        match self.kernel().map(|kernel| kernel.flows()) {
            // Beside the slow path, because a full table takes a hundred thousand system calls.
            Some(flows) => blocking("read flows", move || flows.read()).await,
            None => self.proxied.flows().await,
        }
    }

    async fn tallies(&self, slots: Vec<u32>) -> Vec<Tally> {
        let Some(kernel) = self.kernel() else { return self.proxied.tallies(slots).await };
        let tallies = kernel.tallies();
        // A runtime that ends asks no more.
        let read = move || Ok(slots.into_iter().map(|slot| tallies.read(slot)).collect());
        blocking("read tallies", read).await.unwrap_or_default()
    }

    fn bustle(&self) -> u64 {
        self.proxied.bustle().wrapping_add(self.kernel().map_or(0, |kernel| kernel.tallies().asked()))
    }

    fn sent(&self) -> u64 {
        self.proxied.sent() + self.kernel().map_or(0, |kernel| kernel.sent())
    }

    /// The kernel's and the slow path's together: a packet that took both ways is `slow` in one and something else in the other.
    fn counters(&self) -> Vec<(String, u64)> {
        let mut counters = self.proxied.counters();
        let kernel = self.kernel().map(|kernel| kernel.counters()).unwrap_or_default();
        let counted = locked(&self.counted).clone();
        for (name, value) in kernel.into_iter().chain(counted) {
            match counters.iter_mut().find(|(other, _)| other == name) {
                Some((_, sum)) => *sum += value,
                None => counters.push((name.to_owned(), value)),
            }
        }
        counters
    }
}

/// Loads the programs and takes the uplink, over the maps of an earlier run, or over what an earlier run had in memory.
fn begin(underlay: &Underlay, plain: bool) -> Result<(Kernel, AnyTables), DatapathError> {
    let (kernel, mut tables) = Kernel::load(underlay, plain)?;
    if sheet::directory(&underlay.table_dir, underlay.capacity).exists() {
        let memory = open_sheets(underlay);
        tables.take_over(&memory.rows(), 0)?;
        memory.flows().iter().try_for_each(|(key, flow)| tables.adopt(&key, &flow))?;
    }
    forget_sheets(underlay);
    kernel.attach_uplink(&Port { name: underlay.uplink.clone(), ifindex: underlay.uplink_ifindex })?;
    kernel.sweep(&BTreeSet::from([underlay.uplink_ifindex]));
    Ok((kernel, AnyTables::Kernel(Box::new(tables))))
}

/// What an earlier run knew: from memory, or from the kernel's maps, where those may be read.
fn remembered(underlay: &Underlay) -> MemoryTables {
    let mut memory = open_sheets(underlay);
    // Also where there are tables of its own: it may have been killed on its way down.
    if ebpf::populated(&underlay.pin_dir, underlay.capacity) {
        let copied = ebpf::inherited(underlay).and_then(|(maps, flows): (_, KernelFlows)| {
            memory.take_over(&maps.rows()?)?;
            flows.rows()?.into_iter().for_each(|(key, flow)| memory.flows_mut().adopt(key, flow));
            Ok(())
        });
        if let Err(error) = copied {
            tracing::warn!(%error, "what the kernel's maps hold cannot be read; flows begin anew");
        }
    }
    memory
}

fn open_sheets(underlay: &Underlay) -> MemoryTables {
    MemoryTables::open(&underlay.table_dir, underlay.capacity).unwrap_or_else(|error| {
        let directory = underlay.table_dir.display();
        tracing::warn!(%error, %directory, "tables are kept in memory only: a restart will break connections");
        MemoryTables::with_room(underlay.capacity)
    })
}

fn forget_sheets(underlay: &Underlay) {
    match std::fs::remove_dir_all(&underlay.table_dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            tracing::warn!(%error, directory = %underlay.table_dir.display(), "old tables stay");
        }
        _ => {}
    }
}

fn hook_all(kernel: &Kernel, state: &State) -> Result<(), DatapathError> {
    state.uplinks.iter().try_for_each(|ifindex| hook_uplink(kernel, *ifindex))?;
    if let Some(device) = &state.framing {
        kernel.attach(Hook::Framing, device)?;
    }
    state.ports.values().try_for_each(|port| kernel.attach(Hook::Veth, port))
}

fn hook_uplink(kernel: &Kernel, ifindex: u32) -> Result<(), DatapathError> {
    // One that has gone meanwhile has nothing to take in.
    ebpf::interface(ifindex).map_or(Ok(()), |name| kernel.attach_uplink(&Port { name, ifindex }))
}

async fn blocking<R: Send + 'static>(
    step: &'static str,
    work: impl FnOnce() -> Result<R, DatapathError> + Send + 'static,
) -> Result<R, DatapathError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| DatapathError::Step { step, reason: error.to_string() })?
}

/// The first reason, and others that say something else.
fn joined(refusals: &[DatapathError]) -> String {
    let mut reasons: Vec<String> = refusals.iter().map(ToString::to_string).collect();
    reasons.dedup();
    reasons.join("; ")
}

fn report(errors: Vec<DatapathError>) {
    for error in errors {
        tracing::warn!(%error, "what an eBPF datapath has left could not be removed");
    }
}

fn locked<T>(lock: &Lock<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}
