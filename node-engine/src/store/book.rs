//! What is wanted, in memory: which command is news, which is a repetition, and which is older than what is known. Pure.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use super::database::{Contents, Put, Table};
use super::record::{self, Fate, Given, Record};
use crate::model::{Addresses, InstanceId, ServiceName, Status, TableAnswer};

/// Instances that are remembered although nobody wants them to run: deleted by a count, or ended and never deleted.
const MOST_PAST: usize = 4096;
/// This row says that whatever is wanted is among the others.
const COMPLETE: &str = "complete";
/// Services of the cluster's table that are kept, and rows of all of them.
const MOST_SERVICES: usize = 4096;
const MOST_ROWS: usize = 65_536;

/// A command of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    pub instance: InstanceId,
    /// What shall run; `None`: nothing.
    pub document: Option<Arc<str>>,
    pub given: Option<Given>,
}

/// What an order is, beside what is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It changes what is wanted, and is on the disk.
    New(u64),
    /// It wants what is wanted already.
    Same(u64),
    /// What it wants has run and ended, and that was told.
    Over,
    /// A newer one came before it.
    Old,
    /// It changes what is wanted and cannot be kept: it must not be carried out.
    Refused(String),
}

#[derive(Debug, Default)]
pub(super) struct Book {
    pub(super) instances: BTreeMap<InstanceId, Record>,
    pub(super) addresses: BTreeMap<InstanceId, Addresses>,
    pub(super) services: BTreeMap<ServiceName, TableAnswer>,
    /// What is not in `instances` is not wanted. Not so before a first run has looked around, nor after a loss.
    pub(super) complete: bool,
    rows: usize,
    sequence: u64,
    /// Those of `instances` that are not to run, by sequence.
    past: BTreeMap<u64, InstanceId>,
}

impl Book {
    /// Reads the rows. The number tells how many could not be understood; a book without them is not complete.
    pub(super) fn read(contents: &Contents) -> (Self, usize) {
        let (mut book, mut bad) = (Self::default(), 0);
        let rows = |table| contents.get(&table).into_iter().flatten();
        for (key, text) in rows(Table::Instances) {
            match key.parse().ok().zip(Record::read(text)) {
                Some((instance, record)) => {
                    book.sequence = book.sequence.max(record.sequence);
                    book.put(&instance, Some(record));
                }
                None => bad += 1,
            }
        }
        for (key, text) in rows(Table::Addresses) {
            match key.parse().ok().zip(record::read_addresses(text)) {
                Some((instance, addresses)) => drop(book.addresses.insert(instance, addresses)),
                None => bad += 1,
            }
        }
        for (key, text) in rows(Table::Services) {
            match key.parse().ok().and_then(|service: ServiceName| record::read_rows(service, text)) {
                Some(answer) => drop(book.keep_service(answer)),
                None => bad += 1,
            }
        }
        book.complete = bad == 0 && rows(Table::About).any(|(key, _)| key == COMPLETE);
        (book, bad)
    }

    /// Everything, as rows.
    pub(super) fn write(&self) -> Vec<Put> {
        let instances = self.instances.iter().map(|(id, record)| put(Table::Instances, id, Some(record.text())));
        let addresses = self
            .addresses
            .iter()
            .map(|(id, addresses)| put(Table::Addresses, id, Some(record::addresses_text(*addresses))));
        let services =
            self.services.iter().map(|(name, answer)| put(Table::Services, name, Some(record::rows_text(answer))));
        let complete = self.complete.then(complete);
        instances.chain(addresses).chain(services).chain(complete).collect()
    }

    /// Takes in an order where it is news.
    pub(super) fn order(&mut self, order: &Order, puts: &mut Vec<Put>) -> Verdict {
        let known = self.instances.get(&order.instance);
        // Counts given to another node id are another cluster's.
        let counts = known.and_then(|known| known.given.as_ref()).zip(order.given.as_ref());
        let counts = counts.filter(|(known, new)| known.node == new.node);
        let counts = counts.map(|(known, new)| (known.generation, new.generation));
        if counts.is_some_and(|(known, new)| new < known) {
            return Verdict::Old;
        }
        let repeated = counts.is_some_and(|(known, new)| new == known);
        match (known.map(|known| (known.sequence, &known.fate)), &order.document) {
            (Some((sequence, Fate::Run(known))), Some(document))
                if repeated || (counts.is_none() && known == document) =>
            {
                return Verdict::Same(sequence);
            }
            (Some((_, Fate::Ended { .. })), Some(_)) if repeated => return Verdict::Over,
            (Some((_, Fate::Deleted)), Some(_)) if repeated => return Verdict::Old,
            (Some((sequence, Fate::Deleted)), None) if repeated => return Verdict::Same(sequence),
            (None, None) if order.given.is_none() => return Verdict::Same(0),
            _ => {}
        }
        self.sequence += 1;
        let sequence = self.sequence;
        let fate = match &order.document {
            Some(document) => Fate::Run(document.clone()),
            None if order.given.is_none() => {
                self.set(&order.instance, None, puts);
                return Verdict::New(sequence);
            }
            None => Fate::Deleted,
        };
        self.set(&order.instance, Some(Record { sequence, given: order.given.clone(), fate }), puts);
        self.forget_past(puts);
        Verdict::New(sequence)
    }

    /// An instance has come to its end. That of an earlier deployment of the same name is no news.
    pub(super) fn ended(
        &mut self,
        instance: &InstanceId,
        sequence: u64,
        status: Status,
        detail: String,
        puts: &mut Vec<Put>,
    ) {
        let Some(known) = self.instances.get(instance).filter(|known| known.sequence == sequence) else { return };
        let Fate::Run(document) = &known.fate else { return };
        let fate = Fate::Ended { document: document.clone(), status, detail };
        let record = Record { fate, ..known.clone() };
        self.set(instance, Some(record), puts);
        self.forget_past(puts);
    }

    /// An instance was found running of which nothing is known.
    pub(super) fn found(&mut self, instance: &InstanceId, document: Arc<str>, puts: &mut Vec<Put>) {
        if !self.instances.contains_key(instance) {
            self.set(instance, Some(Record { sequence: 0, given: None, fate: Fate::Run(document) }), puts);
        }
    }

    pub(super) fn found_no_more(&mut self, instance: &InstanceId, puts: &mut Vec<Put>) {
        if self.instances.get(instance).is_some_and(|record| record.sequence == 0) {
            self.set(instance, None, puts);
        }
    }

    pub(super) fn looked_around(&mut self, puts: &mut Vec<Put>) {
        if !std::mem::replace(&mut self.complete, true) {
            puts.push(complete());
        }
    }

    pub(super) fn keep_addresses(&mut self, addresses: BTreeMap<InstanceId, Addresses>, puts: &mut Vec<Put>) {
        for gone in self.addresses.keys().filter(|id| !addresses.contains_key(*id)) {
            puts.push(put(Table::Addresses, gone, None));
        }
        for (id, addresses) in addresses.iter().filter(|(id, addresses)| self.addresses.get(*id) != Some(*addresses)) {
            puts.push(put(Table::Addresses, id, Some(record::addresses_text(*addresses))));
        }
        self.addresses = addresses;
    }

    /// The cluster's table has these rows of a service now; without any it is forgotten.
    pub(super) fn service(&mut self, service: &ServiceName, answer: Option<TableAnswer>, puts: &mut Vec<Put>) {
        match answer.filter(|answer| !answer.rows.is_empty()) {
            Some(answer) => {
                if self.services.get(service).is_some_and(|known| known.rows == answer.rows) {
                    return;
                }
                let text = record::rows_text(&answer);
                if self.keep_service(answer) {
                    puts.push(put(Table::Services, service, Some(text)));
                }
            }
            None => {
                if let Some(gone) = self.services.remove(service) {
                    self.rows -= gone.rows.len();
                    puts.push(put(Table::Services, service, None));
                }
            }
        }
    }

    /// Puts the record back that a refused order has replaced, unless that has been replaced since.
    pub(super) fn take_back(&mut self, instance: &InstanceId, sequence: u64, before: Option<Record>) {
        if self.instances.get(instance).is_some_and(|known| known.sequence == sequence) {
            self.put(instance, before);
        }
    }

    /// Adds what an earlier run knew and this one has heard nothing of, but for what is `gone` since.
    pub(super) fn take_in(&mut self, older: Self, gone: &BTreeSet<InstanceId>) {
        let news = |id: &InstanceId| !self.instances.contains_key(id) && !gone.contains(id);
        let mut records: Vec<_> = older.instances.into_iter().filter(|(id, _)| news(id)).collect();
        records.sort_by_key(|(_, record)| record.sequence);
        let counted = self.sequence > 0;
        self.sequence = self.sequence.max(older.sequence);
        for (instance, mut record) in records {
            // This run has counted from the beginning again.
            if counted && record.sequence != 0 {
                self.sequence += 1;
                record.sequence = self.sequence;
            }
            self.put(&instance, Some(record));
        }
        let given: HashSet<Addresses> = self.addresses.values().copied().collect();
        for (instance, addresses) in older.addresses.into_iter().filter(|(_, addresses)| !given.contains(addresses)) {
            self.addresses.entry(instance).or_insert(addresses);
        }
        for (service, answer) in older.services {
            if !self.services.contains_key(&service) {
                self.keep_service(answer);
            }
        }
        self.complete |= older.complete;
    }

    fn keep_service(&mut self, answer: TableAnswer) -> bool {
        let Some(service) = answer.service.clone() else { return false };
        let before = self.services.get(&service).map(|known| known.rows.len());
        let rows = self.rows - before.unwrap_or(0) + answer.rows.len();
        if rows > MOST_ROWS || (before.is_none() && self.services.len() >= MOST_SERVICES) {
            return false;
        }
        self.rows = rows;
        self.services.insert(service, answer);
        true
    }

    fn set(&mut self, instance: &InstanceId, record: Option<Record>, puts: &mut Vec<Put>) {
        puts.push(put(Table::Instances, instance, record.as_ref().map(Record::text)));
        self.put(instance, record);
    }

    fn put(&mut self, instance: &InstanceId, record: Option<Record>) {
        if let Some(record) = record.as_ref().filter(|record| !matches!(record.fate, Fate::Run(_))) {
            self.past.insert(record.sequence, instance.clone());
        }
        let sequence = record.as_ref().map(|record| record.sequence);
        let before = match record {
            Some(record) => self.instances.insert(instance.clone(), record),
            None => self.instances.remove(instance),
        };
        if let Some(before) = before.filter(|before| Some(before.sequence) != sequence) {
            self.past.remove(&before.sequence);
        }
    }

    fn forget_past(&mut self, puts: &mut Vec<Put>) {
        while self.past.len() > MOST_PAST {
            let Some((_, oldest)) = self.past.pop_first() else { return };
            self.set(&oldest, None, puts);
        }
    }
}

fn complete() -> Put {
    put(Table::About, &COMPLETE, Some(String::new()))
}

fn put(table: Table, key: &impl ToString, text: Option<String>) -> Put {
    Put { table, key: key.to_string(), text }
}
