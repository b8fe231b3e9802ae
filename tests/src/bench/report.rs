//! What a run found: medians, paired ratios, and a document for machines.

use std::collections::BTreeMap;

use serde::Serialize;

use super::case::{Case, Figure, Ground, Sample, figure};
use super::goals::{Goal, Outcome};
use super::programs::Program;
use super::scale::Measured;

/// The samples of a run.
#[derive(Debug, Default)]
pub struct Report {
    pub rows: Vec<Row>,
    pub programs: Vec<Program>,
    pub scale: Vec<Measured>,
}

/// One figure on one ground, by mode.
#[derive(Debug)]
pub struct Row {
    pub ground: Ground,
    pub figure: Figure,
    pub modes: Vec<(&'static str, Vec<f64>)>,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

/// A goal that the run says something about.
#[derive(Clone, Copy, Debug)]
pub struct Judged {
    pub goal: Goal,
    pub value: f64,
    /// Half of the rounds lie between these: how steady the machine was.
    pub quartiles: [f64; 2],
    pub outcome: Outcome,
}

#[derive(Debug, Serialize)]
struct Document<'a> {
    cases: Vec<CaseDocument>,
    ratios: BTreeMap<String, BTreeMap<String, f64>>,
    goals: Vec<GoalDocument>,
    programs: &'a [Program],
    scale: &'a [Measured],
}

#[derive(Debug, Serialize)]
struct CaseDocument {
    case: &'static str,
    unit: &'static str,
    better: &'static str,
    wire: &'static str,
    mtu: u32,
    modes: BTreeMap<&'static str, Spread>,
}

#[derive(Debug, Serialize)]
struct GoalDocument {
    ratio: String,
    case: String,
    goal: f64,
    value: f64,
    quartiles: [f64; 2],
    outcome: &'static str,
}

impl Report {
    pub fn add(&mut self, ground: Ground, case: Case, mode: &'static str, sample: &Sample) {
        for (figure, value) in case.figures(sample) {
            self.add_value(ground, figure, mode, value);
        }
    }

    fn add_value(&mut self, ground: Ground, figure: Figure, mode: &'static str, value: f64) {
        let at = self.rows.iter().position(|row| row.ground == ground && row.figure == figure).unwrap_or_else(|| {
            self.rows.push(Row { ground, figure, modes: Vec::new() });
            self.rows.len() - 1
        });
        let modes = &mut self.rows[at].modes;
        match modes.iter_mut().find(|(name, _)| *name == mode) {
            Some((_, samples)) => samples.push(value),
            None => modes.push((mode, vec![value])),
        }
    }

    /// Modes as they are listed, however they alternated.
    pub fn in_order(&mut self, modes: &[&str]) {
        for row in &mut self.rows {
            row.modes.sort_by_key(|(mode, _)| modes.iter().position(|other| other == mode));
        }
    }

    /// Adds what follows from two cases together.
    pub fn derive(&mut self, ground: Ground) {
        let (Some(four), Some(one)) = (self.row(ground, figure::TCP_STREAMS), self.row(ground, figure::TCP_STREAM))
        else {
            return;
        };
        let mut scalings = Vec::new();
        for (mode, four) in &four.modes {
            let pairs = one.samples(mode).into_iter().flatten().zip(four);
            scalings.extend(pairs.filter(|(one, _)| **one > 0.0).map(|(one, four)| (*mode, four / one)));
        }
        for (mode, scaling) in scalings {
            self.add_value(ground, figure::SCALING, mode, scaling);
        }
    }

    pub fn row(&self, ground: Ground, figure: Figure) -> Option<&Row> {
        self.rows.iter().find(|row| row.ground == ground && row.figure == figure)
    }

    /// Every mode of ours against every other: `ebpf/routed` → `tcp_stream` → 1.1. On other grounds than the usual one, the wire `pass`
    /// at an MTU of 1500, the figure's name says so: `tcp_stream:seg`, `tcp_stream:seg:jumbo`.
    pub fn ratios(&self) -> BTreeMap<String, BTreeMap<String, f64>> {
        let mut ratios: BTreeMap<String, BTreeMap<String, f64>> = BTreeMap::new();
        let ours = |mode: &str| mode.starts_with("ebpf") || mode == "tun" || mode == "local";
        for row in &self.rows {
            for (mode, _) in row.modes.iter().filter(|(mode, _)| ours(mode)) {
                for (base, _) in row.modes.iter().filter(|(base, _)| base != mode) {
                    if let Some(ratio) = row.ratio(mode, base) {
                        ratios.entry(format!("{mode}/{base}")).or_default().insert(row.name(), round(ratio));
                    }
                }
            }
        }
        ratios
    }

    /// The goals that the run has both sides of.
    pub fn judged(&self) -> Vec<Judged> {
        let judge = |goal: Goal| {
            let [low, value, high] = self.row(goal.ground, goal.figure)?.quartiles(goal.ours, goal.base)?;
            Some(Judged { goal, value, quartiles: [low, high], outcome: Outcome::of(value, goal.at_least) })
        };
        super::goals::all().into_iter().filter_map(judge).collect()
    }

    /// The run as a JSON document.
    pub fn json(&self) -> String {
        let cases = self.rows.iter().map(|row| CaseDocument {
            case: row.figure.name,
            unit: row.figure.unit,
            better: row.figure.better,
            wire: row.ground.wire.name(),
            mtu: row.ground.mtu,
            modes: row.modes.iter().map(|(mode, samples)| (*mode, Spread::of(samples))).collect(),
        });
        let goals = self.judged().into_iter().map(|judged| GoalDocument {
            ratio: judged.goal.ratio(),
            case: judged.goal.case(),
            goal: judged.goal.at_least,
            value: round(judged.value),
            quartiles: judged.quartiles.map(round),
            outcome: judged.outcome.words(),
        });
        let document = Document {
            cases: cases.collect(),
            ratios: self.ratios(),
            goals: goals.collect(),
            programs: &self.programs,
            scale: &self.scale,
        };
        serde_json::to_string_pretty(&document).expect("numbers and names serialise")
    }
}

impl Row {
    pub fn samples(&self, mode: &str) -> Option<&[f64]> {
        self.modes.iter().find(|(name, _)| *name == mode).map(|(_, samples)| samples.as_slice())
    }

    pub fn median(&self, mode: &str) -> Option<f64> {
        median(self.samples(mode)?.to_vec())
    }

    /// The median of the ratios of each round: what disturbs a round disturbs both.
    pub fn ratio(&self, ours: &str, base: &str) -> Option<f64> {
        self.quartiles(ours, base).map(|[_, median, _]| median)
    }

    /// A quarter, half and three quarters of the rounds' ratios are no larger than these.
    pub fn quartiles(&self, ours: &str, base: &str) -> Option<[f64; 3]> {
        let (ours, base) = (self.samples(ours)?, self.samples(base)?);
        let pairs = ours.iter().zip(base).filter(|(_, base)| **base > 0.0);
        let mut ratios: Vec<f64> = pairs.map(|(ours, base)| ours / base).collect();
        ratios.sort_by(f64::total_cmp);
        (!ratios.is_empty()).then(|| [1, 2, 3].map(|quarter| ratios[ratios.len() * quarter / 4]))
    }

    fn name(&self) -> String {
        format!("{}{}", self.figure.name, self.ground.suffix())
    }
}

impl Goal {
    pub fn ratio(&self) -> String {
        format!("{}/{}", self.ours, self.base)
    }

    pub fn case(&self) -> String {
        format!("{}{}", self.figure.name, self.ground.suffix())
    }
}

impl Spread {
    pub fn of(samples: &[f64]) -> Self {
        Self {
            median: median(samples.to_vec()).unwrap_or(0.0),
            min: samples.iter().copied().fold(f64::INFINITY, f64::min),
            max: samples.iter().copied().fold(0.0, f64::max),
        }
    }
}

pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

fn round(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let mut report = Report::default();
        for (ours, routed) in [(10.0, 20.0), (30.0, 30.0), (8.0, 10.0)] {
            for (mode, value) in [("ebpf", ours), ("routed", routed)] {
                let sample = Sample { value, busy: 0.5, ..Sample::default() };
                report.add(Ground::PASS, Case::TcpStream, mode, &sample);
                report.add(Ground::SEG, Case::TcpStream, mode, &sample);
                report.add(Ground::PASS, Case::TcpStreams, mode, &Sample { value: 3.0 * value, ..sample });
            }
        }
        report.derive(Ground::PASS);
        report
    }

    #[test]
    fn ratios_are_medians_of_paired_rounds() {
        let ratios = &report().ratios()["ebpf/routed"];
        assert_eq!((ratios["tcp_stream"], ratios["tcp_stream:seg"], ratios["tcp_scaling"]), (0.8, 0.8, 1.0));
        // Half a core for a fifth of the traffic.
        assert_eq!(report().row(Ground::PASS, figure::CPU).and_then(|row| row.median("routed")), Some(0.5 / 20.0));
    }

    #[test]
    fn goals_are_judged_where_both_modes_ran() {
        let report = report();
        let judged: Vec<_> =
            report.judged().iter().map(|one| (one.goal.ratio(), one.goal.case(), one.outcome)).collect();
        assert_eq!(
            judged,
            [
                ("ebpf/routed".into(), "tcp_stream".into(), Outcome::Short),
                ("ebpf/routed".into(), "tcp_stream:seg".into(), Outcome::Short),
                ("ebpf/routed".into(), "tcp_scaling".into(), Outcome::Reached),
            ]
        );
        assert_eq!((report.judged()[0].value, report.judged()[0].quartiles), (0.8, [0.5, 1.0]), "of 0.5, 0.8 and 1");
    }

    #[test]
    fn the_document_has_the_shape_that_others_read() {
        let document: serde_json::Value = serde_json::from_str(&report().json()).unwrap();
        let first = &document["cases"][0];
        assert_eq!((&first["case"], &first["unit"]), (&"tcp_stream".into(), &"Gbit/s".into()));
        assert_eq!((&first["better"], &first["wire"]), (&"higher".into(), &"pass".into()));
        assert_eq!(first["modes"]["routed"], serde_json::json!({"median": 20.0, "min": 10.0, "max": 30.0}));
        assert_eq!(document["ratios"]["ebpf/routed"]["tcp_stream"], 0.8);
    }
}
