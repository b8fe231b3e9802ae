//! The virtual machine as QEMU is asked for it.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::archive::{self, COMMAND_LINE, INITRAMFS, KERNEL, SHARED};
use super::{MEMORY_MIB, qmp, tap};
use crate::model::InstanceSpec;

/// Inside the namespace: the guest, its gateway, and their network of two.
const GUEST: &str = "192.168.1.2";
const GATEWAY: &str = "192.168.1.1";
const MASK: &str = "255.255.255.252";

/// Options of a kernel together; Linux takes 2,048 bytes on most machines.
const LONGEST_COMMAND_LINE: usize = 2048;

/// What executes a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accelerator {
    Kvm,
    /// QEMU itself, slowly.
    Tcg,
}

impl Accelerator {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    pub(super) fn named(name: &str) -> Option<Self> {
        [Self::Kvm, Self::Tcg].into_iter().find(|accelerator| accelerator.name() == name)
    }

    /// The machine, its processor, and nothing that QEMU would add by itself.
    pub(super) fn base(self) -> Vec<String> {
        let machine = if cfg!(target_arch = "aarch64") { "virt" } else { "q35" };
        let cpu = if self == Self::Kvm { "host" } else { "max" };
        let words = ["-machine", machine, "-accel", self.name(), "-cpu", cpu, "-nodefaults", "-no-user-config"];
        // What the guest's devices never need of the host.
        let rest = ["-display", "none", "-no-reboot", "-sandbox", "on,obsolete=deny,spawn=deny"];
        words.into_iter().chain(rest).map(str::to_owned).collect()
    }
}

/// QEMU for this machine's architecture.
pub(super) fn program() -> PathBuf {
    let name = format!("qemu-system-{}", std::env::consts::ARCH);
    let places = ["/usr/bin", "/usr/local/bin", "/usr/libexec"];
    let found = places.iter().map(|place| Path::new(place).join(&name)).find(|path| path.exists());
    found.unwrap_or_else(|| Path::new(places[0]).join(name))
}

/// A guest whose image was unpacked.
#[derive(Debug)]
pub(super) struct Guest {
    pub(super) memory_mib: u64,
    vcpus: u32,
    accelerator: Accelerator,
    initramfs: bool,
    shared: Vec<(&'static str, &'static str)>,
    command_line: String,
    vhost: bool,
}

impl Guest {
    pub(super) fn new(directory: &Path, spec: &InstanceSpec, accelerator: Accelerator) -> io::Result<Self> {
        let command_line = command_line(own_options(directory)?.trim(), &spec.command);
        if command_line.len() > LONGEST_COMMAND_LINE {
            return Err(too_long());
        }
        if !archive::file(directory, KERNEL)? {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("its `{KERNEL}` is not there")));
        }
        let mut shared = Vec::new();
        for (name, tag) in SHARED {
            if archive::shared(directory, name)? {
                shared.push((name, tag));
            }
        }
        Ok(Self {
            memory_mib: spec.limits.memory_mib.unwrap_or(MEMORY_MIB),
            vcpus: spec.limits.vcpus.unwrap_or(1),
            accelerator,
            initramfs: archive::file(directory, INITRAMFS)?,
            shared,
            command_line,
            vhost: accelerator == Accelerator::Kvm && Path::new("/dev/vhost-net").exists(),
        })
    }

    /// Every file is named relative to the instance's directory: a comma in its path would end an option.
    pub(super) fn arguments(&self) -> Vec<String> {
        let mut words = self.accelerator.base();
        let mut add = |option: &str, value: String| words.extend([option.to_owned(), value]);
        add("-m", format!("{}M", self.memory_mib));
        add("-smp", self.vcpus.to_string());
        add("-kernel", KERNEL.into());
        if self.initramfs {
            add("-initrd", INITRAMFS.into());
        }
        add("-append", self.command_line.clone());
        add("-serial", "stdio".into());
        add("-monitor", "none".into());
        add("-qmp", format!("unix:{},server=on,wait=off", qmp::SOCKET));
        let vhost = if self.vhost { ",vhost=on" } else { "" };
        add("-netdev", format!("tap,id=net0,ifname={},script=no,downscript=no{vhost}", tap::DEVICE));
        add("-device", "virtio-net-pci,netdev=net0,romfile=".into());
        for (directory, tag) in &self.shared {
            add("-fsdev", format!("local,id={tag},path={directory},security_model=none"));
            add("-device", format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"));
        }
        words
    }
}

/// Of its image. A file that is too long is not read to its end.
fn own_options(directory: &Path) -> io::Result<String> {
    let mut own = String::new();
    if archive::file(directory, COMMAND_LINE)? {
        let file = File::open(directory.join(COMMAND_LINE))?;
        let length = file.take(LONGEST_COMMAND_LINE as u64 + 1).read_to_string(&mut own)?;
        if length > LONGEST_COMMAND_LINE {
            return Err(too_long());
        }
    }
    Ok(own)
}

fn too_long() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("its options are longer than {LONGEST_COMMAND_LINE} bytes"))
}

/// As unikernels read it: options of the kernel, two dashes, and the program's own words.
fn command_line(own: &str, command: &[String]) -> String {
    let mut line = own.to_owned();
    if !line.is_empty() {
        line.push(' ');
    }
    line.push_str(&format!("netdev.ipv4_addr={GUEST} netdev.ipv4_gw_addr={GATEWAY} netdev.ipv4_subnet_mask={MASK}"));
    line.push_str(" --");
    for word in command {
        line.push(' ');
        // A kernel knows quotes, and no way to escape one.
        let quoted = word.is_empty() || word.contains(char::is_whitespace);
        line.push_str(&if quoted { format!("\"{word}\"") } else { word.clone() });
    }
    line
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::model::{Limits, Technology};

    #[test]
    fn a_guest_is_told_its_address_and_its_command() {
        assert_eq!(
            command_line("console=ttyS0", &["-p".into(), "8080".into(), "two words".into()]),
            "console=ttyS0 netdev.ipv4_addr=192.168.1.2 netdev.ipv4_gw_addr=192.168.1.1 \
             netdev.ipv4_subnet_mask=255.255.255.252 -- -p 8080 \"two words\""
        );
    }

    #[test]
    fn a_machine_is_made_of_what_the_archive_holds() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("kernel"), "k").expect("write");
        let id = "a.b.c.d.instance.0".parse().expect("an id");
        let limits = Limits { vcpus: Some(3), memory_mib: Some(99), ..Limits::default() };
        let spec = InstanceSpec { limits, ..InstanceSpec::new(id, Technology::Unikernel) };
        let words = |accelerator| Guest::new(dir.path(), &spec, accelerator).expect("a guest").arguments().join(" ");
        let bare = words(Accelerator::Tcg);
        assert!(bare.contains("-m 99M -smp 3 -kernel kernel -append netdev."), "{bare}");
        assert!(!bare.contains("-initrd") && !bare.contains("-fsdev") && bare.contains("-cpu max"), "{bare}");
        for name in ["initramfs.cpio", "cmdline"] {
            fs::write(dir.path().join(name), "quiet\n").expect("write");
        }
        fs::create_dir(dir.path().join("files1")).expect("a directory");
        let full = words(Accelerator::Kvm);
        for part in ["-initrd initramfs.cpio", "-append quiet netdev.", "path=files1,", "mount_tag=fs1", "-cpu host"] {
            assert!(full.contains(part), "{part} in {full}");
        }
        assert!(!full.contains("mount_tag=fs0"), "{full}");
        fs::write(dir.path().join("cmdline"), "x".repeat(3000)).expect("write");
        assert!(Guest::new(dir.path(), &spec, Accelerator::Tcg).is_err());
        // Links lead anywhere, and one to `/dev/zero` has no end.
        for (name, to) in [("cmdline", "/dev/zero"), ("initramfs.cpio", "/etc/hosts"), ("files1", "/"), ("kernel", "x")]
        {
            let path = dir.path().join(name);
            let kept = dir.path().join("kept");
            fs::rename(&path, &kept).expect("move");
            std::os::unix::fs::symlink(to, &path).expect("a link");
            let error = Guest::new(dir.path(), &spec, Accelerator::Tcg).expect_err(name).to_string();
            assert!(error.contains(&format!("`{name}` of the archive is not a")), "{error}");
            fs::remove_file(&path).expect("remove");
            fs::rename(&kept, &path).expect("move");
            let _ = fs::write(dir.path().join("cmdline"), "quiet\n");
        }
    }
}
