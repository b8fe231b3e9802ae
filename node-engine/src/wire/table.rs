//! The overlay's questions and answers: subnets, the service table, notices of deployed instances, interests.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::Serialize;

use super::json::{MAX_DOCUMENT, MAX_MESSAGE, Malformed, Members, excerpt};
use super::status::instance;
use crate::model::{
    Addresses, FamilyPair, InstanceId, Policy, Query, SemanticAddress, ServiceName, Subnet, TableAnswer, TableRow,
};

/// Asks for this node's subnets. Every such request takes a new pair out of the cluster's stock.
pub const SUBNET_REQUEST: &str = r#"{"METHOD":"GET"}"#;

#[derive(Serialize)]
struct SubnetResult {
    address: Ipv4Addr,
    addressv6: Ipv6Addr,
}

/// What a cluster answers to a subnet request.
pub fn subnet_result(subnet: &Subnet) -> String {
    super::text(&SubnetResult { address: subnet.v4, addressv6: subnet.v6 })
}

/// Reads the answer to a subnet request. Clusters before v0.4.301 assign no IPv6 subnet; there it follows from the IPv4 one.
///
/// # Errors
/// Where an address is missing, or is not the base of a /26 or /120.
pub fn read_subnet(bytes: &[u8]) -> Result<Subnet, Malformed> {
    let members = Members::parse(bytes, MAX_MESSAGE)?;
    let v4 = address(&members, "address")?.ok_or(Malformed::Missing("address"))?;
    let v4 = base_v4("address", v4)?;
    let v6 = match address::<Ipv6Addr>(&members, "addressv6")? {
        Some(v6) if v6.octets()[15] == 0 => v6,
        Some(v6) => {
            return Err(Malformed::Member {
                member: "addressv6",
                expected: "the base of a /120",
                found: v6.to_string(),
            });
        }
        None => subnet_v6(v4),
    };
    Ok(Subnet { v4, v6 })
}

pub(super) fn base_v4(member: &'static str, v4: Ipv4Addr) -> Result<Ipv4Addr, Malformed> {
    if v4.octets()[3].is_multiple_of(64) {
        return Ok(v4);
    }
    Err(Malformed::Member { member, expected: "the base of a /26", found: v4.to_string() })
}

/// An IPv6 subnet for a node whose cluster knows IPv4 only: as distinct between nodes as the IPv4 one it is made from.
pub(super) fn subnet_v6(v4: Ipv4Addr) -> Ipv6Addr {
    let nth = u128::from(v4.to_bits() >> (32 - u32::from(Subnet::V4_PREFIX)));
    Ipv6Addr::from_bits((0xfc00u128 << 112) | (nth << (128 - u32::from(Subnet::V6_PREFIX))))
}

#[derive(Serialize)]
struct TableRequest<'a> {
    sname: &'a str,
    sip: &'a str,
}

/// Asks for the rows of a service, by its name or by one of its addresses.
pub fn table_query(query: &Query) -> String {
    match query {
        Query::Name(service) => super::text(&TableRequest { sname: service.as_str(), sip: "" }),
        Query::Address(address) => super::text(&TableRequest { sname: "", sip: &address.to_string() }),
    }
}

/// Reads a table query.
///
/// # Errors
/// Where it has neither a service name nor an address, or both.
pub fn read_table_query(bytes: &[u8]) -> Result<Query, Malformed> {
    let members = Members::parse(bytes, MAX_MESSAGE)?;
    match (members.said("sname")?, address(&members, "sip")?) {
        (Some(name), None) => query(&name).ok_or_else(|| Malformed::Member {
            member: "sname",
            expected: "a service name",
            found: excerpt(name.as_bytes()),
        }),
        (None, Some(address)) => Ok(Query::Address(address)),
        _ => Err(Malformed::Missing("sname` or `sip")),
    }
}

fn query(text: &str) -> Option<Query> {
    if let Ok(address) = text.parse() {
        return Some(Query::Address(address));
    }
    text.parse().ok().map(Query::Name)
}

fn query_text(query: &Query) -> String {
    match query {
        Query::Name(service) => service.to_string(),
        Query::Address(address) => address.to_string(),
    }
}

/// Where a first-generation cluster manager answers this question over HTTP.
pub fn first_generation_path(query: &Query) -> String {
    match query {
        Query::Name(service) => format!("/api/job/{service}/instances"),
        Query::Address(address) => format!("/api/job/ip/{}/instances", address.to_string().replace('.', "_")),
    }
}

/// Reads rows of the service table. A row without its addresses is an instance that is not deployed yet; it is left out, and
/// so is one that makes no sense, since neither can be reached and the others can.
///
/// # Errors
/// Where it is no table answer at all.
pub fn read_table(bytes: &[u8]) -> Result<TableAnswer, Malformed> {
    let members = Members::parse(bytes, MAX_DOCUMENT)?;
    Ok(TableAnswer {
        query: members.said("query_key")?.as_deref().and_then(query),
        service: members.said("app_name")?.and_then(|name| name.parse().ok()),
        rows: members.objects("instance_list")?.iter().filter_map(row).collect(),
    })
}

fn row(members: &Members<'_>) -> Option<TableRow> {
    let namespace = pair(members, "namespace_ip", "namespace_ip_v6")?;
    if namespace == FamilyPair::default() {
        return None;
    }
    let (instance, services) = addresses(members)?;
    Some(TableRow {
        number: members.whole("instance_number").ok()??.try_into().ok()?,
        namespace,
        instance,
        host: address(members, "host_ip").ok()??,
        host_port: members.whole("host_port").ok()??.try_into().ok().filter(|port| *port != 0)?,
        weight: members.whole("weight").ok().flatten().map_or(TableRow::DEFAULT_WEIGHT, weight),
        services,
    })
}

fn weight(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(TableRow::MAX_WEIGHT).min(TableRow::MAX_WEIGHT)
}

/// What means exactly this instance, and what means the service. An address of unknown type is one of the instance only
/// where it says so itself; otherwise nobody here knows how to choose behind it.
fn addresses(members: &Members<'_>) -> Option<(FamilyPair, Vec<SemanticAddress>)> {
    let mut own = pair(members, "instance_ip", "instance_ip_v6")?;
    let mut services = Vec::new();
    for entry in members.objects("service_ip").ok()? {
        let (v4, v6): (Option<Ipv4Addr>, Option<Ipv6Addr>) =
            (address(&entry, "Address").ok()?, address(&entry, "Address_v6").ok()?);
        let kind = entry.said("IpType").ok()?.unwrap_or_default();
        let policy = match kind.as_str() {
            // Ours say more; whoever does not understand it takes any instance.
            "RR" => match entry.said("Policy").ok()? {
                None => Policy::RoundRobin,
                Some(label) => Policy::from_label(&label).unwrap_or(Policy::RoundRobin),
            },
            "Closest" => Policy::Closest,
            "instance_ip" | "InstanceNumber" => {
                // Where the row itself does not say it: first-generation answers.
                own.v4 = own.v4.or(v4);
                own.v6 = own.v6.or(v6);
                continue;
            }
            _ => continue,
        };
        let both = [v4.map(IpAddr::V4), v6.map(IpAddr::V6)];
        services.extend(both.into_iter().flatten().map(|address| SemanticAddress { policy, address }));
    }
    Some((own, services))
}

fn pair(members: &Members<'_>, v4: &'static str, v6: &'static str) -> Option<FamilyPair> {
    Some(FamilyPair { v4: address(members, v4).ok()?, v6: address(members, v6).ok()? })
}

fn address<A: std::str::FromStr>(members: &Members<'_>, member: &'static str) -> Result<Option<A>, Malformed> {
    let Some(text) = members.said(member)? else { return Ok(None) };
    text.parse().map(Some).map_err(|_| Malformed::Member {
        member,
        expected: "an address",
        found: excerpt(text.as_bytes()),
    })
}

#[derive(Serialize)]
struct TableResult<'a> {
    app_name: &'a str,
    instance_list: Vec<Row>,
    query_key: String,
}

#[derive(Serialize)]
struct Row {
    instance_number: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    instance_ip: Option<Ipv4Addr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    instance_ip_v6: Option<Ipv6Addr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace_ip: Option<Ipv4Addr>,
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace_ip_v6: Option<Ipv6Addr>,
    host_ip: IpAddr,
    host_port: u16,
    #[serde(skip_serializing_if = "is_default_weight")]
    weight: u32,
    service_ip: Vec<ServiceAddress>,
}

/// The type of address under which upstream nodes and ours know a policy, and what ours read besides. Every type that upstream nodes do
/// not know is one instance's own address to them, so what they do not know must be round robin: they choose at random behind it.
pub const fn spelling(policy: Policy) -> (&'static str, Option<&'static str>) {
    match policy {
        Policy::RoundRobin => ("RR", None),
        Policy::Closest => ("Closest", None),
        other => ("RR", Some(other.label())),
    }
}

#[derive(Serialize)]
struct ServiceAddress {
    #[serde(rename = "IpType")]
    kind: &'static str,
    #[serde(rename = "Policy", skip_serializing_if = "Option::is_none")]
    policy: Option<&'static str>,
    #[serde(rename = "Address", skip_serializing_if = "Option::is_none")]
    v4: Option<Ipv4Addr>,
    #[serde(rename = "Address_v6", skip_serializing_if = "Option::is_none")]
    v6: Option<Ipv6Addr>,
}

/// What a cluster answers to `query`: the rows of `service`, or nothing where it knows no such service.
pub fn table_result(query: &Query, service: Option<&ServiceName>, rows: &[TableRow]) -> String {
    super::text(&TableResult {
        app_name: service.map(ServiceName::as_str).unwrap_or_default(),
        instance_list: rows.iter().map(Row::from).collect(),
        query_key: query_text(query),
    })
}

impl From<&TableRow> for Row {
    fn from(row: &TableRow) -> Self {
        Self {
            instance_number: row.number,
            instance_ip: row.instance.v4,
            instance_ip_v6: row.instance.v6,
            namespace_ip: row.namespace.v4,
            namespace_ip_v6: row.namespace.v6,
            host_ip: row.host,
            host_port: row.host_port,
            weight: row.weight,
            service_ip: service_addresses(row),
        }
    }
}

/// `serde` asks by reference.
#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_default_weight(weight: &u32) -> bool {
    *weight == TableRow::DEFAULT_WEIGHT
}

fn service_addresses(row: &TableRow) -> Vec<ServiceAddress> {
    let mut entries = Vec::new();
    for policy in Policy::ALL {
        let (kind, more) = spelling(policy);
        let mut entry = ServiceAddress { kind, policy: more, v4: None, v6: None };
        for service in row.services.iter().filter(|service| service.policy == policy) {
            match service.address {
                IpAddr::V4(v4) => entry.v4 = Some(v4),
                IpAddr::V6(v6) => entry.v6 = Some(v6),
            }
        }
        if entry.v4.is_some() || entry.v6.is_some() {
            entries.push(entry);
        }
    }
    entries.push(ServiceAddress { kind: "instance_ip", policy: None, v4: row.instance.v4, v6: row.instance.v6 });
    entries
}

/// An instance whose network is up, as a node tells the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deployed {
    pub instance: InstanceId,
    pub addresses: Addresses,
    pub host: IpAddr,
    pub host_port: u16,
}

#[derive(Serialize)]
struct DeployedNotice<'a> {
    appname: &'a str,
    status: &'static str,
    instance_number: u32,
    nsip: Ipv4Addr,
    nsipv6: Ipv6Addr,
    /// A text here, a number in table rows.
    host_port: String,
    host_ip: IpAddr,
}

/// Tells the cluster where an instance is reached. Both families, or the root refuses it.
pub fn deployed(notice: &Deployed) -> String {
    super::text(&DeployedNotice {
        appname: notice.instance.service.as_str(),
        status: "DEPLOYED",
        instance_number: notice.instance.number,
        nsip: notice.addresses.v4,
        nsipv6: notice.addresses.v6,
        host_port: notice.host_port.to_string(),
        host_ip: notice.host,
    })
}

/// Reads what [`deployed`] writes.
///
/// # Errors
/// Where a member is missing or is no address.
pub fn read_deployed(bytes: &[u8]) -> Result<Deployed, Malformed> {
    let members = Members::parse(bytes, MAX_MESSAGE)?;
    let port = members.whole("host_port")?.ok_or(Malformed::Missing("host_port"))?;
    Ok(Deployed {
        instance: instance(&members, "appname", "instance_number")?,
        addresses: Addresses {
            v4: address(&members, "nsip")?.ok_or(Malformed::Missing("nsip"))?,
            v6: address(&members, "nsipv6")?.ok_or(Malformed::Missing("nsipv6"))?,
        },
        host: address(&members, "host_ip")?.ok_or(Malformed::Missing("host_ip"))?,
        host_port: port.try_into().map_err(|_| Malformed::Member {
            member: "host_port",
            expected: "a port",
            found: port.to_string(),
        })?,
    })
}

#[derive(Serialize)]
struct AddressChanged<'a> {
    appname: &'a str,
    instance_number: u32,
    host_port: String,
    host_ip: IpAddr,
}

/// Tells the cluster that the node of an instance has another address than before.
pub fn address_changed(instance: &InstanceId, host: IpAddr, host_port: u16) -> String {
    super::text(&AddressChanged {
        appname: instance.service.as_str(),
        instance_number: instance.number,
        host_port: host_port.to_string(),
        host_ip: host,
    })
}

#[derive(Serialize)]
struct Interest<'a> {
    appname: &'a str,
}

/// Tells the cluster that this node watches a service no longer.
pub fn interest_remove(service: &ServiceName) -> String {
    super::text(&Interest { appname: service.as_str() })
}

/// Reads what [`interest_remove`] writes.
///
/// # Errors
/// Where it names no service.
pub fn read_interest_remove(bytes: &[u8]) -> Result<ServiceName, Malformed> {
    let members = Members::parse(bytes, MAX_MESSAGE)?;
    let name = members.said("appname")?.ok_or(Malformed::Missing("appname"))?;
    name.parse().map_err(|_| Malformed::Member {
        member: "appname",
        expected: "a service name",
        found: excerpt(name.as_bytes()),
    })
}

/// What happened to a watched service. Either way its rows are asked for anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Update {
    Deployment,
    Undeployment,
}

/// What a cluster publishes to those who watch a service.
pub fn updates_available(update: Update) -> &'static str {
    match update {
        Update::Deployment => r#"{"type":"DEPLOYMENT"}"#,
        Update::Undeployment => r#"{"type":"UNDEPLOYMENT"}"#,
    }
}
