//! The workloads that run, by container: what has to be known of them to measure them and to tell their end exactly once. In memory
//! only; after a restart it is filled from what Docker holds.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::model::{InstanceId, InstanceUsage, Technology};
use crate::runtime::cgroup::{self, Cgroup, Sample, cpu_percent, percent};
use crate::runtime::interfaces;

/// A writable layer is measured this often at most: Docker walks through all of it.
const DISK_EVERY: Duration = Duration::from_secs(60);

/// Container id → the workload in it.
#[derive(Debug, Default)]
pub(super) struct Running {
    containers: Mutex<HashMap<String, Workload>>,
}

#[derive(Debug)]
struct Workload {
    instance: InstanceId,
    /// It is asked for and may not run yet.
    starting: bool,
    pid: i64,
    cgroup: Option<Cgroup>,
    sampled: Option<(Instant, Sample)>,
    log_path: Option<PathBuf>,
    log_tail: String,
    /// Length of the log file when the tail was read.
    log_length: Option<u64>,
    disk_bytes: u64,
    disk_measured: Option<Instant>,
}

/// What is old and should be asked of Docker.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Stale {
    pub(super) container: String,
    pub(super) log_path: Option<PathBuf>,
    pub(super) log_length: Option<u64>,
    pub(super) disk: bool,
}

impl Running {
    /// From now on the end of a container is told that runs, as far as is known.
    pub(super) fn expect(&self, container: &str, instance: &InstanceId) {
        self.enter(container, instance, false);
    }

    /// From now on the end of a container is told that is about to be started. That it does not run is no end until it has.
    pub(super) fn expect_start(&self, container: &str, instance: &InstanceId) {
        self.enter(container, instance, true);
    }

    fn enter(&self, container: &str, instance: &InstanceId, starting: bool) {
        let workload = Workload {
            instance: instance.clone(),
            starting,
            pid: 0,
            cgroup: None,
            sampled: None,
            log_path: None,
            log_tail: String::new(),
            log_length: None,
            disk_bytes: 0,
            disk_measured: None,
        };
        self.lock().entry(container.to_owned()).or_insert(workload);
    }

    /// It has been started.
    pub(super) fn started(&self, container: &str) {
        if let Some(workload) = self.lock().get_mut(container) {
            workload.starting = false;
        }
    }

    /// Its first process runs and can be measured.
    pub(super) fn measure(&self, container: &str, pid: i64, cgroup: Option<Cgroup>, log_path: Option<PathBuf>) {
        let sample = cgroup.as_ref().and_then(|cgroup| cgroup.sample().ok()).map(|sample| (Instant::now(), sample));
        if let Some(workload) = self.lock().get_mut(container) {
            workload.pid = pid;
            workload.sampled = sample;
            workload.cgroup = cgroup;
            workload.log_path = log_path;
        }
    }

    /// Forgets the container. Whoever gets its instance tells the end; nobody else does.
    pub(super) fn take(&self, container: &str) -> Option<InstanceId> {
        self.lock().remove(container).map(|workload| workload.instance)
    }

    /// Those that should run.
    pub(super) fn containers(&self) -> Vec<String> {
        let containers = self.lock();
        containers.iter().filter(|(_, workload)| !workload.starting).map(|(container, _)| container.clone()).collect()
    }

    pub(super) fn stale(&self) -> Vec<Stale> {
        let stale = |(container, workload): (&String, &Workload)| Stale {
            container: container.clone(),
            log_path: workload.log_path.clone(),
            log_length: workload.log_length,
            disk: workload.disk_measured.is_none_or(|at| at.elapsed() >= DISK_EVERY),
        };
        self.lock().iter().map(stale).collect()
    }

    pub(super) fn set_log(&self, container: &str, tail: String, length: Option<u64>) {
        if let Some(workload) = self.lock().get_mut(container) {
            workload.log_tail = tail;
            workload.log_length = length;
        }
    }

    pub(super) fn set_disk(&self, container: &str, bytes: u64) {
        if let Some(workload) = self.lock().get_mut(container) {
            workload.disk_bytes = bytes;
            workload.disk_measured = Some(Instant::now());
        }
    }

    /// Usage since the call before. A container whose cgroup has gone is about to be told as ended and is left out.
    pub(super) fn usage(&self) -> Vec<InstanceUsage> {
        let (cpus, memory) = (cgroup::online_cpus(), cgroup::total_memory_bytes());
        let mut containers = self.lock();
        let usage = containers.values_mut().filter_map(|workload| {
            if workload.pid == 0 {
                return None;
            }
            let (now, cgroup) = (Instant::now(), workload.cgroup.as_ref());
            // Of one that shares its group with others nothing is counted but packets.
            let sample = match cgroup {
                Some(cgroup) => Some((now, cgroup.sample().ok()?)),
                None => None,
            };
            let counters = interfaces::count(Some(workload.pid), cgroup.map(Cgroup::counters).unwrap_or_default());
            let before = std::mem::replace(&mut workload.sampled, sample);
            let memory_bytes = sample.map_or(0, |(_, sample)| sample.memory_bytes);
            Some(InstanceUsage {
                instance: workload.instance.clone(),
                technology: Technology::Container,
                cpu_percent: before.zip(sample).map_or(0.0, |(before, now)| cpu_percent(before, now, cpus)),
                memory_bytes,
                memory_percent: percent(memory_bytes as f64, memory as f64),
                disk_bytes: workload.disk_bytes,
                log_tail: workload.log_tail.clone(),
                counters,
            })
        });
        usage.collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Workload>> {
        // Nothing panics while the lock is held, and a poisoned map is still a map.
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_belongs_to_one_taker() {
        let (running, instance) = (Running::default(), super::super::container::tests::spec(0).id);
        running.expect("c", &instance);
        assert_eq!(running.take("c"), Some(instance));
        assert_eq!(running.take("c"), None);
    }

    #[test]
    fn what_was_just_measured_is_not_stale() {
        let (running, instance) = (Running::default(), super::super::container::tests::spec(0).id);
        running.expect("c", &instance);
        running.set_disk("c", 7);
        running.set_log("c", "x".into(), Some(1));
        assert_eq!(
            running.stale(),
            [Stale { container: "c".into(), log_path: None, log_length: Some(1), disk: false }]
        );
    }
}
