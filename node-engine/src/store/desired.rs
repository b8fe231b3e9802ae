//! What is to run here, on the disk. Commands are committed in groups: all that wait are one transaction.
//!
//! Memory leads: what the disk did not take although it has happened (an end, a deletion, an answer of the table) stays in memory and
//! is tried again; what has not happened yet (a deployment) is refused. A file that has gone bad meanwhile is kept aside and written
//! anew from memory.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::book::{Book, Order, Verdict};
use super::database::{Contents, Database, Fault, Put};
use super::free_name_aside;
use super::record::Record;
use crate::fault;
use crate::model::{Addresses, InstanceId, ServiceName, Status, TableAnswer};

const FILE: &str = "desired.redb";

/// What happened on this node, to be kept.
#[derive(Clone, Debug, PartialEq)]
pub enum Fact {
    /// The instance of this deployment has ended for good.
    Ended { instance: InstanceId, sequence: u64, status: Status, detail: String },
    /// It runs, and nothing was known of it.
    Found { instance: InstanceId, document: Arc<str> },
    /// It was found, and has been deleted since.
    FoundNoMore(InstanceId),
    /// All that ran has been found.
    LookedAround,
    /// These are all the addresses of instances here.
    Addresses(BTreeMap<InstanceId, Addresses>),
    /// What the cluster's table says of a service; `None`: nobody here wants to know any more.
    Service(ServiceName, Option<TableAnswer>),
}

/// Deletions that are remembered while the disk cannot be read; more than a node has instances.
const MOST_GONE: usize = 4096;
/// How long blocks that hold what is wanted are tried again before they count as lost, with what was in them.
const PATIENCE: Duration = Duration::from_secs(20);

/// The open database. Its methods block until the disk has what they were given.
#[derive(Debug)]
pub struct Desired {
    path: PathBuf,
    database: Option<Database>,
    book: Book,
    /// The disk lacks something that is in memory.
    behind: Option<String>,
    /// What is on the disk could not be read so far; these were deleted meanwhile.
    unread: Option<BTreeSet<InstanceId>>,
    /// Since when some of its blocks cannot be.
    unreadable: Option<Instant>,
    aside: Option<PathBuf>,
}

impl Desired {
    /// Opens what is kept in `dir`. Always comes back: where nothing can be read it is empty, and not [`complete`](Self::complete).
    pub fn open(dir: &Path) -> Self {
        let (path, book) = (dir.join(FILE), Book::default());
        let unread = Some(BTreeSet::new());
        let mut desired = Self { path, database: None, book, behind: None, unread, unreadable: None, aside: None };
        match Database::open(&desired.path) {
            Ok((database, contents)) => {
                desired.read(&contents);
                desired.database = Some(database);
            }
            Err(fault) => desired.give_up(fault),
        }
        desired.retry();
        desired
    }

    /// Removes what is kept in `dir`, damaged files excepted. Nothing there is a success.
    ///
    /// # Errors
    /// If the file cannot be removed.
    pub fn forget(dir: &Path) -> std::io::Result<()> {
        match std::fs::remove_file(dir.join(FILE)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Everything that is wanted is known: what runs here and is not among it is not wanted.
    pub fn complete(&self) -> bool {
        self.book.complete
    }

    /// Where a damaged file was moved, if one was.
    pub fn aside(&self) -> Option<&Path> {
        self.aside.as_deref()
    }

    pub fn instances(&self) -> impl Iterator<Item = (&InstanceId, &Record)> {
        self.book.instances.iter()
    }

    /// The addresses that instances here had last.
    pub fn addresses(&self) -> BTreeMap<InstanceId, Addresses> {
        self.book.addresses.clone()
    }

    /// The cluster's table as it was last heard.
    pub fn services(&self) -> Vec<TableAnswer> {
        self.book.services.values().cloned().collect()
    }

    /// Why the disk lacks something, if it does.
    pub fn behind(&self) -> Option<&str> {
        self.behind.as_deref()
    }

    /// Takes in orders, in order. Those that come back as new are on the disk.
    pub fn orders(&mut self, orders: &[Order]) -> Vec<Verdict> {
        let mut puts = Vec::new();
        let mut before: Vec<Option<Record>> = Vec::with_capacity(orders.len());
        let mut verdicts = Vec::with_capacity(orders.len());
        for order in orders {
            before.push(self.book.instances.get(&order.instance).cloned());
            verdicts.push(self.book.order(order, &mut puts));
        }
        if let Some(gone) = &mut self.unread {
            let deleted = orders.iter().filter(|order| order.document.is_none());
            gone.extend(deleted.map(|order| order.instance.clone()).take(MOST_GONE.saturating_sub(gone.len())));
        }
        let Err(reason) = self.commit(&puts) else {
            // Nobody but a fault that ends the process can take that back.
            let _ = fault::at("stored");
            return verdicts;
        };
        // Backwards, so that the first of several for one instance has the last word.
        for ((order, verdict), before) in orders.iter().zip(&mut verdicts).zip(before).rev() {
            if let (Verdict::New(sequence), Some(_)) = (&*verdict, &order.document) {
                self.book.take_back(&order.instance, *sequence, before);
                *verdict = Verdict::Refused(reason.clone());
            }
        }
        verdicts
    }

    /// Takes in what has happened. What the disk does not take now is tried again by [`retry`](Self::retry).
    pub fn facts(&mut self, facts: Vec<Fact>) {
        let mut puts = Vec::new();
        for fact in facts {
            match fact {
                Fact::Ended { instance, sequence, status, detail } => {
                    self.book.ended(&instance, sequence, status, detail, &mut puts);
                }
                Fact::Found { instance, document } => self.book.found(&instance, document, &mut puts),
                Fact::FoundNoMore(instance) => self.book.found_no_more(&instance, &mut puts),
                Fact::LookedAround => self.book.looked_around(&mut puts),
                Fact::Addresses(addresses) => self.book.keep_addresses(addresses, &mut puts),
                Fact::Service(service, answer) => self.book.service(&service, answer, &mut puts),
            }
        }
        // Said where it becomes so.
        let _ = self.commit(&puts);
    }

    /// Writes what the disk lacks, if anything.
    pub fn retry(&mut self) {
        if self.behind.is_some() {
            let _ = self.catch_up();
        }
    }

    fn commit(&mut self, puts: &[Put]) -> Result<(), String> {
        if puts.is_empty() {
            return Ok(());
        }
        if self.behind.is_some() {
            return self.catch_up();
        }
        let Some(database) = &mut self.database else { return self.catch_up() };
        match database.commit(puts) {
            Ok(()) => Ok(()),
            Err(fault) => {
                self.give_up(fault);
                self.catch_up()
            }
        }
    }

    /// Opens the file anew and writes all of memory into it.
    fn catch_up(&mut self) -> Result<(), String> {
        // A damaged file is moved away by the first attempt and made anew by the second.
        for _ in 0..2 {
            match self.rewrite() {
                Ok(()) => {
                    if let Some(reason) = self.behind.take() {
                        tracing::info!(reason, "the desired state is on the disk again");
                    }
                    return Ok(());
                }
                Err(fault) => self.give_up(fault),
            }
        }
        Err(self.behind.clone().unwrap_or_default())
    }

    fn rewrite(&mut self) -> Result<(), Fault> {
        let mut database = match self.database.take() {
            Some(database) => database,
            None => {
                let (database, contents) = Database::open(&self.path)?;
                self.read(&contents);
                database
            }
        };
        database.replace(&self.book.write())?;
        self.database = Some(database);
        Ok(())
    }

    /// Takes in what the file holds, unless it comes from here.
    fn read(&mut self, contents: &Contents) {
        let Some(gone) = self.unread.take() else { return };
        let (book, bad) = Book::read(contents);
        if bad > 0 {
            tracing::warn!(rows = bad, "rows of the desired state cannot be read and are left out");
            self.behind = Some("rows are left out".into());
        }
        self.book.take_in(book, &gone);
    }

    /// Lets go of a file that is of no more use as it is.
    fn give_up(&mut self, fault: Fault) {
        self.database = None;
        let (reason, lost) = match &fault {
            Fault::Io(reason) => (reason, false),
            Fault::Corrupt(reason) => (reason, true),
            // A cable, or a disk that wakes up; and what is in memory is written to other blocks at once.
            Fault::Lost(reason) => {
                let since = *self.unreadable.get_or_insert_with(Instant::now);
                (reason, self.unread.is_none() || since.elapsed() >= PATIENCE)
            }
        };
        if lost {
            self.unread = None;
            let aside = free_name_aside(&self.path);
            match std::fs::rename(&self.path, &aside) {
                Ok(()) => {
                    tracing::warn!(reason, kept = %aside.display(), "the desired state is damaged: making it anew from what is there");
                    self.aside = Some(aside);
                }
                Err(error) => tracing::warn!(reason, %error, "the desired state is damaged and cannot be kept aside"),
            }
        }
        let reason = format!("cannot write {}: {reason}", self.path.display());
        if self.behind.replace(reason.clone()).is_none() {
            tracing::warn!(reason, "the desired state is not on the disk: no deployments until it is");
        }
    }
}

#[cfg(test)]
mod power;
#[cfg(test)]
mod tests;
