//! The first process of a simulated host. It runs in namespaces of its own (network, mounts, host name, IPC, processes), makes
//! them look like a machine, starts dockerd, reaps orphans, and ends – and with it the whole host – when its standard input
//! closes, that is when whoever made the host is gone.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio, exit};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::wait::wait;

use crate::process::output;
use crate::wait;

const NOTHING: Option<&str> = None;

/// What `lab host-init` does: `directory` is the host's disk, `group` its control group.
pub fn run(name: &str, directory: &Path, group: &str, docker: bool) -> Result<()> {
    // Still the outer procfs: this is our id as others see it.
    let outer = fs::read_link("/proc/self").context("cannot read /proc/self")?;
    say(&format!("pid {}", outer.display()))?;
    thread::spawn(end_with_maker);
    fs::write("/proc/sys/kernel/hostname", name).context("cannot set the host name")?;
    make_mounts(directory)?;
    make_network()?;
    if docker {
        start_docker(directory, group)?;
    }
    say("ready")?;
    reap()
}

fn say(line: &str) -> Result<()> {
    let mut out = std::io::stdout();
    writeln!(out, "{line}").and_then(|()| out.flush()).context("cannot answer the host's maker")
}

fn end_with_maker() {
    let mut rest = Vec::new();
    let _ = std::io::stdin().read_to_end(&mut rest);
    exit(0);
}

fn make_mounts(directory: &Path) -> Result<()> {
    let bind = |from: &Path, to: &str| {
        mount(Some(from), to, NOTHING, MsFlags::MS_BIND | MsFlags::MS_REC, NOTHING)
            .with_context(|| format!("cannot bind {} to {to}", from.display()))
    };
    let fresh = |kind: &str, to: &str| {
        mount(Some(kind), to, Some(kind), MsFlags::empty(), NOTHING)
            .with_context(|| format!("cannot mount {kind} on {to}"))
    };
    mount(NOTHING, "/", NOTHING, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NOTHING)
        .context("cannot make the mounts private")?;

    // A sysfs that shows this network namespace, with the machine's control groups in it.
    let groups = directory.join("cgroup");
    fs::create_dir_all(&groups).context("cannot make a place for the control groups")?;
    mount(Some("/sys/fs/cgroup"), &groups, NOTHING, MsFlags::MS_BIND | MsFlags::MS_REC, NOTHING)
        .context("cannot keep the control groups")?;
    fresh("sysfs", "/sys")?;
    bind(&groups, "/sys/fs/cgroup")?;
    umount2(&groups, MntFlags::MNT_DETACH).context("cannot unmount the kept control groups")?;
    fresh("bpf", "/sys/fs/bpf")?;
    fresh("proc", "/proc")?;
    fresh("tmpfs", "/run")?;
    fs::create_dir_all("/run/lock").context("cannot make /run/lock")?;
    if Path::new("/etc/docker").is_dir() {
        let configuration = directory.join("etc-docker");
        fs::create_dir_all(&configuration).context("cannot make a place for /etc/docker")?;
        bind(&configuration, "/etc/docker")?;
    }
    Ok(())
}

fn make_network() -> Result<()> {
    // Addresses are usable at once: nobody else on the switch has them.
    for scope in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{scope}/accept_dad");
        fs::write(&path, "0").with_context(|| format!("cannot write {path}"))?;
    }
    output(Command::new("ip").args(["link", "set", "lo", "up"]))?;
    Ok(())
}

fn start_docker(directory: &Path, group: &str) -> Result<()> {
    let data = directory.join("docker");
    fs::create_dir_all(&data).context("cannot make a place for Docker's data")?;
    let kind = nix::sys::statfs::statfs(&data).context("cannot look at the file system of Docker's data")?;
    if kind.filesystem_type() == nix::sys::statfs::OVERLAYFS_SUPER_MAGIC {
        // An overlay cannot be the upper layer of another one; memory can.
        mount(Some("tmpfs"), &data, Some("tmpfs"), MsFlags::empty(), NOTHING).context("cannot mount a tmpfs")?;
    }
    let log = File::create(directory.join("dockerd.log")).context("cannot make dockerd's log")?;
    let configuration = directory.join("daemon.json");
    fs::write(&configuration, "{}").context("cannot write dockerd's configuration")?;
    // Kept for whoever starts it again.
    let script = format!(
        "exec dockerd --config-file '{}' --data-root '{}' --storage-driver overlay2 \
         --exec-opt native.cgroupdriver=cgroupfs --live-restore --cgroup-parent '/{group}'\n",
        configuration.display(),
        data.display(),
    );
    let start = directory.join("start-docker.sh");
    fs::write(&start, script).context("cannot write down how dockerd is started")?;
    Command::new("sh")
        .arg(&start)
        .stdin(Stdio::null())
        .stdout(log.try_clone().context("cannot share dockerd's log")?)
        .stderr(log)
        .spawn()
        .context("cannot start dockerd; is docker.io installed?")?;
    wait::until_true("dockerd answers", Duration::from_secs(60), docker_answers)
}

fn docker_answers() -> Result<bool> {
    let Ok(mut socket) = UnixStream::connect("/run/docker.sock") else { return Ok(false) };
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    socket.write_all(b"GET /_ping HTTP/1.0\r\n\r\n")?;
    let mut answer = String::new();
    socket.read_to_string(&mut answer)?;
    Ok(answer.starts_with("HTTP/1.0 200") || answer.starts_with("HTTP/1.1 200"))
}

fn reap() -> Result<()> {
    loop {
        match wait() {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(Errno::ECHILD) => thread::sleep(Duration::from_millis(100)),
            Err(error) => return Err(error).context("cannot wait for children"),
        }
    }
}
