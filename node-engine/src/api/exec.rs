//! A command in an instance, over a WebSocket: messages keep input, output and the rest apart (`dto::look::ToCommand`, `FromCommand`).

use axum::Extension;
use axum::body::Bytes;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Message, Role, WebSocketConfig};

use super::dto::look::{FromCommand, Terminal, ToCommand};
use super::routes::{Refused, instance_here};
use super::{Api, LARGEST_BODY, REQUEST_TIMEOUT};
use crate::drain::Drain;
use crate::model::InstanceId;
use crate::runtime::session::{self, Input, Output};
use crate::runtime::{Exec, Session};

/// First byte of a piece of output.
pub(super) const OUT: u8 = 1;
pub(super) const ERROR: u8 = 2;

type Socket = WebSocketStream<TokioIo<Upgraded>>;

pub(super) async fn open(
    State(api): State<Api>,
    Extension(drain): Extension<Drain>,
    Path(name): Path<String>,
    headers: HeaderMap,
    mut request: Request,
) -> Result<Response, Refused> {
    let instance = instance_here(&api, &name).await?;
    let Some(key) = headers.get(header::SEC_WEBSOCKET_KEY) else {
        return Err(Refused::new(StatusCode::BAD_REQUEST, "commands are run over a WebSocket"));
    };
    let accept = derive_accept_key(key.as_bytes());
    let upgrading = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match upgrading.await {
            Ok(stream) => converse(&api, instance, stream, drain).await,
            Err(error) => tracing::debug!(%error, "a WebSocket did not come up"),
        }
    });
    let switch = [
        (header::CONNECTION, "upgrade".to_owned()),
        (header::UPGRADE, "websocket".to_owned()),
        (header::SEC_WEBSOCKET_ACCEPT, accept),
    ];
    Ok((StatusCode::SWITCHING_PROTOCOLS, switch).into_response())
}

async fn converse(api: &Api, instance: InstanceId, stream: Upgraded, drain: Drain) {
    let limits = WebSocketConfig::default().max_message_size(Some(LARGEST_BODY)).max_frame_size(Some(LARGEST_BODY));
    let socket = WebSocketStream::from_raw_socket(TokioIo::new(stream), Role::Server, Some(limits)).await;
    let (mut sink, mut source): (SplitSink<Socket, Message>, SplitStream<Socket>) = socket.split();
    let last = match begin(api, instance, &mut source).await {
        Ok(session) => {
            tokio::select! {
                last = carry(session, &mut sink, &mut source) => last,
                _ = drain.wait() => Some(FromCommand::Broken("the node-engine stops; the instance does not".into())),
            }
        }
        Err(refused) => Some(FromCommand::Refused(refused)),
    };
    // A client that has gone hears nothing.
    if let Some(last) = last {
        let _ = sink.send(Message::text(text(&last))).await;
        let _ = sink.close().await;
    }
}

/// The first message says what to run.
async fn begin(api: &Api, instance: InstanceId, source: &mut SplitStream<Socket>) -> Result<Session, String> {
    let first = tokio::time::timeout(REQUEST_TIMEOUT, source.next()).await;
    let Ok(Some(Ok(Message::Text(first)))) = first else { return Err("no command was said".into()) };
    let wanted = serde_json::from_str(&first).map_err(|error| format!("the command is not understood: {error}"))?;
    let ToCommand::Run { command, terminal } = wanted else { return Err("no command was said".into()) };
    if command.is_empty() {
        return Err("the command is empty".into());
    }
    let exec = Exec { command, terminal: terminal.map(size) };
    match tokio::time::timeout(REQUEST_TIMEOUT, api.node.exec(instance, exec)).await {
        Ok(session) => session.map_err(|error| error.to_string()),
        Err(_) => Err(format!("the runtime did not start it within {} s", REQUEST_TIMEOUT.as_secs())),
    }
}

/// Carries both directions until the command's last word, or until the client has gone.
async fn carry(
    session: Session,
    sink: &mut SplitSink<Socket, Message>,
    source: &mut SplitStream<Socket>,
) -> Option<FromCommand> {
    let Session { input, mut output } = session;
    // One direction must not hold up the other: a command that writes without reading would meet a client that does the same.
    let inward = async {
        while let Some(Ok(message)) = source.next().await {
            let said = match message {
                Message::Binary(bytes) => Input::Bytes(bytes),
                Message::Text(text) => match serde_json::from_str(&text) {
                    Ok(ToCommand::Resize(terminal)) => Input::Resize(size(terminal)),
                    Ok(ToCommand::End) => Input::End,
                    Ok(ToCommand::Run { .. }) | Err(_) => return,
                },
                Message::Close(_) => return,
                _ => continue,
            };
            // A command that has ended takes no more; its last word is on its way.
            if input.send(said).await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    };
    let outward = async {
        while let Some(said) = output.recv().await {
            let piece = match said {
                Output::Out(bytes) => marked(OUT, &bytes),
                Output::Error(bytes) => marked(ERROR, &bytes),
                Output::Exit(code) => return Some(FromCommand::Exit(code)),
                Output::Broken(reason) => return Some(FromCommand::Broken(reason)),
            };
            if sink.send(Message::binary(piece)).await.is_err() {
                return None;
            }
        }
        Some(FromCommand::Broken("the runtime says no more of it".into()))
    };
    tokio::select! {
        () = inward => None,
        last = outward => last,
    }
}

fn marked(mark: u8, bytes: &[u8]) -> Bytes {
    let mut piece = Vec::with_capacity(1 + bytes.len());
    piece.push(mark);
    piece.extend_from_slice(bytes);
    piece.into()
}

fn size(terminal: Terminal) -> session::Terminal {
    session::Terminal { columns: terminal.columns, rows: terminal.rows }
}

fn text(said: &FromCommand) -> String {
    serde_json::to_string(said).expect("plain data becomes JSON")
}
