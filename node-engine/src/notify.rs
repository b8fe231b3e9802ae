//! Tells the service manager how the daemon fares, by systemd's notification protocol (sd_notify(3)): one datagram of `NAME=value`
//! lines to the socket named in the environment. Without that variable nobody wants to know.

mod fdstore;

use std::ffi::OsStr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

pub use fdstore::{FdStore, take_over};

/// Where notifications go, if anywhere.
#[derive(Debug)]
pub(crate) struct Notify {
    socket: Option<UnixDatagram>,
    /// The service manager ends a daemon that is silent for longer than twice this.
    pub(crate) heartbeat: Option<Duration>,
}

impl Notify {
    pub(crate) fn from_environment() -> Self {
        let socket = manager();
        let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
        let meant = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        let period = number("WATCHDOG_USEC").filter(|period| meant && *period > 1).map(Duration::from_micros);
        Self { heartbeat: period.filter(|_| socket.is_some()).map(|period| period / 2), socket }
    }

    pub(crate) fn ready(&self, status: &str) {
        self.send(&format!("READY=1\nSTATUS={status}\n"));
    }

    pub(crate) fn stopping(&self) {
        self.send("STOPPING=1\nSTATUS=stopping\n");
    }

    pub(crate) fn alive(&self) {
        self.send("WATCHDOG=1\n");
    }

    /// A service manager that does not listen is no reason to fail.
    fn send(&self, message: &str) {
        if let Some(socket) = &self.socket
            && let Err(error) = socket.send(message.as_bytes())
        {
            tracing::debug!(%error, "the service manager does not listen");
        }
    }
}

/// The service manager's ear, if there is one.
fn manager() -> Option<UnixDatagram> {
    let name = std::env::var_os("NOTIFY_SOCKET")?;
    match connect(&name) {
        Ok(socket) => Some(socket),
        Err(error) => {
            tracing::warn!(%error, socket = ?name, "the service manager cannot be notified");
            None
        }
    }
}

/// A name that begins with `@` is in the abstract namespace.
fn connect(name: &OsStr) -> std::io::Result<UnixDatagram> {
    let address = match name.as_bytes() {
        [b'@', rest @ ..] => SocketAddr::from_abstract_name(rest)?,
        _ => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.connect_addr(&address)?;
    Ok(socket)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notifications_reach_both_kinds_of_socket() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("node-engine-test-{}", std::process::id());
        let abstract_address = SocketAddr::from_abstract_name(&name).unwrap();
        for (listener, name) in [
            (UnixDatagram::bind(&path).unwrap(), path.into_os_string()),
            (UnixDatagram::bind_addr(&abstract_address).unwrap(), format!("@{name}").into()),
        ] {
            let notify = Notify { socket: Some(connect(&name).unwrap()), heartbeat: None };
            notify.ready("node edge-1");
            notify.alive();
            notify.stopping();
            for want in ["READY=1\nSTATUS=node edge-1\n", "WATCHDOG=1\n", "STOPPING=1\nSTATUS=stopping\n"] {
                let mut buffer = [0; 64];
                let length = listener.recv(&mut buffer).unwrap();
                assert_eq!(std::str::from_utf8(&buffer[..length]), Ok(want));
            }
        }
        assert!(connect(OsStr::new("/nonexistent/notify")).is_err());
    }
}
