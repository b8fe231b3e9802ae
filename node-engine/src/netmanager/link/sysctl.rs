//! The host's network settings under `/proc/sys`. What is changed is journaled with its old value, together with what the kernel
//! changes along with it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use tracing::{debug, info};

use super::LinkError;
use super::journal::{Journal, Undo};

const ROOT: &str = "/proc/sys";

/// `ours` of a note whose value is restored whatever it is by then.
const ANY: &str = "*";

/// Forwarding in both families, with the side effects undone and the host's own router discovery kept.
pub(super) fn ensure_forwarding(journal: &mut Journal) -> Result<(), LinkError> {
    let v4 = "net/ipv4/ip_forward";
    if differs(v4, "1")? {
        // Writing it rewrites these too, in both directions (inet_forward_change).
        note_as_it_is(journal, "net/ipv4/conf/all/accept_redirects")?;
        note_forwarding_of_each(journal, "net/ipv4/conf")?;
        ensure(journal, v4, "1")?;
    }
    let v6 = "net/ipv6/conf/all/forwarding";
    if has_ipv6() && differs(v6, "1")? {
        note_forwarding_of_each(journal, "net/ipv6/conf")?;
        keep_router_discovery(journal)?;
        ensure(journal, v6, "1")?;
    }
    Ok(())
}

/// What belongs to one interface of ours and goes with it: loose reverse path filtering, since what the overlay delivers has a source
/// that routes elsewhere (2 wins over a strict `all`); and no router advertisements from a workload.
pub(super) fn settle_own_interface(name: &str) -> Result<(), LinkError> {
    set(&format!("net/ipv4/conf/{name}/rp_filter"), "2")?;
    if has_ipv6() {
        set(&format!("net/ipv6/conf/{name}/accept_ra"), "0")?;
    }
    Ok(())
}

/// Lets the calling thread's namespace forward, which is an instance's with a guest in it and ends with it.
pub(super) fn forward_here() -> io::Result<()> {
    fs::write(full("net/ipv4/ip_forward"), "1")
}

/// For a device on which the host has nothing to say, not even who its neighbours are.
pub(super) fn silence(name: &str) -> Result<(), LinkError> {
    if has_ipv6() { set(&format!("net/ipv6/conf/{name}/disable_ipv6"), "1") } else { Ok(()) }
}

/// Lets the bridge carry what the host's own loopback sends through a published port. The guard must be up before.
pub(super) fn route_loopback(bridge: &str) -> Result<(), LinkError> {
    set(&format!("net/ipv4/conf/{bridge}/route_localnet"), "1")
}

/// Inside an instance's namespace, for its side of the link. Runtimes switch IPv6 off where they assign no address themselves. An
/// address that the node hands out has no duplicate, and looking for one delays the first packet by a second. Another instance
/// on the bridge is nobody to take a router or a shorter way from; the host itself names one where two instances meet through a
/// published port, and a packet that follows it misses its translation.
pub(super) fn prepare_instance_side(interface: &str) -> io::Result<()> {
    for (family, name, setting, value) in [
        ("ipv4", "all", "accept_redirects", "0"),
        ("ipv4", interface, "accept_redirects", "0"),
        ("ipv6", "lo", "disable_ipv6", "0"),
        ("ipv6", interface, "disable_ipv6", "0"),
        ("ipv6", interface, "accept_redirects", "0"),
        ("ipv6", interface, "accept_ra", "0"),
        ("ipv6", interface, "accept_dad", "0"),
    ] {
        let path = format!("net/{family}/conf/{name}/{setting}");
        let at_path = |error: io::Error| io::Error::new(error.kind(), format!("{path}: {error}"));
        match read(&path) {
            Ok(now) if now == value => {}
            Ok(_) => fs::write(full(&path), value).map_err(at_path)?,
            // No IPv6 here, or the workload has renamed its interface.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(at_path(error)),
        }
    }
    Ok(())
}

pub(super) fn has_ipv6() -> bool {
    full("net/ipv6").exists()
}

/// Undoes one noted change. An interface that is gone took its settings along.
pub(super) fn restore(path: &str, ours: &str, old: &str) -> io::Result<()> {
    let now = match read(path) {
        Ok(now) => now,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if now == old {
        return Ok(());
    }
    if ours != ANY && now != ours {
        info!(sysctl = path, now, ours, old, "somebody changed this setting since: left as it is");
        return Ok(());
    }
    fs::write(full(path), old)
}

/// Notes the old value, then writes. Repeatable.
fn ensure(journal: &mut Journal, path: &str, value: &str) -> Result<(), LinkError> {
    let old = read(path).map_err(|error| failed("read", path, &error))?;
    if old == value {
        return Ok(());
    }
    journal.note(Undo::RestoreSysctl { path: path.into(), ours: value.into(), old })?;
    set(path, value)
}

fn set(path: &str, value: &str) -> Result<(), LinkError> {
    if differs(path, value)? {
        fs::write(full(path), value).map_err(|error| failed("write", path, &error))?;
        debug!(sysctl = path, value, "set");
    }
    Ok(())
}

fn differs(path: &str, value: &str) -> Result<bool, LinkError> {
    Ok(read(path).map_err(|error| failed("read", path, &error))? != value)
}

/// A value that another write changes along. Noted before that write, so restored after it.
fn note_as_it_is(journal: &mut Journal, path: &str) -> Result<(), LinkError> {
    let old = read(path).map_err(|error| failed("read", path, &error))?;
    journal.note(Undo::RestoreSysctl { path: path.into(), ours: ANY.into(), old })
}

/// Switching forwarding for all interfaces switches it for each: those that had it alone get it back.
fn note_forwarding_of_each(journal: &mut Journal, directory: &str) -> Result<(), LinkError> {
    for interface in interfaces(directory)? {
        let path = format!("{directory}/{interface}/forwarding");
        if interface != "all" && read(&path).is_ok_and(|value| value == "1") {
            note_as_it_is(journal, &path)?;
        }
    }
    Ok(())
}

/// A forwarding host ignores router advertisements where `accept_ra` is 1: an interface that learned its default route this way would
/// lose it. 2 accepts them all the same. Only interfaces that are there now: for later ones (a bridge, a container's veth) listening
/// to advertisements would be a new behaviour, and a door.
fn keep_router_discovery(journal: &mut Journal) -> Result<(), LinkError> {
    for interface in interfaces("net/ipv6/conf")? {
        let path = format!("net/ipv6/conf/{interface}/accept_ra");
        let special = ["all", "default", "lo"].contains(&interface.as_str());
        if !special && read(&path).is_ok_and(|value| value == "1") {
            ensure(journal, &path, "2")?;
        }
    }
    Ok(())
}

fn interfaces(directory: &str) -> Result<Vec<String>, LinkError> {
    let list = || -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(full(directory))? {
            names.extend(entry?.file_name().into_string());
        }
        names.sort();
        Ok(names)
    };
    list().map_err(|error| failed("list", directory, &error))
}

fn read(path: &str) -> io::Result<String> {
    Ok(fs::read_to_string(full(path))?.trim().to_owned())
}

fn full(path: &str) -> PathBuf {
    Path::new(ROOT).join(path)
}

fn failed(step: &'static str, path: &str, error: &io::Error) -> LinkError {
    LinkError::Kernel { step, object: path.to_owned(), reason: error.to_string() }
}
