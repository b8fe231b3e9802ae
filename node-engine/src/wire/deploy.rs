//! The job document: what a cluster says when it wants an instance.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::Serialize;

use super::furniture::{self, FileDocument, VolumeDocument};
use super::json::{LARGEST_WHOLE, MAX_DOCUMENT, Malformed, Members, excerpt};
use super::service_name;
use crate::model::{
    DeviceGrant, InstanceId, InstanceSpec, InvalidName, Limits, NodeId, PortMapping, Protocol, ServiceName, Technology,
};

/// Why a job document cannot be carried out. Carries the instance where that much was understood, so that the cluster can
/// be told which one failed.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct DeployError {
    pub instance: Option<InstanceId>,
    #[source]
    pub reason: DeployFault,
}

/// What is wrong with a job document.
#[derive(Debug, thiserror::Error)]
pub enum DeployFault {
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error(transparent)]
    Name(#[from] InvalidName),
    #[error("instance number {0} is too large")]
    Number(u64),
    #[error("the document names no instance for this node")]
    NotForThisNode,
    #[error("image {0} is empty, longer than 4096 bytes or has a space or control character")]
    Image(String),
    #[error("`{0}` is not a technology")]
    Technology(String),
    #[error("platform {0} is not of the form os/architecture")]
    Platform(String),
    #[error("{0} has a NUL character")]
    Nul(&'static str),
    #[error("a process has neither image (a program of the node) nor cmd")]
    Nothing,
    #[error("user {0} is not of the form user or user:group")]
    User(String),
    #[error("working directory {0} is not an absolute path")]
    Directory(String),
    #[error("device {0} is neither the name of a device nor vendor/class=name")]
    Device(String),
    #[error("entry {0} of `environment` has no name")]
    Environment(usize),
    #[error("port mapping {text}: {reason} (expected host:container/tcp|udp, several joined by `;`)")]
    Port { text: String, reason: &'static str },
    #[error("volume {id}: {reason}")]
    Volume { id: String, reason: &'static str },
    #[error("added file {path}: {reason}")]
    AddedFile { path: String, reason: &'static str },
    #[error("none of the images is for {0} (offered: {1})")]
    Architecture(&'static str, String),
}

const MAX_PORTS: usize = 256;

/// Has this node been told before to run this instance of the job of this id?
pub type Told<'a> = &'a dyn Fn(&InstanceId, &str) -> bool;

/// Reads a job document of any generation. `node` is this node's id, by which a first-generation document (which lists all
/// instances and singles out none) says which instance is meant.
///
/// # Errors
/// Where a member that is acted on is missing or wrong; all others may be anything.
pub fn deploy(bytes: &[u8], node: Option<&NodeId>) -> Result<InstanceSpec, DeployError> {
    deploy_next(bytes, node, &|_, _| false)
}

/// The same for a node that was told of other instances before, which a first-generation document does not mean again.
///
/// # Errors
/// The same.
pub fn deploy_next(bytes: &[u8], node: Option<&NodeId>, told: Told<'_>) -> Result<InstanceSpec, DeployError> {
    let members = Members::parse(bytes, MAX_DOCUMENT).map_err(|error| DeployError::unnamed(error.into()))?;
    let service = service(&members, "job_name").map_err(DeployError::unnamed)?;
    let meant = || waiting(&members, &service, node, told);
    let number = match number(&members).and_then(|number| number.map_or_else(meant, Ok)) {
        Ok(number) => number,
        Err(reason) => return Err(DeployError::unnamed(reason)),
    };
    read(&members, InstanceId { service, number })
}

impl DeployError {
    pub(super) fn unnamed(reason: DeployFault) -> Self {
        Self { instance: None, reason }
    }
}

/// Reads what [`document`] has written, in this version or an earlier one.
///
/// # Errors
/// As for [`deploy`].
pub fn kept(document: &str) -> Result<InstanceSpec, DeployError> {
    let mut spec = deploy(document.as_bytes(), None)?;
    let members =
        Members::parse(document.as_bytes(), MAX_DOCUMENT).map_err(|error| DeployError::unnamed(error.into()))?;
    if !spec.command.is_empty() && !members.has("beside_entrypoint") {
        spec.beside_entrypoint = true;
        spec.document = self::document(&spec).into();
    }
    Ok(spec)
}

/// Reads the description of an instance that is already known. Names are those of the document, first-generation ones, or
/// those of the common message form.
pub(super) fn read(members: &Members<'_>, id: InstanceId) -> Result<InstanceSpec, DeployError> {
    let instance = Some(id.clone());
    description(members, id).map_err(|reason| DeployError { instance, reason })
}

fn description(members: &Members<'_>, id: InstanceId) -> Result<InstanceSpec, DeployFault> {
    let technology = technology(members)?.unwrap_or(Technology::Container);
    let mut command = members.texts("cmd")?;
    let mut beside_entrypoint = members.flag("beside_entrypoint")?;
    if command.is_empty() {
        command = first_generation_command(members)?;
        beside_entrypoint = true;
    }
    if command.iter().any(|word| word.contains('\0')) {
        return Err(DeployFault::Nul("the command"));
    }
    let image = image(members, &technology)?;
    if image.is_empty() && command.is_empty() {
        return Err(DeployFault::Nothing);
    }
    let mut spec = InstanceSpec {
        id,
        job: job(members),
        image,
        technology,
        beside_entrypoint: beside_entrypoint && !command.is_empty(),
        command,
        environment: environment(members)?,
        ports: ports(members)?,
        platform: platform(members)?,
        user: user(members)?,
        directory: directory(members)?,
        limits: limits(members)?,
        volumes: furniture::volumes(members)?,
        files: furniture::files(members)?,
        mounts: Vec::new(),
        devices: devices(members)?,
        one_shot: members.flag("one_shot")?,
        privileged: members.flag("privileged")?,
        document: Arc::from(""),
    };
    spec.document = document(&spec).into();
    Ok(spec)
}

pub(super) fn service(members: &Members<'_>, member: &'static str) -> Result<ServiceName, DeployFault> {
    let name = members.said(member)?.ok_or(Malformed::Missing(member))?;
    Ok(name.parse()?)
}

pub(super) fn short_service(members: &Members<'_>, member: &'static str) -> Result<ServiceName, DeployFault> {
    let name = members.said(member)?.ok_or(Malformed::Missing(member))?;
    Ok(service_name(&name)?)
}

pub(super) fn number(members: &Members<'_>) -> Result<Option<u32>, DeployFault> {
    let Some(number) = members.whole("instance_number")? else { return Ok(None) };
    number.try_into().map(Some).map_err(|_| DeployFault::Number(number))
}

/// The instance that a first-generation document means: ours, without an address yet, and not told of before. An instance has no address
/// for as long as its image is pulled, and the order for another may come meanwhile. Where all such were told of it is a repetition.
fn waiting(
    members: &Members<'_>,
    service: &ServiceName,
    node: Option<&NodeId>,
    told: Told<'_>,
) -> Result<u32, DeployFault> {
    if !members.has("instance_list") {
        return Err(Malformed::Missing("instance_number").into());
    }
    let job = job(members);
    let mut repeated = None;
    for entry in members.objects("instance_list")? {
        if !is_ours(&entry, node)? || entry.said("namespace_ip")?.is_some() {
            continue;
        }
        let number = number(&entry)?.ok_or(Malformed::Missing("instance_number"))?;
        if !told(&InstanceId { service: service.clone(), number }, &job) {
            return Ok(number);
        }
        repeated = repeated.or(Some(number));
    }
    repeated.ok_or(DeployFault::NotForThisNode)
}

/// Every instance of a first-generation document that is ours.
pub(super) fn ours(members: &Members<'_>, node: Option<&NodeId>) -> Result<Vec<u32>, DeployFault> {
    let mut numbers = Vec::new();
    for entry in members.objects("instance_list")? {
        if is_ours(&entry, node)? {
            numbers.extend(number(&entry)?);
        }
    }
    if numbers.is_empty() { Err(DeployFault::NotForThisNode) } else { Ok(numbers) }
}

fn is_ours(entry: &Members<'_>, node: Option<&NodeId>) -> Result<bool, DeployFault> {
    let Some(node) = node else { return Ok(false) };
    Ok(entry.said("worker_id")?.as_deref() == Some(node.as_str()))
}

/// The cluster's own id of the job. Only ever repeated to it, so whatever is no plain text counts as absent.
fn job(members: &Members<'_>) -> String {
    let id = members.said("_id").ok().flatten().or_else(|| members.said("id").ok().flatten());
    id.filter(|id| id.len() <= 128).unwrap_or_default()
}

pub(super) fn technology(members: &Members<'_>) -> Result<Option<Technology>, DeployFault> {
    for member in ["virtualization", "image_runtime", "technology"] {
        if let Some(name) = members.said(member)? {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._/-".contains(&byte);
            if name.len() > 64 || !name.bytes().all(plain) {
                return Err(DeployFault::Technology(excerpt(name.as_bytes())));
            }
            return Ok(Some(Technology::from(name.as_str())));
        }
    }
    Ok(None)
}

fn image(members: &Members<'_>, technology: &Technology) -> Result<String, DeployFault> {
    let unikernel = *technology == Technology::Unikernel;
    let mut offered = if unikernel { members.texts("vm_images")? } else { Vec::new() };
    if unikernel && offered.is_empty() {
        // Clusters join the list.
        let joined = members.said("image")?.unwrap_or_default();
        offered = joined.split(',').filter(|image| !image.is_empty()).map(str::to_owned).collect();
    }
    let image = if unikernel && !offered.is_empty() {
        for_this_machine(&offered, &members.texts("arch")?)?
    } else {
        match members.said("image")? {
            Some(image) => image,
            // The command says it all.
            None if *technology == Technology::Process => return Ok(String::new()),
            None => return Err(Malformed::Missing("image").into()),
        }
    };
    let bad = |letter: char| letter.is_control() || letter.is_whitespace();
    if image.is_empty() || image.len() > 4096 || image.contains(bad) {
        return Err(DeployFault::Image(excerpt(image.as_bytes())));
    }
    Ok(image)
}

/// There is one image for each of `arch`; where that says nothing, all of them stay on offer.
fn for_this_machine(images: &[String], architectures: &[String]) -> Result<String, DeployFault> {
    if architectures.is_empty() {
        return Ok(images.join(","));
    }
    let here = architecture();
    let found = architectures.iter().zip(images).find(|(architecture, _)| *architecture == here);
    let (_, image) =
        found.ok_or_else(|| DeployFault::Architecture(here, excerpt(architectures.join(", ").as_bytes())))?;
    Ok(image.clone())
}

/// This machine's architecture as clusters spell it.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "x86" => "386",
        other => other,
    }
}

/// `commands` is a list in one document and one text in another.
fn first_generation_command(members: &Members<'_>) -> Result<Vec<String>, DeployFault> {
    match members.get("commands") {
        Some(text) if text.starts_with('"') => {
            let line = members.text("commands")?.unwrap_or_default();
            Ok(line.split_whitespace().map(str::to_owned).collect())
        }
        _ => Ok(members.texts("commands")?),
    }
}

fn environment(members: &Members<'_>) -> Result<Vec<String>, DeployFault> {
    let entries = members.texts("environment")?;
    for (number, entry) in (1..).zip(&entries) {
        if entry.contains('\0') {
            return Err(DeployFault::Nul("the environment"));
        }
        // None of it is repeated: it may be a secret. A name alone takes away what the image says of it.
        if entry.is_empty() || entry.starts_with('=') {
            return Err(DeployFault::Environment(number));
        }
    }
    Ok(entries)
}

fn ports(members: &Members<'_>) -> Result<Vec<PortMapping>, DeployFault> {
    if members.get("port").is_some_and(|text| !text.starts_with('"')) {
        let number = members.whole("port")?.unwrap_or_default();
        return port_mappings(&number.to_string());
    }
    port_mappings(&members.text("port")?.unwrap_or_default())
}

/// Reads `80:80/tcp;53:53/udp`: the host's port first, tcp unless said, one number for both sides.
///
/// # Errors
/// Where an entry is none, or two entries want the same port of the host.
pub fn port_mappings(text: &str) -> Result<Vec<PortMapping>, DeployFault> {
    let mut mappings: Vec<PortMapping> = Vec::new();
    let mut taken = BTreeSet::new();
    for entry in text.split(';').map(str::trim).filter(|entry| !entry.is_empty()) {
        let wrong = |reason| DeployFault::Port { text: excerpt(entry.as_bytes()), reason };
        let mapping = port_mapping(entry).map_err(wrong)?;
        if mappings.contains(&mapping) {
            continue;
        }
        if !taken.insert((mapping.host, mapping.protocol)) {
            return Err(wrong("the host port is mapped twice"));
        }
        if mappings.len() == MAX_PORTS {
            return Err(wrong("more than 256 mappings"));
        }
        mappings.push(mapping);
    }
    Ok(mappings)
}

fn port_mapping(entry: &str) -> Result<PortMapping, &'static str> {
    let (ports, protocol) = match entry.split_once('/') {
        None => (entry, Protocol::Tcp),
        Some((ports, "tcp" | "TCP")) => (ports, Protocol::Tcp),
        Some((ports, "udp" | "UDP")) => (ports, Protocol::Udp),
        Some(_) => return Err("the protocol is neither tcp nor udp"),
    };
    let (host, container) = ports.split_once(':').unwrap_or((ports, ports));
    Ok(PortMapping { host: port(host)?, container: port(container)?, protocol })
}

fn port(text: &str) -> Result<u16, &'static str> {
    match text.trim().parse() {
        Ok(0) | Err(_) => Err("a port is a number from 1 to 65535"),
        Ok(port) => Ok(port),
    }
}

fn platform(members: &Members<'_>) -> Result<Option<String>, DeployFault> {
    let Some(platform) = members.said("platform")? else { return Ok(None) };
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._/-".contains(&byte);
    if platform.len() > 64 || !platform.bytes().all(plain) {
        return Err(DeployFault::Platform(excerpt(platform.as_bytes())));
    }
    Ok(Some(platform))
}

/// Ours: no generation of the reference system gives devices away. The node says at the deployment whether it has them.
fn devices(members: &Members<'_>) -> Result<Vec<DeviceGrant>, DeployFault> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-:/=".contains(&byte);
    let names = members.texts("devices")?.into_iter().map(|name| {
        if name.is_empty() || name.len() > 128 || !name.bytes().all(plain) {
            return Err(DeployFault::Device(excerpt(name.as_bytes())));
        }
        Ok(DeviceGrant { name, nodes: Vec::new() })
    });
    names.collect()
}

fn user(members: &Members<'_>) -> Result<Option<String>, DeployFault> {
    let Some(user) = members.said("user")? else { return Ok(None) };
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let name = |text: &str| !text.is_empty() && text.len() <= 32 && text.bytes().all(plain);
    let (one, group) = user.split_once(':').unwrap_or((&user, "0"));
    if name(one) && name(group) { Ok(Some(user)) } else { Err(DeployFault::User(excerpt(user.as_bytes()))) }
}

fn directory(members: &Members<'_>) -> Result<Option<String>, DeployFault> {
    let Some(path) = members.said("working_directory")? else { return Ok(None) };
    if !path.starts_with('/') || path.len() > 4096 || path.contains(char::is_control) {
        return Err(DeployFault::Directory(excerpt(path.as_bytes())));
    }
    Ok(Some(path))
}

/// Zero asks for nothing in particular. First-generation documents keep their wishes in `requirements`.
fn limits(members: &Members<'_>) -> Result<Limits, DeployFault> {
    let wishes = if members.has("vcpus") || members.has("memory") { None } else { members.object("requirements").ok() };
    let (vcpus, memory) = match wishes.flatten() {
        Some(wishes) => {
            // A share of a processor was a legal wish then; it is rounded up. What is kept of it has to be a number that can be read.
            let wish =
                |member| wishes.number(member).ok().flatten().map(|wish| wish.clamp(0.0, LARGEST_WHOLE).ceil() as u64);
            (wish("cpu"), wish("memory"))
        }
        None => (members.whole("vcpus")?, members.whole("memory")?),
    };
    let narrow = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    Ok(Limits {
        vcpus: vcpus.filter(|number| *number > 0).map(narrow),
        memory_mib: memory.filter(|number| *number > 0),
        storage_mib: members.whole("storage")?.filter(|number| *number > 0),
        vgpus: members.whole("vgpus")?.map(narrow).unwrap_or_default(),
    })
}

/// The members acted on, in the newest form: what [`kept`] reads back into the same description.
pub fn document(spec: &InstanceSpec) -> String {
    super::text(&Document::from(spec))
}

/// A job document as a cluster of the newest generation writes it, as far as a node acts on it.
#[derive(Debug, Serialize)]
pub struct Document {
    #[serde(rename = "_id", skip_serializing_if = "String::is_empty")]
    pub id: String,
    pub job_name: String,
    pub instance_number: u32,
    pub virtualization: String,
    pub image: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cmd: Vec<String>,
    /// Ours: whether the command follows the image's entry point. An earlier version, which says nothing, let every command.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub beside_entrypoint: Option<bool>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub environment: Vec<String>,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub port: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    #[serde(rename = "working_directory", skip_serializing_if = "Option::is_none")]
    pub directory: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub storage: Option<u64>,
    #[serde(skip_serializing_if = "is_zero")]
    pub vgpus: u32,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    volumes: Vec<VolumeDocument>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    added_files: Vec<FileDocument>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub devices: Vec<String>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub one_shot: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub privileged: bool,
}

fn is_zero(number: &u32) -> bool {
    *number == 0
}

impl From<&InstanceSpec> for Document {
    fn from(spec: &InstanceSpec) -> Self {
        let ports: Vec<String> = spec.ports.iter().map(PortMapping::to_string).collect();
        Self {
            id: spec.job.clone(),
            job_name: spec.id.service.to_string(),
            instance_number: spec.id.number,
            virtualization: spec.technology.to_string(),
            image: spec.image.clone(),
            cmd: spec.command.clone(),
            beside_entrypoint: (!spec.command.is_empty()).then_some(spec.beside_entrypoint),
            environment: spec.environment.clone(),
            port: ports.join(";"),
            platform: spec.platform.clone(),
            user: spec.user.clone(),
            directory: spec.directory.clone(),
            vcpus: spec.limits.vcpus,
            memory: spec.limits.memory_mib,
            storage: spec.limits.storage_mib,
            vgpus: spec.limits.vgpus,
            volumes: VolumeDocument::of(spec),
            added_files: FileDocument::of(spec),
            devices: spec.devices.iter().map(|device| device.name.clone()).collect(),
            one_shot: spec.one_shot,
            privileged: spec.privileged,
        }
    }
}
