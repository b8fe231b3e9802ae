//! Fragments on their way: put together before the law sees them, and made anew where a link takes no more.
//!
//! Nobody on the wire gets an inner fragment: peers of the reference system damage them. Towards any peer the whole packet is one
//! datagram, which the underlay may cut.

use std::time::Instant;

use netmanager_common::abi::{CONFIG_RELAX_SOURCE, PEER_OURS};
use netmanager_common::addr::Addr;

use super::carry::{Carrier, Origin, source};
use super::counters::Count;
use super::fragments::Outcome;
use super::offload::Offload;
use super::projection::Projection;

impl<T: Projection> Carrier<T> {
    /// Takes in a fragment, and carries the packet that it completes.
    pub(super) fn join(&mut self, packet: &[u8], origin: Origin) {
        let account = match origin {
            Origin::Instance | Origin::Host => source(packet),
            Origin::Node(outer) => match self.sends_sound_fragments(packet, &outer) {
                Some(sound) => Some(outer).filter(|_| sound),
                // The cluster is asked who this is, as for any other packet of a stranger.
                None => return self.hold(source(packet), packet, origin, Offload::default()),
            },
        };
        let Some(account) = account else { return self.counters.add(Count::Fragment, 1) };
        let (outcome, crowded_out) = self.fragments.take(account, packet, Instant::now());
        self.counters.add(Count::Fragment, crowded_out);
        match outcome {
            Outcome::Waits => {}
            Outcome::Refused => self.counters.add(Count::Fragment, 1),
            Outcome::Whole(mut whole) => {
                self.counters.add(Count::Joined, 1);
                match origin {
                    Origin::Host => self.take_in_whole(&mut whole, &Offload::joined()),
                    Origin::Instance | Origin::Node(_) => self.carry_whole(&mut whole, origin, &Offload::joined()),
                }
            }
        }
    }

    /// Is the sender on a node of ours, and this that node? `None`: nobody knows the sender.
    fn sends_sound_fragments(&mut self, packet: &[u8], outer: &Addr) -> Option<bool> {
        let relaxed = self.tables.config().is_some_and(|config| config.flags & CONFIG_RELAX_SOURCE != 0);
        let sender = self.tables.service(&source(packet)?)?;
        let peer = self.tables.slot(sender.first).filter(|slot| slot.live() && slot.peer != 0).map(|slot| slot.peer);
        let peer = peer.and_then(|peer| self.tables.peer(peer));
        Some(peer.is_some_and(|peer| peer.flags & PEER_OURS != 0 && (relaxed || peer.host == *outer)))
    }

    /// Writes an IPv6 packet that is longer than the device's links take: no router may cut it.
    pub(super) fn write_cut(&mut self, packet: &[u8], offload: &Offload) -> bool {
        let mut whole = packet.to_vec();
        if offload.partial() && offload.complete(&mut whole).is_none() {
            return false;
        }
        let mut pieces = Vec::new();
        self.fragments.cut(&whole, self.mtu, |piece| pieces.push(piece.to_vec()));
        pieces.iter().all(|piece| self.write(piece, &Offload::default()))
    }
}
