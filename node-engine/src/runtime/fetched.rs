//! What the technologies share whose images are one file: the leave of the node, and a directory for each instance.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use tokio::task::spawn_blocking;

use super::{Adopted, RuntimeError};
use crate::model::InstanceId;

/// What the node's configuration allows of such a technology.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    pub allowed: bool,
    /// Images may be files of this node.
    pub files: bool,
}

impl Policy {
    /// # Errors
    /// `Refused` where the configuration does not allow `what`, called `plainly` by those who read the reason.
    pub(super) fn permit(self, what: &'static str, plainly: &str) -> Result<(), RuntimeError> {
        if self.allowed {
            return Ok(());
        }
        let reason = format!("the configuration of this node does not allow {plainly} (runtime.{what})");
        Err(RuntimeError::Refused { what, reason })
    }
}

/// One directory for each instance, below the state directory. Filling and emptying one goes on when its caller has gone: both are
/// done under names that no other has, and only a move, which takes no time, is done under the instance's.
#[derive(Debug)]
pub(super) struct Directories(pub(super) PathBuf);

/// Parts have names of their own.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// What is being filled. It goes with this, unless it was put in its place.
#[derive(Debug)]
pub(super) struct Part(PathBuf);

impl Part {
    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "what is not needed any more cannot be removed");
        }
    }
}

impl Directories {
    pub(super) fn of(&self, instance: &InstanceId) -> PathBuf {
        self.0.join(instance.to_string())
    }

    /// Where a part is made; the daemon alone enters it.
    pub(super) fn part(&self) -> impl FnOnce() -> io::Result<Part> + Send + use<> {
        let path = self.aside();
        move || {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
            Ok(Part(path))
        }
    }

    /// In place of what the instance had.
    pub(super) async fn place(&self, part: Part, instance: &InstanceId) -> io::Result<()> {
        let before = self.set_aside(instance)?;
        fs::rename(&part.0, self.of(instance))?;
        discard(before).await
    }

    /// Removes what the instance has. Repeatable.
    pub(super) async fn remove(&self, instance: &InstanceId) -> io::Result<()> {
        discard(self.set_aside(instance)?).await
    }

    fn set_aside(&self, instance: &InstanceId) -> io::Result<Option<PathBuf>> {
        let aside = self.aside();
        match fs::rename(self.of(instance), &aside) {
            Ok(()) => Ok(Some(aside)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// No instance is named so, and nothing of an earlier run.
    fn aside(&self) -> PathBuf {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_nanos();
        self.0.join(format!(".{now}-{}", NEXT.fetch_add(1, Ordering::Relaxed)))
    }

    /// Removes those of no adopted instance: they are of a run before the last reboot.
    pub(super) async fn keep_only(&self, adopted: &[Adopted]) {
        let known: BTreeSet<_> = adopted.iter().map(|one| OsString::from(one.instance.to_string())).collect();
        let directory = self.0.clone();
        let removed = spawn_blocking(move || {
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                if !known.contains(&entry.file_name()) {
                    let _ = remove(&entry.path());
                }
            }
        });
        if let Err(error) = removed.await {
            tracing::warn!(%error, "what earlier runs have left is still there");
        }
    }
}

async fn discard(directory: Option<PathBuf>) -> io::Result<()> {
    let Some(directory) = directory else { return Ok(()) };
    spawn_blocking(move || remove(&directory)).await.map_err(io::Error::other)?
}

/// With all that is in it. Repeatable.
pub(super) fn remove(directory: &Path) -> io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
