//! Takes back everything that node-engine has made on this machine, newest first: workloads, network, files. Needs no daemon, and
//! goes on past what cannot be removed.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::checks::CheckError;
use super::runtimes;
use crate::api::{RunLock, SocketError};
use crate::config::Config;
use crate::netmanager::link::Links;
use crate::netmanager::{datapath, link_config, pin_dir};
use crate::output::say;
use crate::runtime::docker::DockerRuntime;
use crate::runtime::registries::Registries;
use crate::runtime::{self, Adopted, Runtime};
use crate::store::Desired;

/// How long an engine that runs workloads may take to say what it holds.
const ANSWER: Duration = Duration::from_secs(15);
/// How often the image of sandboxes is tried to be removed, and what is between.
const LOOKS: u32 = 10;
const AGAIN: Duration = Duration::from_millis(300);
/// What workloads get to end by themselves.
const GRACE: Duration = Duration::from_secs(5);
/// Where Docker and Podman keep containers, also while they do not run.
const STORES: [&str; 2] = [runtimes::DOCKER_DATA, "/var/lib/containers/storage"];
/// Where systemd notes that the service starts with the machine.
const ENABLED: &str = "/etc/systemd/system/multi-user.target.wants/node-engine.service";
/// Taking down asks no size.
const ANY_MTU: u32 = 1280;

/// Removes everything of ours; with `purge` also what outlives a reboot. Says on the standard output what it does.
///
/// # Errors
/// If a daemon runs, or with everything that could not be removed.
pub async fn uninstall(config: &Config, purge: bool) -> anyhow::Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!(CheckError::NotRoot);
    }
    // The lock also keeps a daemon from starting meanwhile.
    let lock = match RunLock::take(&config.run_dir) {
        Err(SocketError::Running { pid }) => {
            bail!(
                "node-engine is running (pid {pid}): stop it first, with `systemctl disable --now node-engine`, or with `kill {pid}` \
                 where no service starts it again"
            )
        }
        other => other?,
    };
    let mut left = Vec::new();
    let docker = containers(config, &mut left).await;
    commands(config, &mut left).await;
    network(config, &mut left).await;
    if docker {
        // What a daemon that died had asked Docker for may have been made only after the first look.
        containers(config, &mut left).await;
    }
    // The notes by which the next try finds what is left are the last to go.
    if left.is_empty() {
        runtime::remove_empty_groups(&config.runtime.control_group);
        directory("run directory", &config.run_dir, &mut left);
        // Whoever starts it again wants what the cluster says then, not what was taken down here.
        if let Err(error) = Desired::forget(&config.state_dir) {
            left.push(format!("what was to run here ({error})"));
        }
        if purge {
            directory("state directory", &config.state_dir, &mut left);
        }
    }
    drop(lock);
    if !left.is_empty() {
        let these = if left.len() == 1 { "this" } else { "these" };
        bail!("{these} could not be removed, which a second `uninstall` tries again: {}", left.join("; "));
    }
    say(format_args!("nothing of node-engine is left on this machine but {}", remainder(&config.state_dir)));
    if Path::new(ENABLED).exists() {
        say(format_args!("its service still starts with the machine: `systemctl disable node-engine` ends that"));
    }
    Ok(())
}

/// What an uninstall leaves where nothing went wrong.
pub(super) fn remainder(state_dir: &Path) -> String {
    if !state_dir.exists() {
        return "its binary and configuration".into();
    }
    let state_dir = state_dir.display();
    format!("its binary, its configuration and the state directory {state_dir}, which `uninstall --purge` removes")
}

/// Links, addresses, rules and programs. Also the end of a daemon that takes everything with it.
pub(super) async fn network(config: &Config, left: &mut Vec<String>) {
    left.extend(datapath::uninstall(&pin_dir(&config.network)).iter().map(ToString::to_string));
    match Links::open(link_config(&config.network, &config.run_dir, ANY_MTU)).await {
        Ok(links) => left.extend(links.uninstall().await.iter().map(ToString::to_string)),
        Err(error) => left.push(error.to_string()),
    }
}

/// Whether there is a Docker that answers, and nothing of ours is left in it.
async fn containers(config: &Config, left: &mut Vec<String>) -> bool {
    let made = DockerRuntime::new(config.runtime.docker_host.as_deref(), watch::channel(None).1, Registries::default())
        .map(Arc::new);
    let (docker, furniture) = match (made, runtimes::Furniture::of(config)) {
        (Ok(docker), Ok(furniture)) => (docker, furniture),
        (Err(error), _) | (_, Err(error)) => {
            left.push(format!("containers ({error})"));
            return false;
        }
    };
    let runtime = furniture.given_to(docker.clone());
    for look in 1.. {
        let held = match timeout(ANSWER, runtime.adopt()).await {
            Ok(Ok(held)) => held,
            Ok(Err(_)) if !docker.is_installed() && !STORES.iter().any(|store| Path::new(store).exists()) => {
                say(format_args!("there is no Docker on this machine, so there are no containers"));
                return false;
            }
            Ok(Err(error)) => {
                left.push(format!("containers, if there are any ({error})"));
                return false;
            }
            Err(_) => {
                left.push(format!("containers, if there are any (Docker is silent for {ANSWER:?})"));
                return false;
            }
        };
        let before = left.len();
        stop(&*runtime, held, left).await;
        match docker.remove_sandbox_image().await {
            Ok(()) => return left.len() == before,
            // A container of it that was being made when the daemon died.
            Err(_) if look < LOOKS && left.len() == before => sleep(AGAIN).await,
            Err(error) => {
                left.push(format!("the sandbox image ({error})"));
                return false;
            }
        }
    }
    false
}

/// What this binary looks after itself.
async fn commands(config: &Config, left: &mut Vec<String>) {
    let supervised = match runtimes::supervised(config) {
        Ok(supervised) => supervised,
        Err(error) => return left.push(format!("commands ({error})")),
    };
    for runtime in supervised {
        match runtime.adopt().await {
            Ok(held) => stop(&*runtime, held, left).await,
            Err(error) => left.push(format!("what {} runs ({error})", runtime.technology())),
        }
    }
}

async fn stop(runtime: &dyn Runtime, held: Vec<Adopted>, left: &mut Vec<String>) {
    for adopted in held {
        say(format_args!("removing {}", adopted.instance));
        if let Err(error) = runtime.stop(&adopted.instance, GRACE).await {
            left.push(format!("{} ({error})", adopted.instance));
        }
    }
}

fn directory(what: &str, path: &Path, left: &mut Vec<String>) {
    // What is removed with the directory is what is mounted in it, too: a volume is not ours.
    match fs::read("/proc/self/mountinfo").map(|mounts| mounted_below(path, &mounts)) {
        Ok(None) => {}
        Ok(Some(mounted)) => {
            return left.push(format!("{} (something is mounted at {})", path.display(), mounted.display()));
        }
        Err(error) => return left.push(format!("{} (nobody says what is mounted there: {error})", path.display())),
    }
    match fs::remove_dir_all(path) {
        Ok(()) => say(format_args!("removed the {what} {}", path.display())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => left.push(format!("{} ({error})", path.display())),
    }
}

/// The first mount point in the directory, of what proc_pid_mountinfo(5) lists.
fn mounted_below(directory: &Path, mounts: &[u8]) -> Option<PathBuf> {
    let directory = fs::canonicalize(directory).ok()?;
    let point = |line: &[u8]| {
        line.split(|byte| *byte == b' ').nth(4).map(|field| PathBuf::from(OsString::from_vec(plain(field))))
    };
    let points = mounts.split(|byte| *byte == b'\n').filter_map(point);
    points.into_iter().find(|point| point.starts_with(&directory) && *point != directory)
}

/// Without the octal escapes that keep a path in one word.
fn plain(mut field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    while let Some((first, rest)) = field.split_first() {
        let escaped = rest.first_chunk::<3>().filter(|_| *first == b'\\');
        let escaped = escaped.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        out.push(escaped.unwrap_or(*first));
        field = if escaped.is_some() { &rest[3..] } else { rest };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_mounted_in_a_directory_is_found() {
        let dir = tempfile::Builder::new().prefix("state dir").tempdir().expect("a directory");
        let root = fs::canonicalize(dir.path()).expect("a path");
        let shown = root.to_str().expect("a name").replace(' ', "\\040");
        let line = |point: &str| format!("36 35 98:0 /mnt1 {point} rw,noatime master:1 - ext3 /dev/root rw\n");
        let others = ["/", "/proc", &shown, &format!("{shown}-other/a")].map(line).concat();
        assert_eq!(mounted_below(&root, others.as_bytes()), None);
        let volume = others + &line(&format!("{shown}/csi/publish/a/b"));
        assert_eq!(mounted_below(&root, volume.as_bytes()), Some(root.join("csi/publish/a/b")));
        assert_eq!(mounted_below(&root.join("missing"), volume.as_bytes()), None);
    }
}
