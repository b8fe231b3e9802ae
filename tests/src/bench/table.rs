//! A run for the terminal: a table with bars, ratios beside their goals, programs, scale.

use std::fmt::Write;

use super::goals::Outcome;
use super::report::{Judged, Report, Row};

/// Characters of a bar as long as the best mode's.
const BAR: f64 = 40.0;

/// All of it.
pub fn text(report: &Report) -> String {
    let mut text = String::new();
    for row in &report.rows {
        text += &case(row);
    }
    text += &goals(&report.judged());
    text += &programs(report);
    text += &scale(report);
    text
}

/// Each mode's median, and its part of the first mode's.
fn case(row: &Row) -> String {
    let figure = row.figure;
    let mtu = row.ground.mtu;
    let mut text = format!(
        "\n{} ({}, {} is better; wire {}, MTU {mtu})\n",
        figure.name,
        figure.unit,
        figure.better,
        row.ground.wire.name()
    );
    let medians: Vec<(&str, f64)> = row.modes.iter().filter_map(|(mode, _)| Some((*mode, row.median(mode)?))).collect();
    let largest = medians.iter().map(|(_, median)| *median).fold(0.0, f64::max);
    let first = medians.first().map_or(0.0, |(_, median)| *median);
    for (mode, median) in medians {
        let bar = "█".repeat((median / largest.max(f64::MIN_POSITIVE) * BAR).round() as usize);
        let part = if first > 0.0 { median / first } else { 0.0 };
        let _ = writeln!(text, "  {mode:<14} {:>10} {part:>5.2} {bar}", number(median));
    }
    text
}

fn goals(judged: &[Judged]) -> String {
    let mut text = String::from(
        "\nratios of the same run, paired by round (half of the rounds lie between), beside their goals\n",
    );
    for Judged { goal, value, quartiles: [low, high], outcome } in judged {
        let words = outcome.words();
        let _ = writeln!(
            text,
            "  {:<20} {:<28} {value:>5.2} ({low:.2}–{high:.2})  goal {:.2}  {words}",
            goal.ratio(),
            goal.case(),
            goal.at_least
        );
    }
    let count = |wanted| judged.iter().filter(|one| one.outcome == wanted).count();
    let (reached, nearly, short) = (count(Outcome::Reached), count(Outcome::Nearly), count(Outcome::Short));
    let _ = writeln!(text, "  {reached} reached, {nearly} within 5 %, {short} short");
    text
}

fn programs(report: &Report) -> String {
    if report.programs.is_empty() {
        return String::new();
    }
    let mut text = String::from("\nprograms, by BPF_PROG_TEST_RUN\n");
    for program in &report.programs {
        let (verified, jited) = (program.verified, program.jited);
        let _ = writeln!(
            text,
            "  {:<20} {verified:>6} instructions verified, {jited:>5} bytes of machine code",
            program.name
        );
        for cost in &program.packets {
            let _ = writeln!(text, "    {:<24} {:>5.0} ns", cost.packet, cost.ns);
        }
    }
    text
}

fn scale(report: &Report) -> String {
    if report.scale.is_empty() {
        return String::new();
    }
    let mut text = String::from("\nscale\n");
    for one in &report.scale {
        let goal = format!("goal {} {}", if one.at_least { "≥" } else { "≤" }, number(one.goal));
        let _ = writeln!(
            text,
            "  {:<52} {:>10} {:<9} {goal}  {}",
            one.name,
            number(one.value),
            one.unit,
            one.outcome().words()
        );
    }
    text
}

pub fn number(value: f64) -> String {
    match value {
        _ if value < 1.0 => format!("{value:.3}"),
        _ if value < 100.0 => format!("{value:.2}"),
        _ => format!("{value:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::case::{Case, Ground, Sample};
    use super::*;

    #[test]
    fn what_falls_short_is_said() {
        let mut report = Report::default();
        for (mode, value) in [("direct", 10.0), ("ebpf", 5.0)] {
            report.add(Ground::PASS, Case::TcpStream, mode, &Sample { value, ..Sample::default() });
        }
        let text = text(&report);
        let lines: Vec<&str> = text.lines().filter(|line| line.contains("ebpf")).collect();
        assert!(lines[0].contains("0.50") && lines[0].ends_with(&"█".repeat(20)), "{text}");
        assert!(lines.iter().any(|line| line.contains("ebpf/direct") && line.ends_with("short")), "{text}");
    }
}
