//! The whole module over a runtime in memory and a network that only notes what it is asked. Time is paused: it jumps to the next
//! timer whenever everybody waits.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Mutex;

use super::super::{InstanceInfo, Plan, Workload, start};
use super::*;
use crate::config::Restarts;
use crate::drain::Drain;
use crate::model::Addresses;
use crate::netmanager::{Lease, NetManager, Request as NetRequest};
use crate::runtime::memory::{Fault, MemoryRuntime, Step};

#[tokio::test(start_paused = true)]
async fn the_network_stands_before_the_workload_starts() {
    let mut node = Node::new();
    node.runtime.hold(Step::Start);
    node.deploy(0).await;
    assert_eq!(node.status().await, (0, Status::Creating, String::new()));
    node.called(Step::Start).await;
    assert_eq!(node.attached(), [0]);
    assert_eq!(node.info(0).await.map(|info| info.state), Some("starting"));
    node.runtime.release(Step::Start);
    assert_eq!(node.status().await, (0, Status::Created, String::new()));

    let info = node.info(0).await.expect("it is listed");
    assert_eq!((info.state, info.addresses), ("running", Some(addresses(0))));
    node.workload.delete(id(0)).await.expect("delete");
    assert_eq!(node.status().await, (0, Status::Undeployed, String::new()));
    assert_eq!((node.attached(), node.runtime.instances(), node.info(0).await), (vec![], vec![], None));
}

#[tokio::test(start_paused = true)]
async fn usage_lists_what_runs_and_nothing_else() {
    let mut node = Node::new();
    assert_eq!(node.usage().await, [0u32; 0], "an empty list is sent too");
    node.runtime.hold(Step::Start);
    node.deploy(0).await;
    node.called(Step::Start).await;
    assert_eq!(node.usage().await, [0u32; 0]);
    node.runtime.release(Step::Start);
    node.until(0, Status::Created).await;
    assert_eq!(node.usage().await, [0]);
    // A runtime that cannot say now is reported with what it said before.
    node.runtime.script(Step::Usage, Fault::Error(RuntimeError::Unavailable("away".into())));
    assert_eq!(node.usage().await, [0]);
    node.runtime.script(Step::Usage, Fault::Panic);
    assert_eq!(node.usage().await, [0]);
    node.runtime.hold(Step::Usage);
    assert_eq!(node.usage().await, [0]);
    node.runtime.exit(&id(0), 0, false);
    node.until(0, Status::Dead).await;
    assert_eq!(node.usage().await, [0u32; 0]);
}

#[tokio::test(start_paused = true)]
async fn a_panic_is_the_failure_of_its_step_alone() {
    let mut node = Node::new();
    node.runtime.script(Step::Prepare, Fault::Panic);
    node.deploy(0).await;
    let detail = node.until(0, Status::Failed).await;
    assert_eq!(detail, "internal error: scripted panic in Prepare");
    node.deploy(1).await;
    node.until(1, Status::Created).await;
    assert_eq!(node.runtime.instances(), [(id(1), true)]);
}

#[tokio::test(start_paused = true)]
async fn a_delete_does_not_wait_for_a_long_prepare() {
    let mut node = Node::new();
    node.runtime.hold(Step::Prepare);
    node.deploy(0).await;
    node.called(Step::Prepare).await;
    let mut repeated = 0;
    while repeated < 3 {
        let (number, status, _) = node.status().await;
        assert_eq!((number, status), (0, Status::Creating));
        repeated += 1;
    }
    assert!(node.began.elapsed() >= Duration::from_secs(20));
    node.workload.delete(id(0)).await.expect("delete");
    node.until(0, Status::Undeployed).await;
    node.runtime.release(Step::Prepare);
    node.deploy(0).await;
    node.until(0, Status::Created).await;
}

#[tokio::test(start_paused = true)]
async fn an_ended_instance_keeps_its_last_words_and_makes_room() {
    let mut node = Node::new();
    node.deploy(0).await;
    node.until(0, Status::Created).await;
    node.runtime.write_log(&id(0), b"panic: no such table");
    assert_eq!(node.workload.logs(id(0), 5).await.expect("logs"), b"table");
    node.runtime.exit(&id(0), 3, false);
    assert_eq!(node.until(0, Status::Failed).await, "exit code 3");
    assert_eq!((node.attached(), node.runtime.instances()), (vec![], vec![]));
    let info = node.info(0).await.expect("it is remembered");
    assert_eq!((info.state, info.detail.as_str()), ("failed", "exit code 3"));
    assert_eq!(node.workload.logs(id(0), 5).await.expect("kept logs"), b"table");
    assert!(matches!(node.workload.logs(id(9), 5).await, Err(WorkloadError::Unknown(_))));
    node.deploy(0).await;
    node.until(0, Status::Created).await;
}

#[tokio::test(start_paused = true)]
async fn a_network_without_a_subnet_is_waited_for() {
    let mut node = Node::new();
    node.net.lock().expect("no panic").refuse = 3;
    node.deploy(0).await;
    node.until(0, Status::Created).await;
    assert!(node.began.elapsed() >= Duration::from_secs(6));
    assert_eq!(node.runtime.calls().iter().filter(|(step, _)| *step == Step::Prepare).count(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_runs_is_adopted_and_watched_on() {
    let runtime = Arc::new(MemoryRuntime::new(Technology::Container));
    for number in [0, 1, 2, 3] {
        runtime.prepare(&spec(number)).await.expect("prepare");
    }
    let unreadable = InstanceSpec { document: "?".into(), ..spec(3) };
    runtime.prepare(&unreadable).await.expect("prepare");
    for number in [0, 1, 3] {
        runtime.start(&id(number)).await.expect("start");
    }
    runtime.exit(&id(1), 4, false);
    runtime.exited().await;
    // The back-end is away at first.
    for _ in 0..3 {
        runtime.script(Step::Adopt, Fault::Error(RuntimeError::Unavailable("away".into())));
    }
    let mut node = Node::over(runtime);
    // Its container was removed while no daemon ran.
    node.net.lock().expect("no panic").attached.insert(9);
    node.deploy(0).await;
    let mut up = BTreeSet::new();
    while up.len() < 3 {
        let (number, status, detail) = node.status().await;
        match (number, status) {
            (0..3, Status::Created) => drop(up.insert(number)),
            (3, Status::Failed) | (_, Status::Creating) => {}
            _ => panic!("{number} is {status}: {detail}"),
        }
    }
    assert_eq!(node.usage().await, [0, 1, 2]);
    assert_eq!(node.runtime.instances(), [(id(0), true), (id(1), true), (id(2), true)]);
    assert_eq!(node.attached(), [0, 1, 2]);
    let calls = node.runtime.calls();
    let starts = calls.iter().filter(|call| **call == (Step::Start, Some(id(0))));
    assert_eq!(starts.count(), 1, "what runs is not started a second time");
    node.runtime.exit(&id(0), 1, false);
    node.until(0, Status::Failed).await;
}

#[tokio::test(start_paused = true)]
async fn a_drain_leaves_or_stops() {
    for (on_exit, left) in [(OnExit::Leave, vec![(id(0), true)]), (OnExit::Stop, vec![])] {
        let mut node = Node::new();
        node.deploy(0).await;
        node.until(0, Status::Created).await;
        node.workload.drain(on_exit).await.expect("drain");
        assert_eq!(node.runtime.instances(), left, "{on_exit:?}");
        if on_exit == OnExit::Stop {
            assert_eq!(node.until(0, Status::Dead).await, "the node shuts down");
        }
        node.task.await.expect("the task ends");
        assert!(matches!(node.workload.list().await, Err(WorkloadError::Stopped)));
    }
}

#[tokio::test(start_paused = true)]
async fn a_drain_that_hangs_ends_at_its_deadline() {
    let mut node = Node::new();
    node.deploy(0).await;
    node.until(0, Status::Created).await;
    node.runtime.hold(Step::Stop);
    let workload = node.workload.clone();
    let drain = tokio::spawn(async move { workload.drain(OnExit::Stop).await });
    node.called(Step::Stop).await;
    let began = Instant::now();
    node.drain.begin();
    drain.await.expect("no panic").expect("answered");
    node.task.await.expect("the task ends");
    assert!((GRACE..GRACE * 2).contains(&began.elapsed()), "{:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_control_plane_that_does_not_listen_stalls_nobody() {
    let mut node = Node::new();
    for number in 0..20 {
        node.deploy(number).await;
    }
    loop {
        let infos = node.workload.list().await.expect("list");
        if infos.len() == 20 && infos.iter().all(|info| info.state == "running") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Statuses that were overtaken are gone, the latest of each instance is there.
    let mut created = BTreeSet::new();
    while created.len() < 20 {
        if let (number, Status::Created, _) = node.status().await {
            created.insert(number);
        }
    }
}

/// Time for a drain.
const GRACE: Duration = Duration::from_secs(5);

struct Node {
    workload: Workload,
    task: tokio::task::JoinHandle<()>,
    runtime: Arc<MemoryRuntime>,
    net: Arc<Mutex<Net>>,
    reports: mpsc::Receiver<Report>,
    drain: Drain,
    began: Instant,
}

#[derive(Default)]
struct Net {
    attached: BTreeSet<u32>,
    /// Attachments to refuse for want of a subnet.
    refuse: u32,
}

impl Node {
    fn new() -> Self {
        Self::over(Arc::new(MemoryRuntime::new(Technology::Container)))
    }

    fn over(runtime: Arc<MemoryRuntime>) -> Self {
        let (requests, mut asked) = mpsc::channel(8);
        let net: Arc<Mutex<Net>> = Arc::default();
        let state = net.clone();
        tokio::spawn(async move {
            while let Some(request) = asked.recv().await {
                state.lock().expect("no panic").serve(request);
            }
        });
        let (reports, received) = mpsc::channel(4);
        let drain = Drain::new(GRACE);
        let setup = Setup {
            runtimes: vec![runtime.clone()],
            net: NetManager::new(requests),
            reports,
            events: crate::events::Events::default(),
            plan: Plan::default(),
            notes: mpsc::channel(8).0,
            restarts: Restarts { limit: 0, ..Restarts::default() },
            devices: tokio::sync::watch::channel(Arc::default()).1,
            parse: |document| document.strip_prefix("document of ")?.parse().ok().map(spec),
            drain: drain.clone(),
        };
        let (workload, task) = start(setup);
        Self { workload, task, runtime, net, reports: received, drain, began: Instant::now() }
    }

    async fn deploy(&self, number: u32) {
        self.workload.deploy(spec(number), 1).await.expect("deploy");
    }

    async fn report(&mut self) -> Report {
        tokio::time::timeout(Duration::from_secs(100), self.reports.recv()).await.expect("in time").expect("a report")
    }

    async fn status(&mut self) -> (u32, Status, String) {
        loop {
            if let Report::Status { instance, status, detail } = self.report().await {
                return (instance.number, status, detail);
            }
        }
    }

    /// Reads until the instance has this status; returns its detail.
    async fn until(&mut self, number: u32, status: Status) -> String {
        loop {
            let (of, is, detail) = self.status().await;
            if (of, is) == (number, status) {
                return detail;
            }
            assert!(of != number || is == Status::Creating || is == Status::Created, "{number} is {is}: {detail}");
        }
    }

    /// The instances of the next list that was made after now.
    async fn usage(&mut self) -> Vec<u32> {
        while self.reports.try_recv().is_ok() {}
        let asked = Instant::now();
        loop {
            if let Report::Instances(usage) = self.report().await
                && asked.elapsed() > Duration::from_millis(2500)
            {
                return usage.into_iter().map(|usage| usage.instance.number).collect();
            }
        }
    }

    async fn called(&self, step: Step) {
        let called = async {
            while !self.runtime.calls().iter().any(|(called, _)| *called == step) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(100), called).await.expect("called in time");
    }

    async fn info(&self, number: u32) -> Option<InstanceInfo> {
        self.workload.list().await.expect("list").into_iter().find(|info| info.id == id(number))
    }

    fn attached(&self) -> Vec<u32> {
        self.net.lock().expect("no panic").attached.iter().copied().collect()
    }
}

impl Net {
    fn serve(&mut self, request: NetRequest) {
        match request {
            NetRequest::Attach(_, reply) if self.refuse > 0 => {
                self.refuse -= 1;
                let _ = reply.send(Err(NetError::NoSubnet));
            }
            NetRequest::Attach(Attachment { instance, .. }, reply) => {
                self.attached.insert(instance.number);
                let addresses = addresses(instance.number);
                let _ = reply.send(Ok(Lease { instance, addresses }));
            }
            NetRequest::Detach(instance, reply) => {
                self.attached.remove(&instance.number);
                let _ = reply.send(Ok(()));
            }
            NetRequest::Retain(instances) => {
                self.attached.retain(|number| instances.iter().any(|instance| instance.number == *number));
            }
            // Not the workloads' business.
            _ => {}
        }
    }
}

fn addresses(number: u32) -> Addresses {
    let last = u8::try_from(number + 2).expect("a small number");
    Addresses { v4: Ipv4Addr::new(10, 18, 0, last), v6: Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, last.into()) }
}

fn id(number: u32) -> InstanceId {
    InstanceId { service: "app.default.web.test".parse().expect("a good name"), number }
}

fn spec(number: u32) -> InstanceSpec {
    InstanceSpec {
        image: "a:1".into(),
        ..nameless(id(number), Technology::Container, format!("document of {number}").into())
    }
}
