//! Names for workloads: a small resolver at the bridge's own address, for the instances on this node and for nobody else.
//!
//! `web.test.default.app.edge` has the addresses of the service `app.default.web.test`; a label before it says which: a policy's
//! (`closest.…`, `rr.…`) or an instance's (`instance-0.…`). What this node does not know is asked of the cluster, and what it knows it
//! goes on answering while the cluster is away. All other names go to the host's own resolvers. Keeps no names itself, caches nothing
//! but the silence of those it asks, and does no DNSSEC.

mod limit;
mod server;
#[cfg(test)]
mod tests;
mod upstream;
mod zone;

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::drain::Drain;
use crate::model::{ServiceName, Subnet};
use crate::netmanager::NetManager;
use crate::netmanager::naming::Gateway;
use crate::netmanager::table::ServiceNets;
use crate::netmanager::view::Lookup;
use server::{Door, Server};
use upstream::Upstreams;

/// Where resolvers are asked.
pub const PORT: u16 = 53;
/// An address that is not there yet, or is somebody else's, is tried again so often.
const RETRY: Duration = Duration::from_secs(1);
/// An address may take a moment to be there; then it is worth a word.
const QUIET_TRIES: u32 = 3;

/// Who knows services and their addresses.
#[async_trait]
pub trait Directory: Send + Sync {
    async fn look_up(&self, service: ServiceName) -> Lookup;

    /// Whose address this is, and the label of what it means.
    async fn name_of(&self, address: IpAddr) -> Option<(ServiceName, String)>;
}

#[async_trait]
impl Directory for NetManager {
    async fn look_up(&self, service: ServiceName) -> Lookup {
        Self::look_up(self, service).await.unwrap_or(Lookup::Unreachable)
    }

    async fn name_of(&self, address: IpAddr) -> Option<(ServiceName, String)> {
        Self::name_of(self, address).await.ok().flatten()
    }
}

/// What answers names.
pub struct Names {
    pub directory: Arc<dyn Directory>,
    pub nets: ServiceNets,
    /// Name of the bridge: nobody is answered who does not come by it.
    pub bridge: String,
    pub gateway: watch::Receiver<Option<Gateway>>,
    /// Told where the resolver answers, as that changes: nothing until it is known, no address where it answers nowhere.
    pub resolvers: watch::Sender<Option<Vec<IpAddr>>>,
}

impl std::fmt::Debug for Names {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Names").field("bridge", &self.bridge).finish_non_exhaustive()
    }
}

/// An address and whoever answers there.
#[derive(Default)]
struct Post {
    tries: u32,
    task: Option<AbortOnDropHandle<io::Result<()>>>,
}

impl Names {
    /// Answers until the drain begins. An address that cannot be had is said once and tried again.
    ///
    /// # Errors
    /// None: a node without a resolver is still a node.
    pub async fn run(mut self, drain: Drain) -> anyhow::Result<()> {
        let upstreams = Arc::new(Upstreams::of_this_host());
        loop {
            let gateway = *self.gateway.borrow_and_update();
            let ended = match gateway {
                Some(gateway) => self.answer_at(gateway, &upstreams, &drain).await,
                None => tokio::select! {
                    changed = self.gateway.changed() => changed.is_err(),
                    _ = drain.wait() => true,
                },
            };
            if ended {
                // Whoever is connected now keeps asking here: the next start answers again.
                drain.wait().await;
                return Ok(());
            }
        }
    }

    /// True at the end, false where the gateway has changed.
    async fn answer_at(&mut self, gateway: Gateway, upstreams: &Arc<Upstreams>, drain: &Drain) -> bool {
        let zone = zone::Zone { nets: self.nets, subnet: gateway.subnet };
        upstreams.avoid(&[gateway.v4.into(), gateway.v6.into()]);
        let server = Arc::new(Server::new(Arc::clone(&self.directory), zone, Arc::clone(upstreams)));
        let mut posts: BTreeMap<IpAddr, Post> =
            [gateway.v4.into(), gateway.v6.into()].map(|address| (address, Post::default())).into();
        let mut retry = tokio::time::interval(RETRY);
        loop {
            tokio::select! {
                _ = retry.tick() => {}
                changed = self.gateway.changed() => return changed.is_err(),
                _ = drain.wait() => return true,
            }
            for (address, post) in &mut posts {
                self.man(*address, post, &server).await;
            }
            let manned: Vec<IpAddr> =
                posts.iter().filter(|(_, post)| post.task.is_some()).map(|(address, _)| *address).collect();
            // An address that is late holds nobody up who could ask the other; without any the host's resolvers do.
            let settled = !manned.is_empty() || posts.values().all(|post| post.tries >= QUIET_TRIES);
            if settled {
                let told = Some(manned);
                self.resolvers.send_if_modified(|resolvers| std::mem::replace(resolvers, told.clone()) != told);
            }
        }
    }

    async fn man(&self, address: IpAddr, post: &mut Post, server: &Arc<Server>) {
        if post.task.as_ref().is_some_and(|task| !task.is_finished()) {
            return;
        }
        if let Some(task) = post.task.take() {
            let ended = task.await;
            tracing::warn!(%address, ?ended, "the resolver for workloads has ended at this address and begins again");
        }
        match Door::open(address, PORT, Some(&self.bridge)) {
            Ok(door) => {
                tracing::info!(%address, "names of services are answered here");
                post.tries = 0;
                let server = Arc::clone(server);
                post.task = Some(AbortOnDropHandle::new(tokio::spawn(async move { server.serve(door).await })));
            }
            Err(error) => {
                post.tries = post.tries.saturating_add(1);
                if post.tries == QUIET_TRIES {
                    let hint = match error.kind() {
                        io::ErrorKind::AddrInUse => "another program has port 53 there: keep it to its own addresses",
                        _ => "it is tried again",
                    };
                    tracing::warn!(%address, %error, "workloads get no names of services from here ({hint})");
                }
            }
        }
    }
}

/// Is this the address of an instance on this node?
fn in_subnet(subnet: Subnet, address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => (v4.to_bits() ^ subnet.v4.to_bits()) >> (32 - u32::from(Subnet::V4_PREFIX)) == 0,
        IpAddr::V6(v6) => (v6.to_bits() ^ subnet.v6.to_bits()) >> (128 - u32::from(Subnet::V6_PREFIX)) == 0,
    }
}

/// What is answered to a datagram when nobody is known, for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn answer_of_nobody(bytes: &[u8], zone_nets: ServiceNets, subnet: Subnet) -> Option<Vec<u8>> {
    match zone::hear(bytes) {
        zone::Heard::Nothing => None,
        zone::Heard::Answer(answer) => Some(answer),
        zone::Heard::Question(question) => match (zone::Zone { nets: zone_nets, subnet }).read(&question.name) {
            zone::Asked::Foreign => question.failed(),
            zone::Asked::Part => question.nothing(),
            zone::Asked::Service { .. } | zone::Asked::Address(_) | zone::Asked::Nobody => question.no_such_name(),
        },
    }
}
