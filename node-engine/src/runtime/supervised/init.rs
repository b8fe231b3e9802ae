//! The two inner stages: the first process of a command's namespaces, and the last step before the command itself.

use std::convert::Infallible;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Gid, Pid, Uid, sethostname};

use crate::model::Mount;

use super::launch::{Launch, Order};
use super::place::Place;
use super::supervisor::{ASK, FORCE, GO, HOST_NAME, MOUNTS, OWN, PROCESSES, READY};

const NOTHING: Option<&str> = None;
const RESOLVER: &str = "/etc/resolv.conf";
/// Milliseconds between looks whether the resolver's file is in its place, for changes that the kernel does not tell of.
const LOOK: u16 = 10_000;
/// The same where it has not been put into its place yet.
const LOOK_AGAIN: u16 = 50;

/// Makes the namespaces a place to live in, runs the command, collects what it leaves behind, and ends with its code.
pub(super) fn run(place: &Place, own: &str) -> io::Result<u8> {
    let mut supervisor = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut signals = SigSet::empty();
    for signal in [ASK, FORCE, Signal::SIGCHLD] {
        signals.add(signal);
    }
    signals.thread_block()?;
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    // Where there is no process namespace to take everything along.
    prctl::set_child_subreaper(true)?;
    if let Err(error) = Order::read(&place.launch()).and_then(|order| furnish(place, &order.launch, own)) {
        writeln!(supervisor, "{error}")?;
        return Ok(1);
    }
    writeln!(supervisor, "{READY}")?;
    let mut word = String::new();
    BufReader::new(supervisor).read_line(&mut word)?;
    if word.trim() != GO {
        return Ok(1);
    }
    let command =
        Command::new(OWN).args(["supervise", "command"]).arg(place.directory()).stdin(Stdio::null()).spawn()?;
    let code = wait_for(Pid::from_raw(command.id().cast_signed()), &signals)?;
    // The end of a namespace's first process is the end of all.
    if Pid::this() != Pid::from_raw(1) {
        end_children();
    }
    Ok(code)
}

/// The command's code: of a signal, 128 more than its number.
fn wait_for(command: Pid, signals: &SigSet) -> io::Result<u8> {
    loop {
        match signals.wait()? {
            Signal::SIGCHLD => loop {
                match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                    Ok(WaitStatus::Exited(pid, code)) if pid == command => return Ok(code.to_le_bytes()[0]),
                    Ok(WaitStatus::Signaled(pid, signal, _)) if pid == command => {
                        return Ok(128 + (signal as i32).to_le_bytes()[0]);
                    }
                    Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => break,
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(error) => return Err(error.into()),
                }
            },
            FORCE => {
                end_children();
                return Ok(128 + 9);
            }
            // It may have ended just now, of which SIGCHLD tells next.
            signal => drop(kill(command, signal)),
        }
    }
}

/// Kills children, and theirs as they become ours, until there are none.
fn end_children() {
    loop {
        for child in children() {
            let _ = kill(child, Signal::SIGKILL);
        }
        match waitpid(None, None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(_) => return,
        }
    }
}

fn children() -> Vec<Pid> {
    let own = std::process::id().to_string();
    let parent_is_us = |pid: &i32| {
        // proc_pid_stat(5): the name stands in brackets and may hold anything; state and parent follow it.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let after = stat.rsplit_once(')').map_or("", |(_, after)| after);
        after.split_ascii_whitespace().nth(1) == Some(own.as_str())
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(parent_is_us).map(Pid::from_raw).collect()
}

/// What is ours to change only in namespaces of our own, which `own` lists. A kernel that lacks one of them shares the host's, which
/// stays as it is.
fn furnish(place: &Place, launch: &Launch, own: &str) -> io::Result<()> {
    let step = |what: &'static str| move |error: Errno| io::Error::other(format!("{what}: {error}"));
    let own = |namespace: &str| own.split(',').any(|name| name == namespace);
    if own(MOUNTS) {
        mount(NOTHING, "/", NOTHING, MsFlags::MS_REC | MsFlags::MS_SLAVE, NOTHING).map_err(step("own mounts"))?;
        if own(PROCESSES) {
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            mount(Some("proc"), "/proc", Some("proc"), flags, NOTHING).map_err(step("mount /proc"))?;
        }
        bind_resolver(place, launch)?;
        for mount in &launch.mounts {
            bind(mount)?;
        }
        keep_bound(place.resolver(), RESOLVER.into());
    } else if !launch.mounts.is_empty() {
        return Err(io::Error::other("this kernel has no mount namespaces, and volumes and added files need one"));
    }
    if own(HOST_NAME) {
        sethostname(&launch.host_name).map_err(step("host name"))?;
    }
    // In the command's own network nobody else is to be protected from it: it may serve port 80 as whoever it is.
    let _ = fs::write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0");
    Ok(())
}

fn bind(asked: &Mount) -> io::Result<()> {
    let failed = |error: Errno| io::Error::other(format!("mount {}: {error}", asked.target));
    let target = Path::new(&asked.target);
    mount(Some(&asked.source), target, NOTHING, MsFlags::MS_BIND, NOTHING).map_err(failed)?;
    if asked.read_only {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(NOTHING, target, NOTHING, flags, NOTHING).map_err(failed)?;
    }
    Ok(())
}

fn bind_resolver(place: &Place, launch: &Launch) -> io::Result<()> {
    let target = Path::new(RESOLVER);
    if launch.resolver.is_empty() || !target.exists() {
        return Ok(());
    }
    fs::write(place.resolver(), &launch.resolver)?;
    mount(Some(&place.resolver()), target, NOTHING, MsFlags::MS_BIND, NOTHING)
        .map_err(|error| io::Error::other(format!("bind {}: {error}", target.display())))
}

/// Binds the file again whenever it is not to be seen at the target any more: when a file is replaced outside, as whoever manages a
/// network does with this one, the kernel takes away what was mounted on it, in every namespace. An overlay would stay, and hide from
/// the command what else the node changes and mounts beside it.
fn keep_bound(file: PathBuf, target: PathBuf) {
    let is_bound = |file: &Path, target: &Path| match (fs::metadata(file), fs::metadata(target)) {
        (Ok(file), Ok(target)) => (file.dev(), file.ino()) == (target.dev(), target.ino()),
        _ => false,
    };
    if !is_bound(&file, &target) {
        // The node's own is to be seen there, or one that the job mounts.
        return;
    }
    thread::spawn(move || {
        // proc_pid_mountinfo(5): urgent data when a mount has come or gone. Opened before the first look, so that none is missed.
        let Ok(mounts) = File::open("/proc/thread-self/mountinfo") else { return };
        loop {
            let bound = is_bound(&file, &target)
                || mount(Some(&file), &target, NOTHING, MsFlags::MS_BIND, NOTHING).is_ok() && is_bound(&file, &target);
            // The kernel tells of it while the file that goes is still in its place, and lets nobody mount on that.
            let patience = if bound { LOOK } else { LOOK_AGAIN };
            if poll(&mut [PollFd::new(mounts.as_fd(), PollFlags::POLLPRI)], patience).is_err() {
                thread::sleep(Duration::from_secs(1));
            }
        }
    });
}

/// Joins the control groups, becomes the user and then the command.
pub(super) fn become_command(place: &Place) -> io::Result<Infallible> {
    let Order { launch, groups, .. } = Order::read(&place.launch())?;
    for group in &groups {
        let file = group.join("cgroup.procs");
        fs::write(&file, "0").map_err(|error| io::Error::other(format!("{}: {error}", file.display())))?;
    }
    // The daemon's own protection is not for its workloads. A kernel without the file has no such protection.
    let _ = fs::write("/proc/self/oom_score_adj", "0");
    let mut command = Command::new(&launch.program);
    command.args(&launch.arguments).env_clear().current_dir(&launch.directory);
    command.envs(launch.environment.iter().filter_map(|variable| variable.split_once('=')));
    if let Some((user, group)) = launch.user {
        command.uid(Uid::from_raw(user).as_raw()).gid(Gid::from_raw(group).as_raw());
        if user != 0 {
            // Programs with a set-user-id bit do not lead back.
            prctl::set_no_new_privs()?;
        }
    }
    let error = command.exec();
    Err(io::Error::new(error.kind(), format!("{}: {error}", launch.program.display())))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use nix::sched::{CloneFlags, unshare};

    use super::*;

    #[test]
    #[ignore = "needs root"]
    fn a_file_that_is_replaced_outside_is_covered_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let (file, target, fresh) = (dir.path().join("ours"), dir.path().join("target"), dir.path().join("fresh"));
        fs::write(&file, "ours").expect("a file");
        fs::write(&target, "the node's").expect("a file");
        let inside = (file, target.clone());
        let (bound, is_bound) = std::sync::mpsc::channel();
        let (replaced, is_replaced) = std::sync::mpsc::channel();
        let instance = thread::spawn(move || {
            let (file, target) = inside;
            unshare(CloneFlags::CLONE_NEWNS).expect("own mounts");
            mount(NOTHING, "/", NOTHING, MsFlags::MS_REC | MsFlags::MS_SLAVE, NOTHING).expect("own mounts");
            mount(Some(&file), &target, NOTHING, MsFlags::MS_BIND, NOTHING).expect("bound");
            keep_bound(file, target.clone());
            bound.send(()).expect("heard");
            for () in is_replaced {
                let deadline = Instant::now() + Duration::from_secs(5);
                while fs::read_to_string(&target).expect("a file") != "ours" {
                    assert!(Instant::now() < deadline, "the node's own is to be seen");
                    thread::sleep(Duration::from_millis(10));
                }
                bound.send(()).expect("heard");
            }
        });
        is_bound.recv().expect("bound");
        for text in ["once", "twice"] {
            fs::write(&fresh, text).expect("a file");
            fs::rename(&fresh, &target).expect("replaced");
            replaced.send(()).expect("heard");
            is_bound.recv().expect("covered again");
            assert_eq!(fs::read_to_string(&target).expect("a file"), text, "outside it is as it was");
        }
        drop(replaced);
        instance.join().expect("no failure");
    }
}
