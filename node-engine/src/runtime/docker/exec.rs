//! A command in a running container, by Docker's exec calls, and an output that is followed.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bollard::Docker;
use bollard::container::LogOutput;
use bollard::exec::{ResizeExecOptions, StartExecOptions, StartExecResults};
use bollard::models::ExecConfig;
use bollard::query_parameters::LogsOptions;
use futures_util::{Stream, StreamExt};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc;

use super::Inner;
use super::refresh::log_tail;
use crate::runtime::RuntimeError;
use crate::runtime::session::{Exec, Follow, Input, Output, PIECES, Session, Terminal};

/// Docker closes the streams of a command shortly before it knows the code.
const CODE: Duration = Duration::from_secs(10);
const CODE_POLL: Duration = Duration::from_millis(20);
/// A piece of output is at most about this long.
const PIECE: usize = 32 * 1024;

type Reader = Pin<Box<dyn Stream<Item = Result<LogOutput, bollard::errors::Error>> + Send>>;
type Writer = Pin<Box<dyn AsyncWrite + Send>>;

/// Runs the command in this container.
pub(super) async fn begin(inner: Arc<Inner>, container: &str, exec: Exec) -> Result<Session, RuntimeError> {
    let docker = inner.client.get().await?;
    let terminal = exec.terminal;
    let config = ExecConfig {
        attach_stdin: Some(true),
        attach_stdout: Some(true),
        attach_stderr: Some(true),
        tty: Some(terminal.is_some()),
        cmd: Some(exec.command),
        ..ExecConfig::default()
    };
    let created = match docker.create_exec(container, config).await {
        Ok(created) => created.id,
        // It does not run, or is paused.
        Err(bollard::errors::Error::DockerResponseServerError { status_code: 409, message }) => {
            return Err(RuntimeError::Refused { what: "exec", reason: message });
        }
        Err(error) => return Err(inner.client.failed("create the command", error)),
    };
    let options = StartExecOptions { detach: false, tty: terminal.is_some(), output_capacity: Some(PIECE) };
    let started = docker.start_exec(&created, Some(options)).await;
    let (reader, writer) = match started.map_err(|error| inner.client.failed("start the command", error))? {
        StartExecResults::Attached { output, input } => (output, input),
        StartExecResults::Detached => {
            return Err(RuntimeError::Step { step: "start the command", reason: "it runs detached".into() });
        }
    };
    if let Some(size) = terminal {
        resize(&docker, &created, size).await;
    }
    let (session, inputs, outputs) = Session::open();
    tokio::spawn(run(Command { inner, docker, id: created }, reader, writer, inputs, outputs));
    Ok(session)
}

/// The container's output from its last `tail` bytes on.
pub(super) async fn follow(inner: Arc<Inner>, container: String, tail: usize) -> Result<Follow, RuntimeError> {
    let docker = inner.client.get().await?;
    let past = match tail {
        0 => Vec::new(),
        tail => log_tail(&docker, &container, tail).await.map_err(|error| inner.client.failed("logs", error))?,
    };
    // Docker counts lines and not bytes. Lines written between the two requests push out older ones, and none is lost or told twice.
    let options = LogsOptions {
        follow: true,
        stdout: true,
        stderr: true,
        tail: lines_of(&past).to_string(),
        ..LogsOptions::default()
    };
    let mut live = docker.logs(&container, Some(options));
    let (output, follow) = mpsc::channel(PIECES);
    tokio::spawn(async move {
        loop {
            let piece = tokio::select! {
                () = output.closed() => return,
                piece = live.next() => piece,
            };
            let Some(piece) = piece else { return };
            let piece = piece.map(LogOutput::into_bytes).map_err(|error| inner.client.failed("logs", error));
            let last = piece.is_err();
            if output.send(piece).await.is_err() || last {
                return;
            }
        }
    });
    Ok(follow)
}

/// A command as Docker knows it.
struct Command {
    inner: Arc<Inner>,
    docker: Docker,
    id: String,
}

/// Carries input and output until the command has ended or nobody listens any more. Neither waits for the other: a command like `cat`
/// reads no more while its output is not taken.
async fn run(
    command: Command,
    mut reader: Reader,
    writer: Writer,
    inputs: mpsc::Receiver<Input>,
    outputs: mpsc::Sender<Output>,
) {
    let outward = async {
        loop {
            let piece = match reader.next().await {
                Some(Ok(LogOutput::StdErr { message })) => Output::Error(message),
                Some(Ok(piece)) => Output::Out(piece.into_bytes()),
                Some(Err(error)) => Output::Broken(command.inner.client.failed("exec", error).to_string()),
                None => command.ended().await,
            };
            let last = matches!(piece, Output::Exit(_) | Output::Broken(_));
            if outputs.send(piece).await.is_err() || last {
                return last;
            }
        }
    };
    let ended = tokio::select! {
        ended = outward => ended,
        () = inward(&command, writer, inputs) => false,
        () = outputs.closed() => false,
    };
    if !ended {
        command.hang_up().await;
    }
}

/// Returns when whoever asked has left.
async fn inward(command: &Command, mut writer: Writer, mut inputs: mpsc::Receiver<Input>) {
    let mut open = true;
    while let Some(input) = inputs.recv().await {
        match input {
            Input::Resize(size) => resize(&command.docker, &command.id, size).await,
            // A command that reads no more has its reasons; its end follows.
            Input::Bytes(bytes) if open => {
                open = writer.write_all(&bytes).await.is_ok() && writer.flush().await.is_ok();
            }
            Input::Bytes(_) => {}
            Input::End => {
                open = false;
                if let Err(error) = writer.shutdown().await {
                    tracing::debug!(%error, "the end of the input cannot be told");
                }
            }
        }
    }
}

impl Command {
    /// Its exit code, which Docker knows a moment after its streams are closed.
    async fn ended(&self) -> Output {
        let deadline = tokio::time::Instant::now() + CODE;
        loop {
            let found = match self.docker.inspect_exec(&self.id).await {
                Ok(found) => found,
                Err(error) => {
                    return Output::Broken(self.inner.client.failed("look for its exit code", error).to_string());
                }
            };
            match (found.running, found.exit_code) {
                (Some(true), _) | (_, None) if tokio::time::Instant::now() < deadline => {
                    tokio::time::sleep(CODE_POLL).await;
                }
                (Some(true), _) => return Output::Broken("it has closed its output and goes on".into()),
                (_, Some(code)) => return Output::Exit(code),
                (_, None) => return Output::Broken("Docker does not know its exit code".into()),
            }
        }
    }

    /// Docker lets a command go on when its reader has gone. The streams are there before the command runs, so whoever leaves at once
    /// may be too early for a process to be known.
    async fn hang_up(&self) {
        let deadline = tokio::time::Instant::now() + CODE;
        let pid = loop {
            let Ok(found) = self.docker.inspect_exec(&self.id).await else { return };
            match (found.running, found.pid, found.exit_code) {
                (Some(true), Some(pid), _) if pid > 0 => break pid,
                (_, _, None) if tokio::time::Instant::now() < deadline => tokio::time::sleep(CODE_POLL).await,
                _ => return,
            }
        };
        if let Ok(pid) = i32::try_from(pid)
            && let Err(error) = kill(Pid::from_raw(pid), Signal::SIGHUP)
        {
            tracing::debug!(pid, %error, "an abandoned command cannot be told");
        }
    }
}

/// A terminal of the wrong size is a blemish and no failure.
async fn resize(docker: &Docker, command: &str, size: Terminal) {
    let options = ResizeExecOptions { width: size.columns, height: size.rows };
    if let Err(error) = docker.resize_exec(command, options).await {
        tracing::debug!(%error, "the terminal keeps its size");
    }
}

fn lines_of(log: &[u8]) -> usize {
    let ended = log.iter().filter(|byte| **byte == b'\n').count();
    ended + usize::from(log.last().is_some_and(|last| *last != b'\n'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_counts_before_it_is_ended() {
        for (log, lines) in [("", 0), ("a", 1), ("a\n", 1), ("\n\nb", 3)] {
            assert_eq!(lines_of(log.as_bytes()), lines, "{log:?}");
        }
    }
}
