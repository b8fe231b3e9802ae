//! Every map, and the tables of the law over them.

use aya_ebpf::Global;
use aya_ebpf::bindings::BPF_F_NO_PREALLOC;
use aya_ebpf::helpers::bpf_get_prandom_u32;
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray};
use netmanager_common::abi::{CandidateKey, Config, Endpoint, Flow, FlowKey, Peer, Reply, ReplyKey, Service, Slot};
use netmanager_common::addr::Addr;
use netmanager_common::pipeline::Tables;
use netmanager_common::verdict::COUNTERS as COUNTERS_LEN;
use netmanager_common::{MAX_CANDIDATES, MAX_ENDPOINTS, MAX_FLOWS, MAX_PEERS, MAX_SERVICES, MAX_SLOTS};

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
static FLOWS: LruHashMap<FlowKey, Flow> = LruHashMap::with_max_entries(MAX_FLOWS, 0);
#[map]
static REPLIES: LruHashMap<ReplyKey, Reply> = LruHashMap::with_max_entries(MAX_FLOWS, 0);
#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(COUNTERS_LEN, 0);

/// Set to `n + 1` at load time, every random number is `n`: so a test knows which instance is chosen.
#[unsafe(no_mangle)]
static FIXED_PICK: Global<u64> = Global::new(0);

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
    fn learn(&mut self, key: &FlowKey, flow: &Flow) -> bool {
        FLOWS.insert(key, flow, 0).is_ok()
    }

    #[inline(always)]
    fn reply(&mut self, key: &ReplyKey) -> Option<&'static Reply> {
        row(REPLIES.get_ptr(key))
    }

    #[inline(always)]
    fn learn_reply(&mut self, key: &ReplyKey, reply: &Reply) -> bool {
        REPLIES.insert(key, reply, 0).is_ok()
    }

    #[inline(always)]
    fn pick(&mut self) -> u32 {
        match FIXED_PICK.load() {
            // SAFETY: a helper without arguments.
            0 => unsafe { bpf_get_prandom_u32() },
            fixed => (fixed - 1) as u32,
        }
    }
}

/// Adds one to a counter of this CPU.
#[inline(always)]
pub fn count(index: u32) {
    if let Some(counter) = COUNTERS.get_ptr_mut(index) {
        // SAFETY: a live value of a per-CPU map: nobody else writes it while this program runs.
        unsafe { *counter += 1 };
    }
}
