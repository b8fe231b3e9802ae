//! The same families as an OpenTelemetry collector takes them: OTLP in its JSON form (opentelemetry.io/docs/specs/otlp, "JSON Protobuf
//! Encoding"; numbers of 64 bits are text there). A collector that hands them to Prometheus adds `_total` to counters itself, so that
//! names are the same by either way.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use super::{Family, Kind, Snapshot, families};

/// What every name begins with.
const PREFIX: &str = "node_engine_";
/// `AGGREGATION_TEMPORALITY_CUMULATIVE`
const CUMULATIVE: u8 = 2;

/// A request to a collector's `/v1/metrics`. `node` and `id` are whom it is about.
pub fn encode(snapshot: &Snapshot, node: &str, id: &str, now: SystemTime) -> String {
    let time = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos().to_string();
    let families = families::of(snapshot);
    let metrics: Vec<Value> =
        families.iter().filter(|family| !family.samples.is_empty()).map(|family| metric(family, &time)).collect();
    let resource = [
        ("service.name", "node-engine"),
        ("service.version", snapshot.version),
        ("service.instance.id", id),
        ("host.name", node),
    ];
    let attributes: Vec<Value> = resource
        .into_iter()
        .filter(|(_, value)| !value.is_empty())
        .map(|(name, value)| attribute(name, value))
        .collect();
    let scope = json!({"scope": {"name": "node-engine", "version": snapshot.version}, "metrics": metrics});
    json!({"resourceMetrics": [{"resource": {"attributes": attributes}, "scopeMetrics": [scope]}]}).to_string()
}

fn metric(family: &Family, time: &str) -> Value {
    let point = |(labels, value): &(Vec<(&'static str, String)>, f64)| {
        let attributes: Vec<Value> = labels.iter().map(|(name, value)| attribute(name, value)).collect();
        json!({"attributes": attributes, "timeUnixNano": time, "asDouble": value})
    };
    let points: Vec<Value> = family.samples.iter().map(point).collect();
    let name = format!("{PREFIX}{}", family.name);
    match family.kind {
        Kind::Gauge => json!({"name": name, "description": family.help, "gauge": {"dataPoints": points}}),
        Kind::Counter => json!({
            "name": name,
            "description": family.help,
            "sum": {"aggregationTemporality": CUMULATIVE, "isMonotonic": true, "dataPoints": points},
        }),
    }
}

fn attribute(name: &str, value: &str) -> Value {
    json!({"key": name, "value": {"stringValue": value}})
}
