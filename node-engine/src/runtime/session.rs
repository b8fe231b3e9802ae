//! An output that is followed, and a command that runs beside a workload. Both are channels: who asks drops its end when it has had
//! enough, and who serves notices.

use bytes::Bytes;
use tokio::sync::mpsc;

use super::RuntimeError;

/// Pieces of output that may wait for their reader; then the writer waits.
pub const PIECES: usize = 64;

/// Output as it comes. An error is its last piece.
pub type Follow = mpsc::Receiver<Result<Bytes, RuntimeError>>;

/// A command to run in an instance.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exec {
    /// Program and arguments; never empty.
    pub command: Vec<String>,
    /// With a terminal of this size; without one the two outputs stay apart.
    pub terminal: Option<Terminal>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terminal {
    pub columns: u16,
    pub rows: u16,
}

/// A command that runs. Dropping either end hangs up: a command that still runs gets SIGHUP, as if its terminal was closed.
#[derive(Debug)]
pub struct Session {
    pub input: mpsc::Sender<Input>,
    pub output: mpsc::Receiver<Output>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    Bytes(Bytes),
    /// No more input; the command goes on.
    End,
    Resize(Terminal),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Standard output; all output where there is a terminal.
    Out(Bytes),
    Error(Bytes),
    /// It has ended with this code: the last that is said.
    Exit(i64),
    /// What became of it is not known: the last that is said.
    Broken(String),
}

impl Session {
    /// A session, and the ends of whoever runs its command.
    pub fn open() -> (Self, mpsc::Receiver<Input>, mpsc::Sender<Output>) {
        let (input, inputs) = mpsc::channel(PIECES);
        let (outputs, output) = mpsc::channel(PIECES);
        (Self { input, output }, inputs, outputs)
    }
}
