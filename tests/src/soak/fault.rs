//! What is done to a cluster, one at a time.

use std::fmt;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::chance::Chance;
use super::line::{self, Line};
use crate::cluster::{BROKER_PORT, Deploy};
use crate::process::{built, output};
use crate::topology::Lab;
use crate::wait::until_true;

const TABLES: [&str; 3] = ["ip", "ip6", "netdev"];
const TUNNEL_PORT: u16 = 50103;
/// What comes and goes amid faults that are asked for.
const PASSES: &str = "amid";
const HANGS: Duration = Duration::from_secs(60);
const AWAY: Duration = Duration::from_secs(120);
const STARVES: Duration = Duration::from_secs(20);
/// Beyond what a message may be.
const LARGE: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Kill,
    Terminate,
    Pause,
    DockerStop,
    DockerKill,
    Cluster,
    Uplink,
    Filter,
    Veth,
    Bridge,
    Datagrams,
    Commands,
    /// From here on not by chance: only where it is asked for.
    Upgrade,
    /// dockerd stands still for a minute.
    DockerHang,
    /// It is away for two.
    DockerAway,
    /// The daemon gets no more descriptors.
    Descriptors,
    Line(Line),
}

impl Kind {
    /// Those that come by chance.
    pub const ALL: [Self; 12] = [
        Self::Kill,
        Self::Terminate,
        Self::Pause,
        Self::DockerStop,
        Self::DockerKill,
        Self::Cluster,
        Self::Uplink,
        Self::Filter,
        Self::Veth,
        Self::Bridge,
        Self::Datagrams,
        Self::Commands,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Terminate => "terminate",
            Self::Pause => "pause",
            Self::DockerStop => "docker-stop",
            Self::DockerKill => "docker-kill",
            Self::Cluster => "cluster",
            Self::Uplink => "uplink",
            Self::Filter => "filter",
            Self::Veth => "veth",
            Self::Bridge => "bridge",
            Self::Datagrams => "datagrams",
            Self::Commands => "commands",
            Self::Upgrade => "upgrade",
            Self::DockerHang => "docker-hang",
            Self::DockerAway => "docker-away",
            Self::Descriptors => "descriptors",
            Self::Line(line) => line.name(),
        }
    }

    /// From the moment that the fault is over until all is as it ought to be.
    pub fn bound(self) -> Duration {
        Duration::from_secs(match self {
            // Nodes try to connect again after at most five seconds.
            Self::Cluster => 10,
            // A service goes amid it: ten seconds are its own, and ten more Docker's, for a program that does not listen to SIGTERM.
            Self::Line(_) | Self::Descriptors => 25,
            _ => 5,
        })
    }

    /// Does a daemon begin anew by it?
    pub(super) fn ends_the_daemon(self) -> bool {
        matches!(self, Self::Kill | Self::Terminate | Self::Upgrade)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Kind {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let asked = [Self::Upgrade, Self::DockerHang, Self::DockerAway, Self::Descriptors];
        let all = || Self::ALL.into_iter().chain(asked).chain(Line::ALL.map(Self::Line));
        let names = || all().map(Self::name).collect::<Vec<_>>().join(", ");
        all().find(|kind| kind.name() == text).with_context(|| format!("no fault {text}: {}", names()))
    }
}

/// A fault that is over.
#[derive(Debug)]
pub(super) struct Struck {
    /// What exactly was done.
    pub(super) what: String,
    pub(super) over: Instant,
}

/// Does it to this node, or to the cluster.
pub(super) fn strike(lab: &mut Lab, kind: Kind, node: usize, chance: &mut Chance) -> Result<Struck> {
    let name = lab.nodes[node].host.name().to_owned();
    let pause = Duration::from_millis(50 * chance.below(20) as u64);
    let mut detail = String::new();
    match kind {
        Kind::Kill => {
            lab.nodes[node].kill()?;
            thread::sleep(pause);
            lab.nodes[node].start()?;
            detail = format!("away for {pause:?}");
        }
        Kind::Terminate => {
            let ended = lab.nodes[node].terminate()?;
            if !ended.success() {
                bail!("{name} ended with {ended} when told to end");
            }
            thread::sleep(pause);
            lab.nodes[node].start()?;
            detail = format!("away for {pause:?}");
        }
        Kind::Upgrade => {
            let killed = chance.once_in(2);
            if killed {
                lab.nodes[node].kill()?;
            } else if !lab.nodes[node].terminate()?.success() {
                bail!("{name} did not end well when told to end");
            }
            detail = format!("{} to {}", if killed { "killed" } else { "ended" }, lab.nodes[node].alternate());
            lab.nodes[node].start()?;
            if chance.once_in(3) {
                let after = Duration::from_millis(20 * chance.below(40) as u64);
                thread::sleep(after);
                lab.nodes[node].kill_at_once()?;
                lab.nodes[node].start()?;
                detail = format!("{detail}, which died after {after:?} and began again");
            }
        }
        Kind::Pause => {
            lab.nodes[node].pause(Duration::from_secs(3))?;
            detail = "3 s".into();
        }
        Kind::DockerStop | Kind::DockerKill => {
            let begin = Instant::now();
            lab.nodes[node].host.stop_docker(if kind == Kind::DockerKill { "KILL" } else { "TERM" })?;
            thread::sleep(pause);
            lab.nodes[node].host.start_docker()?;
            detail = format!("away for {:.1} s", begin.elapsed().as_secs_f64());
        }
        Kind::DockerHang => {
            lab.nodes[node].host.shell("kill -STOP $(cat /run/docker.pid)")?;
            thread::sleep(HANGS);
            lab.nodes[node].host.shell("kill -CONT $(cat /run/docker.pid)")?;
            detail = format!("{HANGS:?}");
        }
        Kind::DockerAway => {
            lab.nodes[node].host.stop_docker("TERM")?;
            thread::sleep(AWAY);
            lab.nodes[node].host.start_docker()?;
            detail = format!("{AWAY:?}");
        }
        Kind::Descriptors => detail = descriptors(lab, node)?,
        Kind::Line(line) => detail = line::suffer(lab, node, line, PASSES)?,
        Kind::Cluster => {
            lab.cluster.stop();
            thread::sleep(2 * pause);
            lab.cluster.resume()?;
            return Ok(Struck { what: format!("cluster killed, away for {:?}", 2 * pause), over: Instant::now() });
        }
        Kind::Uplink => {
            let number = lab.nodes[node].number;
            lab.lan.set_link(number, false)?;
            let down = Instant::now();
            thread::sleep(Duration::from_secs(1));
            lab.lan.set_link(number, true)?;
            detail = format!("down for {} ms", down.elapsed().as_millis());
        }
        Kind::Filter => {
            let verb = if chance.once_in(2) { "flush" } else { "delete" };
            let families =
                TABLES.map(|family| format!("nft {verb} table {family} node_engine 2>/dev/null && echo {family}"));
            let done = lab.nodes[node].host.shell(&format!("{}; true", families.join("; ")))?;
            detail = format!("{verb} {}", done.split_whitespace().collect::<Vec<_>>().join(" "));
        }
        Kind::Veth => {
            let links = lab.nodes[node].host.shell("cd /sys/class/net; ls -d ne*")?;
            let links: Vec<&str> = links.split_whitespace().collect();
            let link = chance.among(&links).context("no instance is connected")?;
            lab.nodes[node].host.run(&format!("ip link delete {link}"))?;
            detail = (*link).to_owned();
        }
        Kind::Bridge => {
            let bridge = node_engine::config::NetworkConfig::default().bridge;
            lab.nodes[node].host.run(&format!("ip link delete {bridge}"))?;
        }
        Kind::Datagrams => {
            datagrams(lab, node, chance)?;
            detail = "2,000".into();
        }
        Kind::Commands => commands(lab, node, chance)?,
    }
    Ok(Struck { what: format!("{kind} {name} {detail}").trim_end().to_owned(), over: Instant::now() })
}

/// As a leak of descriptors, or a limit that is too low: what needs another one fails, what has its own goes on, and the daemon with it.
fn descriptors(lab: &Lab, node: usize) -> Result<String> {
    let node = &lab.nodes[node];
    let pid = node.status()?.pid;
    let limit = |soft: &str| node.host.run(&format!("prlimit --pid {pid} --nofile={soft}:")).map(drop);
    let used = node.host.shell(&format!("ls /proc/{pid}/fd | wc -l"))?;
    let before = node.host.shell(&format!("awk '/Max open files/ {{ print $4 }}' /proc/{pid}/limits"))?;
    limit(used.trim())?;
    let name = node.host.name().to_owned();
    lab.cluster.deploy(&Deploy { name: PASSES, on: Some(&name), replicas: 1, ..Deploy::default() })?;
    thread::sleep(STARVES);
    let ran = lab.cluster.instances()?.iter().filter(|row| row.short() == PASSES && row.status == "RUNNING").count();
    limit(before.trim())?;
    // Whatever has become of it, it goes.
    lab.cluster.delete(PASSES)?;
    until_true("it is gone", STARVES, || Ok(!lab.cluster.instances()?.iter().any(|row| row.short() == PASSES)))?;
    let now = node.status()?.pid;
    ensure!(now == pid, "it is process {now} and was {pid}: it has not got over it");
    Ok(format!("none beyond {} for {STARVES:?}; {ran} of one deployed meanwhile", used.trim()))
}

/// As anybody who reaches the tunnel ports can.
fn datagrams(lab: &Lab, node: usize, chance: &mut Chance) -> Result<()> {
    let to = crate::lan::address(lab.nodes[node].number);
    for port in [TUNNEL_PORT, TUNNEL_PORT + 1] {
        let payloads = (0..20).map(|number| {
            let length = chance.below(1_400);
            let mut bytes = chance.bytes(length);
            // Some look like packets at first sight.
            if let Some(first) = bytes.first_mut() {
                *first = [0x45, 0x60, 0x08, *first][number % 4];
            }
            bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>()
        });
        let payloads: Vec<String> = payloads.collect();
        let mut command = lab.lan.command(built("lab")?);
        output(command.args(["datagrams", &format!("{to}:{port}"), "50"]).args(payloads))?;
    }
    Ok(())
}

/// As anybody who reaches the broker can.
fn commands(lab: &Lab, node: usize, chance: &mut Chance) -> Result<()> {
    let id = lab.nodes[node].status()?.node.id;
    let lines = lab.directory().join("commands");
    let large = lab.directory().join("large");
    std::fs::write(&large, "[".repeat(LARGE)).context("cannot write a large message")?;
    for topic in ["control/deploy", "control/delete", "net/tablequery/result", "net/subnetwork/result", "control/x"] {
        let mut text = String::new();
        for sample in [
            "null",
            "[]",
            "{",
            "{}",
            r#"{"job_name":["a"],"instance_number":"x","image":7,"port":[],"cmd":{}}"#,
            r#"{"job_name":"../../etc.passwd.x.y","instance_number":0,"image":"lab/probe:1","virtualization":"container"}"#,
            r#"{"job_name":"a.b.c.d","instance_number":99999999999999999999,"image":"lab/probe:1"}"#,
            r#"{"app_name":5,"instance_list":[{"namespace_ip":"x"},null,7],"query_key":{}}"#,
        ] {
            text.push_str(sample);
            text.push('\n');
            // Cut somewhere, and with a byte of chance in it.
            let mut bytes = sample.as_bytes()[..chance.below(sample.len())].to_vec();
            bytes.push(b' ' + u8::try_from(chance.below(90)).unwrap_or_default());
            text.push_str(&String::from_utf8_lossy(&bytes));
            text.push('\n');
        }
        std::fs::write(&lines, text).context("cannot write messages")?;
        let publish = |what: &str, from: &str| {
            let line = format!(
                "timeout 20 mosquitto_pub -h 127.0.0.1 -p {BROKER_PORT} -q 1 -t nodes/{id}/{topic} {what} {from}"
            );
            output(lab.lan.command("sh").args(["-c", &line]))
        };
        publish("-l <", &lines.to_string_lossy())?;
        // The broker may refuse this one and hang up.
        let _ = publish("-f", &large.to_string_lossy());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fault_has_a_name_of_its_own() {
        for kind in Kind::ALL.into_iter().chain(Line::ALL.map(Kind::Line)) {
            assert_eq!(kind.name().parse::<Kind>().unwrap(), kind);
        }
        assert!("none".parse::<Kind>().is_err());
    }
}
