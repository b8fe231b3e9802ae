//! A container as a place to send traffic from, and what it says about the answers.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::net::IpAddr;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::host::Host;
use crate::process::output;

/// Ports that every `probe serve` answers on.
pub const HTTP: u16 = 80;
/// Echo, TCP and UDP.
pub const ECHO: u16 = 7;
/// Takes a stream and checks its order.
pub const SINK: u16 = 9;

/// A running container of the lab's image.
#[derive(Clone, Copy, Debug)]
pub struct Container<'a> {
    pub host: &'a Host,
    /// Docker's id or name.
    pub name: &'a str,
}

/// Requests of their own connection each, and who answered.
#[derive(Clone, Debug, Deserialize)]
pub struct Gets {
    pub requests: u64,
    pub failed: u64,
    pub seconds: f64,
    /// Identity of the server and how many answers it gave.
    pub answers: BTreeMap<String, u64>,
    /// Addresses as which the servers saw the client.
    pub seen_as: BTreeMap<String, u64>,
    /// The first failure.
    pub error: String,
}

/// Datagrams and their echoes.
#[derive(Clone, Debug, Deserialize)]
pub struct Echoes {
    pub sent: u64,
    pub received: u64,
    pub answers: BTreeMap<String, u64>,
}

/// Transactions a second, one after the other.
#[derive(Clone, Debug, Deserialize)]
pub struct Rate {
    pub rate: f64,
    pub transactions: u64,
    pub failed: u64,
    /// From a question to its answer, or to the end of all patience.
    pub longest_ms: f64,
}

/// The end of a stream whose every byte was acknowledged, in order.
#[derive(Clone, Debug, Deserialize)]
pub struct Streamed {
    pub bytes: u64,
    pub seconds: f64,
    pub mbit_per_second: f64,
    pub longest_stall_ms: u64,
}

/// Does each datagram have its own flow?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flows {
    One,
    Many,
}

impl Container<'_> {
    /// A program in the container.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = self.host.command("docker");
        command.args(["exec", self.name]).args(words);
        command
    }

    pub fn get(&self, to: IpAddr, count: u32) -> Result<Gets> {
        self.probe(&["get", &socket(to, HTTP), &count.to_string()])
    }

    /// Who gets no answer within `patience` has failed; it is ten seconds otherwise.
    pub fn get_within(&self, to: IpAddr, count: u32, patience: Duration) -> Result<Gets> {
        self.probe(&["get", &socket(to, HTTP), &count.to_string(), &patience.as_secs_f64().to_string()])
    }

    pub fn echo(&self, to: IpAddr, count: u32, flows: Flows) -> Result<Echoes> {
        let flows = if flows == Flows::One { "one" } else { "many" };
        self.probe(&["udp", &socket(to, ECHO), &count.to_string(), flows])
    }

    /// Request and response over one connection.
    pub fn rr_tcp(&self, to: IpAddr, seconds: f64) -> Result<Rate> {
        self.probe(&["rr", "tcp", &socket(to, ECHO), &seconds.to_string()])
    }

    pub fn rr_udp(&self, to: IpAddr, seconds: f64) -> Result<Rate> {
        self.probe(&["rr", "udp", &socket(to, ECHO), &seconds.to_string()])
    }

    /// Connect, ask, read, close, again and again.
    pub fn connect(&self, to: IpAddr, seconds: f64) -> Result<Rate> {
        self.probe(&["connect", &socket(to, HTTP), &seconds.to_string()])
    }

    pub fn ping(&self, to: IpAddr) -> Result<()> {
        let program = if to.is_ipv4() { "ping" } else { "ping6" };
        output(&mut self.command(&[program, "-c", "3", "-i", "0.2", "-W", "3", &to.to_string()])).map(drop)
    }

    /// Begins a stream that goes on for so long.
    pub fn stream(&self, to: IpAddr, seconds: f64) -> Result<Stream> {
        Stream::begin(self.command(&["probe", "stream", &socket(to, SINK), &seconds.to_string()]))
    }

    fn probe<T: DeserializeOwned>(&self, words: &[&str]) -> Result<T> {
        let mut all = vec!["probe"];
        all.extend(words);
        parse(&output(&mut self.command(&all))?)
    }
}

/// What a probe printed, from wherever it ran.
pub fn parse<T: DeserializeOwned>(printed: &str) -> Result<T> {
    let line = printed.lines().rfind(|line| line.starts_with('{')).unwrap_or(printed);
    serde_json::from_str(line).with_context(|| format!("the probe said {printed:?}"))
}

/// `address:port` in either family.
pub fn socket(address: IpAddr, port: u16) -> String {
    std::net::SocketAddr::new(address, port).to_string()
}

/// A stream under way.
#[derive(Debug)]
pub struct Stream {
    child: Child,
    /// Milliseconds since it began, and bytes acknowledged.
    progress: Receiver<(u64, u64)>,
    last: u64,
    /// When something was acknowledged last, and the longest time that nothing was.
    at: u64,
    stall: u64,
    rest: thread::JoinHandle<String>,
}

impl Stream {
    /// Starts the program and waits until the first bytes have been acknowledged.
    fn begin(mut command: Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start the stream")?;
        let printed = child.stdout.take().context("the stream's output is not piped")?;
        let (tell, progress) = channel();
        let rest = thread::spawn(move || {
            let mut result = String::new();
            for line in BufReader::new(printed).lines().map_while(Result::ok) {
                let mut words = line.split(' ');
                match (words.next(), words.next().map(str::parse), words.next().map(str::parse)) {
                    (Some("progress"), Some(Ok(time)), Some(Ok(bytes))) => drop(tell.send((time, bytes))),
                    _ => result = line,
                }
            }
            result
        });
        let mut stream = Self { child, progress, last: 0, at: 0, stall: 0, rest };
        stream.advances(Duration::from_secs(10)).context("the stream did not begin")?;
        Ok(stream)
    }

    /// Waits until more has been acknowledged than when this was last asked.
    pub fn advances(&mut self, limit: Duration) -> Result<u64> {
        while let Ok((time, bytes)) = self.progress.try_recv() {
            self.note(time, bytes);
        }
        let deadline = std::time::Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            match self.progress.recv_timeout(left) {
                Ok((time, bytes)) if bytes > self.last => {
                    self.note(time, bytes);
                    return Ok(bytes);
                }
                Ok(_) => {}
                Err(_) => bail!("no more than {} bytes were acknowledged within {limit:?}", self.last),
            }
        }
    }

    /// Waits until so many bytes more have been acknowledged.
    pub fn carries(&mut self, bytes: u64, limit: Duration) -> Result<()> {
        while let Ok((time, acknowledged)) = self.progress.try_recv() {
            self.note(time, acknowledged);
        }
        let (deadline, goal) = (std::time::Instant::now() + limit, self.last + bytes);
        while self.last < goal {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            self.advances(left).with_context(|| format!("{} of {bytes} bytes were missing", goal - self.last))?;
        }
        Ok(())
    }

    /// Ends it where it is.
    pub fn stop(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The longest time without an acknowledgement, as far as was looked.
    pub fn longest_stall(&self) -> Duration {
        Duration::from_millis(self.stall)
    }

    fn note(&mut self, time: u64, bytes: u64) {
        if bytes > self.last {
            if self.last > 0 {
                self.stall = self.stall.max(time.saturating_sub(self.at));
            }
            (self.last, self.at) = (bytes, time);
        }
    }

    /// Waits for its end.
    pub fn finish(mut self) -> Result<Streamed> {
        let mut complaint = String::new();
        if let Some(mut errors) = self.child.stderr.take() {
            errors.read_to_string(&mut complaint).context("cannot read the stream's errors")?;
        }
        let status = self.child.wait().context("cannot wait for the stream")?;
        let result = self.rest.join().map_err(|_| anyhow::anyhow!("the stream's reader panicked"))?;
        if !status.success() {
            bail!("the stream ended with {status}: {}", complaint.trim());
        }
        parse(&result)
    }
}
