//! Packets that wait for an address to become known. Pure: time is an argument.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use netmanager_common::addr::Addr;

/// Packets that may wait for one address.
const PER_ADDRESS: usize = 32;
/// Bytes that may wait in all.
const BYTES: usize = 1 << 20;
/// Addresses that may be asked for at a time, so that a scan of the service network is not passed on to the cluster.
const ADDRESSES: usize = 1024;
/// How long a packet may wait.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long an address that nobody knows is not asked for again.
const GIVEN_UP: Duration = Duration::from_secs(2);

/// What became of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It waits, and nobody has asked for the address yet.
    Ask,
    /// It waits, with others.
    Waits,
    /// Nobody knows the address: dropped.
    GivenUp,
    /// Too many addresses are being asked for: dropped.
    Refused,
}

/// A packet and what has to be known to carry it later.
#[derive(Debug)]
pub(super) struct Packet<O> {
    pub(super) origin: O,
    pub(super) bytes: Box<[u8]>,
    deadline: Instant,
    /// Age among all held packets.
    serial: u64,
}

/// Queues of packets, one for each unknown address.
#[derive(Debug)]
pub(super) struct Held<O> {
    queues: HashMap<Addr, VecDeque<Packet<O>>>,
    given_up: HashMap<Addr, Instant>,
    bytes: usize,
    serial: u64,
}

impl<O> Default for Held<O> {
    fn default() -> Self {
        Self { queues: HashMap::new(), given_up: HashMap::new(), bytes: 0, serial: 0 }
    }
}

impl<O> Held<O> {
    /// Holds a packet until `address` is known. Returns what became of it, and how many older packets had to make room.
    pub(super) fn hold(&mut self, address: Addr, origin: O, packet: &[u8], now: Instant) -> (Outcome, u64) {
        if self.given_up.get(&address).is_some_and(|until| now < *until) {
            return (Outcome::GivenUp, 0);
        }
        let known = self.queues.contains_key(&address);
        if !known && self.queues.len() >= ADDRESSES {
            return (Outcome::Refused, 0);
        }
        let mut crowded_out = 0;
        while self.bytes + packet.len() > BYTES && self.drop_oldest() {
            crowded_out += 1;
        }
        let queue = self.queues.entry(address).or_default();
        if queue.len() >= PER_ADDRESS
            && let Some(oldest) = queue.pop_front()
        {
            self.bytes -= oldest.bytes.len();
            crowded_out += 1;
        }
        self.bytes += packet.len();
        self.serial += 1;
        queue.push_back(Packet { origin, bytes: packet.into(), deadline: now + PATIENCE, serial: self.serial });
        (if known { Outcome::Waits } else { Outcome::Ask }, crowded_out)
    }

    /// The address is known now: what waits for it, oldest first.
    pub(super) fn release(&mut self, address: &Addr) -> VecDeque<Packet<O>> {
        self.given_up.remove(address);
        let packets = self.queues.remove(address).unwrap_or_default();
        self.bytes -= size(&packets);
        packets
    }

    /// Nobody knows the address. Returns what has waited for it.
    pub(super) fn give_up(&mut self, address: Addr, now: Instant) -> VecDeque<Packet<O>> {
        let packets = self.release(&address);
        if self.given_up.len() < ADDRESSES {
            self.given_up.insert(address, now + GIVEN_UP);
        }
        packets
    }

    /// Drops what has waited too long and returns how many packets. An address for which nothing waits any more is asked for again
    /// when the next packet comes.
    pub(super) fn expire(&mut self, now: Instant) -> u64 {
        self.given_up.retain(|_, until| now < *until);
        let mut expired = 0;
        let bytes = &mut self.bytes;
        self.queues.retain(|_, queue| {
            while let Some(packet) = queue.pop_front_if(|packet| packet.deadline <= now) {
                *bytes -= packet.bytes.len();
                expired += 1;
            }
            !queue.is_empty()
        });
        expired
    }

    /// When [`Self::expire`] has something to do next.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let packets = self.queues.values().filter_map(|queue| queue.front()).map(|packet| packet.deadline);
        packets.chain(self.given_up.values().copied()).min()
    }

    fn drop_oldest(&mut self) -> bool {
        let oldest = self.queues.iter().min_by_key(|(_, queue)| queue.front().map_or(u64::MAX, |packet| packet.serial));
        let Some(address) = oldest.map(|(address, _)| *address) else { return false };
        let Some(queue) = self.queues.get_mut(&address) else { return false };
        if let Some(packet) = queue.pop_front() {
            self.bytes -= packet.bytes.len();
        }
        // An empty queue stays: its address has been asked for, and the packet that comes next waits for the same answer.
        true
    }
}

fn size<O>(packets: &VecDeque<Packet<O>>) -> usize {
    packets.iter().map(|packet| packet.bytes.len()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_question_however_many_packets() {
        let (mut held, now) = (Held::default(), Instant::now());
        assert_eq!(held.hold(address(1), (), b"a", now), (Outcome::Ask, 0));
        assert_eq!(held.hold(address(1), (), b"b", now), (Outcome::Waits, 0));
        assert_eq!(held.hold(address(2), (), b"c", now), (Outcome::Ask, 0));
        assert_eq!(bytes(held.release(&address(1))), [b"a", b"b"]);
        assert_eq!(held.bytes, 1);
        assert_eq!(held.hold(address(1), (), b"d", now), (Outcome::Ask, 0), "asked anew after an answer");
    }

    #[test]
    fn the_oldest_of_an_address_makes_room() {
        let (mut held, now) = (Held::default(), Instant::now());
        for i in 0..PER_ADDRESS as u8 {
            assert_eq!(held.hold(address(1), (), &[i], now).1, 0);
        }
        assert_eq!(held.hold(address(1), (), &[99], now), (Outcome::Waits, 1));
        let left = bytes(held.release(&address(1)));
        assert_eq!((left.len(), left[0][0], left[PER_ADDRESS - 1][0]), (PER_ADDRESS, 1, 99));
    }

    #[test]
    fn the_oldest_of_all_makes_room_when_bytes_run_out() {
        let (mut held, now) = (Held::default(), Instant::now());
        let packet = vec![0; BYTES / 16];
        for i in 0..16 {
            assert_eq!(held.hold(address(i), (), &packet, now), (Outcome::Ask, 0));
        }
        assert_eq!(held.hold(address(99), (), &packet, now), (Outcome::Ask, 1));
        assert_eq!(held.bytes, BYTES);
        assert_eq!(held.release(&address(0)).len(), 0);
        assert_eq!(held.release(&address(1)).len(), 1);
    }

    #[test]
    fn each_packet_has_its_own_deadline() {
        let (mut held, start) = (Held::default(), Instant::now());
        held.hold(address(1), (), b"a", start);
        held.hold(address(1), (), b"b", start + Duration::from_secs(1));
        assert_eq!(held.next_deadline(), Some(start + PATIENCE));
        assert_eq!(held.expire(start + PATIENCE - Duration::from_millis(1)), 0);
        assert_eq!(held.expire(start + PATIENCE), 1);
        assert_eq!(held.hold(address(1), (), b"c", start + PATIENCE).0, Outcome::Waits, "one still waits");
        assert_eq!(held.expire(start + 3 * PATIENCE), 2);
        assert_eq!((held.bytes, held.next_deadline()), (0, None));
        assert_eq!(held.hold(address(1), (), b"d", start + 3 * PATIENCE).0, Outcome::Ask);
    }

    #[test]
    fn given_up_means_dropped_for_a_while() {
        let (mut held, start) = (Held::default(), Instant::now());
        held.hold(address(1), (), b"a", start);
        assert_eq!(held.give_up(address(1), start).len(), 1);
        assert_eq!(held.hold(address(1), (), b"b", start).0, Outcome::GivenUp);
        held.expire(start + GIVEN_UP);
        assert_eq!(held.hold(address(1), (), b"c", start + GIVEN_UP).0, Outcome::Ask);
        held.give_up(address(2), start);
        held.release(&address(2));
        assert_eq!(held.hold(address(2), (), b"d", start).0, Outcome::Ask, "a row takes the negative back");
    }

    #[test]
    fn a_scan_is_not_passed_on() {
        let (mut held, now) = (Held::default(), Instant::now());
        let outcomes: Vec<Outcome> =
            (0..2 * ADDRESSES as u32).map(|i| held.hold(address(i), (), b"x", now).0).collect();
        assert_eq!(outcomes.iter().filter(|outcome| **outcome == Outcome::Ask).count(), ADDRESSES);
        assert_eq!(outcomes.last(), Some(&Outcome::Refused));
    }

    fn address(i: u32) -> Addr {
        Addr::v4(i.to_be_bytes())
    }

    fn bytes(packets: VecDeque<Packet<()>>) -> Vec<Vec<u8>> {
        packets.into_iter().map(|packet| packet.bytes.into_vec()).collect()
    }
}
