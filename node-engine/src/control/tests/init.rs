//! A first-generation cluster manager: Socket.IO by hand, in the order of the real one, which asks before it confirms.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio_tungstenite::tungstenite::Message;

const QUESTION: &str = r#"42/init,["sc1",{"hello-edge":"please send your node info"}]"#;
const CONFIRMATION: &str = r#"40/init,{"sid":"weeVbizfpwE-68z-AAAB"}"#;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manner {
    WebSocket,
    /// Assigns no subnet: nodes ask its service manager for one.
    Between,
    /// Offers no upgrade.
    Polling,
    /// Offers one and does not carry it out.
    BrokenUpgrade,
    /// Never confirms the namespace.
    Unconfirmed,
    Refusing,
}

#[derive(Debug)]
pub(super) struct Init {
    pub(super) port: u16,
    state: Arc<State>,
}

#[derive(Debug)]
struct State {
    manner: Manner,
    answer: String,
    /// What is to be said, each as one polling answer.
    outgoing: Mutex<VecDeque<String>>,
    more: Notify,
    heard: Mutex<Vec<String>>,
}

impl Init {
    pub(super) async fn start(manner: Manner, broker_port: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let subnet = if manner == Manner::Between { "" } else { r#", "SUBNETWORK": "172.18.0.64""# };
        let document = format!(r#"{{"id": "node1", "MQTT_BROKER_PORT": "{broker_port}"{subnet}}}"#);
        let state = Arc::new(State {
            manner,
            answer: format!("42/init,{}", serde_json::json!(["sc2", document])),
            outgoing: Mutex::default(),
            more: Notify::new(),
            heard: Mutex::default(),
        });
        let shared = state.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, shared.clone()));
            }
        });
        Self { port, state }
    }

    /// Every packet the worker sent.
    pub(super) fn heard(&self) -> Vec<String> {
        self.state.heard.lock().unwrap().clone()
    }
}

impl State {
    fn say(&self, packets: &str) {
        self.outgoing.lock().unwrap().push_back(packets.to_owned());
        self.more.notify_one();
    }

    async fn next(&self) -> String {
        loop {
            let more = self.more.notified();
            if let Some(packets) = self.outgoing.lock().unwrap().pop_front() {
                return packets;
            }
            more.await;
        }
    }

    /// The conversation, whatever way it travels.
    fn hear(&self, packet: &str) {
        self.heard.lock().unwrap().push(packet.to_owned());
        if packet == "40/init," && self.manner == Manner::Refusing {
            self.say(r#"44/init,{"message":"not you"}"#);
        } else if packet == "40/init," {
            self.say(QUESTION);
            if self.manner != Manner::Unconfirmed {
                self.say(CONFIRMATION);
            }
        } else if packet.starts_with(r#"42/init,["cs1","#) {
            // Whoever does not answer a ping gets nothing.
            self.say("2");
        } else if packet == "3" {
            self.say(&format!("42/init,[\"odd\",1]\u{1e}{}", self.answer));
        }
    }
}

async fn serve(mut stream: TcpStream, state: Arc<State>) {
    let mut head = [0; 4096];
    let mut length = 0;
    while !head[..length].windows(4).any(|bytes| bytes == b"\r\n\r\n") {
        match stream.peek(&mut head).await {
            Ok(0) | Err(_) => return,
            Ok(more) if more == length => tokio::task::yield_now().await,
            Ok(more) => length = more,
        }
    }
    let text = String::from_utf8_lossy(&head[..length]).to_ascii_lowercase();
    if text.contains("upgrade: websocket") {
        if state.manner != Manner::BrokenUpgrade {
            by_socket(stream, state).await;
        }
        return;
    }
    by_polling(&mut stream, &state).await;
}

async fn by_socket(stream: TcpStream, state: Arc<State>) {
    let mut socket = tokio_tungstenite::accept_async(stream).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap().into_text().unwrap().as_str(), "2probe");
    socket.send(Message::text("3probe")).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap().into_text().unwrap().as_str(), "5");
    loop {
        tokio::select! {
            packets = state.next() => {
                for packet in packets.split('\u{1e}') {
                    if socket.send(Message::text(packet)).await.is_err() {
                        return;
                    }
                }
            }
            message = socket.next() => match message {
                Some(Ok(Message::Text(text))) => state.hear(&text),
                Some(Ok(_)) => {}
                _ => return,
            },
        }
    }
}

async fn by_polling(stream: &mut TcpStream, state: &State) {
    let mut request = Vec::new();
    let (head, body) = loop {
        let mut chunk = [0; 4096];
        let read = stream.read(&mut chunk).await.unwrap_or(0);
        if read == 0 {
            return;
        }
        request.extend_from_slice(&chunk[..read]);
        let text = String::from_utf8_lossy(&request).into_owned();
        if let Some((head, body)) = text.split_once("\r\n\r\n")
            && body.len() >= content_length(head)
        {
            break (head.to_owned(), body.to_owned());
        }
    };
    let answer = if let Some(path) = head.strip_prefix("GET /api/job/") {
        table(path.split('/').next().unwrap())
    } else if head.starts_with("POST") {
        body.split('\u{1e}').for_each(|packet| state.hear(packet));
        "ok".to_owned()
    } else if head.contains("&sid=") {
        state.next().await
    } else {
        assert!(head.contains("/socket.io/?transport=polling&EIO=4"), "{head}");
        let upgrades = if state.manner == Manner::Polling { "[]" } else { r#"["websocket"]"# };
        format!(r#"0{{"sid":"lv_VI97HAXpY6yYWAAAC","upgrades":{upgrades},"pingInterval":25000,"pingTimeout":20000}}"#)
    };
    let response = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{answer}", answer.len());
    let _ = stream.write_all(response.as_bytes()).await;
}

/// An answer of the service table, which does not repeat the question.
fn table(name: &str) -> String {
    format!(
        r#"{{"app_name":"{name}","instance_list":[{{"instance_number":0,"namespace_ip":"172.18.0.2","host_ip":"192.0.2.1",
            "host_port":50103,"service_ip":[{{"IpType":"RR","Address":"172.30.0.1"}}]}}]}}"#
    )
}

fn content_length(head: &str) -> usize {
    let value =
        head.lines().find_map(|line| line.to_ascii_lowercase().strip_prefix("content-length:").map(str::to_owned));
    value.and_then(|value| value.trim().parse().ok()).unwrap_or(0)
}
