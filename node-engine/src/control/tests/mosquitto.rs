//! The same against the broker that clusters really run.

use std::process::Stdio;

use tokio::net::TcpStream;
use tokio::process::{Child, Command as Process};

use super::super::mqtt::{Address, Link, LinkEvent, Outcome};
use super::manager::Manager;
use super::*;

const NODE: &str = "6b034ec446528056c08b89ae";

struct Mosquitto {
    port: u16,
    process: Option<Child>,
}

impl Mosquitto {
    async fn start() -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut mosquitto = Self { port, process: None };
        mosquitto.up().await;
        mosquitto
    }

    async fn up(&mut self) {
        let process = Process::new("/usr/sbin/mosquitto")
            .args(["-p", &self.port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .expect("mosquitto is installed");
        self.process = Some(process);
        let listening = async {
            while TcpStream::connect(("127.0.0.1", self.port)).await.is_err() {
                tokio::task::yield_now().await;
            }
        };
        timeout(LONG, listening).await.expect("mosquitto listens");
    }

    async fn kill(&mut self) {
        self.process.take().expect("it runs").kill().await.expect("it is ours");
    }

    /// Another client, as the cluster manager is one.
    async fn client(&self, name: &str) -> Link {
        let address = Address { host: "127.0.0.1".into(), port: self.port, client_id: name.into(), tls: None };
        let mut link = Link::open(&address);
        assert!(matches!(timeout(LONG, link.event()).await.unwrap(), LinkEvent::Up));
        link
    }

    async fn publish(&self, topic: &str, payload: &str) {
        let client = self.client("publisher").await;
        let published = client.publish(topic.into(), payload.into()).unwrap();
        assert_eq!(timeout(LONG, published).await.unwrap(), Outcome::Acknowledged);
    }

    /// The next message on a topic after `report` was said.
    async fn hear(&self, topic: &str, running: &Running, report: Report) -> String {
        let mut client = self.client("listener").await;
        let subscribed = client.subscribe(vec![topic.to_owned()]).unwrap();
        assert_eq!(timeout(LONG, subscribed).await.unwrap(), Outcome::Acknowledged);
        running.say(report).await;
        let LinkEvent::Message { payload, .. } = timeout(LONG, client.event()).await.expect("a message") else {
            panic!("the listener lost its connection");
        };
        harmless(topic, &payload).unwrap();
        String::from_utf8(payload.to_vec()).unwrap()
    }
}

#[tokio::test]
#[ignore = "needs mosquitto"]
async fn a_killed_broker_costs_no_status_and_no_interest() {
    let mut mosquitto = Mosquitto::start().await;
    let manager = Manager::start(mosquitto.port, true).await;
    let mut running = start(config(manager.port));
    running.registered().await;
    running.connected().await;
    running.say(Report::InterestAdd(service("web"))).await;
    mosquitto.publish(&format!("nodes/{NODE}/control/deploy"), &job("web")).await;
    assert_eq!(running.deploy().await.id, instance("web"));
    let job_topic = format!("nodes/{NODE}/job");
    let text = mosquitto.hear(&job_topic, &running, status("web", Status::Creating)).await;
    assert!(text.contains("CREATING"), "{text}");
    for _ in 0..3 {
        mosquitto.kill().await;
        running.disconnected().await;
        mosquitto.up().await;
        running.connected().await;
        mosquitto.publish("jobs/app.default.web.test/updates_available", r#"{"type":"DEPLOYMENT"}"#).await;
        running.hear("a change", |command| matches!(command, Command::ServiceChanged(_)).then_some(())).await;
        let text = mosquitto.hear(&job_topic, &running, status("web", Status::Created)).await;
        assert!(text.contains("CREATED"), "{text}");
    }
    assert_eq!(manager.registrations(), 1);

    "6b034ec446528056c08b0000".clone_into(&mut manager.book.id.lock().unwrap());
    mosquitto.publish(&format!("nodes/{NODE}/control/error"), "{}").await;
    assert_eq!(running.registered().await.id.as_str(), "6b034ec446528056c08b0000");
    running.connected().await;
    mosquitto.publish("nodes/6b034ec446528056c08b0000/control/deploy", &job("web")).await;
    running.deploy().await;
    running.end().await;
}

#[tokio::test]
#[ignore = "needs mosquitto"]
async fn a_long_outage_ends_with_a_registration() {
    let mut mosquitto = Mosquitto::start().await;
    let manager = Manager::start(mosquitto.port, true).await;
    let mut running = start(config(manager.port));
    running.connected().await;
    mosquitto.kill().await;
    running.disconnected().await;
    let outage = tokio::time::Instant::now();
    // Said and not sent: it waits for the broker.
    running.say(status("web", Status::Failed)).await;
    tokio::time::sleep_until(outage + Duration::from_secs(12)).await;
    mosquitto.up().await;
    // In either order: both answers are on their way at once.
    let (mut connected, mut registered) = (None, false);
    running
        .hear("both", |command| {
            match command {
                Command::Connected => connected = connected.or(Some(outage.elapsed())),
                Command::Registered(_) => registered = true,
                _ => {}
            }
            (connected.is_some() && registered).then_some(())
        })
        .await;
    assert!(connected.unwrap() < Duration::from_secs(12 + 6), "reconnected after {connected:?}");
    assert_eq!(manager.registrations(), 2);
    running.end().await;
}

#[tokio::test]
#[ignore = "needs mosquitto"]
async fn a_retained_message_that_is_too_long_does_not_end_the_node() {
    let mosquitto = Mosquitto::start().await;
    let manager = Manager::start(mosquitto.port, true).await;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![b'x'; 10_000_000]).unwrap();
    let topic = format!("nodes/{NODE}/control/deploy");
    let path = file.path().to_str().unwrap();
    let port = mosquitto.port.to_string();
    let retained = Process::new("mosquitto_pub").args(["-p", &port, "-t", &topic, "-r", "-f", path]).status().await;
    assert!(retained.expect("mosquitto_pub is installed").success());
    let mut running = start(config(manager.port));
    running.connected().await;
    mosquitto.publish(&topic, &job("web")).await;
    assert_eq!(running.deploy().await.id, instance("web"));
    running.end().await;
}
