//! Our own nf_tables table, one in each family: instances reach the outside under the host's address, and published ports lead in.
//!
//! ```text
//! prerouting   to an address of the host           → ports
//! output       the same, loopback excepted         → ports
//! ports        tcp 8080                            → 10.18.0.2:80
//! postrouting  from the subnet, out of anything but bridge and TUN         → masquerade
//!              from the subnet through a published port into the subnet    → masquerade, so that the answer comes back this way
//! ```

use std::net::IpAddr;

use tracing::{info, warn};

use crate::model::{Addresses, PortMapping, Protocol, Subnet};

use super::journal::{Family, Undo};
use super::nft::{self, Batch, Expression, Hook, Place, Refused};
use super::{LinkConfig, LinkError, Links, sysctl};

pub(super) const TABLE: &str = "node_engine";
const PREROUTING: &str = "prerouting";
const OUTPUT: &str = "output";
const POSTROUTING: &str = "postrouting";
const PORTS: &str = "ports";

/// Before Docker's own (-100, 100): the first translation of a connection is the one that holds.
const DESTINATION_PRIORITY: i32 = -110;
const SOURCE_PRIORITY: i32 = 90;

/// What the table should say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Wanted {
    subnet: Option<Subnet>,
    ports: Vec<(PortMapping, Addresses)>,
}

/// A rule with the comment that says all that is in it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Rule {
    chain: &'static str,
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
        self.ensure_table(|wanted| *wanted = Wanted { subnet: Some(subnet), ports }).await
    }

    /// Compares the rules by their comments and rewrites all of them in one transaction where one is missing or too many.
    async fn ensure_table(&self, change: impl FnOnce(&mut Wanted)) -> Result<(), LinkError> {
        let wanted = {
            let mut wanted = self.wanted.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            change(&mut wanted);
            wanted.clone()
        };
        let families: Vec<(Family, Vec<Rule>)> =
            families().into_iter().map(|family| (family, wanted_rules(family, &self.config, &wanted))).collect();
        let outdated = blocking("list rules of", {
            let families = families.clone();
            move || {
                let mut outdated = false;
                for (family, rules) in &families {
                    outdated |= !is_current(*family, rules)?;
                }
                Ok(outdated)
            }
        });
        if !outdated.await? {
            return Ok(());
        }
        for (family, _) in &families {
            self.journal().note(Undo::DelTable { family: *family })?;
        }
        blocking("write", move || Ok(rewrite(&families))).await?.map_err(|refused| refused_by_kernel(&refused))?;
        info!(subnet = ?wanted.subnet.map(|subnet| subnet.v4), ports = wanted.ports.len(), "wrote the address translation rules");
        Ok(())
    }
}

/// A table that is not there is a success.
pub(super) async fn delete_table(family: Family) -> Result<(), LinkError> {
    let mut batch = Batch::new();
    // Made first, so that it is there to delete.
    batch.table(family, TABLE);
    batch.delete_table(family, TABLE);
    blocking("delete", move || Ok(batch.commit())).await?.map_err(|refused| refused_by_kernel(&refused))
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

fn is_current(family: Family, rules: &[Rule]) -> std::io::Result<bool> {
    let present = nft::rules(family, TABLE)?;
    let in_chain = |chain: &str| -> Vec<Option<&str>> {
        present.iter().filter(|rule| rule.chain == chain).map(|rule| rule.comment.as_deref()).collect()
    };
    let wanted_in = |chain: &str| -> Vec<Option<&str>> {
        rules.iter().filter(|rule| rule.chain == chain).map(|rule| Some(rule.comment.as_str())).collect()
    };
    Ok([PREROUTING, OUTPUT, POSTROUTING, PORTS].into_iter().all(|chain| in_chain(chain) == wanted_in(chain)))
}

/// Both families in one transaction. A kernel whose nf_tables has no IPv6 gets the IPv4 part alone.
fn rewrite(families: &[(Family, Vec<Rule>)]) -> Result<(), Refused> {
    match transaction(families).commit() {
        Err(refused) if families.len() > 1 && refused.step.contains(" ip6 ") => {
            warn!(step = refused.step, reason = refused.errno.desc(), "no address translation for IPv6 on this kernel");
            transaction(&families[..1]).commit()
        }
        result => result,
    }
}

fn transaction(families: &[(Family, Vec<Rule>)]) -> Batch {
    let mut batch = Batch::new();
    for (family, rules) in families {
        let family = *family;
        batch.table(family, TABLE);
        batch.chain(family, TABLE, PORTS);
        batch.nat_chain(family, TABLE, PREROUTING, Hook::Prerouting, DESTINATION_PRIORITY);
        batch.nat_chain(family, TABLE, OUTPUT, Hook::Output, DESTINATION_PRIORITY);
        batch.nat_chain(family, TABLE, POSTROUTING, Hook::Postrouting, SOURCE_PRIORITY);
        for chain in [PREROUTING, OUTPUT, POSTROUTING, PORTS] {
            batch.flush(family, TABLE, chain);
        }
        for rule in rules {
            batch.rule(family, TABLE, rule.chain, Place::Last, &rule.comment, &rule.expressions);
        }
    }
    batch
}

fn wanted_rules(family: Family, config: &LinkConfig, wanted: &Wanted) -> Vec<Rule> {
    let mut rules = entry_rules(family);
    rules.extend(wanted.ports.iter().map(|(mapping, addresses)| port_rule(family, *mapping, *addresses)));
    rules.extend(wanted.subnet.iter().flat_map(|subnet| masquerade_rules(family, config, *subnet)));
    rules
}

fn entry_rules(family: Family) -> Vec<Rule> {
    let (network, prefix): (IpAddr, u8) = match family {
        Family::V4 => ([127, 0, 0, 0].into(), 8),
        Family::V6 => (std::net::Ipv6Addr::LOCALHOST.into(), 128),
    };
    vec![
        Rule {
            chain: PREROUTING,
            comment: "published ports".into(),
            expressions: vec![Expression::DestinationIsLocal, Expression::Jump(PORTS.into())],
        },
        Rule {
            chain: OUTPUT,
            comment: "published ports, from this host".into(),
            expressions: vec![
                Expression::NotDestination { network, prefix },
                Expression::DestinationIsLocal,
                Expression::Jump(PORTS.into()),
            ],
        },
    ]
}

fn port_rule(family: Family, mapping: PortMapping, addresses: Addresses) -> Rule {
    let address: IpAddr = match family {
        Family::V4 => addresses.v4.into(),
        Family::V6 => addresses.v6.into(),
    };
    let protocol = match mapping.protocol {
        Protocol::Tcp => 6,
        Protocol::Udp => 17,
    };
    Rule {
        chain: PORTS,
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
    let (network, prefix): (IpAddr, u8) = match family {
        Family::V4 => (subnet.v4.into(), Subnet::V4_PREFIX),
        Family::V6 => (subnet.v6.into(), Subnet::V6_PREFIX),
    };
    let out = |name: &str, equal| Expression::Out { name: name.to_owned(), equal };
    let LinkConfig { bridge, tun, .. } = config;
    vec![
        Rule {
            chain: POSTROUTING,
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
            chain: POSTROUTING,
            comment: format!("{network}/{prefix} back to {bridge} through a published port"),
            expressions: vec![
                Expression::Source { network, prefix },
                out(bridge, true),
                Expression::WasTranslated,
                Expression::Counter,
                Expression::Masquerade,
            ],
        },
    ]
}
