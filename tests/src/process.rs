//! Running programs and finding our own.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use anyhow::{Context, Result, bail};

/// Runs to the end, gives what was printed; the error output becomes part of the error.
pub fn output(command: &mut Command) -> Result<String> {
    let output = capture(command)?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        let said = String::from_utf8_lossy(&output.stdout);
        bail!("{} ended with {}: {} {}", shown(command), output.status, complaint.trim(), said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs to the end, whatever the end is.
pub fn capture(command: &mut Command) -> Result<Output> {
    command.stdin(Stdio::null()).output().with_context(|| format!("cannot start {}", shown(command)))
}

/// `ip` in the network namespace of a process, options and all.
pub fn ip(pid: u32, arguments: &str) -> Result<String> {
    output(in_network(pid, "ip").args(arguments.split_whitespace()))
}

/// A program in the network namespace of a process, everything else as here.
pub fn in_network(pid: u32, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/proc/{pid}/ns/net")).arg("--").arg(program);
    command
}

/// A program of this workspace's build: beside this one, or beside the `deps` directory that a test program is in.
pub fn built(name: &str) -> Result<PathBuf> {
    let own = env::current_exe().context("this program has no path")?;
    let directory = own.parent().context("this program is in no directory")?;
    [Some(directory), directory.parent()]
        .into_iter()
        .flatten()
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is not built; run `cargo build -p node-engine -p lab --bins` first"))
}

/// The checkout.
pub fn root() -> &'static Path {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest)
}

fn shown(command: &Command) -> String {
    let mut words: Vec<String> = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|argument| argument.to_string_lossy().into_owned()));
    words.join(" ")
}
