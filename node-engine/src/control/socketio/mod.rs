//! The registration of first-generation clusters: a short Socket.IO conversation on namespace `/init` (protocol 1.2).
//!
//! The session begins with HTTP long-polling and moves to a WebSocket where the server offers one; where that does not work it
//! stays with polling. The server's first event comes *before* it confirms the namespace, so events count from the start.

mod frame;
mod transport;

use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tracing::debug;

use self::frame::{Message, Packet};
use self::transport::Transport;
pub(crate) use self::transport::TransportError;

const NAMESPACE: &str = "/init";

/// The whole conversation.
const LIMIT: Duration = Duration::from_secs(30);

/// How long the node's information waits for the server's confirmation and its question, where one of them stays out.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why a conversation came to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SocketIoError {
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error("the server refused the namespace: {0}")]
    Refused(String),
    #[error("the server ended the conversation")]
    Ended,
    #[error("no answer within {} seconds", LIMIT.as_secs())]
    Timeout,
}

/// Says `greeting` to the server at `base` (such as `http://host:10000`), and returns the text of its answer.
pub(super) async fn register(http: &reqwest::Client, base: &str, greeting: &str) -> Result<String, SocketIoError> {
    tokio::time::timeout(LIMIT, converse(http, base, greeting)).await.unwrap_or(Err(SocketIoError::Timeout))
}

async fn converse(http: &reqwest::Client, base: &str, greeting: &str) -> Result<String, SocketIoError> {
    let mut transport = Transport::open(http, base).await?;
    transport.send(frame::connect(NAMESPACE)).await?;
    let answer = answer(&mut transport, greeting).await?;
    // The server keeps what it said either way.
    if let Err(error) = transport.close(NAMESPACE).await {
        debug!(%error, "the registration's connection did not close cleanly");
    }
    Ok(answer)
}

async fn answer(transport: &mut Transport, greeting: &str) -> Result<String, SocketIoError> {
    let (mut confirmed, mut asked, mut said) = (false, false, false);
    let patience = Instant::now() + PATIENCE;
    loop {
        if !said && ((confirmed && asked) || Instant::now() >= patience) {
            transport.send(frame::event_text(NAMESPACE, "cs1", greeting)).await?;
            said = true;
        }
        let packet = if said {
            transport.receive().await?
        } else {
            match timeout_at(patience, transport.receive()).await {
                Ok(packet) => packet?,
                Err(_) => continue,
            }
        };
        match packet {
            Packet::Ping(text) => transport.send(frame::pong(&text)).await?,
            Packet::Close => return Err(SocketIoError::Ended),
            Packet::Message(message) => match message {
                Message::Connected { namespace } if namespace == NAMESPACE => confirmed = true,
                Message::Event { namespace, name, argument } if namespace == NAMESPACE => match name.as_str() {
                    "sc1" => asked = true,
                    "sc2" => return Ok(argument),
                    other => debug!(event = %other.escape_debug(), "an event that means nothing to a registration"),
                },
                Message::Refused { namespace, reason } if namespace == NAMESPACE => {
                    return Err(SocketIoError::Refused(crate::wire::json::excerpt(reason.as_bytes())));
                }
                Message::Disconnected { namespace } if namespace == NAMESPACE => return Err(SocketIoError::Ended),
                Message::Connected { .. }
                | Message::Event { .. }
                | Message::Refused { .. }
                | Message::Disconnected { .. }
                | Message::Other => {}
            },
            Packet::Open(_) | Packet::Pong | Packet::Noop | Packet::Other => {}
        }
    }
}

/// Every packet of a polling answer, for the fuzzer: is it understood?
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn understood(text: &str) -> Vec<bool> {
    frame::payload(text).map(|packet| packet.is_ok()).collect()
}
