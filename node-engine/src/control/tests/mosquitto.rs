//! The same against the broker that clusters really run.

use std::path::Path;
use std::process::Stdio;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::process::{Child, Command as Process};

use super::super::mqtt::{Address, Link, LinkEvent, Outcome};
use super::manager::Manager;
use super::*;
use crate::config::MqttTls;

const NODE: &str = "6b034ec446528056c08b89ae";

struct Mosquitto {
    port: u16,
    process: Option<Child>,
}

impl Mosquitto {
    async fn start() -> Self {
        let mut mosquitto = Self::unused();
        mosquitto.up().await;
        mosquitto
    }

    fn unused() -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self { port, process: None }
    }

    async fn up(&mut self) {
        self.run(&["-p", &self.port.to_string()]).await;
    }

    async fn run(&mut self, arguments: &[&str]) {
        let process = Process::new("/usr/sbin/mosquitto")
            .args(arguments)
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
    let rounds = size("NODE_ENGINE_TEST_ROUNDS", 3);
    for _ in 0..rounds {
        mosquitto.kill().await;
        running.disconnected().await;
        mosquitto.up().await;
        let back = tokio::time::Instant::now();
        running.connected().await;
        assert!(back.elapsed() < Duration::from_secs(6), "reconnected {:?} after the broker was back", back.elapsed());
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

/// Passes bytes on: as fast as they come from the broker, a kilobyte a second towards it.
async fn slow(broker: u16) -> u16 {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((node, _)) = listener.accept().await {
            let broker = TcpStream::connect(("127.0.0.1", broker)).await.unwrap();
            let (mut from_node, mut to_node) = node.into_split();
            let (mut from_broker, mut to_broker) = broker.into_split();
            tokio::spawn(async move { tokio::io::copy(&mut from_broker, &mut to_node).await });
            tokio::spawn(async move {
                let mut bytes = [0; 100];
                while let Ok(count @ 1..) = from_node.read(&mut bytes).await {
                    if to_broker.write_all(&bytes[..count]).await.is_err() {
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(count as u64)).await;
                }
            });
        }
    });
    port
}

#[tokio::test]
#[ignore = "needs mosquitto"]
async fn a_broker_that_takes_a_kilobyte_a_second_holds_up_nobody() {
    let mosquitto = Mosquitto::start().await;
    let manager = Manager::start(slow(mosquitto.port).await, true).await;
    let mut running = start(config(manager.port));
    running.connected().await;
    // Far more than the sockets in between hold.
    let began = tokio::time::Instant::now();
    for number in 0..5_000 {
        running.say(status(&format!("s{number}"), Status::Failed)).await;
    }
    assert!(began.elapsed() < LONG, "whoever reports waits for the network: {:?}", began.elapsed());
    mosquitto.publish(&format!("nodes/{NODE}/control/deploy"), &job("web")).await;
    assert_eq!(running.deploy().await.id, instance("web"), "what the cluster says still comes in");
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
    let away = Duration::from_secs(size("NODE_ENGINE_TEST_AWAY", 12));
    tokio::time::sleep_until(outage + away).await;
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
    assert!(connected.unwrap() < away + Duration::from_secs(6), "reconnected after {connected:?}");
    // Once a minute, for as long as the broker stays away.
    let most = 2 + usize::try_from(away.as_secs() / 60).unwrap();
    assert!((2..=most).contains(&manager.registrations()), "{} registrations", manager.registrations());
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

/// Certificate authorities, and certificates of the first of them, made by the openssl program in `directory`.
async fn certificates(directory: &Path, names: &[&str]) {
    let openssl = async |arguments: &str| {
        let mut process = Process::new("openssl");
        process.args(arguments.split(' ')).current_dir(directory).stdout(Stdio::null()).stderr(Stdio::null());
        assert!(process.status().await.expect("openssl is installed").success(), "{arguments}");
    };
    for name in ["ca", "other"] {
        openssl(&format!(
            "req -x509 -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.crt -days 2 -subj /CN={name}"
        ))
        .await;
    }
    std::fs::write(directory.join("names"), "subjectAltName=IP:127.0.0.1").unwrap();
    for name in names {
        openssl(&format!("req -newkey rsa:2048 -nodes -keyout {name}.key -out {name}.csr -subj /CN={name}")).await;
        let sign = "-CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile names";
        openssl(&format!("x509 -req -in {name}.csr -out {name}.crt {sign}")).await;
    }
}

/// A broker with mutual TLS, whose certificate is `broker`, and whatever else `setup` says.
async fn with_tls(directory: &Path, setup: &str) -> Mosquitto {
    let mut mosquitto = Mosquitto::unused();
    let file = |name: &str| directory.join(name).display().to_string();
    let setup = format!(
        "listener {} 127.0.0.1\ncafile {}\ncertfile {}\nkeyfile {}\nrequire_certificate true\n{setup}\n",
        mosquitto.port,
        file("ca.crt"),
        file("broker.crt"),
        file("broker.key"),
    );
    std::fs::write(file("broker.conf"), setup).unwrap();
    for name in ["ca.crt", "broker.crt", "broker.key", "."] {
        use std::os::unix::fs::PermissionsExt;
        // Mosquitto gives up root before it reads them.
        let mode = std::fs::Permissions::from_mode(if name == "." { 0o755 } else { 0o644 });
        std::fs::set_permissions(file(name), mode).unwrap();
    }
    mosquitto.run(&["-c", &file("broker.conf")]).await;
    mosquitto
}

fn identity(directory: &Path, name: &str, authority: &str) -> MqttTls {
    let file = |kind: &str| directory.join(format!("{name}.{kind}"));
    MqttTls { certificate: file("crt"), key: file("key"), ca: Some(directory.join(format!("{authority}.crt"))) }
}

#[tokio::test]
#[ignore = "needs mosquitto and openssl"]
async fn a_broker_with_mutual_tls_lets_in_who_has_a_certificate() {
    let directory = tempfile::tempdir().unwrap();
    certificates(directory.path(), &["broker", "node"]).await;
    let mosquitto = with_tls(directory.path(), "allow_anonymous true").await;
    let manager = Manager::start(mosquitto.port, true).await;
    let tls = identity(directory.path(), "node", "ca");
    let mut running = start(ClusterConfig { mqtt_tls: Some(tls.clone()), ..config(manager.port) });
    running.connected().await;
    running.end().await;

    // Whoever the broker is: it is not the one whose authority this node was told of.
    let other = identity(directory.path(), "node", "other");
    let mut running = start(ClusterConfig { mqtt_tls: Some(other), ..config(manager.port) });
    running.registered().await;
    let trusted = timeout(Duration::from_secs(3), running.connected()).await;
    assert!(trusted.is_err(), "a broker of another authority is not believed");
    running.end().await;

    let keyless = MqttTls { key: directory.path().join("nowhere.key"), ..tls };
    let cluster = Cluster::new(ClusterConfig { mqtt_tls: Some(keyless), ..config(manager.port) }, node());
    let (commands, _heard) = channel(1);
    let (_say, reports) = channel(1);
    let error = Box::new(cluster).run(commands, reports, Drain::new(LONG)).await.unwrap_err();
    assert!(error.to_string().contains("nowhere.key"), "{error}");
}

/// By the list that operators are given: `docs/mosquitto.acl`.
#[tokio::test]
#[ignore = "needs mosquitto and openssl"]
async fn another_nodes_certificate_orders_nothing() {
    let directory = tempfile::tempdir().unwrap();
    certificates(directory.path(), &["broker", "cluster_manager", "node", "rogue"]).await;
    let list = directory.path().join("list");
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/mosquitto.acl"), &list).unwrap();
    let setup = format!("use_identity_as_username true\nacl_file {}", list.display());
    let mosquitto = with_tls(directory.path(), &setup).await;
    let manager = Manager::start(mosquitto.port, true).await;
    let tls = identity(directory.path(), "node", "ca");
    let mut running = start(ClusterConfig { mqtt_tls: Some(tls), ..config(manager.port) });
    running.connected().await;

    let topic = format!("nodes/{NODE}/control/deploy");
    let order = async |name: &str, job: &str, times: usize| {
        let tls = super::super::tls::client_config(&identity(directory.path(), name, "ca")).unwrap();
        let address =
            Address { host: "127.0.0.1".into(), port: mosquitto.port, client_id: name.into(), tls: Some(tls) };
        let mut link = Link::open(&address);
        assert!(matches!(timeout(LONG, link.event()).await.unwrap(), LinkEvent::Up));
        for _ in 0..times {
            let published = link.publish(topic.clone(), self::job(job)).unwrap();
            assert_eq!(timeout(LONG, published).await.unwrap(), Outcome::Acknowledged, "it is not told");
        }
    };
    order("rogue", "forged", 10_000).await;
    order("cluster_manager", "web", 1).await;
    assert_eq!(running.deploy().await.id, instance("web"), "the first order that was heard is the cluster's");
    // And what nodes say gets through.
    running.say(status("web", Status::Running)).await;
    running.end().await;
}
