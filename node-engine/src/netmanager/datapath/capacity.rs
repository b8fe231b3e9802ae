//! How much the tables hold. The kernel sets aside a row for every slot, used or not, so a small board shall not pay for a large cluster.

use netmanager_common::{MAX_CANDIDATES, MAX_SERVICES, MAX_SLOTS};

/// The largest number of slots that there is room for. A slot is an instance in one address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity(u32);

impl Capacity {
    /// What the programs are built with.
    pub const USUAL: Self = Self(MAX_SLOTS);
    pub const LARGEST: u32 = 1 << 22;

    /// `None`: fewer than usual, or more than the tables are made for.
    pub fn of(slots: u32) -> Option<Self> {
        (MAX_SLOTS..=Self::LARGEST).contains(&slots).then_some(Self(slots))
    }

    pub fn slots(self) -> u32 {
        self.0
    }

    /// Service addresses.
    pub fn services(self) -> u32 {
        scaled(MAX_SERVICES, self)
    }

    /// Rows of instances behind service addresses.
    pub fn candidates(self) -> u32 {
        scaled(MAX_CANDIDATES, self)
    }
}

impl Default for Capacity {
    fn default() -> Self {
        Self::USUAL
    }
}

/// In the same proportion as usual.
fn scaled(usual: u32, capacity: Capacity) -> u32 {
    (u64::from(usual) * u64::from(capacity.0) / u64::from(MAX_SLOTS)) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_tables_grow_together() {
        let million = Capacity::of(1 << 20).expect("a million");
        assert_eq!((million.slots(), million.services(), million.candidates()), (1 << 20, 1 << 20, 1 << 22));
        assert_eq!((Capacity::USUAL.services(), Capacity::USUAL.candidates()), (MAX_SERVICES, MAX_CANDIDATES));
        assert_eq!((Capacity::of(MAX_SLOTS - 1), Capacity::of(u32::MAX)), (None, None));
    }
}
