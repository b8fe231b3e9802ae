//! The cluster's JSON, field names and all: the only place that knows how the reference system spells things.
//!
//! Each file is one conversation and holds both of its directions, since the embedded cluster speaks the same wire as the node.
//! Reading is lenient about what nobody acts on and strict about what somebody does; writing is exact, because released
//! clusters lose their receive thread over a single bad message (protocol 2). No I/O here, and no panic over any input.

pub mod deploy;
mod furniture;
pub mod json;
pub mod node;
pub mod order;
pub mod register;
mod sensor;
pub mod status;
pub mod table;
pub mod topic;

pub use deploy::{DeployError, deploy};
pub use json::Malformed;
pub use order::{GENERATION, Order, OrderError, generation, order};
pub use sensor::sensor;
pub use topic::{FromNode, ToNode, sensor_topic};

use crate::model::{InvalidName, ServiceName};

/// A service as a person writes it: a full four-part name, or one word `N`, which means `app.default.N.default`.
///
/// # Errors
/// Where neither reading gives a service name.
pub fn service_name(text: &str) -> Result<ServiceName, InvalidName> {
    if text.contains('.') || text.is_empty() { text.parse() } else { format!("app.default.{text}.default").parse() }
}

/// A JSON text of something that is made of texts, numbers, lists and maps with text keys, and therefore always has one.
pub(crate) fn text(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).expect("texts, numbers, lists and string-keyed maps always serialise")
}

#[cfg(test)]
mod tests;
