//! What the proxy counts. One task adds, anybody reads.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use netmanager_common::verdict::{COUNT_LOCAL, COUNT_RECEIVED, COUNT_SENT, COUNT_SLOW, DropReason};

/// What only the slow path counts, beyond the law's verdicts and drops.
#[derive(Clone, Copy, Debug)]
pub(super) enum Count {
    /// Carried to a peer.
    Sent,
    /// Carried between two instances of this node.
    Local,
    /// Delivered from a peer.
    Received,
    /// Held for an unknown address.
    Held,
    /// Put together of fragments.
    Joined,
    /// Fragments that no packet came of.
    Fragment,
    /// Longer than the path to a peer takes; its sender was told.
    TooLong,
    /// Headers the law does not read.
    Header,
    /// Came to the TUN device and is for no service address.
    NotService,
    /// A held packet made room for another, or there was none.
    HeldFull,
    /// Of the host itself, and no instance here can speak for it; or for the host, and nobody there has asked.
    Host,
    /// Waited too long for its address.
    Expired,
    /// For an address that nobody knows.
    GivenUp,
    /// A datagram without a packet in it, or an oversized control datagram.
    Garbage,
    /// A control datagram that nobody fetched in time.
    Control,
    /// The kernel did not take the datagram.
    Send,
    /// The TUN device did not take the packet.
    Write,
    /// A sender was told that nobody is there.
    Told,
}

impl Count {
    pub(super) const ALL: [Self; 18] = [
        Self::Sent,
        Self::Local,
        Self::Received,
        Self::Held,
        Self::Joined,
        Self::Fragment,
        Self::TooLong,
        Self::Header,
        Self::NotService,
        Self::HeldFull,
        Self::Host,
        Self::Expired,
        Self::GivenUp,
        Self::Garbage,
        Self::Control,
        Self::Send,
        Self::Write,
        Self::Told,
    ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Sent => "sent",
            Self::Local => "local",
            Self::Received => "received",
            Self::Held => "held",
            Self::Joined => "joined",
            Self::Fragment => "drop_fragment",
            Self::TooLong => "drop_too_long",
            Self::Header => "drop_header",
            Self::NotService => "drop_not_service",
            Self::HeldFull => "drop_held_full",
            Self::Host => "drop_host",
            Self::Expired => "drop_held_expired",
            Self::GivenUp => "drop_unknown",
            Self::Garbage => "drop_garbage",
            Self::Control => "drop_control",
            Self::Send => "drop_send",
            Self::Write => "drop_tun",
            Self::Told => "told_gone",
        }
    }
}

/// Name of a cell of the kernel's `COUNTERS` array; `None` for a cell that is not used.
pub(super) fn kernel_name(index: u32) -> Option<&'static str> {
    match index {
        COUNT_SENT => Some("sent"),
        COUNT_LOCAL => Some("local"),
        COUNT_SLOW => Some("slow"),
        COUNT_RECEIVED => Some("received"),
        _ => DropReason::ALL.into_iter().find(|reason| *reason as u32 == index).map(DropReason::name),
    }
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    drops: [AtomicU64; DropReason::ALL.len()],
    counts: [AtomicU64; Count::ALL.len()],
}

impl Counters {
    pub(super) fn dropped(&self, reason: DropReason) {
        self.drops[reason as usize].fetch_add(1, Relaxed);
    }

    pub(super) fn add(&self, count: Count, packets: u64) {
        self.counts[count as usize].fetch_add(packets, Relaxed);
    }

    pub(super) fn count(&self, count: Count) -> u64 {
        self.counts[count as usize].load(Relaxed)
    }

    pub(super) fn sum(&self) -> u64 {
        self.counts.iter().chain(&self.drops).fold(0, |sum, cell| sum.wrapping_add(cell.load(Relaxed)))
    }

    pub(super) fn read(&self) -> Vec<(String, u64)> {
        let drops = DropReason::ALL.into_iter().map(DropReason::name).zip(&self.drops);
        let counts = Count::ALL.into_iter().map(Count::name).zip(&self.counts);
        counts.chain(drops).map(|(name, cell)| (name.to_owned(), cell.load(Relaxed))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cell_has_a_name_of_its_own() {
        let counters = Counters::default();
        for count in Count::ALL {
            counters.add(count, 1);
        }
        for reason in DropReason::ALL {
            counters.dropped(reason);
        }
        assert_eq!(counters.sum(), (Count::ALL.len() + DropReason::ALL.len()) as u64);
        let mut read = counters.read();
        assert!(read.iter().all(|(_, value)| *value == 1), "{read:?}");
        read.sort();
        read.dedup_by(|a, b| a.0 == b.0);
        assert_eq!(read.len(), Count::ALL.len() + DropReason::ALL.len());
    }
}
