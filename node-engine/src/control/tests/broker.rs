//! An MQTT broker for one client, that can be told to misbehave. It holds every message up to the rules of [`harmless`].

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use rumqttc::QoS;
use rumqttc::mqttbytes::Error;
use rumqttc::mqttbytes::v4::{
    ConnAck, ConnectReturnCode, Packet, PubAck, Publish, SubAck, SubscribeReasonCode, UnsubAck,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{broadcast, mpsc};
use tokio::time::{Instant, sleep_until, timeout};

use super::{LONG, harmless};

#[derive(Debug)]
pub(super) enum Seen {
    Connected { client_id: String, clean: bool, will: bool },
    Subscribed(Vec<String>),
    Unsubscribed(Vec<String>),
    Published { topic: String, payload: String },
    Harm(String),
}

#[derive(Clone, Debug)]
enum Act {
    Publish(Publish),
    HangUp,
}

pub(super) struct Broker {
    pub(super) port: u16,
    seen: mpsc::UnboundedReceiver<Seen>,
    acts: broadcast::Sender<Act>,
    pub(super) switches: Arc<Switches>,
}

/// What the broker does not do, as long as it is set.
#[derive(Debug, Default)]
pub(super) struct Switches {
    pub(super) refuse: AtomicBool,
    pub(super) keep_acks: AtomicBool,
    /// Acknowledgements of what is published wait for so many milliseconds.
    pub(super) late: AtomicU64,
}

impl Broker {
    pub(super) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (sender, seen) = mpsc::unbounded_channel();
        let (acts, _) = broadcast::channel(8192);
        let switches = Arc::<Switches>::default();
        let (orders, rules) = (acts.clone(), switches.clone());
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if !rules.refuse.load(Ordering::Relaxed) {
                    tokio::spawn(serve(stream, sender.clone(), orders.subscribe(), rules.clone()));
                }
            }
        });
        Self { port, seen, acts, switches }
    }

    /// The next thing seen that `want` wants; others are passed over, harm never.
    pub(super) async fn see<T>(&mut self, what: &str, mut want: impl FnMut(Seen) -> Option<T>) -> T {
        let seeing = async {
            loop {
                match self.seen.recv().await.expect("the broker runs") {
                    Seen::Harm(harm) => panic!("{harm}"),
                    seen => {
                        if let Some(wanted) = want(seen) {
                            return wanted;
                        }
                    }
                }
            }
        };
        timeout(LONG, seeing).await.unwrap_or_else(|_| panic!("never seen: {what}"))
    }

    pub(super) async fn connection(&mut self) -> String {
        self.see("a connection", |seen| match seen {
            Seen::Connected { client_id, clean, will } => {
                assert!(clean && !will);
                Some(client_id)
            }
            _ => None,
        })
        .await
    }

    pub(super) async fn subscription(&mut self, topic: &str) {
        self.see(topic, |seen| match seen {
            Seen::Subscribed(topics) => topics.iter().any(|other| other == topic).then_some(()),
            _ => None,
        })
        .await;
    }

    /// The next subscription to exactly these topics.
    pub(super) async fn subscriptions(&mut self, wanted: &[String]) {
        self.see("these topics", |seen| match seen {
            Seen::Subscribed(topics) => (topics == wanted).then_some(()),
            _ => None,
        })
        .await;
    }

    pub(super) async fn unsubscription(&mut self, topic: &str) {
        self.see(topic, |seen| match seen {
            Seen::Unsubscribed(topics) => topics.iter().any(|other| other == topic).then_some(()),
            _ => None,
        })
        .await;
    }

    /// The payload of the next message on a topic.
    pub(super) async fn message(&mut self, wanted: &str) -> String {
        self.see(wanted, |seen| match seen {
            Seen::Published { topic, payload } => (topic == wanted).then_some(payload),
            _ => None,
        })
        .await
    }

    /// The status of the next status report.
    pub(super) async fn status(&mut self, node: &str) -> (String, String) {
        let text = self.message(&format!("nodes/{node}/job")).await;
        let document: serde_json::Value = serde_json::from_str(&text).unwrap();
        let member = |name: &str| document[name].as_str().unwrap().to_owned();
        (member("sname"), member("status"))
    }

    pub(super) fn publish(&self, topic: &str, payload: impl Into<Vec<u8>>) {
        self.acts.send(Act::Publish(Publish::new(topic, QoS::AtMostOnce, payload))).expect("somebody is connected");
    }

    pub(super) fn hang_up(&self) {
        let _ = self.acts.send(Act::HangUp);
    }
}

async fn serve(
    mut stream: TcpStream,
    seen: mpsc::UnboundedSender<Seen>,
    mut acts: broadcast::Receiver<Act>,
    switches: Arc<Switches>,
) {
    let mut buffer = BytesMut::new();
    let mut late: VecDeque<(Instant, Packet)> = VecDeque::new();
    loop {
        loop {
            let packet = match Packet::read(&mut buffer, 1 << 24) {
                Ok(packet) => packet,
                Err(Error::InsufficientBytes(_)) => break,
                Err(_) => return,
            };
            let Some(answer) = answer(packet, &seen, &switches) else { continue };
            let wait = Duration::from_millis(switches.late.load(Ordering::Relaxed));
            if matches!(answer, Packet::PubAck(_)) && !wait.is_zero() {
                late.push_back((Instant::now() + wait, answer));
            } else if send(&mut stream, &answer).await.is_err() {
                return;
            }
        }
        let due = late.front().map(|(due, _)| *due);
        tokio::select! {
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                if let Some((_, answer)) = late.pop_front()
                    && send(&mut stream, &answer).await.is_err()
                {
                    return;
                }
            }
            read = stream.read_buf(&mut buffer) => if !matches!(read, Ok(1..)) { return },
            act = acts.recv() => match act {
                Ok(Act::Publish(publish)) => if send(&mut stream, &Packet::Publish(publish)).await.is_err() { return },
                Ok(Act::HangUp) | Err(_) => return,
            },
        }
    }
}

async fn send(stream: &mut TcpStream, packet: &Packet) -> std::io::Result<()> {
    let mut bytes = BytesMut::new();
    packet.write(&mut bytes, usize::MAX).expect("a small packet");
    stream.write_all(&bytes).await
}

fn answer(packet: Packet, seen: &mpsc::UnboundedSender<Seen>, switches: &Switches) -> Option<Packet> {
    match packet {
        Packet::Connect(connect) => {
            let _ = seen.send(Seen::Connected {
                client_id: connect.client_id,
                clean: connect.clean_session,
                will: connect.last_will.is_some(),
            });
            Some(Packet::ConnAck(ConnAck::new(ConnectReturnCode::Success, false)))
        }
        Packet::Subscribe(subscribe) => {
            assert!(subscribe.filters.iter().all(|filter| filter.qos == QoS::AtLeastOnce));
            let granted = vec![SubscribeReasonCode::Success(QoS::AtLeastOnce); subscribe.filters.len()];
            let _ = seen.send(Seen::Subscribed(subscribe.filters.into_iter().map(|filter| filter.path).collect()));
            Some(Packet::SubAck(SubAck::new(subscribe.pkid, granted)))
        }
        Packet::Unsubscribe(unsubscribe) => {
            let _ = seen.send(Seen::Unsubscribed(unsubscribe.topics));
            Some(Packet::UnsubAck(UnsubAck::new(unsubscribe.pkid)))
        }
        Packet::Publish(publish) => {
            let topic = String::from_utf8(publish.topic.to_vec()).unwrap();
            let harm = harmless(&topic, &publish.payload).err();
            let harm =
                harm.or_else(|| (publish.retain || publish.qos != QoS::AtLeastOnce).then(|| format!("{topic}: flags")));
            let payload = String::from_utf8_lossy(&publish.payload).into_owned();
            let _ = seen.send(harm.map_or(Seen::Published { topic, payload }, Seen::Harm));
            let acks = !switches.keep_acks.load(Ordering::Relaxed);
            acks.then(|| Packet::PubAck(PubAck::new(publish.pkid)))
        }
        Packet::PingReq => Some(Packet::PingResp),
        _ => None,
    }
}
