//! The containers that run: what has to be known of them to measure them and to tell their end exactly once. In memory only; after a
//! restart it is filled from what containerd holds.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio_util::task::AbortOnDropHandle;

use crate::model::InstanceId;
use crate::runtime::cgroup::{Cgroup, Sample};

/// A snapshot is measured this often at most: containerd walks through all of it.
const DISK_EVERY: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub(super) struct Running {
    workloads: Mutex<HashMap<InstanceId, Workload>>,
}

#[derive(Debug)]
pub(super) struct Workload {
    pub(super) pid: u32,
    /// `None` where it cannot be found: then its packets are counted and nothing else.
    pub(super) cgroup: Option<Cgroup>,
    pub(super) sampled: Option<(Instant, Sample)>,
    pub(super) disk_bytes: u64,
    disk_measured: Option<Instant>,
    /// Ends with this: an end that was asked for is not told.
    watch: Option<AbortOnDropHandle<()>>,
}

impl Running {
    /// From now on it is measured, and its end told by what `watch` begins.
    pub(super) fn add(&self, instance: &InstanceId, pid: u32, watch: impl FnOnce() -> AbortOnDropHandle<()>) {
        let cgroup = Cgroup::of(pid.into());
        if let Err(error) = &cgroup {
            tracing::warn!(%instance, pid, %error, "its usage cannot be measured");
        }
        let cgroup = cgroup.ok();
        let sampled = cgroup.as_ref().and_then(|cgroup| cgroup.sample().ok()).map(|sample| (Instant::now(), sample));
        let mut workloads = self.lock();
        let workload = Workload { pid, cgroup, sampled, disk_bytes: 0, disk_measured: None, watch: None };
        workloads.insert(instance.clone(), workload);
        // Begun under the lock: it finds its entry, however soon the end comes.
        let watch = watch();
        if let Some(workload) = workloads.get_mut(instance) {
            workload.watch = Some(watch);
        }
    }

    /// Forgets it. Whoever gets it tells its end, or has asked for it.
    pub(super) fn take(&self, instance: &InstanceId) -> Option<Workload> {
        self.lock().remove(instance)
    }

    pub(super) fn has(&self, instance: &InstanceId) -> bool {
        self.lock().contains_key(instance)
    }

    /// Those whose disk is to be measured again, and will not be named again for a while.
    pub(super) fn stale(&self) -> Vec<InstanceId> {
        let mut workloads = self.lock();
        let stale = workloads.iter_mut().filter_map(|(instance, workload)| {
            let due = workload.disk_measured.is_none_or(|at| at.elapsed() >= DISK_EVERY);
            due.then(|| {
                workload.disk_measured = Some(Instant::now());
                instance.clone()
            })
        });
        stale.collect()
    }

    pub(super) fn set_disk(&self, instance: &InstanceId, bytes: u64) {
        if let Some(workload) = self.lock().get_mut(instance) {
            workload.disk_bytes = bytes;
        }
    }

    pub(super) fn each<T>(&self, look: impl FnMut((&InstanceId, &mut Workload)) -> Option<T>) -> Vec<T> {
        self.lock().iter_mut().filter_map(look).collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<InstanceId, Workload>> {
        // Nothing panics while the lock is held, and a poisoned map is still a map.
        self.workloads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
