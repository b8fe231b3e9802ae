//! The process that stays with a command from before its start to its end, so that no daemon has to. It is the daemon's own binary,
//! run again, in three stages:
//!
//! ```text
//! supervisor  on the host: keeps the output, notes the end           claims the place
//!   └ init    first process of the new namespaces: collects orphans  dies with its supervisor
//!       └ the command, after it has joined its control groups and become its user
//! ```
//!
//! `prepare` brings up the first two; the command waits for a word on the supervisor's standard input. A daemon that dies before it
//! says it takes both with it.

use std::fs;
use std::io::{self, BufRead, BufReader, PipeReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, setsid};

use super::launch::Order;
use super::place::{Ended, KILLED, Place};
use super::{enter, init};
use crate::runtime::cgroup;
use crate::runtime::output::Rotating;

/// What the stages say to each other.
pub(super) const READY: &str = "ready";
pub(super) const GO: &str = "go";
/// Asks for the command's end, as anybody would.
pub(super) const ASK: Signal = Signal::SIGTERM;
/// Ends it and all its children.
pub(super) const FORCE: Signal = Signal::SIGINT;

/// Namespaces that the inner stages must know of.
pub(super) const MOUNTS: &str = "mount";
pub(super) const HOST_NAME: &str = "uts";
pub(super) const PROCESSES: &str = "pid";

/// The binary that runs, also after the file was replaced.
pub(super) const OWN: &str = "/proc/self/exe";
/// Output that is still in the pipe when the command has ended.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// A stage of supervision: `supervisor`, `init` or `command`; or `enter`, for one more command beside it. `own` lists the namespaces that
/// `init` does not share with the host, and for `enter` the words of the command.
pub fn run(stage: &str, directory: &Path, own: &str) -> ExitCode {
    let place = Place::new(directory.to_owned());
    let done = match stage {
        "supervisor" => supervise(&place),
        "init" => init::run(&place, own),
        "command" => init::become_command(&place).map(|never| match never {}),
        "enter" => enter::run(&place, own),
        other => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{other:?} is no stage"))),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            // To the supervisor's reader, or into the command's log. With nobody there the exit code has to do.
            let _ = writeln!(io::stderr(), "{error}");
            ExitCode::from(if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 })
        }
    }
}

fn supervise(place: &Place) -> io::Result<u8> {
    match prepare(place) {
        Ok((init, stream, log)) => {
            say(READY)?;
            attend(place, init, stream, &log)
        }
        Err(error) => {
            say(&format!("failed: {error}"))?;
            Ok(1)
        }
    }
}

/// Everything up to the command.
fn prepare(place: &Place) -> io::Result<(Pid, UnixStream, Supervised)> {
    // Whoever leads a session is no target of the daemon's terminal. It fails only for one who leads already.
    let _ = setsid();
    let mut signals = SigSet::empty();
    for signal in [ASK, FORCE, Signal::SIGCHLD] {
        signals.add(signal);
    }
    signals.thread_block()?;
    let claim = place.claim()?;
    let order = Order::read(&place.launch())?;
    let log = Rotating::open(&order.log, order.log_limit)
        .map_err(|error| io::Error::new(error.kind(), format!("log {}: {error}", order.log.display())))?;
    let (output, input) = io::pipe()?;
    // Before the process namespace changes: a thread cannot be made across the border.
    let (ended, silent) = mpsc::channel::<()>();
    thread::spawn(move || {
        keep(output, log);
        drop(ended);
    });
    let own = enter(&order.netns)?;
    let (stream, its) = UnixStream::pair()?;
    let mut init = Command::new(OWN);
    init.args(["supervise", "init"]).arg(place.directory()).arg(own.join(",")).env_clear();
    init.stdin(OwnedFd::from(its)).stdout(input.try_clone()?).stderr(input);
    let child = init.spawn()?;
    drop(init);
    let pid = Pid::from_raw(child.id().cast_signed());
    let mut said = String::new();
    BufReader::new(stream.try_clone()?).read_line(&mut said)?;
    if said.trim() != READY {
        let _ = kill(pid, Signal::SIGKILL);
        return Err(io::Error::other(format!("its first process: {}", said.trim())));
    }
    // An earlier run of it may have had its own.
    let kills_before = cgroup::out_of_memory_kills(&order.memory_events);
    let memory_events = order.memory_events;
    Ok((pid, stream, Supervised { signals, silent, memory_events, kills_before, _claim: claim }))
}

struct Supervised {
    signals: SigSet,
    /// Closed when the output has ended.
    silent: mpsc::Receiver<()>,
    memory_events: PathBuf,
    kills_before: u64,
    _claim: nix::fcntl::Flock<fs::File>,
}

/// A network namespace there always is; of the others those that this kernel has, which are returned.
fn enter(netns: &Path) -> io::Result<Vec<&'static str>> {
    let file =
        fs::File::open(netns).map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", netns.display())))?;
    setns(&file, CloneFlags::CLONE_NEWNET)?;
    let mut own = Vec::new();
    for (name, namespace) in [
        (MOUNTS, CloneFlags::CLONE_NEWNS),
        (HOST_NAME, CloneFlags::CLONE_NEWUTS),
        ("ipc", CloneFlags::CLONE_NEWIPC),
        (PROCESSES, CloneFlags::CLONE_NEWPID),
    ] {
        match unshare(namespace) {
            Ok(()) => own.push(name),
            Err(Errno::EINVAL) => {}
            Err(error) => return Err(io::Error::other(format!("a new namespace ({name}): {error}"))),
        }
    }
    Ok(own)
}

/// Waits for the word to start, then for the end.
fn attend(place: &Place, init: Pid, mut stream: UnixStream, supervised: &Supervised) -> io::Result<u8> {
    let mut word = String::new();
    io::stdin().read_line(&mut word)?;
    if word.trim() != GO {
        // Whoever prepared this has gone, or does not want it.
        kill(init, Signal::SIGKILL)?;
        let _ = waitpid(init, None);
        return Ok(0);
    }
    place.note_start()?;
    stream.write_all(format!("{GO}\n").as_bytes())?;
    say(GO)?;
    let code = loop {
        match supervised.signals.wait()? {
            Signal::SIGCHLD => match waitpid(init, Some(WaitPidFlag::WNOHANG))? {
                WaitStatus::Exited(_, code) => break i64::from(code),
                WaitStatus::Signaled(..) => break KILLED,
                _ => {}
            },
            // It may have ended just now, of which SIGCHLD tells next.
            signal => drop(kill(init, signal)),
        }
    };
    // An orphan that holds the pipe must not hold up the end.
    let _ = supervised.silent.recv_timeout(LAST_WORDS);
    let out_of_memory = code != 0 && cgroup::out_of_memory_kills(&supervised.memory_events) > supervised.kills_before;
    place.note_end(Ended { code, out_of_memory })?;
    Ok(0)
}

/// Output must flow also where it cannot be kept: a command must not hang because a disk is full.
fn keep(mut output: PipeReader, mut log: Rotating) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(length @ 1..) = output.read(&mut buffer) {
        let _ = log.write(&buffer[..length]);
    }
}

/// To the daemon, which may have gone.
fn say(word: &str) -> io::Result<()> {
    match writeln!(io::stdout(), "{word}").and_then(|()| io::stdout().flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}
