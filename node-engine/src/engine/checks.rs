//! What the machine must have, looked at before anything is touched.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;

/// What is missing, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    #[error("node-engine makes network interfaces and namespaces: run it as root, for example with sudo")]
    NotRoot,
    #[error("/dev/net/tun is missing: load it with `modprobe tun` (in a container: give it --device /dev/net/tun)")]
    NoTun,
    #[error("/dev/net/tun cannot be opened ({0}): the daemon needs CAP_NET_ADMIN and access to the device")]
    Tun(io::Error),
    #[error("/proc/sys/net/ipv4 is missing: mount /proc")]
    NoProc,
}

/// What a node needs.
pub(super) fn node() -> Result<(), CheckError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(CheckError::NotRoot);
    }
    if !Path::new("/proc/sys/net/ipv4").exists() {
        return Err(CheckError::NoProc);
    }
    tun(Path::new("/dev/net/tun"))
}

fn tun(device: &Path) -> Result<(), CheckError> {
    match OpenOptions::new().read(true).write(true).open(device) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(CheckError::NoTun),
        Err(error) => Err(CheckError::Tun(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_and_one_that_cannot_be_opened_are_told_apart() {
        assert!(matches!(tun(Path::new("/nonexistent/tun")), Err(CheckError::NoTun)));
        assert!(matches!(tun(Path::new("/dev")), Err(CheckError::Tun(_))));
        assert!(tun(Path::new("/dev/null")).is_ok());
    }
}
