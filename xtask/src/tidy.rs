//! The rules of the house that no compiler checks: who may import whom, where a third-party client may be named, that cores think
//! without clocks, that the law of a packet depends on nothing, and that no path of somebody's machine slips in.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process::{output, root};
use crate::source::{PathName, paths, product_code};

/// A file longer than this is worth a second look.
const LONG_FILE: usize = 800;

/// Modules of `node-engine`, and what they must not name: siblings (`crate::…`) and crates.
const IMPORTS: [(&str, &[&str]); 7] = [
    (
        "model",
        &[
            "crate::api",
            "crate::cli",
            "crate::config",
            "crate::control",
            "crate::drain",
            "crate::netmanager",
            "crate::netns",
            "crate::runtime",
            "crate::standalone",
            "crate::store",
            "crate::telemetry",
            "crate::wire",
            "crate::workload",
            "tokio",
        ],
    ),
    (
        "wire",
        &[
            "crate::api",
            "crate::control",
            "crate::netmanager",
            "crate::netns",
            "crate::runtime",
            "crate::standalone",
            "crate::store",
            "crate::telemetry",
            "crate::workload",
            "tokio",
            "std::fs",
            "std::process",
            "reqwest",
        ],
    ),
    ("control", &["crate::workload", "crate::netmanager", "crate::runtime"]),
    ("runtime", &["crate::netmanager", "crate::control", "crate::workload", "crate::wire"]),
    ("netmanager", &["crate::runtime", "crate::control", "crate::wire", "crate::workload"]),
    (
        "workload",
        &[
            "crate::runtime::docker",
            "crate::runtime::containerd",
            "crate::runtime::unikernel",
            "crate::runtime::wasm",
            "crate::control",
            "crate::wire",
        ],
    ),
    ("telemetry", &["crate::control", "crate::wire", "crate::netmanager"]),
];

/// Who may name the composition root.
const MAY_NAME_ENGINE: [&str; 4] = ["main", "lib", "cli", "engine"];

/// A client crate and the places that may name it.
const CLIENTS: [(&str, &[&str]); 14] = [
    ("aya", &["netmanager/datapath"]),
    ("hickory_proto", &["names"]),
    ("bollard", &["runtime/docker"]),
    ("redb", &["store/database"]),
    ("rtnetlink", &["netmanager/link"]),
    ("netlink_packet_route", &["netmanager/link"]),
    ("netlink_packet_core", &["netmanager/link"]),
    ("rumqttc", &["control/mqtt", "standalone/client"]),
    ("rumqttd", &["standalone/broker"]),
    ("prometheus_client", &["metrics"]),
    ("tonic", &["runtime/containerd", "runtime/volumes"]),
    ("wasmi", &["runtime/wasm"]),
    ("wasmi_core", &["runtime/wasm"]),
    ("wasmi_wasi", &["runtime/wasm"]),
];

/// The places that may turn values into text and back.
const SERIALISING: [&str; 17] = [
    "wire",
    "config",
    "api",
    "store",
    // The embedded cluster is a cluster: it reads and writes the wire from the other end, and keeps its own state.
    "standalone/actor",
    "standalone/documents",
    "standalone/http",
    "standalone/saved",
    "standalone/socketio",
    // Event packets are JSON arrays with their name inside: framing, not documents.
    "control/socketio/frame",
    "netmanager/link/journal",
    // credentials are in a file of JSON
    "runtime/registries",
    // gpsd speaks JSON
    "telemetry/gps",
    // collectors of metrics are told in JSON
    "metrics/otlp",
    // images and OCI runtimes speak JSON
    "runtime/containerd/image",
    "runtime/containerd/spec",
    // prints what the local API answered
    "cli",
];

/// Things a core must not name: it gets time and randomness as arguments.
const NOT_IN_CORES: [&str; 6] = ["async ", ".await", "Instant::now", "SystemTime::now", "rand::", "tokio::"];

pub(crate) fn run() -> Result<()> {
    let mut findings = Vec::new();
    let files = tracked_files()?;
    for name in &files {
        let path = root().join(name);
        // A file that git knows and the disk does not is being deleted; a binary file has no lines to judge.
        let Ok(text) = fs::read_to_string(&path) else { continue };
        findings.extend(foreign_paths(name, &text));
        if name.ends_with(".rs") && text.lines().count() > LONG_FILE {
            println!("warning: {name} has {} lines; is there a second idea in it?", text.lines().count());
        }
        if let Some(module) = name.strip_prefix("node-engine/src/").and_then(|name| name.strip_suffix(".rs")) {
            findings.extend(judge(module, &text).into_iter().map(|finding| format!("{name}: {finding}")));
        }
    }
    let manifest = fs::read_to_string(root().join("netmanager-common/Cargo.toml")).context("netmanager-common")?;
    findings.extend(hard_dependencies(&manifest).into_iter().map(|dependency| {
        format!("netmanager-common/Cargo.toml: {dependency} is not optional; the law of a packet depends on nothing")
    }));
    if findings.is_empty() {
        println!("tidy: {} files are in order", files.len());
        return Ok(());
    }
    for finding in &findings {
        eprintln!("{finding}");
    }
    bail!("tidy: {} findings", findings.len())
}

/// Also files not yet added, so that a finding comes before the commit.
fn tracked_files() -> Result<Vec<String>> {
    let mut command = Command::new("git");
    command.current_dir(root()).args(["ls-files", "--cached", "--others", "--exclude-standard"]);
    Ok(output(&mut command)?.lines().map(str::to_owned).collect())
}

/// What is wrong in a source of `node-engine`; `module` is its path below `src` without `.rs`.
fn judge(module: &str, text: &str) -> Vec<String> {
    let place = module.strip_suffix("/mod").unwrap_or(module);
    if place.rsplit('/').next() == Some("tests") || place.contains("/tests/") {
        return Vec::new();
    }
    let code = product_code(text);
    let mut segments: Vec<&str> = place.split('/').collect();
    if matches!(place, "lib" | "main") {
        segments.clear();
    }
    let named = paths(&code, &segments);
    let mut findings = imports(place, &named);
    findings.extend(clients(place, &named));
    if place.rsplit('/').next() == Some("core") {
        findings.extend(
            NOT_IN_CORES
                .iter()
                .filter(|word| code.contains(**word))
                .map(|word| format!("a core must not use `{word}`")),
        );
    }
    findings.sort();
    findings.dedup();
    findings
}

fn imports(place: &str, named: &[PathName]) -> Vec<String> {
    let top = place.split('/').next().unwrap_or(place);
    let mut findings = Vec::new();
    for (_, forbidden) in IMPORTS.iter().filter(|(module, _)| *module == top) {
        for rule in *forbidden {
            if named.iter().any(|path| begins(path, rule)) {
                findings.push(format!("`{top}` must not name `{rule}`"));
            }
        }
    }
    if !MAY_NAME_ENGINE.contains(&top) && named.iter().any(|path| begins(path, "crate::engine")) {
        findings.push("only the command line may name `crate::engine`".into());
    }
    findings
}

fn clients(place: &str, named: &[PathName]) -> Vec<String> {
    let within = |homes: &[&str]| homes.iter().any(|home| place == *home || place.starts_with(&format!("{home}/")));
    let mut findings = Vec::new();
    for (client, homes) in CLIENTS {
        if !within(homes) && named.iter().any(|path| begins(path, client)) {
            findings.push(format!("`{client}` is named outside {}", homes.join(", ")));
        }
    }
    let serialises = named.iter().any(|path| begins(path, "serde") || begins(path, "serde_json"));
    if serialises && !within(&SERIALISING) {
        findings.push(format!("serialises; only {} do", SERIALISING.join(", ")));
    }
    findings
}

/// Does the path begin with the rule's segments?
fn begins(path: &PathName, rule: &str) -> bool {
    let mut segments = path.iter();
    rule.split("::").all(|wanted| segments.next().is_some_and(|segment| segment == wanted))
}

/// Dependencies of the manifest's `[dependencies]` that are not optional.
fn hard_dependencies(manifest: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut inside = false;
    for line in manifest.lines().map(str::trim) {
        if line.starts_with('[') {
            inside = line == "[dependencies]";
            if let Some(name) = line.strip_prefix("[dependencies.") {
                found.push(name.trim_end_matches(']').to_owned());
            }
        } else if inside && line.contains('=') && !line.starts_with('#') && !line.contains("optional = true") {
            found.extend(line.split(['=', '.']).next().map(|name| name.trim().to_owned()));
        }
    }
    found
}

/// Absolute paths of one machine or person.
fn foreign_paths(name: &str, text: &str) -> Vec<String> {
    const FOREIGN: [&str; 4] =
        [concat!("/wo", "rk/"), concat!("/ro", "ot/"), concat!("/tmp", "/wt/"), concat!("/ho", "me/")];
    let mut findings = Vec::new();
    for (number, line) in text.lines().enumerate() {
        for foreign in FOREIGN {
            // A path of its own, not the tail of another one such as `frame/work/`.
            let own = line.match_indices(foreign).any(|(at, _)| {
                !line[..at].ends_with(|c: char| c.is_alphanumeric() || matches!(c, '/' | '.' | '_' | '-' | '}' | '>'))
            });
            if own {
                findings.push(format!("{name}:{}: names a path of one machine ({foreign})", number + 1));
            }
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rule_catches_its_violation() {
        for (module, code, complaint) in [
            ("model/service", "use crate::wire::deploy;", "must not name `crate::wire`"),
            ("model/service", "fn f() { tokio::spawn(x); }", "must not name `tokio`"),
            ("model/service", "use serde::Serialize;", "serialises"),
            ("control/mqtt", "use super::super::workload::Workload;", "must not name `crate::workload`"),
            ("runtime/docker", "use crate::{model::InstanceId, netmanager};", "must not name `crate::netmanager`"),
            ("netmanager/link/veth", "use crate::runtime::Sandbox;", "must not name `crate::runtime`"),
            ("workload/actor", "use crate::runtime::docker::Docker;", "must not name `crate::runtime::docker`"),
            ("workload/mod", "use crate::engine::Engine;", "only the command line"),
            ("netmanager/core", "use std::time::Instant; fn f() { Instant::now(); }", "a core must not use"),
            ("workload/core", "async fn f() {}", "a core must not use"),
            ("engine", "use bollard::Docker;", "`bollard` is named outside runtime/docker"),
            ("netmanager/actor", "let x = aya::maps::Map;", "`aya` is named outside"),
            ("runtime/docker", "use rtnetlink::Handle;", "`rtnetlink` is named outside"),
            ("standalone/http", "use rumqttd::Broker;", "`rumqttd` is named outside standalone/broker"),
        ] {
            let findings = judge(module, code);
            assert!(findings.iter().any(|finding| finding.contains(complaint)), "{module}: {code}: {findings:?}");
        }
    }

    #[test]
    fn good_code_passes() {
        for (module, code) in [
            ("model/service", "use super::status::Status; use std::fmt;"),
            ("wire/deploy", "use crate::model::InstanceSpec; use serde::Deserialize;"),
            ("runtime/docker/mod", "use bollard::Docker; use super::Runtime;"),
            ("workload/core", "use crate::model::InstanceId; fn f(now: Instant) {} // Instant::now"),
            ("workload/actor", "#[cfg(test)]\nmod tests { use crate::runtime::docker::Docker; }"),
            ("engine", "use crate::{control, runtime, netmanager, wire};"),
            ("main", "use node_engine::engine; use crate::engine::run;"),
        ] {
            assert_eq!(judge(module, code), Vec::<String>::new(), "{module}: {code}");
        }
    }

    #[test]
    fn dependencies_of_the_law_are_optional() {
        assert!(
            hard_dependencies("[dependencies]\naya = { workspace = true, optional = true }\n[dev-dependencies]\nx = 1")
                .is_empty()
        );
        assert_eq!(hard_dependencies("[dependencies]\nlibm = \"1\"\nserde.workspace = true"), ["libm", "serde"]);
        assert_eq!(hard_dependencies("[dependencies.libm]\nversion = \"1\""), ["libm"]);
    }

    #[test]
    fn paths_of_one_machine_are_found() {
        let personal = format!("cd {}project", concat!("/ho", "me/somebody/"));
        assert_eq!(foreign_paths("x", &personal).len(), 1);
        assert!(foreign_paths("x", concat!("net/wo", "rk/ and ./wo", "rk/ and <root>/wo", "rk/")).is_empty());
    }

    #[test]
    fn rules_are_about_modules_that_exist() {
        // A rule about nothing checks nothing.
        for (module, _) in IMPORTS {
            let base = root().join("node-engine/src").join(module);
            assert!(base.is_dir() || base.with_extension("rs").is_file(), "{module}");
        }
    }
}
