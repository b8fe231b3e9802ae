//! The overlay's tables in the words of the local API.

use std::net::IpAddr;

use crate::api::dto::net;
use crate::api::{NetChoice, NodeApiError};
use crate::config::DatapathChoice;
use crate::model::InstanceId;
use crate::netmanager::datapath::Kind;
use crate::netmanager::view::{AddressView, Choice, CounterView, FlowView, Page, PeerView, ServiceView, State};
use crate::netmanager::{NetError, NetManager};

pub(super) async fn flows(of: &NetManager, choice: NetChoice) -> Result<net::Page<net::Flow>, NodeApiError> {
    of.flows(wanted(choice)).await.map(|rows| page(rows, flow)).map_err(|error| unavailable("flows", &error))
}

pub(super) async fn services(of: &NetManager, choice: NetChoice) -> Result<net::Page<net::Service>, NodeApiError> {
    of.services(wanted(choice)).await.map(|rows| page(rows, service)).map_err(|error| unavailable("services", &error))
}

pub(super) async fn peers(of: &NetManager) -> Result<Vec<net::Peer>, NodeApiError> {
    let peers = of.peers().await.map_err(|error| unavailable("peers", &error))?;
    Ok(peers.into_iter().map(peer).collect())
}

pub(super) async fn switch(of: &NetManager, choice: DatapathChoice) -> Result<net::Datapath, NodeApiError> {
    of.switch(choice).await.map_err(|error| unavailable("datapath", &error))?;
    let status = of.status().await.map_err(|error| unavailable("datapath", &error))?;
    Ok(net::Datapath { datapath: status.datapath, reason: status.reason })
}

pub(super) async fn counters(of: &NetManager) -> Result<Vec<net::Counter>, NodeApiError> {
    let counters = of.counters().await.map_err(|error| unavailable("counters", &error))?;
    Ok(counters.into_iter().map(counter).collect())
}

fn wanted(choice: NetChoice) -> Choice {
    Choice { service: choice.service, instance: choice.instance, limit: choice.limit }
}

fn page<A, B>(page: Page<A>, row: impl Fn(A) -> B) -> net::Page<B> {
    net::Page { total: page.total, rows: page.rows.into_iter().map(row).collect() }
}

fn flow(flow: FlowView) -> net::Flow {
    let place = if flow.chosen.is_some() { place(flow.node) } else { String::new() };
    net::Flow {
        client: flow.client.as_ref().map(short).unwrap_or_default(),
        client_address: IpAddr::from(flow.row.source).to_string(),
        client_port: flow.row.source_port,
        service: flow.service.map(|service| service.to_string()).unwrap_or_default(),
        service_address: IpAddr::from(flow.row.service).to_string(),
        service_port: flow.row.service_port,
        policy: flow.policy.into(),
        protocol: protocol(flow.row.protocol),
        instance: flow.chosen.as_ref().map(short).unwrap_or_default(),
        node: place,
        idle_seconds: flow.row.idle.map(|idle| idle.as_secs_f64()),
    }
}

fn service(service: ServiceView) -> net::Service {
    let candidate = |(number, share)| net::Candidate { number, share };
    let address = |address: AddressView| net::ServiceAddress {
        policy: address.policy.into(),
        address: text(address.address),
        candidates: address.candidates.into_iter().map(candidate).collect(),
    };
    let instances = service.instances.into_iter().map(|instance| net::ServiceInstance {
        number: instance.number,
        state: state(instance.state).into(),
        reason: if let State::PassedOver(reason, _) = instance.state { reason.into() } else { String::new() },
        seconds_left: match instance.state {
            State::Well => None,
            State::PassedOver(_, left) | State::Draining(left) => left.map(|left| left.as_secs_f64()),
        },
        weight: instance.weight,
        rtt_ms: instance.rtt.map(|rtt| rtt.as_secs_f64() * 1_000.0),
        chosen: instance.picks.map(|picks| picks.chosen),
        answered: instance.picks.map(|picks| picks.answered),
        refused: instance.picks.map(|picks| picks.refused),
        node: place(instance.node),
        namespace: instance.namespace.into_iter().map(text).collect(),
        addresses: instance.own.into_iter().map(text).collect(),
    });
    net::Service {
        service: service.service.to_string(),
        addresses: service.addresses.into_iter().map(address).collect(),
        instances: instances.collect(),
        flows: service.flows,
    }
}

const fn state(state: State) -> &'static str {
    match state {
        State::Well => "well",
        State::PassedOver(..) => "passed over",
        State::Draining(_) => "draining",
    }
}

fn peer(peer: PeerView) -> net::Peer {
    net::Peer {
        address: peer.address.to_string(),
        source: peer.source.to_string(),
        ours: peer.ours,
        framing: peer.framing.into(),
        path_mtu: peer.mtu,
        rtt_ms: peer.rtt.map(|rtt| rtt.as_secs_f64() * 1_000.0),
        slots: peer.slots,
    }
}

fn counter(counter: CounterView) -> net::Counter {
    let kind = counter.words.map_or("", |words| match words.kind {
        Kind::Carried => "carried",
        Kind::Dropped => "dropped",
        Kind::Refused => "refused",
        Kind::Level => "level",
    });
    net::Counter {
        name: counter.name,
        count: counter.value,
        kind: kind.into(),
        meaning: counter.words.map(|words| words.meaning.to_owned()).unwrap_or_default(),
        advice: counter.words.map(|words| words.advice.to_owned()).unwrap_or_default(),
    }
}

fn text(address: IpAddr) -> String {
    address.to_string()
}

/// As a person types it.
fn short(instance: &InstanceId) -> String {
    format!("{}#{}", instance.service, instance.number)
}

fn place(node: Option<IpAddr>) -> String {
    node.map_or_else(|| "here".into(), |node| node.to_string())
}

fn protocol(number: u8) -> String {
    match number {
        1 => "icmp".into(),
        6 => "tcp".into(),
        17 => "udp".into(),
        58 => "icmp6".into(),
        other => other.to_string(),
    }
}

fn unavailable(what: &'static str, error: &NetError) -> NodeApiError {
    NodeApiError::Unavailable { what, reason: error.to_string() }
}
