//! `cargo xtask fuzz`: looks for inputs that break a promise of `node_engine::fuzzing`, door by door.
//!
//! libFuzzer, with the coverage instrumentation that stable compilers have. What it finds interesting goes, where asked for, into the
//! corpora that every `cargo test` replays.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::process::{cargo, root, run};

/// What `tests/fuzz/rustc.sh` gives the compiler for the crates that take bytes apart.
const INSTRUMENTATION: &str = "-Cpasses=sancov-module \
    -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares";
/// No input of ours is longer before it is refused as too long.
const LONGEST: usize = 4_096;

/// What to fuzz, and how long.
#[derive(Debug)]
pub(crate) struct Plan {
    /// All of them where it is `None`.
    pub(crate) target: Option<String>,
    pub(crate) runs: u64,
    /// A door is left after so long, also with fewer inputs.
    pub(crate) minutes: Option<u64>,
    /// Take what was found interesting into the corpora.
    pub(crate) keep: bool,
}

pub(crate) fn fuzz(plan: &Plan) -> Result<()> {
    let program = build()?;
    let corpora = root().join("tests/fuzz/corpus");
    let targets = targets()?;
    let chosen: Vec<&String> =
        targets.iter().filter(|name| plan.target.as_ref().is_none_or(|wanted| wanted == *name)).collect();
    if chosen.is_empty() {
        bail!("there is no target {}; there are {}", plan.target.as_deref().unwrap_or_default(), targets.join(", "));
    }
    let mut broken = Vec::new();
    for name in chosen {
        let began = Instant::now();
        let found = root().join("target/fuzz/found").join(name);
        let corpus = corpora.join(name);
        for directory in [&found, &corpus] {
            fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
        }
        let Outcome { holds, tried } = look(&program, name, plan, &found, &corpus)?;
        println!(
            "{name}: {tried} inputs, {:.0} s, {}",
            began.elapsed().as_secs_f64(),
            if holds { "every promise held" } else { "BROKEN" }
        );
        if !holds {
            broken.push(name.as_str());
        }
        if plan.keep {
            keep(&program, name, &found, &corpus)?;
        }
    }
    if !broken.is_empty() {
        bail!(
            "promises were broken at {}: the inputs are in target/fuzz/broken, what was said in target/fuzz/said",
            broken.join(", ")
        );
    }
    Ok(())
}

fn build() -> Result<PathBuf> {
    let directory = root().join("tests/fuzz");
    let target = root().join("target/fuzz");
    run(cargo()
        .args(["build", "--release", "--manifest-path"])
        .arg(directory.join("Cargo.toml"))
        .arg("--target-dir")
        .arg(&target)
        .args(["--target", &host()?])
        .env("RUSTC_WRAPPER", directory.join("rustc.sh"))
        .env("FUZZ_INSTRUMENTATION", INSTRUMENTATION)
        .env("RUSTFLAGS", "--cfg=fuzzing"))?;
    Ok(target.join(host()?).join("release/node-engine-fuzz"))
}

fn host() -> Result<String> {
    let about = crate::process::output(Command::new("rustc").arg("-vV"))?;
    let host = about.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc does not say its host")?;
    Ok(host.to_owned())
}

/// The names of the table, as it stands in the source.
fn targets() -> Result<Vec<String>> {
    let path = root().join("node-engine/src/fuzzing.rs");
    let source = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let name = |line: &str| Some(line.trim().strip_prefix("Target { name: \"")?.split('"').next()?.to_owned());
    Ok(source.lines().filter_map(name).collect())
}

struct Outcome {
    /// No input has broken a promise.
    holds: bool,
    /// How many inputs there were.
    tried: u64,
}

fn look(program: &Path, name: &str, plan: &Plan, found: &Path, corpus: &Path) -> Result<Outcome> {
    let [broken, said] = ["broken", "said"].map(|kind| root().join("target/fuzz").join(kind).join(name));
    for directory in [&broken, &said] {
        fs::create_dir_all(directory).with_context(|| format!("cannot make {}", directory.display()))?;
    }
    let said = said.join("log");
    let log = fs::File::create(&said).with_context(|| format!("cannot make {}", said.display()))?;
    let mut command = fuzzer(program, name, corpus);
    command
        .arg(format!("-runs={}", plan.runs))
        .args(plan.minutes.map(|minutes| format!("-max_total_time={}", minutes * 60)))
        .arg(format!("-artifact_prefix={}/", broken.display()))
        .args(["-timeout=10", "-rss_limit_mb=2048", "-print_final_stats=1"])
        .args([found, corpus])
        .stderr(log);
    let ended = command.status().with_context(|| format!("cannot start {}", program.display()))?;
    let text = fs::read_to_string(&said).with_context(|| format!("cannot read {}", said.display()))?;
    let tried = text.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:")?.trim().parse().ok());
    Ok(Outcome { holds: ended.success(), tried: tried.unwrap_or_default() })
}

/// Adds to the corpus the fewest inputs that reach all that was reached.
fn keep(program: &Path, name: &str, found: &Path, corpus: &Path) -> Result<()> {
    let mut command = fuzzer(program, name, corpus);
    command.arg("-set_cover_merge=1").args([corpus, found]).stderr(Stdio::null());
    run(&mut command)
}

fn fuzzer(program: &Path, name: &str, seeds: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("FUZZ_TARGET", name).env("FUZZ_SEEDS", seeds).arg(format!("-max_len={LONGEST}"));
    command
}
