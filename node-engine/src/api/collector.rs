//! Metrics for a collector that waits to be told: OTLP over HTTP, where that is configured. One that is away is offered the next
//! snapshot when its time comes; nothing is kept for it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use reqwest::header::CONTENT_TYPE;
use tokio::time::MissedTickBehavior;

use super::NodeApi;
use crate::drain::Drain;
use crate::metrics::otlp;

const PATIENCE: Duration = Duration::from_secs(10);
/// Of what a collector complains, this much is told.
const COMPLAINT: usize = 200;

/// Tells the collector at `url` of the node until the drain begins.
///
/// # Errors
/// Where the TLS roots of the system cannot be used.
pub async fn push(node: Arc<dyn NodeApi>, url: String, every: Duration, drain: Drain) -> Result<(), reqwest::Error> {
    // An error means that one is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = reqwest::Client::builder().timeout(PATIENCE);
    let client = if url.starts_with("https:") { client } else { client.tls_certs_only([]) }.build()?;
    let mut due = tokio::time::interval(every);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut away = false;
    loop {
        let told = tokio::select! {
            _ = drain.wait() => return Ok(()),
            told = async {
                due.tick().await;
                tell(&*node, &client, &url).await
            } => told,
        };
        match (&told, away) {
            (Ok(()), true) => tracing::info!(%url, "the collector takes metrics again"),
            (Err(reason), false) => {
                tracing::warn!(%url, %reason, "the collector takes no metrics; it is offered the next ones");
            }
            (Ok(()), false) | (Err(_), true) => {}
        }
        away = told.is_err();
    }
}

async fn tell(node: &dyn NodeApi, client: &reqwest::Client, url: &str) -> Result<(), String> {
    let snapshot = node.metrics().await.map_err(|error| error.to_string())?;
    let about = node.status().await.node;
    let body = otlp::encode(&snapshot, &about.name, &about.id, SystemTime::now());
    let sent = client.post(url).header(CONTENT_TYPE, "application/json").body(body).send().await;
    let answer = sent.map_err(|error| chain(&error))?;
    let status = answer.status();
    if status.is_success() {
        return Ok(());
    }
    let said = answer.text().await.unwrap_or_default();
    Err(format!("{status}: {}", said.chars().take(COMPLAINT).collect::<String>().trim()))
}

/// Everything an error says, its causes included.
fn chain(error: &reqwest::Error) -> String {
    let causes = std::iter::successors(std::error::Error::source(error), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
