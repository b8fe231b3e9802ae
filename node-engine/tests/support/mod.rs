//! What tests of all runtimes do: run, and wait for an end or for a word.

use std::time::{Duration, Instant};

use node_engine::model::{InstanceId, InstanceSpec};
use node_engine::runtime::{Exit, Runtime, Sandbox};
use tokio::time::timeout;

pub const PATIENCE: Duration = Duration::from_secs(60);

pub async fn run(runtime: &dyn Runtime, spec: &InstanceSpec) -> Sandbox {
    let sandbox = runtime.prepare(spec).await.unwrap();
    runtime.start(&spec.id).await.unwrap();
    sandbox
}

pub async fn exited(runtime: &dyn Runtime) -> Exit {
    timeout(PATIENCE, runtime.exited()).await.expect("an end in time")
}

/// The log, once it has the word.
pub async fn log(runtime: &dyn Runtime, id: &InstanceId, word: &str) -> String {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let log = String::from_utf8(runtime.logs(id, 4096).await.unwrap()).unwrap();
        if log.contains(word) {
            return log;
        }
        assert!(Instant::now() < deadline, "no {word:?} in {log:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
