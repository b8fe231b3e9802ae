//! Becoming a node of the cluster: finding out what kind of cluster it is, and being taken in.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use tokio::net::{UdpSocket, lookup_host};
use tracing::debug;

use super::http::{self, HttpError, ask, authority};
use super::socketio::{self, SocketIoError, TransportError};
use crate::backoff::outline;
use crate::config::ClusterConfig;
use crate::model::{Generation, NodeFacts, NodeIdentity, NodeUsage};
use crate::wire::json::{MAX_MESSAGE, Malformed, Members, excerpt};
use crate::wire::register;

/// Cluster managers since the second generation, and the ones before.
const HTTP_PORT: u16 = 10100;
const SOCKETIO_PORT: u16 = 10000;

/// Why a registration did not happen. Every one is worth another try.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RegisterError {
    #[error("no cluster manager at {url}: {source}")]
    Unreachable {
        url: String,
        #[source]
        source: HttpError,
    },
    #[error("nobody registers nodes at {0}")]
    NoSuchPlace(String),
    #[error("the cluster manager at {url} refused the registration with {status}: {body}")]
    Refused { url: String, status: u16, body: String },
    #[error("the cluster manager at {url} answered with nonsense: {source}: {body}")]
    Malformed {
        url: String,
        #[source]
        source: Malformed,
        body: String,
    },
    #[error("no first-generation cluster manager at {url}: {source}")]
    SocketIo {
        url: String,
        #[source]
        source: SocketIoError,
    },
    #[error("{http}; {socketio}")]
    Neither { http: Box<RegisterError>, socketio: Box<RegisterError> },
}

/// A node that was taken in.
#[derive(Clone, Debug)]
pub(super) struct Registration {
    pub(super) identity: NodeIdentity,
    /// This node's address as its peers and the cluster see it.
    pub(super) address: Option<IpAddr>,
}

/// What it takes to register.
#[derive(Clone, Debug)]
pub(super) struct Registrar {
    pub(super) http: reqwest::Client,
    pub(super) cluster: ClusterConfig,
    pub(super) facts: NodeFacts,
    pub(super) public_address: Option<IpAddr>,
    pub(super) overlay_address: Option<IpAddr>,
    pub(super) tunnel_port: u16,
}

impl Registrar {
    pub(super) async fn register(self, usage: NodeUsage) -> Result<Registration, RegisterError> {
        let address = self.own_address().await;
        let identity = match self.cluster.generation {
            Some(Generation::G1 | Generation::G1b) => self.by_socketio(&usage, address).await?,
            Some(known) => self.by_http(Some(known), &usage, address).await?,
            None => self.by_probing(&usage, address).await?,
        };
        Ok(Registration { identity, address })
    }

    /// HTTP first; where nobody registers nodes that way, the older conversation. A cluster that answers and refuses is no
    /// older one.
    async fn by_probing(&self, usage: &NodeUsage, address: Option<IpAddr>) -> Result<NodeIdentity, RegisterError> {
        let http = match self.by_http(None, usage, address).await {
            Err(error @ (RegisterError::Unreachable { .. } | RegisterError::NoSuchPlace(_))) => error,
            decided => return decided,
        };
        debug!(%http, "trying a first-generation cluster");
        match self.by_socketio(usage, address).await {
            Ok(identity) => Ok(identity),
            Err(socketio) => Err(RegisterError::Neither { http: Box::new(http), socketio: Box::new(socketio) }),
        }
    }

    async fn by_http(
        &self,
        known: Option<Generation>,
        usage: &NodeUsage,
        address: Option<IpAddr>,
    ) -> Result<NodeIdentity, RegisterError> {
        let base = self.base(HTTP_PORT);
        let generation = match known {
            Some(generation) => generation,
            None => self.generation(&base).await?,
        };
        let url = format!("{base}/api/node/register");
        let body = register::registration(generation, &self.facts, usage, address);
        let request = self.http.post(&url).header("content-type", "application/json").body(body);
        let answer = match ask(request, MAX_MESSAGE).await {
            Ok(answer) => answer,
            Err(source) => return Err(RegisterError::Unreachable { url, source }),
        };
        match answer.status {
            200..=299 => register::read_answer(&answer.body, generation).map_err(|source| RegisterError::Malformed {
                url,
                source,
                body: excerpt(&answer.body),
            }),
            404 | 405 => Err(RegisterError::NoSuchPlace(url)),
            status => Err(RegisterError::Refused { url, status, body: excerpt(&answer.body) }),
        }
    }

    /// Only clusters of the newest generation tell their status; one that its root has not taken in yet has no id to tell.
    async fn generation(&self, base: &str) -> Result<Generation, RegisterError> {
        let url = format!("{base}/api/cluster/status");
        let answer = match ask(self.http.get(&url), MAX_MESSAGE).await {
            Ok(answer) => answer,
            Err(source) => return Err(RegisterError::Unreachable { url, source }),
        };
        let tells = |members: Members<'_>| members.has("cluster_id") || members.has("connected_to_root");
        match answer.status {
            200 if Members::parse(&answer.body, MAX_MESSAGE).is_ok_and(tells) => Ok(Generation::G4),
            // Of no generation is known that it cannot say: whoever guesses here guesses for as long as it is connected.
            status @ 500.. => Err(RegisterError::Refused { url, status, body: excerpt(&answer.body) }),
            _ => Ok(Generation::G2),
        }
    }

    async fn by_socketio(&self, usage: &NodeUsage, address: Option<IpAddr>) -> Result<NodeIdentity, RegisterError> {
        let base = self.base(SOCKETIO_PORT);
        let greeting = register::greeting(&self.facts, usage, address, self.tunnel_port);
        let answer = match socketio::register(&self.http, &base, &greeting).await {
            Ok(answer) => answer,
            Err(source) => return Err(RegisterError::SocketIo { url: base, source }),
        };
        let mut identity = register::read_answer(answer.as_bytes(), Generation::G1)
            .map_err(|source| RegisterError::Malformed { url: base, source, body: excerpt(answer.as_bytes()) })?;
        // Who assigns no subnet here has a service manager to ask: the generation between the first and the second. At the second's
        // own port it is the second, which has this conversation still.
        if identity.subnet.is_none() {
            let second = self.cluster.port == Some(HTTP_PORT) && self.cluster.generation != Some(Generation::G1b);
            identity.generation = if second { Generation::G2 } else { Generation::G1b };
        }
        Ok(identity)
    }

    fn base(&self, port: u16) -> String {
        let scheme = if self.cluster.tls { "https" } else { "http" };
        format!("{scheme}://{}", authority(&self.cluster.host, self.cluster.port.unwrap_or(port)))
    }

    /// Where the first-generation cluster manager answers questions.
    pub(super) fn overlay_url(&self, path: &str) -> String {
        format!("{}{path}", self.base(SOCKETIO_PORT))
    }

    /// The configured address, or the one packets to the cluster leave from. Nothing is sent to find out. Packets to a cluster on this
    /// machine leave from where no peer gets to, and which the overlay does not take for its own.
    pub(super) async fn own_address(&self) -> Option<IpAddr> {
        if let Some(address) = self.public_address {
            return Some(address);
        }
        let found = lookup_host((self.cluster.host.as_str(), 0)).await.ok()?;
        let (cluster, own) = way_out(&by_preference(found.map(|address| address.ip()).collect())).await?;
        let elsewhere = self.overlay_address.filter(|_| is_here(cluster, own));
        Some(elsewhere.unwrap_or(own))
    }
}

/// Is this cluster, to which packets leave from `own`, on this very machine?
fn is_here(cluster: IpAddr, own: IpAddr) -> bool {
    own.is_loopback() || own == cluster
}

/// Of the cluster's addresses the one that a node speaks to; the first of them where there is a way to none.
pub(crate) async fn preferred(addresses: Vec<IpAddr>) -> Option<IpAddr> {
    let addresses = by_preference(addresses);
    way_out(&addresses).await.map(|(cluster, _)| cluster).or(addresses.first().copied())
}

/// IPv4 before IPv6.
fn by_preference(mut addresses: Vec<IpAddr>) -> Vec<IpAddr> {
    addresses.sort_by_key(IpAddr::is_ipv6);
    addresses
}

/// The first address that there is a way to, and the one that packets to it leave from. Nothing is sent to find out.
async fn way_out(addresses: &[IpAddr]) -> Option<(IpAddr, IpAddr)> {
    for cluster in addresses {
        let unspecified: IpAddr =
            if cluster.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let Ok(socket) = UdpSocket::bind((unspecified, 0)).await else { continue };
        if socket.connect((*cluster, HTTP_PORT)).await.is_ok() {
            return socket.local_addr().ok().map(|own| (*cluster, own.ip()));
        }
    }
    None
}

impl RegisterError {
    /// What stays the same while the same thing is wrong: said once, not with every try. A name that nobody knows, a port where nobody
    /// listens and a certificate that is not trusted are three things.
    pub(super) fn cause(&self) -> String {
        match self {
            Self::Unreachable { source, .. } => outline(&innermost(source)),
            Self::NoSuchPlace(_) => "no such place".into(),
            Self::Refused { status, .. } => format!("refused with {status}"),
            Self::Malformed { .. } => "malformed".into(),
            Self::SocketIo { source, .. } => match source {
                SocketIoError::Transport(TransportError::Http(source)) => outline(&innermost(source)),
                SocketIoError::Transport(TransportError::Socket(source)) => outline(&innermost(source)),
                SocketIoError::Transport(TransportError::Status { status, .. }) => format!("refused with {status}"),
                SocketIoError::Transport(_) => "no socket.io".into(),
                SocketIoError::Refused(_) | SocketIoError::Ended => "socket.io refused".into(),
                SocketIoError::Timeout => "socket.io timeout".into(),
            },
            Self::Neither { http, socketio } => {
                let (http, socketio) = (http.cause(), socketio.cause());
                if http == socketio { http } else { format!("{http}; {socketio}") }
            }
        }
    }
}

/// Errors around it only say what was tried.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// A client for the cluster manager.
pub(super) fn http_client(tls: bool) -> Result<reqwest::Client, HttpError> {
    http::client(tls)
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_cluster_with_two_families_is_spoken_to_over_ipv4() {
        let of = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpAddr>>();
        let both = of(&["::1", "127.0.0.1"]);
        assert_eq!(preferred(both.clone()).await, Some(both[1]));
        assert_eq!(way_out(&by_preference(both.clone())).await, Some((both[1], both[1])));
        assert_eq!(preferred(of(&["::1"])).await, Some(both[0]));
        // No way leads to either, from anywhere: the one is without its link, the other for who asks to broadcast.
        assert_eq!(preferred(of(&["fe80::1", "255.255.255.255"])).await, of(&["255.255.255.255"]).pop());
        assert_eq!(preferred(Vec::new()).await, None);
    }

    #[tokio::test]
    async fn causes_are_told_from_each_other_and_from_the_words_around_them() {
        let unused = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
        let refused = fails(unused, Some(Generation::G2)).await;
        assert!(refused.to_lowercase().contains("refused") && !refused.contains("http"), "{refused}");
        assert_eq!(fails(unused, None).await, refused, "both ways, for one reason");

        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move { while listener.accept().await.is_ok() {} });
        assert_ne!(fails(port, Some(Generation::G2)).await, refused);

        let answered =
            |status, body: &str| RegisterError::Refused { url: "u".into(), status, body: body.into() }.cause();
        assert_ne!(answered(401, ""), answered(503, ""));
        assert_eq!(answered(503, "at 12:00"), answered(503, "at 12:01"));
    }

    /// Why nobody takes a node in at this port.
    async fn fails(port: u16, generation: Option<Generation>) -> String {
        let host = "127.0.0.1".into();
        let cluster = ClusterConfig { host, port: Some(port), tls: false, generation, mqtt_tls: None };
        let (http, facts) = (http_client(false).unwrap(), NodeFacts::default());
        let registrar =
            Registrar { http, cluster, facts, public_address: None, overlay_address: None, tunnel_port: 50103 };
        registrar.register(NodeUsage::default()).await.unwrap_err().cause()
    }

    #[test]
    fn a_cluster_on_this_machine_is_told_by_the_way_there() {
        for (cluster, own, here) in [
            ("127.0.0.1", "127.0.0.1", true),
            ("127.0.0.2", "127.0.0.1", true),
            ("::1", "::1", true),
            ("192.0.2.7", "192.0.2.7", true),
            ("2001:db8::7", "2001:db8::7", true),
            ("192.0.2.1", "192.0.2.7", false),
            ("2001:db8::1", "2001:db8::7", false),
        ] {
            assert_eq!(is_here(cluster.parse().unwrap(), own.parse().unwrap()), here, "{cluster} from {own}");
        }
    }

    #[tokio::test]
    async fn a_cluster_on_this_machine_does_not_make_a_node_its_own_peer() {
        let address = |text: &str| Some(text.parse::<IpAddr>().unwrap());
        let of = async |host: &str, public_address: Option<IpAddr>, overlay_address: Option<IpAddr>| {
            let cluster = ClusterConfig { host: host.into(), port: None, tls: false, generation: None, mqtt_tls: None };
            let (http, facts) = (http_client(false).unwrap(), NodeFacts::default());
            let registrar = Registrar { http, cluster, facts, public_address, overlay_address, tunnel_port: 50103 };
            registrar.own_address().await
        };
        for host in ["127.0.0.1", "localhost"] {
            assert_eq!(of(host, None, address("192.0.2.7")).await, address("192.0.2.7"), "{host}");
        }
        assert_eq!(of("127.0.0.1", address("192.0.2.9"), address("192.0.2.7")).await, address("192.0.2.9"));
        assert_eq!(of("127.0.0.1", None, None).await, address("127.0.0.1"), "there is no better one");
    }
}
