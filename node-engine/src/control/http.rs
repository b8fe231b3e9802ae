//! Small questions over HTTP: one client, short answers, short waits.

use std::time::Duration;

const CONNECT: Duration = Duration::from_secs(5);
const ANSWER: Duration = Duration::from_secs(10);

/// Why a question got no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HttpError {
    #[error("{}", chain(.0))]
    Request(#[from] reqwest::Error),
    #[error("the answer is longer than {0} bytes")]
    TooLong(usize),
}

/// Everything an error says, its causes included: reqwest's own text names only the URL.
fn chain(error: &reqwest::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// An answer that was read to its end.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
}

/// The client for the cluster manager. It goes there directly: broker and tunnels cannot take a proxy either. Only where it is asked over
/// TLS are the system's roots read: small machines have none.
///
/// # Errors
/// Where the TLS roots of the system cannot be used.
pub(super) fn client(tls: bool) -> Result<reqwest::Client, HttpError> {
    super::tls::ensure_provider();
    let client = reqwest::Client::builder().connect_timeout(CONNECT).timeout(ANSWER).no_proxy();
    let client = if tls { client } else { client.tls_certs_only([]) };
    Ok(client.build()?)
}

/// Sends a request and reads at most `limit` bytes of answer.
pub(super) async fn ask(request: reqwest::RequestBuilder, limit: usize) -> Result<Answer, HttpError> {
    let mut response = request.send().await?;
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await? {
        if body.len() + chunk.len() > limit {
            return Err(HttpError::TooLong(limit));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(Answer { status: response.status().as_u16(), body })
}

/// `host:port` as URLs want it.
pub(super) fn authority(host: &str, port: u16) -> String {
    if host.contains(':') && !host.starts_with('[') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}
