//! The composition root: builds, wires, supervises, shuts down.
