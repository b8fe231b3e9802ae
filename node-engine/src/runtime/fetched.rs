//! What the technologies share whose images are one file: the leave of the node, and a directory for each instance.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

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

/// One directory for each instance, below the state directory.
#[derive(Debug)]
pub(super) struct Directories(pub(super) PathBuf);

impl Directories {
    pub(super) fn of(&self, instance: &InstanceId) -> PathBuf {
        self.0.join(instance.to_string())
    }

    /// Removes those of no adopted instance: they are of a run before the last reboot.
    pub(super) fn keep_only(&self, adopted: &[Adopted]) {
        for entry in fs::read_dir(&self.0).into_iter().flatten().flatten() {
            let known = |one: &Adopted| entry.file_name().to_str() == Some(one.instance.to_string().as_str());
            if !adopted.iter().any(known) {
                let _ = remove(&entry.path());
            }
        }
    }
}

/// With all that is in it. Repeatable.
pub(super) fn remove(directory: &Path) -> io::Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
