//! Each table as text.

use serde::Serialize;

use crate::api::dto::net::{Candidate, Counter, Flow, Page, Peer, Service, ServiceAddress, ServiceInstance};
use crate::cli::ask::dash;
use crate::cli::table::table;
use crate::cli::watch::Screen;

/// A newtype, so that counters are no list of anything.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub(super) struct Counters(pub(super) Vec<Counter>);

impl Screen for Page<Flow> {
    fn screen(&self, before: Option<(&Self, f64)>) -> String {
        let row = |flow: &Flow| {
            [
                match flow.client.as_str() {
                    "" => end(&flow.client_address, flow.client_port),
                    client => format!("{client}:{}", flow.client_port),
                },
                flow.protocol.clone(),
                named(&flow.service),
                dash(&flow.policy),
                end(&flow.service_address, flow.service_port),
                if flow.instance.is_empty() { "chooses anew".into() } else { flow.instance.clone() },
                dash(&flow.node),
                flow.idle_seconds.map_or_else(|| "-".into(), |idle| format!("{idle:.1}s")),
            ]
        };
        let rows: Vec<_> = self.rows.iter().map(row).collect();
        let heading = ["CLIENT", "PROTO", "SERVICE", "POLICY", "ADDRESS", "INSTANCE", "NODE", "IDLE"];
        let then = before.map(|(then, seconds)| (then.total, seconds));
        format!("{}{}", table(heading, &rows), more("flows", rows.len(), self.total, then))
    }
}

impl Screen for Page<Service> {
    fn screen(&self, before: Option<(&Self, f64)>) -> String {
        let mut rows = Vec::new();
        for service in &self.rows {
            let then = before.and_then(|(then, seconds)| {
                let then = then.rows.iter().find(|other| other.service == service.service)?;
                Some((then.flows, seconds))
            });
            let flows = format!("{}{}", service.flows, change(service.flows, then));
            let instances: Vec<String> =
                service.instances.iter().map(|instance| format!("#{}@{}", instance.number, instance.node)).collect();
            let instances = if instances.is_empty() { "none".into() } else { instances.join(" ") };
            let semantic = service.addresses.iter().map(|known| (known.policy.clone(), known.address.clone()));
            let own = service.instances.iter().flat_map(|instance| {
                instance.addresses.iter().map(|address| (format!("instance-{}", instance.number), address.clone()))
            });
            // What is said of the whole service stands in its first row.
            let mut whole = Some((service.service.clone(), flows, instances));
            for (policy, address) in semantic.chain(own) {
                let (name, flows, instances) = whole.take().unwrap_or_default();
                rows.push([name, policy, address, flows, instances]);
            }
            if let Some((name, flows, instances)) = whole {
                rows.push([name, "-".into(), "-".into(), flows, instances]);
            }
        }
        let then = before.map(|(then, seconds)| (then.total, seconds));
        let text = table(["SERVICE", "POLICY", "ADDRESS", "FLOWS", "INSTANCES"], &rows);
        format!("{text}{}", more("services", self.rows.len(), self.total, then))
    }
}

/// Services one by one, each instance in a row.
#[derive(Clone, Debug, Serialize)]
#[serde(transparent)]
pub(super) struct Details(pub(super) Page<Service>);

impl Screen for Details {
    fn screen(&self, before: Option<(&Self, f64)>) -> String {
        if self.0.rows.is_empty() {
            return "no such service is known on this node\n".into();
        }
        let mut text = String::new();
        for service in &self.0.rows {
            let gap = if text.is_empty() { "" } else { "\n" };
            let then = before.and_then(|(then, seconds)| {
                let then = then.0.rows.iter().find(|other| other.service == service.service)?;
                Some((then, seconds))
            });
            let flows = format!("{}{}", service.flows, change(service.flows, then.map(|(then, s)| (then.flows, s))));
            let address = |known: &ServiceAddress| {
                let share = |one: &Candidate| format!("#{} {:.0}%", one.number, one.share);
                let candidates: Vec<String> = known.candidates.iter().map(share).collect();
                let candidates = if candidates.is_empty() { "nobody".into() } else { candidates.join(", ") };
                [known.policy.clone(), known.address.clone(), candidates]
            };
            let addresses: Vec<_> = service.addresses.iter().map(address).collect();
            let instances: Vec<_> = service.instances.iter().map(|one| instance(one, then)).collect();
            text = format!(
                "{text}{gap}{}, {flows} flows\n{}{}",
                service.service,
                table(["POLICY", "ADDRESS", "NEW FLOWS GO TO"], &addresses),
                table(["INSTANCE", "NODE", "STATE", "WEIGHT", "RTT", "CHOSEN", "ANSWERED", "REFUSED"], &instances)
            );
        }
        text
    }
}

fn instance(one: &ServiceInstance, before: Option<(&Service, f64)>) -> [String; 8] {
    let then = before
        .and_then(|(then, seconds)| Some((then.instances.iter().find(|other| other.number == one.number)?, seconds)));
    let left = match one.seconds_left {
        Some(left) => format!(" for {left:.0} s"),
        None => String::new(),
    };
    let state = match (one.state.as_str(), one.reason.as_str(), one.seconds_left) {
        ("passed over", reason, None) => format!("{reason}, to be tried"),
        ("passed over", reason, Some(_)) => format!("{reason}, passed over{left}"),
        (state, ..) => format!("{state}{left}"),
    };
    let count = |now: Option<u64>, count: fn(&ServiceInstance) -> Option<u64>| {
        let Some(now) = now else { return "-".into() };
        let then = then.and_then(|(then, seconds)| Some((count(then)? as usize, seconds)));
        format!("{now}{}", change(now as usize, then))
    };
    [
        format!("#{}", one.number),
        one.node.clone(),
        state,
        one.weight.to_string(),
        one.rtt_ms.map_or_else(|| "-".into(), |rtt| format!("{rtt:.2} ms")),
        count(one.chosen, |one| one.chosen),
        count(one.answered, |one| one.answered),
        count(one.refused, |one| one.refused),
    ]
}

impl Screen for Vec<Peer> {
    fn screen(&self, _before: Option<(&Self, f64)>) -> String {
        let row = |peer: &Peer| {
            [
                peer.address.clone(),
                if peer.ours { "node-engine".into() } else { "reference".into() },
                peer.framing.clone(),
                peer.path_mtu.map_or_else(|| "full".into(), |mtu| mtu.to_string()),
                peer.rtt_ms.map_or_else(|| "-".into(), |rtt| format!("{rtt:.2} ms")),
                peer.slots.to_string(),
                peer.source.clone(),
            ]
        };
        let rows: Vec<_> = self.iter().map(row).collect();
        table(["NODE", "RUNS", "FRAMING", "PATH", "RTT", "SLOTS", "FROM"], &rows)
    }
}

impl Screen for Counters {
    fn screen(&self, before: Option<(&Self, f64)>) -> String {
        let rate = |counter: &Counter| {
            let (then, seconds) = before?;
            // A counter that was not there had not counted.
            let then = then.0.iter().find(|other| other.name == counter.name).map_or(0, |other| other.count);
            Some(format!("{:.0}", counter.count.saturating_sub(then) as f64 / seconds))
        };
        let mut text = String::new();
        for (kind, title) in
            [("dropped", "DROPPED"), ("refused", "REFUSED"), ("carried", "CARRIED"), ("level", "LEVEL"), ("", "OTHER")]
        {
            let known: Vec<&Counter> = self.0.iter().filter(|counter| counter.kind == kind).collect();
            let row = |counter: &&Counter| {
                let advice = match counter.advice.as_str() {
                    "" => String::new(),
                    advice => format!("; {advice}"),
                };
                [
                    counter.name.clone(),
                    counter.count.to_string(),
                    rate(counter).unwrap_or_else(|| "-".into()),
                    format!("{}{advice}", counter.meaning),
                ]
            };
            let rows: Vec<_> = known.iter().map(row).collect();
            if !rows.is_empty() {
                let gap = if text.is_empty() { "" } else { "\n" };
                text = format!("{text}{gap}{}", table([title, "COUNT", "PER SECOND", "MEANING"], &rows));
            } else if kind == "dropped" {
                text.push_str("nothing was dropped\n");
            }
        }
        text
    }
}

/// `[address]:port`, or the address alone where the protocol has no ports.
fn end(address: &str, port: u16) -> String {
    match (address.contains(':'), port) {
        (_, 0) => address.to_owned(),
        (true, _) => format!("[{address}]:{port}"),
        (false, _) => format!("{address}:{port}"),
    }
}

fn named(service: &str) -> String {
    if service.is_empty() { "unknown".into() } else { service.to_owned() }
}

/// A line below the table where it does not show everything, or while it is watched.
fn more(what: &str, shown: usize, total: usize, before: Option<(usize, f64)>) -> String {
    let hidden = if shown < total { format!(", {shown} of them shown: see --limit") } else { String::new() };
    match (before, hidden.is_empty()) {
        (None, true) => String::new(),
        _ => format!("{total} {what}{}{hidden}\n", change(total, before)),
    }
}

fn change(now: usize, before: Option<(usize, f64)>) -> String {
    before.map_or_else(String::new, |(then, seconds)| format!(" ({:+.0}/s)", (now as f64 - then as f64) / seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_have_names_and_a_bound() {
        let flow = Flow {
            client: "app.default.client.default#0".into(),
            client_port: 40_000,
            service: "app.default.web.default".into(),
            service_address: "fdff::1".into(),
            service_port: 80,
            policy: "rr".into(),
            protocol: "tcp".into(),
            instance: "app.default.web.default#1".into(),
            node: "192.0.2.2".into(),
            ..Flow::default()
        };
        let lost = Flow { client_address: "10.18.0.2".into(), protocol: "icmp".into(), ..Flow::default() };
        let page = Page { total: 9, rows: vec![flow, lost] };
        let text = page.screen(None);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[1].split_whitespace().collect::<Vec<_>>().join(" "),
            "app.default.client.default#0:40000 tcp app.default.web.default rr [fdff::1]:80 app.default.web.default#1 \
             192.0.2.2 -"
        );
        assert!(lines[2].starts_with("10.18.0.2  ") && lines[2].contains("chooses anew"), "{text}");
        assert_eq!(lines[3], "9 flows, 2 of them shown: see --limit");
        let calm = Page { total: 5, rows: Vec::new() };
        assert!(page.screen(Some((&calm, 2.0))).ends_with("9 flows (+2/s), 2 of them shown: see --limit\n"));
    }

    #[test]
    fn a_service_is_one_row_for_each_address() {
        let service = Service {
            service: "app.default.web.default".into(),
            addresses: vec![ServiceAddress {
                policy: "rr".into(),
                address: "10.30.0.0".into(),
                ..ServiceAddress::default()
            }],
            instances: vec![ServiceInstance {
                node: "here".into(),
                namespace: vec!["10.18.0.2".into()],
                addresses: vec!["10.30.0.1".into()],
                ..ServiceInstance::default()
            }],
            flows: 3,
        };
        let page = Page { total: 1, rows: vec![service] };
        assert_eq!(
            page.screen(None),
            "SERVICE                  POLICY      ADDRESS    FLOWS  INSTANCES\n\
             app.default.web.default  rr          10.30.0.0  3      #0@here\n\
             \x20                        instance-0  10.30.0.1\n"
        );
    }

    #[test]
    fn a_service_in_detail_says_who_gets_new_flows_and_why_not() {
        let instance = |number: u32, state: &str, reason: &str, seconds_left, chosen| ServiceInstance {
            number,
            state: state.into(),
            reason: reason.into(),
            seconds_left,
            weight: 1,
            rtt_ms: Some(0.5),
            chosen: Some(chosen),
            node: "192.0.2.2".into(),
            ..ServiceInstance::default()
        };
        let service = |chosen| Service {
            service: "app.default.web.default".into(),
            addresses: vec![ServiceAddress {
                policy: "rr".into(),
                address: "10.30.0.0".into(),
                candidates: vec![Candidate { number: 0, share: 100.0 }],
            }],
            instances: vec![
                instance(0, "well", "", None, chosen),
                instance(1, "passed over", "does not answer", Some(3.6), 7),
                instance(2, "passed over", "refuses connections", None, 7),
                instance(3, "draining", "", Some(9.0), 7),
            ],
            flows: 2,
        };
        let [then, now] = [10, 30].map(|chosen| Details(Page { total: 1, rows: vec![service(chosen)] }));
        let text = now.screen(Some((&then, 2.0)));
        for expected in [
            "app.default.web.default, 2 (+0/s) flows\n",
            "rr      10.30.0.0  #0 100%\n",
            "well ",
            "30 (+10/s)",
            "does not answer, passed over for 4 s",
            "refuses connections, to be tried",
            "draining for 9 s",
        ] {
            assert!(text.contains(expected), "{expected:?} in {text}");
        }
        assert!(Details(Page::default()).screen(None).contains("no such service"));
    }

    #[test]
    fn peers_are_told_apart() {
        let peer = Peer { address: "192.0.2.2:50103".into(), framing: "bare".into(), slots: 2, ..Peer::default() };
        let ours = Peer { ours: true, rtt_ms: Some(0.25), path_mtu: Some(1_350), ..peer.clone() };
        let text = vec![peer, ours].screen(None);
        assert!(
            text.contains("reference    bare     full  -        2")
                && text.contains("node-engine  bare     1350  0.25 ms  2"),
            "{text}"
        );
    }

    #[test]
    fn drops_say_what_they_mean_and_how_fast_they_grow() {
        let counter = |count| Counter {
            name: "drop_spoofed".into(),
            count,
            kind: "dropped".into(),
            meaning: "a foreign source".into(),
            advice: "look".into(),
        };
        let before = Counters(vec![counter(10)]);
        let text = Counters(vec![counter(30)]).screen(Some((&before, 2.0)));
        assert_eq!(
            text,
            "DROPPED       COUNT  PER SECOND  MEANING\n\
             drop_spoofed  30     10          a foreign source; look\n"
        );
        assert_eq!(Counters(Vec::new()).screen(None), "nothing was dropped\n");
    }
}
