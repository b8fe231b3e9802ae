//! Where maps, links and programs are pinned, and how they go away.
//!
//! ```text
//! <pin_dir>/v<ABI_VERSION>[_<slots>]/maps/<MAP>
//!                         /links/veth_<ifindex>   uplink_<ifindex>
//!                         /programs/<program>   <program>_before
//!                         /handed_over
//! ```
//!
//! Each layout version, and each size of the tables that is not the usual one, has a directory of its own, so that
//! a program never reads a row it does not understand: it takes over what others have left by its description ([`super::inherit`]). bpffs knows neither
//! ordinary files nor names with dots.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use netmanager_common::ABI_VERSION;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};

use super::hooks;
use crate::netmanager::datapath::{Capacity, DatapathError};

/// Where the system has its bpffs, mounted or not.
const SYSTEM: &str = "/sys/fs/bpf";
/// A directory in a bpffs that we mounted says so.
const MOUNTED: &str = "mounted_by_node_engine";
/// So does a version whose rows are another's now.
const HANDED_OVER: &str = "handed_over";

/// The pins of this layout version.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    root: PathBuf,
    version: String,
}

impl Pins {
    /// Makes the directories, on a bpffs.
    pub(super) fn ensure(root: &Path, capacity: Capacity) -> Result<Self, DatapathError> {
        ensure_bpffs(root)?;
        let pins = Self::at(root, capacity);
        pins.make()?;
        Ok(pins)
    }

    /// Where they are, or would be.
    pub(super) fn at(root: &Path, capacity: Capacity) -> Self {
        Self { root: root.to_owned(), version: version_name(capacity) }
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.version().join("maps").join(name)
    }

    pub(super) fn link(&self, name: &str) -> PathBuf {
        self.version().join("links").join(name)
    }

    pub(super) fn program(&self, name: &str) -> PathBuf {
        self.version().join("programs").join(name)
    }

    /// The one that the program of this name has replaced, until it has been tried out.
    pub(super) fn program_before(&self, name: &str) -> PathBuf {
        self.program(&format!("{name}_before"))
    }

    /// Names of the pinned links.
    pub(super) fn links(&self) -> Vec<String> {
        names(&self.version().join("links"))
    }

    /// The pins of other layouts.
    pub(super) fn others(&self) -> Vec<Self> {
        let others = versions(&self.root).into_iter().filter(|version| *version != self.version);
        others.map(|version| Self { root: self.root.clone(), version }).collect()
    }

    /// As a version is called.
    pub(super) fn name(&self) -> &str {
        &self.version
    }

    /// Were its maps ever filled?
    pub(super) fn in_use(&self) -> bool {
        self.map("CONFIG").exists()
    }

    /// Has another layout everything that was here?
    pub(super) fn handed_over(&self) -> bool {
        self.version().join(HANDED_OVER).exists()
    }

    pub(super) fn hand_over(&self) -> Result<(), DatapathError> {
        make_directory(&self.version().join(HANDED_OVER))
    }

    /// Removes all of it, links first: a program must not run over maps that are half gone.
    pub(super) fn clear(&self) {
        let _ = fs::remove_dir_all(self.version().join("links"));
        let _ = fs::remove_dir_all(self.version());
    }

    /// Makes the directories again.
    pub(super) fn make(&self) -> Result<(), DatapathError> {
        ["maps", "links", "programs"].iter().try_for_each(|name| make_directory(&self.version().join(name)))
    }

    fn version(&self) -> PathBuf {
        self.root.join(&self.version)
    }
}

/// Removes programs from every interface, and all pins. What another process pinned stays.
///
/// Returns what could not be removed.
pub fn uninstall(pin_dir: &Path) -> Vec<DatapathError> {
    let mut errors = retire(pin_dir);
    let mountpoint = mountpoint(pin_dir);
    let marker = mountpoint.join(MOUNTED);
    if marker.is_dir() {
        // Somebody else may have begun to use it: then it stays.
        // Names with a dot are the kernel's own.
        let others = names(&mountpoint).iter().any(|name| name != MOUNTED && !name.contains('.'));
        if !others {
            // Detached, so that a copy of the mount in somebody's namespace does not keep this one.
            let unmounted = umount2(&mountpoint, MntFlags::MNT_DETACH);
            errors.extend(unmounted.err().map(|error| step("unmount bpffs", &mountpoint, &error.into())));
        }
    }
    errors
}

/// Has an earlier run left maps of this layout version?
pub(in crate::netmanager::datapath) fn populated(pin_dir: &Path, capacity: Capacity) -> bool {
    pin_dir.join(version_name(capacity)).join("maps").join("CONFIG").exists()
}

/// Takes the datapath out of the kernel: programs off the interfaces, pins away. The bpffs stays.
///
/// The directory goes last of all: while it is there, a removal that was cut short is begun again.
pub(in crate::netmanager::datapath) fn retire(pin_dir: &Path) -> Vec<DatapathError> {
    if !pin_dir.is_dir() {
        return Vec::new();
    }
    let versions: Vec<PathBuf> = versions(pin_dir).into_iter().map(|version| pin_dir.join(version)).collect();
    // Links first: a program must not run over maps that are half gone.
    let mut errors: Vec<DatapathError> = versions.iter().filter_map(|version| remove(&version.join("links"))).collect();
    hooks::remove_filters();
    errors.extend(versions.iter().filter_map(|version| remove(version)));
    if pin_dir != mountpoint(pin_dir) {
        // Not empty: something in it is not ours.
        let _ = fs::remove_dir(pin_dir);
    }
    errors
}

fn remove(directory: &Path) -> Option<DatapathError> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Some(step("remove pins", directory, &error)),
        _ => None,
    }
}

/// Mounts a bpffs where the pins would not be on one.
fn ensure_bpffs(root: &Path) -> Result<(), DatapathError> {
    if on_bpffs(root) {
        return Ok(());
    }
    let mountpoint = mountpoint(root);
    if mountpoint == root {
        make_directory(root)?;
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), &mountpoint, Some("bpf"), flags, Some("mode=0700")).map_err(|error| {
        let reason = format!("{}: {error}", mountpoint.display());
        DatapathError::Unsupported { what: "mount bpffs", reason }
    })?;
    make_directory(&mountpoint.join(MOUNTED))
}

/// Is the nearest directory that exists on a bpffs?
fn on_bpffs(path: &Path) -> bool {
    let nearest = path.ancestors().find(|ancestor| ancestor.is_dir());
    nearest.and_then(|nearest| statfs(nearest).ok()).is_some_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC)
}

/// Where the bpffs of these pins is mounted, by us or by the system: the system's place where they lie below it, else their own root.
fn mountpoint(root: &Path) -> PathBuf {
    if root.starts_with(SYSTEM) { SYSTEM.into() } else { root.to_owned() }
}

/// Of this layout of rows, and of tables of this size.
pub(in crate::netmanager::datapath) fn version_name(capacity: Capacity) -> String {
    if capacity == Capacity::USUAL { format!("v{ABI_VERSION}") } else { format!("v{ABI_VERSION}_{}", capacity.slots()) }
}

/// The layout versions that have pins.
fn versions(root: &Path) -> Vec<String> {
    let number = |name: &String| {
        name.strip_prefix('v').is_some_and(|rest| rest.split('_').all(|part| part.parse::<u32>().is_ok()))
    };
    names(root).into_iter().filter(number).collect()
}

/// What the directory holds; nothing where there is none.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

fn make_directory(path: &Path) -> Result<(), DatapathError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(|error| {
        let reason = format!("{}: {error}", path.display());
        DatapathError::Unsupported { what: "make pin directory", reason }
    })
}

fn step(step: &'static str, path: &Path, error: &io::Error) -> DatapathError {
    DatapathError::Step { step, reason: format!("{}: {error}", path.display()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netns;

    /// An uninstallation may be killed as well.
    #[test]
    #[ignore = "needs root"]
    fn a_removal_that_was_cut_short_is_begun_again() {
        let name = format!("dp-pins-{}", std::process::id());
        let netns = netns::ensure(&name).expect("a namespace");
        let root = Path::new(SYSTEM).join(&name);
        ensure_bpffs(&root).expect("a bpffs");
        for left in ["", "v1", "v1/maps", "v7_1024/links"] {
            fs::create_dir_all(root.join(left)).expect("directories");
            let errors = netns::within(&netns, || retire(&root)).expect("in the namespace");
            assert!(errors.is_empty() && !root.exists(), "{left}: {errors:?}");
        }
        fs::create_dir_all(root.join("of_another")).expect("directories");
        assert!(netns::within(&netns, || retire(&root)).expect("in the namespace").is_empty());
        assert!(root.join("of_another").is_dir(), "what is not ours stays");
        fs::remove_dir_all(&root).expect("removed");
        netns::remove(&name).expect("removed");
    }
}
