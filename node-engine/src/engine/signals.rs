//! SIGTERM and SIGINT begin the end; a second one is the end.

use std::io::{self, Write};

use tokio::signal::unix::{SignalKind, signal};

use crate::drain::Drain;

/// Begins the drain at the first signal, and ends the process at the second. Needs a tokio runtime.
///
/// # Errors
/// If the signals cannot be listened to.
pub fn stop_on_signals(drain: Drain) -> io::Result<()> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tokio::spawn(async move {
        let mut next = async || {
            tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            }
        };
        let signal = next().await;
        tracing::info!(signal, "stopping; a second signal ends at once");
        drain.begin();
        let signal = next().await;
        let _ = writeln!(io::stderr(), "node-engine: ended at once by a second signal ({signal})");
        std::process::exit(1);
    });
    Ok(())
}
