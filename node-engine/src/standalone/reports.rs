//! What nodes say, as events for the core. Everything that is not acted on may be anything, and one bad entry of a list does not
//! cost the others: a real cluster loses its receive thread over less.

use std::collections::BTreeSet;
use std::net::IpAddr;

use crate::model::{InstanceId, NodeId, Technology};
use crate::wire::json::{MAX_DOCUMENT, MAX_MESSAGE, Malformed, Members, excerpt, tail};
use crate::wire::{FromNode, status, table};

use super::core::{Core, Sample};
use super::inventory::{Deployed, InstanceUsage, Moment, NodeFacts};

/// Log tail that is kept of an instance.
const MAX_LOG: usize = 1024;

/// Why a message of a node is passed over.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unheard {
    #[error("no node says anything on this topic")]
    Topic,
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

/// Takes in one message.
pub(super) fn hear(core: &mut Core, topic: &str, payload: &[u8], now: Moment) -> Result<(), Unheard> {
    let (node, kind) = FromNode::parse(topic).ok_or(Unheard::Topic)?;
    match kind {
        FromNode::Information => core.information(&node, facts(payload, None)?, now),
        FromNode::Job => {
            let report = status::read_job_report(payload)?;
            core.report(&node, &report.instance, report.status, &report.detail, now);
        }
        FromNode::Resources => core.resources(&node, samples(payload)?, now),
        FromNode::Subnet => subnet(core, &node, payload, now)?,
        FromNode::TableQuery => core.table_query(&node, table::read_table_query(payload)?),
        FromNode::Deployed => {
            let (instance, deployed) = deployed(payload)?;
            core.deployed(&node, &instance, deployed, now);
        }
        FromNode::AddressChanged => {
            let members = Members::parse(payload, MAX_MESSAGE)?;
            let (host, port) = (address(&members, "host_ip")?, port(&members)?);
            core.address_changed(&node, &instance(&members, "appname", "instance_number")?, host, port);
        }
        // Whoever listens to changes of a service is known to the broker.
        FromNode::InterestRemove => {}
    }
    Ok(())
}

/// Facts of a registration, a greeting or an `information`, under the names of any generation. A node that does not say where it
/// is, is where it speaks from.
pub(super) fn facts(bytes: &[u8], peer: Option<IpAddr>) -> Result<NodeFacts, Malformed> {
    let members = Members::parse(bytes, MAX_MESSAGE)?;
    let text = |name| members.said(name).ok().flatten();
    let number = |names: &[&'static str]| {
        let number = names.iter().find_map(|name| members.number(name).ok().flatten());
        number.filter(|number| number.is_finite() && *number >= 0.0)
    };
    let count = |names: &[&'static str]| number(names).map(|number| number as u64);
    // `memory` is available MiB to the newest generation, and the used percentage to those before it, which name the available
    // MiB otherwise.
    let older = members.has("memory_free_in_MB") && !members.has("memory_percent");
    let technologies = ["virtualization", "technology"].iter().find_map(|name| {
        let names = members.texts(name).ok()?;
        (!names.is_empty()).then_some(names)
    });
    let said: Option<IpAddr> = text("ip").and_then(|text| text.parse().ok());
    let said =
        said.filter(|ip| !ip.is_unspecified() && (!ip.is_loopback() || peer.is_none_or(|peer| peer.is_loopback())));
    Ok(NodeFacts {
        address: said.or(peer),
        port: text("port").filter(|port| port.len() <= 16),
        architecture: text("architecture").filter(|name| name.len() <= 64),
        technologies: technologies
            .unwrap_or_default()
            .iter()
            .take(64)
            .map(|name| Technology::from(name.as_str()))
            .collect::<BTreeSet<_>>(),
        vcpus: count(&["vcpus", "cpu_count_total", "free_cores"]),
        vgpus: count(&["vgpus", "gpu_cores"]),
        memory_available_mib: count(&["memory_free_in_MB", "memory"]),
        cpu_percent: number(&["cpu_percent", "cpu"]),
        memory_percent: number(if older { &["memory"] } else { &["memory_percent"] }),
    })
}

fn samples(payload: &[u8]) -> Result<Vec<Sample>, Malformed> {
    let members = Members::parse(payload, MAX_DOCUMENT)?;
    if !members.has("services") {
        return Err(Malformed::Missing("services"));
    }
    Ok(members.objects("services")?.iter().filter_map(|entry| sample(entry).ok()).collect())
}

fn sample(entry: &Members<'_>) -> Result<Sample, Malformed> {
    // Numbers in texts, or numbers.
    let figure = |name| match entry.text(name) {
        Ok(text) => text.unwrap_or_default(),
        Err(_) => entry.get(name).unwrap_or_default().to_owned(),
    };
    let short = |text: String| text.chars().take(32).collect();
    Ok(Sample {
        instance: instance(entry, "job_name", "instance")?,
        virtualization: short(entry.text("virtualization").ok().flatten().unwrap_or_default()),
        usage: InstanceUsage {
            cpu_percent: short(figure("cpu_percent")),
            memory_percent: short(figure("memory_percent")),
            disk: short(figure("disk")),
            logs: tail(&entry.text("logs").ok().flatten().unwrap_or_default(), MAX_LOG).to_owned(),
        },
    })
}

fn subnet(core: &mut Core, node: &NodeId, payload: &[u8], now: Moment) -> Result<(), Malformed> {
    let members = Members::parse(payload, MAX_MESSAGE)?;
    let method = members.said("METHOD")?.ok_or(Malformed::Missing("METHOD"))?;
    // Of the methods there are, `DELETE` does nothing in the reference either.
    if method == "GET" {
        core.subnet_request(node, now);
    }
    Ok(())
}

/// A deployed notice. Nodes older than v0.4.301 have no IPv6 address.
fn deployed(payload: &[u8]) -> Result<(InstanceId, Deployed), Malformed> {
    let members = Members::parse(payload, MAX_MESSAGE)?;
    let deployed = Deployed {
        namespace_v4: address(&members, "nsip")?,
        namespace_v6: if members.said("nsipv6")?.is_some() { Some(address(&members, "nsipv6")?) } else { None },
        host: address(&members, "host_ip")?,
        host_port: port(&members)?,
    };
    Ok((instance(&members, "appname", "instance_number")?, deployed))
}

fn instance(members: &Members<'_>, name: &'static str, number: &'static str) -> Result<InstanceId, Malformed> {
    let wrong =
        |member, expected, found: &str| Malformed::Member { member, expected, found: excerpt(found.as_bytes()) };
    let text = members.said(name)?.ok_or(Malformed::Missing(name))?;
    let service = text.parse().map_err(|_| wrong(name, "a service name", &text))?;
    let wide = members.whole(number)?.ok_or(Malformed::Missing(number))?;
    let number = wide.try_into().map_err(|_| wrong(number, "an instance number", &wide.to_string()))?;
    Ok(InstanceId { service, number })
}

fn address<A: std::str::FromStr>(members: &Members<'_>, member: &'static str) -> Result<A, Malformed> {
    let text = members.said(member)?.ok_or(Malformed::Missing(member))?;
    text.parse().map_err(|_| Malformed::Member { member, expected: "an address", found: excerpt(text.as_bytes()) })
}

fn port(members: &Members<'_>) -> Result<u16, Malformed> {
    let wide = members.whole("host_port")?.ok_or(Malformed::Missing("host_port"))?;
    wide.try_into().ok().filter(|port| *port != 0).ok_or_else(|| Malformed::Member {
        member: "host_port",
        expected: "a port",
        found: wide.to_string(),
    })
}

/// Messages of a node, a line of topic before each, to a cluster that has a service; for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn understand(bytes: &[u8]) {
    let mut core = Core::new("c".parse().expect("an id"), super::AddressPlan::default());
    let node: NodeId = "6b034ec446528056c08b89ae".parse().expect("an id");
    core.add_node(super::inventory::Node {
        id: node,
        host: "w".into(),
        facts: NodeFacts::default(),
        subnet: None,
        seen: None,
    });
    for (moment, message) in bytes.split(|byte| *byte == b'\x1e').enumerate() {
        let Some(end) = message.iter().position(|byte| *byte == b'\n') else { return };
        let (topic, payload) = message.split_at(end);
        if let Ok(topic) = std::str::from_utf8(topic) {
            let _ = hear(&mut core, topic, &payload[1..], Moment::from_secs(moment as u64));
        }
    }
}
