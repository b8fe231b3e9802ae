//! A run as a picture: for each kind of traffic the modes' share of the limit, as bars. Plain SVG, legible on light and dark pages.

use std::fmt::Write;

use super::case::{Figure, Ground, figure};
use super::report::{Report, Row};
use super::table::number;

/// The figures of the picture, with the name that people know them by.
const PANELS: [(Figure, Ground, &str); 6] = [
    (figure::TCP_STREAM, Ground::PASS, "TCP stream"),
    (figure::TCP_STREAM, Ground::SEG, "TCP stream, segmented wire"),
    (figure::TCP_RR, Ground::PASS, "TCP request/response"),
    (figure::UDP_RR, Ground::PASS, "UDP request/response"),
    (figure::CONNECTS, Ground::PASS, "connect, request, close"),
    (figure::UDP_SMALL, Ground::PASS, "UDP, 64 bytes"),
];

/// The modes of the picture: name, what is written beside the bar, colour.
const MODES: [(&str, &str, &str); 8] = [
    ("direct", "one veth (the limit)", "#9aa5b1"),
    ("routed", "plain routing, no overlay", "#7b8794"),
    ("vxlan", "kernel VXLAN", "#7b8794"),
    ("vxlan+dnat", "VXLAN + DNAT", "#7b8794"),
    ("ebpf", "node-engine, eBPF", "#0e9f6e"),
    ("ebpf-bare", "to an upstream peer", "#57c49b"),
    ("tun", "node-engine, TUN", "#3f83f8"),
    ("wireguard-go", "wireguard-go (encrypts)", "#c27803"),
];

const WIDTH: usize = 880;
const PANEL: usize = WIDTH / 2;
const MARGIN: usize = 16;
/// Where bars begin in a panel, and how long the limit's is.
const LABELS: usize = 158;
const LONGEST: f64 = 168.0;
const LINE: usize = 19;
const HEAD: usize = 34;
const TITLE: usize = 48;

/// The picture; panels without a measurement are left out.
pub fn svg(report: &Report) -> String {
    let panels: Vec<_> =
        PANELS.iter().filter_map(|(figure, ground, title)| Some((report.row(*ground, *figure)?, *title))).collect();
    let height = |row: &Row| HEAD + LINE * MODES.iter().filter(|(mode, ..)| row.median(mode).is_some()).count();
    let heights: Vec<usize> =
        panels.chunks(2).map(|pair| pair.iter().map(|(row, _)| height(row)).max().unwrap_or(0) + MARGIN).collect();
    let total = TITLE + heights.iter().sum::<usize>();
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {total}\" font-family=\"system-ui,sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{total}\" rx=\"8\" fill=\"#ffffff\"/>\n\
         <text x=\"{MARGIN}\" y=\"30\" font-size=\"16\" font-weight=\"600\" fill=\"#1f2933\">Container to container on two nodes: \
         the part of one veth's speed that is left</text>\n"
    );
    let mut y = TITLE;
    for (pair, height) in panels.chunks(2).zip(&heights) {
        for (column, (row, title)) in pair.iter().enumerate() {
            svg += &panel(row, title, column * PANEL + MARGIN, y);
        }
        y += height;
    }
    svg + "</svg>\n"
}

fn panel(row: &Row, title: &str, x: usize, y: usize) -> String {
    let limit = row
        .median("direct")
        .unwrap_or_else(|| MODES.iter().filter_map(|(mode, ..)| row.median(mode)).fold(0.0, f64::max));
    let mut text = format!("<text x=\"{x}\" y=\"{}\" font-weight=\"600\" fill=\"#1f2933\">{title}</text>\n", y + 18);
    let modes = MODES.iter().filter_map(|(mode, words, colour)| Some((words, colour, row.median(mode)?)));
    for (line, (words, colour, median)) in modes.enumerate() {
        let part = if limit > 0.0 { median / limit } else { 0.0 };
        let (top, bar) = (y + HEAD - 8 + line * LINE, x + LABELS);
        let width = (part * LONGEST).clamp(1.0, LONGEST * 1.2);
        let _ = writeln!(
            text,
            "<text x=\"{}\" y=\"{}\" text-anchor=\"end\" fill=\"#3e4c59\">{words}</text>\
             <rect x=\"{bar}\" y=\"{top}\" width=\"{width:.1}\" height=\"13\" rx=\"2\" fill=\"{colour}\"/>\
             <text x=\"{:.1}\" y=\"{}\" fill=\"#3e4c59\">{part:.2} · {}</text>",
            bar - 8,
            top + 11,
            bar as f64 + width + 6.0,
            top + 11,
            amount(row, median),
        );
    }
    text
}

/// The figure with its unit, short enough for a bar's end.
fn amount(row: &Row, value: f64) -> String {
    if row.figure.unit.starts_with("Gbit") {
        format!("{} {}", number(value), row.figure.unit)
    } else {
        format!("{:.1} k/s", value / 1e3)
    }
}

#[cfg(test)]
mod tests {
    use super::super::case::{Case, Sample};
    use super::*;

    #[test]
    fn bars_are_as_long_as_their_part_of_the_limit() {
        let mut report = Report::default();
        for (mode, value) in [("direct", 20.0), ("ebpf", 10.0)] {
            report.add(Ground::PASS, Case::TcpStream, mode, &Sample { value, ..Sample::default() });
        }
        let svg = svg(&report);
        assert!(svg.contains(&format!("width=\"{:.1}\"", LONGEST / 2.0)), "{svg}");
        assert!(svg.contains("0.50 · 10.00 Gbit/s"), "{svg}");
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
    }
}
