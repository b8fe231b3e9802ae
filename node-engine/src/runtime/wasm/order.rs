//! What the interpreter is to run, and what it says of the end: files of the instance's directory. The module's environment is in the
//! order, and not the interpreter's own: that would decide which libraries it loads.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::runtime::supervised::Records;

/// Arguments and surroundings of a module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Order {
    /// The first is the module's name.
    pub(super) arguments: Vec<String>,
    /// `NAME=value`.
    pub(super) environment: Vec<String>,
    /// TCP ports to listen at.
    pub(super) ports: Vec<u16>,
    /// What the module sees as `/`; empty: no files at all.
    pub(super) root: PathBuf,
    /// Of linear memory and tables.
    pub(super) memory_mib: Option<u64>,
    /// User and group of the interpreter.
    pub(super) user: (u32, u32),
}

/// The end of a module that was not its own doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    OutOfMemory,
    Failed(String),
}

pub(super) fn module(directory: &Path) -> PathBuf {
    directory.join("module.wasm")
}

pub(super) fn end(directory: &Path) -> PathBuf {
    directory.join("end")
}

impl Order {
    pub(super) fn write(&self, directory: &Path) -> io::Result<()> {
        self.records().write(&directory.join("order"))
    }

    fn records(&self) -> Records {
        let mut records = Records::default();
        let mut put = |name: &str, value: &str| records.put(name, value);
        self.arguments.iter().for_each(|argument| put("argument", argument));
        self.environment.iter().for_each(|variable| put("environment", variable));
        self.ports.iter().for_each(|port| put("port", &port.to_string()));
        put("root", &self.root.to_string_lossy());
        if let Some(memory) = self.memory_mib {
            put("memory_mib", &memory.to_string());
        }
        put("user", &self.user.0.to_string());
        put("group", &self.user.1.to_string());
        records
    }

    pub(super) fn read(directory: &Path) -> io::Result<Self> {
        let mut order = Self::default();
        Records::read(&directory.join("order"), |name, value| order.take(name, value))?;
        Ok(order)
    }

    fn take(&mut self, name: &str, value: &str) -> Option<()> {
        match name {
            "argument" => self.arguments.push(value.into()),
            "environment" => self.environment.push(value.into()),
            "port" => self.ports.push(value.parse().ok()?),
            "root" => self.root = value.into(),
            "memory_mib" => self.memory_mib = Some(value.parse().ok()?),
            "user" => self.user.0 = value.parse().ok()?,
            "group" => self.user.1 = value.parse().ok()?,
            _ => return None,
        }
        Some(())
    }
}

impl End {
    pub(super) fn text(&self) -> String {
        match self {
            Self::OutOfMemory => "memory".into(),
            Self::Failed(reason) => format!("failed {reason}"),
        }
    }

    pub(super) fn read(directory: &Path) -> Option<Self> {
        Self::parse(&fs::read_to_string(end(directory)).ok()?)
    }

    fn parse(text: &str) -> Option<Self> {
        match text.split_once(' ') {
            Some(("failed", reason)) => Some(Self::Failed(reason.to_owned())),
            _ => (text == "memory").then_some(Self::OutOfMemory),
        }
    }
}

/// What is understood of an order, or of an end, is understood again from what is written of it, for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn round_trip(text: &str) {
    let read = |text: &str| {
        let mut order = Order::default();
        Records::parse(text, |name, value| order.take(name, value)).ok().map(|()| order)
    };
    if let Some(order) = read(text) {
        assert_eq!(read(order.records().text()), Some(order));
    }
    if let Some(end) = End::parse(text) {
        assert_eq!(End::parse(&end.text()), Some(end));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_and_an_end_are_read_as_they_were_written() {
        let dir = tempfile::tempdir().expect("a directory");
        let order = Order {
            arguments: vec!["m".into(), String::new(), "a=b\n".into()],
            environment: vec!["A=b=c".into()],
            ports: vec![80, 443],
            root: "/a b".into(),
            memory_mib: Some(7),
            user: (65_534, 1),
        };
        order.write(dir.path()).expect("written");
        assert_eq!(Order::read(dir.path()).expect("read"), order);
        assert_eq!(End::read(dir.path()), None);
        for told in [End::OutOfMemory, End::Failed("trap: of a kind\n".into())] {
            fs::write(end(dir.path()), told.text()).expect("written");
            assert_eq!(End::read(dir.path()), Some(told));
        }
    }
}
