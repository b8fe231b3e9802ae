//! The counters that the kernel keeps of a process and of what leaves its machine.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::cluster::BROKER_PORT;
use crate::node::{Node, Status};
use crate::wait::until;

/// What a daemon has used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Bytes in memory, those that others map too by their share; now, not since.
    pub pss: u64,
    /// Time on a processor.
    pub cpu: Duration,
    /// Bytes that went, or will go, to a disk.
    pub written: u64,
    /// Bytes that left by the uplink, headers included, to anybody but the cluster's broker.
    pub sent: u64,
}

impl Sample {
    pub(crate) fn take(node: &Node) -> Result<Self> {
        let pid = node.status()?.pid;
        let read = |file: &str| node.host.run(&format!("cat /proc/{pid}/{file}"));
        Ok(Self {
            pss: 1024 * number(&read("smaps_rollup")?, "Pss:")?,
            cpu: cpu(&read("stat")?)?,
            written: number(&read("io")?, "write_bytes:")?,
            sent: sent(node)?,
        })
    }

    pub(crate) fn since(self, before: &Self) -> Self {
        Self {
            pss: self.pss,
            cpu: self.cpu.saturating_sub(before.cpu),
            written: self.written - before.written,
            sent: self.sent.saturating_sub(before.sent),
        }
    }
}

/// The number behind this word.
fn number(text: &str, word: &str) -> Result<u64> {
    let found = text.lines().find_map(|line| line.strip_prefix(word)?.split_whitespace().next()?.parse().ok());
    found.with_context(|| format!("no {word} in {text:?}"))
}

/// User and system time of all threads, those included that have ended: hundredths of a second in columns 14 and 15.
fn cpu(stat: &str) -> Result<Duration> {
    // The second column is a name and may hold anything but the last closing bracket.
    let columns: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| columns.get(at - 3).and_then(|word| word.parse::<u64>().ok());
    let ticks = ticks(14).zip(ticks(15)).with_context(|| format!("no times in {stat:?}"))?;
    Ok(Duration::from_millis(10 * (ticks.0 + ticks.1)))
}

/// Counts what goes to the broker; each packet of it has an Ethernet header besides.
pub(crate) fn count_what_the_protocol_sends(node: &Node) -> Result<()> {
    let rules = format!(
        "add table inet footprint
         add counter inet footprint protocol
         add chain inet footprint out {{ type filter hook output priority 0; }}
         add rule inet footprint out tcp dport {BROKER_PORT} counter name protocol"
    );
    node.host.shell(&format!("nft -f - <<'END'\n{rules}\nEND")).map(drop)
}

fn sent(node: &Node) -> Result<u64> {
    const ETHERNET: u64 = 14;
    let all: u64 = node.host.run("cat /sys/class/net/eth0/statistics/tx_bytes")?.trim().parse()?;
    let counter = node.host.run("nft list counter inet footprint protocol")?;
    let (packets, bytes) = counted(&counter).with_context(|| format!("no counts in {counter:?}"))?;
    Ok(all.saturating_sub(bytes + packets * ETHERNET))
}

/// `packets 3 bytes 180`
fn counted(text: &str) -> Option<(u64, u64)> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let after =
        |word: &str| words.iter().position(|other| *other == word).and_then(|at| words.get(at + 1)?.parse().ok());
    Some((after("packets")?, after("bytes")?))
}

/// From the start of the process until it is registered, carries, and has so many instances.
pub(super) fn start_to_ready(node: &mut Node, instances: usize) -> Result<Duration> {
    let begin = Instant::now();
    node.start()?;
    let socket = format!("/proc/{}/root/run/node-engine/api.sock", node.host.pid());
    let mut ready = Duration::MAX;
    let waited = until("the node is ready", Duration::from_secs(40), || {
        // Asked without a program of its own, whose start would be most of the time.
        let status = status(&socket)?;
        ready = begin.elapsed();
        let carries = status.network.as_ref().is_some_and(|network| !network.subnet_v4.is_empty());
        let complete = status.cluster.connected && carries && status.running == instances;
        Ok(complete.then_some(()))
    });
    waited.with_context(|| node.log())?;
    Ok(ready)
}

fn status(socket: &str) -> Result<Status> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET /status HTTP/1.0\r\nhost: node\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (_, body) = answer.split_once("\r\n\r\n").with_context(|| format!("the answer is {answer:?}"))?;
    serde_json::from_str(body).with_context(|| format!("the answer is {body:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_as_the_kernel_writes_them() {
        assert_eq!(number("Rss: 12 kB\nPss:                1024 kB\n", "Pss:").unwrap(), 1024);
        assert!(number("Rss: 12 kB", "Pss:").is_err());
        let stat = "42 (a) b) S 1 42 42 0 -1 4194560 900 0 1 0 7 5 0 0 20 0 5 0 100";
        assert_eq!(cpu(stat).unwrap(), Duration::from_millis(120));
        assert!(cpu("42 (x) S 1").is_err());
        let shown = "table inet footprint {\n counter protocol {\n packets 3 bytes 180\n }\n}";
        assert_eq!(counted(shown), Some((3, 180)));
        assert_eq!(counted("table inet footprint"), None);
    }
}
