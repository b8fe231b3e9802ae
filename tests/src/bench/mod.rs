//! How fast the overlay is, beside what there is without it: ratios of one run, never absolute figures.

pub mod case;
pub mod cores;
pub mod goals;
pub mod load;
pub mod mode;
pub mod overlay;
pub mod plot;
pub mod programs;
pub mod readme;
pub mod report;
pub mod rig;
pub mod scale;
pub mod table;
pub mod vpn;

use std::time::Duration;

use anyhow::{Result, ensure};

use case::{Case, Ground};
use mode::{ACROSS, Mode, WITHIN};
use report::Report;

/// What to run, and how long.
#[derive(Clone, Debug)]
pub struct Plan {
    pub rounds: usize,
    pub time: Duration,
    pub grounds: Vec<Ground>,
    pub cases: Vec<Case>,
    pub modes: Vec<&'static str>,
    pub services: u32,
    /// Also the programs by themselves.
    pub programs: bool,
    /// Also what there may be of everything.
    pub scale: bool,
}

impl Plan {
    pub fn full() -> Self {
        Self {
            // Many short ones: what disturbs a machine is shorter than a long measurement, and falls into few of these.
            rounds: 31,
            time: Duration::from_millis(60),
            grounds: vec![Ground::PASS, Ground::SEG, Ground::PASS_JUMBO, Ground::SEG_JUMBO],
            cases: Case::ALL.to_vec(),
            modes: ACROSS.into_iter().chain(WITHIN).collect(),
            services: 1_000,
            programs: true,
            scale: true,
        }
    }

    /// A first look, in under a minute.
    pub fn quick() -> Self {
        Self {
            rounds: 7,
            time: Duration::from_millis(100),
            grounds: vec![Ground::PASS],
            cases: vec![Case::TcpStream, Case::TcpRequests, Case::Connects],
            scale: false,
            ..Self::full()
        }
    }

    /// Large frames change what a stream costs, and nothing else.
    fn cases_on(&self, ground: Ground) -> Vec<Case> {
        let jumbo = ground.mtu != Ground::USUAL_MTU;
        self.cases.iter().copied().filter(|case| !jumbo || *case == Case::TcpStream).collect()
    }

    /// No wire is between the containers of one node; and what large frames are for is a network card.
    fn modes_on(&self, ground: Ground) -> Vec<&'static str> {
        let jumbo = ground.mtu != Ground::USUAL_MTU;
        let wanted = |mode: &&str| match *mode {
            "bridge" | "local" => ground == Ground::PASS,
            "ebpf-instance" | "wireguard-go" => !jumbo,
            _ => true,
        };
        self.modes.iter().copied().filter(wanted).collect()
    }
}

/// Measures what the plan says, modes alternating within each round. The report has what was measured also where something failed.
///
/// # Errors
/// Where a mode cannot be set up, or carries nothing.
pub fn run(plan: &Plan, report: &mut Report) -> Result<()> {
    if plan.programs {
        cores::pin(&[0], &[])?;
        report.programs = programs::measure()?;
    }
    for ground in &plan.grounds {
        let measured = measure(plan, *ground, report);
        report.in_order(&plan.modes);
        report.derive(*ground);
        measured?;
    }
    if plan.scale {
        cores::pin(&[0, 1][..cores::count().min(2)], &[])?;
        scale::run(&mut report.scale)?;
    }
    Ok(())
}

fn measure(plan: &Plan, ground: Ground, report: &mut Report) -> Result<()> {
    let cases = plan.cases_on(ground);
    let modes: Vec<Mode> =
        plan.modes_on(ground).into_iter().map(|mode| Mode::new(mode, ground, plan.services)).collect::<Result<_>>()?;
    for case in cases {
        ensure!(cores::count() >= case.cores().len(), "{} needs {} cores", case.name(), case.cores().len());
        for round in 0..plan.rounds {
            // There and back: a drift of the machine favours nobody.
            let order: Vec<&Mode> = if round % 2 == 0 { modes.iter().collect() } else { modes.iter().rev().collect() };
            for mode in order {
                report.add(ground, case, mode.name, &mode.measure(case, plan.time)?);
            }
        }
    }
    Ok(())
}
