//! How an instance is chosen behind a semantic address.

use crate::abi::{POLICY_ANY, Service};

/// The index of the candidate that a new flow gets, given a random number. Always below `service.count` where that is not 0.
#[inline(always)]
pub fn choose(service: &Service, random: u32) -> u32 {
    match service.policy {
        POLICY_ANY => random.checked_rem(service.count).unwrap_or(0),
        // The list is sorted by what the policy prefers: the first is the closest, or the only one.
        _ => 0,
    }
}
