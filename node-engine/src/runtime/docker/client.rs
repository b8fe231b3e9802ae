//! Finding the Docker daemon and speaking a version of its API that both sides know. Nothing is done until the first call, and a
//! daemon that comes back as another version is asked anew.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bollard::errors::Error;
use bollard::{API_DEFAULT_VERSION, Docker};
use tokio::time::{Instant, sleep};

use super::engine::Engine;
use crate::runtime::RuntimeError;

/// Docker's own, and that of Podman, which speaks the same.
const SOCKETS: [&str; 2] = ["/var/run/docker.sock", "/run/podman/podman.sock"];
/// Until an answer begins; a daemon under load, or one that was stopped for a while, still answers within it.
const TIMEOUT_SECONDS: u64 = 120;
/// Podman cleans up after a container in this time.
const SETTLING: Duration = Duration::from_secs(10);
const SETTLING_POLL: Duration = Duration::from_millis(50);

/// A connection that is made when it is needed.
#[derive(Debug)]
pub(super) struct Client {
    socket: String,
    docker: Mutex<Option<Docker>>,
    /// As it was when it was last asked.
    engine: Mutex<Engine>,
}

impl Client {
    /// `host`, else the first of the usual sockets that is there.
    ///
    /// # Errors
    /// An address that is not a local socket: namespaces and cgroups of containers elsewhere are out of reach.
    pub(super) fn new(host: Option<&str>) -> Result<Self, RuntimeError> {
        let host = host.map_or_else(|| usual(&SOCKETS), str::to_owned);
        let path = host.strip_prefix("unix://").unwrap_or(&host);
        if !path.starts_with('/') {
            let reason = format!("{host:?} is not a local socket; give unix:///path/to/docker.sock");
            return Err(RuntimeError::Refused { what: "docker host", reason });
        }
        Ok(Self { socket: path.to_owned(), docker: Mutex::new(None), engine: Mutex::default() })
    }

    pub(super) fn socket(&self) -> &Path {
        Path::new(&self.socket)
    }

    pub(super) async fn get(&self) -> Result<Docker, RuntimeError> {
        if let Some(docker) = self.cached().clone() {
            return Ok(docker);
        }
        let connect = async {
            Docker::connect_with_unix(&self.socket, TIMEOUT_SECONDS, API_DEFAULT_VERSION)?.negotiate_version().await
        };
        let docker = connect.await.map_err(|error| self.failed("connect", error))?;
        self.look(&docker).await?;
        *self.cached() = Some(docker.clone());
        Ok(docker)
    }

    pub(super) fn engine(&self) -> Engine {
        self.engine.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What answers is told when it is another one than before.
    async fn look(&self, docker: &Docker) -> Result<(), RuntimeError> {
        let version = docker.version().await.map_err(|error| self.failed("ask for the version", error))?;
        // What it says of itself beyond that is nice to know.
        let info = docker.info().await.unwrap_or_else(|error| {
            tracing::debug!(%error, "the container engine does not describe itself");
            bollard::models::SystemInfo::default()
        });
        let owner = std::fs::metadata(&self.socket).map_or(0, |socket| socket.uid());
        let engine = Engine::of(&version, &info, owner);
        let before =
            std::mem::replace(&mut *self.engine.lock().unwrap_or_else(PoisonError::into_inner), engine.clone());
        if before != engine {
            engine.announce(&self.socket);
        }
        Ok(())
    }

    /// The daemon may have been replaced: its version is asked again next time.
    pub(super) fn forget(&self) {
        *self.cached() = None;
    }

    /// What a failed call means for the caller.
    pub(super) fn failed(&self, step: &'static str, error: Error) -> RuntimeError {
        match error {
            Error::DockerResponseServerError { message, .. } => RuntimeError::Step { step, reason: message },
            Error::DockerStreamError { error } => RuntimeError::Step { step, reason: error },
            Error::SocketNotFoundError(path) => RuntimeError::Unavailable(format!(
                "there is no Docker at {path}; install or start it (systemctl start docker)"
            )),
            Error::RequestTimeoutError
            | Error::IOError { .. }
            | Error::HyperResponseError { .. }
            | Error::HyperLegacyError { .. } => RuntimeError::Unavailable(format!(
                "Docker at {} during {step}: {}; see `systemctl status docker`",
                self.socket,
                chain(&error)
            )),
            error => RuntimeError::Step { step, reason: chain(&error) },
        }
    }

    fn cached(&self) -> std::sync::MutexGuard<'_, Option<Docker>> {
        self.docker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where none is there yet, the first will be.
fn usual(sockets: &[&str]) -> String {
    sockets.iter().find(|socket| Path::new(socket).exists()).unwrap_or(&sockets[0]).to_string()
}

/// The answer to a call about something that is not there.
pub(super) fn not_found(error: &Error) -> bool {
    matches!(error, Error::DockerResponseServerError { status_code: 404, .. })
}

/// Asks until a container that has just ended is cleaned up: until then Podman calls it `stopped`, a word that Docker does not have.
pub(super) async fn settled<T, F: Future<Output = Result<T, Error>>>(ask: impl Fn() -> F) -> Result<T, Error> {
    let deadline = Instant::now() + SETTLING;
    loop {
        match ask().await {
            Err(Error::JsonDataError { message, .. })
                if message.contains("variant `stopped`") && Instant::now() < deadline =>
            {
                sleep(SETTLING_POLL).await;
            }
            answer => return answer,
        }
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_local_sockets_are_accepted() {
        for good in ["/run/docker.sock", "unix:///run/user/0/docker.sock"] {
            assert!(Client::new(Some(good)).is_ok(), "{good}");
        }
        for bad in ["tcp://10.0.0.1:2375", "ssh://host", "docker.sock", ""] {
            assert!(matches!(Client::new(Some(bad)), Err(RuntimeError::Refused { .. })), "{bad}");
        }
    }

    #[test]
    fn the_first_socket_that_is_there_is_taken() {
        let dir = tempfile::tempdir().expect("a directory");
        let (docker, podman) = (dir.path().join("docker.sock"), dir.path().join("podman.sock"));
        let (docker, podman) = (docker.to_str().expect("text"), podman.to_str().expect("text"));
        assert_eq!(usual(&[docker, podman]), docker, "it may come yet");
        std::fs::write(podman, "").expect("write");
        assert_eq!(usual(&[docker, podman]), podman);
        std::fs::write(docker, "").expect("write");
        assert_eq!(usual(&[docker, podman]), docker);
    }

    #[tokio::test]
    async fn an_absent_daemon_is_unavailable_and_says_what_to_do() {
        let client = Client::new(Some("/nowhere/docker.sock")).expect("an address");
        let error = client.get().await.expect_err("nobody there");
        assert!(matches!(&error, RuntimeError::Unavailable(_)), "{error}");
        assert!(error.to_string().contains("start"), "{error}");
    }
}
