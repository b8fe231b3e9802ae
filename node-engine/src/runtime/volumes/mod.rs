//! Volumes of instances: asked of drivers by their own protocol (CSI v1) and mounted at places of ours, from which a runtime binds them.
//!
//! ```text
//! <directory>/staging/<driver>/<volume>               ready for the node, where the driver wants that
//! <directory>/publish/<driver>/<instance>/<volume>    mounted for an instance
//! ```
//!
//! These directories are all that is known: an instance of an earlier run is undone by what is there of it.

mod csi;
mod host_path;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tokio_util::task::AbortOnDropHandle;

use self::csi::{Driver, Publish, Stage, Undo};
use super::RuntimeError;
use crate::model::{InstanceId, Mount, VolumeRequest};

pub use host_path::NAME as HOST_PATH;

/// The drivers of this node.
#[derive(Debug)]
pub struct Volumes {
    drivers: BTreeMap<String, PathBuf>,
    directory: PathBuf,
    _bundled: Option<AbortOnDropHandle<()>>,
}

impl Volumes {
    /// `drivers` by name, each with its socket; where `host_path` is given, the bundled driver too, with its volumes there and its
    /// socket in `run_dir`. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// If the bundled driver cannot be served.
    pub fn new(
        mut drivers: BTreeMap<String, PathBuf>,
        host_path: Option<&Path>,
        run_dir: &Path,
        state_dir: &Path,
    ) -> Result<Self, RuntimeError> {
        let failed =
            |error: io::Error| RuntimeError::Step { step: "serve host path volumes", reason: error.to_string() };
        let mut bundled = None;
        if let Some(volumes) = host_path {
            let socket = run_dir.join("csi-hostpath.sock");
            fs::create_dir_all(run_dir).map_err(failed)?;
            let serving = host_path::serve(&socket, volumes.to_owned()).map_err(failed)?;
            bundled = Some(AbortOnDropHandle::new(tokio::spawn(serving)));
            drivers.insert(HOST_PATH.into(), socket);
        }
        Ok(Self { drivers, directory: state_dir.join("csi"), _bundled: bundled })
    }

    /// The drivers that answer, with their sockets; of the others it is told why not.
    pub async fn answering(&self) -> Vec<(String, PathBuf)> {
        let mut answering = Vec::new();
        for (name, socket) in &self.drivers {
            match self.driver(name).await {
                Ok(_) => answering.push((name.clone(), socket.clone())),
                Err(error) => tracing::warn!(%error, "a volume driver is not announced"),
            }
        }
        answering
    }

    /// Mounts the instance's volumes. Repeatable; what a failure leaves half-way `unpublish` undoes.
    pub(super) async fn publish(
        &self,
        instance: &InstanceId,
        volumes: &[VolumeRequest],
    ) -> Result<Vec<Mount>, RuntimeError> {
        let mut mounts = Vec::with_capacity(volumes.len());
        for volume in volumes {
            let driver = self.driver(&volume.driver).await?;
            let failed = |what: &'static str| {
                move |status: tonic::Status| RuntimeError::Step {
                    step: what,
                    reason: format!("volume {} of {}: {}", volume.id, volume.driver, status.message()),
                }
            };
            let context = volume.config.iter().cloned().collect::<std::collections::HashMap<_, _>>();
            let mut staging_path = String::new();
            if driver.stages().await.map_err(failed("ask the driver"))? {
                let path = self.staging(&volume.driver, &volume.id);
                make(&path)?;
                staging_path = shown(&path);
                let stage = Stage {
                    volume: volume.id.clone(),
                    staging_path: staging_path.clone(),
                    capability: csi::capability(),
                    context: context.clone(),
                };
                driver.ask(csi::STAGE, stage).await.map_err(failed("stage"))?;
            }
            let target = self.published(&volume.driver, instance).join(&volume.id);
            // The last part is the driver's to make.
            make(&self.published(&volume.driver, instance))?;
            let publish = Publish {
                volume: volume.id.clone(),
                staging_path,
                target_path: shown(&target),
                capability: csi::capability(),
                context,
            };
            driver.ask(csi::PUBLISH, publish).await.map_err(failed("publish"))?;
            mounts.push(Mount { source: target, target: volume.mount_path.clone(), read_only: false });
        }
        Ok(mounts)
    }

    /// Undoes what was published for the instance, in this run or an earlier one. Repeatable.
    pub(super) async fn unpublish(&self, instance: &InstanceId) -> Result<(), RuntimeError> {
        for (name, published) in self.published_by(instance) {
            let driver = self.driver(&name).await?;
            for volume in names_in(&published) {
                let target = published.join(&volume);
                let failed = |status: tonic::Status| RuntimeError::Step {
                    step: "unpublish",
                    reason: format!("volume {volume} of {name}: {}", status.message()),
                };
                let undo = Undo { volume: volume.clone(), path: shown(&target) };
                driver.ask(csi::UNPUBLISH, undo).await.map_err(failed)?;
                remove(&target)?;
                let staging = self.staging(&name, &volume);
                if staging.exists() && !self.is_used(&name, &volume) {
                    let undo = Undo { volume: volume.clone(), path: shown(&staging) };
                    driver.ask(csi::UNSTAGE, undo).await.map_err(failed)?;
                    remove(&staging)?;
                }
            }
            remove(&published)?;
        }
        Ok(())
    }

    /// The driver of this name, which has said so itself.
    async fn driver(&self, name: &str) -> Result<Driver, RuntimeError> {
        let refused = |reason: String| RuntimeError::Refused { what: "volume", reason };
        let Some(socket) = self.drivers.get(name) else {
            let known: Vec<_> = self.drivers.keys().map(String::as_str).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            return Err(refused(format!("this node has no driver {name:?}; it has {known}")));
        };
        let away = |reason: String| {
            RuntimeError::Unavailable(format!("volume driver {name} at {}: {reason}", socket.display()))
        };
        let driver = Driver::connect(socket).await.map_err(|error| away(error.to_string()))?;
        match driver.name().await {
            Ok(said) if said == name => Ok(driver),
            Ok(said) => Err(refused(format!("the driver at {} calls itself {said:?}, not {name:?}", socket.display()))),
            Err(status) => Err(away(status.message().to_owned())),
        }
    }

    fn staging(&self, driver: &str, volume: &str) -> PathBuf {
        self.directory.join("staging").join(file_name(driver)).join(volume)
    }

    fn published(&self, driver: &str, instance: &InstanceId) -> PathBuf {
        self.directory.join("publish").join(file_name(driver)).join(instance.to_string())
    }

    fn published_by(&self, instance: &InstanceId) -> Vec<(String, PathBuf)> {
        let drivers = names_in(&self.directory.join("publish")).into_iter().map(|name| name.replace('~', "/"));
        let of = drivers.map(|name| (self.published(&name, instance), name)).map(|(path, name)| (name, path));
        of.filter(|(_, path)| path.exists()).collect()
    }

    fn is_used(&self, driver: &str, volume: &str) -> bool {
        let by_instances = self.directory.join("publish").join(file_name(driver));
        names_in(&by_instances).iter().any(|instance| by_instances.join(instance).join(volume).exists())
    }
}

/// What may be a component of a path.
fn is_plain(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    !name.is_empty() && name.len() <= 128 && name != "." && name != ".." && name.bytes().all(plain)
}

/// Names of drivers may have a slash, and never a tilde.
fn file_name(driver: &str) -> String {
    driver.replace('/', "~")
}

fn names_in(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn make(directory: &Path) -> Result<(), RuntimeError> {
    let failed =
        |error| RuntimeError::Step { step: "make a mount point", reason: format!("{}: {error}", directory.display()) };
    fs::create_dir_all(directory).map_err(failed)
}

/// Never more than an empty directory: whatever is still mounted there is not ours to remove.
fn remove(directory: &Path) -> Result<(), RuntimeError> {
    match fs::remove_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(RuntimeError::Step {
            step: "remove a mount point",
            reason: format!("{}: {error}", directory.display()),
        }),
        _ => Ok(()),
    }
}

fn shown(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests;
