//! What arrives on the control topics: job documents, deletes, and the common message form.
//!
//! The common form `{"command", "job", "cluster", "worker"}` was declared for all components of the reference system and is
//! sent by none (protocol 5.5). No other payload has a `command` member, so both can share a topic.

use serde::Serialize;

use super::deploy::{self, DeployError, DeployFault, Told};
use super::json::{MAX_DOCUMENT, Members, excerpt};
use crate::model::{InstanceId, InstanceSpec, NodeId, Technology};

/// What a control message asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    Deploy(Box<InstanceSpec>),
    /// One instance, or every one on this node where a first-generation document names none.
    Delete(Vec<InstanceId>),
}

/// The cluster's count of its orders. Only clusters of ours have one; others leave the member out, and workers of others ignore it.
pub fn generation(bytes: &[u8]) -> Option<u64> {
    Members::parse(bytes, MAX_DOCUMENT).ok()?.whole(GENERATION).ok().flatten()
}

/// The member that carries it.
pub const GENERATION: &str = "order_generation";

/// Why a control message is not carried out.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    /// Answered with a failure where the instance is known.
    #[error("deploy refused: {0}")]
    Deploy(#[from] DeployError),
    #[error("delete refused: {0}")]
    Delete(DeployFault),
    #[error("only a cluster manager can {0} a service")]
    ClusterOnly(&'static str),
    #[error("{0} is not a command (expected deploy or delete)")]
    Unknown(String),
}

/// The control topics that carry orders.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OrderTopic {
    Deploy,
    Delete,
}

/// Reads what came on a control topic. `told` says what came there before.
///
/// # Errors
/// Where it cannot be carried out; nothing about it is then done.
pub fn order(topic: OrderTopic, bytes: &[u8], node: Option<&NodeId>, told: Told<'_>) -> Result<Order, OrderError> {
    let common = Members::parse(bytes, MAX_DOCUMENT).ok().filter(|members| members.has("command"));
    match (common, topic) {
        (Some(members), _) => common_message(&members, node),
        (None, OrderTopic::Deploy) => Ok(Order::Deploy(Box::new(deploy::deploy_next(bytes, node, told)?))),
        (None, OrderTopic::Delete) => Ok(Order::Delete(delete(bytes, node).map_err(OrderError::Delete)?)),
    }
}

fn delete(bytes: &[u8], node: Option<&NodeId>) -> Result<Vec<InstanceId>, DeployFault> {
    let members = Members::parse(bytes, MAX_DOCUMENT)?;
    let service = deploy::service(&members, "job_name")?;
    let numbers = match deploy::number(&members)? {
        Some(number) => vec![number],
        None => deploy::ours(&members, node)?,
    };
    Ok(numbers.into_iter().map(|number| InstanceId { service: service.clone(), number }).collect())
}

fn common_message(members: &Members<'_>, node: Option<&NodeId>) -> Result<Order, OrderError> {
    let command = members.text("command").map_err(|error| OrderError::Unknown(error.to_string()))?.unwrap_or_default();
    match command.as_str() {
        "deploy" => {
            let (job, id) = addressed(members, node).map_err(DeployError::unnamed)?;
            Ok(Order::Deploy(Box::new(deploy::read(&job, id)?)))
        }
        "delete" => {
            let (_, id) = addressed(members, node).map_err(OrderError::Delete)?;
            Ok(Order::Delete(vec![id]))
        }
        "move" => Err(OrderError::ClusterOnly("move")),
        "replicate" => Err(OrderError::ClusterOnly("replicate")),
        other => Err(OrderError::Unknown(excerpt(other.as_bytes()))),
    }
}

/// The job of a common message and the instance it names: number 0 unless said. A list of workers has to name this one.
fn addressed<'a>(members: &Members<'a>, node: Option<&NodeId>) -> Result<(Members<'a>, InstanceId), DeployFault> {
    let workers = members.texts("worker")?;
    let named = |node: &NodeId| workers.iter().any(|worker| worker == node.as_str());
    if !workers.is_empty() && !node.is_some_and(named) {
        return Err(DeployFault::NotForThisNode);
    }
    let job = members.object("job")?.ok_or(super::Malformed::Missing("job"))?;
    let member = if job.has("name") { "name" } else { "job_name" };
    let service = deploy::short_service(&job, member)?;
    let number = deploy::number(&job)?.unwrap_or_default();
    Ok((job, InstanceId { service, number }))
}

#[derive(Serialize)]
struct Delete<'a> {
    job_name: &'a str,
    virtualization: &'a str,
    instance_number: u32,
}

/// What a cluster publishes to have an instance deleted.
pub fn delete_message(instance: &InstanceId, technology: &Technology) -> String {
    super::text(&Delete {
        job_name: instance.service.as_str(),
        virtualization: technology.as_str(),
        instance_number: instance.number,
    })
}
