//! Something that happened on this node, as a person may watch it.

use std::time::SystemTime;

use super::Status;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub time: SystemTime,
    pub kind: EventKind,
    /// An instance as `service#number`, a device, the cluster: by the kind.
    pub subject: String,
    /// Why, or with what; may be empty.
    pub detail: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EventKind {
    /// The cluster is told this of an instance.
    Status(Status),
    /// An instance ran when the daemon came up.
    Adopted,
    /// The first process of an instance ended.
    Exited,
    /// The same, for want of memory.
    OutOfMemory,
    /// Somebody runs a command in an instance.
    Exec,
    ClusterConnected,
    ClusterLost,
    DeviceAdded,
    DeviceRemoved,
}

impl EventKind {
    pub const ALL: [Self; 15] = [
        Self::Status(Status::Creating),
        Self::Status(Status::Created),
        Self::Status(Status::Running),
        Self::Status(Status::Failed),
        Self::Status(Status::Dead),
        Self::Status(Status::Completed),
        Self::Status(Status::Undeployed),
        Self::Adopted,
        Self::Exited,
        Self::OutOfMemory,
        Self::Exec,
        Self::ClusterConnected,
        Self::ClusterLost,
        Self::DeviceAdded,
        Self::DeviceRemoved,
    ];

    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Status(Status::Creating) => "creating",
            Self::Status(Status::Created) => "created",
            Self::Status(Status::Running) => "running",
            Self::Status(Status::Failed) => "failed",
            Self::Status(Status::Dead) => "dead",
            Self::Status(Status::Completed) => "completed",
            Self::Status(Status::Undeployed) => "undeployed",
            Self::Adopted => "adopted",
            Self::Exited => "exited",
            Self::OutOfMemory => "out-of-memory",
            Self::Exec => "exec",
            Self::ClusterConnected => "connected",
            Self::ClusterLost => "disconnected",
            Self::DeviceAdded => "device-added",
            Self::DeviceRemoved => "device-removed",
        }
    }

    /// What the subject is.
    pub fn about(self) -> &'static str {
        match self {
            Self::Status(_) | Self::Adopted | Self::Exited | Self::OutOfMemory | Self::Exec => "instance",
            Self::ClusterConnected | Self::ClusterLost => "cluster",
            Self::DeviceAdded | Self::DeviceRemoved => "device",
        }
    }
}
