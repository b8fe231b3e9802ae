//! Report by exception: what has hardly changed since it was last told is not told again, as long as the cluster does not take silence
//! for absence. Pure; time is an argument.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::config::ReportChoice;
use crate::model::{InstanceId, InstanceUsage, NodeUsage, Report};

/// A cluster gives up a node or an instance that is silent for 30 s, and one message of three may be lost.
const LONGEST_SILENCE: Duration = Duration::from_secs(9);
/// Changes within these are none, in percent of the machine.
const CPU_BAND: f64 = 5.0;
const MEMORY_BAND: f64 = 2.0;

#[derive(Debug)]
pub(super) struct Exception {
    choice: ReportChoice,
    node: Option<(Instant, Figures)>,
    instances: Option<(Instant, BTreeMap<InstanceId, Figures>)>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Figures {
    cpu: f64,
    memory: f64,
}

impl Exception {
    pub(super) fn new(choice: ReportChoice) -> Self {
        Self { choice, node: None, instances: None }
    }

    /// What was told is not known any more: everything is told again.
    pub(super) fn forget(&mut self) {
        self.node = None;
        self.instances = None;
    }

    /// Is this worth telling now? If so it counts as told. Only how node and instances fare is ever not.
    pub(super) fn is_due(&mut self, report: &Report, now: Instant) -> bool {
        if self.choice == ReportChoice::Full {
            return true;
        }
        match report {
            Report::Node(usage) => {
                let figures = Figures::of_node(usage);
                let told = self.node.filter(|(at, before)| recent(*at, now) && before.is_near(&figures));
                if told.is_none() {
                    self.node = Some((now, figures));
                }
                told.is_none()
            }
            Report::Instances(usages) => {
                let figures: BTreeMap<_, _> =
                    usages.iter().map(|usage| (usage.instance.clone(), Figures::of_instance(usage))).collect();
                let told =
                    self.instances.as_ref().is_some_and(|(at, before)| recent(*at, now) && are_near(before, &figures));
                if !told {
                    self.instances = Some((now, figures));
                }
                !told
            }
            _ => true,
        }
    }
}

impl Figures {
    fn of_node(usage: &NodeUsage) -> Self {
        Self { cpu: usage.cpu_percent, memory: usage.memory_percent }
    }

    fn of_instance(usage: &InstanceUsage) -> Self {
        Self { cpu: usage.cpu_percent, memory: usage.memory_percent }
    }

    /// What is no number is near to nothing.
    fn is_near(&self, other: &Self) -> bool {
        (self.cpu - other.cpu).abs() < CPU_BAND && (self.memory - other.memory).abs() < MEMORY_BAND
    }
}

fn recent(at: Instant, now: Instant) -> bool {
    now.saturating_duration_since(at) < LONGEST_SILENCE
}

/// The same instances, each about as before. One that came or went is told at once: by this list a cluster knows what runs.
fn are_near(before: &BTreeMap<InstanceId, Figures>, now: &BTreeMap<InstanceId, Figures>) -> bool {
    before.len() == now.len()
        && before.iter().all(|(instance, figures)| now.get(instance).is_some_and(|other| figures.is_near(other)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{InstanceCounters, Status, Technology};

    fn node(cpu: f64, memory: f64) -> Report {
        Report::Node(Box::new(NodeUsage { cpu_percent: cpu, memory_percent: memory, ..NodeUsage::default() }))
    }

    fn instances(list: &[(u32, f64)]) -> Report {
        let usage = |(number, cpu): &(u32, f64)| InstanceUsage {
            instance: format!("a.b.c.d.instance.{number}").parse().unwrap(),
            technology: Technology::Container,
            cpu_percent: *cpu,
            memory_bytes: 0,
            memory_percent: 1.0,
            disk_bytes: 0,
            log_tail: String::new(),
            counters: InstanceCounters::default(),
        };
        Report::Instances(list.iter().map(usage).collect())
    }

    fn told(choice: ReportChoice, reports: &[(u64, Report)]) -> Vec<u64> {
        let (mut exception, began) = (Exception::new(choice), Instant::now());
        let due = reports.iter().filter(|(at, report)| exception.is_due(report, began + Duration::from_secs(*at)));
        due.map(|(at, _)| *at).collect()
    }

    #[test]
    fn what_hardly_changes_is_told_often_enough_to_count_as_alive() {
        let idle: Vec<_> = (0..=30).step_by(2).map(|at| (at, node(10.0, 40.0))).collect();
        assert_eq!(told(ReportChoice::Changes, &idle), [0, 10, 20, 30]);
        assert_eq!(told(ReportChoice::Full, &idle).len(), 16);
        let nothing: Vec<_> = (0..=20).step_by(2).map(|at| (at, instances(&[]))).collect();
        assert_eq!(told(ReportChoice::Changes, &nothing), [0, 10, 20]);
    }

    #[test]
    fn bands_are_around_what_was_told_last_so_that_a_slow_drift_is_told() {
        let drift: Vec<_> = (0..8).map(|step| (step, node(step as f64 * 2.0, 40.0))).collect();
        assert_eq!(told(ReportChoice::Changes, &drift), [0, 3, 6]);
        let memory = [(0, node(0.0, 40.0)), (1, node(0.0, 41.9)), (2, node(0.0, 42.0)), (3, node(0.0, f64::NAN))];
        assert_eq!(told(ReportChoice::Changes, &memory), [0, 2, 3]);
    }

    #[test]
    fn instances_that_come_or_go_are_told_at_once() {
        let reports = [
            (0, instances(&[(0, 1.0)])),
            (1, instances(&[(0, 5.9)])),
            (2, instances(&[(0, 5.9), (1, 0.0)])),
            (3, instances(&[(1, 0.0)])),
            (4, instances(&[(2, 0.0)])),
            (5, instances(&[(2, 50.0)])),
        ];
        assert_eq!(told(ReportChoice::Changes, &reports), [0, 2, 3, 4, 5]);
    }

    #[test]
    fn everything_else_is_always_told_and_a_new_connection_is_told_everything() {
        let instance: InstanceId = "a.b.c.d.instance.0".parse().unwrap();
        let status = Report::Status { instance, status: Status::Dead, detail: String::new() };
        let (mut exception, now) = (Exception::new(ReportChoice::Changes), Instant::now());
        assert!(exception.is_due(&status, now) && exception.is_due(&status, now));
        assert!(exception.is_due(&node(1.0, 1.0), now) && !exception.is_due(&node(1.0, 1.0), now));
        exception.forget();
        assert!(exception.is_due(&node(1.0, 1.0), now));
    }
}
