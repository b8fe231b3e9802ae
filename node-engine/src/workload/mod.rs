//! The life of the instances on this node: one task owns them, a pure core decides.
