//! What the daemons' memory does over time: a line through the samples by least squares, with one slope for all lives of a daemon and
//! a height for each, since a new process begins anew.

use std::fmt::Write as _;
use std::time::Duration;

/// A life's begin says nothing: until everything has been done once, tables fill, arenas are made and pages of the program come in. Of a
/// debug build that is 7 MiB within two minutes, and 0.1 MiB a minute after that.
const WARM_UP: Duration = Duration::from_secs(150);
/// What was seen for a shorter time after that, in all, has no slope.
const SHORTEST: f64 = 120.0;

/// What is allowed to a daemon over a run, whatever its length: a quarter of what quality allows for 100,000 commands. Arenas of the
/// allocator come and go by up to a mebibyte, so less could not be told from nothing; a leak of 64 KiB for each fault and each
/// operation is more within ten minutes.
pub const MOST_GROWTH: f64 = 4.0;

#[derive(Clone, Copy, Debug, PartialEq)]
struct Sample {
    at: Duration,
    life: u32,
    mebibytes: f64,
    /// What of it is no page of a file: the program's own code comes in little by little, too.
    anonymous: f64,
}

/// Samples of one daemon.
#[derive(Debug, Default)]
pub struct Memory {
    samples: Vec<Sample>,
}

impl Memory {
    /// `life` is the process id, and `status` what the kernel says of it.
    pub(super) fn add(&mut self, at: Duration, life: u32, status: &str) {
        let mebibytes = |name: &str| {
            let value = status.lines().find_map(|line| line.strip_prefix(name)?.split_whitespace().next());
            value.and_then(|kibibytes| kibibytes.parse::<f64>().ok()).map(|kibibytes| kibibytes / 1024.0)
        };
        if let (Some(all), Some(anonymous)) = (mebibytes("VmRSS:"), mebibytes("RssAnon:")) {
            self.samples.push(Sample { at, life, mebibytes: all, anonymous });
        }
    }

    fn lives(&self) -> impl Iterator<Item = &[Sample]> {
        self.samples.chunk_by(|one, next| one.life == next.life)
    }

    /// Of each life, what came after its warm-up.
    fn settled(&self) -> impl Iterator<Item = &[Sample]> {
        self.lives().map(|life| {
            let begin = life.first().map_or(Duration::ZERO, |first| first.at) + WARM_UP;
            &life[life.partition_point(|sample| sample.at < begin)..]
        })
    }

    /// Mebibytes an hour; `None` where no life was long enough to say.
    fn slope(&self, of: fn(&Sample) -> f64) -> Option<f64> {
        let (mut above, mut below, mut seen) = (0.0, 0.0, 0.0);
        for life in self.settled().filter(|life| life.len() > 1) {
            seen += (life[life.len() - 1].at - life[0].at).as_secs_f64();
            let count = life.len() as f64;
            let mean_time = life.iter().map(|sample| sample.at.as_secs_f64()).sum::<f64>() / count;
            let mean_size = life.iter().map(of).sum::<f64>() / count;
            for sample in life {
                let time = sample.at.as_secs_f64() - mean_time;
                above += time * (of(sample) - mean_size);
                below += time * time;
            }
        }
        (seen >= SHORTEST && below > 0.0).then(|| above / below * 3600.0)
    }

    /// What it was after each tenth of the run; `|` before the first of another life.
    fn course(&self, run: Duration) -> String {
        let mut text = String::new();
        let mut before = None;
        for tenth in 1..=10 {
            let Some(sample) = self.samples.iter().rfind(|sample| sample.at <= run * tenth / 10) else { continue };
            let mark = if before.is_some_and(|before| before != sample.life) { "| " } else { "" };
            before = Some(sample.life);
            let _ = write!(text, "{mark}{:.1} ", sample.mebibytes);
        }
        text.trim_end().to_owned()
    }

    /// Lines about it, and whether it grows more than is allowed over a run of this length.
    pub(super) fn report(&self, name: &str, run: Duration) -> (String, bool) {
        let mut text = format!("{name}: ");
        let (Some(first), Some(last)) = (self.samples.first(), self.samples.last()) else {
            return (text + "no samples", false);
        };
        let longest = self.lives().map(|life| life[life.len() - 1].at - life[0].at).max().unwrap_or_default();
        let most = self.samples.iter().map(|sample| sample.mebibytes).fold(0.0, f64::max);
        let _ = write!(
            text,
            "RSS first {:.1}, last {:.1}, most {most:.1} MiB; by tenths of the run {}\n    {} lives, the longest {:.0} s; ",
            first.mebibytes,
            last.mebibytes,
            self.course(run),
            self.lives().count(),
            longest.as_secs_f64()
        );
        let Some(slope) = self.slope(|sample| sample.mebibytes) else { return (text + "too short for a slope", false) };
        let growth = slope * run.as_secs_f64() / 3600.0;
        let too_much = growth > MOST_GROWTH;
        let verdict = if too_much { "  TOO MUCH" } else { "" };
        let _ = write!(text, "slope {slope:+.1} MiB/h, {growth:+.2} of {MOST_GROWTH:.1} MiB over this run{verdict}");
        let anonymous = self.slope(|sample| sample.anonymous).unwrap_or_default();
        let _ = write!(text, "; without pages of files {:.1}, {anonymous:+.1} MiB/h", last.anonymous);
        (text, too_much)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A sample every 5 s: 20 MiB at the begin of each life and so much more each second after it.
    fn lives(count: u32, seconds: u64, growth: f64) -> Memory {
        let mut memory = Memory::default();
        for life in 0..count {
            for at in (0..seconds).step_by(5) {
                let warm_up = if at < 150 { at as f64 * 0.04 } else { 6.0 };
                let size = 20.0 + warm_up + growth * at as f64;
                let (all, anonymous) = ((size * 1024.0) as u64, (growth * at as f64 * 1024.0) as u64);
                let status = format!("Name:\tnode-engine\nVmRSS:\t  {all} kB\nRssAnon:\t {anonymous} kB\n");
                memory.add(Duration::from_secs(u64::from(life) * seconds + at), life, &status);
            }
        }
        memory
    }

    #[test]
    fn growth_is_told_from_beginnings() {
        let run = Duration::from_secs(1_200);
        let (text, too_much) = lives(3, 400, 0.0).report("node-a", run);
        assert!(!too_much && text.contains("3 lives, the longest 395 s; slope +0.0 MiB/h"), "{text}");
        // 10 KiB a second are 12 MiB in twenty minutes, also where each life sees a third of it.
        for (count, seconds) in [(1, 1_200), (3, 400)] {
            let (text, too_much) = lives(count, seconds, 10.0 / 1024.0).report("node-a", run);
            assert!(too_much && text.ends_with(", +35.2 MiB/h"), "{text}");
        }
        assert_eq!(
            lives(2, 100, 0.0).course(Duration::from_secs(200)),
            "20.8 21.6 22.4 23.2 | 20.0 20.8 21.6 22.4 23.2 23.8"
        );
        let (text, too_much) = lives(30, 20, 1.0).report("node-a", run);
        assert!(!too_much && text.contains("too short"), "{text}");
    }
}
