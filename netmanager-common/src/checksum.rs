//! Internet checksums (RFC 1071), updated in place (RFC 1624, equation 3).

/// The checksum field after the covered bytes `old` became `new`. Even lengths only, at an even offset of the covered data.
#[inline(always)]
pub fn update<const N: usize>(field: [u8; 2], old: &[u8; N], new: &[u8; N]) -> [u8; 2] {
    let mut sum = u32::from(!u16::from_be_bytes(field));
    let mut at = 0;
    while at + 1 < N {
        sum += u32::from(!u16::from_be_bytes([old[at], old[at + 1]]));
        sum += u32::from(u16::from_be_bytes([new[at], new[at + 1]]));
        at += 2;
    }
    (!fold(sum)).to_be_bytes()
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
