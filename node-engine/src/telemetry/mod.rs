//! What the node has and uses.
