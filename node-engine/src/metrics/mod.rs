//! What is known of the node as metrics, in the text formats of Prometheus and OpenMetrics, and in that of OpenTelemetry's collectors. A snapshot comes in, text goes out; nothing
//! is kept between two scrapes, so nothing can disagree with what `status`, `stats` and `hardware` show.
//!
//! Names follow the conventions (prometheus.io/docs/practices/naming): base units, `_total` on counters, one prefix. Labels come from
//! bounded sets: devices, reasons of the datapath, and at most [`MOST_INSTANCES`] instances.

mod families;
pub mod otlp;

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, prometheus_text, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use crate::model::{EventKind, InstanceUsage, NodeUsage, Sample, Sent};

/// Instances that have series of their own; what is beyond shows in the number of instances.
pub const MOST_INSTANCES: usize = 512;
/// Sensors' values.
pub const MOST_READINGS: usize = 1024;

/// Everything that becomes metrics.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub version: &'static str,
    pub architecture: String,
    /// Seconds since 1970.
    pub started_seconds: f64,
    pub connected: bool,
    pub usage: NodeUsage,
    /// How many are in each state.
    pub states: Vec<(&'static str, usize)>,
    pub instances: Vec<InstanceUsage>,
    pub services: usize,
    pub peers: usize,
    /// Kind (`carried`, `dropped`, `refused`, `level`), name, value.
    pub counters: Vec<(&'static str, String, u64)>,
    pub sent: Sent,
    pub events: Vec<(EventKind, u64)>,
    pub samples: Vec<Sample>,
    pub process: Process,
}

/// The daemon itself.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Process {
    pub cpu_seconds: f64,
    pub resident_bytes: u64,
    pub open_files: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Prometheus,
    OpenMetrics,
}

impl Format {
    /// By what a scraper accepts; the older format unless it asks for the newer.
    pub fn accepted(accept: &str) -> Self {
        if accept.contains("application/openmetrics-text") { Self::OpenMetrics } else { Self::Prometheus }
    }

    pub fn content_type(self) -> &'static str {
        match self {
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
        }
    }
}

/// The snapshot as text.
pub fn encode(snapshot: &Snapshot, format: Format) -> String {
    let mut registry = Registry::with_prefix("node_engine");
    registry.register_collector(Box::new(Families(families::of(snapshot))));
    let mut text = String::new();
    let written = match format {
        Format::Prometheus => prometheus_text::encode(&mut text, &registry),
        Format::OpenMetrics => text::encode(&mut text, &registry),
    };
    written.expect("a text takes everything");
    text
}

/// Series of one name. A counter's name comes without `_total`, which the format adds.
#[derive(Clone, Debug, PartialEq)]
struct Family {
    name: &'static str,
    help: &'static str,
    kind: Kind,
    samples: Vec<(Vec<(&'static str, String)>, f64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
}

struct Families(Vec<Family>);

impl fmt::Debug for Families {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} families", self.0.len())
    }
}

impl Collector for Families {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for family in self.0.iter().filter(|family| !family.samples.is_empty()) {
            let kind = match family.kind {
                Kind::Counter => MetricType::Counter,
                Kind::Gauge => MetricType::Gauge,
            };
            let mut metric = encoder.encode_descriptor(family.name, family.help, None, kind)?;
            for (labels, value) in &family.samples {
                let mut series = metric.encode_family(labels)?;
                match family.kind {
                    Kind::Counter => series.encode_counter::<Vec<(&str, String)>, f64, f64>(value, None)?,
                    Kind::Gauge => series.encode_gauge(value)?,
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
