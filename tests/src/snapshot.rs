//! What a host looks like to the kernel's own tools, to be compared with what it looks like later.

use std::collections::BTreeSet;

use anyhow::Result;
use serde_json::Value;

use crate::host::Host;

/// Facts about a host, one a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot(BTreeSet<String>);

impl Snapshot {
    /// Links, addresses, routes, rules, packet filter, sysctls, pinned BPF objects, containers, and the daemon's directory.
    pub fn take(host: &Host) -> Result<Self> {
        let mut facts = BTreeSet::new();
        for (what, line) in [
            ("link", "ip -json -details link show"),
            ("address", "ip -json address show"),
            ("route", "ip -json route show table all"),
            ("route6", "ip -json -6 route show table all"),
            ("rule", "ip -json rule show"),
        ] {
            let rows: Value = serde_json::from_str(&host.run(line)?)?;
            for row in rows.as_array().into_iter().flatten() {
                facts.insert(format!("{what} {}", stable(row.clone())));
            }
        }
        for (what, script) in [
            ("filter", "nft list ruleset | sed 's/counter packets [0-9]* bytes [0-9]*/counter/'"),
            ("iptables", "{ iptables-save; ip6tables-save; } | grep -v '^[#:]' || true"),
            ("pinned", "find /sys/fs/bpf -mindepth 1"),
            (
                "tc",
                "for i in $(ls /sys/class/net); do tc filter show dev $i ingress; tc filter show dev $i egress; done",
            ),
            ("program", "bpftool -j net show"),
            ("container", "docker ps --all --no-trunc --format '{{.ID}} {{.Names}}'"),
            ("image", "docker images --all --no-trunc --format '{{.ID}} {{.Repository}}:{{.Tag}}'"),
            ("network", "docker network ls --no-trunc --format '{{.ID}} {{.Name}}'"),
            (
                "sysctl",
                "cd /proc/sys/net; for f in ipv4/ip_forward ipv4/conf/*/forwarding ipv4/conf/*/rp_filter \
                 ipv6/conf/*/forwarding ipv6/conf/*/accept_ra ipv6/conf/*/proxy_ndp; do echo $f $(cat $f); done",
            ),
            ("run", "find /run /var/run -path '*node-engine*' 2>/dev/null || true"),
        ] {
            // Rules are told apart by where they are.
            let mut place = String::new();
            for line in host.shell(script)?.lines().map(str::trim).filter(|line| !line.is_empty()) {
                if line.ends_with('{') {
                    line.clone_into(&mut place);
                }
                facts.insert(format!("{what} {place} {line}"));
            }
        }
        Ok(Self(facts))
    }

    /// What is there now and was not, and what was there and is not: empty if nothing changed.
    pub fn difference(&self, now: &Self) -> Vec<String> {
        let come = now.0.difference(&self.0).map(|fact| format!("+ {fact}"));
        let gone = self.0.difference(&now.0).map(|fact| format!("- {fact}"));
        come.chain(gone).collect()
    }
}

/// Without what changes by itself: counters, timers, and the state of carriers.
fn stable(mut value: Value) -> Value {
    const VOLATILE: [&str; 12] = [
        "stats",
        "stats64",
        "operstate",
        "flags",
        "expires",
        "hello_timer",
        "tcn_timer",
        "topology_change_timer",
        "gc_timer",
        "valid_life_time",
        "preferred_life_time",
        "promiscuity",
    ];
    match &mut value {
        Value::Object(members) => {
            members.retain(|name, _| !VOLATILE.contains(&name.as_str()));
            for member in members.values_mut() {
                *member = stable(member.take());
            }
        }
        Value::Array(items) => {
            for item in items {
                *item = stable(item.take());
            }
        }
        _ => {}
    }
    value
}
