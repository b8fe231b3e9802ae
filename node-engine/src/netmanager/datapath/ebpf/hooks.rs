//! Programs on interfaces: by TCX with a pinned link where the kernel has it (6.6), else as a filter of the clsact qdisc. A restart
//! replaces the program in place; there is no moment without one.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::io;
use std::mem;
use std::path::Path;

use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType, TestRun, TestRunOptions};
use nix::net::if_::{if_indextoname, if_nameindex};

use super::filter;
use super::pins::Pins;
use super::reason::{reason, unsupported};
use crate::config::XdpChoice;
use crate::netmanager::datapath::{DatapathError, Port};

/// Our filters among those of a clsact qdisc: a number of our own, so that a restart finds and replaces them.
const PRIORITY: u16 = 50_103;

/// Where a program sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::netmanager::datapath) enum Hook {
    /// The host end of an instance's veth.
    Veth,
    /// At an uplink, for what comes bare.
    Uplink,
    /// At an uplink, for what comes framed.
    Framed,
    /// The device that makes the kernel join framed packets.
    Framing,
}

impl Hook {
    pub(super) const ALL: [Self; 4] = [Self::Veth, Self::Uplink, Self::Framed, Self::Framing];

    /// The program's name in the object.
    pub(super) const fn program(self) -> &'static str {
        match self {
            Self::Veth => "tc_veth_ingress",
            Self::Uplink => "tc_uplink_ingress",
            Self::Framed => "tc_framed_ingress",
            Self::Framing => "tc_framing_ingress",
        }
    }

    const fn prefix(self) -> &'static str {
        match self {
            Self::Veth => "veth_",
            Self::Uplink => "uplink_",
            Self::Framed => "framed_",
            Self::Framing => "framing_",
        }
    }

    /// Its filter among ours: one interface may have several.
    const fn handle(self) -> TcHandle {
        TcHandle::new(
            0,
            match self {
                Self::Veth | Self::Uplink | Self::Framing => 1,
                Self::Framed => 2,
            },
        )
    }

    /// Is what sits at this interface of no more use?
    fn is_stale(self, ifindex: u32, uplinks: &BTreeSet<u32>) -> bool {
        match self {
            Self::Veth | Self::Framing => interface(ifindex).is_none(),
            Self::Uplink | Self::Framed => !uplinks.contains(&ifindex),
        }
    }

    /// The link's pin. By index and not by name: names come again, and may hold dots.
    fn pin(self, ifindex: u32) -> String {
        format!("{}{ifindex}", self.prefix())
    }

    /// Whose pin it is.
    pub(super) fn of_pin(pin: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|hook| hook.ifindex(pin).is_some())
    }

    /// The index in a pin's name, if it is of this hook.
    fn ifindex(self, pin: &str) -> Option<u32> {
        pin.strip_prefix(self.prefix())?.parse().ok()
    }
}

/// By which way a program sits at its hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Tcx,
    Clsact,
}

/// The loaded programs.
pub(super) struct Hooks {
    pub(super) programs: aya::Ebpf,
    pub(super) pins: Pins,
    xdp: XdpChoice,
    /// Where programs sit, and how.
    attached: BTreeMap<(Hook, u32), (Port, Way)>,
    /// Of each hook's program, as the kernel counts them.
    ids: BTreeMap<Hook, u32>,
    /// Why some are at clsact.
    refused: Option<String>,
}

impl fmt::Debug for Hooks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hooks").field("pins", &self.pins).finish_non_exhaustive()
    }
}

impl Hooks {
    /// Passes the programs by the verifier, has each run once, and pins them.
    pub(super) fn load(mut programs: aya::Ebpf, pins: Pins, xdp: XdpChoice) -> Result<Self, DatapathError> {
        let mut ids = BTreeMap::new();
        for hook in Hook::ALL {
            let program = classifier(&mut programs, hook)?;
            program.load().map_err(|error| unsupported("load programs", &error))?;
            // A frame that is nobody's: what is compiled wrong does not survive it, and what is right lets it pass; but for the one
            // that drops and counts everything.
            if hook != Hook::Framing {
                let options = TestRunOptions { data_in: Some(&[0; 64]), ..TestRunOptions::default() };
                program.test_run(options).map_err(|error| unsupported("run programs", &error))?;
            }
            let pin = pins.program(hook.program());
            // The pin of the previous run names the previous program. It is kept until the new one has been tried out, unless it has
            // itself never been: then there is an older one.
            let before = pins.program_before(hook.program());
            let _ = if before.exists() { fs::remove_file(&pin) } else { fs::rename(&pin, before) };
            program.pin(&pin).map_err(|error| unsupported("pin programs", &error))?;
            ids.insert(hook, program.info().map_err(|error| unsupported("look at programs", &error))?.id());
        }
        Ok(Self { programs, pins, xdp, attached: BTreeMap::new(), ids, refused: None })
    }

    pub(super) fn pins(&self) -> &Pins {
        &self.pins
    }

    /// Why some programs are not where the newest kernels have them.
    pub(super) fn refused(&self) -> Option<String> {
        self.refused.clone()
    }

    /// Puts the program on the interface, or in the place of the one of an earlier run.
    pub(super) fn attach(&mut self, hook: Hook, port: &Port) -> Result<(), DatapathError> {
        let program = classifier(&mut self.programs, hook)?;
        let pin = hook.pin(port.ifindex);
        let linked = match replace_link(program, &self.pins.link(&pin)) {
            true => Ok(()),
            false => new_link(program, port, &self.pins, &pin),
        };
        let way = match linked {
            Ok(()) => {
                // One of an earlier run would have what this one lets pass.
                remove_filter(&port.name, hook);
                Way::Tcx
            }
            Err(tcx) => {
                filter(program, hook.handle(), port).map_err(|clsact| DatapathError::Unsupported {
                    what: "attach program",
                    reason: format!("{}: TCX: {tcx}; clsact: {clsact}", port.name),
                })?;
                self.refused.get_or_insert_with(|| format!("TCX at {}: {tcx}", port.name));
                Way::Clsact
            }
        };
        self.attached.insert((hook, port.ifindex), (port.clone(), way));
        Ok(())
    }

    /// Takes every program off every interface; maps and pins stay.
    pub(super) fn detach_all(&mut self) -> Result<(), DatapathError> {
        let attached: Vec<(Hook, Port)> =
            self.attached.iter().map(|((hook, _), (port, _))| (*hook, port.clone())).collect();
        // What nobody was told of in this run may sit there from an earlier one.
        for pin in self.pins.links() {
            let _ = fs::remove_file(self.pins.link(&pin));
        }
        attached.iter().map(|(hook, port)| self.detach(*hook, port)).fold(Ok(()), Result::and)
    }

    /// Is the program where it was put? Only the kernel's links are looked at: it is they that it takes away.
    pub(super) fn holds(&self, hook: Hook, ifindex: u32) -> bool {
        let Some((port, way)) = self.attached.get(&(hook, ifindex)) else { return true };
        // An interface that has gone has taken its packets along.
        if *way != Way::Tcx || interface(ifindex).is_none() {
            return true;
        }
        self.sits(hook, port) == Some(true)
    }

    /// Whether the kernel has the program at TCX, if it says.
    pub(super) fn sits(&self, hook: Hook, port: &Port) -> Option<bool> {
        let (_, programs) = SchedClassifier::query_tcx(&port.name, TcAttachType::Ingress).ok()?;
        Some(programs.iter().any(|program| Some(&program.id()) == self.ids.get(&hook)))
    }

    /// Where programs sit.
    pub(super) fn attached(&self) -> Vec<(Hook, Port)> {
        self.attached.iter().map(|((hook, _), (port, _))| (*hook, port.clone())).collect()
    }

    /// Puts the programs for what peers send on the interface. The first sees every packet: what comes framed is the most.
    pub(super) fn attach_uplink(&mut self, port: &Port) -> Result<(), DatapathError> {
        self.attach(Hook::Framed, port)?;
        self.attach(Hook::Uplink, port)?;
        filter::put(&mut self.programs, &self.pins, port, self.xdp);
        Ok(())
    }

    /// Takes the program off the interface.
    pub(super) fn detach(&mut self, hook: Hook, port: &Port) -> Result<(), DatapathError> {
        self.attached.remove(&(hook, port.ifindex));
        let pin = self.pins.link(&hook.pin(port.ifindex));
        match fs::remove_file(&pin) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(DatapathError::Step { step: "unpin link", reason: format!("{}: {error}", pin.display()) });
            }
        }
        remove_filter(&port.name, hook);
        Ok(())
    }

    /// Removes the pins of interfaces that are gone, and of uplinks that are none any more.
    pub(super) fn sweep(&mut self, uplinks: &BTreeSet<u32>) {
        self.attached.retain(|(hook, ifindex), _| !hook.is_stale(*ifindex, uplinks));
        for pin in self.pins.links() {
            let stale = |hook: Hook| hook.ifindex(&pin).is_some_and(|ifindex| hook.is_stale(ifindex, uplinks));
            if Hook::ALL.into_iter().any(stale) || filter::is_stale(&pin, uplinks) {
                let _ = fs::remove_file(self.pins.link(&pin));
            }
        }
    }
}

/// The name of the interface with this index, if there is one: nix takes the C library's null pointer for an empty name.
pub(in crate::netmanager::datapath) fn interface(ifindex: u32) -> Option<String> {
    let name = if_indextoname(ifindex).ok()?.into_string().ok()?;
    (!name.is_empty()).then_some(name)
}

pub(super) fn classifier(programs: &mut aya::Ebpf, hook: Hook) -> Result<&mut SchedClassifier, DatapathError> {
    let missing = || DatapathError::Unsupported {
        what: "load programs",
        reason: format!("the embedded object has no classifier {}: build it anew", hook.program()),
    };
    programs.program_mut(hook.program()).ok_or_else(missing)?.try_into().map_err(|_: ProgramError| missing())
}

/// Updates the pinned link to this program. False where there is none, or it is no use: then its pin is gone.
pub(super) fn replace_link(program: &mut SchedClassifier, path: &Path) -> bool {
    let Ok(pinned) = PinnedLink::from_pin(path) else { return false };
    let replaced = SchedClassifierLink::try_from(FdLink::from(pinned))
        .map_err(|error| reason(&error))
        .and_then(|link| program.attach_to_link(link).map_err(|error| reason(&error)))
        // Out of aya's hands, which would hold the descriptor for as long as the program.
        .and_then(|id| program.take_link(id).map_err(|error| reason(&error)));
    match replaced {
        Ok(link) => {
            drop(link);
            true
        }
        Err(reason) => {
            // Its interface went, and another has come by this index.
            tracing::debug!(pin = %path.display(), reason, "a pinned link cannot be updated and is made anew");
            let _ = fs::remove_file(path);
            false
        }
    }
}

fn new_link(program: &mut SchedClassifier, port: &Port, pins: &Pins, pin: &str) -> Result<(), String> {
    let order = TcAttachOptions::TcxOrder(LinkOrder::default());
    let attached = program.attach_with_options(&port.name, TcAttachType::Ingress, order);
    let link = attached.and_then(|id| program.take_link(id)).map_err(|error| reason(&error))?;
    let link = FdLink::try_from(link).map_err(|error| reason(&error))?;
    link.pin(pins.link(pin)).map(drop).map_err(|error| reason(&error))
}

/// Puts the program into the clsact qdisc, which is made where it is missing.
fn filter(program: &mut SchedClassifier, handle: TcHandle, port: &Port) -> Result<(), String> {
    match tc::qdisc_add_clsact(&port.name) {
        Err(error) if !exists(&error) => return Err(reason(&error)),
        _ => {}
    }
    let options = NlOptions { priority: PRIORITY, handle, classid: None };
    let attached = program.attach_with_options(&port.name, TcAttachType::Ingress, TcAttachOptions::Netlink(options));
    let attached = match attached {
        Err(ProgramError::TcError(error)) if exists(&error) => {
            let link = SchedClassifierLink::attached(&port.name, TcAttachType::Ingress, PRIORITY, handle, None);
            program.attach_to_link(link.map_err(|error| error.to_string())?)
        }
        other => other,
    };
    let link = attached.and_then(|id| program.take_link(id)).map_err(|error| reason(&error))?;
    // Dropping it would take the filter away; it shall outlive the process.
    mem::forget(link);
    Ok(())
}

fn exists(error: &TcError) -> bool {
    match error {
        TcError::NetlinkError(error) => error.raw_os_error() == Some(libc::EEXIST),
        TcError::AlreadyAttached => true,
        TcError::IoError(error) => error.raw_os_error() == Some(libc::EEXIST),
        _ => false,
    }
}

/// Removes our filters from every interface.
pub(super) fn remove_filters() {
    for interface in if_nameindex().iter().flat_map(|interfaces| interfaces.iter()) {
        for hook in Hook::ALL {
            if let Ok(name) = interface.name().to_str() {
                remove_filter(name, hook);
            }
        }
    }
}

fn remove_filter(interface: &str, hook: Hook) {
    // No such interface, no such qdisc, no such filter: all that was wanted.
    let _ = tc::qdisc_detach_program(interface, TcAttachType::Ingress, hook.program());
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::super::{OBJECT, maps, pins};
    use super::*;
    use crate::netmanager::datapath::Capacity;
    use crate::netns;

    /// Kernels before 6.6.
    #[test]
    #[ignore = "needs root"]
    fn without_tcx_a_filter_is_put_replaced_and_removed() {
        let name = format!("dp-clsact-{}", std::process::id());
        let netns = netns::ensure(&name).expect("a namespace");
        let scratch = tempfile::tempdir().unwrap();
        let pin_dir = scratch.path().join("bpf");
        let result = netns::within(&netns, || {
            tc("ip", &["link", "add", "veth.7", "type", "veth", "peer", "name", "peer"]);
            let port = Port { name: "veth.7".into(), ifindex: nix::net::if_::if_nametoindex("veth.7").unwrap() };
            let filters = || {
                let shown = tc("tc", &["filter", "show", "dev", "veth.7", "ingress"]);
                shown.lines().filter(|line| line.contains("tc_veth_ingress")).map(str::to_owned).collect::<Vec<_>>()
            };
            let mut seen = Vec::new();
            for _ in 0..2 {
                let pins = Pins::ensure(&pin_dir, Capacity::USUAL).unwrap();
                let mut loader = aya::EbpfLoader::new();
                for map in maps::PINNED {
                    loader.map_pin_path(map, pins.map(map));
                }
                let mut hooks =
                    Hooks::load(loader.load(OBJECT).expect("an eBPF object"), pins, XdpChoice::Off).unwrap();
                filter(classifier(&mut hooks.programs, Hook::Veth).unwrap(), Hook::Veth.handle(), &port).unwrap();
                drop(hooks);
                seen.push(filters());
            }
            assert_eq!(seen[0].len(), 1, "one filter, and it outlives its maker: {seen:?}");
            assert_eq!(seen[1].len(), 1, "it is replaced: {seen:?}");
            assert_ne!(seen[0], seen[1], "by another program");
            assert!(pins::uninstall(&pin_dir).is_empty());
            assert_eq!(filters(), [""; 0]);
        });
        netns::remove(&name).unwrap();
        result.unwrap();
    }

    fn tc(program: &str, arguments: &[&str]) -> String {
        let output = Command::new(program).args(arguments).output().unwrap();
        assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn what_sits_at_no_interface_is_stale() {
        const LOOPBACK: u32 = 1;
        let nowhere = i32::MAX.cast_unsigned();
        for hook in [Hook::Veth, Hook::Framing] {
            assert!(hook.is_stale(nowhere, &BTreeSet::from([nowhere])));
            assert!(!hook.is_stale(LOOPBACK, &BTreeSet::new()));
        }
        assert!(Hook::Uplink.is_stale(LOOPBACK, &BTreeSet::new()));
        assert_eq!((interface(LOOPBACK).as_deref(), interface(nowhere)), (Some("lo"), None));
    }

    #[test]
    fn pins_are_read_as_they_are_written() {
        for hook in Hook::ALL {
            assert_eq!(hook.ifindex(&hook.pin(17)), Some(17));
        }
        assert_eq!(Hook::Veth.ifindex("uplink_3"), None);
        assert_eq!(Hook::Framed.ifindex("framing_3"), None);
        assert_eq!(Hook::Veth.ifindex("veth_x"), None);
    }
}
