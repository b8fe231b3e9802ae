//! Who may send what: each instance's frames are looked at where they come in, at the host end of its veth, before bridge and host see
//! them. Its own MAC, its own addresses, no word about anybody else's: a chain of ours for each veth, in a table of devices.
//!
//! ```text
//! ne1234…        another MAC than its own                           → drop_spoofed_mac
//!                ARP in another's name                              → drop_spoofed_arp
//!                IPv4, IPv6 from another address                    → drop_spoofed_source
//!                neighbour of another address, router, redirect     → drop_spoofed_neighbour
//!                anything but ARP, IPv4 and IPv6                    → drop_foreign_frame
//! drop_…         counted, dropped
//! ```
//!
//! What the kernel programs of the datapath take in hand never comes here: the law checks it by the same row of the endpoint.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::{MutexGuard, PoisonError};

use nix::errno::Errno;
use tracing::warn;

use crate::model::{Addresses, InstanceId};

use super::journal::{Family, Undo};
use super::nft::{self, Batch, Expression, Header, Place, Refused, RuleState};
use super::ports::{self, TABLE, blocking, refused_by_kernel};
use super::{LinkError, Links, Veth, veth};

/// Comments of rules in [`ports`], and names of counters.
pub(super) const DROP_LOOPBACK: &str = "drop_to_loopback";
pub(super) const DROP_TUNNEL: &str = "drop_to_tunnel";
pub(super) const DROP_OUTSIDE: &str = "drop_outside_source";

const MAC: &str = "drop_spoofed_mac";
const ARP: &str = "drop_spoofed_arp";
const SOURCE: &str = "drop_spoofed_source";
const NEIGHBOUR: &str = "drop_spoofed_neighbour";
const FRAME: &str = "drop_foreign_frame";
pub(super) const REASONS: [&str; 5] = [MAC, ARP, SOURCE, NEIGHBOUR, FRAME];

/// The second framing between nodes of ours has the port after the tunnel's.
pub(super) fn tunnel_ports(tunnel_port: u16) -> impl Iterator<Item = u16> {
    [Some(tunnel_port), tunnel_port.checked_add(1)].into_iter().flatten()
}

/// Whose frames are looked at.
#[derive(Debug, Default)]
pub(super) struct Guard {
    /// By host end.
    watched: BTreeMap<String, Watched>,
    /// The kernel has no such tables.
    impossible: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Watched {
    mac: [u8; 6],
    addresses: Addresses,
}

type Rules = Vec<(String, Vec<Expression>)>;

impl Links {
    pub(super) fn watch(&self, veths: &[(Veth, Addresses)]) {
        let rows =
            veths.iter().map(|(veth, addresses)| (veth.name.clone(), Watched { mac: veth.mac, addresses: *addresses }));
        self.guard().watched.extend(rows);
    }

    pub(super) fn watched(&self, instance: &InstanceId) -> Option<Addresses> {
        self.guard().watched.get(&veth::host_end(instance)).map(|row| row.addresses)
    }

    pub(super) async fn unwatch(&self, instance: &InstanceId) -> Result<(), LinkError> {
        let name = veth::host_end(instance);
        self.guard().watched.remove(&name);
        delete_chain(name).await
    }

    /// Like [`Self::ensure_guards`], for one that has just come: of the others nothing is read, however many they are.
    pub(super) async fn ensure_guard(&self, name: &str) -> Result<(), LinkError> {
        let row = self.guard().watched.get(name).copied();
        // The first one makes the table, too.
        if let Some(row) = row.filter(|_| self.journal().holds(&Undo::DelTable { family: Family::Device })) {
            let name = name.to_owned();
            let guarded = blocking("guard", move || {
                let rules = rules_for(row);
                let present = nft::rules_in(Family::Device, TABLE, &name)?;
                Ok(are_there(present.iter(), &rules) || device(&name, &rules).commit().is_ok())
            });
            if guarded.await? {
                return Ok(());
            }
        }
        self.ensure_guards().await
    }

    /// Makes what is missing, and removes what is left of veths that went while nobody looked; cheap where nothing is.
    pub(super) async fn ensure_guards(&self) -> Result<(), LinkError> {
        let made = Undo::DelTable { family: Family::Device };
        let made_before = self.journal().holds(&made);
        let watched = {
            let guard = self.guard();
            if guard.impossible || (guard.watched.is_empty() && !made_before) {
                return Ok(());
            }
            guard.watched.clone()
        };
        self.journal().note(made)?;
        let looked = blocking("guard", move || {
            let present = nft::rules(Family::Device, TABLE)?;
            let chains = present.iter().map(|rule| &rule.chain).filter(|chain| chain.starts_with(veth::PREFIX));
            let chains: BTreeSet<String> = chains.cloned().collect();
            let is_there =
                |chain: &str, rules: &Rules| are_there(present.iter().filter(|rule| rule.chain == chain), rules);
            let mut refused = Vec::new();
            let reasons = REASONS.iter().map(|reason| ((*reason).to_owned(), dropped(reason)));
            if !reasons.clone().all(|(chain, rules)| is_there(&chain, &rules)) {
                refused.extend(reasons_again(reasons).commit().err().map(|error| (None, error)));
            }
            let possible = refused.is_empty();
            for (name, row) in watched.iter().filter(|_| possible) {
                let rules = rules_for(*row);
                if !is_there(name, &rules) {
                    refused.extend(device(name, &rules).commit().err().map(|error| (Some(name.clone()), error)));
                }
            }
            Ok((refused, chains))
        });
        let (refused, chains) = looked.await?;
        // Asked only now: who has come since the look began is watched, too.
        let left: Vec<String> = {
            let guard = self.guard();
            chains.into_iter().filter(|chain| !guard.watched.contains_key(chain)).collect()
        };
        for chain in left {
            // Newer kernels keep it without its device.
            if self.netlink.link(&chain).await?.is_none() {
                delete_chain(chain).await?;
            }
        }
        for (name, error) in refused {
            match (name, error.errno) {
                // The device has gone meanwhile.
                (Some(_), Errno::ENOENT | Errno::ENODEV) => {}
                (None, Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP | Errno::ENOENT) => {
                    warn!(
                        "this kernel's nf_tables cannot watch a device: an instance may send in another's name to the bridge"
                    );
                    self.guard().impossible = true;
                }
                _ => return Err(refused_by_kernel(&error)),
            }
        }
        Ok(())
    }

    fn guard(&self) -> MutexGuard<'_, Guard> {
        self.guard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether a chain's rules are these: their comments tell them apart.
fn are_there<'a>(present: impl Iterator<Item = &'a RuleState>, rules: &Rules) -> bool {
    present.map(|rule| rule.comment.as_deref()).eq(rules.iter().map(|(comment, _)| Some(comment.as_str())))
}

async fn delete_chain(name: String) -> Result<(), LinkError> {
    let mut batch = Batch::new();
    batch.delete_chain(Family::Device, TABLE, &name);
    match blocking("unguard", move || Ok(batch.commit())).await? {
        // Some kernels let it go with its device, some never had it.
        Err(Refused { errno: Errno::ENOENT | Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP, .. }) => Ok(()),
        result => result.map_err(|refused| refused_by_kernel(&refused)),
    }
}

/// What was dropped, by reason; nothing where nothing is guarded yet.
pub(super) fn counters() -> Vec<(String, u64)> {
    let mut counters: BTreeMap<String, u64> = BTreeMap::new();
    for reason in REASONS {
        let rules = nft::rules_in(Family::Device, TABLE, reason).unwrap_or_default();
        let packets = rules.iter().filter_map(|rule| rule.packets).sum();
        counters.insert(reason.to_owned(), packets);
    }
    for (reason, packets) in ports::guarded() {
        *counters.entry(reason).or_default() += packets;
    }
    counters.into_iter().collect()
}

fn reasons_again(reasons: impl Iterator<Item = (String, Rules)>) -> Batch {
    let mut batch = Batch::new();
    batch.table(Family::Device, TABLE);
    for (chain, rules) in reasons {
        batch.chain(Family::Device, TABLE, &chain);
        fill(&mut batch, &chain, &rules);
    }
    batch
}

fn device(name: &str, rules: &Rules) -> Batch {
    let mut batch = Batch::new();
    batch.device_chain(TABLE, name, name);
    fill(&mut batch, name, rules);
    batch
}

fn fill(batch: &mut Batch, chain: &str, rules: &Rules) {
    batch.flush(Family::Device, TABLE, chain);
    for (comment, expressions) in rules {
        batch.rule(Family::Device, TABLE, chain, Place::Last, comment, expressions);
    }
}

fn dropped(reason: &str) -> Rules {
    vec![(reason.to_owned(), vec![Expression::Counter, Expression::Drop])]
}

const ETH_IPV4: u16 = 0x0800;
const ETH_ARP: u16 = 0x0806;
const ETH_IPV6: u16 = 0x86dd;
const ICMPV6: u8 = 58;
const ROUTER_ADVERTISEMENT: u8 = 134;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;

/// In this order: what names somebody else goes, what is left and its own passes, the rest goes.
fn rules_for(Watched { mac, addresses: Addresses { v4, v6 } }: Watched) -> Rules {
    use Expression::{Accept, Carries, Field, Goto, Protocol, Source};
    let local = link_local(mac);
    let field = |header, offset, value: &[u8], equal| Field { header, offset, value: value.to_vec(), equal };
    let icmp = |kind: u8| [Carries(ETH_IPV6), Protocol(ICMPV6), field(Header::Transport, 0, &[kind], true)];
    let from = |network: Ipv6Addr| Source { network: network.into(), prefix: 128 };
    let target = |address: Ipv6Addr| field(Header::Transport, 8, &address.octets(), false);
    let sender = |address: Ipv4Addr| field(Header::Network, 14, &address.octets(), true);
    let to = |reason: &str| Goto(reason.to_owned());
    let own = hex(mac);
    let rule = |comment: String, expressions: Vec<Expression>| (comment, expressions);
    let with = |start: &[Expression], rest: &[Expression]| [start, rest].concat();
    vec![
        rule(format!("not {own}"), vec![field(Header::Link, 6, &mac, false), to(MAC)]),
        rule(format!("ARP not of {own}"), vec![Carries(ETH_ARP), field(Header::Network, 8, &mac, false), to(ARP)]),
        rule(format!("ARP of {v4}"), vec![Carries(ETH_ARP), sender(v4), Accept]),
        rule("ARP probe".into(), vec![Carries(ETH_ARP), sender(Ipv4Addr::UNSPECIFIED), Accept]),
        rule("ARP".into(), vec![Carries(ETH_ARP), to(ARP)]),
        rule(format!("from {v4}"), vec![Carries(ETH_IPV4), Source { network: v4.into(), prefix: 32 }, Accept]),
        rule("IPv4".into(), vec![Carries(ETH_IPV4), to(SOURCE)]),
        rule("router".into(), with(&icmp(ROUTER_ADVERTISEMENT), &[to(NEIGHBOUR)])),
        rule("redirect".into(), with(&icmp(REDIRECT), &[to(NEIGHBOUR)])),
        rule(
            format!("neighbour not {v6} or {local}"),
            with(&icmp(NEIGHBOUR_ADVERTISEMENT), &[target(v6), target(local), to(NEIGHBOUR)]),
        ),
        rule(format!("from {v6}"), vec![Carries(ETH_IPV6), from(v6), Accept]),
        rule(format!("from {local}"), vec![Carries(ETH_IPV6), from(local), Accept]),
        // Looking for duplicates, joining groups.
        rule("from nobody".into(), vec![Carries(ETH_IPV6), from(Ipv6Addr::UNSPECIFIED), Protocol(ICMPV6), Accept]),
        rule("IPv6".into(), vec![Carries(ETH_IPV6), to(SOURCE)]),
        rule("neither".into(), vec![to(FRAME)]),
    ]
}

/// The address that the kernel makes of a MAC (RFC 4291, appendix A).
fn link_local([a, b, c, d, e, f]: [u8; 6]) -> Ipv6Addr {
    let [hi, lo] = [u16::from_be_bytes([a ^ 2, b]), u16::from_be_bytes([e, f])];
    Ipv6Addr::new(0xfe80, 0, 0, 0, hi, u16::from_be_bytes([c, 0xff]), u16::from_be_bytes([0xfe, d]), lo)
}

fn hex(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_local_address_is_made_as_the_kernel_does() {
        assert_eq!(
            link_local([0x02, 0x42, 0xac, 0x11, 0x00, 0x02]),
            "fe80::42:acff:fe11:2".parse::<Ipv6Addr>().unwrap()
        );
    }

    #[test]
    fn the_second_framing_has_the_port_after() {
        assert_eq!(tunnel_ports(50_103).collect::<Vec<_>>(), [50_103, 50_104]);
        assert_eq!(tunnel_ports(65_535).collect::<Vec<_>>(), [65_535]);
    }
}
