//! Names: asks the resolvers of `/etc/resolv.conf` as a C library does, and is a resolver that knows one name. Written by hand on both
//! sides, so that nothing of what is tested tests itself.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::time::{Duration, Instant};

use super::{Outcome, client_socket};

const PORT: u16 = 53;
const PATIENCE: Duration = Duration::from_secs(5);
const NUMBER: [u8; 2] = [0x4e, 0x45];
const A: u16 = 1;
const AAAA: u16 = 28;

/// Prints the response code, the addresses, who answered, and how long it took.
pub(crate) fn lookup(name: &str, kind: &str) -> Outcome {
    let kind = match kind {
        "A" => A,
        "AAAA" => AAAA,
        _ => return Err("A or AAAA".into()),
    };
    let conf = fs::read_to_string("/etc/resolv.conf")?;
    let servers: Vec<IpAddr> = conf
        .lines()
        .filter_map(|line| line.strip_prefix("nameserver "))
        .map(|address| address.trim().parse())
        .collect::<Result<_, _>>()?;
    let question = question(name, kind);
    let begin = Instant::now();
    for server in &servers {
        let socket = client_socket((*server, PORT).into())?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let mut answer = [0; 2_048];
        let Ok(length) = socket.send(&question).and_then(|_| socket.recv(&mut answer)) else { continue };
        let (code, addresses) = read(&answer[..length], question.len())?;
        let addresses: Vec<String> = addresses.iter().map(|address| format!("\"{address}\"")).collect();
        println!(
            r#"{{"code":{code},"addresses":[{}],"server":"{server}","servers":{},"ms":{}}}"#,
            addresses.join(","),
            servers.len(),
            begin.elapsed().as_millis()
        );
        return Ok(());
    }
    Err(format!("none of {servers:?} answers").into())
}

/// Answers A questions for the name, and that there is no other name.
pub(crate) fn serve(at: &str, name: &str, address: &str) -> Outcome {
    let (at, address): (IpAddr, Ipv4Addr) = (at.parse()?, address.parse()?);
    let socket = UdpSocket::bind((at, PORT))?;
    println!("serving {name} at {at}");
    let known = question(name, A);
    let mut buffer = [0; 2_048];
    loop {
        let Ok((length, client)) = socket.recv_from(&mut buffer) else { continue };
        let Some(asked) = buffer[..length].get(12..) else { continue };
        let ours = asked.len() >= known.len() - 12 && asked[..known.len() - 12].eq_ignore_ascii_case(&known[12..]);
        let end = 12 + asked.iter().position(|byte| *byte == 0).map_or(0, |zero| zero + 5).min(asked.len());
        let mut answer = buffer[..end].to_vec();
        answer[2..4].copy_from_slice(&if ours { [0x81, 0x80] } else { [0x81, 0x83] });
        answer[6..12].copy_from_slice(&[0, u8::from(ours), 0, 0, 0, 0]);
        if ours {
            // The name of the question, A, IN, a minute, four bytes.
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
            answer.extend(address.octets());
        }
        let _ = socket.send_to(&answer, client);
    }
}

fn question(name: &str, kind: u16) -> Vec<u8> {
    let mut question = NUMBER.to_vec();
    question.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
    for label in name.split('.').filter(|label| !label.is_empty()) {
        question.push(u8::try_from(label.len()).unwrap_or(63));
        question.extend(label.bytes());
    }
    question.push(0);
    question.extend(kind.to_be_bytes());
    question.extend(1_u16.to_be_bytes());
    question
}

/// The response code and the addresses of an answer whose question ends at `at`.
fn read(answer: &[u8], mut at: usize) -> Outcome<(u8, Vec<IpAddr>)> {
    let short = || "a short answer";
    if answer.len() < 12 || answer[..2] != NUMBER {
        return Err("an answer to another question".into());
    }
    let mut addresses = Vec::new();
    for _ in 0..u16::from_be_bytes([answer[6], answer[7]]) {
        at = after_name(answer, at).ok_or_else(short)?;
        let fixed: &[u8; 10] = answer.get(at..at + 10).and_then(|bytes| bytes.try_into().ok()).ok_or_else(short)?;
        let length = usize::from(u16::from_be_bytes([fixed[8], fixed[9]]));
        let data = answer.get(at + 10..at + 10 + length).ok_or_else(short)?;
        match u16::from_be_bytes([fixed[0], fixed[1]]) {
            A => addresses.push(Ipv4Addr::from(<[u8; 4]>::try_from(data)?).into()),
            AAAA => addresses.push(Ipv6Addr::from(<[u8; 16]>::try_from(data)?).into()),
            _ => {}
        }
        at += 10 + length;
    }
    Ok((answer[3] & 0x0f, addresses))
}

/// Where a name ends: with a zero, or with a pointer to the rest.
fn after_name(answer: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *answer.get(at)? {
            0 => return Some(at + 1),
            length if length >= 0xc0 => return Some(at + 2),
            length => at += 1 + usize::from(length),
        }
    }
}
