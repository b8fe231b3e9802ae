//! A node: a simulated host with the engine's daemon on it.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use crate::cluster::{InstanceRow, json};
use crate::host::Host;
use crate::lan;
use crate::process::{built, capture, output};
use crate::traffic::Container;
use crate::wait::until;

/// What carries the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Datapath {
    Ebpf,
    /// Programs as kernels before 5.10 know them.
    Plain,
    Tun,
    /// Whatever the daemon finds best.
    Auto,
}

impl Datapath {
    pub fn name(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::Plain => "ebpf-plain",
            Self::Tun => "tun",
            Self::Auto => "auto",
        }
    }
}

/// Where the daemon keeps what a reboot forgets.
const RUN: &str = "/run/node-engine";

/// A host and the daemon on it, which may be stopped, killed and started again.
#[derive(Debug)]
pub struct Node {
    pub host: Host,
    pub number: u8,
    datapath: Datapath,
    cluster: String,
    options: Vec<String>,
    settings: Vec<(String, String)>,
    /// Where the daemon is not the one of this build.
    program: Option<PathBuf>,
    /// What the daemon is started by, and that one's arguments.
    wrapper: Vec<String>,
    daemon: Option<Child>,
}

/// What the daemon says of itself.
#[derive(Clone, Debug, Deserialize)]
pub struct Status {
    pub pid: u32,
    pub node: StatusNode,
    pub cluster: StatusCluster,
    pub network: Option<StatusNetwork>,
    pub running: usize,
}

#[derive(Clone, Debug, Deserialize)]
pub struct StatusNode {
    pub id: String,
}

#[derive(Clone, Debug, Deserialize)]
pub struct StatusCluster {
    pub connected: bool,
    pub generation: String,
}

#[derive(Clone, Debug, Deserialize)]
pub struct StatusNetwork {
    pub datapath: String,
    pub reason: String,
    pub subnet_v4: String,
    pub subnet_v6: String,
    pub services: usize,
    pub peers: usize,
    pub counters: Vec<(String, u64)>,
}

impl Node {
    /// A node whose daemon does not run yet; `options` are further arguments of the daemon.
    pub fn new(host: Host, number: u8, datapath: Datapath, options: &[&str]) -> Self {
        let options = options.iter().map(|&option| option.to_owned()).collect();
        // What the daemon makes itself goes with the host, as what its dockerd makes does.
        let settings = vec![("NODE_ENGINE_CONTROL_GROUP".to_owned(), format!("/{}", host.group()))];
        Self {
            host,
            number,
            datapath,
            cluster: lan::CLUSTER.to_owned(),
            options,
            settings,
            program: None,
            wrapper: if datapath == Datapath::Plain { before_tcx() } else { Vec::new() },
            daemon: None,
        }
    }

    /// Further settings of the daemon, as variables of its environment.
    #[must_use]
    pub fn with_settings(mut self, settings: &[(&str, &str)]) -> Self {
        self.settings.extend(settings.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())));
        self
    }

    /// Another setting of the daemon's next start, as a variable of its environment.
    pub fn set(&mut self, name: &str, value: &str) {
        self.settings.push((name.to_owned(), value.to_owned()));
    }

    /// The datapath that the next start of the daemon uses.
    pub fn set_datapath(&mut self, datapath: Datapath) {
        self.datapath = datapath;
    }

    /// The program by which the next start of the daemon is made, and its arguments.
    pub fn set_wrapper(&mut self, wrapper: &[&str]) {
        self.wrapper = words(wrapper);
    }

    /// Where the next start of the daemon looks for the cluster.
    pub fn set_cluster(&mut self, cluster: &str) {
        cluster.clone_into(&mut self.cluster);
    }

    /// A variable in the environment of the next start of the daemon.
    pub fn set_variable(&mut self, name: &str, value: &str) {
        self.settings.push((name.to_owned(), value.to_owned()));
    }

    /// The daemon that the next start runs.
    pub fn set_program(&mut self, program: PathBuf) {
        self.program = Some(program);
    }

    /// Has the next start lay out the tables in the kernel otherwise, or as before: by a program with other rows where there is one
    /// (`cargo xtask soak --only upgrade`), else by tables of another size. Says how.
    pub fn alternate(&mut self) -> &'static str {
        const SIZE: &str = "NODE_ENGINE_INSTANCES";
        if let Ok(other) = built("node-engine-other") {
            self.program = if self.program.is_none() { Some(other) } else { None };
            return if self.program.is_some() { "other rows" } else { "the usual rows" };
        }
        let settings = self.settings.len();
        self.settings.retain(|(name, _)| name != SIZE);
        if self.settings.len() < settings {
            return "the usual tables";
        }
        self.settings.push((SIZE.to_owned(), "131072".to_owned()));
        "larger tables"
    }

    fn program(&self) -> Result<PathBuf> {
        self.program.clone().map_or_else(|| built("node-engine"), Ok)
    }

    /// Starts the daemon; it may not be ready yet.
    pub fn start(&mut self) -> Result<()> {
        if self.daemon.is_some() {
            bail!("{} runs already", self.host.name());
        }
        let log = File::options().create(true).append(true).open(self.host.directory().join("node-engine.log"));
        let log = log.context("cannot make the daemon's log")?;
        let program = self.program()?;
        let mut command = match self.wrapper.split_first() {
            Some((wrapper, arguments)) => {
                let confine = (wrapper == "confine").then(|| built("confine")).transpose()?;
                let mut command = self.host.command(confine.unwrap_or_else(|| wrapper.into()));
                command.args(arguments).arg(program);
                command
            }
            None => self.host.command(program),
        };
        let child = command
            .args(["--cluster", &self.cluster, "--name", self.host.name(), "--datapath", self.datapath.name()])
            .args(["--uplink", "eth0", "--run-dir", RUN])
            .arg("--state-dir")
            .arg(self.host.directory().join("state"))
            .args(&self.options)
            .envs(self.settings.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("cannot share the daemon's log")?)
            .stderr(log)
            .spawn()
            .context("cannot start the daemon")?;
        self.daemon = Some(child);
        Ok(())
    }

    /// Starts the daemon and waits until it is registered, connected, and has a subnet.
    pub fn start_and_join(&mut self) -> Result<()> {
        self.start()?;
        self.joined().map(drop)
    }

    /// Waits until the daemon is registered, connected, and has a subnet.
    pub fn joined(&mut self) -> Result<Status> {
        let name = self.host.name().to_owned();
        until(&format!("{name} joins the cluster"), Duration::from_secs(40), || {
            self.still_runs()?;
            let status = self.status()?;
            let subnet = status.network.as_ref().is_some_and(|network| !network.subnet_v4.is_empty());
            if status.cluster.connected && subnet {
                return Ok(Some(status));
            }
            bail!("its status is {status:?}")
        })
        .with_context(|| self.log())
    }

    pub fn status(&self) -> Result<Status> {
        json(self.client()?.args(["status", "--json"]))
    }

    /// A client command of the daemon.
    pub fn client(&self) -> Result<std::process::Command> {
        let mut command = self.host.command(built("node-engine")?);
        command.args(["--socket", &format!("{RUN}/api.sock")]);
        Ok(command)
    }

    /// One of the datapath's counters.
    pub fn counter(&self, name: &str) -> Result<u64> {
        let network = self.status()?.network.context("the daemon has no network")?;
        let found = network.counters.iter().find(|(counter, _)| counter == name);
        Ok(found.with_context(|| format!("no counter {name} in {:?}", network.counters))?.1)
    }

    /// Fails if the daemon has ended.
    pub fn still_runs(&mut self) -> Result<()> {
        let daemon = self.daemon.as_mut().context("the daemon was not started")?;
        match daemon.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the daemon of {} ended with {status}\n{}", self.host.name(), self.log()),
        }
    }

    /// SIGSTOP for so long, as if it hung.
    pub fn pause(&self, length: Duration) -> Result<()> {
        let pid = self.status()?.pid;
        self.host.run(&format!("kill -STOP {pid}"))?;
        std::thread::sleep(length);
        self.host.run(&format!("kill -CONT {pid}"))?;
        // `nsenter`, its parent, stops with it.
        if let Some(parent) = &self.daemon {
            output(std::process::Command::new("kill").args(["-CONT", &parent.id().to_string()]))?;
        }
        Ok(())
    }

    /// SIGKILL, as if it had crashed.
    pub fn kill(&mut self) -> Result<()> {
        self.signal("KILL").map(drop)
    }

    /// SIGKILL, also before the daemon can be asked for anything.
    pub fn kill_at_once(&mut self) -> Result<()> {
        let mut daemon = self.daemon.take().context("the daemon was not started")?;
        // It is the child of the program that entered the host.
        let children = format!("/proc/{0}/task/{0}/children", daemon.id());
        let pid = until("the daemon is a process", Duration::from_secs(5), || {
            Ok(std::fs::read_to_string(&children)?.split_whitespace().next().map(ToOwned::to_owned))
        });
        let pid = pid.with_context(|| self.log())?;
        output(std::process::Command::new("kill").args(["-KILL", &pid]))?;
        daemon.wait().context("cannot wait for the daemon")?;
        Ok(())
    }

    /// Waits until it has ended by itself.
    pub fn ends(&mut self) -> Result<ExitStatus> {
        let mut daemon = self.daemon.take().context("the daemon was not started")?;
        let ended = until("the daemon ends", Duration::from_secs(30), || Ok(daemon.try_wait()?));
        if ended.is_err() {
            self.daemon = Some(daemon);
        }
        ended.with_context(|| self.log())
    }

    /// As if the plug had been pulled and put back: the daemon and every container die at once, and what the kernel and the run
    /// directory held is gone. dockerd and the disks are there again.
    pub fn power_cut(&mut self) -> Result<()> {
        self.kill()?;
        let config = node_engine::config::NetworkConfig::default();
        let (bridge, tun) = (config.bridge, config.tun);
        self.host.shell(&format!(
            "for c in $(docker ps --quiet --no-trunc); do kill -9 $(docker inspect --format '{{{{.State.Pid}}}}' $c); done
             rm -rf {RUN} /sys/fs/bpf/node-engine
             ip link delete {bridge}
             ip link delete {tun} || true
             for f in ip ip6 netdev; do nft delete table $f node_engine || true; done
             while [ -n \"$(docker ps --quiet)\" ]; do sleep 0.1; done"
        ))?;
        Ok(())
    }

    /// SIGTERM; gives how the daemon ended.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.signal("TERM")
    }

    fn signal(&mut self, signal: &str) -> Result<ExitStatus> {
        let pid = self.status()?.pid;
        self.host.run(&format!("kill -{signal} {pid}"))?;
        self.ends()
    }

    /// Puts the host back as it was before the daemon first ran.
    pub fn uninstall(&self) -> Result<()> {
        let mut command = self.host.command(built("node-engine")?);
        output(command.args(self.undoing())).map(drop).with_context(|| self.log())
    }

    /// Begins to put it back, and dies after this time if it has not ended.
    pub fn uninstall_cut_short(&self, after: Duration) -> Result<()> {
        let mut command = self.host.command("timeout");
        command.args(["--signal=KILL", &format!("{:.3}", after.as_secs_f64().max(0.001))]).arg(built("node-engine")?);
        capture(command.args(self.undoing())).map(drop)
    }

    /// What `upgrade --check` says of this build.
    pub fn upgrade_check(&self) -> Result<serde_json::Value> {
        let mut command = self.host.command(self.program()?);
        command.args(["upgrade", "--check", "--json", "--cluster", &self.cluster, "--run-dir", RUN, "--state-dir"]);
        command.arg(self.host.directory().join("state")).envs(self.settings.iter().map(|(name, value)| (name, value)));
        // Its exit code says the same as its last words.
        let said = capture(&mut command)?;
        serde_json::from_slice(&said.stdout).with_context(|| format!("it said {said:?}"))
    }

    fn undoing(&self) -> Vec<std::ffi::OsString> {
        let state = self.host.directory().join("state");
        vec!["uninstall".into(), "--run-dir".into(), RUN.into(), "--state-dir".into(), state.into()]
    }

    /// The instance's container, to send traffic from.
    pub fn container<'a>(&'a self, name: &'a str) -> Container<'a> {
        Container { host: &self.host, name }
    }

    /// Process id, on the host, of the instance's first process.
    pub fn container_pid(&self, instance: &InstanceRow) -> Result<u32> {
        let pid = self.host.run(&format!("docker inspect --format {{{{.State.Pid}}}} {}", instance.container()))?;
        pid.trim().parse().with_context(|| format!("docker said {pid:?}"))
    }

    /// Has the daemon said this, in any of its lives?
    pub fn log_has(&self, words: &str) -> bool {
        std::fs::read_to_string(self.host.directory().join("node-engine.log")).is_ok_and(|log| log.contains(words))
    }

    /// The end of the daemon's log.
    pub fn log(&self) -> String {
        format!("log of {}:\n{}", self.host.name(), self.host.log_tail("node-engine.log", 40))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
        // The plug is pulled next; this only ends the wait for it.
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}

/// What makes a kernel one without TCX: no links, and no programs there.
fn before_tcx() -> Vec<String> {
    words(&["confine", "--error", "EINVAL", "--commands", "28,8"])
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}
