//! How packets travel: by HTTP long-polling, or over a WebSocket that takes over the same session.

use std::collections::VecDeque;
use std::time::Duration;

use futures_util::future::BoxFuture;
use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::{self, protocol::WebSocketConfig};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};
use tracing::debug;

use super::frame::{self, FrameError, Handshake, MAX_PACKET, Packet};
use crate::control::http::{Answer, HttpError, ask};
use crate::wire::json::excerpt;

/// The longest polling answer: several packets.
const MAX_ANSWER: usize = 4 * MAX_PACKET;

/// For the WebSocket to open and prove itself.
const UPGRADE: Duration = Duration::from_secs(5);

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// What goes wrong between two packets.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TransportError {
    #[error(transparent)]
    Http(#[from] HttpError),
    #[error("the server answered {status}: {body}")]
    Status { status: u16, body: String },
    #[error("the server speaks no Engine.IO: {0}")]
    NoHandshake(String),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("the WebSocket failed: {0}")]
    Socket(#[from] Box<tungstenite::Error>),
    #[error("the WebSocket did not prove itself")]
    Unproved,
    #[error("silence for longer than the server's own ping time")]
    Silence,
    #[error("the server closed the connection")]
    Closed,
}

/// An open session.
pub(super) struct Transport {
    /// Packets that came together with the one already handed out.
    received: VecDeque<Packet>,
    silence: Duration,
    way: Way,
}

enum Way {
    Polling(Polling),
    Socket(Box<Socket>),
}

impl Transport {
    pub(super) async fn open(http: &reqwest::Client, base: &str) -> Result<Self, TransportError> {
        let url = format!("{base}/socket.io/?transport=polling&EIO=4");
        let text = accepted(ask(http.get(&url), MAX_ANSWER).await?)?;
        let mut received = VecDeque::new();
        for packet in frame::payload(&text) {
            received.push_back(packet.map_err(|_| TransportError::NoHandshake(excerpt(text.as_bytes())))?);
        }
        let Some(Packet::Open(handshake)) = received.pop_front() else {
            return Err(TransportError::NoHandshake(excerpt(text.as_bytes())));
        };
        let silence = handshake.ping_interval_ms.saturating_add(handshake.ping_timeout_ms).clamp(1_000, 120_000);
        let way = match upgrade(base, &handshake).await {
            Ok(socket) => Way::Socket(Box::new(socket)),
            Err(error) => {
                debug!(%error, "no WebSocket, registering by long-polling");
                Way::Polling(Polling { http: http.clone(), url: format!("{url}&sid={}", handshake.sid), asking: None })
            }
        };
        Ok(Self { received, silence: Duration::from_millis(silence), way })
    }

    pub(super) async fn send(&mut self, packet: String) -> Result<(), TransportError> {
        match &mut self.way {
            Way::Polling(polling) => polling.send(packet).await,
            Way::Socket(socket) => socket.send(packet.into()).await.map_err(|error| Box::new(error).into()),
        }
    }

    /// The next packet. Nothing is lost where the wait is given up.
    pub(super) async fn receive(&mut self) -> Result<Packet, TransportError> {
        loop {
            if let Some(packet) = self.received.pop_front() {
                return Ok(packet);
            }
            let text = match &mut self.way {
                Way::Polling(polling) => timeout(self.silence, polling.receive()).await,
                Way::Socket(socket) => timeout(self.silence, from_socket(socket)).await,
            };
            let text = text.map_err(|_| TransportError::Silence)??;
            for packet in frame::payload(&text) {
                match packet {
                    Ok(packet) => self.received.push_back(packet),
                    Err(error) => debug!(%error, packet = excerpt(text.as_bytes()), "a packet that cannot be read"),
                }
            }
        }
    }

    /// Leaves the namespace and ends the session.
    pub(super) async fn close(mut self, namespace: &str) -> Result<(), TransportError> {
        self.send(frame::disconnect(namespace)).await?;
        self.send(frame::CLOSE.to_owned()).await?;
        if let Way::Socket(socket) = &mut self.way {
            SinkExt::close(socket.as_mut()).await.map_err(Box::new)?;
        }
        Ok(())
    }
}

/// Moves the session to a WebSocket, as far as the server offers one.
async fn upgrade(base: &str, handshake: &Handshake) -> Result<Socket, TransportError> {
    let offered = handshake.upgrades.iter().any(|upgrade| upgrade == "websocket");
    // A first-generation cluster has no TLS; what stands in front of one may, and long-polling goes through that as well.
    let (true, Some(host)) = (offered, base.strip_prefix("http://")) else { return Err(TransportError::Unproved) };
    let url = format!("ws://{host}/socket.io/?transport=websocket&EIO=4&sid={}", handshake.sid);
    timeout(UPGRADE, prove(&url)).await.unwrap_or(Err(TransportError::Unproved))
}

async fn prove(url: &str) -> Result<Socket, TransportError> {
    let limits = WebSocketConfig::default().max_message_size(Some(MAX_PACKET)).max_frame_size(Some(MAX_PACKET));
    let (mut socket, _) =
        tokio_tungstenite::connect_async_with_config(url, Some(limits), true).await.map_err(Box::new)?;
    socket.send(frame::PROBE.into()).await.map_err(Box::new)?;
    if from_socket(&mut socket).await? != frame::PROBE_ANSWER {
        return Err(TransportError::Unproved);
    }
    socket.send(frame::UPGRADE.into()).await.map_err(Box::new)?;
    Ok(socket)
}

async fn from_socket(socket: &mut Socket) -> Result<String, TransportError> {
    loop {
        match socket.next().await {
            Some(Ok(tungstenite::Message::Text(text))) => return Ok(text.as_str().to_owned()),
            Some(Ok(tungstenite::Message::Close(_))) | None => return Err(TransportError::Closed),
            Some(Ok(_)) => {}
            Some(Err(error)) => return Err(Box::new(error).into()),
        }
    }
}

struct Polling {
    http: reqwest::Client,
    url: String,
    /// The question in hand. Kept, since giving it up would lose the packets of its answer.
    asking: Option<BoxFuture<'static, Result<Answer, HttpError>>>,
}

impl Polling {
    async fn send(&mut self, packet: String) -> Result<(), TransportError> {
        let request = self.http.post(&self.url).header("content-type", "text/plain;charset=UTF-8").body(packet);
        accepted(ask(request, MAX_ANSWER).await?).map(drop)
    }

    async fn receive(&mut self) -> Result<String, TransportError> {
        // The server holds the question until it has something to say, a ping at the latest.
        let request = self.http.get(&self.url).timeout(Duration::from_secs(120));
        let asking = self.asking.get_or_insert_with(|| Box::pin(ask(request, MAX_ANSWER)));
        let answer = asking.await;
        self.asking = None;
        accepted(answer?)
    }
}

fn accepted(answer: Answer) -> Result<String, TransportError> {
    if answer.status != 200 {
        return Err(TransportError::Status { status: answer.status, body: excerpt(&answer.body) });
    }
    String::from_utf8(answer.body).map_err(|error| TransportError::NoHandshake(excerpt(error.as_bytes())))
}
