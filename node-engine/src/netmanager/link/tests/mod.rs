//! The host's objects against a real kernel. Each test makes its own host out of network namespaces, looks with the kernel's own
//! tools, and leaves nothing.

mod bridge;
mod changes;
mod filter;
mod guard;
mod guest;
mod neighbour;
mod ports;
mod undo;
mod veth;

use std::future::Future;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::socket::{self, shutdown};
use std::os::fd::AsRawFd;

use super::*;
use crate::model::Protocol;
use crate::netns;

const BRIDGE: &str = "lk-bridge";
const TUN: &str = "lk-tun";

const SUBNET: Subnet = Subnet { v4: Ipv4Addr::new(10, 18, 0, 0), v6: Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 0) };
const GATEWAY: Addresses =
    Addresses { v4: Ipv4Addr::new(10, 18, 0, 1), v6: Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 1) };
const FIRST: Addresses = Addresses { v4: Ipv4Addr::new(10, 18, 0, 2), v6: Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 2) };
const SECOND: Addresses = Addresses { v4: Ipv4Addr::new(10, 18, 0, 3), v6: Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, 3) };
const TUN_V4: Ipv4Addr = Ipv4Addr::new(10, 19, 1, 254);
const TUN_V6: Ipv6Addr = Ipv6Addr::new(0xfcef, 0, 0, 0, 0, 0, 0xdead, 0xbeef);

/// The wire between host and outside.
const HOST_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));
const HOST_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1));
const OUTSIDE_V4: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2));
const OUTSIDE_V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2));

/// A network namespace of the test's own.
struct Namespace {
    name: String,
    path: PathBuf,
}

impl Namespace {
    fn new(label: &str) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("lk-{label}-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let path = netns::ensure(&name).expect("a network namespace; is this root?");
        let namespace = Self { name, path };
        namespace.exec("ip link set lo up");
        // Link-local addresses are then there at once and look the same in every snapshot.
        for scope in ["all", "default"] {
            namespace.write(&format!("net/ipv6/conf/{scope}/accept_dad"), "0");
            namespace.write(&format!("net/ipv6/conf/{scope}/disable_ipv6"), "0");
        }
        namespace
    }

    fn within<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        netns::within(&self.path, f).expect("entering a namespace of our own")
    }

    /// Runs a command inside; its words are separated by spaces.
    fn exec(&self, command: &str) -> String {
        let output = self.within(|| {
            let mut words = command.split(' ');
            Command::new(words.next().unwrap())
                .args(words)
                .output()
                .unwrap_or_else(|error| panic!("{command}: {error}"))
        });
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, command: &str) -> serde_json::Value {
        let text = self.exec(command);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{command}: {error}: {text}"))
    }

    fn read(&self, sysctl: &str) -> String {
        let path = Path::new("/proc/sys").join(sysctl);
        let text = self.within(|| std::fs::read_to_string(&path));
        text.unwrap_or_else(|error| panic!("{sysctl}: {error}")).trim().to_owned()
    }

    fn write(&self, sysctl: &str, value: &str) {
        let path = Path::new("/proc/sys").join(sysctl);
        self.within(|| std::fs::write(&path, value)).unwrap_or_else(|error| panic!("{sysctl}: {error}"));
    }

    /// Runs async code with its sockets inside.
    fn block_on<T: Send>(&self, future: impl Future<Output = T> + Send) -> T {
        self.within(|| {
            tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(future)
        })
    }

    /// Everything of the network that can be seen from inside.
    fn snapshot(&self) -> Vec<(String, serde_json::Value)> {
        let mut snapshot: Vec<(String, serde_json::Value)> = [
            "ip -j -d link",
            "ip -j addr",
            "ip -j route show table all",
            "ip -6 -j route show table all",
            "ip -j rule",
            "ip -6 -j rule",
            "nft -s -j list ruleset",
        ]
        .into_iter()
        .flat_map(|command| match entries_of(without_clocks(self.json(command))) {
            serde_json::Value::Array(entries) => entries.into_iter().map(|entry| (command.to_owned(), entry)).collect(),
            other => vec![(command.to_owned(), other)],
        })
        .collect();
        let settings = self.exec("sysctl -a -r ^net\\.(ipv4|ipv6)\\.(conf|ip_forward)");
        // Random or counted down by the kernel itself.
        let steady = settings.lines().filter(|line| !line.contains("stable_secret") && !line.contains("mc_forwarding"));
        snapshot.extend(steady.map(|line| (line.to_owned(), serde_json::Value::Null)));
        snapshot
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // A test that has failed already tells of that first.
        let _ = netns::remove(&self.name);
    }
}

/// `nft` wraps its list once more.
fn entries_of(mut value: serde_json::Value) -> serde_json::Value {
    value.get_mut("nftables").map(serde_json::Value::take).unwrap_or(value)
}

fn without_clocks(mut value: serde_json::Value) -> serde_json::Value {
    match &mut value {
        serde_json::Value::Array(items) => {
            for item in items {
                *item = without_clocks(item.take());
            }
        }
        serde_json::Value::Object(fields) => {
            fields.retain(|name, _| !name.ends_with("_timer") && name != "expires" && name != "tentative");
            for (_, field) in fields.iter_mut() {
                *field = without_clocks(field.take());
            }
        }
        _ => {}
    }
    value
}

/// Compares entry by entry, so that a failure shows only what differs.
fn assert_same(before: &[(String, serde_json::Value)], after: &[(String, serde_json::Value)]) {
    let only_in = |these: &[(String, serde_json::Value)], others: &[(String, serde_json::Value)]| -> Vec<String> {
        let differing = these.iter().filter(|entry| !others.contains(entry));
        differing.map(|(what, value)| format!("{what} {value}")).collect()
    };
    let (gone, new) = (only_in(before, after), only_in(after, before));
    assert!(gone.is_empty() && new.is_empty(), "before:\n{}\nafter:\n{}", gone.join("\n"), new.join("\n"));
}

/// A host with a TUN device, a wire to the outside, and a run directory.
struct Host {
    namespace: Namespace,
    outside: Namespace,
    run_dir: tempfile::TempDir,
}

impl Host {
    fn new(label: &str) -> Self {
        let (namespace, outside) = (Namespace::new(label), Namespace::new("out"));
        namespace.exec(&format!("ip link add lk-up type veth peer name lk-out netns {}", outside.name));
        namespace.exec(&format!("ip tuntap add {TUN} mode tun"));
        for (inside, link, v4, v6) in
            [(&namespace, "lk-up", HOST_V4, HOST_V6), (&outside, "lk-out", OUTSIDE_V4, OUTSIDE_V6)]
        {
            inside.exec(&format!("ip addr add {v4}/24 dev {link}"));
            inside.exec(&format!("ip addr add {v6}/64 dev {link} nodad"));
            inside.exec(&format!("ip link set {link} up"));
        }
        let host = Self { namespace, outside, run_dir: tempfile::tempdir().expect("a directory") };
        // A link's own queueing discipline and carrier settle with its first packet.
        wait_until("the wire carries", || host.outside.exec("ip -j link show lk-out").contains("\"operstate\":\"UP\""));
        wait_until("the wire carries", || {
            host.namespace.exec("ip -j link show lk-up").contains("\"operstate\":\"UP\"")
        });
        host
    }

    fn config(&self) -> LinkConfig {
        LinkConfig {
            framing: "lk-framing".into(),
            bridge: BRIDGE.into(),
            tun: TUN.into(),
            mtu: 1450,
            run_dir: self.run_dir.path().to_owned(),
            tunnel_port: 50_103,
            service_v4: (Ipv4Addr::new(10, 30, 0, 0), 16),
            service_v6: (Ipv6Addr::new(0xfdff, 0, 0, 0, 0, 0, 0, 0), 16),
        }
    }

    /// Runs `f` with the host's links, as the daemon would; they are closed and kept after it.
    fn links<T: Send, F: Future<Output = T> + Send>(&self, f: impl FnOnce(Links) -> F + Send) -> T {
        let config = self.config();
        self.namespace.block_on(async { f(Links::open(config).await.expect("links open")).await })
    }

    /// Bridge, and one connected instance.
    fn with_instance(&self) -> Namespace {
        let instance = Namespace::new("in");
        let path = instance.path.clone();
        self.links(|links| async move {
            links.ensure_bridge(SUBNET).await.expect("bridge");
            links.attach(&id(0), &path, SUBNET, FIRST).await.expect("attached");
        });
        instance
    }
}

fn id(number: u32) -> InstanceId {
    InstanceId { service: "app.default.web.test".parse().unwrap(), number }
}

fn tcp(host: u16, container: u16) -> PortMapping {
    PortMapping { host, container, protocol: Protocol::Tcp }
}

/// Tells everybody who connects the address it sees.
struct Server {
    listener: TcpListener,
    accepting: Option<JoinHandle<()>>,
}

impl Server {
    fn start(namespace: &Namespace, port: u16) -> Self {
        Self::start_at(namespace, (Ipv6Addr::UNSPECIFIED, port).into())
    }

    fn start_at(namespace: &Namespace, at: SocketAddr) -> Self {
        let listener = namespace.within(|| TcpListener::bind(at)).expect("a listener");
        let accepted = listener.try_clone().unwrap();
        let accepting = std::thread::spawn(move || {
            while let Ok((mut stream, peer)) = accepted.accept() {
                let _ = write!(stream, "{}", peer.ip().to_canonical());
            }
        });
        Self { listener, accepting: Some(accepting) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Wakes the thread that accepts.
        let _ = shutdown(self.listener.as_raw_fd(), socket::Shutdown::Both);
        let _ = self.accepting.take().map(JoinHandle::join);
    }
}

/// The address that the server at the other end sees, or why there is none.
fn ask(from: &Namespace, address: IpAddr, port: u16) -> io::Result<IpAddr> {
    ask_within(Duration::from_secs(5), from, address, port)
}

/// Nobody answers, and not only slowly.
fn is_cut_off(from: &Namespace, address: IpAddr, port: u16) -> bool {
    ask_within(Duration::from_millis(500), from, address, port).is_err()
}

fn ask_within(limit: Duration, from: &Namespace, address: IpAddr, port: u16) -> io::Result<IpAddr> {
    from.within(|| {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::new(address, port), limit)?;
        stream.set_read_timeout(Some(limit))?;
        stream.shutdown(Shutdown::Write)?;
        let mut seen = String::new();
        stream.read_to_string(&mut seen)?;
        seen.parse().map_err(io::Error::other)
    })
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !condition() {
        assert!(Instant::now() < deadline, "not within five seconds: {what}");
        std::thread::yield_now();
    }
}
