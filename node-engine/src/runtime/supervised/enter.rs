//! The stage that runs one more command beside one that runs: it joins its control groups and namespaces, becomes its user, and ends
//! with the new command's code.

use std::fs::{self, File};
use std::io::{self, IsTerminal};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Command;

use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::unistd::setsid;

use super::launch::{Launch, Order};
use super::place::Place;

/// Those of the command that runs; its files last, as the others are found by them.
const NAMESPACES: [(&str, CloneFlags); 5] = [
    ("net", CloneFlags::CLONE_NEWNET),
    ("uts", CloneFlags::CLONE_NEWUTS),
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("pid", CloneFlags::CLONE_NEWPID),
    ("mnt", CloneFlags::CLONE_NEWNS),
];

pub(super) fn run(place: &Place, packed: &str) -> io::Result<u8> {
    let words = unpack(packed).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no command was given"))?;
    let (program, arguments) = words.split_first().ok_or_else(|| io::Error::other("no command was given"))?;
    let Order { launch, groups, .. } = Order::read(&place.launch())?;
    let beside = place.command().ok_or_else(|| io::Error::other("the instance does not run any more"))?;
    for group in &groups {
        let file = group.join("cgroup.procs");
        fs::write(&file, "0").map_err(|error| io::Error::other(format!("{}: {error}", file.display())))?;
    }
    // The daemon's own protection is not for its workloads. A kernel without the file has no such protection.
    let _ = fs::write("/proc/self/oom_score_adj", "0");
    let stdin = io::stdin();
    if stdin.is_terminal() {
        setsid()?;
        rustix::process::ioctl_tiocsctty(&stdin)?;
    }
    let mut namespaces = Vec::new();
    for (name, flag) in NAMESPACES {
        let (theirs, own) = (format!("/proc/{beside}/ns/{name}"), format!("/proc/self/ns/{name}"));
        // A kernel that lacks one shares the host's.
        if fs::metadata(&theirs).map(|theirs| theirs.ino()).ok() != fs::metadata(own).map(|own| own.ino()).ok() {
            namespaces.push((File::open(&theirs)?, flag));
        }
    }
    for (namespace, flag) in namespaces {
        setns(namespace, flag)?;
    }
    let status = command(program, arguments, &launch)?.status()?;
    let killed = status.signal().map(|signal| 128 + signal);
    Ok(status.code().or(killed).unwrap_or(255).to_le_bytes()[0])
}

fn command(program: &str, arguments: &[String], launch: &Launch) -> io::Result<Command> {
    let mut command = Command::new(program);
    command.args(arguments).env_clear().current_dir(&launch.directory);
    command.envs(launch.environment.iter().filter_map(|variable| variable.split_once('=')));
    if let Some((user, group)) = launch.user {
        command.uid(user).gid(group);
        if user != 0 {
            // Programs with a set-user-id bit do not lead back.
            prctl::set_no_new_privs()?;
        }
    }
    Ok(command)
}

/// Words as one argument: each behind its length, as words may hold any character.
pub(super) fn pack(words: &[String]) -> String {
    words.iter().map(|word| format!("{}:{word}", word.len())).collect()
}

fn unpack(mut packed: &str) -> Option<Vec<String>> {
    let mut words = Vec::new();
    while !packed.is_empty() {
        let (length, rest) = packed.split_once(':')?;
        let (word, rest) = rest.split_at_checked(length.parse().ok()?)?;
        words.push(word.to_owned());
        packed = rest;
    }
    Some(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_of_any_kind_come_through() {
        let words = ["sh", "-c", "", "3:ä\n\u{1f}:", "x"].map(str::to_owned);
        assert_eq!(unpack(&pack(&words)), Some(words.to_vec()));
        for bad in ["x", "5:abc", ":", "-1:a", "1:ä"] {
            assert_eq!(unpack(bad), None, "{bad:?}");
        }
    }
}
