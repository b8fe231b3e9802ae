//! Reports that wait for the control plane. A report that an equal one already waits for is not queued again; past the limit
//! questions go first, because whoever asks asks again.

use std::collections::VecDeque;

use crate::model::{Query, Report};

/// Reports that may wait at once.
const WAITING: usize = 8_192;

#[derive(Debug, Default)]
pub(super) struct Outbox {
    reports: VecDeque<Report>,
    /// Reports for which there was no room.
    lost: u64,
}

impl Outbox {
    pub(super) fn push(&mut self, report: Report) {
        if let Report::TableQuery(query) = &report
            && self.waits(query)
        {
            return;
        }
        if self.reports.len() >= WAITING {
            self.lost += 1;
            let question = self.reports.iter().position(|report| matches!(report, Report::TableQuery(_)));
            self.reports.remove(question.unwrap_or(0));
        }
        self.reports.push_back(report);
    }

    pub(super) fn pop(&mut self) -> Option<Report> {
        self.reports.pop_front()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.reports.is_empty()
    }

    pub(super) fn lost(&self) -> u64 {
        self.lost
    }

    /// Looks at the newest only: a repeated question follows its predecessor soon or not at all.
    fn waits(&self, query: &Query) -> bool {
        self.reports.iter().rev().take(64).any(|report| matches!(report, Report::TableQuery(other) if other == query))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(number: u32) -> Report {
        Report::TableQuery(Query::Address(std::net::Ipv4Addr::from_bits(number).into()))
    }

    #[test]
    fn questions_make_room_and_are_not_repeated() {
        let mut outbox = Outbox::default();
        outbox.push(Report::SubnetRequest);
        outbox.push(query(0));
        outbox.push(query(0));
        for number in 1..20_000 {
            outbox.push(query(number));
        }
        assert_eq!(outbox.lost(), 20_001 - WAITING as u64);
        assert!(matches!(outbox.pop(), Some(Report::SubnetRequest)), "what is said once is kept");
        let rest = std::iter::from_fn(|| outbox.pop()).count();
        assert_eq!(rest, WAITING - 1);
        assert!(outbox.is_empty());
    }
}
