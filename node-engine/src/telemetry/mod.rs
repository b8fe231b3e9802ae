//! What the node has and uses. One task samples the host and its GPUs, offers the latest sample to whoever watches, and reports it
//! to the cluster at the cluster's pace. Samples are never queued: one that finds no room is superseded by the next. Others keep the
//! list of what is attached, follow a receiver of positions, and tell the cluster what sensors say; [`readings`] says it to whoever asks.

mod clock;
pub mod devices;
pub mod gps;
mod gpu;
pub mod hardware;
mod health;
mod host;
pub mod readings;
mod roots;
mod sensors;
mod slow;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::{self, JoinHandle};
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::config::{Generation, SensorChoice, TelemetryConfig};
use crate::drain::Drain;
use crate::events::Events;
use crate::model::{NodeFacts, NodeUsage, Report, Technology};

use devices::watch::Inventory;
use host::Host;
use roots::Roots;
use slow::{Known, Slow};

/// How often the machine is looked at.
const SAMPLE: Duration = Duration::from_secs(2);

/// The sensors of this machine could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("{what} of this machine cannot be read: {reason}")]
pub struct SensorError {
    what: &'static str,
    reason: String,
}

/// What telemetry works with.
#[derive(Debug)]
pub struct Setup {
    pub config: TelemetryConfig,
    pub reports: mpsc::Sender<Report>,
    /// How often the cluster wants to hear of the node; may change at any time.
    pub pace: watch::Receiver<Duration>,
    pub events: Events,
    pub drain: Drain,
}

/// What it offers, and the tasks that do it.
#[derive(Debug)]
pub struct Telemetry {
    pub usage: watch::Receiver<NodeUsage>,
    /// Everything attached now.
    pub devices: watch::Receiver<Inventory>,
    pub tasks: Vec<(&'static str, JoinHandle<()>)>,
}

/// How often a cluster of this generation wants to hear of a node.
pub fn pace(generation: Option<Generation>) -> Duration {
    match generation {
        Some(Generation::G1) => Duration::from_secs(8),
        Some(Generation::G1b | Generation::G2 | Generation::G4) | None => Duration::from_secs(2),
    }
}

/// What never changes while the daemon runs.
pub fn facts(node_name: &str, technologies: Vec<Technology>) -> NodeFacts {
    host::facts(node_name, technologies)
}

/// Samples until the drain begins; the first report goes out at once.
///
/// # Errors
/// If the machine's sensors cannot be opened at all; a sensor that fails later keeps its last value.
pub async fn start(setup: Setup) -> Result<Telemetry, SensorError> {
    let Setup { config, reports, pace, events, drain } = setup;
    let failed = |error: task::JoinError| SensorError { what: "sensors", reason: error.to_string() };
    let roots = config.roots.clone();
    let gps = config.gps.as_ref().map(gps::device);
    let attached = {
        let (roots, gps) = (roots.clone(), gps.clone());
        task::spawn_blocking(move || devices::with(gps.as_ref(), devices::scan(&roots))).await.map_err(failed)?
    };
    let (found, attached) = watch::channel(Arc::new(attached));
    let watched = devices::watch::Watch { roots: roots.clone(), extra: gps, devices: found, events };
    let mut tasks = vec![("device watch", tokio::spawn(watched.run(drain.clone())))];

    let inventory = attached.clone();
    let host = task::spawn_blocking(Host::open).await.map_err(failed)??;
    let mut sampler = Sampler { host: Some(host), slow: Slow::new(roots.clone(), inventory), roots };
    let first = sampler.sample().await.map_err(failed)?;
    let (latest, usage) = watch::channel(first);
    tasks.push(("telemetry", tokio::spawn(run(sampler, latest, reports.clone(), pace, drain.clone()))));

    let (fixes, fix) = watch::channel(None);
    if let Some(source) = config.gps {
        tasks.push(("position", tokio::spawn(gps::run(source, fixes, drain.clone()))));
    }
    if config.sensors != SensorChoice::Off {
        let (choice, every) = (config.sensors, config.sensors_every);
        let publisher = sensors::Publisher { choice, every, devices: attached.clone(), fix, reports };
        tasks.push(("sensors", tokio::spawn(publisher.run(drain))));
    }
    Ok(Telemetry { usage, devices: attached, tasks })
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
        let sampled = tokio::select! {
            _ = drain.wait() => return,
            sampled = sampler.sample() => sampled,
        };
        let usage = match sampled {
            Ok(usage) => usage,
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
    /// Away only while it is read.
    host: Option<Host>,
    slow: Slow,
    roots: Roots,
}

impl Sampler {
    async fn sample(&mut self) -> Result<NodeUsage, task::JoinError> {
        let Known { disks, gpus, health } = self.slow.ask().await?.clone();
        let (host, roots) = (self.host.take(), self.roots.clone());
        // Reading /proc may block; the sampler travels to a thread that may.
        let read = task::spawn_blocking(move || {
            let mut host = host?;
            let usage = host.sample();
            Some((host, NodeUsage { disks, gpus, health: health::of_kernel(&roots, health), ..usage }))
        });
        let Some((host, usage)) = read.await? else { return Ok(NodeUsage::default()) };
        self.host = Some(host);
        Ok(usage)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::EventKind;

    fn setup(config: TelemetryConfig, pace: Duration) -> (Setup, mpsc::Receiver<Report>) {
        let (reports, inbox) = mpsc::channel(64);
        let (_, pace) = watch::channel(pace);
        let drain = Drain::new(Duration::from_secs(1));
        (Setup { config, reports, pace, events: Events::default(), drain }, inbox)
    }

    async fn ended(telemetry: Telemetry, drain: &Drain) {
        drain.begin();
        for (name, task) in telemetry.tasks {
            tokio::time::timeout(Duration::from_secs(20), task).await.expect(name).expect(name);
        }
    }

    #[tokio::test]
    async fn first_report_goes_out_at_once_and_is_what_watchers_see() {
        let (setup, mut inbox) = setup(TelemetryConfig::default(), pace(Some(Generation::G1)));
        let drain = setup.drain.clone();
        let telemetry = start(setup).await.unwrap();
        let report = tokio::time::timeout(Duration::from_secs(10), inbox.recv()).await.unwrap();
        let Some(Report::Node(usage)) = report else { panic!("expected usage, got {report:?}") };
        assert!(usage.memory_total_mib > 0);
        assert_eq!(telemetry.usage.borrow().cpus_logical, usage.cpus_logical);
        ended(telemetry, &drain).await;
    }

    #[tokio::test]
    async fn reports_keep_the_pace_and_samples_go_on_between() {
        let (setup, mut inbox) = setup(TelemetryConfig::default(), Duration::from_secs(3600));
        let drain = setup.drain.clone();
        let mut telemetry = start(setup).await.unwrap();
        for _ in 0..2 {
            tokio::time::timeout(Duration::from_secs(20), telemetry.usage.changed()).await.unwrap().unwrap();
        }
        assert!(matches!(inbox.try_recv(), Ok(Report::Node(_))));
        assert!(inbox.try_recv().is_err(), "a second report before its time, or a sensor that nobody asked for");
        ended(telemetry, &drain).await;
    }

    /// As a probe on a bad wire: whoever reads it waits.
    #[tokio::test]
    async fn what_does_not_answer_holds_up_nothing_else() {
        let board = devices::fixture();
        let zone = board.sys.join("class/thermal/thermal_zone0");
        let (file, kept) = (zone.join("temp"), zone.join("kept"));
        std::fs::rename(&file, &kept).unwrap();
        nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let config = TelemetryConfig { roots: (*board).clone(), ..TelemetryConfig::default() };
        let (setup, mut inbox) = setup(config, Duration::from_secs(2));
        let drain = setup.drain.clone();
        let began = Instant::now();
        let mut telemetry = start(setup).await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
        for _ in 0..2 {
            let report = tokio::time::timeout(Duration::from_secs(10), inbox.recv()).await.unwrap();
            let Some(Report::Node(usage)) = report else { panic!("expected usage, got {report:?}") };
            assert!(usage.memory_total_mib > 0 && usage.health.temperatures.is_empty(), "{usage:?}");
        }
        // The reader has the pipe open; the next one finds a file again.
        let pipe = std::fs::OpenOptions::new().write(true).open(&file).unwrap();
        std::fs::rename(&kept, &file).unwrap();
        drop(pipe);
        let answered = telemetry.usage.wait_for(|usage| !usage.health.temperatures.is_empty());
        tokio::time::timeout(Duration::from_secs(10), answered).await.expect("in time").unwrap();
        ended(telemetry, &drain).await;
    }

    /// The kernel itself says that something changed; what has changed meanwhile is a tree of files.
    #[tokio::test]
    #[ignore = "needs root"]
    async fn what_is_plugged_in_is_noticed_by_the_kernels_word() {
        let board = devices::fixture();
        let config =
            TelemetryConfig { roots: (*board).clone(), sensors: SensorChoice::All, ..TelemetryConfig::default() };
        let (setup, _inbox) = setup(config, Duration::from_secs(3600));
        let (events, drain) = (setup.events.clone(), setup.drain.clone());
        let mut telemetry = start(setup).await.unwrap();
        let known =
            |telemetry: &Telemetry, name: &str| telemetry.devices.borrow().iter().any(|device| device.name == name);
        assert!(known(&telemetry, "bme280") && !known(&telemetry, "tmp117"));

        board.write("sys/class/hwmon/hwmon7/name", "tmp117");
        board.write("sys/class/hwmon/hwmon7/temp1_input", "19500");
        board.remove("sys/bus/iio/devices/iio:device0");
        // As if the loopback device had come: harmless, and the kernel tells it to all who listen.
        std::fs::write("/sys/class/net/lo/uevent", "add").unwrap();
        // Long before it would be looked at again anyway.
        tokio::time::timeout(Duration::from_secs(20), telemetry.devices.changed()).await.expect("in time").unwrap();
        assert!(!known(&telemetry, "bme280") && known(&telemetry, "tmp117"));
        let mut heard = events.watch(10).unwrap();
        let mut told = Vec::new();
        while let Ok(event) = heard.try_recv() {
            told.push((event.kind, event.subject));
        }
        assert_eq!(told, [(EventKind::DeviceRemoved, "bme280".into()), (EventKind::DeviceAdded, "tmp117".into())]);
        ended(telemetry, &drain).await;
    }

    #[test]
    fn only_the_first_generation_is_slow() {
        for (generation, seconds) in [
            (None, 2),
            (Some(Generation::G1), 8),
            (Some(Generation::G1b), 2),
            (Some(Generation::G2), 2),
            (Some(Generation::G4), 2),
        ] {
            assert_eq!(pace(generation), Duration::from_secs(seconds), "{generation:?}");
        }
    }
}
