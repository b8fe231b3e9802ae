//! A whole laboratory: a switch, a cluster on it, and nodes.

use std::thread;

use anyhow::{Context, Result, anyhow};

use crate::cluster::{Broker, Cluster, Deploy, InstanceRow};
use crate::host::{Docker, Host};
use crate::image;
use crate::lan::Lan;
use crate::node::{Datapath, Node};
use crate::scratch::Scratch;
use crate::traffic::Container;

/// What a laboratory consists of.
#[derive(Clone, Debug)]
pub struct Plan<'a> {
    pub nodes: u8,
    pub datapath: Datapath,
    pub broker: Broker,
    /// Further arguments of every node's daemon.
    pub options: &'a [&'a str],
    /// Settings of every node's daemon, as variables of its environment.
    pub settings: &'a [(&'a str, &'a str)],
    /// Further arguments of the cluster.
    pub cluster_options: &'a [&'a str],
}

impl Plan<'_> {
    pub fn new(nodes: u8, datapath: Datapath) -> Self {
        Self { nodes, datapath, broker: Broker::Embedded, options: &[], settings: &[], cluster_options: &[] }
    }
}

/// A running laboratory. Fields go in this order when it is dropped.
#[derive(Debug)]
pub struct Lab {
    pub nodes: Vec<Node>,
    pub cluster: Cluster,
    pub lan: Lan,
    scratch: Scratch,
}

impl Lab {
    /// Builds it and waits until every node has joined.
    pub fn start(plan: &Plan<'_>) -> Result<Self> {
        let mut lab = Self::prepare(plan)?;
        for node in &mut lab.nodes {
            node.start()?;
        }
        for node in &mut lab.nodes {
            node.joined()?;
        }
        Ok(lab)
    }

    /// Builds it with the daemons not started yet.
    pub fn prepare(plan: &Plan<'_>) -> Result<Self> {
        let scratch = Scratch::new()?;
        let lan = Lan::new()?;
        let (cluster, hosts) = thread::scope(|scope| {
            let boots: Vec<_> = (1..=plan.nodes)
                .map(|number| {
                    let scratch = &scratch;
                    scope.spawn(move || boot(scratch, number))
                })
                .collect();
            let cluster = Cluster::start(&scratch, &lan, plan.broker, plan.cluster_options);
            let hosts: Vec<Result<Host>> = boots
                .into_iter()
                .map(|boot| boot.join().unwrap_or_else(|_| Err(anyhow!("a host's boot panicked"))))
                .collect();
            (cluster, hosts)
        });
        let cluster = cluster?;
        let mut nodes = Vec::new();
        for (host, number) in hosts.into_iter().zip(1..) {
            let host = host?;
            lan.plug(&host, number)?;
            nodes.push(Node::new(host, number, plan.datapath, plan.options).with_settings(plan.settings));
        }
        Ok(Self { nodes, cluster, lan, scratch })
    }

    /// Deploys and waits until the service has so many instances in all.
    pub fn deploy(&self, what: &Deploy<'_>, in_all: usize) -> Result<Vec<InstanceRow>> {
        self.cluster.deploy(what)?;
        self.cluster.running(what.name, in_all)
    }

    /// The node with this name.
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes.iter().find(|node| node.host.name() == name).with_context(|| format!("no node {name}"))
    }

    /// Runs the action with the instance's container, wherever it is.
    pub fn within<T>(&self, instance: &InstanceRow, act: impl FnOnce(Container<'_>) -> Result<T>) -> Result<T> {
        let name = instance.container();
        act(self.node(&instance.node)?.container(&name))
    }

    pub fn directory(&self) -> &std::path::Path {
        self.scratch.path()
    }
}

/// `node-a` is number 1.
pub fn node_name(number: u8) -> String {
    format!("node-{}", char::from(b'a' + number.saturating_sub(1)))
}

fn boot(scratch: &Scratch, number: u8) -> Result<Host> {
    let host = Host::boot(scratch, &node_name(number), Docker::Yes)?;
    image::load(&host)?;
    Ok(host)
}
