//! The MQTT client's one address: a connection to the broker that lives once.
//!
//! A [`Link`] is opened, carries messages, and ends for good with its connection; whoever opened it opens the next. So nothing of
//! an old session (packet ids, half-sent messages) reaches a new one, and what to send again is decided in one place, not two.
//! The client's event loop runs in a task of its own and is never cancelled half-way, since that could lose a message it has
//! already taken.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{BoxFuture, FutureExt};
use rumqttc::{
    AckMode, AsyncClient, Broker, Event, EventLoop, ManualAck, MqttOptions, Packet, Publish, PublishOptions, QoS,
    SubscribeFilterInput, SubscribeNoticeError, TlsConfiguration, Transport,
};
use rustls::ClientConfig;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::wire::json::MAX_DOCUMENT;

/// The broker takes a silent node for dead after one and a half of this.
const KEEP_ALIVE_SECONDS: u16 = 20;

/// How long an acknowledgement may be outstanding while nothing at all is heard.
pub(super) const SILENCE: Duration = Duration::from_secs(KEEP_ALIVE_SECONDS as u64 * 3 / 2);

/// Operations on their way at once.
pub(super) const WINDOW: usize = 64;

/// The client's own queue: every operation on its way, and the acknowledgements of what brokers send at once (100 and less).
const QUEUE: usize = 4 * WINDOW;

/// A longer packet ends the connection. Far above what is ever read (`wire` refuses most of it), so that an oversized message
/// costs a line in the log and not the session with everything that is sent meanwhile.
const MAX_INCOMING: usize = 16 * 1024 * 1024;
const MAX_OUTGOING: usize = 4 * 1024 * 1024;

/// Messages the broker sent that nobody has taken yet. While it is full nothing more is read.
const INCOMING: usize = 16;

/// Where the broker is and who we are to it.
#[derive(Clone)]
pub(super) struct Address {
    pub(super) host: String,
    pub(super) port: u16,
    pub(super) client_id: String,
    pub(super) tls: Option<Arc<ClientConfig>>,
}

/// What a link tells, in order: `Up` once, messages, `Down` once. After `Down` nothing.
#[derive(Debug)]
pub(super) enum LinkEvent {
    Up,
    Message {
        topic: String,
        payload: Bytes,
        receipt: Unacknowledged,
    },
    /// A message longer than any that is read; its content is gone already.
    TooLong {
        topic: String,
        size: usize,
        receipt: Unacknowledged,
    },
    Down(String),
}

/// What the broker waits to hear of a message; nothing for one of quality 0. A broker that hears nothing sends it again to the next
/// connection, if it keeps sessions at all.
#[derive(Debug, Default)]
pub(super) struct Unacknowledged(Option<ManualAck>);

impl Unacknowledged {
    pub(super) fn is_waited_for(&self) -> bool {
        self.0.is_some()
    }
}

/// How an operation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Acknowledged,
    /// The broker answered that it does not want it.
    Refused,
    /// The connection ended first.
    Lost,
}

/// Why an operation was not even queued. The link ends soon after, or has.
#[derive(Debug, thiserror::Error)]
#[error("the broker connection takes no more: {0}")]
pub(super) struct LinkError(String);

pub(super) struct Link {
    client: AsyncClient,
    events: mpsc::Receiver<LinkEvent>,
    pump: JoinHandle<()>,
    over: bool,
}

impl Link {
    pub(super) fn open(address: &Address) -> Self {
        let mut options = MqttOptions::new(&address.client_id, Broker::tcp(bracketed(&address.host), address.port));
        options
            .set_keep_alive(KEEP_ALIVE_SECONDS)
            .set_clean_session(true)
            .set_inflight(WINDOW as u16)
            .set_ack_mode(AckMode::Manual)
            .set_max_packet_size(MAX_INCOMING, MAX_OUTGOING);
        if let Some(tls) = &address.tls {
            options.set_transport(Transport::tls_with_config(TlsConfiguration::Rustls(tls.clone())));
        }
        let (client, mut event_loop) = AsyncClient::builder(options).capacity(QUEUE).build();
        let mut network = event_loop.network_options();
        network.set_tcp_nodelay(true);
        network.set_connection_timeout(10);
        event_loop.set_network_options(network);
        let (sender, events) = mpsc::channel(INCOMING);
        let pump = tokio::spawn(pump(event_loop, client.clone(), sender));
        Self { client, events, pump, over: false }
    }

    /// The next event. Nothing is lost where the wait is given up.
    pub(super) async fn event(&mut self) -> LinkEvent {
        if self.over {
            return std::future::pending().await;
        }
        let event = self.events.recv().await.unwrap_or_else(|| LinkEvent::Down("the client ended".into()));
        self.over = matches!(event, LinkEvent::Down(_));
        event
    }

    /// Publishes at QoS 1, unretained.
    pub(super) fn publish(&self, topic: String, payload: String) -> Result<BoxFuture<'static, Outcome>, LinkError> {
        let notice = self.client.try_publish_tracked(topic, payload, PublishOptions::new(QoS::AtLeastOnce));
        let notice = notice.map_err(|error| LinkError(error.to_string()))?;
        let outcome = async move {
            match notice.wait_completion_async().await {
                Ok(()) => Outcome::Acknowledged,
                Err(_) => Outcome::Lost,
            }
        };
        Ok(outcome.boxed())
    }

    /// Subscribes at QoS 1. Refused where the broker grants one of them not.
    pub(super) fn subscribe(&self, filters: Vec<String>) -> Result<BoxFuture<'static, Outcome>, LinkError> {
        let filters = filters.into_iter().map(|filter| SubscribeFilterInput::new(filter, QoS::AtLeastOnce));
        let notice = self.client.try_subscribe_many_tracked(filters).map_err(|error| LinkError(error.to_string()))?;
        let outcome = async move {
            match notice.wait_completion_async().await {
                Ok(()) => Outcome::Acknowledged,
                Err(SubscribeNoticeError::V4SubAckFailure(_)) => Outcome::Refused,
                Err(_) => Outcome::Lost,
            }
        };
        Ok(outcome.boxed())
    }

    pub(super) fn unsubscribe(&self, filter: String) -> Result<BoxFuture<'static, Outcome>, LinkError> {
        let notice = self.client.try_unsubscribe_tracked(filter).map_err(|error| LinkError(error.to_string()))?;
        let outcome = async move {
            match notice.wait_completion_async().await {
                Ok(()) => Outcome::Acknowledged,
                Err(_) => Outcome::Lost,
            }
        };
        Ok(outcome.boxed())
    }

    /// Tells the broker that a message has arrived for good.
    pub(super) fn acknowledge(&self, receipt: Unacknowledged) -> Result<(), LinkError> {
        let Some(receipt) = receipt.0 else { return Ok(()) };
        self.client.try_manual_ack(receipt).map_err(|error| LinkError(error.to_string()))
    }

    /// Says goodbye, so that the broker does not wait for a dead connection.
    pub(super) async fn close(mut self, limit: Duration) {
        if self.client.try_disconnect_with_timeout(limit).is_ok() {
            let drained = async { while self.events.recv().await.is_some() {} };
            let _ = tokio::time::timeout(limit, drained).await;
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.pump.abort();
    }
}

fn bracketed(host: &str) -> String {
    if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host.to_owned() }
}

async fn pump(mut event_loop: EventLoop, client: AsyncClient, events: mpsc::Sender<LinkEvent>) {
    loop {
        let event = match event_loop.poll().await {
            Ok(Event::Incoming(Packet::ConnAck(_))) => LinkEvent::Up,
            Ok(Event::Incoming(Packet::Publish(publish))) => {
                let receipt = Unacknowledged(client.prepare_ack(&publish));
                message(&publish, receipt)
            }
            Ok(_) => continue,
            Err(error) => LinkEvent::Down(error.to_string()),
        };
        let over = matches!(event, LinkEvent::Down(_));
        if events.send(event).await.is_err() || over {
            return;
        }
    }
}

fn message(publish: &Publish, receipt: Unacknowledged) -> LinkEvent {
    let topic = String::from_utf8_lossy(&publish.topic).into_owned();
    match publish.payload.len() {
        // Not a slice: that would keep the whole read buffer for as long as the message waits.
        0..=MAX_DOCUMENT => LinkEvent::Message { topic, payload: Bytes::copy_from_slice(&publish.payload), receipt },
        size => LinkEvent::TooLong { topic, size, receipt },
    }
}
