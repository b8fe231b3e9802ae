//! Orders as they come, and messages as they go: the JSON between people, manager and nodes.
//!
//! An order is a job document, or the common message `{"command", "job", "cluster", "worker"}` of the original design with the
//! commands `deploy`, `delete`, `move` and `replicate`. A description is checked as strictly as a node would, so that a mistake
//! is told to who made it, and kept with all its members, because nodes of other makes may act on more than ours do.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde_json::{Map, Value, json};

use crate::model::{InstanceId, Policy, Query, ServiceName, TableRow, Technology};
use crate::wire::json::{MAX_DOCUMENT, MAX_MESSAGE, Members, excerpt};
use crate::wire::table::{Update, spelling, subnet_result, updates_available};
use crate::wire::{self, GENERATION, ToNode};

use super::core::{Change, DeployOrder, Message, Row, Table};
use super::inventory::{AddressPair, Needs, Request};
use super::{ClusterApiError, Target};

/// What somebody wants of the cluster.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Order {
    Deploy { request: Box<Request>, replicas: u32, on: Option<String> },
    Delete(Target),
    Replicate { service: ServiceName, replicas: u32 },
    Move { instance: Moved, node: String },
}

/// The instance that is to be moved: by its number, by where it runs, or the only one there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Moved {
    Number(InstanceId),
    From { service: ServiceName, node: String },
    Only(ServiceName),
}

/// Reads a job document, or a common message for the cluster of this id.
pub(super) fn order(bytes: &[u8], cluster: &str) -> Result<Order, ClusterApiError> {
    let members = Members::parse(bytes, MAX_DOCUMENT).map_err(refuse)?;
    if !members.has("command") {
        return Ok(Order::Deploy { request: Box::new(request(bytes)?), replicas: 1, on: None });
    }
    let clusters = members.texts("cluster").map_err(refuse)?;
    if !clusters.is_empty() && !clusters.iter().any(|name| name == cluster) {
        return Err(refuse(format!(
            "it is for cluster {}, and this is {cluster}",
            excerpt(clusters.join(", ").as_bytes())
        )));
    }
    let job = members.get("job").ok_or_else(|| refuse("member `job` is missing"))?;
    common_order(&members, job.as_bytes())
}

fn common_order(members: &Members<'_>, job: &[u8]) -> Result<Order, ClusterApiError> {
    let mut workers = members.texts("worker").map_err(refuse)?;
    let fields = Members::parse(job, MAX_DOCUMENT).map_err(refuse)?;
    let number = fields.whole("instance_number").map_err(refuse)?.map(u32::try_from);
    let number = number.transpose().map_err(|_| refuse("the instance number is too large"))?;
    let replicas = fields.whole("replicas").map_err(refuse)?.map(|number| u32::try_from(number).unwrap_or(u32::MAX));
    match members.text("command").map_err(refuse)?.unwrap_or_default().as_str() {
        "deploy" => {
            let mut request = request(job)?;
            // One worker is a place, several are a choice.
            let on = if workers.len() == 1 { workers.pop() } else { None };
            request.needs.nodes.extend(workers);
            Ok(Order::Deploy { request: Box::new(request), replicas: replicas.unwrap_or(1), on })
        }
        "delete" => {
            let service = service(&fields)?;
            Ok(Order::Delete(match number {
                Some(number) => Target::Instance(InstanceId { service, number }),
                None => Target::Service(service),
            }))
        }
        "replicate" => {
            let replicas = replicas.ok_or_else(|| refuse("member `job.replicas` is missing"))?;
            Ok(Order::Replicate { service: service(&fields)?, replicas })
        }
        "move" => {
            let service = service(&fields)?;
            let node = workers.pop().ok_or_else(|| refuse("`worker` names no node to move to"))?;
            let instance = match (number, workers.pop()) {
                (Some(number), _) => Moved::Number(InstanceId { service, number }),
                (None, Some(node)) => Moved::From { service, node },
                (None, None) => Moved::Only(service),
            };
            Ok(Order::Move { instance, node })
        }
        other => Err(refuse(format!(
            "{} is not a command (expected deploy, delete, move or replicate)",
            excerpt(other.as_bytes())
        ))),
    }
}

/// Reads the description of a service in any of its spellings.
pub(super) fn request(bytes: &[u8]) -> Result<Request, ClusterApiError> {
    // A node gets it back with the state of the instance added, and takes at most `MAX_DOCUMENT`.
    let fields = Members::parse(bytes, MAX_MESSAGE).map_err(refuse)?;
    let name = service(&fields)?;
    let mut document: Map<String, Value> = serde_json::from_slice(bytes).map_err(refuse)?;
    for runtime_state in
        ["instance_number", "instance_list", "next_instance_progressive_number", GENERATION, "_id", "id", "name"]
    {
        document.remove(runtime_state);
    }
    document.insert("job_name".into(), name.as_str().into());
    let spec = wire::deploy(checkable(document.clone()).to_string().as_bytes(), None).map_err(refuse)?;
    spell_newest(&mut document, &spec);

    let wanted = fields.object("addresses").map_err(refuse)?;
    let address = |member: &'static str| -> Result<Option<IpAddr>, ClusterApiError> {
        let Some(text) = wanted.as_ref().map(|wanted| wanted.said(member)).transpose().map_err(refuse)?.flatten()
        else {
            return Ok(None);
        };
        text.parse()
            .map(Some)
            .map_err(|_| refuse(format!("`addresses.{member}` is not an address: {}", excerpt(text.as_bytes()))))
    };
    let family = |address: Option<IpAddr>, four: bool| match address {
        Some(address) if address.is_ipv4() != four => Err(refuse(format!("{address} is of the wrong family"))),
        address => Ok(address),
    };
    let round_robin_v4 = family(address("rr_ip")?, true)?;
    let round_robin_v6 = family(address("rr_ip_v6")?, false)?;
    let weights = weights(document.get("addresses"))?;
    let virtualization = document.get("virtualization").and_then(Value::as_str).unwrap_or("container").to_owned();
    Ok(Request {
        needs: needs(&fields, &spec)?,
        one_shot: spec.one_shot,
        ports: spec.ports,
        image: spec.image,
        document: Value::Object(document).to_string().into(),
        virtualization,
        round_robin_v4: round_robin_v4.and_then(|address| if let IpAddr::V4(v4) = address { Some(v4) } else { None }),
        round_robin_v6: round_robin_v6.and_then(|address| if let IpAddr::V6(v6) = address { Some(v6) } else { None }),
        policies: policies(wanted.as_ref())?,
        weights,
        name,
    })
}

/// `addresses.policies`: labels.
fn policies(addresses: Option<&Members<'_>>) -> Result<BTreeSet<Policy>, ClusterApiError> {
    let labels = addresses.map(|members| members.texts("policies")).transpose().map_err(refuse)?.unwrap_or_default();
    let policy = |label: String| {
        Policy::from_label(&label).ok_or_else(|| {
            let known: Vec<_> = Policy::ALL.iter().map(|policy| policy.label()).collect();
            let label = excerpt(label.as_bytes());
            refuse(format!("`addresses.policies`: {label} is no policy (known are {})", known.join(", ")))
        })
    };
    let mut policies: BTreeSet<Policy> = labels.into_iter().map(policy).collect::<Result<_, _>>()?;
    // Every service has it.
    policies.remove(&Policy::RoundRobin);
    Ok(policies)
}

/// `addresses.weights`: a weight by instance number.
fn weights(addresses: Option<&Value>) -> Result<BTreeMap<u32, u32>, ClusterApiError> {
    let Some(weights) = addresses.and_then(|addresses| addresses.get("weights")) else { return Ok(BTreeMap::new()) };
    let wrong = || {
        let most = TableRow::MAX_WEIGHT;
        refuse(format!("`addresses.weights` is not an object of instance numbers with weights of 0 to {most}"))
    };
    let weight = |(number, weight): (&String, &Value)| {
        let weight = weight.as_u64().and_then(|weight| u32::try_from(weight).ok());
        let weight = weight.filter(|weight| *weight <= TableRow::MAX_WEIGHT).ok_or_else(wrong)?;
        Ok((number.parse().map_err(|_| wrong())?, weight))
    };
    weights.as_object().ok_or_else(wrong)?.iter().map(weight).collect()
}

fn refuse(reason: impl ToString) -> ClusterApiError {
    ClusterApiError::Document { reason: reason.to_string() }
}

/// The name in one piece, in four, or as one word.
fn service(fields: &Members<'_>) -> Result<ServiceName, ClusterApiError> {
    for member in ["job_name", "name"] {
        if let Some(name) = fields.said(member).map_err(refuse)? {
            return wire::service_name(&name).map_err(refuse);
        }
    }
    let said = |member| fields.said(member).map_err(refuse);
    let Some(service) = said("service_name")?.or(said("microservice_name")?) else {
        return Err(refuse("it has no `job_name` (or `name`)"));
    };
    let part = |text: Option<String>, or: &str| text.unwrap_or_else(|| or.to_owned());
    let (app, app_ns) = (part(said("app_name")?, "app"), part(said("app_ns")?, "default"));
    format!("{app}.{app_ns}.{service}.{}", part(said("service_ns")?, "default")).parse().map_err(refuse)
}

/// The description with what depends on the node that runs it taken out: another machine's architecture or drivers are not ours
/// to judge.
fn checkable(mut document: Map<String, Value>) -> Value {
    document.remove("volumes");
    document.remove("arch");
    document.insert("instance_number".into(), 0.into());
    Value::Object(document)
}

/// Nodes of other makes know only the newest names.
fn spell_newest(document: &mut Map<String, Value>, spec: &crate::model::InstanceSpec) {
    let written = wire::deploy::Document::from(spec);
    if !document.get("virtualization").is_some_and(Value::is_string) {
        let word = if spec.technology == Technology::Container { "container" } else { spec.technology.as_str() };
        document.insert("virtualization".into(), word.into());
    }
    document.insert("image".into(), written.image.into());
    document.insert("cmd".into(), written.cmd.into());
    // Nodes of other makes have it replaced all the same.
    if let Some(true) = written.beside_entrypoint {
        document.insert("beside_entrypoint".into(), true.into());
    }
    document.insert("environment".into(), written.environment.into());
    document.insert("port".into(), written.port.into());
    document.insert("one_shot".into(), written.one_shot.into());
    for (member, number) in [
        ("vcpus", u64::from(written.vcpus.unwrap_or(0))),
        ("memory", written.memory.unwrap_or(0)),
        ("vgpus", u64::from(written.vgpus)),
    ] {
        document.insert(member.into(), number.into());
    }
}

fn needs(fields: &Members<'_>, spec: &crate::model::InstanceSpec) -> Result<Needs, ClusterApiError> {
    let mut architectures = fields.texts("arch").unwrap_or_default();
    if let Some((_, architecture)) = spec.platform.as_ref().and_then(|platform| platform.split_once('/')) {
        architectures.push(architecture.split('/').next().unwrap_or(architecture).to_owned());
    }
    let mut nodes = Vec::new();
    for constraint in fields.objects("constraints").map_err(refuse)? {
        let direct = constraint.said("type").map_err(refuse)?.as_deref() == Some("direct");
        nodes.extend(constraint.said("node").map_err(refuse)?.filter(|_| direct));
    }
    Ok(Needs {
        memory_mib: spec.limits.memory_mib.unwrap_or(0),
        vcpus: u64::from(spec.limits.vcpus.unwrap_or(0)),
        vgpus: u64::from(spec.limits.vgpus),
        architectures,
        nodes,
    })
}

/// Topic and payload of a message.
pub(super) fn publication(message: &Message, cluster: &str) -> (String, String) {
    match message {
        Message::Deploy(order) => (ToNode::Deploy.topic(&order.node), deploy(order)),
        Message::Delete { node, instance, virtualization, generation } => {
            let payload = json!({
                (GENERATION): generation,
                "job_name": instance.service.as_str(),
                "virtualization": virtualization,
                "instance_number": instance.number,
            });
            (ToNode::Delete.topic(node), payload.to_string())
        }
        Message::NotRegistered { node } => {
            (ToNode::Error.topic(node), json!({ "message": "Node not registered to the cluster" }).to_string())
        }
        Message::Subnet { node, subnet } => (ToNode::Subnet.topic(node), subnet_result(subnet)),
        Message::Table { node, answer } => (ToNode::Table.topic(node), table(answer, cluster).to_string()),
        Message::Changed { service, change } => {
            let update = match change {
                Change::Deployment => Update::Deployment,
                Change::Undeployment => Update::Undeployment,
            };
            (format!("jobs/{service}/updates_available"), updates_available(update).into())
        }
    }
}

/// The job document for one node: the description, and where this instance of it stands.
fn deploy(order: &DeployOrder) -> String {
    let mut document: Map<String, Value> = serde_json::from_str(&order.document).unwrap_or_default();
    let name = &order.instance.service;
    let mut parts = name.as_str().split('.');
    for (member, alias) in [
        ("app_name", None),
        ("app_ns", None),
        ("service_name", Some("microservice_name")),
        ("service_ns", Some("microservice_namespace")),
    ] {
        let part = parts.next().unwrap_or_default();
        document.insert(member.into(), part.into());
        if let Some(alias) = alias {
            document.insert(alias.into(), part.into());
        }
    }
    let instance = json!({
        "instance_number": order.instance.number,
        "status": "NODE_SCHEDULED",
        "worker_id": order.node.as_str(),
        "host_ip": order.host,
        "host_port": order.port,
    });
    for (member, value) in [
        ("_id", Value::from(order.job.as_str())),
        ("microserviceID", order.job.as_str().into()),
        ("job_name", name.as_str().into()),
        ("status", "NODE_SCHEDULED".into()),
        (GENERATION, order.generation.into()),
        ("instance_number", order.instance.number.into()),
        ("instance_list", json!([instance])),
        ("next_instance_progressive_number", order.next_number.into()),
        ("RR_ip", order.round_robin.v4.to_string().into()),
        ("RR_ip_v6", order.round_robin.v6.to_string().into()),
    ] {
        document.insert(member.into(), value);
    }
    Value::Object(document).to_string()
}

/// A table answer. An instance without a network has its service addresses and no others.
pub(super) fn table(answer: &Table, cluster: &str) -> Value {
    let query = match &answer.query {
        Query::Name(name) => name.to_string(),
        Query::Address(address) => address.to_string(),
    };
    let asked_name = if let Query::Name(name) = &answer.query { name.as_str() } else { "" };
    json!({
        "app_name": answer.service.as_ref().map_or(asked_name, ServiceName::as_str),
        "instance_list": answer.rows.iter().map(|entry| row(entry, cluster)).collect::<Vec<_>>(),
        "query_key": query,
    })
}

fn service_addresses(row: &Row) -> Vec<Value> {
    let entry = |(policy, pair): &(Policy, AddressPair)| {
        let (kind, more) = spelling(*policy);
        let mut entry = json!({ "IpType": kind, "Address": pair.v4, "Address_v6": pair.v6 });
        if let Some(label) = more {
            entry["Policy"] = label.into();
        }
        entry
    };
    let own = json!({ "IpType": "instance_ip", "Address": row.address.v4, "Address_v6": row.address.v6 });
    row.services.iter().map(entry).chain([own]).collect()
}

fn row(row: &Row, cluster: &str) -> Value {
    let mut entry = json!({
        "cluster_id": cluster,
        "instance_number": row.number,
        "instance_ip": row.address.v4,
        "instance_ip_v6": row.address.v6,
        "service_ip": service_addresses(row),
    });
    let Value::Object(members) = &mut entry else { return entry };
    if let Some(node) = &row.node {
        members.insert("worker_id".into(), node.as_str().into());
    }
    if row.weight != TableRow::DEFAULT_WEIGHT {
        members.insert("weight".into(), row.weight.into());
    }
    if let Some(deployed) = &row.deployed {
        members.insert("namespace_ip".into(), deployed.namespace_v4.to_string().into());
        if let Some(v6) = deployed.namespace_v6 {
            members.insert("namespace_ip_v6".into(), v6.to_string().into());
        }
        members.insert("host_ip".into(), deployed.host.to_string().into());
        members.insert("host_port".into(), deployed.host_port.into());
    }
    entry
}

/// A description that is taken is understood again as it is kept, as the same, for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn round_trip(bytes: &[u8]) {
    let Ok(Order::Deploy { request: taken, .. }) = order(bytes, "c") else { return };
    let again = request(taken.document.as_bytes()).expect("what is kept is understood");
    assert_eq!((&again.name, &again.document), (&taken.name, &taken.document));
}
