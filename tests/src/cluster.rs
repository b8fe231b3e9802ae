//! The cluster of a laboratory: the engine's own, on the machine that is the switch, with its own broker or a real mosquitto.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::lan::Lan;
use crate::process::{built, in_network, output};
use crate::scratch::Scratch;
use crate::wait::until;

/// Port of the broker, as in the reference system.
pub const BROKER_PORT: u16 = 10003;

/// Which broker carries the messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Broker {
    /// The one inside the cluster's process.
    Embedded,
    Mosquitto,
}

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    directory: PathBuf,
    /// The switch's namespace, by a process in it.
    network: u32,
    options: Vec<String>,
    daemon: Option<Daemon>,
    mosquitto: Option<Daemon>,
}

/// A node as the cluster sees it.
#[derive(Clone, Debug, Deserialize)]
pub struct NodeRow {
    pub id: String,
    pub name: String,
    pub active: bool,
}

/// An instance as the cluster sees it.
#[derive(Clone, Debug, Deserialize)]
pub struct InstanceRow {
    pub service: String,
    pub number: u32,
    pub node: String,
    pub status: String,
    pub detail: String,
    /// Inside the node's subnet.
    pub address: String,
    pub instance_address: String,
    pub service_addresses: Vec<String>,
    /// By policy.
    #[serde(default)]
    pub policies: BTreeMap<String, Vec<String>>,
}

impl InstanceRow {
    /// The name that its container carries.
    pub fn container(&self) -> String {
        format!("{}.instance.{}", self.service, self.number)
    }

    /// `web` of `app.default.web.default`.
    pub fn short(&self) -> &str {
        self.service.split('.').nth(2).unwrap_or(&self.service)
    }

    /// The addresses of the whole service, of one family.
    pub fn service_address(&self, v6: bool) -> Result<IpAddr> {
        let addresses = self.service_addresses.iter().filter_map(|text| text.parse::<IpAddr>().ok());
        addresses
            .into_iter()
            .find(|address| address.is_ipv6() == v6)
            .with_context(|| format!("{} has no {} service address", self.service, if v6 { "IPv6" } else { "IPv4" }))
    }

    /// The service's address of one family that chooses by this policy.
    pub fn policy_address(&self, policy: &str, v6: bool) -> Result<IpAddr> {
        let addresses = self.policies.get(policy).into_iter().flatten().filter_map(|text| text.parse::<IpAddr>().ok());
        addresses
            .into_iter()
            .find(|address| address.is_ipv6() == v6)
            .with_context(|| format!("{} has no {policy} address: {:?}", self.service, self.policies))
    }

    /// The address that means this instance alone.
    pub fn own_address(&self) -> Result<IpAddr> {
        self.instance_address.parse().with_context(|| format!("instance address {:?}", self.instance_address))
    }
}

/// What to deploy.
#[derive(Clone, Debug, Default)]
pub struct Deploy<'a> {
    pub name: &'a str,
    pub on: Option<&'a str>,
    pub replicas: u32,
    /// `host:container[/protocol]`
    pub ports: &'a [&'a str],
    /// Labels.
    pub policies: &'a [&'a str],
    /// `number=weight`
    pub weights: &'a [&'a str],
}

impl Cluster {
    /// Starts it on the switch and waits until it answers.
    pub fn start(scratch: &Scratch, lan: &Lan, broker: Broker, options: &[&str]) -> Result<Self> {
        let directory = scratch.directory("cluster")?;
        let mut options: Vec<String> = options.iter().map(|&option| option.to_owned()).collect();
        let mosquitto = match broker {
            Broker::Embedded => None,
            Broker::Mosquitto => {
                options.extend(["--broker".to_owned(), format!("127.0.0.1:{BROKER_PORT}")]);
                Some(mosquitto(&directory, lan)?)
            }
        };
        let mut cluster = Self { directory, network: lan.pid(), options, daemon: None, mosquitto };
        cluster.resume()?;
        Ok(cluster)
    }

    /// Kills the cluster's process; nodes and what runs on them are on their own.
    pub fn stop(&mut self) {
        self.daemon = None;
    }

    /// Starts it, with what it has kept, and waits until it answers.
    pub fn resume(&mut self) -> Result<()> {
        let log = File::options().create(true).append(true).open(self.directory.join("node-engine.log"));
        let log = log.context("cannot make the cluster's log")?;
        let mut command = in_network(self.network, built("node-engine")?);
        command.args(["standalone", "--no-node"]).args(["--run-dir".as_ref(), self.directory.join("run").as_os_str()]);
        command.args(["--state-dir".as_ref(), self.directory.join("state").as_os_str()]).args(&self.options);
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("cannot share the cluster's log")?)
            .stderr(log)
            .spawn()
            .context("cannot start the cluster")?;
        let mut daemon = Daemon(child);
        until("the cluster answers", Duration::from_secs(20), || {
            if let Some(status) = daemon.0.try_wait()? {
                anyhow::bail!("the cluster ended with {status}");
            }
            Ok(self.nodes().ok())
        })
        .with_context(|| self.log())?;
        self.daemon = Some(daemon);
        Ok(())
    }

    /// A client command, such as `ps`.
    pub fn command(&self, words: &[&str]) -> Result<Command> {
        let mut command = in_network(self.network, built("node-engine")?);
        command.arg("--socket").arg(self.directory.join("run/api.sock")).args(words);
        Ok(command)
    }

    pub fn nodes(&self) -> Result<Vec<NodeRow>> {
        json(&mut self.command(&["nodes", "--json"])?)
    }

    pub fn instances(&self) -> Result<Vec<InstanceRow>> {
        json(&mut self.command(&["ps", "--json"])?)
    }

    pub fn deploy(&self, what: &Deploy<'_>) -> Result<()> {
        let replicas = what.replicas.max(1).to_string();
        let mut words =
            vec!["deploy", "--image", crate::image::PROBE, "--name", what.name, "--replicas", replicas.as_str()];
        if let Some(node) = what.on {
            words.extend(["--on", node]);
        }
        for port in what.ports {
            words.extend(["--port", port]);
        }
        for policy in what.policies {
            words.extend(["--policy", policy]);
        }
        for weight in what.weights {
            words.extend(["--weight", weight]);
        }
        output(&mut self.command(&words)?).map(drop)
    }

    /// Deploys what a job document says, on this node.
    pub fn deploy_document(&self, document: &serde_json::Value, on: &str) -> Result<()> {
        let path = self.directory.join("document.json");
        fs::write(&path, document.to_string()).context("cannot write the document")?;
        output(self.command(&["deploy", "--on", on])?.arg(&path)).map(drop)
    }

    /// Waits until the instance has ended so; gives the detail.
    pub fn ended(&self, service: &str, status: &str) -> Result<String> {
        until(&format!("{service} is {status}"), Duration::from_secs(60), || {
            let rows = self.instances()?;
            let found = rows.iter().find(|row| row.short() == service && row.status == status);
            found.map(|row| Some(row.detail.clone())).with_context(|| format!("there is {rows:?}"))
        })
        .with_context(|| self.log())
    }

    /// Takes down `web`, or one instance of it: `web#0`.
    pub fn delete(&self, target: &str) -> Result<()> {
        output(&mut self.command(&["delete", target])?).map(drop)
    }

    /// Brings the service to so many instances.
    pub fn replicate(&self, service: &str, replicas: u32) -> Result<()> {
        output(&mut self.command(&["replicate", service, &replicas.to_string()])?).map(drop)
    }

    /// Moves `web#0` to another node.
    pub fn relocate(&self, instance: &str, node: &str) -> Result<()> {
        output(&mut self.command(&["move", instance, node])?).map(drop)
    }

    /// Kills the real broker and starts it again, empty.
    pub fn restart_broker(&mut self, lan: &Lan) -> Result<()> {
        drop(self.mosquitto.take().context("the broker is part of the cluster's process")?);
        self.mosquitto = Some(mosquitto(&self.directory, lan)?);
        Ok(())
    }

    /// Waits until the service has exactly so many instances, all of them running and reachable.
    pub fn running(&self, service: &str, count: usize) -> Result<Vec<InstanceRow>> {
        until(&format!("{count} instances of {service} run"), Duration::from_secs(60), || {
            let mut rows = self.instances()?;
            rows.retain(|row| row.short() == service);
            rows.sort_by_key(|row| row.number);
            let up = rows.iter().filter(|row| row.status == "RUNNING" && !row.address.is_empty()).count();
            if up == count && rows.len() == count {
                return Ok(Some(rows));
            }
            anyhow::bail!("there is {rows:?}")
        })
        .with_context(|| self.log())
    }

    /// The end of the cluster's log.
    pub fn log(&self) -> String {
        let text = fs::read_to_string(self.directory.join("node-engine.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        format!("cluster's log:\n{}", lines[lines.len().saturating_sub(30)..].join("\n"))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.log());
        }
    }
}

/// Prints its answer as JSON.
pub fn json<T: serde::de::DeserializeOwned>(command: &mut Command) -> Result<T> {
    let answer = output(command)?;
    serde_json::from_str(&answer).with_context(|| format!("the answer is {answer:?}"))
}

/// A process that ends with its handle.
#[derive(Debug)]
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn mosquitto(directory: &std::path::Path, lan: &Lan) -> Result<Daemon> {
    let configuration = directory.join("mosquitto.conf");
    // As the reference system ships it: open, without persistence.
    let text = format!("listener {BROKER_PORT} 0.0.0.0\nallow_anonymous true\npersistence false\nuser root\n");
    fs::write(&configuration, text).context("cannot write the broker's configuration")?;
    let log = File::create(directory.join("mosquitto.log")).context("cannot make the broker's log")?;
    let child = lan
        .command("mosquitto")
        .arg("-c")
        .arg(&configuration)
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("cannot share the broker's log")?)
        .stderr(log)
        .spawn()
        .context("cannot start mosquitto")?;
    let daemon = Daemon(child);
    until("mosquitto listens", Duration::from_secs(10), || {
        let listening = output(lan.command("ss").args(["-Hltn", &format!("sport = {BROKER_PORT}")]))?;
        Ok((!listening.trim().is_empty()).then_some(()))
    })?;
    Ok(daemon)
}
