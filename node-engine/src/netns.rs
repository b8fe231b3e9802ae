//! Open, create and enter a network namespace.
