//! Traffic that goes on through everything: a probe in an instance's network, but no child of the container engine, which may die.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};

use crate::host::Host;
use crate::wait::until;

/// What became of it until now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Answers; bytes of a stream.
    pub good: u64,
    pub lost: u64,
    pub doubled: u64,
}

#[derive(Debug, Default)]
struct Heard {
    counts: Counts,
    /// Milliseconds of the probe's clock when more was answered.
    advanced: u64,
    /// Since this was last asked, in milliseconds.
    silence: u64,
    last: String,
}

#[derive(Debug)]
pub(super) struct Load {
    name: &'static str,
    child: Child,
    input: Option<ChildStdin>,
    heard: Arc<Mutex<Heard>>,
    reader: JoinHandle<()>,
}

impl Load {
    /// Starts a probe in the network of this process of the host, and waits until it is answered.
    pub(super) fn start(host: &Host, pid: u32, name: &'static str, words: &[&str]) -> Result<Self> {
        let log = host.directory().join(format!("{name}.log"));
        let log = std::fs::File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
        let mut child = host
            .command("nsenter")
            .arg(format!("--net=/proc/{pid}/ns/net"))
            .arg("--")
            .arg(format!("/proc/{pid}/root/bin/probe"))
            .args(words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        let input = child.stdin.take();
        let printed = child.stdout.take().context("the probe's output is not piped")?;
        let heard = Arc::new(Mutex::new(Heard::default()));
        let hears = heard.clone();
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(printed).lines().map_while(Result::ok) {
                hears.lock().unwrap_or_else(PoisonError::into_inner).line(&line);
            }
        });
        let mut load = Self { name, child, input, heard, reader };
        until(&format!("{name} is answered"), Duration::from_secs(20), || {
            load.still_runs()?;
            Ok((load.counts().good > 0).then_some(()))
        })?;
        Ok(load)
    }

    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    pub(super) fn counts(&self) -> Counts {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).counts
    }

    /// The longest time without an answer since this was last asked.
    pub(super) fn silence(&self) -> Duration {
        let mut heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        Duration::from_millis(std::mem::take(&mut heard.silence))
    }

    pub(super) fn still_runs(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("{} has ended with {status}", self.name),
        }
    }

    /// Ends it in order; gives the last line it printed.
    pub(super) fn finish(mut self) -> Result<String> {
        drop(self.input.take());
        let (name, child) = (self.name, &mut self.child);
        let ended = until(&format!("{name} ends"), Duration::from_secs(40), || Ok(child.try_wait()?));
        if ended.is_err() {
            let _ = child.kill();
        }
        let status = ended?;
        self.reader.join().map_err(|_| anyhow!("the reader of {name} panicked"))?;
        let last = self.heard.lock().unwrap_or_else(PoisonError::into_inner).last.clone();
        if !status.success() {
            bail!("{name} ended with {status} {last}");
        }
        Ok(last)
    }
}

impl Heard {
    /// `progress <ms> <good> [<lost> <doubled> <silence>]`
    fn line(&mut self, line: &str) {
        let Some(numbers) = line.strip_prefix("progress ") else {
            line.clone_into(&mut self.last);
            return;
        };
        let mut numbers = numbers.split(' ').map_while(|word| word.parse::<u64>().ok());
        let (Some(now), Some(good)) = (numbers.next(), numbers.next()) else { return };
        let [lost, doubled] = [numbers.next(), numbers.next()].map(Option::unwrap_or_default);
        let silence = numbers.next().unwrap_or(now.saturating_sub(self.advanced));
        if good > self.counts.good {
            self.advanced = now;
        }
        self.silence = self.silence.max(silence);
        self.counts = Counts { good, lost, doubled };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_summed_and_silence_kept_until_it_is_asked_for() {
        let mut heard = Heard::default();
        for line in ["pid 7", "progress 100 10 0 0 20", "progress 200 10 3 0 120", "progress 300 25 2 1 130", "{}"] {
            heard.line(line);
        }
        assert_eq!(heard.counts, Counts { good: 25, lost: 2, doubled: 1 });
        assert_eq!((heard.silence, heard.last.as_str()), (130, "{}"));

        let mut stream = Heard::default();
        for line in ["progress 50 1", "progress 100 2", "progress 150 2", "progress 200 2", "progress 250 9"] {
            stream.line(line);
        }
        assert_eq!((stream.counts.good, stream.silence), (9, 150));
    }
}
