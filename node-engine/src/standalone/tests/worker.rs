//! A worker of the newest generation, played from the examples of the protocol.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rumqttc::{AsyncClient, Event, MqttOptions, Packet, PublishOptions, QoS};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::{WEB, http, until};

pub(super) struct Worker {
    pub(super) id: String,
    pub(super) client: AsyncClient,
    state: Arc<Mutex<State>>,
    _tasks: JoinSet<()>,
}

#[derive(Default)]
struct State {
    heard: Vec<(String, Value)>,
    running: BTreeSet<u64>,
    obeys: bool,
    subscribed: bool,
}

impl Worker {
    /// Registers by HTTP and reports every 200 ms. One that obeys brings up and takes down what it is told.
    pub(super) async fn start(host: &str, cluster: SocketAddr, broker: &(String, u16), obeys: bool) -> Self {
        let body = json!({ "id": "", "host": host, "ip": "192.0.2.11", "port": "3000", "architecture": "amd64",
            "vcpus": 4, "memory": 4000, "cpu_percent": 7.5, "virtualization": ["docker"], "csi_drivers": null });
        let (status, answer) = http(cluster, "POST", "/api/node/register", &body.to_string()).await;
        assert_eq!(status, 200, "{answer}");
        let answer: Value = serde_json::from_str(&answer).expect("JSON");
        assert_eq!(answer["MQTT_BROKER_PORT"], broker.1.to_string());
        let id = answer["id"].as_str().expect("a text").to_owned();
        assert!(id.len() == 24 && id.bytes().all(|byte| byte.is_ascii_hexdigit()), "{id}");
        Self::connect(id, broker, obeys).await
    }

    pub(super) async fn connect(id: String, (host, port): &(String, u16), obeys: bool) -> Self {
        let mut options = MqttOptions::new(format!("{id}-ne"), (host.clone(), *port));
        options.set_keep_alive(30).set_max_packet_size(2 << 20, 2 << 20);
        let (client, events) = AsyncClient::builder(options).capacity(256).build();
        let state = Arc::new(Mutex::new(State { obeys, ..State::default() }));
        let mut tasks = JoinSet::new();
        tasks.spawn(listen(id.clone(), client.clone(), events, state.clone()));
        let worker = Self { id, client, state, _tasks: tasks };
        for topic in ["control/+", "net/subnetwork/result", "net/tablequery/result"] {
            let topic = format!("nodes/{}/{topic}", worker.id);
            worker.client.subscribe(topic, QoS::AtLeastOnce).await.expect("queued");
        }
        until("subscribed", async || worker.state.lock().unwrap().subscribed).await;
        worker.report();
        worker
    }

    fn report(&self) {
        let (id, client, state) = (self.id.clone(), self.client.clone(), Arc::downgrade(&self.state));
        tokio::spawn(async move {
            while let Some(state) = state.upgrade() {
                let running: Vec<Value> = state.lock().unwrap().running.iter().map(listed).collect();
                drop(state);
                let usage = json!({ "cpu_percent": 7.5, "memory_percent": 20.0, "memory": 4000, "ip": "", "port": "" });
                say(&client, &id, "information", &usage).await;
                say(&client, &id, "jobs/resources", &json!({ "services": running })).await;
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        });
    }

    pub(super) async fn say(&self, topic: &str, payload: &Value) {
        say(&self.client, &self.id, topic, payload).await;
    }

    pub(super) async fn ask_table(&self, name: &str, address: &str) -> Value {
        self.forget("net/tablequery/result");
        self.say("net/tablequery/request", &json!({ "sname": name, "sip": address })).await;
        self.hears("net/tablequery/result", |_| true).await
    }

    /// Waits for a message whose topic ends so.
    pub(super) async fn hears(&self, topic: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let find = || {
            let state = self.state.lock().unwrap();
            let mut found = state.heard.iter().filter(|(heard, _)| heard.ends_with(topic));
            found.find(|(_, payload)| wanted(payload)).map(|(_, payload)| payload.clone())
        };
        until(topic, async || find().is_some()).await;
        find().expect("it was there")
    }

    pub(super) fn count(&self, topic: &str) -> usize {
        self.state.lock().unwrap().heard.iter().filter(|(heard, _)| heard.ends_with(topic)).count()
    }

    pub(super) fn forget(&self, topic: &str) {
        self.state.lock().unwrap().heard.retain(|(heard, _)| !heard.ends_with(topic));
    }

    pub(super) fn running(&self) -> Vec<u64> {
        self.state.lock().unwrap().running.iter().copied().collect()
    }

    /// From now on it lists this too, whoever wanted it.
    pub(super) fn runs(&self, number: u64) {
        self.state.lock().unwrap().running.insert(number);
    }
}

fn listed(number: &u64) -> Value {
    json!({ "cpu_percent": "1.500000", "memory_percent": "0.200000", "disk": "1000", "logs": "hello",
        "job_name": WEB, "virtualization": "docker", "instance": number })
}

async fn say(client: &AsyncClient, id: &str, topic: &str, payload: &Value) {
    let options = PublishOptions::new(QoS::AtLeastOnce);
    let _ = client.publish(format!("nodes/{id}/{topic}"), payload.to_string().into_bytes(), options).await;
}

async fn listen(id: String, client: AsyncClient, mut events: rumqttc::EventLoop, state: Arc<Mutex<State>>) {
    let mut acknowledged = 0;
    loop {
        match events.poll().await {
            Ok(Event::Incoming(Packet::SubAck(_))) => {
                acknowledged += 1;
                state.lock().unwrap().subscribed = acknowledged >= 3;
            }
            Ok(Event::Incoming(Packet::Publish(publish))) => {
                let topic = String::from_utf8(publish.topic.to_vec()).expect("text");
                let payload: Value = serde_json::from_slice(&publish.payload).unwrap_or_default();
                state.lock().unwrap().heard.push((topic.clone(), payload.clone()));
                if state.lock().unwrap().obeys {
                    tokio::spawn(obey(id.clone(), client.clone(), topic, payload, state.clone()));
                }
            }
            Ok(_) => {}
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
    }
}

async fn obey(id: String, client: AsyncClient, topic: String, payload: Value, state: Arc<Mutex<State>>) {
    let number = payload["instance_number"].as_u64().unwrap_or_default();
    let report = |status: &str| json!({ "sname": WEB, "status": status, "status_detail": "", "instance": number, "publicip": "" });
    if topic.ends_with("control/deploy") {
        assert_eq!(payload["job_name"], WEB);
        say(&client, &id, "job", &report("CREATING")).await;
        let notice = json!({ "appname": WEB, "status": "DEPLOYED", "instance_number": number,
            "nsip": format!("10.18.0.{}", 2 + number), "nsipv6": format!("fc00::{}", 2 + number),
            "host_port": "50103", "host_ip": "192.0.2.11" });
        say(&client, &id, "net/service/deployed", &notice).await;
        say(&client, &id, "job", &report("CREATED")).await;
        state.lock().unwrap().running.insert(number);
    } else if topic.ends_with("control/delete") {
        state.lock().unwrap().running.remove(&number);
        say(&client, &id, "job", &report("UNDEPLOYED")).await;
    }
}
