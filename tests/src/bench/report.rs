//! What a run found: medians, ratios, a table for the terminal and a document for machines.

use std::collections::BTreeMap;

use serde::Serialize;

use super::load::{Case, Sample};
use super::rig::Wire;

/// The samples of a run, by wire, case and mode.
#[derive(Debug, Default)]
pub struct Report {
    rows: Vec<Row>,
}

#[derive(Debug)]
struct Row {
    wire: Wire,
    case: Case,
    modes: Vec<(&'static str, Vec<Sample>)>,
}

#[derive(Debug, Serialize)]
struct Document {
    cases: Vec<CaseDocument>,
    ratios: BTreeMap<String, BTreeMap<String, f64>>,
}

#[derive(Debug, Serialize)]
struct CaseDocument {
    case: &'static str,
    wire: &'static str,
    unit: &'static str,
    better: &'static str,
    modes: BTreeMap<&'static str, Spread>,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
    /// Microseconds, medians over the rounds; 0 where the case has no round trips.
    p50: f64,
    p99: f64,
}

impl Report {
    pub fn add(&mut self, wire: Wire, case: Case, mode: &'static str, sample: Sample) {
        let row = match self.rows.iter().position(|row| row.wire == wire && row.case == case) {
            Some(at) => &mut self.rows[at],
            None => {
                self.rows.push(Row { wire, case, modes: Vec::new() });
                let last = self.rows.len() - 1;
                &mut self.rows[last]
            }
        };
        match row.modes.iter_mut().find(|(name, _)| *name == mode) {
            Some((_, samples)) => samples.push(sample),
            None => row.modes.push((mode, vec![sample])),
        }
    }

    /// A table with bars: each mode's median, and its part of `direct`.
    pub fn table(&self) -> String {
        let mut text = String::new();
        for row in &self.rows {
            let best = row.spread("direct").map_or(0.0, |spread| spread.median);
            text += &format!("\n{} ({}, wire {})\n", row.case.name(), row.case.unit(), row.wire.name());
            for (mode, samples) in &row.modes {
                let spread = Spread::of(samples);
                let part = if best > 0.0 { spread.median / best } else { 0.0 };
                let bar = "█".repeat((part * 40.0).round().clamp(0.0, 60.0) as usize);
                let latency = if spread.p50 > 0.0 {
                    format!("  p50 {:.0} µs, p99 {:.0} µs", spread.p50, spread.p99)
                } else {
                    String::new()
                };
                text += &format!("  {mode:<12} {:>10} {part:>5.2} {bar}{latency}\n", number(spread.median));
            }
        }
        text
    }

    /// The run as a JSON document.
    pub fn json(&self) -> String {
        let cases = self.rows.iter().map(|row| CaseDocument {
            case: row.case.name(),
            wire: row.wire.name(),
            unit: row.case.unit(),
            better: "higher",
            modes: row.modes.iter().map(|(mode, samples)| (*mode, Spread::of(samples))).collect(),
        });
        let document = Document { cases: cases.collect(), ratios: self.ratios() };
        serde_json::to_string_pretty(&document).expect("numbers and names serialise")
    }

    /// Our modes against what there is without us, by case and wire: `ebpf/routed` → `tcp_stream:pass` → 0.96.
    pub fn ratios(&self) -> BTreeMap<String, BTreeMap<String, f64>> {
        let mut ratios: BTreeMap<String, BTreeMap<String, f64>> = BTreeMap::new();
        for row in &self.rows {
            for (ours, _) in row.modes.iter().filter(|(mode, _)| mode.starts_with("ebpf") || mode.starts_with("tun")) {
                for (base, _) in row.modes.iter().filter(|(mode, _)| mode != ours) {
                    if let Some(ratio) = row.ratio(ours, base) {
                        let case = format!("{}:{}", row.case.name(), row.wire.name());
                        ratios.entry(format!("{ours}/{base}")).or_default().insert(case, (ratio * 1e3).round() / 1e3);
                    }
                }
            }
        }
        ratios
    }
}

impl Row {
    fn samples(&self, mode: &str) -> Option<&[Sample]> {
        self.modes.iter().find(|(name, _)| *name == mode).map(|(_, samples)| samples.as_slice())
    }

    fn spread(&self, mode: &str) -> Option<Spread> {
        self.samples(mode).map(Spread::of)
    }

    /// The median of the ratios of each round: what disturbs a round disturbs both.
    fn ratio(&self, ours: &str, base: &str) -> Option<f64> {
        let (ours, base) = (self.samples(ours)?, self.samples(base)?);
        let ratios =
            ours.iter().zip(base).filter(|(_, base)| base.value > 0.0).map(|(ours, base)| ours.value / base.value);
        median(ratios.collect())
    }
}

impl Spread {
    fn of(samples: &[Sample]) -> Self {
        let of = |part: fn(&Sample) -> f64| median(samples.iter().map(part).collect()).unwrap_or(0.0);
        let values = || samples.iter().map(|sample| sample.value);
        Self {
            median: of(|sample| sample.value),
            min: values().fold(f64::INFINITY, f64::min),
            max: values().fold(0.0, f64::max),
            p50: of(|sample| sample.p50),
            p99: of(|sample| sample.p99),
        }
    }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn number(value: f64) -> String {
    if value < 100.0 { format!("{value:.2}") } else { format!("{value:.0}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_medians_of_paired_rounds() {
        let mut report = Report::default();
        for (ours, routed) in [(10.0, 20.0), (30.0, 30.0), (8.0, 10.0)] {
            for (mode, value) in [("ebpf", ours), ("routed", routed)] {
                report.add(Wire::Pass, Case::TcpStream, mode, Sample { value, p50: 0.0, p99: 0.0 });
            }
        }
        assert_eq!(report.ratios()["ebpf/routed"]["tcp_stream:pass"], 0.8);
        assert!(report.table().contains("tcp_stream"));
    }
}
