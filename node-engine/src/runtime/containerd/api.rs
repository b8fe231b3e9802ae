//! What is said to containerd over its socket: its gRPC services (`api/services/*/v1/*.proto` of containerd), as far as instances need
//! them. Members that nothing here reads are left out; a reader skips what it does not know.

use std::collections::HashMap;

use prost::Message;

#[derive(Clone, PartialEq, Message)]
pub(super) struct Empty {}

/// `google.protobuf.Any`: a document and what it is.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Any {
    #[prost(string, tag = "1")]
    pub(super) type_url: String,
    #[prost(bytes = "vec", tag = "2")]
    pub(super) value: Vec<u8>,
}

#[derive(Clone, Copy, PartialEq, Message)]
pub(super) struct Timestamp {
    #[prost(int64, tag = "1")]
    pub(super) seconds: i64,
    #[prost(int32, tag = "2")]
    pub(super) nanos: i32,
}

/// A list of names: filters of a list, or members to update.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Names {
    #[prost(string, repeated, tag = "1")]
    pub(super) names: Vec<String>,
}

/// Of a request that only names something: a container, an image, a content by its digest.
#[derive(Clone, PartialEq, Message)]
pub(super) struct Named {
    #[prost(string, tag = "1")]
    pub(super) name: String,
}

pub(super) mod version {
    use super::Message;

    pub(in super::super) const GET: &str = "/containerd.services.version.v1.Version/Version";

    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct Version {
        #[prost(string, tag = "1")]
        pub(in super::super) version: String,
    }
}

pub(super) mod introspection {
    use super::{Empty, Message};

    pub(in super::super) const PLUGINS: &str = "/containerd.services.introspection.v1.Introspection/Plugins";

    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct Plugins {
        #[prost(message, repeated, tag = "1")]
        pub(in super::super) plugins: Vec<Plugin>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct Plugin {
        #[prost(string, tag = "2")]
        pub(in super::super) id: String,
        /// Why it does not work, if it does not.
        #[prost(message, optional, tag = "7")]
        pub(in super::super) error: Option<Empty>,
    }
}

pub(super) mod images {
    use super::{HashMap, Message};

    pub(in super::super) const GET: &str = "/containerd.services.images.v1.Images/Get";
    pub(in super::super) const READ: &str = "/containerd.services.content.v1.Content/Read";

    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct Got {
        #[prost(message, optional, tag = "1")]
        pub(in super::super) image: Option<Image>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct Image {
        #[prost(string, tag = "1")]
        pub(in super::super) name: String,
        #[prost(map = "string, string", tag = "2")]
        pub(in super::super) labels: HashMap<String, String>,
        #[prost(message, optional, tag = "3")]
        pub(in super::super) target: Option<Descriptor>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct Descriptor {
        #[prost(string, tag = "1")]
        pub(in super::super) media_type: String,
        #[prost(string, tag = "2")]
        pub(in super::super) digest: String,
        #[prost(int64, tag = "3")]
        pub(in super::super) size: i64,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct Piece {
        #[prost(bytes = "vec", tag = "2")]
        pub(in super::super) data: Vec<u8>,
    }
}

pub(super) mod snapshots {
    use super::{HashMap, Message};

    pub(in super::super) const PREPARE: &str = "/containerd.services.snapshots.v1.Snapshots/Prepare";
    pub(in super::super) const STAT: &str = "/containerd.services.snapshots.v1.Snapshots/Stat";
    pub(in super::super) const REMOVE: &str = "/containerd.services.snapshots.v1.Snapshots/Remove";
    pub(in super::super) const USAGE: &str = "/containerd.services.snapshots.v1.Snapshots/Usage";

    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct Snapshot {
        #[prost(string, tag = "1")]
        pub(in super::super) snapshotter: String,
        #[prost(string, tag = "2")]
        pub(in super::super) key: String,
        /// To prepare one alone.
        #[prost(string, tag = "3")]
        pub(in super::super) parent: String,
        #[prost(map = "string, string", tag = "4")]
        pub(in super::super) labels: HashMap<String, String>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct Mounts {
        #[prost(message, repeated, tag = "1")]
        pub(in super::super) mounts: Vec<Mount>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct Mount {
        #[prost(string, tag = "1")]
        pub(in super::super) kind: String,
        #[prost(string, tag = "2")]
        pub(in super::super) source: String,
        #[prost(string, tag = "3")]
        pub(in super::super) target: String,
        #[prost(string, repeated, tag = "4")]
        pub(in super::super) options: Vec<String>,
    }

    #[derive(Clone, Copy, PartialEq, Message)]
    pub(in super::super) struct Usage {
        #[prost(int64, tag = "1")]
        pub(in super::super) bytes: i64,
    }
}

pub(super) mod containers {
    use super::{Any, HashMap, Message, Names, Timestamp};

    pub(in super::super) const GET: &str = "/containerd.services.containers.v1.Containers/Get";
    pub(in super::super) const LIST: &str = "/containerd.services.containers.v1.Containers/List";
    pub(in super::super) const CREATE: &str = "/containerd.services.containers.v1.Containers/Create";
    pub(in super::super) const UPDATE: &str = "/containerd.services.containers.v1.Containers/Update";
    pub(in super::super) const DELETE: &str = "/containerd.services.containers.v1.Containers/Delete";

    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct Container {
        #[prost(string, tag = "1")]
        pub(in super::super) id: String,
        #[prost(map = "string, string", tag = "2")]
        pub(in super::super) labels: HashMap<String, String>,
        #[prost(string, tag = "3")]
        pub(in super::super) image: String,
        #[prost(message, optional, tag = "4")]
        pub(in super::super) runtime: Option<Runtime>,
        #[prost(message, optional, tag = "5")]
        pub(in super::super) spec: Option<Any>,
        #[prost(string, tag = "6")]
        pub(in super::super) snapshotter: String,
        #[prost(string, tag = "7")]
        pub(in super::super) snapshot_key: String,
        #[prost(message, optional, tag = "8")]
        pub(in super::super) created_at: Option<Timestamp>,
        #[prost(map = "string, message", tag = "10")]
        pub(in super::super) extensions: HashMap<String, Any>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct Runtime {
        #[prost(string, tag = "1")]
        pub(in super::super) name: String,
        #[prost(message, optional, tag = "2")]
        pub(in super::super) options: Option<Any>,
    }

    /// `containerd.runc.v1.Options`.
    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct RuncOptions {
        #[prost(string, tag = "6")]
        pub(in super::super) binary_name: String,
    }

    /// A container that is asked for, or told; to update it, with the members that change.
    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct One {
        #[prost(message, optional, tag = "1")]
        pub(in super::super) container: Option<Container>,
        #[prost(message, optional, tag = "2")]
        pub(in super::super) members: Option<Names>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct Listed {
        #[prost(message, repeated, tag = "1")]
        pub(in super::super) containers: Vec<Container>,
    }
}

pub(super) mod tasks {
    use super::snapshots::Mount;
    use super::{Any, Message, Timestamp};

    pub(in super::super) const CREATE: &str = "/containerd.services.tasks.v1.Tasks/Create";
    pub(in super::super) const START: &str = "/containerd.services.tasks.v1.Tasks/Start";
    pub(in super::super) const GET: &str = "/containerd.services.tasks.v1.Tasks/Get";
    pub(in super::super) const KILL: &str = "/containerd.services.tasks.v1.Tasks/Kill";
    pub(in super::super) const WAIT: &str = "/containerd.services.tasks.v1.Tasks/Wait";
    pub(in super::super) const DELETE: &str = "/containerd.services.tasks.v1.Tasks/Delete";
    pub(in super::super) const EXEC: &str = "/containerd.services.tasks.v1.Tasks/Exec";
    pub(in super::super) const DELETE_EXEC: &str = "/containerd.services.tasks.v1.Tasks/DeleteProcess";
    pub(in super::super) const RESIZE: &str = "/containerd.services.tasks.v1.Tasks/ResizePty";
    pub(in super::super) const CLOSE_INPUT: &str = "/containerd.services.tasks.v1.Tasks/CloseIO";

    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct Create {
        #[prost(string, tag = "1")]
        pub(in super::super) container: String,
        #[prost(message, repeated, tag = "3")]
        pub(in super::super) root: Vec<Mount>,
        #[prost(string, tag = "5")]
        pub(in super::super) stdout: String,
        #[prost(string, tag = "6")]
        pub(in super::super) stderr: String,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct Created {
        #[prost(uint32, tag = "2")]
        pub(in super::super) pid: u32,
    }

    /// A container's first process, or one more beside it.
    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct Which {
        #[prost(string, tag = "1")]
        pub(in super::super) container: String,
        #[prost(string, tag = "2")]
        pub(in super::super) exec: String,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct Kill {
        #[prost(string, tag = "1")]
        pub(in super::super) container: String,
        #[prost(string, tag = "2")]
        pub(in super::super) exec: String,
        #[prost(uint32, tag = "3")]
        pub(in super::super) signal: u32,
    }

    #[derive(Clone, Copy, PartialEq, Message)]
    pub(in super::super) struct Ended {
        #[prost(uint32, tag = "1")]
        pub(in super::super) code: u32,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct Got {
        #[prost(message, optional, tag = "1")]
        pub(in super::super) process: Option<Process>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct Process {
        #[prost(uint32, tag = "3")]
        pub(in super::super) pid: u32,
        #[prost(enumeration = "Status", tag = "4")]
        pub(in super::super) status: i32,
        #[prost(uint32, tag = "9")]
        pub(in super::super) code: u32,
        #[prost(message, optional, tag = "10")]
        pub(in super::super) ended_at: Option<Timestamp>,
    }

    #[derive(Clone, Copy, Debug, PartialEq, Eq, prost::Enumeration)]
    #[repr(i32)]
    pub(in super::super) enum Status {
        Unknown = 0,
        Created = 1,
        Running = 2,
        Stopped = 3,
        Paused = 4,
        Pausing = 5,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct Exec {
        #[prost(string, tag = "1")]
        pub(in super::super) container: String,
        #[prost(string, tag = "2")]
        pub(in super::super) stdin: String,
        #[prost(string, tag = "3")]
        pub(in super::super) stdout: String,
        #[prost(string, tag = "4")]
        pub(in super::super) stderr: String,
        #[prost(bool, tag = "5")]
        pub(in super::super) terminal: bool,
        #[prost(message, optional, tag = "6")]
        pub(in super::super) process: Option<Any>,
        #[prost(string, tag = "7")]
        pub(in super::super) exec: String,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct Resize {
        #[prost(string, tag = "1")]
        pub(in super::super) container: String,
        #[prost(string, tag = "2")]
        pub(in super::super) exec: String,
        #[prost(uint32, tag = "3")]
        pub(in super::super) width: u32,
        #[prost(uint32, tag = "4")]
        pub(in super::super) height: u32,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(in super::super) struct CloseInput {
        #[prost(string, tag = "1")]
        pub(in super::super) container: String,
        #[prost(string, tag = "2")]
        pub(in super::super) exec: String,
        #[prost(bool, tag = "3")]
        pub(in super::super) stdin: bool,
    }
}
