//! Builds the eBPF programs: always release, always the same bytes from the same sources.

use std::env;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::bpf_toolchain::{self, Core, TARGET, Toolchain};
use crate::elf;
use crate::process::{cargo, root, run, without_leaks};
use crate::setup;

const PACKAGE: &str = "netmanager-ebpf";

/// Where the finished object lies.
pub(crate) fn object() -> PathBuf {
    root().join("target/ebpf").join(TARGET).join("release/netmanager")
}

/// Builds and returns the object, installing the toolchain first if there is none.
pub(crate) fn build() -> Result<PathBuf> {
    if let Some(given) = env::var_os("NODE_ENGINE_EBPF_OBJECT").map(PathBuf::from) {
        if !given.is_file() {
            bail!("NODE_ENGINE_EBPF_OBJECT names {}, which is no file", given.display());
        }
        println!("eBPF: {} as NODE_ENGINE_EBPF_OBJECT says", given.display());
        return Ok(given);
    }
    let toolchain = toolchain()?;
    run(&mut build_command(&toolchain, "build"))?;
    let object = object();
    println!("eBPF: {}", object.display());
    for function in elf::functions(&object)? {
        println!("  {:12} {:32} {:6} instructions", function.section, function.name, function.bytes / 8);
    }
    Ok(object)
}

/// Builds the object whose rows are those of a test's other layout, and returns it.
pub(crate) fn build_other_layout() -> Result<PathBuf> {
    let toolchain = toolchain()?;
    let directory = root().join("target/ebpf-other");
    // What comes later counts.
    run(build_command(&toolchain, "build").args(["--features", "other-layout", "--target-dir"]).arg(&directory))?;
    Ok(directory.join(TARGET).join("release/netmanager"))
}

/// The toolchain, installed if need be.
pub(crate) fn toolchain() -> Result<Toolchain> {
    bpf_toolchain::find().or_else(|_| {
        setup::ebpf()?;
        bpf_toolchain::find()
    })
}

/// `cargo <verb>` of the eBPF crate with everything that makes it reproducible.
pub(crate) fn build_command(toolchain: &Toolchain, verb: &str) -> Command {
    let compiler = &toolchain.compiler;
    let mut command = cargo();
    without_leaks(&mut command)
        .env("RUSTC", &compiler.rustc)
        .env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", &toolchain.linker)
        .env("CARGO_ENCODED_RUSTFLAGS", flags().join("\x1f"))
        .args([verb, "--package", PACKAGE, "--bins", "--release", "--target", TARGET])
        .env("CARGO_TARGET_DIR", root().join("target/ebpf"));
    match compiler.core {
        // The crate's name, not `1`: only aya-ebpf needs unstable features, everything else stays stable.
        Core::Prebuilt => command.env("RUSTC_BOOTSTRAP", "aya_ebpf"),
        Core::FromSource => command.env("RUSTC_BOOTSTRAP", "1").args(["-Z", "build-std=core"]),
    };
    command
}

fn flags() -> Vec<String> {
    let mut flags = vec![
        format!("--cfg=bpf_target_arch=\"{}\"", env::consts::ARCH),
        "-Cdebuginfo=2".into(),
        "-Clink-arg=--btf".into(),
        "-Ctarget-cpu=v3".into(),
        format!("--remap-path-prefix={}=/node-engine", root().display()),
    ];
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    if let Some(home) = home.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo"))) {
        flags.push(format!("--remap-path-prefix={}=/cargo", home.display()));
    }
    flags
}

/// Clippy with the lints of the workspace, by the clippy that belongs to the compiler.
pub(crate) fn clippy() -> Result<()> {
    let toolchain = toolchain()?;
    let build = build_command(&toolchain, "clippy");
    let mut command = match toolchain.compiler.core {
        Core::FromSource => build,
        Core::Prebuilt => {
            let beside = toolchain.compiler.rustc.with_file_name("cargo-clippy");
            if !beside.is_file() {
                setup::ebpf()?;
            }
            let mut command = Command::new(&beside);
            command.current_dir(root()).env("CARGO", cargo().get_program()).args(build.get_args());
            for (name, value) in build.get_envs() {
                match value {
                    Some(value) => command.env(name, value),
                    None => command.env_remove(name),
                };
            }
            command
        }
    };
    run(command.args(["--", "-D", "warnings"])).context("clippy of the eBPF programs")
}
