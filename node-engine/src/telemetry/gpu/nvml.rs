//! GPUs of NVIDIA, asked through the driver's own library. A machine without that library has none.

use nvml_wrapper::enum_wrappers::device::TemperatureSensor;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml};

use crate::model::GpuUsage;

const MIB: u64 = 1 << 20;

/// The driver's library, where there is one.
#[derive(Debug)]
pub(super) struct Gpus {
    driver: Option<(Nvml, String)>,
}

impl Gpus {
    pub(super) fn open() -> Self {
        let driver = match Nvml::init() {
            Ok(library) => {
                let version = library.sys_driver_version().unwrap_or_default();
                Some((library, format!("nvidia {version}").trim_end().to_owned()))
            }
            Err(error) => {
                tracing::debug!(%error, "no GPUs: the driver's library is not usable");
                None
            }
        };
        Self { driver }
    }

    /// Every GPU that answers; one that does not (it fell off the bus, its driver is being replaced) is left out.
    pub(super) fn sample(&self) -> Vec<GpuUsage> {
        let Some((library, driver)) = &self.driver else { return Vec::new() };
        let count = library.device_count().unwrap_or(0);
        (0..count).filter_map(|index| read(&library.device_by_index(index).ok()?, driver).ok()).collect()
    }
}

fn read(device: &Device<'_>, driver: &str) -> Result<GpuUsage, NvmlError> {
    let memory = device.memory_info()?;
    Ok(GpuUsage {
        name: device.name()?,
        driver: driver.to_owned(),
        // Some cards do not tell their usage or temperature; they still have memory to offer.
        usage_percent: device.utilization_rates().map_or(0.0, |rates| f64::from(rates.gpu)),
        memory_total_mib: memory.total / MIB,
        memory_used_mib: memory.used / MIB,
        temperature_celsius: device.temperature(TemperatureSensor::Gpu).map_or(0.0, f64::from),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_as_many_as_the_driver_shows() {
        let gpus = Gpus::open().sample();
        let shown = std::fs::read_dir("/proc/driver/nvidia/gpus").map_or(0, Iterator::count);
        assert_eq!(gpus.len(), shown, "{gpus:?}");
    }
}
