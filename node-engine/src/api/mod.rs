//! The local API on a unix socket, and what the command line talks to.
