//! What passed at the interfaces of an instance, read through its first process: whatever carries its packets, they pass its own
//! end of the veth, which the kernel counts.

use std::fs;

use crate::model::InstanceCounters;

/// The counters with those of the interfaces in the network namespace of this process; unchanged where it has gone.
pub(super) fn count(pid: Option<i64>, counters: InstanceCounters) -> InstanceCounters {
    match pid.and_then(|pid| fs::read_to_string(format!("/proc/{pid}/net/dev")).ok()) {
        Some(table) => add(&table, counters),
        None => counters,
    }
}

/// Columns as in `/proc/net/dev`: bytes, packets, errors, drops, four more received, then the same sent.
fn add(table: &str, counters: InstanceCounters) -> InstanceCounters {
    let mut sums = [0u64; 16];
    for line in table.lines() {
        let Some((name, columns)) = line.split_once(':') else { continue };
        if name.trim() == "lo" {
            continue;
        }
        for (sum, column) in sums.iter_mut().zip(columns.split_ascii_whitespace()) {
            *sum = sum.saturating_add(column.parse().unwrap_or(0));
        }
    }
    InstanceCounters {
        received_bytes: Some(sums[0]),
        received_packets: Some(sums[1]),
        sent_bytes: Some(sums[8]),
        sent_packets: Some(sums[9]),
        dropped_packets: Some(sums[3].saturating_add(sums[11])),
        ..counters
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_interfaces_but_the_loopback_are_summed() {
        let table = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo: 999 9 0 0 0 0 0 0 999 9 0 0 0 0 0 0
  eth0: 100 2 0 1 0 0 0 0 50 3 0 4 0 0 0 0
 veth1:1 1 0 0 0 0 0 0 2 1 0 0 0 0 0 0
";
        let counters = add(table, InstanceCounters::default());
        assert_eq!((counters.received_bytes, counters.received_packets), (Some(101), Some(3)));
        assert_eq!(
            (counters.sent_bytes, counters.sent_packets, counters.dropped_packets),
            (Some(52), Some(4), Some(5))
        );
    }

    #[test]
    fn a_process_that_has_gone_leaves_the_counters_as_they_are() {
        let counters = InstanceCounters { processes: Some(3), ..InstanceCounters::default() };
        assert_eq!((count(Some(0), counters), count(None, counters)), (counters, counters));
    }
}
