//! What happened on this node: the last of it is kept, and whoever watches is told as it happens. Nobody decides by it, and nobody who
//! says something ever waits: a watcher that does not keep up is let go, which ends its stream.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use tokio::sync::mpsc;

use crate::model::{Event, EventKind, InstanceId};

/// Events that are kept.
const KEPT: usize = 512;
/// Events that may wait for a watcher.
const WAITING: usize = 1024;
const WATCHERS: usize = 64;

/// Handle to what happened. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Events(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    past: VecDeque<Event>,
    /// How often each kind has happened since the daemon began.
    counts: HashMap<EventKind, u64>,
    watchers: Vec<mpsc::Sender<Event>>,
}

/// There are as many watchers as there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{WATCHERS} watchers follow the events already")]
pub struct Crowded;

impl Events {
    pub fn say(&self, kind: EventKind, subject: impl Into<String>, detail: impl Into<String>) {
        let event = Event { time: SystemTime::now(), kind, subject: subject.into(), detail: detail.into() };
        let mut state = self.state();
        *state.counts.entry(kind).or_default() += 1;
        if state.past.len() == KEPT {
            state.past.pop_front();
        }
        state.past.push_back(event.clone());
        state.watchers.retain(|watcher| watcher.try_send(event.clone()).is_ok());
    }

    pub fn say_of(&self, instance: &InstanceId, kind: EventKind, detail: impl Into<String>) {
        self.say(kind, format!("{}#{}", instance.service, instance.number), detail);
    }

    /// How often each kind has happened since the daemon began; of all kinds, so that a first time is seen as one more.
    pub fn counts(&self) -> Vec<(EventKind, u64)> {
        let state = self.state();
        EventKind::ALL.map(|kind| (kind, state.counts.get(&kind).copied().unwrap_or(0))).into()
    }

    /// The last `past` events, oldest first, and those to come.
    pub fn watch(&self, past: usize) -> Result<mpsc::Receiver<Event>, Crowded> {
        let (watcher, events) = mpsc::channel(WAITING);
        let mut state = self.state();
        state.watchers.retain(|watcher| !watcher.is_closed());
        if state.watchers.len() >= WATCHERS {
            return Err(Crowded);
        }
        let skip = state.past.len().saturating_sub(past);
        for event in state.past.iter().skip(skip) {
            // There is room for more than is ever kept.
            let _ = watcher.try_send(event.clone());
        }
        state.watchers.push(watcher);
        Ok(events)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while the lock is held.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subjects(events: &mut mpsc::Receiver<Event>) -> Vec<String> {
        std::iter::from_fn(|| events.try_recv().ok()).map(|event| event.subject).collect()
    }

    #[test]
    fn a_watcher_hears_the_past_it_asked_for_and_all_that_follows() {
        let events = Events::default();
        for number in 0..KEPT + 2 {
            events.say(EventKind::DeviceAdded, number.to_string(), "");
        }
        let (mut two, mut all) = (events.watch(2).unwrap(), events.watch(usize::MAX).unwrap());
        events.say(EventKind::DeviceRemoved, "new", "");
        assert_eq!(subjects(&mut two), ["512", "513", "new"]);
        let all = subjects(&mut all);
        assert_eq!((all.len(), all[0].as_str()), (KEPT + 1, "2"));
    }

    #[test]
    fn kinds_are_counted_also_what_is_kept_no_more() {
        let events = Events::default();
        for _ in 0..KEPT + 2 {
            events.say(EventKind::OutOfMemory, "web#0", "");
        }
        let counts = events.counts();
        assert_eq!(counts.iter().map(|(_, count)| count).sum::<u64>(), KEPT as u64 + 2);
        assert!(counts.contains(&(EventKind::OutOfMemory, KEPT as u64 + 2)));
        let words: std::collections::HashSet<_> = counts.iter().map(|(kind, _)| kind.word()).collect();
        assert_eq!(words.len(), EventKind::ALL.len());
    }

    #[test]
    fn one_who_does_not_keep_up_is_let_go_and_holds_up_nobody() {
        let events = Events::default();
        let mut slow = events.watch(0).unwrap();
        for number in 0..WAITING + 5 {
            events.say(EventKind::DeviceAdded, number.to_string(), "");
        }
        assert_eq!(subjects(&mut slow).len(), WAITING);
        assert_eq!(slow.try_recv(), Err(mpsc::error::TryRecvError::Disconnected), "its stream has ended");
    }

    #[test]
    fn watchers_are_bounded_and_those_who_left_make_room() {
        let events = Events::default();
        let mut watchers: Vec<_> = (0..WATCHERS).map(|_| events.watch(0).unwrap()).collect();
        assert!(events.watch(0).is_err());
        watchers.pop();
        assert!(events.watch(0).is_ok());
    }
}
