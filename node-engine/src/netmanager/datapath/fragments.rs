//! Puts fragments together, and takes apart what is too long for a link. Pure: time is an argument.
//!
//! Whoever sends fragments is charged for them, and only he loses some where they become too many: an instance by its address, a node
//! of ours by its outer one. A packet whose fragments overlap is nobody's honest one (RFC 5722) and is forgotten as a whole.

use std::collections::HashMap;
use std::ops::Range;
use std::time::{Duration, Instant};

use netmanager_common::addr::Addr;
use netmanager_common::checksum::{fold, sum};

/// Bytes that may wait, in all and of one source.
const BYTES: usize = 4 << 20;
const PER_SOURCE: usize = 512 << 10;
/// What a fragment counts beyond its own length.
const OVERHEAD: usize = 128;
/// Of one packet; the largest needs half as many on a link of 1,280 bytes.
const PIECES: usize = 128;
/// How long a packet may take to be whole (RFC 791 3.2).
const PATIENCE: Duration = Duration::from_secs(15);

const V4_LEN: usize = 20;
const V6_LEN: usize = 40;
const V6_FRAGMENT_LEN: usize = 8;
const V6_FRAGMENT: u8 = 44;
/// The longest packet there is.
const LONGEST: usize = 65_535;

/// Is the packet a fragment?
pub(super) fn is_fragment(packet: &[u8]) -> bool {
    match packet.first().map(|first| first >> 4) {
        Some(4) => packet.get(6..8).is_some_and(|field| field[0] & 0x3f != 0 || field[1] != 0),
        Some(6) => packet.get(6) == Some(&V6_FRAGMENT),
        _ => false,
    }
}

/// What became of a fragment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It waits for others.
    Waits,
    /// It was the last that was missing.
    Whole(Vec<u8>),
    /// It cannot belong to any packet, or its packet is forgotten.
    Refused,
}

/// Fragments of one packet: whom it is charged to, between whom it travels, and its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    account: Addr,
    source: Addr,
    destination: Addr,
    id: u32,
    protocol: u8,
}

#[derive(Debug)]
struct Partial {
    /// The headers before the fragmented part, as the first fragment has them, and the protocol of that part.
    headers: Option<(Vec<u8>, u8)>,
    /// In order, without overlaps.
    pieces: Vec<(usize, Box<[u8]>)>,
    /// Length of the fragmented part; only the last fragment tells.
    len: Option<usize>,
    /// Fragments of it have overlapped: none is taken until its time is over.
    spoilt: bool,
    charge: usize,
    deadline: Instant,
    serial: u64,
}

/// Packets of which some fragments have come.
#[derive(Debug, Default)]
pub(super) struct Fragments {
    partials: HashMap<Key, Partial>,
    accounts: HashMap<Addr, usize>,
    bytes: usize,
    serial: u64,
    /// The number of the last packet that was taken apart.
    number: u32,
}

impl Fragments {
    /// Takes a fragment at the charge of `account`. Returns what became of it, and how many others had to make room.
    pub(super) fn take(&mut self, account: Addr, packet: &[u8], now: Instant) -> (Outcome, u64) {
        let Some(piece) = Piece::read(packet) else { return (Outcome::Refused, 0) };
        let key = Key { account, ..piece.key };
        let charge = piece.data.len() + OVERHEAD;
        let crowded_out = self.make_room(&key, charge);
        self.serial += 1;
        let partial = self.partials.entry(key).or_insert_with(|| Partial {
            headers: None,
            pieces: Vec::new(),
            len: None,
            spoilt: false,
            charge: 0,
            deadline: now + PATIENCE,
            serial: self.serial,
        });
        let before = partial.charge;
        let taken = partial.insert(&piece, charge);
        let (after, whole) = (partial.charge, partial.whole());
        self.charge(account, before, after);
        match taken {
            true => match whole {
                Some(whole) => {
                    self.forget(&key);
                    (whole.map_or(Outcome::Refused, Outcome::Whole), crowded_out)
                }
                None => (Outcome::Waits, crowded_out),
            },
            false => (Outcome::Refused, crowded_out),
        }
    }

    /// Forgets what has waited too long and returns how many fragments.
    pub(super) fn expire(&mut self, now: Instant) -> u64 {
        let late: Vec<Key> =
            self.partials.iter().filter(|(_, partial)| partial.deadline <= now).map(|(key, _)| *key).collect();
        late.iter().map(|key| self.forget(key)).sum()
    }

    /// Does nothing wait, and is nobody charged?
    #[cfg(any(test, feature = "fuzzing"))]
    pub(super) fn is_empty(&self) -> bool {
        self.partials.is_empty() && self.accounts.is_empty() && self.bytes == 0
    }

    /// When [`Self::expire`] has something to do next.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.partials.values().map(|partial| partial.deadline).min()
    }

    /// Takes an IPv6 packet apart for a link of this MTU, on which nobody else may do so. Nothing where it has no room for that.
    pub(super) fn cut(&mut self, packet: &[u8], mtu: usize, mut each: impl FnMut(&[u8])) {
        let Some((header, data)) = packet.split_at_checked(V6_LEN) else { return };
        let room = mtu.saturating_sub(V6_LEN + V6_FRAGMENT_LEN) & !7;
        if room == 0 {
            return;
        }
        self.number = self.number.wrapping_add(1);
        let last = data.len().div_ceil(room).saturating_sub(1);
        for (index, chunk) in data.chunks(room).enumerate() {
            let more = u16::from(index != last);
            let mut fragment = header.to_vec();
            fragment[4..6].copy_from_slice(&((V6_FRAGMENT_LEN + chunk.len()) as u16).to_be_bytes());
            fragment[6] = V6_FRAGMENT;
            fragment.extend([header[6], 0]);
            fragment.extend(((index * room) as u16 | more).to_be_bytes());
            fragment.extend(self.number.to_be_bytes());
            fragment.extend(chunk);
            each(&fragment);
        }
    }

    /// Forgets packets until there is room for `charge` more: the oldest of this account where it has had its share, else the oldest of
    /// the account that has most.
    fn make_room(&mut self, key: &Key, charge: usize) -> u64 {
        let mut crowded_out = 0;
        loop {
            let greedy = if self.accounts.get(&key.account).copied().unwrap_or(0) + charge > PER_SOURCE {
                Some(key.account)
            } else if self.bytes + charge > BYTES {
                self.accounts.iter().max_by_key(|(_, bytes)| **bytes).map(|(account, _)| *account)
            } else {
                None
            };
            let Some(greedy) = greedy else { return crowded_out };
            let of = self.partials.iter().filter(|(key, _)| key.account == greedy);
            let Some(oldest) = of.min_by_key(|(_, partial)| partial.serial).map(|(key, _)| *key) else {
                return crowded_out;
            };
            crowded_out += self.forget(&oldest);
        }
    }

    fn forget(&mut self, key: &Key) -> u64 {
        let Some(partial) = self.partials.remove(key) else { return 0 };
        self.charge(key.account, partial.charge, 0);
        partial.pieces.len() as u64
    }

    fn charge(&mut self, account: Addr, before: usize, after: usize) {
        self.bytes = self.bytes + after - before;
        let of = self.accounts.entry(account).or_default();
        *of = *of + after - before;
        if *of == 0 {
            self.accounts.remove(&account);
        }
    }
}

impl Partial {
    /// False where the fragment is not taken.
    fn insert(&mut self, piece: &Piece<'_>, charge: usize) -> bool {
        if self.spoilt {
            return false;
        }
        let Range { start, end } = piece.range();
        let known_end = self.pieces.last().map_or(0, |(at, data)| at + data.len());
        let contradicts = match self.len {
            Some(len) => end > len || piece.last && end != len,
            None => piece.last && end < known_end,
        };
        let at = self.pieces.partition_point(|(at, _)| *at < start);
        if self.pieces.get(at).is_some_and(|(at, data)| (*at, data.len()) == (start, piece.data.len())) {
            // Once more the same.
            return !contradicts;
        }
        let overlaps = at > 0 && self.pieces[at - 1].0 + self.pieces[at - 1].1.len() > start
            || self.pieces.get(at).is_some_and(|(next, _)| *next < end);
        if contradicts || overlaps || self.pieces.len() >= PIECES {
            // What stands for it until its time is over.
            (self.pieces, self.headers, self.spoilt, self.charge) = (Vec::new(), None, true, OVERHEAD);
            return false;
        }
        self.pieces.insert(at, (start, piece.data.into()));
        self.charge += charge;
        if start == 0 {
            self.headers = Some((piece.headers.to_vec(), piece.protocol));
        }
        if piece.last {
            self.len = Some(end);
        }
        true
    }

    /// The packet, if nothing is missing; `Some(None)` where it is longer than a packet can be.
    fn whole(&self) -> Option<Option<Vec<u8>>> {
        let (Some(len), Some((headers, protocol))) = (self.len, &self.headers) else { return None };
        if self.pieces.iter().map(|(_, data)| data.len()).sum::<usize>() != len {
            return None;
        }
        let mut packet = Vec::with_capacity(headers.len() + len);
        packet.extend_from_slice(headers);
        self.pieces.iter().for_each(|(_, data)| packet.extend_from_slice(data));
        let v6 = packet[0] >> 4 == 6;
        let claimed = if v6 { packet.len() - V6_LEN } else { packet.len() };
        let Ok(claimed) = u16::try_from(claimed) else { return Some(None) };
        if v6 {
            packet[4..6].copy_from_slice(&claimed.to_be_bytes());
            packet[6] = *protocol;
        } else {
            packet[2..4].copy_from_slice(&claimed.to_be_bytes());
            // Neither a fragment, nor one that must not become some again.
            packet[6..8].fill(0);
            packet[10..12].fill(0);
            let header = !fold(sum(0, &packet[..headers.len()]));
            packet[10..12].copy_from_slice(&header.to_be_bytes());
        }
        Some(Some(packet))
    }
}

/// A fragment.
struct Piece<'a> {
    key: Key,
    headers: &'a [u8],
    protocol: u8,
    offset: usize,
    last: bool,
    data: &'a [u8],
}

impl<'a> Piece<'a> {
    fn read(packet: &'a [u8]) -> Option<Self> {
        let piece = match packet.first()? >> 4 {
            4 => Self::read_v4(packet)?,
            6 => Self::read_v6(packet)?,
            _ => return None,
        };
        let fits = !piece.data.is_empty()
            && (piece.last || piece.data.len().is_multiple_of(8))
            && piece.headers.len() + piece.range().end <= LONGEST + V6_LEN;
        // A fragment in a fragment would be put together here again and again.
        (fits && !(piece.headers.len() == V6_LEN && piece.protocol == V6_FRAGMENT)).then_some(piece)
    }

    fn read_v4(packet: &'a [u8]) -> Option<Self> {
        let header: &[u8; V4_LEN] = packet.first_chunk()?;
        let [_, _, len_a, len_b, id_a, id_b, flags, offset, _, protocol, _, _, a, b, c, d, e, f, g, h] = *header;
        let headers_len = usize::from(header[0] & 0x0f) * 4;
        let packet = packet.get(..usize::from(u16::from_be_bytes([len_a, len_b])))?;
        let (headers, data) = packet.split_at_checked(headers_len).filter(|_| headers_len >= V4_LEN)?;
        let (source, destination) = (Addr::v4([a, b, c, d]), Addr::v4([e, f, g, h]));
        let id = u16::from_be_bytes([id_a, id_b]).into();
        Some(Self {
            key: Key { account: Addr::NONE, source, destination, id, protocol },
            headers,
            protocol,
            offset: usize::from(u16::from_be_bytes([flags & 0x1f, offset])) * 8,
            last: flags & 0x20 == 0,
            data,
        })
    }

    fn read_v6(packet: &'a [u8]) -> Option<Self> {
        let header: &[u8; V6_LEN] = packet.first_chunk()?;
        let len = V6_LEN + usize::from(u16::from_be_bytes([header[4], header[5]]));
        let (headers, rest) = packet.get(..len)?.split_at(V6_LEN);
        let (&[protocol, _, a, b, id @ ..], data) = rest.split_first_chunk::<V6_FRAGMENT_LEN>()?;
        let (source, destination) = (Addr::v6(*header[8..].first_chunk()?), Addr::v6(*header[24..].first_chunk()?));
        let field = u16::from_be_bytes([a, b]);
        Some(Self {
            // RFC 8200 4.5: by addresses and number alone.
            key: Key { account: Addr::NONE, source, destination, id: u32::from_be_bytes(id), protocol: 0 },
            headers,
            protocol,
            offset: usize::from(field & !7),
            last: field & 1 == 0,
            data,
        })
    }

    fn range(&self) -> Range<usize> {
        self.offset..self.offset + self.data.len()
    }
}

#[cfg(test)]
mod tests {
    use netmanager_common::testing::{CLIENT, DB_SERVICE, Payload, checksums_hold, packet};
    use proptest::prelude::*;

    use super::*;

    /// A datagram with so much data.
    fn datagram(v6: bool, len: usize) -> Vec<u8> {
        let mut bytes = packet(CLIENT.of(v6), DB_SERVICE.of(v6), Payload::UdpBare(5_000, 53));
        let at = if v6 { V6_LEN } else { V4_LEN } + 8;
        bytes.truncate(at);
        bytes.extend((0..len).map(|i| (i * 31 + i / 251) as u8));
        let claimed = bytes.len() - if v6 { V6_LEN } else { 0 };
        let field = if v6 { 4..6 } else { 2..4 };
        bytes[field].copy_from_slice(&(claimed as u16).to_be_bytes());
        if !v6 {
            bytes[6..8].fill(0);
            seal(&mut bytes);
        }
        bytes
    }

    fn seal(bytes: &mut [u8]) {
        bytes[10..12].fill(0);
        let header = !fold(sum(0, &bytes[..V4_LEN]));
        bytes[10..12].copy_from_slice(&header.to_be_bytes());
    }

    /// Its fragments, as a kernel makes them for a link of this MTU.
    fn fragments(packet: &[u8], mtu: usize) -> Vec<Vec<u8>> {
        let mut all = Vec::new();
        if packet[0] >> 4 == 6 {
            Fragments::default().cut(packet, mtu, |fragment| all.push(fragment.to_vec()));
            return all;
        }
        let room = (mtu - V4_LEN) & !7;
        let (header, data) = packet.split_at(V4_LEN);
        for (index, chunk) in data.chunks(room).enumerate() {
            let more = if (index + 1) * room < data.len() { 0x2000 } else { 0 };
            let mut fragment = [header, chunk].concat();
            let len = fragment.len() as u16;
            fragment[2..4].copy_from_slice(&len.to_be_bytes());
            fragment[6..8].copy_from_slice(&((index * room / 8) as u16 | more).to_be_bytes());
            seal(&mut fragment);
            all.push(fragment);
        }
        all
    }

    fn account(i: u32) -> Addr {
        Addr::v4(i.to_be_bytes())
    }

    proptest! {
        #[test]
        fn any_order_gives_the_packet_that_was_cut(v6: bool, len in 1..65_000_usize, mtu in 1_280..1_500_usize, order: u64, again: bool) {
            let packet = datagram(v6, len);
            prop_assume!(packet.len() > mtu);
            let mut pieces = fragments(&packet, mtu);
            prop_assert!(pieces.iter().all(|piece| piece.len() <= mtu && is_fragment(piece)));
            // Shuffled, and perhaps the first of them twice.
            pieces.sort_by_key(|piece| piece.iter().fold(order | 1, |hash, byte| hash.rotate_left(5) ^ u64::from(*byte)).wrapping_mul(order | 1));
            let (mut waiting, now) = (Fragments::default(), Instant::now());
            if again {
                waiting.take(account(1), &pieces[0], now);
            }
            let (last, before) = pieces.split_last().unwrap();
            for piece in before {
                prop_assert_eq!(waiting.take(account(1), piece, now), (Outcome::Waits, 0));
            }
            let (Outcome::Whole(whole), 0) = waiting.take(account(1), last, now) else { panic!("not whole") };
            prop_assert!(whole == packet);
            prop_assert!(v6 || checksums_hold(&whole));
            prop_assert_eq!((waiting.bytes, waiting.accounts.len(), waiting.partials.len()), (0, 0, 0));
        }

        #[test]
        fn no_input_panics(bytes in proptest::collection::vec(any::<u8>(), 0..120), v4: bool, bits: u16) {
            let mut bytes = bytes;
            let (mut waiting, now) = (Fragments::default(), Instant::now());
            if bytes.len() > 60 {
                let len = bytes.len() as u16;
                if v4 {
                    (bytes[0], bytes[9]) = (0x45, 17);
                    bytes[2..4].copy_from_slice(&len.to_be_bytes());
                    bytes[6..8].copy_from_slice(&bits.to_be_bytes());
                } else {
                    (bytes[0], bytes[6]) = (0x60, V6_FRAGMENT);
                    bytes[4..6].copy_from_slice(&(len - 40).to_be_bytes());
                    bytes[42..44].copy_from_slice(&bits.to_be_bytes());
                }
            }
            let _ = is_fragment(&bytes);
            for _ in 0..2 {
                waiting.take(account(1), &bytes, now);
            }
            waiting.expire(now + PATIENCE);
            prop_assert_eq!((waiting.bytes, waiting.accounts.len()), (0, 0));
            waiting.cut(&bytes, bits.into(), |_| ());
        }
    }

    #[test]
    fn overlapping_fragments_spoil_their_packet() {
        for v6 in [false, true] {
            let (mut waiting, now) = (Fragments::default(), Instant::now());
            let pieces = fragments(&datagram(v6, 4_000), 1_450);
            let mut shifted = fragments(&datagram(v6, 4_000), 1_442);
            for piece in &mut shifted {
                // Of the same packet.
                let id = if v6 { 44..48 } else { 4..6 };
                piece[id.clone()].copy_from_slice(&pieces[0][id]);
                if !v6 {
                    seal(piece);
                }
            }
            assert_eq!(waiting.take(account(1), &pieces[0], now), (Outcome::Waits, 0));
            assert_eq!(waiting.take(account(1), &shifted[1], now), (Outcome::Refused, 0), "8 bytes of both");
            for piece in &pieces {
                assert_eq!(waiting.take(account(1), piece, now), (Outcome::Refused, 0), "it stays spoilt");
            }
            assert_eq!(waiting.bytes, OVERHEAD);
            waiting.expire(now + PATIENCE);
            assert_eq!((waiting.bytes, waiting.next_deadline()), (0, None));
            let outcomes = pieces.iter().map(|piece| waiting.take(account(1), piece, now).0);
            assert!(matches!(outcomes.last(), Some(Outcome::Whole(_))), "a new packet of that number is one");
        }
    }

    #[test]
    fn what_contradicts_itself_is_refused() {
        for v6 in [false, true] {
            let (mut waiting, now) = (Fragments::default(), Instant::now());
            let long = fragments(&datagram(v6, 4_000), 1_450);
            let short = fragments(&datagram(v6, 2_000), 1_450);
            waiting.take(account(1), &long[2], now);
            assert_eq!(waiting.take(account(1), &short[1], now).0, Outcome::Refused, "two ends");

            let mut odd = long[0].clone();
            odd.pop();
            let len = odd.len() - if v6 { V6_LEN } else { 0 };
            odd[if v6 { 4..6 } else { 2..4 }].copy_from_slice(&(len as u16).to_be_bytes());
            assert_eq!(waiting.take(account(2), &odd, now).0, Outcome::Refused, "not a multiple of eight bytes");
        }
        let mut nested = fragments(&datagram(true, 2_000), 1_450).remove(0);
        nested[40] = V6_FRAGMENT;
        assert_eq!(Fragments::default().take(account(1), &nested, Instant::now()).0, Outcome::Refused);
    }

    #[test]
    fn senders_do_not_meet_in_one_packet() {
        let (mut waiting, now) = (Fragments::default(), Instant::now());
        let pieces = fragments(&datagram(false, 2_000), 1_450);
        waiting.take(account(1), &pieces[0], now);
        assert_eq!(waiting.take(account(2), &pieces[1], now), (Outcome::Waits, 0));
    }

    #[test]
    fn each_packet_has_its_own_deadline() {
        let (mut waiting, start) = (Fragments::default(), Instant::now());
        let pieces = fragments(&datagram(false, 4_000), 1_450);
        waiting.take(account(1), &pieces[0], start);
        waiting.take(account(1), &pieces[1], start + PATIENCE / 2);
        assert_eq!(waiting.next_deadline(), Some(start + PATIENCE), "more of it is no delay");
        assert_eq!(waiting.expire(start + PATIENCE - Duration::from_millis(1)), 0);
        assert_eq!(waiting.expire(start + PATIENCE), 2);
        assert_eq!((waiting.bytes, waiting.accounts.len()), (0, 0));
    }

    #[test]
    fn only_the_greedy_lose() {
        let (mut waiting, now) = (Fragments::default(), Instant::now());
        let first = |id: u16| {
            let mut piece = fragments(&datagram(false, 4_000), 1_450).remove(0);
            piece[4..6].copy_from_slice(&id.to_be_bytes());
            piece
        };
        assert_eq!(waiting.take(account(1), &first(1), now), (Outcome::Waits, 0));
        let flood = PER_SOURCE / 1_000;
        let crowded: u64 = (0..flood as u16).map(|id| waiting.take(account(2), &first(id), now).1).sum();
        assert!(crowded > 0 && waiting.accounts[&account(2)] <= PER_SOURCE);
        // Many who each stay within their share.
        for i in 0..40 {
            for id in 0..200 {
                waiting.take(account(100 + i), &first(id), now);
            }
        }
        assert!(waiting.bytes <= BYTES, "{}", waiting.bytes);
        let rest = fragments(&datagram(false, 4_000), 1_450).into_iter().skip(1).map(|mut piece| {
            piece[4..6].copy_from_slice(&1_u16.to_be_bytes());
            piece
        });
        let outcome = rest.map(|piece| waiting.take(account(1), &piece, now).0).last();
        assert!(matches!(outcome, Some(Outcome::Whole(_))), "the modest one's packet was complete all the time");
    }
}
