//! Plain text for people: aligned columns, sizes and times in the unit that fits.

/// Rows under a heading, each column as wide as its widest cell. The last column is not padded.
pub(super) fn table<const N: usize>(heading: [&str; N], rows: &[[String; N]]) -> String {
    let heading = heading.map(str::to_owned);
    let rows: Vec<[String; N]> = rows.iter().map(|row| row.clone().map(|cell| printable(&cell))).collect();
    let mut widths = [0; N];
    for row in std::iter::once(&heading).chain(&rows) {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |row: &[String; N]| {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        format!("{}\n", cells.join("  ").trim_end())
    };
    std::iter::once(&heading).chain(&rows).map(line).collect()
}

/// Names and values under each other, without those that have no value.
pub(super) fn list(pairs: &[(&str, String)]) -> String {
    let pairs: Vec<_> = pairs.iter().filter(|(_, value)| !value.is_empty()).collect();
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    pairs.iter().map(|(name, value)| format!("{name:<width$}  {}\n", printable(value))).collect()
}

/// Text from images, clusters and runtimes must not steer the terminal.
fn printable(text: &str) -> String {
    text.chars().map(|letter| if letter.is_control() { '\u{fffd}' } else { letter }).collect()
}

pub(super) fn mebibytes(number: u64) -> String {
    match number {
        0..1024 => format!("{number} MiB"),
        _ => format!("{:.1} GiB", number as f64 / 1024.0),
    }
}

pub(super) fn seconds(number: u64) -> String {
    let (days, hours, minutes) = (number / 86_400, number / 3600 % 24, number / 60 % 60);
    match number {
        0..60 => format!("{number}s"),
        60..3600 => format!("{minutes}m {}s", number % 60),
        3600..86_400 => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

pub(super) fn percent(number: f64) -> String {
    format!("{number:.0}%")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [["web#0".into(), "running".into()], ["a-longer-name#12".into(), "évil\u{1b}[31m".into()]];
        assert_eq!(
            table(["NAME", "STATE"], &rows),
            "NAME              STATE\nweb#0             running\na-longer-name#12  évil\u{fffd}[31m\n"
        );
        assert_eq!(table(["NAME"], &[]), "NAME\n");
        assert_eq!(list(&[("a", "1".into()), ("none", String::new()), ("bcd", "2".into())]), "a    1\nbcd  2\n");
    }

    #[test]
    fn sizes_and_times_are_readable() {
        for (number, text) in [(0, "0s"), (59, "59s"), (61, "1m 1s"), (3_700, "1h 1m"), (90_000, "1d 1h")] {
            assert_eq!(seconds(number), text);
        }
        for (number, text) in [(0, "0 MiB"), (1023, "1023 MiB"), (1536, "1.5 GiB"), (24 << 10, "24.0 GiB")] {
            assert_eq!(mebibytes(number), text);
        }
    }
}
