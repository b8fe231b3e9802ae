//! What a device says, on a topic of its own: `nodes/<id>/sensors/<name>`. Ours; no generation of the reference system has it.

use std::time::UNIX_EPOCH;

use serde::Serialize;

use super::node::finite;
use crate::model::Sample;

#[derive(Serialize)]
struct Message<'a> {
    sensor: &'a str,
    kind: &'static str,
    /// Seconds since 1970.
    time: f64,
    readings: Vec<Value<'a>>,
}

#[derive(Serialize)]
struct Value<'a> {
    channel: &'a str,
    value: f64,
    unit: &'static str,
}

/// The payload of one sample.
pub fn sensor(sample: &Sample) -> String {
    let since = sample.time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let readings = sample.readings.iter().map(|reading| Value {
        channel: &reading.channel,
        value: finite(reading.value),
        unit: reading.unit.word(),
    });
    super::text(&Message {
        sensor: &sample.device,
        kind: sample.kind.word(),
        // Milliseconds are enough, and a shorter text.
        time: since.as_millis() as f64 / 1000.0,
        readings: readings.collect(),
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::model::{DeviceKind, Reading, Unit};

    #[test]
    fn a_sample_has_unit_and_time() {
        let sample = Sample {
            device: "bme280".into(),
            kind: DeviceKind::Iio,
            time: UNIX_EPOCH + Duration::from_micros(1_795_820_701_123_456),
            readings: vec![Reading { channel: "temp".into(), unit: Unit::Celsius, value: 21.34 }],
        };
        assert_eq!(
            sensor(&sample),
            r#"{"sensor":"bme280","kind":"iio","time":1795820701.123,"readings":[{"channel":"temp","value":21.34,"unit":"celsius"}]}"#
        );
    }
}
