//! Building the daemon for another machine than this one.
//!
//! Two kinds of compiler can: this checkout's own, where rustup has brought it the other machine's standard library, and Debian's
//! `rustc-web`, whose standard library for the other architecture is taken out of that architecture's package and put into a sysroot
//! of our own, beside the compiler's. Either links by Debian's cross gcc.

use std::fmt;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, Result, bail};

use crate::cache;
use crate::debian::Archive;
use crate::process::{cargo, output, root, which, without_leaks};

/// A machine the daemon is built for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    Amd64,
    Arm64,
    Armv7,
}

/// How to build for a target.
#[derive(Debug)]
pub(crate) struct Toolchain {
    target: Target,
    rustc: PathBuf,
    /// Beside the compiler's own, where that lacks the target's standard library.
    sysroot: Option<PathBuf>,
    linker: PathBuf,
}

impl Target {
    pub(crate) fn triple(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-unknown-linux-gnu",
            Self::Arm64 => "aarch64-unknown-linux-gnu",
            Self::Armv7 => "armv7-unknown-linux-gnueabihf",
        }
    }

    /// Debian's name for the architecture.
    pub(crate) fn debian(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
            Self::Armv7 => "armhf",
        }
    }

    /// The prefix of the tools that make programs for it.
    fn tools(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-linux-gnu",
            Self::Arm64 => "aarch64-linux-gnu",
            Self::Armv7 => "arm-linux-gnueabihf",
        }
    }

    /// This machine.
    pub(crate) fn own() -> Result<Self> {
        let own = [Self::Amd64, Self::Arm64, Self::Armv7].into_iter().find(|target| target.is_native());
        own.with_context(|| format!("the daemon is not built for {}", std::env::consts::ARCH))
    }

    /// Is it this machine's own?
    pub(crate) fn is_native(self) -> bool {
        match self {
            Self::Amd64 => cfg!(target_arch = "x86_64"),
            Self::Arm64 => cfg!(target_arch = "aarch64"),
            Self::Armv7 => cfg!(target_arch = "arm"),
        }
    }

    pub(crate) fn gcc(self) -> String {
        if self.is_native() { "cc".to_owned() } else { format!("{}-gcc", self.tools()) }
    }

    /// Debian's packages with compiler, linker and C library.
    pub(crate) fn packages(self) -> [String; 2] {
        if self.is_native() {
            return ["gcc", "libc6-dev"].map(str::to_owned);
        }
        [format!("gcc-{}", self.tools().replace('_', "-")), format!("libc6-dev-{}-cross", self.debian())]
    }

    /// Boards have C libraries of every age, and no library of a GPU's driver that would have to be opened: there the program brings
    /// its own.
    fn is_static(self) -> bool {
        self == Self::Armv7
    }

    /// Runs programs of the target on this machine, as far as they need no kernel of it.
    pub(crate) fn emulator(self) -> Option<&'static str> {
        match self {
            _ if self.is_native() => None,
            Self::Amd64 => Some("qemu-x86_64-static"),
            Self::Arm64 => Some("qemu-aarch64-static"),
            Self::Armv7 => Some("qemu-arm-static"),
        }
    }

    fn variable(self, name: &str) -> String {
        format!("CARGO_TARGET_{}_{name}", self.triple().replace('-', "_").to_uppercase())
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "amd64" | "x86_64" => Ok(Self::Amd64),
            "arm64" | "aarch64" => Ok(Self::Arm64),
            "armv7" | "arm-7" | "armhf" => Ok(Self::Armv7),
            _ => Err("amd64, arm64 or armv7".to_owned()),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
            Self::Armv7 => "armv7",
        })
    }
}

impl Toolchain {
    /// The first that can; the error holds the reason of each that cannot.
    pub(crate) fn find(target: Target) -> Result<Self> {
        let Some(linker) = which(&target.gcc()) else {
            bail!("{} is not installed (package {})", target.gcc(), target.packages()[0]);
        };
        let own = own_rustc()?;
        let debians = PathBuf::from("/usr/bin/rustc");
        let attempts: [(&str, &dyn Fn() -> Result<Self>); 2] = [
            ("own", &|| Self { target, rustc: own.clone(), sysroot: None, linker: linker.clone() }.tried()),
            ("debian", &|| {
                let sysroot = Some(sysroot(&debians, target)?);
                Self { target, rustc: debians.clone(), sysroot, linker: linker.clone() }.tried()
            }),
        ];
        let mut reasons = String::new();
        for (name, attempt) in attempts {
            match attempt() {
                Ok(found) => return Ok(found),
                Err(reason) => reasons.push_str(&format!("\n  {name}: {}", brief(&format!("{reason:#}")))),
            }
        }
        bail!(
            "no compiler here can build for {target}; one of these helps:\n  \
             rustup target add {}\n  \
             apt-get install rustc-web libstd-rust-web-dev    (Debian 12 and later)\nlooked at:{reasons}",
            target.triple()
        )
    }

    /// Is the standard library there, and by this very compiler? One of another build is refused only when something uses it.
    fn tried(self) -> Result<Self> {
        let directory = tempfile::tempdir().context("no room for a trial")?;
        let program = directory.path().join("trial.rs");
        fs::write(&program, "fn main() { println!(\"{}\", std::env::args().count()); }")
            .context("cannot write a trial")?;
        let mut trial = Command::new(&self.rustc);
        without_leaks(&mut trial).args(["--target", self.target.triple(), "--emit", "metadata", "--out-dir"]);
        trial.arg(directory.path()).args(self.flags()).arg(&program);
        output(&mut trial)?;
        Ok(self)
    }

    /// The compiler alone, for a program of one file: small, and without need of a library.
    pub(crate) fn rustc(&self) -> Command {
        let mut command = Command::new(&self.rustc);
        without_leaks(&mut command).current_dir(root()).args(["--edition", "2024", "--target", self.target.triple()]);
        command.args(["-O", "-Cpanic=abort", "-Cstrip=symbols", "-Ctarget-feature=+crt-static"]);
        command.arg(format!("-Clinker={}", self.linker.display())).args(self.flags());
        command
    }

    fn flags(&self) -> Vec<String> {
        let mut flags = Vec::new();
        if let Some(sysroot) = &self.sysroot {
            flags.push(format!("--sysroot={}", sysroot.display()));
        }
        if self.target.is_static() {
            flags.push("-Ctarget-feature=+crt-static".to_owned());
        }
        if self.target == Target::Armv7 {
            // Every armv7 has the short form of instructions, and code is a third smaller in it. The compiler calls the name unstable.
            flags.push("-Ctarget-feature=+thumb-mode".to_owned());
        }
        flags
    }

    /// `cargo <verb>` for the target. Another compiler's products have a directory of their own: those of this checkout stay warm.
    pub(crate) fn cargo(&self, verb: &str) -> Command {
        let mut command = cargo();
        without_leaks(&mut command)
            .env("RUSTC", &self.rustc)
            .env(self.target.variable("LINKER"), &self.linker)
            .env(self.target.variable("RUSTFLAGS"), self.flags().join(" "))
            .env(format!("CC_{}", self.target.triple().replace('-', "_")), &self.linker);
        if let Some(emulator) = self.target.emulator() {
            command.env(self.target.variable("RUNNER"), emulator);
        }
        command.args([verb, "--target", self.target.triple(), "--target-dir"]).arg(directory());
        command
    }
}

/// This checkout's compiler itself. rustup's stand-in would choose anew in the directory of each crate, and some come with a choice of
/// their own.
fn own_rustc() -> Result<PathBuf> {
    let rustc = which("rustc").context("there is no rustc")?;
    let sysroot = output(without_leaks(&mut Command::new(&rustc)).current_dir(root()).args(["--print", "sysroot"]))?;
    let itself = Path::new(sysroot.trim()).join("bin/rustc");
    Ok(if itself.is_file() { itself } else { rustc })
}

/// Where products for other machines are.
pub(crate) fn directory() -> PathBuf {
    root().join("target/cross")
}

/// The compiler's own sysroot with the target's standard library added, in the cache.
fn sysroot(rustc: &Path, target: Target) -> Result<PathBuf> {
    let version = output(Command::new(rustc).arg("-vV")).context("Debian's compiler")?;
    let release = version.lines().find_map(|line| line.strip_prefix("release: ")).context("it tells no release")?;
    let own = output(Command::new(rustc).args(["--print", "sysroot"]))?;
    let own = Path::new(own.trim());
    let sysroot = cache::directory("sysroot")?.join(format!("{target}-{release}"));
    let libraries = sysroot.join("lib/rustlib");
    let there = libraries.join(target.triple());
    if !there.join("lib").is_dir() {
        let unpacked = standard_library(target, release)?;
        fs::create_dir_all(&libraries).with_context(|| format!("cannot make {}", libraries.display()))?;
        link(&unpacked.join("usr/lib/rustlib").join(target.triple()), &there)?;
    }
    // Debian keeps the compiler's libraries where the architecture's are, and finds them from the sysroot by these links.
    for entry in fs::read_dir(own.join("lib/rustlib")).context("the compiler has no libraries")?.flatten() {
        if entry.file_name() != *target.triple() {
            link(&entry.path(), &libraries.join(entry.file_name()))?;
        }
    }
    Ok(sysroot)
}

/// The package with the standard library of exactly this release; the compiler refuses any other.
fn standard_library(target: Target, release: &str) -> Result<PathBuf> {
    let archive = Archive::open(target.debian())?;
    for name in ["libstd-rust-web-dev", "libstd-rust-dev"] {
        let fitting = archive.versions(name)?.into_iter().find(|package| package.version.starts_with(release));
        if let Some(package) = fitting {
            return archive.unpacked(&package);
        }
    }
    bail!("Debian has no standard library {release} for {}", target.debian())
}

fn link(to: &Path, from: &Path) -> Result<()> {
    if fs::read_link(from).is_ok_and(|present| present == to) {
        return Ok(());
    }
    let _ = fs::remove_file(from);
    symlink(to, from).with_context(|| format!("cannot make {}", from.display()))
}

fn brief(text: &str) -> String {
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).take(3).collect();
    lines.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_have_names_and_names_targets() {
        for (names, target, gcc) in [
            (["amd64", "x86_64"], Target::Amd64, "x86_64-linux-gnu-gcc"),
            (["arm64", "aarch64"], Target::Arm64, "aarch64-linux-gnu-gcc"),
            (["armv7", "arm-7"], Target::Armv7, "arm-linux-gnueabihf-gcc"),
        ] {
            let gcc = if target.is_native() { "cc" } else { gcc };
            for name in names {
                assert_eq!(name.parse(), Ok(target));
            }
            assert_eq!(target.to_string().parse(), Ok(target));
            assert_eq!(target.gcc(), gcc);
        }
        assert_eq!("mips".parse::<Target>(), Err("amd64, arm64 or armv7".to_owned()));
        assert_eq!(Target::Armv7.variable("LINKER"), "CARGO_TARGET_ARMV7_UNKNOWN_LINUX_GNUEABIHF_LINKER");
    }
}
