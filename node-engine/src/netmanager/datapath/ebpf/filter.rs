//! The filter before the stack: an XDP program at an uplink, in the driver itself. It only saves work, so whatever keeps it away is told
//! and no more.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::xdp::XdpLink;
use aya::programs::{Xdp, XdpMode};

use super::pins::Pins;
use super::reason::reason;
use crate::config::XdpChoice;
use crate::netmanager::datapath::Port;

const PROGRAM: &str = "xdp_uplink_ingress";
const PREFIX: &str = "xdp_";

/// Puts the filter on the interface, in the place of the one of an earlier run; or takes that away where none is wanted.
pub(super) fn put(programs: &mut aya::Ebpf, pins: &Pins, port: &Port, choice: XdpChoice) {
    let pin = pins.link(&format!("{PREFIX}{}", port.ifindex));
    let wanted = match choice {
        XdpChoice::On => true,
        XdpChoice::Off => false,
        XdpChoice::Auto => suits(&port.name),
    };
    if !wanted {
        // Its link ends with its pin.
        let _ = fs::remove_file(pin);
        return;
    }
    match attach(programs, &pin, port) {
        Ok(()) => tracing::info!(interface = port.name, "what does not belong is dropped in the driver"),
        Err(reason) if choice == XdpChoice::On => {
            tracing::warn!(interface = port.name, reason, "the driver takes no filter: network.xdp is on for nothing");
        }
        Err(reason) => tracing::debug!(interface = port.name, reason, "the driver takes no filter"),
    }
}

/// Is the pin a filter's at what is no uplink any more?
pub(super) fn is_stale(pin: &str, uplinks: &BTreeSet<u32>) -> bool {
    let ifindex = pin.strip_prefix(PREFIX).and_then(|index| index.parse().ok());
    ifindex.is_some_and(|ifindex: u32| !uplinks.contains(&ifindex))
}

/// Devices with a driver of their own. A veth would lose its GRO, a virtual machine's card its large packets; what has no device below
/// it has no driver.
fn suits(interface: &str) -> bool {
    let bus = Path::new("/sys/class/net").join(interface).join("device/subsystem");
    let bus = fs::read_link(bus).ok().and_then(|bus| Some(bus.file_name()?.to_str()?.to_owned()));
    bus.is_some_and(|bus| bus != "virtio")
}

/// Has the link of an earlier run lead to our filter. One that cannot goes: it only saves work.
pub(super) fn take(programs: &mut aya::Ebpf, pin: &str, path: &Path) -> bool {
    let taken = pin.starts_with(PREFIX) && loaded(programs).is_ok_and(|program| replace(program, path));
    if !taken {
        let _ = fs::remove_file(path);
    }
    taken
}

fn loaded(programs: &mut aya::Ebpf) -> Result<&mut Xdp, String> {
    let program = programs.program_mut(PROGRAM).ok_or("the embedded object has no such program: build it anew")?;
    let program: &mut Xdp = program.try_into().map_err(|error| reason(&error))?;
    if program.fd().is_err() {
        program.load().map_err(|error| reason(&error))?;
    }
    Ok(program)
}

fn replace(program: &mut Xdp, pin: &Path) -> bool {
    let Ok(pinned) = PinnedLink::from_pin(pin) else { return false };
    let link = XdpLink::try_from(FdLink::from(pinned)).ok();
    link.and_then(|link| program.attach_to_link(link).ok()).is_some_and(|id| program.take_link(id).is_ok())
}

fn attach(programs: &mut aya::Ebpf, pin: &Path, port: &Port) -> Result<(), String> {
    let program = loaded(programs)?;
    if replace(program, pin) {
        return Ok(());
    }
    // Its interface went, and another has come by this index.
    let _ = fs::remove_file(pin);
    let id = program.attach(&port.name, XdpMode::Driver).map_err(|error| reason(&error))?;
    let link = program.take_link(id).map_err(|error| reason(&error))?;
    let link = FdLink::try_from(link).map_err(|error| reason(&error))?;
    link.pin(pin).map(drop).map_err(|error| reason(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_without_a_driver_are_left_alone() {
        assert!(!suits("lo") && !suits("there is none such"));
    }

    #[test]
    fn filters_at_other_interfaces_are_stale() {
        for (pin, stale) in [("xdp_3", false), ("xdp_4", true), ("uplink_4", false), ("xdp_x", false)] {
            assert_eq!(is_stale(pin, &[3].into()), stale, "{pin}");
        }
    }
}
