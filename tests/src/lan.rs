//! A switch with hosts on it: one IPv4 and one IPv6 network, each host with an `eth0` that can be unplugged.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::host::Host;
use crate::process::{in_network, ip};
use crate::wait;

/// IPv4 address of the machine that is the switch: the cluster, and the outside world to the nodes.
pub const CLUSTER: &str = "198.18.0.254";
/// Its IPv6 address.
pub const CLUSTER_V6: &str = "fd00:198:18::fe";

/// A network namespace with a bridge.
#[derive(Debug)]
pub struct Lan {
    /// Holds the namespace until its standard input closes.
    holder: Child,
}

impl Lan {
    pub fn new() -> Result<Self> {
        let holder = Command::new("unshare")
            .args(["--net", "--", "cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start unshare")?;
        let lan = Self { holder };
        lan.wait_for_namespace()?;
        lan.ip("link set lo up")?;
        lan.ip("link add br0 type bridge mcast_snooping 0")?;
        lan.ip("link set br0 up")?;
        lan.ip(&format!("addr add {CLUSTER}/24 dev br0"))?;
        lan.ip(&format!("addr add {CLUSTER_V6}/64 dev br0 nodad"))?;
        Ok(lan)
    }

    /// Plugs the host in as number `number` (1 to 99): `198.18.0.<number>` and `fd00:198:18::<number>`.
    pub fn plug(&self, host: &Host, number: u8) -> Result<()> {
        self.ip(&format!("link add p{number} type veth peer name eth0 netns {}", host.pid()))?;
        self.ip(&format!("link set p{number} master br0 up"))?;
        for arguments in [
            format!("addr add {}/24 dev eth0", address(number)),
            format!("addr add {}/64 dev eth0 nodad", address_v6(number)),
            "link set eth0 up".to_owned(),
            format!("route add default via {CLUSTER}"),
            format!("-6 route add default via {CLUSTER_V6}"),
        ] {
            ip(host.pid(), &arguments)?;
        }
        // The link-local address comes by itself, a moment after the link is up at both ends.
        wait::until_true("eth0 has its link-local address", Duration::from_secs(10), || {
            Ok(ip(host.pid(), "-6 -oneline address show dev eth0 scope link -tentative")?.contains("fe80::"))
        })
    }

    /// Unplugs the host's cable, or plugs it in again.
    pub fn set_link(&self, number: u8, up: bool) -> Result<()> {
        self.ip(&format!("link set p{number} {}", if up { "up" } else { "down" })).map(drop)
    }

    /// A process in the switch's network namespace.
    pub fn pid(&self) -> u32 {
        self.holder.id()
    }

    /// `ip` on the switch.
    pub fn ip(&self, arguments: &str) -> Result<String> {
        ip(self.holder.id(), arguments)
    }

    /// A program in the switch's network: on the cluster's machine, seen from the nodes.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        in_network(self.holder.id(), program)
    }

    fn wait_for_namespace(&self) -> Result<()> {
        let own = std::fs::read_link("/proc/self/ns/net")?;
        let theirs = format!("/proc/{}/ns/net", self.holder.id());
        wait::until_true("the switch has its namespace", Duration::from_secs(5), || {
            Ok(std::fs::read_link(&theirs)? != own)
        })
    }
}

/// IPv4 address of the host with this number.
pub fn address(number: u8) -> String {
    format!("198.18.0.{number}")
}

/// IPv6 address of the host with this number.
pub fn address_v6(number: u8) -> String {
    format!("fd00:198:18::{number}")
}

impl Drop for Lan {
    fn drop(&mut self) {
        drop(self.holder.stdin.take());
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
