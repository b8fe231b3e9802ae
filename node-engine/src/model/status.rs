//! The life of an instance as the cluster sees it.

use std::fmt;

/// A status that a worker may report. Released clusters lose their MQTT thread over any other word (protocol 5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Status {
    /// Pulling or preparing.
    Creating,
    /// Created, start requested.
    Created,
    Running,
    /// Deployment failed, or exit code other than 0.
    Failed,
    /// Ended with exit code 0 without being one-shot, or was killed.
    Dead,
    /// One-shot, ended with exit code 0.
    Completed,
    /// Answer to a delete.
    Undeployed,
}

impl Status {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Creating => "CREATING",
            Self::Created => "CREATED",
            Self::Running => "RUNNING",
            Self::Failed => "FAILED",
            Self::Dead => "DEAD",
            Self::Completed => "COMPLETED",
            Self::Undeployed => "UNDEPLOYED",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
