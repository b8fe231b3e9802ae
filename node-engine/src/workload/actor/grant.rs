//! What is attached to the node is given to an instance by name: at its deployment the name becomes device nodes, or a reason.

use std::sync::Arc;

use crate::model::{Device, DeviceGrant, InstanceSpec};
use crate::runtime::RuntimeError;

/// Names that a refusal lists.
const LISTED: usize = 16;

/// The description with the nodes of every device that it asks for.
pub(super) fn grant(spec: &Arc<InstanceSpec>, attached: &[Device]) -> Result<Arc<InstanceSpec>, RuntimeError> {
    if spec.devices.iter().all(DeviceGrant::is_cdi) {
        return Ok(spec.clone());
    }
    let devices =
        spec.devices.iter().map(|asked| if asked.is_cdi() { Ok(asked.clone()) } else { find(asked, attached) });
    Ok(Arc::new(InstanceSpec { devices: devices.collect::<Result<_, _>>()?, ..InstanceSpec::clone(spec) }))
}

fn find(asked: &DeviceGrant, attached: &[Device]) -> Result<DeviceGrant, RuntimeError> {
    let refused = |reason| RuntimeError::Refused { what: "device", reason };
    let name = &asked.name;
    let meant = |device: &&Device| device.name == *name || (!device.id.is_empty() && device.id == *name);
    // One that has nodes before one that has none: a USB adapter and its serial line have the same id.
    let mut found: Vec<&Device> = attached.iter().filter(meant).collect();
    found.sort_by_key(|device| device.nodes.is_empty());
    let Some(device) = found.first() else {
        let known = attached.iter().filter(|device| !device.nodes.is_empty()).map(|device| device.name.as_str());
        let known: Vec<&str> = known.take(LISTED).collect();
        let known = if known.is_empty() { "nothing that could be given".to_owned() } else { known.join(", ") };
        return Err(refused(format!("{name} is not attached to this node; attached: {known}")));
    };
    if let Some(missing) = device.nodes.iter().find(|node| !node.exists()) {
        return Err(refused(format!("{name} has no {}: is its driver loaded?", missing.display())));
    }
    if device.nodes.is_empty() {
        return Err(refused(format!("{name} has no device node that could be given to an instance")));
    }
    Ok(DeviceGrant { name: name.clone(), nodes: device.nodes.clone() })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::model::{DeviceKind, Technology};

    fn device(name: &str, id: &str, nodes: &[&str]) -> Device {
        let nodes = nodes.iter().map(Into::into).collect();
        Device { name: name.into(), id: id.into(), nodes, kind: DeviceKind::Serial, ..Device::default() }
    }

    #[test]
    fn a_device_is_found_by_name_or_id_and_a_refusal_says_what_there_is() {
        let attached = [
            device("can0", "", &[]),
            device("usb-1-2", "0403:6001:A5", &[]),
            device("ttyusb0", "0403:6001:A5", &["/dev/null"]),
            device("video0", "", &["/dev/nonexistent"]),
        ];
        let granted = |names: &[&str]| {
            let devices = names.iter().map(|name| DeviceGrant { name: (*name).into(), nodes: Vec::new() }).collect();
            let id = "a.b.c.d.instance.0".parse().unwrap();
            let spec = Arc::new(InstanceSpec { devices, ..InstanceSpec::new(id, Technology::Container) });
            grant(&spec, &attached)
                .map(|spec| spec.devices.iter().map(|device| device.nodes.clone()).collect::<Vec<_>>())
        };
        let null = vec![PathBuf::from("/dev/null")];
        assert_eq!(granted(&[]).unwrap(), Vec::<Vec<PathBuf>>::new());
        assert_eq!(granted(&["ttyusb0"]).unwrap(), vec![null.clone()]);
        assert_eq!(granted(&["0403:6001:A5"]).unwrap(), vec![null], "the one that has a node");
        assert_eq!(granted(&["nvidia.com/gpu=0"]).unwrap(), vec![Vec::<PathBuf>::new()], "the runtime's business");
        for (name, reason) in [
            ("camera", "camera is not attached to this node; attached: ttyusb0, video0"),
            ("can0", "can0 has no device node that could be given to an instance"),
            ("video0", "video0 has no /dev/nonexistent: is its driver loaded?"),
        ] {
            assert_eq!(granted(&["ttyusb0", name]).unwrap_err().to_string(), format!("device: {reason}"));
        }
    }
}
