//! The wire to the cluster. A control plane is a pump between the cluster and two closed enums; it holds no state of instances
//! or networks, decides nothing about them, and never ends because of what the cluster says.

mod cluster;
mod encode;
mod exception;
mod http;
pub mod memory;
mod mqtt;
mod outbox;
mod register;
pub(crate) mod socketio;
pub mod tls;

pub use cluster::{Cluster, Node};
pub(crate) use cluster::{SHORT_LIVED, STABLE};
pub(crate) use register::preferred;

use async_trait::async_trait;
use tokio::sync::mpsc::{Receiver, Sender};

use crate::drain::Drain;
use crate::model::{Command, Report};

/// A connection to a cluster: registers, receives commands, sends reports, and reconnects for ever.
#[async_trait]
pub trait ControlPlane: Send {
    /// Runs until `stop`, then flushes the reports already queued within the drain's deadline.
    ///
    /// # Errors
    /// Only what no retry can mend, such as an unreadable TLS key.
    async fn run(
        self: Box<Self>,
        commands: Sender<Command>,
        reports: Receiver<Report>,
        stop: Drain,
    ) -> anyhow::Result<()>;
}

#[cfg(test)]
mod tests;
