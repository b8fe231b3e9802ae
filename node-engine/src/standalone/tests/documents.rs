use std::time::Duration;

use serde_json::{Value, json};

use super::super::core::{Core, Message};
use super::super::documents::{self, Order, order, request};
use super::super::inventory::NodeFacts;
use super::super::{AddressPlan, ClusterApiError, Target};
use crate::model::{NodeId, Query, Status};
use crate::wire::json::MAX_DOCUMENT;

#[test]
fn a_service_is_named_in_any_spelling() {
    for (document, name) in [
        (json!({ "job_name": "a.b.c.d", "image": "i" }), "a.b.c.d"),
        (json!({ "name": "web", "image": "i" }), "app.default.web.default"),
        (json!({ "app_name": "a", "app_ns": "b", "service_name": "c", "service_ns": "d", "image": "i" }), "a.b.c.d"),
        (json!({ "microservice_name": "c", "image": "i" }), "app.default.c.default"),
    ] {
        assert_eq!(request(document.to_string().as_bytes()).unwrap().name.as_str(), name);
    }
}

#[test]
fn old_names_become_the_newest_and_the_rest_stays() {
    let document = json!({ "name": "web", "image": "nginx", "technology": "docker", "commands": ["a", "b"],
        "port": 8080, "x": { "y": 1 }, "_id": "old", "instance_list": [] });
    let request = request(document.to_string().as_bytes()).unwrap();
    let kept: Value = serde_json::from_str(&request.document).unwrap();
    assert_eq!(kept["virtualization"], "container");
    assert_eq!((&kept["cmd"], &kept["beside_entrypoint"]), (&json!(["a", "b"]), &json!(true)));
    assert_eq!(kept["port"], "8080:8080/tcp");
    assert_eq!(kept["x"], json!({ "y": 1 }));
    assert!(kept.get("_id").is_none() && kept.get("instance_list").is_none());
    let again = super::super::documents::request(request.document.as_bytes()).unwrap();
    assert_eq!(again, request, "what is kept reads back as the same");
}

#[test]
fn what_a_node_must_have_is_read() {
    let document = json!({ "job_name": "a.b.c.d", "image": "i", "memory": 100, "vcpus": 2, "vgpus": 1,
        "platform": "linux/arm64/v8", "one_shot": true, "volumes": [{ "volume_id": "v" }],
        "constraints": [{ "type": "direct", "node": "n1", "cluster": "c" }, { "type": "latency", "node": "n2" }] });
    let request = request(document.to_string().as_bytes()).unwrap();
    let needs = request.needs;
    assert_eq!((needs.memory_mib, needs.vcpus, needs.vgpus), (100, 2, 1));
    assert_eq!((needs.architectures, needs.nodes), (vec!["arm64".to_owned()], vec!["n1".to_owned()]));
    assert!(request.one_shot);
}

#[test]
fn mistakes_are_told_to_who_made_them() {
    for (document, word) in [
        ("", "JSON"),
        ("[]", "JSON"),
        ("{}", "job_name"),
        (r#"{"job_name":"a.b.c.d"}"#, "image"),
        (r#"{"job_name":"a/b","image":"i"}"#, "a/b"),
        (r#"{"job_name":"a.b.c.d","image":"i","port":"x"}"#, "port"),
        (r#"{"job_name":"a.b.c.d","image":"i","addresses":{"rr_ip":"x"}}"#, "rr_ip"),
        (r#"{"job_name":"a.b.c.d","image":"i","addresses":{"rr_ip":"fdff:2000::1"}}"#, "family"),
        (r#"{"job_name":"a.b.c.d","image":"i","constraints":3}"#, "constraints"),
        (r#"{"job_name":"a.b.c.d","image":"i","addresses":{"policies":["nearest"]}}"#, "known are rr, random, closest"),
        (r#"{"job_name":"a.b.c.d","image":"i","addresses":{"policies":7}}"#, "policies"),
        (r#"{"job_name":"a.b.c.d","image":"i","addresses":{"weights":{"0":101}}}"#, "0 to 100"),
        (r#"{"job_name":"a.b.c.d","image":"i","addresses":{"weights":{"first":1}}}"#, "instance numbers"),
    ] {
        let Err(ClusterApiError::Document { reason }) = request(document.as_bytes()) else {
            panic!("{document} is accepted")
        };
        assert!(reason.contains(word), "{document}: {reason}");
    }
}

#[test]
fn policies_have_addresses_of_their_own_that_stay() {
    let now = Duration::from_secs(1);
    let mut core = Core::new("c".parse().unwrap(), AddressPlan::default());
    let deploy = |core: &mut Core, addresses: Value| {
        let document = json!({ "job_name": "a.b.c.d", "image": "i", "addresses": addresses });
        core.deploy(request(document.to_string().as_bytes()).unwrap(), 1, None, "job".into(), now).unwrap();
        let table = core.table(Query::Name("a.b.c.d".parse().unwrap()));
        // As a node reads it: of each row the policies and how many addresses each has.
        let text = documents::table(&table, "c").to_string();
        (serde_json::from_str::<Value>(&text).unwrap()["instance_list"].clone(), table.rows[0].services.clone())
    };
    let (rows, first) = deploy(&mut core, json!({ "policies": ["sticky", "closest", "rr"], "weights": { "0": 30 } }));
    let kinds = rows[0]["service_ip"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| (one["IpType"].as_str().unwrap().to_owned(), one["Policy"].as_str().unwrap_or("").to_owned()));
    let said = |kind: &str, label: &str| (kind.to_owned(), label.to_owned());
    assert_eq!(
        kinds.collect::<Vec<_>>(),
        [said("RR", ""), said("Closest", ""), said("RR", "sticky"), said("instance_ip", "")]
    );
    assert_eq!(rows[0]["weight"], 0, "it does not run yet");

    let (_, more) = deploy(&mut core, json!({ "policies": ["weighted"] }));
    assert_eq!(more.len(), 4);
    assert!(first.iter().all(|known| more.contains(known)), "{first:?} {more:?}");
    let mut addresses: Vec<_> = more.iter().map(|(_, pair)| pair.v4).collect();
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), 4, "each its own");
    for (policy, pair) in &more {
        let found = core.table(Query::Address(pair.v6.into()));
        assert!(found.service.is_some(), "{policy:?} is found by its address");
    }
}

#[test]
fn commands_become_orders() {
    let read = |message: Value| order(message.to_string().as_bytes(), "here");
    let job = json!({ "name": "web", "image": "nginx" });
    let Ok(Order::Deploy { request, replicas, on }) =
        read(json!({ "command": "deploy", "job": job, "worker": ["n1", "n2"] }))
    else {
        panic!("no deploy")
    };
    assert_eq!((replicas, on, request.needs.nodes), (1, None, vec!["n1".to_owned(), "n2".to_owned()]));
    let service = "app.default.web.default".parse().unwrap();
    assert_eq!(
        read(json!({ "command": "delete", "job": job, "cluster": ["here"] })).unwrap(),
        Order::Delete(Target::Service(service))
    );
    for refused in [
        json!({ "command": "delete", "job": job, "cluster": ["there"] }),
        json!({ "command": "replicate", "job": job }),
        json!({ "command": "deploy", "job": { "name": "web" } }),
        json!({ "command": 3, "job": job }),
    ] {
        assert!(matches!(read(refused.clone()), Err(ClusterApiError::Document { .. })), "{refused}");
    }
}

#[test]
fn the_longest_documents_are_ones_a_node_takes() {
    let now = Duration::from_secs(1);
    let mut core = Core::new("c".parse().unwrap(), AddressPlan::default());
    let node: NodeId = "6b034ec446528056c08b89ae".parse().unwrap();
    let facts = NodeFacts { technologies: ["docker".into()].into(), ..NodeFacts::default() };
    core.register("n", facts, node.clone()).unwrap();
    core.information(&node, NodeFacts::default(), now);
    let document = json!({ "job_name": "a.b.c.d", "image": "i", "x": "x".repeat(60_000) });
    let request = request(document.to_string().as_bytes()).unwrap();
    for instance in core.deploy(request, 1000, None, "job".into(), now).unwrap() {
        core.report(&node, &instance, Status::Creating, &"\u{1}".repeat(2000), now);
    }
    core.take_effects();
    core.report(&node, &"a.b.c.d.instance.0".parse().unwrap(), Status::Failed, "", now);
    core.tick(now + Duration::from_secs(3));
    let table = documents::table(&core.table(Query::Name("a.b.c.d".parse().unwrap())), "c").to_string();
    assert!(table.len() < MAX_DOCUMENT, "{}", table.len());
    let messages = core.take_effects().messages;
    let deploy = messages.iter().find(|message| matches!(message, Message::Deploy(_))).expect("a deploy");
    let (_, payload) = documents::publication(deploy, "c");
    assert!(payload.len() < MAX_DOCUMENT, "{}", payload.len());
    assert!(crate::wire::deploy(payload.as_bytes(), None).is_ok());
}
