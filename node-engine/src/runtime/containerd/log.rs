//! Output of containers. containerd hands it to a program, which it starts for each container and which lives as long as that: this
//! binary, so that a log is bounded and goes on without the daemon.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use nix::sys::signal::{SigSet, Signal};

use crate::runtime::output::Rotating;

/// The command of this binary that keeps a log.
pub const COMMAND: &str = "keep-log";
/// Of output, twice this much is kept.
const LIMIT: u64 = 5 << 20;
/// What containerd hands over: both outputs to read from, and one end to say on that all is ready.
const OUTPUTS: [&str; 2] = ["/proc/self/fd/3", "/proc/self/fd/4"];
const READY: &str = "/proc/self/fd/5";

/// Where containerd is to send a container's output: a program, its argument's name and the argument.
pub(super) fn address(keeper: &Path, log: &Path) -> String {
    format!("binary://{}?{COMMAND}={}", escaped(keeper), escaped(log))
}

/// Keeps what comes until there is nobody left who could write.
pub fn keep(log: &Path) -> ExitCode {
    match run(log) {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever started this is told by the end of its pipe.
        Err(_) => ExitCode::FAILURE,
    }
}

fn run(log: &Path) -> io::Result<()> {
    // The container's end asks for ours; what is still in the pipes is read first.
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGTERM);
    signals.thread_block()?;
    let log = Arc::new(Mutex::new(Rotating::open(log, LIMIT)?));
    let outputs = OUTPUTS.map(File::open);
    File::options().write(true).open(READY)?.write_all(b"r")?;
    let mut readers = Vec::new();
    for output in outputs {
        let (output, log) = (output?, log.clone());
        readers.push(thread::spawn(move || copy(output, &log)));
    }
    for reader in readers {
        let _ = reader.join();
    }
    Ok(())
}

/// Output must flow also where it cannot be kept: a container must not hang because a disk is full.
fn copy(mut output: File, log: &Mutex<Rotating>) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(length @ 1..) = output.read(&mut buffer) {
        let _ = log.lock().unwrap_or_else(PoisonError::into_inner).write(&buffer[..length]);
    }
}

/// As part of an address.
fn escaped(path: &Path) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-".contains(&byte);
    let escaped = |byte: &u8| if plain(*byte) { char::from(*byte).to_string() } else { format!("%{byte:02X}") };
    path.as_os_str().as_encoded_bytes().iter().map(escaped).collect()
}

/// This binary by its path. One that was replaced since it began has left its place to another that knows the same command.
pub(super) fn own_path() -> io::Result<PathBuf> {
    let path = std::fs::read_link("/proc/self/exe")?;
    let text = path.to_string_lossy();
    Ok(text.strip_suffix(" (deleted)").map(PathBuf::from).unwrap_or(path.clone()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_of_any_kind_are_addresses() {
        let address = address(Path::new("/opt/node engine/x"), Path::new("/var/lib/a.b-c_d/ä&.log"));
        assert_eq!(address, "binary:///opt/node%20engine/x?keep-log=/var/lib/a.b-c_d/%C3%A4%26.log");
    }
}
