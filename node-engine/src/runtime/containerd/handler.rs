//! OCI runtimes that containerd's own configuration names. A cluster asks for one by its name.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;

use prost::Message;

use super::api::Any;
use super::api::containers::{RuncOptions, Runtime};
use crate::runtime::RuntimeError;

/// What containerd starts runc with.
pub(super) const SHIM: &str = "io.containerd.runc.v2";
/// Plugins whose configuration lists OCI runtimes: of containerd 1, and of 2.
const LISTS: [&str; 2] = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"];
const LONGEST_NAME: usize = 64;

/// An OCI runtime.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Handler {
    /// As the configuration calls it; empty for the one that is there without any.
    pub name: String,
    /// How containerd starts it.
    pub shim: String,
    /// Its program, where that is not the shim's usual one.
    pub binary: Option<String>,
}

impl Handler {
    /// containerd's usual one.
    pub fn usual() -> Self {
        Self { name: String::new(), shim: SHIM.into(), binary: None }
    }

    pub(super) fn runtime(&self) -> Runtime {
        let options = self.binary.as_ref().map(|binary| Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: RuncOptions { binary_name: binary.clone() }.encode_to_vec(),
        });
        Runtime { name: self.shim.clone(), options }
    }
}

/// Whose containers a runtime looks after: each carries the name of the handler that it was made with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Share {
    /// It makes containers by this handler.
    Of(Handler),
    /// Of a handler that this node does not offer any more. None are made.
    Left(String),
    /// Of all but these. None are made.
    Others(BTreeSet<String>),
}

impl Share {
    pub(super) fn has(&self, handler: &str) -> bool {
        match self {
            Self::Of(own) => own.name == handler,
            Self::Left(name) => name == handler,
            Self::Others(known) => !known.contains(handler),
        }
    }

    /// What makes containers.
    pub(super) fn handler(&self) -> Result<&Handler, RuntimeError> {
        match self {
            Self::Of(handler) => Ok(handler),
            Self::Left(_) | Self::Others(_) => {
                let reason = "this node does not offer it any more: it looks after what was made, and makes none";
                Err(RuntimeError::Refused { what: "OCI runtime of containerd", reason: reason.into() })
            }
        }
    }
}

impl From<Handler> for Share {
    fn from(handler: Handler) -> Self {
        Self::Of(handler)
    }
}

/// Those that have made containers here, by name, whatever the configuration says by now.
pub fn noted(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.retain(|name| is_name(name));
    names.sort();
    names
}

/// Before its first container: its containers are found again also when it is configured no longer.
pub(super) fn note(directory: &Path, name: &str) -> io::Result<()> {
    let path = directory.join(name);
    // The usual one has no name, and needs none to be found.
    if name.is_empty() || path.exists() {
        return Ok(());
    }
    fs::create_dir_all(directory)?;
    fs::write(path, "")
}

/// Those of this configuration; none where it cannot be read.
pub fn configured(file: &Path) -> Vec<Handler> {
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) => {
            tracing::debug!(file = %file.display(), %error, "containerd's configuration names no OCI runtimes");
            return Vec::new();
        }
    };
    match text.parse::<toml::Table>() {
        Ok(table) => listed(&table),
        Err(error) => {
            tracing::warn!(file = %file.display(), %error, "containerd's configuration cannot be read");
            Vec::new()
        }
    }
}

fn listed(table: &toml::Table) -> Vec<Handler> {
    let runtimes = |plugin: &str| table.get("plugins")?.get(plugin)?.get("containerd")?.get("runtimes")?.as_table();
    let mut handlers: Vec<Handler> = LISTS
        .iter()
        .filter_map(|plugin| runtimes(plugin))
        .flatten()
        .filter_map(|(name, one)| handler(name, one))
        .collect();
    handlers.sort_by(|one, other| one.name.cmp(&other.name));
    handlers.dedup_by(|one, other| one.name == other.name);
    handlers
}

fn handler(name: &str, entry: &toml::Value) -> Option<Handler> {
    if !is_name(name) {
        return None;
    }
    let shim = entry.get("runtime_type").and_then(toml::Value::as_str).filter(|shim| !shim.is_empty()).unwrap_or(SHIM);
    let binary = entry.get("options").and_then(|options| options.get("BinaryName")).and_then(toml::Value::as_str);
    let binary = binary.filter(|binary| !binary.is_empty()).map(str::to_owned);
    Some(Handler { name: name.to_owned(), shim: shim.to_owned(), binary })
}

/// Also of a file.
fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    name.len() <= LONGEST_NAME && name.bytes().all(plain) && !name.trim_matches('.').is_empty()
}

/// A configuration of containerd, for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn understand(text: &str) {
    if let Ok(table) = text.parse::<toml::Table>() {
        assert!(listed(&table).iter().all(|one| !one.name.is_empty() && !one.shim.is_empty()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runtimes_are_listed_in_both_versions() {
        let crun = Handler { name: "crun".into(), shim: SHIM.into(), binary: Some("/usr/bin/crun".into()) };
        let kata = Handler { name: "kata".into(), shim: "io.containerd.kata.v2".into(), binary: None };
        for plugin in LISTS {
            let text = format!(
                "version = 2\n[plugins.\"{plugin}\".containerd.runtimes.kata]\nruntime_type = \"io.containerd.kata.v2\"\n\
                 [plugins.\"{plugin}\".containerd.runtimes.crun.options]\nBinaryName = \"/usr/bin/crun\"\n\
                 [plugins.\"{plugin}\".containerd.runtimes.\"no name\"]\n"
            );
            let table = text.parse().expect("a table");
            assert_eq!(listed(&table), [crun.clone(), kata.clone()], "{plugin}");
        }
        assert_eq!(listed(&"version = 2\nplugins = 3".parse().expect("a table")), []);
        assert_eq!(configured(Path::new("/nowhere/config.toml")), []);
    }

    #[test]
    fn each_container_is_looked_after_by_one() {
        let crun = Handler { name: "crun".into(), ..Handler::usual() };
        let shares = [
            Share::Of(Handler::usual()),
            Share::Of(crun),
            Share::Left("kata".into()),
            Share::Others(["", "crun", "kata"].map(String::from).into()),
        ];
        for (label, owner) in [("", 0), ("crun", 1), ("kata", 2), ("gone", 3)] {
            let owners: Vec<_> = (0..shares.len()).filter(|number| shares[*number].has(label)).collect();
            assert_eq!(owners, [owner], "{label:?}");
        }
        assert!(shares[1].handler().is_ok() && shares[2].handler().is_err() && shares[3].handler().is_err());
    }

    #[test]
    fn who_has_made_containers_is_known_afterwards() {
        let dir = tempfile::tempdir().expect("a directory");
        let directory = dir.path().join("handlers");
        assert_eq!(noted(&directory), [] as [&str; 0]);
        for name in ["kata", "", "crun", "kata"] {
            note(&directory, name).expect("noted");
        }
        assert_eq!(noted(&directory), ["crun", "kata"]);
    }

    #[test]
    fn a_program_of_its_own_is_an_option() {
        assert_eq!(Handler::usual().runtime().options, None);
        let crun = Handler { binary: Some("crun".into()), ..Handler::usual() };
        // Field six, four bytes.
        assert_eq!(crun.runtime().options.expect("options").value, b"\x32\x04crun");
    }
}
