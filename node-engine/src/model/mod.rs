//! The nouns of the node: services, instances, statuses, messages. No I/O, no serialisation, no sibling module:
//! everything else speaks in these types, parsed once at the door that let the value in.

pub mod budget;
pub mod device;
pub mod event;
pub mod furniture;
pub mod message;
pub mod node;
pub mod service;
pub mod status;

pub use budget::{Purpose, Sent, Volume};
pub use device::{Channel, Device, DeviceKind, Reading, Sample, Unit};
pub use event::{Event, EventKind};
pub use furniture::{AddedFile, Mount, VolumeRequest};
pub use message::{Command, FamilyPair, Policy, Query, Receipt, Report, SemanticAddress, TableAnswer, TableRow};
pub use node::{
    Clock, DiskUsage, Generation, GpuUsage, InstanceCounters, InstanceDetails, InstanceUsage, NetworkUsage, NodeFacts,
    NodeHealth, NodeId, NodeIdentity, NodeUsage, Pressure, Subnet, Wear,
};
pub use service::{
    Addresses, DeviceGrant, InstanceId, InstanceSpec, InvalidName, Limits, PortMapping, Protocol, ServiceName,
    ServicePattern, Technology,
};
pub use status::Status;
