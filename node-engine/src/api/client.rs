//! The other end of the socket: what the command line asks with.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use axum::body::Bytes;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt, StreamExt};
use reqwest::{Method, RequestBuilder, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

use super::Selector;
use super::dto::hardware::Hardware;
use super::dto::look::{EventsQuery, FromCommand, Inspection, Terminal, ToCommand, Usage};
use super::dto::{
    Changed, ClusterInstance, ClusterNode, DeployQuery, Explanation, Instance, LogsQuery, Move, Refusal, Replicate,
    Status, net,
};
use super::exec::{ERROR, OUT};

/// Longer than the daemon takes to give up.
const PATIENCE: Duration = Duration::from_secs(40);

/// For answers that go on as long as there is something to tell.
const FOR_EVER: Duration = Duration::from_secs(100 * 365 * 86_400);

/// A daemon on this machine.
#[derive(Clone, Debug)]
pub struct Client {
    socket: PathBuf,
    http: reqwest::Client,
}

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("no node-engine answers on {}: start it, or name its socket with --socket", .0.display())]
    NotRunning(PathBuf),
    #[error("{} belongs to another user: use sudo", .0.display())]
    NotYours(PathBuf),
    #[error("connect to {}: {source}", .path.display())]
    Connect { path: PathBuf, source: io::Error },
    /// The daemon's own words.
    #[error("{0}")]
    Refused(String),
    #[error("the node-engine on {} broke off: {reason}", .socket.display())]
    Broken { socket: PathBuf, reason: String },
}

impl Client {
    /// Connects once to tell a daemon that is not there from one that does not answer.
    ///
    /// # Errors
    /// If nobody listens there, or not for this user.
    pub fn new(socket: &Path) -> Result<Self, ClientError> {
        match std::os::unix::net::UnixStream::connect(socket) {
            Ok(_) => {}
            Err(source) => {
                let path = socket.to_owned();
                return Err(match source.kind() {
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => ClientError::NotRunning(path),
                    io::ErrorKind::PermissionDenied => ClientError::NotYours(path),
                    _ => ClientError::Connect { path, source },
                });
            }
        }
        // The HTTP client is built with TLS and wants a provider and roots for it, though nothing here is encrypted.
        let _already_there = rustls::crypto::ring::default_provider().install_default();
        let http =
            reqwest::Client::builder().unix_socket(socket).no_proxy().timeout(PATIENCE).tls_certs_only([]).build();
        let http = http.map_err(|error| ClientError::Broken { socket: socket.to_owned(), reason: chain(&error) })?;
        Ok(Self { socket: socket.to_owned(), http })
    }

    pub async fn status(&self) -> Result<Status, ClientError> {
        self.json(self.request(Method::GET, &["status"])).await
    }

    pub async fn instances(&self) -> Result<Vec<Instance>, ClientError> {
        self.json(self.request(Method::GET, &["instances"])).await
    }

    pub async fn explain(&self, instance: &Selector) -> Result<Explanation, ClientError> {
        self.json(self.request(Method::GET, &["instances", &instance.to_string(), "explain"])).await
    }

    pub async fn logs(&self, instance: &Selector, tail: Option<usize>) -> Result<Vec<u8>, ClientError> {
        let name = instance.to_string();
        let request = self.query(Method::GET, &["instances", &name, "logs"], &LogsQuery { tail, follow: false });
        let response = self.send(request).await?;
        response.bytes().await.map(Vec::from).map_err(|error| self.broken(&error))
    }

    /// The instance's output, and what it adds.
    pub async fn follow_logs(&self, instance: &Selector, tail: Option<usize>) -> Result<Following, ClientError> {
        let name = instance.to_string();
        let request = self.query(Method::GET, &["instances", &name, "logs"], &LogsQuery { tail, follow: true });
        self.following(request).await
    }

    pub async fn inspect(&self, instance: &Selector) -> Result<Inspection, ClientError> {
        self.json(self.request(Method::GET, &["instances", &instance.to_string()])).await
    }

    pub async fn stats(&self) -> Result<Vec<Usage>, ClientError> {
        self.json(self.request(Method::GET, &["stats"])).await
    }

    pub async fn hardware(&self) -> Result<Hardware, ClientError> {
        self.json(self.request(Method::GET, &["hardware"])).await
    }

    /// Metrics in the older text format.
    pub async fn metrics(&self) -> Result<String, ClientError> {
        let response = self.send(self.request(Method::GET, &["metrics"])).await?;
        response.text().await.map_err(|error| self.broken(&error))
    }

    /// What happened, one JSON document a line.
    pub async fn events(&self, query: &EventsQuery) -> Result<Following, ClientError> {
        self.following(self.query(Method::GET, &["events"], query)).await
    }

    /// Runs a command in an instance.
    pub async fn exec(
        &self,
        instance: &Selector,
        command: Vec<String>,
        terminal: Option<Terminal>,
    ) -> Result<(CommandInput, CommandOutput), ClientError> {
        // The name is settled first: a WebSocket that is refused loses the words it is refused with.
        self.inspect(instance).await?;
        let stream = UnixStream::connect(&self.socket).await;
        let stream = stream.map_err(|source| ClientError::Connect { path: self.socket.clone(), source })?;
        let url = url(&["instances", &instance.to_string(), "exec"]).replacen("http", "ws", 1);
        let (socket, _) = tokio_tungstenite::client_async(url, stream).await.map_err(|error| self.broken(&error))?;
        let (sink, source) = socket.split();
        let mut input = CommandInput(sink);
        input.say(&ToCommand::Run { command, terminal }).await;
        Ok((input, CommandOutput { source, socket: self.socket.clone() }))
    }

    pub async fn flows(&self, choice: &net::Choice) -> Result<net::Page<net::Flow>, ClientError> {
        self.json(self.query(Method::GET, &["net", "flows"], choice)).await
    }

    pub async fn services(&self, choice: &net::Choice) -> Result<net::Page<net::Service>, ClientError> {
        self.json(self.query(Method::GET, &["net", "services"], choice)).await
    }

    pub async fn peers(&self) -> Result<Vec<net::Peer>, ClientError> {
        self.json(self.request(Method::GET, &["net", "peers"])).await
    }

    pub async fn counters(&self) -> Result<Vec<net::Counter>, ClientError> {
        self.json(self.request(Method::GET, &["net", "counters"])).await
    }

    pub async fn switch(&self, choice: &str) -> Result<net::Datapath, ClientError> {
        self.json(self.request(Method::POST, &["net", "datapath", choice])).await
    }

    pub async fn deploy(
        &self,
        document: Vec<u8>,
        replicas: Option<u32>,
        on: Option<String>,
    ) -> Result<Changed, ClientError> {
        let request = self.query(Method::POST, &["cluster", "deploy"], &DeployQuery { replicas, on });
        self.json(request.header("content-type", "application/json").body(document)).await
    }

    pub async fn delete(&self, target: &Selector) -> Result<Changed, ClientError> {
        self.json(self.request(Method::DELETE, &["cluster", "instances", &target.to_string()])).await
    }

    pub async fn replicate(&self, service: &Selector, replicas: u32) -> Result<Changed, ClientError> {
        let wanted = Replicate { service: service.to_string(), replicas };
        self.json(self.request(Method::POST, &["cluster", "replicate"]).json(&wanted)).await
    }

    pub async fn move_instance(&self, instance: &Selector, node: &str) -> Result<Changed, ClientError> {
        let wanted = Move { instance: instance.to_string(), node: node.to_owned() };
        self.json(self.request(Method::POST, &["cluster", "move"]).json(&wanted)).await
    }

    pub async fn nodes(&self) -> Result<Vec<ClusterNode>, ClientError> {
        self.json(self.request(Method::GET, &["cluster", "nodes"])).await
    }

    pub async fn cluster_instances(&self) -> Result<Vec<ClusterInstance>, ClientError> {
        self.json(self.request(Method::GET, &["cluster", "instances"])).await
    }

    fn request(&self, method: Method, path: &[&str]) -> RequestBuilder {
        self.http.request(method, url(path))
    }

    fn query(&self, method: Method, path: &[&str], query: &impl Serialize) -> RequestBuilder {
        self.http.request(method, format!("{}{}", url(path), query_text(query)))
    }

    async fn following(&self, request: RequestBuilder) -> Result<Following, ClientError> {
        let response = self.send(request.timeout(FOR_EVER)).await?;
        Ok(Following { response, socket: self.socket.clone() })
    }

    async fn json<T: DeserializeOwned>(&self, request: RequestBuilder) -> Result<T, ClientError> {
        self.send(request).await?.json().await.map_err(|error| self.broken(&error))
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, ClientError> {
        let response = request.send().await.map_err(|error| self.broken(&error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        match response.json::<Refusal>().await {
            Ok(Refusal { error }) if !error.is_empty() => Err(ClientError::Refused(error)),
            _ => Err(ClientError::Refused(format!("the node-engine answers {status}"))),
        }
    }

    fn broken(&self, error: &dyn std::error::Error) -> ClientError {
        broken(&self.socket, error)
    }
}

/// An answer that goes on.
#[derive(Debug)]
pub struct Following {
    response: Response,
    socket: PathBuf,
}

impl Following {
    /// The next piece; `None` at its end.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ClientError> {
        self.response.chunk().await.map_err(|error| broken(&self.socket, &error))
    }
}

/// What goes to a command. A command that has ended takes no more, which its output tells better.
#[derive(Debug)]
pub struct CommandInput(SplitSink<WebSocketStream<UnixStream>, Message>);

impl CommandInput {
    pub async fn write(&mut self, bytes: Vec<u8>) {
        let _ = self.0.send(Message::binary(bytes)).await;
    }

    pub async fn resize(&mut self, terminal: Terminal) {
        self.say(&ToCommand::Resize(terminal)).await;
    }

    pub async fn end(&mut self) {
        self.say(&ToCommand::End).await;
    }

    async fn say(&mut self, what: &ToCommand) {
        let text = serde_json::to_string(what).expect("plain data becomes JSON");
        let _ = self.0.send(Message::text(text)).await;
    }
}

/// What comes from a command.
#[derive(Debug)]
pub struct CommandOutput {
    source: SplitStream<WebSocketStream<UnixStream>>,
    socket: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    Out(Bytes),
    Error(Bytes),
    /// The last.
    Exit(i64),
}

impl CommandOutput {
    /// # Errors
    /// If the command was refused, or what became of it is not known.
    pub async fn next(&mut self) -> Result<Piece, ClientError> {
        loop {
            match self.source.next().await {
                Some(Ok(Message::Binary(bytes))) => match bytes.first() {
                    Some(&OUT) => return Ok(Piece::Out(bytes.slice(1..))),
                    Some(&ERROR) => return Ok(Piece::Error(bytes.slice(1..))),
                    _ => {}
                },
                Some(Ok(Message::Text(text))) => match serde_json::from_str(&text) {
                    Ok(FromCommand::Exit(code)) => return Ok(Piece::Exit(code)),
                    Ok(FromCommand::Refused(reason)) => return Err(ClientError::Refused(reason)),
                    Ok(FromCommand::Broken(reason)) => {
                        return Err(ClientError::Broken { socket: self.socket.clone(), reason });
                    }
                    Err(_) => {}
                },
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(broken(&self.socket, &error)),
                None => {
                    let reason = "nothing more is said of the command".into();
                    return Err(ClientError::Broken { socket: self.socket.clone(), reason });
                }
            }
        }
    }
}

fn broken(socket: &Path, error: &dyn std::error::Error) -> ClientError {
    ClientError::Broken { socket: socket.to_owned(), reason: chain(error) }
}

/// The host is a formality: requests go to the socket.
fn url(path: &[&str]) -> String {
    path.iter().fold("http://node-engine".to_owned(), |url, part| format!("{url}/{}", Escaped(part)))
}

/// `?name=value&…` of the members that are set.
fn query_text(query: &impl Serialize) -> String {
    let members = match serde_json::to_value(query) {
        Ok(serde_json::Value::Object(members)) => members,
        _ => return String::new(),
    };
    let mut text = String::new();
    for (name, value) in members {
        let value = match value {
            serde_json::Value::Null => continue,
            serde_json::Value::String(value) => value,
            other => other.to_string(),
        };
        text.push(if text.is_empty() { '?' } else { '&' });
        text.push_str(&format!("{name}={}", Escaped(&value)));
    }
    text
}

/// Percent-encoded but for letters, digits and `-._~`.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0.bytes() {
            match byte {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => write!(f, "{}", byte as char)?,
                other => write!(f, "%{other:02X}")?,
            }
        }
        Ok(())
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_travel_escaped() {
        assert_eq!(url(&["instances", "web#0", "logs"]), "http://node-engine/instances/web%230/logs");
        assert_eq!(query_text(&DeployQuery { replicas: None, on: None }), "");
        let query = DeployQuery { replicas: Some(2), on: Some("a&b c".into()) };
        assert_eq!(query_text(&query), "?on=a%26b%20c&replicas=2");
    }

    #[test]
    fn a_daemon_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api.sock");
        assert!(matches!(Client::new(&path), Err(ClientError::NotRunning(_))));
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(matches!(Client::new(&path), Err(ClientError::NotRunning(_))));
    }
}
