//! Who this node is to its cluster, and which subnet belongs to which node id.
//!
//! One JSON file, replaced as a whole: written beside, synced, renamed, directory synced. A crash leaves the old file or the new one.
//! What cannot be read is moved aside, never deleted and never a reason not to start: the cluster gives all of it again.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::model::{NodeId, Subnet};

/// The format this program writes, and the newest it reads.
const FORMAT: u32 = 1;
/// A state file is some hundred bytes; nothing larger than this is one.
const LARGEST: u64 = 1 << 20;
/// Subnets kept of other node ids (of clusters that this node belonged to).
const MOST_SUBNETS: usize = 64;

/// The open state file. Writing blocks until the disk has it.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
    state: State,
}

/// What is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub identity: Option<Identity>,
    pub subnets: BTreeMap<String, Subnet>,
}

/// Who this node is, and to whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Host of the cluster manager as it was configured.
    pub cluster: String,
    pub node: NodeId,
}

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{step} {path}: {source}")]
    Io { step: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "{path} was written by a newer node-engine (format {found}, this one reads up to {FORMAT}): install that version again, or move the file away"
    )]
    Newer { path: PathBuf, found: u32 },
}

impl Store {
    /// Reads the state in `dir`, which is made where it is missing. Returns, too, where a corrupt file was moved.
    ///
    /// # Errors
    /// If the directory cannot be used, or the file was written by a newer version.
    pub fn open(dir: &Path) -> Result<(Self, Option<PathBuf>), StoreError> {
        fs::create_dir_all(dir).map_err(io("make", dir))?;
        let path = dir.join("state.json");
        let mut store = Self { dir: dir.to_owned(), state: State::default() };
        match read(&path)? {
            Content::Absent => Ok((store, None)),
            Content::State(state) => {
                store.state = state;
                Ok((store, None))
            }
            Content::Newer(found) => Err(StoreError::Newer { path, found }),
            Content::Corrupt => {
                let aside = super::free_name_aside(&path);
                fs::rename(&path, &aside).map_err(io("move aside", &path))?;
                Ok((store, Some(aside)))
            }
        }
    }

    /// What [`Self::open`] would make of what is in `dir`, in words. Changes nothing.
    ///
    /// # Errors
    /// As for that.
    pub fn look(dir: &Path) -> Result<&'static str, StoreError> {
        let path = dir.join("state.json");
        match read(&path)? {
            Content::Absent => Ok("nothing is kept yet"),
            Content::State(_) => Ok("as this version writes it"),
            Content::Corrupt => Ok("damaged: it will be kept aside, and made again"),
            Content::Newer(found) => Err(StoreError::Newer { path, found }),
        }
    }

    pub fn state(&self) -> &State {
        &self.state
    }

    /// The id and subnet that this node has in the cluster, if that is still `cluster`.
    pub fn assigned_in(&self, cluster: &str) -> Option<(NodeId, Subnet)> {
        let identity = self.state.identity.as_ref().filter(|identity| identity.cluster == cluster)?;
        let subnet = self.state.subnets.get(identity.node.as_str()).copied()?;
        Some((identity.node.clone(), subnet))
    }

    /// Keeps who the node is.
    ///
    /// # Errors
    /// If it cannot be written; what was kept before is kept still.
    pub fn keep_identity(&mut self, identity: Identity) -> Result<(), StoreError> {
        self.change(|state| state.identity = Some(identity))
    }

    /// Keeps the subnet that was assigned to this node under this id.
    ///
    /// # Errors
    /// If it cannot be written; what was kept before is kept still.
    pub fn keep_subnet(&mut self, node: &NodeId, subnet: Subnet) -> Result<(), StoreError> {
        self.change(|state| {
            state.subnets.insert(node.to_string(), subnet);
            while state.subnets.len() > MOST_SUBNETS {
                let Some(other) = state.subnets.keys().find(|other| *other != node.as_str()).cloned() else { return };
                state.subnets.remove(&other);
            }
        })
    }

    fn change(&mut self, change: impl FnOnce(&mut State)) -> Result<(), StoreError> {
        let mut next = self.state.clone();
        change(&mut next);
        if next != self.state {
            write(&self.dir, &next)?;
            self.state = next;
        }
        Ok(())
    }
}

enum Content {
    Absent,
    State(State),
    Newer(u32),
    Corrupt,
}

fn read(path: &Path) -> Result<Content, StoreError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Content::Absent),
        Err(error) => return Err(io("open", path)(error)),
    };
    let mut bytes = Vec::new();
    match file.take(LARGEST + 1).read_to_end(&mut bytes) {
        Ok(_) => Ok(parse(&bytes)),
        // A directory in its place, or a block that the disk cannot read any more.
        Err(error) if error.kind() == io::ErrorKind::IsADirectory || error.raw_os_error() == Some(libc::EIO) => {
            Ok(Content::Corrupt)
        }
        Err(error) => Err(io("read", path)(error)),
    }
}

fn parse(bytes: &[u8]) -> Content {
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    if bytes.len() as u64 > LARGEST {
        return Content::Corrupt;
    }
    match serde_json::from_slice::<Format>(bytes) {
        Ok(Format { format }) if format > FORMAT => return Content::Newer(format),
        Ok(_) => {}
        Err(_) => return Content::Corrupt,
    }
    let Ok(written) = serde_json::from_slice::<Written>(bytes) else { return Content::Corrupt };
    State::try_from(written).map_or(Content::Corrupt, Content::State)
}

fn write(dir: &Path, state: &State) -> Result<(), StoreError> {
    let (path, beside) = (dir.join("state.json"), dir.join("state.json.new"));
    let text = serde_json::to_vec_pretty(&Written::from(state)).map_err(|error| io("encode", &path)(error.into()))?;
    let mut file = File::create(&beside).map_err(io("create", &beside))?;
    file.write_all(&text).and_then(|()| file.sync_all()).map_err(io("write", &beside))?;
    fs::rename(&beside, &path).map_err(io("replace", &path))?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io("sync", dir))
}

fn io<'a>(step: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> StoreError + 'a {
    move |source| StoreError::Io { step, path: path.to_owned(), source }
}

/// The file.
#[derive(Serialize, Deserialize)]
struct Written {
    format: u32,
    identity: Option<WrittenIdentity>,
    #[serde(default)]
    subnets: BTreeMap<String, WrittenSubnet>,
}

#[derive(Serialize, Deserialize)]
struct WrittenIdentity {
    cluster: String,
    node: String,
}

#[derive(Serialize, Deserialize)]
struct WrittenSubnet {
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

impl From<&State> for Written {
    fn from(state: &State) -> Self {
        let identity = state.identity.as_ref();
        Self {
            format: FORMAT,
            identity: identity
                .map(|identity| WrittenIdentity { cluster: identity.cluster.clone(), node: identity.node.to_string() }),
            subnets: state
                .subnets
                .iter()
                .map(|(node, subnet)| (node.clone(), WrittenSubnet { v4: subnet.v4, v6: subnet.v6 }))
                .collect(),
        }
    }
}

impl TryFrom<Written> for State {
    type Error = crate::model::node::InvalidNodeId;

    fn try_from(written: Written) -> Result<Self, Self::Error> {
        let identity = match written.identity {
            Some(WrittenIdentity { cluster, node }) => Some(Identity { cluster, node: node.parse()? }),
            None => None,
        };
        let subnets = written.subnets.into_iter().map(|(node, WrittenSubnet { v4, v6 })| (node, Subnet { v4, v6 }));
        Ok(Self { identity, subnets: subnets.collect() })
    }
}

/// What is understood of a state file is understood again from what is written of it, for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn round_trip(bytes: &[u8]) {
    if let Content::State(state) = parse(bytes) {
        let written = serde_json::to_vec(&Written::from(&state)).expect("texts and numbers always serialise");
        assert!(matches!(parse(&written), Content::State(again) if again == state));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn node(text: &str) -> NodeId {
        text.parse().unwrap()
    }

    fn identity(text: &str) -> Identity {
        Identity { cluster: "cluster.example".into(), node: node(text) }
    }

    fn subnet(last: u8) -> Subnet {
        Subnet { v4: Ipv4Addr::new(10, 18, 0, last), v6: Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, u16::from(last), 0) }
    }

    #[test]
    fn what_is_kept_is_there_again() {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = Store::open(dir.path()).unwrap();
        assert_eq!(store.assigned_in("cluster.example"), None);
        store.keep_identity(identity("6b03")).unwrap();
        store.keep_subnet(&node("6b03"), subnet(64)).unwrap();
        let kept = store.state().clone();

        let (store, aside) = Store::open(dir.path()).unwrap();
        assert_eq!((store.state(), aside), (&kept, None));
        assert_eq!(store.assigned_in("cluster.example"), Some((node("6b03"), subnet(64))));
        assert_eq!(store.assigned_in("another.example"), None);
        assert_eq!(files(dir.path()), ["state.json"]);
    }

    #[test]
    fn a_new_node_id_does_not_have_the_old_ones_subnet() {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = Store::open(dir.path()).unwrap();
        store.keep_identity(identity("first")).unwrap();
        store.keep_subnet(&node("first"), subnet(64)).unwrap();
        store.keep_identity(identity("second")).unwrap();
        assert_eq!(store.assigned_in("cluster.example"), None);
        store.keep_identity(identity("first")).unwrap();
        assert_eq!(store.assigned_in("cluster.example"), Some((node("first"), subnet(64))));
    }

    #[test]
    fn ids_that_came_and_went_do_not_fill_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = Store::open(dir.path()).unwrap();
        for number in 0..MOST_SUBNETS + 10 {
            let name = format!("node{number}");
            store.keep_identity(identity(&name)).unwrap();
            store.keep_subnet(&node(&name), subnet(64)).unwrap();
            assert_eq!(store.assigned_in("cluster.example"), Some((node(&name), subnet(64))));
        }
        assert_eq!(store.state().subnets.len(), MOST_SUBNETS);
    }

    #[test]
    fn corrupt_files_are_moved_aside_and_the_start_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        let bad_id = br#"{"format":1,"identity":{"cluster":"c","node":"../../etc"}}"#;
        let corrupt: [&[u8]; 5] = [b"", b"{", b"[]", b"\xff\xfe", bad_id];
        for (index, content) in corrupt.into_iter().enumerate() {
            fs::write(&path, content).unwrap();
            let (store, aside) = Store::open(dir.path()).unwrap();
            assert_eq!(store.state(), &State::default());
            let aside = aside.unwrap();
            assert_eq!(aside, dir.path().join(format!("state.json.corrupt-{}", index + 1)));
            assert_eq!(fs::read(aside).unwrap(), content);
        }
        for _ in 0..20 {
            fs::write(&path, b"{").unwrap();
            Store::open(dir.path()).unwrap();
        }
        assert_eq!(files(dir.path()).len(), super::super::MOST_ASIDE as usize);
    }

    #[test]
    fn a_newer_format_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        fs::write(&path, br#"{"format":2,"identity":[]}"#).unwrap();
        assert!(matches!(Store::look(dir.path()), Err(StoreError::Newer { found: 2, .. })));
        let error = Store::open(dir.path()).unwrap_err();
        assert!(matches!(error, StoreError::Newer { found: 2, .. }), "{error}");
        assert_eq!(fs::read(&path).unwrap(), br#"{"format":2,"identity":[]}"#);
    }

    #[test]
    fn a_write_cut_short_leaves_the_old_state() {
        let dir = tempfile::tempdir().unwrap();
        let (mut store, _) = Store::open(dir.path()).unwrap();
        store.keep_identity(identity("6b03")).unwrap();
        fs::write(dir.path().join("state.json.new"), b"{\"format\":1,\"iden").unwrap();
        let (mut again, aside) = Store::open(dir.path()).unwrap();
        assert_eq!((again.state(), aside), (store.state(), None));
        again.keep_subnet(&node("6b03"), subnet(128)).unwrap();
        assert_eq!(files(dir.path()), ["state.json"]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]
        #[test]
        fn damage_never_panics_and_never_prevents_a_start(
            cuts in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            length in any::<prop::sample::Index>(),
            truncate in any::<bool>(),
        ) {
            let dir = tempfile::tempdir().unwrap();
            let (mut store, _) = Store::open(dir.path()).unwrap();
            store.keep_identity(identity("6b034ec446528056c08b89ae")).unwrap();
            store.keep_subnet(&node("6b034ec446528056c08b89ae"), subnet(64)).unwrap();
            let path = dir.path().join("state.json");
            let mut bytes = fs::read(&path).unwrap();
            for (at, value) in &cuts {
                let at = at.index(bytes.len());
                bytes[at] = *value;
            }
            if truncate {
                bytes.truncate(length.index(bytes.len()));
            }
            fs::write(&path, &bytes).unwrap();
            match Store::open(dir.path()) {
                Ok((_, Some(aside))) => prop_assert_eq!(fs::read(aside).unwrap(), bytes),
                Ok((mut store, None)) => store.keep_identity(identity("other")).unwrap(),
                Err(error) => prop_assert!(matches!(error, StoreError::Newer { .. }), "{}", error),
            }
        }
    }

    fn files(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}
