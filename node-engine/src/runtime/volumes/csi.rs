//! What a node says to a volume driver: the Container Storage Interface v1 (its `csi.proto`), as far as a node without a controller needs
//! it, over the driver's unix socket.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::net::UnixStream;
use tokio::time::timeout;
use tonic::client::Grpc;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};
use tonic_prost::ProstCodec;

pub(super) const PROBE: &str = "/csi.v1.Identity/Probe";
pub(super) const PLUGIN_INFO: &str = "/csi.v1.Identity/GetPluginInfo";
pub(super) const CAPABILITIES: &str = "/csi.v1.Node/NodeGetCapabilities";
pub(super) const STAGE: &str = "/csi.v1.Node/NodeStageVolume";
pub(super) const UNSTAGE: &str = "/csi.v1.Node/NodeUnstageVolume";
pub(super) const PUBLISH: &str = "/csi.v1.Node/NodePublishVolume";
pub(super) const UNPUBLISH: &str = "/csi.v1.Node/NodeUnpublishVolume";

/// `NodeServiceCapability.RPC.Type`.
const STAGE_UNSTAGE_VOLUME: i32 = 1;
/// `VolumeCapability.AccessMode.Mode`: one node, reading and writing.
const SINGLE_NODE_WRITER: i32 = 1;

/// A driver says who it is within it.
const PROBE_PATIENCE: Duration = Duration::from_secs(10);
/// Mounting a volume may mean to reach a server far away.
const PATIENCE: Duration = Duration::from_secs(120);

/// A request or an answer without members.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Nothing {}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PluginInfo {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(string, tag = "2")]
    pub(super) version: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Capabilities {
    #[prost(message, repeated, tag = "1")]
    pub(super) capabilities: Vec<NodeCapability>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct NodeCapability {
    #[prost(message, optional, tag = "1")]
    pub(super) rpc: Option<Rpc>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Rpc {
    #[prost(int32, tag = "1")]
    pub(super) kind: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct VolumeCapability {
    #[prost(message, optional, tag = "2")]
    pub(super) mount: Option<Nothing>,
    #[prost(message, optional, tag = "3")]
    pub(super) access: Option<AccessMode>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct AccessMode {
    #[prost(int32, tag = "1")]
    pub(super) mode: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Stage {
    #[prost(string, tag = "1")]
    pub(super) volume: String,
    #[prost(string, tag = "3")]
    pub(super) staging_path: String,
    #[prost(message, optional, tag = "4")]
    pub(super) capability: Option<VolumeCapability>,
    #[prost(map = "string, string", tag = "6")]
    pub(super) context: HashMap<String, String>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Publish {
    #[prost(string, tag = "1")]
    pub(super) volume: String,
    #[prost(string, tag = "3")]
    pub(super) staging_path: String,
    #[prost(string, tag = "4")]
    pub(super) target_path: String,
    #[prost(message, optional, tag = "5")]
    pub(super) capability: Option<VolumeCapability>,
    #[prost(map = "string, string", tag = "8")]
    pub(super) context: HashMap<String, String>,
}

/// Of a volume and a path: where it was staged, or where it was published.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Undo {
    #[prost(string, tag = "1")]
    pub(super) volume: String,
    #[prost(string, tag = "2")]
    pub(super) path: String,
}

/// How every volume is used here.
pub(super) fn capability() -> Option<VolumeCapability> {
    Some(VolumeCapability { mount: Some(Nothing {}), access: Some(AccessMode { mode: SINGLE_NODE_WRITER }) })
}

/// A connection to one driver.
#[derive(Clone, Debug)]
pub(super) struct Driver {
    channel: Channel,
}

impl Driver {
    pub(super) async fn connect(socket: &Path) -> io::Result<Self> {
        let path: PathBuf = socket.to_owned();
        // The socket leads there; the name is for the protocol's headers alone.
        let endpoint = Endpoint::from_static("http://localhost");
        let connector = tower::service_fn(move |_| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let connected = timeout(PROBE_PATIENCE, endpoint.connect_with_connector(connector)).await;
        let channel = connected.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?.map_err(io::Error::other)?;
        Ok(Self { channel })
    }

    /// Its name, once it says that it is ready.
    pub(super) async fn name(&self) -> Result<String, Status> {
        let _: Nothing = self.call(PROBE, Nothing {}, PROBE_PATIENCE).await?;
        let info: PluginInfo = self.call(PLUGIN_INFO, Nothing {}, PROBE_PATIENCE).await?;
        Ok(info.name)
    }

    /// Whether volumes are made ready for the node before they are for an instance.
    pub(super) async fn stages(&self) -> Result<bool, Status> {
        let answer: Capabilities = self.call(CAPABILITIES, Nothing {}, PROBE_PATIENCE).await?;
        let stages = |one: &NodeCapability| one.rpc.as_ref().is_some_and(|rpc| rpc.kind == STAGE_UNSTAGE_VOLUME);
        Ok(answer.capabilities.iter().any(stages))
    }

    pub(super) async fn ask<Q: Message + 'static>(&self, call: &'static str, question: Q) -> Result<(), Status> {
        let _: Nothing = self.call(call, question, PATIENCE).await?;
        Ok(())
    }

    async fn call<Q, A>(&self, call: &'static str, question: Q, patience: Duration) -> Result<A, Status>
    where
        Q: Message + 'static,
        A: Message + Default + 'static,
    {
        let answer = async {
            let mut grpc = Grpc::new(self.channel.clone());
            grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
            let codec = ProstCodec::<Q, A>::default();
            grpc.unary(Request::new(question), PathAndQuery::from_static(call), codec).await
        };
        let late = || Status::deadline_exceeded(format!("no answer within {patience:?}"));
        Ok(timeout(patience, answer).await.map_err(|_| late())??.into_inner())
    }
}
