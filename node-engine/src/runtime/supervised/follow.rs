//! An output that we keep ourselves, followed: read again a few times a second for as long as somebody listens.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::spawn_blocking;

use crate::runtime::session::{Follow, PIECES};
use crate::runtime::{RuntimeError, output};

const LOOK: Duration = Duration::from_millis(200);
const PIECE: u64 = 64 * 1024;

/// From the last `tail` bytes on, until `lives` says no and everything is told.
pub(in crate::runtime) fn output(log: PathBuf, tail: usize, lives: impl Fn() -> bool + Send + 'static) -> Follow {
    let (pieces, follow) = mpsc::channel(PIECES);
    tokio::spawn(async move {
        let mut reader = Reader { log, file: None, tail: Some(tail) };
        let mut lives = lives;
        loop {
            let read = spawn_blocking(move || {
                // Before reading: what is written between the look and the end is read still.
                let last = !lives();
                let piece = reader.next();
                (reader, lives, last, piece)
            });
            let Ok((back, still, last, piece)) = read.await else { return };
            (reader, lives) = (back, still);
            let nothing = matches!(&piece, Ok(piece) if piece.is_empty());
            if !nothing {
                let failed = piece.is_err();
                let piece = piece.map_err(|error| RuntimeError::Step { step: "logs", reason: error.to_string() });
                if pieces.send(piece).await.is_err() || failed {
                    return;
                }
            } else if last {
                return;
            } else {
                tokio::select! {
                    () = pieces.closed() => return,
                    () = tokio::time::sleep(LOOK) => {}
                }
            }
        }
    });
    follow
}

struct Reader {
    log: PathBuf,
    file: Option<File>,
    /// What is told first; `None` once it has been.
    tail: Option<usize>,
}

impl Reader {
    /// What has been added; nothing where nothing has.
    fn next(&mut self) -> io::Result<Bytes> {
        if let Some(tail) = self.tail.take() {
            // Opened before the tail is read, at the end as it is then: what is added meanwhile may come twice, and is never lost.
            self.file = open(&self.log)?;
            if let Some(file) = &mut self.file {
                file.seek(SeekFrom::End(0))?;
            }
            return output::tail(&self.log, tail).map(Bytes::from);
        }
        let Some(file) = &mut self.file else {
            self.file = open(&self.log)?;
            return Ok(Bytes::new());
        };
        let mut piece = Vec::new();
        file.take(PIECE).read_to_end(&mut piece)?;
        if piece.is_empty() && !is_at(file, &self.log) {
            // It has been turned, and read to its end: the next one begins.
            self.file = open(&self.log)?;
        }
        Ok(piece.into())
    }
}

fn open(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    let same =
        |there: fs::Metadata| file.metadata().is_ok_and(|here| (here.dev(), here.ino()) == (there.dev(), there.ino()));
    fs::metadata(path).is_ok_and(same)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::runtime::output::Rotating;

    #[tokio::test]
    async fn what_is_added_is_told_across_a_turn_and_to_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("web.log");
        let mut writer = Rotating::open(&log, 100).unwrap();
        writer.write(b"before ").unwrap();
        let lives = Arc::new(AtomicBool::new(true));
        let seen = lives.clone();
        let mut follow = output(log, 3, move || seen.load(Ordering::SeqCst));
        let mut told = Vec::new();
        told.extend_from_slice(&follow.recv().await.unwrap().unwrap());
        assert_eq!(told, b"re ");
        for number in 0..20 {
            // As fast as somebody reads: of a log that turns twice between two looks the middle is gone.
            let line = format!("line {number:02} ");
            writer.write(line.as_bytes()).unwrap();
            while !told.ends_with(line.as_bytes()) {
                told.extend_from_slice(&follow.recv().await.unwrap().unwrap());
            }
        }
        writer.write(b"last").unwrap();
        lives.store(false, Ordering::SeqCst);
        while let Some(piece) = follow.recv().await {
            told.extend_from_slice(&piece.unwrap());
        }
        let expected: String = (0..20).map(|number| format!("line {number:02} ")).collect();
        assert_eq!(String::from_utf8(told).unwrap(), format!("re {expected}last"));
    }

    #[tokio::test]
    async fn a_log_that_is_not_there_yet_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("web.log");
        let written = log.clone();
        let mut looks = 0;
        let lives = std::sync::Mutex::new(move || {
            looks += 1;
            if looks == 2 {
                fs::write(&written, "hello").unwrap();
            }
            looks < 4
        });
        let mut follow = output(log, 100, move || (lives.lock().unwrap())());
        assert_eq!(follow.recv().await.unwrap().unwrap(), "hello");
        assert!(follow.recv().await.is_none());
    }
}
