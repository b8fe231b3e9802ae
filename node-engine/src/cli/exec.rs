//! A command in an instance: this terminal becomes its terminal, this process ends with its exit code.

use std::io::{IsTerminal, Read};
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use rustix::termios::{self, OptionalActions, Termios};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::api::Selector;
use crate::api::client::{Client, CommandInput, CommandOutput, Piece};
use crate::api::dto::look::Terminal;
use crate::output::write;

/// Pieces of input that may wait.
const PIECES: usize = 16;
const PIECE: usize = 16 * 1024;
/// A code that no exit code of a process is, becomes this one.
const NO_CODE: u8 = 255;

#[derive(Clone, Debug, Args)]
pub(super) struct ExecArgs {
    /// Give the command a terminal [default: where input and output are one]
    #[arg(long, short = 't', conflicts_with = "no_tty")]
    tty: bool,
    /// Give it none
    #[arg(long, short = 'T')]
    no_tty: bool,
    #[arg(value_name = "INSTANCE")]
    instance: Selector,
    #[arg(value_name = "COMMAND", last = true, required = true)]
    command: Vec<String>,
}

impl ExecArgs {
    #[cfg(test)]
    pub(super) fn command(&self) -> &[String] {
        &self.command
    }

    /// Runs it to its end; gives its exit code.
    pub(super) async fn run(self, client: &Client) -> anyhow::Result<u8> {
        let ours = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
        let wanted = self.tty || (ours && !self.no_tty);
        let terminal = wanted.then(size);
        let (input, output) = client.exec(&self.instance, self.command, terminal).await?;
        // Dropped before anything else is printed.
        let _raw = if wanted && ours { Some(Raw::enter()?) } else { None };
        let feeding = tokio::spawn(feed(input, wanted));
        let code = print(output).await;
        feeding.abort();
        code
    }
}

/// Until the command ends, or the reader has had enough: the command's input ends with this process.
async fn print(mut output: CommandOutput) -> anyhow::Result<u8> {
    loop {
        let written = match output.next().await? {
            Piece::Out(bytes) => write(&mut std::io::stdout().lock(), &bytes),
            Piece::Error(bytes) => write(&mut std::io::stderr().lock(), &bytes),
            Piece::Exit(code) => return Ok(u8::try_from(code).unwrap_or(NO_CODE)),
        };
        if !written.context("write what the command says")? {
            return Ok(0);
        }
    }
}

/// Carries our input to the command until there is none, and tells it when our terminal changes its size.
async fn feed(mut input: CommandInput, terminal: bool) {
    let mut typed = reader();
    let resized = signal(SignalKind::window_change());
    let Ok(mut resized) = resized else { return };
    let mut open = true;
    loop {
        tokio::select! {
            piece = typed.recv(), if open => match piece {
                Some(piece) => input.write(piece).await,
                None => {
                    open = false;
                    input.end().await;
                }
            },
            Some(()) = resized.recv(), if terminal => input.resize(size()).await,
            // Whoever lets go of the input hangs up: it is held until the command's end is known.
            else => std::future::pending().await,
        }
    }
}

/// Input is read by a thread of its own: a read that waits for a key must not hold up the end of this process.
fn reader() -> mpsc::Receiver<Vec<u8>> {
    let (pieces, typed) = mpsc::channel(PIECES);
    std::thread::spawn(move || {
        let mut buffer = vec![0; PIECE];
        loop {
            match std::io::stdin().read(&mut buffer) {
                Ok(0) => return,
                Ok(length) if pieces.blocking_send(buffer[..length].to_vec()).is_err() => return,
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(_) => return,
            }
        }
    });
    typed
}

fn size() -> Terminal {
    match termios::tcgetwinsize(std::io::stdout()) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => Terminal { columns: size.ws_col, rows: size.ws_row },
        // What terminals had before they had sizes.
        _ => Terminal { columns: 80, rows: 24 },
    }
}

/// Our terminal hands every key through, until this is dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> anyhow::Result<Self> {
        let before = termios::tcgetattr(std::io::stdin()).context("read the terminal's settings")?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(std::io::stdin(), OptionalActions::Now, &raw).context("change the terminal's settings")?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // There is nobody to tell.
        let _ = termios::tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0);
    }
}
