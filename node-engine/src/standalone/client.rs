//! The manager's own connection to the broker. Two tasks and no decisions: one takes in what nodes publish, one publishes what
//! the manager says, so that neither waits for the other.

use std::time::Duration;

use rumqttc::{AsyncClient, Event, MqttOptions, Packet, PublishOptions, QoS, SubscribeFilter};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::sleep;

use crate::wire::FromNode;

/// Common messages for the cluster come here; what came of them is published under [`RESULT`].
pub(super) const COMMAND: &str = "cluster/command";
pub(super) const RESULT: &str = "cluster/command/result";

/// Longer than what the broker lets through.
const MAX_PACKET: usize = 2 * 1024 * 1024;

/// Publications waiting for their acknowledgement, and for being sent.
const INFLIGHT: u16 = 100;
const QUEUE: usize = 64;

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A message of a node, as it came.
#[derive(Debug)]
pub(super) struct Heard {
    pub(super) topic: String,
    pub(super) payload: bytes::Bytes,
}

/// What is to be published.
#[derive(Debug)]
pub(super) struct Said {
    pub(super) topic: String,
    pub(super) payload: String,
}

/// Runs the connection for as long as the receiver of `heard` and the sender of `said` live, reconnecting for ever.
/// `subscribed` says whether the broker has taken the subscriptions of the present connection.
pub(super) fn start(
    client_id: &str,
    (host, port): (String, u16),
    heard: mpsc::Sender<Heard>,
    said: mpsc::Receiver<Said>,
    subscribed: watch::Sender<bool>,
) -> JoinSet<()> {
    let mut options = MqttOptions::new(client_id, (host, port));
    options
        .set_keep_alive(5)
        .set_clean_session(true)
        .set_inflight(INFLIGHT)
        .set_max_packet_size(MAX_PACKET, MAX_PACKET);
    let (client, events) = AsyncClient::builder(options).capacity(QUEUE).build();
    let mut tasks = JoinSet::new();
    tasks.spawn(publish(client.clone(), said, subscribed.subscribe()));
    tasks.spawn(receive(client, events, heard, subscribed));
    tasks
}

async fn receive(
    client: AsyncClient,
    mut events: rumqttc::EventLoop,
    heard: mpsc::Sender<Heard>,
    subscribed: watch::Sender<bool>,
) {
    let mut pause = FIRST_PAUSE;
    loop {
        match events.poll().await {
            Ok(Event::Incoming(Packet::ConnAck(_))) => {
                pause = FIRST_PAUSE;
                // The queue is bounded and this task empties it: it must not wait for room itself.
                if client.try_subscribe_many(filters()).is_err() {
                    let client = client.clone();
                    tokio::spawn(async move { client.subscribe_many(filters()).await });
                }
            }
            Ok(Event::Incoming(Packet::SubAck(_))) => drop(subscribed.send_replace(true)),
            Ok(Event::Incoming(Packet::Publish(publish))) => {
                let Ok(topic) = String::from_utf8(publish.topic.to_vec()) else { continue };
                if heard.send(Heard { topic, payload: publish.payload }).await.is_err() {
                    return;
                }
            }
            Ok(_) => {}
            Err(error) => {
                if subscribed.send_replace(false) {
                    tracing::warn!(%error, "the connection to the broker is lost");
                }
                if heard.is_closed() {
                    return;
                }
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

/// Publishes in order, and only while the broker listens. What was under way when a connection broke may be lost; the manager's
/// timers make up for it.
async fn publish(client: AsyncClient, mut said: mpsc::Receiver<Said>, mut subscribed: watch::Receiver<bool>) {
    while let Some(Said { topic, payload }) = said.recv().await {
        if subscribed.wait_for(|subscribed| *subscribed).await.is_err() {
            return;
        }
        let options = PublishOptions::new(QoS::AtLeastOnce);
        if let Err(error) = client.publish(topic, payload.into_bytes(), options).await {
            tracing::warn!(%error, "a message cannot be published");
        }
    }
}

fn filters() -> Vec<SubscribeFilter> {
    let topics = FromNode::SUBSCRIPTIONS.iter().chain([&COMMAND]);
    topics.map(|topic| SubscribeFilter::new((*topic).to_owned(), QoS::AtLeastOnce)).collect()
}
