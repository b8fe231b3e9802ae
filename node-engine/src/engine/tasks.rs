//! The tasks that make up a daemon, by name. None of them may end unasked.

use std::future::Future;

use anyhow::{Context, anyhow};
use tokio::task::{JoinError, JoinHandle, JoinSet};
use tokio::time::Instant;

/// Tasks that run. Dropping it aborts them.
#[derive(Debug, Default)]
pub(crate) struct Tasks {
    running: JoinSet<(&'static str, anyhow::Result<()>)>,
    names: Vec<&'static str>,
}

impl Tasks {
    pub(crate) fn spawn(
        &mut self,
        name: &'static str,
        task: impl Future<Output = anyhow::Result<()>> + Send + 'static,
    ) {
        self.adopt(name, tokio::spawn(task));
    }

    /// Watches over a task that runs already.
    pub(crate) fn adopt<T: Outcome>(&mut self, name: &'static str, task: JoinHandle<T>) {
        self.names.push(name);
        // Ends with its watcher, so that nothing outlives an aborted start.
        let task = tokio_util::task::AbortOnDropHandle::new(task);
        self.running.spawn(async move { (name, outcome(task.await)) });
    }

    /// The next task that ends, and how; pends where none runs.
    pub(super) async fn ended(&mut self) -> (&'static str, anyhow::Result<()>) {
        match self.running.join_next().await {
            Some(Ok((name, result))) => {
                self.names.retain(|other| *other != name);
                (name, result)
            }
            Some(Err(error)) => ("supervisor", Err(anyhow!(error).context("a watcher of a task has failed"))),
            None => std::future::pending().await,
        }
    }

    /// Waits until all have ended, or the deadline. Returns the first failure, or the names of those that would not end.
    pub(super) async fn all_ended(&mut self, deadline: Instant) -> anyhow::Result<()> {
        self.ended_except("", deadline).await
    }

    /// The same for all but the one of this name.
    pub(super) async fn ended_except(&mut self, late: &str, deadline: Instant) -> anyhow::Result<()> {
        let mut failure = Ok(());
        while self.names.iter().any(|name| *name != late) {
            match tokio::time::timeout_at(deadline, self.ended()).await {
                Ok((name, result)) => failure = failure.and(result.with_context(|| format!("{name} failed"))),
                Err(_) => {
                    let names = self.names.join(", ");
                    self.running.abort_all();
                    return failure.and(Err(anyhow!("not ended in time: {names}")));
                }
            }
        }
        failure
    }
}

/// What a task ends with.
pub(crate) trait Outcome: Send + 'static {
    fn into_result(self) -> anyhow::Result<()>;
}

impl Outcome for () {
    fn into_result(self) -> anyhow::Result<()> {
        Ok(())
    }
}

impl<E: Into<anyhow::Error> + Send + 'static> Outcome for Result<(), E> {
    fn into_result(self) -> anyhow::Result<()> {
        self.map_err(Into::into)
    }
}

fn outcome<T: Outcome>(joined: Result<T, JoinError>) -> anyhow::Result<()> {
    match joined {
        Ok(result) => result.into_result(),
        Err(error) if error.is_panic() => Err(anyhow!("it has panicked")),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn ends_are_told_with_name_and_reason() {
        let mut tasks = Tasks::default();
        tasks.spawn("idle", std::future::pending());
        tasks.spawn("broken", async { Err(anyhow!("out of luck")) });
        let (name, result) = tasks.ended().await;
        assert_eq!((name, result.unwrap_err().to_string().as_str()), ("broken", "out of luck"));
        tasks.adopt("panicking", tokio::spawn(async { assert!(std::env::args().len() == 0, "a test's panic") }));
        let (name, result) = tasks.ended().await;
        assert_eq!((name, result.unwrap_err().to_string().as_str()), ("panicking", "it has panicked"));
        let error = tasks.all_ended(Instant::now() + Duration::from_millis(10)).await.unwrap_err();
        assert_eq!(error.to_string(), "not ended in time: idle");
    }
}
