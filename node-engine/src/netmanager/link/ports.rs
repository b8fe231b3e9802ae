//! Our own nf_tables table, one in each family: instances reach the outside under the host's address, and published ports lead in.
//!
//! ```text
//! guard        from instances: to loopback, to a tunnel port               → dropped, counted
//!              from the subnet or a service, by anything but bridge and TUN → dropped, counted
//! prerouting   to an address of the host           → ports
//! output       the same; ::1 excepted              → ports
//! ports        tcp 8080                            → 10.18.0.2:80
//! postrouting  from loopback, through a published port                     → masquerade
//!              from the subnet, out of anything but bridge and TUN         → masquerade
//!              from the subnet through a published port into the subnet    → masquerade, so that the answer comes back this way
//! ```
//!
//! IPv4 loopback needs one thing more: the bridge may route it (`route_localnet`), which `guard` keeps instances from using. IPv6 has
//! nothing like it: `::1` is served by [`super::relay`].

use std::net::{IpAddr, Ipv6Addr};
use std::sync::{MutexGuard, PoisonError};

use nix::errno::Errno;
use tracing::{info, warn};

use crate::model::{Addresses, PortMapping, Protocol, Subnet};

use super::guard::{self, DROP_LOOPBACK, DROP_OUTSIDE, DROP_TUNNEL};
use super::journal::{Family, Undo};
use super::nft::{self, Batch, Expression, Hook, Place, Refused};
use super::{LinkConfig, LinkError, Links, sysctl};

pub(super) const TABLE: &str = "node_engine";
const GUARD: &str = "guard";
const PREROUTING: &str = "prerouting";
const OUTPUT: &str = "output";
const POSTROUTING: &str = "postrouting";
const PORTS: &str = "ports";

/// Before Docker's own (-100, 100): the first translation of a connection is the one that holds.
const DESTINATION_PRIORITY: i32 = -110;
const SOURCE_PRIORITY: i32 = 90;
/// After connection tracking (-200), before any translation.
const GUARD_PRIORITY: i32 = -150;

/// What the table should say. Before the first `publish` of this process nobody knows the ports: what an earlier one published stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    subnet: Option<Subnet>,
    ports: Option<Vec<(PortMapping, Addresses)>>,
    /// The kernel has refused the IPv6 half.
    v4_alone: bool,
}

/// A chain whose rules are ours to write now, in order.
#[derive(Clone, Debug)]
struct Chain {
    name: &'static str,
    rules: Vec<Rule>,
}

/// A rule with the comment that says all that is in it.
#[derive(Clone, Debug)]
struct Rule {
    comment: String,
    expressions: Vec<Expression>,
}

impl Links {
    pub(super) async fn ensure_nat(&self, subnet: Subnet) -> Result<(), LinkError> {
        self.ensure_table(|wanted| wanted.subnet = Some(subnet)).await
    }

    pub(super) async fn publish_ports(
        &self,
        subnet: Subnet,
        ports: &[(PortMapping, Addresses)],
    ) -> Result<(), LinkError> {
        let mut ports = ports.to_vec();
        ports.sort_by_key(|(mapping, _)| *mapping);
        let ports_kept = ports.clone();
        self.ensure_table(|wanted| {
            wanted.subnet = Some(subnet);
            wanted.ports = Some(ports);
        })
        .await?;
        self.relay.serve(&ports_kept).await;
        Ok(())
    }

    /// Compares the rules by their comments and rewrites in one transaction the chains in which one is missing or too many; what the
    /// others have counted stays.
    async fn ensure_table(&self, change: impl FnOnce(&mut Wanted)) -> Result<(), LinkError> {
        let (wanted, lost) = {
            let mut wanted = self.wanted();
            let before = wanted.clone();
            change(&mut wanted);
            // What was written for the same wish before and is not there now, somebody else has removed.
            (wanted.clone(), wanted.subnet.is_some() && *wanted == before)
        };
        let mut tables: Vec<(Family, Vec<Chain>)> =
            families().into_iter().map(|family| (family, chains(family, &self.config, &wanted))).collect();
        tables.retain(|(family, _)| *family == Family::V4 || !wanted.v4_alone);
        let compared = tables;
        let outdated = blocking("list rules of", move || {
            let mut outdated = Vec::with_capacity(compared.len());
            for (family, chains) in compared {
                outdated.push((family, outdated_of(family, chains)?));
            }
            Ok(outdated)
        });
        let tables = outdated.await?;
        if tables.iter().all(|(_, chains)| chains.is_empty()) {
            return Ok(());
        }
        for (family, _) in &tables {
            self.journal().note(Undo::DelTable { family: *family })?;
        }
        let all = tables.len();
        let written =
            blocking("write", move || Ok(rewrite(&tables))).await?.map_err(|refused| refused_by_kernel(&refused))?;
        self.wanted().v4_alone |= written < all;
        if lost {
            warn!("others have removed packet filter rules of this node; they are back");
        }
        info!(subnet = ?wanted.subnet, ports = wanted.ports.map(|ports| ports.len()), "wrote the address translation rules");
        Ok(())
    }

    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A table that is not there is a success.
pub(super) async fn delete_table(family: Family) -> Result<(), LinkError> {
    let mut batch = Batch::new();
    // Made first, so that it is there to delete.
    batch.table(family, TABLE);
    batch.delete_table(family, TABLE);
    match blocking("delete", move || Ok(batch.commit())).await? {
        // What the kernel cannot have made.
        Err(Refused { errno: Errno::EAFNOSUPPORT | Errno::EOPNOTSUPP, .. }) => Ok(()),
        result => result.map_err(|refused| refused_by_kernel(&refused)),
    }
}

pub(super) fn families() -> Vec<Family> {
    if sysctl::has_ipv6() { vec![Family::V4, Family::V6] } else { vec![Family::V4] }
}

/// nf_tables answers at once, except that a commit may wait for every processor to pass.
pub(super) async fn blocking<T: Send + 'static>(
    step: &'static str,
    f: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, LinkError> {
    let done = tokio::task::spawn_blocking(f).await.map_err(std::io::Error::other).and_then(|result| result);
    done.map_err(|error| LinkError::Kernel { step, object: "nf_tables".into(), reason: error.to_string() })
}

pub(super) fn refused_by_kernel(refused: &Refused) -> LinkError {
    LinkError::Kernel { step: "nf_tables", object: refused.step.clone(), reason: refused.errno.desc().to_owned() }
}

fn outdated_of(family: Family, mut chains: Vec<Chain>) -> std::io::Result<Vec<Chain>> {
    let present = nft::rules(family, TABLE)?;
    chains.retain(|chain| {
        let present = present.iter().filter(|rule| rule.chain == chain.name).map(|rule| rule.comment.as_deref());
        !present.eq(chain.rules.iter().map(|rule| Some(rule.comment.as_str())))
    });
    Ok(chains)
}

/// All families in one transaction; how many it was. A kernel whose nf_tables has no IPv6 gets the IPv4 part alone.
fn rewrite(tables: &[(Family, Vec<Chain>)]) -> Result<usize, Refused> {
    match transaction(tables).commit() {
        Err(refused) if tables.len() > 1 && refused.step.contains(" ip6 ") => {
            warn!(step = refused.step, reason = refused.errno.desc(), "no address translation for IPv6 on this kernel");
            transaction(&tables[..1]).commit().map(|()| 1)
        }
        result => result.map(|()| tables.len()),
    }
}

fn transaction(tables: &[(Family, Vec<Chain>)]) -> Batch {
    let mut batch = Batch::new();
    for (family, chains) in tables {
        let family = *family;
        batch.table(family, TABLE);
        batch.chain(family, TABLE, PORTS);
        batch.filter_chain(family, TABLE, GUARD, Hook::Prerouting, GUARD_PRIORITY);
        batch.nat_chain(family, TABLE, PREROUTING, Hook::Prerouting, DESTINATION_PRIORITY);
        batch.nat_chain(family, TABLE, OUTPUT, Hook::Output, DESTINATION_PRIORITY);
        batch.nat_chain(family, TABLE, POSTROUTING, Hook::Postrouting, SOURCE_PRIORITY);
        for chain in chains {
            batch.flush(family, TABLE, chain.name);
            for rule in &chain.rules {
                batch.rule(family, TABLE, chain.name, Place::Last, &rule.comment, &rule.expressions);
            }
        }
    }
    batch
}

fn chains(family: Family, config: &LinkConfig, wanted: &Wanted) -> Vec<Chain> {
    let mut chains = entries(family);
    chains.push(Chain { name: GUARD, rules: guard_rules(family, config, wanted.subnet) });
    let masquerade = wanted.subnet.iter().flat_map(|subnet| masquerade_rules(family, config, *subnet));
    chains.push(Chain { name: POSTROUTING, rules: masquerade.collect() });
    if let Some(ports) = &wanted.ports {
        let rules = ports.iter().map(|(mapping, addresses)| port_rule(family, *mapping, *addresses));
        chains.push(Chain { name: PORTS, rules: rules.collect() });
    }
    chains
}

fn entries(family: Family) -> Vec<Chain> {
    let (network, prefix) = loopback(family);
    let local = [Expression::DestinationIsLocal, Expression::Jump(PORTS.into())];
    let not_loopback = (family == Family::V6).then_some(Expression::NotDestination { network, prefix });
    let rule = |comment: &str, expressions| vec![Rule { comment: comment.into(), expressions }];
    vec![
        Chain { name: PREROUTING, rules: rule("published ports", local.to_vec()) },
        Chain {
            name: OUTPUT,
            rules: rule("published ports, from this host", not_loopback.into_iter().chain(local).collect()),
        },
    ]
}

fn loopback(family: Family) -> (IpAddr, u8) {
    match family {
        Family::V4 => ([127, 0, 0, 0].into(), 8),
        Family::V6 | Family::Device => (Ipv6Addr::LOCALHOST.into(), 128),
    }
}

/// What no instance may reach: services on the host's loopback, which are not meant for the network, and the tunnel of any node, where
/// it could speak in the name of a node. An answer may well go to a port of that number. And whose packets this host forwards may not
/// speak in the name of an instance: nothing of the overlay comes by a wire but in a tunnel.
fn guard_rules(family: Family, config: &LinkConfig, subnet: Option<Subnet>) -> Vec<Rule> {
    let (network, prefix) = loopback(family);
    let from_instance = Expression::In(config.bridge.clone());
    let (service, service_prefix): (IpAddr, u8) = match family {
        Family::V4 => (config.service_v4.0.into(), config.service_v4.1),
        Family::V6 | Family::Device => (config.service_v6.0.into(), config.service_v6.1),
    };
    let mut rules = vec![Rule {
        comment: DROP_LOOPBACK.into(),
        expressions: vec![
            from_instance.clone(),
            Expression::Destination { network, prefix },
            Expression::Counter,
            Expression::Drop,
        ],
    }];
    for port in guard::tunnel_ports(config.tunnel_port) {
        rules.push(Rule {
            comment: format!("{DROP_TUNNEL} {port}"),
            expressions: vec![
                from_instance.clone(),
                Expression::FromOriginator,
                Expression::Protocol(17),
                Expression::DestinationPort(port),
                Expression::NotDestination { network: service, prefix: service_prefix },
                Expression::Counter,
                Expression::Drop,
            ],
        });
    }
    let own = subnet.map(|subnet| subnet_of(family, subnet));
    for (network, prefix) in own.into_iter().chain([(service, service_prefix)]) {
        rules.push(Rule {
            comment: format!("{DROP_OUTSIDE} {network}/{prefix}"),
            expressions: vec![
                Expression::NotIn(config.bridge.clone()),
                Expression::NotIn(config.tun.clone()),
                Expression::NotIn("lo".into()),
                Expression::Source { network, prefix },
                Expression::Counter,
                Expression::Drop,
            ],
        });
    }
    rules
}

fn subnet_of(family: Family, subnet: Subnet) -> (IpAddr, u8) {
    match family {
        Family::V4 => (subnet.v4.into(), Subnet::V4_PREFIX),
        Family::V6 | Family::Device => (subnet.v6.into(), Subnet::V6_PREFIX),
    }
}

/// What the guard has dropped, by the names of the counters.
pub(super) fn guarded() -> Vec<(String, u64)> {
    let rules = families().into_iter().flat_map(|family| nft::rules_in(family, TABLE, GUARD).unwrap_or_default());
    let count = |rule: nft::RuleState| Some((rule.comment?.split(' ').next()?.to_owned(), rule.packets?));
    rules.filter_map(count).collect()
}

fn port_rule(family: Family, mapping: PortMapping, addresses: Addresses) -> Rule {
    let address: IpAddr = match family {
        Family::V4 => addresses.v4.into(),
        Family::V6 | Family::Device => addresses.v6.into(),
    };
    let protocol = match mapping.protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
    };
    Rule {
        comment: format!("{mapping} of {address}"),
        expressions: vec![
            Expression::Protocol(protocol),
            Expression::DestinationPort(mapping.host),
            Expression::Counter,
            Expression::TranslateTo(address, mapping.container),
        ],
    }
}

fn masquerade_rules(family: Family, config: &LinkConfig, subnet: Subnet) -> Vec<Rule> {
    let (network, prefix) = subnet_of(family, subnet);
    let out = |name: &str, equal| Expression::Out { name: name.to_owned(), equal };
    let LinkConfig { bridge, tun, .. } = config;
    let (own, own_prefix) = loopback(family);
    let from_loopback = Rule {
        comment: format!("loopback to {bridge} through a published port"),
        expressions: vec![
            Expression::Source { network: own, prefix: own_prefix },
            out(bridge, true),
            Expression::WasTranslated,
            Expression::Counter,
            Expression::Masquerade,
        ],
    };
    let mut rules = vec![
        Rule {
            comment: format!("{network}/{prefix} not to {bridge} or {tun}"),
            expressions: vec![
                Expression::Source { network, prefix },
                out(bridge, false),
                out(tun, false),
                Expression::Counter,
                Expression::Masquerade,
            ],
        },
        Rule {
            comment: format!("{network}/{prefix} back to {bridge} through a published port"),
            expressions: vec![
                Expression::Source { network, prefix },
                out(bridge, true),
                Expression::WasTranslated,
                Expression::Counter,
                Expression::Masquerade,
            ],
        },
    ];
    if family == Family::V4 {
        rules.insert(0, from_loopback);
    }
    rules
}
