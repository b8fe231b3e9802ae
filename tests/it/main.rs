//! Scenarios.
mod ground;
