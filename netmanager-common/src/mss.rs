//! The largest segment that an end of a TCP connection says it takes (RFC 9293 3.7.1), lowered to what its path takes.

use crate::checksum::Change;
use crate::frame::{Family, mend};

/// The largest segment in packets of this length; headers without options, as the option counts them.
#[inline(always)]
pub const fn of_packet(family: Family, len: u16) -> u16 {
    match family {
        Family::V4 => len.saturating_sub(20 + 20),
        Family::V6 => len.saturating_sub(40 + 20),
    }
}

/// Lowers what the segment at the start of `segment` says, if it says more than `limit`. `complete`: its checksum covers all of it already,
/// and is not yet to be completed by a device.
pub fn clamp(segment: &mut [u8], limit: u16, complete: bool) {
    let Some(at) = option(segment) else { return };
    let said = [segment[at], segment[at + 1]];
    if u16::from_be_bytes(said) <= limit {
        return;
    }
    let limit = limit.to_be_bytes();
    segment[at..at + 2].copy_from_slice(&limit);
    if complete {
        // An option may begin anywhere, and sums are over words: at an odd place the bytes count the other way round.
        let turned = |[a, b]: [u8; 2]| if at.is_multiple_of(2) { [a, b] } else { [b, a] };
        let change = Change::of(&turned(said), &turned(limit));
        if let Some(field) = segment.get_mut(16..).and_then(<[u8]>::first_chunk_mut) {
            mend(field, false, change);
        }
    }
}

/// Where the two bytes of the option are.
fn option(segment: &[u8]) -> Option<usize> {
    let end = usize::from(segment.get(12)? >> 4) * 4;
    let options = segment.get(..end)?;
    let mut at = 20;
    loop {
        match (options.get(at)?, options.get(at + 1)) {
            // The end; a filler.
            (0, _) => return None,
            (1, _) => at += 1,
            (2, Some(4)) => return options.get(at + 2..at + 4).map(|_| at + 2),
            (_, Some(len @ 2..)) => at += usize::from(*len),
            _ => return None,
        }
    }
}
