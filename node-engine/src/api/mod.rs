//! The local API: JSON over HTTP on the unix socket `<run-dir>/api.sock`, mode 0600. The command line is its client.

pub mod dto;
