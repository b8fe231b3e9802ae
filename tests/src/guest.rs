//! A guest for the `unikernel` runtime, made here: a kernel of Debian's, and an initramfs of busybox, the modules the guest's devices
//! need, and a script that takes its address from the kernel's command line and serves.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::image::newer;
use crate::process::{output, root};

/// The package that names the newest kernel.
const NEWEST: &str = "linux-image-amd64";
const MODULES: [&str; 6] = ["virtio_pci", "virtio_net", "9p", "9pnet_virtio", "button", "evdev"];

/// What the guest does: serves its own name, what the shared directory holds, and the words after `--`; switches off at the power button.
/// The first of the words may want it to end, or to take all memory, or all processors.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
for module in $(cat /modules/order); do insmod /modules/$module; done
for word in $(cat /proc/cmdline); do
  case $word in
    netdev.ipv4_addr=*) address=${word#*=} ;;
    netdev.ipv4_gw_addr=*) gateway=${word#*=} ;;
    netdev.ipv4_subnet_mask=*) mask=${word#*=} ;;
  esac
done
ip link set lo up
ifconfig eth0 $address netmask $mask up
route add default gw $gateway
mkdir -p /www /shared
mount -t 9p -o trans=virtio,ro fs0 /shared && cat /shared/* > /www/shared
echo "$*" > /www/words
grep -c ^processor /proc/cpuinfo > /www/processors
sed -n 's/MemTotal: *\([0-9]*\).*/\1/p' /proc/meminfo > /www/memory
mkdir -p /etc/acpi/PWRF
printf '#!/bin/sh\necho "power button"; poweroff -f\n' > /etc/acpi/PWRF/00000080
chmod +x /etc/acpi/PWRF/00000080
acpid -l /dev/console
httpd -p 80 -h /www
echo "guest serves"
case "$1" in
  end) poweroff -f ;;
  hog) exec tail /dev/zero ;;
  burn) for i in 1 2 3 4; do while :; do :; done & done ;;
esac
while :; do sleep 1000; done
"#;

/// The archive, or why there is none: a machine without Debian's archive has no such kernel.
pub fn archive() -> Result<PathBuf> {
    let directory = root().join("target/lab/guest");
    fs::create_dir_all(&directory).context("cannot make a place for the guest")?;
    let archive = directory.join("guest.tar.gz");
    if newer(&archive, &root().join("tests/src/guest.rs")) {
        return Ok(archive);
    }
    let kernel = kernel(&directory)?;
    let image = directory.join(format!("image-{}", std::process::id()));
    fs::create_dir_all(image.join("files")).context("cannot make the image")?;
    fs::copy(kernel.join("vmlinuz"), image.join("kernel")).context("cannot copy the kernel")?;
    fs::write(image.join("cmdline"), "console=ttyS0 quiet panic=-1\n").context("cannot write the options")?;
    fs::write(image.join("files/greeting"), "from the shared directory\n").context("cannot write a shared file")?;
    fs::write(image.join("initramfs.cpio"), initramfs(&kernel)?).context("cannot write the initramfs")?;
    let fresh = archive.with_extension("new");
    output(Command::new("tar").arg("-czf").arg(&fresh).arg("-C").arg(&image).arg("."))?;
    fs::remove_dir_all(&image).context("cannot remove the image's parts")?;
    fs::rename(&fresh, &archive).context("cannot place the archive")?;
    Ok(archive)
}

/// The kernel's package, unpacked: `vmlinuz`, and `modules` with everything below `lib/modules/<version>`.
fn kernel(directory: &Path) -> Result<PathBuf> {
    let unpacked = directory.join("kernel");
    if unpacked.join("vmlinuz").exists() {
        return Ok(unpacked);
    }
    let depends = output(Command::new("apt-cache").args(["depends", "--important", NEWEST]))?;
    let package = depends.lines().find_map(|line| line.trim().strip_prefix("Depends: "));
    let package = package.with_context(|| format!("{NEWEST} names no kernel; is there a Debian archive?"))?;
    output(Command::new("apt-get").current_dir(directory).args(["download", package]))
        .with_context(|| format!("cannot download {package}"))?;
    let files = fs::read_dir(directory).context("cannot read the guest's place")?.flatten();
    let deb = files.map(|entry| entry.path()).find(|path| path.extension().is_some_and(|extension| extension == "deb"));
    let deb = deb.context("apt-get downloaded no package")?;
    let parts = directory.join("package");
    output(Command::new("dpkg-deb").arg("-x").arg(&deb).arg(&parts))?;
    fs::create_dir_all(&unpacked).context("cannot make a place for the kernel")?;
    let modules = only(&first_that_exists(&[parts.join("usr/lib/modules"), parts.join("lib/modules")])?)?;
    fs::rename(&modules, unpacked.join("modules")).context("cannot move the modules")?;
    let kernel = fs::read_dir(parts.join("boot")).context("the package has no kernel")?.flatten();
    let kernel = kernel.map(|entry| entry.path()).find(|path| path.to_string_lossy().contains("/vmlinuz-"));
    fs::rename(kernel.context("the package has no kernel")?, unpacked.join("vmlinuz"))
        .context("cannot move the kernel")?;
    fs::remove_dir_all(&parts).context("cannot remove the package's rest")?;
    fs::remove_file(&deb).context("cannot remove the package")?;
    Ok(unpacked)
}

fn first_that_exists(paths: &[PathBuf]) -> Result<PathBuf> {
    paths.iter().find(|path| path.is_dir()).cloned().with_context(|| format!("there is none of {paths:?}"))
}

fn only(directory: &Path) -> Result<PathBuf> {
    let mut entries = fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))?;
    Ok(entries.next().with_context(|| format!("{} is empty", directory.display()))??.path())
}

/// An archive as the kernel unpacks it (the kernel's `initramfs-buffer-format`), uncompressed.
fn initramfs(kernel: &Path) -> Result<Vec<u8>> {
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].map(Path::new).into_iter().find(|path| path.exists());
    let busybox = fs::read(busybox.context("busybox is missing; run `cargo xtask setup`")?)?;
    let mut cpio = Cpio::default();
    for name in ["bin", "dev", "proc", "sys", "modules"] {
        cpio.add(name, 0o040_755, b"")?;
    }
    cpio.add("bin/busybox", 0o100_755, &busybox)?;
    cpio.add("init", 0o100_755, INIT.as_bytes())?;
    let mut order = String::new();
    for (name, module) in modules(&kernel.join("modules"))? {
        cpio.add(&format!("modules/{name}.ko"), 0o100_644, &module)?;
        order.push_str(&format!("{name}.ko\n"));
    }
    cpio.add("modules/order", 0o100_644, order.as_bytes())?;
    cpio.add("TRAILER!!!", 0, b"")?;
    Ok(cpio.bytes)
}

/// The modules and what they depend on, in the order in which they are to be loaded.
fn modules(directory: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let mut files = BTreeMap::new();
    find(directory, &mut files)?;
    let mut ordered = Vec::new();
    for module in MODULES {
        need(module, &files, &mut ordered)?;
    }
    Ok(ordered)
}

fn find(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("cannot read {}", directory.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.file_type()?.is_dir() {
            find(&entry.path(), files)?;
        } else if name.contains(".ko") {
            files.insert(name_of(&name), entry.path());
        }
    }
    Ok(())
}

/// What is no file is built into the kernel.
fn need(name: &str, files: &BTreeMap<String, PathBuf>, ordered: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
    if ordered.iter().any(|(known, _)| known == name) {
        return Ok(());
    }
    let Some(path) = files.get(name) else { return Ok(()) };
    let module = plain(path)?;
    // A module says in words, each ended by a zero, what it is.
    let words = module.split(|byte| *byte == 0).filter_map(|word| word.strip_prefix(b"depends="));
    for dependency in words.flat_map(|names| names.split(|byte| *byte == b',')).filter(|name| !name.is_empty()) {
        need(&String::from_utf8_lossy(dependency).replace('-', "_"), files, ordered)?;
    }
    ordered.push((name.to_owned(), module));
    Ok(())
}

fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split(".ko").next().unwrap_or(file).replace('-', "_")
}

/// busybox loads no compressed module.
fn plain(path: &Path) -> Result<Vec<u8>> {
    let tool = match path.extension().and_then(|extension| extension.to_str()) {
        Some("ko") => return fs::read(path).with_context(|| format!("cannot read {}", path.display())),
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => bail!("{} is no module", path.display()),
    };
    let made = Command::new(tool).arg("-dc").arg(path).output().with_context(|| format!("cannot start {tool}"))?;
    if !made.status.success() {
        bail!("{tool} {}: {}", path.display(), String::from_utf8_lossy(&made.stderr));
    }
    Ok(made.stdout)
}

#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
}

impl Cpio {
    fn add(&mut self, name: &str, mode: u32, body: &[u8]) -> Result<()> {
        self.entries += 1;
        let size = u32::try_from(body.len()).context("a file of an initramfs is smaller")?;
        let length = u32::try_from(name.len() + 1).context("a name is shorter")?;
        write!(self.bytes, "070701")?;
        for field in [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, length, 0] {
            write!(self.bytes, "{field:08X}")?;
        }
        self.bytes.extend(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend(body);
        self.align();
        Ok(())
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
