//! What is still to be told to the cluster. Pure: reports in, reports out in order, and a bound on everything.
//!
//! Status changes and notices wait for the broker's acknowledgement and survive a lost connection; what a newer report makes
//! void is removed while it still waits. Questions are asked again by whoever asked once the connection stands, so they die
//! with it. Telemetry is only worth its newest sample.

use std::collections::{BTreeMap, VecDeque};

use crate::model::{Report, Status};

/// Reports kept for later. A status is one of at most five an instance can have waiting.
const MAX_WAITING: usize = 8192;

/// Sensors whose newest sample may wait.
const MAX_SENSORS: usize = 512;

/// Names a report between `take` and its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ticket(u64);

#[derive(Debug, Default)]
pub(super) struct Outbox {
    waiting: VecDeque<(Ticket, Report)>,
    in_flight: VecDeque<(Ticket, Report)>,
    node: Option<Report>,
    instances: Option<Report>,
    /// By the name of the device.
    sensors: BTreeMap<String, Report>,
    next: u64,
    /// Telemetry that a newer sample or a lost connection made void, and what did not fit.
    pub(super) dropped: u64,
}

impl Outbox {
    /// Takes in a report. `online` says whether it could be sent now.
    pub(super) fn push(&mut self, report: Report, online: bool) {
        match report {
            Report::Node(_) | Report::Instances(_) | Report::Sensor(_) if !online => self.dropped += 1,
            Report::Node(_) => self.dropped += u64::from(self.node.replace(report).is_some()),
            Report::Instances(_) => self.dropped += u64::from(self.instances.replace(report).is_some()),
            Report::TableQuery(_) if !online => self.dropped += 1,
            Report::Sensor(ref sample) => {
                let (name, room) = (sample.device.clone(), self.sensors.len() < MAX_SENSORS);
                if room || self.sensors.contains_key(&name) {
                    self.dropped += u64::from(self.sensors.insert(name, report).is_some());
                } else {
                    self.dropped += 1;
                }
            }
            report => self.enqueue(report),
        }
    }

    fn enqueue(&mut self, report: Report) {
        self.waiting.retain(|(_, older)| !makes_void(&report, older));
        if self.waiting.len() >= MAX_WAITING {
            self.waiting.pop_front();
            self.dropped += 1;
        }
        let ticket = self.ticket();
        self.waiting.push_back((ticket, report));
    }

    fn ticket(&mut self) -> Ticket {
        self.next += 1;
        Ticket(self.next)
    }

    /// The next report to send, in order; telemetry after everything else. Without `questions`, those about the service table
    /// stay.
    pub(super) fn take(&mut self, questions: bool) -> Option<(Ticket, Report)> {
        let place = self.waiting.iter().position(|(_, report)| questions || !matches!(report, Report::TableQuery(_)));
        let taken = match place.and_then(|place| self.waiting.remove(place)) {
            Some(taken) => taken,
            None => {
                let sensor = |outbox: &mut Self| outbox.sensors.pop_first().map(|(_, report)| report);
                let report = self.node.take().or_else(|| self.instances.take()).or_else(|| sensor(self))?;
                (self.ticket(), report)
            }
        };
        self.in_flight.push_back(taken.clone());
        Some(taken)
    }

    /// The broker has it.
    pub(super) fn delivered(&mut self, ticket: Ticket) {
        self.in_flight.retain(|(other, _)| *other != ticket);
    }

    /// The connection is lost: what was not acknowledged waits again, before everything younger.
    pub(super) fn lost(&mut self) {
        while let Some((ticket, report)) = self.in_flight.pop_back() {
            if !outlives_connection(&report) {
                self.dropped += 1;
            } else if !self.waiting.iter().any(|(_, younger)| makes_void(younger, &report)) {
                self.waiting.push_front((ticket, report));
            }
        }
        let before = self.waiting.len();
        self.waiting.retain(|(_, report)| outlives_connection(report));
        self.dropped += (before - self.waiting.len()) as u64;
        self.dropped += u64::from(self.node.take().is_some()) + u64::from(self.instances.take().is_some());
        self.dropped += std::mem::take(&mut self.sensors).len() as u64;
    }

    /// Nothing waits and nothing is on its way.
    pub(super) fn is_empty(&self) -> bool {
        let telemetry = self.node.is_some() || self.instances.is_some() || !self.sensors.is_empty();
        self.waiting.is_empty() && self.in_flight.is_empty() && !telemetry
    }
}

fn outlives_connection(report: &Report) -> bool {
    match report {
        Report::Status { .. } | Report::Deployed { .. } | Report::SubnetRequest | Report::InterestRemove(_) => true,
        Report::Address(_)
        | Report::TableQuery(_)
        | Report::InterestAdd(_)
        | Report::Node(_)
        | Report::Instances(_)
        | Report::Sensor(_) => false,
    }
}

/// Does `younger` say everything that `older` would have said? An end of an instance is never skipped over by another state:
/// what ended and began again is told as both.
fn makes_void(younger: &Report, older: &Report) -> bool {
    match (younger, older) {
        (
            Report::Status { instance, status, .. },
            Report::Status { instance: older_instance, status: older_status, .. },
        ) => instance == older_instance && (is_passing(*older_status) || status == older_status),
        (Report::Deployed { instance, .. }, Report::Deployed { instance: older, .. }) => instance == older,
        // A notice of what is gone would bring it back into the table.
        (Report::Status { instance, status, .. }, Report::Deployed { instance: older, .. }) => {
            instance == older && !is_passing(*status)
        }
        (Report::SubnetRequest, Report::SubnetRequest) => true,
        (Report::TableQuery(query), Report::TableQuery(older)) => query == older,
        (Report::InterestAdd(service) | Report::InterestRemove(service), Report::InterestRemove(older)) => {
            service == older
        }
        _ => false,
    }
}

fn is_passing(status: Status) -> bool {
    match status {
        Status::Creating | Status::Created | Status::Running => true,
        Status::Failed | Status::Dead | Status::Completed | Status::Undeployed => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Addresses, NodeUsage, Query};

    fn status(name: &str, status: Status) -> Report {
        let instance = format!("app.default.{name}.test.instance.0").parse().unwrap();
        Report::Status { instance, status, detail: String::new() }
    }

    fn deployed(name: &str) -> Report {
        let instance = format!("app.default.{name}.test.instance.0").parse().unwrap();
        let addresses = Addresses { v4: "10.18.0.2".parse().unwrap(), v6: "fc00::2".parse().unwrap() };
        Report::Deployed { instance, addresses }
    }

    fn node() -> Report {
        Report::Node(Box::<NodeUsage>::default())
    }

    fn sensor(device: &str) -> Report {
        let time = std::time::UNIX_EPOCH;
        let kind = crate::model::DeviceKind::Iio;
        Report::Sensor(Box::new(crate::model::Sample { device: device.into(), kind, time, readings: Vec::new() }))
    }

    fn query(name: &str) -> Report {
        Report::TableQuery(Query::Name(format!("app.default.{name}.test").parse().unwrap()))
    }

    fn say(report: &Report) -> String {
        match report {
            Report::Status { instance, status, .. } => format!("{}:{status}", instance.service.short()),
            Report::Deployed { instance, .. } => format!("{}:net", instance.service.short()),
            Report::TableQuery(_) => "query".into(),
            Report::InterestRemove(_) => "remove".into(),
            Report::InterestAdd(_) => "add".into(),
            Report::SubnetRequest => "subnet".into(),
            Report::Address(_) => "address".into(),
            Report::Node(_) => "node".into(),
            Report::Instances(_) => "instances".into(),
            Report::Sensor(sample) => format!("sensor {}", sample.device),
        }
    }

    fn taken(outbox: &mut Outbox) -> Vec<(Ticket, String)> {
        std::iter::from_fn(|| outbox.take(true)).map(|(ticket, report)| (ticket, say(&report))).collect()
    }

    fn check(reports: Vec<Report>, online: bool, expected: &[&str]) {
        let mut outbox = Outbox::default();
        for report in reports {
            outbox.push(report, online);
        }
        let said: Vec<String> = taken(&mut outbox).into_iter().map(|(_, text)| text).collect();
        assert_eq!(said, expected);
    }

    #[test]
    fn only_what_is_void_is_left_out() {
        use Status::{Created, Creating, Dead, Failed, Undeployed};
        check(vec![status("a", Creating), status("a", Creating), status("a", Created)], false, &["a:CREATED"]);
        check(vec![status("a", Creating), status("b", Creating)], false, &["a:CREATING", "b:CREATING"]);
        check(
            vec![status("a", Undeployed), status("a", Creating), status("a", Created)],
            false,
            &["a:UNDEPLOYED", "a:CREATED"],
        );
        check(vec![status("a", Failed), status("a", Dead), status("a", Failed)], false, &["a:DEAD", "a:FAILED"]);
        check(vec![status("a", Creating), deployed("a"), status("a", Created)], false, &["a:net", "a:CREATED"]);
        check(vec![deployed("a"), deployed("b"), status("a", Failed)], false, &["b:net", "a:FAILED"]);
        check(vec![Report::SubnetRequest, Report::SubnetRequest], false, &["subnet"]);
        check(vec![query("a"), query("a"), query("b")], true, &["query", "query"]);
        let service: crate::model::ServiceName = "a.b.c.d".parse().unwrap();
        check(vec![Report::InterestRemove(service.clone()), Report::InterestAdd(service)], false, &["add"]);
    }

    #[test]
    fn telemetry_is_newest_only_and_comes_last() {
        check(
            vec![node(), Report::Instances(vec![]), status("a", Status::Dead), node()],
            true,
            &["a:DEAD", "node", "instances"],
        );
        check(
            vec![sensor("b"), sensor("a"), sensor("b"), node(), status("a", Status::Dead)],
            true,
            &["a:DEAD", "node", "sensor a", "sensor b"],
        );
        check(vec![sensor("a")], false, &[]);
        let mut outbox = Outbox::default();
        outbox.push(node(), false);
        outbox.push(query("a"), false);
        assert!(outbox.is_empty());
        assert_eq!(outbox.dropped, 2);
    }

    #[test]
    fn questions_can_be_held_back() {
        let mut outbox = Outbox::default();
        for report in [query("a"), status("b", Status::Dead)] {
            outbox.push(report, true);
        }
        assert_eq!(outbox.take(false).map(|(_, report)| say(&report)), Some("b:DEAD".into()));
        assert_eq!(outbox.take(false).map(|(_, report)| say(&report)), None);
        assert_eq!(outbox.take(true).map(|(_, report)| say(&report)), Some("query".into()));
    }

    #[test]
    fn what_was_not_acknowledged_is_sent_again_in_order() {
        let mut outbox = Outbox::default();
        for report in [status("a", Status::Dead), status("b", Status::Dead), query("a"), deployed("c"), node()] {
            outbox.push(report, true);
        }
        let first = taken(&mut outbox);
        assert_eq!(first.len(), 5);
        outbox.delivered(first[0].0);
        outbox.push(status("d", Status::Dead), true);
        outbox.lost();
        let again: Vec<String> = taken(&mut outbox).into_iter().map(|(_, text)| text).collect();
        assert_eq!(again, ["b:DEAD", "c:net", "d:DEAD"]);
        assert_eq!(outbox.dropped, 2);
        assert!(!outbox.is_empty());
    }

    #[test]
    fn what_became_void_on_its_way_is_not_sent_again() {
        let mut outbox = Outbox::default();
        outbox.push(status("a", Status::Creating), true);
        taken(&mut outbox);
        outbox.push(status("a", Status::Created), true);
        outbox.lost();
        let again: Vec<String> = taken(&mut outbox).into_iter().map(|(_, text)| text).collect();
        assert_eq!(again, ["a:CREATED"]);
    }

    #[test]
    fn the_outbox_is_bounded() {
        let mut outbox = Outbox::default();
        for number in 0..MAX_WAITING + 10 {
            outbox.push(status(&format!("s{number}"), Status::Failed), false);
        }
        assert_eq!((outbox.waiting.len(), outbox.dropped), (MAX_WAITING, 10));
        assert_eq!(taken(&mut outbox)[0].1, "s10:FAILED");
    }
}
