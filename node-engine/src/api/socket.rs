//! The socket, and the lock that lets one daemon alone use a run directory.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};

use axum::serve::Listener;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use tokio::net::unix::{SocketAddr, UCred};
use tokio::net::{UnixListener, UnixStream};

/// Held as long as the daemon lives; the kernel releases it however the daemon ends.
#[derive(Debug)]
pub struct RunLock {
    run_dir: PathBuf,
    _file: Flock<File>,
}

/// The listening socket. Connections of other users are closed unanswered.
#[derive(Debug)]
pub struct OwnerListener {
    listener: UnixListener,
    /// The user that may ask besides root.
    owner: u32,
}

#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    #[error("another node-engine is running (pid {pid}): stop it, or give this one a --run-dir of its own")]
    Running { pid: String },
    #[error("another program answers on {}: end it, or use another --run-dir", .0.display())]
    Taken(PathBuf),
    #[error("{step} {}: {source}", .path.display())]
    Io { step: &'static str, path: PathBuf, source: io::Error },
}

impl RunLock {
    /// Makes the run directory where it is missing, and takes the lock in it.
    ///
    /// # Errors
    /// If another daemon has the lock, or the directory cannot be used.
    pub fn take(run_dir: &Path) -> Result<Self, SocketError> {
        fs::create_dir_all(run_dir).map_err(io("make", run_dir))?;
        let path = run_dir.join("lock");
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        let mut locked = match Flock::lock(file.map_err(io("open", &path))?, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => locked,
            Err((mut file, Errno::EWOULDBLOCK)) => return Err(SocketError::Running { pid: read_pid(&mut file) }),
            Err((_, error)) => return Err(io("lock", &path)(error.into())),
        };
        let pid = std::process::id();
        locked.set_len(0).and_then(|()| locked.rewind()).map_err(io("write", &path))?;
        writeln!(locked, "{pid}").map_err(io("write", &path))?;
        Ok(Self { run_dir: run_dir.to_owned(), _file: locked })
    }

    pub fn socket(&self) -> PathBuf {
        self.run_dir.join("api.sock")
    }

    /// Listens on `api.sock`, in place of the socket of a daemon that has died. Needs a tokio runtime.
    ///
    /// # Errors
    /// If a program that is not a node-engine answers there, or the socket cannot be made.
    pub fn listen(&self) -> Result<OwnerListener, SocketError> {
        let (path, beside) = (self.socket(), self.run_dir.join("api.sock.new"));
        if StdUnixStream::connect(&path).is_ok() {
            return Err(SocketError::Taken(path));
        }
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io("remove", &beside)(error)),
            _ => {}
        }
        let listener = UnixListener::bind(&beside).map_err(io("listen on", &beside))?;
        fs::set_permissions(&beside, Permissions::from_mode(0o600)).map_err(io("set the mode of", &beside))?;
        // Renamed into place: whoever looks sees the dead socket or the living one, and that one only with its final mode.
        fs::rename(&beside, &path).map_err(io("replace", &path))?;
        Ok(OwnerListener { listener, owner: nix::unistd::geteuid().as_raw() })
    }
}

fn read_pid(file: &mut File) -> String {
    let mut text = String::new();
    match file.take(20).read_to_string(&mut text) {
        Ok(_) if !text.trim().is_empty() => text.trim().to_owned(),
        _ => "unknown".into(),
    }
}

fn io<'a>(step: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> SocketError + 'a {
    move |source| SocketError::Io { step, path: path.to_owned(), source }
}

impl Listener for OwnerListener {
    type Io = UnixStream;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (UnixStream, SocketAddr) {
        loop {
            // The listener trait's own accept retries what passes, such as no free file descriptor.
            let (stream, address) = Listener::accept(&mut self.listener).await;
            match stream.peer_cred() {
                Ok(peer) if may_ask(&peer, self.owner) => return (stream, address),
                Ok(peer) => tracing::warn!(uid = peer.uid(), "a local user without the right to asked the local API"),
                Err(error) => tracing::debug!(%error, "a client of the local API is gone before it asked"),
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

fn may_ask(peer: &UCred, owner: u32) -> bool {
    peer.uid() == 0 || peer.uid() == owner
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_second_daemon_is_refused_and_told_the_pid() {
        let dir = tempfile::tempdir().unwrap();
        let lock = RunLock::take(dir.path()).unwrap();
        let error = RunLock::take(dir.path()).unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "another node-engine is running (pid {}): stop it, or give this one a --run-dir of its own",
                std::process::id()
            )
        );
        drop(lock);
        RunLock::take(dir.path()).unwrap();
    }

    #[tokio::test]
    async fn a_dead_socket_is_replaced_and_the_new_one_is_the_owners() {
        let dir = tempfile::tempdir().unwrap();
        let lock = RunLock::take(dir.path()).unwrap();
        drop(std::os::unix::net::UnixListener::bind(lock.socket()).unwrap());
        fs::write(dir.path().join("api.sock.new"), "").unwrap();
        let _listener = lock.listen().unwrap();
        let mode = fs::metadata(lock.socket()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        StdUnixStream::connect(lock.socket()).unwrap();
    }

    #[tokio::test]
    async fn a_living_foreign_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let lock = RunLock::take(dir.path()).unwrap();
        let _foreign = std::os::unix::net::UnixListener::bind(lock.socket()).unwrap();
        assert!(matches!(lock.listen(), Err(SocketError::Taken(_))));
        StdUnixStream::connect(lock.socket()).unwrap();
    }
}
