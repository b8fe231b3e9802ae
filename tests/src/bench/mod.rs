//! How fast the overlay is, beside what there is without it: ratios of one run, never absolute figures.

pub mod load;
pub mod report;
pub mod rig;
