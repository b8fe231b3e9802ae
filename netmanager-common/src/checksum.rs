//! Internet checksums (RFC 1071), updated in place (RFC 1624, equation 3).

use crate::addr::Addr;
use crate::frame::Family;

/// By how much the one's complement sum of the covered data changes. In the machine's own order of bytes, which gives the same sums as
/// the wire's (RFC 1071, 2(B)), so that whole words are added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change(u32);

impl Change {
    /// `old` became `new`, both of an even length, at an even offset of the covered data.
    pub fn of<const N: usize>(old: &[u8; N], new: &[u8; N]) -> Self {
        const { assert!(N.is_multiple_of(2)) };
        let word = |pair: &[u8]| u64::from(u16::from_ne_bytes([pair[0], pair[1]]));
        let sum = old.chunks_exact(2).map(|pair| 0xffff ^ word(pair)).chain(new.chunks_exact(2).map(word)).sum();
        Self::folded(sum)
    }

    /// These addresses became those.
    #[inline(always)]
    pub fn of_addresses(family: Family, old: [&Addr; 2], new: [&Addr; 2]) -> Self {
        let sum = match family {
            // What is before the last word is the same in all.
            Family::V4 => {
                let [[.., a], [.., b], [.., c], [.., d]] =
                    [old[0].words(), old[1].words(), new[0].words(), new[1].words()];
                less(a) + less(b) + u64::from(c) + u64::from(d)
            }
            Family::V6 => less_all(old[0]) + less_all(old[1]) + all(new[0]) + all(new[1]),
        };
        Self::folded(sum)
    }

    #[inline(always)]
    const fn folded(sum: u64) -> Self {
        let sum = (sum & 0xffff_ffff) + (sum >> 32);
        let sum = (sum & 0xffff_ffff) + (sum >> 32);
        Self(sum as u32)
    }

    /// As the kernel takes it (`__wsum`).
    #[inline(always)]
    pub const fn wsum(self) -> u32 {
        self.0
    }

    /// The checksum field after the change (RFC 1624, equation 3).
    #[inline(always)]
    pub const fn apply(self, field: [u8; 2]) -> [u8; 2] {
        let sum = Self::folded((0xffff ^ u16::from_ne_bytes(field) as u64) + self.0 as u64);
        (!fold(sum.0)).to_ne_bytes()
    }
}

#[inline(always)]
fn all(address: &Addr) -> u64 {
    let [a, b, c, d] = address.words();
    u64::from(a) + u64::from(b) + u64::from(c) + u64::from(d)
}

#[inline(always)]
fn less_all(address: &Addr) -> u64 {
    let [a, b, c, d] = address.words();
    less(a) + less(b) + less(c) + less(d)
}

/// What takes a word out of the sum.
#[inline(always)]
fn less(word: u32) -> u64 {
    u64::from(!word)
}

/// The one's complement sum of `bytes`, added to `seed`; an odd last byte counts as its high half.
pub fn sum(seed: u32, bytes: &[u8]) -> u32 {
    let words = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])));
    words.fold(seed, |sum, word| u32::from(fold(sum + word)))
}

/// Folds the carries of a 32-bit one's complement sum into 16 bits.
#[inline(always)]
pub const fn fold(sum: u32) -> u16 {
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    sum as u16
}
