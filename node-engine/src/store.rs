//! The little that outlives the process.
