//! What the node has and uses. One task samples the host and its GPUs, offers the latest sample to whoever watches, and reports it
//! to the cluster at the cluster's pace. Samples are never queued: one that finds no room is superseded by the next.

mod gpu;
mod host;

use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::{self, JoinHandle};
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::config::Generation;
use crate::drain::Drain;
use crate::model::{NodeFacts, NodeUsage, Report, Technology};

use gpu::Gpus;
use host::Host;

/// How often the machine is looked at.
const SAMPLE: Duration = Duration::from_secs(2);

/// The sensors of this machine could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("{what} of this machine cannot be read: {reason}")]
pub struct SensorError {
    what: &'static str,
    reason: String,
}

/// How often a cluster of this generation wants to hear of a node.
pub fn pace(generation: Option<Generation>) -> Duration {
    match generation {
        Some(Generation::G1) => Duration::from_secs(8),
        Some(Generation::G2 | Generation::G4) | None => Duration::from_secs(2),
    }
}

/// What never changes while the daemon runs.
pub fn facts(node_name: &str, technologies: Vec<Technology>) -> NodeFacts {
    host::facts(node_name, technologies)
}

/// Samples until the drain begins. The sender's pace may change at any time; the first report goes out at once.
///
/// # Errors
/// If the machine's sensors cannot be opened at all; a sensor that fails later keeps its last value.
pub async fn start(
    reports: mpsc::Sender<Report>,
    pace: watch::Receiver<Duration>,
    drain: Drain,
) -> Result<(watch::Receiver<NodeUsage>, JoinHandle<()>), SensorError> {
    let mut sampler = task::spawn_blocking(Sampler::open)
        .await
        .map_err(|error| SensorError { what: "sensors", reason: error.to_string() })??;
    let first = sampler.sample();
    let (latest, watched) = watch::channel(first);
    Ok((watched, tokio::spawn(run(sampler, latest, reports, pace, drain))))
}

async fn run(
    mut sampler: Sampler,
    latest: watch::Sender<NodeUsage>,
    reports: mpsc::Sender<Report>,
    pace: watch::Receiver<Duration>,
    drain: Drain,
) {
    let mut ticks = interval(SAMPLE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut due = Instant::now();
    loop {
        tokio::select! {
            _ = drain.wait() => return,
            _ = ticks.tick() => {}
        }
        // Reading /proc and asking a GPU driver block, at times for long; the sampler travels to a thread that may.
        let sampled = task::spawn_blocking(move || {
            let usage = sampler.sample();
            (sampler, usage)
        });
        let usage = match sampled.await {
            Ok((back, usage)) => {
                sampler = back;
                usage
            }
            Err(error) => {
                tracing::error!(%error, "the sampler of this machine's usage has failed");
                return;
            }
        };
        let now = Instant::now();
        if now >= due {
            // The wire's clock must not drift with the length of a sample, nor catch up after a pause.
            due = now + pace.borrow().saturating_sub(SAMPLE / 2);
            if let Err(mpsc::error::TrySendError::Closed(_)) = reports.try_send(Report::Node(Box::new(usage.clone()))) {
                return;
            }
        }
        latest.send_replace(usage);
    }
}

#[derive(Debug)]
struct Sampler {
    host: Host,
    gpus: Gpus,
}

impl Sampler {
    fn open() -> Result<Self, SensorError> {
        Ok(Self { host: Host::open()?, gpus: Gpus::open() })
    }

    fn sample(&mut self) -> NodeUsage {
        NodeUsage { gpus: self.gpus.sample(), ..self.host.sample() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn first_report_goes_out_at_once_and_is_what_watchers_see() {
        let (reports, mut inbox) = mpsc::channel(8);
        let (_pace, paced) = watch::channel(pace(Some(Generation::G1)));
        let drain = Drain::new(Duration::from_secs(1));
        let (latest, task) = start(reports, paced, drain.clone()).await.unwrap();
        let report = tokio::time::timeout(Duration::from_secs(10), inbox.recv()).await.unwrap();
        let Some(Report::Node(usage)) = report else { panic!("expected usage, got {report:?}") };
        assert!(usage.memory_total_mib > 0);
        assert_eq!(latest.borrow().cpus_logical, usage.cpus_logical);
        drain.begin();
        task.await.unwrap();
    }

    #[tokio::test]
    async fn reports_keep_the_pace_and_samples_go_on_between() {
        let (reports, mut inbox) = mpsc::channel(64);
        let (pacer, paced) = watch::channel(Duration::from_secs(3600));
        let drain = Drain::new(Duration::from_secs(1));
        let (mut latest, task) = start(reports, paced, drain.clone()).await.unwrap();
        for _ in 0..2 {
            tokio::time::timeout(Duration::from_secs(20), latest.changed()).await.unwrap().unwrap();
        }
        assert!(matches!(inbox.try_recv(), Ok(Report::Node(_))));
        assert!(inbox.try_recv().is_err(), "a second report before its time");
        drop(pacer);
        drain.begin();
        task.await.unwrap();
    }

    #[test]
    fn only_the_first_generation_is_slow() {
        for (generation, seconds) in
            [(None, 2), (Some(Generation::G1), 8), (Some(Generation::G2), 2), (Some(Generation::G4), 2)]
        {
            assert_eq!(pace(generation), Duration::from_secs(seconds), "{generation:?}");
        }
    }
}
