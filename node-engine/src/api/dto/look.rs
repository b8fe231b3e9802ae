//! A closer look at instances and at what happens, as it goes over the socket and as `--json` prints it.

use serde::{Deserialize, Serialize};

/// Everything that is known of an instance.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Inspection {
    pub service: String,
    pub number: u32,
    /// The cluster's id of the job; empty where it gave none.
    pub job: String,
    pub technology: String,
    pub image: String,
    /// What the image's name stands for on this node.
    pub image_id: String,
    pub platform: String,
    pub state: String,
    /// Why it ended, or what it waits for.
    pub detail: String,
    /// How often it was started again since the daemon began.
    pub restarts: u32,
    pub one_shot: bool,
    pub privileged: bool,
    pub address_v4: String,
    pub address_v6: String,
    /// `host:container/protocol`.
    pub ports: Vec<String>,
    pub limits: Limits,
    /// `None` where the runtime does not hold it.
    pub runtime: Option<Runtime>,
    /// Why the runtime says nothing, where it does not.
    pub runtime_error: String,
    /// `None` where it does not run or has not been measured yet.
    pub usage: Option<Usage>,
}

/// What was asked for; `None` is unlimited.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    pub vcpus: Option<u32>,
    pub memory_mib: Option<u64>,
    pub vgpus: u32,
}

/// What the runtime says.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Runtime {
    /// Its own name for the instance, such as a container id.
    pub handle: String,
    pub pid: Option<u32>,
    pub command: Vec<String>,
    /// Names alone: values may be secrets.
    pub environment: Vec<String>,
    pub working_directory: String,
    pub user: String,
    /// As applied; `None` is unlimited.
    pub cpus: Option<f64>,
    pub memory_bytes: Option<u64>,
    pub gpus: Vec<String>,
    pub devices: Vec<String>,
    pub mounts: Vec<String>,
    /// RFC 3339; empty where it has not happened.
    pub created: String,
    pub started: String,
    pub ended: String,
    pub exit_code: Option<i64>,
    pub out_of_memory: bool,
}

/// What a running instance uses. Counters count since its first process began; `None` is not known here.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Usage {
    /// `<service>#<number>`.
    pub instance: String,
    pub technology: String,
    /// Of the whole machine.
    pub cpu_percent: f64,
    pub cpu_seconds: Option<f64>,
    /// It wanted to run and its limit did not let it.
    pub throttled_seconds: Option<f64>,
    pub memory_bytes: u64,
    pub memory_percent: f64,
    pub memory_peak_bytes: Option<u64>,
    pub memory_limit_bytes: Option<u64>,
    pub out_of_memory_kills: Option<u64>,
    pub processes: Option<u64>,
    /// Its writable layer.
    pub disk_bytes: u64,
    pub read_bytes: Option<u64>,
    pub written_bytes: Option<u64>,
    pub received_bytes: Option<u64>,
    pub received_packets: Option<u64>,
    pub sent_bytes: Option<u64>,
    pub sent_packets: Option<u64>,
    pub dropped_packets: Option<u64>,
}

/// Query of `GET /events`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EventsQuery {
    /// How many of those before.
    pub past: Option<usize>,
    /// Go on with those to come.
    pub follow: bool,
}

/// Something that happened. One of these is a line of the answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Event {
    /// Milliseconds since 1970.
    pub time_ms: u64,
    /// What the subject is: `instance`, `device`, `cluster`.
    pub about: String,
    pub subject: String,
    pub event: String,
    pub detail: String,
}

/// What a client says on the WebSocket of `GET /instances/{instance}/exec`, besides the input itself as binary messages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToCommand {
    /// First of all.
    Run {
        command: Vec<String>,
        terminal: Option<Terminal>,
    },
    Resize(Terminal),
    /// No more input.
    End,
}

/// What the daemon says there, besides the output as binary messages whose first byte is 1 or 2, for the standard output and the
/// error output.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromCommand {
    Refused(String),
    Exit(i64),
    Broken(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    pub columns: u16,
    pub rows: u16,
}
