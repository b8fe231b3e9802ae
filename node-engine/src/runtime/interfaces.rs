//! What passed at the interfaces of an instance, read through its first process: whatever carries its packets, they pass its own
//! end of the veth, which the kernel counts.

use std::fs;

use crate::model::InstanceCounters;
use crate::net_dev::{self, Direction};

/// The counters with those of the interfaces in the network namespace of this process; unchanged where it has gone.
pub(super) fn count(pid: Option<i64>, counters: InstanceCounters) -> InstanceCounters {
    match pid.and_then(|pid| fs::read_to_string(format!("/proc/{pid}/net/dev")).ok()) {
        Some(table) => add(&table, counters),
        None => counters,
    }
}

fn add(table: &str, counters: InstanceCounters) -> InstanceCounters {
    let (mut received, mut sent) = (Direction::default(), Direction::default());
    for (_, passed) in net_dev::interfaces(table).filter(|(name, _)| *name != "lo") {
        for (sum, one) in [(&mut received, passed.received), (&mut sent, passed.sent)] {
            sum.bytes = sum.bytes.saturating_add(one.bytes);
            sum.packets = sum.packets.saturating_add(one.packets);
            sum.dropped = sum.dropped.saturating_add(one.dropped);
        }
    }
    InstanceCounters {
        received_bytes: Some(received.bytes),
        received_packets: Some(received.packets),
        sent_bytes: Some(sent.bytes),
        sent_packets: Some(sent.packets),
        dropped_packets: Some(received.dropped.saturating_add(sent.dropped)),
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
