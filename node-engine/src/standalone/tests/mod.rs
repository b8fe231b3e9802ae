//! The embedded cluster as nodes meet it: real broker, real HTTP, workers played by hand.

mod cluster;
mod documents;
mod node;
mod registration;
mod saved;
mod worker;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{Standalone, StandaloneConfig};
use crate::drain::Drain;

const WEB: &str = "app.default.web.test";

/// Longest a condition may take to come true; far more than it needs, for busy machines.
const PATIENCE: Duration = Duration::from_secs(30);

struct Started {
    standalone: Standalone,
    drain: Drain,
    broker: (String, u16),
}

fn config(state: &Path) -> StandaloneConfig {
    StandaloneConfig {
        listen: Ipv4Addr::LOCALHOST.into(),
        http_port: 0,
        socketio_port: 0,
        broker_port: 0,
        ..StandaloneConfig::new(state.to_owned())
    }
}

async fn start(config: StandaloneConfig) -> Started {
    let drain = Drain::new(Duration::from_secs(5));
    let host = config.broker.as_ref().map_or("127.0.0.1".to_owned(), |(host, _)| host.clone());
    let standalone = Standalone::start(config, drain.clone()).await.expect("the cluster starts");
    let broker = (host, standalone.broker_port);
    Started { standalone, drain, broker }
}

impl Started {
    async fn stop(self) {
        self.drain.begin();
        let ended = tokio::time::timeout(PATIENCE, self.standalone.task).await.expect("it ends");
        ended.expect("no panic").expect("no error");
    }

    /// The rows of the service that have addresses, by number.
    async fn rows(&self) -> Vec<u64> {
        let (status, body) = http(self.standalone.http, "GET", &format!("/api/job/{WEB}/instances"), "").await;
        assert_eq!(status, 200);
        let table: Value = serde_json::from_str(&body).expect("JSON");
        let rows = table["instance_list"].as_array().expect("a list").iter();
        rows.filter(|row| row.get("namespace_ip").is_some()).filter_map(|row| row["instance_number"].as_u64()).collect()
    }
}

fn web() -> Vec<u8> {
    json!({ "job_name": WEB, "image": "docker.io/library/nginx:alpine", "virtualization": "container", "memory": 100 })
        .to_string()
        .into_bytes()
}

/// One request on a connection of its own.
async fn http(address: SocketAddr, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.expect("a connection");
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.expect("an answer");
    let answer = String::from_utf8(answer).expect("text");
    let (head, body) = answer.split_once("\r\n\r\n").expect("head and body");
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    (status, body.to_owned())
}

/// Waits until it is so.
async fn until<F: Future<Output = bool>>(what: &str, mut so: impl FnMut() -> F) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !so().await {
        assert!(tokio::time::Instant::now() < deadline, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
