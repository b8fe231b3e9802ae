//! The cluster's JSON, field names and all: the only place that knows how the reference system spells things.
