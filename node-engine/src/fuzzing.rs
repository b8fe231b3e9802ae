//! Every door at which bytes of others come in, as a target for a fuzzer: what nobody may make us panic with, and what must hold of
//! whatever is understood. `cargo xtask fuzz` looks for inputs that break a promise; the corpora under `tests/fuzz/corpus`, which begin
//! with the seeds, are replayed by a plain `cargo test`.

mod seeds;

use std::net::{Ipv4Addr, Ipv6Addr};

use netmanager_common::addr::Addr;
use netmanager_common::frame::SliceFrame;
use netmanager_common::pipeline::{inbound, outbound};
use netmanager_common::testing::{Direction, OURS, PORT, UPSTREAM, World, checksums_hold};
use netmanager_common::verdict::Verdict;

use crate::api::Selector;
use crate::model::{Generation, InstanceId, NodeId, ServiceName, Subnet};
use crate::netmanager::datapath::{self, fuzzed, offload_round_trip};
use crate::netmanager::hello::Hello;
use crate::netmanager::lease::Leases;
use crate::netmanager::link;
use crate::netmanager::table::{ServiceNets, ServiceTable};
use crate::runtime::{self, containerd, registries, supervised, unikernel, wasm};
use crate::wire::order::{OrderTopic, order};
use crate::wire::{FromNode, ToNode};
use crate::wire::{deploy, node, register, status, table};
use crate::{api, config, control, names, standalone, store, telemetry, wire};
use seeds::*;

/// One door.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    pub name: &'static str,
    /// Takes an input, and panics where a promise is broken.
    pub run: fn(&[u8]),
    /// Where a fuzzer begins.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

const NETS: ServiceNets =
    ServiceNets { v4: (Ipv4Addr::new(10, 30, 0, 0), 16), v6: (Ipv6Addr::new(0xfdff, 0, 0, 0, 0, 0, 0, 0), 16) };
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
    Target { name: "interest", run: interest, seeds: || texts(&[TABLE, QUERY]) },
    Target { name: "records", run: |bytes| text(bytes, store::record_round_trip), seeds: || texts(&RECORDS) },
    Target { name: "state", run: store::state_round_trip, seeds: || texts(&[STATE]) },
    Target { name: "journal", run: |bytes| text(bytes, link::journal_round_trip), seeds: || texts(&[JOURNAL]) },
    Target { name: "rows", run: datapath::sheet_round_trip, seeds: rows },
    Target { name: "layout", run: |bytes| text(bytes, datapath::layouts), seeds: || texts(&[LAYOUT]) },
    Target { name: "rules", run: rules_of_others, seeds: rules },
    Target { name: "launch", run: |bytes| text(bytes, supervised::round_trip), seeds: || texts(&[LAUNCH]) },
    Target { name: "module-order", run: |bytes| text(bytes, wasm::round_trip), seeds: || texts(&MODULE_ORDER) },
    Target { name: "module", run: wasm::understand, seeds: modules },
    Target { name: "archive", run: unikernel::understand, seeds: archives },
    Target { name: "image", run: containerd::images, seeds: || texts(&IMAGES) },
    Target { name: "container", run: containerd::documents, seeds: || texts(&IMAGES) },
    Target { name: "handlers", run: |bytes| text(bytes, containerd::handlers), seeds: || texts(&[HANDLERS]) },
    Target { name: "accounts", run: |bytes| text(bytes, runtime::accounts), seeds: || texts(&ACCOUNTS) },
    Target { name: "places", run: places, seeds: || texts(&PLACES) },
    Target { name: "position", run: |bytes| text(bytes, telemetry::gps::understand), seeds: || texts(&POSITIONS) },
    Target { name: "api", run: |bytes| text(bytes, api::understand), seeds: || texts(&REQUESTS) },
    Target { name: "description", run: standalone::documents_round_trip, seeds: || texts(&[DEPLOY, COMMON]) },
    Target { name: "cluster", run: standalone::saved_round_trip, seeds: || texts(&[CLUSTER]) },
    Target { name: "messages", run: standalone::messages, seeds: || texts(&[MESSAGES]) },
    Target { name: "greeting", run: |bytes| text(bytes, standalone::greetings), seeds: || texts(&GREETINGS) },
    Target { name: "datagram", run: fuzzed::datagrams, seeds: packets },
    Target { name: "host", run: fuzzed::host, seeds: packets },
    Target { name: "fragments", run: fuzzed::fragments, seeds: fragments },
    Target { name: "offload", run: offload_round_trip, seeds: packets },
    Target { name: "law", run: law, seeds: packets },
];

fn texts(texts: &[&str]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

fn text(bytes: &[u8], understand: fn(&str)) {
    if let Ok(text) = std::str::from_utf8(bytes) {
        understand(text);
    }
}

fn this_node() -> NodeId {
    NODE.parse().expect("a node id")
}

/// What was understood of a job is understood again from what is kept of it, as the same.
fn deploys(bytes: &[u8]) {
    let Ok(spec) = deploy::deploy(bytes, Some(&this_node())) else { return };
    let kept = deploy::document(&spec);
    let again = deploy::kept(&kept).expect("what is kept is understood");
    assert_eq!(deploy::document(&again), kept);
}

fn orders(bytes: &[u8]) {
    for (topic, told) in [(OrderTopic::Deploy, false), (OrderTopic::Deploy, true), (OrderTopic::Delete, false)] {
        let _ = order(topic, bytes, Some(&this_node()), &|_, _| told);
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

/// Answers about services, one after another, as the table of a node takes them in.
fn interest(bytes: &[u8]) {
    let mut table = ServiceTable::new(NETS, Addr::v4([192, 0, 2, 11]));
    for answer in bytes.split(|byte| *byte == b'\x1e').filter_map(|answer| table::read_table(answer).ok()) {
        let delta = table.update(&answer);
        let known = table.full();
        for (address, ..) in &delta.services {
            assert!(table.serves(*address), "what is told of is there");
        }
        assert!(known.services.len() <= 4 * bytes.len(), "services come from bytes");
        let again = table.update(&answer);
        assert!(again.services.is_empty() && again.slots.is_empty(), "what is told again changes nothing");
    }
}

/// What the kernel has of others' rules.
fn rules_of_others(bytes: &[u8]) {
    link::attributes(bytes, 4);
    link::legacy(bytes);
}

fn places(bytes: &[u8]) {
    text(bytes, registries::understand);
    text(bytes, runtime::places);
}

fn registrations(bytes: &[u8]) {
    for generation in [Generation::G1, Generation::G1b, Generation::G2, Generation::G4] {
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
    let subnet = Subnet { v4: Ipv4Addr::new(10, 18, 0, 0), v6: Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0) };
    if let Some(answer) = names::answer_of_nobody(bytes, NETS, subnet) {
        assert_eq!(answer.get(..2), bytes.get(..2), "an answer carries the question's id");
        assert!(names::answer_of_nobody(&answer, NETS, subnet).is_none(), "answers are not answered");
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
