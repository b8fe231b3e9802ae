//! What every workload finds around it, whatever runs it: host name, environment, and name servers, which are the node's own, and where
//! there is none those of the host that can be reached from a namespace.

use std::net::IpAddr;
use std::path::Path;
use std::time::Duration;

use tokio::sync::watch::Receiver;

use crate::model::{InstanceId, InstanceSpec};

/// Addresses at which workloads find a resolver of this node: `None` until that is known, empty where there is none.
pub type Resolvers = Option<Vec<IpAddr>>;

/// So long a new instance waits to hear where the node answers names.
const PATIENCE: Duration = Duration::from_secs(5);
/// Where no name server of the host can be reached from a namespace.
const FALLBACK: &str = "8.8.8.8";

pub(super) fn host_name(instance: &InstanceId) -> String {
    format!("instance-{}", instance.number)
}

pub(super) fn environment(spec: &InstanceSpec) -> Vec<String> {
    let mut environment = spec.environment.clone();
    if !environment.iter().any(|variable| variable.starts_with("HOSTNAME=")) {
        environment.push(format!("HOSTNAME={}", host_name(&spec.id)));
    }
    environment
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
            environment: vec!["HOSTNAME=x".into(), "A=b".into()],
            ..InstanceSpec::new(id, Technology::Container)
        };
        assert_eq!(environment(&spec), ["HOSTNAME=x", "A=b"]);
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
