//! A runtime in memory: instances are entries of a map, they end when a test says so, and any step can be made to fail, to panic or
//! to wait. What drives a runtime is tested against this one, without a daemon and without root.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::{mpsc, watch};

use super::session::{Input, Output, PIECES};
use super::{Adopted, AdoptedState, Exec, Exit, Follow, Runtime, RuntimeError, Sandbox, Session};
use crate::model::{InstanceCounters, InstanceDetails, InstanceId, InstanceSpec, InstanceUsage, Technology};

/// Calls that are remembered; older ones are forgotten.
const CALLS: usize = 4096;
/// Exits that may wait to be read.
const EXITS: usize = 1024;

/// A runtime whose instances live in this process.
#[derive(Debug)]
pub struct MemoryRuntime {
    technology: Technology,
    state: Arc<Mutex<State>>,
    held: watch::Sender<BTreeSet<Step>>,
    exits: mpsc::Sender<Exit>,
    exited: tokio::sync::Mutex<mpsc::Receiver<Exit>>,
}

/// The methods of a runtime, to be scripted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Step {
    Prepare,
    Start,
    Stop,
    Adopt,
    Usage,
    Logs,
    Inspect,
    Follow,
    Exec,
}

/// What a scripted step does in place of its work.
#[derive(Debug)]
pub enum Fault {
    Error(RuntimeError),
    Panic,
}

#[derive(Debug, Default)]
struct State {
    instances: BTreeMap<InstanceId, Instance>,
    faults: Vec<(Step, Fault)>,
    calls: VecDeque<(Step, Option<InstanceId>)>,
}

#[derive(Debug)]
struct Instance {
    spec: Arc<InstanceSpec>,
    phase: Phase,
    log: Vec<u8>,
    /// How long the log is, to those who follow it; closed with the instance's end.
    grown: Option<watch::Sender<usize>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Phase {
    Prepared,
    Running,
    Exited(Exit),
}

impl MemoryRuntime {
    pub fn new(technology: Technology) -> Self {
        let (exits, exited) = mpsc::channel(EXITS);
        Self {
            technology,
            state: Arc::default(),
            held: watch::Sender::new(BTreeSet::new()),
            exits,
            exited: tokio::sync::Mutex::new(exited),
        }
    }

    /// The next call of `step` meets this fault; several faults of one step are met in turn.
    pub fn script(&self, step: Step, fault: Fault) {
        self.state().faults.push((step, fault));
    }

    /// Calls of `step` wait until `release`.
    pub fn hold(&self, step: Step) {
        self.held.send_modify(|held| {
            held.insert(step);
        });
    }

    pub fn release(&self, step: Step) {
        self.held.send_modify(|held| {
            held.remove(&step);
        });
    }

    /// Ends a running instance. Returns whether there was one.
    pub fn exit(&self, instance: &InstanceId, code: i64, out_of_memory: bool) -> bool {
        let exit = Exit { instance: instance.clone(), code, out_of_memory, reason: None };
        let mut state = self.state();
        let Some(held) = state.instances.get_mut(instance).filter(|held| held.phase == Phase::Running) else {
            return false;
        };
        held.phase = Phase::Exited(exit.clone());
        held.grown = None;
        self.exits.try_send(exit).is_ok()
    }

    /// Adds to the output of an instance.
    pub fn write_log(&self, instance: &InstanceId, text: &[u8]) {
        if let Some(held) = self.state().instances.get_mut(instance) {
            held.log.extend_from_slice(text);
            if let Some(grown) = &held.grown {
                grown.send_replace(held.log.len());
            }
        }
    }

    /// The description that the instance was prepared with.
    pub fn prepared(&self, instance: &InstanceId) -> Option<Arc<InstanceSpec>> {
        self.state().instances.get(instance).map(|held| held.spec.clone())
    }

    /// Instances that hold anything, and whether their process runs.
    pub fn instances(&self) -> Vec<(InstanceId, bool)> {
        self.state().instances.iter().map(|(id, held)| (id.clone(), held.phase == Phase::Running)).collect()
    }

    /// What was called so far, oldest first.
    pub fn calls(&self) -> Vec<(Step, Option<InstanceId>)> {
        self.state().calls.iter().cloned().collect()
    }

    /// Notes the call, waits while the step is held, and meets its fault if there is one.
    async fn enter(&self, step: Step, instance: Option<&InstanceId>) -> Result<(), RuntimeError> {
        {
            let mut state = self.state();
            if state.calls.len() == CALLS {
                state.calls.pop_front();
            }
            state.calls.push_back((step, instance.cloned()));
        }
        let mut held = self.held.subscribe();
        // The sender lives in `self`, so this wait cannot fail.
        let _ = held.wait_for(|held| !held.contains(&step)).await;
        let fault = {
            let mut state = self.state();
            let position = state.faults.iter().position(|(at, _)| *at == step);
            position.map(|position| state.faults.remove(position).1)
        };
        match fault {
            None => Ok(()),
            Some(Fault::Error(error)) => Err(error),
            Some(Fault::Panic) => panic!("scripted panic in {step:?}"),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while the lock is held, and a poisoned map is still a map.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn sandbox(instance: &InstanceId) -> Sandbox {
    Sandbox { netns: format!("/memory/{instance}/net").into() }
}

#[async_trait]
impl Runtime for MemoryRuntime {
    fn technology(&self) -> Technology {
        self.technology.clone()
    }

    async fn prepare(&self, spec: &InstanceSpec) -> Result<Sandbox, RuntimeError> {
        self.enter(Step::Prepare, Some(&spec.id)).await?;
        let held = Instance {
            spec: Arc::new(spec.clone()),
            phase: Phase::Prepared,
            log: Vec::new(),
            grown: Some(watch::Sender::new(0)),
        };
        self.state().instances.insert(spec.id.clone(), held);
        Ok(sandbox(&spec.id))
    }

    async fn start(&self, instance: &InstanceId) -> Result<(), RuntimeError> {
        self.enter(Step::Start, Some(instance)).await?;
        let mut state = self.state();
        let held = state.instances.get_mut(instance).ok_or_else(|| RuntimeError::Unknown(instance.clone()))?;
        held.phase = Phase::Running;
        Ok(())
    }

    async fn stop(&self, instance: &InstanceId, _grace: Duration) -> Result<(), RuntimeError> {
        self.enter(Step::Stop, Some(instance)).await?;
        self.state().instances.remove(instance);
        Ok(())
    }

    async fn adopt(&self) -> Result<Vec<Adopted>, RuntimeError> {
        self.enter(Step::Adopt, None).await?;
        let adopted = |(id, held): (&InstanceId, &Instance)| Adopted {
            instance: id.clone(),
            document: held.spec.document.clone(),
            state: match &held.phase {
                Phase::Prepared => AdoptedState::Incomplete,
                Phase::Running => AdoptedState::Running(sandbox(id)),
                Phase::Exited(exit) => AdoptedState::Exited(exit.clone()),
            },
        };
        Ok(self.state().instances.iter().map(adopted).collect())
    }

    async fn usage(&self) -> Result<Vec<InstanceUsage>, RuntimeError> {
        self.enter(Step::Usage, None).await?;
        let usage = |(id, held): (&InstanceId, &Instance)| InstanceUsage {
            instance: id.clone(),
            technology: self.technology.clone(),
            cpu_percent: 1.0,
            memory_bytes: 1 << 20,
            memory_percent: 0.1,
            disk_bytes: 0,
            log_tail: String::from_utf8_lossy(tail(&held.log, 1024)).into_owned(),
            counters: InstanceCounters { cpu_nanoseconds: Some(1_000_000_000), ..InstanceCounters::default() },
        };
        Ok(self.state().instances.iter().filter(|(_, held)| held.phase == Phase::Running).map(usage).collect())
    }

    async fn logs(&self, instance: &InstanceId, bytes: usize) -> Result<Vec<u8>, RuntimeError> {
        self.enter(Step::Logs, Some(instance)).await?;
        let state = self.state();
        let held = state.instances.get(instance).ok_or_else(|| RuntimeError::Unknown(instance.clone()))?;
        Ok(tail(&held.log, bytes).to_vec())
    }

    async fn inspect(&self, instance: &InstanceId) -> Result<InstanceDetails, RuntimeError> {
        self.enter(Step::Inspect, Some(instance)).await?;
        let state = self.state();
        let held = state.instances.get(instance).ok_or_else(|| RuntimeError::Unknown(instance.clone()))?;
        let exit = match &held.phase {
            Phase::Exited(exit) => Some(exit),
            Phase::Prepared | Phase::Running => None,
        };
        Ok(InstanceDetails {
            handle: format!("memory:{instance}"),
            pid: (held.phase == Phase::Running).then(std::process::id),
            command: held.spec.command.clone(),
            cpus: held.spec.limits.vcpus.map(f64::from),
            memory_bytes: held.spec.limits.memory_mib.map(|limit| limit << 20),
            exit_code: exit.map(|exit| exit.code),
            out_of_memory: exit.is_some_and(|exit| exit.out_of_memory),
            ..InstanceDetails::default()
        })
    }

    async fn follow(&self, instance: &InstanceId, bytes: usize) -> Result<Follow, RuntimeError> {
        self.enter(Step::Follow, Some(instance)).await?;
        let (past, mut told, grown) = {
            let state = self.state();
            let held = state.instances.get(instance).ok_or_else(|| RuntimeError::Unknown(instance.clone()))?;
            (tail(&held.log, bytes).to_vec(), held.log.len(), held.grown.as_ref().map(watch::Sender::subscribe))
        };
        let (output, follow) = mpsc::channel(PIECES);
        let (log, instance) = (self.state.clone(), instance.clone());
        tokio::spawn(async move {
            let mut piece = past;
            let mut grown = grown;
            loop {
                if !piece.is_empty() && output.send(Ok(Bytes::from(piece))).await.is_err() {
                    return;
                }
                let more = async {
                    match &mut grown {
                        Some(grown) => grown.wait_for(|length| *length > told).await.is_ok(),
                        None => false,
                    }
                };
                let more = tokio::select! {
                    () = output.closed() => return,
                    more = more => more,
                };
                if !more {
                    return;
                }
                let state = log.lock().unwrap_or_else(PoisonError::into_inner);
                let Some(held) = state.instances.get(&instance) else { return };
                piece = held.log[told..].to_vec();
                told = held.log.len();
            }
        });
        Ok(follow)
    }

    /// `echo WORDS`, `cat`, `exit CODE` and `size`: enough to see each kind of input and output pass.
    async fn exec(&self, instance: &InstanceId, exec: Exec) -> Result<Session, RuntimeError> {
        self.enter(Step::Exec, Some(instance)).await?;
        let running = self.state().instances.get(instance).map(|held| held.phase == Phase::Running);
        match running {
            None => return Err(RuntimeError::Unknown(instance.clone())),
            Some(false) => {
                return Err(RuntimeError::Refused { what: "exec", reason: format!("{instance} does not run") });
            }
            Some(true) => {}
        }
        let (session, inputs, outputs) = Session::open();
        tokio::spawn(command(exec, inputs, outputs));
        Ok(session)
    }

    async fn exited(&self) -> Exit {
        match self.exited.lock().await.recv().await {
            Some(exit) => exit,
            // The sender lives in `self`.
            None => std::future::pending().await,
        }
    }
}

async fn command(exec: Exec, mut inputs: mpsc::Receiver<Input>, outputs: mpsc::Sender<Output>) {
    let words: Vec<&str> = exec.command.iter().map(String::as_str).collect();
    let text = |text: String| Output::Out(Bytes::from(text));
    // Whoever asked may have left at any time.
    let code = match words.as_slice() {
        ["echo", words @ ..] => {
            let _ = outputs.send(text(format!("{}\n", words.join(" ")))).await;
            0
        }
        ["exit", code] => code.parse().unwrap_or(2),
        ["size"] => {
            let mut size = exec.terminal;
            while let Some(terminal) = size {
                let _ = outputs.send(text(format!("{}x{}\n", terminal.columns, terminal.rows))).await;
                size = match inputs.recv().await {
                    Some(Input::Resize(terminal)) => Some(terminal),
                    _ => None,
                };
            }
            0
        }
        ["cat"] => {
            while let Some(Input::Bytes(bytes)) = inputs.recv().await {
                let _ = outputs.send(Output::Out(bytes)).await;
            }
            0
        }
        other => {
            let complaint = format!("{}: not found\n", other.first().unwrap_or(&""));
            let _ = outputs.send(Output::Error(Bytes::from(complaint))).await;
            127
        }
    };
    let _ = outputs.send(Output::Exit(code)).await;
}

fn tail(log: &[u8], bytes: usize) -> &[u8] {
    &log[log.len().saturating_sub(bytes)..]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> InstanceSpec {
        InstanceSpec {
            image: "bb:1".into(),
            document: "{}".into(),
            ..InstanceSpec::new("app.default.web.test.instance.0".parse().expect("a good id"), Technology::Container)
        }
    }

    #[tokio::test]
    async fn an_instance_lives_from_prepare_to_stop() {
        let (runtime, spec) = (MemoryRuntime::new(Technology::Container), spec());
        assert!(matches!(runtime.start(&spec.id).await, Err(RuntimeError::Unknown(_))));
        let sandbox = runtime.prepare(&spec).await.expect("prepare");
        assert!(!runtime.exit(&spec.id, 0, false), "nothing runs yet");
        assert_eq!(runtime.adopt().await.expect("adopt")[0].state, AdoptedState::Incomplete);
        assert!(runtime.usage().await.expect("usage").is_empty());

        runtime.start(&spec.id).await.expect("start");
        assert_eq!(runtime.adopt().await.expect("adopt")[0].state, AdoptedState::Running(sandbox));
        assert_eq!(runtime.usage().await.expect("usage").len(), 1);

        assert!(runtime.exit(&spec.id, 3, false));
        let exit = runtime.exited().await;
        assert_eq!(exit, Exit { instance: spec.id.clone(), code: 3, out_of_memory: false, reason: None });
        assert_eq!(runtime.adopt().await.expect("adopt")[0].state, AdoptedState::Exited(exit));

        runtime.stop(&spec.id, Duration::ZERO).await.expect("stop");
        runtime.stop(&spec.id, Duration::ZERO).await.expect("stop again");
        assert!(runtime.instances().is_empty());
    }

    #[tokio::test]
    async fn scripted_faults_are_met_once_and_in_turn() {
        let (runtime, spec) = (MemoryRuntime::new(Technology::Container), spec());
        runtime.script(Step::Prepare, Fault::Error(RuntimeError::Unavailable("first".into())));
        runtime.script(Step::Prepare, Fault::Error(RuntimeError::Unavailable("second".into())));
        for expected in ["first", "second"] {
            assert!(runtime.prepare(&spec).await.expect_err("scripted").to_string().contains(expected));
        }
        runtime.prepare(&spec).await.expect("the script is over");
        let calls = runtime.calls();
        assert_eq!(calls, vec![(Step::Prepare, Some(spec.id)); 3]);
    }
}
