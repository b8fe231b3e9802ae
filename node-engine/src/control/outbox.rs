//! What is still to be told to the cluster. Pure: reports in, reports out in order, and a bound on everything.
//!
//! Status changes and notices wait for the broker's acknowledgement and survive a lost connection; what a newer report makes
//! void is removed while it still waits. Questions are asked again by whoever asked once the connection stands, so they die
//! with it. So does the end of an interest: who is there after it may know of no such interest, and dies of its end. Telemetry is only
//! worth its newest sample.
//!
//! The bound is in bytes. Beyond it whatever is no status goes first, then a status that a later one of the same instance follows, then
//! the answer to a delete, which the cluster does not wait for. The last status of an instance goes only where nothing else is left.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

use crate::model::{InstanceId, Report, Status};

/// Reports kept for later, in bytes of memory.
const MAX_BYTES: usize = 4 << 20;
/// What a report takes besides its texts: names are shared.
const BASE: usize = 512;
/// The wire tells no more of a reason.
const MAX_DETAIL: usize = 1024;

/// More than a node has instances.
const MAX_GIVEN_UP: usize = 4096;

/// Sensors whose newest sample may wait.
const MAX_SENSORS: usize = 512;

/// Names a report between `take` and its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Ticket(u64);

/// Which reports are given up together.
type Rank<'a> = &'a dyn Fn(Ticket, &Report) -> bool;

#[derive(Debug, Default)]
pub(super) struct Outbox {
    waiting: VecDeque<(Ticket, Report)>,
    bytes: usize,
    /// How many of the waiting are about each instance.
    instances_waiting: HashMap<InstanceId, usize>,
    in_flight: VecDeque<(Ticket, Report)>,
    node: Option<Report>,
    instances: Option<Report>,
    /// By the name of the device.
    sensors: BTreeMap<String, Report>,
    /// Instances that the cluster has given up, and that have not ended yet.
    given_up: BTreeSet<InstanceId>,
    next: u64,
    /// Telemetry that a newer sample or a lost connection made void, questions without a connection, and what did not fit.
    pub(super) dropped: u64,
}

impl Outbox {
    /// Takes in a report. `online` says whether it could be sent now.
    pub(super) fn push(&mut self, report: Report, online: bool) {
        match report {
            Report::Node(_) | Report::Instances(_) | Report::Sensor(_) if !online => self.dropped += 1,
            Report::Node(_) => self.dropped += u64::from(self.node.replace(report).is_some()),
            Report::Instances(_) => self.dropped += u64::from(self.instances.replace(report).is_some()),
            Report::TableQuery(_) | Report::SubnetRequest | Report::InterestRemove(_) if !online => self.dropped += 1,
            Report::Sensor(ref sample) => {
                let (name, room) = (sample.device.clone(), self.sensors.len() < MAX_SENSORS);
                if room || self.sensors.contains_key(&name) {
                    self.dropped += u64::from(self.sensors.insert(name, report).is_some());
                } else {
                    self.dropped += 1;
                }
            }
            Report::Status { ref instance, status: Status::Failed | Status::Dead, .. }
                if self.given_up.contains(instance) => {}
            report => self.enqueue(report),
        }
    }

    fn enqueue(&mut self, mut report: Report) {
        if let Report::Status { instance, status: Status::Undeployed, .. } = &report {
            self.given_up.remove(instance);
        }
        if let Report::Status { detail, .. } = &mut report {
            detail.truncate(detail.floor_char_boundary(MAX_DETAIL));
        }
        // A list from before its end, sent after it, would make the cluster think that it runs again.
        if let (Report::Status { instance, status, .. }, Some(Report::Instances(usages))) =
            (&report, &mut self.instances)
            && !is_passing(*status)
        {
            usages.retain(|usage| usage.instance != *instance);
        }
        // Most reports are the only one of their instance: then nothing has to be looked through.
        if about(&report).is_none_or(|instance| self.instances_waiting.contains_key(instance)) {
            self.keep_those(|_, older| !makes_void(&report, older));
        }
        let ticket = self.ticket();
        self.note(&report);
        self.waiting.push_back((ticket, report));
        if self.bytes > MAX_BYTES {
            self.shed();
        }
    }

    /// Gives up what is missed least, an eighth of all at once.
    fn shed(&mut self) {
        let last: HashMap<InstanceId, Ticket> = self
            .waiting
            .iter()
            .filter(|(_, report)| matches!(report, Report::Status { .. }))
            .filter_map(|(ticket, report)| Some((about(report)?.clone(), *ticket)))
            .collect();
        let is_status = |report: &Report| matches!(report, Report::Status { .. });
        let followed = |ticket: Ticket, report: &Report| about(report).is_some_and(|id| last.get(id) != Some(&ticket));
        let answered = |report: &Report| matches!(report, Report::Status { status: Status::Undeployed, .. });
        let ranks: [Rank<'_>; 4] = [
            &|_, report| !is_status(report),
            &|ticket, report| followed(ticket, report),
            &|_, report| answered(report),
            &|_, _| true,
        ];
        let mut excess = self.bytes.saturating_sub(MAX_BYTES / 8 * 7);
        let before = self.waiting.len();
        for goes in ranks {
            self.keep_those(|ticket, report| {
                let gone = excess > 0 && goes(ticket, report);
                if gone {
                    excess = excess.saturating_sub(weight(report));
                }
                !gone
            });
        }
        let gone = before - self.waiting.len();
        self.dropped += gone as u64;
        tracing::warn!(gone, "too much waits for the broker: the least of it is given up");
    }

    fn keep_those(&mut self, mut keep: impl FnMut(Ticket, &Report) -> bool) {
        let (bytes, instances) = (&mut self.bytes, &mut self.instances_waiting);
        self.waiting.retain(|(ticket, report)| {
            let kept = keep(*ticket, report);
            if !kept {
                forget(bytes, instances, report);
            }
            kept
        });
    }

    fn note(&mut self, report: &Report) {
        self.bytes += weight(report);
        if let Some(instance) = about(report) {
            *self.instances_waiting.entry(instance.clone()).or_default() += 1;
        }
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
            Some(taken) => {
                forget(&mut self.bytes, &mut self.instances_waiting, &taken.1);
                taken
            }
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

    /// Those that the broker has not acknowledged.
    pub(super) fn in_flight(&self) -> impl Iterator<Item = &Report> {
        self.in_flight.iter().map(|(_, report)| report)
    }

    /// The connection is lost: what was not acknowledged waits again, before everything younger.
    pub(super) fn lost(&mut self) {
        while let Some((ticket, report)) = self.in_flight.pop_back() {
            if !outlives_connection(&report) {
                self.dropped += 1;
            } else if !self.waiting.iter().any(|(_, younger)| makes_void(younger, &report)) {
                self.note(&report);
                self.waiting.push_front((ticket, report));
            }
        }
        let before = self.waiting.len();
        self.keep_those(|_, report| outlives_connection(report));
        self.dropped += (before - self.waiting.len()) as u64;
        self.dropped += u64::from(self.node.take().is_some()) + u64::from(self.instances.take().is_some());
        self.dropped += std::mem::take(&mut self.sensors).len() as u64;
    }

    /// The cluster wants this instance, anew perhaps: what becomes of it from here on is told.
    pub(super) fn deploying(&mut self, instance: &InstanceId) {
        self.given_up.remove(instance);
    }

    /// The cluster has given up this instance. That it has failed would be taken for a word about the next of its name, which may be on
    /// another node by now.
    pub(super) fn deleting(&mut self, instance: &InstanceId) {
        let failed = |report: &Report| {
            let status = matches!(report, Report::Status { status: Status::Failed | Status::Dead, .. });
            status && about(report) == Some(instance)
        };
        self.keep_those(|_, report| !failed(report));
        self.in_flight.retain(|(_, report)| !failed(report));
        if self.given_up.len() < MAX_GIVEN_UP {
            self.given_up.insert(instance.clone());
        }
    }

    /// Nothing waits and nothing is on its way.
    pub(super) fn is_empty(&self) -> bool {
        let telemetry = self.node.is_some() || self.instances.is_some() || !self.sensors.is_empty();
        self.waiting.is_empty() && self.in_flight.is_empty() && !telemetry
    }
}

fn about(report: &Report) -> Option<&InstanceId> {
    match report {
        Report::Status { instance, .. } | Report::Deployed { instance, .. } => Some(instance),
        _ => None,
    }
}

fn forget(bytes: &mut usize, instances: &mut HashMap<InstanceId, usize>, report: &Report) {
    *bytes = bytes.saturating_sub(weight(report));
    let Some(instance) = about(report) else { return };
    if let Some(count) = instances.get_mut(instance) {
        *count -= 1;
        if *count == 0 {
            instances.remove(instance);
        }
    }
}

fn weight(report: &Report) -> usize {
    match report {
        Report::Status { detail, .. } => BASE + detail.len(),
        _ => BASE,
    }
}

fn outlives_connection(report: &Report) -> bool {
    match report {
        Report::Status { .. } | Report::Deployed { .. } => true,
        Report::Stored(_)
        | Report::Address(_)
        | Report::SubnetRequest
        | Report::TableQuery(_)
        | Report::InterestAdd(_)
        | Report::InterestRemove(_)
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
    use crate::model::{Addresses, InstanceCounters, InstanceUsage, NodeUsage, Query, Technology};

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
            Report::Stored(_) => "stored".into(),
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
        check(vec![Report::SubnetRequest, Report::SubnetRequest], true, &["subnet"]);
        check(vec![query("a"), query("a"), query("b")], true, &["query", "query"]);
        let service: crate::model::ServiceName = "a.b.c.d".parse().unwrap();
        check(vec![Report::InterestRemove(service.clone()), Report::InterestAdd(service)], true, &["add"]);
    }

    #[test]
    fn questions_and_ends_of_interests_do_not_outlive_their_connection() {
        let reports = || [query("a"), Report::SubnetRequest, Report::InterestRemove("a.b.c.d".parse().unwrap())];
        check(reports().into(), false, &[]);
        let mut outbox = Outbox::default();
        let push = |outbox: &mut Outbox| reports().into_iter().for_each(|report| outbox.push(report, true));
        push(&mut outbox);
        assert_eq!(taken(&mut outbox).len(), 3);
        push(&mut outbox);
        // Neither what was not acknowledged nor what was not sent.
        outbox.lost();
        assert!(outbox.is_empty());
        assert_eq!(outbox.dropped, 6);
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
    fn what_has_ended_is_in_no_list_that_is_told_later() {
        let usage = |name: &str| InstanceUsage {
            instance: format!("app.default.{name}.test.instance.0").parse().unwrap(),
            technology: Technology::Container,
            cpu_percent: 0.0,
            memory_bytes: 0,
            memory_percent: 0.0,
            disk_bytes: 0,
            log_tail: String::new(),
            counters: InstanceCounters::default(),
        };
        let mut outbox = Outbox::default();
        outbox.push(Report::Instances(vec![usage("a"), usage("b"), usage("c")]), true);
        outbox.push(status("a", Status::Completed), true);
        outbox.push(status("b", Status::Created), true);
        let told: Vec<Report> = std::iter::from_fn(|| outbox.take(true)).map(|(_, report)| report).collect();
        let Some(Report::Instances(left)) = told.last() else { panic!("{told:?}") };
        assert_eq!(left.iter().map(|usage| usage.instance.service.short()).collect::<Vec<_>>(), ["b", "c"]);
    }

    #[test]
    fn after_a_delete_nothing_is_said_of_a_failure_before_it() {
        let mut outbox = Outbox::default();
        for report in [status("a", Status::Failed), status("b", Status::Failed), status("a", Status::Completed)] {
            outbox.push(report, true);
        }
        outbox.take(true);
        let a = "app.default.a.test.instance.0".parse().unwrap();
        outbox.push(status("a", Status::Dead), true);
        outbox.deleting(&a);
        outbox.lost();
        // On its way here when the delete came.
        outbox.push(status("a", Status::Dead), false);
        outbox.push(status("a", Status::Undeployed), false);
        outbox.push(status("a", Status::Failed), false);
        let said: Vec<String> = taken(&mut outbox).into_iter().map(|(_, text)| text).collect();
        assert_eq!(said, ["b:FAILED", "a:COMPLETED", "a:UNDEPLOYED", "a:FAILED"], "the last is about the next one");

        outbox.deleting(&a);
        outbox.deploying(&a);
        outbox.push(status("a", Status::Failed), false);
        assert_eq!(outbox.take(true).map(|(_, report)| say(&report)), Some("a:FAILED".into()), "so is this");
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
    fn the_outbox_is_bounded_and_the_last_word_of_an_instance_goes_last() {
        use Status::{Dead, Failed, Undeployed};
        let mut outbox = Outbox::default();
        let most = MAX_BYTES / BASE;
        for number in 0..most / 10 {
            outbox.push(status(&format!("s{number}"), Failed), false);
            outbox.push(status(&format!("s{number}"), Dead), false);
            outbox.push(status(&format!("u{number}"), Undeployed), false);
            outbox.push(deployed(&format!("n{number}")), false);
        }
        let count = |outbox: &Outbox, word: &str| {
            outbox.waiting.iter().filter(|(_, report)| say(report).ends_with(word)).count()
        };
        let mut number = 0;
        let mut fill = |outbox: &mut Outbox| {
            let before = outbox.dropped;
            while outbox.dropped == before {
                number += 1;
                outbox.push(status(&format!("x{number}"), Failed), false);
                assert!(outbox.bytes <= MAX_BYTES, "{} bytes", outbox.bytes);
            }
        };
        let tenth = most / 10;
        let followed = |outbox: &Outbox| {
            let is = |text: &str| text.starts_with('s') && text.ends_with(":FAILED");
            outbox.waiting.iter().filter(|(_, report)| is(&say(report))).count()
        };
        let left = |outbox: &Outbox| [":net", ":UNDEPLOYED", ":DEAD"].map(|word| count(outbox, word));
        fill(&mut outbox);
        assert_eq!(left(&outbox), [0, tenth, tenth], "what is no status goes first");
        assert!(followed(&outbox) < tenth, "then what another status follows");
        fill(&mut outbox);
        assert_eq!((followed(&outbox), count(&outbox, ":DEAD")), (0, tenth));
        assert!(count(&outbox, ":UNDEPLOYED") < tenth, "then the answers to deletes");
        fill(&mut outbox);
        assert_eq!(count(&outbox, ":UNDEPLOYED"), 0);
        assert!(count(&outbox, ":DEAD") < tenth, "and the last word of an instance only where nothing else is left");
        let weighed: usize = outbox.waiting.iter().map(|(_, report)| weight(report)).sum();
        assert_eq!((outbox.bytes, outbox.instances_waiting.values().sum::<usize>()), (weighed, outbox.waiting.len()));
    }
}
