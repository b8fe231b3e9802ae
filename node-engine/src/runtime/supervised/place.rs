//! The files of one supervised instance, from which a restarted daemon tells what became of it:
//!
//! ```text
//! document   the description, as given
//! launch     what the supervisor is to run
//! alive      the supervisor's process id; locked by it for as long as it lives, closed by the kernel when it does not
//! started    there once the command was started
//! exit       exit code, and whether memory ran out; there once the command has ended
//! ```

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::Pid;

/// Code of a command whose end nobody saw: as if killed.
pub(super) const KILLED: i64 = 137;

#[derive(Clone, Debug)]
pub(super) struct Place {
    directory: PathBuf,
}

/// What the files say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// Nothing of it runs, or its supervisor has not been told to start.
    Incomplete,
    Running,
    Ended(Ended),
}

/// A process that is not mistaken for a later one of its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Process {
    pub(super) pid: u32,
    /// In clock ticks since boot.
    started: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) code: i64,
    pub(super) out_of_memory: bool,
}

impl Place {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory }
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(super) fn document(&self) -> PathBuf {
        self.directory.join("document")
    }

    pub(super) fn launch(&self) -> PathBuf {
        self.directory.join("launch")
    }

    pub(super) fn resolver(&self) -> PathBuf {
        self.directory.join("resolv.conf")
    }

    pub(super) fn alive(&self) -> PathBuf {
        self.directory.join("alive")
    }

    /// Claims the place for the calling process, for as long as the result is kept.
    pub(super) fn claim(&self) -> io::Result<Flock<File>> {
        // Emptied by whoever has the lock, and not by one who does not get it.
        let file = File::options().create(true).truncate(false).write(true).mode(0o600).open(self.alive())?;
        let mut claim = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| error)?;
        claim.set_len(0)?;
        claim.write_all(std::process::id().to_string().as_bytes())?;
        Ok(claim)
    }

    /// The supervisor that lives, if one does.
    pub(super) fn supervisor(&self) -> Option<Pid> {
        let file = File::open(self.alive()).ok()?;
        match Flock::lock(file, FlockArg::LockSharedNonblock) {
            Ok(_) => None,
            Err(_) => fs::read_to_string(self.alive()).ok()?.trim().parse().ok().map(Pid::from_raw),
        }
    }

    /// The command's process, in the process namespace of the caller: a child of the supervisor's child.
    pub(super) fn command(&self) -> Option<u32> {
        let init = *children_of(self.supervisor()?.as_raw().cast_unsigned()).first()?;
        children_of(init).first().copied()
    }

    pub(super) fn note_start(&self) -> io::Result<()> {
        write_private(&self.directory.join("started"), b"")
    }

    pub(super) fn started(&self) -> bool {
        self.directory.join("started").exists()
    }

    /// Leaves it as it was before its start.
    pub(super) fn forget_end(&self) -> io::Result<()> {
        fs::remove_file(self.directory.join("started"))?;
        fs::remove_file(self.directory.join("exit")).or_else(|error| match error.kind() {
            // A supervisor that was killed has noted nothing.
            io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        })
    }

    pub(super) fn note_end(&self, ended: Ended) -> io::Result<()> {
        let text = format!("{} {}\n", ended.code, ended.out_of_memory);
        write_private(&self.directory.join("exit"), text.as_bytes())
    }

    /// Reads the files in the order that makes an end meanwhile an end and not a loss.
    pub(super) fn state(&self) -> State {
        let (started, lives) = (self.started(), self.supervisor().is_some());
        match self.end() {
            Some(ended) => State::Ended(ended),
            None if lives && started => State::Running,
            None if started => State::Ended(Ended { code: KILLED, out_of_memory: false }),
            None => State::Incomplete,
        }
    }

    fn end(&self) -> Option<Ended> {
        let text = fs::read_to_string(self.directory.join("exit")).ok()?;
        let (code, out_of_memory) = text.trim().split_once(' ')?;
        Some(Ended { code: code.parse().ok()?, out_of_memory: out_of_memory == "true" })
    }
}

impl Process {
    pub(super) fn of(pid: u32) -> Option<Self> {
        Some(Self { pid, started: stat(pid, STARTED)? })
    }

    pub(super) fn lives(self) -> bool {
        Self::of(self.pid) == Some(self)
    }
}

/// The eldest first. Both stages above a command have one thread that makes processes, their first.
fn children_of(parent: u32) -> Vec<u32> {
    match fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")) {
        Ok(children) => children.split_ascii_whitespace().filter_map(|pid| pid.parse().ok()).collect(),
        // It has gone, or the kernel was built without the file (CONFIG_PROC_CHILDREN).
        Err(_) if Process::of(parent).is_none() => Vec::new(),
        Err(_) => children_among_all(parent),
    }
}

/// By a look at every process. The eldest first, as far as numbers tell.
fn children_among_all(parent: u32) -> Vec<u32> {
    let is_child = |pid: &u32| stat(*pid, PARENT) == Some(u64::from(parent));
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids: Vec<u32> =
        processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).filter(is_child).collect();
    pids.sort_unstable();
    pids
}

/// Behind the name.
const PARENT: usize = 1;
const STARTED: usize = 19;

/// A number of proc_pid_stat(5). The name stands in brackets and may hold anything; the state follows it.
fn stat(pid: u32, field: usize) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after) = stat.rsplit_once(')')?;
    after.split_ascii_whitespace().nth(field)?.parse().ok()
}

/// Whoever reads finds all of it or none, and others may not.
pub(super) fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let fresh = path.with_extension("new");
    let mut file = File::options().create(true).truncate(true).write(true).mode(0o600).open(&fresh)?;
    file.write_all(bytes)?;
    fs::rename(&fresh, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_tell_what_became_of_an_instance() {
        let dir = tempfile::tempdir().expect("a directory");
        let place = Place::new(dir.path().into());
        assert_eq!(place.state(), State::Incomplete);
        let claim = place.claim().expect("claimed");
        assert_eq!(place.supervisor(), Some(Pid::this()));
        assert!(place.claim().is_err(), "one supervisor at a time");
        assert_eq!(place.state(), State::Incomplete, "not started yet");
        place.note_start().expect("noted");
        assert_eq!(place.state(), State::Running);
        drop(claim);
        assert_eq!(place.supervisor(), None);
        assert_eq!(place.state(), State::Ended(Ended { code: KILLED, out_of_memory: false }));
        let ended = Ended { code: 3, out_of_memory: true };
        place.note_end(ended).expect("noted");
        assert_eq!(place.state(), State::Ended(ended));
        place.forget_end().expect("forgotten");
        assert_eq!(place.state(), State::Incomplete);
    }
    #[test]
    fn processes_are_found_and_not_mistaken_for_later_ones() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().expect("a child");
        assert!(children_among_all(std::process::id()).contains(&child.id()));
        let noted = Process::of(child.id()).expect("it runs");
        assert!(noted.lives());
        assert!(!Process { started: noted.started - 1, ..noted }.lives(), "an earlier one of this number");
        child.kill().and_then(|()| child.wait()).expect("killed");
        assert!(!noted.lives());
        assert!(children_of(noted.pid).is_empty());
    }

    #[test]
    fn children_are_the_same_whoever_tells_of_them() {
        let mut shell = std::process::Command::new("sh");
        let shell = shell.args(["-c", "sleep 1000 & sleep 1000 & echo; wait"]).stdout(std::process::Stdio::piped());
        let mut shell = shell.spawn().expect("a shell");
        io::Read::read_exact(&mut shell.stdout.take().expect("its output"), &mut [0]).expect("it has begun both");
        let (told, found) = (children_of(shell.id()), children_among_all(shell.id()));
        for pid in &found {
            let _ = nix::sys::signal::kill(Pid::from_raw(pid.cast_signed()), nix::sys::signal::Signal::SIGKILL);
        }
        shell.wait().expect("it ends");
        assert_eq!((told.len(), &told), (2, &found));
    }
}
