//! Every setting in one table: its key in the file, its names in the environment, and how its text is read. File, environment and
//! command line all go through it, so that a value means the same wherever it stands.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::time::Duration;

use super::telemetry;
use super::{
    ClusterConfig, Config, ContainerdChoice, DatapathChoice, Generation, MqttTls, NetworkConfig, OnExit, RuntimeConfig,
    ServicePattern, TelemetryConfig, XdpChoice,
};
use crate::netmanager::datapath::Capacity;
use crate::runtime::registries::is_place;

/// One setting.
pub(super) struct Setting {
    pub(super) key: &'static str,
    /// Names in the environment, the strongest first; the others are those of the first generation, and of other programs.
    pub(super) environment: &'static [&'static str],
    /// Reads the text. The error says what was expected.
    pub(super) set: fn(&mut Draft, &str) -> Result<(), String>,
}

/// A configuration in the making.
pub(super) struct Draft {
    pub(super) config: Config,
    pub(super) mqtt_certificate: Option<PathBuf>,
    pub(super) mqtt_key: Option<PathBuf>,
    pub(super) mqtt_ca: Option<PathBuf>,
}

impl Draft {
    pub(super) fn new(host_name: String) -> Self {
        let cluster = ClusterConfig { host: String::new(), port: None, tls: false, generation: None, mqtt_tls: None };
        let config = Config {
            cluster,
            node_name: host_name,
            announced_port: 3000,
            network: NetworkConfig::default(),
            runtime: RuntimeConfig::default(),
            telemetry: TelemetryConfig::default(),
            on_exit: OnExit::Leave,
            state_dir: "/var/lib/node-engine".into(),
            run_dir: "/run/node-engine".into(),
        };
        Self { config, mqtt_certificate: None, mqtt_key: None, mqtt_ca: None }
    }

    /// The configuration, if what belongs together is there together.
    pub(super) fn finish(mut self) -> Result<Config, &'static str> {
        self.config.cluster.mqtt_tls = match (self.mqtt_certificate, self.mqtt_key, self.mqtt_ca) {
            (Some(certificate), Some(key), ca) => Some(MqttTls { certificate, key, ca }),
            (None, None, None) => None,
            (None, None, Some(_)) => return Err("cluster.mqtt_ca needs cluster.mqtt_certificate and cluster.mqtt_key"),
            _ => return Err("cluster.mqtt_certificate and cluster.mqtt_key go together: set both or neither"),
        };
        if self.config.network.bridge == self.config.network.tun {
            return Err("network.bridge and network.tun are two interfaces: give them two names");
        }
        Ok(self.config)
    }
}

/// In the order in which a source is applied: a port after the host it belongs to.
pub(super) const SETTINGS: &[Setting] = &[
    Setting {
        key: "node_name",
        environment: &["NODE_ENGINE_NAME"],
        set: |draft, text| node_name(text).map(|name| draft.config.node_name = name),
    },
    Setting {
        key: "announced_port",
        environment: &["NODE_ENGINE_ANNOUNCED_PORT", "MY_PORT"],
        set: |draft, text| port(text).map(|port| draft.config.announced_port = port),
    },
    Setting { key: "on_exit", environment: &["NODE_ENGINE_ON_EXIT"], set: on_exit },
    Setting {
        key: "state_dir",
        environment: &["NODE_ENGINE_STATE_DIR"],
        set: |draft, text| directory(text).map(|path| draft.config.state_dir = path),
    },
    Setting {
        key: "run_dir",
        environment: &["NODE_ENGINE_RUN_DIR"],
        set: |draft, text| directory(text).map(|path| draft.config.run_dir = path),
    },
    Setting { key: "cluster.host", environment: &["NODE_ENGINE_CLUSTER", "CLUSTER_MANAGER_IP"], set: cluster_host },
    Setting {
        key: "cluster.port",
        environment: &["NODE_ENGINE_CLUSTER_PORT", "CLUSTER_MANAGER_PORT"],
        set: |draft, text| port(text).map(|port| draft.config.cluster.port = Some(port)),
    },
    Setting {
        key: "cluster.tls",
        environment: &["NODE_ENGINE_CLUSTER_TLS"],
        set: |draft, text| truth(text).map(|tls| draft.config.cluster.tls = tls),
    },
    Setting { key: "cluster.generation", environment: &["NODE_ENGINE_GENERATION"], set: generation },
    Setting {
        key: "cluster.mqtt_certificate",
        environment: &["NODE_ENGINE_MQTT_CERTIFICATE"],
        set: |draft, text| file(text).map(|path| draft.mqtt_certificate = Some(path)),
    },
    Setting {
        key: "cluster.mqtt_key",
        environment: &["NODE_ENGINE_MQTT_KEY"],
        set: |draft, text| file(text).map(|path| draft.mqtt_key = Some(path)),
    },
    Setting {
        key: "cluster.mqtt_ca",
        environment: &["NODE_ENGINE_MQTT_CA"],
        set: |draft, text| file(text).map(|path| draft.mqtt_ca = Some(path)),
    },
    Setting { key: "network.datapath", environment: &["NODE_ENGINE_DATAPATH"], set: datapath },
    Setting {
        key: "network.uplink",
        environment: &["NODE_ENGINE_UPLINK"],
        set: |draft, text| interface(text).map(|name| draft.config.network.uplink = Some(name)),
    },
    Setting {
        key: "network.public_ip",
        environment: &["NODE_ENGINE_PUBLIC_IP", "PUBLIC_WORKER_IP"],
        set: |draft, text| public_ip(text).map(|address| draft.config.network.public_ip = Some(address)),
    },
    Setting {
        key: "network.tunnel_port",
        environment: &["NODE_ENGINE_TUNNEL_PORT", "PUBLIC_WORKER_PORT"],
        set: |draft, text| port(text).map(|port| draft.config.network.tunnel_port = port),
    },
    Setting {
        key: "network.bridge",
        environment: &["NODE_ENGINE_BRIDGE"],
        set: |draft, text| interface(text).map(|name| draft.config.network.bridge = name),
    },
    Setting {
        key: "network.tun",
        environment: &["NODE_ENGINE_TUN"],
        set: |draft, text| interface(text).map(|name| draft.config.network.tun = name),
    },
    Setting { key: "network.service_v4", environment: &["NODE_ENGINE_SERVICE_V4"], set: service_v4 },
    Setting { key: "network.service_v6", environment: &["NODE_ENGINE_SERVICE_V6"], set: service_v6 },
    Setting {
        key: "network.bpffs",
        environment: &["NODE_ENGINE_BPFFS"],
        set: |draft, text| directory(text).map(|path| draft.config.network.bpffs = path),
    },
    Setting {
        key: "network.relax_source",
        environment: &["NODE_ENGINE_RELAX_SOURCE"],
        set: |draft, text| truth(text).map(|relax| draft.config.network.relax_source = relax),
    },
    Setting {
        key: "network.framing",
        environment: &["NODE_ENGINE_FRAMING"],
        set: |draft, text| truth(text).map(|framing| draft.config.network.framing = framing),
    },
    Setting { key: "network.xdp", environment: &["NODE_ENGINE_XDP"], set: xdp },
    Setting {
        key: "network.drain",
        environment: &["NODE_ENGINE_DRAIN"],
        set: |draft, text| seconds(text).map(|drain| draft.config.network.drain = drain),
    },
    Setting {
        key: "network.instances",
        environment: &["NODE_ENGINE_INSTANCES"],
        set: |draft, text| capacity(text).map(|capacity| draft.config.network.instances = capacity),
    },
    Setting {
        key: "runtime.docker_host",
        environment: &["NODE_ENGINE_DOCKER_HOST"],
        set: |draft, text| docker_host(text).map(|host| draft.config.runtime.docker_host = Some(host)),
    },
    Setting {
        key: "runtime.containerd",
        environment: &["NODE_ENGINE_CONTAINERD"],
        set: |draft, text| containerd(text).map(|choice| draft.config.runtime.containerd = choice),
    },
    Setting {
        key: "runtime.containerd_namespace",
        environment: &["NODE_ENGINE_CONTAINERD_NAMESPACE"],
        set: |draft, text| identifier(text).map(|name| draft.config.runtime.containerd_namespace = name),
    },
    Setting {
        key: "runtime.containerd_config",
        environment: &["NODE_ENGINE_CONTAINERD_CONFIG"],
        set: |draft, text| file(text).map(|path| draft.config.runtime.containerd_config = path),
    },
    Setting {
        key: "runtime.process",
        environment: &["NODE_ENGINE_PROCESS"],
        set: |draft, text| truth(text).map(|process| draft.config.runtime.process = process),
    },
    Setting {
        key: "runtime.process_user",
        environment: &["NODE_ENGINE_PROCESS_USER"],
        set: |draft, text| user(text).map(|user| draft.config.runtime.process_user = user),
    },
    Setting {
        key: "runtime.unikernel",
        environment: &["NODE_ENGINE_UNIKERNEL"],
        set: |draft, text| truth(text).map(|unikernel| draft.config.runtime.unikernel = unikernel),
    },
    Setting {
        key: "runtime.wasm",
        environment: &["NODE_ENGINE_WASM"],
        set: |draft, text| truth(text).map(|wasm| draft.config.runtime.wasm = wasm),
    },
    Setting {
        key: "runtime.image_files",
        environment: &["NODE_ENGINE_IMAGE_FILES"],
        set: |draft, text| truth(text).map(|files| draft.config.runtime.image_files = files),
    },
    Setting {
        key: "runtime.registry_mirrors",
        environment: &["NODE_ENGINE_REGISTRY_MIRRORS"],
        set: |draft, text| mirrors(text).map(|mirrors| draft.config.runtime.registries.mirrors = mirrors),
    },
    Setting {
        key: "runtime.registry_credentials",
        environment: &["NODE_ENGINE_REGISTRY_CREDENTIALS"],
        set: |draft, text| file(text).map(|path| draft.config.runtime.registries.credentials = Some(path)),
    },
    Setting {
        key: "runtime.privileged",
        environment: &["NODE_ENGINE_PRIVILEGED"],
        set: |draft, text| patterns(text).map(|patterns| draft.config.runtime.privileged = patterns),
    },
    Setting {
        key: "runtime.volume_drivers",
        environment: &["NODE_ENGINE_VOLUME_DRIVERS"],
        set: |draft, text| drivers(text).map(|drivers| draft.config.runtime.volume_drivers = drivers),
    },
    Setting {
        key: "runtime.host_path_volumes",
        environment: &["NODE_ENGINE_HOST_PATH_VOLUMES"],
        set: |draft, text| directory(text).map(|path| draft.config.runtime.host_path_volumes = Some(path)),
    },
    Setting {
        key: "runtime.control_group",
        environment: &["NODE_ENGINE_CONTROL_GROUP"],
        set: |draft, text| control_group(text).map(|group| draft.config.runtime.control_group = group),
    },
    Setting {
        key: "runtime.restart_limit",
        environment: &["NODE_ENGINE_RESTART_LIMIT"],
        set: |draft, text| whole(text, 0..=1000).map(|limit| draft.config.runtime.restarts.limit = limit),
    },
    Setting {
        key: "runtime.restart_window",
        environment: &["NODE_ENGINE_RESTART_WINDOW"],
        set: |draft, text| {
            whole(text, 1..=86_400)
                .map(|seconds| draft.config.runtime.restarts.window = Duration::from_secs(seconds.into()))
        },
    },
    Setting {
        key: "telemetry.reports",
        environment: &["NODE_ENGINE_REPORTS"],
        set: |draft, text| telemetry::reports(text).map(|choice| draft.config.telemetry.reports = choice),
    },
    Setting {
        key: "telemetry.sensors",
        environment: &["NODE_ENGINE_SENSORS"],
        set: |draft, text| telemetry::sensors(text).map(|choice| draft.config.telemetry.sensors = choice),
    },
    Setting {
        key: "telemetry.sensors_every",
        environment: &["NODE_ENGINE_SENSORS_EVERY"],
        set: |draft, text| telemetry::pace(text).map(|every| draft.config.telemetry.sensors_every = every),
    },
    Setting {
        key: "telemetry.gps",
        environment: &["NODE_ENGINE_GPS"],
        set: |draft, text| telemetry::gps(text).map(|source| draft.config.telemetry.gps = source),
    },
    Setting {
        key: "telemetry.metrics",
        environment: &["NODE_ENGINE_METRICS"],
        set: |draft, text| telemetry::metrics(text).map(|address| draft.config.telemetry.metrics = address),
    },
    Setting {
        key: "telemetry.otlp",
        environment: &["NODE_ENGINE_OTLP"],
        set: |draft, text| telemetry::otlp(text).map(|url| draft.config.telemetry.otlp = url),
    },
    Setting {
        key: "telemetry.otlp_every",
        environment: &["NODE_ENGINE_OTLP_EVERY"],
        set: |draft, text| telemetry::pace(text).map(|every| draft.config.telemetry.otlp_every = every),
    },
    Setting {
        key: "telemetry.sys_dir",
        environment: &["NODE_ENGINE_SYS_DIR"],
        set: |draft, text| directory(text).map(|path| draft.config.telemetry.roots.sys = path),
    },
    Setting {
        key: "telemetry.proc_dir",
        environment: &["NODE_ENGINE_PROC_DIR"],
        set: |draft, text| directory(text).map(|path| draft.config.telemetry.roots.proc = path),
    },
    Setting {
        key: "telemetry.dev_dir",
        environment: &["NODE_ENGINE_DEV_DIR"],
        set: |draft, text| directory(text).map(|path| draft.config.telemetry.roots.dev = path),
    },
];

/// `HOST`, `HOST:PORT`, `[IPV6]:PORT`, each with `http://` or `https://` before it where somebody copied it so. A host brings its own
/// port or none: the port of a weaker source belonged to the host of that source.
fn cluster_host(draft: &mut Draft, text: &str) -> Result<(), String> {
    let expected = || "is not HOST or HOST:PORT".to_owned();
    let cluster = &mut draft.config.cluster;
    let (rest, tls) = match text.split_once("://") {
        Some(("http", rest)) => (rest, Some(false)),
        Some(("https", rest)) => (rest, Some(true)),
        Some(_) => return Err(expected()),
        None => (text, None),
    };
    let rest = rest.trim_end_matches('/');
    let (host, number) = if rest.parse::<Ipv6Addr>().is_ok() {
        (rest, None)
    } else if let Some((host, after)) = rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        host.parse::<Ipv6Addr>().map_err(|_| expected())?;
        match after.strip_prefix(':') {
            Some(number) => (host, Some(number)),
            None if after.is_empty() => (host, None),
            None => return Err(expected()),
        }
    } else {
        match rest.split_once(':') {
            Some((host, number)) => (host, Some(number)),
            None => (rest, None),
        }
    };
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b':');
    if host.is_empty() || host.len() > 253 || !host.bytes().all(plain) {
        return Err(expected());
    }
    cluster.port = number.map(port).transpose()?;
    cluster.host = host.to_owned();
    if let Some(tls) = tls {
        cluster.tls = tls;
    }
    Ok(())
}

fn generation(draft: &mut Draft, text: &str) -> Result<(), String> {
    draft.config.cluster.generation = match text.to_ascii_lowercase().as_str() {
        "auto" => None,
        "g1" | "1" => Some(Generation::G1),
        "g1b" => Some(Generation::G1b),
        "g2" | "2" | "g3" | "3" => Some(Generation::G2),
        "g4" | "4" => Some(Generation::G4),
        _ => return Err("is not one of auto, g1, g1b, g2, g4".into()),
    };
    Ok(())
}

fn datapath(draft: &mut Draft, text: &str) -> Result<(), String> {
    draft.config.network.datapath = DatapathChoice::parse(text).ok_or("is not one of auto, ebpf, ebpf-plain, tun")?;
    Ok(())
}

fn xdp(draft: &mut Draft, text: &str) -> Result<(), String> {
    draft.config.network.xdp = match text {
        "auto" => XdpChoice::Auto,
        "on" | "true" => XdpChoice::On,
        "off" | "false" => XdpChoice::Off,
        _ => return Err("is not one of auto, on, off".into()),
    };
    Ok(())
}

fn on_exit(draft: &mut Draft, text: &str) -> Result<(), String> {
    draft.config.on_exit = match text {
        "leave" => OnExit::Leave,
        "stop" => OnExit::Stop,
        _ => return Err("is not one of leave, stop".into()),
    };
    Ok(())
}

fn service_v4(draft: &mut Draft, text: &str) -> Result<(), String> {
    let expected = "is not an IPv4 network such as 10.30.0.0/16 (prefix 8 to 30)";
    let (address, prefix) = network::<Ipv4Addr>(text, 8..=30).ok_or(expected)?;
    if u32::from(address).checked_shl(u32::from(prefix)).unwrap_or(0) != 0 {
        return Err("has bits set after its prefix".into());
    }
    draft.config.network.service_v4 = (address, prefix);
    Ok(())
}

fn service_v6(draft: &mut Draft, text: &str) -> Result<(), String> {
    let expected = "is not an IPv6 network such as fdff::/16 (prefix 8 to 126)";
    let (address, prefix) = network::<Ipv6Addr>(text, 8..=126).ok_or(expected)?;
    if u128::from(address).checked_shl(u32::from(prefix)).unwrap_or(0) != 0 {
        return Err("has bits set after its prefix".into());
    }
    draft.config.network.service_v6 = (address, prefix);
    Ok(())
}

fn network<A: std::str::FromStr>(text: &str, prefixes: std::ops::RangeInclusive<u8>) -> Option<(A, u8)> {
    let (address, prefix) = text.split_once('/')?;
    let prefix = prefix.parse().ok().filter(|prefix| prefixes.contains(prefix))?;
    Some((address.parse().ok()?, prefix))
}

fn node_name(text: &str) -> Result<String, String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
    if text.is_empty() || text.len() > 253 || !text.bytes().all(plain) {
        return Err("is not a node name (1 to 253 letters, digits, `.`, `-`, `_`)".into());
    }
    Ok(text.to_owned())
}

fn interface(text: &str) -> Result<String, String> {
    let plain = |byte: u8| byte.is_ascii_graphic() && byte != b'/' && byte != b':';
    if text.is_empty() || text.len() > 15 || !text.bytes().all(plain) || text == "." || text == ".." {
        return Err("is not an interface name (1 to 15 characters)".into());
    }
    Ok(text.to_owned())
}

fn public_ip(text: &str) -> Result<IpAddr, String> {
    let address: IpAddr = text.parse().map_err(|_| "is not an IP address")?;
    if address.is_unspecified() || address.is_loopback() || address.is_multicast() {
        return Err("is not an address that peers can reach".into());
    }
    Ok(address)
}

fn port(text: &str) -> Result<u16, String> {
    text.parse().ok().filter(|port| *port != 0).ok_or_else(|| "is not a port (1 to 65535)".into())
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds = text.parse().ok().filter(|seconds| *seconds <= 3_600);
    seconds.map(Duration::from_secs).ok_or_else(|| "is not a number of seconds (0 to 3600)".into())
}

fn whole(text: &str, range: std::ops::RangeInclusive<u32>) -> Result<u32, String> {
    let number = text.parse().ok().filter(|number| range.contains(number));
    number.ok_or_else(|| format!("is not a whole number from {} to {}", range.start(), range.end()))
}

fn capacity(text: &str) -> Result<Capacity, String> {
    let slots = whole(text, Capacity::USUAL.slots()..=Capacity::LARGEST)?;
    Ok(Capacity::of(slots).unwrap_or_default())
}

fn truth(text: &str) -> Result<bool, String> {
    match text {
        "true" | "yes" | "on" | "1" => Ok(true),
        "false" | "no" | "off" | "0" => Ok(false),
        _ => Err("is not true or false".into()),
    }
}

fn directory(text: &str) -> Result<PathBuf, String> {
    file(text)
}

fn file(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err("is not an absolute path".into()) }
}

fn docker_host(text: &str) -> Result<String, String> {
    let known = ["unix://", "tcp://", "http://", "https://", "/"];
    if known.iter().any(|prefix| text.len() > prefix.len() && text.starts_with(prefix)) {
        return Ok(text.to_owned());
    }
    Err("is not a Docker host such as unix:///var/run/docker.sock".into())
}

fn containerd(text: &str) -> Result<ContainerdChoice, String> {
    match text {
        "auto" => Ok(ContainerdChoice::Auto),
        "off" => Ok(ContainerdChoice::Off),
        path if path.starts_with('/') => Ok(ContainerdChoice::At(path.into())),
        _ => Err("is not auto, off or the path of a socket".into()),
    }
}

/// As containerd names things.
fn identifier(text: &str) -> Result<String, String> {
    let part = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let good = text.len() <= 76 && text.split(['.', '_', '-']).all(part);
    if good { Ok(text.to_owned()) } else { Err("is not letters and digits, with single dots or dashes between".into()) }
}

fn user(text: &str) -> Result<String, String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    let name = |text: &str| !text.is_empty() && text.len() <= 32 && text.bytes().all(plain);
    let (user, group) = text.split_once(':').unwrap_or((text, "0"));
    if name(user) && name(group) { Ok(text.to_owned()) } else { Err("is not USER or USER:GROUP".into()) }
}

/// Separated by commas.
fn patterns(text: &str) -> Result<Vec<ServicePattern>, String> {
    let patterns = text.split(',').map(str::trim).filter(|pattern| !pattern.is_empty()).map(str::parse);
    let expected = "is not a list of services such as app.default.web.test, app.*.*.*";
    patterns.collect::<Result<_, _>>().map_err(|_| expected.to_owned())
}

/// `REGISTRY=MIRROR`, separated by commas; the mirrors of one registry in the order in which they are tried.
fn mirrors(text: &str) -> Result<BTreeMap<String, Vec<String>>, String> {
    let mut mirrors: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for entry in text.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
        let pair = entry.split_once('=').map(|(registry, mirror)| (registry.trim(), mirror.trim()));
        let pair = pair.filter(|(registry, mirror)| is_place(registry) && !registry.contains('/') && is_place(mirror));
        let (registry, mirror) =
            pair.ok_or("is not a list of mirrors such as docker.io=mirror.example:5000, ghcr.io=mirror.example/ghcr")?;
        mirrors.entry(registry.to_owned()).or_default().push(mirror.to_owned());
    }
    Ok(mirrors)
}

/// `NAME=SOCKET`, separated by commas.
fn drivers(text: &str) -> Result<BTreeMap<String, PathBuf>, String> {
    let expected = || "is not a list of drivers such as csi.example/nfs=/run/csi/nfs.sock".to_owned();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'/');
    let driver = |entry: &str| {
        let (name, socket) = entry.split_once('=').ok_or_else(expected)?;
        let socket = socket.strip_prefix("unix://").unwrap_or(socket);
        let good = !name.is_empty() && name.len() <= 128 && name.bytes().all(plain) && socket.starts_with('/');
        if good { Ok((name.to_owned(), PathBuf::from(socket))) } else { Err(expected()) }
    };
    text.split(',').map(str::trim).filter(|entry| !entry.is_empty()).map(driver).collect()
}

fn control_group(text: &str) -> Result<String, String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    let component = |part: &str| !part.is_empty() && part != "." && part != ".." && part.bytes().all(plain);
    match text.strip_prefix('/') {
        Some(path) if path.split('/').all(component) => Ok(text.to_owned()),
        _ => Err("is not the path of a control group such as /node-engine".into()),
    }
}
