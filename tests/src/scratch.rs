//! Directories of a run, and what becomes of them when it is killed.
//!
//! Each run has a directory `<name>` and holds the lock `<name>.lock` beside it; a directory whose lock nobody holds belongs to a
//! run that was killed, and goes.

use std::env;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

use crate::wait;

static NEXT: AtomicU32 = AtomicU32::new(1);

/// The directory of one laboratory, removed with it.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    name: String,
    _lock: Flock<File>,
}

impl Scratch {
    /// A new directory; those of killed runs are removed first.
    pub fn new() -> Result<Self> {
        if let Err(error) = clean() {
            eprintln!("what a killed run has left stays: {error:#}");
        }
        let name = format!("{}-{}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = base().join(&name);
        fs::create_dir_all(base()).with_context(|| format!("cannot make {}", base().display()))?;
        let lock = lock(&path)?.with_context(|| format!("{} is held by another run", path.display()))?;
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self { path, name, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Unlike that of any other run that lives: a prefix for names that the machine shares, such as control groups.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A directory below.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = remove(&self.path) {
            eprintln!("left behind: {error:#}");
        }
    }
}

/// Removes what killed runs have left; says what it removed.
pub fn clean() -> Result<Vec<PathBuf>> {
    let mut removed = Vec::new();
    let entries = match fs::read_dir(base()) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(removed),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", base().display())),
    };
    for path in entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()) {
        if let Some(_lock) = lock(&path)? {
            remove(&path)?;
            removed.push(path);
        }
    }
    Ok(removed)
}

/// The name of the control group of everything a host of this run contains.
pub fn control_group(run: &str, host: &str) -> String {
    format!("lab-{run}-{host}")
}

fn base() -> PathBuf {
    env::var_os("NODE_ENGINE_LAB_DIR").map_or_else(|| env::temp_dir().join("node-engine-labs"), PathBuf::from)
}

/// Where the lock of a directory is: beside it, so that it is there until the directory is not.
fn lock_file(path: &Path) -> PathBuf {
    path.with_extension("lock")
}

/// `None` where somebody else holds it, or has just removed what it is for.
fn lock(path: &Path) -> Result<Option<Flock<File>>> {
    let name = lock_file(path);
    let file = File::create(&name).with_context(|| format!("cannot make {}", name.display()))?;
    let Ok(lock) = Flock::lock(file, FlockArg::LockExclusiveNonblock) else { return Ok(None) };
    let still_there = lock.metadata().context("cannot look at a lock")?.nlink() > 0;
    Ok(still_there.then_some(lock))
}

/// The directory, the control groups of its hosts and its lock, which the caller holds. The processes in the groups are dead or
/// dying: their namespace's init is.
fn remove(path: &Path) -> Result<()> {
    if let Some(run) = path.file_name().and_then(|name| name.to_str()) {
        wait::until_true("control groups of dead hosts are removed", Duration::from_secs(10), || {
            Ok(remove_groups(Path::new("/sys/fs/cgroup"), &format!("lab-{run}-"), 2))
        })?;
    }
    for result in [fs::remove_dir_all(path), fs::remove_file(lock_file(path))] {
        match result {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot remove {}", path.display()));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Removes the groups whose name begins so; false if one is still in use.
fn remove_groups(directory: &Path, prefix: &str, depth: u32) -> bool {
    let mut gone = true;
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        // Controllers that share a hierarchy are links to it.
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        if entry.file_name().to_string_lossy().starts_with(prefix) {
            gone &= remove_group(&path);
        } else if depth > 1 {
            gone &= remove_groups(&path, prefix, depth - 1);
        }
    }
    gone
}

fn remove_group(path: &Path) -> bool {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_group(&entry.path());
        }
    }
    fs::remove_dir(path).is_ok() || !path.exists()
}
