//! News from the kernel: links, addresses, routes or packet filter rules have changed. A burst is told once; what happens between two questions is kept.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::Stream;
use netlink_packet_core::NetlinkMessage;
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::MulticastGroup;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout_at};
use tracing::{debug, warn};

use super::kernel::Netlink;
use super::neighbour::Carriers;
use super::nft::Watch;

/// A deploy makes some twenty changes within a few milliseconds; one look at the result is enough.
const COALESCE: Duration = Duration::from_millis(50);
/// More than this within one window are told in two.
const BURST: usize = 65_536;
const REOPEN: Duration = Duration::from_secs(1);

const GROUPS: [MulticastGroup; 5] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
];

#[derive(Debug)]
pub(super) struct Changes {
    notify: Arc<Notify>,
    watcher: AbortHandle,
    filter: Option<AbortHandle>,
}

impl Changes {
    /// Watches the calling thread's namespace from now on.
    pub(super) fn watch() -> io::Result<Self> {
        let notify = Arc::new(Notify::new());
        let first = Subscription::open()?;
        let watcher = tokio::spawn(run(first, notify.clone())).abort_handle();
        // A kernel without nf_tables has no rules of ours either.
        let filter =
            Watch::open().inspect_err(|error| debug!(%error, "changes of packet filter rules are not told")).ok();
        let filter = filter.map(|watch| tokio::spawn(follow(watch, notify.clone())).abort_handle());
        Ok(Self { notify, watcher, filter })
    }

    /// Resolves when something has changed since the last time. Cancelling it loses nothing.
    pub(super) async fn next(&self) {
        self.notify.notified().await;
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        self.watcher.abort();
        if let Some(filter) = &self.filter {
            filter.abort();
        }
    }
}

async fn follow(watch: Watch, notify: Arc<Notify>) {
    loop {
        let heard = async {
            watch.next().await?;
            tokio::time::sleep(COALESCE).await;
            watch.drain()
        };
        if let Err(error) = heard.await {
            warn!(%error, "changes of packet filter rules are seen late");
            tokio::time::sleep(REOPEN).await;
        }
        notify.notify_one();
    }
}

/// A socket that overflowed or broke leaves us blind for a moment: that counts as a change.
async fn run(first: Subscription, notify: Arc<Notify>) {
    let mut subscription = Some(first);
    let mut carriers = Carriers::default();
    loop {
        if let Some(Subscription { mut messages, netlink }) = subscription.take() {
            while let Some(news) = messages.next().await {
                at_once(&netlink, carriers.raised(&news)).await;
                let told = Instant::now() + COALESCE;
                for _ in 0..BURST {
                    match timeout_at(told, messages.next()).await {
                        Ok(Some(news)) => at_once(&netlink, carriers.raised(&news)).await,
                        Ok(None) | Err(_) => break,
                    }
                }
                notify.notify_one();
            }
        }
        tokio::time::sleep(REOPEN).await;
        match Subscription::open() {
            Ok(again) => subscription = Some(again),
            Err(error) => warn!(%error, "changes of links, addresses and routes are not seen: netlink does not open"),
        }
        notify.notify_one();
    }
}

/// What cannot wait until a burst is over: this interface has a carrier again.
async fn at_once(netlink: &Netlink, raised: Option<u32>) {
    let Some(link) = raised else { return };
    match netlink.seek_anew(link).await {
        Ok(0) => {}
        Ok(neighbours) => debug!(link, neighbours, "a carrier is back: who has not answered is looked for anew"),
        Err(error) => debug!(link, %error, "a carrier is back: neighbours are found when the kernel looks for them"),
    }
}

struct Subscription {
    messages: Pin<Box<dyn Stream<Item = NetlinkMessage<RouteNetlinkMessage>> + Send>>,
    /// The connection ends when both this and the stream are gone.
    netlink: Netlink,
}

impl Subscription {
    fn open() -> io::Result<Self> {
        let (connection, handle, messages) = rtnetlink::new_multicast_connection(&GROUPS)?;
        let netlink = Netlink::over(handle, tokio::spawn(connection).abort_handle());
        Ok(Self { messages: Box::pin(messages.map(|(message, _)| message)), netlink })
    }
}
