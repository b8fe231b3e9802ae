//! A simulated host: namespaces, mounts and processes of its own, with its own dockerd where asked for.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::process::{built, output};
use crate::scratch::{Scratch, control_group};

/// A running host. Dropping it is pulling its plug: everything on it dies at once.
#[derive(Debug)]
pub struct Host {
    name: String,
    directory: PathBuf,
    group: String,
    /// `unshare`, the parent of the host's first process.
    shell: Child,
    /// The host's first process, as seen from outside.
    init: u32,
}

/// Does the host run a dockerd?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Docker {
    Yes,
    No,
}

impl Host {
    /// Boots a host and waits until it (and its dockerd) is ready.
    pub fn boot(scratch: &Scratch, name: &str, docker: Docker) -> Result<Self> {
        let directory = scratch.directory(name)?;
        let group = control_group(scratch.name(), name);
        let mut shell = Command::new("unshare")
            .args(["--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--"])
            .arg(built("lab")?)
            .args(["host-init", name])
            .arg(&directory)
            .arg(&group)
            .args((docker == Docker::Yes).then_some("--docker"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(directory.join("init.log")).context("cannot make the host's log")?)
            .spawn()
            .context("cannot start unshare")?;
        let said = shell.stdout.take().context("the host's output is not piped")?;
        // Made first, so that it is ended and waited for whatever comes.
        let mut host = Self { name: name.to_owned(), directory, group, shell, init: 0 };
        for line in BufReader::new(said).lines() {
            let line = line.context("cannot read what the host says")?;
            match line.strip_prefix("pid ") {
                Some(pid) => host.init = pid.parse().context("the host said no process id")?,
                None if line == "ready" => return Ok(host),
                None => bail!("host {name} said {line:?}"),
            }
        }
        bail!("host {name} did not come up:\n{}\n{}", host.log_tail("init.log", 20), host.log_tail("dockerd.log", 20));
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// What is on the host's disk, seen from outside.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The control group of everything on the host that is in one.
    pub fn group(&self) -> &str {
        &self.group
    }

    /// A process id whose namespaces are the host's.
    pub fn pid(&self) -> u32 {
        self.init
    }

    /// A program that runs on the host.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.init.to_string()]);
        command.args(["--net", "--mount", "--uts", "--ipc", "--pid", "--"]).arg(program);
        command
    }

    /// Runs a command line on the host, words separated by blanks.
    pub fn run(&self, line: &str) -> Result<String> {
        let mut words = line.split_whitespace();
        let program = words.next().context("an empty command line")?;
        output(self.command(program).args(words)).with_context(|| format!("on {}", self.name))
    }

    /// Runs a shell script on the host.
    pub fn shell(&self, script: &str) -> Result<String> {
        output(self.command("sh").args(["-ec", script])).with_context(|| format!("on {}", self.name))
    }

    /// Ends the host's dockerd with this signal; containers live on.
    pub fn stop_docker(&self, signal: &str) -> Result<()> {
        let script = format!(
            "pid=$(cat /run/docker.pid); kill -{signal} $pid
             while kill -0 $pid 2>/dev/null && ! grep -q 'State:.Z' /proc/$pid/status; do sleep 0.05; done
             rm -f /run/docker.pid"
        );
        self.shell(&script).map(drop)
    }

    /// Starts it again, until it answers. The first start after a kill may fail for want of the old one's containerd.
    pub fn start_docker(&self) -> Result<()> {
        let start = self.directory.join("start-docker.sh");
        let script =
            format!("setsid sh '{}' >>'{}/dockerd.log' 2>&1 </dev/null &", start.display(), self.directory.display());
        crate::wait::until_true("dockerd answers", Duration::from_secs(90), || {
            if self.run("docker version").is_ok() {
                return Ok(true);
            }
            if self.shell("pidof dockerd").is_err() {
                self.shell(&script)?;
            }
            Ok(false)
        })
    }

    /// The end of a file on the host's disk.
    pub fn log_tail(&self, file: &str, lines: usize) -> String {
        let Ok(text) = std::fs::read(self.directory.join(file)) else { return String::new() };
        let text = String::from_utf8_lossy(&text);
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.init != 0 {
            // The first process takes all others of its namespace with it.
            let _ = nix::sys::signal::kill(
                nix::unistd::Pid::from_raw(self.init.cast_signed()),
                nix::sys::signal::Signal::SIGKILL,
            );
        }
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
        let gone = || Ok(!Path::new(&format!("/proc/{}", self.init)).exists());
        if let Err(error) = crate::wait::until_true("the host's processes are gone", Duration::from_secs(10), gone) {
            eprintln!("host {}: {error:#}", self.name);
        }
    }
}
