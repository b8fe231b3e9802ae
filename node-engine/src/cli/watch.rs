//! What is shown once or again and again. With `--watch` each screen also says how fast things change. On a terminal a screen
//! replaces the one before; elsewhere they follow each other, and as JSON they are one document a line.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use serde::Serialize;

use crate::api::client::ClientError;
use crate::output;

/// The shortest time between two screens.
const SHORTEST: f64 = 0.1;
const LONGEST: f64 = 3600.0;
/// To the upper left corner, and away with what is below.
const CLEAR: &str = "\x1b[H\x1b[J";

/// What can be shown, and compared with what it was some seconds ago.
pub(super) trait Screen: Sized {
    fn screen(&self, before: Option<(&Self, f64)>) -> String;
}

/// Once or again and again, for people or programs.
#[derive(Clone, Copy, Debug, Args)]
pub(super) struct Repeat {
    /// Again and again, with what has changed per second since the last time
    #[arg(long, short)]
    watch: bool,
    /// Seconds between two times
    #[arg(long, value_name = "SECONDS", default_value_t = 1.0, requires = "watch", value_parser = pause)]
    every: f64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Prints what is asked for: once, or until the reader has had enough.
pub(super) async fn show<T: Screen + Serialize, F: Future<Output = Result<T, ClientError>>>(
    repeat: Repeat,
    mut ask: impl FnMut() -> F,
) -> anyhow::Result<()> {
    let terminal = std::io::stdout().is_terminal();
    let mut before: Option<(T, Instant)> = None;
    let mut timer = tokio::time::interval(Duration::from_secs_f64(repeat.every));
    timer.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        timer.tick().await;
        let (now, at) = (ask().await?, Instant::now());
        let text = match repeat {
            Repeat { json: true, watch: true, .. } => format!("{}\n", json(serde_json::to_string(&now))),
            Repeat { json: true, .. } => format!("{}\n", json(serde_json::to_string_pretty(&now))),
            _ => {
                let since = before.as_ref().map(|(then, when)| (then, (at - *when).as_secs_f64()));
                let screen = now.screen(since);
                match (repeat.watch, terminal) {
                    (false, _) => screen,
                    (true, true) => format!("{CLEAR}{screen}"),
                    (true, false) => format!("{screen}\n"),
                }
            }
        };
        if !print(text.as_bytes())? || !repeat.watch {
            return Ok(());
        }
        before = Some((now, at));
    }
}

fn json(text: serde_json::Result<String>) -> String {
    text.expect("plain data without maps of odd keys becomes JSON")
}

/// False where the reader has had enough (`| head`).
pub(super) fn print(text: &[u8]) -> anyhow::Result<bool> {
    output::print(text).context("write the answer")
}

fn pause(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|_| "expected seconds, such as 1 or 0.5")?;
    if (SHORTEST..=LONGEST).contains(&seconds) { Ok(seconds) } else { Err("expected 0.1 to 3600 seconds".into()) }
}
