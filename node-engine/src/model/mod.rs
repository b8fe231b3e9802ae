//! The nouns of the node: services, instances, statuses, messages. No I/O, no serialisation, no sibling module:
//! everything else speaks in these types, parsed once at the door that let the value in.

pub mod message;
pub mod node;
pub mod service;
pub mod status;

pub use message::{Command, FamilyPair, Policy, Query, Report, SemanticAddress, TableAnswer, TableRow};
pub use node::{
    DiskUsage, Generation, GpuUsage, InstanceUsage, NetworkUsage, NodeFacts, NodeId, NodeIdentity, NodeUsage, Subnet,
};
pub use service::{
    Addresses, InstanceId, InstanceSpec, InvalidName, Limits, PortMapping, Protocol, ServiceName, Technology,
};
pub use status::Status;
