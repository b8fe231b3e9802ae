//! What has passed at interfaces, as the kernel counts it in `/proc/<pid>/net/dev`.

/// One interface's line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Passed {
    pub(crate) received: Direction,
    pub(crate) sent: Direction,
}

/// Since the interface was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Direction {
    pub(crate) bytes: u64,
    pub(crate) packets: u64,
    pub(crate) dropped: u64,
}

/// The interfaces of the table by their names; lines of another form are left out.
pub(crate) fn interfaces(table: &str) -> impl Iterator<Item = (&str, Passed)> {
    table.lines().filter_map(|line| {
        let (name, columns) = line.split_once(':')?;
        let mut columns = columns.split_ascii_whitespace().map_while(|column| column.parse().ok());
        let received = direction(&mut columns)?;
        // The rest of what is received has no counterpart in what is sent: fifo, frame, compressed, multicast.
        columns.nth(3)?;
        Some((name.trim(), Passed { received, sent: direction(&mut columns)? }))
    })
}

/// Bytes, packets, errors, drops.
fn direction(columns: &mut impl Iterator<Item = u64>) -> Option<Direction> {
    let (bytes, packets, _errors, dropped) = (columns.next()?, columns.next()?, columns.next()?, columns.next()?);
    Some(Direction { bytes, packets, dropped })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_is_an_interface() {
        let table = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo: 999 9 0 0 0 0 0 0 998 8 0 0 0 0 0 0
  eth0: 100 2 0 1 0 0 0 0 50 3 0 4 0 0 0 0
eth0.2:1 1 0 0 0 0 0 0 2 1 0 0 0 0 0 0
broken: 1 2
";
        let found: Vec<(&str, Passed)> = interfaces(table).collect();
        assert_eq!(found.iter().map(|(name, _)| *name).collect::<Vec<_>>(), ["lo", "eth0", "eth0.2"]);
        let received = Direction { bytes: 100, packets: 2, dropped: 1 };
        let sent = Direction { bytes: 50, packets: 3, dropped: 4 };
        assert_eq!(found[1].1, Passed { received, sent });
        assert_eq!(found[2].1.received.bytes, 1);
    }

    #[test]
    fn the_kernel_writes_it_so() {
        let table = std::fs::read_to_string("/proc/self/net/dev").unwrap();
        assert_eq!(interfaces(&table).count(), table.lines().count() - 2, "{table}");
    }
}
