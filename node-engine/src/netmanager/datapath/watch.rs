//! Looks whether the kernel's programs are where they were put: links go away where somebody detaches them, and packets in framing, which
//! only a program takes, are lost from then on. A thread of its own, that mostly sleeps.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use tokio::sync::mpsc;

use super::ebpf::{Hook, Kernel};
use super::{DatapathError, Port};

/// Between two looks at the uplinks, while packets come; the other interfaces get one look each by turns, as their packets find the
/// slow path by themselves.
const PAUSE: Duration = Duration::from_millis(25);
/// Pauses between two looks while none come: a look is some forty system calls, and nothing is lost.
const IDLE: u32 = 20;

/// A program that is not where it was put.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Gone {
    pub(super) hook: Hook,
    pub(super) port: Port,
}

/// Watches until the kernel's side is dropped.
pub(super) fn start(kernel: &Arc<Kernel>, alarm: &mpsc::Sender<Gone>) -> Result<(), DatapathError> {
    let (kernel, alarm) = (Arc::downgrade(kernel), alarm.clone());
    let thread = thread::Builder::new().name("watch".into()).spawn(move || watch(&kernel, &alarm));
    thread.map(drop).map_err(|error| DatapathError::Step { step: "watch programs", reason: error.to_string() })
}

fn watch(kernel: &Weak<Kernel>, alarm: &mpsc::Sender<Gone>) {
    let mut arrivals = Arrivals::default();
    let mut turn = 0_usize;
    let mut paused = 0;
    let mut uplinks: Vec<(Hook, Port)> = Vec::new();
    loop {
        thread::sleep(PAUSE);
        let Some(kernel) = kernel.upgrade() else { return };
        paused += 1;
        let more = arrivals.more(uplinks.iter().map(|(_, port)| port.name.as_str()));
        if !more && paused < IDLE {
            continue;
        }
        paused = 0;
        let others: Vec<_>;
        (uplinks, others) =
            kernel.attached().into_iter().partition(|(hook, _)| matches!(hook, Hook::Uplink | Hook::Framed));
        turn = turn.wrapping_add(1);
        let other = others.get(turn % others.len().max(1)).cloned();
        for (hook, port) in uplinks.iter().cloned().chain(other) {
            // Full: there is enough to do.
            if !kernel.holds(hook, port.ifindex) {
                let _ = alarm.try_send(Gone { hook, port });
            }
        }
    }
}

/// How many packets have come in, as the interfaces count them: whether a program took them or not.
#[derive(Debug, Default)]
struct Arrivals {
    before: Option<u64>,
    /// Their counters stay open: each look is one system call, and there are forty a second.
    counters: Vec<(String, File)>,
}

impl Arrivals {
    /// Whether packets have come since the last time, or may have.
    fn more<'a>(&mut self, interfaces: impl Iterator<Item = &'a str>) -> bool {
        let mut last = "";
        let mut sum = 0_u64;
        let mut known = true;
        for name in interfaces {
            // One with several programs comes several times, one after the other.
            if name != std::mem::replace(&mut last, name) {
                match self.received(name) {
                    Some(packets) => sum = sum.wrapping_add(packets),
                    None => known = false,
                }
            }
        }
        let before = std::mem::replace(&mut self.before, known.then_some(sum));
        !known || before != Some(sum)
    }

    fn received(&mut self, interface: &str) -> Option<u64> {
        let at = match self.counters.iter().position(|(name, _)| name == interface) {
            Some(at) => at,
            None => {
                let counter = File::open(format!("/sys/class/net/{interface}/statistics/rx_packets")).ok()?;
                self.counters.push((interface.to_owned(), counter));
                self.counters.len() - 1
            }
        };
        let packets = number(&self.counters[at].1);
        if packets.is_none() {
            // The interface has gone; there may be another of its name.
            self.counters.swap_remove(at);
        }
        packets
    }
}

fn number(counter: &File) -> Option<u64> {
    let mut digits = [0; 24];
    let len = counter.read_at(&mut digits, 0).ok()?;
    std::str::from_utf8(&digits[..len]).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    #[test]
    fn packets_that_come_are_noticed() {
        let mut arrivals = Arrivals::default();
        assert!(arrivals.more(["lo", "lo"].into_iter()), "nothing was known before");
        let socket = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        socket.send_to(b"x", socket.local_addr().expect("an address")).expect("sent");
        assert!(arrivals.more(["lo", "lo"].into_iter()));
        assert!(arrivals.more(["no such interface"].into_iter()), "what cannot be known may be");
        assert!(arrivals.more(["no such interface"].into_iter()));
        // Another's packets may come by between two looks, but not always.
        let quiet = (0..1_000).any(|_| !arrivals.more(["lo"].into_iter()));
        assert!(quiet, "none has come");
    }
}
