//! Control groups of our own: one for each workload that no container engine puts into one, below a parent of ours, in every hierarchy
//! that has a controller we need.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::{Controller, Counted, Sample, field, mount_of};
use crate::model::{InstanceCounters, Limits};

const PERIOD_MICROSECONDS: u64 = 100_000;
/// A group whose processes were killed empties within it, unless one hangs in the kernel.
const EMPTY: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(10);

/// Where groups are made: for each controller its hierarchy, where the kernel has one.
#[derive(Clone, Debug)]
pub(in crate::runtime) struct Groups {
    parent: PathBuf,
    cpu: Option<Controller>,
    cpu_account: Option<Controller>,
    memory: Option<Controller>,
}

/// The control group of one workload, which is a directory in each hierarchy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::runtime) struct Group {
    cpu: Option<Controller>,
    cpu_account: Option<Controller>,
    memory: Option<Controller>,
}

impl Controller {
    fn path(&self) -> &Path {
        match self {
            Self::V1(path) | Self::V2(path) => path,
        }
    }

    fn join(&self, path: &Path) -> Self {
        match self {
            Self::V1(root) => Self::V1(root.join(path)),
            Self::V2(root) => Self::V2(root.join(path)),
        }
    }
}

impl Groups {
    /// Groups below `parent`, such as `/node-engine`.
    pub(in crate::runtime) fn below(parent: &str) -> Self {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let find = |controller| hierarchy(controller, &mounts);
        Self {
            parent: parent.trim_start_matches('/').into(),
            cpu: find("cpu"),
            // In the unified hierarchy `cpu` counts as well.
            cpu_account: find("cpuacct").or_else(|| find("cpu").filter(|cpu| matches!(cpu, Controller::V2(_)))),
            memory: find("memory"),
        }
    }

    /// Removes the parent and what is directly below it, as far as nothing is in them.
    pub(in crate::runtime) fn remove_empty(&self) {
        for root in [&self.cpu, &self.cpu_account, &self.memory].into_iter().flatten() {
            let parent = root.path().join(&self.parent);
            // Directories are groups, and everything else in them the kernel's.
            let below = fs::read_dir(&parent).into_iter().flatten().flatten().map(|entry| entry.path());
            for group in below.filter(|path| path.is_dir()).chain([parent.clone()]) {
                // Used by somebody, or gone already.
                let _ = fs::remove_dir(group);
            }
        }
    }

    /// What this kernel cannot limit.
    pub(in crate::runtime) fn missing(&self) -> Vec<&'static str> {
        let missing = [("cpu", &self.cpu), ("memory", &self.memory)];
        missing.into_iter().filter(|(_, found)| found.is_none()).map(|(name, _)| name).collect()
    }

    /// Whether a limit of memory can be one of swap as well. Kernels without swap accounting lack the file.
    pub(in crate::runtime) fn limits_swap(&self) -> bool {
        match &self.memory {
            Some(Controller::V1(root)) => root.join("memory.memsw.limit_in_bytes").exists(),
            Some(Controller::V2(_)) => true,
            None => false,
        }
    }

    /// The group of this name, whether or not it exists.
    pub(in crate::runtime) fn named(&self, name: &str) -> Group {
        let path = self.parent.join(name);
        let at = |controller: &Option<Controller>| controller.as_ref().map(|root| root.join(&path));
        Group { cpu: at(&self.cpu), cpu_account: at(&self.cpu_account), memory: at(&self.memory) }
    }

    /// Makes the group, empty, with these limits.
    pub(in crate::runtime) fn make(&self, name: &str, limits: Limits) -> io::Result<Group> {
        let group = self.named(name);
        for root in [&self.cpu, &self.cpu_account, &self.memory].into_iter().flatten() {
            if let Controller::V2(root) = root {
                delegate(root, &self.parent)?;
            }
        }
        for directory in group.directories() {
            fs::create_dir_all(directory).map_err(|error| at(directory, &error))?;
        }
        group.limit(limits)?;
        Ok(group)
    }
}

impl Group {
    /// Where a process writes itself to become a member.
    pub(in crate::runtime) fn directories(&self) -> Vec<&Path> {
        let mut directories: Vec<_> = self.controllers().map(Controller::path).collect();
        directories.sort_unstable();
        directories.dedup();
        directories
    }

    /// Replaces the limits. `None` lifts one.
    fn limit(&self, limits: Limits) -> io::Result<()> {
        let quota = limits.vcpus.map(|vcpus| u64::from(vcpus) * PERIOD_MICROSECONDS);
        let quota_text = |unlimited: &str| quota.map_or_else(|| unlimited.to_owned(), |quota| quota.to_string());
        match &self.cpu {
            Some(Controller::V1(path)) => {
                write(&path.join("cpu.cfs_period_us"), &PERIOD_MICROSECONDS.to_string())?;
                write(&path.join("cpu.cfs_quota_us"), &quota_text("-1"))?;
            }
            Some(Controller::V2(path)) => {
                write(&path.join("cpu.max"), &format!("{} {PERIOD_MICROSECONDS}", quota_text("max")))?;
            }
            None => {}
        }
        let Some(bytes) = limits.memory_mib.map(|mib| mib.saturating_mul(1 << 20).to_string()) else { return Ok(()) };
        match &self.memory {
            Some(Controller::V1(path)) => {
                write(&path.join("memory.limit_in_bytes"), &bytes)?;
                // Memory and swap together: no swap. Kernels without swap accounting lack the file.
                let with_swap = path.join("memory.memsw.limit_in_bytes");
                if with_swap.exists() { write(&with_swap, &bytes) } else { Ok(()) }
            }
            Some(Controller::V2(path)) => {
                write(&path.join("memory.max"), &bytes)?;
                let swap = path.join("memory.swap.max");
                if swap.exists() { write(&swap, "0") } else { Ok(()) }
            }
            None => Ok(()),
        }
    }

    /// What the kernel has counted, and its memory limit.
    pub(in crate::runtime) fn counters(&self) -> InstanceCounters {
        let unified = self.memory.as_ref().filter(|memory| matches!(memory, Controller::V2(_)));
        let counted = Counted {
            cpu: self.cpu_account.as_ref(),
            memory: self.memory.as_ref(),
            bandwidth: self.cpu.as_ref(),
            // In the unified hierarchy one directory has everything that is delegated to it.
            disks: unified,
            processes: unified,
        };
        counted.read()
    }

    /// CPUs that it may use at once; `None` is unlimited.
    pub(in crate::runtime) fn cpus(&self) -> Option<f64> {
        let (quota, period): (u64, u64) = match self.cpu.as_ref()? {
            Controller::V1(path) => (
                super::number(&path.join("cpu.cfs_quota_us")).ok()?,
                super::number(&path.join("cpu.cfs_period_us")).ok()?,
            ),
            Controller::V2(path) => {
                let text = fs::read_to_string(path.join("cpu.max")).ok()?;
                let (quota, period) = text.trim().split_once(' ')?;
                (quota.parse().ok()?, period.parse().ok()?)
            }
        };
        (period > 0).then(|| quota as f64 / period as f64)
    }

    /// What its processes use; what the kernel does not count is zero.
    pub(in crate::runtime) fn sample(&self) -> io::Result<Sample> {
        let cpu_nanoseconds = match &self.cpu_account {
            Some(controller) => super::cpu_nanoseconds(controller)?,
            None => 0,
        };
        let memory_bytes = match &self.memory {
            Some(controller) => super::memory_bytes(controller)?,
            None => 0,
        };
        Ok(Sample { cpu_nanoseconds, memory_bytes })
    }

    /// The file in which the kernel counts those of its processes that it killed because of the memory limit.
    pub(in crate::runtime) fn memory_events(&self) -> Option<PathBuf> {
        self.memory.as_ref().map(|memory| match memory {
            Controller::V1(path) => path.join("memory.oom_control"),
            Controller::V2(path) => path.join("memory.events"),
        })
    }

    /// Its processes, as the calling process sees them.
    pub(in crate::runtime) fn processes(&self) -> Vec<Pid> {
        let Some(directory) = self.directories().first().copied().map(Path::to_owned) else { return Vec::new() };
        let listed = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
        // Zero is a process that cannot be seen from here.
        listed.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0).map(Pid::from_raw).collect()
    }

    /// Kills what is in it and removes it. One that does not exist is a success.
    pub(in crate::runtime) fn remove(&self) -> io::Result<()> {
        let deadline = Instant::now() + EMPTY;
        loop {
            for process in self.processes() {
                // Gone meanwhile is what was wanted.
                let _ = kill(process, Signal::SIGKILL);
            }
            let busy = self.directories().into_iter().find_map(|directory| match fs::remove_dir(directory) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Some(at(directory, &error)),
                _ => None,
            });
            match busy {
                None => return Ok(()),
                Some(error) if Instant::now() >= deadline => return Err(error),
                Some(_) => thread::sleep(POLL),
            }
        }
    }

    fn controllers(&self) -> impl Iterator<Item = &Controller> {
        [&self.cpu, &self.cpu_account, &self.memory].into_iter().flatten()
    }
}

/// How many processes the kernel has killed, by the file that counts them. Of a file that is not there, none.
pub(in crate::runtime) fn out_of_memory_kills(memory_events: &Path) -> u64 {
    field(memory_events, "oom_kill").unwrap_or(0)
}

/// Where the controller is mounted: its own hierarchy where it has one, else the unified one if that offers it.
fn hierarchy(controller: &str, mounts: &str) -> Option<Controller> {
    let own = mount_of(mounts, "cgroup", |options| options.split(',').any(|name| name == controller));
    own.map(Controller::V1).or_else(|| {
        let unified = mount_of(mounts, "cgroup2", |_| true)?;
        let offered = fs::read_to_string(unified.join("cgroup.controllers")).ok()?;
        offered.split_ascii_whitespace().any(|name| name == controller).then_some(Controller::V2(unified))
    })
}

/// In the unified hierarchy every ancestor has to hand a controller down.
fn delegate(root: &Path, parent: &Path) -> io::Result<()> {
    let mut directory = root.to_owned();
    let mut below = parent.components();
    loop {
        for controller in ["+cpu", "+memory"] {
            let file = directory.join("cgroup.subtree_control");
            if let Err(error) = write(&file, controller) {
                tracing::debug!(%error, controller, "a controller is not handed down");
            }
        }
        let Some(component) = below.next() else { return Ok(()) };
        directory.push(component);
        fs::create_dir_all(&directory).map_err(|error| at(&directory, &error))?;
    }
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    fs::write(path, text).map_err(|error| at(path, &error))
}

fn at(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_written_as_each_hierarchy_reads_them() {
        let dir = tempfile::tempdir().expect("a directory");
        let (v1, v2) = (dir.path().join("v1"), dir.path().join("v2"));
        fs::create_dir_all(&v1).expect("v1");
        fs::create_dir_all(&v2).expect("v2");
        fs::write(v1.join("memory.memsw.limit_in_bytes"), "").expect("swap is accounted");
        let limits = Limits { vcpus: Some(2), memory_mib: Some(16), ..Limits::default() };
        for (path, wrap) in [(&v1, Controller::V1 as fn(PathBuf) -> Controller), (&v2, Controller::V2)] {
            let one = Some(wrap(path.clone()));
            Group { cpu: one.clone(), cpu_account: one.clone(), memory: one }.limit(limits).expect("written");
        }
        let read = |path: PathBuf| fs::read_to_string(path).expect("written");
        assert_eq!(read(v1.join("cpu.cfs_quota_us")), "200000");
        assert_eq!(read(v1.join("memory.limit_in_bytes")), "16777216");
        assert_eq!(read(v1.join("memory.memsw.limit_in_bytes")), "16777216");
        assert_eq!(read(v2.join("cpu.max")), "200000 100000");
        assert_eq!(read(v2.join("memory.max")), "16777216");
        assert!(!v2.join("memory.swap.max").exists());
    }

    #[test]
    fn kills_are_counted_in_both_hierarchies() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("memory.oom_control"), "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n").expect("v1");
        fs::write(dir.path().join("memory.events"), "low 0\nmax 9\noom 1\noom_kill 1\n").expect("v2");
        let of = |memory| {
            let group = Group { cpu: None, cpu_account: None, memory: Some(memory) };
            out_of_memory_kills(&group.memory_events().expect("a file"))
        };
        assert_eq!(of(Controller::V1(dir.path().into())), 2);
        assert_eq!(of(Controller::V2(dir.path().into())), 1);
    }

    #[test]
    #[ignore = "needs root"]
    fn a_group_holds_limits_and_goes_with_its_processes() {
        let groups = Groups::below(&format!("node-engine-test-{}", std::process::id()));
        let group_parents = [&groups.cpu, &groups.cpu_account, &groups.memory].map(Clone::clone);
        let group_parents: Vec<Controller> = group_parents.into_iter().flatten().collect();
        let group = groups.make("a", Limits { memory_mib: Some(64), ..Limits::default() }).expect("made");
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().expect("a process");
        for directory in group.directories() {
            fs::write(directory.join("cgroup.procs"), child.id().to_string()).expect("it becomes a member");
        }
        assert_eq!(group.processes(), [Pid::from_raw(child.id().cast_signed())]);
        assert!(group.sample().expect("figures").memory_bytes < 64 << 20);
        // It has to be collected for the group to become empty.
        let removed = thread::spawn(move || group.remove());
        assert!(!child.wait().expect("it ended").success());
        removed.join().expect("no panic").expect("removed");

        let parents: Vec<PathBuf> =
            group_parents.iter().map(|controller| controller.path().join(&groups.parent)).collect();
        let kept = groups.make("b", Limits::default()).expect("made");
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().expect("a process");
        for directory in kept.directories() {
            fs::write(directory.join("cgroup.procs"), child.id().to_string()).expect("it becomes a member");
        }
        groups.remove_empty();
        assert!(kept.directories().iter().all(|directory| directory.exists()), "what is used stays");
        child.kill().expect("killed");
        child.wait().expect("it ended");
        // The kernel takes a moment to let go of it.
        thread::sleep(Duration::from_millis(100));
        groups.remove_empty();
        assert!(parents.iter().all(|parent| !parent.exists()), "{parents:?}");
    }
}
