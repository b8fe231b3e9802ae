//! Addresses of instances inside the node's subnets. One offset serves both families: +0 is never used, +1 is the bridge, +2 to
//! +62 are instances (+63 is the broadcast address of the /26). A freed address is the last to be given again, so that a peer with
//! an old table does not reach a stranger.

use std::collections::{BTreeMap, VecDeque};
use std::net::{Ipv4Addr, Ipv6Addr};

use crate::model::{Addresses, InstanceId, Subnet};

const BRIDGE: u8 = 1;
const FIRST: u8 = 2;
const LAST: u8 = 62;

/// The addresses of one pair of subnets and who has them.
#[derive(Clone, Debug)]
pub struct Ipam {
    subnet: Subnet,
    leased: BTreeMap<InstanceId, u8>,
    /// Longest free first; never-used ones before all.
    free: VecDeque<u8>,
}

/// Every address is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("all {used} instance addresses of the subnet are in use; undeploy an instance first")]
pub struct Exhausted {
    pub used: usize,
}

/// Why an address of an earlier run cannot be kept.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdoptError {
    #[error("{v4} and {v6} are not a pair of instance addresses of the subnet", v4 = .0.v4, v6 = .0.v6)]
    OutsideSubnet(Addresses),
    #[error("the address belongs to {0} already")]
    Taken(InstanceId),
    #[error("the instance has another address already")]
    Leased,
}

impl Ipam {
    /// All of the subnet is free. Host bits in the subnet's addresses are ignored.
    pub fn new(subnet: Subnet) -> Self {
        Self { subnet: network(subnet), leased: BTreeMap::new(), free: (FIRST..=LAST).collect() }
    }

    pub fn subnet(&self) -> Subnet {
        self.subnet
    }

    /// The gateway of every instance.
    pub fn bridge(&self) -> Addresses {
        at(self.subnet, BRIDGE)
    }

    /// How many instances have an address.
    pub fn used(&self) -> usize {
        self.leased.len()
    }

    pub fn get(&self, instance: &InstanceId) -> Option<Addresses> {
        self.leased.get(instance).map(|offset| at(self.subnet, *offset))
    }

    /// The instance's address: the one it has, else the longest free one.
    pub fn allocate(&mut self, instance: &InstanceId) -> Result<Addresses, Exhausted> {
        if let Some(addresses) = self.get(instance) {
            return Ok(addresses);
        }
        let offset = self.free.pop_front().ok_or(Exhausted { used: self.leased.len() })?;
        self.leased.insert(instance.clone(), offset);
        Ok(at(self.subnet, offset))
    }

    /// The same, preferring addresses that are not spoken for.
    pub fn allocate_beside(
        &mut self,
        instance: &InstanceId,
        spoken_for: impl Fn(&Addresses) -> bool,
    ) -> Result<Addresses, Exhausted> {
        if self.get(instance).is_none()
            && let Some(place) = self.free.iter().position(|offset| !spoken_for(&at(self.subnet, *offset)))
            && let Some(offset) = self.free.remove(place)
        {
            self.leased.insert(instance.clone(), offset);
        }
        self.allocate(instance)
    }

    /// Takes over what an earlier run gave. Repeatable.
    pub fn adopt(&mut self, instance: &InstanceId, addresses: Addresses) -> Result<(), AdoptError> {
        let offset = addresses.v4.octets()[3] & !mask_v4_low();
        if !(FIRST..=LAST).contains(&offset) || at(self.subnet, offset) != addresses {
            return Err(AdoptError::OutsideSubnet(addresses));
        }
        match self.leased.get(instance) {
            Some(leased) if *leased == offset => return Ok(()),
            Some(_) => return Err(AdoptError::Leased),
            None => {}
        }
        let Some(place) = self.free.iter().position(|free| *free == offset) else {
            let owner = self.leased.iter().find(|(_, leased)| **leased == offset).map(|(owner, _)| owner.clone());
            return Err(owner.map_or(AdoptError::OutsideSubnet(addresses), AdoptError::Taken));
        };
        self.free.remove(place);
        self.leased.insert(instance.clone(), offset);
        Ok(())
    }

    /// Gives the address back. An instance without one is a success.
    pub fn free(&mut self, instance: &InstanceId) {
        if let Some(offset) = self.leased.remove(instance) {
            self.free.push_back(offset);
        }
    }
}

/// The subnet with its host bits cleared.
pub fn network(subnet: Subnet) -> Subnet {
    Subnet {
        v4: Ipv4Addr::from_bits(subnet.v4.to_bits() & (u32::MAX << (32 - Subnet::V4_PREFIX))),
        v6: Ipv6Addr::from_bits(subnet.v6.to_bits() & (u128::MAX << (128 - Subnet::V6_PREFIX))),
    }
}

fn at(subnet: Subnet, offset: u8) -> Addresses {
    Addresses {
        v4: Ipv4Addr::from_bits(subnet.v4.to_bits() | u32::from(offset)),
        v6: Ipv6Addr::from_bits(subnet.v6.to_bits() | u128::from(offset)),
    }
}

/// The network's part of an IPv4 address's last byte.
const fn mask_v4_low() -> u8 {
    u8::MAX << (32 - Subnet::V4_PREFIX)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn subnet() -> Subnet {
        Subnet { v4: Ipv4Addr::new(10, 18, 0, 64), v6: "fc00::100".parse().unwrap() }
    }

    fn instance(number: u32) -> InstanceId {
        format!("a.b.c.d.instance.{number}").parse().unwrap()
    }

    fn addresses(v4: &str, v6: &str) -> Addresses {
        Addresses { v4: v4.parse().unwrap(), v6: v6.parse().unwrap() }
    }

    #[test]
    fn bridge_is_first_and_instances_follow() {
        let mut ipam = Ipam::new(subnet());
        assert_eq!(ipam.bridge(), addresses("10.18.0.65", "fc00::101"));
        assert_eq!(ipam.allocate(&instance(0)), Ok(addresses("10.18.0.66", "fc00::102")));
        assert_eq!(ipam.allocate(&instance(1)), Ok(addresses("10.18.0.67", "fc00::103")));
        assert_eq!(ipam.allocate(&instance(0)), Ok(addresses("10.18.0.66", "fc00::102")), "the same instance again");
    }

    #[test]
    fn freed_address_is_the_last_to_return() {
        let mut ipam = Ipam::new(subnet());
        let first = ipam.allocate(&instance(0)).unwrap();
        ipam.free(&instance(0));
        let others: Vec<_> = (1..=60).map(|number| ipam.allocate(&instance(number)).unwrap()).collect();
        assert!(!others.contains(&first));
        assert_eq!(ipam.allocate(&instance(99)), Ok(first));
    }

    #[test]
    fn exhaustion_says_how_many_are_used() {
        let mut ipam = Ipam::new(subnet());
        for number in 0..61 {
            ipam.allocate(&instance(number)).unwrap();
        }
        assert_eq!(ipam.allocate(&instance(61)), Err(Exhausted { used: 61 }));
        ipam.free(&instance(30));
        assert!(ipam.allocate(&instance(61)).is_ok());
    }

    #[test]
    fn host_bits_of_the_subnet_are_ignored() {
        let ipam = Ipam::new(Subnet { v4: Ipv4Addr::new(10, 18, 0, 70), v6: "fc00::1ff".parse().unwrap() });
        assert_eq!(ipam.subnet(), subnet());
    }

    #[test]
    fn adopts_only_what_fits() {
        let mut ipam = Ipam::new(subnet());
        let ours = addresses("10.18.0.70", "fc00::106");
        for (wrong, why) in [
            (addresses("10.18.0.6", "fc00::106"), "another v4 subnet"),
            (addresses("10.18.0.70", "fc00::6"), "another v6 subnet"),
            (addresses("10.18.0.70", "fc00::107"), "two offsets"),
            (addresses("10.18.0.64", "fc00::100"), "the network"),
            (addresses("10.18.0.65", "fc00::101"), "the bridge"),
            (addresses("10.18.0.127", "fc00::13f"), "broadcast"),
        ] {
            assert_eq!(ipam.adopt(&instance(0), wrong), Err(AdoptError::OutsideSubnet(wrong)), "{why}");
        }
        assert_eq!(ipam.adopt(&instance(0), ours), Ok(()));
        assert_eq!(ipam.adopt(&instance(0), ours), Ok(()));
        assert_eq!(ipam.adopt(&instance(1), ours), Err(AdoptError::Taken(instance(0))));
        assert_eq!(ipam.adopt(&instance(0), addresses("10.18.0.71", "fc00::107")), Err(AdoptError::Leased));
        let given: BTreeSet<_> = (1..=60).map(|number| ipam.allocate(&instance(number)).unwrap().v4).collect();
        assert!(!given.contains(&ours.v4));
        assert_eq!(given.len(), 60);
    }

    proptest! {
        #[test]
        fn no_two_instances_share_an_address(steps in prop::collection::vec((any::<bool>(), 0u32..80), 0..400)) {
            let mut ipam = Ipam::new(subnet());
            let mut held = BTreeMap::new();
            for (take, number) in steps {
                if !take {
                    ipam.free(&instance(number));
                    held.remove(&number);
                    continue;
                }
                match ipam.allocate(&instance(number)) {
                    Ok(given) => {
                        let before = held.insert(number, given);
                        prop_assert!(before.is_none_or(|before| before == given));
                    }
                    Err(Exhausted { used }) => prop_assert_eq!(used, 61),
                }
                let distinct: BTreeSet<_> = held.values().map(|addresses| (addresses.v4, addresses.v6)).collect();
                prop_assert_eq!(distinct.len(), held.len());
                prop_assert_eq!(ipam.used(), held.len());
            }
        }
    }
}
