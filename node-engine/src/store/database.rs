//! redb's one address: tables of text, changed in one durable transaction at a time.
//!
//! A commit is in two phases, so that a power cut between them leaves the state before. A file that somebody else has changed is found
//! when it is opened, where every page is checked; whatever redb then does, a panic included, comes out as [`Fault::Corrupt`].

use std::collections::BTreeMap;
use std::fs::{OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use redb::{Durability, ReadableDatabase, ReadableTable, TableDefinition, TableError};

/// Pages kept in memory. Everything is read once, at the start.
const CACHE: usize = 256 << 10;

/// The tables of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Table {
    /// Instance → what shall become of it.
    Instances,
    /// Instance → its addresses on this node.
    Addresses,
    /// Service → the last answer of the cluster's table.
    Services,
    /// What the others are: see `book`.
    About,
}

impl Table {
    pub(super) const ALL: [Self; 4] = [Self::Instances, Self::Addresses, Self::Services, Self::About];

    fn definition(self) -> TableDefinition<'static, &'static str, &'static str> {
        TableDefinition::new(match self {
            Self::Instances => "instances 1",
            Self::Addresses => "addresses 1",
            Self::Services => "services 1",
            Self::About => "about 1",
        })
    }
}

/// One row as it shall be; without a text it shall not be there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Put {
    pub(super) table: Table,
    pub(super) key: String,
    pub(super) text: Option<String>,
}

pub(super) type Contents = BTreeMap<Table, BTreeMap<String, String>>;

#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    /// The disk does not do as it is told; it may at another time.
    #[error("{0}")]
    Io(String),
    /// Some of the disk's blocks cannot be read or written: now, or for good.
    #[error("{0}")]
    Lost(String),
    /// What is in the file is not what was written.
    #[error("{0}")]
    Corrupt(String),
}

#[derive(Debug)]
pub(super) struct Database(redb::Database);

impl Database {
    /// Opens the file, or makes an empty one, and reads all of it. Nobody else may: descriptions have secrets.
    pub(super) fn open(path: &Path) -> Result<(Self, Contents), Fault> {
        Self::opened(|builder| {
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
            // One of an earlier version's.
            file.set_permissions(Permissions::from_mode(0o600))?;
            builder.create_with_backend(redb::backends::FileBackend::new(file)?)
        })
    }

    #[cfg(test)]
    fn on(disk: impl redb::StorageBackend) -> Result<(Self, Contents), Fault> {
        Self::opened(|builder| builder.create_with_backend(disk))
    }

    fn opened(
        open: impl FnOnce(&redb::Builder) -> Result<redb::Database, redb::DatabaseError>,
    ) -> Result<(Self, Contents), Fault> {
        contained(|| {
            let mut builder = redb::Database::builder();
            builder.set_cache_size(CACHE).set_check_integrity_on_open(true);
            let database = open(&builder).map_err(fault)?;
            let contents = read(&database)?;
            Ok((Self(database), contents))
        })
    }

    /// All rows or none, and on the disk when it returns. After an error the database is of no more use: open it anew.
    pub(super) fn commit(&mut self, puts: &[Put]) -> Result<(), Fault> {
        contained(|| self.write(false, puts))
    }

    /// The same for a file that may hold anything: afterwards it holds these rows alone.
    pub(super) fn replace(&mut self, puts: &[Put]) -> Result<(), Fault> {
        contained(|| self.write(true, puts))
    }

    fn write(&self, alone: bool, puts: &[Put]) -> Result<(), Fault> {
        let mut transaction = self.0.begin_write().map_err(fault)?;
        transaction.set_durability(Durability::Immediate).map_err(|error| Fault::Io(error.to_string()))?;
        transaction.set_two_phase_commit(true);
        for table in Table::ALL {
            if alone {
                transaction.delete_table(table.definition()).map_err(fault)?;
            }
            let mut rows = transaction.open_table(table.definition()).map_err(fault)?;
            for put in puts.iter().filter(|put| put.table == table) {
                match &put.text {
                    Some(text) => rows.insert(put.key.as_str(), text.as_str()).map_err(fault)?,
                    None => rows.remove(put.key.as_str()).map_err(fault)?,
                };
            }
        }
        transaction.commit().map_err(fault)
    }
}

fn read(database: &redb::Database) -> Result<Contents, Fault> {
    let transaction = database.begin_read().map_err(fault)?;
    let mut contents = Contents::new();
    for table in Table::ALL {
        let rows = match transaction.open_table(table.definition()) {
            Ok(rows) => rows,
            Err(TableError::TableDoesNotExist(_)) => continue,
            Err(error) => return Err(fault(error)),
        };
        let mut read = BTreeMap::new();
        for row in rows.iter().map_err(fault)? {
            let (key, text) = row.map_err(fault)?;
            read.insert(key.value().to_owned(), text.value().to_owned());
        }
        contents.insert(table, read);
    }
    Ok(contents)
}

/// Damage that redb did not expect is a panic of its.
fn contained<T>(work: impl FnOnce() -> Result<T, Fault>) -> Result<T, Fault> {
    // What the panic leaves behind is dropped unseen.
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        Err(Fault::Corrupt(text.unwrap_or_else(|| "the database panicked".into())))
    })
}

fn fault(error: impl Into<redb::Error>) -> Fault {
    match error.into() {
        redb::Error::Io(error) if error.raw_os_error() == Some(libc::EIO) => Fault::Lost(error.to_string()),
        // A directory in its place, or less of it than there was.
        redb::Error::Io(error) if damaged(error.kind()) => Fault::Corrupt(error.to_string()),
        redb::Error::Io(error) => Fault::Io(error.to_string()),
        redb::Error::DatabaseAlreadyOpen => Fault::Io("another process has it open".into()),
        redb::Error::PreviousIo => Fault::Io("an earlier write has failed".into()),
        error => Fault::Corrupt(error.to_string()),
    }
}

fn damaged(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof | io::ErrorKind::IsADirectory)
}

#[cfg(test)]
mod tests;
