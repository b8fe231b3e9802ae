//! What a name means and what is answered. Pure: names and addresses in, messages out.
//!
//! ```text
//! [label .] service . service namespace . app namespace . app . edge
//! closest .  web    .       test        .    default    . app . edge     the service app.default.web.test
//! ```

use std::net::IpAddr;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, PTR, SOA};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use super::in_subnet;
use crate::model::{Policy, ServiceName, Subnet};
use crate::netmanager::table::ServiceNets;
use crate::netmanager::view::Named;

/// The last label of every name of ours.
const APEX: &str = "edge";
/// Labels of a service's name before the apex.
const PARTS: usize = 4;
/// Seconds for which an answer may be kept.
const TTL: u32 = 5;
/// More addresses than this are not told at once.
const MOST: usize = 32;
/// What fits a datagram everywhere (DNS flag day 2020), and what every client takes.
const LARGEST_DATAGRAM: u16 = 1_232;
const SMALLEST_DATAGRAM: u16 = 512;
/// Before the number of an instance.
const INSTANCE: &str = "instance-";

/// What is ours to answer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Zone {
    pub(super) nets: ServiceNets,
    pub(super) subnet: Subnet,
}

/// What a name asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    Service {
        service: ServiceName,
        label: Option<String>,
    },
    /// Whose address is this? Only addresses that are ours to know.
    Address(IpAddr),
    /// A part of a name of ours: it exists and has nothing.
    Part,
    /// Ours, and cannot be anything.
    Nobody,
    /// Somebody else's.
    Foreign,
}

impl Zone {
    pub(super) fn read(&self, name: &Name) -> Asked {
        let labels: Option<Vec<&str>> = name.iter().map(|label| std::str::from_utf8(label).ok()).collect();
        let last = name.iter().next_back();
        if !last.is_some_and(|last| last.eq_ignore_ascii_case(APEX.as_bytes())) {
            return self.read_reverse(name);
        }
        let Some((_, labels)) = labels.as_deref().and_then(<[&str]>::split_last) else { return Asked::Nobody };
        let (label, parts) = match labels.len() {
            0..PARTS => return Asked::Part,
            PARTS => (None, labels),
            _ if labels.len() == PARTS + 1 => (Some(labels[0].to_ascii_lowercase()), &labels[1..]),
            _ => return Asked::Nobody,
        };
        let [service, service_namespace, app_namespace, app] = parts else { return Asked::Nobody };
        match format!("{app}.{app_namespace}.{service}.{service_namespace}").parse() {
            Ok(service) => Asked::Service { service, label },
            Err(_) => Asked::Nobody,
        }
    }

    fn read_reverse(&self, name: &Name) -> Asked {
        let Ok(net) = name.parse_arpa_name() else { return Asked::Foreign };
        let address = net.addr();
        let ours = self.nets.contain(address) || in_subnet(self.subnet, address);
        if net.prefix_len() == net.max_prefix_len() && ours { Asked::Address(address) } else { Asked::Foreign }
    }
}

/// The name of a service, or of what one of its addresses means.
pub(super) fn name_of(service: &ServiceName, label: &str) -> Option<Name> {
    let mut parts = service.as_str().split('.');
    let (app, app_namespace) = (parts.next()?, parts.next()?);
    let (name, namespace) = (parts.next()?, parts.next()?);
    // The service's own address has the service's own name.
    let label = if label == Policy::RoundRobin.label() { String::new() } else { format!("{label}.") };
    Name::from_ascii(format!("{label}{name}.{namespace}.{app_namespace}.{app}.{APEX}.")).ok()
}

/// The addresses that the label means; without one those of round robin, else of the first policy there is, else of all instances.
/// `None` where the service has no such label.
pub(super) fn choose<'a>(named: &'a Named, label: Option<&'a str>) -> Option<Vec<IpAddr>> {
    let of = |label: &str| -> Vec<IpAddr> {
        named.addresses.iter().filter(|(other, _)| other == label).map(|(_, address)| *address).collect()
    };
    if let Some(label) = label {
        return Some(of(label)).filter(|addresses| !addresses.is_empty());
    }
    let policies =
        || named.addresses.iter().map(|(label, _)| label.as_str()).filter(|label| !label.starts_with(INSTANCE));
    let usual = Policy::RoundRobin.label();
    match policies().find(|label| *label == usual).or_else(|| policies().next()) {
        Some(label) => Some(of(label)),
        None => Some(named.addresses.iter().map(|(_, address)| *address).collect()),
    }
}

/// A question that can be answered.
#[derive(Clone, Debug)]
pub(super) struct Question {
    message: Message,
    pub(super) name: Name,
    pub(super) kind: RecordType,
}

/// What becomes of a datagram.
#[derive(Debug)]
pub(super) enum Heard {
    Question(Box<Question>),
    /// Answered without looking anything up.
    Answer(Vec<u8>),
    /// Not worth an answer: malformed, or an answer itself.
    Nothing,
}

pub(super) fn hear(bytes: &[u8]) -> Heard {
    let Ok(message) = Message::from_vec(bytes) else { return Heard::Nothing };
    if message.metadata.message_type != MessageType::Query {
        return Heard::Nothing;
    }
    let refuse = |code| {
        let answer = reply(&message, code, Vec::new()).to_vec();
        answer.map_or(Heard::Nothing, Heard::Answer)
    };
    if message.metadata.op_code != OpCode::Query {
        return refuse(ResponseCode::NotImp);
    }
    if message.edns.as_ref().is_some_and(|edns| edns.version() > 0) {
        return refuse(ResponseCode::BADVERS);
    }
    let [query] = message.queries.as_slice() else { return refuse(ResponseCode::FormErr) };
    let (name, kind) = (query.name().clone(), query.query_type());
    if query.query_class() != DNSClass::IN || matches!(kind, RecordType::AXFR | RecordType::IXFR) {
        return refuse(ResponseCode::Refused);
    }
    Heard::Question(Box::new(Question { name, kind, message }))
}

impl Question {
    /// The largest datagram that the client takes.
    pub(super) fn largest(&self) -> usize {
        let told = self.message.edns.as_ref().map_or(SMALLEST_DATAGRAM, Edns::max_payload);
        told.clamp(SMALLEST_DATAGRAM, LARGEST_DATAGRAM).into()
    }

    /// Those of the addresses that are asked for; none is an answer too.
    pub(super) fn addresses(&self, addresses: &[IpAddr]) -> Option<Vec<u8>> {
        let data = |address: &IpAddr| match (self.kind, address) {
            (RecordType::A | RecordType::ANY, IpAddr::V4(v4)) => Some(RData::A(A(*v4))),
            (RecordType::AAAA | RecordType::ANY, IpAddr::V6(v6)) => Some(RData::AAAA(AAAA(*v6))),
            _ => None,
        };
        self.found(addresses.iter().filter_map(data))
    }

    pub(super) fn pointer(&self, to: Name) -> Option<Vec<u8>> {
        let asked = matches!(self.kind, RecordType::PTR | RecordType::ANY);
        self.found(asked.then_some(RData::PTR(PTR(to))).into_iter())
    }

    /// The name exists, and has nothing of what is asked for.
    pub(super) fn nothing(&self) -> Option<Vec<u8>> {
        self.found(std::iter::empty())
    }

    pub(super) fn no_such_name(&self) -> Option<Vec<u8>> {
        self.negative(ResponseCode::NXDomain)
    }

    pub(super) fn failed(&self) -> Option<Vec<u8>> {
        reply(&self.message, ResponseCode::ServFail, Vec::new()).to_vec().ok()
    }

    /// The answer is too long for a datagram: ask again by TCP.
    pub(super) fn cut(&self) -> Option<Vec<u8>> {
        let mut cut = reply(&self.message, ResponseCode::NoError, Vec::new());
        cut.metadata.truncation = true;
        cut.to_vec().ok()
    }

    fn found(&self, data: impl Iterator<Item = RData>) -> Option<Vec<u8>> {
        let record = |data| Record::from_rdata(self.name.clone(), TTL, data);
        let records: Vec<Record> = data.take(MOST).map(record).collect();
        if records.is_empty() {
            return self.negative(ResponseCode::NoError);
        }
        let mut answer = reply(&self.message, ResponseCode::NoError, records);
        answer.metadata.authoritative = true;
        answer.to_vec().ok()
    }

    /// With the record that says for how long nothing may be remembered (RFC 2308).
    fn negative(&self, code: ResponseCode) -> Option<Vec<u8>> {
        let apex = Name::from_ascii(format!("{APEX}.")).ok()?;
        let soa = SOA::new(apex.clone(), apex.clone(), 1, 60, 60, 60, TTL);
        let mut answer = reply(&self.message, code, Vec::new());
        answer.metadata.authoritative = true;
        answer.authorities.push(Record::from_rdata(apex, TTL, RData::SOA(soa)));
        answer.to_vec().ok()
    }
}

fn reply(to: &Message, code: ResponseCode, answers: Vec<Record>) -> Message {
    let mut reply = Message::response(to.metadata.id, to.metadata.op_code);
    reply.metadata.recursion_desired = to.metadata.recursion_desired;
    reply.metadata.checking_disabled = to.metadata.checking_disabled;
    reply.metadata.recursion_available = true;
    reply.metadata.response_code = code;
    // A question that is wrong is not repeated: it may be long.
    reply.queries = to.queries.iter().take(1).cloned().collect();
    reply.answers = answers;
    if to.edns.is_some() {
        let mut edns = Edns::new();
        edns.set_max_payload(LARGEST_DATAGRAM).set_version(0);
        edns.set_rcode_high(code.high());
        reply.edns = Some(edns);
    }
    reply
}
