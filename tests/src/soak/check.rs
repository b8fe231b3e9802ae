//! Is everything as it ought to be, and nothing else there? Asked of the kernel's and Docker's own tools on each host, of the cluster,
//! and by requests to everything that ought to answer.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;

use anyhow::{Context, Result, anyhow};
use serde_json::Value;

use super::model::{Model, Operation};
use crate::cluster::InstanceRow;
use crate::node::Node;
use crate::topology::Lab;
use crate::traffic::{HTTP, socket};

/// Sections of what a host prints begin so.
const MARK: &str = "@@ ";
const SANDBOX: &str = ".sandbox";

/// What of a host ought not to change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Frame {
    facts: BTreeSet<String>,
}

/// What a host is seen to have.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Process and state of each container, by name.
    containers: BTreeMap<String, (u32, String)>,
    /// Host ends by the instance that they are for.
    veths: BTreeMap<String, String>,
    complaints: Vec<String>,
    frame: Frame,
    endpoints: Option<usize>,
    /// Network namespaces that a process is in, but the host's own.
    namespaces: usize,
    pub(super) daemon: u32,
}

/// A look at everything, where all is well.
#[derive(Debug)]
pub(super) struct Sight {
    pub(super) rows: Vec<InstanceRow>,
    /// By name.
    pub(super) hosts: BTreeMap<String, Seen>,
}

/// What all hosts had when last all was well.
#[derive(Debug, Default)]
pub(super) struct Known {
    frames: BTreeMap<String, Frame>,
    /// By node and container.
    processes: BTreeMap<(String, String), u32>,
}

impl Known {
    /// What is to be compared with later.
    pub(super) fn adopt(&mut self, seen: &BTreeMap<String, Seen>) {
        self.processes.clear();
        for (node, seen) in seen {
            self.frames.entry(node.clone()).or_insert_with(|| seen.frame.clone());
            for (name, (pid, _)) in &seen.containers {
                self.processes.insert((node.clone(), name.clone()), *pid);
            }
        }
    }
}

/// Looks at all of it; complaints, none of them where all is well.
pub(super) fn look(
    lab: &Lab,
    model: &Model,
    known: &Known,
    operation: Option<&Operation>,
) -> Result<Sight, Vec<String>> {
    let rows = lab.cluster.instances().map_err(|error| vec![format!("cluster: {error:#}")])?;
    model.judge(&rows, operation).map_err(|error| vec![format!("cluster: {error:#}")])?;
    let looks: Vec<(String, Result<Seen>)> = thread::scope(|scope| {
        let looks: Vec<_> =
            lab.nodes.iter().map(|node| (node.host.name().to_owned(), scope.spawn(|| look_at(node, &rows)))).collect();
        let panicked = |_| Err(anyhow!("a look panicked"));
        looks.into_iter().map(|(name, look)| (name, look.join().unwrap_or_else(panicked))).collect()
    });
    let (mut all, mut complaints) = (BTreeMap::new(), Vec::new());
    for (node, seen) in looks {
        match seen {
            Ok(seen) => {
                let found = judge(&node, &seen, &rows, known);
                complaints.extend(found.into_iter().map(|complaint| format!("{node}: {complaint}")));
                all.insert(node, seen);
            }
            Err(error) => complaints.push(format!("{node}: {error:#}")),
        }
    }
    if complaints.is_empty() { Ok(Sight { rows, hosts: all }) } else { Err(complaints) }
}

/// What of a node alone is not as these rows of the cluster's want it: each instance that runs once and connected, nothing else.
pub(super) fn alone(node: &Node, rows: &[InstanceRow]) -> Result<Vec<String>> {
    let running: Vec<InstanceRow> = rows.iter().filter(|row| row.status == "RUNNING").cloned().collect();
    Ok(judge(node.host.name(), &look_at(node, &running)?, &running, &Known::default()))
}

fn judge(node: &str, seen: &Seen, rows: &[InstanceRow], known: &Known) -> Vec<String> {
    let mut complaints = seen.complaints.clone();
    let here: BTreeSet<String> = rows.iter().filter(|row| row.node == node).map(InstanceRow::container).collect();
    let mut differ = |what: &str, there: BTreeSet<String>, wanted: &BTreeSet<String>| {
        complaints.extend(wanted.difference(&there).map(|name| format!("{what} {name} is missing")));
        complaints.extend(there.difference(wanted).map(|name| format!("{what} {name} is left over")));
    };
    let wanted = here.iter().flat_map(|name| [name.clone(), format!("{name}{SANDBOX}")]).collect();
    differ("container", seen.containers.keys().cloned().collect(), &wanted);
    differ("veth of", seen.veths.keys().cloned().collect(), &here);
    if let Some(frame) = known.frames.get(node) {
        differ("fact", seen.frame.facts.clone(), &frame.facts);
    }
    if let Some(endpoints) = seen.endpoints.filter(|endpoints| *endpoints != 2 * here.len()) {
        complaints.push(format!("{endpoints} endpoints in the datapath for {} instances", here.len()));
    }
    if seen.namespaces != here.len() {
        complaints.push(format!("{} network namespaces for {} instances", seen.namespaces, here.len()));
    }
    for (name, (pid, state)) in &seen.containers {
        if state != "running" {
            complaints.push(format!("container {name} is {state}"));
        }
        let before = known.processes.get(&(node.to_owned(), name.clone()));
        if let Some(before) = before.filter(|before| *before != pid) {
            complaints.push(format!("container {name} was process {before} and is {pid}: it was restarted"));
        }
    }
    complaints
}

fn look_at(node: &Node, rows: &[InstanceRow]) -> Result<Seen> {
    let client = node.client()?;
    let words: Vec<String> = std::iter::once(client.get_program())
        .chain(client.get_args())
        .skip_while(|word| *word != "--")
        .skip(1)
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let ask = words.join(" ");
    let mut script = format!(
        "echo '{MARK}containers'
         ids=$(docker ps --all --quiet --no-trunc)
         test -z \"$ids\" || docker inspect --format '{{{{.Name}}}} {{{{.State.Pid}}}} {{{{.State.Status}}}}' $ids
         echo '{MARK}links'
         ip -json -details link show
         echo '{MARK}namespaces'
         readlink /proc/[0-9]*/ns/net /proc/1/ns/net | sort -u
         echo '{MARK}filter'
         nft list ruleset | sed 's/counter packets [0-9]* bytes [0-9]*/counter/'
         echo '{MARK}addresses'
         ip -oneline address show | sed 's/^[0-9]*: //'
         echo '{MARK}routes'
         ip route show table all; ip -6 route show table all
         echo '{MARK}pins'
         find /sys/fs/bpf -mindepth 1 -type f | sed 's,/v[0-9_]*/,/v/,'
         echo '{MARK}endpoints'
         map=$(find /sys/fs/bpf -name ENDPOINTS)
         test -z \"$map\" || bpftool -j map dump pinned $map
         echo '{MARK}services'
         {ask} net services --json
         echo '{MARK}status'
         {ask} status --json
         echo '{MARK}answers'\n"
    );
    let targets = targets(node.host.name(), rows)?;
    if let Some((from, _)) = targets.first() {
        script.push_str(&format!("pid=$(docker inspect --format '{{{{.State.Pid}}}}' {from})\n"));
    }
    for (_, to) in &targets {
        // Several at a time: one that does not answer must not keep the others waiting.
        script.push_str(&format!(
            "{{ said=$(timeout 3 nsenter --net=/proc/$pid/ns/net /proc/$pid/root/bin/probe get {to} 1); echo \"{to} $said\"; }} &\n"
        ));
    }
    script.push_str("wait\n");
    let mut command = node.host.command("sh");
    let printed = crate::process::output(command.args(["-c", &script]))?;
    read(&printed, targets.len(), rows)
}

/// From which container of this node, and to where: every service and every instance but its own.
fn targets(node: &str, rows: &[InstanceRow]) -> Result<Vec<(String, String)>> {
    let Some(from) = rows.iter().find(|row| row.node == node && super::STAYING.contains(&row.short())) else {
        return Ok(Vec::new());
    };
    let others = rows.iter().filter(|row| row.service != from.service);
    let mut addresses = BTreeSet::new();
    for row in others {
        addresses.extend([row.service_address(false)?, row.service_address(true)?, row.own_address()?]);
    }
    Ok(addresses.into_iter().map(|to| (from.container(), socket(to, HTTP))).collect())
}

fn read(printed: &str, targets: usize, rows: &[InstanceRow]) -> Result<Seen> {
    let mut sections: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    let mut section = "";
    for line in printed.lines() {
        match line.trim_start().strip_prefix(MARK) {
            Some(name) => section = name,
            None => sections.entry(section).or_default().push(line),
        }
    }
    let lines = |name: &str| sections.get(name).map(Vec::as_slice).unwrap_or_default();
    let json = |name: &str| -> Result<Value> {
        let text = lines(name).join("\n");
        serde_json::from_str(&text).with_context(|| format!("{name}: {text:?}"))
    };
    let mut seen = Seen::default();
    for line in lines("containers") {
        let mut words = line.split(' ');
        let (Some(name), Some(pid), Some(state)) = (words.next(), words.next(), words.next()) else { continue };
        seen.containers.insert(name.trim_start_matches('/').to_owned(), (pid.parse()?, state.to_owned()));
    }
    let names = links(&json("links")?, &mut seen);
    seen.namespaces = lines("namespaces").len().saturating_sub(1);
    let chains: BTreeSet<String> = seen.veths.values().cloned().collect();
    seen.frame.facts.extend(filter(lines("filter"), &chains, &mut seen.complaints));
    seen.frame.facts.extend(addresses(lines("addresses")));
    seen.frame.facts.extend(routes(lines("routes")));
    seen.frame.facts.extend(pins(lines("pins"), &names, &chains, &mut seen.complaints));
    if !lines("endpoints").is_empty() {
        seen.endpoints = json("endpoints")?.as_array().map(Vec::len);
    }
    seen.complaints.extend(services(&json("services")?, rows));
    let status = json("status")?;
    if status["cluster"]["connected"] != true {
        seen.complaints.push("not connected to the cluster".into());
    }
    seen.daemon = u32::try_from(status["pid"].as_u64().unwrap_or_default())?;
    let answered = lines("answers").iter().filter(|line| line.contains(r#""failed":0"#)).count();
    if answered < targets {
        let silent: Vec<&str> =
            lines("answers").iter().copied().filter(|line| !line.contains(r#""failed":0"#)).collect();
        seen.complaints.push(format!("{answered} of {targets} addresses answer: {}", silent.join("; ")));
    }
    Ok(seen)
}

/// A service that has gone may be kept, so that who calls it is told; instances that have gone may not, and none may be missing.
fn services(page: &Value, rows: &[InstanceRow]) -> Vec<String> {
    let mut complaints = Vec::new();
    for row in page["rows"].as_array().into_iter().flatten() {
        let name = row["service"].as_str().unwrap_or_default();
        let known: BTreeSet<u64> =
            row["instances"].as_array().into_iter().flatten().filter_map(|one| one["number"].as_u64()).collect();
        let wanted: BTreeSet<u64> =
            rows.iter().filter(|row| row.service == name).map(|row| u64::from(row.number)).collect();
        if known != wanted {
            complaints.push(format!("the overlay's table has the instances {known:?} of {name}, not {wanted:?}"));
        }
    }
    complaints
}

/// Gives the names of all by their indices.
fn links(links: &Value, seen: &mut Seen) -> BTreeMap<String, String> {
    let mut names = BTreeMap::new();
    let bridge = node_engine::config::NetworkConfig::default().bridge;
    for link in links.as_array().into_iter().flatten() {
        let text = |member: &str| link[member].as_str().unwrap_or_default().to_owned();
        let name = text("ifname");
        names.insert(link["ifindex"].to_string(), name.clone());
        let is_veth = link["linkinfo"]["info_kind"] == "veth";
        if !is_veth || name == "eth0" {
            seen.frame.facts.insert(format!("link {name} mtu {} master {:?}", link["mtu"], text("master")));
            continue;
        }
        if text("master") != bridge || text("operstate") != "UP" {
            seen.complaints.push(format!("{name} is {} at {:?}", text("operstate"), text("master")));
        }
        let instance = text("ifalias");
        if let Some(other) = seen.veths.insert(instance.clone(), name.clone()) {
            seen.complaints.push(format!("{name} and {other} are both for {instance:?}"));
        }
    }
    names
}

/// Rules of ours, and those of ours in chains of others. Chains of instances are compared with what is connected.
fn filter(lines: &[&str], veths: &BTreeSet<String>, complaints: &mut Vec<String>) -> BTreeSet<String> {
    let (mut facts, mut guarded) = (BTreeSet::new(), BTreeSet::new());
    let (mut table, mut chain) = (String::new(), String::new());
    for line in lines.iter().map(|line| line.trim()) {
        if let Some(name) = line.strip_prefix("table ") {
            name.trim_end_matches(" {").clone_into(&mut table);
            chain.clear();
        } else if let Some(name) = line.strip_prefix("chain ") {
            name.trim_end_matches(" {").clone_into(&mut chain);
            if table == "netdev node_engine" && chain.starts_with("ne") {
                guarded.insert(chain.clone());
            }
        }
        let of_instance = table == "netdev node_engine" && chain.starts_with("ne");
        let ours = table.ends_with(" node_engine") || line.contains("edge-");
        if ours && !of_instance && line != "}" {
            facts.insert(format!("{table} {chain} {line}"));
        }
    }
    complaints.extend(veths.difference(&guarded).map(|name| format!("{name} has no guard")));
    complaints.extend(guarded.difference(veths).map(|name| format!("guard of {name} is left over")));
    facts
}

fn is_of_instance(line: &str) -> bool {
    line.split([' ', '@', '/', '_', '-', '.']).any(|word| word.len() == 13 && word.starts_with("ne"))
}

/// Link-local ones come and go with the links.
fn addresses<'a>(lines: &'a [&str]) -> impl Iterator<Item = String> + use<'a> {
    let kept = lines.iter().filter(|line| !line.contains("fe80:") && !is_of_instance(line));
    kept.map(|line| {
        let words: Vec<&str> = line.split_whitespace().take(4).collect();
        format!("address {}", words.join(" ").trim_end_matches('\\').trim_end())
    })
}

fn routes<'a>(lines: &'a [&str]) -> impl Iterator<Item = String> + use<'a> {
    let kept = lines.iter().filter(|line| !line.contains("fe80:") && !line.contains("ff00::") && !is_of_instance(line));
    kept.map(|line| format!("route {}", line.replace(" linkdown", "").split_whitespace().collect::<Vec<_>>().join(" ")))
}

/// A link's pin is named after the index of its interface: an instance's has one, and one of no interface is left over.
fn pins(
    lines: &[&str],
    names: &BTreeMap<String, String>,
    veths: &BTreeSet<String>,
    complaints: &mut Vec<String>,
) -> BTreeSet<String> {
    let (mut facts, mut pinned) = (BTreeSet::new(), BTreeSet::new());
    for pin in lines {
        let what = pin.trim_end_matches(|letter: char| letter.is_ascii_digit());
        match names.get(&pin[what.len()..]) {
            _ if what.len() == pin.len() => drop(facts.insert(format!("pin {pin}"))),
            Some(name) if veths.contains(name) => drop(pinned.insert(name.clone())),
            Some(name) => drop(facts.insert(format!("pin {what} of {name}"))),
            None => complaints.push(format!("pin {pin} is left over")),
        }
    }
    if !facts.is_empty() {
        complaints.extend(veths.difference(&pinned).map(|name| format!("no program is pinned for {name}")));
    }
    facts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(names: &[&str]) -> BTreeSet<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn pins_belong_to_interfaces() {
        let names = [("2", "eth0"), ("7", "ne0123456789a")].map(|(index, name)| (index.to_owned(), name.to_owned()));
        let names = BTreeMap::from(names);
        let veths = set(&["ne0123456789a"]);
        let check = |lines: &[&str]| {
            let mut complaints = Vec::new();
            let facts = pins(lines, &names, &veths, &mut complaints);
            (facts, complaints)
        };
        let (facts, complaints) = check(&["/p/FLOWS", "/p/uplink_2", "/p/veth_7"]);
        assert_eq!((facts, complaints.as_slice()), (set(&["pin /p/FLOWS", "pin /p/uplink_ of eth0"]), &[][..]));
        assert_eq!(check(&["/p/FLOWS", "/p/veth_9"]).1.len(), 2, "one left over, one missing");
        assert_eq!(check(&[]).1.len(), 0, "another datapath has none");
    }

    #[test]
    fn guards_are_compared_with_what_is_connected() {
        let rules = |chain: &str| {
            let text = format!(
                "table netdev node_engine {{\nchain drop_x {{\ncounter drop\n}}\nchain {chain} {{\nip saddr 10.0.0.1 accept\n}}\n}}\n\
                 table ip filter {{\nchain DOCKER-USER {{\niifname \"edge-bridge\" counter accept\nreturn\n}}\n}}"
            );
            let lines: Vec<&str> = text.lines().collect();
            let mut complaints = Vec::new();
            let facts = filter(&lines, &set(&["ne0123456789a"]), &mut complaints);
            (facts, complaints)
        };
        let (facts, complaints) = rules("ne0123456789a");
        assert!(complaints.is_empty(), "{complaints:?}");
        assert!(facts.contains("ip filter DOCKER-USER iifname \"edge-bridge\" counter accept"), "{facts:?}");
        assert!(!facts.iter().any(|fact| fact.contains("saddr") || fact.contains("return")), "{facts:?}");
        assert_eq!(rules("neaaaaaaaaaaa").1.len(), 2, "one left over, one missing");
    }
}
