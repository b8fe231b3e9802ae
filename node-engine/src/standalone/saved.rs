//! What the manager keeps over a restart: `<state dir>/cluster.json`, with the copy before it as `cluster.json.old`.
//!
//! Each save is a new file, synced and renamed over the old one, so that a crash leaves the one or the other. A file that cannot
//! be read is kept aside under another name and its predecessor is used; subnets are then counted on from further up, because
//! the latest ones may not be in it and must not be handed out twice.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::{NodeId, Policy, ServiceName, Subnet, Technology};

use super::address::AddressPlan;
use super::core::{Core, ORDERS_RESERVED, number_of};
use super::inventory::{AddressPair, Deployed, Instance, InstanceUsage, Node, NodeFacts, Phase, Request, Service};

/// How far subnets are counted on after a loss. A predecessor is one save behind, and one save holds what came in one batch.
const SUBNETS_IN_DOUBT: u32 = 1024;

/// Why the state cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    #[error("cannot {step} {path}: check that the state directory exists, is writable and has space")]
    File {
        step: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the task that writes the state ended before it was done")]
    Task(#[source] tokio::task::JoinError),
}

/// The files of one embedded cluster.
#[derive(Clone, Debug)]
pub(super) struct Saved {
    current: PathBuf,
    old: PathBuf,
}

impl Saved {
    /// Makes the directory where there is none.
    pub(super) fn in_directory(directory: &Path) -> Result<Self, SaveError> {
        fs::create_dir_all(directory).map_err(file("create", directory))?;
        Ok(Self { current: directory.join("cluster.json"), old: directory.join("cluster.json.old") })
    }

    /// The cluster as it was saved, or a new one. `read` understands a service's description.
    pub(super) fn load(&self, plan: AddressPlan, fresh_id: NodeId, read: impl Fn(&str) -> Option<Request>) -> Core {
        for (path, doubt) in [(&self.current, 0), (&self.old, SUBNETS_IN_DOUBT)] {
            match fs::read(path) {
                Ok(bytes) => match serde_json::from_slice::<Document>(&bytes) {
                    Ok(document) => return document.into_core(plan, doubt, &read),
                    Err(error) => {
                        let aside = path.with_extension("json.unreadable");
                        tracing::error!(path = %path.display(), aside = %aside.display(), %error, "state is unreadable and kept aside");
                        if let Err(error) = fs::rename(path, &aside) {
                            tracing::warn!(path = %path.display(), %error, "cannot keep the unreadable state aside");
                        }
                    }
                },
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => tracing::error!(path = %path.display(), %error, "state cannot be read"),
            }
        }
        Core::new(fresh_id, plan)
    }

    /// Returns when the text is on the disk.
    pub(super) fn store(&self, text: &str) -> Result<(), SaveError> {
        let new = self.current.with_extension("json.new");
        // One left half written may be anybody's to read.
        let _ = fs::remove_file(&new);
        let out = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new);
        let mut out = out.map_err(file("create", &new))?;
        out.write_all(text.as_bytes()).map_err(file("write", &new))?;
        out.sync_all().map_err(file("sync", &new))?;
        // The predecessor is a convenience: without it a save is as good.
        let _ = fs::remove_file(&self.old);
        let _ = fs::hard_link(&self.current, &self.old);
        fs::rename(&new, &self.current).map_err(file("replace", &self.current))?;
        let directory = self.current.parent().unwrap_or(Path::new("."));
        File::open(directory).and_then(|directory| directory.sync_all()).map_err(file("sync", directory))
    }
}

/// The cluster as text.
pub(super) fn text(core: &Core) -> String {
    serde_json::to_string(&Document::from(core)).expect("texts, numbers, lists and string-keyed maps always serialise")
}

fn file(step: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SaveError {
    let path = path.to_owned();
    move |source| SaveError::File { step, path, source }
}

#[derive(Serialize, Deserialize)]
struct Document {
    cluster_id: String,
    next_subnet: u32,
    next_service_v4: Ipv4Addr,
    next_round_robin_v6: Ipv6Addr,
    next_instance_v6: Ipv6Addr,
    #[serde(default)]
    orders: u64,
    nodes: Vec<SavedNode>,
    services: Vec<SavedService>,
}

#[derive(Serialize, Deserialize)]
struct SavedNode {
    id: String,
    host: String,
    subnet: Option<(Ipv4Addr, Ipv6Addr)>,
    address: Option<IpAddr>,
    port: Option<String>,
    architecture: Option<String>,
    technologies: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct SavedService {
    job: String,
    document: String,
    round_robin: (Ipv4Addr, Ipv6Addr),
    /// By label.
    #[serde(default)]
    policies: Vec<(String, Ipv4Addr, Ipv6Addr)>,
    next_number: u32,
    instances: Vec<SavedInstance>,
}

#[derive(Serialize, Deserialize)]
struct SavedInstance {
    number: u32,
    address: (Ipv4Addr, Ipv6Addr),
    phase: SavedPhase,
    detail: String,
    node: Option<String>,
    deployed: Option<SavedDeployed>,
    pin: Option<String>,
    replaces: Option<u32>,
}

/// Without its moments: they begin anew with the manager.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum SavedPhase {
    Waiting,
    Scheduled,
    Creating,
    Created,
    Running,
    Lost,
    Failed,
    FailedForGood,
    DeadForGood,
    Completed,
}

#[derive(Serialize, Deserialize)]
struct SavedDeployed {
    namespace_v4: Ipv4Addr,
    namespace_v6: Option<Ipv6Addr>,
    host: IpAddr,
    host_port: u16,
}

impl From<&Core> for Document {
    fn from(core: &Core) -> Self {
        let v4 = |number: u128| Ipv4Addr::from(u32::try_from(number).unwrap_or_default());
        Self {
            cluster_id: core.cluster_id.to_string(),
            next_subnet: core.next_subnet,
            next_service_v4: v4(core.services_v4.position()),
            next_round_robin_v6: core.round_robin_v6.position().into(),
            next_instance_v6: core.instances_v6.position().into(),
            orders: core.orders_reserved,
            nodes: core.nodes.values().map(SavedNode::from).collect(),
            services: core.services.values().map(SavedService::from).collect(),
        }
    }
}

impl From<&Node> for SavedNode {
    fn from(node: &Node) -> Self {
        Self {
            id: node.id.to_string(),
            host: node.host.clone(),
            subnet: node.subnet.map(|subnet| (subnet.v4, subnet.v6)),
            address: node.facts.address,
            port: node.facts.port.clone(),
            architecture: node.facts.architecture.clone(),
            technologies: node.facts.technologies.iter().map(Technology::to_string).collect(),
        }
    }
}

impl From<&Service> for SavedService {
    fn from(service: &Service) -> Self {
        // One that is being retired is gone with the restart: its node lists it and is told to delete it.
        let stays = |instance: &&Instance| !matches!(instance.phase, Phase::Retiring { .. });
        Self {
            job: service.job.clone(),
            document: service.request.document.to_string(),
            round_robin: (service.round_robin.v4, service.round_robin.v6),
            policies: service
                .policies
                .iter()
                .map(|(policy, pair)| (policy.label().to_owned(), pair.v4, pair.v6))
                .collect(),
            next_number: service.next_number,
            instances: service.instances.values().filter(stays).map(SavedInstance::from).collect(),
        }
    }
}

impl From<&Instance> for SavedInstance {
    fn from(instance: &Instance) -> Self {
        Self {
            number: instance.number,
            address: (instance.address.v4, instance.address.v6),
            phase: SavedPhase::from(instance.phase),
            detail: instance.detail.clone(),
            node: instance.node.as_ref().map(NodeId::to_string),
            deployed: instance.deployed.map(|deployed| SavedDeployed {
                namespace_v4: deployed.namespace_v4,
                namespace_v6: deployed.namespace_v6,
                host: deployed.host,
                host_port: deployed.host_port,
            }),
            pin: instance.pin.as_ref().map(NodeId::to_string),
            replaces: instance.replaces,
        }
    }
}

impl From<Phase> for SavedPhase {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Waiting { .. } | Phase::Retiring { .. } => Self::Waiting,
            Phase::Scheduled => Self::Scheduled,
            Phase::Creating => Self::Creating,
            Phase::Created => Self::Created,
            Phase::Running { .. } => Self::Running,
            Phase::Lost { .. } => Self::Lost,
            Phase::Failed { retry: None } => Self::FailedForGood,
            Phase::Dead { retry: None } => Self::DeadForGood,
            Phase::Failed { .. } | Phase::Dead { .. } | Phase::Undeployed { .. } => Self::Failed,
            Phase::Completed => Self::Completed,
        }
    }
}

impl From<SavedPhase> for Phase {
    fn from(saved: SavedPhase) -> Self {
        // Nodes need a moment to report after the manager is back.
        let retry = Duration::from_secs(5);
        match saved {
            SavedPhase::Waiting => Self::Waiting { retry: Duration::ZERO, searched: false },
            SavedPhase::Scheduled => Self::Scheduled,
            SavedPhase::Creating => Self::Creating,
            SavedPhase::Created => Self::Created,
            SavedPhase::Running => Self::Running { since: Duration::ZERO },
            SavedPhase::Lost => Self::Lost { retry },
            SavedPhase::Failed => Self::Failed { retry: Some(retry) },
            SavedPhase::FailedForGood => Self::Failed { retry: None },
            SavedPhase::DeadForGood => Self::Dead { retry: None },
            SavedPhase::Completed => Self::Completed,
        }
    }
}

impl Document {
    /// What makes no sense is left out with a word in the log; the rest is the cluster.
    fn into_core(self, plan: AddressPlan, doubt: u32, read: &impl Fn(&str) -> Option<Request>) -> Core {
        let fallback = || "000000000000000000000000".parse().expect("a plain text is a node id");
        let mut core = Core::new(self.cluster_id.parse().unwrap_or_else(|_| fallback()), plan);
        core.next_subnet = self.next_subnet.saturating_add(doubt);
        // A predecessor is at most one reservation behind.
        core.orders_reserved = self.orders.saturating_add(if doubt > 0 { 2 * ORDERS_RESERVED } else { 0 });
        core.services_v4.resume(number_of(self.next_service_v4));
        core.round_robin_v6.resume(self.next_round_robin_v6.into());
        core.instances_v6.resume(self.next_instance_v6.into());
        for node in self.nodes {
            match node.id.parse() {
                Ok(id) => core.add_node(node.into_node(id)),
                Err(error) => tracing::error!(host = node.host, %error, "a saved node is left out"),
            }
        }
        for saved in self.services {
            match read(&saved.document) {
                Some(request) => add_service(&mut core, saved, request),
                None => {
                    tracing::error!(job = saved.job, "a saved service is left out: its description is not understood");
                }
            }
        }
        core.resume();
        core
    }
}

impl SavedNode {
    fn into_node(self, id: NodeId) -> Node {
        let facts = NodeFacts {
            address: self.address,
            port: self.port,
            architecture: self.architecture,
            technologies: self.technologies.iter().map(|name| Technology::from(name.as_str())).collect(),
            ..NodeFacts::default()
        };
        let subnet = self.subnet.map(|(v4, v6)| Subnet { v4, v6 });
        Node { id, host: self.host, facts, subnet, seen: None }
    }
}

fn add_service(core: &mut Core, saved: SavedService, request: Request) {
    let name: ServiceName = request.name.clone();
    let (v4, v6) = saved.round_robin;
    if !(core.services_v4.claim(number_of(v4)) && core.round_robin_v6.claim(v6.into())) {
        tracing::error!(service = %name, %v4, %v6, "a saved service is left out: its address is taken or outside the plan");
        return;
    }
    let mut service = Service {
        job: saved.job,
        request,
        round_robin: AddressPair { v4, v6 },
        policies: Default::default(),
        next_number: saved.next_number,
        instances: Default::default(),
    };
    for (label, v4, v6) in saved.policies {
        match Policy::from_label(&label) {
            Some(policy) if core.services_v4.claim(number_of(v4)) && core.round_robin_v6.claim(v6.into()) => {
                service.policies.insert(policy, AddressPair { v4, v6 });
            }
            _ => {
                tracing::error!(service = %name, label, %v4, "a saved address is left out: it is taken, or of no policy");
            }
        }
    }
    for instance in saved.instances {
        let (v4, v6) = instance.address;
        if core.services_v4.claim(number_of(v4)) && core.instances_v6.claim(v6.into()) {
            service.next_number = service.next_number.max(instance.number.saturating_add(1));
            service.instances.insert(instance.number, instance.into_instance());
        } else {
            tracing::error!(service = %name, number = instance.number, "a saved instance is left out: its address is taken");
        }
    }
    core.services.insert(name, service);
}

impl SavedInstance {
    fn into_instance(self) -> Instance {
        let deployed = self.deployed.map(|deployed| Deployed {
            namespace_v4: deployed.namespace_v4,
            namespace_v6: deployed.namespace_v6,
            host: deployed.host,
            host_port: deployed.host_port,
        });
        let node = |text: Option<String>| text.and_then(|text| text.parse().ok());
        Instance {
            number: self.number,
            address: AddressPair { v4: self.address.0, v6: self.address.1 },
            phase: self.phase.into(),
            detail: self.detail,
            node: node(self.node),
            deployed,
            pin: node(self.pin),
            replaces: self.replaces,
            heard: Duration::ZERO,
            failures: 0,
            usage: InstanceUsage::default(),
        }
    }
}

/// A cluster that is understood is the same cluster once it is saved and understood again, for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn round_trip(bytes: &[u8]) {
    let load = |bytes: &[u8]| {
        let document = serde_json::from_slice::<Document>(bytes).ok()?;
        Some(document.into_core(AddressPlan::default(), 0, &|text| super::documents::request(text.as_bytes()).ok()))
    };
    let Some(core) = load(bytes) else { return };
    let saved = text(&core);
    let again = load(saved.as_bytes()).expect("what is saved is understood");
    assert_eq!(text(&again), saved);
}
