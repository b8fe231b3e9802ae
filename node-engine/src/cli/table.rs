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

pub(super) fn bytes(number: u64) -> String {
    match number {
        0..1024 => format!("{number} B"),
        1024..0x10_0000 => format!("{:.1} KiB", number as f64 / 1024.0),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", number as f64 / 1_048_576.0),
        _ => format!("{:.1} GiB", number as f64 / 1_073_741_824.0),
    }
}

/// A point in time, in UTC: `2026-11-27 23:05:01.123Z`.
pub(super) fn time(milliseconds: u64) -> String {
    let (days, rest) = (milliseconds / 86_400_000, milliseconds % 86_400_000);
    let (year, month, day) = date(days);
    let (hours, minutes, seconds) = (rest / 3_600_000, rest / 60_000 % 60, rest / 1000 % 60);
    format!("{year:04}-{month:02}-{day:02} {hours:02}:{minutes:02}:{seconds:02}.{:03}Z", rest % 1000)
}

/// The date so many days after 1 January 1970 (Howard Hinnant, "chrono-compatible low-level date algorithms": civil_from_days).
fn date(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
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
    fn points_in_time_are_those_of_the_calendar() {
        for (milliseconds, text) in [
            (0, "1970-01-01 00:00:00.000Z"),
            (951_782_399_999, "2000-02-28 23:59:59.999Z"),
            (951_782_400_000, "2000-02-29 00:00:00.000Z"),
            (1_795_820_701_123, "2026-11-27 23:05:01.123Z"),
        ] {
            assert_eq!(time(milliseconds), text);
        }
        for (number, text) in [(1023, "1023 B"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 30, "5.0 GiB")] {
            assert_eq!(bytes(number), text);
        }
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
