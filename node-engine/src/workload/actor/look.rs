//! What people ask of instances: a closer look, an output that is followed, one more command. Read-only towards the core; each answer is
//! found by a step of its own, so that a runtime that hangs holds up nobody else.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::{Actor, Answer, LONGEST_LOG, contained};
use crate::model::{EventKind, InstanceId, InstanceUsage};
use crate::runtime::{Exec, Follow, Runtime, RuntimeError, Session};
use crate::workload::core::Output;
use crate::workload::{InstanceReport, WorkloadError};

type Reply<T> = oneshot::Sender<Result<T, WorkloadError>>;

impl Actor {
    pub(super) fn inspect(&mut self, instance: InstanceId, reply: Reply<InstanceReport>) {
        let Some((info, spec)) = self.core.look(&instance) else {
            // Whoever asked may have left; that is no fault of ours.
            let _ = reply.send(Err(WorkloadError::Unknown(instance)));
            return;
        };
        let usage = self.usage_of(&instance);
        let restarts = self.starts.get(&instance).copied().unwrap_or(0).saturating_sub(1);
        let runtime = self.holder(&instance);
        self.steps.spawn(async move {
            let details = match runtime {
                Some(runtime) => contained(runtime.inspect(&instance)).await.unwrap_or_else(|panic| {
                    Err(RuntimeError::Step { step: "inspect", reason: format!("internal error: {panic}") })
                }),
                None => Err(RuntimeError::Unknown(instance)),
            };
            let _ = reply.send(Ok(InstanceReport { info, spec, restarts, usage, details }));
            Answer::Served
        });
    }

    pub(super) fn follow(&mut self, instance: InstanceId, tail: usize, reply: Reply<Follow>) {
        let runtime = self.holder(&instance);
        self.ask(instance, runtime, reply, async move |runtime, instance| {
            runtime.follow(&instance, tail.min(LONGEST_LOG)).await
        });
    }

    pub(super) fn exec(&mut self, instance: InstanceId, exec: Exec, reply: Reply<Session>) {
        let runtime = self.holder(&instance);
        if runtime.is_some() {
            tracing::info!(%instance, command = ?exec.command, "a command is run in the instance");
            self.setup.events.say_of(&instance, EventKind::Exec, exec.command.join(" "));
        }
        self.ask(instance, runtime, reply, async move |runtime, instance| runtime.exec(&instance, exec).await);
    }

    /// The last that was measured of everything that runs.
    pub(super) fn measured(&self) -> Vec<InstanceUsage> {
        self.usage.values().flatten().filter(|usage| self.core.runs(&usage.instance)).cloned().collect()
    }

    fn usage_of(&self, instance: &InstanceId) -> Option<InstanceUsage> {
        self.usage
            .values()
            .flatten()
            .find(|usage| usage.instance == *instance)
            .filter(|_| self.core.runs(instance))
            .cloned()
    }

    /// The runtime that holds the instance now.
    fn holder(&self, instance: &InstanceId) -> Option<Arc<dyn Runtime>> {
        match self.core.output(instance) {
            Output::Runtime(technology) => self.runtime(&technology),
            Output::Kept(_) | Output::Nowhere => None,
        }
    }

    fn ask<T: Send + 'static, F: Future<Output = Result<T, RuntimeError>> + Send>(
        &mut self,
        instance: InstanceId,
        runtime: Option<Arc<dyn Runtime>>,
        reply: Reply<T>,
        question: impl FnOnce(Arc<dyn Runtime>, InstanceId) -> F + Send + 'static,
    ) {
        let Some(runtime) = runtime else {
            let _ = reply.send(Err(WorkloadError::Unknown(instance)));
            return;
        };
        self.steps.spawn(async move {
            if let Ok(result) = contained(question(runtime, instance)).await {
                let _ = reply.send(result.map_err(WorkloadError::from));
            }
            Answer::Served
        });
    }
}
