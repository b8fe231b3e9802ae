//! The image of the lab's containers, made here from busybox and our own static program; no registry is asked.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};

use crate::host::Host;
use crate::process::{output, root};

/// Serves as described in `probe` unless given another command.
pub const PROBE: &str = "lab/probe:1";

static BUILDING: Mutex<()> = Mutex::new(());

/// Puts the image into the host's Docker.
pub fn load(host: &Host) -> Result<()> {
    let archive = archive()?;
    output(
        host.command("docker")
            .args(["import", "--change", r#"ENTRYPOINT ["/bin/probe"]"#, "--change", r#"CMD ["serve"]"#])
            .args(["--change", "ENV PATH=/bin"])
            .arg(&archive)
            .arg(PROBE),
    )?;
    Ok(())
}

/// Puts the image into the host's Podman, whose service answers at the socket.
pub fn load_into_podman(host: &Host, socket: &str) -> Result<()> {
    let archive = archive()?;
    output(
        host.command("podman")
            .args(["--url", &format!("unix://{socket}"), "import", "--change", r#"ENTRYPOINT ["/bin/probe"]"#])
            .args(["--change", r#"CMD ["serve"]"#, "--change", "ENV PATH=/bin"])
            .arg(&archive)
            .arg(format!("docker.io/{PROBE}")),
    )?;
    Ok(())
}

/// Puts the image of the host's Docker into a namespace of the containerd that answers at `socket`.
pub fn load_into_containerd(host: &Host, socket: &str, namespace: &str) -> Result<()> {
    let saved = host.directory().join("probe-image.tar");
    output(host.command("docker").args(["save", "--output"]).arg(&saved).arg(PROBE))?;
    output(host.command("ctr").args(["--address", socket, "--namespace", namespace, "images", "import"]).arg(&saved))?;
    fs::remove_file(&saved).context("cannot remove the saved image")
}

/// The root file system as an archive; made again when the program's source is newer.
fn archive() -> Result<PathBuf> {
    let _one_at_a_time = BUILDING.lock().unwrap_or_else(PoisonError::into_inner);
    let source = root().join("tests/src/bin/probe.rs");
    let directory = root().join("target/lab");
    let archive = directory.join("probe.tar");
    if newer(&archive, &source) {
        return Ok(archive);
    }
    let system = directory.join(format!("rootfs-{}", std::process::id()));
    let result = fill(&system, &source).and_then(|()| {
        // Another process may do the same: each writes its own file and the last one wins.
        let fresh = system.with_extension("tar");
        output(
            Command::new("tar").args(["--owner=0", "--group=0", "-cf"]).arg(&fresh).arg("-C").arg(&system).arg("."),
        )?;
        fs::rename(&fresh, &archive).with_context(|| format!("cannot make {}", archive.display()))
    });
    let _ = fs::remove_dir_all(&system);
    result.map(|()| archive)
}

fn fill(system: &Path, source: &Path) -> Result<()> {
    for directory in ["bin", "etc", "proc", "sys", "dev", "tmp"] {
        fs::create_dir_all(system.join(directory)).context("cannot make the image's root")?;
    }
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    output(
        Command::new(rustc)
            .args(["--edition", "2024", "-O", "-Cpanic=abort", "-Cstrip=symbols", "-Ctarget-feature=+crt-static", "-o"])
            .arg(system.join("bin/probe"))
            .arg(source),
    )
    .context("cannot build the image's program")?;
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].map(Path::new).into_iter().find(|path| path.exists());
    let Some(busybox) = busybox else { bail!("busybox is missing; run `cargo xtask setup`") };
    fs::copy(busybox, system.join("bin/busybox")).context("cannot copy busybox")?;
    for applet in output(Command::new(busybox).arg("--list"))?.lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", system.join("bin").join(applet)).context("cannot link an applet")?;
    }
    fs::write(system.join("etc/passwd"), "root:x:0:0::/:/bin/sh\n").context("cannot write passwd")
}

pub(crate) fn newer(file: &Path, than: &Path) -> bool {
    let time = |path: &Path| fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    matches!((time(file), time(than)), (Some(file), Some(than)) if file > than)
}
