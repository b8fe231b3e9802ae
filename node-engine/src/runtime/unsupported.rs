//! What a description may ask for and a technology cannot give: refused with a reason, and not passed over.

use super::RuntimeError;
use crate::model::{InstanceSpec, Technology};

/// For commands that this binary looks after itself: what is no container has no layer of its own to measure, and no container engine
/// that reads the vendors' specifications of devices.
///
/// # Errors
/// `Refused`, for the first of them.
pub(super) fn refuse(spec: &InstanceSpec) -> Result<(), RuntimeError> {
    let technology = &spec.technology;
    let refused = |what: &'static str, reason: String| Err(RuntimeError::Refused { what, reason });
    if spec.limits.storage_mib.is_some() {
        return refused("storage", format!("what {technology} writes is not limited on this node"));
    }
    if spec.limits.vgpus > 0 {
        return refused("vgpus", format!("GPUs are given to containers of Docker, and not to {technology}"));
    }
    // A command sees the node's own.
    let sees_devices = spec.technology == Technology::Process;
    match spec.devices.iter().find(|device| device.is_cdi() || !sees_devices) {
        None => Ok(()),
        Some(device) if sees_devices => refused(
            "devices",
            format!("{} is described for container engines (CDI), and not for {technology}", device.name),
        ),
        Some(device) => refused("devices", format!("{} cannot be given to {technology}", device.name)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{DeviceGrant, Limits};

    #[test]
    fn what_cannot_be_given_is_refused() {
        let plain = Limits::default();
        let (named, cdi) = (Some("camera"), Some("vendor.example/gpu=0"));
        for (technology, limits, device, reason) in [
            (Technology::Process, plain, None, None),
            (Technology::Process, plain, named, None),
            (Technology::Process, plain, cdi, Some("devices: vendor.example/gpu=0 is described for container engines")),
            (Technology::Process, Limits { storage_mib: Some(1), ..plain }, None, Some("storage: what process writes")),
            (Technology::Unikernel, Limits { vgpus: 1, ..plain }, None, Some("vgpus: GPUs are given to containers")),
            (Technology::Unikernel, plain, named, Some("devices: camera cannot be given to unikernel")),
            (Technology::Wasm, plain, cdi, Some("devices: vendor.example/gpu=0 cannot be given to wasm")),
        ] {
            let id = "a.b.c.d.instance.0".parse().expect("an id");
            let devices = device.map(|name| DeviceGrant { name: name.into(), ..DeviceGrant::default() });
            let devices = devices.into_iter().collect();
            let said = refuse(&InstanceSpec { limits, devices, ..InstanceSpec::new(id, technology) });
            match (said, reason) {
                (Ok(()), None) => {}
                (Err(error), Some(reason)) => assert!(error.to_string().starts_with(reason), "{error}"),
                (said, reason) => panic!("{said:?} where {reason:?} is right"),
            }
        }
    }
}
