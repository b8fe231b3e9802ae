//! The README's share of a run: a picture, and a table between two marks.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::case::{Figure, Ground, figure};
use super::plot;
use super::report::Report;

const PICTURE: &str = "docs/bench.svg";
const BEGIN: &str = "<!-- bench: begin -->\n";
const END: &str = "<!-- bench: end -->";

const COLUMNS: [(&str, Figure, Ground); 7] = [
    ("TCP stream", figure::TCP_STREAM, Ground::PASS),
    ("on wire `seg`", figure::TCP_STREAM, Ground::SEG),
    ("TCP request/ response", figure::TCP_RR, Ground::PASS),
    ("UDP request/ response", figure::UDP_RR, Ground::PASS),
    ("connect, request, close", figure::CONNECTS, Ground::PASS),
    ("UDP, 64 bytes", figure::UDP_SMALL, Ground::PASS),
    ("CPU per Gbit", figure::CPU, Ground::PASS),
];

const ROWS: [(&str, &str, &str); 9] = [
    ("**eBPF**, by service address, of a direct veth", "ebpf", "direct"),
    ("of plain routing", "ebpf", "routed"),
    ("of VXLAN + DNAT, 1,000 services", "ebpf", "vxlan+dnat"),
    ("of the same without translation", "ebpf", "ebpf-instance"),
    ("towards an upstream peer, of a direct veth", "ebpf-bare", "direct"),
    ("on one node, of a plain bridge", "local", "bridge"),
    ("**TUN**, by service address, of plain routing", "tun", "routed"),
    ("of wireguard-go (which encrypts)", "tun", "wireguard-go"),
    ("of eBPF", "tun", "ebpf"),
];

/// Writes both below `root`.
///
/// # Errors
/// Where the README has lost its marks, or cannot be written.
pub fn write(root: &Path, report: &Report) -> Result<()> {
    let path = root.join("README.md");
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let text = replaced(&text, &table(report)).with_context(|| format!("{} has no marks", path.display()))?;
    fs::write(&path, text).with_context(|| path.display().to_string())?;
    let picture = root.join(PICTURE);
    fs::write(&picture, plot::svg(report)).with_context(|| picture.display().to_string())
}

/// What is between the marks becomes `inner`.
fn replaced(text: &str, inner: &str) -> Option<String> {
    let (before, rest) = text.split_once(BEGIN)?;
    let (_, after) = rest.split_once(END)?;
    Some(format!("{before}{BEGIN}{inner}{END}{after}"))
}

/// Medians of paired ratios.
fn table(report: &Report) -> String {
    let mut text = format!("![Container to container on two nodes]({PICTURE})\n\n|");
    for (name, ..) in COLUMNS {
        let _ = write!(text, " | {name}");
    }
    text += " |\n|---";
    text += &"|---".repeat(COLUMNS.len());
    text += "|\n";
    for (name, ours, base) in ROWS {
        let ratio = |figure, ground| report.row(ground, figure)?.ratio(ours, base);
        let cells: Vec<_> = COLUMNS.iter().map(|(_, figure, ground)| ratio(*figure, *ground)).collect();
        if cells.iter().all(Option::is_none) {
            continue;
        }
        let _ = write!(text, "| {name}");
        for cell in cells {
            let _ = write!(text, " | {}", cell.map_or_else(String::new, |ratio| format!("{ratio:.2}")));
        }
        text += " |\n";
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::case::{Case, Sample};
    use super::*;

    #[test]
    fn only_what_is_between_the_marks_changes() {
        let mut report = Report::default();
        for (mode, value) in [("direct", 20.0), ("ebpf", 19.0)] {
            report.add(Ground::SEG, Case::TcpStream, mode, &Sample { value, ..Sample::default() });
        }
        let old = format!("a\n{BEGIN}old\n{END}\nz\n");
        let new = replaced(&old, &table(&report)).expect("both marks");
        assert!(new.starts_with("a\n") && new.ends_with("\nz\n") && !new.contains("old"), "{new}");
        let rows: Vec<_> = new.lines().filter(|line| line.contains("direct veth |")).collect();
        assert_eq!(rows, ["| **eBPF**, by service address, of a direct veth |  | 0.95 |  |  |  |  |  |"]);
        assert_eq!(replaced("no marks", ""), None);
    }
}
