//! Whether the cluster's state is on the disk. What the disk does not take is offered to it again, at growing distances, and what stands in
//! the way is said once.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::saved::SaveError;
use crate::backoff::{Backoff, Complaints};

/// The longest wait between two tries, in seconds.
const LONGEST: u64 = 30;
/// Somebody who waits for an answer is worth another try, so long after the last.
const ASKED: Duration = Duration::from_secs(1);

#[derive(Debug)]
pub(super) struct Keeping {
    /// Something may not be on the disk.
    unsaved: bool,
    failed: Option<Failed>,
    backoff: Backoff,
    complaints: Complaints,
}

/// The last try, if it came to nothing.
#[derive(Debug)]
struct Failed {
    error: Arc<SaveError>,
    at: Instant,
    again: Instant,
}

/// What is to be done about what is not on the disk.
#[derive(Debug)]
pub(super) enum Due {
    Nothing,
    Save,
    /// The last try was too short a while ago. This came of it.
    Wait(Arc<SaveError>),
}

/// What somebody should hear of a try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum News {
    Nothing,
    /// It fails, and for another reason than before.
    Fails,
    WorksAgain,
}

impl Keeping {
    /// At the start nothing is known to be on the disk.
    pub(super) fn new() -> Self {
        Self {
            unsaved: true,
            failed: None,
            backoff: Backoff::up_to_seconds(LONGEST),
            complaints: Complaints::default(),
        }
    }

    pub(super) fn changed(&mut self) {
        self.unsaved = true;
    }

    /// `asked`: somebody waits to hear that it is kept.
    pub(super) fn due(&self, asked: bool, now: Instant) -> Due {
        let failed = match &self.failed {
            _ if !self.unsaved => return Due::Nothing,
            Some(failed) => failed,
            None => return Due::Save,
        };
        let waited = now.saturating_duration_since(failed.at) >= ASKED;
        if now >= failed.again || (asked && waited) { Due::Save } else { Due::Wait(failed.error.clone()) }
    }

    /// How a try ended.
    pub(super) fn tried(&mut self, result: &Result<(), Arc<SaveError>>, now: Instant) -> News {
        let Err(error) = result else {
            self.unsaved = false;
            self.backoff.reset();
            self.complaints.settle();
            return if self.failed.take().is_some() { News::WorksAgain } else { News::Nothing };
        };
        self.failed = Some(Failed { error: error.clone(), at: now, again: now + self.backoff.next() });
        // On a disk that is full now one step fails and now another.
        let reason = match &**error {
            SaveError::File { source, .. } => source.to_string(),
            SaveError::Task(error) => error.to_string(),
        };
        if self.complaints.is_new(&reason, now) { News::Fails } else { News::Nothing }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Error, ErrorKind};

    use super::*;

    fn fails(kind: ErrorKind) -> Result<(), Arc<SaveError>> {
        Err(Arc::new(SaveError::File { step: "write", path: "cluster.json".into(), source: Error::from(kind) }))
    }

    /// Ten turns a second for ten minutes: how often is it tried, and what is said?
    fn turns(keeping: &mut Keeping, begin: Instant, asked: bool, kind: ErrorKind) -> (u32, Vec<News>) {
        let (mut tries, mut said) = (0, Vec::new());
        for tenth in 0..6_000 {
            let now = begin + Duration::from_millis(100 * tenth);
            keeping.changed();
            if let Due::Save = keeping.due(asked, now) {
                tries += 1;
                said.extend(Some(keeping.tried(&fails(kind), now)).filter(|news| *news != News::Nothing));
            }
        }
        (tries, said)
    }

    #[test]
    fn a_full_disk_is_tried_now_and_then_and_complained_of_once() {
        let (mut keeping, begin) = (Keeping::new(), Instant::now());
        let (tries, said) = turns(&mut keeping, begin, false, ErrorKind::StorageFull);
        assert!((20..60).contains(&tries), "{tries} tries in ten minutes");
        assert_eq!(said, [News::Fails]);
        let later = begin + Duration::from_secs(600);
        assert_eq!(turns(&mut keeping, later, false, ErrorKind::ReadOnlyFilesystem).1, [News::Fails], "another reason");

        let last = later + Duration::from_secs(600);
        assert_eq!(keeping.tried(&Ok(()), last), News::WorksAgain);
        assert!(matches!(keeping.due(true, last), Due::Nothing));
        keeping.changed();
        assert!(matches!(keeping.due(false, last), Due::Save), "at once, as ever");
        assert_eq!(keeping.tried(&Ok(()), last), News::Nothing);
        assert_eq!(keeping.tried(&fails(ErrorKind::ReadOnlyFilesystem), last), News::Fails, "anew");
    }

    #[test]
    fn whoever_waits_for_an_answer_gets_another_try_or_the_last_ones_error() {
        let (mut keeping, begin) = (Keeping::new(), Instant::now());
        let (tries, _) = turns(&mut keeping, begin, true, ErrorKind::StorageFull);
        assert!((500..=1_300).contains(&tries), "{tries} tries in ten minutes");
        let now = begin + Duration::from_secs(600);
        assert_eq!(keeping.tried(&fails(ErrorKind::StorageFull), now), News::Nothing);
        assert!(matches!(keeping.due(true, now), Due::Wait(error) if error.to_string().contains("cluster.json")));
        assert!(matches!(keeping.due(true, now + ASKED), Due::Save));
    }
}
