//! What ought to run, and operations at random that change it.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Result, ensure};

use super::chance::Chance;
use crate::cluster::{Cluster, Deploy, InstanceRow};

/// Services that come and go.
const PASSING: [&str; 3] = ["red", "green", "blue"];
const MOST_REPLICAS: usize = 3;
/// Instances of passing services, so that a small machine carries them.
const MOST_INSTANCES: usize = 5;
const NODES: [&str; 2] = ["node-a", "node-b"];

/// What is asked of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Deploy { name: &'static str, replicas: usize, on: &'static str },
    Delete { name: &'static str },
    Replicate { name: &'static str, replicas: usize },
    Move { name: &'static str, number: u32, to: &'static str },
}

/// The instances that ought to run, as they were when last all was well.
#[derive(Debug, Default)]
pub(super) struct Model {
    /// By service's short name and number.
    rows: BTreeMap<(String, u32), InstanceRow>,
}

impl Model {
    pub(super) fn rows(&self) -> impl Iterator<Item = &InstanceRow> {
        self.rows.values()
    }

    pub(super) fn on<'a>(&'a self, node: &'a str) -> impl Iterator<Item = &'a InstanceRow> {
        self.rows().filter(move |row| row.node == node)
    }

    pub(super) fn adopt(&mut self, rows: Vec<InstanceRow>) {
        self.rows = rows.into_iter().map(|row| ((row.short().to_owned(), row.number), row)).collect();
    }

    fn count(&self, name: &str) -> usize {
        self.rows.keys().filter(|(service, _)| service == name).count()
    }

    /// Something that can be done now.
    pub(super) fn choose(&self, chance: &mut Chance) -> Option<Operation> {
        let all: usize = PASSING.iter().map(|name| self.count(name)).sum();
        let room = MOST_INSTANCES.saturating_sub(all);
        let name = *chance.among(&PASSING)?;
        let count = self.count(name);
        if count == 0 {
            let on = *chance.among(&NODES)?;
            return (room > 0).then(|| Operation::Deploy { name, replicas: 1 + chance.below(room.min(2)), on });
        }
        match chance.below(4) {
            0 => Some(Operation::Delete { name }),
            1 => {
                let most = MOST_REPLICAS.min(count + room);
                let replicas = 1 + chance.below(most);
                (replicas != count).then_some(Operation::Replicate { name, replicas })
            }
            _ => {
                let rows: Vec<&InstanceRow> = self.rows().filter(|row| row.short() == name).collect();
                let row = chance.among(&rows)?;
                let to = NODES.into_iter().find(|node| *node != row.node)?;
                Some(Operation::Move { name, number: row.number, to })
            }
        }
    }

    /// Do these rows of the cluster's say what is wanted, given what was before and what was asked for since?
    pub(super) fn judge(&self, rows: &[InstanceRow], operation: Option<&Operation>) -> Result<()> {
        let now: BTreeMap<(String, u32), &InstanceRow> =
            rows.iter().map(|row| ((row.short().to_owned(), row.number), row)).collect();
        ensure!(now.len() == rows.len(), "an instance twice: {}", told(rows.iter()));
        for row in rows {
            ensure!(row.status == "RUNNING" && !row.address.is_empty(), "not running: {}", told([row].into_iter()));
        }
        let changed = operation.map(Operation::service);
        let kept = |(service, _): &&(String, u32)| Some(service.as_str()) != changed;
        ensure!(
            self.rows.keys().filter(kept).eq(now.keys().filter(kept)),
            "the cluster has {} instead of {}",
            told(rows.iter()),
            told(self.rows())
        );
        for (key, row) in &now {
            let Some(before) = self.rows.get(key).filter(|_| !operation.is_some_and(|done| done.renews(key))) else {
                continue;
            };
            ensure!(
                (&before.node, &before.address, &before.service_addresses)
                    == (&row.node, &row.address, &row.service_addresses),
                "{before:?} has become {row:?}"
            );
        }
        let Some(operation) = operation else { return Ok(()) };
        let of_it: Vec<&InstanceRow> = rows.iter().filter(|row| row.short() == operation.service()).collect();
        let on = |node: &str| of_it.iter().filter(|row| row.node == node).count();
        let done = match operation {
            Operation::Deploy { replicas, on: node, .. } => of_it.len() == *replicas && on(node) == *replicas,
            Operation::Delete { .. } => of_it.is_empty(),
            Operation::Replicate { replicas, .. } => of_it.len() == *replicas,
            Operation::Move { name, to, .. } => {
                let before = self.on(to).filter(|row| row.short() == *name).count();
                of_it.len() == self.count(name) && on(to) == before + 1
            }
        };
        ensure!(done, "{operation} is not done: {}", told(of_it.into_iter()));
        Ok(())
    }
}

impl Operation {
    fn service(&self) -> &'static str {
        match self {
            Self::Deploy { name, .. }
            | Self::Delete { name }
            | Self::Replicate { name, .. }
            | Self::Move { name, .. } => name,
        }
    }

    /// Is this instance another one afterwards, by the same name?
    fn renews(&self, (service, instance): &(String, u32)) -> bool {
        match self {
            Self::Move { name, number, .. } => service == name && instance == number,
            Self::Deploy { .. } | Self::Delete { .. } | Self::Replicate { .. } => false,
        }
    }

    pub(super) fn ask(&self, cluster: &Cluster) -> Result<()> {
        match self {
            Self::Deploy { name, replicas, on } => {
                let replicas = u32::try_from(*replicas)?;
                cluster.deploy(&Deploy { name, on: Some(on), replicas, ..Deploy::default() })
            }
            Self::Delete { name } => cluster.delete(name),
            Self::Replicate { name, replicas } => cluster.replicate(name, u32::try_from(*replicas)?),
            Self::Move { name, number, to } => cluster.relocate(&format!("{name}#{number}"), to),
        }
    }
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Deploy { name, replicas, on } => write!(f, "deploy {name} x{replicas} on {on}"),
            Self::Delete { name } => write!(f, "delete {name}"),
            Self::Replicate { name, replicas } => write!(f, "replicate {name} to {replicas}"),
            Self::Move { name, number, to } => write!(f, "move {name}#{number} to {to}"),
        }
    }
}

fn told<'a>(rows: impl Iterator<Item = &'a InstanceRow>) -> String {
    let rows: Vec<String> = rows
        .map(|row| format!("{}#{} {} on {} {}", row.short(), row.number, row.status, row.node, row.detail))
        .map(|row| row.trim().to_owned())
        .collect();
    format!("[{}]", rows.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(service: &str, number: u32, node: &str) -> InstanceRow {
        InstanceRow {
            service: format!("app.default.{service}.default"),
            number,
            node: node.into(),
            status: "RUNNING".into(),
            detail: String::new(),
            address: format!("{node}/{service}/{number}"),
            instance_address: String::new(),
            service_addresses: Vec::new(),
            policies: BTreeMap::new(),
        }
    }

    #[test]
    fn what_was_not_asked_for_is_a_complaint() {
        let mut model = Model::default();
        let before = [row("red", 0, "node-a"), row("red", 1, "node-b"), row("steady", 0, "node-b")];
        model.adopt(before.to_vec());
        let fine = |rows: &[InstanceRow], operation: Option<&Operation>| model.judge(rows, operation).is_ok();
        assert!(fine(&before, None));
        assert!(!fine(&before[..2], None), "one is missing");
        assert!(!fine(&[&before[..], &before[..1]].concat(), None), "one twice");
        let moved = [row("red", 0, "node-b"), before[1].clone(), before[2].clone()];
        assert!(!fine(&moved, None));
        let to_b = Operation::Move { name: "red", number: 0, to: "node-b" };
        assert!(fine(&moved, Some(&to_b)));
        assert!(!fine(&before, Some(&to_b)), "not done");
        let delete = Operation::Delete { name: "red" };
        assert!(fine(&before[2..], Some(&delete)));
        assert!(!fine(&[], Some(&delete)), "more than asked for");
        let mut ill = before.to_vec();
        ill[0].status = "FAILED".into();
        assert!(!fine(&ill, None));
        let more = Operation::Replicate { name: "red", replicas: 3 };
        assert!(fine(&[&before[..], &[row("red", 2, "node-a")]].concat(), Some(&more)));
    }

    #[test]
    fn operations_are_possible_ones() {
        let mut model = Model::default();
        let mut chance = Chance::new(5);
        for _ in 0..200 {
            let Some(operation) = model.choose(&mut chance) else { continue };
            let name = operation.service();
            let mut rows: Vec<InstanceRow> = model.rows().cloned().collect();
            let count = rows.iter().filter(|row| row.short() == name).count();
            match &operation {
                Operation::Deploy { replicas, on, .. } => {
                    assert!(count == 0 && *replicas > 0);
                    rows.extend((0..).take(*replicas).map(|number| row(name, number, on)));
                }
                Operation::Delete { .. } => rows.retain(|row| row.short() != name),
                Operation::Replicate { replicas, .. } => {
                    assert!(count > 0 && *replicas > 0 && *replicas != count);
                    rows.retain(|row| row.short() != name);
                    rows.extend((0..).take(*replicas).map(|number| row(name, number, "node-a")));
                }
                Operation::Move { number, to, .. } => {
                    let moved = rows.iter_mut().find(|row| row.short() == name && row.number == *number);
                    let moved = moved.expect("it is there");
                    assert_ne!(moved.node, *to);
                    (*to).clone_into(&mut moved.node);
                }
            }
            assert!(rows.len() <= MOST_INSTANCES, "{operation}");
            model.adopt(rows);
        }
    }
}
