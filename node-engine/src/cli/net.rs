//! Tables of the overlay, once or again and again.

mod rows;

use clap::Subcommand;

use self::rows::{Counters, Details};
use super::watch::{Repeat, print, show};
use crate::api::Selector;
use crate::api::client::Client;
use crate::api::dto::net::{Choice, Counter, Flow, Page, Peer, Service};

/// Services that may have the same short name.
const MOST_NAMESAKES: usize = 100;

#[derive(Debug, Subcommand)]
pub(super) enum NetCommand {
    /// Flows from instances on this node to services, and whom each has chosen
    Flows {
        /// Only to this service
        #[arg(long, value_name = "NAME")]
        service: Option<Selector>,
        /// Only from or to this instance
        #[arg(long, value_name = "NAME[#N]")]
        instance: Option<Selector>,
        /// Rows at most
        #[arg(long, value_name = "N", default_value_t = 100)]
        limit: usize,
        #[command(flatten)]
        repeat: Repeat,
    },
    /// Services that this node knows: addresses, instances, where they are
    Services {
        /// Only this service
        #[arg(long, value_name = "NAME")]
        service: Option<Selector>,
        /// Services at most
        #[arg(long, value_name = "N", default_value_t = 100)]
        limit: usize,
        #[command(flatten)]
        repeat: Repeat,
    },
    /// One service: whom new flows are sent to, how far each is, how often it was chosen, who is passed over or on its way out
    Service {
        /// Its name
        #[arg(value_name = "NAME")]
        service: Selector,
        #[command(flatten)]
        repeat: Repeat,
    },
    /// Other nodes that this one knows
    Peers {
        #[command(flatten)]
        repeat: Repeat,
    },
    /// Changes what carries the packets, while they flow: until the next start
    Datapath {
        /// `auto` is the fastest that works here; `ebpf-plain` does without what kernels before 5.10 lack
        #[arg(value_parser = ["auto", "ebpf", "ebpf-plain", "tun"])]
        datapath: String,
    },
    /// What was carried and what was dropped, why, and what to do about it
    Drops {
        /// Also what has never happened
        #[arg(long)]
        all: bool,
        #[command(flatten)]
        repeat: Repeat,
    },
}

impl NetCommand {
    pub(super) async fn run(self, client: &Client) -> anyhow::Result<()> {
        match self {
            Self::Flows { service, instance, limit, repeat } => {
                let choice = choice(service, instance, limit);
                show::<Page<Flow>, _>(repeat, async || client.flows(&choice).await).await
            }
            Self::Services { service, limit, repeat } => {
                let choice = choice(service, None, limit);
                show::<Page<Service>, _>(repeat, async || client.services(&choice).await).await
            }
            Self::Service { service, repeat } => {
                let choice = choice(Some(service), None, MOST_NAMESAKES);
                show::<Details, _>(repeat, async || client.services(&choice).await.map(Details)).await
            }
            Self::Peers { repeat } => show::<Vec<Peer>, _>(repeat, async || client.peers().await).await,
            Self::Datapath { datapath } => {
                let now = client.switch(&datapath).await?;
                let why = if now.reason.is_empty() { String::new() } else { format!(": {}", now.reason) };
                print(format!("{}{why}\n", now.datapath).as_bytes()).map(drop)
            }
            Self::Drops { all, repeat } => {
                let ask = async || {
                    let mut known: Vec<Counter> = client.counters().await?;
                    known.retain(|counter| all || counter.count > 0);
                    Ok(Counters(known))
                };
                show(repeat, ask).await
            }
        }
    }
}

fn choice(service: Option<Selector>, instance: Option<Selector>, limit: usize) -> Choice {
    Choice {
        service: service.map(|selector| selector.to_string()),
        instance: instance.map(|selector| selector.to_string()),
        limit: Some(limit),
    }
}
