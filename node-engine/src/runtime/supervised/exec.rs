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
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::enter::pack;
use super::place::Place;
use crate::runtime::session::{Exec, Input, Output, Session, Terminal};

const PIECE: usize = 32 * 1024;
/// How long a pipe may be silent when the command has ended; a child of its may hold it for ever.
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
            let mut pumps = Pumps::default();
            if let Some(out) = child.stdout.take() {
                pumps.add(out, &outputs, Output::Out);
            }
            if let Some(error) = child.stderr.take() {
                pumps.add(error, &outputs, Output::Error);
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
            let mut pumps = Pumps::default();
            pumps.add(reader, &outputs, Output::Out);
            tokio::spawn(carry(child, pumps, feed_terminal(inputs, writer), outputs));
        }
    }
    Ok(session)
}

/// Waits for the end of the command, or of the interest in it.
async fn carry(mut child: Child, pumps: Pumps, feed: impl Future<Output = ()>, outputs: mpsc::Sender<Output>) {
    let group = child.id();
    let ended = tokio::select! {
        ended = child.wait() => ended,
        () = feed => return hang_up(group, child).await,
        () = outputs.closed() => return hang_up(group, child).await,
    };
    pumps.drain().await;
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

/// What carries the outputs, and the word that the command has ended.
#[derive(Default)]
struct Pumps {
    tasks: JoinSet<()>,
    ended: CancellationToken,
}

impl Pumps {
    fn add(
        &mut self,
        from: impl AsyncRead + Unpin + Send + 'static,
        outputs: &mpsc::Sender<Output>,
        kind: fn(Bytes) -> Output,
    ) {
        self.tasks.spawn(pump(from, outputs.clone(), kind, self.ended.clone()));
    }

    /// Waits until all that the command has said is on its way.
    async fn drain(mut self) {
        self.ended.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Until the end; for a terminal that is an error, when nobody has its other end any more. Once the command has ended, also until the
/// pipe has been silent for a while; the time that a slow reader takes is not the pipe's.
async fn pump(
    mut from: impl AsyncRead + Unpin,
    outputs: mpsc::Sender<Output>,
    kind: fn(Bytes) -> Output,
    ended: CancellationToken,
) {
    let mut buffer = vec![0; PIECE];
    loop {
        let silent = async {
            ended.cancelled().await;
            sleep(LAST_WORDS).await;
        };
        let length = tokio::select! {
            biased;
            read = from.read(&mut buffer) => match read {
                Ok(length @ 1..) => length,
                Ok(0) | Err(_) => return,
            },
            () = silent => return,
        };
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

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::time::Instant;

    use super::*;

    /// Begins to read long after the end of the command.
    async fn read_late(script: &str) -> (Vec<Output>, Duration) {
        let mut command = Command::new("sh");
        let mut child = command.args(["-c", script]).stdout(Stdio::piped()).spawn().expect("a shell");
        let pid = child.id().expect("it runs");
        let (outputs, mut output) = mpsc::channel(1);
        let mut pumps = Pumps::default();
        pumps.add(child.stdout.take().expect("its output"), &outputs, Output::Out);
        tokio::spawn(carry(child, pumps, pending(), outputs));
        while Path::new(&format!("/proc/{pid}")).exists() {
            sleep(Duration::from_millis(1)).await;
        }
        let ended = Instant::now();
        sleep(2 * LAST_WORDS).await;
        let mut said = Vec::new();
        while let Some(one) = output.recv().await {
            said.push(one);
        }
        (said, ended.elapsed())
    }

    #[tokio::test]
    async fn a_slow_reader_gets_all_of_the_output() {
        // More than the channel takes, and no more than the pipe holds.
        let (mut said, _) = read_late("head -c 65536 /dev/zero").await;
        assert_eq!(said.pop(), Some(Output::Exit(0)));
        let length = |one: &Output| if let Output::Out(bytes) = one { bytes.len() } else { 0 };
        assert_eq!(said.iter().map(length).sum::<usize>(), 65_536);
    }

    #[tokio::test]
    async fn a_child_that_holds_the_output_and_is_silent_does_not_hold_up_the_end() {
        let (said, took) = read_late("echo said; sleep 20 & exit 3").await;
        assert_eq!(said, [Output::Out(Bytes::from_static(b"said\n")), Output::Exit(3)]);
        assert!(took < Duration::from_secs(15), "{took:?}");
    }
}
