//! Descriptors that outlive the process: the service manager keeps them under names while the daemon is restarted, and hands them to the
//! next start (systemd's file descriptor store: sd_pid_notify_with_fds(3), sd_listen_fds_with_names(3)). What comes meanwhile waits in
//! them. Where there is no service manager, nothing is kept.

use std::collections::BTreeMap;
use std::io::{IoSlice, pipe};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};

use super::manager;

/// The first descriptor that is handed over.
const FIRST: RawFd = 3;
/// More than the unit has kept.
const MOST: RawFd = 64;
/// How long the service manager is waited for, at a word to it and at its answer.
const PATIENCE: Duration = Duration::from_secs(1);

/// What was handed to this process, until somebody wants it.
static GIVEN: Mutex<BTreeMap<String, OwnedFd>> = Mutex::new(BTreeMap::new());

/// Takes over what the service manager has kept for this process. To be called before the process opens anything: numbers are all that it
/// is told, and one that is not open would soon be something else's. Once; later calls find nothing.
pub fn take_over() {
    static DONE: AtomicBool = AtomicBool::new(false);
    if DONE.swap(true, Ordering::Relaxed) {
        return;
    }
    let [pid, count, names] = ["LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"].map(|name| std::env::var(name).ok());
    let meant = pid.is_some_and(|pid| pid == std::process::id().to_string());
    let count = count.and_then(|count| count.parse().ok()).filter(|count| meant && (0..=MOST).contains(count));
    let names = names.unwrap_or_default();
    let given = named(count.unwrap_or(0), &names).filter_map(adopt);
    GIVEN.lock().unwrap_or_else(PoisonError::into_inner).extend(given);
}

/// What the service manager keeps, and has kept.
#[derive(Debug, Default)]
pub struct FdStore {
    manager: Option<UnixDatagram>,
    given: Mutex<BTreeMap<String, OwnedFd>>,
}

impl FdStore {
    /// The store of the service manager that has started this process, with what [`take_over`] has found; later ones begin empty.
    pub fn from_environment() -> Self {
        let manager = manager().filter(|manager| {
            let ready = manager.set_nonblocking(false).and_then(|()| manager.set_write_timeout(Some(PATIENCE)));
            ready.inspect_err(|error| tracing::warn!(%error, "the service manager keeps no descriptors")).is_ok()
        });
        let given = std::mem::take(&mut *GIVEN.lock().unwrap_or_else(PoisonError::into_inner));
        Self { manager, given: Mutex::new(given) }
    }

    /// What was kept under this name.
    pub fn take(&self, name: &str) -> Option<OwnedFd> {
        self.given.lock().unwrap_or_else(PoisonError::into_inner).remove(name)
    }

    /// Has this kept, in place of what was kept under the name.
    pub fn keep(&self, name: &str, fd: BorrowedFd<'_>) {
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}\n"), None);
        // An error that waits in a socket is no reason to close it (FDPOLL, systemd 246).
        self.send(&format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0\n"), Some(fd));
    }

    /// Has nothing kept under the name. Waits until the service manager has closed it, so that what it held is free: a port, a device.
    pub fn forget(&self, name: &str) {
        drop(self.take(name));
        if self.manager.is_none() {
            return;
        }
        self.send(&format!("FDSTOREREMOVE=1\nFDNAME={name}\n"), None);
        // Words are heard in their order: the barrier's descriptor is closed after it.
        let Ok((heard, barrier)) = pipe() else { return };
        self.send("BARRIER=1", Some(barrier.as_fd()));
        drop(barrier);
        let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
        if poll(&mut [PollFd::new(heard.as_fd(), PollFlags::empty())], timeout) != Ok(1) {
            tracing::warn!(name, "the service manager does not say whether it still keeps this");
        }
    }

    /// Has nothing kept any more that was kept for this process and that nobody has taken.
    pub fn forget_rest(&self) {
        let names: Vec<String> = {
            let given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
            given.keys().cloned().collect()
        };
        names.iter().for_each(|name| self.forget(name));
    }

    /// A service manager that does not listen is no reason to fail.
    fn send(&self, message: &str, fd: Option<BorrowedFd<'_>>) {
        let Some(manager) = &self.manager else { return };
        let fds: Vec<RawFd> = fd.iter().map(AsRawFd::as_raw_fd).collect();
        let rights: Vec<ControlMessage<'_>> = fd.iter().map(|_| ControlMessage::ScmRights(&fds)).collect();
        let words = [IoSlice::new(message.as_bytes())];
        let sent = sendmsg::<UnixAddr>(manager.as_raw_fd(), &words, &rights, MsgFlags::empty(), None);
        if let Err(error) = sent {
            tracing::debug!(%error, "the service manager does not listen");
        }
    }
}

/// Descriptors and their names; none where these are not as many.
fn named(count: RawFd, names: &str) -> impl Iterator<Item = (RawFd, String)> {
    let names: Vec<String> = names.split(':').map(str::to_owned).collect();
    let count = if usize::try_from(count) == Ok(names.len()) { count } else { 0 };
    (FIRST..FIRST + count).zip(names)
}

/// Makes a descriptor that was handed over ours. No program that is started later gets it, too.
fn adopt((number, name): (RawFd, String)) -> Option<(String, OwnedFd)> {
    // SAFETY: the service manager says that it has opened this for us; nothing else of the process knows it, and this is done once.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    match fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
        Ok(_) => Some((name, fd)),
        // There is nothing to close.
        Err(_) => {
            let _ = fd.into_raw_fd();
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{IoSliceMut, Read, Write};

    use nix::cmsg_space;
    use nix::sys::socket::{ControlMessageOwned, recvmsg};

    use super::*;

    /// What a service manager hears.
    fn heard(manager: &UnixDatagram) -> (String, Vec<OwnedFd>) {
        let mut words = [0; 128];
        let mut control = cmsg_space!([RawFd; 4]);
        let mut slices = [IoSliceMut::new(&mut words)];
        let message =
            recvmsg::<UnixAddr>(manager.as_raw_fd(), &mut slices, Some(&mut control), MsgFlags::empty()).unwrap();
        let numbers: Vec<RawFd> = message
            .cmsgs()
            .unwrap()
            .filter_map(|message| if let ControlMessageOwned::ScmRights(fds) = message { Some(fds) } else { None })
            .flatten()
            .collect();
        let length = message.bytes;
        // SAFETY: the kernel has just made them for us.
        let fds = numbers.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect();
        (String::from_utf8(words[..length].to_vec()).unwrap(), fds)
    }

    #[test]
    fn what_is_kept_is_the_same_and_forgotten_in_order() {
        let (ours, manager) = UnixDatagram::pair().unwrap();
        let store = FdStore { manager: Some(ours), given: Mutex::default() };
        let (mut reader, writer) = pipe().unwrap();
        store.keep("tun", writer.as_fd());
        assert_eq!(heard(&manager).0, "FDSTOREREMOVE=1\nFDNAME=tun\n");
        let (words, mut fds) = heard(&manager);
        assert_eq!((words.as_str(), fds.len()), ("FDSTORE=1\nFDNAME=tun\nFDPOLL=0\n", 1));
        drop(writer);
        std::fs::File::from(fds.remove(0)).write_all(b"kept").unwrap();
        let mut written = String::new();
        reader.read_to_string(&mut written).unwrap();
        assert_eq!(written, "kept");

        let manager = std::thread::spawn(move || {
            let first = heard(&manager).0;
            let (second, fds) = heard(&manager);
            let open = fds.len();
            std::thread::sleep(Duration::from_millis(50));
            drop(fds);
            (first, second, open)
        });
        let begin = std::time::Instant::now();
        store.forget("tun");
        assert!(begin.elapsed() >= Duration::from_millis(50), "the answer was not waited for");
        let said = manager.join().unwrap();
        assert_eq!(said, ("FDSTOREREMOVE=1\nFDNAME=tun\n".into(), "BARRIER=1".into(), 1));
    }

    #[test]
    fn names_belong_to_descriptors() {
        let of = |count, names| named(count, names).collect::<Vec<_>>();
        assert_eq!(of(2, "tun:tunnel"), [(3, "tun".to_owned()), (4, "tunnel".to_owned())]);
        assert_eq!(of(0, ""), []);
        assert_eq!(of(3, "tun:tunnel"), []);
        assert!(adopt((1_000_000, "closed".into())).is_none());
        let fd = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let store = FdStore { manager: None, given: Mutex::new(BTreeMap::from([("framed".to_owned(), fd)])) };
        store.forget_rest();
        assert!(store.take("framed").is_none(), "nobody wanted it");
    }
}
