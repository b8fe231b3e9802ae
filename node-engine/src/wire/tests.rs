//! Documents as real clusters send them, mutations of them, and what comes back of what is written.

use proptest::prelude::*;

use super::deploy::{DeployFault, deploy_next, document, port_mappings};
use super::order::{Order, OrderTopic, delete_message};
use super::{node, status, *};
use crate::model::*;

const JOB: &str = r#"{"app_name":"app","app_ns":"default","service_name":"web","service_ns":"test",
     "microservice_name":"web","microservice_namespace":"test",
     "applicationID":"64b0000000000000000000bb","microserviceID":"64b0000000000000000000aa",
     "virtualization":"container","memory":100,"vcpus":1,"vgpus":0,"vtpus":0,"bandwidth_in":0,"bandwidth_out":0,
     "storage":0,"code":"docker.io/library/nginx:alpine","image":"docker.io/library/nginx:alpine","state":"",
     "port":"8080:80","cmd":[],"environment":["A=b"],"one_shot":false,"privileged":false,
     "addresses":{"rr_ip":"10.30.55.55"},"RR_ip":"10.30.55.55","added_files":[],"constraints":[],
     "job_name":"app.default.web.test","status":"NODE_SCHEDULED","_id":"64b0000000000000000000aa",
     "instance_list":[{"instance_number":0,"cpu_percent":null,"memory_percent":null,"publicip":null,"disk":null,
        "status":"NODE_SCHEDULED","status_detail":"No extra information","logs":"","worker_id":"6b034692",
        "host_ip":"10.1.1.1","host_port":"3000","last_modified_timestamp":1795379349.11,
        "cpu_history":[{"value":null,"timestamp":"2026-11-22T20:29:09.118312"}],"memory_history":[]}],
     "next_instance_progressive_number":1,"instance_number":0}"#;

const FIRST_GENERATION_JOB: &str = r#"{"_id":"60c0aa","system_job_id":"60c0bb","job_name":"app.default.web.test",
     "image":"nginx","image_runtime":"docker","port":80,"commands":"nginx -g x","status":"NODE_SCHEDULED",
     "requirements":{"cpu":0.5,"memory":100,"node":"any"},
     "service_ip_list":[{"IpType":"RR","Address":"172.30.0.1"}],
     "instance_list":[{"instance_number":0,"namespace_ip":"172.18.0.2","worker_id":"node1"},
                      {"instance_number":1,"namespace_ip":"","worker_id":"other"},
                      {"instance_number":2,"namespace_ip":"","worker_id":"node1"}]}"#;

const TABLE: &str = r#"{"app_name":"app.default.web.test",
     "instance_list":[{"cluster_id":"64b001","worker_id":"6b034692","instance_number":0,
        "instance_ip":"10.30.0.0","instance_ip_v6":"fdff::",
        "namespace_ip":"10.18.0.2","namespace_ip_v6":"fc00::2","host_ip":"10.1.1.1","host_port":50103,
        "service_ip":[{"IpType":"RR","Address":"10.30.55.55","Address_v6":"fdff:2000::"},
                      {"IpType":"instance_ip","Address":"10.30.0.0","Address_v6":"fdff::"}]}],
     "query_key":"app.default.web.test"}"#;

fn node(id: &str) -> NodeId {
    id.parse().unwrap()
}

fn service_of(text: &str) -> ServiceName {
    text.parse().unwrap()
}

fn instance(number: u32) -> InstanceId {
    InstanceId { service: service_of("app.default.web.test"), number }
}

/// As the first that comes.
fn order(topic: OrderTopic, bytes: &[u8], node: Option<&NodeId>) -> Result<Order, OrderError> {
    super::order(topic, bytes, node, &|_, _| false)
}

#[test]
fn one_word_is_a_service_in_the_default_namespaces() {
    assert_eq!(service_name("web").unwrap().as_str(), "app.default.web.default");
    assert_eq!(service_name("a.b.c.d").unwrap().as_str(), "a.b.c.d");
    for bad in ["", "a.b", "we b", "web/..", "."] {
        assert!(service_name(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn a_real_job_document_becomes_a_description() {
    let spec = deploy(JOB.as_bytes(), None).unwrap();
    assert_eq!(spec.id, instance(0));
    assert_eq!(spec.job, "64b0000000000000000000aa");
    assert_eq!(spec.technology, Technology::Container);
    assert_eq!(spec.image, "docker.io/library/nginx:alpine");
    assert_eq!(spec.command, Vec::<String>::new());
    assert_eq!(spec.environment, ["A=b"]);
    assert_eq!(spec.ports, [PortMapping { host: 8080, container: 80, protocol: Protocol::Tcp }]);
    assert_eq!(spec.limits, Limits { vcpus: Some(1), memory_mib: Some(100), ..Limits::default() });
    assert_eq!((spec.platform.as_deref(), spec.one_shot, spec.privileged), (None, false, false));
}

#[test]
fn the_stored_document_reads_back_into_the_same_description() {
    for text in [JOB, &JOB.replace("\"container\"", "\"unikernel\""), &JOB.replace("\"container\"", "\"runsc\"")] {
        let spec = deploy(text.as_bytes(), None).unwrap();
        assert_eq!(deploy(spec.document.as_bytes(), None).unwrap(), spec);
    }
}

#[test]
fn what_an_instance_is_given_is_read_and_kept() {
    let mut document: serde_json::Value = serde_json::from_str(JOB).unwrap();
    document["volumes"] = serde_json::json!([
        {"volume_id": "data", "csi_driver": "csi.example/nfs", "mount_path": "/data", "config": {"server": "x"}},
        {"volume_id": "logs", "csi_driver": "csi.example/nfs", "mount_path": null, "config": null},
    ]);
    document["added_files"] =
        serde_json::json!([{"path": "/etc/x", "content": "text", "mode": "0600"}, {"path": "/y"}]);
    document["storage"] = 10.into();
    document["user"] = "web:80".into();
    document["working_directory"] = "/srv".into();
    let spec = deploy(document.to_string().as_bytes(), None).unwrap();
    let mounted: Vec<_> = spec.volumes.iter().map(|volume| (volume.id.as_str(), volume.mount_path.as_str())).collect();
    assert_eq!(mounted, [("data", "/data"), ("logs", "/mnt/csi/logs")]);
    assert_eq!(spec.volumes[0].config, [("server".to_owned(), "x".to_owned())]);
    let modes: Vec<_> = spec.files.iter().map(|file| (file.content.as_str(), file.mode)).collect();
    assert_eq!(modes, [("text", 0o600), ("", 0o644)]);
    assert_eq!(spec.limits.storage_mib, Some(10));
    assert_eq!((spec.user.as_deref(), spec.directory.as_deref()), (Some("web:80"), Some("/srv")));
    assert_eq!(deploy(spec.document.as_bytes(), None).unwrap(), spec);
}

#[test]
fn a_command_takes_the_entry_points_place_unless_it_is_older() {
    let read = |member: &str| {
        let mut document: serde_json::Value = serde_json::from_str(JOB).unwrap();
        document["cmd"] = serde_json::Value::Null;
        document[member] = serde_json::json!(["serve", "-v"]);
        deploy(document.to_string().as_bytes(), None).unwrap()
    };
    for (member, beside) in [("cmd", false), ("commands", true)] {
        let spec = read(member);
        assert_eq!((spec.command.len(), spec.beside_entrypoint), (2, beside), "{member}");
        assert_eq!(deploy::kept(&spec.document).unwrap(), spec, "{member}");
        // As an earlier version has kept it.
        let mut older: serde_json::Value = serde_json::from_str(&spec.document).unwrap();
        older.as_object_mut().unwrap().remove("beside_entrypoint");
        assert_eq!(deploy::kept(&older.to_string()).unwrap(), read("commands"), "{member}");
    }
    let without = deploy(JOB.as_bytes(), None).unwrap();
    assert!(!without.beside_entrypoint && !without.document.contains("entrypoint"), "{}", without.document);
    assert_eq!(deploy::kept(&without.document).unwrap(), without);
}

#[test]
fn what_the_first_generation_wished_for_can_be_read_again_however_much_it_is() {
    let document = r#"{"job_name":"app.default.web.test","instance_number":0,"image":"i","requirements":{"cpu":0.5,"memory":1e60}}"#;
    let spec = deploy(document.as_bytes(), None).unwrap();
    assert_eq!((spec.limits.vcpus, spec.limits.memory_mib), (Some(1), Some(1 << 53)));
    assert_eq!(deploy::kept(&spec.document).unwrap(), spec);
}

#[test]
fn a_process_needs_an_image_or_a_command() {
    let process = |image: &str, command: &str| {
        let mut document: serde_json::Value = serde_json::from_str(&job_with("virtualization", "\"process\"")).unwrap();
        document["image"] = serde_json::from_str(image).unwrap();
        document["cmd"] = serde_json::from_str(command).unwrap();
        deploy(document.to_string().as_bytes(), None)
    };
    for (image, command) in [("\"\"", "[\"sh\"]"), ("null", "[\"sh\"]"), ("\"/bin/sh\"", "[]")] {
        let spec = process(image, command).unwrap();
        assert_eq!(deploy(spec.document.as_bytes(), None).unwrap(), spec);
    }
    assert!(process("\"\"", "[]").unwrap_err().to_string().contains("neither image"));
}

#[test]
fn a_first_generation_document_means_our_instance_without_an_address() {
    let spec = deploy(FIRST_GENERATION_JOB.as_bytes(), Some(&node("node1"))).unwrap();
    assert_eq!(spec.id, instance(2));
    assert_eq!(spec.command, ["nginx", "-g", "x"]);
    assert_eq!(spec.ports, [PortMapping { host: 80, container: 80, protocol: Protocol::Tcp }]);
    assert_eq!(spec.limits, Limits { vcpus: Some(1), memory_mib: Some(100), ..Limits::default() });
    assert_eq!(deploy(spec.document.as_bytes(), None).unwrap(), spec);
    for stranger in [None, Some(node("node9"))] {
        let error = deploy(FIRST_GENERATION_JOB.as_bytes(), stranger.as_ref()).unwrap_err();
        assert!(matches!(error.reason, DeployFault::NotForThisNode));
    }
    let deleted = order(OrderTopic::Delete, FIRST_GENERATION_JOB.as_bytes(), Some(&node("node1"))).unwrap();
    assert_eq!(deleted, Order::Delete(vec![instance(0), instance(2)]));
}

#[test]
fn two_replicas_that_wait_for_an_address_are_two() {
    let document = FIRST_GENERATION_JOB.replace("172.18.0.2", "");
    let told = |of: &'static [u32]| {
        let told =
            move |id: &InstanceId, job: &str| job == "60c0aa" && of.iter().any(|number| *id == instance(*number));
        deploy_next(document.as_bytes(), Some(&node("node1")), &told).unwrap().id.number
    };
    assert_eq!(told(&[]), 0);
    assert_eq!(told(&[0]), 2, "the first is told of already, and its image is being pulled");
    assert_eq!(told(&[2]), 0);
    assert_eq!(told(&[0, 2]), 0, "nothing new is a repetition");
    let known = deploy_next(FIRST_GENERATION_JOB.as_bytes(), Some(&node("node1")), &|_, _| true).unwrap();
    assert_eq!(known.id, instance(2), "what has an address is never meant");
    let anew = document.replace("60c0aa", "60c0ff");
    let told = |_: &InstanceId, job: &str| job == "60c0aa";
    assert_eq!(deploy_next(anew.as_bytes(), Some(&node("node1")), &told).unwrap().id.number, 0, "another job");
}

/// `JOB` with one member replaced.
fn job_with(member: &str, value: &str) -> String {
    let mut document: serde_json::Value = serde_json::from_str(JOB).unwrap();
    document[member] = serde_json::from_str(value).unwrap();
    document.to_string()
}

#[test]
fn unused_members_may_be_anything() {
    for member in ["code", "state", "added_files", "constraints", "addresses", "RR_ip", "status", "whatever"] {
        for value in ["null", "3", "\"x\"", "[[[]]]", "{\"a\":{}}"] {
            let spec = deploy(job_with(member, value).as_bytes(), None).unwrap();
            assert_eq!(spec.id, instance(0), "{member}={value}");
        }
    }
}

#[test]
fn used_members_may_be_null() {
    for member in [
        "cmd",
        "environment",
        "port",
        "memory",
        "vcpus",
        "vgpus",
        "one_shot",
        "privileged",
        "platform",
        "volumes",
        "_id",
    ] {
        deploy(job_with(member, "null").as_bytes(), None).unwrap_or_else(|error| panic!("{member}: {error}"));
    }
}

#[test]
fn a_wrong_member_fails_its_instance_and_says_which() {
    for (member, value, said) in [
        ("image", "null", "`image` is missing"),
        ("image", "3", "`image` is not a text: 3"),
        ("image", "\"a b\"", "space"),
        ("cmd", "\"sh\"", "`cmd` is not a list of texts"),
        ("cmd", "[\"a\\u0000\"]", "NUL"),
        ("environment", "[\"A\", \"=x\"]", "entry 2 of `environment` has no name"),
        ("environment", "[\"\"]", "entry 1 of `environment` has no name"),
        ("environment", "{}", "list of texts"),
        ("port", "\"80:80/icmp\"", "neither tcp nor udp"),
        ("port", "\"0\"", "1 to 65535"),
        ("port", "\"80:99999\"", "1 to 65535"),
        ("port", "\"80:80;80:81\"", "mapped twice"),
        ("port", "[]", "whole number"),
        ("memory", "-1", "`memory` is not a whole number: -1"),
        ("memory", "\"lots\"", "whole number"),
        ("vcpus", "1.5", "whole number"),
        ("one_shot", "\"yes\"", "true or false"),
        ("virtualization", "\"a b\"", "technology"),
        ("virtualization", "[]", "`virtualization` is not a text"),
        ("platform", "\"linux/arm64;rm\"", "os/architecture"),
        ("platform", "7", "`platform` is not a text"),
        ("storage", "\"much\"", "`storage` is not a whole number"),
        ("vgpus", "-1", "`vgpus` is not a whole number"),
        ("user", "\"a b\"", "user or user:group"),
        ("user", "\":0\"", "user or user:group"),
        ("working_directory", "\"tmp\"", "absolute path"),
        ("volumes", "[{\"volume_id\":\"v\"}]", "`csi_driver` is missing"),
        ("volumes", "[{\"csi_driver\":\"d\"}]", "`volume_id` is missing"),
        ("volumes", "[{\"volume_id\":\"..\",\"csi_driver\":\"d\"}]", "its id is not"),
        ("volumes", "[{\"volume_id\":\"v\",\"csi_driver\":\"a~b\"}]", "its driver is not"),
        ("volumes", "[{\"volume_id\":\"v\",\"csi_driver\":\"d\",\"mount_path\":\"/a/../b\"}]", "without `..`"),
        ("volumes", "[{\"volume_id\":\"v\",\"csi_driver\":\"d\",\"config\":{\"a\":1}}]", "not texts by name"),
        (
            "volumes",
            "[{\"volume_id\":\"v\",\"csi_driver\":\"d\",\"mount_path\":\"/m\"},{\"volume_id\":\"w\",\"csi_driver\":\"d\",\"mount_path\":\"/m\"}]",
            "another volume is mounted there",
        ),
        ("added_files", "[{\"path\":\"etc/x\"}]", "absolute path of a file"),
        ("added_files", "[{\"path\":\"/etc/x\",\"mode\":\"0888\"}]", "octal digits"),
        ("added_files", "[{\"path\":\"/etc/x\",\"content\":3}]", "`content` is not a text"),
    ] {
        let error = deploy(job_with(member, value).as_bytes(), None).unwrap_err();
        assert_eq!(error.instance, Some(instance(0)), "{member}={value}");
        assert!(error.to_string().contains(said), "{member}={value}: {error}");
    }
}

#[test]
fn without_a_name_nobody_can_be_answered() {
    for (member, value) in [("job_name", "null"), ("job_name", "\"../x\""), ("instance_number", "-1")] {
        assert_eq!(deploy(job_with(member, value).as_bytes(), None).unwrap_err().instance, None);
    }
    assert!(deploy(job_with("instance_number", "4294967296").as_bytes(), None).is_err());
    assert!(deploy(b"", None).is_err());
}

#[test]
fn secrets_stay_out_of_errors() {
    for (member, value) in [
        ("environment", r#"["OK=1", "=hunter2"]"#),
        ("environment", r#"{"TOKEN": "hunter2"}"#),
        ("environment", r#"["TOKEN=hunter2", 7]"#),
        ("environment", r#""TOKEN=hunter2""#),
        ("cmd", r#""login --password hunter2""#),
        ("volumes", r#"["hunter2"]"#),
        ("volumes", r#"[{"volume_id": "v", "csi_driver": "d", "config": {"key": ["hunter2"]}}]"#),
        ("volumes", r#"[{"volume_id": "v", "csi_driver": "d", "config": "key=hunter2"}]"#),
        ("added_files", r#"[{"path": "/etc/key", "content": {"key": "hunter2"}}]"#),
    ] {
        let error = deploy(job_with(member, value).as_bytes(), None).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{member} {value}: {error}");
    }
    let whole = deploy(br#""hunter2""#, None).unwrap_err();
    assert!(!whole.to_string().contains("hunter2"), "{whole}");
}

#[test]
fn port_mappings_read_what_they_write() {
    let text = "80:80/tcp;53:53/udp;8080:80;443";
    let mappings = port_mappings(text).unwrap();
    let written: Vec<String> = mappings.iter().map(ToString::to_string).collect();
    assert_eq!(written.join(";"), "80:80/tcp;53:53/udp;8080:80/tcp;443:443/tcp");
    assert_eq!(port_mappings(&written.join(";")).unwrap(), mappings);
    assert_eq!(port_mappings(" 80 ; 80:80/tcp ;; ").unwrap().len(), 1);
    assert_eq!(port_mappings("53:53/tcp;53:53/udp").unwrap().len(), 2);
}

#[test]
fn unikernel_images_are_chosen_by_architecture() {
    let here = deploy::architecture();
    let document = format!(
        r#"{{"job_name":"app.default.web.test","instance_number":0,"virtualization":"unikernel",
            "vm_images":["http://x/other","http://x/ours"],"arch":["other","{here}"]}}"#
    );
    assert_eq!(deploy(document.as_bytes(), None).unwrap().image, "http://x/ours");
    let none = document.replace(here, "vax");
    assert!(deploy(none.as_bytes(), None).unwrap_err().to_string().contains("none of the images"));
    let all = document.replace(&format!(r#","arch":["other","{here}"]"#), "");
    assert_eq!(deploy(all.as_bytes(), None).unwrap().image, "http://x/other,http://x/ours");
}

#[test]
fn a_long_document_of_a_large_service_is_read() {
    let history = r#"{"value":0.5,"timestamp":"2026-11-22T20:29:09.118312"},"#.repeat(4000);
    let document = JOB.replace(r#""cpu_history":["#, &format!(r#""cpu_history":[{history}"#));
    assert!(document.len() > 200_000);
    assert_eq!(deploy(document.as_bytes(), None).unwrap().id, instance(0));
    let endless = JOB.replace("\"state\":\"\"", &format!("\"state\":\"{}\"", "x".repeat(10_000_000)));
    assert!(deploy(endless.as_bytes(), None).unwrap_err().to_string().contains("bytes"));
}

#[test]
fn deletes_name_an_instance() {
    let text = r#"{"job_name":"app.default.web.test","virtualization":"container","instance_number":0}"#;
    let deleted = |text: &str| order(OrderTopic::Delete, text.as_bytes(), None).unwrap();
    assert_eq!(deleted(text), Order::Delete(vec![instance(0)]));
    assert_eq!(deleted(&delete_message(&instance(7), &Technology::Container)), Order::Delete(vec![instance(7)]));
    for bad in ["", "{}", r#"{"job_name":"app.default.web.test"}"#, r#"{"job_name":1,"instance_number":0}"#] {
        assert!(order(OrderTopic::Delete, bad.as_bytes(), None).is_err(), "{bad}");
    }
}

#[test]
fn the_common_form_is_understood_on_either_topic() {
    let deploy = r#"{"command":"deploy","job":{"id":"7","name":"web","image":"nginx","technology":"docker",
        "port":"80:80","instance_number":2},"cluster":["c"],"worker":["node1"]}"#;
    for topic in [OrderTopic::Deploy, OrderTopic::Delete] {
        let Order::Deploy(spec) = order(topic, deploy.as_bytes(), Some(&node("node1"))).unwrap() else { panic!() };
        assert_eq!(spec.id.to_string(), "app.default.web.default.instance.2");
        assert_eq!((spec.job.as_str(), spec.image.as_str(), spec.ports.len()), ("7", "nginx", 1));
    }
    assert!(order(OrderTopic::Deploy, deploy.as_bytes(), Some(&node("node2"))).is_err());

    let delete = r#"{"command":"delete","job":{"name":"app.default.web.test"},"worker":[]}"#;
    assert_eq!(order(OrderTopic::Deploy, delete.as_bytes(), None).unwrap(), Order::Delete(vec![instance(0)]));

    for (command, said) in
        [("move", "only a cluster manager can move"), ("replicate", "only a cluster"), ("x", "`x`|x is not")]
    {
        let text = format!(r#"{{"command":"{command}","job":{{"name":"web"}}}}"#);
        let error = order(OrderTopic::Deploy, text.as_bytes(), None).unwrap_err().to_string();
        assert!(said.split('|').any(|said| error.contains(said)), "{error}");
    }
    let broken = r#"{"command":"deploy","job":{"name":"web","image":3}}"#;
    let Err(OrderError::Deploy(error)) = order(OrderTopic::Deploy, broken.as_bytes(), None) else { panic!() };
    assert_eq!(error.instance.unwrap().to_string(), "app.default.web.default.instance.0");
}

#[test]
fn a_real_table_answer_becomes_rows() {
    let answer = table::read_table(TABLE.as_bytes()).unwrap();
    assert_eq!(answer.query, Some(Query::Name(service_of("app.default.web.test"))));
    assert_eq!(answer.service, Some(service_of("app.default.web.test")));
    let pair = |v4: &str, v6: &str| FamilyPair { v4: Some(v4.parse().unwrap()), v6: Some(v6.parse().unwrap()) };
    let round_robin = |address: &str| SemanticAddress { policy: Policy::RoundRobin, address: address.parse().unwrap() };
    assert_eq!(
        answer.rows,
        [TableRow {
            number: 0,
            namespace: pair("10.18.0.2", "fc00::2"),
            instance: pair("10.30.0.0", "fdff::"),
            host: "10.1.1.1".parse().unwrap(),
            host_port: 50103,
            weight: 1,
            services: vec![round_robin("10.30.55.55"), round_robin("fdff:2000::")],
        }]
    );
    let written = table::table_result(answer.query.as_ref().unwrap(), answer.service.as_ref(), &answer.rows);
    assert_eq!(table::read_table(written.as_bytes()).unwrap(), answer);
}

/// To an upstream node every type that it does not know is an instance's own address, and the last one in the list wins.
#[test]
fn every_policy_is_told_in_types_that_upstream_nodes_know() {
    let mut answer = table::read_table(TABLE.as_bytes()).unwrap();
    let all = Policy::ALL.iter().enumerate();
    answer.rows[0].services =
        all.map(|(at, policy)| SemanticAddress { policy: *policy, address: [10, 30, 55, at as u8].into() }).collect();
    answer.rows[0].weight = 9;
    let written = table::table_result(answer.query.as_ref().unwrap(), answer.service.as_ref(), &answer.rows);
    assert_eq!(table::read_table(written.as_bytes()).unwrap(), answer);
    let written: serde_json::Value = serde_json::from_str(&written).unwrap();
    for entry in written["instance_list"][0]["service_ip"].as_array().unwrap() {
        let kind = entry["IpType"].as_str().unwrap();
        assert!(["RR", "Closest", "instance_ip"].contains(&kind), "{entry}");
        assert_eq!(kind == "instance_ip", entry["Address"] == "10.30.0.0", "{entry}");
    }
}

#[test]
fn unknown_services_have_no_rows() {
    let text = r#"{"app_name":"","instance_list":[],"query_key":"10.30.99.99"}"#;
    let answer = table::read_table(text.as_bytes()).unwrap();
    let expected =
        TableAnswer { query: Some(Query::Address("10.30.99.99".parse().unwrap())), service: None, rows: vec![] };
    assert_eq!(answer, expected);
    assert_eq!(table::table_result(answer.query.as_ref().unwrap(), None, &[]), text);
}

/// The first row of `TABLE` after an edit; the second row is always there and sound.
fn row_after(from: &str, to: &str) -> Option<TableRow> {
    let one = &TABLE[TABLE.find("[{").unwrap() + 1..TABLE.find("],\n     \"query_key\"").unwrap()];
    assert!(one.contains(from), "{from}");
    let sound = one.replace("\"instance_number\":0", "\"instance_number\":1");
    let text = TABLE.replace(one, &format!("{},{sound}", one.replace(from, to)));
    let mut rows = table::read_table(text.as_bytes()).unwrap().rows;
    assert_eq!(rows.pop().map(|row| row.number), Some(1));
    rows.pop()
}

#[test]
fn a_row_that_cannot_be_reached_hides_no_other() {
    for (from, to) in [
        (r#""namespace_ip":"10.18.0.2","namespace_ip_v6":"fc00::2","host_ip":"10.1.1.1","host_port":50103,"#, ""),
        (r#""host_ip":"10.1.1.1","#, ""),
        (r#""host_port":50103"#, r#""host_port":0"#),
        (r#""host_port":50103"#, r#""host_port":70000"#),
        (r#""namespace_ip":"10.18.0.2""#, r#""namespace_ip":"x""#),
        (r#""instance_number":0"#, r#""instance_number":null"#),
        (r#""service_ip":["#, r#""service_ip":[3,"#),
    ] {
        assert_eq!(row_after(from, to), None, "{to}");
    }
}

#[test]
fn rows_bend_where_clusters_differ() {
    assert_eq!(row_after("50103", "\"50103\"").unwrap().host_port, 50103);
    assert_eq!(row_after(r#","namespace_ip_v6":"fc00::2""#, "").unwrap().namespace.v6, None);
    for gone in [r#""cluster_id":"64b001","#, r#""worker_id":"6b034692","#] {
        assert!(row_after(gone, "").is_some());
    }
    // An address nobody knows how to choose behind is no address of the service.
    assert_eq!(row_after("\"RR\"", "\"Underutilised\"").unwrap().services, []);
    let closest = row_after("\"RR\"", "\"Closest\"").unwrap();
    assert!(closest.services.iter().all(|service| service.policy == Policy::Closest));
    // Ours say more of what upstream nodes take for round robin.
    let sticky = row_after(r#""IpType":"RR""#, r#""IpType":"RR","Policy":"sticky""#).unwrap();
    assert!(sticky.services.iter().all(|service| service.policy == Policy::Sticky));
    let newer = row_after(r#""IpType":"RR""#, r#""IpType":"RR","Policy":"telepathic""#).unwrap();
    assert!(newer.services.iter().all(|service| service.policy == Policy::RoundRobin));
    for (weight, read) in [("7", 7), ("0", 0), ("1000", 100), ("-3", 1), ("\"x\"", 1)] {
        let heavy = row_after("\"instance_number\":0", &format!("\"instance_number\":0,\"weight\":{weight}"));
        assert_eq!(heavy.map(|row| row.weight), Some(read), "{weight}");
    }
    // First-generation rows name their own address only in the list.
    let old = row_after(r#""instance_ip":"10.30.0.0","instance_ip_v6":"fdff::","#, "").unwrap();
    assert_eq!(old.instance.v4, Some("10.30.0.0".parse().unwrap()));
}

#[test]
fn queries_read_what_they_write() {
    let by_name = Query::Name(service_of("app.default.web.test"));
    assert_eq!(table::table_query(&by_name), r#"{"sname":"app.default.web.test","sip":""}"#);
    let by_address = Query::Address("10.30.55.55".parse().unwrap());
    assert_eq!(table::table_query(&by_address), r#"{"sname":"","sip":"10.30.55.55"}"#);
    let by_v6 = Query::Address("fdff:2000::".parse().unwrap());
    for query in [by_name.clone(), by_address.clone(), by_v6] {
        assert_eq!(table::read_table_query(table::table_query(&query).as_bytes()).unwrap(), query);
    }
    for bad in
        ["{}", r#"{"sname":"","sip":""}"#, r#"{"sname":"a.b.c.d","sip":"10.0.0.1"}"#, r#"{"sname":"x","sip":""}"#]
    {
        assert!(table::read_table_query(bad.as_bytes()).is_err(), "{bad}");
    }
    assert_eq!(table::first_generation_path(&by_address), "/api/job/ip/10_30_55_55/instances");
    assert_eq!(table::first_generation_path(&by_name), "/api/job/app.default.web.test/instances");
}

#[test]
fn subnets_read_what_they_write() {
    let text = r#"{"address":"10.18.0.64","addressv6":"fc00::100"}"#;
    let subnet = table::read_subnet(text.as_bytes()).unwrap();
    assert_eq!(subnet, Subnet { v4: "10.18.0.64".parse().unwrap(), v6: "fc00::100".parse().unwrap() });
    assert_eq!(table::subnet_result(&subnet), text);
    for bad in [
        "{}",
        r#"{"address":"10.18.0.1","addressv6":"fc00::"}"#,
        r#"{"address":"10.18.0.0","addressv6":"fc00::1"}"#,
        r#"{"address":"fc00::","addressv6":"fc00::"}"#,
        r#"{"address":7}"#,
    ] {
        assert!(table::read_subnet(bad.as_bytes()).is_err(), "{bad}");
    }
}

#[test]
fn clusters_without_ipv6_still_give_each_node_a_subnet_of_its_own() {
    let v6 = |v4: &str| table::read_subnet(format!(r#"{{"address":"{v4}"}}"#).as_bytes()).unwrap().v6;
    let given: std::collections::BTreeSet<_> =
        ["10.18.0.0", "10.18.0.64", "10.18.1.0", "172.18.0.0"].map(v6).into_iter().collect();
    assert_eq!(given.len(), 4);
    assert!(given.iter().all(|v6| v6.octets()[0] == 0xfc && v6.octets()[15] == 0));
}

#[test]
fn deployed_notices_carry_both_families_and_the_port_as_text() {
    let notice = table::Deployed {
        instance: instance(0),
        addresses: Addresses { v4: "10.18.0.2".parse().unwrap(), v6: "fc00::2".parse().unwrap() },
        host: "192.0.2.11".parse().unwrap(),
        host_port: 50103,
    };
    let text = table::deployed(&notice);
    assert_eq!(
        text,
        r#"{"appname":"app.default.web.test","status":"DEPLOYED","instance_number":0,"nsip":"10.18.0.2","nsipv6":"fc00::2","host_port":"50103","host_ip":"192.0.2.11"}"#
    );
    assert_eq!(table::read_deployed(text.as_bytes()).unwrap(), notice);
    let service = service_of("app.default.web.test");
    assert_eq!(table::read_interest_remove(table::interest_remove(&service).as_bytes()).unwrap(), service);
    assert_eq!(
        table::address_changed(&instance(1), "192.0.2.99".parse().unwrap(), 50103),
        r#"{"appname":"app.default.web.test","instance_number":1,"host_port":"50103","host_ip":"192.0.2.99"}"#
    );
}

fn facts() -> NodeFacts {
    NodeFacts {
        host: "w1".into(),
        kernel_version: "6.18".into(),
        architecture: "amd64".into(),
        cpus_logical: 4,
        technologies: vec![Technology::Container, Technology::Unikernel],
        ..NodeFacts::default()
    }
}

fn usage() -> NodeUsage {
    NodeUsage {
        cpu_percent: 12.5,
        cpus_logical: 4,
        memory_percent: 41.0,
        memory_available_mib: 2310,
        memory_total_mib: 4096,
        gpus: vec![GpuUsage { memory_total_mib: 8192, memory_used_mib: 2048, ..GpuUsage::default() }],
        ..NodeUsage::default()
    }
}

#[test]
fn registrations_pass_the_strict_schema() {
    for (facts, usage) in
        [(facts(), usage()), (NodeFacts { host: "x".into(), ..NodeFacts::default() }, NodeUsage::default())]
    {
        let text = register::registration(Generation::G4, &facts, &usage, Some("192.0.2.11".parse().unwrap()));
        let registrant = register::read_registration(text.as_bytes()).unwrap();
        assert_eq!(registrant.host, facts.host);
        assert_eq!(registrant.memory_mib, Some(usage.memory_available_mib));
        assert!(!text.contains("null") && !text.contains(r#""architecture":"","virtualization""#), "{text}");
    }
    let text = register::registration(Generation::G4, &facts(), &usage(), None);
    assert_eq!(register::read_registration(text.as_bytes()).unwrap().virtualization, ["docker", "unikernel"]);
    assert!(text.contains(r#""port":"3000""#), "{text}");
    let named = NodeFacts { announced_port: Some(3001), ..facts() };
    let text = register::registration(Generation::G4, &named, &usage(), None);
    assert!(text.contains(r#""port":"3001""#), "{text}");
}

#[test]
fn the_strict_schema_refuses_what_clusters_refuse() {
    for good in [r#"{"host":"x"}"#, r#"{"host":"x","virtualization":null,"csi_drivers":null,"memory":4000.5,"foo":[]}"#]
    {
        assert!(register::read_registration(good.as_bytes()).is_ok(), "{good}");
    }
    for bad in [
        "{}",
        r#"{"host":"x","port":3000}"#,
        r#"{"host":"x","ip":null}"#,
        r#"{"host":"x","memory":null}"#,
        r#"{"host":"x","memory":"much"}"#,
        r#"{"host":"x","virtualization":"docker"}"#,
        r#"{"host":"x","csi_drivers":{}}"#,
        r#"{"host":"x","aggregation_per_architecture":[]}"#,
    ] {
        assert!(register::read_registration(bad.as_bytes()).is_err(), "{bad}");
    }
}

#[test]
fn answers_give_an_identity() {
    let text = r#"{"id": "6b034ec446528056c08b89ae", "MQTT_BROKER_PORT": "10003"}"#;
    let identity = register::read_answer(text.as_bytes(), Generation::G4).unwrap();
    assert_eq!(
        (identity.id.as_str(), identity.broker_port, identity.subnet),
        ("6b034ec446528056c08b89ae", 10003, None)
    );
    assert_eq!(
        register::read_answer(register::answer(&identity.id, 10003).as_bytes(), Generation::G4).unwrap(),
        identity
    );
    let text = r#"{"id": "6b03561a69c09ab668d1c1fc", "MQTT_BROKER_PORT": "10003", "SUBNETWORK": "172.18.0.0"}"#;
    let identity = register::read_answer(text.as_bytes(), Generation::G1).unwrap();
    assert_eq!(identity.subnet.unwrap().v4.to_string(), "172.18.0.0");
    for bad in [
        r#"{"id":"","MQTT_BROKER_PORT":"1"}"#,
        r##"{"id":"a/#","MQTT_BROKER_PORT":"1"}"##,
        r#"{"id":"a","MQTT_BROKER_PORT":"0"}"#,
        r#"{"id":"a"}"#,
        r#"{"id":"a","MQTT_BROKER_PORT":"1","SUBNETWORK":"172.18.0.3"}"#,
    ] {
        assert!(register::read_answer(bad.as_bytes(), Generation::G1).is_err(), "{bad}");
    }
}

#[test]
fn memory_means_what_each_generation_thinks() {
    let read = |generation| -> serde_json::Value {
        serde_json::from_str(&node::information(generation, &usage(), Some("192.0.2.11".parse().unwrap()))).unwrap()
    };
    let (old, new, first) = (read(Generation::G2), read(Generation::G4), read(Generation::G1));
    assert_eq!((&old["memory"], &new["memory"], &first["memory"]), (&41.0.into(), &2310.into(), &41.0.into()));
    for document in [&old, &new] {
        assert_eq!(document["cpu"], document["cpu_percent"]);
        assert_eq!(document["free_cores"], 4);
        assert_eq!(document["vram"], 8192);
        assert_eq!(document["gpu_mem_used"], 25.0);
        assert_eq!(document["ip"], "192.0.2.11");
    }
    assert_eq!(first["free_cores"], 3.5);
    assert_eq!(read(Generation::G1b), old);
}

#[test]
fn information_is_only_what_changes_and_never_empty() {
    let mut broken = usage();
    broken.cpu_percent = f64::NAN;
    broken.gpus[0].temperature_celsius = f64::INFINITY;
    for (generation, usage) in [
        (Generation::G1, usage()),
        (Generation::G1b, broken.clone()),
        (Generation::G2, broken.clone()),
        (Generation::G4, broken),
    ] {
        let text = node::information(generation, &usage, None);
        let document: serde_json::Value = serde_json::from_str(&text).unwrap();
        for (name, value) in document.as_object().unwrap() {
            assert!(!value.is_null() && value != "", "{name} in {text}");
        }
        for absent in ["port", "architecture", "host", "virtualization"] {
            assert!(document.get(absent).is_none(), "{absent}");
        }
    }
}

fn running(number: u32, technology: Technology) -> InstanceUsage {
    InstanceUsage {
        instance: instance(number),
        technology,
        cpu_percent: 1.5,
        memory_bytes: 1,
        memory_percent: 0.2,
        disk_bytes: 1000,
        log_tail: format!("{}\u{1}end", "ä".repeat(2000)),
        counters: crate::model::InstanceCounters::default(),
    }
}

#[test]
fn resources_are_lists_by_technology() {
    assert_eq!(node::resources(&[]), [r#"{"services":[]}"#]);
    let usages: Vec<_> = (0..40)
        .map(|number| running(number, Technology::Container))
        .chain([running(40, Technology::Unikernel)])
        .collect();
    let messages = node::resources(&usages);
    assert_eq!(messages.len(), 3);
    let mut seen = Vec::new();
    for message in &messages {
        assert!(message.len() < json::MAX_MESSAGE);
        let services = node::read_resources(message.as_bytes()).unwrap();
        assert!(services.iter().all(|service| service.virtualization == services[0].virtualization));
        assert!(services.iter().all(|service| service.logs.len() <= 1024 && service.logs.ends_with("end")));
        seen.extend(services.into_iter().map(|service| service.instance.number));
    }
    assert_eq!(seen, (0..=40).collect::<Vec<_>>());
    let document: serde_json::Value = serde_json::from_str(&messages[0]).unwrap();
    let first = &document["services"][0];
    assert_eq!((&first["cpu_percent"], &first["disk"]), (&"1.500000".into(), &"1000".into()));
    assert!(node::read_resources(br#"{"services":null}"#).is_err());
}

#[test]
fn the_greeting_names_the_real_tunnel_port() {
    let text = register::greeting(&facts(), &usage(), None, 50103);
    let document: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&document["host"], &document["node_port"]), (&"w1".into(), &50103.into()));
    assert_eq!(document["technology"], serde_json::json!(["docker", "unikernel"]));
}

/// Everything that reads, at once: none may panic.
fn read_all(bytes: &[u8]) {
    let us = node("node1");
    let _ = deploy(bytes, Some(&us)).map(|spec| assert_eq!(deploy(document(&spec).as_bytes(), None).unwrap(), spec));
    for topic in [OrderTopic::Deploy, OrderTopic::Delete] {
        let _ = order(topic, bytes, Some(&us));
    }
    let _ = table::read_table(bytes);
    let _ = table::read_subnet(bytes);
    let _ = table::read_table_query(bytes);
    let _ = table::read_deployed(bytes);
    let _ = table::read_interest_remove(bytes);
    let _ = register::read_answer(bytes, Generation::G1);
    let _ = register::read_registration(bytes);
    let _ = node::read_resources(bytes);
    let _ = node::read_information(bytes);
    let _ = status::read_job_report(bytes);
    let _ = json::excerpt(bytes);
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _ = port_mappings(text);
        let _ = service_name(text);
        let _ = ToNode::parse(text, &us);
        let _ = FromNode::parse(text);
    }
}

fn a_document() -> impl Strategy<Value = String> {
    let notice = r#"{"appname":"app.default.web.test","status":"DEPLOYED","instance_number":0,"nsip":"10.18.0.2","nsipv6":"fc00::2","host_port":"50103","host_ip":"192.0.2.11"}"#;
    let usage = r#"{"services":[{"cpu_percent":"1.500000","job_name":"app.default.web.test","virtualization":"docker","instance":0}]}"#;
    prop::sample::select(vec![JOB, FIRST_GENERATION_JOB, TABLE, notice, usage]).prop_map(str::to_owned)
}

proptest! {
    #[test]
    fn random_bytes_panic_nobody(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
        read_all(&bytes);
    }

    #[test]
    fn random_texts_of_json_letters_panic_nobody(text in r#"[\[\]{}":,0-9a-z\\.\-eE/ ]{0,300}"#) {
        read_all(text.as_bytes());
    }

    #[test]
    fn mutated_documents_panic_nobody(
        document in a_document(),
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4u8), 1..8),
    ) {
        let mut bytes = document.into_bytes();
        for (place, byte, kind) in edits {
            if bytes.is_empty() {
                break;
            }
            let at = place.index(bytes.len());
            match kind {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                2 => { bytes.remove(at); }
                _ => bytes.truncate(at),
            }
        }
        read_all(&bytes);
    }

    #[test]
    fn replaced_values_panic_nobody(
        document in a_document(),
        place in any::<prop::sample::Index>(),
        value in prop::sample::select(vec![
            "null", "0", "-1", "1e400", "18446744073709551616", "\"\"", "\"\\u0000\"", "[]", "{}", "[null]", "[{}]",
            "true", "\"10.0.0.1\"", "\"fc00::\"", "[[\"a=b\"]]", "{\"a\":{\"b\":[]}}",
        ]),
    ) {
        let mut parsed: serde_json::Value = serde_json::from_str(&document).unwrap();
        let members: Vec<String> = parsed.as_object().unwrap().keys().cloned().collect();
        parsed[&members[place.index(members.len())]] =
            serde_json::from_str(value).unwrap_or(serde_json::Value::Null);
        read_all(parsed.to_string().as_bytes());
    }
}
