//! Every map, and the tables of the law over them.

use aya_ebpf::Global;
use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::helpers::bpf_get_prandom_u32;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, PerCpuArray};
use netmanager_common::abi::{
    Answers, CandidateKey, Config, Endpoint, FLOW_CACHED, FLOW_CLOSING, FLOW_SEEN, Flow, FlowKey, Neighbour, Peer,
    Service, Slot,
};
use netmanager_common::addr::Addr;
use netmanager_common::frame::TCP;
use netmanager_common::pipeline::Tables;
use netmanager_common::verdict::COUNTERS as COUNTERS_LEN;
use netmanager_common::{MAX_ACCOUNTS, MAX_CANDIDATES, MAX_ENDPOINTS, MAX_FLOWS, MAX_PEERS, MAX_SERVICES, MAX_SLOTS};

#[map]
static CONFIG: Array<Config> = Array::with_max_entries(1, 0);
#[map]
static SERVICES: HashMap<Addr, Service> = HashMap::with_max_entries(MAX_SERVICES, BPF_F_NO_PREALLOC);
#[map]
static CANDIDATES: HashMap<CandidateKey, u32> = HashMap::with_max_entries(MAX_CANDIDATES, BPF_F_NO_PREALLOC);
#[map]
static SLOTS: Array<Slot> = Array::with_max_entries(MAX_SLOTS, 0);
#[map]
static PEERS: Array<Peer> = Array::with_max_entries(MAX_PEERS, 0);
#[map]
static ENDPOINTS: HashMap<Addr, Endpoint> = HashMap::with_max_entries(MAX_ENDPOINTS, 0);
#[map]
static FLOWS: HashMap<FlowKey, Flow> = HashMap::with_max_entries(MAX_FLOWS, BPF_F_NO_PREALLOC);
/// Seconds, written by user space as they pass: what a flow was last seen by.
#[map]
static CLOCK: Array<u32> = Array::with_max_entries(1, 0);
/// Rows of flows ever opened on each account, counted here; how many may have been, raised by user space as it removes rows.
#[map]
static OPENED: Array<u64> = Array::with_max_entries(MAX_ACCOUNTS, 0);
#[map]
static ALLOWED: Array<u64> = Array::with_max_entries(MAX_ACCOUNTS, 0);
/// The nodes that are known, by their address; each has a peer's number.
#[map]
static HOSTS: HashMap<Addr, u32> = HashMap::with_max_entries(MAX_PEERS, 0);
/// The link address of the next hop to each peer, as long as it is fresh. By peer number; nobody but the programs writes it.
#[map]
static NEIGHBOURS: Array<Neighbour> = Array::with_max_entries(MAX_PEERS, 0);
/// Whose turn it is, by the service's id.
#[map]
static TURNS: Array<u32> = Array::with_max_entries(MAX_SERVICES + 1, 0);
/// Flows that each slot was chosen for, over all CPUs. Only a new flow writes here.
#[map]
static CHOSEN: Array<u64> = Array::with_max_entries(MAX_SLOTS, 0);
/// What became of them, as far as they are TCP connections. Only a new flow and its first answer write here.
#[map]
static ANSWERS: Array<Answers> = Array::with_max_entries(MAX_SLOTS, 0);
/// The slot that the next new flow to a service shall try, by the service's id; 0 once a flow has taken it.
#[map]
static TRIALS: Array<u32> = Array::with_max_entries(MAX_SERVICES + 1, 0);
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTERS_LEN, 0);

/// Set to `n + 1` at load time, every random number is `n`: so a test knows which instance is chosen.
#[unsafe(no_mangle)]
static FIXED_PICK: Global<u64> = Global::new(0);

/// Not zero: without the helpers that came after Linux 5.9. A constant to the verifier, which does not look at what is never reached.
#[unsafe(no_mangle)]
static PLAIN: Global<u64> = Global::new(0);

#[inline(always)]
pub fn plain() -> bool {
    PLAIN.load() != 0
}

/// The kernel's maps as the law sees them.
pub struct Maps;

/// The map value behind the pointer.
#[inline(always)]
fn row<T>(value: Option<*const T>) -> Option<&'static T> {
    // SAFETY: the kernel returned a pointer to a live map value; it stays readable until the program ends, which is as long as
    // anything in it lives. User space may change the value meanwhile, each of its words whole.
    value.map(|value| unsafe { &*value })
}

impl Tables for Maps {
    type Row<T: Copy + 'static> = &'static T;

    #[inline(always)]
    fn config(&mut self) -> Option<&'static Config> {
        // An array always has its row; before it is written its masks are zero, and would match every address.
        row(CONFIG.get_ptr(0)).filter(|config| !config.service_v4_mask.is_none())
    }

    #[inline(always)]
    fn service(&mut self, address: &Addr) -> Option<&'static Service> {
        row(SERVICES.get_ptr(address))
    }

    #[inline(always)]
    fn candidate(&mut self, key: &CandidateKey) -> Option<u32> {
        row(CANDIDATES.get_ptr(key)).copied()
    }

    #[inline(always)]
    fn slot(&mut self, index: u32) -> Option<&'static Slot> {
        row(SLOTS.get_ptr(index))
    }

    #[inline(always)]
    fn peer(&mut self, index: u32) -> Option<&'static Peer> {
        row(PEERS.get_ptr(index))
    }

    #[inline(always)]
    fn endpoint(&mut self, address: &Addr) -> Option<&'static Endpoint> {
        row(ENDPOINTS.get_ptr(address))
    }

    #[inline(always)]
    fn flow(&mut self, key: &FlowKey) -> Option<&'static Flow> {
        row(FLOWS.get_ptr(key))
    }

    #[inline(always)]
    fn touch(&mut self, key: &FlowKey, flow: &&'static Flow, ends: u8) {
        let now = now();
        let state = flow.state | FLOW_SEEN | ends;
        if flow.seen == now && flow.state == state {
            // Not written: another core may be reading its cache line.
            return;
        }
        let first = key.protocol == u32::from(TCP) && flow.unanswered();
        note(core::ptr::from_ref(*flow).cast_mut(), now, state, first);
    }

    #[inline(always)]
    fn learn(&mut self, key: &FlowKey, flow: &mut Flow, new: bool) -> bool {
        if new && !open(flow) {
            return false;
        }
        flow.seen = now();
        // By reference, or a copy would need its room on the stack.
        let row: &Flow = flow;
        FLOWS.insert(key, row, 0).is_ok()
    }

    #[inline(always)]
    fn forget(&mut self, key: &FlowKey) {
        // Gone already is gone.
        let _ = FLOWS.remove(key);
    }

    #[inline(always)]
    fn pick(&mut self) -> u32 {
        match FIXED_PICK.load() {
            // SAFETY: a helper without arguments.
            0 => unsafe { bpf_get_prandom_u32() },
            fixed => (fixed - 1) as u32,
        }
    }

    #[inline(always)]
    fn turn(&mut self, service: u32) -> u32 {
        let Some(turn) = TURNS.get_ptr_mut(service) else { return 0 };
        // SAFETY: a live map value, a word whole. Two CPUs at the same moment may take the same turn; the next is the next again, so
        // that nobody is passed over.
        unsafe {
            let mine = *turn;
            *turn = mine.wrapping_add(1);
            mine
        }
    }

    #[inline(always)]
    fn trial(&mut self, service: u32) -> Option<u32> {
        let trial = TRIALS.get_ptr_mut(service)?;
        // SAFETY: as in `turn`; two CPUs at the same moment may both try.
        let slot = unsafe { core::mem::replace(&mut *trial, 0) };
        (slot != 0).then_some(slot)
    }

    #[inline(always)]
    fn chosen(&mut self, slot: u32, tcp: bool) {
        if let Some(chosen) = CHOSEN.get_ptr_mut(slot) {
            // SAFETY: as in `turn`; two CPUs at the same moment may count as one.
            unsafe { *chosen += 1 };
        }
        if tcp {
            for index in [0, slot] {
                if let Some(answers) = ANSWERS.get_ptr_mut(index) {
                    // SAFETY: as above.
                    unsafe { (*answers).asked = (*answers).asked.wrapping_add(1) };
                }
            }
        }
    }

    #[inline(always)]
    fn answered(&mut self, slot: u16, refused: bool) {
        note_answer(slot.into(), refused);
    }
}

/// Not in line, as it is rare and the programs have no stack to spare. `answers`: this is the first packet that does.
#[inline(never)]
fn note(flow: *mut Flow, now: u32, state: u8, answers: bool) {
    // A pointer and not a reference: what a function gets by shared reference it may not write, and the compiler knows.
    // SAFETY: a live, writable map value (see `row`); both fields are written whole, by whoever comes last.
    unsafe {
        if answers {
            note_answer((*flow).server.into(), state & FLOW_CLOSING != 0);
        }
        (*flow).seen = now;
        (*flow).state = state;
    }
}

#[inline(always)]
fn note_answer(slot: u32, refused: bool) {
    if let Some(answers) = ANSWERS.get_ptr_mut(slot) {
        // SAFETY: as in `chosen`.
        unsafe {
            let count = if refused { &mut (*answers).refused } else { &mut (*answers).answered };
            *count = count.wrapping_add(1);
        }
    }
}

#[inline(always)]
fn now() -> u32 {
    row(CLOCK.get_ptr(0)).copied().unwrap_or(0)
}

/// One more row on the flow's account; false where that is exhausted.
#[inline(always)]
fn open(flow: &Flow) -> bool {
    let account = 2 * u32::from(flow.account) + u32::from(flow.kind == FLOW_CACHED);
    let (Some(opened), Some(allowed)) = (OPENED.get_ptr_mut(account), ALLOWED.get_ptr(account)) else { return false };
    // SAFETY: live map values, each word whole. Two cores may count as one what they open at the same moment: user space counts the
    // rows anew with each sweep.
    unsafe {
        if flow.account != 0 && *opened >= *allowed {
            return false;
        }
        *opened += 1;
    }
    true
}

/// Is there a node at this address?
#[inline(always)]
pub fn knows(host: &Addr) -> bool {
    HOSTS.get_ptr(host).is_some()
}

/// The next hop to a peer, to be read and refreshed.
#[inline(always)]
pub fn neighbour(peer: u32) -> Option<*mut Neighbour> {
    NEIGHBOURS.get_ptr_mut(peer)
}

/// Adds one to a counter of this CPU.
#[inline(always)]
pub fn count(index: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: a live value of a per-CPU map: nobody else writes it while this program runs.
        unsafe { *counter += 1 };
    }
}
