//! The address plan of the embedded cluster, and the pools that hand addresses out.
//!
//! Two rules keep late packets from reaching a stranger: a service address that was freed is not handed out again before the
//! pool has gone round once, and a node's subnet is its own for ever.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};

use crate::model::Subnet;

/// Which ranges the cluster hands addresses from. The defaults are those of the reference system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AddressPlan {
    /// First /26 for nodes, and the first address after the last one.
    pub nodes_v4: (Ipv4Addr, Ipv4Addr),
    /// First /120 for nodes.
    pub nodes_v6: Ipv6Addr,
    /// Address of every node's TUN device: the subnet around it is never handed out.
    pub tun_v4: Ipv4Addr,
    /// Round robin and instance addresses come from this one range.
    pub services_v4: (Ipv4Addr, u8),
    pub round_robin_v6: (Ipv6Addr, u8),
    pub instances_v6: (Ipv6Addr, u8),
}

impl Default for AddressPlan {
    fn default() -> Self {
        Self {
            nodes_v4: (Ipv4Addr::new(10, 18, 0, 0), Ipv4Addr::new(10, 30, 0, 0)),
            nodes_v6: Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0),
            tun_v4: Ipv4Addr::new(10, 19, 1, 254),
            services_v4: (Ipv4Addr::new(10, 30, 0, 0), 16),
            round_robin_v6: (Ipv6Addr::new(0xfdff, 0x2000, 0, 0, 0, 0, 0, 0), 21),
            instances_v6: (Ipv6Addr::new(0xfdff, 0, 0, 0, 0, 0, 0, 0), 21),
        }
    }
}

impl AddressPlan {
    /// The subnet pair at `index`, counting up from the plan's first; `None` where the plan has no such subnet.
    pub(super) fn subnet(&self, index: u32) -> Option<Subnet> {
        let step = 1u32 << (32 - Subnet::V4_PREFIX);
        let v4 = u32::from(self.nodes_v4.0).checked_add(index.checked_mul(step)?)?;
        let last = v4.checked_add(step - 1)?;
        let tun = u32::from(self.tun_v4);
        if last >= u32::from(self.nodes_v4.1) || (v4..=last).contains(&tun) {
            return None;
        }
        let v6 = u128::from(self.nodes_v6).checked_add(u128::from(index) << (128 - Subnet::V6_PREFIX))?;
        Some(Subnet { v4: v4.into(), v6: v6.into() })
    }

    /// The first usable subnet at or after `index`, and the index to look from next.
    pub(super) fn subnet_from(&self, index: u32) -> Option<(Subnet, u32)> {
        // One index at most is barred: the one around the TUN address.
        (index..=index.checked_add(1)?).find_map(|index| Some((self.subnet(index)?, index + 1)))
    }

    pub(super) fn services_v4(&self) -> Pool {
        let (base, prefix) = self.services_v4;
        // The reference counts each of the last two octets from 0 to 253.
        let plain = |address: u128| address & 0xff <= 253 && (address >> 8) & 0xff <= 253;
        Pool::new(u128::from(u32::from(base)), 32 - u32::from(prefix.min(32)), plain)
    }

    pub(super) fn round_robin_v6(&self) -> Pool {
        Self::pool_v6(self.round_robin_v6)
    }

    pub(super) fn instances_v6(&self) -> Pool {
        Self::pool_v6(self.instances_v6)
    }

    fn pool_v6((base, prefix): (Ipv6Addr, u8)) -> Pool {
        Pool::new(u128::from(base), 128 - u32::from(prefix.min(128)), |_| true)
    }
}

/// Addresses of one range, as numbers, handed out upward and round.
#[derive(Clone, Debug)]
pub(super) struct Pool {
    first: u128,
    last: u128,
    next: u128,
    usable: fn(u128) -> bool,
    taken: BTreeSet<u128>,
}

impl Pool {
    fn new(base: u128, host_bits: u32, usable: fn(u128) -> bool) -> Self {
        let hosts = 1u128.checked_shl(host_bits).map_or(u128::MAX, |size| size - 1);
        let first = base & !hosts;
        Self { first, last: first | hosts, next: first, usable, taken: BTreeSet::new() }
    }

    /// The next free address, or `None` when all are taken.
    pub(super) fn take(&mut self) -> Option<u128> {
        // Each step meets a taken or an unusable address, or succeeds; of the unusable there are at most all those of a /16.
        for _ in 0..=self.taken.len() + 0x1_0000 {
            let address = self.next;
            self.next = if address == self.last { self.first } else { address + 1 };
            if (self.usable)(address) && self.taken.insert(address) {
                return Some(address);
            }
        }
        None
    }

    /// Takes this very address: `false` where it is outside the range or taken already.
    pub(super) fn claim(&mut self, address: u128) -> bool {
        (self.first..=self.last).contains(&address) && self.taken.insert(address)
    }

    pub(super) fn free(&mut self, address: u128) {
        self.taken.remove(&address);
    }

    #[cfg(test)]
    pub(super) fn is_unused(&self) -> bool {
        self.taken.is_empty()
    }

    /// Where the next address is looked for; kept over a restart so that freed addresses rest.
    pub(super) fn position(&self) -> u128 {
        self.next
    }

    pub(super) fn resume(&mut self, position: u128) {
        if (self.first..=self.last).contains(&position) {
            self.next = position;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_count_up_as_in_the_reference() {
        let plan = AddressPlan::default();
        for (index, v4, v6) in [
            (0, "10.18.0.0", "fc00::"),
            (1, "10.18.0.64", "fc00::100"),
            (2, "10.18.0.128", "fc00::200"),
            (4, "10.18.1.0", "fc00::400"),
            (12287, "10.29.255.192", "fc00::2f:ff00"),
        ] {
            let subnet = plan.subnet(index).expect("a subnet");
            assert_eq!((subnet.v4.to_string().as_str(), subnet.v6.to_string().as_str()), (v4, v6));
        }
        assert_eq!(plan.subnet(12288), None);
        assert_eq!(plan.subnet(u32::MAX), None);
    }

    #[test]
    fn no_node_gets_the_subnet_around_the_tun_address() {
        let plan = AddressPlan::default();
        let (mut index, mut seen) = (0, BTreeSet::new());
        while let Some((subnet, next)) = plan.subnet_from(index) {
            assert_ne!(subnet.v4, Ipv4Addr::new(10, 19, 1, 192));
            assert!(seen.insert(subnet.v4));
            index = next;
        }
        assert_eq!(seen.len(), 12287);
    }

    #[test]
    fn pools_skip_what_the_reference_skips_and_end() {
        let mut pool = AddressPlan::default().services_v4();
        let taken: Vec<Ipv4Addr> = std::iter::from_fn(|| pool.take()).map(|address| (address as u32).into()).collect();
        assert_eq!(taken.len(), 254 * 254);
        assert_eq!(taken[0], Ipv4Addr::new(10, 30, 0, 0));
        assert_eq!(taken[254], Ipv4Addr::new(10, 30, 1, 0));
        pool.free(u128::from(u32::from(taken[7])));
        assert_eq!(pool.take(), Some(u128::from(u32::from(taken[7]))));
        assert_eq!(pool.take(), None);
    }

    #[test]
    fn freed_addresses_rest_until_the_pool_has_gone_round() {
        let mut pool = AddressPlan::default().instances_v6();
        let first = pool.take().expect("an address");
        pool.free(first);
        assert_eq!(pool.take(), Some(first + 1));
    }

    #[test]
    fn claims_are_exclusive_and_inside_the_range() {
        let mut pool = AddressPlan::default().services_v4();
        let wanted = u128::from(u32::from(Ipv4Addr::new(10, 30, 0, 0)));
        assert!(pool.claim(wanted));
        assert!(!pool.claim(wanted));
        assert_eq!(pool.take(), Some(wanted + 1));
        assert!(!pool.claim(u128::from(u32::from(Ipv4Addr::new(10, 31, 0, 0)))));
    }
}
