//! What was configured, checked: defaults, then the file, then the environment, then the command line.

mod load;
mod nearest;
mod settings;
mod telemetry;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

pub use crate::model::Generation;
use crate::model::ServicePattern;
use crate::netmanager::datapath::Capacity;
use crate::runtime::registries::Registries;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use load::load_text;
pub use load::{ConfigError, DEFAULT_FILE, ENVIRONMENT_FILE, Flag, Loaded, Origin, Sources, environment_file, load};

/// Everything the daemon needs to know before it starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub cluster: ClusterConfig,
    /// The node's identity towards the cluster: its host name unless configured.
    pub node_name: String,
    /// `port` of the node's registration: where first-generation nodes served HTTP. Stored by clusters, used by none.
    pub announced_port: u16,
    pub network: NetworkConfig,
    pub runtime: RuntimeConfig,
    pub telemetry: TelemetryConfig,
    /// What happens to workloads when the daemon is told to stop.
    pub on_exit: OnExit,
    /// What outlives a reboot: `/var/lib/node-engine`.
    pub state_dir: PathBuf,
    /// What a reboot forgets: `/run/node-engine`. Holds `api.sock`.
    pub run_dir: PathBuf,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterConfig {
    /// Host name or address of the cluster manager; its broker is on the same host.
    pub host: String,
    /// HTTP port of the cluster manager (10100), or of a first-generation one (10000).
    pub port: Option<u16>,
    pub tls: bool,
    /// `None`: found out by probing.
    pub generation: Option<Generation>,
    /// Mutual TLS towards the broker.
    pub mqtt_tls: Option<MqttTls>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MqttTls {
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// `None`: the system's roots.
    pub ca: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkConfig {
    pub datapath: DatapathChoice,
    /// Interface towards the peers; `None`: the one that leads to the cluster, else the default route's.
    pub uplink: Option<String>,
    /// This node's address as its peers see it; `None`: the uplink's.
    pub public_ip: Option<IpAddr>,
    pub tunnel_port: u16,
    pub bridge: String,
    pub tun: String,
    pub service_v4: (Ipv4Addr, u8),
    pub service_v6: (Ipv6Addr, u8),
    /// Where programs, links and maps are pinned.
    pub bpffs: PathBuf,
    /// Accept tunnel packets whose outer source is not the known address of the inner source's node (NAT in between).
    pub relax_source: bool,
    /// Frame packets between nodes of ours (as VXLAN, on the port after the tunnel's), so that the receiving kernel can join them.
    pub framing: bool,
    /// An instance that vanishes from the cluster's table keeps the flows it has for so long, or until its node has it no more.
    pub drain: Duration,
    /// Drop what does not belong in the uplink's driver.
    pub xdp: XdpChoice,
    /// How many instances (of all nodes, each address family by itself) the tables have room for.
    pub instances: Capacity,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            datapath: DatapathChoice::Auto,
            uplink: None,
            public_ip: None,
            tunnel_port: netmanager_common::TUNNEL_PORT,
            bridge: "edge-bridge".into(),
            tun: "edge-tun".into(),
            service_v4: (Ipv4Addr::new(10, 30, 0, 0), 16),
            service_v6: (Ipv6Addr::new(0xfdff, 0, 0, 0, 0, 0, 0, 0), 16),
            bpffs: "/sys/fs/bpf".into(),
            relax_source: false,
            framing: true,
            drain: Duration::from_secs(10),
            xdp: XdpChoice::Auto,
            instances: Capacity::USUAL,
        }
    }
}

impl ClusterConfig {
    /// `host:port` as a URL has it.
    pub fn authority(&self, port: u16) -> String {
        if self.host.contains(':') { format!("[{}]:{port}", self.host) } else { format!("{}:{port}", self.host) }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XdpChoice {
    /// Where the driver is a real card's.
    Auto,
    On,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DatapathChoice {
    /// The fastest that works here.
    Auto,
    /// Programs in the kernel, or nothing.
    Ebpf,
    /// The same, without what came to kernels after 5.9.
    EbpfPlain,
    Tun,
}

impl DatapathChoice {
    /// As a person types it.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "auto" => Some(Self::Auto),
            "ebpf" => Some(Self::Ebpf),
            "ebpf-plain" => Some(Self::EbpfPlain),
            "tun" => Some(Self::Tun),
            _ => None,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeConfig {
    /// `None`: the platform's default socket.
    pub docker_host: Option<String>,
    pub containerd: ContainerdChoice,
    /// containerd's namespace for everything of ours.
    pub containerd_namespace: String,
    /// containerd's own configuration, which names OCI runtimes.
    pub containerd_config: PathBuf,
    /// Run plain commands of this machine when the cluster says so.
    pub process: bool,
    /// User of such commands, `user` or `user:group`.
    pub process_user: String,
    /// Run virtual machines when the cluster says so.
    pub unikernel: bool,
    /// Run WebAssembly modules when the cluster says so.
    pub wasm: bool,
    /// Take images from files of this machine (`file://`).
    pub image_files: bool,
    pub registries: Registries,
    /// Services that may be privileged.
    pub privileged: Vec<ServicePattern>,
    /// Volume drivers by name, each with its socket.
    pub volume_drivers: BTreeMap<String, PathBuf>,
    /// Where the bundled driver keeps volumes; `None`: it does not run.
    pub host_path_volumes: Option<PathBuf>,
    /// Parent of the control groups that we make ourselves, such as `/node-engine`.
    pub control_group: String,
    pub restarts: Restarts,
}

impl Default for RuntimeConfig {
    fn default() -> Self {
        Self {
            docker_host: None,
            containerd: ContainerdChoice::Auto,
            containerd_namespace: "node-engine".into(),
            containerd_config: "/etc/containerd/config.toml".into(),
            process: false,
            process_user: "nobody".into(),
            unikernel: false,
            wasm: false,
            image_files: false,
            registries: Registries::default(),
            privileged: Vec::new(),
            volume_drivers: BTreeMap::new(),
            host_path_volumes: None,
            control_group: "/node-engine".into(),
            restarts: Restarts::default(),
        }
    }
}

/// Whether containers are run through containerd itself, and where that is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ContainerdChoice {
    /// Where there is one at its usual socket.
    Auto,
    Off,
    /// At this socket.
    At(PathBuf),
}

impl ContainerdChoice {
    /// Where containerd is unless the configuration says otherwise.
    pub const USUAL: &str = "/run/containerd/containerd.sock";

    pub fn socket(&self) -> Option<PathBuf> {
        match self {
            Self::Auto => Some(Self::USUAL.into()),
            Self::Off => None,
            Self::At(socket) => Some(socket.clone()),
        }
    }
}

/// How often an instance that falls is raised again before the cluster hears of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restarts {
    /// 0: never, each end is told at once.
    pub limit: u32,
    /// Restarts longer ago than this do not count.
    pub window: Duration,
}

impl Default for Restarts {
    fn default() -> Self {
        Self { limit: 5, window: Duration::from_secs(600) }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TelemetryConfig {
    pub reports: ReportChoice,
    /// Which sensors' values the cluster's broker is told.
    pub sensors: SensorChoice,
    pub sensors_every: Duration,
    pub gps: Option<GpsSource>,
    /// Where metrics are served over TCP, besides the local API; `None`: nowhere.
    pub metrics: Option<SocketAddr>,
    /// A collector that is told metrics (OTLP over HTTP).
    pub otlp: Option<String>,
    pub otlp_every: Duration,
    pub roots: Roots,
}

impl Default for TelemetryConfig {
    fn default() -> Self {
        Self {
            reports: ReportChoice::Full,
            sensors: SensorChoice::Off,
            sensors_every: Duration::from_secs(10),
            gps: None,
            metrics: None,
            otlp: None,
            otlp_every: Duration::from_secs(30),
            roots: Roots::default(),
        }
    }
}

/// `/sys`, `/proc` and `/dev`, or trees that look like them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    pub sys: PathBuf,
    pub proc: PathBuf,
    pub dev: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self { sys: "/sys".into(), proc: "/proc".into(), dev: "/dev".into() }
    }
}

/// When the cluster is told how the node and its instances fare.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReportChoice {
    /// At its pace.
    Full,
    /// When something has changed, and often enough that it does not count the node or an instance as lost.
    Changes,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SensorChoice {
    Off,
    All,
    Named(Vec<String>),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GpsSource {
    /// `host:port` of a gpsd.
    Gpsd(String),
    /// A receiver that speaks NMEA 0183.
    Nmea(PathBuf),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnExit {
    /// Workloads and flows go on; the next start adopts them.
    Leave,
    /// Everything is undeployed first.
    Stop,
}
