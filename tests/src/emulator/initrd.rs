//! What a guest has for a disk: an archive in memory with a shell, the kernel's modules, and the programs of a test.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process::output;

/// Networks, filters and the emulator's card; what a kernel has built in is passed over, and so is what it does not know.
const MODULES: [&str; 25] = [
    "virtio_mmio",
    "virtio_pci",
    "virtio_net",
    "af_packet",
    "tun",
    "tap",
    "bridge",
    "veth",
    "vxlan",
    "sch_ingress",
    "cls_bpf",
    "ipv6",
    // Nobody names it as what they depend on, and nf_tables needs it.
    "crc32c_generic",
    "nf_tables",
    "nf_tables_ipv4",
    "nf_tables_ipv6",
    "nf_nat",
    "nft_chain_nat",
    "nft_nat",
    "nft_masq",
    "nft_ct",
    "nft_fib_inet",
    "nft_counter",
    "br_netfilter",
    "configs",
];

const DIRECTORY: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const LINK: u32 = 0o120_777;
const DEVICE: u32 = 0o020_600;

/// The first program: mounts, loads, and then does what it is told over the serial line.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/usr/sbin:/usr/bin:/bin HOME=/root RUST_BACKTRACE=0
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/net; [ -c /dev/net/tun ] || mknod /dev/net/tun c 10 200
mount -t tmpfs tmpfs /run; mount -t tmpfs tmpfs /tmp; mount -t cgroup2 cgroup2 /sys/fs/cgroup 2>/dev/null
for m in $(cat /modules/order); do insmod /modules/$m.ko 2>/dev/null; done
ip link set lo up
stty -echo -onlcr 2>/dev/null
echo "@ready $(uname -r)"
while read -r line; do sh -c "$line" </dev/null 2>&1; echo "@done $?"; done
poweroff -f
"#;

/// A kernel's package of Debian, unpacked.
#[derive(Clone, Debug)]
pub struct Kernel {
    pub directory: PathBuf,
}

impl Kernel {
    pub fn image(&self) -> Result<PathBuf> {
        let boot = self.directory.join("boot");
        let mut entries = fs::read_dir(&boot).with_context(|| format!("no kernel in {}", boot.display()))?.flatten();
        let image = entries.find(|entry| entry.file_name().to_string_lossy().starts_with("vmlinuz"));
        Ok(image.with_context(|| format!("no kernel in {}", boot.display()))?.path())
    }

    /// Every module, by name; a kernel may have none.
    fn modules(&self) -> BTreeMap<String, PathBuf> {
        let mut found = BTreeMap::new();
        let mut directories = vec![self.directory.join("lib/modules"), self.directory.join("usr/lib/modules")];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                match name.split_once(".ko") {
                    _ if entry.file_type().is_ok_and(|kind| kind.is_dir()) => directories.push(entry.path()),
                    Some((name, _)) => drop(found.insert(name.replace('-', "_"), entry.path())),
                    None => {}
                }
            }
        }
        found
    }
}

/// An archive in the making, in the form that kernels unpack at their start.
#[derive(Debug, Default)]
pub struct Initrd {
    bytes: Vec<u8>,
    entries: u32,
    directories: BTreeSet<String>,
}

impl Initrd {
    /// With a shell and the modules of this kernel.
    pub fn new(busybox: &Path, kernel: &Kernel) -> Result<Self> {
        let mut initrd = Self::default();
        for directory in [
            "bin", "dev", "proc", "sys", "etc", "tmp", "run", "root", "modules", "usr/sbin", "usr/bin", "var/lib",
            "var/log",
        ] {
            initrd.directory(directory);
        }
        initrd.entry("dev/console", DEVICE, &[], (5, 1));
        initrd.entry("dev/null", DEVICE, &[], (1, 3));
        initrd.copy(busybox, "bin/busybox")?;
        initrd.entry("bin/sh", LINK, b"busybox", (0, 0));
        initrd.file("init", INIT.as_bytes());
        initrd.file("etc/passwd", b"root:x:0:0::/root:/bin/sh\n");
        initrd.modules(kernel)?;
        Ok(initrd)
    }

    /// A program, as it is.
    pub fn copy(&mut self, from: &Path, to: &str) -> Result<()> {
        let bytes = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.file(to, &bytes);
        Ok(())
    }

    /// A program without symbols, and the libraries it is linked with; one of another machine is linked with none.
    pub fn program(&mut self, strip: &str, from: &Path, to: &str) -> Result<()> {
        let stripped = tempfile::NamedTempFile::new().context("no room for a stripped program")?;
        output(Command::new(strip).arg("-o").arg(stripped.path()).arg(from))?;
        self.copy(stripped.path(), to)?;
        // Of a static one it says that it is not dynamic, and fails.
        let Ok(libraries) = output(Command::new("ldd").arg(from)) else { return Ok(()) };
        for library in libraries.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/'))) {
            let name = library.trim_start_matches('/');
            if self.directories.insert(format!("file {name}")) {
                self.copy(Path::new(library), name)?;
            }
        }
        Ok(())
    }

    pub fn file(&mut self, name: &str, bytes: &[u8]) {
        if let Some((directory, _)) = name.rsplit_once('/') {
            self.directory(directory);
        }
        self.entry(name, PROGRAM, bytes, (0, 0));
    }

    pub fn write(mut self, to: &Path) -> Result<()> {
        self.entry("TRAILER!!!", 0, &[], (0, 0));
        fs::write(to, &self.bytes).with_context(|| format!("cannot write {}", to.display()))
    }

    /// The directory and those above it, once.
    fn directory(&mut self, name: &str) {
        let ends = name.match_indices('/').map(|(at, _)| at).chain([name.len()]);
        for end in ends {
            let name = &name[..end];
            if !name.is_empty() && self.directories.insert(name.to_owned()) {
                self.entry(name, DIRECTORY, &[], (0, 0));
            }
        }
    }

    fn modules(&mut self, kernel: &Kernel) -> Result<()> {
        let known = kernel.modules();
        let mut order = Vec::new();
        for module in MODULES {
            self.module(&known, module, &mut order)?;
        }
        self.file("modules/order", order.join("\n").as_bytes());
        Ok(())
    }

    /// The module after those it depends on.
    fn module(&mut self, known: &BTreeMap<String, PathBuf>, name: &str, order: &mut Vec<String>) -> Result<()> {
        let Some(path) = known.get(name).filter(|_| !order.iter().any(|other| other == name)) else { return Ok(()) };
        let bytes = unpacked(path)?;
        for other in dependencies(&bytes) {
            self.module(known, &other, order)?;
        }
        self.file(&format!("modules/{name}.ko"), &bytes);
        order.push(name.to_owned());
        Ok(())
    }

    /// The "new ASCII" form: a header of hexadecimal numbers, the name, the content, each padded to four bytes.
    fn entry(&mut self, name: &str, mode: u32, content: &[u8], device: (u32, u32)) {
        self.entries += 1;
        let links = 1;
        let fields = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            content.len() as u32,
            0,
            0,
            device.0,
            device.1,
            name.len() as u32 + 1,
            0,
        ];
        self.bytes.extend(b"070701");
        self.bytes.extend(fields.map(|field| format!("{field:08X}")).concat().bytes());
        self.bytes.extend(name.bytes().chain([0]));
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// The module as the kernel takes it, however the package has packed it.
fn unpacked(path: &Path) -> Result<Vec<u8>> {
    let program = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(path).with_context(|| format!("cannot read {}", path.display())),
    };
    let output =
        Command::new(program).arg("-dc").arg(path).output().with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        bail!("{program} cannot unpack {}", path.display());
    }
    Ok(output.stdout)
}

/// `depends=a,b` among a module's own words about itself.
fn dependencies(module: &[u8]) -> Vec<String> {
    let words = module.split(|byte| *byte == 0).filter_map(|word| std::str::from_utf8(word).ok());
    let found = words.filter_map(|word| word.strip_prefix("depends=")).next().unwrap_or_default();
    found.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_what_cpio_reads() {
        let directory = tempfile::tempdir().expect("room");
        let path = directory.path().join("initrd");
        let mut initrd = Initrd::default();
        initrd.file("a/b/odd", b"12345");
        initrd.file("a/b/even", b"1234");
        initrd.write(&path).expect("written");
        let listed = output(Command::new("busybox").args(["cpio", "-t", "-F"]).arg(&path)).expect("cpio reads it");
        assert_eq!(listed.lines().collect::<Vec<_>>(), ["a", "a/b", "a/b/odd", "a/b/even"]);
    }

    #[test]
    fn a_module_names_what_it_depends_on() {
        assert_eq!(
            dependencies(b"junk\0license=GPL\0depends=udp_tunnel,ip6-udp-tunnel\0x"),
            ["udp_tunnel", "ip6_udp_tunnel"]
        );
        assert!(dependencies(b"license=GPL\0depends=\0").is_empty());
    }
}
