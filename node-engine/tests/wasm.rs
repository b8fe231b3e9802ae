//! WebAssembly modules in the real interpreter, under the real supervisor: what they are given, limits, ends, adoption.
#![expect(clippy::unwrap_used, reason = "a test panics where it cannot go on")]

mod support;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use node_engine::model::{DeviceGrant, InstanceId, InstanceSpec, Limits, Mount, PortMapping, Protocol, Technology};
use node_engine::runtime::supervised::Home;
use node_engine::runtime::wasm::{Policy, WasmRuntime};
use node_engine::runtime::{AdoptedState, Exit, Runtime, RuntimeError};
use support::{PATIENCE, exited, log, run};

const WORKLOAD: &str = include_str!("modules/workload.wat");

/// Directories of one test, and names that no other has.
struct Rig {
    dir: tempfile::TempDir,
    service: &'static str,
}

impl Rig {
    fn new(service: &'static str) -> Self {
        let rig = Self { dir: tempfile::tempdir().unwrap(), service };
        fs::write(rig.dir.path().join("workload.wasm"), wat::parse_str(WORKLOAD).unwrap()).unwrap();
        rig
    }

    fn runtime(&self, allowed: bool) -> WasmRuntime {
        let group = format!("/node-engine-test-{}", std::process::id());
        let (run, state) = (self.dir.path().join("run"), self.dir.path().join("state"));
        let home =
            Home { supervisor: env!("CARGO_BIN_EXE_node-engine").into(), ..Home::new(&run, &state, "wasm", &group) };
        WasmRuntime::new(home, &state, Policy { allowed, files: true })
    }

    fn id(&self, number: u32) -> InstanceId {
        format!("test.wasm.{}.{}.instance.{number}", self.service, std::process::id()).parse().unwrap()
    }

    fn workload(&self, number: u32, command: &str) -> InstanceSpec {
        InstanceSpec {
            image: format!("file://{}/workload.wasm", self.dir.path().display()),
            command: vec![command.into()],
            document: format!("document of {number}").into(),
            ..InstanceSpec::new(self.id(number), Technology::Wasm)
        }
    }

    /// What a module leaves on this node.
    fn left(&self) -> usize {
        let entries = |name: &str| fs::read_dir(self.dir.path().join(name)).map_or(0, Iterator::count);
        entries("run/wasm") + entries("state/wasm/instances") + entries("state/logs/wasm")
    }
}

fn served() -> Vec<PortMapping> {
    vec![PortMapping { host: 8080, container: 80, protocol: Protocol::Tcp }]
}

/// Asks from inside the namespace.
fn page(netns: &Path) -> String {
    let script = "ip link set lo up; exec 3<>/dev/tcp/127.0.0.1/80; printf 'GET / HTTP/1.0\\r\\n' >&3; printf '\\r\\n' >&3; cat <&3";
    let asked = Command::new("nsenter").arg(format!("--net={}", netns.display())).args(["bash", "-c", script]).output();
    String::from_utf8(asked.unwrap().stdout).unwrap()
}

#[tokio::test]
#[ignore = "needs root"]
async fn a_module_sees_what_it_is_given_and_no_more() {
    let rig = Rig::new("given");
    assert!(!rig.runtime(false).works().await);
    let runtime = rig.runtime(true);
    assert!(runtime.works().await, "a trial");
    assert_eq!(rig.left(), 0, "the trial is gone");

    let told = InstanceSpec { environment: vec!["A=b c".into()], ports: served(), ..rig.workload(0, "e") };
    run(&runtime, &told).await;
    assert_eq!(exited(&runtime).await.code, 0);
    let said = log(&runtime, &told.id, "LISTEN_FD=3").await;
    assert_eq!(said, "workload.wasm\ne\nA=b c\nHOSTNAME=instance-0\nLISTEN_FDS=1\nLISTEN_FD=3\n");

    let (volume, file) = (rig.dir.path().join("volume"), rig.dir.path().join("greeting"));
    fs::create_dir(&volume).unwrap();
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o777)).unwrap();
    fs::write(&file, "hello\n").unwrap();
    let mounts = vec![
        Mount { source: volume.clone(), target: "/mnt/data".into(), read_only: false },
        Mount { source: file, target: "/etc/greeting".into(), read_only: true },
    ];
    for (number, spec) in [(1, InstanceSpec { mounts, ..rig.workload(1, "f") }), (2, rig.workload(2, "r"))] {
        run(&runtime, &spec).await;
        let exit = Exit { instance: rig.id(number), code: 0, out_of_memory: false, reason: None };
        assert_eq!(exited(&runtime).await, exit);
    }
    assert_eq!(fs::read_to_string(volume.join("copy")).unwrap(), "hello\n");
    assert_eq!(runtime.logs(&rig.id(1), 100).await.unwrap(), b"hello\n");
    for number in 0..3 {
        runtime.stop(&rig.id(number), Duration::ZERO).await.unwrap();
    }
    assert_eq!(rig.left(), 0);
}

#[tokio::test]
#[ignore = "needs root"]
async fn each_end_is_told_with_its_reason() {
    let rig = Rig::new("ends");
    let runtime = rig.runtime(true);
    for (command, code, out_of_memory, reason) in [
        ("x", 7, false, None),
        ("m", 137, true, None),
        ("t", 134, false, Some("trap: wasm `unreachable` instruction executed")),
    ] {
        let limits = Limits { memory_mib: Some(16), ..Limits::default() };
        let spec = InstanceSpec { limits, ..rig.workload(0, command) };
        run(&runtime, &spec).await;
        let exit = Exit { instance: spec.id.clone(), code, out_of_memory, reason: reason.map(str::to_owned) };
        assert_eq!(exited(&runtime).await, exit, "{command}");
        let later = rig.runtime(true).adopt().await.unwrap();
        assert_eq!(later[0].state, AdoptedState::Exited(exit.clone()), "also for who did not watch");
        runtime.start(&spec.id).await.unwrap();
        assert_eq!(exited(&runtime).await, exit, "{command}, raised again");
        runtime.stop(&spec.id, Duration::ZERO).await.unwrap();
    }
    // A limit that only the kernel holds: the interpreter has its share of it too.
    let limits = Limits { vcpus: Some(1), memory_mib: Some(64), ..Limits::default() };
    let burning = InstanceSpec { limits, ..rig.workload(1, "c") };
    run(&runtime, &burning).await;
    let known = runtime.inspect(&burning.id).await.unwrap();
    assert_eq!((known.cpus, known.memory_bytes), (Some(1.0), Some((64 + 48) << 20)));
    runtime.stop(&burning.id, Duration::from_secs(5)).await.unwrap();
    assert_eq!(rig.left(), 0);
}

#[tokio::test]
#[ignore = "needs root"]
async fn what_cannot_run_is_refused_with_a_reason() {
    let rig = Rig::new("refused");
    let runtime = rig.runtime(true);
    let module = |name: &str, bytes: &[u8]| {
        let path = rig.dir.path().join(name);
        fs::write(&path, bytes).unwrap();
        InstanceSpec { image: format!("file://{}", path.display()), ..rig.workload(0, "x") }
    };
    let stranger = r#"(module (import "env" "f" (func)) (memory (export "memory") 1) (func (export "_start")))"#;
    let udp = vec![PortMapping { host: 53, container: 53, protocol: Protocol::Udp }];
    let device = DeviceGrant { name: "camera".into(), nodes: vec!["/dev/null".into()] };
    let limits = |storage_mib, vgpus| Limits { storage_mib, vgpus, ..Limits::default() };
    for (spec, reason) in [
        (module("text", b"hello"), "module: it is no WebAssembly module"),
        (module("stranger", &wat::parse_str(stranger).unwrap()), "module: it imports env::f;"),
        (InstanceSpec { image: "file:///no/such".into(), ..rig.workload(0, "x") }, "No such file"),
        (InstanceSpec { image: "docker.io/library/web".into(), ..rig.workload(0, "x") }, "is not the URL"),
        (InstanceSpec { ports: udp, ..rig.workload(0, "x") }, "port: 53:53/udp: WASI preview 1"),
        (InstanceSpec { devices: vec![device], ..rig.workload(0, "x") }, "devices: camera cannot be given to wasm"),
        (InstanceSpec { limits: limits(Some(1), 0), ..rig.workload(0, "x") }, "storage: "),
        (InstanceSpec { limits: limits(None, 1), ..rig.workload(0, "x") }, "vgpus: "),
        (InstanceSpec { user: Some("no-such-user".into()), ..rig.workload(0, "x") }, "user: there is no user"),
        (InstanceSpec { directory: Some("/x".into()), ..rig.workload(0, "x") }, "working directory: a module has none"),
    ] {
        let error = runtime.prepare(&spec).await.unwrap_err();
        assert!(error.to_string().contains(reason), "{reason:?} is not in {error}");
        runtime.stop(&spec.id, Duration::ZERO).await.unwrap();
    }
    let error = rig.runtime(false).prepare(&rig.workload(0, "x")).await.unwrap_err();
    assert!(matches!(error, RuntimeError::Refused { what: "wasm", .. }), "{error}");
    assert_eq!(rig.left(), 0);
}

#[tokio::test]
#[ignore = "needs root"]
async fn a_server_outlives_the_daemon_and_has_few_rights() {
    let rig = Rig::new("serves");
    let earlier = rig.runtime(true);
    let spec = InstanceSpec { ports: served(), ..rig.workload(0, "s") };
    let netns = run(&earlier, &spec).await.netns;
    log(&earlier, &spec.id, "serving").await;
    assert!(page(&netns).ends_with("\r\n\r\nwasm\n"));
    let known = earlier.inspect(&spec.id).await.unwrap();
    assert_eq!((known.command.join(" "), known.user.as_str()), ("workload.wasm s".into(), "65534:65534"));
    let pid = known.pid.unwrap();
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    for line in [
        "Uid:\t65534\t65534\t65534\t65534",
        "Gid:\t65534\t65534\t65534\t65534",
        "NoNewPrivs:\t1",
        "CapEff:\t0000000000000000",
    ] {
        assert!(status.contains(line), "{line} in {status}");
    }
    drop(earlier);
    // The file it came from may go.
    fs::remove_file(rig.dir.path().join("workload.wasm")).unwrap();
    let later = rig.runtime(true);
    let adopted = later.adopt().await.unwrap();
    let AdoptedState::Running(sandbox) = &adopted[0].state else { panic!("{adopted:?}") };
    assert_eq!((&sandbox.netns, &adopted[0].document), (&netns, &spec.document));
    assert_eq!(later.inspect(&spec.id).await.unwrap().pid, Some(pid), "the same process");
    assert!(page(&netns).ends_with("\r\n\r\nwasm\n"));
    let pid = nix::unistd::Pid::from_raw(pid.cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_eq!(exited(&later).await.code, 137);
    later.start(&spec.id).await.unwrap();
    let deadline = Instant::now() + PATIENCE;
    while !page(&netns).ends_with("\r\n\r\nwasm\n") {
        assert!(Instant::now() < deadline, "it does not serve again");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    later.stop(&spec.id, Duration::from_secs(5)).await.unwrap();
    assert_eq!(rig.left(), 0);
}

#[tokio::test]
#[ignore = "needs root"]
async fn whoever_the_user_is_a_module_has_no_capabilities() {
    let rig = Rig::new("rights");
    let runtime = rig.runtime(true);
    for (number, user, ids) in
        [(0, None, 65_534), (1, Some("root"), 0), (2, Some("0"), 0), (3, Some("1234:5678"), 1234)]
    {
        let spec = InstanceSpec { ports: served(), user: user.map(Into::into), ..rig.workload(number, "s") };
        run(&runtime, &spec).await;
        log(&runtime, &spec.id, "serving").await;
        let pid = runtime.inspect(&spec.id).await.unwrap().pid.unwrap();
        for thread in fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
            let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
            assert!(status.contains(&format!("Uid:\t{ids}\t{ids}\t{ids}\t{ids}\n")), "{user:?}: {status}");
            for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                assert!(status.contains(&format!("{set}:\t0000000000000000\n")), "{user:?}: {set} in {status}");
            }
        }
        runtime.stop(&spec.id, Duration::ZERO).await.unwrap();
    }
    assert_eq!(rig.left(), 0);
}
