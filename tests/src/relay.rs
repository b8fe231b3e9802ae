//! A relay between a node and a broker that takes its time.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// Passes on what comes to this port, `delay` later, and towards `to` no more than so many bytes a second (0: any).
pub fn run(port: u16, to: SocketAddr, delay: Duration, rate: u64) -> Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", port)).with_context(|| format!("cannot listen on {port}"))?;
    for stream in listener.incoming() {
        let (Ok(from), Ok(to)) = (stream, TcpStream::connect(to)) else { continue };
        let (Ok(from_too), Ok(to_too)) = (from.try_clone(), to.try_clone()) else { continue };
        thread::spawn(move || pass(from, to, delay, rate));
        thread::spawn(move || pass(to_too, from_too, delay, 0));
    }
    Ok(())
}

fn pass(mut from: TcpStream, mut to: TcpStream, delay: Duration, rate: u64) {
    let (sender, late): (_, Receiver<(Instant, Vec<u8>)>) = channel();
    let closes = from.try_clone();
    let writer = thread::spawn(move || {
        let mut waiting: VecDeque<u8> = VecDeque::new();
        for (due, bytes) in late {
            thread::sleep(due.saturating_duration_since(Instant::now()));
            waiting.extend(bytes);
            while !waiting.is_empty() {
                let some: Vec<u8> =
                    waiting.drain(..waiting.len().min(if rate == 0 { usize::MAX } else { 100 })).collect();
                if to.write_all(&some).is_err() {
                    return;
                }
                if let Some(pause) = (1_000 * some.len() as u64).checked_div(rate) {
                    thread::sleep(Duration::from_millis(pause));
                }
            }
        }
        let _ = to.shutdown(Shutdown::Both);
    });
    let mut bytes = [0; 4_096];
    // Reads no faster than it writes, so that a sender finds out.
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        if sender.send((Instant::now() + delay, bytes[..count].to_vec())).is_err() {
            break;
        }
        if let Some(pause) = (1_000 * count as u64).checked_div(rate) {
            thread::sleep(Duration::from_millis(pause));
        }
    }
    drop(sender);
    let _ = writer.join();
    if let Ok(from) = closes {
        let _ = from.shutdown(Shutdown::Both);
    }
}
