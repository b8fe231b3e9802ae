use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::super::inventory::{Needs, Request};
use super::super::{ClusterApiError, Target};
use super::*;
use crate::model::Technology;

const WEB: &str = "app.default.web.test";

/// A cluster whose clock moves only when told, and a record of what it said.
struct Cluster {
    core: Core,
    now: Moment,
    ids: u32,
    said: Vec<Message>,
    saves: usize,
}

impl Cluster {
    fn with_nodes(hosts: &[&str]) -> Self {
        let id = "c00000000000000000000001".parse().unwrap();
        let core = Core::new(id, AddressPlan::default());
        let mut cluster = Self { core, now: Duration::from_secs(100), ids: 0, said: Vec::new(), saves: 0 };
        for host in hosts {
            let id = cluster.register(host);
            cluster.core.information(&id, NodeFacts::default(), cluster.now);
        }
        cluster.take();
        cluster
    }

    fn register(&mut self, host: &str) -> NodeId {
        self.ids += 1;
        let facts = NodeFacts {
            technologies: BTreeSet::from([Technology::Container]),
            memory_available_mib: Some(1000),
            architecture: Some("amd64".into()),
            ..NodeFacts::default()
        };
        self.core.register(host, facts, format!("node{}", self.ids).parse().unwrap()).unwrap()
    }

    fn id(&self, host: &str) -> NodeId {
        self.core.nodes[host].id.clone()
    }

    fn deploy(&mut self, replicas: u32) -> Vec<InstanceId> {
        self.deploy_as(request(WEB), replicas, None).unwrap()
    }

    fn deploy_as(
        &mut self,
        request: Request,
        replicas: u32,
        on: Option<&str>,
    ) -> Result<Vec<InstanceId>, ClusterApiError> {
        self.ids += 1;
        self.core.deploy(request, replicas, on, format!("job{}", self.ids), self.now)
    }

    /// What the cluster said since the last call, in short.
    fn take(&mut self) -> Vec<String> {
        let effects = self.core.take_effects();
        self.saves += usize::from(effects.save);
        let short = effects.messages.iter().map(|message| self.short(message)).collect();
        self.said.extend(effects.messages);
        short
    }

    fn host(&self, id: &NodeId) -> String {
        self.core.node(id).map_or_else(|| id.to_string(), |node| node.host.clone())
    }

    fn short(&self, message: &Message) -> String {
        match message {
            Message::Deploy(order) => format!("deploy {} on {}", order.instance.number, self.host(&order.node)),
            Message::Delete { node, instance, .. } => format!("delete {} on {}", instance.number, self.host(node)),
            Message::NotRegistered { node } => format!("not registered {node}"),
            Message::Subnet { node, subnet } => format!("subnet {} {} for {}", subnet.v4, subnet.v6, self.host(node)),
            Message::Table { node, answer } => format!("table of {} rows for {}", answer.rows.len(), self.host(node)),
            Message::Changed { change, .. } => format!("{change:?}").to_lowercase(),
        }
    }

    /// The node does what a good node does: network up, then listed as running.
    fn runs(&mut self, host: &str, number: u32) {
        let (id, now) = (self.id(host), self.now);
        self.core.report(&id, &instance(number), Status::Creating, "", now);
        self.core.deployed(&id, &instance(number), place(host, number), now);
        self.core.report(&id, &instance(number), Status::Created, "", now);
        self.lists(host, &[number]);
    }

    fn lists(&mut self, host: &str, numbers: &[u32]) {
        let samples = numbers.iter().map(|number| Sample {
            instance: instance(*number),
            virtualization: "docker".into(),
            usage: InstanceUsage::default(),
        });
        self.core.resources(&self.id(host), samples.collect(), self.now);
    }

    fn says(&mut self, host: &str, number: u32, status: Status) {
        self.core.report(&self.id(host), &instance(number), status, "because", self.now);
    }

    /// Seconds go by, in which these nodes report themselves and these instances.
    fn pass(&mut self, seconds: u32, nodes: &[(&str, &[u32])]) {
        for _ in 0..seconds {
            self.now += Duration::from_secs(1);
            for (host, numbers) in nodes {
                self.core.information(&self.id(host), NodeFacts::default(), self.now);
                self.lists(host, numbers);
            }
            self.core.tick(self.now);
        }
    }

    fn words(&self) -> Vec<(u32, &'static str, String)> {
        let service = &self.core.services[&name(WEB)];
        let row = |instance: &Instance| {
            let node = instance.node.as_ref().map(|node| self.host(node)).unwrap_or_default();
            (instance.number, instance.phase.word(), node)
        };
        service.instances.values().map(row).collect()
    }

    fn rows(&self) -> Vec<u32> {
        let table = self.core.table(Query::Name(name(WEB)));
        table.rows.iter().filter(|row| row.deployed.is_some()).map(|row| row.number).collect()
    }
}

fn name(text: &str) -> ServiceName {
    text.parse().unwrap()
}

fn instance(number: u32) -> InstanceId {
    InstanceId { service: name(WEB), number }
}

fn request(service: &str) -> Request {
    Request {
        name: name(service),
        document: "{}".into(),
        virtualization: "container".into(),
        one_shot: false,
        needs: Needs::default(),
        ports: Vec::new(),
        image: "nginx".into(),
        round_robin_v4: None,
        round_robin_v6: None,
        policies: BTreeSet::new(),
        weights: BTreeMap::new(),
    }
}

fn place(host: &str, number: u32) -> Deployed {
    Deployed {
        namespace_v4: Ipv4Addr::new(10, 18, host.len() as u8, 2 + number as u8),
        namespace_v6: Some("fc00::2".parse().unwrap()),
        host: "192.0.2.1".parse().unwrap(),
        host_port: 50103,
    }
}

#[test]
fn a_host_name_is_one_node() {
    let mut cluster = Cluster::with_nodes(&["a", "b"]);
    let first = cluster.id("a");
    assert_eq!(cluster.register("a"), first);
    assert_ne!(cluster.id("b"), first);
    assert!(!Core::is_fresh(cluster.core.node(&first).unwrap(), cluster.now), "it may not hear us yet");
}

#[test]
fn every_node_has_one_subnet_for_ever() {
    let mut cluster = Cluster::with_nodes(&["a", "b"]);
    let (a, b) = (cluster.id("a"), cluster.id("b"));
    for node in [&a, &b, &a] {
        cluster.core.subnet_request(node, cluster.now);
    }
    cluster.core.subnet_request(&"stranger".parse().unwrap(), cluster.now);
    assert_eq!(
        cluster.take(),
        [
            "subnet 10.18.0.0 fc00:: for a",
            "subnet 10.18.0.64 fc00::100 for b",
            "subnet 10.18.0.0 fc00:: for a",
            "not registered stranger"
        ]
    );
}

#[test]
fn a_deploy_becomes_an_order_and_resources_make_it_run() {
    let mut cluster = Cluster::with_nodes(&["a"]);
    assert_eq!(cluster.deploy(1), [instance(0)]);
    assert_eq!(cluster.take(), ["deploy 0 on a"]);
    assert_eq!(cluster.words(), [(0, "NODE_SCHEDULED", "a".into())]);
    cluster.says("a", 0, Status::Creating);
    assert_eq!(cluster.words(), [(0, "CREATING", "a".into())]);
    cluster.core.deployed(&cluster.id("a"), &instance(0), place("a", 0), cluster.now);
    assert_eq!(cluster.take(), ["deployment"]);
    cluster.says("a", 0, Status::Created);
    assert_eq!(cluster.words(), [(0, "CREATED", "a".into())]);
    cluster.lists("a", &[0]);
    assert_eq!(cluster.words(), [(0, "RUNNING", "a".into())]);
    assert_eq!(cluster.take(), ["deployment"], "from now on it gets new flows also where there are others");
}

#[test]
fn addresses_are_those_of_the_reference() {
    let mut cluster = Cluster::with_nodes(&["a"]);
    cluster
        .deploy_as(Request { round_robin_v4: Some(Ipv4Addr::new(10, 30, 55, 55)), ..request(WEB) }, 1, None)
        .unwrap();
    let service = &cluster.core.services[&name(WEB)];
    assert_eq!(service.round_robin.v4, Ipv4Addr::new(10, 30, 55, 55));
    assert_eq!(service.round_robin.v6, "fdff:2000::".parse::<std::net::Ipv6Addr>().unwrap());
    assert_eq!(service.instances[&0].address.v4, Ipv4Addr::new(10, 30, 0, 0));
    assert_eq!(service.instances[&0].address.v6, "fdff::".parse::<std::net::Ipv6Addr>().unwrap());

    for wanted in [Ipv4Addr::new(10, 30, 55, 55), Ipv4Addr::new(10, 30, 0, 0), Ipv4Addr::new(10, 99, 0, 1)] {
        let refused = Request { round_robin_v4: Some(wanted), ..request("app.default.other.test") };
        assert!(matches!(cluster.deploy_as(refused, 1, None), Err(ClusterApiError::Document { .. })), "{wanted}");
    }
    assert_eq!(cluster.core.services.len(), 1);
}

#[test]
fn instances_spread_over_fresh_nodes_that_can() {
    let mut cluster = Cluster::with_nodes(&["a", "b", "c"]);
    cluster.register("late");
    let id = cluster.core.register("wasm-only", NodeFacts::default(), "w".parse().unwrap()).unwrap();
    cluster.core.information(&id, NodeFacts::default(), cluster.now);
    cluster.deploy(6);
    let mut orders = cluster.take();
    orders.sort();
    let hosts: Vec<_> = orders.iter().map(|order| order.rsplit(' ').next().unwrap().to_owned()).collect();
    for host in ["a", "b", "c"] {
        assert_eq!(hosts.iter().filter(|chosen| *chosen == host).count(), 2, "{orders:?}");
    }
}

#[test]
fn what_a_node_lacks_keeps_it_out() {
    let rows: [(&str, Needs, &str); 5] = [
        ("", Needs::default(), ""),
        ("memory", Needs { memory_mib: 1001, ..Needs::default() }, "a has less than 1001 MiB of memory left"),
        ("gpu", Needs { vgpus: 1, ..Needs::default() }, "a has less than 1 GPUs"),
        ("arch", Needs { architectures: vec!["arm64".into()], ..Needs::default() }, "a is not arm64"),
        ("node", Needs { nodes: vec!["b".into()], ..Needs::default() }, "a is not among the nodes asked for"),
    ];
    for (case, needs, reason) in rows {
        let mut cluster = Cluster::with_nodes(&["a"]);
        cluster.deploy_as(Request { needs, ..request(WEB) }, 1, None).unwrap();
        let instance = &cluster.core.services[&name(WEB)].instances[&0];
        assert_eq!((instance.detail.as_str(), instance.node.is_none()), (reason, !reason.is_empty()), "{case}");
    }
}

#[test]
fn an_instance_waits_for_the_node_it_is_bound_to() {
    let mut cluster = Cluster::with_nodes(&["a", "b"]);
    assert!(matches!(cluster.deploy_as(request(WEB), 1, Some("x")), Err(ClusterApiError::UnknownNode { .. })));
    cluster.deploy_as(request(WEB), 2, Some("b")).unwrap();
    assert_eq!(cluster.take(), ["deploy 0 on b", "deploy 1 on b"]);
    cluster.pass(31, &[("a", &[])]);
    assert_eq!(cluster.words()[0], (0, "FAILED", "b".into()));
    cluster.pass(60, &[("a", &[])]);
    assert_eq!(cluster.take(), [""; 0], "a is not asked");
    cluster.pass(10, &[("b", &[])]);
    assert_eq!(cluster.take(), ["deploy 0 on b", "deploy 1 on b"]);
}

#[test]
fn without_a_node_an_instance_waits_and_then_goes() {
    let mut cluster = Cluster::with_nodes(&[]);
    cluster.deploy(1);
    assert_eq!(cluster.words(), [(0, "NO_WORKER_CAPACITY", String::new())]);
    let id = cluster.register("a");
    cluster.pass(5, &[]);
    assert_eq!(cluster.take(), [""; 0], "a registered node that has not reported may not hear");
    cluster.core.information(&id, NodeFacts::default(), cluster.now);
    cluster.pass(3, &[]);
    assert_eq!(cluster.take(), ["deploy 0 on a"]);
}

#[test]
fn an_instance_its_node_no_longer_lists_is_deployed_again() {
    let mut cluster = Cluster::with_nodes(&["a"]);
    cluster.deploy(1);
    cluster.runs("a", 0);
    cluster.take();
    cluster.pass(29, &[("a", &[])]);
    assert_eq!(cluster.take(), [""; 0]);
    cluster.pass(1, &[("a", &[])]);
    assert_eq!(cluster.take(), ["delete 0 on a", "undeployment"]);
    assert_eq!(cluster.words(), [(0, "FAILED", "a".into())]);
    cluster.pass(2, &[("a", &[])]);
    assert_eq!(cluster.take(), ["deploy 0 on a"]);
}

#[test]
fn a_silent_nodes_instances_go_elsewhere_and_its_copies_are_deleted() {
    let mut cluster = Cluster::with_nodes(&["a", "b"]);
    cluster.deploy(2);
    cluster.runs("a", 0);
    cluster.runs("b", 1);
    cluster.take();
    cluster.pass(31, &[("b", &[1])]);
    assert_eq!(cluster.take(), ["delete 0 on a", "deploy 0 on b", "undeployment"]);
    cluster.runs("b", 0);
    assert_eq!(cluster.take(), ["deployment"]);
    cluster.lists("a", &[0]);
    assert_eq!(cluster.take(), ["delete 0 on a"]);
    assert_eq!(cluster.words(), [(0, "RUNNING", "b".into()), (1, "RUNNING", "b".into())]);
}

#[test]
fn a_node_that_comes_back_keeps_what_nobody_else_could_take() {
    let mut cluster = Cluster::with_nodes(&["a"]);
    cluster.deploy(1);
    cluster.runs("a", 0);
    cluster.take();
    cluster.pass(300, &[]);
    assert_eq!(cluster.take(), ["undeployment"]);
    assert_eq!(cluster.words(), [(0, "FAILED", "a".into())]);
    cluster.register("a");
    cluster.core.information(&cluster.id("a"), NodeFacts::default(), cluster.now);
    cluster.pass(3, &[]);
    cluster.lists("a", &[0]);
    cluster.pass(20, &[("a", &[0])]);
    assert_eq!(cluster.take(), ["deployment"], "neither deleted nor deployed anew");
    assert_eq!(cluster.words(), [(0, "RUNNING", "a".into())]);
}

/// The broker dies with the manager: an order that was saved and published may have reached nobody.
#[test]
fn an_order_that_died_with_the_broker_is_repeated_when_its_node_is_back() {
    let mut cluster = Cluster::with_nodes(&["a", "b"]);
    cluster.deploy_as(request(WEB), 1, Some("a")).unwrap();
    cluster.deploy_as(request(WEB), 1, Some("b")).unwrap();
    assert_eq!(cluster.take(), ["deploy 0 on a", "deploy 1 on b"]);
    cluster.core.resume();
    cluster.core.nodes.values_mut().for_each(|node| node.seen = None);
    cluster.pass(1, &[]);
    assert_eq!(cluster.take(), [""; 0], "nobody hears yet");
    // The one has heard it, the other has not.
    cluster.says("a", 0, Status::Creating);
    let id = cluster.id("b");
    cluster.core.information(&id, NodeFacts::default(), cluster.now);
    cluster.pass(1, &[]);
    assert_eq!(cluster.take(), ["deploy 1 on b"]);
    cluster.pass(1, &[]);
    assert_eq!(cluster.take(), [""; 0], "once");
}

#[test]
fn failures_are_tried_again_ever_more_slowly() {
    let mut cluster = Cluster::with_nodes(&["a"]);
    cluster.deploy(1);
    cluster.take();
    for pause in [2, 4, 8, 16, 32, 60, 60] {
        cluster.says("a", 0, Status::Creating);
        cluster.says("a", 0, Status::Failed);
        cluster.says("a", 0, Status::Failed);
        assert_eq!(cluster.take(), ["delete 0 on a"]);
        cluster.pass(pause - 1, &[("a", &[])]);
        assert_eq!(cluster.take(), [""; 0], "{pause}");
        cluster.pass(1, &[("a", &[])]);
        assert_eq!(cluster.take(), ["deploy 0 on a"], "{pause}");
        cluster.says("a", 0, Status::Undeployed);
        assert_eq!(cluster.words()[0].1, "NODE_SCHEDULED", "the answer to the delete that went before");
    }
    cluster.runs("a", 0);
    cluster.pass(61, &[("a", &[0])]);
    cluster.says("a", 0, Status::Dead);
    assert_eq!(cluster.words()[0].1, "DEAD");
    cluster.take();
    cluster.pass(2, &[("a", &[])]);
    assert_eq!(cluster.take(), ["deploy 0 on a"], "having run for a minute it starts from the first pause");
}

#[test]
fn one_shots_end_once() {
    for (status, word) in [(Status::Completed, "COMPLETED"), (Status::Failed, "FAILED"), (Status::Dead, "DEAD")] {
        let mut cluster = Cluster::with_nodes(&["a", "b"]);
        cluster.deploy_as(Request { one_shot: true, ..request(WEB) }, 1, Some("a")).unwrap();
        cluster.runs("a", 0);
        cluster.says("a", 0, status);
        cluster.lists("a", &[0]);
        cluster.take();
        cluster.pass(300, &[("a", &[]), ("b", &[])]);
        assert_eq!(cluster.words(), [(0, word, "a".into())]);
        assert_eq!(cluster.take(), [""; 0]);
        assert_eq!(cluster.rows(), [0; 0]);
    }
}

#[test]
fn what_nobody_asked_for_is_deleted() {
    let mut cluster = Cluster::with_nodes(&["a", "b"]);
    cluster.lists("a", &[3]);
    assert_eq!(cluster.take(), ["delete 3 on a"]);
    cluster.deploy_as(request(WEB), 1, Some("a")).unwrap();
    cluster.take();
    cluster.lists("b", &[0]);
    assert_eq!(cluster.take(), ["delete 0 on b"]);
    cluster.says("b", 0, Status::Failed);
    cluster.core.deployed(&cluster.id("b"), &instance(0), place("b", 0), cluster.now);
    assert_eq!(cluster.take(), [""; 0], "what another node says of it does not count");
}

#[test]
fn unknown_nodes_are_told_to_register() {
    let mut cluster = Cluster::with_nodes(&[]);
    let id: NodeId = "gone".parse().unwrap();
    cluster.core.information(&id, NodeFacts::default(), cluster.now);
    cluster.core.report(&id, &instance(0), Status::Running, "", cluster.now);
    cluster.core.resources(&id, Vec::new(), cluster.now);
    cluster.core.deployed(&id, &instance(0), place("x", 0), cluster.now);
    assert_eq!(cluster.take(), ["not registered gone"; 4]);
}

#[test]
fn a_table_is_found_by_name_and_by_every_address() {
    let mut cluster = Cluster::with_nodes(&["a", "b"]);
    cluster.deploy(2);
    cluster.runs("a", 0);
    let service = cluster.core.services[&name(WEB)].clone();
    let addresses = [service.round_robin, service.instances[&0].address, service.instances[&1].address];
    let queries = addresses
        .iter()
        .flat_map(|pair| [Query::Address(pair.v4.into()), Query::Address(pair.v6.into())])
        .chain([Query::Name(name(WEB))]);
    for query in queries {
        let table = cluster.core.table(query.clone());
        assert_eq!(table.query, query);
        assert_eq!(table.service, Some(name(WEB)));
        let deployed: Vec<bool> = table.rows.iter().map(|row| row.deployed.is_some()).collect();
        assert_eq!(deployed, [true, false], "{query:?}");
    }
    let unknown = cluster.core.table(Query::Address("10.30.99.99".parse().unwrap()));
    assert_eq!((unknown.service, unknown.rows), (None, Vec::new()));
}

#[test]
fn a_changed_address_is_told() {
    let mut cluster = Cluster::with_nodes(&["a"]);
    cluster.deploy(1);
    cluster.runs("a", 0);
    cluster.take();
    let host: IpAddr = "192.0.2.99".parse().unwrap();
    for _ in 0..2 {
        cluster.core.address_changed(&cluster.id("a"), &instance(0), host, 50104);
    }
    assert_eq!(cluster.take(), ["deployment"]);
    let row = cluster.core.table(Query::Name(name(WEB))).rows[0].deployed.unwrap();
    assert_eq!((row.host, row.host_port), (host, 50104));
}

#[test]
fn delete_takes_down_all_and_frees_the_name() {
    let mut cluster = Cluster::with_nodes(&["a", "b"]);
    cluster.deploy(2);
    cluster.runs("a", 0);
    cluster.runs("b", 1);
    cluster.take();
    let now = cluster.now;
    assert_eq!(cluster.core.delete(&Target::Instance(instance(1)), now).unwrap(), [instance(1)]);
    assert_eq!(cluster.take(), ["undeployment"], "another takes over: the peers hear of it first");
    cluster.pass(1, &[("a", &[0]), ("b", &[1])]);
    assert_eq!(cluster.take(), ["delete 1 on b"]);
    assert_eq!(cluster.core.delete(&Target::Service(name(WEB)), now).unwrap(), [instance(0)]);
    assert_eq!(cluster.take(), ["delete 0 on a", "undeployment"]);
    assert!(matches!(cluster.core.delete(&Target::Service(name(WEB)), now), Err(ClusterApiError::UnknownService(_))));
    cluster.says("a", 0, Status::Undeployed);
    assert_eq!(cluster.take(), [""; 0]);
    cluster.deploy(1);
    let service = &cluster.core.services[&name(WEB)];
    assert_eq!(service.round_robin.v4, Ipv4Addr::new(10, 30, 0, 3), "freed addresses rest");
}

#[test]
fn replicate_adds_the_next_numbers_and_takes_the_newest() {
    let mut cluster = Cluster::with_nodes(&["a", "b"]);
    cluster.deploy(1);
    cluster.runs("a", 0);
    let now = cluster.now;
    assert_eq!(cluster.core.replicate(&name(WEB), 3, now).unwrap(), [instance(0), instance(1), instance(2)]);
    assert_eq!(cluster.take(), ["deploy 0 on a", "deploy 1 on b", "deploy 2 on a", "deployment"]);
    cluster.runs("b", 1);
    cluster.runs("a", 2);
    cluster.take();
    assert_eq!(cluster.core.replicate(&name(WEB), 1, now).unwrap(), [instance(0)]);
    assert_eq!(cluster.take(), ["undeployment"], "the peers hear of it first");
    cluster.pass(1, &[("a", &[0, 2]), ("b", &[1])]);
    assert_eq!(cluster.take(), ["delete 1 on b", "delete 2 on a"]);
    cluster.core.replicate(&name(WEB), 2, cluster.now).unwrap();
    assert_eq!(cluster.words().iter().map(|row| row.0).collect::<Vec<_>>(), [0, 3], "numbers are not used twice");
    assert!(matches!(cluster.core.replicate(&name(WEB), 1001, now), Err(ClusterApiError::Limit { .. })));
}

#[test]
fn a_move_keeps_a_row_all_the_while() {
    let mut cluster = Cluster::with_nodes(&["a", "b"]);
    cluster.deploy_as(request(WEB), 1, Some("a")).unwrap();
    cluster.runs("a", 0);
    cluster.take();
    assert_eq!(cluster.core.move_instance(&instance(0), "b", cluster.now).unwrap(), instance(1));
    assert_eq!(cluster.take(), ["deploy 1 on b"]);
    assert!(matches!(cluster.core.move_instance(&instance(0), "b", cluster.now), Err(ClusterApiError::NoNode { .. })));
    cluster.pass(20, &[("a", &[0]), ("b", &[])]);
    assert_eq!(cluster.rows(), [0]);
    cluster.core.deployed(&cluster.id("b"), &instance(1), place("b", 1), cluster.now);
    cluster.pass(1, &[("a", &[0])]);
    assert_eq!(cluster.rows(), [0, 1], "a network is not yet a program");
    assert_eq!(cluster.take(), ["deployment"]);
    cluster.pass(1, &[("a", &[0]), ("b", &[1])]);
    let ready = |cluster: &Cluster| {
        let rows = cluster.core.table(Query::Name(name(WEB))).rows;
        rows.iter().map(|row| (row.number, row.weight == 1)).collect::<Vec<_>>()
    };
    assert_eq!(ready(&cluster), [(0, true), (1, false)], "it may not listen yet");
    assert_eq!(cluster.take(), [""; 0]);
    cluster.pass(2, &[("a", &[0]), ("b", &[1])]);
    assert_eq!(cluster.rows(), [1]);
    assert_eq!(ready(&cluster), [(1, true)]);
    assert_eq!(cluster.take(), ["deployment"], "it still runs when its peers learn that they should not choose it");
    cluster.pass(1, &[("a", &[0]), ("b", &[1])]);
    assert_eq!(cluster.take(), ["delete 0 on a"]);
    assert_eq!(cluster.words(), [(1, "RUNNING", "b".into())]);
    assert_eq!(cluster.core.services[&name(WEB)].instances[&1].pin, None);
}

#[test]
fn a_move_that_cannot_be_leaves_the_old_instance() {
    let mut cluster = Cluster::with_nodes(&["a", "b"]);
    cluster.deploy_as(request(WEB), 1, Some("a")).unwrap();
    cluster.runs("a", 0);
    cluster.core.move_instance(&instance(0), "b", cluster.now).unwrap();
    for _ in 0..3 {
        cluster.says("b", 1, Status::Creating);
        cluster.says("b", 1, Status::Failed);
        cluster.pass(10, &[("a", &[0]), ("b", &[])]);
    }
    assert_eq!(cluster.words(), [(0, "RUNNING", "a".into())]);
    assert_eq!(cluster.rows(), [0]);
    cluster.take();

    cluster.core.move_instance(&instance(0), "b", cluster.now).unwrap();
    cluster.pass(60, &[("a", &[0])]);
    assert_eq!(cluster.words(), [(0, "RUNNING", "a".into())], "its node fell silent");
    let refused = cluster.core.move_instance(&instance(0), "b", cluster.now);
    assert!(matches!(refused, Err(ClusterApiError::NoNode { .. })));
    let there = cluster.core.move_instance(&instance(0), "a", cluster.now);
    assert!(matches!(there, Err(ClusterApiError::NoNode { .. })));
}

#[test]
fn repeated_deploys_add_and_limits_hold() {
    let mut cluster = Cluster::with_nodes(&["a"]);
    assert_eq!(cluster.deploy(1), [instance(0)]);
    assert_eq!(cluster.deploy(2), [instance(1), instance(2)]);
    assert!(matches!(cluster.deploy_as(request(WEB), 998, None), Err(ClusterApiError::Limit { .. })));
    assert_eq!(cluster.core.services[&name(WEB)].instances.len(), 3);
}

#[derive(Clone, Debug)]
enum Step {
    Register(u8),
    Information(u8),
    Subnet(u8),
    Deploy(u8, u8, Option<u8>),
    Delete(u8, Option<u8>),
    Replicate(u8, u8),
    Move(u8, u8, u8),
    Report(u8, u8, u8, u8),
    Lists(u8, u8, u8),
    Deployed(u8, u8, u8),
    Pass(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let node = 0..4u8;
    let service = 0..3u8;
    let number = 0..6u8;
    prop_oneof![
        node.clone().prop_map(Step::Register),
        node.clone().prop_map(Step::Information),
        node.clone().prop_map(Step::Subnet),
        (service.clone(), 0..4u8, proptest::option::of(node.clone())).prop_map(|(s, n, on)| Step::Deploy(s, n, on)),
        (service.clone(), proptest::option::of(number.clone())).prop_map(|(s, n)| Step::Delete(s, n)),
        (service.clone(), 0..5u8).prop_map(|(s, n)| Step::Replicate(s, n)),
        (service.clone(), number.clone(), node.clone()).prop_map(|(s, n, on)| Step::Move(s, n, on)),
        (node.clone(), service.clone(), number.clone(), 0..7u8).prop_map(|(n, s, i, w)| Step::Report(n, s, i, w)),
        (node.clone(), service.clone(), number.clone()).prop_map(|(n, s, i)| Step::Lists(n, s, i)),
        (node, service, number).prop_map(|(n, s, i)| Step::Deployed(n, s, i)),
        (1..40u8).prop_map(Step::Pass),
    ]
}

fn take_step(cluster: &mut Cluster, step: &Step) {
    let service = |nth: u8| name(&format!("app.default.s{nth}.test"));
    let instance = |nth: u8, number: u8| InstanceId { service: service(nth), number: number.into() };
    let host = |nth: u8| format!("host{nth}");
    let id = |cluster: &Cluster, nth: u8| match cluster.core.nodes.get(&host(nth)) {
        Some(node) => node.id.clone(),
        None => "stranger".parse().unwrap(),
    };
    let now = cluster.now;
    match *step {
        Step::Register(node) => drop(cluster.register(&host(node))),
        Step::Information(node) => cluster.core.information(&id(cluster, node), NodeFacts::default(), now),
        Step::Subnet(node) => cluster.core.subnet_request(&id(cluster, node), now),
        Step::Deploy(nth, replicas, on) => {
            let on = on.map(host);
            drop(cluster.deploy_as(request(service(nth).as_str()), replicas.into(), on.as_deref()));
        }
        Step::Delete(nth, None) => drop(cluster.core.delete(&Target::Service(service(nth)), cluster.now)),
        Step::Delete(nth, Some(number)) => {
            drop(cluster.core.delete(&Target::Instance(instance(nth, number)), cluster.now));
        }
        Step::Replicate(nth, replicas) => drop(cluster.core.replicate(&service(nth), replicas.into(), now)),
        Step::Move(nth, number, on) => drop(cluster.core.move_instance(&instance(nth, number), &host(on), now)),
        Step::Report(node, nth, number, word) => {
            let word = [
                Status::Creating,
                Status::Created,
                Status::Running,
                Status::Failed,
                Status::Dead,
                Status::Completed,
                Status::Undeployed,
            ][usize::from(word)];
            cluster.core.report(&id(cluster, node), &instance(nth, number), word, "", now);
        }
        Step::Lists(node, nth, number) => {
            let sample = Sample {
                instance: instance(nth, number),
                virtualization: "docker".into(),
                usage: InstanceUsage::default(),
            };
            cluster.core.resources(&id(cluster, node), vec![sample], now);
        }
        Step::Deployed(node, nth, number) => {
            cluster.core.deployed(&id(cluster, node), &instance(nth, number), place("x", number.into()), now);
        }
        Step::Pass(seconds) => cluster.pass(seconds.into(), &[]),
    }
}

fn check_invariants(cluster: &Cluster, subnets: &mut HashMap<NodeId, Subnet>) {
    let core = &cluster.core;
    let (mut v4, mut v6) = (BTreeSet::new(), BTreeSet::new());
    for service in core.services.values() {
        let instances = service.instances.values().map(|instance| instance.address);
        for pair in instances.chain([service.round_robin]) {
            assert!(v4.insert(pair.v4) && v6.insert(pair.v6), "an address twice");
        }
        assert!(service.instances.keys().all(|number| *number < service.next_number));
        for instance in service.instances.values() {
            assert!(instance.reachable().is_none() || instance.node.is_some(), "a row of nowhere");
            assert!(!instance.phase.placed() || instance.node.is_some(), "placed nowhere");
        }
    }
    let assigned: Vec<Subnet> = core.nodes.values().filter_map(|node| node.subnet).collect();
    let distinct: BTreeSet<Ipv4Addr> = assigned.iter().map(|subnet| subnet.v4).collect();
    assert_eq!(distinct.len(), assigned.len(), "a subnet twice");
    for node in core.nodes.values() {
        if let Some(subnet) = node.subnet {
            assert_eq!(*subnets.entry(node.id.clone()).or_insert(subnet), subnet, "a subnet changed");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
    #[test]
    fn any_order_of_events_keeps_addresses_apart(steps in proptest::collection::vec(step(), 1..80)) {
        let mut cluster = Cluster::with_nodes(&[]);
        let mut subnets = HashMap::new();
        for step in &steps {
            take_step(&mut cluster, step);
            cluster.take();
            check_invariants(&cluster, &mut subnets);
        }
        // What is deleted is gone, whatever came before.
        for nth in 0..3 {
            let _ = cluster.core.delete(&Target::Service(name(&format!("app.default.s{nth}.test"))), cluster.now);
        }
        cluster.take();
        prop_assert!(cluster.core.services.is_empty() && cluster.core.told.is_empty());
        prop_assert!(cluster.core.services_v4.is_unused() && cluster.core.instances_v6.is_unused());
    }
}
