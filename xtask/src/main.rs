//! The project's own driver: everything a person or a CI job does with this repository is one `cargo xtask` command.
//!
//! `setup` and `build-ebpf` prepare, `lint` and `tidy` judge, `test`, `demo` and `bench` run, `ci` is all of it. Commands need
//! nothing but cargo at first; what else they need they install (`setup`) and say so.

mod bench;
mod bpf_toolchain;
mod build;
mod cache;
mod ci;
mod cross;
mod debian;
mod demo;
mod ebpf;
mod elf;
mod footprint;
mod fuzz;
mod lint;
mod process;
mod setup;
mod soak;
mod source;
mod test;
mod tidy;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::cross::Target;

#[derive(Debug, Parser)]
#[command(name = "cargo xtask", about = "Builds, checks and shows node-engine")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Install what is missing on this machine to build and test everything
    Setup {
        /// Only what building the eBPF programs needs
        #[arg(long)]
        ebpf: bool,
    },
    /// Build the eBPF programs into target/ebpf
    BuildEbpf,
    /// Build the daemon for this machine or another, with the eBPF programs in it, into target/cross
    Build {
        /// amd64, arm64 or armv7; this machine by default
        #[arg(long)]
        target: Option<Target>,
        /// As it is handed out: optimised, small, stripped
        #[arg(long)]
        release: bool,
    },
    /// Check format, clippy (host and eBPF) and tidiness
    Lint {
        /// Only clippy of the eBPF crate
        #[arg(long)]
        ebpf: bool,
    },
    /// Check the rules of the house that no compiler checks
    Tidy,
    /// Build everything and run every test, those that need root and Docker included
    Test {
        /// Only lab scenarios whose name contains this; no unit tests
        #[arg(long)]
        scenario: Option<String>,
        /// Only the overlay's lab scenarios, all of them, on this rung of the datapath
        #[arg(long, conflicts_with_all = ["scenario", "unit"])]
        rung: Option<test::Rung>,
        /// Only unit tests; no lab
        #[arg(long, conflicts_with = "scenario")]
        unit: bool,
        /// Tests of faults at their full size (72 hours without a cluster, 200 power cuts, 10,000 damaged files, 5 minutes without a
        /// broker)
        #[arg(long, conflicts_with_all = ["scenario", "rung", "target"])]
        full: bool,
        /// The unit tests of another machine (armv7), in an emulator of its processor, without those that need root
        #[arg(long, conflicts_with_all = ["scenario", "rung"])]
        target: Option<Target>,
    },
    /// Two nodes and a cluster on this machine: deploy, reach, measure, clean up
    Demo,
    /// Compare the datapaths with plain routing
    Bench {
        /// Handed to the bench program
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Look for inputs that make the daemon break a promise
    Fuzz {
        /// Only this door
        target: Option<String>,
        /// Inputs to try at each door
        #[arg(long, default_value_t = 1_000_000)]
        runs: u64,
        /// Leave each door after so long, also with fewer inputs
        #[arg(long)]
        minutes: Option<u64>,
        /// Take interesting inputs into the corpora under tests/fuzz, which `cargo test` replays
        #[arg(long)]
        keep: bool,
    },
    /// Measure what the daemon costs an idle node, and compare it with what is promised
    Footprint {
        /// Fewer starts and a shorter watch, as CI does
        #[arg(long)]
        short: bool,
    },
    /// Faults, deployments and traffic at random on two nodes of this machine; everything must be well again after each fault
    Soak(soak::Options),
    /// Boot other kernels in emulators: every program into the verifier, real packets, a node that joins a cluster
    Vm {
        /// amd64 or armv7
        #[arg(long, default_value = "amd64")]
        arch: Target,
        /// A version such as 6.1, the newest that Debian's archive has of it; `all`; 5.10, 6.1 and 6.12 by default
        #[arg(long)]
        kernel: Vec<String>,
    },
    /// lint, demo and test, as CI does
    Ci,
}

fn main() -> ExitCode {
    let outcome = match Args::parse().task {
        Task::Setup { ebpf: true } => setup::ebpf(),
        Task::Setup { ebpf: false } => setup::everything(),
        Task::BuildEbpf => ebpf::build().map(drop),
        Task::Build { target, release } => {
            target.map_or_else(Target::own, Ok).and_then(|target| build::run(target, release)).map(drop)
        }
        Task::Lint { ebpf: true } => ebpf::clippy(),
        Task::Lint { ebpf: false } => lint::run(),
        Task::Tidy => tidy::run(),
        Task::Test { scenario, rung, unit, full, target } => {
            test::run(&test::Selection { scenario, rung, unit, full, target })
        }
        Task::Demo => demo::run(),
        Task::Bench { arguments } => bench::run(&arguments),
        Task::Fuzz { target, runs, minutes, keep } => fuzz::fuzz(&fuzz::Plan { target, runs, minutes, keep }),
        Task::Footprint { short } => footprint::run(short),
        Task::Soak(options) => soak::run(&options),
        Task::Vm { arch, kernel } => vm::run(arch, &kernel),
        Task::Ci => ci::run(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
