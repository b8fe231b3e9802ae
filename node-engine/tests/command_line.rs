//! The program as a person meets it: exit codes, one line for each error, and a daemon that is started, asked and stopped.

#![expect(clippy::unwrap_used, reason = "a test panics; it does not return an error")]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(30);

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_node-engine"));
    command.env_clear().env("NODE_ENGINE_CONFIG", "/dev/null").stdin(Stdio::null());
    command
}

fn run(arguments: &[&str]) -> Output {
    program().args(arguments).output().unwrap()
}

fn check(arguments: &[&str], code: i32, want: &str) {
    let output = run(arguments);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{arguments:?} said {said}");
    assert!(said.contains(want), "{arguments:?} said {said:?} and not {want:?}");
}

#[test]
fn errors_are_one_line_that_says_what_to_do() {
    for (arguments, code, want) in [
        (&[] as &[&str], 2, "no cluster is configured: pass --cluster HOST"),
        (&["--cluster", "c", "--datapath", "xdp"], 2, "--datapath: \"xdp\" is not one of auto, ebpf, ebpf-plain, tun"),
        (&["--cluster", "c", "--log", "a=b=c"], 2, "--log: \"a=b=c\" is not a filter"),
        (
            &["--socket", "/nonexistent/api.sock", "status"],
            1,
            "no node-engine answers on /nonexistent/api.sock: start it",
        ),
        (&["--config", "/nonexistent/c.toml", "--cluster", "c"], 1, "read /nonexistent/c.toml: "),
        (&["deploy", "/nonexistent/d.json"], 1, "read /nonexistent/d.json: "),
    ] {
        check(arguments, code, want);
        let lines = String::from_utf8_lossy(&run(arguments).stderr).lines().count();
        assert_eq!(lines, 1, "{arguments:?}");
    }
}

#[test]
fn words_that_are_no_command_are_usage_errors() {
    check(&["fly"], 2, "unrecognized subcommand 'fly'");
    check(&["deploy"], 2, "FILE");
    check(&["--cluster", "c", "status"], 2, "options of the daemon go with `run`, `standalone` or no command");
}

#[test]
fn version_and_help_are_told() {
    let version = run(&["version"]);
    assert_eq!(String::from_utf8_lossy(&version.stdout), format!("node-engine {}\n", env!("CARGO_PKG_VERSION")));
    let help = run(&["--help"]);
    assert!(help.status.success());
    for command in [
        "standalone",
        "status",
        "ps",
        "logs",
        "inspect",
        "stats",
        "exec",
        "events",
        "hardware",
        "metrics",
        "deploy",
        "delete",
        "replicate",
        "move",
        "nodes",
        "uninstall",
    ] {
        assert!(String::from_utf8_lossy(&help.stdout).contains(command), "{command} is not in the help");
    }
}

#[test]
fn an_output_that_takes_nothing_is_an_error_at_most() {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    drop(ours);
    let gone = program().arg("version").stdout(std::os::fd::OwnedFd::from(theirs)).output().unwrap();
    assert_eq!((gone.status.code(), gone.stderr.as_slice()), (Some(0), b"".as_slice()), "{gone:?}");

    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let full = program().arg("version").stdout(full).output().unwrap();
    assert_eq!(full.status.code(), Some(1), "{full:?}");
    let said = String::from_utf8_lossy(&full.stderr).into_owned();
    assert!(said.starts_with("node-engine: write the version: "), "{said}");
}

#[test]
fn a_cluster_without_a_node_is_started_asked_and_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(dir.path());
    let ask = |arguments: &[&str]| {
        let mut command = program();
        command.arg("--run-dir").arg(dir.path().join("run")).args(arguments).output().unwrap()
    };
    let status = ask(&["status", "--json"]);
    assert!(status.status.success(), "{}", String::from_utf8_lossy(&status.stderr));
    let status: serde_json::Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!((status["cluster"]["standalone"].as_bool(), status["pid"].as_u64()), (Some(true), Some(daemon.pid())));
    let nodes = ask(&["nodes"]);
    assert!(String::from_utf8_lossy(&nodes.stdout).starts_with("NODE  STATE"), "{nodes:?}");
    let deleted = ask(&["delete", "web"]);
    assert_eq!(deleted.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&deleted.stderr).starts_with("node-engine: nothing here is called web; "));

    let second = standalone(dir.path()).output().unwrap();
    assert_eq!(second.status.code(), Some(1));
    let want = format!("another node-engine is running (pid {})", daemon.pid());
    assert!(String::from_utf8_lossy(&second.stderr).contains(&want), "{second:?}");

    let code = daemon.stop();
    assert_eq!(code, Some(0));
    assert_eq!(ask(&["status"]).status.code(), Some(1));
}

#[test]
fn the_service_manager_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let manager = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    manager.set_read_timeout(Some(PATIENCE)).unwrap();
    let told = || {
        let mut buffer = [0; 256];
        let length = manager.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    };
    let mut command = standalone(dir.path());
    command.env("NOTIFY_SOCKET", &path).env("WATCHDOG_USEC", "400000");
    let daemon = Daemon::spawn(command, dir.path());
    assert!(told().starts_with("READY=1\n"));
    assert_eq!(told(), "WATCHDOG=1\n");
    assert_eq!(told(), "WATCHDOG=1\n");
    assert_eq!(daemon.stop(), Some(0));
    while !told().starts_with("STOPPING=1\n") {}
}

#[test]
#[ignore = "needs root"]
fn another_user_is_not_answered() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    let dir = tempfile::tempdir().unwrap();
    let open = |path: &Path| std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o777)).unwrap();
    open(dir.path());
    let _daemon = Daemon::start(dir.path());
    // Where nobody can reach it.
    let binary = dir.path().join("node-engine");
    std::fs::copy(env!("CARGO_BIN_EXE_node-engine"), &binary).unwrap();
    let status = || {
        let mut command = Command::new(&binary);
        command.env_clear().uid(65534).gid(65534).arg("--socket").arg(dir.path().join("run/api.sock")).arg("status");
        String::from_utf8_lossy(&command.output().unwrap().stderr).into_owned()
    };
    assert!(status().contains("belongs to another user: use sudo"), "{}", status());
    // Even a socket whose mode somebody has changed.
    open(&dir.path().join("run/api.sock"));
    assert!(status().contains("broke off"), "{}", status());
}

/// As the first generation's README has it: `nohup ./start-up.sh ARCHITECTURE &`, and then whoever typed it logs out.
#[test]
fn started_with_nohup_it_goes_on_after_logging_out() {
    let dir = tempfile::tempdir().unwrap();
    // Nobody is there to type the superuser's password.
    let id = dir.path().join("id");
    std::fs::write(&id, "#!/bin/sh\necho 0\n").unwrap();
    std::fs::set_permissions(&id, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut nohup = Command::new("nohup");
    nohup.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/start-up.sh")).arg("amd64");
    nohup.args(standalone(dir.path()).get_args()).env_clear().stdin(Stdio::null()).stdout(Stdio::null());
    nohup.env("PATH", format!("{}:/usr/bin:/bin", dir.path().display()));
    nohup.env("NODE_ENGINE_BINARY", env!("CARGO_BIN_EXE_node-engine")).env("NODE_ENGINE_CONFIG", "/dev/null");
    let daemon = Daemon::spawn(nohup, dir.path());
    daemon.signal(nix::sys::signal::Signal::SIGHUP);
    let asked = program().arg("--run-dir").arg(dir.path().join("run")).args(["status", "--json"]).output().unwrap();
    let status: serde_json::Value = serde_json::from_slice(&asked.stdout).unwrap_or_default();
    assert_eq!(status["pid"].as_u64(), Some(daemon.pid()), "each program has become the next: {asked:?}");
    assert_eq!(daemon.stop(), Some(0));
}

fn standalone(dir: &Path) -> Command {
    let mut command = program();
    command.args(["standalone", "--no-node", "--listen", "127.0.0.1"]);
    command.args(["--http-port", "0", "--socketio-port", "0", "--broker-port", "0"]);
    command.arg("--state-dir").arg(dir.join("state")).arg("--run-dir").arg(dir.join("run"));
    command
}

/// A daemon that is killed when the test fails.
struct Daemon {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Daemon {
    /// Returns when the local API answers.
    fn start(dir: &Path) -> Self {
        Self::spawn(standalone(dir), dir)
    }

    fn spawn(mut command: Command, dir: &Path) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let stderr = child.stderr.take().unwrap();
        let (said, lines) = mpsc::channel();
        std::thread::spawn(move || {
            BufReader::new(stderr).lines().map_while(Result::ok).try_for_each(|line| said.send(line))
        });
        let mut daemon = Self { child, lines };
        let deadline = Instant::now() + PATIENCE;
        while std::os::unix::net::UnixStream::connect(dir.join("run/api.sock")).is_err() {
            let ended = daemon.child.try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < deadline, "not started: {ended:?}, {:?}", daemon.said());
            std::thread::yield_now();
        }
        daemon
    }

    fn pid(&self) -> u64 {
        u64::from(self.child.id())
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    fn said(&self) -> Vec<String> {
        self.lines.try_iter().collect()
    }

    /// Asks it to end, and returns its exit code.
    fn stop(mut self) -> Option<i32> {
        self.signal(nix::sys::signal::Signal::SIGTERM);
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "not ended: {:?}", self.said());
            std::thread::yield_now();
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
