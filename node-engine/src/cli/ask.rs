//! Questions to a running daemon, and its answers as text.

use std::path::Path;

use serde::Serialize;

use super::describe::DeployArgs;
use super::exec::ExecArgs;
use super::hardware;
use super::look::{self, EventsArgs};
use super::net::NetCommand;
use super::table::{bytes, list, mebibytes, percent, seconds, table};
use super::watch::{self, Repeat};
use crate::api::Selector;
use crate::api::client::{Client, ClientError};
use crate::api::dto::{Changed, ClusterInstance, ClusterNode, Explanation, Instance, Status};

/// A question, as typed.
#[derive(Debug)]
pub(super) enum Ask {
    Status { json: bool },
    Ps { local: bool, json: bool },
    Explain { instance: Selector, json: bool },
    Logs { instance: Selector, tail: Option<usize>, follow: bool },
    Inspect { instance: Selector, json: bool },
    Stats { instance: Option<Selector>, repeat: Repeat },
    Hardware { json: bool },
    Metrics,
    Exec(ExecArgs),
    Events(EventsArgs),
    Deploy(Box<DeployArgs>),
    Delete { target: Selector },
    Replicate { service: Selector, replicas: u32 },
    Move { instance: Selector, node: String },
    Nodes { json: bool },
    Net(NetCommand),
}

impl Ask {
    /// Asks and prints. Gives the exit code of this process.
    pub(super) async fn run(self, socket: &Path) -> anyhow::Result<u8> {
        let answer = match self {
            // The description is read before anybody is asked: what is wrong with it has nothing to do with a daemon.
            Self::Deploy(args) => {
                let document = args.document()?;
                let changed = Client::new(socket)?.deploy(document, args.replicas, args.on).await?;
                said(&changed, "deploying").into_bytes()
            }
            Self::Net(command) => return command.run(&Client::new(socket)?).await.map(|()| 0),
            Self::Logs { instance, tail, follow: true } => {
                let following = Client::new(socket)?.follow_logs(&instance, tail).await?;
                return look::follow(following).await.map(|()| 0);
            }
            Self::Stats { instance, repeat } => {
                return look::stats(&Client::new(socket)?, instance, repeat).await.map(|()| 0);
            }
            Self::Events(args) => return args.run(&Client::new(socket)?).await.map(|()| 0),
            Self::Exec(args) => return args.run(&Client::new(socket)?).await,
            other => other.answer(&Client::new(socket)?).await?,
        };
        // A reader that has had enough (`| head`) is no error.
        watch::print(&answer).map(|_| 0)
    }

    async fn answer(self, client: &Client) -> Result<Vec<u8>, ClientError> {
        let text = match self {
            Self::Status { json } => shown(json, &client.status().await?, status),
            Self::Ps { local, json } => {
                if !local && client.status().await?.cluster.standalone {
                    shown(json, &client.cluster_instances().await?, |known| cluster_instances(known))
                } else {
                    shown(json, &client.instances().await?, |known| instances(known))
                }
            }
            Self::Explain { instance, json } => shown(json, &client.explain(&instance).await?, explanation),
            Self::Logs { instance, tail, .. } => return client.logs(&instance, tail).await,
            Self::Inspect { instance, json } => shown(json, &client.inspect(&instance).await?, look::inspection),
            Self::Hardware { json } => shown(json, &client.hardware().await?, hardware::hardware),
            Self::Metrics => client.metrics().await?,
            Self::Deploy(_) | Self::Net(_) | Self::Stats { .. } | Self::Events(_) | Self::Exec(_) => {
                unreachable!("answered by its caller")
            }
            Self::Delete { target } => said(&client.delete(&target).await?, "taking down"),
            Self::Replicate { service, replicas } => said(&client.replicate(&service, replicas).await?, "to run"),
            Self::Move { instance, node } => {
                let changed = client.move_instance(&instance, &node).await?;
                format!("{instance} is replaced on {node} by:\n{}", said(&changed, "deploying"))
            }
            Self::Nodes { json } => shown(json, &client.nodes().await?, |known| nodes(known)),
        };
        Ok(text.into_bytes())
    }
}

pub(super) fn shown<T: Serialize>(json: bool, answer: &T, text: impl FnOnce(&T) -> String) -> String {
    if !json {
        return text(answer);
    }
    let mut json = serde_json::to_string_pretty(answer).expect("plain data without maps of odd keys becomes JSON");
    json.push('\n');
    json
}

fn said(changed: &Changed, verb: &str) -> String {
    if changed.instances.is_empty() {
        return "no instances\n".into();
    }
    changed.instances.iter().map(|instance| format!("{verb} {instance}\n")).collect()
}

fn status(status: &Status) -> String {
    let cluster = match (&status.cluster.address, status.cluster.standalone) {
        (_, true) => "this process".to_owned(),
        (address, false) => address.clone(),
    };
    let connection = if status.cluster.connected { "connected" } else { "not connected" };
    let generation = match status.cluster.generation.as_str() {
        "" => String::new(),
        generation => format!(", generation {generation}"),
    };
    let mut pairs = vec![
        ("node-engine", format!("{}, pid {}, up {}", status.version, status.pid, seconds(status.uptime_seconds))),
        ("node", status.node.name.clone()),
        ("id", status.node.id.clone()),
        ("cluster", format!("{cluster}, {connection} for {}{generation}", seconds(status.cluster.since_seconds))),
        ("last error", if status.cluster.connected { String::new() } else { status.cluster.last_error.clone() }),
        ("runs", status.node.technologies.join(", ")),
        ("instances", format!("{} running", status.running)),
    ];
    if let Some(network) = &status.network {
        let why = if network.reason.is_empty() { String::new() } else { format!(": {}", network.reason) };
        pairs.push(("datapath", format!("{}{why}", network.datapath)));
        let address = if network.address.is_empty() { String::new() } else { format!(", {}", network.address) };
        pairs.push(("uplink", format!("{}{address}", network.uplink)));
        let subnet = [network.subnet_v4.as_str(), network.subnet_v6.as_str()];
        pairs.push(("subnet", if subnet[0].is_empty() { "not assigned yet".into() } else { subnet.join(", ") }));
        pairs.push(("overlay", format!("{} services, {} peers", network.services, network.peers)));
    }
    if let Some(usage) = &status.usage {
        pairs.push(("cpu", format!("{} of {} CPUs", percent(usage.cpu_percent), usage.cpus)));
        let (free, total) = (mebibytes(usage.memory_available_mib), mebibytes(usage.memory_total_mib));
        pairs.push(("memory", format!("{} used, {free} of {total} available", percent(usage.memory_percent))));
        pairs.push(("gpus", if usage.gpus == 0 { String::new() } else { usage.gpus.to_string() }));
    }
    let sent: Vec<String> =
        status.sent_today.iter().map(|sent| format!("{} {}", sent.purpose, bytes(sent.bytes))).collect();
    pairs.push(("sent today", sent.join(", ")));
    let dropped = match status.reports_dropped {
        0 => String::new(),
        number => format!("{number} reports since the start"),
    };
    pairs.push(("given up", dropped));
    for warning in status.network.iter().flat_map(|network| &network.warnings) {
        pairs.push(("warning", warning.clone()));
    }
    let mut text = list(&pairs);
    let moved: Vec<_> = status.network.iter().flat_map(|network| &network.counters).filter(|(_, n)| *n > 0).collect();
    if !moved.is_empty() {
        let rows: Vec<_> = moved.iter().map(|(name, number)| [name.clone(), number.to_string()]).collect();
        text.push('\n');
        text.push_str(&table(["PACKETS", "COUNT"], &rows));
    }
    text
}

fn instances(known: &[Instance]) -> String {
    let row = |instance: &Instance| {
        [
            format!("{}#{}", instance.service, instance.number),
            instance.state.clone(),
            dash(&instance.address_v4),
            dash(&instance.address_v6),
            instance.image.clone(),
            instance.detail.clone(),
        ]
    };
    let rows: Vec<_> = known.iter().map(row).collect();
    table(["INSTANCE", "STATE", "ADDRESS", "ADDRESS6", "IMAGE", "DETAIL"], &rows)
}

fn explanation(known: &Explanation) -> String {
    let command = match known.command {
        0 => "as it was found running".into(),
        number => format!("by command {number}"),
    };
    let wanted = match (known.wanted.as_str(), &known.ended) {
        ("run", _) => format!("to run, {command}, for {}", seconds(known.wanted_seconds)),
        (_, Some((status, why))) if why.is_empty() => format!("no more: it is {status}, which the cluster was told"),
        (_, Some((status, why))) => format!("no more: it is {status} ({why}), which the cluster was told"),
        _ => "not to be here".into(),
    };
    let state = match known.state_seconds {
        Some(since) => format!("{} for {}", known.state, seconds(since)),
        None => known.state.clone(),
    };
    let restarts = match (known.restarts, known.restart_limit) {
        (0, 0) => "none: each end is told to the cluster at once".into(),
        (number, limit) => format!("{number} of {limit} within {}", seconds(known.restart_window_seconds)),
    };
    let mut pairs = vec![
        ("instance", format!("{}#{}", known.service, known.number)),
        ("image", format!("{} ({})", known.image, known.technology)),
        ("wanted", wanted),
        ("is", state),
        ("address", [&known.address_v4, &known.address_v6].map(String::as_str).join(" ").trim().to_owned()),
    ];
    pairs.extend(known.reasons.iter().map(|reason| ("because", reason.clone())));
    if let Some(next) = known.next_try_seconds {
        pairs.push(("next try", format!("in {next:.0} s")));
    }
    if let Some((ago, why)) = &known.fell {
        pairs.push(("last end", format!("{why}, {} ago", seconds(*ago))));
    }
    pairs.push(("restarts", restarts));
    pairs.push(("not kept", known.state_not_kept.clone()));
    list(&pairs)
}

fn cluster_instances(known: &[ClusterInstance]) -> String {
    let row = |instance: &ClusterInstance| {
        [
            format!("{}#{}", instance.service, instance.number),
            instance.status.clone(),
            dash(&instance.node),
            dash(&instance.address),
            dash(instance.service_addresses.first().map_or("", String::as_str)),
            dash(&instance.ports.join(" ")),
            instance.image.clone(),
            instance.detail.clone(),
        ]
    };
    let rows: Vec<_> = known.iter().map(row).collect();
    table(["INSTANCE", "STATUS", "NODE", "ADDRESS", "SERVICE", "PORTS", "IMAGE", "DETAIL"], &rows)
}

fn nodes(known: &[ClusterNode]) -> String {
    let row = |node: &ClusterNode| {
        let seen = if node.active { "active".into() } else { format!("silent for {}", seconds(node.seen_seconds)) };
        [
            node.name.clone(),
            seen,
            dash(&node.address),
            dash(&node.subnet),
            node.instances.to_string(),
            format!("{} of {}", percent(node.cpu_percent), node.cpus),
            format!("{} free", mebibytes(node.memory_mib)),
            dash(&node.architecture),
            node.id.clone(),
        ]
    };
    let rows: Vec<_> = known.iter().map(row).collect();
    table(["NODE", "STATE", "ADDRESS", "SUBNET", "INSTANCES", "CPU", "MEMORY", "ARCH", "ID"], &rows)
}

pub(super) fn dash(text: &str) -> String {
    if text.is_empty() { "-".into() } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::dto::{ClusterStatus, NetworkStatus, NodeStatus, SentStatus, UsageStatus};

    #[test]
    fn status_says_who_where_and_why() {
        let mut known = Status {
            version: "0.1.0".into(),
            pid: 7,
            uptime_seconds: 61,
            node: NodeStatus { name: "edge-1".into(), technologies: vec!["docker".into()], ..NodeStatus::default() },
            cluster: ClusterStatus {
                address: "c.example".into(),
                connected: true,
                since_seconds: 5,
                generation: "g4".into(),
                standalone: false,
                last_error: "connection refused".into(),
            },
            network: Some(NetworkStatus {
                datapath: "tun".into(),
                reason: "no BTF".into(),
                uplink: "eth0".into(),
                counters: vec![("sent".into(), 3), ("never".into(), 0)],
                ..NetworkStatus::default()
            }),
            usage: Some(UsageStatus { cpu_percent: 12.4, cpus: 2, memory_total_mib: 2048, ..UsageStatus::default() }),
            running: 1,
            sent_today: vec![SentStatus { purpose: "information".into(), messages: 2, bytes: 2048 }],
            reports_dropped: 7,
        };
        assert_eq!(
            status(&known),
            "node-engine  0.1.0, pid 7, up 1m 1s\n\
             node         edge-1\n\
             cluster      c.example, connected for 5s, generation g4\n\
             runs         docker\n\
             instances    1 running\n\
             datapath     tun: no BTF\n\
             uplink       eth0\n\
             subnet       not assigned yet\n\
             overlay      0 services, 0 peers\n\
             cpu          12% of 2 CPUs\n\
             memory       0% used, 0 MiB of 2.0 GiB available\n\
             sent today   information 2.0 KiB\n\
             given up     7 reports since the start\n\
             \n\
             PACKETS  COUNT\n\
             sent     3\n"
        );
        known.cluster.connected = false;
        let lines = "cluster      c.example, not connected for 5s, generation g4\nlast error   connection refused\n";
        assert!(status(&known).contains(lines), "{}", status(&known));
    }

    #[test]
    fn instances_are_shown_as_they_are_typed() {
        let known = Instance {
            service: "app.default.web.default".into(),
            number: 1,
            state: "failed".into(),
            image: "nginx".into(),
            detail: "exit code 3".into(),
            ..Instance::default()
        };
        assert_eq!(
            instances(&[known]),
            "INSTANCE                   STATE   ADDRESS  ADDRESS6  IMAGE  DETAIL\n\
             app.default.web.default#1  failed  -        -         nginx  exit code 3\n"
        );
    }

    #[test]
    fn an_explanation_says_what_is_wanted_what_is_and_why() {
        let known = Explanation {
            service: "app.default.web.default".into(),
            technology: "docker".into(),
            image: "nginx".into(),
            wanted: "run".into(),
            command: 12,
            wanted_seconds: 70,
            state: "starting".into(),
            state_seconds: Some(3),
            reasons: vec!["exit code 3; restart 2 of 5 in 2 s".into()],
            next_try_seconds: Some(1.6),
            restarts: 2,
            restart_limit: 5,
            restart_window_seconds: 600,
            fell: Some((3, "exit code 3".into())),
            ..Explanation::default()
        };
        assert_eq!(
            explanation(&known),
            "instance  app.default.web.default#0\n\
             image     nginx (docker)\n\
             wanted    to run, by command 12, for 1m 10s\n\
             is        starting for 3s\n\
             because   exit code 3; restart 2 of 5 in 2 s\n\
             next try  in 2 s\n\
             last end  exit code 3, 3s ago\n\
             restarts  2 of 5 within 10m 0s\n"
        );
    }

    #[test]
    fn json_is_what_the_daemon_said() {
        let text = shown(true, &vec![Instance { number: 3, ..Instance::default() }], |_| String::new());
        let read: Vec<Instance> = serde_json::from_str(&text).unwrap();
        assert_eq!(read[0].number, 3);
    }
}
