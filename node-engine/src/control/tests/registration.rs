//! Who takes a node in, and how.

use std::sync::atomic::Ordering;

use super::broker::{Broker, Seen};
use super::init::{Init, Manner};
use super::manager::Manager;
use super::*;

#[tokio::test]
async fn the_newest_generation_is_told_by_its_status() {
    let mut broker = Broker::start().await;
    let manager = Manager::start(broker.port, true).await;
    let mut running = start(config(manager.port));
    let identity = running.registered().await;
    assert_eq!((identity.id.as_str(), identity.generation), ("6b034ec446528056c08b89ae", Generation::G4));
    assert_eq!(broker.connection().await, "6b034ec446528056c08b89ae-ne");
    running.connected().await;
    let bodies = manager.book.bodies.lock().unwrap().clone();
    assert_eq!(bodies.len(), 1);
    assert!(bodies[0].contains(r#""memory":4000"#) && bodies[0].contains(r#""ip":"127.0.0.1""#), "{}", bodies[0]);
    running.end().await;
}

#[tokio::test]
async fn a_status_that_cannot_be_told_now_is_asked_for_again() {
    let broker = Broker::start().await;
    let manager = Manager::start(broker.port, true).await;
    manager.book.outages.store(2, std::sync::atomic::Ordering::Relaxed);
    let mut running = start(config(manager.port));
    assert_eq!(running.registered().await.generation, Generation::G4, "and not one that nobody has named");
    running.end().await;
}

#[tokio::test]
async fn an_older_generation_hears_memory_as_a_percentage() {
    let broker = Broker::start().await;
    let manager = Manager::start(broker.port, false).await;
    let mut running = start(config(manager.port));
    assert_eq!(running.registered().await.generation, Generation::G2);
    assert!(manager.book.bodies.lock().unwrap()[0].contains(r#""memory":0.0"#));
    running.end().await;
}

#[tokio::test]
async fn a_configured_generation_is_not_asked_for() {
    let broker = Broker::start().await;
    let manager = Manager::start(broker.port, false).await;
    let mut running = start(ClusterConfig { generation: Some(Generation::G4), ..config(manager.port) });
    assert_eq!(running.registered().await.generation, Generation::G4);
    running.end().await;
}

/// Where the cluster is on the node's machine, and peers are not.
#[tokio::test]
async fn a_node_beside_its_cluster_is_where_its_overlay_is() {
    let mut broker = Broker::start().await;
    let manager = Manager::start(broker.port, true).await;
    let overlay = |text: &str| text.parse::<std::net::IpAddr>().unwrap();
    let mut running =
        run(Cluster::new(config(manager.port), Node { overlay_address: Some(overlay("192.0.2.7")), ..node() }));
    running.connected().await;
    let addresses = Addresses { v4: "10.18.0.2".parse().unwrap(), v6: "fc00::2".parse().unwrap() };
    running.say(Report::Deployed { instance: instance("web"), addresses }).await;
    let text = broker.message("nodes/6b034ec446528056c08b89ae/net/service/deployed").await;
    assert!(text.contains(r#""host_ip":"192.0.2.7""#), "{text}");
    running.say(status("web", Status::Created)).await;
    let text = broker.message("nodes/6b034ec446528056c08b89ae/job").await;
    assert!(text.contains(r#""publicip":"192.0.2.7""#), "{text}");

    running.say(Report::Address(overlay("192.0.2.8"))).await;
    running.registered().await;
    running.connected().await;
    running.say(status("web", Status::Running)).await;
    let text = broker.message("nodes/6b034ec446528056c08b89ae/job").await;
    assert!(text.contains(r#""publicip":"192.0.2.8""#), "{text}");
    let bodies = manager.book.bodies.lock().unwrap().clone();
    let said = ["192.0.2.7", "192.0.2.8"].map(|ip| format!(r#""ip":"{ip}""#));
    assert!(bodies.iter().zip(&said).all(|(body, ip)| body.contains(ip)) && bodies.len() == 2, "{bodies:?}");
    running.end().await;
}

#[tokio::test]
async fn a_refused_registration_is_tried_again() {
    let broker = Broker::start().await;
    let manager = Manager::start(broker.port, true).await;
    manager.book.refusals.store(2, std::sync::atomic::Ordering::Relaxed);
    let mut running = start(config(manager.port));
    running.registered().await;
    assert_eq!(manager.book.bodies.lock().unwrap().len(), 3);
    running.end().await;
}

#[tokio::test]
async fn a_node_without_a_cluster_takes_reports_and_ends_when_told() {
    let unused = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let mut running = start(config(unused));
    let trouble = running.trouble().await;
    assert!(trouble.contains(&format!("no cluster manager at http://127.0.0.1:{unused}")), "{trouble}");
    assert!(trouble.to_lowercase().contains("refused"), "{trouble}");
    for _ in 0..100 {
        running.say(status("a", Status::Creating)).await;
        running.say(Report::Node(Box::default())).await;
    }
    running.end().await;
}

async fn first_generation(manner: Manner) -> (Init, NodeIdentity) {
    let mut broker = Broker::start().await;
    let init = Init::start(manner, broker.port).await;
    let begun = tokio::time::Instant::now();
    let mut running = start(config(init.port));
    let identity = running.registered().await;
    // Whoever misses the question, which comes before the confirmation, waits for another five seconds.
    assert_eq!(begun.elapsed() >= Duration::from_secs(5), manner == Manner::Unconfirmed);
    broker.subscription("nodes/node1/control/+").await;
    running.connected().await;
    running.end().await;
    (init, identity)
}

/// An instance that was there before this start has its job from then.
#[tokio::test]
async fn a_first_generation_cluster_hears_of_instances_of_an_earlier_run() {
    let mut broker = Broker::start().await;
    let init = Init::start(Manner::WebSocket, broker.port).await;
    let node = Node { jobs: vec![(instance("web"), "60c0aa".into())], ..node() };
    let mut running = run(Cluster::new(config(init.port), node));
    running.connected().await;
    for name in ["unknown", "web"] {
        running.say(status(name, Status::Dead)).await;
    }
    let text = broker.message("nodes/node1/job").await;
    assert!(text.contains(r#""job_id":"60c0aa","status":"FAILED""#), "{text}");
    running.end().await;
}

fn deployed(name: &str) -> Report {
    let addresses = Addresses { v4: "172.18.0.2".parse().unwrap(), v6: "fc00::2".parse().unwrap() };
    Report::Deployed { instance: instance(name), addresses }
}

/// It takes an address for that of any instance of the job that has none yet.
#[tokio::test]
async fn a_first_generation_cluster_hears_once_where_an_instance_is() {
    let mut broker = Broker::start().await;
    let init = Init::start(Manner::WebSocket, broker.port).await;
    let jobs = ["old", "new"].map(|name| (instance(name), format!("60c0{name}")));
    let node = Node { jobs: jobs.into(), announced: vec![instance("old")], ..node() };
    let mut running = run(Cluster::new(config(init.port), node));
    running.connected().await;
    broker.connection().await;
    let job = "nodes/node1/job";
    broker.switches.keep_acks.store(true, Ordering::Relaxed);
    running.say(deployed("old")).await;
    running.say(deployed("new")).await;
    let expected = r#"{"job_id":"60c0new","status":"DEPLOYED","ns_ip":"172.18.0.2"}"#;
    assert_eq!(broker.message(job).await, expected, "an earlier run has told of the other");
    broker.hang_up();
    running.disconnected().await;
    broker.switches.keep_acks.store(false, Ordering::Relaxed);
    broker.connection().await;
    running.connected().await;
    running.say(deployed("new")).await;
    assert_eq!(broker.message(job).await, expected, "it was not acknowledged");
    // This comes after the acknowledgement.
    broker.publish("nodes/node1/control/deploy", super::job("after"));
    running.deploy().await;
    broker.hang_up();
    running.disconnected().await;
    broker.connection().await;
    running.connected().await;
    for name in ["old", "new"] {
        running.say(deployed(name)).await;
    }
    running.say(status("new", Status::Failed)).await;
    let text = broker.message(job).await;
    assert!(text.contains("FAILED"), "{text}");
    running.end().await;
}

fn the_conversation_was_right(heard: &[String]) {
    assert_eq!(heard[0], "40/init,");
    let greeting = heard[1].strip_prefix("42/init,").unwrap();
    let event: (String, String) = serde_json::from_str(greeting).expect("a name and JSON as text");
    let document: serde_json::Value = serde_json::from_str(&event.1).unwrap();
    assert_eq!((event.0.as_str(), &document["node_port"], &document["host"]), ("cs1", &50103.into(), &"w1".into()));
    assert_eq!(heard[2..], ["3", "41/init,", "1"]);
}

#[tokio::test]
async fn a_first_generation_cluster_takes_a_node_in_over_a_websocket() {
    let (init, identity) = first_generation(Manner::WebSocket).await;
    assert_eq!((identity.id.as_str(), identity.generation), ("node1", Generation::G1));
    assert_eq!(identity.subnet.unwrap().v4.to_string(), "172.18.0.64");
    the_conversation_was_right(&init.heard());
}

/// As it was for a few months.
#[tokio::test]
async fn a_cluster_between_the_generations_hears_of_jobs_as_the_first() {
    let mut broker = Broker::start().await;
    let init = Init::start(Manner::Between, broker.port).await;
    let node = Node { jobs: vec![(instance("web"), "60c0aa".into())], ..node() };
    let mut running = run(Cluster::new(config(init.port), node));
    let identity = running.registered().await;
    assert_eq!((identity.generation, identity.subnet), (Generation::G1b, None));
    broker.subscription("nodes/node1/net/subnetwork/result").await;
    running.connected().await;
    running.say(Report::SubnetRequest).await;
    broker.message("nodes/node1/net/subnet").await;
    running.say(status("web", Status::Creating)).await;
    running.say(deployed("web")).await;
    let mut said = Vec::new();
    broker
        .see("both notices", |seen| {
            if let Seen::Published { topic, payload } = seen {
                said.push((topic, payload));
            }
            (said.len() == 2).then_some(())
        })
        .await;
    assert_eq!(said[0].0, "nodes/node1/net/service/deployed");
    let job = r#"{"job_id":"60c0aa","status":"DEPLOYED","status_detail":""}"#;
    assert_eq!(said[1], ("nodes/node1/job".to_owned(), job.to_owned()));
    running.end().await;
}

#[tokio::test]
async fn a_first_generation_cluster_takes_a_node_in_by_polling_alone() {
    let (init, identity) = first_generation(Manner::Polling).await;
    assert_eq!(identity.generation, Generation::G1);
    the_conversation_was_right(&init.heard());
}

#[tokio::test]
async fn an_upgrade_that_fails_leaves_polling() {
    let (init, _) = first_generation(Manner::BrokenUpgrade).await;
    the_conversation_was_right(&init.heard());
}

#[tokio::test]
async fn a_namespace_that_is_never_confirmed_is_spoken_to_anyway() {
    let (init, _) = first_generation(Manner::Unconfirmed).await;
    the_conversation_was_right(&init.heard());
}

#[tokio::test]
async fn a_refused_namespace_is_an_error_with_its_reason() {
    let init = Init::start(Manner::Refusing, 1).await;
    let http = super::super::http::client(false).unwrap();
    let base = format!("http://127.0.0.1:{}", init.port);
    let error = super::super::socketio::register(&http, &base, "{}").await.unwrap_err();
    assert!(error.to_string().contains("not you"), "{error}");
}

#[tokio::test]
async fn whoever_speaks_no_engine_io_is_refused() {
    let manager = Manager::start(1, true).await;
    let http = super::super::http::client(false).unwrap();
    let error = super::super::socketio::register(&http, &format!("http://127.0.0.1:{}", manager.port), "{}").await;
    assert!(error.unwrap_err().to_string().contains("404"));
}
