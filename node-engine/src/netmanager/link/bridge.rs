//! The bridge that connects this node's instances, and its passage through other people's packet filters.
//!
//! Accepting in a table of our own does not override a drop in another's: Docker sets the policy of `FORWARD` to drop. So rules of
//! ours go where the host's filter asks: Docker leaves the chain `DOCKER-USER` for this, and without Docker the dropping chain itself
//! gets them. They carry a comment, by which they are found, completed and removed again.

use std::net::IpAddr;

use netlink_packet_route::link::InfoKind;
use rtnetlink::{LinkBridge, LinkMessageBuilder, LinkUnspec};
use tracing::{info, warn};

use crate::model::Subnet;

use super::journal::{Family, Undo};
use super::nft::{self, Batch, ChainState, Expression, Place};
use super::ports::{blocking, families, refused_by_kernel};
use super::{Bridge, LinkError, Links, gateway, legacy, stable_mac, sysctl};

/// On the bridge, for people, and for a node whose journal is lost.
const ALIAS: &str = "node-engine";

/// Begins the comment of every rule of ours in a chain of others.
const MARK: &str = "node-engine: ";

const FILTER: &str = "filter";
const DOCKER_USER: &str = "DOCKER-USER";
const FORWARD: &str = "FORWARD";
const FORWARD_HOOK: u32 = nft::Hook::Forward as u32;
const INET: u8 = 1;

impl Links {
    pub(super) async fn ensure_bridge_link(&self, subnet: Subnet) -> Result<Bridge, LinkError> {
        let name = &self.config.bridge;
        let undo = Undo::DelLink { name: name.clone() };
        let mac = stable_mac(name);
        let existing = self.netlink.link(name).await?;
        if let Some(link) = &existing {
            let ours = link.alias.as_deref() == Some(ALIAS) || self.journal().holds(&undo);
            if link.kind != Some(InfoKind::Bridge) || !ours {
                return Err(LinkError::Foreign(name.clone()));
            }
        }
        self.journal().note(undo)?;
        if existing.is_none() {
            // An address of its own, or the bridge would take on that of a port and change it with every instance. The MTU is set
            // afterwards: only then does the bridge keep it when its ports change.
            let bridge = LinkMessageBuilder::<LinkBridge>::new(name).address(mac.to_vec());
            self.netlink.create(name, bridge.build()).await?;
        }
        let unfinished = existing.as_ref().is_none_or(|link| {
            !link.up || link.alias.as_deref() != Some(ALIAS) || link.mtu != self.config.mtu || link.mac != Some(mac)
        });
        if unfinished {
            let finished = LinkUnspec::new_with_name(name).alias(ALIAS).mtu(self.config.mtu).address(mac.to_vec()).up();
            self.netlink.set(name, finished.build()).await?;
        }
        sysctl::settle_own_interface(name)?;

        let link = self.netlink.link(name).await?.ok_or_else(|| LinkError::Kernel {
            step: "look up",
            object: name.clone(),
            reason: "the bridge has disappeared".into(),
        })?;
        let gateway = gateway(subnet);
        let mut wanted = vec![(IpAddr::V4(gateway.v4), Subnet::V4_PREFIX)];
        if sysctl::has_ipv6() {
            wanted.push((IpAddr::V6(gateway.v6), Subnet::V6_PREFIX));
        }
        let present = self.netlink.addresses(link.index).await?;
        for (address, prefix) in present.iter().filter(|address| !wanted.contains(address)) {
            self.netlink.delete_address(link.index, *address, *prefix).await?;
        }
        for (address, prefix) in wanted.iter().filter(|address| !present.contains(address)) {
            self.netlink.add_address(link.index, *address, *prefix).await?;
        }
        Ok(Bridge { ifindex: link.index, mac: link.mac.unwrap_or(mac) })
    }

    /// Traffic of bridge and TUN passes the host's own filters, as far as they are ours to change; the rest becomes a warning.
    pub(super) async fn ensure_accepted(&self) -> Result<(), LinkError> {
        let interfaces = [self.config.bridge.clone(), self.config.tun.clone()];
        let (chains, legacy) = blocking("list chains of", || Ok((nft::chains()?, legacy::dropping()))).await?;
        let mut warnings = legacy::warnings(&legacy, &interfaces);
        warnings.extend(warnings_for(&chains, &interfaces));
        for family in families() {
            if let Some(chain) = door(&chains, family) {
                self.ensure_rules(family, &chain.name, &interfaces).await?;
            }
        }
        let mut known = self.warnings.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for warning in warnings.iter().filter(|warning| !known.contains(warning)) {
            warn!("{warning}");
        }
        *known = warnings;
        Ok(())
    }

    async fn ensure_rules(&self, family: Family, chain: &str, interfaces: &[String]) -> Result<(), LinkError> {
        let wanted = acceptance(interfaces);
        let mut present = blocking("list rules of", move || nft::rules(family, FILTER)).await?;
        present.retain(|rule| rule.chain == chain);
        let is_there = |comment: &str| present.iter().any(|rule| rule.comment.as_deref() == Some(comment));
        let missing: Vec<_> = wanted.iter().filter(|(comment, _)| !is_there(comment)).collect();
        let stale = present.iter().filter(|rule| {
            let ours = rule.comment.as_deref().filter(|comment| comment.starts_with(MARK));
            ours.is_some_and(|comment| !wanted.iter().any(|(wanted, _)| wanted == comment))
        });
        let mut batch = Batch::new();
        for rule in stale {
            batch.delete_rule(family, FILTER, chain, rule.handle);
        }
        for (comment, expressions) in missing {
            batch.rule(family, FILTER, chain, Place::First, comment, expressions);
        }
        if batch.is_empty() {
            return Ok(());
        }
        self.journal().note(Undo::DelRules { family, table: FILTER.into(), chain: chain.into() })?;
        blocking("write", move || Ok(batch.commit())).await?.map_err(|refused| refused_by_kernel(&refused))?;
        info!(%family, chain, "the host's filter now lets the bridge and the TUN device pass");
        Ok(())
    }
}

/// Rules that carry our mark; a chain that is not there has none.
pub(super) async fn delete_rules(family: Family, table: &str, chain: &str) -> Result<(), LinkError> {
    let (in_table, in_chain) = (table.to_owned(), chain.to_owned());
    let deleted = blocking("delete rules of", move || {
        let mut batch = Batch::new();
        for rule in nft::rules(family, &in_table)? {
            if rule.chain == in_chain && rule.comment.is_some_and(|comment| comment.starts_with(MARK)) {
                batch.delete_rule(family, &in_table, &in_chain, rule.handle);
            }
        }
        Ok(if batch.is_empty() { Ok(()) } else { batch.commit() })
    });
    deleted.await?.map_err(|refused| refused_by_kernel(&refused))
}

/// Where this family's filter lets us in: Docker's chain for it, else an iptables chain that drops by default.
fn door(chains: &[ChainState], family: Family) -> Option<&ChainState> {
    let mut filter = chains.iter().filter(|chain| chain.family == family.number() && chain.table == FILTER);
    filter.clone().find(|chain| chain.name == DOCKER_USER).or_else(|| filter.find(|chain| is_dropping_forward(chain)))
}

fn is_dropping_forward(chain: &ChainState) -> bool {
    chain.name == FORWARD && chain.hook == Some(FORWARD_HOOK) && chain.drops_by_default
}

/// In both directions of each interface; Docker's `RETURN` comes after them.
fn acceptance(interfaces: &[String]) -> Vec<(String, Vec<Expression>)> {
    let mut rules = Vec::new();
    for name in interfaces {
        let accept = |matches| vec![matches, Expression::Counter, Expression::Accept];
        rules.push((format!("{MARK}from {name}"), accept(Expression::In(name.clone()))));
        rules.push((format!("{MARK}to {name}"), accept(Expression::Out { name: name.clone(), equal: true })));
    }
    rules
}

/// A chain that somebody wrote to drop what is not listed is theirs: a rule of ours in it would be a hole they did not make.
fn warnings_for(chains: &[ChainState], interfaces: &[String]) -> Vec<String> {
    let dropping = chains.iter().filter(|chain| {
        let routed = [INET, Family::V4.number(), Family::V6.number()].contains(&chain.family);
        routed && chain.hook == Some(FORWARD_HOOK) && chain.drops_by_default
    });
    let foreign =
        dropping.filter(|chain| !(chain.family != INET && chain.table == FILTER && is_dropping_forward(chain)));
    foreign
        .map(|chain| {
            let family = match chain.family {
                INET => "inet",
                2 => "ip",
                _ => "ip6",
            };
            format!(
                "the chain {} of nf_tables table {family} {} drops forwarded traffic by default: instances reach nobody unless it \
                 accepts what comes from and goes to {}",
                chain.name,
                chain.table,
                interfaces.join(" and ")
            )
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(family: u8, table: &str, name: &str, hook: Option<u32>, drops_by_default: bool) -> ChainState {
        ChainState { family, table: table.into(), name: name.into(), hook, drops_by_default }
    }

    #[test]
    fn rules_go_where_the_filter_asks() {
        let forward = |drops| chain(2, "filter", "FORWARD", Some(2), drops);
        let docker = chain(2, "filter", "DOCKER-USER", None, false);
        let own = chain(1, "filter", "forward", Some(2), true);
        let input = chain(2, "filter", "INPUT", Some(1), true);
        let name = |chains: &[ChainState], family| door(chains, family).map(|chain| chain.name.clone());

        assert_eq!(name(&[forward(true), docker.clone()], Family::V4).as_deref(), Some("DOCKER-USER"));
        assert_eq!(name(&[forward(false), docker], Family::V4).as_deref(), Some("DOCKER-USER"));
        assert_eq!(name(&[forward(true)], Family::V4).as_deref(), Some("FORWARD"));
        assert_eq!(name(&[forward(true)], Family::V6), None);
        assert_eq!(name(&[forward(false), own.clone(), input], Family::V4), None);

        let interfaces = ["edge-bridge".to_owned(), "edge-tun".to_owned()];
        assert!(warnings_for(&[forward(true)], &interfaces).is_empty());
        let warnings = warnings_for(&[own], &interfaces);
        assert!(warnings.len() == 1 && warnings[0].contains("inet filter") && warnings[0].contains("edge-bridge"));
    }
}
