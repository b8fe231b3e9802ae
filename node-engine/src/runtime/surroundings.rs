//! What every workload finds around it, whatever runs it: host name, environment, and name servers, which are the node's own, and where
//! there is none those of the host that can be reached from a namespace.

use std::fs::File;
use std::io::Read;
use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use tokio::sync::watch::Receiver;

use crate::model::{InstanceId, InstanceSpec};

/// Addresses at which workloads find a resolver of this node: `None` until that is known, empty where there is none.
pub type Resolvers = Option<Vec<IpAddr>>;

/// So long a new instance waits to hear where the node answers names.
const PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of the host's file, and names of it, that workloads are told.
const LONGEST_HOSTS: u64 = 64 << 10;
const MOST_HOSTS: usize = 256;
/// Where no name server of the host can be reached from a namespace.
const FALLBACK: &str = "8.8.8.8";

pub(super) fn host_name(instance: &InstanceId) -> String {
    format!("instance-{}", instance.number)
}

/// As `NAME=value`.
pub(super) fn environment(spec: &InstanceSpec) -> impl Iterator<Item = String> {
    let named = spec.environment.iter().any(|variable| variable.starts_with("HOSTNAME="));
    let host_name = (!named).then(|| format!("HOSTNAME={}", host_name(&spec.id)));
    spec.environment.iter().filter(|variable| variable.contains('=')).cloned().chain(host_name)
}

/// Names of variables that the workload is not to have, although its image says so.
pub(super) fn unset(spec: &InstanceSpec) -> impl Iterator<Item = String> {
    spec.environment.iter().filter(|variable| !variable.contains('=')).cloned()
}

/// What the node's `/etc/hosts` says of other machines: workers of the reference system hand that file to their containers.
pub(super) fn known_hosts() -> Vec<(IpAddr, String)> {
    let mut text = String::new();
    // None is as good as an empty one.
    let _ = File::open("/etc/hosts").and_then(|file| file.take(LONGEST_HOSTS).read_to_string(&mut text));
    others(&text)
}

fn others(hosts: &str) -> Vec<(IpAddr, String)> {
    let entry = |line: &str| {
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        let address = words.next()?.parse::<IpAddr>().ok()?;
        let elsewhere = !address.is_loopback() && !address.is_unspecified() && !address.is_multicast();
        let names: Vec<_> = words.filter(|name| is_host_name(name)).map(|name| (address, name.to_owned())).collect();
        elsewhere.then_some(names)
    };
    hosts.lines().filter_map(entry).flatten().take(MOST_HOSTS).collect()
}

/// What an engine takes for one; `localhost` is everybody's own.
fn is_host_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    name.len() < 254 && name.bytes().all(plain) && !name.contains("localhost") && !name.starts_with("ip6-")
}

/// The node's own resolver; where there is none, the host's. A node that has just come up may still be on its way to one.
pub(super) async fn name_servers(resolvers: &Receiver<Resolvers>) -> Vec<String> {
    let mut resolvers = resolvers.clone();
    let known = tokio::time::timeout(PATIENCE, resolvers.wait_for(Option::is_some)).await;
    match known.ok().and_then(Result::ok).and_then(|known| known.clone()) {
        Some(own) if !own.is_empty() => own.iter().map(ToString::to_string).collect(),
        _ => host_name_servers(),
    }
}

/// The host's real name servers: behind a local stub resolver, those that systemd-resolved knows.
pub(super) fn host_name_servers() -> Vec<String> {
    let resolved = Path::new("/run/systemd/resolve/resolv.conf");
    let conf = std::fs::read_to_string(resolved).or_else(|_| std::fs::read_to_string("/etc/resolv.conf"));
    reachable(&conf.unwrap_or_default())
}

/// The name servers of a resolv.conf that a workload can reach: not those on the host's loopback.
fn reachable(resolv_conf: &str) -> Vec<String> {
    let server = |line: &str| line.strip_prefix("nameserver")?.trim().parse::<IpAddr>().ok();
    let reachable = |address: &IpAddr| !address.is_loopback() && !address.is_unspecified();
    let servers: Vec<_> =
        resolv_conf.lines().filter_map(server).filter(reachable).take(3).map(|address| address.to_string()).collect();
    if servers.is_empty() { vec![FALLBACK.into()] } else { servers }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Technology;

    #[test]
    fn the_environment_may_set_its_own_host_name() {
        let id = "a.b.c.d.instance.0".parse().expect("an id");
        let spec = InstanceSpec {
            environment: vec!["HOSTNAME=x".into(), "A=b".into(), "PAGER".into()],
            ..InstanceSpec::new(id, Technology::Container)
        };
        assert_eq!(environment(&spec).collect::<Vec<_>>(), ["HOSTNAME=x", "A=b"]);
        assert_eq!(unset(&spec).collect::<Vec<_>>(), ["PAGER"]);
    }

    #[test]
    fn workloads_know_the_machines_that_their_node_knows() {
        let hosts = "127.0.0.1 localhost\n127.0.1.1 node-a\n# 10.0.0.9 no\n10.0.0.7\tbroker broker.site # the site's\n\
                     fd00::7 broker6\nff02::1 ip6-allnodes\n::1 ip6-localhost\nbad\n10.0.0.8\n10.0.0.8 a:b\n";
        let found: Vec<_> = others(hosts).into_iter().map(|(address, name)| format!("{name}={address}")).collect();
        assert_eq!(found, ["broker=10.0.0.7", "broker.site=10.0.0.7", "broker6=fd00::7"]);
    }

    #[test]
    fn workloads_get_name_servers_they_can_reach() {
        for (conf, expected) in [
            ("nameserver 10.0.0.1\nsearch x\nnameserver fd00::1\n", vec!["10.0.0.1", "fd00::1"]),
            ("# none\nnameserver 127.0.0.53\nnameserver ::1\n", vec!["8.8.8.8"]),
            ("", vec!["8.8.8.8"]),
            ("nameserver bad\nnameserver\t1.1.1.1\n", vec!["1.1.1.1"]),
        ] {
            assert_eq!(reachable(conf), expected, "{conf:?}");
        }
    }
}
