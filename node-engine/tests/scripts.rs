//! The scripts that install and start a node, with a root directory, a binary and a sudo of the test's own.

#![expect(clippy::unwrap_used, reason = "a test panics; it does not return an error")]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts").join(name)
}

fn executable(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

fn text(output: &[u8]) -> String {
    String::from_utf8_lossy(output).into_owned()
}

/// Is the file a configuration, and does it name this cluster?
fn check_config(path: &Path, cluster: Option<&str>) {
    let mut node_engine = Command::new(env!("CARGO_BIN_EXE_node-engine"));
    // The flag is wrong, so nothing starts; it is read after the file, so the file was right.
    let output = node_engine.env_clear().arg("--config").arg(path).args(["--datapath", "xdp"]).output().unwrap();
    assert!(text(&output.stderr).contains("--datapath"), "{}", text(&output.stderr));
    let table: toml::Table = fs::read_to_string(path).unwrap().parse().unwrap();
    let host = table["cluster"].get("host").and_then(toml::Value::as_str);
    assert_eq!(host, cluster);
}

#[test]
fn a_node_is_installed_and_installed_again() {
    let dir = tempfile::tempdir().unwrap();
    let install = |arguments: &[&str]| -> Output {
        let mut command = Command::new(script("install-node.sh"));
        command.arg(env!("CARGO_BIN_EXE_node-engine")).args(arguments).env("DESTDIR", dir.path()).output().unwrap()
    };
    let config = dir.path().join("etc/node-engine/config.toml");
    let first = install(&[]);
    assert!(first.status.success(), "{}", text(&first.stderr));
    assert!(text(&first.stdout).starts_with(&format!("installed node-engine {}", env!("CARGO_PKG_VERSION"))));
    check_config(&config, None);
    assert!(dir.path().join("etc/systemd/system/node-engine.service").exists());

    fs::write(&config, format!("node_name = \"kept\"\n{}", fs::read_to_string(&config).unwrap())).unwrap();
    for cluster in ["c.example:10100", "192.0.2.1", "[2001:db8::1]:10100"] {
        assert!(install(&["--cluster", cluster]).status.success());
        check_config(&config, Some(cluster));
    }
    assert!(fs::read_to_string(&config).unwrap().contains("node_name = \"kept\""));
    // However somebody has written it.
    for before in [
        "[cluster] # ours\r\nport = 10000\r\n  host=\"old\"\r\n[network]\r\n",
        "  [ cluster ]\n[network]\ntunnel_port = 50105\n",
        "[network]\n",
        "",
    ] {
        fs::write(&config, before).unwrap();
        assert!(install(&["--cluster", "c.example:10100"]).status.success());
        check_config(&config, Some("c.example:10100"));
        let text = fs::read_to_string(&config).unwrap();
        assert!(!text.contains("10000") && !text.contains("old"), "{text}");
        assert_eq!(text.contains("tunnel_port"), before.contains("tunnel_port"));
    }
    assert!(!config.with_extension("toml.new").exists());

    assert_eq!(install(&["--cluster", "a|b"]).status.code(), Some(2));
    assert_eq!(install(&["--fly"]).status.code(), Some(2));
}

#[test]
fn the_version_before_comes_back_where_the_new_one_cannot_take_over() {
    let dir = tempfile::tempdir().unwrap();
    let binary = |name: &str| {
        let path = dir.path().join(name);
        executable(&path, &format!("#!/bin/sh\necho node-engine {name}\n"));
        path
    };
    let install = |binary: &Path| {
        let done = Command::new(script("install-node.sh")).arg(binary).env("DESTDIR", dir.path()).output().unwrap();
        assert!(done.status.success(), "{}", text(&done.stderr));
    };
    let installed = |name: &str| {
        let output = Command::new(dir.path().join("usr/local/bin").join(name)).output();
        output.map_or_else(|error| error.kind().to_string(), |output| text(&output.stdout).trim().to_owned())
    };
    let go_back = |status: &str| {
        let command = dir.path().join("usr/local/lib/node-engine/go-back.sh");
        let done = Command::new(command).env("DESTDIR", dir.path()).env("EXIT_STATUS", status).output().unwrap();
        assert!(done.status.success(), "{}", text(&done.stderr));
    };
    install(&binary("old"));
    install(&binary("new"));
    // Once more the same: what was before it is not forgotten.
    install(&binary("new"));
    for status in ["0", "1", "KILL", ""] {
        go_back(status);
        assert_eq!(
            (installed("node-engine"), installed("node-engine.previous")),
            ("node-engine new".into(), "node-engine old".into())
        );
    }
    go_back("75");
    assert_eq!(
        (installed("node-engine"), installed("node-engine.refused")),
        ("node-engine old".into(), "node-engine new".into())
    );
    go_back("75");
    assert_eq!(installed("node-engine"), "node-engine old", "there is none before it");
    let unit = fs::read_to_string(script("node-engine.service")).unwrap();
    assert!(unit.contains("ExecStopPost=-/usr/local/lib/node-engine/go-back.sh"));
}

#[test]
fn every_setting_shown_in_the_skeleton_exists() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.toml");
    let skeleton = fs::read_to_string(script("config.toml")).unwrap();
    let shown: String = skeleton
        .lines()
        .map(|line| match line.strip_prefix("# ") {
            Some(setting) if setting.contains(" = ") => format!("{setting}\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    assert!(shown.lines().filter(|line| line.contains(" = ")).count() >= 8);
    fs::write(&config, shown).unwrap();
    check_config(&config, Some("cluster.example"));
}

#[test]
fn start_up_hands_the_environment_over_to_the_superuser() {
    let dir = tempfile::tempdir().unwrap();
    let (binary, sudo) = (dir.path().join("engine"), dir.path().join("sudo"));
    executable(
        &binary,
        "#!/bin/sh\necho \"$CLUSTER_MANAGER_IP|$CLUSTER_MANAGER_PORT|${MY_PORT-none}|$NODE_ENGINE_NAME|$*\"\n",
    );
    // As the real one does: nothing of the environment passes.
    executable(&sudo, "#!/bin/sh\n[ \"$1\" = -- ] && shift\nexec env -i PATH=\"$PATH\" \"$@\"\n");
    executable(&dir.path().join("id"), "#!/bin/sh\necho 1000\n");
    let path = format!("{}:/usr/bin:/bin", dir.path().display());
    let mut start_up = Command::new(script("start-up.sh"));
    start_up
        .args(["amd64", "--datapath", "tun"])
        .env_clear()
        .env("PATH", path)
        .env("NODE_ENGINE_BINARY", &binary)
        .env("CLUSTER_MANAGER_IP", "192.0.2.1")
        .env("CLUSTER_MANAGER_PORT", "10000")
        .env("NODE_ENGINE_NAME", "it's $HOME `x`");
    let output = start_up.output().unwrap();
    assert_eq!(
        text(&output.stdout),
        "192.0.2.1|10000|none|it's $HOME `x`|--datapath tun\n",
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn start_up_knows_the_architectures_and_what_is_built_for_each() {
    for (arguments, code) in [(&[] as &[&str], 2), (&["mips"], 2)] {
        let output = Command::new(script("start-up.sh")).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(code));
        assert!(text(&output.stderr).contains("amd64|arm64|arm-7"), "{}", text(&output.stderr));
    }
    // A checkout of the test's own, on a machine of another kind.
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("scripts/start-up.sh");
    fs::create_dir_all(dir.path().join("scripts")).unwrap();
    fs::copy(script("start-up.sh"), &copy).unwrap();
    executable(&dir.path().join("id"), "#!/bin/sh\necho 0\n");
    executable(&dir.path().join("uname"), "#!/bin/sh\necho mips\n");
    let start = |architecture: &str| -> Output {
        let path = format!("{}:/usr/bin:/bin", dir.path().display());
        Command::new(&copy).args([architecture, "--now"]).env_clear().env("PATH", path).output().unwrap()
    };
    for (architecture, name, triple) in [
        ("amd64", "amd64", "x86_64-unknown-linux-gnu"),
        ("arm64", "arm64", "aarch64-unknown-linux-gnu"),
        ("arm-7", "armv7", "armv7-unknown-linux-gnueabihf"),
    ] {
        let without = start(architecture);
        assert_eq!(without.status.code(), Some(1));
        let wanted = format!("cargo xtask build --release --target {name}");
        assert!(text(&without.stderr).contains(&wanted), "{}", text(&without.stderr));

        let built = dir.path().join("target/cross").join(triple).join("dist");
        fs::create_dir_all(&built).unwrap();
        executable(&built.join("node-engine"), &format!("#!/bin/sh\necho {name} \"$@\"\n"));
        let output = start(architecture);
        assert_eq!(text(&output.stdout), format!("{name} --now\n"), "{}", text(&output.stderr));
    }
}
