//! A machine in an emulator: another kernel, perhaps another processor, with nothing on it but what a test puts there. It is driven
//! over its serial line, a command at a time, and plugged into the lab's switch like any other host.

mod initrd;
mod machine;
pub mod smoke;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::lan::{self, Lan};
pub use initrd::{Initrd, Kernel};
pub use machine::Machine;

/// Emulated machines are slow, and this one's processors are busy with others' work.
const BOOT: Duration = Duration::from_secs(150);

/// A running guest. Dropping it is pulling its plug.
#[derive(Debug)]
pub struct Guest {
    emulator: Child,
    keyboard: ChildStdin,
    screen: Receiver<String>,
    /// The last lines, for messages.
    seen: Vec<String>,
    /// `uname -r`
    pub release: String,
}

/// How a command in the guest ended.
#[derive(Clone, Debug)]
pub struct Ended {
    pub code: i32,
    pub lines: Vec<String>,
}

impl Guest {
    /// Boots the kernel and waits until the guest takes commands. It is number `number` on the switch.
    pub fn boot(machine: Machine, kernel: &Kernel, initrd: &Path, lan: &Lan, number: u8) -> Result<Self> {
        let tap = format!("p{number}");
        lan.ip(&format!("tuntap add {tap} mode tap"))?;
        lan.ip(&format!("link set {tap} master br0 up"))?;
        let mut command = lan.command(machine.emulator());
        command.args(machine.arguments(&kernel.image()?, initrd, &tap));
        let mut emulator = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .with_context(|| format!("cannot start {}", machine.emulator()))?;
        let keyboard = emulator.stdin.take().context("the guest has no keyboard")?;
        let output = emulator.stdout.take().context("the guest has no screen")?;
        let (lines, screen) = channel();
        thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
                if lines.send(line).is_err() {
                    return;
                }
            }
        });
        let mut guest = Self { emulator, keyboard, screen, seen: Vec::new(), release: String::new() };
        guest.release = guest.expect("@ready ", Instant::now() + BOOT, &mut Vec::new()).context("the guest boots")?;
        for line in [
            format!("ip addr add {}/24 dev eth0", lan::address(number)),
            "ip link set eth0 up".to_owned(),
            format!("ip route add default via {}", lan::CLUSTER),
        ] {
            guest.shell(&line)?;
        }
        Ok(guest)
    }

    /// Runs a line of shell to its end.
    pub fn run(&mut self, line: &str, limit: Duration) -> Result<Ended> {
        writeln!(self.keyboard, "{line}")
            .and_then(|()| self.keyboard.flush())
            .context("the guest takes no commands")?;
        let mut lines = Vec::new();
        let code =
            self.expect("@done ", Instant::now() + limit, &mut lines).with_context(|| format!("guest: {line}"))?;
        let code = code.parse().with_context(|| format!("the guest said {code:?}"))?;
        Ok(Ended { code, lines })
    }

    /// Runs a short line of shell; its failure is an error. Gives what it printed.
    pub fn shell(&mut self, line: &str) -> Result<String> {
        let ended = self.run(line, Duration::from_secs(60))?;
        if ended.code != 0 {
            bail!("guest: {line} ended with {}: {}", ended.code, ended.lines.join("; "));
        }
        Ok(ended.lines.join("\n"))
    }

    /// The rest of the first line that begins so; other lines are gathered.
    fn expect(&mut self, begin: &str, deadline: Instant, lines: &mut Vec<String>) -> Result<String> {
        loop {
            match self.screen.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    if let Some(rest) = line.strip_prefix(begin) {
                        return Ok(rest.trim().to_owned());
                    }
                    self.seen.push(line.clone());
                    lines.push(line);
                }
                Err(RecvTimeoutError::Timeout) => bail!("it takes too long; the last it said:\n{}", self.last()),
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("the emulator has ended; the last it said:\n{}", self.last())
                }
            }
        }
    }

    fn last(&self) -> String {
        self.seen[self.seen.len().saturating_sub(20)..].join("\n")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.emulator.kill();
        let _ = self.emulator.wait();
    }
}
