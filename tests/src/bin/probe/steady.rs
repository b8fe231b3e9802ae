//! Traffic that goes on until standard input closes, and says all the while what becomes of it, in lines
//! `progress <ms> <answered> <lost> <doubled> <silence>`: silence is the longest time in milliseconds without an answer since the
//! line before. The first line is `pid <number>`, the last one a sum as JSON.

use std::collections::BTreeSet;
use std::io::Read;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use super::{Outcome, client_socket, request};

/// A request that takes longer has failed.
const REQUEST: Duration = Duration::from_secs(2);
/// An echo is waited for so long; one that comes later counts as answered after all.
const ECHO: Duration = Duration::from_millis(50);
/// Datagrams on their way at a time, so that no socket's buffer overflows.
const BATCH: usize = 32;
/// Numbers that a flow remembers as lost.
const MOST_MISSING: usize = 4_096;
const EVERY: Duration = Duration::from_millis(100);
/// What is still on its way at the end may arrive for so long.
const LAST: Duration = Duration::from_secs(1);

/// Set when standard input has closed.
pub(crate) fn told() -> Arc<AtomicBool> {
    let told = Arc::new(AtomicBool::new(false));
    let tell = told.clone();
    thread::spawn(move || {
        let _ = std::io::stdin().read_to_end(&mut Vec::new());
        tell.store(true, Ordering::Relaxed);
    });
    told
}

#[derive(Default)]
struct Counts {
    sent: AtomicU64,
    answered: AtomicU64,
    lost: AtomicU64,
    doubled: AtomicU64,
    /// When the last answer came, and the longest time before one since that was last told.
    heard: Mutex<Option<(Instant, Duration)>>,
}

impl Counts {
    fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    fn answer(&self) {
        Self::add(&self.answered);
        if let Ok(mut heard) = self.heard.lock() {
            let now = Instant::now();
            let (last, longest) = heard.unwrap_or((now, Duration::ZERO));
            *heard = Some((now, longest.max(now - last)));
        }
    }

    /// Of what was lost, one has come after all.
    fn late(&self) {
        self.lost.fetch_sub(1, Ordering::Relaxed);
        self.answer();
    }

    fn silence(&self) -> Duration {
        let Ok(mut heard) = self.heard.lock() else { return Duration::ZERO };
        let Some((last, longest)) = *heard else { return Duration::ZERO };
        *heard = Some((last, Duration::ZERO));
        longest.max(last.elapsed())
    }

    fn tell(self: &Arc<Self>) {
        let (counts, begin) = (self.clone(), Instant::now());
        println!("pid {}", std::process::id());
        thread::spawn(move || {
            loop {
                thread::sleep(EVERY);
                let [answered, lost, doubled] =
                    [&counts.answered, &counts.lost, &counts.doubled].map(|counter| counter.load(Ordering::Relaxed));
                let silence = counts.silence().as_millis();
                println!("progress {} {answered} {lost} {doubled} {silence}", begin.elapsed().as_millis());
            }
        });
    }

    fn sum(&self, begin: Instant) {
        let [sent, answered, lost, doubled] =
            [&self.sent, &self.answered, &self.lost, &self.doubled].map(|counter| counter.load(Ordering::Relaxed));
        let seconds = begin.elapsed().as_secs_f64();
        println!(r#"{{"sent":{sent},"answered":{answered},"lost":{lost},"doubled":{doubled},"seconds":{seconds:.3}}}"#);
    }
}

/// Requests of their own connection each, so many milliseconds apart.
pub(crate) fn pulse(to: &str, gap: &str) -> Outcome {
    let (to, gap): (SocketAddr, u64) = (to.parse()?, gap.parse()?);
    let (told, counts, begin) = (told(), Arc::new(Counts::default()), Instant::now());
    counts.tell();
    while !told.load(Ordering::Relaxed) {
        Counts::add(&counts.sent);
        match request(to, REQUEST) {
            Ok(_) => counts.answer(),
            Err(error) => {
                eprintln!("after {} ms: {error}", begin.elapsed().as_millis());
                Counts::add(&counts.lost);
            }
        }
        thread::sleep(Duration::from_millis(gap));
    }
    counts.sum(begin);
    Ok(())
}

/// Numbered datagrams of so many flows and their echoes, so many a second in all; 0: as many as are answered.
pub(crate) fn flows(to: &str, flows: &str, rate: &str) -> Outcome {
    let (to, flows, rate): (SocketAddr, usize, u64) = (to.parse()?, flows.parse()?, rate.parse()?);
    let (told, counts, begin) = (told(), Arc::new(Counts::default()), Instant::now());
    counts.tell();
    let workers: usize = if rate == 0 { 2 } else { 1 };
    let mut running = Vec::new();
    for _ in 0..workers {
        let mut own = Vec::new();
        for _ in 0..flows.div_ceil(workers).max(1) {
            let socket = client_socket(to)?;
            socket.set_read_timeout(Some(ECHO))?;
            own.push(Flow { socket, next: 0, missing: BTreeSet::new() });
        }
        let (told, counts) = (told.clone(), counts.clone());
        running.push(thread::spawn(move || {
            let (mut at, mut size, mut sent) = (0, BATCH, 0);
            while !told.load(Ordering::Relaxed) {
                let end = (at + size).min(own.len());
                let whole = exchange(&mut own[at..end], &counts);
                sent += (end - at) as u64;
                at = if end == own.len() { 0 } else { end };
                // Where echoes are missing a single datagram asks for more: others may wait in a buffer still.
                size = if whole { BATCH } else { 1 };
                if let Some(due) = (1_000 * sent).checked_div(rate) {
                    thread::sleep(Duration::from_millis(due).saturating_sub(begin.elapsed()));
                }
            }
            thread::sleep(LAST);
            for flow in &mut own {
                let _ = flow.socket.set_nonblocking(true);
                while flow.hear(&counts).is_some() {}
            }
        }));
    }
    for worker in running {
        worker.join().map_err(|_| "a sender panicked")?;
    }
    counts.sum(begin);
    Ok(())
}

struct Flow {
    socket: UdpSocket,
    next: u64,
    missing: BTreeSet<u64>,
}

impl Flow {
    fn send(&mut self, counts: &Counts) {
        self.next += 1;
        Counts::add(&counts.sent);
        if self.socket.send(&self.next.to_be_bytes()).is_err() {
            // Reports an ICMP error of an earlier datagram, which was not this one's.
            let _ = self.socket.send(&self.next.to_be_bytes());
        }
    }

    /// The number of the next echo, where one comes in time.
    fn hear(&mut self, counts: &Counts) -> Option<u64> {
        let mut echo = [0; 512];
        let length = self.socket.recv(&mut echo).ok()?;
        let number = u64::from_be_bytes(*echo[..length].last_chunk()?);
        if self.missing.remove(&number) {
            counts.late();
        } else if number != self.next {
            Counts::add(&counts.doubled);
        }
        Some(number)
    }
}

/// One datagram of each flow, and their echoes; together they get the time of one. Have all come?
fn exchange(batch: &mut [Flow], counts: &Counts) -> bool {
    for flow in &mut *batch {
        flow.send(counts);
    }
    let mut late = false;
    for flow in batch {
        if late {
            let _ = flow.socket.set_nonblocking(true);
        }
        loop {
            match flow.hear(counts) {
                Some(number) if number == flow.next => {
                    counts.answer();
                    break;
                }
                Some(_) => {}
                None => {
                    Counts::add(&counts.lost);
                    if flow.missing.len() < MOST_MISSING {
                        flow.missing.insert(flow.next);
                    }
                    late = true;
                    break;
                }
            }
        }
        let _ = flow.socket.set_nonblocking(false);
    }
    !late
}
