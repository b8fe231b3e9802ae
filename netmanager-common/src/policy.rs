//! How an instance is chosen behind a semantic address: which index of its list of candidates a new flow gets. What a policy means
//! beyond that (weights, preferences, round trips) is which list user space has written.

use crate::addr::Addr;

/// The cell of the client: the same on every node, and unrelated for neighbouring addresses.
#[inline(always)]
pub fn cell(client: &Addr) -> u32 {
    let bytes = &client.0;
    let word = |at: usize| {
        let [a, b, c, d] = [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
        u64::from(u32::from_be_bytes([a, b, c, d]))
    };
    (scramble(scramble(word(0) << 32 | word(4)) ^ (word(8) << 32 | word(12))) >> 32) as u32
}

/// The finaliser of splitmix64.
#[inline(always)]
const fn scramble(state: u64) -> u64 {
    let state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}

/// The index that a number leads to in a list of so many; 0 for an empty one.
#[inline(always)]
pub fn index(number: u32, count: u32) -> u32 {
    number.checked_rem(count).unwrap_or(0)
}
