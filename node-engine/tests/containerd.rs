//! Containers under a containerd of this test's own: namespaces, control groups, ends, adoption.
#![expect(clippy::unwrap_used, reason = "a test panics where it cannot go on")]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output as Ran, Stdio};
use std::time::{Duration, Instant};

use node_engine::model::{InstanceId, InstanceSpec, Limits, Mount, Technology};
use node_engine::runtime::containerd::{self, ContainerdRuntime, Handler, Settings, Share};
use node_engine::runtime::registries::Registries;
use node_engine::runtime::session::{Input, Output, Terminal};
use node_engine::runtime::{Adopted, AdoptedState, Exec, Exit, Runtime, RuntimeError, Session};
use serde_json::json;
use support::{PATIENCE, exited, log, run};
use tokio::sync::watch;
use tokio::time::timeout;

const NAMESPACE: &str = "edge";
const IMAGE: &str = "lab/box:1";

/// A containerd with an image, and directories that no other test has.
struct Rig {
    dir: tempfile::TempDir,
    containerd: Child,
}

impl Rig {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name).display().to_string();
        let configuration = format!(
            "version = 2\nroot = {:?}\nstate = {:?}\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n\
             [grpc]\naddress = {:?}\n[plugins.\"io.containerd.internal.v1.opt\"]\npath = {:?}\n",
            at("root"),
            at("state"),
            at("c.sock"),
            at("opt")
        );
        fs::write(dir.path().join("config.toml"), configuration).unwrap();
        let mut rig = Self { containerd: start(dir.path()), dir };
        rig.until_it_answers();
        write_image(&rig.dir.path().join("image"));
        let archive = rig.dir.path().join("image.tar");
        let mut tar = Command::new("tar");
        tar.arg("-cf").arg(&archive).arg("-C").arg(rig.dir.path().join("image")).arg(".");
        assert!(tar.status().unwrap().success());
        let snapshotter = if rig.ctr(&["snapshots", "--snapshotter", "overlayfs", "ls"]).status.success() {
            "overlayfs"
        } else {
            "native"
        };
        let imported = rig.ctr(&["images", "import", "--snapshotter", snapshotter, archive.to_str().unwrap()]);
        assert!(imported.status.success(), "{imported:?}");
        rig
    }

    fn settings(&self) -> Settings {
        let group = format!("/{}", self.group());
        let (run, state) = (self.dir.path().join("run"), self.dir.path().join("var"));
        Settings {
            keeper: Some(env!("CARGO_BIN_EXE_node-engine").into()),
            ..Settings::new(&self.dir.path().join("c.sock"), NAMESPACE, &run, &state, &group)
        }
    }

    /// Parent of its control groups.
    fn group(&self) -> String {
        let own = self.dir.path().file_name().unwrap().to_str().unwrap();
        format!("node-engine-test-{}", own.trim_start_matches('.'))
    }

    fn runtime(&self) -> ContainerdRuntime {
        self.runtime_of(Handler::usual())
    }

    fn runtime_of(&self, share: impl Into<Share>) -> ContainerdRuntime {
        runtime(self.settings(), share)
    }

    /// Its image, at a registry that wants `robot` and `secret` or nothing.
    fn registry(&self, locked: bool) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, content) = (listener.local_addr().unwrap(), self.dir.path().join("image"));
        std::thread::spawn(move || listener.incoming().flatten().for_each(|stream| answer(stream, &content, locked)));
        address
    }

    fn ctr(&self, words: &[&str]) -> Ran {
        let mut command = Command::new("ctr");
        command.arg("--address").arg(self.dir.path().join("c.sock")).args(["--namespace", NAMESPACE]);
        command.args(words).output().unwrap()
    }

    /// What containerd, and we beside it, still have.
    fn left(&self) -> Vec<String> {
        let listed = |words: &[&str]| String::from_utf8(self.ctr(words).stdout).unwrap();
        let mut left: Vec<String> = listed(&["containers", "ls", "-q"]).lines().map(str::to_owned).collect();
        left.extend(listed(&["tasks", "ls", "-q"]).lines().map(str::to_owned));
        for snapshotter in ["overlayfs", "native"] {
            let snapshots = listed(&["snapshots", "--snapshotter", snapshotter, "ls"]);
            left.extend(snapshots.lines().filter(|line| line.contains("Active")).map(str::to_owned));
        }
        for directory in ["run/containerd", "var/logs/containerd"] {
            let entries = fs::read_dir(self.dir.path().join(directory)).into_iter().flatten().flatten();
            left.extend(entries.map(|entry| entry.path().display().to_string()));
        }
        let pattern = format!("*/{}/containerd/*", self.group());
        let groups = Command::new("find").args(["/sys/fs/cgroup", "-type", "d", "-path", &pattern]).output().unwrap();
        left.extend(String::from_utf8_lossy(&groups.stdout).lines().map(str::to_owned));
        left
    }

    fn kill_containerd(&mut self) {
        self.containerd.kill().unwrap();
        self.containerd.wait().unwrap();
    }

    fn restart_containerd(&mut self) {
        self.containerd = start(self.dir.path());
        self.until_it_answers();
    }

    fn until_it_answers(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while !self.ctr(&["version"]).status.success() {
            assert!(Instant::now() < deadline, "{}", fs::read_to_string(self.dir.path().join("log")).unwrap());
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = self.containerd.kill();
        let _ = self.containerd.wait();
    }
}

fn start(dir: &Path) -> Child {
    let log = fs::File::options().create(true).append(true).open(dir.join("log")).unwrap();
    let mut command = Command::new("containerd");
    command.arg("--config").arg(dir.join("config.toml")).stdout(Stdio::null()).stderr(log).spawn().unwrap()
}

fn runtime(settings: Settings, share: impl Into<Share>) -> ContainerdRuntime {
    let resolvers = watch::channel(Some(vec!["192.0.2.53".parse().unwrap()])).1;
    ContainerdRuntime::new(settings, share, Technology::Other("containerd".into()), resolvers).unwrap()
}

/// One request to a connection.
fn answer(mut stream: TcpStream, content: &Path, locked: bool) {
    let lines = BufReader::new(stream.try_clone().unwrap()).lines().map_while(Result::ok);
    let lines: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    let path = lines.first().and_then(|line| line.split(' ').nth(1)).unwrap_or_default();
    // `robot:secret`
    let known = lines.iter().any(|line| line.eq_ignore_ascii_case("authorization: Basic cm9ib3Q6c2VjcmV0"));
    let name = path.strip_prefix("/v2/lab/box/").unwrap_or_default();
    let index: serde_json::Value = serde_json::from_slice(&fs::read(content.join("index.json")).unwrap()).unwrap();
    let digest = match name {
        "manifests/1" => index["manifests"][0]["digest"].as_str(),
        _ => name.strip_prefix("manifests/").or(name.strip_prefix("blobs/")),
    };
    let blob = digest.and_then(|digest| digest.strip_prefix("sha256:")).filter(|_| !locked || known);
    let blob = blob.and_then(|digest| fs::read(content.join("blobs/sha256").join(digest)).ok());
    let (status, body) = match blob {
        Some(blob) => ("200 OK", blob),
        None if locked && !known => ("401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"test\"", Vec::new()),
        None => ("404 Not Found", Vec::new()),
    };
    let kind = if name.starts_with("manifests/") { "vnd.oci.image.manifest.v1+json" } else { "octet-stream" };
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Type: application/{kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    // Whoever asked may have left.
    let _ = stream.write_all(head.as_bytes());
    if lines.first().is_some_and(|line| line.starts_with("GET")) {
        let _ = stream.write_all(&body);
    }
}

/// A directory in the OCI image layout with busybox and a user of its own.
fn write_image(to: &Path) {
    let root = to.with_extension("root");
    for directory in ["bin", "etc", "tmp"] {
        fs::create_dir_all(root.join(directory)).unwrap();
    }
    let busybox: PathBuf =
        ["/bin/busybox", "/usr/bin/busybox"].into_iter().map(PathBuf::from).find(|path| path.exists()).unwrap();
    fs::copy(busybox, root.join("bin/busybox")).unwrap();
    for applet in ["sh", "sleep", "cat", "echo", "hostname", "id", "tail", "env", "ls", "stty", "readlink", "head"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
    }
    fs::write(root.join("etc/passwd"), "root:x:0:0::/:/bin/sh\nweb:x:1000:100::/:/bin/sh\n").unwrap();
    fs::write(root.join("etc/group"), "video:x:44:web\n").unwrap();
    let blobs = to.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let layer = to.with_extension("layer");
    let mut tar = Command::new("tar");
    tar.args(["--owner=0", "--group=0", "-cf"]).arg(&layer).arg("-C").arg(&root).arg(".");
    assert!(tar.status().unwrap().success());
    let put = |content: Vec<u8>| {
        let digest = ring::digest::digest(&ring::digest::SHA256, &content);
        let digest: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        fs::write(blobs.join(&digest), &content).unwrap();
        (format!("sha256:{digest}"), content.len())
    };
    let (layer, layer_size) = put(fs::read(layer).unwrap());
    let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let configuration = json!({
        "architecture": architecture, "os": "linux",
        "config": {"Env": ["PATH=/bin", "A=image"], "Entrypoint": ["/bin/sh"], "Cmd": ["-c", "echo usual; sleep 1000"],
                   "WorkingDir": "/tmp", "StopSignal": "SIGINT"},
        "rootfs": {"type": "layers", "diff_ids": [layer]},
    });
    let (configuration, configuration_size) = put(configuration.to_string().into());
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": configuration, "size": configuration_size},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": layer, "size": layer_size}],
    });
    let (manifest, manifest_size) = put(manifest.to_string().into());
    let index = json!({
        "schemaVersion": 2,
        "manifests": [{"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": manifest, "size": manifest_size,
                       "annotations": {"io.containerd.image.name": format!("docker.io/{IMAGE}")}}],
    });
    fs::write(to.join("index.json"), index.to_string()).unwrap();
    fs::write(to.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

fn id(number: u32) -> InstanceId {
    InstanceId { number, ..format!("test.containerd.x.{}.instance.0", std::process::id()).parse().unwrap() }
}

fn shell(number: u32, script: &str) -> InstanceSpec {
    let command = ["/bin/sh", "-c", script].map(str::to_owned).into();
    // Longer than a label may be.
    let document = format!("document of {number} {}", "x".repeat(5000)).into();
    let technology = Technology::Other("containerd".into());
    InstanceSpec { image: IMAGE.into(), command, document, ..InstanceSpec::new(id(number), technology) }
}

/// Standard output, standard error, exit code.
async fn said(session: &mut Session) -> (String, String, i64) {
    let (mut out, mut errors) = (Vec::new(), Vec::new());
    loop {
        match timeout(PATIENCE, session.output.recv()).await.expect("it says something").expect("its end") {
            Output::Out(bytes) => out.extend(bytes),
            Output::Error(bytes) => errors.extend(bytes),
            Output::Exit(code) => return (String::from_utf8(out).unwrap(), String::from_utf8(errors).unwrap(), code),
            Output::Broken(reason) => panic!("{reason}"),
        }
    }
}

#[tokio::test]
#[ignore = "needs root"]
async fn a_container_has_surroundings_of_its_own_and_leaves_nothing() {
    let rig = Rig::new();
    let runtime = rig.runtime();
    runtime.try_out().await.unwrap();
    assert_eq!(rig.left(), [] as [&str; 0], "the trial is gone");
    let shared = tempfile::tempdir().unwrap();
    let script = "hostname; echo $A $B $HOSTNAME; cat /etc/resolv.conf /etc/hostname; id; echo $PWD; readlink /proc/self/ns/net; \
                  echo ran > /data/ran; trap 'echo asked; exit 0' INT; echo ready; while :; do sleep 0.1; done";
    let spec = InstanceSpec {
        environment: vec!["B=own".into()],
        limits: Limits { vcpus: Some(1), memory_mib: Some(64), ..Limits::default() },
        mounts: vec![Mount { source: shared.path().into(), target: "/data".into(), read_only: false }],
        ..shell(0, script)
    };
    let netns = runtime.prepare(&spec).await.unwrap().netns;
    let inode = |path: &Path| fs::metadata(path).unwrap().ino();
    assert_ne!(inode(&netns), inode(Path::new("/proc/self/ns/net")));
    assert_eq!(runtime.logs(&spec.id, 100).await.unwrap(), b"", "nothing runs yet");
    assert!(!shared.path().join("ran").exists());
    let (wanted, kept) = (inode(&netns), fs::read_link(&netns).unwrap());
    runtime.start(&spec.id).await.unwrap();
    runtime.start(&spec.id).await.unwrap();
    let said_first = log(&runtime, &spec.id, "ready").await;
    let lines: Vec<&str> = said_first.lines().collect();
    assert_eq!(
        lines[..4],
        ["instance-0", "image own instance-0", "nameserver 192.0.2.53", "instance-0"],
        "{said_first}"
    );
    assert!(lines[4].starts_with("uid=0(root) gid=0") && lines[5] == "/tmp", "{said_first}");
    assert_eq!(kept.to_str(), Some(lines[6]), "the namespace that was prepared ({wanted})");
    assert!(shared.path().join("ran").exists());

    let known = runtime.inspect(&spec.id).await.unwrap();
    assert_eq!((known.cpus, known.memory_bytes), (Some(1.0), Some(64 << 20)));
    assert_eq!((known.command[0].as_str(), known.environment.len()), ("/bin/sh", 4), "{known:?}");
    assert!(known.image_id.starts_with("sha256:") && known.pid.is_some(), "{known:?}");
    let usage = runtime.usage().await.unwrap();
    assert_eq!((usage.len(), usage[0].counters.memory_limit_bytes), (1, Some(64 << 20)));
    assert!(usage[0].memory_bytes > 0 && usage[0].log_tail.contains("ready"), "{usage:?}");

    runtime.stop(&spec.id, Duration::from_secs(20)).await.unwrap();
    runtime.stop(&spec.id, Duration::ZERO).await.unwrap();
    assert_eq!(rig.left(), [] as [&str; 0]);
    assert!(matches!(runtime.inspect(&spec.id).await, Err(RuntimeError::Unknown(_))));
    assert!(
        timeout(Duration::from_millis(100), runtime.exited()).await.is_err(),
        "an end that was asked for is no news"
    );
}

#[tokio::test]
#[ignore = "needs root"]
async fn commands_run_beside_it_as_its_user() {
    let rig = Rig::new();
    let runtime = rig.runtime();
    let spec = InstanceSpec { user: Some("web".into()), ..shell(0, "echo ready; exec sleep 1000") };
    run(&runtime, &spec).await;
    log(&runtime, &spec.id, "ready").await;
    let exec = |script: &str, terminal| Exec { command: ["sh", "-c", script].map(str::to_owned).into(), terminal };
    let mut session =
        runtime.exec(&spec.id, exec("id -u; id -G; echo $A; echo wrong >&2; cat; exit 7", None)).await.unwrap();
    session.input.send(Input::Bytes("typed\n".into())).await.unwrap();
    session.input.send(Input::End).await.unwrap();
    assert_eq!(said(&mut session).await, ("1000\n100 44\nimage\ntyped\n".into(), "wrong\n".into(), 7));

    let size = Some(Terminal { columns: 77, rows: 33 });
    let mut session = runtime.exec(&spec.id, exec("read x; stty size; exit 3", size)).await.unwrap();
    session.input.send(Input::Bytes("\n".into())).await.unwrap();
    let (out, _, code) = said(&mut session).await;
    assert!(out.contains("33 77") && code == 3, "{out:?}");

    let session = runtime.exec(&spec.id, exec("sleep 777", None)).await.unwrap();
    drop(session);
    let deadline = Instant::now() + PATIENCE;
    while Command::new("pgrep").args(["-f", "^sleep 777$"]).status().unwrap().success() {
        assert!(Instant::now() < deadline, "an abandoned command goes on");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    runtime.stop(&spec.id, Duration::ZERO).await.unwrap();
    let error = runtime.exec(&spec.id, exec("true", None)).await.unwrap_err();
    assert!(matches!(error, RuntimeError::Unknown(_)), "{error}");
    assert_eq!(rig.left(), [] as [&str; 0]);
}

#[tokio::test]
#[ignore = "needs root"]
async fn ends_are_told_once_and_as_what_they_were() {
    let rig = Rig::new();
    let runtime = rig.runtime();
    let exit = |number, code, out_of_memory| Exit { instance: id(number), code, out_of_memory, reason: None };
    run(&runtime, &shell(0, "echo bye; exit 3")).await;
    assert_eq!(exited(&runtime).await, exit(0, 3, false));
    assert_eq!(log(&runtime, &id(0), "bye").await, "bye\n", "it is kept until the instance is removed");
    // Who would raise it where it was has to make it anew: nothing runs that could be told as running.
    let again = runtime.start(&id(0)).await.expect_err("it has ended").to_string();
    assert!(again.contains("exit code 3"), "{again}");
    run(&runtime, &shell(0, "echo bye; exit 4")).await;
    assert_eq!(exited(&runtime).await, exit(0, 4, false));
    // A start whose answer was lost is asked for again, and its end is told like any other.
    run(&runtime, &shell(3, "sleep 2; exit 7")).await;
    let later = rig.runtime();
    later.start(&id(3)).await.unwrap();
    assert_eq!(exited(&later).await, exit(3, 7, false));
    assert_eq!(exited(&runtime).await, exit(3, 7, false));
    let limits = Limits { memory_mib: Some(32), ..Limits::default() };
    run(&runtime, &InstanceSpec { limits, ..shell(1, "tail /dev/zero; exit 9") }).await;
    let hog = exited(&runtime).await;
    assert!(hog.out_of_memory && hog.code != 0, "{hog:?}");
    let netns = run(&runtime, &shell(2, "sleep 1000")).await.netns;
    let pid: i32 = netns.iter().nth(2).unwrap().to_str().unwrap().parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_eq!(exited(&runtime).await, exit(2, 137, false));
    assert!(timeout(Duration::from_millis(200), runtime.exited()).await.is_err(), "each is told once");
    let mut follow = runtime.follow(&id(0), 100).await.unwrap();
    assert_eq!(follow.recv().await.unwrap().unwrap(), "bye\n");
    assert!(follow.recv().await.is_none(), "what has ended says nothing more");
    for number in 0..4 {
        runtime.stop(&id(number), Duration::ZERO).await.unwrap();
    }
    assert_eq!(rig.left(), [] as [&str; 0]);
}

#[tokio::test]
#[ignore = "needs root"]
async fn a_new_daemon_adopts_what_the_old_one_left() {
    let rig = Rig::new();
    let old = rig.runtime();
    let ticks = "i=0; while :; do echo tick $i; i=$((i+1)); sleep 0.1; done";
    let netns = run(&old, &shell(0, ticks)).await.netns;
    run(&old, &shell(1, "exit 4")).await;
    assert_eq!(exited(&old).await.code, 4);
    run(&old, &shell(2, "sleep 1; exit 5")).await;
    old.prepare(&shell(3, "true")).await.unwrap();
    drop(old);

    let new = rig.runtime();
    let find = |adopted: Vec<Adopted>, number: u32| adopted.into_iter().find(|one| one.instance == id(number)).unwrap();
    let adopted = new.adopt().await.unwrap();
    assert_eq!(adopted.len(), 4);
    let ticking = find(adopted.clone(), 0);
    assert!(ticking.document.starts_with("document of 0 xxx") && ticking.document.len() > 5000);
    let AdoptedState::Running(sandbox) = ticking.state else { panic!("{:?}", ticking.state) };
    assert_eq!(sandbox.netns, netns);
    assert_eq!(
        find(adopted.clone(), 1).state,
        AdoptedState::Exited(Exit { instance: id(1), code: 4, out_of_memory: false, reason: None })
    );
    assert_eq!(find(adopted, 3).state, AdoptedState::Incomplete);
    assert_eq!(exited(&new).await, Exit { instance: id(2), code: 5, out_of_memory: false, reason: None });
    // Its output goes on, and is bounded by whoever keeps it and not by us.
    let last = log(&new, &id(0), "tick").await;
    let count =
        |log: &str| log.lines().filter_map(|line| line.strip_prefix("tick ")?.parse::<u32>().ok()).max().unwrap_or(0);
    log(&new, &id(0), &format!("tick {}\n", count(&last) + 5)).await;
    for number in 0..4 {
        new.stop(&id(number), Duration::ZERO).await.unwrap();
    }
    assert_eq!(rig.left(), [] as [&str; 0]);
}

#[tokio::test]
#[ignore = "needs root"]
async fn containers_outlive_containerd_and_their_ends_are_told_afterwards() {
    let mut rig = Rig::new();
    let runtime = rig.runtime();
    run(&runtime, &shell(0, "sleep 1000")).await;
    run(&runtime, &shell(1, "sleep 2; exit 6")).await;
    rig.kill_containerd();
    assert!(matches!(runtime.adopt().await, Err(RuntimeError::Unavailable(_))));
    assert_eq!(runtime.usage().await.unwrap().len(), 2, "measured without containerd");
    tokio::time::sleep(Duration::from_millis(2500)).await;
    rig.restart_containerd();
    assert_eq!(exited(&runtime).await, Exit { instance: id(1), code: 6, out_of_memory: false, reason: None });
    assert!(runtime.inspect(&id(0)).await.unwrap().pid.is_some());
    for number in 0..2 {
        runtime.stop(&id(number), Duration::ZERO).await.unwrap();
    }
    assert_eq!(rig.left(), [] as [&str; 0]);
}

#[tokio::test]
#[ignore = "needs root"]
async fn what_cannot_be_run_says_why_and_leaves_nothing() {
    let rig = Rig::new();
    let runtime = rig.runtime();
    let absent = InstanceSpec { image: "127.0.0.1:9/none:1".into(), ..shell(0, "true") };
    let missing = InstanceSpec { image: IMAGE.into(), user: Some("nobody-here".into()), ..shell(1, "true") };
    for (spec, reason) in [(absent, "image 127.0.0.1:9/none:1 cannot be pulled"), (missing, "there is no user")] {
        let error = runtime.prepare(&spec).await.unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
        runtime.stop(&spec.id, Duration::ZERO).await.unwrap();
    }
    assert_eq!(rig.left(), [] as [&str; 0]);
    let named = Handler { name: "other".into(), binary: Some("runc".into()), ..Handler::usual() };
    let other = rig.runtime_of(named);
    other.try_out().await.unwrap();
    run(&other, &shell(0, "echo by another; exec sleep 1000")).await;
    assert_eq!(log(&other, &id(0), "another").await, "by another\n");
    assert_eq!(runtime.adopt().await.unwrap().len(), 0, "it is not the usual runtime's");
    assert_eq!(other.adopt().await.unwrap().len(), 1);
    // Once its handler is configured no longer it is looked after, and no more are made.
    drop(other);
    assert_eq!(containerd::noted(&rig.settings().handlers), ["other"]);
    let strange = rig.runtime_of(Share::Others(["", "other"].map(String::from).into()));
    assert_eq!(strange.adopt().await.unwrap().len(), 0, "it is known");
    for share in [Share::Left("other".into()), Share::Others([String::new()].into())] {
        let left = rig.runtime_of(share);
        assert!(matches!(left.adopt().await.unwrap()[0].state, AdoptedState::Running(_)));
        assert!(matches!(left.prepare(&shell(1, "true")).await, Err(RuntimeError::Refused { .. })));
        left.stop(&id(0), Duration::ZERO).await.unwrap();
        assert_eq!(left.adopt().await.unwrap().len(), 0);
        run(&rig.runtime_of(Handler { name: "other".into(), ..Handler::usual() }), &shell(0, "exec sleep 1000")).await;
    }
    let last = rig.runtime_of(Share::Left("other".into()));
    last.stop(&id(0), Duration::ZERO).await.unwrap();
    let nonsense =
        rig.runtime_of(Handler { name: "x".into(), binary: Some("/no/such/program".into()), ..Handler::usual() });
    assert!(nonsense.try_out().await.is_err(), "it is tried before it is believed");
    assert_eq!(rig.left(), [] as [&str; 0]);
}

#[tokio::test]
#[ignore = "needs root"]
async fn images_come_from_mirrors_and_registries_that_want_credentials() {
    let rig = Rig::new();
    let (locked, open) = (rig.registry(true), rig.registry(false));
    let auth = rig.dir.path().join("auth.json");
    let write = |user: &str, password: &str| {
        let text = json!({"auths": {locked.to_string(): {"username": user, "password": password}}});
        fs::write(&auth, text.to_string()).unwrap();
    };
    let runtime_with = |mirror: &str, credentials: bool| {
        let mirrors = BTreeMap::from([("elsewhere.example".to_owned(), vec!["127.0.0.1:9".into(), mirror.to_owned()])]);
        let registries = Registries { mirrors, credentials: credentials.then(|| auth.clone()) };
        runtime(Settings { registries, ..rig.settings() }, Handler::usual())
    };
    let asked = |image: String| InstanceSpec { image, ..shell(0, "echo here; exec sleep 1000") };
    let own = asked(format!("{locked}/{IMAGE}"));
    write("robot", "wrong");
    for credentials in [false, true] {
        let error = runtime_with("127.0.0.1:9", credentials).prepare(&own).await.unwrap_err().to_string();
        assert!(error.contains("cannot be pulled") && error.contains("auth"), "{error}");
    }
    write("robot", "secret");
    let runtime = runtime_with(&open.to_string(), true);
    run(&runtime, &own).await;
    assert_eq!(log(&runtime, &own.id, "here").await, "here\n");
    runtime.stop(&own.id, Duration::ZERO).await.unwrap();
    // The first mirror does not answer, the second has it, and the registry itself does not exist.
    let mirrored = asked(format!("elsewhere.example/{IMAGE}"));
    run(&runtime, &mirrored).await;
    assert_eq!(log(&runtime, &mirrored.id, "here").await, "here\n");
    runtime.stop(&mirrored.id, Duration::ZERO).await.unwrap();
    let error = runtime.prepare(&asked("elsewhere.example/lab/none:1".into())).await.unwrap_err().to_string();
    assert!(error.contains(&format!("{open}/lab/none:1: ")) && error.contains("; elsewhere.example/"), "{error}");
    runtime.stop(&id(0), Duration::ZERO).await.unwrap();
    assert_eq!(rig.left(), [] as [&str; 0]);
}
