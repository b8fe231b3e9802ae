//! The link address of the next hop to a peer: asked of the kernel's routes and neighbours now and then, in between remembered.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::{
    __sk_buff, BPF_FIB_LOOKUP_OUTPUT, bpf_fib_lookup as FibLookup, bpf_fib_lookup__bindgen_ty_3 as FibSource,
    bpf_fib_lookup__bindgen_ty_4 as FibDestination,
};
use aya_ebpf::helpers::{bpf_fib_lookup, bpf_jiffies64};
use aya_ebpf::programs::TcContext;
use netmanager_common::abi::{Mac, Macs, Neighbour, Peer};
use netmanager_common::pipeline::Tables as _;

use crate::maps::{Maps, neighbour, plain};

const AF_INET: u8 = 2;
const _: () = assert!(size_of::<FibLookup>().is_multiple_of(4) && align_of::<FibLookup>() >= 4);
/// Jiffies for which an answer is trusted: a quarter of a second up to two and a half, by the kernel's clock rate.
const TRUST: u32 = 250;

/// `None`: let the kernel's neighbour code send this one, or, without the helper for that, the tunnel's socket. It does so once in a while for every peer, which is what keeps the entry in
/// use and verified, and always where it does not know the address, which is what makes it ask.
#[inline(always)]
pub fn next_hop(context: &TcContext, number: u32, peer: &Peer) -> Option<Macs> {
    let row = neighbour(number)?;
    // SAFETY: a helper without arguments.
    let now = unsafe { bpf_jiffies64() } as u32;
    // SAFETY: a live map value. Another core may refresh it at the same time; both write the same addresses.
    let known = unsafe { *row };
    if known.host == peer.host.v4_bytes() && (known.until.wrapping_sub(now) as i32) > 0 {
        return known.found().then_some(known.macs);
    }
    let mut fresh = Neighbour { host: peer.host.v4_bytes(), until: now.wrapping_add(TRUST), macs: Macs::default() };
    ask(context.skb.skb, number, &mut fresh.macs);
    // SAFETY: as above.
    unsafe { *row = fresh };
    (plain() && fresh.found()).then_some(fresh.macs)
}

/// A function of its own: its parameter block would not fit on the stack with all the rest.
#[inline(never)]
fn ask(skb: *mut __sk_buff, number: u32, answer: &mut Macs) {
    let Some(peer) = Maps.peer(number) else { return };
    let mut block = MaybeUninit::<FibLookup>::uninit();
    // Cleared word by word: anything else becomes a call, and old kernels count 32 bytes of the stack for one at the end of this chain.
    for word in 0..size_of::<FibLookup>() / 4 {
        // SAFETY: inside the block, which is aligned to words.
        unsafe { block.as_mut_ptr().cast::<u32>().add(word).write_volatile(0) };
    }
    // SAFETY: integers, arrays and unions of them: all zero is a value.
    let question = unsafe { block.assume_init_mut() };
    question.family = AF_INET;
    question.ifindex = peer.ifindex;
    question.__bindgen_anon_3 = FibSource { ipv4_src: u32::from_ne_bytes(peer.source.v4_bytes()) };
    question.__bindgen_anon_4 = FibDestination { ipv4_dst: u32::from_ne_bytes(peer.host.v4_bytes()) };
    // SAFETY: a valid context, and a parameter block of the length that is given.
    let found = unsafe {
        let len = size_of::<FibLookup>() as i32;
        bpf_fib_lookup(skb.cast(), question, len, BPF_FIB_LOOKUP_OUTPUT)
    };
    if found == 0 && question.ifindex == peer.ifindex {
        *answer = Macs { destination: Mac(question.dmac), source: Mac(question.smac) };
    }
}
