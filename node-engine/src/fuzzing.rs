//! Every door at which bytes of others come in, as a target for a fuzzer: what nobody may make us panic with, and what must hold of
//! whatever is understood. `cargo xtask fuzz` looks for inputs that break a promise; the corpora under `tests/fuzz/corpus`, which begin
//! with the seeds, are replayed by a plain `cargo test`.

use std::net::{Ipv4Addr, Ipv6Addr};

use netmanager_common::frame::SliceFrame;
use netmanager_common::pipeline::{inbound, outbound};
use netmanager_common::testing::{Direction, OURS, PORT, UPSTREAM, World, cases, checksums_hold};
use netmanager_common::verdict::Verdict;

use crate::api::Selector;
use crate::model::{Generation, InstanceId, NodeId, ServiceName, Subnet};
use crate::netmanager::datapath::offload_round_trip;
use crate::netmanager::hello::Hello;
use crate::netmanager::lease::Leases;
use crate::netmanager::table::ServiceNets;
use crate::wire::order::{OrderTopic, order};
use crate::wire::{FromNode, ToNode};
use crate::wire::{deploy, node, register, status, table};
use crate::{config, control, names, wire};

/// One door.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    pub name: &'static str,
    /// Takes an input, and panics where a promise is broken.
    pub run: fn(&[u8]),
    /// Where a fuzzer begins.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

const NODE: &str = "6b034ec446528056c08b89ae";

/// Every door there is.
pub const TARGETS: &[Target] = &[
    Target { name: "deploy", run: deploys, seeds: || texts(&[DEPLOY, DEPLOY_FIRST_GENERATION]) },
    Target { name: "order", run: orders, seeds: || texts(&[DEPLOY, DELETE, COMMON]) },
    Target { name: "table", run: tables, seeds: || texts(&[TABLE, SUBNET, DEPLOYED, QUERY]) },
    Target { name: "registration", run: registrations, seeds: || texts(&[ANSWER, REGISTRATION]) },
    Target { name: "reports", run: reports, seeds: || texts(&[JOB, RESOURCES, INFORMATION]) },
    Target { name: "topics", run: topics, seeds: || texts(&TOPICS) },
    Target { name: "names", run: typed_names, seeds: || texts(&TYPED) },
    Target { name: "socketio", run: socketio, seeds: || texts(&SOCKETIO) },
    Target { name: "dns", run: dns, seeds: dns_questions },
    Target { name: "hello", run: hello, seeds: || vec![HELLO.to_vec()] },
    Target { name: "config", run: configuration, seeds: || texts(&[CONFIG]) },
    Target { name: "leases", run: leases, seeds: || texts(&[LEASES]) },
    Target { name: "offload", run: offload_round_trip, seeds: packets },
    Target { name: "law", run: law, seeds: packets },
];

fn texts(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

fn this_node() -> NodeId {
    NODE.parse().expect("a node id")
}

/// What was understood of a job is understood again from what is kept of it, as the same.
fn deploys(bytes: &[u8]) {
    let Ok(spec) = deploy::deploy(bytes, Some(&this_node())) else { return };
    let kept = deploy::document(&spec);
    let again = deploy::deploy(kept.as_bytes(), None).expect("what is kept is understood");
    assert_eq!(deploy::document(&again), kept);
}

fn orders(bytes: &[u8]) {
    for topic in [OrderTopic::Deploy, OrderTopic::Delete] {
        let _ = order(topic, bytes, Some(&this_node()));
    }
}

fn tables(bytes: &[u8]) {
    if let Ok(answer) = table::read_table(bytes) {
        assert!(answer.rows.len() <= bytes.len(), "rows come from bytes");
    }
    let _ = table::read_deployed(bytes);
    let _ = table::read_interest_remove(bytes);
    if let Ok(subnet) = table::read_subnet(bytes) {
        assert_eq!(table::read_subnet(table::subnet_result(&subnet).as_bytes()).ok(), Some(subnet));
    }
    if let Ok(query) = table::read_table_query(bytes) {
        assert_eq!(table::read_table_query(table::table_query(&query).as_bytes()).ok(), Some(query));
    }
}

fn registrations(bytes: &[u8]) {
    for generation in [Generation::G1, Generation::G2, Generation::G4] {
        let _ = register::read_answer(bytes, generation);
    }
    let _ = register::read_registration(bytes);
}

fn reports(bytes: &[u8]) {
    let _ = status::read_job_report(bytes);
    let _ = node::read_resources(bytes);
    let _ = node::read_information(bytes);
}

fn topics(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let node = this_node();
    if let Some(topic) = ToNode::parse(text, &node) {
        assert_eq!(topic.topic(&node), text);
    }
    if let Some((node, topic)) = FromNode::parse(text) {
        assert_eq!(topic.topic(&node), text);
    }
}

/// A name that is one can be written, read again, and used as a file's name.
fn typed_names(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let _ = text.parse::<Selector>();
    let _ = wire::service_name(text);
    let _ = deploy::port_mappings(text);
    if let Ok(service) = text.parse::<ServiceName>() {
        assert_eq!(service.to_string().parse().as_ref(), Ok(&service));
    }
    if let Ok(node) = text.parse::<NodeId>() {
        assert!(!node.as_str().contains(['/', '\0', '+', '#']), "it becomes part of topics");
    }
    if let Ok(instance) = text.parse::<InstanceId>() {
        let name = instance.to_string();
        assert!(!name.contains(['/', '\0']) && !name.starts_with('.'), "{name:?} becomes the name of files");
        assert_eq!(name.parse().as_ref(), Ok(&instance));
    }
}

fn socketio(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    assert!(!control::socketio::understood(text).is_empty(), "a text has at least one packet");
}

fn dns(bytes: &[u8]) {
    let nets =
        ServiceNets { v4: (Ipv4Addr::new(10, 30, 0, 0), 16), v6: (Ipv6Addr::new(0xfdff, 0, 0, 0, 0, 0, 0, 0), 16) };
    let subnet = Subnet { v4: Ipv4Addr::new(10, 18, 0, 0), v6: Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0) };
    if let Some(answer) = names::answer_of_nobody(bytes, nets, subnet) {
        assert_eq!(answer.get(..2), bytes.get(..2), "an answer carries the question's id");
        assert!(names::answer_of_nobody(&answer, nets, subnet).is_none(), "answers are not answered");
    }
}

fn hello(bytes: &[u8]) {
    let Ok(hello) = Hello::decode(bytes) else { return };
    assert!(!matches!(bytes.first().map(|byte| byte >> 4), Some(4 | 6)), "a packet is no hello");
    assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
}

fn configuration(bytes: &[u8]) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = config::load_text(text).map_err(|error| error.to_string());
    }
}

fn leases(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    if let Ok(leases) = Leases::decode(text) {
        assert_eq!(Leases::decode(&leases.encode()), Ok(leases));
    }
}

/// The first byte is the direction, the rest a packet, which goes through the law twice: as a flow's first, and as one of a known flow.
fn law(bytes: &[u8]) {
    let Some((direction, packet)) = bytes.split_first() else { return };
    let direction = match direction % 3 {
        0 => Direction::Outbound(PORT),
        1 => Direction::Inbound(OURS),
        _ => Direction::Inbound(UPSTREAM),
    };
    let mut world = World::sample();
    for _ in 0..2 {
        let mut rewritten = packet.to_vec();
        let mut frame = SliceFrame::new(&mut rewritten);
        let verdict = match direction {
            Direction::Outbound(port) => outbound(&mut frame, &mut world, port),
            Direction::Inbound(outer) => inbound(&mut frame, &mut world, &outer),
        };
        match verdict {
            Ok(Verdict::Send { .. } | Verdict::Local { .. }) => {
                assert!(!checksums_hold(packet) || checksums_hold(&rewritten), "right checksums stay right");
            }
            _ => assert_eq!(rewritten, packet, "what is not carried is not changed"),
        }
    }
}

fn packets() -> Vec<Vec<u8>> {
    let direction = |direction| match direction {
        Direction::Outbound(_) => 0,
        Direction::Inbound(outer) => 1 + u8::from(outer == UPSTREAM),
    };
    cases().into_iter().map(|case| [&[direction(case.direction)][..], &case.packet].concat()).collect()
}

fn dns_questions() -> Vec<Vec<u8>> {
    let question = |labels: &[&str], kind: u8| {
        let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
        for label in labels {
            bytes.push(label.len() as u8);
            bytes.extend(label.as_bytes());
        }
        bytes.extend([0, 0, kind, 0, 1]);
        bytes
    };
    vec![
        question(&["web", "test", "default", "app", "edge"], 1),
        question(&["closest", "web", "test", "default", "app", "edge"], 28),
        question(&["0", "0", "30", "10", "in-addr", "arpa"], 12),
        question(&["example", "com"], 1),
    ]
}

const DEPLOY: &str = r#"{"app_name":"app","virtualization":"container","memory":100,"vcpus":1,"vgpus":0,"storage":0,
"image":"docker.io/library/nginx:alpine","port":"8080:80;53:53/udp","cmd":["a","b"],"environment":["A=b"],"one_shot":false,"privileged":false,
"addresses":{"rr_ip":"10.30.55.55"},"RR_ip":"10.30.55.55","job_name":"app.default.web.test","_id":"64b0000000000000000000aa",
"vm_images":["http://a/k.tar.gz"],"arch":["amd64"],"volumes":null,"platform":"linux/amd64","instance_list":[{"instance_number":0,"status":null}],"instance_number":0}"#;
const DEPLOY_FIRST_GENERATION: &str = r#"{"_id":"x","system_job_id":"y","job_name":"app.default.web.test","image":"i","image_runtime":"docker","port":80,
"commands":["c"],"requirements":{"cpu":1,"memory":100},"instance_list":[{"instance_number":2,"worker_id":"6b034ec446528056c08b89ae","namespace_ip":""}]}"#;
const DELETE: &str = r#"{"job_name":"app.default.web.test","virtualization":"container","instance_number":0}"#;
const COMMON: &str = r#"{"command":"deploy","job":{"id":"1","name":"app.default.web.test","image":"i","technology":"docker"},"cluster":["c"],"worker":["w"]}"#;
const TABLE: &str = r#"{"app_name":"app.default.web.test","instance_list":[{"cluster_id":"c","worker_id":"w","instance_number":0,"instance_ip":"10.30.0.0",
"instance_ip_v6":"fdff::","namespace_ip":"10.18.0.2","namespace_ip_v6":"fc00::2","host_ip":"10.1.1.1","host_port":50103,"service_ip":[
{"IpType":"RR","Address":"10.30.55.55","Address_v6":"fdff:2000::"},{"IpType":"instance_ip","Address":"10.30.0.0","Address_v6":"fdff::"}]},{"instance_number":1}],
"query_key":"app.default.web.test"}"#;
const SUBNET: &str = r#"{"address":"10.18.0.64","addressv6":"fc00::100"}"#;
const DEPLOYED: &str = r#"{"appname":"app.default.web.test","status":"DEPLOYED","instance_number":0,"nsip":"10.18.0.2","nsipv6":"fc00::2","host_port":"50103","host_ip":"192.0.2.11"}"#;
const QUERY: &str = r#"{"sname":"","sip":"10.30.55.55"}"#;
const ANSWER: &str = r#"{"id":"6b034ec446528056c08b89ae","MQTT_BROKER_PORT":"10003","SUBNETWORK":"172.18.0.0"}"#;
const REGISTRATION: &str = r#"{"host":"w","ip":"192.0.2.11","port":"3000","node_port":50011,"technology":["docker"],"virtualization":["docker"],"memory":4000,"vcpus":4,"architecture":"amd64"}"#;
const JOB: &str =
    r#"{"sname":"app.default.web.test","status":"CREATED","status_detail":"","instance":0,"publicip":"192.0.2.11"}"#;
const RESOURCES: &str = r#"{"services":[{"cpu_percent":"1.5","memory_percent":"0.2","disk":"1000","logs":"hello","job_name":"app.default.web.test","virtualization":"docker","instance":0}]}"#;
const INFORMATION: &str = r#"{"cpu_percent":7.5,"vcpus":4,"memory_percent":20.0,"memory":4000,"cpu":1,"free_cores":3.5,"memory_free_in_MB":2310.5,"ip":"192.0.2.11"}"#;
const TOPICS: [&str; 5] = [
    "nodes/6b034ec446528056c08b89ae/control/deploy",
    "nodes/6b034ec446528056c08b89ae/net/tablequery/result",
    "nodes/6b034ec446528056c08b89ae/net/service/deployed",
    "nodes/6b034ec446528056c08b89ae/jobs/resources",
    "jobs/app.default.web.test/updates_available",
];
const TYPED: [&str; 6] =
    ["web", "web#0", "app.default.web.default#12", "app.default.web.test.instance.0", NODE, "8080:80/tcp;53:53/udp;9"];
const SOCKETIO: [&str; 3] = [
    "0{\"sid\":\"weeVbizfpwE-68z-AAAB\",\"upgrades\":[\"websocket\"],\"pingInterval\":25000,\"pingTimeout\":20000,\"maxPayload\":1000000}",
    "42/init,[\"sc1\",{\"hello-edge\":\"please send your node info\"}]\u{1e}40/init,{\"sid\":\"a\"}",
    "42/init,[\"sc2\",\"{\\\"id\\\":\\\"x\\\"}\"]",
];
const HELLO: [u8; 20] = [0x9e, 0x6e, 1, 1, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 0xc3, 0xb8];
const CONFIG: &str = "name = \"n\"\n[cluster]\nhost = \"h\"\nport = 10100\n[network]\ndatapath = \"tun\"\ntunnel_port = 50103\nframing = false\n";
const LEASES: &str = "node-engine leases 1\nsubnet 10.18.0.64 fc00::100\nlease app.ns.web.ns.instance.0 10.18.0.66 fc00::102 own=10.30.0.0,fdff:: ports=8080:80/tcp inode=4026532281 netns=/proc/17/ns/net\n";

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn seeds_break_no_promise() {
        for target in TARGETS {
            for seed in (target.seeds)() {
                (target.run)(&seed);
            }
            (target.run)(&[]);
        }
    }

    /// What a fuzzer has found interesting once: most of all what it has broken.
    #[test]
    fn corpora_break_no_promise() {
        let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus");
        for target in TARGETS {
            let directory = corpora.join(target.name);
            let files = fs::read_dir(&directory).unwrap_or_else(|error| panic!("{}: {error}", directory.display()));
            let mut replayed = 0;
            for file in files {
                let path = file.expect("a directory entry").path();
                let bytes = fs::read(&path).expect("a file of the corpus");
                let outcome = std::panic::catch_unwind(|| (target.run)(&bytes));
                assert!(outcome.is_ok(), "{} breaks a promise", path.display());
                replayed += 1;
            }
            assert!(replayed > 0, "{} has no corpus", target.name);
        }
    }
}
