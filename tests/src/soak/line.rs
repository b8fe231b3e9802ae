//! A bad line between a node and its broker: what a kernel without netem can do to TCP, by rules of the packet filter on the switch, and
//! by a relay where bytes are to be late or few.

use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::cluster::{BROKER_PORT, Deploy};
use crate::lan;
use crate::process::{built, output};
use crate::topology::Lab;
use crate::wait::until;

/// One and a half of the keep-alive, and a look of the node's own clock.
const DEAD: Duration = Duration::from_secs(32);
/// A service comes and goes over such a line.
const THROUGH: Duration = Duration::from_secs(120);
/// Whoever asks the node itself waits for no broker.
const LOCAL: Duration = Duration::from_secs(3);
const RELAY_PORT: u16 = 11_003;
const TABLE: &str = "lab_line";

/// What is wrong with the line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Line {
    /// Of hundred segments each way so many are lost.
    Loses5,
    Loses30,
    /// Of ten segments each way one comes twice.
    Doubles,
    /// Each way takes 600 ms.
    Delays,
    /// A kilobyte a second towards the broker.
    Crawls,
    /// Nothing that the node sends arrives, nothing that it is sent, or neither, and nobody is told.
    Mute,
    Deaf,
    HalfOpen,
}

impl Line {
    pub const ALL: [Self; 8] = [
        Self::Loses5,
        Self::Loses30,
        Self::Doubles,
        Self::Delays,
        Self::Crawls,
        Self::Mute,
        Self::Deaf,
        Self::HalfOpen,
    ];

    pub const fn name(self) -> &'static str {
        match self {
            Self::Loses5 => "line-loses-5",
            Self::Loses30 => "line-loses-30",
            Self::Doubles => "line-doubles",
            Self::Delays => "line-delays",
            Self::Crawls => "line-crawls",
            Self::Mute => "line-mute",
            Self::Deaf => "line-deaf",
            Self::HalfOpen => "line-half-open",
        }
    }

    /// Does anything come through?
    const fn carries(self) -> bool {
        !matches!(self, Self::Mute | Self::Deaf | Self::HalfOpen)
    }

    /// What becomes of a segment, towards the broker and from it.
    fn rules(self, node: &str) -> [String; 2] {
        let lossy = |percent: u32| format!("numgen random mod 100 < {percent} drop");
        let twice = |to: &str, device: &str| format!("numgen random mod 100 < 10 dup to {to} device {device}");
        let drop = || "drop".to_owned();
        match self {
            Self::Loses5 => [lossy(5), lossy(5)],
            Self::Loses30 => [lossy(30), lossy(30)],
            Self::Doubles => [twice(lan::CLUSTER, "eth0"), twice(node, "br0")],
            // A connection of before does not go by the relay.
            Self::Delays | Self::Crawls => ["reject with tcp reset".into(), String::new()],
            Self::Mute => [drop(), String::new()],
            Self::Deaf => [String::new(), drop()],
            Self::HalfOpen => [drop(), drop()],
        }
    }

    /// Milliseconds each way, and bytes a second towards the broker.
    const fn relay(self) -> Option<[&'static str; 2]> {
        match self {
            Self::Delays => Some(["600", "0"]),
            Self::Crawls => Some(["0", "1000"]),
            _ => None,
        }
    }
}

/// What is wrong, until it is dropped.
struct Wrong<'a> {
    lab: &'a Lab,
    node: usize,
    relay: Option<Child>,
}

impl<'a> Wrong<'a> {
    fn begin(lab: &'a Lab, node: usize, line: Line) -> Result<Self> {
        let address = lan::address(lab.nodes[node].number);
        let mut wrong = Self { lab, node, relay: None };
        let [towards, from] = line.rules(&address);
        let rule = |chosen: &str, rule: &str| if rule.is_empty() { String::new() } else { format!("{chosen} {rule}") };
        let (to_broker, to_node) = (
            rule(&format!("ip saddr {address} tcp dport {BROKER_PORT}"), &towards),
            rule(&format!("ip daddr {address} tcp sport {BROKER_PORT}"), &from),
        );
        let filter = |hook: &str, rule: &str| {
            format!("table ip {TABLE} {{\n chain {hook} {{\n type filter hook {hook} priority 0\n {rule}\n }}\n}}\n")
        };
        if line == Line::Doubles {
            // Where it leaves, so that the copy takes the same way.
            let rule = rule(&format!("ip daddr {} tcp dport {BROKER_PORT}", lan::CLUSTER), &towards);
            lab.nodes[node].host.shell(&format!("nft -f - <<'END'\n{}END\n", filter("output", &rule)))?;
            wrong.on_switch(&filter("output", &to_node))?;
            return Ok(wrong);
        }
        if let Some([delay, rate]) = line.relay() {
            let mut command = lab.lan.command(built("lab")?);
            command.args(["relay", &RELAY_PORT.to_string(), &format!("127.0.0.1:{BROKER_PORT}"), delay, rate]);
            wrong.relay = Some(command.stdin(Stdio::null()).spawn().context("cannot start the relay")?);
            wrong.on_switch(&format!(
                "table ip {TABLE} {{\n chain prerouting {{\n type nat hook prerouting priority -100\n ip saddr {address} tcp dport \
                 {BROKER_PORT} redirect to :{RELAY_PORT}\n }}\n}}\n"
            ))?;
        }
        wrong.on_switch(&(filter("input", &to_broker) + &filter("output", &to_node)))?;
        Ok(wrong)
    }

    fn on_switch(&self, rules: &str) -> Result<()> {
        let script = format!("nft -f - <<'END'\n{rules}END\n");
        output(self.lab.lan.command("sh").args(["-ec", &script])).map(drop)
    }
}

impl Drop for Wrong<'_> {
    fn drop(&mut self) {
        let script = format!("nft delete table ip {TABLE} 2>/dev/null; true");
        let _ = output(self.lab.lan.command("sh").args(["-c", &script]));
        let _ = self.lab.nodes[self.node].host.shell(&script);
        if let Some(mut relay) = self.relay.take() {
            let _ = relay.kill();
            let _ = relay.wait();
        }
    }
}

/// Has the line be like this for a while, in which a service comes and goes where anything comes through, and else until the node has
/// noticed. Says what it took.
pub fn suffer(lab: &Lab, node: usize, line: Line, service: &str) -> Result<String> {
    let name = lab.nodes[node].host.name().to_owned();
    let wrong = Wrong::begin(lab, node, line)?;
    let begin = Instant::now();
    let mut slowest = Duration::ZERO;
    let mut look = || {
        let asked = Instant::now();
        let status = lab.nodes[node].status()?;
        slowest = slowest.max(asked.elapsed());
        ensure!(slowest <= LOCAL, "the local API took {slowest:?}");
        Ok(status)
    };
    let said = if line.carries() {
        if line.relay().is_some() {
            // Its connection is cut as soon as it says something, and goes by the relay then.
            until("its connection is cut", THROUGH, || Ok((!look()?.cluster.connected).then_some(())))?;
            until("it is connected again", THROUGH, || Ok(look()?.cluster.connected.then_some(())))?;
        }
        let count = |wanted: usize| {
            until(&format!("there are {wanted} of {service}"), THROUGH, || {
                let rows = lab.cluster.instances()?;
                let rows: Vec<_> = rows.iter().filter(|row| row.short() == service).collect();
                let running = rows.iter().filter(|row| row.status == "RUNNING").count();
                Ok((running == wanted && rows.len() == wanted).then_some(()))
            })
        };
        lab.cluster.deploy(&Deploy { name: service, on: Some(&name), replicas: 1, ..Deploy::default() })?;
        look()?;
        count(1)?;
        let deployed = begin.elapsed();
        lab.cluster.delete(service)?;
        look()?;
        count(0)?;
        format!(
            "a service had come after {:.1} s and gone after {:.1} s",
            deployed.as_secs_f64(),
            begin.elapsed().as_secs_f64()
        )
    } else {
        until("the node has noticed", DEAD, || {
            thread::sleep(Duration::from_millis(100));
            Ok((!look()?.cluster.connected).then_some(()))
        })?;
        format!("noticed after {:.1} s", begin.elapsed().as_secs_f64())
    };
    drop(wrong);
    Ok(format!("{said}, the local API took {} ms at most", slowest.as_millis()))
}
