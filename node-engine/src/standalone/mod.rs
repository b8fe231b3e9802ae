//! The embedded cluster: broker, manager and service manager in one process, for one machine, a handful, or a test.
