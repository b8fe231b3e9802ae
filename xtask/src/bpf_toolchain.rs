//! Which compiler and linker can build for the kernel's eBPF machine.
//!
//! Two kinds of compiler can: one that comes with a prebuilt `core` for `bpfel-unknown-none` (Debian's `rustc-web` with
//! `libstd-rust-web-dev-bpf`), and a nightly with `rust-src`, which builds `core` itself. The linker has to read the bitcode of
//! the compiler it serves, so it is built against that compiler's own libLLVM.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache;
use crate::process::{cargo, output, run, which, without_leaks};

pub(crate) const TARGET: &str = "bpfel-unknown-none";

/// The release of bpf-linker this project is built with.
const LINKER_VERSION: &str = "0.13.0";

/// Everything needed to build the programs.
#[derive(Debug)]
pub(crate) struct Toolchain {
    pub(crate) compiler: Compiler,
    pub(crate) linker: PathBuf,
}

#[derive(Clone, Debug)]
pub(crate) struct Compiler {
    pub(crate) rustc: PathBuf,
    pub(crate) core: Core,
    llvm_major: u32,
}

/// Where `core` for the eBPF machine comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Core {
    Prebuilt,
    /// `-Z build-std=core`
    FromSource,
}

/// What is there now, without installing anything.
pub(crate) fn find() -> Result<Toolchain> {
    let compiler = compiler()?;
    let linker = linker(&compiler)?;
    Ok(Toolchain { compiler, linker })
}

/// The first compiler that can; the error holds the reason of each that cannot.
pub(crate) fn compiler() -> Result<Compiler> {
    if let Some(chosen) = env::var_os("NODE_ENGINE_BPF_RUSTC") {
        return examine(Path::new(&chosen)).context("NODE_ENGINE_BPF_RUSTC cannot build for eBPF");
    }
    let mut reasons = String::new();
    for candidate in candidates() {
        match examine(&candidate) {
            Ok(found) => return Ok(found),
            Err(reason) => reasons.push_str(&format!("\n  {}: {reason:#}", candidate.display())),
        }
    }
    bail!(
        "no compiler here can build for eBPF; one of these helps:\n  \
         apt-get install rustc-web libstd-rust-web-dev-bpf        (Debian 12 and later)\n  \
         rustup toolchain install nightly --component rust-src    (elsewhere)\nlooked at:{reasons}"
    )
}

fn candidates() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = which("rustc").into_iter().collect();
    found.push("/usr/bin/rustc".into());
    let nightly = output(without_leaks(Command::new("rustup").args(["which", "rustc", "--toolchain", "nightly"])));
    found.extend(nightly.ok().map(|path| PathBuf::from(path.trim())));
    found.dedup();
    found
}

fn examine(rustc: &Path) -> Result<Compiler> {
    let ask = |arguments: &[&str]| output(without_leaks(Command::new(rustc).args(arguments)));
    let version = ask(&["-vV"])?;
    let field = |name: &str| version.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let llvm_major = field("LLVM version:")
        .and_then(|version| version.split('.').next()?.parse().ok())
        .context("it does not tell its LLVM version")?;
    let compiler = |core| Compiler { rustc: rustc.to_owned(), core, llvm_major };

    let libraries = ask(&["--print", "target-libdir", "--target", TARGET])?;
    if holds_core(Path::new(libraries.trim())) {
        return Ok(compiler(Core::Prebuilt));
    }
    let sysroot = ask(&["--print", "sysroot"])?;
    let source = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core");
    if !source.is_dir() {
        bail!("it has neither a prebuilt core for {TARGET} nor rust-src");
    }
    if !field("release:").is_some_and(|release| release.contains("nightly") || release.contains("dev")) {
        bail!("it has no prebuilt core for {TARGET}, and only a nightly builds one from rust-src");
    }
    Ok(compiler(Core::FromSource))
}

fn holds_core(directory: &Path) -> bool {
    let Ok(entries) = fs::read_dir(directory) else { return false };
    entries.flatten().any(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.starts_with("libcore-") && name.ends_with(".rlib")
    })
}

/// The linker for this compiler: the one named in the environment, or ours in the cache.
fn linker(compiler: &Compiler) -> Result<PathBuf> {
    if let Some(chosen) = env::var_os("NODE_ENGINE_BPF_LINKER") {
        let chosen = PathBuf::from(chosen);
        if !chosen.is_file() {
            bail!("NODE_ENGINE_BPF_LINKER names {}, which is no file", chosen.display());
        }
        return Ok(chosen);
    }
    let path = linker_cache()?.join("bin/bpf-linker");
    let version = output(Command::new(&path).arg("--version"))
        .context("bpf-linker is not installed; run `cargo xtask setup --ebpf`")?;
    if version.split_whitespace().nth(1) != Some(LINKER_VERSION) {
        bail!("{} is {}, not {LINKER_VERSION}; run `cargo xtask setup --ebpf`", path.display(), version.trim());
    }
    let library = llvm_of(&path)?;
    if llvm_major(&library) != Some(compiler.llvm_major) {
        bail!(
            "{} reads another LLVM ({}) than the compiler writes ({}); run `cargo xtask setup --ebpf`",
            path.display(),
            library.display(),
            compiler.llvm_major
        );
    }
    Ok(path)
}

fn linker_cache() -> Result<PathBuf> {
    cache::directory("bpf-linker")
}

/// Installs bpf-linker for the compiler unless it is there already.
pub(crate) fn ensure_linker(compiler: &Compiler) -> Result<PathBuf> {
    if let Ok(found) = linker(compiler) {
        return Ok(found);
    }
    let cache = linker_cache()?;
    let rustc = fs::canonicalize(&compiler.rustc)?;
    let library = llvm_of(&rustc)?;
    println!("installing bpf-linker {LINKER_VERSION} into {} (about a minute)", cache.display());

    let prefix = cache.join("llvm");
    let libraries = prefix.join("lib");
    fs::create_dir_all(&libraries).with_context(|| format!("cannot make {}", libraries.display()))?;
    let name = library.file_name().context("libLLVM has no file name")?;
    for link in [libraries.join("libLLVM.so"), libraries.join(name)] {
        match fs::remove_file(&link) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot replace {}", link.display()));
            }
            _ => {}
        }
        std::os::unix::fs::symlink(&library, &link).with_context(|| format!("cannot make {}", link.display()))?;
    }
    let mut install = cargo();
    without_leaks(&mut install)
        .current_dir("/")
        .env("LLVM_PREFIX", &prefix)
        .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
        .args(["install", "bpf-linker", "--version", LINKER_VERSION, "--locked", "--force", "--no-default-features"])
        .args(["--features", &format!("llvm-{}", compiler.llvm_major), "--root"])
        .arg(&cache);
    run(&mut install).context("bpf-linker could not be built; NODE_ENGINE_BPF_LINKER may name another one")?;
    linker(compiler)
}

/// The libLLVM a program is linked with, found as the dynamic linker finds it.
fn llvm_of(program: &Path) -> Result<PathBuf> {
    let listing = output(Command::new("ldd").arg(program))?;
    listing
        .lines()
        .filter(|line| line.trim_start().starts_with("libLLVM"))
        .find_map(|line| line.split_whitespace().nth(2))
        .map(PathBuf::from)
        .with_context(|| format!("{} is not linked with a shared libLLVM", program.display()))
}

/// 22 of `libLLVM.so.22.1` and of `libLLVM.so.22.1-rust-1.95.0-stable`.
fn llvm_major(library: &Path) -> Option<u32> {
    library.file_name()?.to_str()?.strip_prefix("libLLVM.so.")?.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llvm_major_is_read_from_either_name() {
        for (name, major) in [
            ("/usr/lib/x86_64-linux-gnu/libLLVM.so.22.1", Some(22)),
            ("/x/lib/libLLVM.so.21.1-rust-1.95.0-stable", Some(21)),
            ("/usr/lib/libLLVM-17.so", None),
        ] {
            assert_eq!(llvm_major(Path::new(name)), major, "{name}");
        }
    }
}
