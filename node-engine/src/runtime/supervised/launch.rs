//! What a supervisor is to run, and how it is told: by records, as no part of a command can hold what ends one.

use std::io;
use std::path::{Path, PathBuf};

use super::records::Records;
use crate::model::Mount;

/// A command and the surroundings it runs in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Launch {
    /// Absolute.
    pub program: PathBuf,
    pub arguments: Vec<String>,
    /// `NAME=value`; nothing else is passed on.
    pub environment: Vec<String>,
    pub directory: PathBuf,
    /// User and group; `None`: those of the daemon.
    pub user: Option<(u32, u32)>,
    pub host_name: String,
    /// Made in its own mount namespace, on files or directories that are there.
    pub mounts: Vec<Mount>,
    /// Text of its `/etc/resolv.conf`; empty: the host's.
    pub resolver: String,
}

/// A command, the network namespace to be in, the control groups to join, and where output goes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Order {
    pub(super) launch: Launch,
    pub(super) netns: PathBuf,
    pub(super) groups: Vec<PathBuf>,
    /// Where the kernel counts what it killed for want of memory; empty where it does not.
    pub(super) memory_events: PathBuf,
    pub(super) log: PathBuf,
    pub(super) log_limit: u64,
}

impl Order {
    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        self.records().write(path)
    }

    fn records(&self) -> Records {
        let launch = &self.launch;
        let mut records = Records::default();
        let mut put = |name: &str, value: &str| records.put(name, value);
        let shown = |path: &Path| path.to_string_lossy().into_owned();
        put("program", &shown(&launch.program));
        launch.arguments.iter().for_each(|argument| put("argument", argument));
        launch.environment.iter().for_each(|variable| put("environment", variable));
        put("directory", &shown(&launch.directory));
        if let Some((user, group)) = launch.user {
            put("user", &user.to_string());
            put("group", &group.to_string());
        }
        put("host_name", &launch.host_name);
        for mount in &launch.mounts {
            let kind = if mount.read_only { "ro" } else { "rw" };
            // No path of a description has a control character.
            put("mount", &format!("{kind}\u{1f}{}\u{1f}{}", mount.target, shown(&mount.source)));
        }
        put("resolver", &launch.resolver);
        put("netns", &shown(&self.netns));
        self.groups.iter().for_each(|group| put("control_group", &shown(group)));
        put("memory_events", &shown(&self.memory_events));
        put("log", &shown(&self.log));
        put("log_limit", &self.log_limit.to_string());
        records
    }

    pub(super) fn read(path: &Path) -> io::Result<Self> {
        let mut reading = Reading::default();
        Records::read(path, |name, value| reading.take(name, value))?;
        Ok(reading.order())
    }
}

/// An order of which some records are read.
#[derive(Default)]
struct Reading {
    order: Order,
    user: Option<u32>,
    group: Option<u32>,
}

impl Reading {
    fn take(&mut self, name: &str, value: &str) -> Option<()> {
        let order = &mut self.order;
        let launch = &mut order.launch;
        match name {
            "program" => launch.program = value.into(),
            "argument" => launch.arguments.push(value.into()),
            "environment" => launch.environment.push(value.into()),
            "directory" => launch.directory = value.into(),
            "user" => self.user = Some(value.parse().ok()?),
            "group" => self.group = Some(value.parse().ok()?),
            "host_name" => launch.host_name = value.into(),
            "mount" => launch.mounts.push(mount(value)?),
            "resolver" => launch.resolver = value.into(),
            "netns" => order.netns = value.into(),
            "control_group" => order.groups.push(value.into()),
            "memory_events" => order.memory_events = value.into(),
            "log" => order.log = value.into(),
            "log_limit" => order.log_limit = value.parse().ok()?,
            _ => return None,
        }
        Some(())
    }

    fn order(mut self) -> Order {
        self.order.launch.user = self.user.zip(self.group);
        self.order
    }
}

fn mount(record: &str) -> Option<Mount> {
    let mut parts = record.splitn(3, '\u{1f}');
    let (kind, target, source) = (parts.next()?, parts.next()?, parts.next()?);
    Some(Mount { source: source.into(), target: target.into(), read_only: kind == "ro" })
}

/// What is understood of an order is understood again from what is written of it, for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn round_trip(text: &str) {
    let read = |text: &str| {
        let mut reading = Reading::default();
        Records::parse(text, |name, value| reading.take(name, value)).ok().map(|()| reading.order())
    };
    if let Some(order) = read(text) {
        assert_eq!(read(order.records().text()), Some(order));
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_supervisor_reads_what_the_daemon_wrote() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("launch");
        let launch = Launch {
            program: "/bin/sh".into(),
            arguments: vec!["-c".into(), "echo a=b\n".into(), String::new()],
            environment: vec!["A=b=c".into(), "B=".into()],
            directory: "/".into(),
            user: Some((1, 2)),
            host_name: "instance-0".into(),
            mounts: vec![Mount { source: "/a b".into(), target: "/c".into(), read_only: true }],
            resolver: "nameserver 10.0.0.1\n".into(),
        };
        let order = Order {
            launch,
            netns: "/run/netns/x".into(),
            groups: vec!["/sys/fs/cgroup/a".into()],
            memory_events: "/sys/fs/cgroup/a/memory.events".into(),
            log: "/log".into(),
            log_limit: 7,
        };
        order.write(&path).expect("written");
        assert_eq!(Order::read(&path).expect("read"), order);
        fs::write(&path, "nonsense\0").expect("write");
        assert!(Order::read(&path).is_err());
    }
}
