//! The connection to containerd: made when it is needed, and made again when containerd comes back.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::net::UnixStream;
use tokio::time::timeout;
use tonic::client::Grpc;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

use super::api::images::Piece;
use super::api::{Named, images};
use crate::runtime::RuntimeError;

/// A containerd under load still answers within it.
const PATIENCE: Duration = Duration::from_secs(120);
/// Of a document that is read whole.
const LARGEST: usize = 4 << 20;
/// Calls are about one namespace.
const NAMESPACE: &str = "containerd-namespace";

/// A connection, and the namespace that everything of ours is in.
#[derive(Clone, Debug)]
pub(super) struct Client {
    socket: PathBuf,
    namespace: String,
    header: MetadataValue<Ascii>,
    channel: Channel,
}

impl Client {
    /// Nothing is done until the first call. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// A namespace whose name containerd would refuse.
    pub(super) fn new(socket: &Path, namespace: &str) -> Result<Self, RuntimeError> {
        let header = namespace.parse().map_err(|_| RuntimeError::Refused {
            what: "containerd namespace",
            reason: format!("{namespace:?} is no name of one"),
        })?;
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The socket leads there; the name is for the protocol's headers alone.
        let channel = Endpoint::from_static("http://localhost").connect_with_connector_lazy(connector);
        Ok(Self { socket: socket.to_owned(), namespace: namespace.to_owned(), header, channel })
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(super) fn namespace(&self) -> &str {
        &self.namespace
    }

    pub(super) async fn call<Q, A>(&self, call: &'static str, question: Q) -> Result<A, Status>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let late = |_| Status::deadline_exceeded(format!("no answer within {PATIENCE:?}"));
        timeout(PATIENCE, self.call_and_wait(call, question)).await.map_err(late)?
    }

    /// Of a call whose answer takes as long as it takes.
    pub(super) async fn call_and_wait<Q, A>(&self, call: &'static str, question: Q) -> Result<A, Status>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let mut grpc = self.ready().await?;
        let codec = ProstCodec::<Q, A>::default();
        Ok(grpc.unary(self.request(question), PathAndQuery::from_static(call), codec).await?.into_inner())
    }

    /// A document of containerd's store of contents.
    pub(super) async fn read(&self, digest: &str) -> Result<Vec<u8>, Status> {
        let read = async {
            let mut grpc = self.ready().await?;
            let codec = ProstCodec::<Named, Piece>::default();
            let request = self.request(Named { name: digest.to_owned() });
            let mut pieces =
                grpc.server_streaming(request, PathAndQuery::from_static(images::READ), codec).await?.into_inner();
            let mut content = Vec::new();
            while let Some(Piece { data }) = pieces.message().await? {
                if content.len() + data.len() > LARGEST {
                    return Err(Status::out_of_range(format!("{digest} is larger than {LARGEST} bytes")));
                }
                content.extend(data);
            }
            Ok(content)
        };
        timeout(PATIENCE, read).await.map_err(|_| Status::deadline_exceeded(format!("{digest} does not come")))?
    }

    /// What a failed call means for the caller.
    pub(super) fn failed(&self, step: &'static str, status: &Status) -> RuntimeError {
        if away(status) {
            let reason = format!("containerd at {} during {step}: {}", self.socket.display(), status.message());
            return RuntimeError::Unavailable(reason);
        }
        RuntimeError::Step { step, reason: status.message().to_owned() }
    }

    async fn ready(&self) -> Result<Grpc<Channel>, Status> {
        let mut grpc = Grpc::new(self.channel.clone());
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        Ok(grpc)
    }

    fn request<Q>(&self, question: Q) -> Request<Q> {
        let mut request = Request::new(question);
        request.metadata_mut().insert(NAMESPACE, self.header.clone());
        request
    }
}

/// Not an answer of containerd's: it is not there, or went while it was asked.
pub(super) fn away(status: &Status) -> bool {
    matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled)
        || std::error::Error::source(status).is_some()
}

/// The answer to a call about something that is not there.
pub(super) fn not_found(status: &Status) -> bool {
    status.code() == Code::NotFound
}

/// Of a call that takes something away: it is gone, which is what was wanted.
pub(super) fn gone<T: Default>(answer: Result<T, Status>) -> Result<T, Status> {
    match answer {
        Err(status) if not_found(&status) => Ok(T::default()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::super::api::{Empty, version};
    use super::*;

    #[tokio::test]
    async fn one_that_is_not_there_is_unavailable() {
        let client = Client::new(Path::new("/nowhere/containerd.sock"), "edge").expect("a name");
        let status = client.call::<_, version::Version>(version::GET, Empty {}).await.expect_err("nobody there");
        assert!(matches!(client.failed("ask", &status), RuntimeError::Unavailable(_)), "{status:?}");
        assert!(!away(&Status::unknown("OCI runtime create failed")));
        assert!(Client::new(Path::new("/c.sock"), "a\nb").is_err());
    }
}
