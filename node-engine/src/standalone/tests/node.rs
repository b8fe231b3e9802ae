//! Our own node's control plane at our own cluster: what the one writes, the other reads, and back.

use std::time::Duration;

use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::time::timeout;

use super::{PATIENCE, Started, WEB, config, start, until, web};
use crate::config::ClusterConfig;
use crate::control::{Cluster, ControlPlane, Node};
use crate::drain::Drain;
use crate::model::{
    Addresses, Command, Generation, InstanceUsage, NodeFacts, NodeIdentity, NodeUsage, Query, Report, Status, Subnet,
    Technology,
};
use crate::standalone::Target;

struct OurNode {
    commands: Receiver<Command>,
    reports: Sender<Report>,
    identity: NodeIdentity,
    stop: Drain,
}

impl OurNode {
    async fn join(cluster: &Started, generation: Option<Generation>) -> Self {
        let port =
            if generation == Some(Generation::G1) { cluster.standalone.socketio } else { cluster.standalone.http };
        let config =
            ClusterConfig { host: "127.0.0.1".into(), port: Some(port.port()), tls: false, generation, mqtt_tls: None };
        let facts = NodeFacts {
            host: "ours".into(),
            architecture: "amd64".into(),
            technologies: vec![Technology::Container],
            ..NodeFacts::default()
        };
        let address = Some("192.0.2.7".parse().unwrap());
        let node = Node {
            facts,
            usage: usage(),
            address,
            overlay_address: None,
            tunnel_port: 50103,
            jobs: Vec::new(),
            announced: Vec::new(),
        };
        let (commands, mut received) = channel(64);
        let (reports, queue) = channel(64);
        let stop = Drain::new(Duration::from_secs(5));
        tokio::spawn(Box::new(Cluster::new(config, node)).run(commands, queue, stop.clone()));
        let Command::Registered(identity) = next(&mut received).await else { panic!("not registered first") };
        let mut node = Self { commands: received, reports, identity, stop };
        node.hears(|command| matches!(command, Command::Connected).then_some(())).await;
        node.says(Report::Node(Box::new(usage()))).await;
        until("fresh", async || cluster.standalone.cluster.nodes().await.unwrap().iter().any(|node| node.active)).await;
        node
    }

    async fn says(&self, report: Report) {
        self.reports.send(report).await.expect("the control plane runs");
    }

    async fn hears<T>(&mut self, wanted: impl Fn(Command) -> Option<T>) -> T {
        loop {
            if let Some(found) = wanted(next(&mut self.commands).await) {
                return found;
            }
        }
    }
}

async fn next(commands: &mut Receiver<Command>) -> Command {
    timeout(PATIENCE, commands.recv()).await.expect("a command in time").expect("the control plane runs")
}

fn usage() -> NodeUsage {
    NodeUsage { cpus_logical: 4, memory_available_mib: 4000, cpu_percent: 7.5, ..NodeUsage::default() }
}

#[tokio::test]
async fn our_node_and_our_cluster_understand_each_other() {
    let state = tempfile::tempdir().unwrap();
    let cluster = start(config(state.path())).await;
    let mut node = OurNode::join(&cluster, None).await;
    assert_eq!(node.identity.generation, Generation::G4);
    let seen = cluster.standalone.cluster.nodes().await.unwrap().remove(0);
    assert_eq!((seen.name.as_str(), seen.cpus, seen.memory_mib, seen.cpu_percent), ("ours", 4, 4000, 7.5));
    assert_eq!((seen.address.as_str(), seen.architecture.as_str()), ("192.0.2.7", "amd64"));

    node.says(Report::SubnetRequest).await;
    let subnet = node.hears(|command| if let Command::Subnet(subnet) = command { Some(subnet) } else { None }).await;
    assert_eq!(subnet, Subnet { v4: "10.18.0.0".parse().unwrap(), v6: "fc00::".parse().unwrap() });

    cluster.standalone.cluster.deploy(web(), None, None).await.unwrap();
    let spec = node.hears(|command| if let Command::Deploy(spec, _) = command { Some(spec) } else { None }).await;
    assert_eq!(spec.id.to_string(), format!("{WEB}.instance.0"));
    let (instance, service) = (spec.id.clone(), spec.id.service.clone());
    node.says(Report::InterestAdd(service.clone())).await;
    node.says(Report::Status { instance: instance.clone(), status: Status::Creating, detail: String::new() }).await;
    let addresses = Addresses { v4: "10.18.0.2".parse().unwrap(), v6: "fc00::2".parse().unwrap() };
    node.says(Report::Deployed { instance: instance.clone(), addresses }).await;
    let running = InstanceUsage {
        instance: instance.clone(),
        technology: Technology::Container,
        cpu_percent: 1.5,
        memory_bytes: 1000,
        memory_percent: 0.2,
        disk_bytes: 1000,
        log_tail: "hello".into(),
        counters: crate::model::InstanceCounters::default(),
    };
    node.says(Report::Instances(vec![running])).await;
    let status = async || cluster.standalone.cluster.instances().await.unwrap().remove(0).status;
    until("running", async || status().await == "RUNNING").await;

    let service_address =
        cluster.standalone.cluster.instances().await.unwrap()[0].service_addresses[0].parse().unwrap();
    for query in [Query::Name(service.clone()), Query::Address(service_address)] {
        node.says(Report::TableQuery(query.clone())).await;
        let table = node
            .hears(|command| match command {
                Command::Table(table) if table.query.as_ref() == Some(&query) => Some(table),
                _ => None,
            })
            .await;
        assert_eq!(table.service.as_ref(), Some(&service));
        let row = &table.rows[0];
        assert_eq!((row.namespace.v4, row.namespace.v6), (Some(addresses.v4), Some(addresses.v6)));
        assert_eq!((row.host.to_string().as_str(), row.host_port), ("192.0.2.7", 50103));
        assert_eq!(row.services.len(), 2);
    }

    cluster.standalone.cluster.delete(Target::Service(service.clone())).await.unwrap();
    let (mut deleted, mut told) = (false, false);
    while !(deleted && told) {
        match next(&mut node.commands).await {
            Command::Delete(id, _) => deleted = id == instance,
            Command::ServiceChanged(name) => told = name == service,
            _ => {}
        }
    }
    node.says(Report::Status { instance, status: Status::Undeployed, detail: String::new() }).await;
    node.stop.begin();
    cluster.stop().await;
}

#[tokio::test]
async fn our_node_registers_the_first_way_too() {
    let state = tempfile::tempdir().unwrap();
    let mut config = config(state.path());
    config.first_generation = true;
    let cluster = start(config).await;
    let mut node = OurNode::join(&cluster, Some(Generation::G1)).await;
    let subnet = node.identity.subnet.expect("with the registration");
    assert_eq!(subnet.v4.to_string(), "10.18.0.0");
    cluster.standalone.cluster.deploy(web(), None, None).await.unwrap();
    let spec = node.hears(|command| if let Command::Deploy(spec, _) = command { Some(spec) } else { None }).await;
    assert_eq!(spec.id.to_string(), format!("{WEB}.instance.0"));
    node.stop.begin();
    cluster.stop().await;
}
