//! The daemon's end of one more command: its input, its outputs or its terminal, and its code.

use std::fs::File;
use std::io;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use bytes::Bytes;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::openpty;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::enter::pack;
use super::place::Place;
use crate::runtime::session::{Exec, Input, Output, Session, Terminal};

const PIECE: usize = 32 * 1024;
/// What is still in the pipes when the command has ended; a child of its may hold them for ever.
const LAST_WORDS: Duration = Duration::from_secs(2);

pub(super) fn begin(supervisor: &Path, place: &Place, exec: &Exec) -> io::Result<Session> {
    let mut command = Command::new(supervisor);
    command.args(["supervise", "enter"]).arg(place.directory()).arg(pack(&exec.command)).env_clear();
    let (session, inputs, outputs) = Session::open();
    match exec.terminal {
        None => {
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
            let mut child = command.spawn()?;
            let input = child.stdin.take();
            let mut pumps = JoinSet::new();
            if let Some(out) = child.stdout.take() {
                pumps.spawn(pump(out, outputs.clone(), Output::Out));
            }
            if let Some(error) = child.stderr.take() {
                pumps.spawn(pump(error, outputs.clone(), Output::Error));
            }
            tokio::spawn(carry(child, pumps, feed_pipe(inputs, input), outputs));
        }
        Some(size) => {
            let pair = openpty(None, None)?;
            tcsetwinsize(&pair.master, window(size))?;
            // It makes itself the leader of a session, which one who leads a group cannot.
            command.stdin(Stdio::from(pair.slave.try_clone()?));
            command.stdout(Stdio::from(pair.slave.try_clone()?)).stderr(Stdio::from(pair.slave));
            let child = command.spawn()?;
            // Until it is dropped it holds the other end of the terminal.
            drop(command);
            fcntl(&pair.master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
            let master = File::from(pair.master);
            // A terminal is no pipe, and read and written like one.
            let reader = pipe::Receiver::from_file_unchecked(master.try_clone()?)?;
            let writer = pipe::Sender::from_file_unchecked(master)?;
            let mut pumps = JoinSet::new();
            pumps.spawn(pump(reader, outputs.clone(), Output::Out));
            tokio::spawn(carry(child, pumps, feed_terminal(inputs, writer), outputs));
        }
    }
    Ok(session)
}

/// Waits for the end of the command, or of the interest in it.
async fn carry(
    mut child: Child,
    mut pumps: JoinSet<()>,
    feed: impl Future<Output = ()>,
    outputs: mpsc::Sender<Output>,
) {
    let group = child.id();
    let ended = tokio::select! {
        ended = child.wait() => ended,
        () = feed => return hang_up(group, child).await,
        () = outputs.closed() => return hang_up(group, child).await,
    };
    let rest = async { while pumps.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(LAST_WORDS, rest).await;
    let last = match ended {
        Ok(status) => Output::Exit(status.code().map_or(255, i64::from)),
        Err(error) => Output::Broken(error.to_string()),
    };
    // Whoever asked may have left.
    let _ = outputs.send(last).await;
}

async fn hang_up(group: Option<u32>, mut child: Child) {
    if let Some(group) = group.and_then(|group| i32::try_from(group).ok()) {
        // Gone meanwhile is what was wanted.
        let _ = killpg(Pid::from_raw(group), Signal::SIGHUP);
    }
    // Collected when it ends.
    let _ = child.wait().await;
}

/// Until the end; for a terminal that is an error, when nobody has its other end any more.
async fn pump(mut from: impl AsyncRead + Unpin, outputs: mpsc::Sender<Output>, kind: fn(Bytes) -> Output) {
    let mut buffer = vec![0; PIECE];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        if outputs.send(kind(Bytes::copy_from_slice(&buffer[..length]))).await.is_err() {
            return;
        }
    }
}

/// Returns when whoever asked has left.
async fn feed_pipe(mut inputs: mpsc::Receiver<Input>, mut pipe: Option<ChildStdin>) {
    while let Some(input) = inputs.recv().await {
        match (input, &mut pipe) {
            (Input::Bytes(bytes), Some(open)) => {
                // A command that reads no more has its reasons; its end follows.
                if open.write_all(&bytes).await.is_err() {
                    pipe = None;
                }
            }
            (Input::End, _) => pipe = None,
            (Input::Bytes(_), None) | (Input::Resize(_), _) => {}
        }
    }
}

async fn feed_terminal(mut inputs: mpsc::Receiver<Input>, mut master: pipe::Sender) {
    /// What a person types to end the input of a line: control-D.
    const END: &[u8] = b"\x04";
    while let Some(input) = inputs.recv().await {
        let done = match input {
            Input::Bytes(bytes) => master.write_all(&bytes).await,
            Input::End => master.write_all(END).await,
            Input::Resize(size) => tcsetwinsize(&master, window(size)).map_err(io::Error::from),
        };
        if let Err(error) = done {
            tracing::debug!(%error, "a terminal takes no more input");
        }
    }
}

fn window(size: Terminal) -> Winsize {
    Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 }
}
