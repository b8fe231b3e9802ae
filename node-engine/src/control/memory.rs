//! A control plane in memory: the cluster is whoever holds the other end.

use async_trait::async_trait;
use tokio::sync::mpsc::{self, Receiver, Sender};

use super::ControlPlane;
use crate::drain::Drain;
use crate::model::{Command, Report};

const CAPACITY: usize = 256;

/// The node's end.
#[derive(Debug)]
pub struct Memory {
    commands: Receiver<Command>,
    reports: Sender<Report>,
}

/// The cluster's end: what is sent here the node hears, and what the node says arrives here.
#[derive(Debug)]
pub struct Remote {
    pub commands: Sender<Command>,
    pub reports: Receiver<Report>,
}

/// Both ends.
pub fn pair() -> (Memory, Remote) {
    let (to_node, commands) = mpsc::channel(CAPACITY);
    let (reports, from_node) = mpsc::channel(CAPACITY);
    (Memory { commands, reports }, Remote { commands: to_node, reports: from_node })
}

#[async_trait]
impl ControlPlane for Memory {
    async fn run(
        self: Box<Self>,
        commands: Sender<Command>,
        mut reports: Receiver<Report>,
        stop: Drain,
    ) -> anyhow::Result<()> {
        let Self { commands: mut incoming, reports: outgoing } = *self;
        let inward = async {
            while let Some(command) = incoming.recv().await {
                if commands.send(command).await.is_err() {
                    break;
                }
            }
            std::future::pending::<()>().await;
        };
        let outward = async {
            while let Some(report) = reports.recv().await {
                if outgoing.send(report).await.is_err() {
                    break;
                }
            }
        };
        tokio::pin!(outward);
        let deadline = tokio::select! {
            () = inward => return Ok(()),
            () = &mut outward => return Ok(()),
            deadline = stop.wait() => deadline,
        };
        // The reports go on until their last sender is gone; past the deadline nobody waits for them.
        let _ = tokio::time::timeout_at(deadline, outward).await;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn carries_both_ways_and_flushes_at_the_end() {
        let (node, mut cluster) = pair();
        let (commands, mut heard) = mpsc::channel(4);
        let (say, reports) = mpsc::channel(4);
        let stop = Drain::new(Duration::from_secs(5));
        let running = tokio::spawn(Box::new(node).run(commands, reports, stop.clone()));

        cluster.commands.send(Command::Connected).await.unwrap();
        assert!(matches!(heard.recv().await, Some(Command::Connected)));
        stop.begin();
        say.send(Report::SubnetRequest).await.unwrap();
        drop(say);
        assert!(matches!(cluster.reports.recv().await, Some(Report::SubnetRequest)));
        running.await.unwrap().unwrap();
    }
}
