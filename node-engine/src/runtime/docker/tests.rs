//! Against a real Docker daemon, kept for tests alone. They run in its pid and mount namespaces, as the daemon of the node does:
//! `NODE_ENGINE_TEST_DOCKER` is the path of its socket, beside which `docker.pid` lies. It must have `live-restore` on, and
//! /bin/busybox must be a static one.

mod devices;
mod registry;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tokio::sync::{OnceCell, RwLock};
use tokio::time::timeout;

use super::container::tests::spec as bare;
use super::*;
use crate::model::Limits;
use crate::runtime::pause;
use crate::runtime::session::{Input, Output, Terminal};

const IMAGE: &str = "node-engine-test/busybox:1";
const PATIENCE: Duration = Duration::from_secs(60);

/// Tests that need the daemon to stay up read; those that restart it write.
static DAEMON: RwLock<()> = RwLock::const_new(());

#[tokio::test]
#[ignore = "needs docker"]
async fn nothing_runs_before_start_and_nothing_is_left_after_stop() {
    let _up = DAEMON.read().await;
    let runtime = runtime().await;
    let script = "echo hello; hostname; echo $HOSTNAME $A; cat /etc/resolv.conf; while :; do :; done";
    let spec = InstanceSpec { environment: vec!["A=b".into()], ..shell(10, script) };

    let sandbox = runtime.prepare(&spec).await.expect("prepare");
    let inode = namespace(&sandbox.netns);
    assert_ne!(inode, namespace("/proc/self/ns/net"));
    let workload = inspect(&runtime, &workload_name(&spec.id)).await.expect("the workload is created");
    assert_eq!(running_pid(&workload), None, "nothing of it runs");
    assert_eq!(state_of(&spec.id).await, Some(AdoptedState::Incomplete));

    runtime.start(&spec.id).await.expect("start");
    runtime.start(&spec.id).await.expect("starting what runs changes nothing");
    let Some(AdoptedState::Running(found)) = state_of(&spec.id).await else { panic!("it runs") };
    assert_eq!(namespace(&found.netns), inode, "in the prepared namespace");
    assert_eq!(found.netns, sandbox.netns, "by a name that a later start of the workload leaves as it is");

    let log = eventually("its output", async || {
        let log = runtime.logs(&spec.id, 4096).await.expect("logs");
        let log = String::from_utf8(log).expect("text");
        log.contains("nameserver").then_some(log)
    });
    let log = log.await;
    assert!(log.starts_with("hello\ninstance-10\ninstance-10 b\n"), "{log}");
    let servers: Vec<_> =
        surroundings::host_name_servers().iter().map(|server| format!("nameserver {server}")).collect();
    for server in servers {
        assert!(log.contains(&server), "{server} in {log}");
    }
    assert_eq!(runtime.logs(&spec.id, 4).await.expect("logs").len(), 4);

    let usage = eventually("its usage", async || {
        let usage = runtime.usage().await.expect("usage").into_iter().find(|usage| usage.instance == spec.id)?;
        (usage.cpu_percent > 1.0 && !usage.log_tail.is_empty()).then_some(usage)
    });
    let usage = usage.await;
    assert!(usage.cpu_percent <= 110.0 && usage.memory_bytes > 0 && usage.memory_percent > 0.0, "{usage:?}");
    assert!(usage.log_tail.contains("hello"), "{usage:?}");

    runtime.stop(&spec.id, Duration::ZERO).await.expect("stop");
    assert_gone(&runtime, &spec.id).await;
    assert!(!Path::new(&sandbox.netns).exists(), "the namespace is gone");
    assert!(runtime.usage().await.expect("usage").is_empty());
    runtime.stop(&spec.id, Duration::ZERO).await.expect("stopping the unknown is a success");
    assert!(matches!(runtime.start(&spec.id).await, Err(RuntimeError::Unknown(_))));
    assert!(matches!(runtime.logs(&spec.id, 10).await, Err(RuntimeError::Unknown(_))));
}

#[tokio::test]
#[ignore = "needs docker"]
async fn limits_hold_in_the_cgroup() {
    let _up = DAEMON.read().await;
    let runtime = runtime().await;
    let script = "cd /sys/fs/cgroup; cat memory/memory.limit_in_bytes cpu/cpu.cfs_quota_us 2>/dev/null || cat memory.max cpu.max";
    let limits = Limits { vcpus: Some(1), memory_mib: Some(48), ..Limits::default() };
    let spec = InstanceSpec { limits, ..shell(20, script) };
    assert!(cgroup::online_cpus() > 1, "on one CPU a limit of one is none");
    run(&runtime, &spec).await;
    assert_eq!(exited(&runtime).await, Exit { instance: spec.id.clone(), code: 0, out_of_memory: false, reason: None });
    let log = String::from_utf8(runtime.logs(&spec.id, 1000).await.expect("logs")).expect("text");
    let words: Vec<_> = log.split_ascii_whitespace().collect();
    assert_eq!(words[..2], ["50331648", "100000"], "{log}");
    runtime.stop(&spec.id, Duration::ZERO).await.expect("stop");
}

#[tokio::test]
#[ignore = "needs docker"]
async fn each_end_is_told_once_with_its_code() {
    let _up = DAEMON.read().await;
    let runtime = runtime().await;
    for (number, script, code, out_of_memory) in
        [(30, "exit 0", 0, false), (31, "exit 7", 7, false), (32, "tail /dev/zero", 137, true)]
    {
        let limits = Limits { memory_mib: Some(16), ..Limits::default() };
        let spec = InstanceSpec { limits, ..shell(number, script) };
        run(&runtime, &spec).await;
        let exit = exited(&runtime).await;
        assert_eq!(exit, Exit { instance: spec.id.clone(), code, out_of_memory, reason: None }, "{script}");
        assert_eq!(state_of(&spec.id).await, Some(AdoptedState::Exited(exit)));
        runtime.stop(&spec.id, Duration::ZERO).await.expect("stop");
        assert_gone(&runtime, &spec.id).await;
    }
    // The sandboxes that ended, and an end that was asked for, are not told: the next end is the next instance's.
    let asked = shell(33, "sleep 1000");
    run(&runtime, &asked).await;
    runtime.stop(&asked.id, Duration::ZERO).await.expect("stop");
    let next = shell(34, "exit 5");
    run(&runtime, &next).await;
    assert_eq!(exited(&runtime).await.instance, next.id);
    runtime.stop(&next.id, Duration::ZERO).await.expect("stop");
}

#[tokio::test]
#[ignore = "needs docker"]
async fn a_stop_asks_first_and_forces_after_the_grace() {
    let _up = DAEMON.read().await;
    let runtime = runtime().await;
    for (number, script, least, most) in [
        (40, "trap 'exit 0' TERM; echo up; while :; do sleep 0.1; done", 0.0, 8.0),
        (41, "trap '' TERM; echo up; while :; do sleep 0.1; done", 2.0, 12.0),
    ] {
        let spec = shell(number, script);
        run(&runtime, &spec).await;
        eventually("it listens for signals", async || {
            let log = runtime.logs(&spec.id, 10).await.expect("logs");
            log.starts_with(b"up").then_some(())
        })
        .await;
        let began = Instant::now();
        let grace = Duration::from_secs(if number == 40 { 30 } else { 2 });
        runtime.stop(&spec.id, grace).await.expect("stop");
        let took = began.elapsed().as_secs_f64();
        assert!((least..most).contains(&took), "{script}: {took} s");
        assert_gone(&runtime, &spec.id).await;
    }
}

/// What tells network namespaces apart.
fn namespace(path: impl AsRef<Path>) -> u64 {
    fs::metadata(path).expect("the namespace is there").ino()
}

#[tokio::test]
#[ignore = "needs docker"]
async fn a_restarted_daemon_of_ours_adopts_what_runs() {
    let _up = DAEMON.read().await;
    let earlier = runtime().await;
    let (runs, ended, prepared) = (shell(50, "sleep 1000"), shell(51, "exit 9"), shell(52, "true"));
    run(&earlier, &runs).await;
    run(&earlier, &ended).await;
    assert_eq!(exited(&earlier).await.code, 9);
    earlier.prepare(&prepared).await.expect("prepare");
    let pid = pid_of(&earlier, &runs.id).await;
    drop(earlier);

    let runtime = runtime().await;
    let adopted = runtime.adopt().await.expect("adopt");
    let of = |id: &InstanceId| adopted.iter().find(|adopted| adopted.instance == *id).expect("adopted").clone();
    let AdoptedState::Running(found) = of(&runs.id).state else { panic!("{:?}", of(&runs.id)) };
    assert_eq!(namespace(found.netns), namespace(netns(pid).netns), "of the same process");
    assert_eq!(of(&runs.id).document, runs.document);
    let exit = Exit { instance: ended.id.clone(), code: 9, out_of_memory: false, reason: None };
    assert_eq!(of(&ended.id).state, AdoptedState::Exited(exit));
    assert_eq!(of(&prepared.id).state, AdoptedState::Incomplete);

    // What was adopted is measured and watched like the rest.
    assert!(runtime.usage().await.expect("usage").iter().any(|usage| usage.instance == runs.id));
    kill(pid);
    eventually("its end", async || (exited(&runtime).await.instance == runs.id).then_some(())).await;
    for spec in [runs, ended, prepared] {
        runtime.stop(&spec.id, Duration::ZERO).await.expect("stop");
        assert_gone(&runtime, &spec.id).await;
    }
}

#[tokio::test]
#[ignore = "needs docker"]
async fn workloads_outlive_the_docker_daemon_and_a_missed_end_is_told() {
    let _down = DAEMON.write().await;
    let runtime = runtime().await;
    let (stays, goes) = (shell(60, "sleep 1000"), shell(61, "sleep 1000"));
    run(&runtime, &stays).await;
    run(&runtime, &goes).await;
    let (kept, lost) = (pid_of(&runtime, &stays.id).await, pid_of(&runtime, &goes.id).await);
    assert_eq!(runtime.usage().await.expect("usage").len(), 2);

    let daemon = Daemon::stop();
    assert!(matches!(runtime.adopt().await, Err(RuntimeError::Unavailable(_))));
    assert_eq!(runtime.usage().await.expect("usage goes on").len(), 2);
    kill(lost);
    daemon.start();

    let exit = exited(&runtime).await;
    // Docker 26 and later no longer know the code of an end they missed.
    assert!(exit.instance == goes.id && [137, 255].contains(&exit.code), "missed, and told: {exit:?}");
    assert_eq!(pid_of(&runtime, &stays.id).await, kept, "the same process");
    // The stream is open again: the next end comes at once, and nothing was told twice before it.
    kill(kept);
    assert_eq!(exited(&runtime).await.instance, stays.id);
    for spec in [stays, goes] {
        runtime.stop(&spec.id, Duration::ZERO).await.expect("stop");
        assert_gone(&runtime, &spec.id).await;
    }
}

#[tokio::test]
#[ignore = "needs docker"]
async fn an_image_that_cannot_be_had_is_told_in_the_registrys_words() {
    let _up = DAEMON.read().await;
    let runtime = runtime().await;
    let spec = InstanceSpec { image: "127.0.0.1:1/no/such:1".into(), ..shell(70, "true") };
    let error = runtime.prepare(&spec).await.expect_err("no registry there");
    assert!(matches!(&error, RuntimeError::Image { image, .. } if *image == spec.image), "{error}");
    assert!(error.to_string().contains("connection refused"), "{error}");
    // A local image of another platform does not count as present.
    let spec = InstanceSpec { platform: Some("linux/s390x".into()), ..shell(70, "true") };
    assert!(matches!(runtime.prepare(&spec).await, Err(RuntimeError::Image { .. })));
    runtime.stop(&spec.id, Duration::ZERO).await.expect("nothing to undo");
    assert_gone(&runtime, &spec.id).await;
}

#[tokio::test]
#[ignore = "needs docker"]
async fn a_prepare_dropped_at_any_point_is_undone_by_stop() {
    let _up = DAEMON.read().await;
    let runtime = Arc::new(runtime().await);
    let spec = shell(80, "true");
    for milliseconds in (0..400).step_by(25) {
        // The deadline drops the future at an arbitrary point.
        let _ = timeout(Duration::from_millis(milliseconds), runtime.prepare(&spec)).await;
        runtime.stop(&spec.id, Duration::ZERO).await.expect("stop");
        assert_gone(&runtime, &spec.id).await;
    }
    // And one that was made before is made anew.
    runtime.prepare(&spec).await.expect("prepare");
    runtime.prepare(&spec).await.expect("prepare over what is there");
    runtime.stop(&spec.id, Duration::ZERO).await.expect("stop");
    assert_gone(&runtime, &spec.id).await;
}

#[tokio::test]
#[ignore = "needs docker"]
async fn a_command_runs_beside_the_workload_with_and_without_a_terminal() {
    let _up = DAEMON.read().await;
    let runtime = runtime().await;
    let spec = shell(100, "sleep 1000");
    assert!(matches!(runtime.exec(&spec.id, words("true")).await, Err(RuntimeError::Unknown(_))));
    runtime.prepare(&spec).await.expect("prepare");
    let early = runtime.exec(&spec.id, words("true")).await;
    assert!(matches!(early, Err(RuntimeError::Refused { what: "exec", .. })), "nothing of it runs yet");
    runtime.start(&spec.id).await.expect("start");

    let script = "echo out; echo error >&2; hostname; exit 7";
    let apart = Exec { command: ["/bin/sh", "-c", script].map(str::to_owned).into(), terminal: None };
    let (out, error, code) = outcome(runtime.exec(&spec.id, apart.clone()).await.expect("exec")).await;
    assert_eq!((out.as_str(), error.as_str(), code), ("out\ninstance-100\n", "error\n", 7));
    let terminal = Some(Terminal { columns: 100, rows: 30 });
    let (out, error, code) = outcome(runtime.exec(&spec.id, Exec { terminal, ..apart }).await.expect("exec")).await;
    assert_eq!((out.as_str(), error.as_str(), code), ("out\r\nerror\r\ninstance-100\r\n", "", 7), "one stream");

    // Both ends are full before either reads: nothing may wait for the other direction.
    let session = runtime.exec(&spec.id, words("/bin/cat")).await.expect("exec");
    let input = session.input.clone();
    let feeding = tokio::spawn(async move {
        for _ in 0..64 {
            input.send(Input::Bytes(vec![b'y'; 32 * 1024].into())).await.expect("it takes input");
        }
        input.send(Input::End).await.expect("it takes the end");
    });
    let (out, _, code) = outcome(session).await;
    feeding.await.expect("all was taken");
    assert_eq!((out.len(), code), (64 * 32 * 1024, 0));

    let (out, error, code) = outcome(runtime.exec(&spec.id, words("/no/such/program")).await.expect("exec")).await;
    assert!([126, 127].contains(&code) && format!("{out}{error}").contains("no such file"), "{out}{error}: {code}");

    // Whoever leaves takes the command along.
    let left = runtime.exec(&spec.id, words("/bin/sleep 777")).await.expect("exec");
    eventually("it runs", async || sleeping("777").then_some(())).await;
    drop(left);
    eventually("it is gone", async || (!sleeping("777")).then_some(())).await;
    // At whatever moment: Docker gives the streams before it has started the command.
    for milliseconds in [0, 5, 10, 20, 40, 80] {
        let left = runtime.exec(&spec.id, words("/bin/sleep 777")).await.expect("exec");
        tokio::time::sleep(Duration::from_millis(milliseconds)).await;
        drop(left);
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    eventually("all are gone", async || (!sleeping("777")).then_some(())).await;
    runtime.stop(&spec.id, Duration::ZERO).await.expect("stop");
}

#[tokio::test]
#[ignore = "needs docker"]
async fn an_output_is_followed_and_an_instance_inspected() {
    let _up = DAEMON.read().await;
    let runtime = runtime().await;
    let script = "echo 1; echo 2; echo 3; while ! [ -e /tmp/go ]; do sleep 0.1; done; echo 4; exit 5";
    let limits = Limits { vcpus: Some(1), memory_mib: Some(32), ..Limits::default() };
    let spec = InstanceSpec { limits, environment: vec!["PATH=/bin".into(), "TOKEN=x".into()], ..shell(110, script) };
    run(&runtime, &spec).await;
    eventually("its output", async || {
        let log = runtime.logs(&spec.id, 100).await.expect("logs");
        log.ends_with(b"3\n").then_some(())
    })
    .await;
    let details = runtime.inspect(&spec.id).await.expect("details");
    assert_eq!(details.pid.map(i64::from), Some(pid_of(&runtime, &spec.id).await));
    assert_eq!((details.cpus, details.memory_bytes), (Some(1.0), Some(32 << 20)));
    assert_eq!(details.command, ["/bin/sh", "-c", script]);
    assert!(details.environment.contains(&"TOKEN".into()) && !details.started.is_empty(), "{details:?}");
    assert_eq!((details.exit_code, details.ended.as_str()), (None, ""));

    let mut follow = runtime.follow(&spec.id, 4).await.expect("follow");
    let touch = Exec { command: ["/bin/sh", "-c", "echo > /tmp/go"].map(str::to_owned).into(), terminal: None };
    let mut text = String::new();
    let mut going = Some(touch);
    while let Some(piece) = timeout(PATIENCE, follow.recv()).await.expect("in time") {
        text.push_str(std::str::from_utf8(&piece.expect("output")).expect("text"));
        if let Some(touch) = going.take() {
            assert_eq!(outcome(runtime.exec(&spec.id, touch).await.expect("exec")).await.2, 0);
        }
    }
    assert_eq!(text, "2\n3\n4\n", "the last four bytes, and what came");
    assert_eq!(exited(&runtime).await.code, 5);
    let details = runtime.inspect(&spec.id).await.expect("details");
    assert_eq!((details.pid, details.exit_code, details.ended.is_empty()), (None, Some(5), false));
    runtime.stop(&spec.id, Duration::ZERO).await.expect("stop");
    assert!(matches!(runtime.inspect(&spec.id).await, Err(RuntimeError::Unknown(_))));
}

#[tokio::test]
#[ignore = "needs docker"]
async fn counters_are_those_of_the_container() {
    let _up = DAEMON.read().await;
    let runtime = runtime().await;
    let limits = Limits { memory_mib: Some(48), ..Limits::default() };
    let spec = InstanceSpec {
        limits,
        ..shell(120, "sleep 1000 & i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; sleep 1000")
    };
    run(&runtime, &spec).await;
    let counters = eventually("it has worked", async || {
        let usage = runtime.usage().await.expect("usage").into_iter().find(|usage| usage.instance == spec.id)?;
        usage.counters.cpu_nanoseconds.is_some_and(|used| used > 50_000_000).then_some(usage.counters)
    });
    let counters = counters.await;
    assert_eq!(counters.memory_limit_bytes, Some(48 << 20), "{counters:?}");
    assert!(counters.memory_peak_bytes.is_some_and(|peak| peak > 0 && peak <= 48 << 20), "{counters:?}");
    assert!(counters.processes.is_some_and(|number| (2..8).contains(&number)), "{counters:?}");
    // Nothing is attached, so nothing passes; that is known, not unknown.
    assert_eq!((counters.received_bytes, counters.sent_packets), (Some(0), Some(0)), "{counters:?}");
    assert_eq!(counters.out_of_memory_kills, Some(0), "{counters:?}");
    runtime.stop(&spec.id, Duration::ZERO).await.expect("stop");
}

#[tokio::test]
#[ignore = "needs docker"]
async fn containers_of_others_are_never_touched() {
    let _up = DAEMON.read().await;
    let runtime = runtime().await;
    let (spec, docker) = (shell(90, "true"), docker(&runtime).await);
    let name = workload_name(&spec.id);
    let options = CreateContainerOptions { name: Some(name.clone()), ..CreateContainerOptions::default() };
    let body = bollard::models::ContainerCreateBody {
        image: Some(IMAGE.into()),
        cmd: Some(vec!["true".into()]),
        ..Default::default()
    };
    docker.create_container(Some(options), body).await.expect("a container of somebody");
    let error = runtime.prepare(&spec).await.expect_err("the name is taken");
    assert!(matches!(error, RuntimeError::Refused { .. }) && error.to_string().contains("already in use"), "{error}");
    runtime.stop(&spec.id, Duration::ZERO).await.expect("stop");
    assert!(inspect(&runtime, &name).await.is_some(), "still there");
    assert!(inspect(&runtime, &sandbox_name(&spec.id)).await.is_none());
    docker.remove_container(&name, None).await.expect("remove");
}

/// The image of all these tests is imported once.
async fn runtime() -> DockerRuntime {
    with_registries(Registries::default()).await
}

async fn with_registries(registries: Registries) -> DockerRuntime {
    static IMPORTED: OnceCell<()> = OnceCell::const_new();
    let socket = std::env::var("NODE_ENGINE_TEST_DOCKER").expect("NODE_ENGINE_TEST_DOCKER names a socket");
    let runtime = DockerRuntime::new(Some(&socket), tokio::sync::watch::channel(Some(Vec::new())).1, registries)
        .expect("an address");
    IMPORTED.get_or_init(|| import_busybox(&runtime)).await;
    runtime
}

async fn import_busybox(runtime: &DockerRuntime) {
    use futures_util::TryStreamExt;
    let mut archive = tar::Builder::new(Vec::new());
    let append = |archive: &mut tar::Builder<Vec<u8>>, name: &str, kind, data: &[u8], target: &str| {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(0o755);
        header.set_size(data.len() as u64);
        if target.is_empty() {
            archive.append_data(&mut header, name, data).expect("append");
        } else {
            archive.append_link(&mut header, name, target).expect("append a link");
        }
    };
    let busybox = fs::read("/bin/busybox").expect("busybox-static is installed");
    for directory in ["bin/", "etc/", "proc/", "sys/", "dev/", "tmp/"] {
        append(&mut archive, directory, tar::EntryType::Directory, &[], "");
    }
    append(&mut archive, "bin/busybox", tar::EntryType::Regular, &busybox, "");
    for applet in ["sh", "cat", "sleep", "hostname", "tail", "true", "echo"] {
        append(&mut archive, &format!("bin/{applet}"), tar::EntryType::Symlink, &[], "busybox");
    }
    let archive = archive.into_inner().expect("an archive");
    let (repo, tag) = IMAGE.split_once(':').expect("a tag");
    let options = bollard::query_parameters::CreateImageOptions {
        from_src: Some("-".into()),
        repo: Some(repo.into()),
        tag: Some(tag.into()),
        ..Default::default()
    };
    let import = docker(runtime).await.create_image(Some(options), Some(bollard::body_full(archive.into())), None);
    import.try_collect::<Vec<_>>().await.expect("import");
}

fn shell(number: u32, script: &str) -> InstanceSpec {
    let command = ["/bin/sh", "-c", script].map(str::to_owned).into();
    let environment = vec!["PATH=/bin".into()];
    InstanceSpec { image: IMAGE.into(), command, environment, ..bare(number) }
}

fn words(line: &str) -> Exec {
    Exec { command: line.split(' ').map(str::to_owned).collect(), terminal: None }
}

/// Everything a command says, and its code.
async fn outcome(mut session: Session) -> (String, String, i64) {
    let (mut out, mut error) = (Vec::new(), Vec::new());
    loop {
        match timeout(PATIENCE, session.output.recv()).await.expect("in time").expect("a last word") {
            Output::Out(bytes) => out.extend_from_slice(&bytes),
            Output::Error(bytes) => error.extend_from_slice(&bytes),
            Output::Exit(code) => {
                let text = |bytes| String::from_utf8(bytes).expect("text");
                return (text(out), text(error), code);
            }
            Output::Broken(reason) => panic!("{reason}"),
        }
    }
}

/// Is there a `sleep` of so long in this process namespace?
fn sleeping(seconds: &str) -> bool {
    let processes = fs::read_dir("/proc").expect("processes").flatten();
    let lines = processes.filter_map(|process| fs::read_to_string(process.path().join("cmdline")).ok());
    lines.into_iter().any(|line| line.ends_with(&format!("sleep\0{seconds}\0")))
}

async fn run(runtime: &DockerRuntime, spec: &InstanceSpec) {
    runtime.prepare(spec).await.expect("prepare");
    runtime.start(&spec.id).await.expect("start");
}

async fn exited(runtime: &DockerRuntime) -> Exit {
    timeout(PATIENCE, runtime.exited()).await.expect("an end in time")
}

async fn docker(runtime: &DockerRuntime) -> Docker {
    runtime.inner.client.get().await.expect("a daemon")
}

async fn inspect(runtime: &DockerRuntime, name: &str) -> Option<ContainerInspectResponse> {
    docker(runtime).await.inspect_container(name, None).await.ok()
}

async fn pid_of(runtime: &DockerRuntime, instance: &InstanceId) -> i64 {
    let found = inspect(runtime, &workload_name(instance)).await.expect("a container");
    running_pid(&found).expect("it runs")
}

/// As another daemon of ours would find it: whoever adopts watches everything, also the instances of the tests beside this one.
async fn state_of(instance: &InstanceId) -> Option<AdoptedState> {
    let adopted = runtime().await.adopt().await.expect("adopt");
    adopted.into_iter().find(|adopted| adopted.instance == *instance).map(|adopted| adopted.state)
}

async fn assert_gone(runtime: &DockerRuntime, instance: &InstanceId) {
    for name in [workload_name(instance), sandbox_name(instance)] {
        assert!(inspect(runtime, &name).await.is_none(), "{name} is left");
    }
}

async fn eventually<T>(what: &str, condition: impl AsyncFn() -> Option<T>) -> T {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(Instant::now() < deadline, "{what}: not in time");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn kill(pid: i64) {
    let pid = nix::unistd::Pid::from_raw(i32::try_from(pid).expect("a pid"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("kill");
}

/// A stopped dockerd, and how it was started.
struct Daemon {
    command: Vec<String>,
}

impl Daemon {
    /// Kills it as a crash would.
    fn stop() -> Self {
        let pid: i64 = fs::read_to_string(pid_file()).expect("docker.pid").trim().parse().expect("a pid");
        let command = fs::read_to_string(format!("/proc/{pid}/cmdline")).expect("its command line");
        assert!(command.contains("dockerd"), "{command:?} is not a dockerd of this pid namespace");
        kill(pid);
        let deadline = Instant::now() + PATIENCE;
        while Path::new(&format!("/proc/{pid}/exe")).exists() {
            assert!(Instant::now() < deadline, "dockerd does not end");
            std::thread::yield_now();
        }
        let command = command.split_terminator('\0').map(str::to_owned).collect();
        Self { command }
    }

    /// It stays when the tests end.
    fn start(self) {
        let mut dockerd = Command::new(&self.command[0]);
        dockerd.args(&self.command[1..]).process_group(0);
        dockerd.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut dockerd = dockerd.spawn().expect("dockerd starts");
        // Collected should the next restart come from this process too.
        std::thread::spawn(move || dockerd.wait());
    }
}

fn pid_file() -> PathBuf {
    let socket = std::env::var("NODE_ENGINE_TEST_DOCKER").expect("NODE_ENGINE_TEST_DOCKER names a socket");
    Path::new(&socket).with_file_name("docker.pid")
}
