//! Metrics for scrapers: on the socket like everything else, and over TCP where that is configured. There nothing else is answered.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;

use super::few::Few;
use super::routes::{Refused, within_time};
use super::{Api, NodeApi};
use crate::backoff::Complaints;
use crate::drain::Drain;
use crate::metrics::{self, Format};

/// Between two tries to have the address.
const RETRY: Duration = Duration::from_secs(10);

pub(super) async fn metrics(State(api): State<Api>, headers: HeaderMap) -> Result<Response, Refused> {
    Ok(scraped(&*api.node, &headers).await?)
}

/// Answers scrapers at `address` until the drain begins. One that is taken, or not there yet, is tried again for ever: that nobody can
/// scrape a node is no reason for it to end.
pub async fn serve(address: SocketAddr, node: Arc<dyn NodeApi>, drain: Drain) {
    let mut complaints = Complaints::default();
    while !drain.begun() {
        let served = match TcpListener::bind(address).await {
            Ok(listener) => {
                if complaints.settle() {
                    tracing::info!(%address, "metrics are served now");
                }
                answer(listener, node.clone(), drain.clone()).await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = served {
            let reason = error.to_string();
            if complaints.is_new(&reason, tokio::time::Instant::now()) {
                tracing::warn!(%address, reason, "metrics cannot be served there, trying again for ever");
            }
        }
        tokio::select! {
            _ = drain.wait() => return,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

async fn answer(listener: TcpListener, node: Arc<dyn NodeApi>, drain: Drain) -> std::io::Result<()> {
    let answer = async |State(node): State<Arc<dyn NodeApi>>, headers: HeaderMap| -> Result<Response, Refused> {
        Ok(scraped(&*node, &headers).await?)
    };
    let router = Router::new()
        .route("/metrics", get(answer))
        .fallback(async || Refused::new(StatusCode::NOT_FOUND, "here are metrics, under /metrics, and nothing else"))
        .layer(middleware::from_fn(within_time))
        .with_state(node);
    tokio::select! {
        ended = std::future::IntoFuture::into_future(axum::serve(Few::from(listener), router)) => ended,
        _ = drain.wait() => Ok(()),
    }
}

async fn scraped(node: &dyn NodeApi, headers: &HeaderMap) -> Result<Response, super::NodeApiError> {
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    let format = Format::accepted(accept);
    let text = metrics::encode(&node.metrics().await?, format);
    Ok(([(header::CONTENT_TYPE, format.content_type())], text).into_response())
}
