//! What is deployed: service names, instances, and the description of one instance.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use super::furniture::{AddedFile, Mount, VolumeRequest};

/// `<app>.<app namespace>.<service>.<service namespace>`, each part `[a-zA-Z0-9]{1,30}`.
///
/// The cluster calls it `job_name`. Checked once here; nothing behind this type meets a path separator,
/// a control character or an over-long name.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceName(Arc<str>);

impl ServiceName {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The third part: what a person calls the service.
    pub fn short(&self) -> &str {
        self.0.split('.').nth(2).unwrap_or(&self.0)
    }
}

/// A text that is not a service name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not a service name: {reason} (expected app.namespace.service.namespace, each 1 to 30 letters or digits)"
)]
pub struct InvalidName {
    text: String,
    reason: &'static str,
}

impl FromStr for ServiceName {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let invalid = |reason| InvalidName { text: text.chars().take(160).collect(), reason };
        let mut parts = 0;
        for part in text.split('.') {
            parts += 1;
            if part.is_empty() || part.len() > 30 {
                return Err(invalid("a part is empty or longer than 30 characters"));
            }
            if !part.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
                return Err(invalid("a part has a character that is neither letter nor digit"));
            }
        }
        if parts != 4 {
            return Err(invalid("it does not have four parts"));
        }
        Ok(Self(text.into()))
    }
}

impl fmt::Display for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ServiceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Services by name, where any of the four parts may be `*`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServicePattern([Option<String>; 4]);

impl ServicePattern {
    pub fn matches(&self, service: &ServiceName) -> bool {
        let fits = |(wanted, part): (&Option<String>, &str)| wanted.as_deref().is_none_or(|wanted| wanted == part);
        self.0.iter().zip(service.as_str().split('.')).all(fits)
    }
}

impl FromStr for ServicePattern {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        // What is a name with a letter in place of each star is a pattern.
        let as_name: Vec<_> = text.split('.').map(|part| if part == "*" { "x" } else { part }).collect();
        as_name.join(".").parse::<ServiceName>()?;
        let mut parts = text.split('.').map(|part| (part != "*").then(|| part.to_owned()));
        Ok(Self(std::array::from_fn(|_| parts.next().flatten())))
    }
}

/// One instance of a service. Displayed as `<service>.instance.<number>`, the name that containers and namespaces carry.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InstanceId {
    pub service: ServiceName,
    pub number: u32,
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.instance.{}", self.service, self.number)
    }
}

impl FromStr for InstanceId {
    type Err = InvalidName;

    /// Reads what `Display` writes.
    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let invalid = |reason| InvalidName { text: text.chars().take(160).collect(), reason };
        let (service, number) =
            text.rsplit_once(".instance.").ok_or_else(|| invalid("it has no `.instance.<number>`"))?;
        Ok(Self {
            service: service.parse()?,
            number: number.parse().map_err(|_| invalid("the instance number is not a number"))?,
        })
    }
}

/// What runs an instance. `container` and `docker` are the same on the wire and one value here.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Technology {
    Container,
    Unikernel,
    Wasm,
    /// A plain command of the node's own system.
    Process,
    /// An OCI runtime or virtual machine monitor by its own name, as the cluster wrote it.
    Other(String),
}

impl Technology {
    /// The word for `virtualization` in node reports.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Container => "docker",
            Self::Unikernel => "unikernel",
            Self::Wasm => "wasm",
            Self::Process => "process",
            Self::Other(name) => name,
        }
    }
}

impl From<&str> for Technology {
    fn from(text: &str) -> Self {
        match text {
            "container" | "docker" => Self::Container,
            "unikernel" | "mirage" => Self::Unikernel,
            "wasm" => Self::Wasm,
            "process" => Self::Process,
            other => Self::Other(other.chars().take(64).collect()),
        }
    }
}

impl fmt::Display for Technology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Everything a runtime and the network need to know to bring up one instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceSpec {
    pub id: InstanceId,
    /// The cluster's `_id` of the job; empty where the cluster sent none.
    pub job: String,
    pub technology: Technology,
    /// Image reference; comma-separated URLs for unikernels; a program of the node, or nothing, for processes.
    pub image: String,
    /// Replaces all that the image says to run, when not empty.
    pub command: Vec<String>,
    /// The command follows the image's entry point instead, as the first generation had it.
    pub beside_entrypoint: bool,
    /// `NAME=value`.
    pub environment: Vec<String>,
    pub ports: Vec<PortMapping>,
    /// Pull platform such as `linux/arm64`.
    pub platform: Option<String>,
    /// Name or number of the user the command runs as, `:group` behind it where it is not the user's own; `None`: the image's.
    pub user: Option<String>,
    /// Absolute; `None`: the image's.
    pub directory: Option<String>,
    pub limits: Limits,
    pub volumes: Vec<VolumeRequest>,
    pub files: Vec<AddedFile>,
    /// What the node mounts into the instance. No description asks for it by itself.
    pub mounts: Vec<Mount>,
    /// Devices of the node.
    pub devices: Vec<DeviceGrant>,
    /// Exit code 0 means completed, not dead.
    pub one_shot: bool,
    pub privileged: bool,
    /// The description in its wire form, opaque here. A runtime keeps it beside the workload (a container label),
    /// so that a restarted daemon can read back what it was asked for.
    pub document: Arc<str>,
}

impl InstanceSpec {
    /// A description that asks for nothing in particular.
    pub fn new(id: InstanceId, technology: Technology) -> Self {
        Self {
            id,
            job: String::new(),
            technology,
            image: String::new(),
            command: Vec::new(),
            beside_entrypoint: false,
            environment: Vec::new(),
            ports: Vec::new(),
            platform: None,
            user: None,
            directory: None,
            limits: Limits::default(),
            volumes: Vec::new(),
            files: Vec::new(),
            mounts: Vec::new(),
            devices: Vec::new(),
            one_shot: false,
            privileged: false,
            document: "".into(),
        }
    }
}

/// A device that an instance asks for, and, once the node has granted it, what that is here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceGrant {
    /// Name or id of something attached; or `vendor/class=name`, which a CDI specification of the node describes.
    pub name: String,
    /// Device nodes; empty until it is granted, and for what CDI describes.
    pub nodes: Vec<PathBuf>,
}

impl DeviceGrant {
    /// What is granted by the runtime, by a specification that vendors install (Container Device Interface).
    pub fn is_cdi(&self) -> bool {
        self.name.contains('=')
    }
}

/// Resources an instance may use; `None` is unlimited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    pub vcpus: Option<u32>,
    pub memory_mib: Option<u64>,
    /// Of what it writes beside its volumes.
    pub storage_mib: Option<u64>,
    pub vgpus: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    Tcp,
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A host port forwarded to a port of an instance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortMapping {
    pub host: u16,
    pub container: u16,
    pub protocol: Protocol,
}

impl fmt::Display for PortMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.host, self.container, self.protocol)
    }
}

/// The namespace addresses of an instance inside its node's subnets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Addresses {
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn service_names_have_four_plain_parts() {
        for good in ["app.default.web.test", "a.b.c.d", "A1.b2.C3.d4"] {
            assert_eq!(good.parse::<ServiceName>().map(|name| name.to_string()), Ok(good.to_owned()));
        }
        let long = format!("{}.b.c.d", "a".repeat(31));
        for bad in ["", "a", "a.b.c", "a.b.c.d.e", "a..c.d", "a.b.c.d/..", "a.b.c.\n", "ä.b.c.d", &long] {
            assert!(bad.parse::<ServiceName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn patterns_match_part_by_part() {
        let name: ServiceName = "app.default.web.test".parse().unwrap();
        for (pattern, matches) in [
            ("app.default.web.test", true),
            ("*.*.*.*", true),
            ("app.*.web.test", true),
            ("app.*.db.test", false),
            ("ap.default.web.test", false),
        ] {
            assert_eq!(pattern.parse::<ServicePattern>().unwrap().matches(&name), matches, "{pattern}");
        }
        for bad in ["", "*", "app.default.web", "app.*.w*b.test", "a.b.c.d.e"] {
            assert!(bad.parse::<ServicePattern>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn instance_ids_read_what_they_write() {
        let id: InstanceId = "app.default.web.test.instance.7".parse().expect("a good id");
        assert_eq!(id.number, 7);
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!("app.default.web.test".parse::<InstanceId>().is_err());
        assert!("app.default.web.test.instance.-1".parse::<InstanceId>().is_err());
    }
}
