//! Installs what is missing: nothing is asked for twice, nothing that is there is touched.

use std::env;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::bpf_toolchain;
use crate::cross::{Target, Toolchain};
use crate::elf;
use crate::process::{as_root, cargo, output, run, which};

/// A program the tests need, the package that brings it, and what for.
struct Need {
    program: &'static str,
    package: &'static str,
    purpose: &'static str,
}

/// For guests of this machine's architecture.
const QEMU: (&str, &str) = if cfg!(target_arch = "aarch64") {
    ("qemu-system-aarch64", "qemu-system-arm")
} else {
    ("qemu-system-x86_64", "qemu-system-x86")
};

const NEEDS: &[Need] = &[
    Need { program: "cc", package: "gcc libc6-dev", purpose: "links Rust programs" },
    Need { program: "dockerd", package: "docker.io", purpose: "runs containers in the simulated hosts" },
    Need { program: "containerd", package: "containerd", purpose: "is what dockerd works through" },
    Need { program: "runc", package: "runc", purpose: "starts containers" },
    Need { program: "iptables", package: "iptables", purpose: "is what dockerd filters with" },
    Need { program: "busybox", package: "busybox-static", purpose: "is the user land of the test image" },
    Need { program: "mosquitto", package: "mosquitto", purpose: "is a real broker for the cluster" },
    Need { program: "faketime", package: "faketime", purpose: "lets a clock jump by years" },
    Need { program: "mosquitto_pub", package: "mosquitto-clients", purpose: "speaks to the broker as a foreigner" },
    Need { program: "iperf3", package: "iperf3", purpose: "measures streams" },
    Need { program: "nft", package: "nftables", purpose: "shows the packet filter" },
    Need { program: "ip", package: "iproute2", purpose: "builds and shows namespaces and links" },
    Need { program: "ping", package: "iputils-ping", purpose: "checks ICMP" },
    Need { program: "promtool", package: "prometheus", purpose: "judges metrics and alert rules" },
    Need { program: QEMU.0, package: QEMU.1, purpose: "runs guests" },
    Need { program: "podman", package: "podman", purpose: "runs containers where Docker does not" },
    Need { program: "xz", package: "xz-utils", purpose: "unpacks a guest's modules" },
    Need { program: "ethtool", package: "ethtool", purpose: "makes a veth send as a card does" },
    Need { program: "wireguard-go", package: "wireguard-go", purpose: "is a VPN to compare with" },
    Need { program: "wg", package: "wireguard-tools", purpose: "configures it" },
    Need { program: "bpftool", package: "bpftool", purpose: "shows loaded programs" },
];

/// Everything `cargo xtask ci` needs.
pub(crate) fn everything() -> Result<()> {
    let missing: Vec<&Need> = NEEDS.iter().filter(|need| !present(need)).collect();
    for need in &missing {
        println!("missing: {} {} (package {})", need.program, need.purpose, need.package);
    }
    apt_install(&missing.iter().flat_map(|need| need.package.split(' ')).collect::<Vec<_>>())?;
    if let Some(need) = NEEDS.iter().find(|need| !present(need)) {
        bail!("{} is still missing after installing {}", need.program, need.package);
    }
    ebpf()?;
    println!("setup: everything is there");
    Ok(())
}

fn present(need: &Need) -> bool {
    match which(need.program) {
        // In an image `FROM scratch` only a static one runs.
        Some(path) if need.program == "busybox" => elf::is_static(&path).unwrap_or(false),
        Some(_) => true,
        None => false,
    }
}

/// What building the eBPF programs needs.
pub(crate) fn ebpf() -> Result<()> {
    if env::var_os("NODE_ENGINE_EBPF_OBJECT").is_some() {
        println!("setup: NODE_ENGINE_EBPF_OBJECT names a finished object; no BPF toolchain is needed");
        return Ok(());
    }
    let compiler = match bpf_toolchain::compiler() {
        Ok(compiler) => compiler,
        Err(reason) if which("apt-get").is_some() => {
            println!("missing: a compiler for eBPF (packages rustc-web, libstd-rust-web-dev-bpf)");
            apt_install(&["rustc-web", "libstd-rust-web-dev-bpf"]).with_context(|| format!("{reason:#}"))?;
            bpf_toolchain::compiler()?
        }
        Err(reason) => return Err(reason),
    };
    // Clippy of the eBPF crate has to match its compiler; rustup's brings its own.
    if compiler.rustc == Path::new("/usr/bin/rustc") && !Path::new("/usr/bin/cargo-clippy").exists() {
        println!("missing: clippy for the eBPF crate (package rust-web-clippy)");
        apt_install(&["rust-web-clippy"])?;
    }
    let linker = bpf_toolchain::ensure_linker(&compiler)?;
    println!("setup: eBPF is built by {} and {}", compiler.rustc.display(), linker.display());
    Ok(())
}

/// What building for another machine needs.
pub(crate) fn cross(target: Target) -> Result<()> {
    let Err(reason) = Toolchain::find(target) else { return Ok(()) };
    println!("missing: {reason:#}");
    apt_install(&target.packages().iter().map(String::as_str).collect::<Vec<_>>())?;
    if Toolchain::find(target).is_err() {
        apt_install(&["rustc-web", "libstd-rust-web-dev"])?;
    }
    Toolchain::find(target).map(drop)
}

/// What running another machine's programs, or the whole machine, needs: programs, each with its package.
pub(crate) fn emulators(needs: &[(&str, &str)]) -> Result<()> {
    let missing: Vec<&str> =
        needs.iter().filter(|(name, _)| which(name).is_none()).map(|(_, package)| *package).collect();
    apt_install(&missing)?;
    match needs.iter().find(|(name, _)| which(name).is_none()) {
        Some((name, package)) => bail!("{name} is still missing after installing {package}"),
        None => Ok(()),
    }
}

/// What judging the sources needs: rustup's smallest profile comes without.
pub(crate) fn linters() -> Result<()> {
    for (command, component) in [("fmt", "rustfmt"), ("clippy", "clippy")] {
        if output(cargo().args([command, "--version"])).is_err() {
            println!("missing: cargo {command} (component {component})");
            run(Command::new("rustup").args(["component", "add", component]))?;
        }
    }
    Ok(())
}

fn apt_install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    if which("apt-get").is_none() {
        bail!("this machine has no apt-get; install by its own means what these packages hold: {}", packages.join(" "));
    }
    let install = || {
        let mut command = as_root("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").args(["install", "-y", "--no-install-recommends"]);
        run(command.args(packages))
    };
    // A fresh image has no package lists, an old one has stale ones; where they are good the update is saved.
    if install().is_ok() {
        return Ok(());
    }
    run(as_root("apt-get").env("DEBIAN_FRONTEND", "noninteractive").arg("update"))?;
    install()
}
