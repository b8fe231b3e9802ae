//! Layering, as rows of *given file, environment, flags → then this setting*.

use std::collections::BTreeSet;
use std::io::Write;

use super::*;
use crate::config::{DatapathChoice, Generation, OnExit};

type Pairs = &'static [(&'static str, &'static str)];

fn load_from(file: &str, environment: Pairs, flags: &[(&'static str, &str)]) -> Result<Loaded, String> {
    let mut written = tempfile::NamedTempFile::new().unwrap();
    written.write_all(file.as_bytes()).unwrap();
    let sources = Sources {
        file: Some(written.path().to_owned()),
        environment: environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        flags: flags.iter().map(|(key, value)| Flag { name: "--flag", key, value: (*value).to_owned() }).collect(),
    };
    let path = written.path().display().to_string();
    load(&sources).map_err(|error| error.to_string().replace(&path, "FILE"))
}

fn check(file: &str, environment: Pairs, flags: &[(&'static str, &str)], seen: impl Fn(&Config) -> String, want: &str) {
    let loaded = load_from(file, environment, flags).unwrap();
    assert_eq!(seen(&loaded.config), want, "file {file:?}, environment {environment:?}, flags {flags:?}");
}

#[test]
fn stronger_sources_win() {
    let port = |config: &Config| config.network.tunnel_port.to_string();
    let file = "[network]\ntunnel_port = 1001";
    let legacy: Pairs = &[("PUBLIC_WORKER_PORT", "1002")];
    let both: Pairs = &[("PUBLIC_WORKER_PORT", "1002"), ("NODE_ENGINE_TUNNEL_PORT", "1003")];
    let flag = [("network.tunnel_port", "1004")];
    let docker = |config: &Config| config.runtime.docker_host.clone().unwrap_or_default();
    let named = "[runtime]\ndocker_host = \"/file.sock\"";
    check("", &[("DOCKER_HOST", "/theirs.sock")], &[], docker, "/theirs.sock");
    check(named, &[("DOCKER_HOST", "/theirs.sock")], &[], docker, "/file.sock");
    check(named, &[("DOCKER_HOST", "ssh://theirs")], &[], docker, "/file.sock");
    let both_hosts: Pairs = &[("DOCKER_HOST", "/theirs.sock"), ("NODE_ENGINE_DOCKER_HOST", "/ours.sock")];
    check(named, both_hosts, &[], docker, "/ours.sock");
    check("", &[], &[], port, "50103");
    check(file, &[], &[], port, "1001");
    check(file, legacy, &[], port, "1002");
    check(file, both, &[], port, "1003");
    check(file, both, &flag, port, "1004");
    check(file, &[("PUBLIC_WORKER_PORT", "")], &[], port, "1001");
}

#[test]
fn first_generation_variables_are_understood() {
    let environment: Pairs = &[
        ("CLUSTER_MANAGER_IP", "192.0.2.1"),
        ("CLUSTER_MANAGER_PORT", "10000"),
        ("MY_PORT", "3001"),
        ("PUBLIC_WORKER_IP", "192.0.2.7"),
        ("PUBLIC_WORKER_PORT", "50011"),
    ];
    let config = load_from("", environment, &[]).unwrap().config;
    assert_eq!((config.cluster.host.as_str(), config.cluster.port), ("192.0.2.1", Some(10000)));
    assert_eq!(config.announced_port, 3001);
    assert_eq!(config.network.public_ip, Some("192.0.2.7".parse().unwrap()));
    assert_eq!(config.network.tunnel_port, 50011);
}

#[test]
fn generations_have_names() {
    let names = [
        ("auto", "None"),
        ("g1", "Some(G1)"),
        ("G1b", "Some(G1b)"),
        ("g2", "Some(G2)"),
        ("g3", "Some(G2)"),
        ("g4", "Some(G4)"),
    ];
    for (name, generation) in names {
        check(
            "",
            &[],
            &[("cluster.generation", name)],
            |config| format!("{:?}", config.cluster.generation),
            generation,
        );
    }
}

#[test]
fn a_host_brings_its_own_port_or_none() {
    let file = "[cluster]\nhost = \"a.example\"\nport = 10000";
    let seen = |config: &Config| format!("{} {:?} {}", config.cluster.host, config.cluster.port, config.cluster.tls);
    check(file, &[], &[], seen, "a.example Some(10000) false");
    check(file, &[], &[("cluster.host", "b.example")], seen, "b.example None false");
    check(file, &[], &[("cluster.host", "b.example:7")], seen, "b.example Some(7) false");
    check(file, &[("CLUSTER_MANAGER_PORT", "9")], &[], seen, "a.example Some(9) false");
    for (text, want) in [
        ("::1", "::1 None false"),
        ("[fd00::1]:10100", "fd00::1 Some(10100) false"),
        ("[fd00::1]", "fd00::1 None false"),
        ("https://c.example:443/", "c.example Some(443) true"),
        ("http://c.example", "c.example None false"),
    ] {
        check("", &[], &[("cluster.host", text)], seen, want);
    }
}

#[test]
fn every_setting_is_read_from_the_file() {
    let file = r#"
        node_name = "edge-1"
        announced_port = 3000
        on_exit = "stop"
        state_dir = "/srv/state"
        run_dir = "/srv/run"
        [cluster]
        host = "c.example"
        port = 10100
        tls = true
        generation = "g1"
        mqtt_certificate = "/c.crt"
        mqtt_key = "/c.key"
        mqtt_ca = "/ca.crt"
        [network]
        datapath = "tun"
        uplink = "eth1"
        public_ip = "192.0.2.9"
        tunnel_port = 50104
        bridge = "br"
        tun = "tn"
        service_v4 = "10.40.0.0/16"
        service_v6 = "fdfe::/16"
        bpffs = "/bpf"
        relax_source = true
        framing = false
        drain = 30
        xdp = "off"
        instances = 1048576
        [runtime]
        docker_host = "unix:///d.sock"
        containerd = "/c.sock"
        containerd_namespace = "edge"
        containerd_config = "/c.toml"
        process = true
        process_user = "web"
        unikernel = true
        wasm = true
        image_files = true
        privileged = "a.b.c.d"
        volume_drivers = "d=/d.sock"
        host_path_volumes = "/srv/volumes"
        registry_mirrors = "docker.io=near:5000, docker.io=far.example/hub,ghcr.io=near:5000/ghcr"
        registry_credentials = "/etc/auth.json"
        control_group = "/edge"
        restart_limit = 2
        restart_window = 90
        [telemetry]
        reports = "changes"
        sensors = "bme280"
        sensors_every = "2.5"
        gps = "gpsd"
        metrics = "127.0.0.1:9640"
        otlp = "http://collector:4318"
        otlp_every = "60"
        sys_dir = "/t/sys"
        proc_dir = "/t/proc"
        dev_dir = "/t/dev"
    "#;
    let table: toml::Table = file.parse().unwrap();
    let written: usize = table.values().map(|value| value.as_table().map_or(1, toml::Table::len)).sum();
    assert_eq!(written, SETTINGS.len(), "a setting is missing from this test");
    let config = load_from(file, &[], &[]).unwrap().config;
    let defaults = load_from("", &[], &[]).unwrap().config;
    assert_eq!(config.cluster.generation, Some(Generation::G1));
    assert_eq!(config.network.datapath, DatapathChoice::Tun);
    assert_eq!(config.on_exit, OnExit::Stop);
    assert_eq!(config.network.service_v4, ("10.40.0.0".parse().unwrap(), 16));
    assert_eq!(config.cluster.mqtt_tls.as_ref().unwrap().key, PathBuf::from("/c.key"));
    assert_ne!(config.network.bpffs, defaults.network.bpffs);
    assert_ne!(config.network.relax_source, defaults.network.relax_source);
    assert_ne!(config.network.framing, defaults.network.framing);
    assert_ne!(config.network.drain, defaults.network.drain);
    assert_ne!(config.network.xdp, defaults.network.xdp);
    assert_eq!(config.network.instances.slots(), 1 << 20);
    assert_eq!(config.runtime.docker_host.as_deref(), Some("unix:///d.sock"));
    assert_eq!(config.runtime.containerd.socket(), Some(PathBuf::from("/c.sock")));
    assert_eq!(config.runtime.containerd_namespace, "edge");
    assert_eq!(config.runtime.containerd_config, Path::new("/c.toml"));
    let telemetry = &config.telemetry;
    assert_eq!((telemetry.reports, telemetry.sensors_every.as_millis()), (crate::config::ReportChoice::Changes, 2500));
    assert_ne!(telemetry.sensors, defaults.telemetry.sensors);
    assert_eq!(telemetry.metrics.map(|address| address.port()), Some(9640));
    assert_eq!(telemetry.otlp.as_deref(), Some("http://collector:4318/v1/metrics"));
    assert_ne!(telemetry.otlp_every, defaults.telemetry.otlp_every);
    assert!(telemetry.gps.is_some() && telemetry.roots.sys == Path::new("/t/sys"));
    assert_ne!(
        (&telemetry.roots.proc, &telemetry.roots.dev),
        (&defaults.telemetry.roots.proc, &defaults.telemetry.roots.dev)
    );
    assert!(config.runtime.process && config.runtime.unikernel && config.runtime.wasm && config.runtime.image_files);
    assert_eq!(config.runtime.host_path_volumes.as_deref(), Some(Path::new("/srv/volumes")));
    let registries = &config.runtime.registries;
    assert_eq!(registries.mirrors["docker.io"], ["near:5000", "far.example/hub"]);
    assert_eq!(registries.mirrors["ghcr.io"], ["near:5000/ghcr"]);
    assert_eq!(registries.credentials.as_deref(), Some(Path::new("/etc/auth.json")));
    assert_eq!((config.runtime.process_user.as_str(), config.runtime.control_group.as_str()), ("web", "/edge"));
    assert_eq!((config.runtime.privileged.len(), config.runtime.volume_drivers.len()), (1, 1));
    assert_eq!((config.runtime.restarts.limit, config.runtime.restarts.window.as_secs()), (2, 90));
}

/// The file that is installed is where settings are looked up.
#[test]
fn the_skeleton_shows_every_setting_and_nothing_that_is_not_one() {
    let skeleton = include_str!("../../../../scripts/config.toml");
    let setting = |line: &'static str| line.strip_prefix("# ").filter(|rest| rest.contains(" = ")).unwrap_or(line);
    let shown: String = skeleton.lines().map(setting).flat_map(|line| [line, "\n"]).collect();
    let table: toml::Table = shown.parse().unwrap();
    let keys = |(name, value): (&String, &toml::Value)| match value.as_table() {
        Some(table) => table.keys().map(|key| format!("{name}.{key}")).collect::<Vec<_>>(),
        None => vec![name.clone()],
    };
    let keys: BTreeSet<String> = table.iter().flat_map(keys).collect();
    let known: BTreeSet<String> = SETTINGS.iter().map(|setting| setting.key.to_owned()).collect();
    assert_eq!(keys, known);
    load_text(&shown).unwrap();
}

#[test]
fn errors_say_where_and_what() {
    type Row = (&'static str, Pairs, Pairs, &'static str);
    let rows: &[Row] = &[
        (
            "[network]\ndatpath = 1",
            &[],
            &[],
            "FILE: there is no setting `network.datpath`; did you mean `network.datapath`?",
        ),
        ("datapath = \"tun\"", &[], &[], "FILE: there is no setting `datapath`; did you mean `network.datapath`?"),
        ("[netwrk]\ntun = 1", &[], &[], "FILE: there is no setting `netwrk.tun`; did you mean `network.tun`?"),
        ("[network]\ntunnel_port = 0", &[], &[], "FILE: network.tunnel_port: \"0\" is not a port (1 to 65535)"),
        (
            "[network]\ntunnel_port = 1.5",
            &[],
            &[],
            "FILE: network.tunnel_port: \"1.5\" is not a text, a whole number or a truth value",
        ),
        (
            "",
            &[("NODE_ENGINE_INSTANCES", "9")],
            &[],
            "environment variable NODE_ENGINE_INSTANCES: \"9\" is not a whole number from 65536 to 4194304",
        ),
        ("", &[("MY_PORT", "x")], &[], "environment variable MY_PORT: \"x\" is not a port (1 to 65535)"),
        ("", &[], &[("network.datapath", "xdp")], "--flag: \"xdp\" is not one of auto, ebpf, ebpf-plain, tun"),
        ("", &[], &[("cluster.host", "a b")], "--flag: \"a b\" is not HOST or HOST:PORT"),
        ("", &[], &[("cluster.host", "ftp://a")], "--flag: \"ftp://a\" is not HOST or HOST:PORT"),
        ("", &[], &[("cluster.host", "a:99999")], "--flag: \"a:99999\" is not a port (1 to 65535)"),
        ("", &[], &[("network.service_v4", "10.30.1.0/16")], "--flag: \"10.30.1.0/16\" has bits set after its prefix"),
        ("", &[], &[("state_dir", "var")], "--flag: \"var\" is not an absolute path"),
        (
            "",
            &[],
            &[("network.uplink", "a-name-far-too-long")],
            "--flag: \"a-name-far-too-long\" is not an interface name (1 to 15 characters)",
        ),
        ("", &[], &[("network.public_ip", "0.0.0.0")], "--flag: \"0.0.0.0\" is not an address that peers can reach"),
        (
            "",
            &[],
            &[("cluster.mqtt_key", "/k")],
            "cluster.mqtt_certificate and cluster.mqtt_key go together: set both or neither",
        ),
    ];
    for (file, environment, flags, want) in rows {
        assert_eq!(load_from(file, environment, flags).map(|_| ()), Err((*want).to_owned()));
    }
    let syntax = load_from("node_name = \"a\"\n[network\n", &[], &[]).unwrap_err();
    assert!(syntax.starts_with("FILE line 2: "), "{syntax}");
}

#[test]
fn a_file_that_was_named_must_exist() {
    let sources = Sources { file: Some("/nonexistent/c.toml".into()), environment: BTreeMap::new(), flags: Vec::new() };
    assert!(matches!(load(&sources), Err(ConfigError::Read { .. })));
}

#[test]
fn unknown_variables_of_ours_are_warned_about() {
    let environment: Pairs = &[("NODE_ENGINE_DATPATH", "tun"), ("NODE_ENGINE_LOG", "debug"), ("PATH", "/bin")];
    assert_eq!(
        load_from("", environment, &[]).unwrap().warnings,
        ["environment variable NODE_ENGINE_DATPATH is not a setting; did you mean NODE_ENGINE_DATAPATH?"]
    );
}

#[test]
fn a_daemon_needs_a_cluster() {
    let config = load_from("", &[], &[]).unwrap().config;
    assert!(matches!(config.with_cluster(), Err(ConfigError::NoCluster)));
    let config = load_from("", &[("CLUSTER_MANAGER_IP", "c")], &[]).unwrap().config;
    assert_eq!(config.with_cluster().unwrap().cluster.authority(1), "c:1");
}

proptest::proptest! {
    #[test]
    fn no_text_panics(file in "\\PC{0,200}", host in "\\PC{0,60}", network in "[0-9a-f.:/]{0,30}") {
        let _ = load_from(&file, &[], &[("cluster.host", &host)]);
        let _ = load_from("", &[], &[("network.service_v4", &network), ("network.service_v6", &network)]);
        let _ = load_from(&format!("node_name = \"x\"\n[cluster]\nhost = {host:?}\n"), &[], &[]);
    }
}

#[test]
fn what_a_node_grants_is_read_and_checked() {
    let file = "[runtime]\nprocess = true\nprocess_user = \"web:80\"\nprivileged = \"a.b.c.d, tools.*.*.*\"\n\
                volume_drivers = \"csi.example/nfs=unix:///run/nfs.sock\"\ncontrol_group = \"/a/b\"";
    let runtime = load_from(file, &[], &[]).unwrap().config.runtime;
    assert!(runtime.process && !runtime.unikernel && !runtime.wasm && !runtime.image_files);
    assert_eq!((runtime.process_user.as_str(), runtime.privileged.len()), ("web:80", 2));
    assert_eq!(runtime.volume_drivers["csi.example/nfs"], Path::new("/run/nfs.sock"));
    assert_eq!(runtime.control_group, "/a/b");
    for (setting, reason) in [
        ("process_user = \"a b\"", "is not USER or USER:GROUP"),
        ("privileged = \"everybody\"", "is not a list of services"),
        ("volume_drivers = \"nfs\"", "is not a list of drivers"),
        ("volume_drivers = \"nfs=run/x\"", "is not a list of drivers"),
        ("registry_mirrors = \"https://near:5000\"", "is not a list of mirrors"),
        ("registry_mirrors = \"docker.io=https://near:5000\"", "is not a list of mirrors"),
        ("registry_credentials = \"auth.json\"", "is not an absolute path"),
        ("control_group = \"/a/../b\"", "is not the path of a control group"),
        ("host_path_volumes = \"volumes\"", "is not an absolute path"),
        ("process = \"maybe\"", "is not true or false"),
        ("containerd = \"on\"", "is not auto, off or the path of a socket"),
        ("containerd_namespace = \"a--b\"", "is not letters and digits"),
    ] {
        let error = load_from(&format!("[runtime]\n{setting}"), &[], &[]).unwrap_err();
        assert!(error.contains(reason), "{setting}: {error}");
    }
}

#[test]
fn the_services_variables_are_read_as_systemd_does() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let text = "# a comment\n; another\n\nNODE_ENGINE_STATE_DIR=/data/ne\n CLUSTER_MANAGER_IP = \"192.0.2.1\" \nQUOTE='a \"b'\nEMPTY=\nno word\n";
    std::fs::write(file.path(), text).unwrap();
    let variables = environment_file(file.path());
    let expected =
        [("CLUSTER_MANAGER_IP", "192.0.2.1"), ("EMPTY", ""), ("NODE_ENGINE_STATE_DIR", "/data/ne"), ("QUOTE", "a \"b")];
    assert_eq!(variables, expected.map(|(name, value)| (name.to_owned(), value.to_owned())).into());
    let sources = Sources { file: None, environment: variables, flags: Vec::new() };
    assert_eq!(load(&sources).unwrap().config.state_dir, Path::new("/data/ne"));
    assert!(environment_file(Path::new("/nonexistent")).is_empty());
}
