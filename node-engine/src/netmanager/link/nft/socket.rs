//! The netfilter netlink socket: requests out, answers in.

use std::io;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::errno::Errno;
use nix::sys::socket::{setsockopt, sockopt};

const ERROR: u16 = 2;
const DONE: u16 = 3;
const DUMP_INTERRUPTED: u16 = 0x10;
const RETRIES: u32 = 8;

/// The kernel puts as many rows into one datagram as the reader has had room for, up to this.
const MOST: usize = 32 << 10;

/// `nlmsghdr` and `nfgenmsg`.
const NETLINK_HEADER: usize = 16;
const HEADERS: usize = 20;

/// One message from the kernel.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) kind: u16,
    pub(super) sequence: u32,
    /// Of a dump during which the tables have changed.
    interrupted: bool,
    body: Vec<u8>,
}

impl Answer {
    /// The errno of a refusal; 0 of an acknowledgement.
    pub(super) fn error(&self) -> Option<i32> {
        let code = i32::from_ne_bytes(self.body.get(..4)?.try_into().ok()?);
        (self.kind == ERROR).then_some(code.wrapping_neg())
    }

    pub(super) fn family(&self) -> Option<u8> {
        self.body.first().copied()
    }

    pub(super) fn attributes(&self) -> &[u8] {
        self.body.get(HEADERS - NETLINK_HEADER..).unwrap_or_default()
    }
}

/// Whole and of one moment: asked again when somebody has changed the tables meanwhile.
pub(super) fn dump(request: &[u8], wanted: u16) -> io::Result<Vec<Answer>> {
    let mut left = RETRIES;
    loop {
        let socket = open(request.len())?;
        socket.send(request, 0)?;
        let answers = receive(&socket)?;
        if left > 0 && answers.iter().any(|answer| answer.interrupted) {
            left -= 1;
            continue;
        }
        let refused = answers.iter().filter(|answer| answer.kind == ERROR).find_map(Answer::error);
        return match refused.map(Errno::from_raw) {
            None => Ok(answers.into_iter().filter(|answer| answer.kind == wanted).collect()),
            // No such table; no IPv6 in nf_tables.
            Some(Errno::ENOENT | Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP) => Ok(Vec::new()),
            Some(errno) => Err(errno.into()),
        };
    }
}

/// A socket that can send so many bytes at once, in the calling thread's namespace.
pub(super) fn open(bytes: usize) -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    socket.set_non_blocking(true)?;
    // Without it every refusal sends back the whole message.
    socket.set_cap_ack(true)?;
    let size = bytes * 2 + 65_536;
    // Above the system's limit if we may.
    setsockopt(&socket, sockopt::SndBufForce, &size).or_else(|_| setsockopt(&socket, sockopt::SndBuf, &size))?;
    let size = size * 4;
    setsockopt(&socket, sockopt::RcvBufForce, &size).or_else(|_| setsockopt(&socket, sockopt::RcvBuf, &size))?;
    Ok(socket)
}

/// All that the kernel has to say now.
pub(super) fn receive(socket: &Socket) -> io::Result<Vec<Answer>> {
    let mut answers = Vec::new();
    let mut bytes = Vec::with_capacity(MOST);
    loop {
        bytes.clear();
        match socket.recv_from(&mut bytes, 0) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(answers),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        let before = answers.len();
        split(&bytes, &mut answers);
        if answers[before..].iter().any(|answer| answer.kind == DONE) {
            return Ok(answers);
        }
    }
}

pub(super) fn split(mut bytes: &[u8], answers: &mut Vec<Answer>) {
    let field =
        |bytes: &[u8], at: usize| -> Option<u32> { Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?)) };
    while let (Some(length), Some(kind), Some(sequence)) = (field(bytes, 0), field(bytes, 4), field(bytes, 8)) {
        let Ok(length) = usize::try_from(length) else { return };
        let Some(body) = bytes.get(NETLINK_HEADER..length) else { return };
        // Type in the first two bytes in memory, flags in the other two.
        let [first, second, third, fourth] = kind.to_ne_bytes();
        let flags = u16::from_ne_bytes([third, fourth]);
        answers.push(Answer {
            kind: u16::from_ne_bytes([first, second]),
            sequence,
            interrupted: flags & DUMP_INTERRUPTED != 0,
            body: body.to_vec(),
        });
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
}
