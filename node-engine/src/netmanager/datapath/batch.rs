//! Datagrams that leave together: what is read in one go is sent in as few calls as it takes. The kernel cuts a call's bytes into
//! datagrams of one length (`UDP_SEGMENT`), and takes them through its stack as one.
//!
//! Nothing is copied: a datagram is pieces of the buffer that its packet was read into, and headers that are written beside it.

use std::io::IoSlice;
use std::ops::Range;

use netmanager_common::abi::Peer;

use super::offload::Offload;
use super::socket::TunnelSocket;

/// Datagrams that the kernel takes in one call (`UDP_MAX_SEGMENTS` of all kernels), and their bytes.
pub(super) const SEGMENTS: usize = 64;
const SEGMENTS_LEN: usize = 65_507;
/// Calls that may be open at a time: packets for several peers go by turns.
const OPEN: usize = 8;

/// Part of a datagram.
#[derive(Clone, Debug)]
enum Piece {
    /// Of the buffer.
    Read(Range<usize>),
    /// Of the headers.
    Written(Range<usize>),
}

/// Datagrams of one call.
#[derive(Debug)]
struct Group {
    number: u32,
    peer: Peer,
    /// Of all datagrams but the last, which may be shorter.
    stride: usize,
    bytes: usize,
    count: usize,
    pieces: Vec<Piece>,
}

impl Group {
    fn takes(&self, number: u32, len: usize) -> bool {
        self.number == number
            && len <= self.stride
            // The last one was shorter.
            && self.bytes == self.count * self.stride
            && self.count < SEGMENTS
            && self.bytes + len <= SEGMENTS_LEN
    }
}

/// What waits to be sent. Rooms are kept from one use to the next.
#[derive(Debug, Default)]
pub(super) struct Batch {
    groups: Vec<Group>,
    /// How many of them are in use.
    used: usize,
    headers: Vec<u8>,
}

impl Batch {
    /// The packet at `at` of the buffer, as one datagram.
    pub(super) fn add(&mut self, number: u32, peer: &Peer, at: Range<usize>) {
        let group = self.group(number, peer, at.len());
        group.bytes += at.len();
        group.count += 1;
        group.pieces.push(Piece::Read(at));
    }

    /// A super-packet at `at` of the buffer, as many datagrams. `None` where it is none; then nothing of it is sent.
    pub(super) fn add_many(
        &mut self,
        number: u32,
        peer: &Peer,
        (buffer, at): (&[u8], Range<usize>),
        offload: &Offload,
    ) -> Option<()> {
        let packet = buffer.get(at.clone())?;
        let cut = offload.cut(packet)?;
        for segment in cut.segments() {
            let begin = self.headers.len();
            self.headers.extend_from_slice(&packet[..cut.headers_len()]);
            cut.finish(&mut self.headers[begin..], packet, &segment);
            let headers = begin..self.headers.len();
            let group = self.group(number, peer, headers.len() + segment.payload.len());
            group.bytes += headers.len() + segment.payload.len();
            group.count += 1;
            group.pieces.push(Piece::Written(headers));
            group.pieces.push(Piece::Read(at.start + segment.payload.start..at.start + segment.payload.end));
        }
        Some(())
    }

    /// Sends everything that waits, and returns how many datagrams the kernel took, and how many not.
    pub(super) fn flush(&mut self, buffer: &[u8], socket: &TunnelSocket) -> (u64, u64) {
        let (mut sent, mut refused) = (0, 0);
        for group in &mut self.groups[..self.used] {
            let taken = send(group, buffer, &self.headers, socket);
            sent += taken;
            refused += group.count as u64 - taken;
            group.pieces.clear();
        }
        self.used = 0;
        self.headers.clear();
        (sent, refused)
    }

    /// The peer of a datagram that waits, if it is this one.
    pub(super) fn peer(&self, number: u32) -> Option<Peer> {
        self.groups[..self.used].iter().rev().find(|group| group.number == number).map(|group| group.peer)
    }

    /// Where the next datagram of this length goes: after the others of its peer, as nothing may overtake them.
    fn group(&mut self, number: u32, peer: &Peer, len: usize) -> &mut Group {
        let open = self.groups[..self.used].iter().rev().take(OPEN).position(|group| group.number == number);
        let last = open.map(|back| self.used - 1 - back).filter(|at| self.groups[*at].takes(number, len));
        let at = last.unwrap_or_else(|| {
            let fresh = Group { number, peer: *peer, stride: len, bytes: 0, count: 0, pieces: Vec::new() };
            match self.groups.get_mut(self.used) {
                Some(group) => *group = Group { pieces: std::mem::take(&mut group.pieces), ..fresh },
                None => self.groups.push(fresh),
            }
            self.used += 1;
            self.used - 1
        });
        &mut self.groups[at]
    }
}

/// How many of the group's datagrams the kernel took.
fn send(group: &Group, buffer: &[u8], headers: &[u8], socket: &TunnelSocket) -> u64 {
    let mut slices = [IoSlice::new(&[]); 2 * SEGMENTS];
    for (slice, piece) in slices.iter_mut().zip(&group.pieces) {
        *slice = IoSlice::new(match piece {
            Piece::Read(range) => &buffer[range.clone()],
            Piece::Written(range) => &headers[range.clone()],
        });
    }
    socket.try_send_many(&slices[..group.pieces.len()], group.count, group.stride, &group.peer)
}
