//! Network namespaces: open one by its path, tell two apart, run code inside one, make and remove named ones.
//!
//! Code runs inside a namespace on a thread of its own that ends with it, so no thread of the runtime ever changes its namespace.
//! A socket opened inside stays in that namespace for its life: callers enter for as long as it takes to open one, and talk from outside.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::thread;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};

/// Where named namespaces are pinned; `ip netns` shows them.
pub const NAMED: &str = "/run/netns";

/// The namespace of the calling thread.
const OWN: &str = "/proc/thread-self/ns/net";

/// An open network namespace. Keeps it alive, also after its last process and its path are gone.
#[derive(Debug)]
pub struct Netns {
    file: File,
    id: NetnsId,
}

/// What tells one namespace from another, whatever paths lead to it. Unique among those that exist at one time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NetnsId {
    device: u64,
    inode: u64,
}

impl NetnsId {
    /// The number in `net:[…]`.
    pub fn inode(self) -> u64 {
        self.inode
    }
}

impl Netns {
    /// Opens `/proc/<pid>/ns/net`, `/run/netns/<name>` or a bind mount of one. A path that leads to anything but a namespace, such
    /// as the empty file a killed `create` leaves, is `InvalidInput`.
    pub fn open(path: &Path) -> io::Result<Self> {
        let with_path =
            |error: io::Error| io::Error::new(error.kind(), format!("namespace {}: {error}", path.display()));
        let file = File::open(path).map_err(with_path)?;
        let id = fstatfs(&file).map_err(io::Error::from).and_then(|file_system| {
            if file_system.filesystem_type() != NSFS_MAGIC {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "this is not a namespace"));
            }
            let metadata = file.metadata()?;
            Ok(NetnsId { device: metadata.dev(), inode: metadata.ino() })
        });
        Ok(Self { id: id.map_err(with_path)?, file })
    }

    /// The namespace of the calling thread.
    pub fn current() -> io::Result<Self> {
        Self::open(Path::new(OWN))
    }

    pub fn id(&self) -> NetnsId {
        self.id
    }

    /// Runs `f` inside the namespace, on a thread that ends with it. Blocks until it has. A panic in `f` goes on in the caller.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> io::Result<T> {
        thread::scope(|scope| {
            let inside = thread::Builder::new().name("netns".into()).spawn_scoped(scope, || {
                setns(&self.file, CloneFlags::CLONE_NEWNET)?;
                Ok(f())
            })?;
            inside.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Runs `f` inside the namespace that `netns` leads to, on a thread that ends with it.
pub fn within<T: Send>(netns: &Path, f: impl FnOnce() -> T + Send) -> io::Result<T> {
    Netns::open(netns)?.run(f)
}

/// Which namespace the path leads to.
pub fn identity(netns: &Path) -> io::Result<NetnsId> {
    Ok(Netns::open(netns)?.id())
}

/// Makes a namespace that lives until [`remove`], under [`NAMED`]; one that exists already under this name stays as it is.
/// The name must be a plain file name.
pub fn ensure(name: &str) -> io::Result<PathBuf> {
    let path = named(name)?;
    if Netns::open(&path).is_ok() {
        return Ok(path);
    }
    fs::create_dir_all(NAMED)?;
    File::create(&path)?;
    let pinned = thread::scope(|scope| {
        let new = thread::Builder::new().name("netns".into()).spawn_scoped(scope, || {
            unshare(CloneFlags::CLONE_NEWNET)?;
            mount(Some(OWN), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        })?;
        new.join().unwrap_or_else(|panic| resume_unwind(panic)).map_err(io::Error::from)
    });
    match pinned {
        Ok(()) => Ok(path),
        Err(error) => {
            // The empty file would stand in the way of nothing but a reader's understanding; the first error is the one that counts.
            let _ = fs::remove_file(&path);
            Err(io::Error::new(error.kind(), format!("namespace {name} cannot be made: {error}")))
        }
    }
}

/// Unpins a named namespace; it ends with its last process. An unknown name is a success.
pub fn remove(name: &str) -> io::Result<()> {
    let path = named(name)?;
    match umount2(&path, MntFlags::MNT_DETACH) {
        // EINVAL: the file is there and no namespace is mounted on it.
        Ok(()) | Err(nix::Error::EINVAL) => {}
        Err(nix::Error::ENOENT) => return Ok(()),
        Err(error) => return Err(io::Error::new(io::Error::from(error).kind(), format!("namespace {name}: {error}"))),
    }
    match fs::remove_file(&path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn named(name: &str) -> io::Result<PathBuf> {
    let plain = !name.is_empty() && name != "." && name != ".." && name.len() < 256 && !name.contains(['/', '\0']);
    if !plain {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?} cannot name a namespace")));
    }
    Ok(Path::new(NAMED).join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_is_no_namespace_is_refused() {
        let file = tempfile::NamedTempFile::new().expect("a temporary file");
        let error = identity(file.path()).expect_err("a plain file is no namespace");
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(identity(Path::new("/nonexistent")).is_err());
    }

    #[test]
    fn only_plain_names_are_taken() {
        for bad in ["", ".", "..", "a/b", "../x", "a\0b"] {
            assert!(ensure(bad).is_err() && remove(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    #[ignore = "needs root"]
    fn code_runs_inside_and_the_caller_stays_outside() {
        let name = format!("lk-ns-{}", std::process::id());
        let path = ensure(&name).expect("a namespace");
        assert_eq!(ensure(&name).expect("the same again"), path);
        let outside = Netns::current().expect("our own").id();
        let inside = within(&path, || Netns::current().expect("inside").id()).expect("entered");
        assert_eq!(inside, identity(&path).expect("its identity"));
        assert_ne!(inside, outside);
        assert_eq!(Netns::current().expect("our own").id(), outside);

        let panicked = std::panic::catch_unwind(|| within(&path, || panic!("inside")));
        assert!(panicked.is_err());

        remove(&name).expect("removed");
        remove(&name).expect("an unknown name is a success");
        assert!(identity(&path).is_err());
    }
}
