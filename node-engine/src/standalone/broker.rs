//! The embedded MQTT broker. It runs on a thread of its own with its own event loop, is started anew should its router die, and
//! ends when the handle is dropped: the listener closes and every connection with it. (The router's thread stays parked until
//! the process ends; the library has no way to stop it.)

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::thread;
use std::time::Duration;

use rumqttd::protocol::v4::V4;
use rumqttd::{ConnectionSettings, LinkType, Router, RouterConfig, Server, ServerSettings};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout};

/// Largest payload: a table or a job document of a large service, or the list of what runs on a busy node.
const MAX_PAYLOAD: usize = 1024 * 1024;

/// The broker keeps a log for each subscription; what a subscriber has not read when it is full is lost to it.
const SEGMENT_BYTES: usize = 256 * 1024;
const SEGMENTS: usize = 4;

/// Nodes have two connections each, and there may be some that only listen.
const MAX_CONNECTIONS: usize = 10_010;

/// Why there is no broker.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    #[error("the broker cannot listen on {address}: another program may have the port")]
    Listen {
        address: SocketAddr,
        #[source]
        source: io::Error,
    },
    #[error("the broker's thread cannot be started")]
    Thread(#[source] io::Error),
    #[error("the broker did not accept connections on {address} within 10 seconds")]
    NotReady { address: SocketAddr },
}

const READY: Duration = Duration::from_secs(10);

/// A running broker.
#[derive(Debug)]
pub(super) struct Broker {
    pub(super) address: SocketAddr,
    stop: oneshot::Sender<()>,
    stopped: oneshot::Receiver<()>,
}

impl Broker {
    /// Returns when the broker accepts connections. Port 0 takes a free one.
    pub(super) async fn start(listen: SocketAddr) -> Result<Self, BrokerError> {
        let address = free_address(listen).map_err(|source| BrokerError::Listen { address: listen, source })?;
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(BrokerError::Thread)?;
        let (stop, told) = oneshot::channel();
        let (tell, stopped) = oneshot::channel();
        let body = move || {
            runtime.block_on(run(address, told));
            drop(runtime);
            // Nobody may be waiting for it.
            let _ = tell.send(());
        };
        thread::Builder::new().name("broker".into()).spawn(body).map_err(BrokerError::Thread)?;
        let broker = Self { address, stop, stopped };
        broker.ready().await?;
        Ok(broker)
    }

    /// Where a client on this machine finds the broker.
    pub(super) fn local(&self) -> SocketAddr {
        let ip = match self.address.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
            ip => ip,
        };
        SocketAddr::new(ip, self.address.port())
    }

    /// Returns when the port is free again.
    pub(super) async fn stop(self) {
        drop(self.stop);
        let _ = self.stopped.await;
    }

    async fn ready(&self) -> Result<(), BrokerError> {
        let connects = async {
            while TcpStream::connect(self.local()).await.is_err() {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(READY, connects).await.map_err(|_| BrokerError::NotReady { address: self.address })
    }
}

/// The broker binds by itself and only logs a failure: finding it out beforehand gives an error to show.
fn free_address(listen: SocketAddr) -> io::Result<SocketAddr> {
    std::net::TcpListener::bind(listen)?.local_addr()
}

async fn run(address: SocketAddr, mut stopped: oneshot::Receiver<()>) {
    loop {
        let started = Instant::now();
        let router = Router::new(0, router_config()).spawn();
        let mut server = Server::new(settings(address), router.clone(), V4);
        let router_died = async {
            while !router.is_disconnected() {
                sleep(Duration::from_secs(1)).await;
            }
        };
        tokio::select! {
            _ = &mut stopped => return,
            ended = server.start(LinkType::Remote) => tracing::error!(?ended, "the broker's listener ended; starting it anew"),
            () = router_died => tracing::error!("the broker's router died; starting it anew"),
        }
        // Not in a circle, should the cause last.
        tokio::time::sleep_until(started + Duration::from_secs(1)).await;
    }
}

fn router_config() -> RouterConfig {
    RouterConfig {
        max_connections: MAX_CONNECTIONS,
        max_outgoing_packet_count: 200,
        max_segment_size: SEGMENT_BYTES,
        max_segment_count: SEGMENTS,
        ..RouterConfig::default()
    }
}

fn settings(address: SocketAddr) -> ServerSettings {
    ServerSettings {
        name: "embedded".into(),
        listen: address,
        tls: None,
        next_connection_delay_ms: 1,
        connections: ConnectionSettings {
            connection_timeout_ms: 10_000,
            max_payload_size: MAX_PAYLOAD,
            max_inflight_count: 100,
            auth: None,
            external_auth: None,
            dynamic_filters: false,
        },
    }
}
