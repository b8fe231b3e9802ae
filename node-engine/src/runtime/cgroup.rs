//! Control groups: what a workload uses, read without asking any daemon, and groups of our own that hold limits. Both hierarchies are
//! known, also side by side (cgroups(7), kernel documents cgroup-v1/memory, cgroup-v1/cpuacct and cgroup-v2).

mod group;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

pub(super) use group::{Groups, out_of_memory_kills};

use crate::model::InstanceCounters;

/// Where the figures of one container are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Cgroup {
    /// Any may be missing: a kernel is built or started without it, as with `cgroup_disable=memory`.
    cpu: Option<Controller>,
    memory: Option<Controller>,
    bandwidth: Option<Controller>,
    disks: Option<Controller>,
    processes: Option<Controller>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Controller {
    V1(PathBuf),
    V2(PathBuf),
}

/// What the kernel does not count is zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sample {
    /// Time on any CPU since the container began.
    pub(super) cpu_nanoseconds: u64,
    /// Without the page cache that can be had back at once, as `docker stats` counts it.
    pub(super) memory_bytes: u64,
}

impl Cgroup {
    /// The cgroup of a process.
    ///
    /// # Errors
    /// If it cannot be found.
    pub(super) fn of(pid: i64) -> io::Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let membership = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let found = |controller| find(controller, &membership, &mounts);
        let (cpu, memory) = (found("cpuacct"), found("memory"));
        if cpu.is_none() && memory.is_none() {
            return Err(io::Error::new(io::ErrorKind::NotFound, "no cgroup with cpu or memory figures"));
        }
        Ok(Self { cpu, memory, bandwidth: found("cpu"), disks: found("blkio"), processes: found("pids") })
    }

    /// Whether it is of this container alone: every engine names it after the container's id.
    pub(super) fn is_of(&self, container: &str) -> bool {
        self.directories().any(|directory| directory.to_string_lossy().contains(container))
    }

    /// # Errors
    /// If the group has gone, and nothing else: a container is not missing because its kernel counts less.
    pub(super) fn sample(&self) -> io::Result<Sample> {
        let sample = Sample {
            cpu_nanoseconds: self.cpu.as_ref().and_then(|cpu| cpu_nanoseconds(cpu).ok()).unwrap_or(0),
            memory_bytes: self.memory.as_ref().and_then(|memory| memory_bytes(memory).ok()).unwrap_or(0),
        };
        // After reading: what went meanwhile has no figures.
        if self.directories().any(Path::is_dir) {
            Ok(sample)
        } else {
            Err(io::Error::new(io::ErrorKind::NotFound, "the cgroup has gone"))
        }
    }

    /// Those that say whether it is there.
    fn directories(&self) -> impl Iterator<Item = &Path> {
        [&self.memory, &self.cpu]
            .into_iter()
            .flatten()
            .map(|(Controller::V1(path) | Controller::V2(path))| path.as_path())
    }

    /// Everything else that the kernel has counted.
    pub(super) fn counters(&self) -> InstanceCounters {
        Counted {
            cpu: self.cpu.as_ref(),
            memory: self.memory.as_ref(),
            bandwidth: self.bandwidth.as_ref(),
            disks: self.disks.as_ref(),
            processes: self.processes.as_ref(),
        }
        .read()
    }
}

/// Where the kernel counts for one workload, as far as it does.
struct Counted<'a> {
    cpu: Option<&'a Controller>,
    memory: Option<&'a Controller>,
    bandwidth: Option<&'a Controller>,
    disks: Option<&'a Controller>,
    processes: Option<&'a Controller>,
}

impl Counted<'_> {
    fn read(&self) -> InstanceCounters {
        let (read_bytes, written_bytes) = self.disks.map_or((None, None), disk_bytes);
        let of_memory =
            |v1: &dyn Fn(&Path) -> io::Result<u64>, v2: &dyn Fn(&Path) -> io::Result<u64>| match self.memory? {
                Controller::V1(path) => v1(path).ok(),
                Controller::V2(path) => v2(path).ok(),
            };
        let limit =
            of_memory(&|path| number(&path.join("memory.limit_in_bytes")), &|path| number(&path.join("memory.max")));
        InstanceCounters {
            cpu_nanoseconds: self.cpu.and_then(|cpu| cpu_nanoseconds(cpu).ok()),
            throttled_nanoseconds: self.bandwidth.and_then(throttled),
            memory_peak_bytes: of_memory(&|path| number(&path.join("memory.max_usage_in_bytes")), &|path| {
                number(&path.join("memory.peak"))
            }),
            // Without a limit the older hierarchy says a number next to the largest there is, the newer one a word.
            memory_limit_bytes: limit.filter(|limit| *limit < 1 << 62),
            out_of_memory_kills: of_memory(&|path| field(&path.join("memory.oom_control"), "oom_kill"), &|path| {
                field(&path.join("memory.events"), "oom_kill")
            }),
            processes: self
                .processes
                .and_then(|(Controller::V1(path) | Controller::V2(path))| number(&path.join("pids.current")).ok()),
            read_bytes,
            written_bytes,
            ..InstanceCounters::default()
        }
    }
}

fn throttled(bandwidth: &Controller) -> Option<u64> {
    match bandwidth {
        Controller::V1(path) => field(&path.join("cpu.stat"), "throttled_time").ok(),
        Controller::V2(path) => {
            field(&path.join("cpu.stat"), "throttled_usec").ok().map(|micros| micros.saturating_mul(1000))
        }
    }
}

/// Read and written, over all devices.
fn disk_bytes(disks: &Controller) -> (Option<u64>, Option<u64>) {
    let sum =
        |text: &str, value: &dyn Fn(&str) -> Option<u64>| text.lines().filter_map(value).fold(0, u64::saturating_add);
    match disks {
        Controller::V1(path) => {
            let file = "blkio.throttle.io_service_bytes_recursive";
            let Ok(text) = fs::read_to_string(path.join(file)) else { return (None, None) };
            // `8:0 Read 4096`
            let of = |operation: &'static str| {
                sum(&text, &|line| {
                    let mut words = line.split(' ').skip(1);
                    (words.next()? == operation).then(|| words.next()?.parse().ok()).flatten()
                })
            };
            (Some(of("Read")), Some(of("Write")))
        }
        Controller::V2(path) => {
            let Ok(text) = fs::read_to_string(path.join("io.stat")) else { return (None, None) };
            // `8:0 rbytes=4096 wbytes=0 …`
            let of = |name: &'static str| {
                sum(&text, &|line| {
                    line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
                })
            };
            (Some(of("rbytes")), Some(of("wbytes")))
        }
    }
}

fn cpu_nanoseconds(cpu: &Controller) -> io::Result<u64> {
    match cpu {
        Controller::V1(path) => number(&path.join("cpuacct.usage")),
        Controller::V2(path) => Ok(field(&path.join("cpu.stat"), "usage_usec")?.saturating_mul(1000)),
    }
}

fn memory_bytes(memory: &Controller) -> io::Result<u64> {
    let (used, inactive) = match memory {
        Controller::V1(path) => {
            (number(&path.join("memory.usage_in_bytes"))?, field(&path.join("memory.stat"), "total_inactive_file")?)
        }
        Controller::V2(path) => {
            (number(&path.join("memory.current"))?, field(&path.join("memory.stat"), "inactive_file")?)
        }
    };
    Ok(used.saturating_sub(inactive))
}

/// Percent of the whole machine between two samples.
pub(super) fn cpu_percent((then, before): (Instant, Sample), (now, after): (Instant, Sample), cpus: u32) -> f64 {
    let used = after.cpu_nanoseconds.saturating_sub(before.cpu_nanoseconds);
    let available = now.duration_since(then).as_nanos() as f64 * f64::from(cpus);
    percent(used as f64, available)
}

pub(super) fn percent(part: f64, whole: f64) -> f64 {
    if whole > 0.0 { part / whole * 100.0 } else { 0.0 }
}

/// CPUs that are on line.
pub(super) fn online_cpus() -> u32 {
    let online = fs::read_to_string("/sys/devices/system/cpu/online").unwrap_or_default();
    cpus_in(&online).unwrap_or(1).max(1)
}

pub(super) fn total_memory_bytes() -> u64 {
    let kib = field(Path::new("/proc/meminfo"), "MemTotal:").unwrap_or(0);
    kib.saturating_mul(1024)
}

/// The directory of a controller: its own hierarchy where it has one, else the unified one.
fn find(controller: &str, membership: &str, mounts: &str) -> Option<Controller> {
    let memberships = membership.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        Some((parts.next()?, parts.next()?))
    });
    let mut unified = None;
    for (controllers, path) in memberships {
        let path = path.trim_start_matches('/');
        if controllers.split(',').any(|name| name == controller) {
            let mounted = mount_of(mounts, "cgroup", |options| options.split(',').any(|name| name == controller))?;
            return Some(Controller::V1(mounted.join(path)));
        }
        if controllers.is_empty() {
            unified = mount_of(mounts, "cgroup2", |_| true).map(|mounted| Controller::V2(mounted.join(path)));
        }
    }
    unified
}

fn mount_of(mounts: &str, kind: &str, fits: impl Fn(&str) -> bool) -> Option<PathBuf> {
    let found = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let (path, file_system, options) = (words.next()?, words.next()?, words.next()?);
        (file_system == kind && fits(options)).then_some(path)
    });
    found.map(PathBuf::from)
}

fn cpus_in(list: &str) -> Option<u32> {
    let ranges = list.trim().split(',').map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        last.checked_sub(first)?.checked_add(1)
    });
    ranges.sum()
}

fn number(path: &Path) -> io::Result<u64> {
    let text = fs::read_to_string(path)?;
    text.trim().parse().map_err(|_| invalid(path, "a number"))
}

fn field(path: &Path, name: &str) -> io::Result<u64> {
    let text = fs::read_to_string(path)?;
    let value = text.lines().find_map(|line| {
        let mut words = line.split_ascii_whitespace();
        (words.next()? == name).then(|| words.next()?.parse().ok()).flatten()
    });
    value.ok_or_else(|| invalid(path, name))
}

fn invalid(path: &Path, what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{} has no {what}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn cpu_is_a_share_of_the_whole_machine() {
        let (then, sample) = (Instant::now(), |cpu_nanoseconds| Sample { cpu_nanoseconds, memory_bytes: 0 });
        let now = then + Duration::from_secs(2);
        let percent = cpu_percent((then, sample(1_000_000_000)), (now, sample(2_000_000_000)), 4);
        assert!((percent - 12.5).abs() < 1e-9, "{percent}");
        assert_eq!(cpu_percent((then, sample(5)), (then, sample(9)), 4), 0.0);
    }

    const V1_MOUNTS: &str = "\
tmpfs /sys/fs/cgroup tmpfs rw 0 0
cgroup /sys/fs/cgroup/memory cgroup rw,nosuid,memory 0 0
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0
";
    const V2_MOUNTS: &str = "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate 0 0\n";

    #[test]
    fn a_controller_is_found_in_either_hierarchy() {
        let hybrid = "9:memory:/docker/00ff\n4:cpu,cpuacct:/docker/00ff\n0::/docker/00ff\n";
        let unified = "0::/system.slice/docker-00ff.scope\n";
        for (controller, membership, mounts, expected) in [
            ("memory", hybrid, V1_MOUNTS, Some(Controller::V1("/sys/fs/cgroup/memory/docker/00ff".into()))),
            ("cpuacct", hybrid, V1_MOUNTS, Some(Controller::V1("/sys/fs/cgroup/cpu,cpuacct/docker/00ff".into()))),
            (
                "memory",
                unified,
                V2_MOUNTS,
                Some(Controller::V2("/sys/fs/cgroup/system.slice/docker-00ff.scope".into())),
            ),
            ("memory", "", V2_MOUNTS, None),
            ("memory", unified, "", None),
            ("memory", "garbage\n9\n:", V1_MOUNTS, None),
        ] {
            assert_eq!(find(controller, membership, mounts), expected, "{controller} in {membership:?}");
        }
    }

    #[test]
    fn samples_are_read_from_both_kinds_of_files() {
        let dir = tempfile::tempdir().expect("a directory");
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).expect("write");
        write("cpuacct.usage", "5000\n");
        write("memory.usage_in_bytes", "9000\n");
        write("memory.stat", "inactive_file 100\ntotal_inactive_file 1000\n");
        write("cpu.stat", "usage_usec 7\nuser_usec 3\n");
        write("memory.current", "50\n");
        let (v1, v2) = (Controller::V1(dir.path().into()), Controller::V2(dir.path().into()));
        let cgroup = whole(&v1);
        assert_eq!(cgroup.sample().expect("v1"), Sample { cpu_nanoseconds: 5000, memory_bytes: 8000 });
        let cgroup = whole(&v2);
        assert_eq!(cgroup.sample().expect("v2"), Sample { cpu_nanoseconds: 7000, memory_bytes: 0 });
    }

    #[test]
    fn a_kernel_that_does_not_count_memory_hides_no_container() {
        let dir = tempfile::tempdir().expect("a directory");
        let (v1, v2) = (dir.path().join("v1"), dir.path().join("v2"));
        for directory in [&v1, &v2] {
            fs::create_dir(directory).expect("a directory");
        }
        fs::write(v1.join("cpuacct.usage"), "5000\n").expect("write");
        fs::write(v2.join("cpu.stat"), "usage_usec 7\n").expect("write");
        // The older hierarchy has no directory without the controller, the newer one no files.
        let membership = "4:cpu,cpuacct:/docker/00ff\n";
        assert_eq!(find("memory", membership, V1_MOUNTS), None);
        let older = Cgroup { memory: None, ..whole(&Controller::V1(v1)) };
        let newer = whole(&Controller::V2(v2.clone()));
        assert_eq!(older.sample().expect("v1"), Sample { cpu_nanoseconds: 5000, memory_bytes: 0 });
        assert_eq!(newer.sample().expect("v2"), Sample { cpu_nanoseconds: 7000, memory_bytes: 0 });
        assert!(older.is_of("v1") && !older.is_of("v2"));
        fs::remove_file(v2.join("cpu.stat")).expect("remove");
        assert_eq!(newer.sample().expect("nothing counted"), Sample { cpu_nanoseconds: 0, memory_bytes: 0 });
        fs::remove_dir(v2).expect("remove");
        assert!(newer.sample().is_err(), "it has gone");
    }

    fn whole(controller: &Controller) -> Cgroup {
        Cgroup {
            cpu: Some(controller.clone()),
            memory: Some(controller.clone()),
            bandwidth: Some(controller.clone()),
            disks: Some(controller.clone()),
            processes: Some(controller.clone()),
        }
    }

    #[test]
    fn counters_are_read_from_both_kinds_of_files_and_absent_where_there_is_none() {
        let none = Cgroup::counters(&Cgroup {
            bandwidth: None,
            disks: None,
            processes: None,
            ..whole(&Controller::V1("/nonexistent".into()))
        });
        assert_eq!(none, InstanceCounters::default());

        let dir = tempfile::tempdir().expect("a directory");
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).expect("write");
        write("pids.current", "3\n");
        write("cpu.stat", "throttled_time 9000\nthrottled_usec 8\n");
        write("blkio.throttle.io_service_bytes_recursive", "8:0 Read 10\n8:0 Write 20\n8:16 Read 1\nTotal 31\n");
        write("io.stat", "8:0 rbytes=7 wbytes=5 rios=1\n8:16 rbytes=1 wbytes=1\n");
        write("memory.limit_in_bytes", "9223372036854771712\n");
        write("memory.max", "max\n");
        write("memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n");
        write("memory.events", "oom 1\noom_kill 1\n");
        let v1 = whole(&Controller::V1(dir.path().into())).counters();
        assert_eq!((v1.throttled_nanoseconds, v1.read_bytes, v1.written_bytes), (Some(9000), Some(11), Some(20)));
        assert_eq!((v1.memory_limit_bytes, v1.out_of_memory_kills, v1.processes), (None, Some(2), Some(3)));
        let v2 = whole(&Controller::V2(dir.path().into())).counters();
        assert_eq!((v2.throttled_nanoseconds, v2.read_bytes, v2.written_bytes), (Some(8000), Some(8), Some(6)));
        assert_eq!((v2.memory_limit_bytes, v2.out_of_memory_kills, v2.processes), (None, Some(1), Some(3)));
    }

    #[test]
    fn cpu_lists_are_counted() {
        for (list, expected) in [("0-3\n", Some(4)), ("0", Some(1)), ("0-1,4,6-7", Some(5)), ("", None), ("3-1", None)]
        {
            assert_eq!(cpus_in(list), expected, "{list:?}");
        }
    }
}
