//! How fast the overlay is, beside what there is without it: ratios of one run, never absolute figures.
//!
//! Everything is pinned to one core: two make TCP slower here (interrupts between them are dear) and reorder it.

pub mod load;
pub mod overlay;
pub mod report;
pub mod rig;

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result};

use load::{Case, Ends, measure};
use overlay::{Kind, Overlay};
use report::Report;
use rig::{Rig, Wire};

/// What to run, and how long.
#[derive(Clone, Debug)]
pub struct Plan {
    pub rounds: usize,
    pub time: Duration,
    pub wires: Vec<Wire>,
    pub cases: Vec<Case>,
    /// Empty: all of them.
    pub modes: Vec<String>,
    pub services: u32,
}

impl Plan {
    pub fn full() -> Self {
        Self {
            rounds: 5,
            time: Duration::from_secs(1),
            wires: vec![Wire::Pass, Wire::Seg],
            cases: Case::ALL.to_vec(),
            modes: Vec::new(),
            services: 1_000,
        }
    }

    /// A first look, in under a minute.
    pub fn quick() -> Self {
        Self {
            rounds: 3,
            time: Duration::from_millis(400),
            wires: vec![Wire::Pass],
            cases: vec![Case::TcpStream, Case::TcpRequests, Case::Connects],
            ..Self::full()
        }
    }
}

/// A way for packets, ready to be measured.
struct Mode {
    name: &'static str,
    ends: Ends,
    /// Kept while measured.
    _overlay: Option<Overlay>,
    _rig: Rig,
}

/// Measures what the plan says, modes alternating within each round.
///
/// # Errors
/// Where a mode cannot be set up, or carries nothing.
pub fn run(plan: &Plan) -> Result<Report> {
    pin_to_one_core()?;
    let mut report = Report::default();
    for wire in &plan.wires {
        let modes = modes(plan, *wire)?;
        for case in &plan.cases {
            for _ in 0..plan.rounds {
                for mode in &modes {
                    let sample = measure(*case, &mode.ends, plan.time)
                        .with_context(|| format!("mode {} on wire {}", mode.name, wire.name()))?;
                    report.add(*wire, *case, mode.name, sample);
                }
            }
        }
    }
    Ok(report)
}

fn modes(plan: &Plan, wire: Wire) -> Result<Vec<Mode>> {
    const NAMES: [&str; 7] = ["direct", "routed", "vxlan", "vxlan+dnat", "ebpf", "ebpf-bare", "tun"];
    let wanted = |name: &&str| plan.modes.is_empty() || plan.modes.iter().any(|mode| mode == name);
    let all = NAMES.into_iter().filter(wanted);
    all.map(|name| Mode::new(name, wire, plan.services).with_context(|| format!("cannot set up {name}"))).collect()
}

impl Mode {
    fn new(name: &'static str, wire: Wire, services: u32) -> Result<Self> {
        let mtu = if matches!(name, "direct" | "routed") { 1500 } else { 1450 };
        let rig = Rig::new(name, wire, mtu)?;
        let overlay = |kind| Overlay::new(&rig, kind, services);
        let (target, overlay): (IpAddr, _) = match name {
            "direct" => (rig.direct(wire)?, None),
            "routed" => (rig.route()?, None),
            "vxlan" => (rig.vxlan()?, None),
            "vxlan+dnat" => {
                rig.vxlan()?;
                (rig.dnat(services)?, None)
            }
            ours => {
                let overlay = overlay(match ours {
                    "tun" => Kind::Tun,
                    "ebpf-bare" => Kind::Bare,
                    _ => Kind::Framed,
                })?;
                (overlay.service(), Some(overlay))
            }
        };
        let [client, server] = &rig.sides;
        let ends = Ends { client: client.container_netns(), server: server.container_netns(), target };
        Ok(Self { name, ends, _overlay: overlay, _rig: rig })
    }
}

fn pin_to_one_core() -> Result<()> {
    let mut cores = nix::sched::CpuSet::new();
    cores.set(0)?;
    nix::sched::sched_setaffinity(nix::unistd::Pid::from_raw(0), &cores).context("cannot pin to one core")
}
