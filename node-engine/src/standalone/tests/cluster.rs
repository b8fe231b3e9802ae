use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rumqttc::{PublishOptions, QoS};
use serde_json::{Value, json};

use super::super::{ClusterApiError, Target};
use super::worker::Worker;
use super::{Started, WEB, config, http, start, until, web};
use crate::model::{InstanceId, ServiceName};

fn instance(number: u32) -> InstanceId {
    InstanceId { service: WEB.parse().unwrap(), number }
}

async fn word(cluster: &Started, number: u32) -> String {
    let instances = cluster.standalone.cluster.instances().await.unwrap();
    instances.into_iter().find(|one| one.number == number).map(|one| one.status).unwrap_or_default()
}

/// Deploy, subnet, table, notices, zombie, delete: the life of a service on two workers.
async fn the_whole_loop(cluster: Started) {
    let (http_address, broker) = (cluster.standalone.http, cluster.broker.clone());
    let a = Worker::start("a", http_address, &broker, false).await;
    a.say("net/subnet", &json!({ "METHOD": "GET" })).await;
    let subnet = a.hears("subnetwork/result", |_| true).await;
    assert_eq!(subnet, json!({ "address": "10.18.0.0", "addressv6": "fc00::" }));
    let b = Worker::start("b", http_address, &broker, true).await;
    b.say("net/subnet", &json!({ "METHOD": "GET" })).await;
    let subnet = b.hears("subnetwork/result", |_| true).await;
    assert_eq!(subnet, json!({ "address": "10.18.0.64", "addressv6": "fc00::100" }));

    let api = &cluster.standalone.cluster;
    let mut document: Value = serde_json::from_slice(&web()).unwrap();
    document["addresses"] = json!({ "rr_ip": "10.30.55.55" });
    document["sla_extra"] = json!("kept");
    let deployed = api.deploy(document.to_string().into_bytes(), None, Some("a".into())).await.unwrap();
    assert_eq!(deployed, [instance(0)]);
    let order = a.hears("control/deploy", |_| true).await;
    for (member, value) in [
        ("job_name", json!(WEB)),
        ("instance_number", json!(0)),
        ("virtualization", json!("container")),
        ("image", json!("docker.io/library/nginx:alpine")),
        ("app_name", json!("app")),
        ("microservice_namespace", json!("test")),
        ("RR_ip", json!("10.30.55.55")),
        ("sla_extra", json!("kept")),
    ] {
        assert_eq!(order[member], value, "{member}");
    }
    assert_eq!(order["instance_list"][0]["worker_id"], a.id);
    assert_eq!(order["instance_list"][0]["host_port"], "3000", "what a registration said outlives empty reports");
    let spec = crate::wire::deploy(order.to_string().as_bytes(), None).expect("our own node reads it");
    assert_eq!(spec.id, instance(0));

    // Before its network is up it is listed without addresses.
    let row = b.ask_table(WEB, "").await["instance_list"][0].clone();
    assert_eq!(row["instance_ip"], "10.30.0.0");
    assert_eq!(row["instance_ip_v6"], "fdff::");
    assert!(row.get("namespace_ip").is_none() && row.get("host_port").is_none(), "{row}");

    b.client.subscribe(format!("jobs/{WEB}/updates_available"), QoS::AtLeastOnce).await.unwrap();
    a.say("job", &json!({ "sname": WEB, "status": "CREATING", "status_detail": "", "instance": 0, "publicip": "" }))
        .await;
    until("creating", async || word(&cluster, 0).await == "CREATING").await;
    let notice = json!({ "appname": WEB, "status": "DEPLOYED", "instance_number": 0, "nsip": "10.18.0.2",
        "nsipv6": "fc00::2", "host_port": "50103", "host_ip": "192.0.2.11" });
    a.say("net/service/deployed", &notice).await;
    b.hears("updates_available", |update| *update == json!({ "type": "DEPLOYMENT" })).await;

    let expected = json!({
        "cluster_id": b.ask_table(WEB, "").await["instance_list"][0]["cluster_id"],
        "worker_id": a.id, "instance_number": 0, "instance_ip": "10.30.0.0", "instance_ip_v6": "fdff::",
        "namespace_ip": "10.18.0.2", "namespace_ip_v6": "fc00::2", "host_ip": "192.0.2.11", "host_port": 50103,
        "service_ip": [
            { "IpType": "RR", "Address": "10.30.55.55", "Address_v6": "fdff:2000::" },
            { "IpType": "instance_ip", "Address": "10.30.0.0", "Address_v6": "fdff::" },
        ],
        // It does not run yet.
        "weight": 0,
    });
    for (name, address) in [(WEB, ""), ("", "10.30.55.55"), ("", "fdff:2000::"), ("", "10.30.0.0"), ("", "fdff::")] {
        let table = b.ask_table(name, address).await;
        let key = if name.is_empty() { address } else { name };
        assert_eq!(table, json!({ "app_name": WEB, "instance_list": [expected], "query_key": key }));
    }
    let table = b.ask_table("", "10.30.99.99").await;
    assert_eq!(table, json!({ "app_name": "", "instance_list": [], "query_key": "10.30.99.99" }));
    let table = b.ask_table("app.default.none.test", "").await;
    assert_eq!((&table["instance_list"], &table["query_key"]), (&json!([]), &json!("app.default.none.test")));

    a.runs(0);
    until("running", async || word(&cluster, 0).await == "RUNNING").await;
    b.runs(7);
    let count =
        |order: &mut Value| order.as_object_mut().unwrap().remove("order_generation").unwrap().as_u64().unwrap();
    let mut zombie = b.hears("control/delete", |_| true).await;
    let first = count(&mut zombie);
    assert_eq!(zombie, json!({ "job_name": WEB, "virtualization": "docker", "instance_number": 7 }));

    assert_eq!(api.delete(Target::Service(WEB.parse().unwrap())).await.unwrap(), [instance(0)]);
    let mut delete = a.hears("control/delete", |_| true).await;
    assert!(count(&mut delete) > first, "a newer order counts more");
    assert_eq!(delete, json!({ "job_name": WEB, "virtualization": "container", "instance_number": 0 }));
    b.hears("updates_available", |update| *update == json!({ "type": "UNDEPLOYMENT" })).await;
    a.say("job", &json!({ "sname": WEB, "status": "UNDEPLOYED", "status_detail": "", "instance": 0, "publicip": "" }))
        .await;
    let gone = api.delete(Target::Service(WEB.parse().unwrap())).await;
    assert!(matches!(gone, Err(ClusterApiError::UnknownService(_))));
    drop((a, b));
    cluster.stop().await;
}

#[tokio::test]
async fn a_service_lives_on_the_embedded_broker() {
    let state = tempfile::tempdir().unwrap();
    the_whole_loop(start(config(state.path())).await).await;
}

#[tokio::test]
#[ignore = "needs mosquitto"]
async fn a_service_lives_on_mosquitto() {
    let state = tempfile::tempdir().unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let settings = state.path().join("mosquitto.conf");
    std::fs::write(&settings, format!("listener {port} 127.0.0.1\nallow_anonymous true\n")).unwrap();
    let mut mosquitto = tokio::process::Command::new("/usr/sbin/mosquitto")
        .arg("-c")
        .arg(&settings)
        .stderr(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("mosquitto is installed");
    let mut config = config(state.path());
    config.broker = Some(("127.0.0.1".into(), port));
    the_whole_loop(start(config).await).await;
    mosquitto.kill().await.unwrap();
}

#[tokio::test]
async fn move_and_replicate_keep_a_row_all_the_while() {
    let state = tempfile::tempdir().unwrap();
    let cluster = Arc::new(start(config(state.path())).await);
    let a = Worker::start("a", cluster.standalone.http, &cluster.broker, true).await;
    let b = Worker::start("b", cluster.standalone.http, &cluster.broker, true).await;
    let api = &cluster.standalone.cluster;
    until("fresh", async || api.nodes().await.unwrap().iter().all(|node| node.active)).await;
    api.deploy(web(), None, Some("a".into())).await.unwrap();
    until("running", async || word(&cluster, 0).await == "RUNNING").await;

    let over = Arc::new(AtomicBool::new(false));
    let watch = tokio::spawn({
        let (cluster, over) = (Arc::clone(&cluster), Arc::clone(&over));
        async move {
            let mut looks = 0;
            while !over.load(Ordering::Relaxed) {
                assert!(!cluster.rows().await.is_empty(), "no row after {looks} looks");
                looks += 1;
            }
            looks
        }
    });
    assert_eq!(api.move_instance(instance(0), "b".into()).await.unwrap(), instance(1));
    until("moved", async || a.running().is_empty() && b.running() == [1] && cluster.rows().await == [1]).await;
    assert_eq!(api.replicate(WEB.parse().unwrap(), 3).await.unwrap(), [1, 2, 3].map(instance));
    until("replicated", async || cluster.rows().await == [1, 2, 3]).await;
    until("running", async || word(&cluster, 3).await == "RUNNING").await;
    assert!(!a.running().is_empty() && !b.running().is_empty(), "spread");
    assert_eq!(api.replicate(WEB.parse().unwrap(), 1).await.unwrap(), [instance(1)]);
    until("fewer", async || a.running().is_empty() && b.running() == [1]).await;
    over.store(true, Ordering::Relaxed);
    assert!(watch.await.expect("a row at every look") > 20);
}

#[tokio::test]
async fn a_failed_instance_is_deployed_again() {
    let state = tempfile::tempdir().unwrap();
    let cluster = start(config(state.path())).await;
    let a = Worker::start("a", cluster.standalone.http, &cluster.broker, false).await;
    cluster.standalone.cluster.deploy(web(), None, None).await.unwrap();
    a.hears("control/deploy", |_| true).await;
    a.say(
        "job",
        &json!({ "sname": WEB, "status": "FAILED", "status_detail": "no image", "instance": 0, "publicip": "" }),
    )
    .await;
    a.hears("control/delete", |_| true).await;
    until("again", async || a.count("control/deploy") == 2).await;
    cluster.stop().await;
}

#[tokio::test]
async fn a_deployment_is_of_as_many_as_was_said_last_and_nothing_else() {
    let state = tempfile::tempdir().unwrap();
    let cluster = start(config(state.path())).await;
    let api = &cluster.standalone.cluster;
    let order = |command: &str, replicas: u32| {
        let job = json!({ "name": WEB, "image": "nginx", "technology": "docker", "replicas": replicas });
        json!({ "command": command, "job": job, "worker": ["a"] }).to_string().into_bytes()
    };
    let deploy = async |document: Vec<u8>, replicas: Option<u32>| api.deploy(document, replicas, None).await;
    // No node has registered: the place that a document names is unknown, and where there is none they wait.
    assert!(matches!(deploy(order("deploy", 3), Some(2)).await, Err(ClusterApiError::UnknownNode { .. })));
    for command in ["delete", "replicate", "move"] {
        let refused = deploy(order(command, 3), None).await.unwrap_err().to_string();
        assert!(refused.contains(&format!("`node-engine {command}`")), "{refused}");
    }
    for (document, replicas) in [(order("deploy", 0), None), (web(), Some(0))] {
        let refused = deploy(document, replicas).await.unwrap_err().to_string();
        assert!(refused.contains("0 replicas"), "{refused}");
    }
    assert!(api.services().await.unwrap().is_empty());

    let said = json!({ "command": "deploy", "job": { "name": WEB, "image": "nginx", "replicas": 3 } }).to_string();
    assert_eq!(deploy(said.clone().into_bytes(), None).await.unwrap().len(), 3);
    assert_eq!(deploy(said.into_bytes(), Some(2)).await.unwrap().len(), 2, "what is typed counts more");
    assert_eq!(deploy(web(), None).await.unwrap().len(), 1);

    let name: ServiceName = WEB.parse().unwrap();
    assert!(api.replicate(name.clone(), 0).await.unwrap().is_empty());
    assert_eq!(api.services().await.unwrap(), vec![name], "it can still be named");
    cluster.stop().await;
}

#[tokio::test]
async fn orders_come_over_the_wire_too() {
    let state = tempfile::tempdir().unwrap();
    let cluster = start(config(state.path())).await;
    let a = Worker::start("a", cluster.standalone.http, &cluster.broker, true).await;
    let b = Worker::start("b", cluster.standalone.http, &cluster.broker, true).await;
    until("fresh", async || cluster.standalone.cluster.nodes().await.unwrap().iter().all(|node| node.active)).await;
    a.client.subscribe("cluster/command/result", QoS::AtLeastOnce).await.unwrap();
    let order = async |order: Value| {
        a.forget("command/result");
        let options = PublishOptions::new(QoS::AtLeastOnce);
        a.client.publish("cluster/command", order.to_string().into_bytes(), options).await.unwrap();
        a.hears("command/result", |_| true).await
    };
    let job = json!({ "id": 1, "name": WEB, "image": "nginx", "technology": "docker" });
    let ok = |numbers: &[u32]| {
        let instances: Vec<String> = numbers.iter().map(|number| instance(*number).to_string()).collect();
        json!({ "ok": true, "instances": instances })
    };
    assert_eq!(order(json!({ "command": "deploy", "job": job, "cluster": [], "worker": [a.id] })).await, ok(&[0]));
    until("on a", async || a.running() == [0]).await;
    assert_eq!(order(json!({ "command": "move", "job": { "name": WEB }, "worker": ["b"] })).await, ok(&[1]));
    until("on b", async || b.running() == [1] && a.running().is_empty()).await;
    assert_eq!(order(json!({ "command": "replicate", "job": { "name": WEB, "replicas": 2 } })).await, ok(&[1, 2]));
    assert_eq!(order(json!({ "command": "delete", "job": { "name": WEB } })).await, ok(&[1, 2]));
    until("gone", async || b.running().is_empty() && a.running().is_empty()).await;
    for refused in [
        json!({ "command": "dance", "job": job }),
        json!({ "command": "deploy", "job": job, "cluster": ["another"] }),
        json!({ "command": "deploy" }),
        json!({ "command": "move", "job": job }),
        json!({ "command": "delete", "job": { "name": "../x" } }),
        json!([]),
    ] {
        let result = order(refused.clone()).await;
        assert_eq!(result["ok"], false, "{refused}");
        assert!(result["error"].as_str().is_some_and(|error| !error.is_empty()), "{refused}");
    }
    cluster.stop().await;
}

#[tokio::test]
async fn malformed_messages_on_every_topic_are_survived() {
    let state = tempfile::tempdir().unwrap();
    let cluster = start(config(state.path())).await;
    let a = Worker::start("a", cluster.standalone.http, &cluster.broker, false).await;
    let topics = [
        "information",
        "job",
        "jobs/resources",
        "net/subnet",
        "net/tablequery/request",
        "net/service/deployed",
        "net/service/undeployed",
        "net/service/address-changed",
        "net/interest/remove",
        "net/tablequery/result",
        "net/x",
    ];
    let long = format!("{{\"services\":\"{}\"}}", "x".repeat(600_000));
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let payloads: [&[u8]; 14] = [
        b"", b"\xff\xfe", b"null", b"3", b"[]", b"\"text\"", b"{", b"{}", b"{\"services\":null}",
        br#"{"services":[null,3,{},{"job_name":"x"},{"job_name":"a.b.c.d","instance":-1}]}"#,
        br#"{"sname":"app.default.web.test","status":"NONSENSE","instance":"one"}"#,
        br#"{"sname":"app.default.web.test","sip":"10.30.0.0","appname":"a.b.c.d","instance_number":99999999999,"METHOD":7}"#,
        long.as_bytes(),
        deep.as_bytes(),
    ];
    let options = PublishOptions::new(QoS::AtLeastOnce);
    for id in [a.id.as_str(), "stranger", "b\u{e4}d id"] {
        for topic in topics {
            for payload in payloads {
                a.client.publish(format!("nodes/{id}/{topic}"), payload.to_vec(), options).await.unwrap();
            }
        }
    }
    for payload in payloads {
        a.client.publish("cluster/command", payload.to_vec(), options).await.unwrap();
    }
    a.say("net/subnet", &json!({ "METHOD": "GET" })).await;
    a.hears("subnetwork/result", |_| true).await;
    let (status, _) = http(cluster.standalone.http, "GET", "/api/cluster/status", "").await;
    assert_eq!(status, 200);
    assert_eq!(cluster.standalone.cluster.nodes().await.unwrap().len(), 1, "no node came of it");
    cluster.stop().await;
}

#[tokio::test]
async fn a_restart_keeps_ids_subnets_and_services() {
    let state = tempfile::tempdir().unwrap();
    let cluster = start(config(state.path())).await;
    let a = Worker::start("a", cluster.standalone.http, &cluster.broker, true).await;
    a.say("net/subnet", &json!({ "METHOD": "GET" })).await;
    let subnet = a.hears("subnetwork/result", |_| true).await;
    cluster.standalone.cluster.deploy(web(), None, None).await.unwrap();
    until("running", async || word(&cluster, 0).await == "RUNNING").await;
    let (id, port) = (a.id.clone(), cluster.broker.1);
    cluster.stop().await;

    // The same port, so that the worker, which knows nothing of it, comes back by itself.
    let mut again = config(state.path());
    again.broker_port = port;
    let cluster = start(again).await;
    assert_eq!(cluster.rows().await, [0]);
    a.forget("control/deploy");
    let b = Worker::start("b", cluster.standalone.http, &cluster.broker, false).await;
    b.say("net/subnet", &json!({ "METHOD": "GET" })).await;
    assert_ne!(b.hears("subnetwork/result", |_| true).await, subnet);
    let a_again = Worker::start("a", cluster.standalone.http, &cluster.broker, false).await;
    assert_eq!(a_again.id, id);
    a_again.runs(0);
    a_again.say("net/subnet", &json!({ "METHOD": "GET" })).await;
    assert_eq!(a_again.hears("subnetwork/result", |_| true).await, subnet);
    until("running", async || word(&cluster, 0).await == "RUNNING").await;
    assert_eq!(b.ask_table(WEB, "").await["instance_list"][0]["worker_id"], id);
    assert_eq!(a_again.count("control/deploy") + a_again.count("control/delete") + b.count("control/deploy"), 0);
    cluster.stop().await;
}
