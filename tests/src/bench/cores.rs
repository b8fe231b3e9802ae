//! Which cores the measurement runs on, and how busy they were.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// Every thread of this process, and of these, runs on these cores alone; so do the threads that they make later.
///
/// # Errors
/// Where there is no such core.
pub fn pin(cores: &[usize], others: &[u32]) -> Result<()> {
    let set = set(cores)?;
    for process in others.iter().copied().chain([std::process::id()]) {
        let tasks = fs::read_dir(format!("/proc/{process}/task")).context("cannot list threads")?;
        for task in tasks.flatten() {
            let Some(thread) = task.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            match sched_setaffinity(Pid::from_raw(thread), &set) {
                // It has just ended.
                Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                Err(error) => return Err(error).with_context(|| format!("cannot pin to the cores {cores:?}")),
            }
        }
    }
    Ok(())
}

/// This thread runs on one core.
///
/// # Errors
/// As [`pin`].
pub fn pin_thread(core: usize) -> Result<()> {
    sched_setaffinity(Pid::from_raw(0), &set(&[core])?).with_context(|| format!("cannot pin to core {core}"))
}

fn set(cores: &[usize]) -> Result<CpuSet> {
    let mut set = CpuSet::new();
    for core in cores {
        set.set(*core)?;
    }
    Ok(set)
}

/// How many cores there are, not counting only those that this thread is pinned to.
pub fn count() -> usize {
    let online = nix::unistd::sysconf(nix::unistd::SysconfVar::_NPROCESSORS_ONLN).ok().flatten();
    online.and_then(|count| usize::try_from(count).ok()).unwrap_or(1)
}

/// The time that cores were at work, as the kernel's clock ticks count it.
#[derive(Debug)]
pub struct Watch {
    cores: &'static [usize],
    busy: f64,
    since: Instant,
}

impl Watch {
    /// # Errors
    /// Where the kernel does not tell.
    pub fn start(cores: &'static [usize]) -> Result<Self> {
        Ok(Self { cores, busy: busy(cores)?, since: Instant::now() })
    }

    /// How many cores were at work since the start, on average.
    ///
    /// # Errors
    /// As [`Watch::start`].
    pub fn read(&self) -> Result<f64> {
        let elapsed = self.since.elapsed().max(Duration::from_millis(1));
        Ok((busy(self.cores)? - self.busy) / elapsed.as_secs_f64())
    }
}

/// Seconds.
fn busy(cores: &[usize]) -> Result<f64> {
    let text = fs::read_to_string("/proc/stat").context("/proc/stat")?;
    Ok(cores.iter().map(|core| ticks(&text, *core)).sum::<u64>() as f64 / 100.0)
}

/// User, nice, system, irq and softirq: all but idle, iowait and what others took.
fn ticks(stat: &str, core: usize) -> u64 {
    let name = format!("cpu{core} ");
    let line = stat.lines().find_map(|line| line.strip_prefix(&name)).unwrap_or_default();
    let fields: Vec<u64> = line.split_whitespace().filter_map(|field| field.parse().ok()).collect();
    [0, 1, 2, 5, 6].iter().filter_map(|index| fields.get(*index)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_time_is_not_work() {
        let stat = "cpu  9 9 9 9 9 9 9 0 0 0\ncpu0 1 2 3 400 50 6 7 80 0 0\ncpu1 0 0 0 9 0 0 0 0 0 0\n";
        assert_eq!((ticks(stat, 0), ticks(stat, 1)), (1 + 2 + 3 + 6 + 7, 0));
    }
}
