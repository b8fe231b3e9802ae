//! Metrics for a collector that waits to be told: OTLP over HTTP, where that is configured. One that is away is offered the next
//! snapshot when its time comes; nothing is kept for it.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use reqwest::Client;
use reqwest::header::CONTENT_TYPE;
use tokio::time::{Instant, MissedTickBehavior, timeout};

use super::{NodeApi, NodeApiError};
use crate::backoff::Complaints;
use crate::drain::Drain;
use crate::metrics::otlp;

/// With the node, and with the collector.
const PATIENCE: Duration = Duration::from_secs(10);
/// Of what a collector complains, this much is told.
const COMPLAINT: usize = 200;

/// Tells the collector at `url` of the node until the drain begins. What stands in the way is tried anew when the next snapshot is due:
/// that nobody hears how a node fares is no reason for it to end.
pub async fn push(node: Arc<dyn NodeApi>, url: String, every: Duration, drain: Drain) {
    Collector { url, make: client, made: None }.keep_told(node, every, drain).await;
}

struct Collector<M> {
    url: String,
    /// Makes the client, which needs the TLS roots of the system.
    make: M,
    made: Option<Client>,
}

impl<M: Fn(&str) -> Result<Client, String>> Collector<M> {
    async fn keep_told(mut self, node: Arc<dyn NodeApi>, every: Duration, drain: Drain) {
        let mut due = tokio::time::interval(every);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut complaints = Complaints::default();
        loop {
            let told = tokio::select! {
                _ = drain.wait() => return,
                told = async {
                    due.tick().await;
                    self.tell(&*node).await
                } => told,
            };
            let url = self.url.as_str();
            match told {
                Ok(()) => {
                    if complaints.settle() {
                        tracing::info!(url, "the collector takes metrics again");
                    }
                }
                Err(reason) => {
                    if complaints.is_new(&reason, Instant::now()) {
                        tracing::warn!(url, reason, "the collector is told no metrics; it is offered the next ones");
                    }
                }
            }
        }
    }

    async fn tell(&mut self, node: &dyn NodeApi) -> Result<(), String> {
        let client = match &self.made {
            Some(client) => client.clone(),
            None => self.made.insert((self.make)(&self.url)?).clone(),
        };
        let said =
            timeout(PATIENCE, async { Ok::<_, NodeApiError>((node.metrics().await?, node.status().await.node)) });
        let (snapshot, about) = match said.await {
            Ok(said) => said.map_err(|error| error.to_string())?,
            Err(_) => return Err(format!("this node has not said within {} s how it fares", PATIENCE.as_secs())),
        };
        let body = otlp::encode(&snapshot, &about.name, &about.id, SystemTime::now());
        let sent = client.post(&self.url).header(CONTENT_TYPE, "application/json").body(body).send().await;
        let answer = sent.map_err(|error| chain(&error))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(());
        }
        let said = answer.text().await.unwrap_or_default();
        Err(format!("{status}: {}", said.chars().take(COMPLAINT).collect::<String>().trim()))
    }
}

fn client(url: &str) -> Result<Client, String> {
    // An error means that one is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let client = Client::builder().timeout(PATIENCE);
    let client = if url.starts_with("https:") { client } else { client.tls_certs_only([]) };
    client.build().map_err(|error| chain(&error))
}

/// Everything an error says, its causes included.
fn chain(error: &reqwest::Error) -> String {
    let causes = std::iter::successors(std::error::Error::source(error), |cause| cause.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;

    use super::super::tests::MemoryNode;
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_client_that_cannot_be_made_yet_is_made_later_and_kept() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/v1/metrics", listener.local_addr().unwrap());
        let tries = Arc::new(AtomicUsize::new(0));
        let counted = tries.clone();
        let make = move |url: &str| match counted.fetch_add(1, Ordering::SeqCst) {
            0 | 1 => Err("no roots".to_owned()),
            _ => client(url),
        };
        let drain = Drain::new(Duration::from_secs(1));
        let collector = Collector { url, make, made: None };
        let (node, every) = (Arc::new(MemoryNode::default()), Duration::from_millis(20));
        let telling = tokio::spawn(collector.keep_told(node, every, drain.clone()));
        // The first hangs up on it, which is no reason for another client.
        for _ in 0..2 {
            let (mut taken, _) = timeout(LONG, listener.accept()).await.expect("in time").unwrap();
            let mut word = [0; 4];
            taken.read_exact(&mut word).await.unwrap();
            assert_eq!(&word, b"POST");
        }
        assert_eq!(tries.load(Ordering::SeqCst), 3);
        drain.begin();
        timeout(LONG, telling).await.expect("in time").unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_does_not_say_how_it_fares_is_not_waited_for_long() {
        let url = "http://127.0.0.1:9/v1/metrics".to_owned();
        let mut collector = Collector { url, make: client, made: None };
        let node = MemoryNode { silent: true, ..MemoryNode::default() };
        let told = timeout(6 * PATIENCE, collector.tell(&node)).await.expect("in time");
        assert_eq!(told, Err("this node has not said within 10 s how it fares".into()));
    }
}
