//! A laboratory on one machine: hosts with their own kernel namespaces and dockerd, a switch between them, a cluster, node
//! engines, containers, traffic.
//!
//! Nothing here has a name outside: namespaces live as long as the processes that hold them, which end when the laboratory's
//! process ends, however it ends. What a killed run leaves on disk the next one removes.

pub mod bench;
pub mod cluster;
pub mod emulator;
pub mod footprint;
pub mod guest;
pub mod host;
pub mod image;
pub mod lan;
pub mod load;
pub mod manager;
pub mod node;
pub mod process;
pub mod relay;
pub mod scratch;
pub mod snapshot;
pub mod soak;
pub mod topology;
pub mod traffic;
pub mod wait;

mod init;

pub use init::run as host_init;
