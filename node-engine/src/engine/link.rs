//! How things stand with the cluster, and which changes of that are worth an event: of connections that end soon after they are made, again
//! and again, only the first are.

use std::time::Instant;

use crate::config::Generation;
use crate::control::{SHORT_LIVED, STABLE};
use crate::model::NodeId;

#[derive(Clone, Debug)]
pub(super) struct ClusterLink {
    pub(super) node: Option<NodeId>,
    pub(super) generation: Option<Generation>,
    pub(super) connected: bool,
    /// When it became so.
    pub(super) since: Instant,
    /// Why there is no connection, or was none before this one.
    pub(super) last_error: String,
    /// Connections in a row that did not last.
    short_lived: u32,
}

impl ClusterLink {
    pub(super) fn new(node: Option<NodeId>, generation: Option<Generation>) -> Self {
        let last_error = String::new();
        Self { node, generation, connected: false, since: Instant::now(), last_error, short_lived: 0 }
    }

    /// The connection stands. Is that an event?
    pub(super) fn made(&mut self, now: Instant) -> bool {
        if self.connected {
            return false;
        }
        (self.connected, self.since) = (true, now);
        self.short_lived < SHORT_LIVED
    }

    /// The connection does not stand any more. What is to be told of it, if it is an event?
    pub(super) fn lost(&mut self, reason: &str, now: Instant) -> Option<String> {
        reason.clone_into(&mut self.last_error);
        if !self.connected {
            return None;
        }
        self.short_lived = if self.is_stable(now) { 0 } else { self.short_lived.saturating_add(1) };
        (self.connected, self.since) = (false, now);
        match self.short_lived {
            0..SHORT_LIVED => Some(reason.to_owned()),
            SHORT_LIVED => Some(format!("{reason}; nothing more is told until a connection lasts")),
            _ => None,
        }
    }

    /// Lasts a connection at last, of which nothing was told when it was made?
    pub(super) fn lasts(&mut self, now: Instant) -> bool {
        let settled = self.connected && self.short_lived > 0 && self.is_stable(now);
        settled && std::mem::take(&mut self.short_lived) >= SHORT_LIVED
    }

    fn is_stable(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) >= STABLE
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn connections_that_do_not_last_are_soon_no_event() {
        let (mut link, mut now) = (ClusterLink::new(None, None), Instant::now());
        let mut events = Vec::new();
        for _ in 0..100 {
            now += Duration::from_secs(5);
            events.extend(link.made(now).then(String::new));
            now += Duration::from_secs(1);
            assert!(!link.lasts(now));
            events.extend(link.lost("closed", now));
        }
        assert_eq!(events.len(), 6, "{events:?}");
        assert!(events[5].starts_with("closed; nothing more is told"), "{}", events[5]);
        assert_eq!(link.last_error, "closed");

        assert!(!link.made(now));
        assert!(link.lasts(now + STABLE) && !link.lasts(now + STABLE), "told once");
        assert_eq!(link.lost("closed", now + STABLE), Some("closed".into()));
        assert!(link.made(now + STABLE), "as ever");
    }

    #[test]
    fn nothing_happens_twice() {
        let (mut link, now) = (ClusterLink::new(None, None), Instant::now());
        assert_eq!(link.lost("refused", now), None, "there was none");
        assert_eq!(link.last_error, "refused");
        assert!(link.made(now) && !link.made(now));
        assert!(link.lost("closed", now).is_some() && link.lost("closed", now).is_none());
    }
}
