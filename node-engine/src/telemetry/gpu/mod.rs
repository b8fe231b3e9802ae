//! GPUs: those of NVIDIA through the driver's own library, all others (and NVIDIA's own boards, whose library knows none) as the kernel
//! describes them.

mod nvml;
mod sysfs;

use std::collections::{BTreeMap, BTreeSet};

use super::roots::Roots;
use crate::model::GpuUsage;

pub(super) use sysfs::{Card, cards, name};

#[derive(Debug)]
pub(super) struct Gpus {
    library: nvml::Gpus,
    roots: Roots,
    /// Names of cards, by place and id: the list they are looked up in is long.
    names: BTreeMap<String, String>,
}

impl Gpus {
    pub(super) fn open(roots: Roots) -> Self {
        Self { library: nvml::Gpus::open(), roots, names: BTreeMap::new() }
    }

    /// Every GPU that answers.
    pub(super) fn sample(&mut self) -> Vec<GpuUsage> {
        let mut gpus = self.library.sample();
        // A card that both tell of is told of by the library, which knows more.
        let known: BTreeSet<&str> = gpus.iter().map(|gpu| gpu.driver.split(' ').next().unwrap_or_default()).collect();
        let rest =
            sysfs::sample(&self.roots, &mut self.names).into_iter().filter(|gpu| !known.contains(gpu.driver.as_str()));
        let rest: Vec<_> = rest.collect();
        gpus.extend(rest);
        gpus
    }
}
