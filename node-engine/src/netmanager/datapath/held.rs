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
/// Of that, what one sender may have: the cluster is asked for so many in little more than a second, which is what others wait at most.
const ADDRESSES_OF_ONE: usize = 64;
const BYTES_OF_ONE: usize = BYTES / 4;
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
    /// Too many addresses are being asked for, or too much waits for this sender: dropped.
    Refused,
}

/// A packet and what has to be known to carry it later.
#[derive(Debug)]
pub(super) struct Packet<O> {
    pub(super) origin: O,
    pub(super) bytes: Box<[u8]>,
    sender: Addr,
    deadline: Instant,
    /// Age among all held packets.
    serial: u64,
}

/// Queues of packets, one for each unknown address.
#[derive(Debug)]
pub(super) struct Held<O> {
    queues: HashMap<Addr, Queue<O>>,
    given_up: HashMap<Addr, Instant>,
    shares: HashMap<Addr, Share>,
    bytes: usize,
    serial: u64,
}

#[derive(Debug)]
struct Queue<O> {
    /// Whose packet came first.
    asker: Addr,
    packets: VecDeque<Packet<O>>,
}

/// What a sender has of all that waits.
#[derive(Debug, Default)]
struct Share {
    addresses: usize,
    bytes: usize,
}

impl<O> Default for Held<O> {
    fn default() -> Self {
        Self { queues: HashMap::new(), given_up: HashMap::new(), shares: HashMap::new(), bytes: 0, serial: 0 }
    }
}

impl<O> Held<O> {
    /// Holds a packet of `sender` until `address` is known. Returns what became of it, and how many older packets had to make room.
    pub(super) fn hold(
        &mut self,
        address: Addr,
        sender: Addr,
        origin: O,
        packet: &[u8],
        now: Instant,
    ) -> (Outcome, u64) {
        if self.given_up.get(&address).is_some_and(|until| now < *until) {
            return (Outcome::GivenUp, 0);
        }
        let known = self.queues.contains_key(&address);
        let share = self.shares.get(&sender);
        let crowd = self.queues.len() >= ADDRESSES || share.is_some_and(|share| share.addresses >= ADDRESSES_OF_ONE);
        if !known && crowd || share.is_some_and(|share| share.bytes + packet.len() > BYTES_OF_ONE) {
            return (Outcome::Refused, 0);
        }
        let mut crowded_out = 0;
        while self.bytes + packet.len() > BYTES && self.drop_oldest() {
            crowded_out += 1;
        }
        let queue = self.queues.entry(address).or_insert_with(|| Queue { asker: sender, packets: VecDeque::new() });
        let full = queue.packets.len() >= PER_ADDRESS;
        let oldest = queue.packets.pop_front_if(|_| full);
        self.serial += 1;
        let deadline = now + PATIENCE;
        queue.packets.push_back(Packet { origin, bytes: packet.into(), sender, deadline, serial: self.serial });
        crowded_out += u64::from(oldest.is_some());
        oldest.iter().for_each(|oldest| self.let_go(oldest));
        self.bytes += packet.len();
        let share = self.shares.entry(sender).or_default();
        share.bytes += packet.len();
        share.addresses += usize::from(!known);
        (if known { Outcome::Waits } else { Outcome::Ask }, crowded_out)
    }

    /// The address is known now: what waits for it, oldest first.
    pub(super) fn release(&mut self, address: &Addr) -> VecDeque<Packet<O>> {
        self.given_up.remove(address);
        let Some(queue) = self.queues.remove(address) else { return VecDeque::new() };
        queue.packets.iter().for_each(|packet| self.let_go(packet));
        self.answered(&queue.asker);
        queue.packets
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
        let (mut expired, mut askers) = (Vec::new(), Vec::new());
        self.queues.retain(|_, queue| {
            while let Some(packet) = queue.packets.pop_front_if(|packet| packet.deadline <= now) {
                expired.push(packet);
            }
            let waits = !queue.packets.is_empty();
            if !waits {
                askers.push(queue.asker);
            }
            waits
        });
        expired.iter().for_each(|packet| self.let_go(packet));
        askers.iter().for_each(|asker| self.answered(asker));
        expired.len() as u64
    }

    /// When [`Self::expire`] has something to do next.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let packets = self.queues.values().filter_map(|queue| queue.packets.front()).map(|packet| packet.deadline);
        packets.chain(self.given_up.values().copied()).min()
    }

    fn drop_oldest(&mut self) -> bool {
        let serial = |queue: &Queue<O>| queue.packets.front().map_or(u64::MAX, |packet| packet.serial);
        let Some(queue) = self.queues.values_mut().min_by_key(|queue| serial(queue)) else { return false };
        // An empty queue stays: its address has been asked for, and the packet that comes next waits for the same answer.
        if let Some(packet) = queue.packets.pop_front() {
            self.let_go(&packet);
        }
        true
    }

    /// A packet waits no longer.
    fn let_go(&mut self, packet: &Packet<O>) {
        self.bytes -= packet.bytes.len();
        self.change(&packet.sender, |share| share.bytes -= packet.bytes.len());
    }

    /// Nothing waits any more for an address for which this sender's packet was the first.
    fn answered(&mut self, asker: &Addr) {
        self.change(asker, |share| share.addresses -= 1);
    }

    fn change(&mut self, sender: &Addr, change: impl FnOnce(&mut Share)) {
        let Some(share) = self.shares.get_mut(sender) else { return };
        change(share);
        if share.addresses == 0 && share.bytes == 0 {
            self.shares.remove(sender);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_question_however_many_packets() {
        let (mut held, now) = (Held::default(), Instant::now());
        assert_eq!(held.hold(address(1), CALLER, (), b"a", now), (Outcome::Ask, 0));
        assert_eq!(held.hold(address(1), CALLER, (), b"b", now), (Outcome::Waits, 0));
        assert_eq!(held.hold(address(2), CALLER, (), b"c", now), (Outcome::Ask, 0));
        assert_eq!(bytes(held.release(&address(1))), [b"a", b"b"]);
        assert_eq!(held.bytes, 1);
        assert_eq!(held.hold(address(1), CALLER, (), b"d", now), (Outcome::Ask, 0), "asked anew after an answer");
    }

    #[test]
    fn the_oldest_of_an_address_makes_room() {
        let (mut held, now) = (Held::default(), Instant::now());
        for i in 0..PER_ADDRESS as u8 {
            assert_eq!(held.hold(address(1), CALLER, (), &[i], now).1, 0);
        }
        assert_eq!(held.hold(address(1), CALLER, (), &[99], now), (Outcome::Waits, 1));
        let left = bytes(held.release(&address(1)));
        assert_eq!((left.len(), left[0][0], left[PER_ADDRESS - 1][0]), (PER_ADDRESS, 1, 99));
    }

    #[test]
    fn the_oldest_of_all_makes_room_when_bytes_run_out() {
        let (mut held, now) = (Held::default(), Instant::now());
        let packet = vec![0; BYTES / 16];
        for i in 0..16 {
            assert_eq!(held.hold(address(i), sender(i / 4), (), &packet, now), (Outcome::Ask, 0));
        }
        assert_eq!(held.hold(address(98), sender(0), (), &packet, now), (Outcome::Refused, 0), "it has its share");
        assert_eq!(held.hold(address(99), sender(9), (), &packet, now), (Outcome::Ask, 1));
        assert_eq!(held.bytes, BYTES);
        assert_eq!(held.release(&address(0)).len(), 0);
        assert_eq!(held.release(&address(1)).len(), 1);
    }

    #[test]
    fn each_packet_has_its_own_deadline() {
        let (mut held, start) = (Held::default(), Instant::now());
        held.hold(address(1), CALLER, (), b"a", start);
        held.hold(address(1), CALLER, (), b"b", start + Duration::from_secs(1));
        assert_eq!(held.next_deadline(), Some(start + PATIENCE));
        assert_eq!(held.expire(start + PATIENCE - Duration::from_millis(1)), 0);
        assert_eq!(held.expire(start + PATIENCE), 1);
        assert_eq!(held.hold(address(1), CALLER, (), b"c", start + PATIENCE).0, Outcome::Waits, "one still waits");
        assert_eq!(held.expire(start + 3 * PATIENCE), 2);
        assert_eq!((held.bytes, held.next_deadline()), (0, None));
        assert_eq!(held.hold(address(1), CALLER, (), b"d", start + 3 * PATIENCE).0, Outcome::Ask);
    }

    #[test]
    fn given_up_means_dropped_for_a_while() {
        let (mut held, start) = (Held::default(), Instant::now());
        held.hold(address(1), CALLER, (), b"a", start);
        assert_eq!(held.give_up(address(1), start).len(), 1);
        assert_eq!(held.hold(address(1), CALLER, (), b"b", start).0, Outcome::GivenUp);
        held.expire(start + GIVEN_UP);
        assert_eq!(held.hold(address(1), CALLER, (), b"c", start + GIVEN_UP).0, Outcome::Ask);
        held.give_up(address(2), start);
        held.release(&address(2));
        assert_eq!(held.hold(address(2), CALLER, (), b"d", start).0, Outcome::Ask, "a row takes the negative back");
    }

    #[test]
    fn a_scan_is_not_passed_on() {
        let (mut held, now) = (Held::default(), Instant::now());
        let outcomes: Vec<Outcome> =
            (0..2 * ADDRESSES as u32).map(|i| held.hold(address(i), sender(i / 32), (), b"x", now).0).collect();
        assert_eq!(outcomes.iter().filter(|outcome| **outcome == Outcome::Ask).count(), ADDRESSES);
        assert_eq!(outcomes.last(), Some(&Outcome::Refused));
    }

    #[test]
    fn who_scans_leaves_room_for_others() {
        let (mut held, now) = (Held::default(), Instant::now());
        let scan = |held: &mut Held<()>, from: u32| {
            (from..from + 2_000).filter(|i| held.hold(address(*i), CALLER, (), b"x", now).0 == Outcome::Ask).count()
        };
        assert_eq!(scan(&mut held, 0), ADDRESSES_OF_ONE);
        assert_eq!(held.hold(address(9_000), sender(1), (), b"x", now).0, Outcome::Ask, "another is not kept back");
        assert_eq!(
            held.hold(address(9_000), CALLER, (), b"x", now).0,
            Outcome::Waits,
            "what others ask for costs nothing"
        );
        held.release(&address(3));
        held.give_up(address(4), now);
        assert_eq!(scan(&mut held, 10_000), 2, "what is answered makes room");
        held.expire(now + PATIENCE);
        assert!(held.shares.is_empty() && held.bytes == 0, "nothing is left of anybody: {:?}", held.shares);
    }

    const CALLER: Addr = Addr::v4([10, 18, 0, 2]);

    fn sender(i: u32) -> Addr {
        Addr::v4((0x0a12_0100 + i).to_be_bytes())
    }

    fn address(i: u32) -> Addr {
        Addr::v4(i.to_be_bytes())
    }

    fn bytes(packets: VecDeque<Packet<()>>) -> Vec<Vec<u8>> {
        packets.into_iter().map(|packet| packet.bytes.into_vec()).collect()
    }
}
