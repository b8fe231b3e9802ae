//! What is said and heard once a node is taken in, and what becomes of it when the broker fails.

use std::sync::atomic::Ordering;

use super::broker::{Broker, Seen};
use super::init::{Init, Manner};
use super::manager::Manager;
use super::*;

pub(super) const NODE: &str = "6b034ec446528056c08b89ae";

pub(super) async fn online() -> (Broker, Manager, Running) {
    let mut broker = Broker::start().await;
    let manager = Manager::start(broker.port, true).await;
    let mut running = start(config(manager.port));
    broker.connection().await;
    let own = ["control/deploy", "control/delete", "control/error", "net/subnetwork/result", "net/tablequery/result"];
    broker.subscriptions(&own.map(topic)).await;
    running.connected().await;
    (broker, manager, running)
}

pub(super) fn topic(rest: &str) -> String {
    format!("nodes/{NODE}/{rest}")
}

#[tokio::test]
async fn orders_and_answers_become_commands() {
    let (broker, _manager, mut running) = online().await;
    broker.publish(&topic("control/deploy"), job("web"));
    assert_eq!(running.deploy().await.id, instance("web"));
    let delete = crate::wire::order::delete_message(&instance("web"), &Technology::Container);
    broker.publish(&topic("control/delete"), delete);
    broker.publish(&topic("net/subnetwork/result"), r#"{"address":"10.18.0.0","addressv6":"fc00::"}"#);
    broker.publish(&topic("net/tablequery/result"), r#"{"app_name":"","instance_list":[],"query_key":"10.30.9.9"}"#);
    broker.publish("jobs/app.default.web.test/updates_available", r#"{"type":"DEPLOYMENT"}"#);
    let heard = [
        running.commands.recv().await,
        running.commands.recv().await,
        running.commands.recv().await,
        running.commands.recv().await,
    ];
    let [
        Some(Command::Delete(deleted, _)),
        Some(Command::Subnet(subnet)),
        Some(Command::Table(answer)),
        Some(Command::ServiceChanged(changed)),
    ] = heard
    else {
        panic!("{heard:?}")
    };
    assert_eq!((deleted, changed), (instance("web"), service("web")));
    assert_eq!(subnet.v4.to_string(), "10.18.0.0");
    assert_eq!(answer.query, Some(Query::Address("10.30.9.9".parse().unwrap())));
    running.end().await;
}

#[tokio::test]
async fn reports_become_messages_that_harm_no_cluster() {
    let (mut broker, _manager, running) = online().await;
    let addresses = Addresses { v4: "10.18.0.2".parse().unwrap(), v6: "fc00::2".parse().unwrap() };
    for each in [
        Status::Creating,
        Status::Created,
        Status::Running,
        Status::Failed,
        Status::Dead,
        Status::Completed,
        Status::Undeployed,
    ] {
        running.say(status("web", each)).await;
        assert_eq!(broker.status(NODE).await, ("app.default.web.test".into(), each.to_string()));
    }
    running.say(Report::Deployed { instance: instance("web"), addresses }).await;
    let text = broker.message(&topic("net/service/deployed")).await;
    assert!(text.contains(r#""host_port":"50103","host_ip":"127.0.0.1""#), "{text}");
    running.say(Report::SubnetRequest).await;
    broker.message(&topic("net/subnet")).await;
    running.say(Report::TableQuery(Query::Address("fdff:2000::".parse().unwrap()))).await;
    assert_eq!(broker.message(&topic("net/tablequery/request")).await, r#"{"sname":"","sip":"fdff:2000::"}"#);
    running.say(Report::InterestAdd(service("web"))).await;
    broker.subscription("jobs/app.default.web.test/updates_available").await;
    running.say(Report::InterestRemove(service("web"))).await;
    // The subscription ends, and the interest: a question before it makes sure that there is one.
    let (mut unsubscribed, mut said) = (false, Vec::new());
    broker
        .see("the end of an interest", |seen| {
            match seen {
                Seen::Unsubscribed(topics) => unsubscribed = topics == ["jobs/app.default.web.test/updates_available"],
                Seen::Published { topic, payload } => said.push((topic, payload)),
                _ => {}
            }
            (unsubscribed && said.len() == 2).then_some(())
        })
        .await;
    let question = (topic("net/tablequery/request"), r#"{"sname":"app.default.web.test","sip":""}"#.to_owned());
    assert_eq!(said, [question, (topic("net/interest/remove"), r#"{"appname":"app.default.web.test"}"#.to_owned())]);
    let odd = NodeUsage { cpu_percent: f64::INFINITY, memory_percent: f64::NAN, ..NodeUsage::default() };
    running.say(Report::Node(Box::new(odd))).await;
    broker.message(&topic("information")).await;
    for usages in [vec![], vec![usage("a"), usage("b")]] {
        running.say(Report::Instances(usages)).await;
        broker.message(&topic("jobs/resources")).await;
    }
    running.end().await;
}

#[tokio::test]
async fn nonsense_is_passed_over_and_a_bad_deploy_is_answered() {
    let (mut broker, _manager, mut running) = online().await;
    for rest in
        ["control/deploy", "control/delete", "net/subnetwork/result", "net/tablequery/result", "control/odd", "x"]
    {
        for payload in ["", "{", "[]", "null", "\u{0}", "{}", r#"{"command":"move","job":{"name":"web"}}"#] {
            broker.publish(&topic(rest), payload);
        }
        broker.publish(&topic(rest), vec![0xff; 3]);
        broker.publish(&topic(rest), vec![b'['; 100_000]);
    }
    broker.publish(&topic("control/deploy"), job("bad").replace("\"nginx\"", "3"));
    assert_eq!(broker.status(NODE).await, ("app.default.bad.test".into(), "FAILED".into()));
    broker.publish(&topic("control/deploy"), job("good"));
    assert_eq!(running.deploy().await.id, instance("good"));
    running.end().await;
}

#[tokio::test]
async fn an_oversized_message_costs_nothing_but_itself() {
    let (mut broker, _manager, mut running) = online().await;
    broker.publish(&topic("control/deploy"), vec![b'x'; 10_000_000]);
    broker.publish(&topic("control/deploy"), job("after"));
    assert_eq!(running.deploy().await.id, instance("after"));
    // Beyond what the client takes the connection ends, and comes back.
    broker.publish(&topic("control/deploy"), vec![b'x'; 20_000_000]);
    running.disconnected().await;
    broker.connection().await;
    running.connected().await;
    broker.publish(&topic("control/deploy"), job("again"));
    assert_eq!(running.deploy().await.id, instance("again"));
    running.end().await;
}

#[tokio::test]
async fn what_was_not_acknowledged_is_said_again_in_order() {
    let (mut broker, _manager, mut running) = online().await;
    running.say(Report::InterestAdd(service("web"))).await;
    broker.subscription("jobs/app.default.web.test/updates_available").await;
    broker.switches.keep_acks.store(true, Ordering::Relaxed);
    for name in ["a", "b"] {
        running.say(status(name, Status::Failed)).await;
        assert_eq!(broker.status(NODE).await.1, "FAILED");
    }
    broker.hang_up();
    assert_ne!(running.disconnected().await, "", "it is told why");
    running.say(status("c", Status::Creating)).await;
    running.say(Report::Node(Box::default())).await;
    running.say(status("c", Status::Created)).await;
    broker.switches.keep_acks.store(false, Ordering::Relaxed);
    broker.connection().await;
    for (name, word) in [("a", "FAILED"), ("b", "FAILED"), ("c", "CREATED")] {
        assert_eq!(broker.status(NODE).await, (format!("app.default.{name}.test"), word.to_owned()));
    }
    running.connected().await;
    running.end().await;
}

#[tokio::test]
async fn interests_are_subscribed_anew_after_every_reconnect() {
    let (mut broker, manager, mut running) = online().await;
    running.say(Report::InterestAdd(service("kept"))).await;
    running.say(Report::InterestAdd(service("gone"))).await;
    broker.subscription("jobs/app.default.gone.test/updates_available").await;
    running.say(Report::InterestRemove(service("gone"))).await;
    broker.unsubscription("jobs/app.default.gone.test/updates_available").await;
    broker.hang_up();
    running.disconnected().await;
    running.say(Report::InterestAdd(service("new"))).await;
    broker.connection().await;
    let wanted = ["kept", "new"].map(|name| format!("jobs/app.default.{name}.test/updates_available"));
    broker.subscriptions(&wanted).await;
    running.connected().await;
    // A short outage is no reason to register again.
    assert_eq!(manager.registrations(), 1);
    running.end().await;
}

/// The cluster may have been restarted meanwhile, and dies of the end of an interest that it does not know.
#[tokio::test]
async fn no_interest_ends_after_its_connection() {
    let (mut broker, _manager, mut running) = online().await;
    for name in ["sent", "unsent"] {
        running.say(Report::InterestAdd(service(name))).await;
        broker.subscription(&format!("jobs/app.default.{name}.test/updates_available")).await;
    }
    broker.switches.keep_acks.store(true, Ordering::Relaxed);
    running.say(Report::InterestRemove(service("sent"))).await;
    broker.message(&topic("net/interest/remove")).await;
    broker.hang_up();
    running.disconnected().await;
    running.say(Report::InterestRemove(service("unsent"))).await;
    running.say(status("web", Status::Dead)).await;
    broker.switches.keep_acks.store(false, Ordering::Relaxed);
    broker.connection().await;
    running.connected().await;
    let said = broker
        .see("the first word on the new connection", |seen| match seen {
            Seen::Published { topic, .. } => Some(topic),
            _ => None,
        })
        .await;
    assert_eq!(said, topic("job"));
    running.say(status("web", Status::Undeployed)).await;
    broker
        .see("what is said after it", |seen| match seen {
            Seen::Published { topic, payload } => {
                assert!(!topic.contains("/net/"), "{topic} {payload}");
                payload.contains("UNDEPLOYED").then_some(())
            }
            _ => None,
        })
        .await;
    running.end().await;
}

#[tokio::test]
async fn a_cluster_that_forgot_the_node_takes_it_in_anew() {
    let (mut broker, manager, mut running) = online().await;
    "6b034ec446528056c08b0000".clone_into(&mut manager.book.id.lock().unwrap());
    broker.publish(&topic("control/error"), r#"{"message":"Node not registered to the cluster"}"#);
    let identity = running.registered().await;
    assert_eq!(identity.id.as_str(), "6b034ec446528056c08b0000");
    assert_eq!(broker.connection().await, "6b034ec446528056c08b0000-ne");
    broker.subscription("nodes/6b034ec446528056c08b0000/control/deploy").await;
    running.connected().await;
    running.say(status("web", Status::Created)).await;
    assert_eq!(broker.status("6b034ec446528056c08b0000").await.1, "CREATED");
    running.end().await;
}

#[tokio::test]
async fn a_cluster_that_still_knows_the_node_is_asked_everything_again() {
    let (broker, manager, mut running) = online().await;
    broker.publish(&topic("control/error"), "{}");
    assert_eq!(running.registered().await.id.as_str(), NODE);
    running.connected().await;
    assert_eq!(manager.registrations(), 2);
    running.end().await;
}

#[tokio::test]
async fn a_broker_that_refuses_is_tried_again() {
    let mut broker = Broker::start().await;
    broker.switches.refuse.store(true, Ordering::Relaxed);
    let manager = Manager::start(broker.port, true).await;
    let mut running = start(config(manager.port));
    running.registered().await;
    assert_ne!(running.trouble().await, "");
    running.say(status("web", Status::Dead)).await;
    broker.switches.refuse.store(false, Ordering::Relaxed);
    broker.connection().await;
    assert_eq!(broker.status(NODE).await.1, "DEAD");
    running.connected().await;
    running.end().await;
}

#[tokio::test]
async fn the_last_words_are_said_before_the_end() {
    let (mut broker, _manager, running) = online().await;
    let Running { commands, reports, stop, task } = running;
    stop.begin();
    reports.send(status("web", Status::Dead)).await.unwrap();
    drop(reports);
    assert_eq!(broker.status(NODE).await.1, "DEAD");
    timeout(LONG, task).await.unwrap().unwrap().unwrap();
    drop(commands);
}

#[tokio::test]
async fn a_consumer_that_stands_still_blocks_no_reporter() {
    let (mut broker, _manager, running) = online().await;
    for number in 0..200 {
        broker.publish(&topic("control/deploy"), job(&format!("n{number}")));
    }
    // Nobody reads `running.commands`, whose channel is long full.
    for number in 0..100 {
        running.say(status(&format!("n{number}"), Status::Failed)).await;
        assert_eq!(broker.status(NODE).await.0, format!("app.default.n{number}.test"));
    }
    running.end().await;
}

#[tokio::test]
async fn a_silent_broker_is_left_and_tried_again() {
    let mut broker = Broker::start().await;
    let manager = Manager::start(broker.port, true).await;
    let mut cluster = Cluster::new(config(manager.port), node());
    cluster.silence = Duration::from_millis(200);
    let mut running = run(cluster);
    running.connected().await;
    broker.connection().await;
    broker.switches.keep_acks.store(true, Ordering::Relaxed);
    running.say(status("web", Status::Dead)).await;
    running.disconnected().await;
    broker.switches.keep_acks.store(false, Ordering::Relaxed);
    broker.connection().await;
    assert_eq!(broker.status(NODE).await.1, "DEAD");
    running.connected().await;
    running.end().await;
}

#[tokio::test]
async fn a_question_waits_for_the_subscription_before_it() {
    let (mut broker, _manager, running) = online().await;
    for number in 0..50 {
        let name = service(&format!("s{number}"));
        running.say(Report::InterestAdd(name.clone())).await;
        running.say(Report::TableQuery(Query::Name(name.clone()))).await;
        let mut subscribed = false;
        broker
            .see("a question", |seen| match seen {
                Seen::Subscribed(_) => {
                    subscribed = true;
                    None
                }
                Seen::Published { payload, .. } => {
                    assert!(subscribed && payload.contains(name.as_str()), "{payload}");
                    Some(())
                }
                _ => None,
            })
            .await;
    }
    running.end().await;
}

#[tokio::test]
async fn a_storm_of_orders_loses_none_and_keeps_their_order() {
    let (broker, _manager, mut running) = online().await;
    let nonsense = ["", "{", "[]", "\u{1}", r#"{"job_name":"../../etc"}"#];
    for number in 0..3000 {
        broker.publish(&topic("control/deploy"), job(&format!("n{number}")));
        if number % 20 == 0 {
            broker.publish(&topic("control/deploy"), nonsense[number % nonsense.len()]);
        }
        if number % 10 == 0 {
            broker.publish(&topic("control/deploy"), job(&format!("n{number}")));
        }
    }
    for number in 0..3000 {
        let wanted = instance(&format!("n{number}"));
        for _ in 0..=usize::from(number % 10 == 0) {
            assert_eq!(running.deploy().await.id, wanted);
        }
    }
    running.end().await;
}

#[tokio::test]
async fn a_first_generation_cluster_is_asked_over_http() {
    let mut broker = Broker::start().await;
    let init = Init::start(Manner::Polling, broker.port).await;
    let mut running = start(config(init.port));
    running.registered().await;
    broker.connection().await;
    running.connected().await;
    broker.publish(
        "nodes/node1/control/deploy",
        r#"{"_id":"60c0","job_name":"app.default.web.test","image":"nginx","image_runtime":"docker","port":"80",
            "instance_list":[{"instance_number":3,"namespace_ip":"","worker_id":"node1"}]}"#,
    );
    assert_eq!(running.deploy().await.id.number, 3);
    running.say(Report::SubnetRequest).await;
    running.hear("a subnet", |command| matches!(command, Command::Subnet(_)).then_some(())).await;
    let question = Query::Name(service("web"));
    running.say(Report::TableQuery(question.clone())).await;
    let answer = running
        .hear("an answer", |command| match command {
            Command::Table(answer) => Some(answer),
            _ => None,
        })
        .await;
    assert_eq!((answer.query, answer.service, answer.rows.len()), (Some(question), Some(service("web")), 1));
    running.end().await;
}

/// A first-generation order names no instance, and its document none that is being made ready.
#[tokio::test]
async fn two_orders_of_a_first_generation_cluster_are_two_instances() {
    let mut broker = Broker::start().await;
    let init = Init::start(Manner::Polling, broker.port).await;
    let node = Node { jobs: vec![(InstanceId { number: 1, ..instance("web") }, "60c0".into())], ..node() };
    let mut running = run(Cluster::new(config(init.port), node));
    broker.connection().await;
    running.connected().await;
    let order = r#"{"_id":"60c0","job_name":"app.default.web.test","image":"nginx","image_runtime":"docker","port":"80",
        "instance_list":[{"instance_number":0,"namespace_ip":"","worker_id":"node1"},
                         {"instance_number":1,"namespace_ip":"","worker_id":"node1"},
                         {"instance_number":2,"namespace_ip":"","worker_id":"node1"}]}"#;
    // The last is a repetition; the second is wanted since an earlier run.
    for number in [0, 2, 0] {
        broker.publish("nodes/node1/control/deploy", order);
        assert_eq!(running.deploy().await.id.number, number);
    }
    running.end().await;
}
