//! The emulator's command line for each kind of machine.

use std::fs;
use std::path::Path;
use std::str::FromStr;

/// A kind of machine. Both run without the processor's help: a stock kernel does not boot under every machine's /dev/kvm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    Amd64,
    Armv7,
}

impl Machine {
    pub fn emulator(self) -> &'static str {
        match self {
            Self::Amd64 => "qemu-system-x86_64",
            Self::Armv7 => "qemu-system-arm",
        }
    }

    /// What takes the symbols out of its programs.
    pub(super) fn strip(self) -> &'static str {
        match self {
            Self::Amd64 => "strip",
            Self::Armv7 => "arm-linux-gnueabihf-strip",
        }
    }

    /// For a guest with one network card, which is the other end of `tap`.
    pub(super) fn arguments(self, kernel: &Path, initrd: &Path, tap: &str) -> Vec<String> {
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        let mut arguments = match self {
            Self::Amd64 => words("-M microvm -accel tcg,thread=multi -cpu max -smp 1 -m 1024"),
            Self::Armv7 => words("-M virt,highmem=off -cpu cortex-a15 -smp 1 -m 768"),
        };
        arguments.extend(words("-nographic -nodefaults -no-reboot -serial stdio -device virtio-net-device,netdev=n0"));
        arguments.extend(["-netdev".to_owned(), format!("tap,id=n0,ifname={tap},script=no,downscript=no")]);
        arguments.extend(["-kernel".to_owned(), kernel.display().to_string()]);
        arguments.extend(["-initrd".to_owned(), initrd.display().to_string()]);
        let (console, own) = match self {
            Self::Amd64 => ("ttyS0", clock()),
            Self::Armv7 => ("ttyAMA0", String::new()),
        };
        arguments.extend(["-append".to_owned(), format!("console={console} quiet loglevel=1 panic=-1 {own}")]);
        arguments
    }
}

/// A microvm has no timer that a kernel could measure its own clock by, so it is told: the emulated counter runs at the host's rate.
fn clock() -> String {
    let text = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let megahertz =
        text.lines().find_map(|line| line.strip_prefix("cpu MHz")?.split(':').nth(1)?.trim().parse::<f64>().ok());
    let kilohertz = (megahertz.unwrap_or(2_000.0) * 1_000.0) as u64;
    format!("no_timer_check lpj=4000000 tsc=reliable tsc_early_khz={kilohertz}")
}

impl FromStr for Machine {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self, anyhow::Error> {
        match text {
            "amd64" => Ok(Self::Amd64),
            "armv7" => Ok(Self::Armv7),
            _ => anyhow::bail!("{text} is neither amd64 nor armv7"),
        }
    }
}
