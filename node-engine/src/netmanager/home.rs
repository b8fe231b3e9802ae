//! The node's own subnet: asked for once, kept per node id, and in use for as long as an instance has an address of it.
//!
//! The cluster gives a new subnet with every request and takes none back, so one that is kept stays this node's for ever. A node
//! that gets a new id asks for a subnet of its own, but goes on with the old one until the last instance of it has gone: an
//! instance cannot be readdressed while it runs, and the bridge has one gateway. Nothing else can collide meanwhile, because the
//! old subnet belongs to nobody else in the cluster that assigned it.

use std::net::IpAddr;
use std::time::Duration;

use netmanager_common::addr::Addr;

use super::ipam::{Ipam, network};
use super::table::ServiceNets;
use crate::model::{NodeId, NodeIdentity, Subnet};

/// So long an answer may take before the question is repeated, at first and at most: each question may take a subnet out of the
/// cluster's stock for ever.
const FIRST_WAIT: Duration = Duration::from_secs(10);
const LONGEST_WAIT: Duration = Duration::from_secs(60);

#[derive(Clone, Debug)]
pub(super) struct Home {
    nets: ServiceNets,
    node: Option<NodeId>,
    /// What was assigned, and to which id.
    assigned: Option<(NodeId, Subnet)>,
    ipam: Option<Ipam>,
    connected: bool,
    /// When this node's question was asked last, and how long its answer is waited for.
    asked: Option<Duration>,
    wait: Duration,
}

/// A subnet that cannot be a node's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the subnet {v4} with {v6} that the cluster assigned overlaps addresses in use here, or is none", v4 = .0.v4, v6 = .0.v6)]
pub struct UnusableSubnet(pub Subnet);

/// What a change at home leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum News {
    Nothing,
    /// To be kept over restarts.
    Assigned(NodeId, Subnet),
    Refused(UnusableSubnet),
}

impl Home {
    /// `kept` is what an earlier run kept. `in_use` is the subnet its instances still live in.
    pub(super) fn new(nets: ServiceNets, kept: Option<(NodeId, Subnet)>, in_use: Option<Subnet>) -> Self {
        let subnet = in_use.or(kept.as_ref().map(|(_, subnet)| *subnet));
        Self {
            nets,
            node: kept.as_ref().map(|(node, _)| node.clone()),
            assigned: kept.map(|(node, subnet)| (node, network(subnet))),
            ipam: subnet.map(Ipam::new),
            connected: false,
            asked: None,
            wait: FIRST_WAIT,
        }
    }

    pub(super) fn subnet(&self) -> Option<Subnet> {
        self.ipam.as_ref().map(Ipam::subnet)
    }

    pub(super) fn ipam(&mut self) -> Option<&mut Ipam> {
        self.ipam.as_mut()
    }

    pub(super) fn registered(&mut self, identity: &NodeIdentity, host: Addr) -> News {
        if self.node.as_ref() != Some(&identity.id) {
            self.node = Some(identity.id.clone());
            self.asked = None;
        }
        match identity.subnet {
            Some(subnet) if !self.has_own() => self.assign(subnet, host),
            _ => News::Nothing,
        }
    }

    /// An answer to the request, or to an earlier one that was repeated meanwhile: the first counts.
    pub(super) fn answered(&mut self, subnet: Subnet, host: Addr) -> News {
        if self.has_own() || self.asked.is_none() { News::Nothing } else { self.assign(subnet, host) }
    }

    /// An answer may be lost with the connection it was to come by, but a connection that comes and goes must not ask each time.
    pub(super) fn set_connected(&mut self, connected: bool) {
        self.connected = connected;
        self.wait = FIRST_WAIT;
    }

    /// Is it time to ask for a subnet?
    pub(super) fn asks(&mut self, now: Duration) -> bool {
        let waits = self.asked.is_some_and(|asked| now.saturating_sub(asked) < self.wait);
        let asks = self.connected && self.node.is_some() && !self.has_own() && !waits;
        if asks {
            self.wait = if self.asked.is_some() { (self.wait * 2).min(LONGEST_WAIT) } else { FIRST_WAIT };
            self.asked = Some(now);
        }
        asks
    }

    /// Begins with the newest subnet where no instance lives in another. True where that is a change.
    pub(super) fn settle(&mut self) -> bool {
        let Some((_, assigned)) = self.assigned else { return false };
        let settled = self.ipam.as_ref().is_some_and(|ipam| ipam.subnet() == assigned || ipam.used() > 0);
        if !settled {
            self.ipam = Some(Ipam::new(assigned));
        }
        !settled
    }

    fn has_own(&self) -> bool {
        self.assigned.as_ref().is_some_and(|(node, _)| Some(node) == self.node.as_ref())
    }

    fn assign(&mut self, subnet: Subnet, host: Addr) -> News {
        let subnet = network(subnet);
        let Some(node) = self.node.clone() else { return News::Nothing };
        if !self.usable(subnet, host) {
            return News::Refused(UnusableSubnet(subnet));
        }
        self.assigned = Some((node.clone(), subnet));
        News::Assigned(node, subnet)
    }

    /// The cluster must not make us take over the host's own network, loopback or the service addresses.
    fn usable(&self, subnet: Subnet, host: Addr) -> bool {
        let Subnet { v4, v6 } = subnet;
        let v4_is_one = !(v4.is_loopback() || v4.is_link_local()) && (1..224).contains(&v4.octets()[0]);
        let v6_is_none =
            v6.is_unspecified() || v6.is_multicast() || v6.is_unicast_link_local() || v6.to_ipv4_mapped().is_some();
        let host_inside = match IpAddr::from(host) {
            IpAddr::V4(host) => network(Subnet { v4: host, v6 }).v4 == v4,
            IpAddr::V6(host) => network(Subnet { v4, v6: host }).v6 == v6,
        };
        v4_is_one && !v6_is_none && !host_inside && !self.nets.contain(v4.into()) && !self.nets.contain(v6.into())
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const HOST: Addr = Addr::v4([192, 0, 2, 1]);

    #[test]
    fn subnet_is_asked_for_once_and_again_when_nobody_answers() {
        let mut home = home(None, None);
        assert!(!home.asks(at(0)), "not before the node is somebody");
        assert_eq!(home.registered(&identity("one", None), HOST), News::Nothing);
        assert!(!home.asks(at(0)), "not before the broker is there");
        home.set_connected(true);
        assert!(home.asks(at(0)));
        assert!(!home.asks(at(9)));
        assert!(home.asks(at(10)));
        assert_eq!(home.answered(subnet(0), HOST), News::Assigned(node("one"), subnet(0)));
        assert!(home.settle());
        assert_eq!(home.answered(subnet(64), HOST), News::Nothing, "the answer to the first request");
        assert!(!home.asks(at(100)));
        assert!(!home.settle());
        assert_eq!(home.subnet(), Some(subnet(0)));
    }

    #[test]
    fn the_longer_nobody_answers_the_less_often_a_subnet_is_asked_for() {
        let mut home = home(None, None);
        home.registered(&identity("one", None), HOST);
        home.set_connected(true);
        let asked: Vec<u64> = (0..250).filter(|second| home.asks(at(*second))).collect();
        assert_eq!(asked, [0, 10, 30, 70, 130, 190]);
        let flapping = (250..400).filter(|second| {
            home.set_connected(false);
            home.set_connected(true);
            home.asks(at(*second))
        });
        assert_eq!(flapping.take(4).collect::<Vec<_>>(), [250, 260, 270, 280], "no sooner over a new connection");
        home.registered(&identity("two", None), HOST);
        let asked: Vec<u64> = (281..330).filter(|second| home.asks(at(*second))).collect();
        assert_eq!(asked, [281, 291, 311], "another node asks for its own");
    }

    #[test]
    fn kept_subnet_serves_at_once_and_only_its_own_id() {
        let mut home = home(Some(("one", subnet(0))), None);
        assert_eq!(home.subnet(), Some(subnet(0)));
        home.set_connected(true);
        home.registered(&identity("one", None), HOST);
        assert!(!home.asks(at(0)));
        home.registered(&identity("two", None), HOST);
        assert!(home.asks(at(0)));
        assert_eq!(home.answered(subnet(64), HOST), News::Assigned(node("two"), subnet(64)));
        assert!(home.settle());
        assert_eq!(home.subnet(), Some(subnet(64)));
    }

    #[test]
    fn subnet_with_instances_stays_until_the_last_has_gone() {
        let mut home = home(Some(("one", subnet(64))), Some(subnet(0)));
        assert_eq!(home.subnet(), Some(subnet(0)));
        let instance = "a.b.c.d.instance.0".parse().unwrap();
        home.ipam().unwrap().allocate(&instance).unwrap();
        assert!(!home.settle());
        home.ipam().unwrap().free(&instance);
        assert!(home.settle());
        assert_eq!(home.subnet(), Some(subnet(64)));
    }

    #[test]
    fn registration_may_bring_the_subnet() {
        let mut home = home(None, None);
        let news = home.registered(&identity("one", Some(subnet(0))), HOST);
        assert_eq!(news, News::Assigned(node("one"), subnet(0)));
        assert_eq!(home.registered(&identity("one", Some(subnet(64))), HOST), News::Nothing);
    }

    #[test]
    fn subnets_that_are_none_are_refused() {
        for (v4, v6) in [
            ("0.0.0.0", "fc00::"),
            ("127.0.0.0", "fc00::"),
            ("224.0.0.0", "fc00::"),
            ("255.255.255.192", "fc00::"),
            ("169.254.1.0", "fc00::"),
            ("10.30.4.0", "fc00::"),
            ("192.0.2.0", "fc00::"),
            ("10.18.0.0", "::"),
            ("10.18.0.0", "fe80::"),
            ("10.18.0.0", "ff02::"),
            ("10.18.0.0", "fdff:1::"),
            ("10.18.0.0", "::ffff:10.18.0.0"),
        ] {
            let mut home = home(None, None);
            home.set_connected(true);
            home.registered(&identity("one", None), HOST);
            assert!(home.asks(at(0)));
            let bad = Subnet { v4: v4.parse().unwrap(), v6: v6.parse().unwrap() };
            assert!(matches!(home.answered(bad, HOST), News::Refused(_)), "{v4} {v6}");
            assert!(!home.settle());
        }
    }

    fn home(kept: Option<(&str, Subnet)>, in_use: Option<Subnet>) -> Home {
        let nets = ServiceNets { v4: (Ipv4Addr::new(10, 30, 0, 0), 16), v6: ("fdff::".parse().unwrap(), 16) };
        Home::new(nets, kept.map(|(id, subnet)| (node(id), subnet)), in_use)
    }

    fn subnet(offset: u8) -> Subnet {
        Subnet { v4: Ipv4Addr::new(10, 18, 0, offset), v6: format!("fc00::{:x}00", offset / 64).parse().unwrap() }
    }

    fn node(id: &str) -> NodeId {
        id.parse().unwrap()
    }

    fn identity(id: &str, subnet: Option<Subnet>) -> NodeIdentity {
        NodeIdentity { id: node(id), broker_port: 1883, subnet, generation: crate::model::Generation::G4 }
    }

    const fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }
}
