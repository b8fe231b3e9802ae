//! Plain commands under the real supervisor: namespaces, control groups, ends, adoption.
#![expect(clippy::unwrap_used, reason = "a test panics where it cannot go on")]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::inotify::{InitFlags, Inotify};
use node_engine::model::{InstanceId, InstanceSpec, InstanceUsage, Limits, Technology};
use node_engine::netns;
use node_engine::runtime::process::{Policy, ProcessRuntime};
use node_engine::runtime::supervised::Home;
use node_engine::runtime::{AdoptedState, Exit, Runtime, RuntimeError};
use support::{exited, log, run};
use tokio::sync::watch;

/// Directories of one test, and names that no other has.
struct Rig {
    dir: tempfile::TempDir,
    service: &'static str,
}

impl Rig {
    fn new(service: &'static str) -> Self {
        Self { dir: tempfile::tempdir().unwrap(), service }
    }

    fn runtime(&self, allowed: bool, user: &str) -> ProcessRuntime {
        let group = format!("/node-engine-test-{}", std::process::id());
        let home = Home {
            supervisor: env!("CARGO_BIN_EXE_node-engine").into(),
            ..Home::new(&self.dir.path().join("run"), &self.dir.path().join("state"), "process", &group)
        };
        let policy = Policy { allowed, user: user.into() };
        ProcessRuntime::new(home, policy, watch::channel(Some(vec!["192.0.2.53".parse().unwrap()])).1)
    }

    fn id(&self, number: u32) -> InstanceId {
        format!("test.process.{}.{}.instance.{number}", self.service, std::process::id()).parse().unwrap()
    }

    fn shell(&self, number: u32, script: &str) -> InstanceSpec {
        let command = ["sh", "-c", script].map(str::to_owned).into();
        let document = format!("document of {number}").into();
        InstanceSpec { command, document, ..InstanceSpec::new(self.id(number), Technology::Process) }
    }

    fn supervisor(&self, id: &InstanceId) -> i32 {
        let file = self.dir.path().join("run/process").join(id.to_string()).join("alive");
        fs::read_to_string(file).unwrap().trim().parse().unwrap()
    }

    fn pinned(id: &InstanceId) -> PathBuf {
        Path::new(netns::NAMED).join(id.to_string())
    }
}

#[tokio::test]
#[ignore = "needs root"]
async fn a_command_has_surroundings_of_its_own() {
    let (rig, marker) = (Rig::new("own"), tempfile::NamedTempFile::new().unwrap());
    let runtime = rig.runtime(true, "root");
    let script = format!(
        "echo ran > {}; hostname; echo $A $HOSTNAME; cat /etc/resolv.conf; readlink /proc/self/ns/net; pwd; echo pid $$; \
         ls /proc | grep -c '^[0-9]'; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; echo end; exec sleep 1000",
        marker.path().display()
    );
    let spec =
        InstanceSpec { environment: vec!["A=b".into()], directory: Some("/usr".into()), ..rig.shell(0, &script) };
    let sandbox = runtime.prepare(&spec).await.unwrap();
    assert_eq!(sandbox.netns, Rig::pinned(&spec.id));
    assert_eq!(fs::read_to_string(marker.path()).unwrap(), "", "nothing of it runs before the start");
    runtime.start(&spec.id).await.unwrap();
    runtime.start(&spec.id).await.expect("starting what runs changes nothing");
    let said = log(&runtime, &spec.id, "end").await;
    let lines: Vec<&str> = said.lines().collect();
    let net = format!("net:[{}]", netns::identity(&sandbox.netns).unwrap().inode());
    assert_eq!(lines[..5], ["instance-0", "b instance-0", "nameserver 192.0.2.53", &net, "/usr"], "{said}");
    // Behind the first process and its thread.
    assert_eq!(lines[5], "pid 3", "{said}");
    assert!(lines[6].parse::<u32>().unwrap() < 8, "it sees its own processes alone: {said}");
    assert_eq!(lines[7], "0", "{said}");
    let usage = runtime.usage().await.unwrap();
    assert_eq!((usage.len(), &usage[0].instance), (1, &spec.id));
    assert!(usage[0].log_tail.contains("nameserver") && usage[0].disk_bytes > 0, "{usage:?}");
    runtime.stop(&spec.id, Duration::ZERO).await.unwrap();
    assert!(!Rig::pinned(&spec.id).exists());
    assert!(matches!(runtime.logs(&spec.id, 1).await, Err(RuntimeError::Unknown(_))));
    assert!(matches!(runtime.start(&spec.id).await, Err(RuntimeError::Unknown(_))));
    runtime.stop(&spec.id, Duration::ZERO).await.expect("stopping the unknown is a success");
}

#[tokio::test]
#[ignore = "needs root"]
async fn each_end_is_told_once_with_its_code() {
    let rig = Rig::new("ends");
    let runtime = rig.runtime(true, "root");
    for (number, script, memory, code, out_of_memory) in [
        (0, "exit 0", None, 0, false),
        (1, "exit 7", None, 7, false),
        (2, "kill -9 $$", None, 137, false),
        (3, "tail /dev/zero", Some(16), 137, true),
        // An orphan that holds the output does not hold up the end.
        (4, "sleep 1000 & exit 5", None, 5, false),
    ] {
        let limits = Limits { memory_mib: memory, ..Limits::default() };
        let spec = InstanceSpec { limits, ..rig.shell(number, script) };
        run(&runtime, &spec).await;
        let exit = exited(&runtime).await;
        assert_eq!(exit, Exit { instance: spec.id.clone(), code, out_of_memory, reason: None }, "{script}");
        let adopted = runtime.adopt().await.unwrap();
        assert_eq!(adopted[0].state, AdoptedState::Exited(exit));
        runtime.stop(&spec.id, Duration::ZERO).await.unwrap();
    }
    // What is started again after its end runs again, and its end is its own.
    let marker = tempfile::tempdir().unwrap();
    let script = format!("cd {}; test -e x || {{ >x; tail /dev/zero; }}; exit 5", marker.path().display());
    let limits = Limits { memory_mib: Some(16), ..Limits::default() };
    let raised = InstanceSpec { limits, ..rig.shell(8, &script) };
    run(&runtime, &raised).await;
    for out_of_memory in [true, false, false] {
        let exit = Exit { instance: raised.id.clone(), code: 5, out_of_memory, reason: None };
        assert_eq!(exited(&runtime).await, exit);
        runtime.start(&raised.id).await.unwrap();
    }
    exited(&runtime).await;
    runtime.stop(&raised.id, Duration::ZERO).await.unwrap();
    // An end that was asked for is not told: the next one is the next instance's.
    let (asked, next) = (rig.shell(5, "sleep 1000"), rig.shell(6, "exit 9"));
    run(&runtime, &asked).await;
    runtime.stop(&asked.id, Duration::ZERO).await.unwrap();
    run(&runtime, &next).await;
    assert_eq!(exited(&runtime).await.instance, next.id);
    // A supervisor that is killed takes its command along.
    let orphan = rig.shell(7, "sleep 1000");
    run(&runtime, &orphan).await;
    let supervisor = nix::unistd::Pid::from_raw(rig.supervisor(&orphan.id));
    nix::sys::signal::kill(supervisor, nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_eq!(
        exited(&runtime).await,
        Exit { instance: orphan.id.clone(), code: 137, out_of_memory: false, reason: None }
    );
    for spec in [next, orphan] {
        runtime.stop(&spec.id, Duration::ZERO).await.unwrap();
    }
    assert!(runtime.adopt().await.unwrap().is_empty());
}

#[tokio::test]
#[ignore = "needs root"]
async fn a_stop_asks_first_and_forces_after_the_grace() {
    let rig = Rig::new("grace");
    let runtime = rig.runtime(true, "root");
    for (number, script, grace, least, most) in [
        (0, "trap 'exit 0' TERM; echo up; while :; do sleep 0.05; done", 30, 0.0, 15.0),
        (1, "trap '' TERM; echo up; while :; do sleep 0.05; done", 1, 1.0, 15.0),
    ] {
        let spec = rig.shell(number, script);
        run(&runtime, &spec).await;
        log(&runtime, &spec.id, "up").await;
        let began = Instant::now();
        runtime.stop(&spec.id, Duration::from_secs(grace)).await.unwrap();
        let took = began.elapsed().as_secs_f64();
        assert!((least..most).contains(&took), "{script}: {took} s");
    }
}

#[tokio::test]
#[ignore = "needs root"]
async fn a_restarted_daemon_adopts_what_runs() {
    let rig = Rig::new("adopt");
    let (runs, ended, prepared) = (rig.shell(0, "sleep 1000"), rig.shell(1, "exit 9"), rig.shell(2, "true"));
    let earlier = rig.runtime(true, "root");
    run(&earlier, &runs).await;
    run(&earlier, &ended).await;
    assert_eq!(exited(&earlier).await.code, 9);
    earlier.prepare(&prepared).await.unwrap();
    let supervisor = rig.supervisor(&runs.id);
    drop(earlier);

    let later = rig.runtime(true, "root");
    let adopted = later.adopt().await.unwrap();
    let of = |id: &InstanceId| adopted.iter().find(|adopted| adopted.instance == *id).unwrap().clone();
    let AdoptedState::Running(sandbox) = of(&runs.id).state else { panic!("{adopted:?}") };
    assert_eq!(sandbox.netns, Rig::pinned(&runs.id));
    assert_eq!(of(&runs.id).document, runs.document);
    let exit = Exit { instance: ended.id.clone(), code: 9, out_of_memory: false, reason: None };
    assert_eq!(of(&ended.id).state, AdoptedState::Exited(exit));
    assert_eq!(of(&prepared.id).state, AdoptedState::Incomplete);
    assert_eq!(rig.supervisor(&runs.id), supervisor, "the same process");
    assert_eq!(later.usage().await.unwrap().len(), 1);
    // What was adopted is watched like the rest.
    let supervisor = nix::unistd::Pid::from_raw(supervisor);
    nix::sys::signal::kill(supervisor, nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_eq!(exited(&later).await.instance, runs.id);
    for spec in [runs, ended, prepared] {
        later.stop(&spec.id, Duration::ZERO).await.unwrap();
    }
    assert_eq!(fs::read_dir(rig.dir.path().join("run/process")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(rig.dir.path().join("state/logs/process")).unwrap().count(), 0);
}

#[tokio::test]
#[ignore = "needs root"]
async fn the_nodes_configuration_decides_who_runs_what() {
    let rig = Rig::new("policy");
    let off = rig.runtime(false, "root");
    assert!(!off.works().await);
    let error = off.prepare(&rig.shell(0, "true")).await.unwrap_err();
    assert!(error.to_string().contains("runtime.process"), "{error}");

    let runtime = rig.runtime(true, "nobody");
    assert!(runtime.works().await, "a trial");
    let spec = rig.shell(1, "id -u; grep NoNewPrivs /proc/self/status; echo end");
    run(&runtime, &spec).await;
    assert_eq!(exited(&runtime).await.code, 0);
    let said = log(&runtime, &spec.id, "end").await;
    assert!(said.starts_with("65534\nNoNewPrivs:\t1\n"), "{said}");
    runtime.stop(&spec.id, Duration::ZERO).await.unwrap();
    for (spec, reason) in [
        (InstanceSpec { user: Some("root".into()), ..rig.shell(2, "true") }, "runs processes as nobody"),
        (InstanceSpec { user: Some("no-such-user".into()), ..rig.shell(2, "true") }, "there is no user"),
        (InstanceSpec { directory: Some("/no/such".into()), ..rig.shell(2, "true") }, "is no directory"),
        (InstanceSpec { image: "no-such-program".into(), ..rig.shell(2, "true") }, "not an executable file"),
    ] {
        let error = runtime.prepare(&spec).await.unwrap_err();
        assert!(matches!(error, RuntimeError::Refused { .. }) && error.to_string().contains(reason), "{error}");
    }
    assert!(runtime.adopt().await.unwrap().is_empty(), "a refusal leaves nothing");
}

#[tokio::test]
#[ignore = "needs root"]
async fn ends_are_found_where_the_kernel_has_no_watch_to_give() {
    let rig = Rig::new("unwatched");
    let earlier = rig.runtime(true, "root");
    let runs = rig.shell(0, "sleep 1000");
    run(&earlier, &runs).await;
    drop(earlier);
    // Its watch goes with a task that ends meanwhile.
    tokio::time::sleep(Duration::from_millis(100)).await;
    // As a container of the same user may do.
    let mut taken = Vec::new();
    let refused = loop {
        match Inotify::init(InitFlags::IN_CLOEXEC) {
            Ok(one) => taken.push(one),
            Err(error) => break error,
        }
    };
    assert_eq!(refused, Errno::EMFILE);
    let runtime = rig.runtime(true, "root");
    assert!(runtime.works().await, "a trial");
    let adopted = runtime.adopt().await.unwrap();
    assert!(matches!(adopted[0].state, AdoptedState::Running(_)), "{adopted:?}");
    let short = rig.shell(1, "exit 7");
    run(&runtime, &short).await;
    let exit = exited(&runtime).await;
    assert_eq!((exit.instance, exit.code), (short.id.clone(), 7));
    let supervisor = nix::unistd::Pid::from_raw(rig.supervisor(&runs.id));
    nix::sys::signal::kill(supervisor, nix::sys::signal::Signal::SIGKILL).unwrap();
    let exit = exited(&runtime).await;
    assert_eq!((exit.instance, exit.code), (runs.id.clone(), 137), "what was adopted");
    // With watches to have again, the next end is told by the kernel.
    drop(taken);
    runtime.start(&short.id).await.unwrap();
    assert_eq!(exited(&runtime).await.code, 7);
    for spec in [runs, short] {
        runtime.stop(&spec.id, Duration::ZERO).await.unwrap();
    }
}

#[tokio::test]
#[ignore = "needs root"]
async fn measuring_does_not_read_of_every_process() {
    let rig = Rig::new("measured");
    let runtime = rig.runtime(true, "root");
    // Others of this machine.
    let mut crowd: Vec<_> = (0..200).map(|_| Command::new("sleep").arg("1000").spawn().unwrap()).collect();
    let spec = rig.shell(0, "echo up; exec sleep 1000");
    run(&runtime, &spec).await;
    log(&runtime, &spec.id, "up").await;
    let reads = || {
        let io = fs::read_to_string("/proc/self/io").unwrap();
        io.lines().find_map(|line| line.strip_prefix("syscr: ")?.parse::<u32>().ok()).unwrap()
    };
    let counted = |usage: Vec<InstanceUsage>| usage[0].counters.received_bytes;
    assert!(counted(runtime.usage().await.unwrap()).is_some());
    let before = reads();
    assert!(counted(runtime.usage().await.unwrap()).is_some(), "its interfaces are found");
    let took = reads() - before;
    assert!(took < 150, "{took} reads for one instance");
    for one in &mut crowd {
        one.kill().and_then(|()| one.wait()).unwrap();
    }
    runtime.stop(&spec.id, Duration::ZERO).await.unwrap();
}
