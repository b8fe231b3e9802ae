//! One address type for both families: IPv4 is mapped into IPv6 (`::ffff:a.b.c.d`, RFC 4291 2.5.5.2) in every key and value,
//! so there is one set of maps and only header parsing knows families.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IPv6 address, or an IPv4 address mapped into one, in network byte order.
///
/// Aligned so that the kernel's programs copy it by words; every map type has it at a multiple of 4 anyway.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Addr(pub [u8; 16]);

impl Addr {
    /// No address.
    pub const NONE: Self = Self([0; 16]);

    #[inline(always)]
    pub const fn v4(bytes: [u8; 4]) -> Self {
        let mut mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0];
        mapped.split_at_mut(12).1.copy_from_slice(&bytes);
        Self(mapped)
    }

    #[inline(always)]
    pub const fn v6(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }

    /// The last four bytes: the IPv4 address where this is a mapped one.
    #[inline(always)]
    pub const fn v4_bytes(&self) -> [u8; 4] {
        self.words()[3].to_ne_bytes()
    }

    /// Of four 32-bit words, each as it lies in memory. Never taken apart into bytes on the way: the kernel's programs would write them one
    /// by one, and a look-up that reads them as words right after waits for every one.
    #[inline(always)]
    pub fn from_words(words: [u32; 4]) -> Self {
        let mut bytes = [0; 16];
        bytes.copy_from_slice(words.map(u32::to_ne_bytes).as_flattened());
        Self(bytes)
    }

    /// The four 32-bit words, each as it lies in memory.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        let [a0, a1, a2, a3, b0, b1, b2, b3, c0, c1, c2, c3, d0, d1, d2, d3] = self.0;
        [
            u32::from_ne_bytes([a0, a1, a2, a3]),
            u32::from_ne_bytes([b0, b1, b2, b3]),
            u32::from_ne_bytes([c0, c1, c2, c3]),
            u32::from_ne_bytes([d0, d1, d2, d3]),
        ]
    }

    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        let [a, b, c, _] = self.words();
        a | b | (c ^ 0xffff_u32.to_be()) == 0
    }

    #[inline(always)]
    pub fn is_none(&self) -> bool {
        u128::from_ne_bytes(self.0) == 0
    }
}

impl From<IpAddr> for Addr {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(v4) => v4.into(),
            IpAddr::V6(v6) => v6.into(),
        }
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(address: Ipv4Addr) -> Self {
        Self::v4(address.octets())
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(address: Ipv6Addr) -> Self {
        Self::v6(address.octets())
    }
}

impl From<Addr> for IpAddr {
    fn from(address: Addr) -> Self {
        if address.is_v4() { Self::V4(address.v4_bytes().into()) } else { Self::V6(address.0.into()) }
    }
}
