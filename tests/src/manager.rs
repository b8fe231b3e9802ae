//! A service manager as far as descriptors go: keeps those that a daemon hands over, and hands them to its next start. (systemd does so
//! for a unit with `FileDescriptorStoreMax=`; none runs where the laboratory does.)

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::cmsg_space;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, UnixAddr, recvmsg};

use crate::node::Node;

/// How often it looks whether it is to end.
const TICK: Duration = Duration::from_millis(50);

type Kept = Arc<Mutex<BTreeMap<String, OwnedFd>>>;

/// Ends when dropped, and closes what it has kept.
#[derive(Debug)]
pub struct ServiceManager {
    path: PathBuf,
    kept: Kept,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ServiceManager {
    /// One for this node, which its next start tells.
    pub fn of(node: &mut Node) -> Result<Self> {
        let path = node.host.directory().join("notify");
        let _ = fs::remove_file(&path);
        let socket = UnixDatagram::bind(&path).with_context(|| format!("cannot listen at {}", path.display()))?;
        socket.set_read_timeout(Some(TICK)).context("cannot wait for a while")?;
        let (kept, ends) = (Kept::default(), Arc::new(AtomicBool::new(false)));
        let thread = thread::spawn({
            let (kept, ends) = (Arc::clone(&kept), Arc::clone(&ends));
            move || {
                while !ends.load(Ordering::Relaxed) {
                    hear(&socket, &kept);
                }
            }
        });
        node.set_variable("NOTIFY_SOCKET", &path.to_string_lossy());
        Ok(Self { path, kept, ends, thread: Some(thread) })
    }

    /// Names of what is kept.
    pub fn names(&self) -> Vec<String> {
        locked(&self.kept).keys().cloned().collect()
    }

    /// Starts the daemon with what is kept.
    pub fn start(&self, node: &mut Node) -> Result<()> {
        let kept = locked(&self.kept);
        // To higher numbers first: one may be where another is to go.
        let (mut aside, mut script) = (String::new(), String::new());
        for (fd, number) in kept.values().zip(3..) {
            // Programs that are started from here get it.
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).context("cannot hand over a descriptor")?;
            let far = number + 60;
            aside += &format!("exec {far}<&{} {0}<&-; ", fd.as_raw_fd());
            script += &format!("exec {number}<&{far} {far}<&-; ");
        }
        let names = kept.keys().cloned().collect::<Vec<_>>().join(":");
        let script = format!(
            "{aside}{script}export LISTEN_PID=$$ LISTEN_FDS={} LISTEN_FDNAMES={names}; exec \"$@\"",
            kept.len()
        );
        node.set_wrapper(&["bash", "-c", &script, "bash"]);
        let started = node.start();
        node.set_wrapper(&[]);
        for fd in kept.values() {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).context("cannot keep a descriptor")?;
        }
        started
    }
}

impl Drop for ServiceManager {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let _ = fs::remove_file(&self.path);
    }
}

fn locked(kept: &Kept) -> MutexGuard<'_, BTreeMap<String, OwnedFd>> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One message, if one comes. Descriptors that are not to be kept are closed, which answers a barrier.
fn hear(socket: &UnixDatagram, kept: &Kept) {
    let mut words = [0; 4096];
    let mut control = cmsg_space!([RawFd; 8]);
    let mut slices = [IoSliceMut::new(&mut words)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = match recvmsg::<UnixAddr>(socket.as_raw_fd(), &mut slices, Some(&mut control), flags) {
        Ok(message) => message,
        Err(error) if std::io::Error::from(error).kind() == ErrorKind::WouldBlock => return,
        Err(error) => panic!("cannot hear the daemon: {error}"),
    };
    let mut fds: Vec<OwnedFd> = Vec::new();
    for control in message.cmsgs().expect("control messages in whole") {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            // SAFETY: the kernel has just made them for this process.
            fds.extend(numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) }));
        }
    }
    let length = message.bytes;
    let said = String::from_utf8_lossy(&words[..length]).into_owned();
    let value = |name: &str| said.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    let name = value("FDNAME").unwrap_or("stored").to_owned();
    if value("FDSTOREREMOVE") == Some("1") {
        locked(kept).remove(&name);
    }
    if value("FDSTORE") == Some("1")
        && let Some(fd) = fds.pop()
    {
        locked(kept).insert(name, fd);
    }
}
