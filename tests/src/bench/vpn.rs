//! A VPN in user space, as people use it to connect machines: WireGuard's own, in Go. It encrypts; ours does not.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::rig::{Rig, ip, run};

const PORT: &str = "51820";
/// What it leaves of 1500 for the packet, by its own default.
pub const OVERHEAD: u32 = 80;
const PATIENCE: Duration = Duration::from_secs(5);

/// One daemon on each node, until dropped.
#[derive(Debug)]
pub struct Vpn(Vec<(Child, PathBuf)>);

impl Vpn {
    /// Connects the nodes of the rig and routes their containers' networks through it.
    ///
    /// # Errors
    /// Where a daemon does not start.
    pub fn new(rig: &Rig) -> Result<Self> {
        let scratch = tempfile::tempdir().context("cannot make a scratch directory")?;
        let keys = [Keys::new(&scratch.path().join("a"))?, Keys::new(&scratch.path().join("b"))?];
        let mut vpn = Self(Vec::new());
        for (which, side) in rig.sides.iter().enumerate() {
            // Their control sockets lie in one directory, named by the device.
            let device = format!("wg{}{which}", std::process::id());
            let (own, other, far) = (&keys[which], &keys[1 - which], &rig.sides[1 - which]);
            vpn.0.push(daemon(&side.node, &device)?);
            let endpoint = format!("{}:{PORT}", far.underlay);
            let set = ["ip", "netns", "exec", &side.node, "wg", "set", &device, "listen-port", PORT];
            let key = ["private-key", &own.private, "peer", &other.public, "endpoint", &endpoint];
            run(&[&set[..], &key, &["allowed-ips", "0.0.0.0/0"]].concat())?;
            ip(&["-n", &side.node, "link", "set", &device, "up"])?;
            ip(&["-n", &side.node, "route", "add", far.subnet, "dev", &device])?;
        }
        Ok(vpn)
    }

    /// The daemons' process ids.
    pub fn processes(&self) -> Vec<u32> {
        self.0.iter().map(|(daemon, _)| daemon.id()).collect()
    }
}

impl Drop for Vpn {
    fn drop(&mut self) {
        for (daemon, socket) in &mut self.0 {
            let _ = daemon.kill();
            let _ = daemon.wait();
            let _ = fs::remove_file(socket);
        }
    }
}

/// Starts it in the node's namespace and waits until it listens: `wg` removes the socket of one that does not yet.
fn daemon(node: &str, device: &str) -> Result<(Child, PathBuf)> {
    let mut command = Command::new("ip");
    command.args(["netns", "exec", node, "wireguard-go", "--foreground", device]).env("LOG_LEVEL", "error");
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().context("cannot start wireguard-go")?;
    let socket = Path::new("/run/wireguard").join(format!("{device}.sock"));
    let deadline = Instant::now() + PATIENCE;
    while UnixStream::connect(&socket).is_err() {
        let ended = child.try_wait().context("cannot look after wireguard-go")?;
        if ended.is_some() || Instant::now() > deadline {
            let _ = child.kill();
            bail!("wireguard-go makes no device in {node} (it ended: {ended:?})");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok((child, socket))
}

struct Keys {
    /// The file.
    private: String,
    public: String,
}

impl Keys {
    fn new(file: &Path) -> Result<Self> {
        let private = wg("genkey", Stdio::null())?;
        fs::write(file, &private).with_context(|| format!("cannot write {}", file.display()))?;
        let public = wg("pubkey", fs::File::open(file)?.into())?.trim().to_owned();
        Ok(Self { private: file.display().to_string(), public })
    }
}

fn wg(verb: &str, input: Stdio) -> Result<String> {
    let output = Command::new("wg").arg(verb).stdin(input).output().context("cannot run wg")?;
    if !output.status.success() {
        bail!("wg {verb}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).context("wg's answer is not text")
}
