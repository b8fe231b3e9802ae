//! The control plane against clusters that are not there: doubles for each conversation, on loopback.

mod broker;
mod budget;
mod flow;
mod ill;
mod init;
mod manager;
mod mosquitto;
mod registration;

use std::time::Duration;

use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::cluster::{Cluster, Node};
use super::*;
use crate::config::ClusterConfig;
use crate::model::*;
use crate::wire::FromNode;

/// Longer than anything here takes; a test that waits for it has failed.
const LONG: Duration = Duration::from_secs(20);

pub(super) fn config(port: u16) -> ClusterConfig {
    ClusterConfig { host: "127.0.0.1".into(), port: Some(port), tls: false, generation: None, mqtt_tls: None }
}

pub(super) fn node() -> Node {
    Node {
        facts: NodeFacts {
            host: "w1".into(),
            architecture: "amd64".into(),
            cpus_logical: 4,
            technologies: vec![Technology::Container],
            ..NodeFacts::default()
        },
        usage: NodeUsage { cpus_logical: 4, memory_available_mib: 4000, ..NodeUsage::default() },
        address: None,
        overlay_address: None,
        tunnel_port: 50103,
        jobs: Vec::new(),
        announced: Vec::new(),
    }
}

/// A running control plane and both of its channels.
pub(super) struct Running {
    pub(super) commands: Receiver<Command>,
    pub(super) reports: Sender<Report>,
    pub(super) stop: Drain,
    task: JoinHandle<anyhow::Result<()>>,
}

pub(super) fn start(config: ClusterConfig) -> Running {
    run(Cluster::new(config, node()))
}

pub(super) fn run(cluster: Cluster) -> Running {
    let (sender, commands) = channel(16);
    let (reports, receiver) = channel(16);
    let stop = Drain::new(Duration::from_secs(5));
    let task = tokio::spawn(Box::new(cluster).run(sender, receiver, stop.clone()));
    Running { commands, reports, stop, task }
}

impl Running {
    /// The next command that `want` wants; others are passed over.
    pub(super) async fn hear<T>(&mut self, what: &str, mut want: impl FnMut(Command) -> Option<T>) -> T {
        let heard = async {
            loop {
                let command = self.commands.recv().await.expect("the control plane runs");
                if let Some(wanted) = want(command) {
                    return wanted;
                }
            }
        };
        timeout(LONG, heard).await.unwrap_or_else(|_| panic!("never heard: {what}"))
    }

    pub(super) async fn registered(&mut self) -> NodeIdentity {
        self.hear("registered", |command| match command {
            Command::Registered(identity) => Some(identity),
            _ => None,
        })
        .await
    }

    pub(super) async fn connected(&mut self) {
        self.hear("connected", |command| matches!(command, Command::Connected).then_some(())).await;
    }

    /// Waits until it is, and returns why.
    pub(super) async fn disconnected(&mut self) -> String {
        self.hear("disconnected", |command| match command {
            Command::Disconnected(reason) => Some(reason),
            _ => None,
        })
        .await
    }

    /// What is in the way of a connection.
    pub(super) async fn trouble(&mut self) -> String {
        self.hear("trouble", |command| match command {
            Command::Trouble(error) => Some(error),
            _ => None,
        })
        .await
    }

    pub(super) async fn deploy(&mut self) -> InstanceSpec {
        self.hear("a deploy", |command| match command {
            Command::Deploy(spec, _) => Some(*spec),
            _ => None,
        })
        .await
    }

    pub(super) async fn say(&self, report: Report) {
        timeout(LONG, self.reports.send(report)).await.expect("reports are always taken").expect("it runs");
    }

    /// Ends it as the engine does, and waits for the end.
    pub(super) async fn end(self) {
        let Self { commands, reports, stop, task } = self;
        stop.begin();
        drop(reports);
        timeout(LONG, task).await.expect("it ends").expect("no panic").expect("no error");
        drop(commands);
    }
}

pub(super) fn instance(name: &str) -> InstanceId {
    InstanceId { service: service(name), number: 0 }
}

pub(super) fn service(name: &str) -> ServiceName {
    format!("app.default.{name}.test").parse().unwrap()
}

pub(super) fn status(name: &str, status: Status) -> Report {
    Report::Status { instance: instance(name), status, detail: "why \"so\"\n".into() }
}

pub(super) fn usage(name: &str) -> InstanceUsage {
    InstanceUsage {
        instance: instance(name),
        technology: Technology::Container,
        cpu_percent: f64::NAN,
        memory_bytes: 1,
        memory_percent: 0.5,
        disk_bytes: 1,
        log_tail: "\u{1b}[31mred\u{0}".into(),
        counters: crate::model::InstanceCounters::default(),
    }
}

/// How much of it, where somebody wants more than usual.
pub(super) fn size(variable: &str, usual: u64) -> u64 {
    std::env::var(variable).map_or(usual, |text| text.parse().expect("a number"))
}

pub(super) fn job(name: &str) -> String {
    format!(
        r#"{{"_id":"64b0","job_name":"app.default.{name}.test","instance_number":0,"virtualization":"container",
            "image":"nginx","cmd":null,"port":"","instance_list":[]}}"#
    )
}

/// What a released cluster survives (protocol 2). It dies of anything else, for every worker at once.
pub(super) fn harmless(topic: &str, payload: &[u8]) -> Result<(), String> {
    // A topic of ours, where no cluster listens: nothing there can harm one.
    if topic.split('/').nth(2) == Some("sensors") {
        return Ok(());
    }
    let (_, kind) = FromNode::parse(topic).ok_or_else(|| format!("nobody reads {topic}"))?;
    let document: serde_json::Value =
        serde_json::from_slice(payload).map_err(|error| format!("{topic}: not JSON: {error}"))?;
    let members = document.as_object().ok_or_else(|| format!("{topic}: not an object"))?;
    let check = |right: bool, what: &str| if right { Ok(()) } else { Err(format!("{topic}: {what}: {document}")) };
    match kind {
        // As the first generation hears it.
        FromNode::Job if members.contains_key("job_id") => {
            check(members["status"] == "DEPLOYED" || members["status"] == "FAILED", "status")
        }
        FromNode::Job => {
            for member in ["sname", "status", "status_detail", "instance", "publicip"] {
                check(members.contains_key(member), member)?;
            }
            let known = ["CREATING", "CREATED", "RUNNING", "FAILED", "DEAD", "COMPLETED", "UNDEPLOYED"];
            check(members["status"].as_str().is_some_and(|status| known.contains(&status)), "status")?;
            check(members["instance"].is_u64(), "instance is a number")
        }
        FromNode::Resources => {
            let services = members.get("services").and_then(|services| services.as_array());
            check(services.is_some(), "services is a list")?;
            for entry in services.into_iter().flatten() {
                check(entry["job_name"].is_string() && entry["instance"].is_u64(), "an entry names its instance")?;
                check(entry["cpu_percent"].is_string() && entry["logs"].is_string(), "an entry's texts")?;
            }
            Ok(())
        }
        FromNode::Information => {
            check(members.values().all(|value| !value.is_null() && value != ""), "no empty member")?;
            check(members["memory"].is_number() && members["cpu_percent"].is_number(), "numbers")
        }
        FromNode::Deployed => {
            let texts = ["appname", "nsip", "nsipv6", "host_port", "host_ip"];
            check(texts.iter().all(|name| members.get(*name).is_some_and(|value| value.is_string())), "texts")
        }
        FromNode::TableQuery => {
            let said =
                ["sname", "sip"].iter().filter(|name| members[**name].as_str().is_some_and(|text| !text.is_empty()));
            check(said.count() == 1, "exactly one of sname and sip")
        }
        FromNode::Subnet => check(document == serde_json::json!({"METHOD": "GET"}), "a request"),
        FromNode::AddressChanged | FromNode::InterestRemove => check(members["appname"].is_string(), "appname"),
    }
}

#[test]
fn the_check_for_harm_can_fail() {
    for (topic, payload) in [
        ("nodes/n/job", r#"{"sname":"a.b.c.d","status":"ODD","status_detail":"","instance":0,"publicip":""}"#),
        ("nodes/n/job", r#"{"sname":"a.b.c.d","status":"DEAD","status_detail":"","instance":"0","publicip":""}"#),
        ("nodes/n/jobs/resources", r#"{"services":null}"#),
        ("nodes/n/information", "[]"),
        ("nodes/n/information", ""),
        ("nodes/n/information", r#"{"memory":1,"cpu_percent":1,"port":""}"#),
        ("nodes/n/net/service/deployed", r#"{"appname":"x","nsip":"1","nsipv6":"2","host_port":3,"host_ip":"4"}"#),
        ("nodes/n/net/odd", "{}"),
    ] {
        assert!(harmless(topic, payload.as_bytes()).is_err(), "{topic} {payload}");
    }
}
