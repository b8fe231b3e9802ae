//! `cargo xtask vm`: the daemon and its programs under other kernels and on another processor, in emulators.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::build;
use crate::cross::{self, Target, Toolchain};
use crate::debian::{Archive, Package};
use crate::process::{self, cargo, output, which};
use crate::{ebpf, setup, test};

/// Kernels that are tried where none is named: each of Debian's releases that are looked after, as far as they differ.
const USUAL: [&str; 3] = ["5.10", "6.1", "6.12"];
/// Programs of the test suite that need no more than a kernel.
const TESTS: [&str; 2] = ["kernel_equals_law", "datapath"];

pub(crate) fn run(target: Target, kernels: &[String]) -> Result<()> {
    test::require_root()?;
    setup::everything()?;
    setup::emulators(&emulator(target)?)?;
    ebpf::build()?;
    test::build_programs()?;
    // Of this machine the one that everything else is tested with.
    let daemon = match target.is_native() {
        true => process::root().join("target/debug/node-engine"),
        false => build::run(target, true)?,
    };
    let tests = test_programs(target)?;

    let archive = Archive::open(target.debian())?;
    let mut command = test::lab();
    command.args(["vm", &target.to_string(), "--daemon"]).arg(daemon).arg("--busybox").arg(busybox(target, &archive)?);
    command.arg("--probe").arg(probe(target)?);
    for program in tests {
        command.arg("--test").arg(program);
    }
    let kernels = wanted(&archive, target, kernels)?;
    for directory in kernels {
        command.arg("--kernel").arg(directory);
    }
    process::run(&mut command)
}

fn emulator(target: Target) -> Result<Vec<(&'static str, &'static str)>> {
    let emulator = match target {
        Target::Amd64 => ("qemu-system-x86_64", "qemu-system-x86"),
        Target::Armv7 => ("qemu-system-arm", "qemu-system-arm"),
        Target::Arm64 => bail!("there is no guest of this kind; amd64 and armv7 are emulated"),
    };
    Ok(vec![emulator, ("xz", "xz-utils"), ("strip", "binutils")])
}

/// The kernels' packages, unpacked. One that the archive does not have is told and passed over, unless none is left.
fn wanted(archive: &Archive, target: Target, series: &[String]) -> Result<Vec<PathBuf>> {
    let offered = offered(archive, target)?;
    let parsed = |name: &str| number(name).with_context(|| format!("{name} is no kernel version such as 6.1"));
    let series: Vec<(u64, u64)> = match series {
        [] => USUAL.into_iter().map(parsed).collect::<Result<_>>()?,
        [all] if all == "all" => offered.keys().copied().collect(),
        named => named.iter().map(|name| parsed(name)).collect::<Result<_>>()?,
    };
    let mut found = Vec::new();
    for (major, minor) in series {
        match offered.get(&(major, minor)) {
            Some(package) => found.push(archive.unpacked(package)?),
            None => eprintln!("skipped: Debian's archive has no kernel {major}.{minor} for {target}"),
        }
    }
    ensure!(!found.is_empty(), "none of these kernels is to be had");
    Ok(found)
}

/// The newest package of each series.
fn offered(archive: &Archive, target: Target) -> Result<BTreeMap<(u64, u64), Package>> {
    let pattern = match target {
        Target::Armv7 => r"^linux-image-[0-9][0-9.]*[^ ]*[0-9]-armmp$",
        _ => r"^linux-image-[0-9][^ ]*-cloud-amd64(-unsigned)?$",
    };
    let mut newest: BTreeMap<(u64, u64), Package> = BTreeMap::new();
    for package in archive.versions_of(&archive.names(pattern)?)? {
        let Some(series) = number(&package.version) else { continue };
        let known = newest.get(&series).map(|known| digits(&known.version));
        if known.is_none_or(|known| known < digits(&package.version)) {
            newest.insert(series, package);
        }
    }
    Ok(newest)
}

/// `6.12` of `6.12.95-1~bpo12+1`.
fn number(version: &str) -> Option<(u64, u64)> {
    let mut numbers = version.split(['.', '-', '~', '+']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// To be compared: all numbers in it.
fn digits(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

/// The test programs for the target, built as the target's own tests are.
fn test_programs(target: Target) -> Result<Vec<PathBuf>> {
    // Real packets want iproute2 in the guest, which is taken from this machine.
    let tests = if target.is_native() { &TESTS[..] } else { &TESTS[..1] };
    let mut command = if target.is_native() { cargo() } else { build::toolchain(target)?.cargo("test") };
    match target.is_native() {
        // As every test is built, so that nothing is built twice.
        true => command.args(["test", "--workspace", "--exclude", "lab", "--exclude", "netmanager-ebpf"]),
        false => command.args(["--package", "node-engine"]),
    };
    command.arg("--no-run").args(tests.iter().flat_map(|test| ["--test", test]));
    process::run(&mut command)?;
    let messages = output(command.args(["--message-format", "json"]))?;
    let programs: Vec<PathBuf> = messages.lines().filter_map(executable).filter(|path| is_test(path, tests)).collect();
    ensure!(programs.len() == tests.len(), "cargo names {programs:?} and not {tests:?}");
    Ok(programs)
}

/// `"executable":"/path"` of one of cargo's messages.
fn executable(message: &str) -> Option<PathBuf> {
    let rest = message.split_once(r#""executable":""#)?.1;
    Some(rest.split('"').next()?.into())
}

fn is_test(path: &Path, tests: &[&str]) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    tests.iter().any(|test| name.starts_with(&format!("{test}-")))
}

/// A static busybox for the guest: this machine's own, or out of the package of its architecture.
fn busybox(target: Target, archive: &Archive) -> Result<PathBuf> {
    if target.is_native() {
        return which("busybox").context("busybox is missing");
    }
    let newest = archive.versions("busybox-static")?.into_iter().next().context("Debian has no busybox-static")?;
    let unpacked = archive.unpacked(&newest)?;
    let places = ["usr/bin/busybox", "bin/busybox"].map(|place| unpacked.join(place));
    places.into_iter().find(|place| place.is_file()).context("there is no busybox in its package")
}

/// The lab's traffic program for the guest.
fn probe(target: Target) -> Result<PathBuf> {
    let toolchain: Toolchain = build::toolchain(target)?;
    let directory = cross::directory().join(target.triple());
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    let program = directory.join("probe");
    process::run(toolchain.rustc().arg("-o").arg(&program).arg(process::root().join("tests/src/bin/probe.rs")))?;
    Ok(program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newer_versions_are_greater() {
        assert_eq!(number("6.12.95-1~bpo12+1"), Some((6, 12)));
        assert_eq!(number("7.3~rc1"), Some((7, 3)));
        assert_eq!(number("6"), None);
        assert!(digits("5.10.262-1") > digits("5.10.46-4"));
        assert!(digits("6.12.117-1") < digits("6.12.118-1"));
    }

    #[test]
    fn programs_are_read_from_cargos_messages() {
        let message = r#"{"reason":"compiler-artifact","executable":"/t/deps/datapath-12ab","fresh":true}"#;
        let path = executable(message).expect("there is one");
        assert!(is_test(&path, &TESTS), "{}", path.display());
        assert_eq!(executable(r#"{"executable":null}"#), None);
        assert!(!is_test(Path::new("/t/deps/command_line-12ab"), &TESTS));
    }
}
