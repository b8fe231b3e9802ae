//! Volumes of instances: asked of drivers by their own protocol (CSI v1) and mounted at places of ours, from which a runtime binds them.
//!
//! ```text
//! <directory>/noted/<driver>/<instance>/<volume>      an instance has it, or was about to
//! <directory>/staging/<driver>/<volume>               ready for the node, where the driver wants that
//! <directory>/publish/<driver>/<instance>/<volume>    mounted for an instance
//! ```
//!
//! These directories are all that is known: an instance of an earlier run is undone by what is there of it. The note comes before the
//! driver's first call and goes after its last, so that a step that fails or is given up half-way is undone too.

mod csi;
mod host_path;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::OwnedMutexGuard;
use tokio::task::JoinHandle;
use tokio_util::task::AbortOnDropHandle;
use tonic::Code;

use self::csi::{Driver, Publish, Stage, Undo};
use super::RuntimeError;
use crate::model::{InstanceId, Mount, VolumeRequest};

pub use host_path::NAME as HOST_PATH;

/// By driver and volume.
type Locks = HashMap<(String, String), Weak<tokio::sync::Mutex<()>>>;

/// The drivers of this node.
#[derive(Debug)]
pub struct Volumes {
    drivers: BTreeMap<String, PathBuf>,
    directory: PathBuf,
    /// One call for a volume at a time, whichever instance it is for: none is staged while it is unstaged for another.
    locks: Mutex<Locks>,
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
        Ok(Self { drivers, directory: state_dir.join("csi"), locks: Mutex::default(), _bundled: bundled })
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

    /// Mounts the instance's volumes. Repeatable; what a failure or a caller that goes away leaves half-way `unpublish` undoes.
    pub(super) async fn publish(
        self: &Arc<Self>,
        instance: &InstanceId,
        volumes: &[VolumeRequest],
    ) -> Result<Vec<Mount>, RuntimeError> {
        let mut mounts = Vec::with_capacity(volumes.len());
        for volume in volumes {
            if !is_plain(&volume.id) {
                return Err(RuntimeError::Refused {
                    what: "volume",
                    reason: format!("{:?} cannot name one", volume.id),
                });
            }
            let driver = self.driver(&volume.driver).await?;
            let stages = driver.stages().await.map_err(failed("ask the driver", &volume.driver, &volume.id))?;
            let guard = self.lock(&volume.driver, &volume.id).await;
            // Nothing is waited for between the note and the task: who undoes sees the note, and waits for the task.
            make(&self.noted(&volume.driver, instance).join(&volume.id))?;
            let (this, instance, volume) = (self.clone(), instance.clone(), volume.clone());
            let task = tokio::spawn(async move { this.publish_one(&driver, stages, &instance, volume, &guard).await });
            mounts.push(finished("publish", task).await?);
        }
        Ok(mounts)
    }

    async fn publish_one(
        &self,
        driver: &Driver,
        stages: bool,
        instance: &InstanceId,
        volume: VolumeRequest,
        _guard: &OwnedMutexGuard<()>,
    ) -> Result<Mount, RuntimeError> {
        let failed = |what| failed(what, &volume.driver, &volume.id);
        let context: HashMap<_, _> = volume.config.iter().cloned().collect();
        let mut staging_path = String::new();
        if stages {
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
        // The last part is the driver's to make.
        let parent = self.published(&volume.driver, instance);
        make(&parent)?;
        let target = parent.join(&volume.id);
        let publish = Publish {
            volume: volume.id.clone(),
            staging_path,
            target_path: shown(&target),
            capability: csi::capability(),
            context,
        };
        driver.ask(csi::PUBLISH, publish).await.map_err(failed("publish"))?;
        Ok(Mount { source: target, target: volume.mount_path, read_only: false })
    }

    /// Undoes what was published for the instance, in this run or an earlier one, or was about to be. Repeatable.
    pub(super) async fn unpublish(self: &Arc<Self>, instance: &InstanceId) -> Result<(), RuntimeError> {
        for (name, volumes) in self.held_by(instance) {
            let driver = self.driver(&name).await?;
            for volume in volumes {
                let guard = self.lock(&name, &volume).await;
                let (this, driver, name, instance) = (self.clone(), driver.clone(), name.clone(), instance.clone());
                let task =
                    tokio::spawn(async move { this.unpublish_one(&driver, &name, &instance, &volume, &guard).await });
                finished("unpublish", task).await?;
            }
            remove(&self.published(&name, instance))?;
            remove(&self.noted(&name, instance))?;
        }
        Ok(())
    }

    async fn unpublish_one(
        &self,
        driver: &Driver,
        name: &str,
        instance: &InstanceId,
        volume: &str,
        _guard: &OwnedMutexGuard<()>,
    ) -> Result<(), RuntimeError> {
        let target = self.published(name, instance).join(volume);
        undo(driver, csi::UNPUBLISH, volume, &target).await.map_err(failed("unpublish", name, volume))?;
        remove(&target)?;
        let staging = self.staging(name, volume);
        if staging.exists() && !self.is_used_beside(instance, name, volume) {
            undo(driver, csi::UNSTAGE, volume, &staging).await.map_err(failed("unstage", name, volume))?;
            remove(&staging)?;
        }
        remove(&self.noted(name, instance).join(volume))
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

    fn noted(&self, driver: &str, instance: &InstanceId) -> PathBuf {
        self.directory.join("noted").join(file_name(driver)).join(instance.to_string())
    }

    /// By driver, the volumes of which something may be there for the instance.
    fn held_by(&self, instance: &InstanceId) -> BTreeMap<String, BTreeSet<String>> {
        let mut held = BTreeMap::<_, BTreeSet<_>>::new();
        for kind in KINDS {
            for file_name in names_in(&self.directory.join(kind)) {
                let of_instance = self.directory.join(kind).join(&file_name).join(instance.to_string());
                if of_instance.exists() {
                    held.entry(file_name.replace('~', "/")).or_default().extend(names_in(&of_instance));
                }
            }
        }
        held
    }

    /// Whether another instance has the volume, or is about to.
    fn is_used_beside(&self, instance: &InstanceId, driver: &str, volume: &str) -> bool {
        let own = instance.to_string();
        KINDS.iter().any(|kind| {
            let by_instances = self.directory.join(kind).join(file_name(driver));
            let mut others = names_in(&by_instances).into_iter().filter(|name| *name != own);
            others.any(|other| by_instances.join(other).join(volume).exists())
        })
    }

    async fn lock(&self, driver: &str, volume: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| lock.strong_count() > 0);
            let key = (driver.to_owned(), volume.to_owned());
            let lock = locks.get(&key).and_then(Weak::upgrade).unwrap_or_default();
            locks.insert(key, Arc::downgrade(&lock));
            lock
        };
        lock.lock_owned().await
    }
}

/// Where it is seen that an instance has a volume. An earlier version left no notes.
const KINDS: [&str; 2] = ["noted", "publish"];

async fn undo(driver: &Driver, call: &'static str, volume: &str, path: &Path) -> Result<(), tonic::Status> {
    match driver.ask(call, Undo { volume: volume.to_owned(), path: shown(path) }).await {
        // What the driver does not know (any more) is not mounted.
        Err(status) if status.code() == Code::NotFound => Ok(()),
        other => other,
    }
}

fn failed(step: &'static str, driver: &str, volume: &str) -> impl FnOnce(tonic::Status) -> RuntimeError {
    let what = format!("volume {volume} of {driver}");
    move |status| RuntimeError::Step { step, reason: format!("{what}: {}", status.message()) }
}

/// The result of a task that goes on to its end, also when nobody waits for it any more.
async fn finished<T>(step: &'static str, task: JoinHandle<Result<T, RuntimeError>>) -> Result<T, RuntimeError> {
    task.await.unwrap_or_else(|error| Err(RuntimeError::Step { step, reason: error.to_string() }))
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
    DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)
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
