//! Tells the cluster what sensors say, at a pace of their own and only where that is configured. Like all telemetry these reports are
//! never queued: one that finds no room is superseded by the next.

use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, watch};
use tokio::task;
use tokio::time::{MissedTickBehavior, interval};

use super::devices::{self, watch::Inventory};
use super::gps::{self, Fix};
use crate::config::SensorChoice;
use crate::drain::Drain;
use crate::model::{Device, DeviceKind, Report, Sample};

pub(super) struct Publisher {
    pub(super) choice: SensorChoice,
    pub(super) every: Duration,
    pub(super) devices: watch::Receiver<Inventory>,
    pub(super) fix: watch::Receiver<Option<Fix>>,
    pub(super) reports: mpsc::Sender<Report>,
}

impl Publisher {
    /// Until the drain begins.
    pub(super) async fn run(self, drain: Drain) {
        let mut ticks = interval(self.every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = drain.wait() => return,
                _ = ticks.tick() => {}
            }
            let wanted: Vec<Device> =
                self.devices.borrow().iter().filter(|device| self.takes(device)).cloned().collect();
            let fix = *self.fix.borrow();
            // A sensor on a slow bus takes its time.
            let Ok(samples) = task::spawn_blocking(move || samples(&wanted, fix)).await else { continue };
            for sample in samples {
                if let Err(mpsc::error::TrySendError::Closed(_)) =
                    self.reports.try_send(Report::Sensor(Box::new(sample)))
                {
                    return;
                }
            }
        }
    }

    fn takes(&self, device: &Device) -> bool {
        match &self.choice {
            SensorChoice::Off => false,
            SensorChoice::All => true,
            SensorChoice::Named(names) => names.contains(&device.name),
        }
    }
}

/// Of each device that says anything.
fn samples(devices: &[Device], fix: Option<Fix>) -> Vec<Sample> {
    let samples = devices.iter().filter_map(|device| {
        let readings = match device.kind {
            DeviceKind::Gps if device.name == gps::NAME => fix?.readings(),
            _ => devices::read(device),
        };
        let time = SystemTime::now();
        (!readings.is_empty()).then(|| Sample { device: device.name.clone(), kind: device.kind, time, readings })
    });
    samples.collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::devices::{fixture, scan};
    use super::*;

    #[tokio::test]
    async fn chosen_sensors_are_told_of_again_and_again_and_others_are_not() {
        let fixture = fixture();
        let mut attached = scan(&fixture);
        attached.push(gps::device(&crate::config::GpsSource::Gpsd("h:1".into())));
        let fix = Fix { latitude: 1.0, longitude: 2.0, altitude: None, speed: None };
        let (reports, mut told) = mpsc::channel(64);
        let drain = Drain::new(Duration::from_secs(1));
        let publisher = Publisher {
            choice: SensorChoice::Named(vec!["bme280".into(), "gps".into(), "video0".into(), "absent".into()]),
            every: Duration::from_millis(50),
            devices: watch::channel(Arc::new(attached)).1,
            fix: watch::channel(Some(fix)).1,
            reports,
        };
        let task = tokio::spawn(publisher.run(drain.clone()));
        let mut names = Vec::new();
        while names.len() < 4 {
            let report = tokio::time::timeout(Duration::from_secs(20), told.recv()).await.unwrap();
            let Some(Report::Sensor(sample)) = report else { panic!("{report:?}") };
            names.push((sample.device, sample.readings.len()));
        }
        assert_eq!(names[..2], [("bme280".to_owned(), 3), ("gps".to_owned(), 2)], "a camera says nothing");
        assert_eq!(names[2..], names[..2]);
        drain.begin();
        task.await.unwrap();
    }
}
