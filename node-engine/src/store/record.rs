//! Rows of the database as text, and back.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::model::{
    Addresses, FamilyPair, NodeId, Policy, Query, SemanticAddress, ServiceName, Status, TableAnswer, TableRow,
};

/// What is to become of an instance, and by which command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Counts the commands that changed what is wanted on this node. Never repeats, except that 0 is what was found without a command.
    pub sequence: u64,
    /// The cluster's own count, where it has one.
    pub given: Option<Given>,
    pub fate: Fate,
}

/// A cluster's count of its orders, of worth among those to the same node id only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    pub node: NodeId,
    pub generation: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It shall run as this document says.
    Run(Arc<str>),
    /// It has ended, which was told to the cluster; it is not to run again by itself.
    Ended { document: Arc<str>, status: Status, detail: String },
    /// It was deleted by an order that has a count: an older one must not bring it back.
    Deleted,
}

#[derive(Serialize, Deserialize)]
struct WrittenRecord {
    sequence: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    given: Option<(String, u64)>,
    #[serde(skip_serializing_if = "Option::is_none")]
    document: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ended: Option<(String, String)>,
}

impl Record {
    pub(super) fn text(&self) -> String {
        let (document, ended) = match &self.fate {
            Fate::Run(document) => (Some(document.to_string()), None),
            Fate::Ended { document, status, detail } => {
                (Some(document.to_string()), Some((status.as_str().to_owned(), detail.clone())))
            }
            Fate::Deleted => (None, None),
        };
        let given = self.given.as_ref().map(|given| (given.node.to_string(), given.generation));
        json(&WrittenRecord { sequence: self.sequence, given, document, ended })
    }

    pub(super) fn read(text: &str) -> Option<Self> {
        let WrittenRecord { sequence, given, document, ended } = serde_json::from_str(text).ok()?;
        let given = match given {
            Some((node, generation)) => Some(Given { node: node.parse().ok()?, generation }),
            None => None,
        };
        let fate = match (document.map(Arc::from), ended) {
            (None, _) => Fate::Deleted,
            (Some(document), None) => Fate::Run(document),
            (Some(document), Some((status, detail))) => Fate::Ended { document, status: ending(&status)?, detail },
        };
        Some(Self { sequence, given, fate })
    }
}

fn ending(word: &str) -> Option<Status> {
    [Status::Failed, Status::Dead, Status::Completed].into_iter().find(|status| status.as_str() == word)
}

pub(super) fn addresses_text(addresses: Addresses) -> String {
    format!("{} {}", addresses.v4, addresses.v6)
}

pub(super) fn read_addresses(text: &str) -> Option<Addresses> {
    let (v4, v6) = text.split_once(' ')?;
    Some(Addresses { v4: v4.parse().ok()?, v6: v6.parse().ok()? })
}

#[derive(Serialize, Deserialize)]
struct WrittenRow {
    number: u32,
    namespace: (Option<Ipv4Addr>, Option<Ipv6Addr>),
    instance: (Option<Ipv4Addr>, Option<Ipv6Addr>),
    host: IpAddr,
    host_port: u16,
    weight: u32,
    services: Vec<(String, IpAddr)>,
}

pub(super) fn rows_text(answer: &TableAnswer) -> String {
    let pair = |pair: FamilyPair| (pair.v4, pair.v6);
    let row = |row: &TableRow| WrittenRow {
        number: row.number,
        namespace: pair(row.namespace),
        instance: pair(row.instance),
        host: row.host,
        host_port: row.host_port,
        weight: row.weight,
        services: row.services.iter().map(|service| (service.policy.label().into(), service.address)).collect(),
    };
    json(&answer.rows.iter().map(row).collect::<Vec<_>>())
}

/// As if the cluster had just answered.
pub(super) fn read_rows(service: ServiceName, text: &str) -> Option<TableAnswer> {
    let written: Vec<WrittenRow> = serde_json::from_str(text).ok()?;
    let pair = |(v4, v6)| FamilyPair { v4, v6 };
    let mut rows = Vec::with_capacity(written.len());
    for row in written {
        let mut services = Vec::with_capacity(row.services.len());
        for (label, address) in row.services {
            services.push(SemanticAddress { policy: Policy::from_label(&label)?, address });
        }
        rows.push(TableRow {
            number: row.number,
            namespace: pair(row.namespace),
            instance: pair(row.instance),
            host: row.host,
            host_port: row.host_port,
            weight: row.weight,
            services,
        });
    }
    Some(TableAnswer { query: Some(Query::Name(service.clone())), service: Some(service), rows })
}

fn json(value: &impl Serialize) -> String {
    serde_json::to_string(value).expect("texts, numbers and lists always serialise")
}

/// What is understood of a row is understood again from what is written of it, for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn round_trip(text: &str) {
    if let Some(record) = Record::read(text) {
        assert_eq!(Record::read(&record.text()), Some(record));
    }
    if let Some(addresses) = read_addresses(text) {
        assert_eq!(read_addresses(&addresses_text(addresses)), Some(addresses));
    }
    let service: ServiceName = "app.default.web.default".parse().expect("a service name");
    if let Some(answer) = read_rows(service.clone(), text) {
        assert_eq!(read_rows(service, &rows_text(&answer)), Some(answer));
    }
}
