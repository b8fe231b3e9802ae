//! The daemon on every machine of an edge cluster. Each module is one idea with one door; see ARCHITECTURE.md for the map.

pub mod api;
mod backoff;
pub mod cli;
pub mod config;
pub mod control;
pub mod drain;
pub mod engine;
pub mod events;
mod fault;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod heap;
pub mod metrics;
pub mod model;
pub mod names;
mod net_dev;
pub mod netmanager;
pub mod netns;
pub mod notify;
pub mod output;
pub mod runtime;
pub mod standalone;
pub mod store;
pub mod telemetry;
pub mod wire;
pub mod workload;
