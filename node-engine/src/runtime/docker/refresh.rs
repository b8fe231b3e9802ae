//! What only Docker can say of a running workload, the end of its log and the size of its writable layer, asked in the background: a
//! daemon that hangs delays no usage report.

use std::collections::VecDeque;
use std::sync::Arc;

use bollard::Docker;
use bollard::errors::Error;
use bollard::query_parameters::{InspectContainerOptions, LogsOptions};
use futures_util::{StreamExt, TryStreamExt};

use super::Inner;
use super::running::Stale;
use crate::runtime::RuntimeError;
use crate::runtime::output::{TAIL, text};

const AT_ONCE: usize = 8;

/// Begins a pass over all running workloads unless one is under way.
pub(super) fn begin(inner: &Arc<Inner>) {
    let inner = inner.clone();
    tokio::spawn(async move {
        let Ok(_one) = inner.refreshing.try_lock() else { return };
        let stale = inner.running.stale();
        if stale.is_empty() {
            return;
        }
        let passes = futures_util::stream::iter(stale).map(|stale| refresh(&inner, stale));
        passes
            .buffer_unordered(AT_ONCE)
            .for_each(|result| async {
                if let Err(error) = result {
                    tracing::trace!(%error, "a workload cannot be refreshed");
                }
            })
            .await;
    });
}

/// The last `bytes` of a container's output, both streams as they came.
pub(super) async fn log_tail(docker: &Docker, container: &str, bytes: usize) -> Result<Vec<u8>, Error> {
    // Docker counts lines: enough of them for lines of a usual length, and the ring keeps the bound where they are longer.
    let lines = (bytes / 16).clamp(16, 100_000);
    let options = LogsOptions { stdout: true, stderr: true, tail: lines.to_string(), ..LogsOptions::default() };
    let output = docker.logs(container, Some(options));
    let ring = output.try_fold(Ring::new(bytes), |mut ring, chunk| async move {
        ring.push(&chunk.into_bytes());
        Ok(ring)
    });
    Ok(ring.await?.bytes.into())
}

async fn refresh(inner: &Inner, stale: Stale) -> Result<(), RuntimeError> {
    let docker = inner.client.get().await?;
    let Stale { container, log_path, log_length, disk } = stale;
    let failed = |error| inner.client.failed("refresh", error);
    if disk {
        let options = InspectContainerOptions { size: true };
        let found = docker.inspect_container(&container, Some(options)).await.map_err(failed)?;
        inner.running.set_disk(&container, found.size_rw.and_then(|bytes| u64::try_from(bytes).ok()).unwrap_or(0));
    }
    // A log that has not grown is not read again; where its file cannot be seen it is read every time.
    let length = log_path.and_then(|path| std::fs::metadata(path).ok()).map(|file| file.len());
    if length.is_none() || length != log_length {
        let tail = log_tail(&docker, &container, TAIL).await.map_err(failed)?;
        inner.running.set_log(&container, text(&tail), length);
    }
    Ok(())
}

/// The last bytes of a stream.
struct Ring {
    bytes: VecDeque<u8>,
    capacity: usize,
}

impl Ring {
    fn new(capacity: usize) -> Self {
        Self { bytes: VecDeque::new(), capacity }
    }

    fn push(&mut self, chunk: &[u8]) {
        let chunk = &chunk[chunk.len().saturating_sub(self.capacity)..];
        let surplus = (self.bytes.len() + chunk.len()).saturating_sub(self.capacity);
        self.bytes.drain(..surplus);
        self.bytes.extend(chunk);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_keeps_the_last_bytes() {
        for (chunks, expected) in [
            (&["ab", "c"][..], "abc"),
            (&["abcd", "ef"], "cdef"),
            (&["abcdefgh"], "efgh"),
            (&["abcd", "", "efghij"], "ghij"),
            (&[], ""),
        ] {
            let mut ring = Ring::new(4);
            for chunk in chunks {
                ring.push(chunk.as_bytes());
            }
            assert_eq!(Vec::from(ring.bytes), expected.as_bytes(), "{chunks:?}");
        }
    }
}
