//! One more command in a container: containerd runs it, and its streams come through pipes with names.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe::{OpenOptions, Receiver, Sender};
use tokio::sync::mpsc;
use tonic::{Code, Status};

use super::api::tasks::{self, CloseInput, Ended, Kill, Resize, Which};
use super::api::{Any, Empty};
use super::client::Client;
use crate::runtime::RuntimeError;
use crate::runtime::session::{Exec, Input, Output, Session, Terminal};

const PIECE: usize = 32 * 1024;
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";

/// Numbers of this daemon's commands.
static NEXT: AtomicU64 = AtomicU64::new(0);

/// Named pipes, gone with this.
#[derive(Debug)]
struct Pipes {
    paths: [PathBuf; 3],
}

/// A command as containerd knows it.
#[derive(Clone, Debug)]
struct Command {
    client: Client,
    container: String,
    exec: String,
}

/// Runs `process` (an OCI process document) in this container. Pipes lie in `directory` until both sides have opened them.
pub(super) async fn begin(
    client: Client,
    container: String,
    directory: &Path,
    process: Vec<u8>,
    exec: &Exec,
) -> Result<Session, RuntimeError> {
    let failed =
        |error: io::Error| RuntimeError::Step { step: "make pipes for the command", reason: error.to_string() };
    let name = format!("exec-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let pipes = Pipes::make(directory, &name).map_err(failed)?;
    let [input, output, errors] = &pipes.paths;
    // Open for reading too, so that it opens before containerd has.
    let writer = OpenOptions::new().read_write(true).open_sender(input).map_err(failed)?;
    let reader = OpenOptions::new().open_receiver(output).map_err(failed)?;
    let error_reader = OpenOptions::new().open_receiver(errors).map_err(failed)?;
    let text = |path: &Path| path.to_string_lossy().into_owned();
    let terminal = exec.terminal;
    let order = tasks::Exec {
        container: container.clone(),
        stdin: text(input),
        stdout: text(output),
        // A terminal has one output.
        stderr: if terminal.is_some() { String::new() } else { text(errors) },
        terminal: terminal.is_some(),
        process: Some(Any { type_url: PROCESS.into(), value: process }),
        exec: name.clone(),
    };
    let command = Command { client, container, exec: name };
    command.client.call::<_, Empty>(tasks::EXEC, order).await.map_err(|status| command.refused(&status))?;
    if let Err(status) = command.client.call::<_, Empty>(tasks::START, command.which()).await {
        command.forget().await;
        return Err(command.refused(&status));
    }
    // Both sides have them open now.
    drop(pipes);
    if let Some(size) = terminal {
        command.resize(size).await;
    }
    let (session, inputs, outputs) = Session::open();
    let error_reader = terminal.is_none().then_some(error_reader);
    tokio::spawn(run(command, writer, reader, error_reader, inputs, outputs));
    Ok(session)
}

impl Pipes {
    fn make(directory: &Path, name: &str) -> io::Result<Self> {
        let pipes = Self { paths: ["in", "out", "err"].map(|stream| directory.join(format!("{name}.{stream}"))) };
        for path in &pipes.paths {
            mkfifo(path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        }
        Ok(pipes)
    }
}

impl Drop for Pipes {
    fn drop(&mut self) {
        for path in &self.paths {
            let _ = fs::remove_file(path);
        }
    }
}

/// Carries input and output until the command has ended or nobody listens any more. Neither waits for the other: a command like `cat`
/// reads no more while its output is not taken.
async fn run(
    command: Command,
    writer: Sender,
    reader: Receiver,
    error_reader: Option<Receiver>,
    inputs: mpsc::Receiver<Input>,
    outputs: mpsc::Sender<Output>,
) {
    let outward = async {
        let errors = async {
            match error_reader {
                Some(reader) => copy(reader, &outputs, Output::Error).await,
                None => true,
            }
        };
        let (out, errors) = tokio::join!(copy(reader, &outputs, Output::Out), errors);
        if !(out && errors) {
            return false;
        }
        let end = match command.client.call_and_wait::<_, Ended>(tasks::WAIT, command.which()).await {
            Ok(ended) => Output::Exit(ended.code.into()),
            Err(status) => Output::Broken(command.client.failed("exec", &status).to_string()),
        };
        outputs.send(end).await.is_ok()
    };
    let ended = tokio::select! {
        ended = outward => ended,
        () = inward(&command, writer, inputs) => false,
        () = outputs.closed() => false,
    };
    if !ended {
        command.hang_up().await;
    }
    command.forget().await;
}

/// Everything that comes; false where nobody takes it any more.
async fn copy(mut from: Receiver, to: &mpsc::Sender<Output>, kind: impl Fn(Bytes) -> Output) -> bool {
    let mut buffer = vec![0; PIECE];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        if to.send(kind(Bytes::copy_from_slice(&buffer[..length]))).await.is_err() {
            return false;
        }
    }
    true
}

/// Returns when whoever asked has left.
async fn inward(command: &Command, writer: Sender, mut inputs: mpsc::Receiver<Input>) {
    let mut writer = Some(writer);
    while let Some(input) = inputs.recv().await {
        match (input, &mut writer) {
            (Input::Resize(size), _) => command.resize(size).await,
            (Input::Bytes(bytes), Some(open)) => {
                // A command that reads no more has its reasons; its end follows.
                if open.write_all(&bytes).await.is_err() {
                    writer = None;
                }
            }
            (Input::End, Some(_)) => {
                writer = None;
                command.close_input().await;
            }
            (Input::Bytes(_) | Input::End, None) => {}
        }
    }
}

impl Command {
    fn which(&self) -> Which {
        Which { container: self.container.clone(), exec: self.exec.clone() }
    }

    /// A container that does not run takes no command.
    fn refused(&self, status: &Status) -> RuntimeError {
        match status.code() {
            Code::NotFound | Code::FailedPrecondition => {
                RuntimeError::Refused { what: "exec", reason: status.message().to_owned() }
            }
            _ => self.client.failed("start the command", status),
        }
    }

    /// A terminal of the wrong size is a blemish and no failure.
    async fn resize(&self, size: Terminal) {
        let (container, exec) = (self.container.clone(), self.exec.clone());
        let order = Resize { container, exec, width: size.columns.into(), height: size.rows.into() };
        if let Err(error) = self.client.call::<_, Empty>(tasks::RESIZE, order).await {
            tracing::debug!(%error, "the terminal keeps its size");
        }
    }

    async fn close_input(&self) {
        let order = CloseInput { container: self.container.clone(), exec: self.exec.clone(), stdin: true };
        if let Err(error) = self.client.call::<_, Empty>(tasks::CLOSE_INPUT, order).await {
            tracing::debug!(%error, "the end of the input cannot be told");
        }
    }

    /// Its reader has gone. One that does not mind goes on, until the container ends.
    async fn hang_up(&self) {
        let signal = (Signal::SIGHUP as i32).cast_unsigned();
        let order = Kill { container: self.container.clone(), exec: self.exec.clone(), signal };
        if self.client.call::<_, Empty>(tasks::KILL, order).await.is_ok() {
            let _ = self.client.call_and_wait::<_, Ended>(tasks::WAIT, self.which()).await;
        }
    }

    /// containerd keeps what has ended until it is told to forget it.
    async fn forget(&self) {
        if let Err(error) = self.client.call::<_, Empty>(tasks::DELETE_EXEC, self.which()).await {
            tracing::debug!(%error, "containerd keeps a command that has ended");
        }
    }
}
