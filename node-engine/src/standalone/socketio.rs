//! Registration over Socket.IO, the way of the first generation: Engine.IO 4 by polling and by WebSocket, the one namespace
//! `/init`, and a conversation of four messages in which `sc1` comes before the namespace is acknowledged.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{ConnectInfo, DefaultBodyLimit, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use futures_util::{SinkExt, StreamExt};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Message, Role, WebSocketConfig};

use crate::wire::json::{MAX_DOCUMENT, Members, excerpt};

use super::http::{self, Door};

const PING_INTERVAL: Duration = Duration::from_secs(25);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// Conversations at a time. Each takes seconds; who comes beyond that is asked to come again.
const MAX_SESSIONS: usize = 1024;

/// What may wait for whoever polls; a conversation needs half a dozen.
const MOST_WAITING: usize = 64;

/// Packets of one polling payload are separated by this.
const RECORD_SEPARATOR: char = '\u{1e}';

/// `/socket.io/` and the first generation's tables.
pub(super) fn router(door: Door) -> Router {
    let state = Server { door: door.clone(), sessions: Arc::default() };
    Router::new()
        .route("/socket.io/", get(open_or_poll).post(take_payload))
        .layer(DefaultBodyLimit::max(MAX_DOCUMENT))
        .with_state(state)
        .merge(http::tables(door))
}

#[derive(Clone)]
struct Server {
    door: Door,
    sessions: Arc<Mutex<HashMap<String, Arc<Session>>>>,
}

/// One conversation, whatever carries it.
struct Session {
    peer: IpAddr,
    packets: Mutex<VecDeque<String>>,
    more: Notify,
    touched: Mutex<Instant>,
}

#[derive(Deserialize)]
struct Parameters {
    #[serde(rename = "EIO")]
    version: Option<String>,
    transport: Option<String>,
    sid: Option<String>,
}

async fn open_or_poll(
    State(server): State<Server>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    Query(parameters): Query<Parameters>,
    headers: HeaderMap,
    request: Request,
) -> Response {
    if parameters.version.as_deref() != Some("4") {
        return bad_request("unsupported version: Engine.IO 4 is spoken here");
    }
    let (sid, session) = match &parameters.sid {
        Some(sid) => match server.session(sid) {
            Some(session) => (sid.clone(), session),
            None => return bad_request("unknown session"),
        },
        None => match server.open(peer.ip()) {
            Ok(opened) => opened,
            Err(Crowded) => return StatusCode::SERVICE_UNAVAILABLE.into_response(),
        },
    };
    match parameters.transport.as_deref() {
        Some("websocket") => upgrade(server, sid, session, parameters.sid.is_some(), &headers, request),
        Some("polling") => session.poll().await.into_response(),
        _ => bad_request("unknown transport"),
    }
}

async fn take_payload(State(server): State<Server>, Query(parameters): Query<Parameters>, body: Bytes) -> Response {
    let Some((sid, session)) = parameters.sid.and_then(|sid| server.session(&sid).map(|session| (sid, session))) else {
        return bad_request("unknown session");
    };
    let Ok(payload) = std::str::from_utf8(&body) else { return bad_request("not UTF-8 text") };
    for packet in payload.split(RECORD_SEPARATOR) {
        if server.take(&session, packet).await == After::Close {
            server.close(&sid);
            break;
        }
        // Each packet may have an answer, and who says much may listen to none.
        if session.waiting() > MOST_WAITING {
            server.close(&sid);
            return bad_request("too much is said without listening");
        }
    }
    "ok".into_response()
}

fn bad_request(reason: &'static str) -> Response {
    (StatusCode::BAD_REQUEST, reason).into_response()
}

struct Crowded;

#[derive(Debug, PartialEq, Eq)]
enum After {
    GoOn,
    Close,
}

impl Server {
    fn open(&self, peer: IpAddr) -> Result<(String, Arc<Session>), Crowded> {
        let sid = super::random_id().map_err(|_| Crowded)?.to_string();
        let session = Arc::new(Session {
            peer,
            packets: Mutex::default(),
            more: Notify::new(),
            touched: Mutex::new(Instant::now()),
        });
        session.say(&format!(
            "0{}",
            json!({
                "sid": sid,
                "upgrades": ["websocket"],
                "pingInterval": PING_INTERVAL.as_millis() as u64,
                "pingTimeout": PING_TIMEOUT.as_millis() as u64,
                "maxPayload": MAX_DOCUMENT,
            })
        ));
        let mut sessions = lock(&self.sessions);
        sessions.retain(|_, session| lock(&session.touched).elapsed() < PING_INTERVAL + PING_TIMEOUT);
        if sessions.len() >= MAX_SESSIONS {
            return Err(Crowded);
        }
        sessions.insert(sid.clone(), Arc::clone(&session));
        Ok((sid, session))
    }

    fn session(&self, sid: &str) -> Option<Arc<Session>> {
        let session = lock(&self.sessions).get(sid).cloned()?;
        *lock(&session.touched) = Instant::now();
        Some(session)
    }

    fn close(&self, sid: &str) {
        lock(&self.sessions).remove(sid);
    }

    /// Takes in one Engine.IO packet.
    async fn take(&self, session: &Session, packet: &str) -> After {
        match packet.split_at_checked(1) {
            Some(("4", message)) => self.take_message(session, message).await,
            Some(("1", _)) => After::Close,
            Some(("2", probe)) => {
                session.say(&format!("3{probe}"));
                After::GoOn
            }
            _ => After::GoOn,
        }
    }

    /// Takes in one Socket.IO packet: connect, disconnect or event, in the namespace `/init`.
    async fn take_message(&self, session: &Session, message: &str) -> After {
        let Some((kind, rest)) = message.split_at_checked(1) else { return After::GoOn };
        let (namespace, data) = addressed(rest);
        match (kind, namespace) {
            ("0", "/init") => {
                // In this order, as the reference has it.
                session.say(&event("sc1", &json!({ "hello-edge": "please send your node info" })));
                let id = super::random_id().map(|id| id.to_string()).unwrap_or_default();
                session.say(&format!("40/init,{}", json!({ "sid": id })));
            }
            ("0", other) => {
                let other = if other == "/" { String::new() } else { format!("{},", excerpt(other.as_bytes())) };
                session.say(&format!("44{other}{}", json!({ "message": "Unable to connect" })));
            }
            ("1", _) => return After::Close,
            ("2", "/init") => self.take_event(session, data).await,
            _ => {}
        }
        After::GoOn
    }

    async fn take_event(&self, session: &Session, data: &str) {
        match self.greet(session, data).await {
            Ok(answer) => session.say(&event("sc2", &answer.into())),
            Err(error) => tracing::warn!(peer = %session.peer, %error, "a greeting is passed over"),
        }
    }

    /// `cs1` carries the description as a text of JSON within the JSON; so does the answer.
    async fn greet(&self, session: &Session, data: &str) -> Result<String, GreetingError> {
        let (host, description) = described(data)?;
        let node = http::take_in(&self.door.manager, &host, description.as_bytes(), session.peer).await?;
        let mut answer = json!({ "id": node.id.as_str(), "MQTT_BROKER_PORT": self.door.broker_port.to_string() });
        if let (Some(subnet), Value::Object(members)) = (node.subnet, &mut answer) {
            members.insert("SUBNETWORK".into(), subnet.v4.to_string().into());
        }
        Ok(answer.to_string())
    }
}

/// The namespace of a packet, and what it carries.
fn addressed(rest: &str) -> (&str, &str) {
    let (namespace, data) = match rest.split_once(',') {
        Some((namespace, data)) if namespace.starts_with('/') => (namespace, data),
        _ if rest.starts_with('/') => (rest, ""),
        _ => ("/", rest),
    };
    (namespace.split('?').next().unwrap_or_default(), data)
}

/// The host that an event tells of, and its description.
fn described(data: &str) -> Result<(String, String), GreetingError> {
    // There may be an acknowledgement number before the list.
    let data = data.trim_start_matches(|letter: char| letter.is_ascii_digit());
    let wrapped = format!("{{\"event\":{data}}}");
    let members = Members::parse(wrapped.as_bytes(), MAX_DOCUMENT)?;
    let arguments: Vec<Value> = serde_json::from_str(members.get("event").unwrap_or_default())?;
    let description = match arguments.as_slice() {
        [Value::String(name), Value::String(text)] if name == "cs1" => text.clone(),
        [Value::String(name), object @ Value::Object(_)] if name == "cs1" => object.to_string(),
        _ => return Err(GreetingError::Unknown),
    };
    let members = Members::parse(description.as_bytes(), MAX_DOCUMENT)?;
    let host = members.said("host")?.ok_or(crate::wire::Malformed::Missing("host"))?;
    Ok((host, description))
}

/// A packet of a node that greets, for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn understand(text: &str) {
    let (namespace, data) = addressed(text);
    assert!(namespace.starts_with('/') && data.len() <= text.len());
    let _ = described(data);
}

/// Why a greeting is not answered.
#[derive(Debug, thiserror::Error)]
enum GreetingError {
    #[error(transparent)]
    Malformed(#[from] crate::wire::Malformed),
    #[error("the event is not a list")]
    Json(#[from] serde_json::Error),
    #[error("the event is not `cs1` with a description")]
    Unknown,
    #[error(transparent)]
    Registration(#[from] http::RegistrationError),
}

fn event(name: &str, argument: &Value) -> String {
    format!("42/init,{}", json!([name, argument]))
}

impl Session {
    fn say(&self, packet: &str) {
        lock(&self.packets).push_back(packet.to_owned());
        self.more.notify_one();
    }

    fn waiting(&self) -> usize {
        lock(&self.packets).len()
    }

    fn take_packets(&self) -> Vec<String> {
        lock(&self.packets).drain(..).collect()
    }

    /// What there is to say, when there is something; a ping when there is nothing for a while.
    async fn next_packets(&self) -> Vec<String> {
        let some = async {
            loop {
                let packets = self.take_packets();
                if !packets.is_empty() {
                    return packets;
                }
                self.more.notified().await;
            }
        };
        timeout(PING_INTERVAL, some).await.unwrap_or_else(|_| vec!["2".to_owned()])
    }

    async fn poll(&self) -> String {
        self.next_packets().await.join(&RECORD_SEPARATOR.to_string())
    }
}

fn upgrade(
    server: Server,
    sid: String,
    session: Arc<Session>,
    from_polling: bool,
    headers: &HeaderMap,
    mut request: Request,
) -> Response {
    let Some(key) = headers.get(header::SEC_WEBSOCKET_KEY) else { return bad_request("not a WebSocket request") };
    let accept = derive_accept_key(key.as_bytes());
    let upgrading = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match upgrading.await {
            Ok(stream) => converse(&server, &session, from_polling, stream).await,
            Err(error) => tracing::debug!(%error, "a WebSocket did not come up"),
        }
        server.close(&sid);
    });
    let switch = [
        (header::CONNECTION, "upgrade".to_owned()),
        (header::UPGRADE, "websocket".to_owned()),
        (header::SEC_WEBSOCKET_ACCEPT, accept),
    ];
    (StatusCode::SWITCHING_PROTOCOLS, switch).into_response()
}

/// The conversation over a WebSocket, until either side ends it.
async fn converse(server: &Server, session: &Session, from_polling: bool, stream: Upgraded) {
    let limits = WebSocketConfig::default().max_message_size(Some(MAX_DOCUMENT)).max_frame_size(Some(MAX_DOCUMENT));
    let mut socket = WebSocketStream::from_raw_socket(TokioIo::new(stream), Role::Server, Some(limits)).await;
    if from_polling && !take_over(&mut socket, session).await {
        return;
    }
    loop {
        tokio::select! {
            packets = session.next_packets() => {
                for packet in packets {
                    if socket.send(Message::text(packet)).await.is_err() {
                        return;
                    }
                }
            }
            incoming = timeout(PING_INTERVAL + PING_TIMEOUT, socket.next()) => {
                let Ok(Some(Ok(message))) = incoming else { return };
                let after = match message {
                    Message::Text(packet) => server.take(session, &packet).await,
                    Message::Close(_) => After::Close,
                    _ => After::GoOn,
                };
                if after == After::Close {
                    return;
                }
            }
        }
    }
}

/// The hand-over from polling: probe, its answer, and the word that everything goes this way from now on. An open poll is ended
/// with a packet that says nothing.
async fn take_over(socket: &mut WebSocketStream<TokioIo<Upgraded>>, session: &Session) -> bool {
    while let Ok(Some(Ok(Message::Text(packet)))) = timeout(PING_TIMEOUT, socket.next()).await {
        match packet.as_str() {
            "2probe" => {
                if socket.send(Message::text("3probe")).await.is_err() {
                    return false;
                }
                session.say("6");
            }
            "5" => return true,
            _ => return false,
        }
    }
    false
}

/// Nothing panics while it holds one of these locks.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
