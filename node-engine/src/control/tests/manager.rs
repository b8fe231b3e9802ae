//! A cluster manager with HTTP, as strict about registrations as the newest generation.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use tokio::net::TcpListener;

use crate::wire::register::{answer, read_registration};

#[derive(Debug)]
pub(super) struct Manager {
    pub(super) port: u16,
    pub(super) book: Arc<Book>,
}

#[derive(Debug)]
pub(super) struct Book {
    broker_port: u16,
    /// The newest generation tells its status.
    tells_status: bool,
    pub(super) id: Mutex<String>,
    pub(super) registrations: AtomicUsize,
    pub(super) bodies: Mutex<Vec<String>>,
    /// Answers 500 to that many registrations first.
    pub(super) refusals: AtomicUsize,
    /// Answers 502 to that many questions for its status first.
    pub(super) outages: AtomicUsize,
}

impl Manager {
    pub(super) async fn start(broker_port: u16, tells_status: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let book = Arc::new(Book {
            broker_port,
            tells_status,
            id: Mutex::new("6b034ec446528056c08b89ae".into()),
            registrations: AtomicUsize::new(0),
            bodies: Mutex::new(Vec::new()),
            refusals: AtomicUsize::new(0),
            outages: AtomicUsize::new(0),
        });
        let routes = Router::new()
            .route("/api/cluster/status", get(status))
            .route("/api/node/register", post(register))
            .with_state(book.clone());
        tokio::spawn(async move { axum::serve(listener, routes).await });
        Self { port, book }
    }

    pub(super) fn registrations(&self) -> usize {
        self.book.registrations.load(Ordering::Relaxed)
    }
}

fn is_due(count: &AtomicUsize) -> bool {
    count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
}

async fn status(State(book): State<Arc<Book>>) -> Response {
    if is_due(&book.outages) {
        StatusCode::BAD_GATEWAY.into_response()
    } else if book.tells_status {
        // Its root is not there yet.
        r#"{"cluster_name":"c","cluster_id":null,"connected_to_root":false}"#.into_response()
    } else {
        StatusCode::NOT_FOUND.into_response()
    }
}

async fn register(State(book): State<Arc<Book>>, body: Bytes) -> Response {
    let refused = is_due(&book.refusals);
    book.bodies.lock().unwrap().push(String::from_utf8_lossy(&body).into_owned());
    if refused || read_registration(&body).is_err() {
        let text = r#"{"code":500,"status":"Internal Server Error"}"#;
        return (StatusCode::INTERNAL_SERVER_ERROR, text).into_response();
    }
    book.registrations.fetch_add(1, Ordering::Relaxed);
    let id = book.id.lock().unwrap().parse().unwrap();
    ([(header::CONTENT_TYPE, "application/json")], answer(&id, book.broker_port)).into_response()
}
