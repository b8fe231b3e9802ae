//! The stop signal: one token and one deadline that every task shares.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Told to stop? And how long may the end take? Cloned into every task.
#[derive(Clone, Debug)]
pub struct Drain {
    token: CancellationToken,
    grace: Duration,
}

impl Drain {
    /// A drain that gives tasks `grace` to finish after `begin`.
    pub fn new(grace: Duration) -> Self {
        Self { token: CancellationToken::new(), grace }
    }

    /// Tells every holder to stop.
    pub fn begin(&self) {
        self.token.cancel();
    }

    pub fn begun(&self) -> bool {
        self.token.is_cancelled()
    }

    /// Resolves when the stop begins, with the instant by which everything should have ended.
    pub async fn wait(&self) -> Instant {
        self.token.cancelled().await;
        Instant::now() + self.grace
    }
}
