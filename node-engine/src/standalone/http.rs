//! Registration over HTTP, as the cluster manager of the reference answers it, and the little that is asked beside it.

use std::net::{IpAddr, SocketAddr};

use axum::body::Bytes;
use axum::extract::{ConnectInfo, DefaultBodyLimit, Path, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

use crate::model::Query;
use crate::wire::json::{MAX_MESSAGE, excerpt};
use crate::wire::{self, register};

use super::actor::{Manager, Refused, Registered};
use super::{documents, reports};

/// What the routes need.
#[derive(Clone, Debug)]
pub(super) struct Door {
    pub(super) manager: Manager,
    pub(super) broker_port: u16,
}

/// The cluster manager of the second and later generations.
pub(super) fn router(door: Door) -> Router {
    Router::new()
        .route("/api/node/register", post(register))
        .route("/api/cluster/status", get(status))
        .layer(DefaultBodyLimit::max(MAX_MESSAGE))
        .with_state(door.clone())
        .merge(tables(door))
}

/// Tables over HTTP, as nodes of the first generation ask for them.
pub(super) fn tables(door: Door) -> Router {
    Router::new()
        .route("/api/job/{name}/instances", get(table_by_name))
        .route("/api/job/ip/{address}/instances", get(table_by_address))
        .with_state(door)
}

/// Takes in a node by its own description.
pub(super) async fn take_in(
    manager: &Manager,
    host: &str,
    description: &[u8],
    peer: IpAddr,
) -> Result<Registered, RegistrationError> {
    if host.is_empty() || host.len() > 253 || host.chars().any(|letter| letter.is_control() || letter.is_whitespace()) {
        return Err(RegistrationError::Host(excerpt(host.as_bytes())));
    }
    let facts = reports::facts(description, Some(peer))?;
    Ok(manager.register(host.to_owned(), facts).await?)
}

/// Why a registration comes to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum RegistrationError {
    #[error("{0} is not a host name")]
    Host(String),
    #[error(transparent)]
    Malformed(#[from] wire::Malformed),
    #[error(transparent)]
    Refused(#[from] Refused),
}

async fn register(State(door): State<Door>, ConnectInfo(peer): ConnectInfo<SocketAddr>, body: Bytes) -> Response {
    let registrant = match register::read_registration(&body) {
        Ok(registrant) => registrant,
        Err(error) => return refused(&error.into(), peer),
    };
    match take_in(&door.manager, &registrant.host, &body, peer.ip()).await {
        Ok(node) => {
            ([("content-type", "application/json")], register::answer(&node.id, door.broker_port)).into_response()
        }
        Err(error) => refused(&error, peer),
    }
}

/// The reference says no more than this, whatever is wrong; the reason is for this side's log.
fn refused(error: &RegistrationError, peer: SocketAddr) -> Response {
    tracing::warn!(%peer, %error, "a registration is refused");
    let body = Json(json!({ "code": 500, "status": "Internal Server Error" }));
    (StatusCode::INTERNAL_SERVER_ERROR, body).into_response()
}

async fn status(State(door): State<Door>) -> Json<Value> {
    Json(json!({ "cluster_name": "standalone", "cluster_id": &*door.manager.cluster, "connected_to_root": false }))
}

async fn table_by_name(State(door): State<Door>, Path(name): Path<String>) -> Response {
    match name.parse() {
        Ok(name) => table(&door, Query::Name(name)).await,
        Err(_) => StatusCode::NOT_FOUND.into_response(),
    }
}

/// Addresses come with `_` for the dots of IPv4.
async fn table_by_address(State(door): State<Door>, Path(address): Path<String>) -> Response {
    match address.replace('_', ".").parse() {
        Ok(address) => table(&door, Query::Address(address)).await,
        Err(_) => StatusCode::NOT_FOUND.into_response(),
    }
}

async fn table(door: &Door, query: Query) -> Response {
    match door.manager.table(query).await {
        Some(answer) => Json(documents::table(&answer, &door.manager.cluster)).into_response(),
        None => StatusCode::SERVICE_UNAVAILABLE.into_response(),
    }
}
