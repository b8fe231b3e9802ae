//! What of an answer is believed: rows with sane addresses, each number and each address once.

use std::collections::{BTreeMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netmanager_common::addr::Addr;

use crate::model::{FamilyPair, Policy, TableAnswer};

/// More rows than this of one service are not looked at.
const MAX_ROWS: usize = 4_096;

/// The networks whose addresses are service addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceNets {
    pub v4: (Ipv4Addr, u8),
    pub v6: (Ipv6Addr, u8),
}

impl ServiceNets {
    pub fn contain(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(v4) => {
                (v4.to_bits() ^ self.v4.0.to_bits()).checked_shr(32 - u32::from(self.v4.1.min(32))).unwrap_or(0) == 0
            }
            IpAddr::V6(v6) => {
                (v6.to_bits() ^ self.v6.0.to_bits()).checked_shr(128 - u32::from(self.v6.1.min(128))).unwrap_or(0) == 0
            }
        }
    }
}

/// One believed row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) number: u32,
    pub(super) host: Addr,
    pub(super) port: u16,
    pub(super) weight: u32,
    /// One for each family, v4 first.
    pub(super) sides: Vec<Side>,
}

/// An instance in one family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Side {
    pub(super) namespace: Addr,
    pub(super) instance: Addr,
}

/// What is left of an answer, and how much was not believed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sifted {
    pub(super) rows: Vec<Row>,
    pub(super) semantics: BTreeMap<Addr, Policy>,
    /// Addresses out of range: of hosts, namespaces, instances or services.
    pub(super) out_of_range: u64,
    /// The first address of an instance or a service that is not in the networks of services.
    pub(super) elsewhere: Option<IpAddr>,
    /// A number or an address that an earlier row of the answer has.
    pub(super) duplicate: u64,
}

pub(super) fn sift(answer: &TableAnswer, nets: &ServiceNets) -> Sifted {
    let mut sifted = Sifted::default();
    let mut numbers = HashSet::new();
    let mut taken = HashSet::new();
    for row in answer.rows.iter().take(MAX_ROWS) {
        let host = row.host.to_canonical();
        if row.host_port == 0 || !is_node(host) || nets.contain(host) {
            sifted.out_of_range += 1;
            continue;
        }
        if !numbers.insert(row.number) {
            sifted.duplicate += 1;
            continue;
        }
        let mut sides = Vec::with_capacity(2);
        for (namespace, instance) in pairs(row.namespace, row.instance) {
            if !nets.contain(instance) {
                sifted.elsewhere.get_or_insert(instance);
            }
            if !is_unicast(namespace) || nets.contain(namespace) || !nets.contain(instance) || !is_unicast(instance) {
                sifted.out_of_range += 1;
                continue;
            }
            let side = Side { namespace: namespace.into(), instance: instance.into() };
            if taken.contains(&side.namespace) || taken.contains(&side.instance) {
                sifted.duplicate += 1;
                continue;
            }
            taken.extend([side.namespace, side.instance]);
            sides.push(side);
        }
        for semantic in &row.services {
            if nets.contain(semantic.address) && is_unicast(semantic.address) {
                sifted.semantics.entry(semantic.address.into()).or_insert(semantic.policy);
            } else {
                sifted.elsewhere.get_or_insert(semantic.address);
                sifted.out_of_range += 1;
            }
        }
        if !sides.is_empty() {
            sifted.rows.push(Row {
                number: row.number,
                host: host.into(),
                port: row.host_port,
                weight: row.weight,
                sides,
            });
        }
    }
    // An address that means one instance means that, whatever else is said of it.
    for row in &sifted.rows {
        for side in &row.sides {
            sifted.semantics.remove(&side.instance);
        }
    }
    sifted
}

/// The families in which the instance has both addresses.
fn pairs(namespace: FamilyPair, instance: FamilyPair) -> impl Iterator<Item = (IpAddr, IpAddr)> {
    let v4 = namespace.v4.zip(instance.v4).map(|(namespace, instance)| (namespace.into(), instance.into()));
    let v6 = namespace.v6.zip(instance.v6).map(|(namespace, instance)| (namespace.into(), instance.into()));
    v4.into_iter().chain(v6)
}

/// Could this be the address of a node? Loopback is none: it would send to ourselves what is meant for another.
fn is_node(address: IpAddr) -> bool {
    is_unicast(address) && !address.is_loopback()
}

/// Host part zero is an ordinary address here (`fc00::`, `10.30.0.0`). An IPv4 address in IPv6 clothes is none: it would
/// change family on its way into a key.
fn is_unicast(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => !(v4.is_unspecified() || v4.is_multicast() || v4.is_broadcast()),
        IpAddr::V6(v6) => !(v6.is_unspecified() || v6.is_multicast() || v6.to_ipv4_mapped().is_some()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{SemanticAddress, TableRow};

    fn nets() -> ServiceNets {
        ServiceNets { v4: (Ipv4Addr::new(10, 30, 0, 0), 16), v6: ("fdff::".parse().unwrap(), 16) }
    }

    fn row() -> TableRow {
        TableRow {
            number: 0,
            namespace: FamilyPair { v4: Some([10, 18, 0, 2].into()), v6: Some("fc00::2".parse().unwrap()) },
            instance: FamilyPair { v4: Some([10, 30, 0, 0].into()), v6: Some("fdff::".parse().unwrap()) },
            host: [192, 0, 2, 1].into(),
            host_port: 50103,
            weight: 1,
            services: vec![SemanticAddress { policy: Policy::RoundRobin, address: [10, 30, 0, 9].into() }],
        }
    }

    fn v4(text: &str) -> Option<Ipv4Addr> {
        Some(text.parse().unwrap())
    }

    fn v6(text: &str) -> Option<Ipv6Addr> {
        Some(text.parse().unwrap())
    }

    #[test]
    fn networks_contain_by_prefix() {
        for (address, inside) in [
            ("10.30.0.0", true),
            ("10.30.255.255", true),
            ("10.31.0.0", false),
            ("10.29.255.255", false),
            ("fdff::", true),
            ("fdff:2000::1", true),
            ("fdfe::1", false),
        ] {
            assert_eq!(nets().contain(address.parse().unwrap()), inside, "{address}");
        }
        let all = ServiceNets { v4: (Ipv4Addr::UNSPECIFIED, 0), v6: (Ipv6Addr::UNSPECIFIED, 0) };
        assert!(all.contain([1, 2, 3, 4].into()));
        let one = ServiceNets { v4: (Ipv4Addr::LOCALHOST, 32), ..nets() };
        assert!(one.contain([127, 0, 0, 1].into()) && !one.contain([127, 0, 0, 0].into()));
    }

    #[test]
    fn families_and_rows_are_believed_one_by_one() {
        type Change = fn(&mut TableRow);
        let cases: [(&str, Change, usize, u64); 15] = [
            ("a good row", |_| {}, 2, 0),
            ("no port", |row| row.host_port = 0, 0, 1),
            ("host is loopback", |row| row.host = [127, 0, 0, 1].into(), 0, 1),
            ("host is mapped loopback", |row| row.host = "::ffff:127.0.0.1".parse().unwrap(), 0, 1),
            ("host is a service address", |row| row.host = [10, 30, 1, 1].into(), 0, 1),
            ("host is unspecified", |row| row.host = [0, 0, 0, 0].into(), 0, 1),
            ("host is multicast", |row| row.host = "ff02::1".parse().unwrap(), 0, 1),
            ("namespace is a service address", |row| row.namespace.v4 = v4("10.30.0.7"), 1, 1),
            ("namespace is broadcast", |row| row.namespace.v4 = v4("255.255.255.255"), 1, 1),
            ("namespace is v4 in v6", |row| row.namespace.v6 = v6("::ffff:10.18.0.2"), 1, 1),
            ("instance is outside", |row| row.instance.v6 = v6("fc00::9"), 1, 1),
            ("no v6 instance address", |row| row.instance.v6 = None, 1, 0),
            ("no addresses", |row| row.namespace = FamilyPair::default(), 0, 0),
            ("semantic address outside", |row| row.services[0].address = [8, 8, 8, 8].into(), 2, 1),
            ("semantic address is the instance's", |row| row.services[0].address = [10, 30, 0, 0].into(), 2, 0),
        ];
        for (what, change, sides, refused) in cases {
            let mut row = row();
            change(&mut row);
            let sifted = sift(&TableAnswer { query: None, service: None, rows: vec![row] }, &nets());
            assert_eq!(sifted.rows.iter().map(|row| row.sides.len()).sum::<usize>(), sides, "{what}");
            assert_eq!(sifted.out_of_range, refused, "{what}");
            let elsewhere = matches!(what, "instance is outside" | "semantic address outside");
            assert_eq!(sifted.elsewhere.is_some(), elsewhere, "{what}");
            assert!(sifted.semantics.keys().all(|address| *address == Addr::v4([10, 30, 0, 9])), "{what}");
        }
    }

    #[test]
    fn first_row_has_its_number_and_addresses() {
        let same_number = TableRow { namespace: FamilyPair { v4: v4("10.18.0.3"), v6: None }, ..row() };
        let same_namespace =
            TableRow { number: 1, instance: FamilyPair { v4: v4("10.30.0.1"), v6: v6("fdff::1") }, ..row() };
        let same_instance =
            TableRow { number: 2, namespace: FamilyPair { v4: v4("10.18.0.4"), v6: v6("fc00::4") }, ..row() };
        let rows = vec![row(), same_number, same_namespace, same_instance];
        let sifted = sift(&TableAnswer { query: None, service: None, rows }, &nets());
        assert_eq!(sifted.rows.len(), 1);
        assert_eq!(sifted.rows[0].number, 0);
        assert_eq!(sifted.duplicate, 5);
    }
}
