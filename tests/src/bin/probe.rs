//! What runs inside the containers of the lab: a server that says who it is, and the clients that ask it. std only, built
//! statically, so that an image needs nothing else.
//!
//! `probe serve` answers on TCP 80 (HTTP), TCP and UDP 7 (echo), TCP 9 (sink that checks the order of what it gets). The clients
//! print one line of JSON; `stream` prints lines `progress <ms> <bytes>` before it.

#[path = "probe/names.rs"]
mod names;
#[path = "probe/steady.rs"]
mod steady;

use std::collections::BTreeMap;
use std::env;
use std::error::Error;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::process::CommandExt;
use std::process::{self, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

type Outcome<T = ()> = Result<T, Box<dyn Error>>;

const HTTP: u16 = 80;
const ECHO: u16 = 7;
const SINK: u16 = 9;
/// A stream is made of blocks that carry their own number at both ends.
const BLOCK: usize = 64 * 1024;
/// The sink acknowledges every so many blocks, and every block of a slow stream: a pause would be hidden between the acknowledgements.
const ACKNOWLEDGE_EVERY: u64 = 16;
const ACKNOWLEDGE_AFTER: Duration = Duration::from_millis(5);
const PATIENCE: Duration = Duration::from_secs(10);

const USAGE: &str = "usage: probe serve [TEXT]
       probe get ADDRESS:PORT COUNT
       probe udp ADDRESS:PORT COUNT [one|many] [GAP_MS]
       probe rr tcp|udp ADDRESS:PORT SECONDS
       probe connect ADDRESS:PORT SECONDS
       probe stream ADDRESS:PORT SECONDS [GAP_MS]
       probe hold ADDRESS:PORT COUNT
       probe pulse ADDRESS:PORT GAP_MS
       probe flows ADDRESS:PORT FLOWS PER_SECOND
       probe say ADDRESS:PORT TEXT [FROM:PORT]
       probe shell SCRIPT
       probe lookup NAME A|AAAA
       probe nameserver ADDRESS NAME IPV4";

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        ["serve", text @ ..] => serve(&text.join(" ")),
        ["get", to, count] => get(to, count, &PATIENCE.as_secs().to_string()),
        ["get", to, count, patience] => get(to, count, patience),
        ["udp", to, count] => udp(to, count, "one", "0"),
        ["udp", to, count, flows] => udp(to, count, flows, "0"),
        ["udp", to, count, flows, gap] => udp(to, count, flows, gap),
        ["rr", "tcp", to, seconds] => rr_tcp(to, seconds),
        ["rr", "udp", to, seconds] => rr_udp(to, seconds),
        ["connect", to, seconds] => connect(to, seconds),
        ["stream", to, seconds] => stream(to, seconds, None),
        ["stream", to, seconds, gap] => stream(to, seconds, Some(gap)),
        ["hold", to, count] => hold(to, count),
        ["pulse", to, gap] => steady::pulse(to, gap),
        ["flows", to, flows, rate] => steady::flows(to, flows, rate),
        ["lookup", name, kind] => names::lookup(name, kind),
        ["nameserver", at, name, address] => names::serve(at, name, address),
        ["shell", script] => shell(script),
        ["say", to, text] => say(to, text, None),
        ["say", to, text, from] => say(to, text, Some(from)),
        _ => Err(USAGE.into()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("probe: {error}");
            ExitCode::FAILURE
        }
    }
}

/// In place of this program, so that the script's end is its own.
fn shell(script: &str) -> Outcome {
    Err(process::Command::new("/bin/sh").args(["-c", script]).exec().into())
}

fn serve(text: &str) -> Outcome {
    let identity: Arc<str> = identity(text)?.into();
    let http = listen(HTTP)?;
    let echo = listen(ECHO)?;
    let sink = listen(SINK)?;
    let datagrams = bind(ECHO)?;
    println!("serving as {identity}");

    let name = identity.clone();
    thread::spawn(move || accept(&http, move |stream, peer| answer_http(stream, peer, &name)));
    thread::spawn(move || accept(&echo, |stream, _| echo_back(stream)));
    thread::spawn(move || accept(&sink, |stream, _| check_order(stream)));
    let mut buffer = vec![0; 65_536];
    loop {
        // An ICMP error of an earlier answer arrives here; it is not this socket's end.
        let Ok((length, peer)) = datagrams.recv_from(&mut buffer) else { continue };
        let mut reply = format!("{identity} ").into_bytes();
        reply.extend_from_slice(&buffer[..length]);
        let _ = datagrams.send_to(&reply, peer);
    }
}

/// Opens so many connections, says so, and with each line that it is told asks for an echo on every one of them.
fn hold(to: &str, count: &str) -> Outcome {
    let to: SocketAddr = to.parse()?;
    let connections = (0..count.parse()?).map(|_| TcpStream::connect_timeout(&to, PATIENCE));
    let mut connections: Vec<TcpStream> = connections.collect::<Result<_, _>>()?;
    for connection in &connections {
        connection.set_read_timeout(Some(PATIENCE))?;
    }
    println!("open");
    io::stdout().flush()?;
    for line in io::stdin().lines() {
        line?;
        let asked = connections.iter_mut().map(|connection| {
            connection.write_all(b"x")?;
            connection.read_exact(&mut [0; 1])
        });
        let broken = asked.filter(Result::is_err).count();
        println!("{{\"open\":{},\"broken\":{broken}}}", connections.len());
        io::stdout().flush()?;
    }
    Ok(())
}

/// The container's own name and a number that no other start of it has.
fn identity(text: &str) -> Outcome<String> {
    let host = fs::read_to_string("/proc/sys/kernel/hostname")?;
    let unique = fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    let unique = unique.split('-').next().unwrap_or_default();
    Ok(format!("{}{}/{unique}", if text.is_empty() { String::new() } else { format!("{text}@") }, host.trim()))
}

/// Both families where there are both.
fn listen(port: u16) -> io::Result<TcpListener> {
    TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))
}

fn bind(port: u16) -> io::Result<UdpSocket> {
    UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port)).or_else(|_| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)))
}

fn accept(listener: &TcpListener, answer: impl Fn(TcpStream, SocketAddr) -> io::Result<()> + Clone + Send + 'static) {
    loop {
        let Ok((stream, peer)) = listener.accept() else { continue };
        let answer = answer.clone();
        thread::spawn(move || {
            let _ = stream.set_nodelay(true);
            let _ = answer(stream, peer);
        });
    }
}

fn answer_http(stream: TcpStream, peer: SocketAddr, identity: &str) -> io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    while reader.read_line(&mut line)? > 2 {
        line.clear();
    }
    let body = format!("{identity} {}\n", peer.ip());
    let mut stream = stream;
    write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}", body.len())
}

fn echo_back(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            length => stream.write_all(&buffer[..length])?,
        }
    }
}

/// Reads blocks, ends the connection at the first one out of order.
fn check_order(mut stream: TcpStream) -> io::Result<()> {
    let mut block = vec![0; BLOCK];
    let mut last = Instant::now();
    for number in 0_u64.. {
        let done = stream.read_exact(&mut block).is_err();
        if !done && (block[..8] != number.to_be_bytes() || block[BLOCK - 8..] != number.to_be_bytes()) {
            return Err(io::Error::other("a block out of order"));
        }
        if done || (number + 1) % ACKNOWLEDGE_EVERY == 0 || last.elapsed() >= ACKNOWLEDGE_AFTER {
            last = Instant::now();
            stream.write_all(&(if done { number } else { number + 1 }).to_be_bytes())?;
        }
        if done {
            break;
        }
    }
    Ok(())
}

fn get(to: &str, count: &str, patience: &str) -> Outcome {
    let (to, count): (SocketAddr, u64) = (to.parse()?, count.parse()?);
    let patience = Duration::from_secs_f64(patience.parse()?);
    let mut answers = Answers::default();
    let begin = Instant::now();
    let mut seen_as = BTreeMap::new();
    for _ in 0..count {
        match request(to, patience) {
            Ok(body) => {
                let mut words = body.split_whitespace();
                answers.add(words.next().unwrap_or_default());
                *seen_as.entry(words.next().unwrap_or_default().to_owned()).or_insert(0_u64) += 1;
            }
            Err(error) => answers.failed(&error.to_string()),
        }
    }
    let seconds = begin.elapsed().as_secs_f64();
    println!(
        r#"{{"requests":{count},"failed":{},"seconds":{seconds:.6},"answers":{},"seen_as":{},"error":"{}"}}"#,
        answers.failures,
        object(&answers.by),
        object(&seen_as),
        answers.first_error.escape_default()
    );
    Ok(())
}

fn request(to: SocketAddr, patience: Duration) -> Outcome<String> {
    let mut stream = TcpStream::connect_timeout(&to, patience)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(patience))?;
    write!(stream, "GET / HTTP/1.1\r\nhost: {}\r\n\r\n", to.ip())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let body = answer.split_once("\r\n\r\n").ok_or("an answer without a body")?.1;
    Ok(body.trim().to_owned())
}

/// `one` flow for all datagrams, or `many`: a socket for each.
fn udp(to: &str, count: &str, flows: &str, gap: &str) -> Outcome {
    let (to, count): (SocketAddr, u32) = (to.parse()?, count.parse()?);
    let gap = Duration::from_millis(gap.parse()?);
    let mut sockets = Vec::new();
    let mut answers = Answers::default();
    for number in 0..count {
        if sockets.is_empty() || flows == "many" {
            sockets.push(client_socket(to)?);
        }
        let socket = sockets.last().ok_or("no socket")?;
        if socket.send(number.to_string().as_bytes()).is_err() {
            // Reports an ICMP error of an earlier datagram, which was not this one's.
            socket.send(number.to_string().as_bytes())?;
        }
        thread::sleep(gap);
    }
    let mut got = vec![false; count as usize];
    let deadline = Instant::now() + PATIENCE;
    let mut buffer = [0; 2048];
    for socket in &sockets {
        while got.iter().any(|got| !got) {
            let left = deadline.saturating_duration_since(Instant::now());
            socket.set_read_timeout(Some(left.clamp(Duration::from_millis(1), Duration::from_secs(3))))?;
            let Ok(length) = socket.recv(&mut buffer) else { break };
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            let Some((who, number)) = text.split_once(' ') else { continue };
            if let Some(got) = number.parse().ok().and_then(|number: usize| got.get_mut(number))
                && !std::mem::replace(got, true)
            {
                answers.add(who);
            }
            if flows == "many" {
                break;
            }
        }
    }
    let received = got.iter().filter(|got| **got).count();
    println!(r#"{{"sent":{count},"received":{received},"answers":{}}}"#, object(&answers.by));
    Ok(())
}

/// One datagram, and no answer is waited for.
fn say(to: &str, text: &str, from: Option<&str>) -> Outcome {
    let to: SocketAddr = to.parse()?;
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let from: SocketAddr = from.unwrap_or(any).parse()?;
    UdpSocket::bind(from)?.send_to(text.as_bytes(), to)?;
    Ok(())
}

fn client_socket(to: SocketAddr) -> io::Result<UdpSocket> {
    let any: SocketAddr =
        if to.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    Ok(socket)
}

fn rr_tcp(to: &str, seconds: &str) -> Outcome {
    let mut stream = TcpStream::connect_timeout(&to.parse()?, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut message = [7; 64];
    rate(seconds, move || {
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        Ok(())
    })
}

fn rr_udp(to: &str, seconds: &str) -> Outcome {
    let socket = client_socket(to.parse()?)?;
    socket.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut answer = [0; 512];
    rate(seconds, move || {
        socket.send(&[7; 64])?;
        socket.recv(&mut answer)?;
        Ok(())
    })
}

/// Connect, ask, read, close.
fn connect(to: &str, seconds: &str) -> Outcome {
    let to: SocketAddr = to.parse()?;
    rate(seconds, move || request(to, PATIENCE).map(drop))
}

fn rate(seconds: &str, mut transact: impl FnMut() -> Outcome) -> Outcome {
    let length = Duration::from_secs_f64(seconds.parse()?);
    // The first transaction may wait for the cluster's answer about the address.
    transact()?;
    let begin = Instant::now();
    let (mut transactions, mut failed, mut longest) = (0_u64, 0_u64, Duration::ZERO);
    while begin.elapsed() < length {
        let asked = Instant::now();
        match transact() {
            Ok(()) => transactions += 1,
            Err(_) => failed += 1,
        }
        longest = longest.max(asked.elapsed());
        if failed > 10 && transactions == 0 {
            return Err("no answers".into());
        }
    }
    let seconds = begin.elapsed().as_secs_f64();
    let rate = transactions as f64 / seconds;
    let longest = longest.as_secs_f64() * 1e3;
    println!(
        r#"{{"rate":{rate:.1},"transactions":{transactions},"failed":{failed},"longest_ms":{longest:.3},"seconds":{seconds:.6}}}"#
    );
    Ok(())
}

/// With a gap after each block it ends when standard input closes, if that is sooner.
fn stream(to: &str, seconds: &str, gap: Option<&str>) -> Outcome {
    let length = Duration::from_secs_f64(seconds.parse()?);
    let gap = gap.map(str::parse).transpose()?.map(Duration::from_millis);
    let told = gap.map(|_| steady::told()).unwrap_or_default();
    let mut stream = TcpStream::connect_timeout(&to.parse()?, PATIENCE)?;
    stream.set_write_timeout(Some(3 * PATIENCE))?;
    stream.set_read_timeout(Some(3 * PATIENCE))?;
    let begin = Instant::now();
    let acknowledged = Arc::new(AtomicU64::new(0));
    let reader = acknowledgements(stream.try_clone()?, acknowledged.clone());
    let shown = acknowledged.clone();
    thread::spawn(move || {
        loop {
            println!("progress {} {}", begin.elapsed().as_millis(), shown.load(Ordering::Relaxed) * BLOCK as u64);
            thread::sleep(Duration::from_millis(50));
        }
    });
    let mut block = vec![0; BLOCK];
    let mut number = 0_u64;
    while begin.elapsed() < length && !told.load(Ordering::Relaxed) {
        block[..8].copy_from_slice(&number.to_be_bytes());
        block[BLOCK - 8..].copy_from_slice(&number.to_be_bytes());
        if let Err(error) = stream.write_all(&block) {
            // The kernel tells a connection's error once, to whichever of the two asks first; the other hears of a broken pipe.
            let heard = reader.join().map_err(|_| "the reader panicked")?.err();
            return Err(format!("after {number} blocks: {error}; {}", heard.unwrap_or_default()).into());
        }
        number += 1;
        thread::sleep(gap.unwrap_or_default());
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    let stall = reader.join().map_err(|_| "the reader panicked")??;
    let bytes = acknowledged.load(Ordering::Relaxed) * BLOCK as u64;
    if bytes != number * BLOCK as u64 {
        return Err(format!("sent {} bytes, {bytes} were acknowledged", number * BLOCK as u64).into());
    }
    let seconds = begin.elapsed().as_secs_f64();
    let mbit = bytes as f64 * 8.0 / seconds / 1e6;
    println!(
        r#"{{"bytes":{bytes},"seconds":{seconds:.6},"mbit_per_second":{mbit:.1},"longest_stall_ms":{}}}"#,
        stall.as_millis()
    );
    Ok(())
}

/// Counts what the sink has taken until it closes; gives the longest time between two acknowledgements.
fn acknowledgements(mut stream: TcpStream, blocks: Arc<AtomicU64>) -> thread::JoinHandle<Result<Duration, String>> {
    thread::spawn(move || {
        let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
        let mut number = [0; 8];
        loop {
            match stream.read_exact(&mut number) {
                Ok(()) => blocks.store(u64::from_be_bytes(number), Ordering::Relaxed),
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(longest),
                Err(error) => return Err(format!("waiting for acknowledgements: {error}")),
            }
            longest = longest.max(last.elapsed());
            last = Instant::now();
        }
    })
}

/// Who answered how often.
#[derive(Default)]
struct Answers {
    by: BTreeMap<String, u64>,
    failures: u64,
    first_error: String,
}

impl Answers {
    fn add(&mut self, who: &str) {
        *self.by.entry(who.to_owned()).or_insert(0) += 1;
    }

    fn failed(&mut self, why: &str) {
        self.failures += 1;
        if self.first_error.is_empty() {
            why.clone_into(&mut self.first_error);
        }
    }
}

/// Identities hold no character that JSON would escape.
fn object(counts: &BTreeMap<String, u64>) -> String {
    let rows: Vec<String> = counts.iter().map(|(name, count)| format!(r#""{name}":{count}"#)).collect();
    format!("{{{}}}", rows.join(","))
}
