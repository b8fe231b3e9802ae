//! What everything attached says, for whoever asks at any time: several may scrape at once, and a thermometer on a wire takes the better
//! part of a second. Devices are asked one after another, in one round at a time that all who ask wait for. One that does not answer keeps
//! its thread until it does, and is not asked again meanwhile: it costs that one, however often somebody asks.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use tokio::task;
use tokio::time::timeout;

use super::devices::{self, watch::Inventory};
use crate::model::{Device, Sample};

/// So long whoever asks waits for the end of a round.
const ROUND: Duration = Duration::from_secs(2);
/// Whoever is slow and well has answered by then.
const ANSWER: Duration = Duration::from_secs(5);
/// Devices that may keep a thread each; while so many do, nobody is asked.
const MOST_SILENT: usize = 64;

/// Handle to what was read last. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Readings(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    devices: watch::Receiver<Inventory>,
    round: Duration,
    answer: Duration,
    /// A round is under way.
    busy: watch::Sender<bool>,
    state: Mutex<State>,
}

/// By the names of devices.
#[derive(Debug, Default)]
struct State {
    known: BTreeMap<String, Sample>,
    /// A thread waits for their answer.
    asked: BTreeSet<String>,
    /// They have not answered in time, which was said.
    silent: BTreeSet<String>,
}

impl Readings {
    pub fn new(devices: watch::Receiver<Inventory>) -> Self {
        Self::patient(devices, ROUND, ANSWER)
    }

    fn patient(devices: watch::Receiver<Inventory>, round: Duration, answer: Duration) -> Self {
        let busy = watch::Sender::new(false);
        Self(Arc::new(Shared { devices, round, answer, busy, state: Mutex::default() }))
    }

    /// What everything attached says now. What is not read in time is told as it was read last; what does not answer is left out.
    pub async fn now(&self) -> Vec<Sample> {
        let mut busy = self.0.busy.subscribe();
        if self.0.busy.send_if_modified(|busy| !std::mem::replace(busy, true)) {
            tokio::spawn(round(self.0.clone()));
        }
        // Not by then: the round goes on, for whoever asks next.
        let _ = timeout(self.0.round, busy.wait_for(|busy| !busy)).await;
        self.0.state().known.values().cloned().collect()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while the lock is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn round(shared: Arc<Shared>) {
    let attached = shared.devices.borrow().clone();
    shared.state().keep_those(&attached);
    for device in attached.iter() {
        if !device.channels.is_empty() {
            ask(&shared, device).await;
        }
    }
    shared.busy.send_replace(false);
}

async fn ask(shared: &Arc<Shared>, device: &Device) {
    if !shared.state().asks(&device.name) {
        return;
    }
    let (reader, asked) = (shared.clone(), device.clone());
    let reading = task::spawn_blocking(move || {
        let readings = devices::read(&asked);
        let sample = Sample { device: asked.name, kind: asked.kind, time: SystemTime::now(), readings };
        reader.state().answered(sample);
    });
    let in_time = matches!(timeout(shared.answer, reading).await, Ok(Ok(())));
    shared.state().judge(&device.name, in_time);
}

impl State {
    /// What is attached no more says nothing.
    fn keep_those(&mut self, attached: &[Device]) {
        let names: BTreeSet<&str> = attached.iter().map(|device| device.name.as_str()).collect();
        self.known.retain(|name, _| names.contains(name.as_str()));
        self.silent.retain(|name| names.contains(name.as_str()));
    }

    /// May this one be asked? Not while its thread still waits.
    fn asks(&mut self, device: &str) -> bool {
        let free = self.asked.len() < MOST_SILENT && self.asked.insert(device.to_owned());
        if !free {
            self.known.remove(device);
        }
        free
    }

    fn answered(&mut self, sample: Sample) {
        self.asked.remove(&sample.device);
        self.known.insert(sample.device.clone(), sample);
    }

    fn judge(&mut self, device: &str, in_time: bool) {
        if in_time {
            if self.silent.remove(device) {
                tracing::info!(device, "a sensor has answered again");
            }
            return;
        }
        // A value that nobody confirms is none.
        self.known.remove(device);
        if self.silent.insert(device.to_owned()) {
            tracing::warn!(device, "a sensor does not answer: metrics go without it until it does");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, OpenOptions};
    use std::path::Path;
    use std::time::Instant;

    use tokio::runtime::{Builder, Runtime};

    use super::*;
    use crate::model::{Channel, DeviceKind, Unit};

    const SHORT: Duration = Duration::from_secs(1);
    const LONG: Duration = Duration::from_secs(30);

    /// Of three thermometers the middle one does not answer.
    fn board() -> (tempfile::TempDir, Inventory) {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "c"] {
            fs::write(dir.path().join(name), "21500\n").unwrap();
        }
        nix::unistd::mkfifo(&dir.path().join("b"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let devices = ["a", "b", "c"].map(|name| thermometer(dir.path(), name));
        (dir, Arc::new(devices.into()))
    }

    fn thermometer(dir: &Path, name: &str) -> Device {
        let (path, unit) = (dir.join(name), Unit::Celsius);
        let channel = Channel { name: "temperature".into(), unit, path, offset: 0.0, scale: 1e-3 };
        Device { name: name.into(), kind: DeviceKind::OneWire, channels: vec![channel], ..Device::default() }
    }

    /// With as many threads for what blocks.
    fn runtime(threads: usize) -> Runtime {
        Builder::new_current_thread().enable_all().max_blocking_threads(threads).build().unwrap()
    }

    async fn told(readings: &Readings) -> Vec<String> {
        let samples = readings.now().await.into_iter();
        samples.filter(|sample| !sample.readings.is_empty()).map(|sample| sample.device).collect()
    }

    #[test]
    fn a_sensor_that_never_answers_costs_one_thread_and_no_other_sensor() {
        let (_dir, devices) = board();
        let runtime = runtime(2);
        let heard = runtime.block_on(async {
            let readings = Readings::patient(watch::channel(devices).1, LONG, SHORT);
            let mut heard = Vec::new();
            for _ in 0..4 {
                heard.push(told(&readings).await);
            }
            heard
        });
        runtime.shutdown_background();
        assert_eq!(heard, [["a", "c"]; 4]);
    }

    #[test]
    fn whoever_asks_waits_a_moment_and_gets_what_was_read() {
        let (_dir, devices) = board();
        let runtime = runtime(1);
        let began = Instant::now();
        let heard = runtime.block_on(async {
            let readings = Readings::patient(watch::channel(devices).1, SHORT, 10 * LONG);
            tokio::join!(told(&readings), told(&readings))
        });
        runtime.shutdown_background();
        assert_eq!(heard, (vec!["a".to_owned()], vec!["a".to_owned()]));
        assert!(began.elapsed() < LONG, "{:?}", began.elapsed());
    }

    #[test]
    fn a_sensor_that_answers_after_all_is_told_again_and_one_that_goes_is_not() {
        let (dir, devices) = board();
        let runtime = runtime(2);
        let (attach, attached) = watch::channel(devices.clone());
        let heard = runtime.block_on(async {
            let readings = Readings::patient(attached, LONG, SHORT);
            let silent = told(&readings).await;
            // Its thread has the pipe open; the next one finds a file.
            let file = dir.path().join("b");
            let pipe = OpenOptions::new().write(true).open(&file).unwrap();
            fs::remove_file(&file).unwrap();
            fs::write(&file, "19000\n").unwrap();
            drop(pipe);
            let deadline = Instant::now() + LONG;
            let mut again = told(&readings).await;
            while again.len() < 3 && Instant::now() < deadline {
                again = told(&readings).await;
            }
            attach.send_replace(Arc::new(devices[1..].to_vec()));
            [silent, again, told(&readings).await]
        });
        runtime.shutdown_background();
        assert_eq!(heard, [vec!["a", "c"], vec!["a", "b", "c"], vec!["b", "c"]]);
    }
}
