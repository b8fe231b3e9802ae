//! Reports that wait for the control plane. A newer status of an instance takes the place of an older one that still waits, and so
//! does a newer list of usages: the queue is bounded by the number of instances, and the cluster hears the latest in any case.

use std::collections::VecDeque;

use crate::model::Report;

/// Instances whose status may wait at once.
const WAITING: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct Outbox {
    reports: VecDeque<Report>,
}

impl Outbox {
    pub(super) fn push(&mut self, report: Report) {
        self.reports.retain(|waiting| !replaces(&report, waiting));
        if self.reports.len() == WAITING {
            let lost = self.reports.pop_front();
            tracing::warn!(?lost, "too many reports wait for the control plane, the oldest is dropped");
        }
        self.reports.push_back(report);
    }

    pub(super) fn pop(&mut self) -> Option<Report> {
        self.reports.pop_front()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.reports.is_empty()
    }
}

fn replaces(newer: &Report, older: &Report) -> bool {
    match (newer, older) {
        (Report::Status { instance, .. }, Report::Status { instance: waiting, .. }) => instance == waiting,
        (Report::Instances(_), Report::Instances(_)) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Status;

    fn status(number: u32, status: Status) -> Report {
        let service = "app.default.web.test".parse().expect("a good name");
        let instance = crate::model::InstanceId { service, number };
        Report::Status { instance, status, detail: String::new() }
    }

    #[test]
    fn the_latest_status_of_each_instance_waits_in_order() {
        let mut outbox = Outbox::default();
        for report in [
            status(0, Status::Creating),
            status(1, Status::Creating),
            Report::Instances(Vec::new()),
            status(0, Status::Created),
            Report::Instances(Vec::new()),
        ] {
            outbox.push(report);
        }
        let waiting: Vec<_> = std::iter::from_fn(|| outbox.pop()).map(|report| format!("{report:?}")).collect();
        let expected = [status(1, Status::Creating), status(0, Status::Created), Report::Instances(Vec::new())];
        assert_eq!(waiting, expected.map(|report| format!("{report:?}")));
        assert!(outbox.is_empty());
    }

    #[test]
    fn the_queue_is_bounded() {
        let mut outbox = Outbox::default();
        for number in 0..WAITING as u32 + 10 {
            outbox.push(status(number, Status::Creating));
        }
        assert_eq!(outbox.reports.len(), WAITING);
    }
}
