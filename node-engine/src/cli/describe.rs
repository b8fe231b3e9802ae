//! The description of a service to deploy: read from a file, or made from options.

use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use serde_json::json;

use crate::api::LARGEST_BODY;
use crate::model::{Policy, ServiceName, TableRow};

/// What to deploy.
#[derive(Clone, Debug, Args)]
pub(super) struct DeployArgs {
    /// Description in the cluster's own JSON; `-` reads it from the standard input
    #[arg(value_name = "FILE", required_unless_present = "image", conflicts_with = "image")]
    file: Option<PathBuf>,
    /// Image to run, in place of a description
    #[arg(long, requires = "name")]
    image: Option<String>,
    /// Name of the service: `web`, or all four parts `app.default.web.default`
    #[arg(long, requires = "image", value_parser = service_name)]
    name: Option<ServiceName>,
    /// Port of the host that leads to the service: 8080:80, 5353:53/udp; may be repeated
    #[arg(long = "port", requires = "image", value_name = "HOST:CONTAINER[/PROTOCOL]")]
    ports: Vec<String>,
    /// Environment variable; may be repeated
    #[arg(long = "env", requires = "image", value_name = "NAME=VALUE")]
    environment: Vec<String>,
    /// Command in place of the image's; takes the rest of the line
    #[arg(long = "cmd", requires = "image", value_name = "WORD", num_args = 1.., allow_hyphen_values = true)]
    command: Vec<String>,
    /// Memory limit
    #[arg(long, requires = "image", value_name = "MIB")]
    memory: Option<u64>,
    /// CPU limit
    #[arg(long, requires = "image", value_name = "N")]
    vcpus: Option<u32>,
    /// Device of the node, by its name in `node-engine hardware` or as vendor/class=name (CDI); may be repeated
    #[arg(long = "device", requires = "image", value_name = "NAME")]
    devices: Vec<String>,
    /// What runs it: container (or docker), containerd, unikernel, wasm, process, or an OCI runtime by its name
    #[arg(long, requires = "image", value_name = "TECHNOLOGY", default_value = "container")]
    technology: String,
    /// It is meant to end: exit code 0 means completed
    #[arg(long, requires = "image")]
    one_shot: bool,
    /// Offer the service at an address of its own that chooses so: random, closest, underutilised, sticky, weighted, local, failover; may
    /// be repeated
    #[arg(long = "policy", requires = "image", value_name = "POLICY", value_parser = policy)]
    policies: Vec<Policy>,
    /// How much an instance weighs (0 to 100) where that decides; may be repeated
    #[arg(long = "weight", requires = "image", value_name = "NUMBER=WEIGHT", value_parser = weight)]
    weights: Vec<(u32, u32)>,
    /// How many instances [default: as many as the description says, or 1]
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub(super) replicas: Option<u32>,
    /// Name or id of the node to run on
    #[arg(long, value_name = "NODE")]
    pub(super) on: Option<String>,
}

impl DeployArgs {
    /// The description, as the cluster reads it.
    pub(super) fn document(&self) -> anyhow::Result<Vec<u8>> {
        match (&self.file, &self.name) {
            (Some(path), _) if path.as_os_str() == "-" => read(std::io::stdin(), "the standard input"),
            (Some(path), _) => {
                let shown = path.display().to_string();
                read(std::fs::File::open(path).with_context(|| format!("read {shown}"))?, &shown)
            }
            (None, Some(name)) => Ok(self.made_for(name)),
            (None, None) => bail!("name what to deploy: a FILE, or --image with --name"),
        }
    }

    fn made_for(&self, name: &ServiceName) -> Vec<u8> {
        let mut document = json!({
            "job_name": name.to_string(),
            "virtualization": self.technology,
            "image": self.image,
            "cmd": self.command,
            "environment": self.environment,
            "port": self.ports.join(";"),
            "one_shot": self.one_shot,
        });
        if !self.devices.is_empty() {
            document["devices"] = json!(self.devices);
        }
        if let Some(memory) = self.memory {
            document["memory"] = memory.into();
        }
        if let Some(vcpus) = self.vcpus {
            document["vcpus"] = vcpus.into();
        }
        if !self.policies.is_empty() {
            let labels: Vec<_> = self.policies.iter().map(|policy| policy.label()).collect();
            document["addresses"]["policies"] = labels.into();
        }
        for (number, weight) in &self.weights {
            document["addresses"]["weights"][number.to_string()] = (*weight).into();
        }
        document.to_string().into_bytes()
    }
}

fn read(from: impl Read, shown: &str) -> anyhow::Result<Vec<u8>> {
    let mut document = Vec::new();
    from.take(LARGEST_BODY as u64 + 1).read_to_end(&mut document).with_context(|| format!("read {shown}"))?;
    if document.len() > LARGEST_BODY {
        bail!("{shown} is longer than {} KiB: it is no description of a service", LARGEST_BODY / 1024);
    }
    Ok(document)
}

fn at_least_one(text: &str) -> Result<u32, String> {
    let number = text.parse::<u32>().ok().filter(|number| *number > 0);
    number.ok_or_else(|| "expected a number from 1 on; `node-engine replicate` takes instances away".into())
}

fn policy(text: &str) -> Result<Policy, String> {
    Policy::from_label(text).ok_or_else(|| {
        let known: Vec<_> = Policy::ALL.iter().map(|policy| policy.label()).collect();
        format!("expected one of {}", known.join(", "))
    })
}

fn weight(text: &str) -> Result<(u32, u32), String> {
    let expected = || format!("expected an instance's number and 0 to {}, such as 0=50", TableRow::MAX_WEIGHT);
    let (number, weight) = text.split_once('=').ok_or_else(expected)?;
    let weight = weight.parse().ok().filter(|weight| *weight <= TableRow::MAX_WEIGHT).ok_or_else(expected)?;
    Ok((number.parse().map_err(|_| expected())?, weight))
}

fn service_name(text: &str) -> Result<ServiceName, String> {
    let full = if text.contains('.') { text.to_owned() } else { format!("app.default.{text}.default") };
    full.parse().map_err(|_| "expected 1 to 30 letters or digits, or app.namespace.service.namespace of such".into())
}
