//! A container that does nothing, made and run like any other, shows what a version number does not: that the OCI runtime is there,
//! that it may make namespaces and control groups, and that output is kept.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::OwnedMutexGuard;

use super::api::{Empty, version};
use super::holder::Holder;
use super::image;
use crate::model::{InstanceId, InstanceSpec};
use crate::runtime::{RuntimeError, pause};

/// Makes, starts and removes it.
pub(super) async fn run(holder: &Arc<Holder>) -> Result<(), RuntimeError> {
    let asked = holder.client.call::<_, version::Version>(version::GET, Empty {}).await;
    let version = asked.map_err(|status| holder.client.failed("ask for the version", &status))?.version;
    holder.snapshotter().await?;
    let id = trial(&holder.technology.to_string());
    let guard = holder.lock(&id).await;
    let result = attempt(holder, &id, &guard).await;
    let removed = holder.remove(&id, Duration::ZERO, &guard).await;
    result.and(removed)?;
    tracing::info!(version, technology = %holder.technology, "containers run by containerd on this node");
    Ok(())
}

async fn attempt(holder: &Arc<Holder>, id: &InstanceId, guard: &OwnedMutexGuard<()>) -> Result<(), RuntimeError> {
    holder.remove(id, Duration::ZERO, guard).await?;
    let failed = |error: io::Error| RuntimeError::Step { step: "write the trial", reason: error.to_string() };
    let directory = holder.directory(id).join("root");
    write(&directory).map_err(failed)?;
    let command = vec![pause::PATH.to_owned()];
    let spec = InstanceSpec { command, ..InstanceSpec::new(id.clone(), holder.technology.clone()) };
    let sandbox = holder.make_plain(&spec, &directory).await?;
    fs::metadata(&sandbox.netns).map_err(failed)?;
    holder.start(id, guard).await?;
    // There before the process is, or never.
    fs::metadata(holder.log(id)).map(drop).map_err(|error| {
        let reason = format!("its output is not kept: {error}");
        RuntimeError::Step { step: "trial", reason }
    })
}

fn write(directory: &Path) -> io::Result<()> {
    fs::create_dir_all(directory)?;
    let program = pause::program(image::architecture()).ok_or(io::ErrorKind::Unsupported)?;
    let path = directory.join(pause::PATH.trim_start_matches('/'));
    fs::write(&path, program)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))
}

/// No cluster names an instance so: it would have to be the name of a service of its own.
fn trial(technology: &str) -> InstanceId {
    let part: String = technology.chars().filter(char::is_ascii_alphanumeric).take(30).collect();
    format!("node.engine.trial.{part}.instance.0").parse().expect("a name of four parts and a number")
}
