//! The host's own resolvers, for names that are not ours: read from where the host keeps them, read again when that changes, asked
//! one after the other. A question goes out under a number and from a port of its own; an answer that does not repeat both number and
//! question is none.

use std::collections::HashMap;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

use super::PORT;

/// So long a resolver has, and one that was silent lately; all of them together.
const PATIENCE: Duration = Duration::from_secs(2);
const LITTLE_PATIENCE: Duration = Duration::from_millis(250);
const IN_ALL: Duration = Duration::from_secs(4);
/// For so long a silent resolver is known as such.
const SILENT: Duration = Duration::from_secs(10);
/// No more than these are asked, as `resolv.conf(5)` has it.
const MOST: usize = 3;
/// The files are looked at no more often.
const LOOK: Duration = Duration::from_secs(1);
/// Longer answers are read to their end by TCP only.
const DATAGRAM: usize = 4_096;

/// How a question came, and goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Transport {
    Udp,
    Tcp,
}

/// No resolver has answered, or there is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NoAnswer;

#[derive(Debug)]
pub(super) struct Upstreams {
    /// The host's file, and the one behind systemd-resolved's local stub.
    files: [PathBuf; 2],
    port: u16,
    state: Mutex<State>,
    numbers: RandomState,
    count: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    servers: Vec<SocketAddr>,
    /// What the files were when they were read: inode, length, time of change.
    stamps: [Option<(u64, u64, i64, i64)>; 2],
    looked: Option<Instant>,
    silent: HashMap<SocketAddr, Instant>,
    avoided: Vec<IpAddr>,
}

impl Upstreams {
    pub(super) fn of_this_host() -> Self {
        Self::of(["/etc/resolv.conf".into(), "/run/systemd/resolve/resolv.conf".into()], PORT)
    }

    pub(super) fn of(files: [PathBuf; 2], port: u16) -> Self {
        Self { files, port, state: Mutex::default(), numbers: RandomState::new(), count: AtomicU64::new(0) }
    }

    /// Never asks at these addresses: they are our own.
    pub(super) fn avoid(&self, addresses: &[IpAddr]) {
        let mut state = self.state();
        (state.avoided, state.looked, state.stamps) = (addresses.to_vec(), None, [None; 2]);
    }

    /// The answer of the first resolver that has one, under the number of the question.
    pub(super) async fn ask(&self, question: &[u8], transport: Transport) -> Result<Vec<u8>, NoAnswer> {
        let Some(end) = end_of_question(question) else { return Err(NoAnswer) };
        let deadline = Instant::now() + IN_ALL;
        let mut unhelpful = None;
        for server in self.servers() {
            let patience = self.patience(server).min(deadline.saturating_duration_since(Instant::now()));
            let mut sent = question.to_vec();
            let number = self.number();
            sent[..2].copy_from_slice(&number);
            let asked = async {
                match transport {
                    Transport::Udp => by_udp(server, &sent, end).await,
                    Transport::Tcp => by_tcp(server, &sent, end).await,
                }
            };
            match tokio::time::timeout(patience, asked).await {
                Ok(Ok(mut answer)) => {
                    self.state().silent.remove(&server);
                    answer[..2].copy_from_slice(&question[..2]);
                    // "server failure" and "refused": another one may do better.
                    if matches!(answer[3] & 0x0f, 2 | 5) {
                        unhelpful = Some(answer);
                        continue;
                    }
                    return Ok(answer);
                }
                // Not there at all: that is known at once, next time too.
                Ok(Err(_)) => {}
                Err(_) => drop(self.state().silent.insert(server, Instant::now())),
            }
        }
        unhelpful.ok_or(NoAnswer)
    }

    pub(super) fn servers(&self) -> Vec<SocketAddr> {
        let mut state = self.state();
        let now = Instant::now();
        if state.looked.is_some_and(|looked| now.saturating_duration_since(looked) < LOOK) {
            return state.servers.clone();
        }
        state.looked = Some(now);
        let stamp = |file: &PathBuf| {
            let data = fs::metadata(file).ok()?;
            Some((data.ino(), data.len(), data.mtime(), data.mtime_nsec()))
        };
        let stamps = [stamp(&self.files[0]), stamp(&self.files[1])];
        if stamps != state.stamps || state.servers.is_empty() {
            let servers = self.read(&state.avoided);
            if servers != state.servers {
                tracing::info!(?servers, "names of others are asked of the host's resolvers");
            }
            (state.stamps, state.servers) = (stamps, servers);
            let known = state.servers.clone();
            state.silent.retain(|server, _| known.contains(server));
        }
        state.servers.clone()
    }

    fn read(&self, avoided: &[IpAddr]) -> Vec<SocketAddr> {
        let [host, behind] = &self.files;
        let of = |file: &PathBuf| name_servers(&fs::read_to_string(file).unwrap_or_default());
        let mut servers = of(host);
        if servers.iter().all(|server| is_stub(*server)) {
            let real = of(behind);
            if !real.is_empty() {
                servers = real;
            }
        }
        servers.retain(|server| !avoided.contains(server));
        servers.truncate(MOST);
        servers.into_iter().map(|server| SocketAddr::new(server, self.port)).collect()
    }

    fn patience(&self, server: SocketAddr) -> Duration {
        let silent = self.state().silent.get(&server).is_some_and(|since| since.elapsed() < SILENT);
        if silent { LITTLE_PATIENCE } else { PATIENCE }
    }

    /// One that nobody outside can guess: a keyed hash of a count.
    fn number(&self) -> [u8; 2] {
        let [a, b, ..] = self.numbers.hash_one(self.count.fetch_add(1, Ordering::Relaxed)).to_be_bytes();
        [a, b]
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The name servers of a resolv.conf, in order. A scope (`fe80::1%eth0`) is beyond us.
fn name_servers(text: &str) -> Vec<IpAddr> {
    let server = |line: &str| {
        let rest = line.trim_start().strip_prefix("nameserver")?;
        let address: IpAddr = rest.split_whitespace().next().filter(|_| rest.starts_with([' ', '\t']))?.parse().ok()?;
        (!address.is_unspecified() && !address.is_multicast()).then_some(address)
    };
    text.lines().filter_map(server).collect()
}

/// systemd-resolved's local stub.
fn is_stub(server: IpAddr) -> bool {
    [Ipv4Addr::new(127, 0, 0, 53), Ipv4Addr::new(127, 0, 0, 54)].map(IpAddr::from).contains(&server)
}

async fn by_udp(server: SocketAddr, question: &[u8], end: usize) -> io::Result<Vec<u8>> {
    let any: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(question).await?;
    let mut answer = vec![0; DATAGRAM];
    loop {
        let length = socket.recv(&mut answer).await?;
        // Whatever else comes to this port, the answer may still come.
        if answers(&answer[..length], question, end) {
            answer.truncate(length);
            return Ok(answer);
        }
    }
}

async fn by_tcp(server: SocketAddr, question: &[u8], end: usize) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(question.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), question].concat()).await?;
    let mut answer = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut answer).await?;
    if answers(&answer, question, end) { Ok(answer) } else { Err(io::Error::other("an answer to another question")) }
}

/// Is it the answer to this question? `end` is where the question ends.
fn answers(answer: &[u8], question: &[u8], end: usize) -> bool {
    let (Some(asked), Some(repeated)) = (question.get(12..end), answer.get(12..end)) else { return false };
    answer[..2] == question[..2]
        && answer[2] & 0x80 != 0
        && answer[4..6] == [0, 1]
        && asked.eq_ignore_ascii_case(repeated)
}

/// Where the one question of a message ends; `None` where it has another form.
fn end_of_question(message: &[u8]) -> Option<usize> {
    if message.get(4..6)? != [0, 1] {
        return None;
    }
    let mut at = 12;
    loop {
        match *message.get(at)? {
            0 => break,
            length @ 1..=63 => at += 1 + usize::from(length),
            _ => return None,
        }
    }
    let end = at + 1 + 4;
    (end <= message.len()).then_some(end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolvers_are_read_as_resolv_conf_has_them() {
        for (text, expected) in [
            ("nameserver 10.0.0.1\nsearch x\nnameserver fd00::1\n", vec!["10.0.0.1", "fd00::1"]),
            ("# nameserver 1.1.1.1\n  nameserver\t9.9.9.9 # mine\nnameserver bad\n", vec!["9.9.9.9"]),
            ("nameservers 1.1.1.1\nnameserver 0.0.0.0\nnameserver fe80::1%eth0\n", vec![]),
            ("", vec![]),
        ] {
            let expected: Vec<IpAddr> = expected.iter().map(|text| text.parse().unwrap()).collect();
            assert_eq!(name_servers(text), expected, "{text:?}");
        }
    }

    #[test]
    fn files_are_read_again_and_stubs_looked_behind() {
        let dir = tempfile::tempdir().unwrap();
        let (host, behind) = (dir.path().join("resolv.conf"), dir.path().join("behind"));
        let upstreams = Upstreams::of([host.clone(), behind.clone()], 53);
        let servers = || -> Vec<String> {
            upstreams.state().looked = None;
            upstreams.servers().iter().map(|server| server.ip().to_string()).collect()
        };
        assert_eq!(servers(), Vec::<String>::new());
        fs::write(&host, "nameserver 127.0.0.53\n").unwrap();
        assert_eq!(servers(), ["127.0.0.53"], "better than nothing: it is this host's");
        fs::write(&behind, "nameserver 192.0.2.7\n").unwrap();
        assert_eq!(servers(), ["192.0.2.7"]);
        fs::write(&host, "nameserver 127.0.0.1\nnameserver 10.18.0.1\n").unwrap();
        assert_eq!(servers(), ["127.0.0.1", "10.18.0.1"]);
        upstreams.avoid(&["10.18.0.1".parse().unwrap()]);
        assert_eq!(servers(), ["127.0.0.1"], "never ourselves");
    }

    #[test]
    fn only_the_answer_to_the_question_is_one() {
        let question = b"\x12\x34\x01\0\0\x01\0\0\0\0\0\0\x01a\x04test\0\0\x01\0\x01".to_vec();
        let end = end_of_question(&question).unwrap();
        assert_eq!(end, question.len());
        let mut answer = question.clone();
        answer[2] |= 0x80;
        assert!(answers(&answer, &question, end));
        for (at, what) in [(0, "number"), (2, "not an answer"), (13, "name"), (end - 3, "type")] {
            let mut other = answer.clone();
            other[at] ^= 0x81;
            assert!(!answers(&other, &question, end), "{what}");
        }
        assert!(!answers(&answer[..end - 1], &question, end));
        for short in 0..question.len() {
            assert_eq!(end_of_question(&question[..short]), None);
        }
    }
}
