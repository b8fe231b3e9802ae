//! The output of workloads that we keep ourselves: two files of a bounded size each, of which the older one gives way, and the part of
//! it that is reported.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Of a log, this much is reported to the cluster.
pub(super) const TAIL: usize = 1024;

/// Where output goes. At most twice `limit` bytes are on disk.
#[derive(Debug)]
pub(super) struct Rotating {
    path: PathBuf,
    file: File,
    length: u64,
    limit: u64,
}

impl Rotating {
    /// Goes on where an earlier one ended.
    pub(super) fn open(path: &Path, limit: u64) -> io::Result<Self> {
        let file = append(path)?;
        let length = file.metadata()?.len();
        Ok(Self { path: path.to_owned(), file, length, limit: limit.max(1) })
    }

    pub(super) fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.length >= self.limit {
                self.turn()?;
            }
            let room = usize::try_from(self.limit - self.length).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(bytes.len().min(room));
            self.file.write_all(now)?;
            self.length += now.len() as u64;
            bytes = later;
        }
        Ok(())
    }

    fn turn(&mut self) -> io::Result<()> {
        fs::rename(&self.path, earlier(&self.path))?;
        self.file = append(&self.path)?;
        self.length = 0;
        Ok(())
    }
}

/// The last `bytes` of what a [`Rotating`] wrote to this path.
pub(super) fn tail(path: &Path, bytes: usize) -> io::Result<Vec<u8>> {
    let mut last = tail_of(path, bytes)?;
    if last.len() < bytes {
        let mut before = tail_of(&earlier(path), bytes - last.len())?;
        before.append(&mut last);
        return Ok(before);
    }
    Ok(last)
}

/// Removes both files. Repeatable.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    for path in [path.to_owned(), earlier(path)] {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Both files' length.
pub(super) fn length(path: &Path) -> u64 {
    let length = |path: &Path| fs::metadata(path).map(|file| file.len()).unwrap_or(0);
    length(path) + length(&earlier(path))
}

/// At most [`TAIL`] bytes of valid text: a character cut in two at the front is dropped, other invalid bytes are replaced.
pub(super) fn text(tail: &[u8]) -> String {
    let cut = tail.iter().take(3).take_while(|byte| **byte & 0xc0 == 0x80).count();
    let mut text = String::from_utf8_lossy(&tail[cut..]).into_owned();
    // Replacing may make it longer.
    let surplus = text.len().saturating_sub(TAIL);
    let from = (surplus..text.len()).find(|index| text.is_char_boundary(*index)).unwrap_or(0);
    text.drain(..from);
    text
}

fn append(path: &Path) -> io::Result<File> {
    File::options().create(true).append(true).open(path)
}

fn earlier(path: &Path) -> PathBuf {
    path.with_extension("1")
}

/// Of a file that is not there, nothing.
fn tail_of(path: &Path, bytes: usize) -> io::Result<Vec<u8>> {
    let mut file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(bytes as u64)))?;
    let mut tail = Vec::with_capacity(bytes.min(1 << 16));
    file.take(bytes as u64).read_to_end(&mut tail)?;
    Ok(tail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_bounded_and_its_end_is_whole() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("log");
        let mut log = Rotating::open(&path, 10).expect("open");
        for line in ["0123456", "789ab", "cdefghijklmnop"] {
            log.write(line.as_bytes()).expect("write");
        }
        assert!(length(&path) <= 20);
        assert_eq!(tail(&path, 12).expect("tail"), b"efghijklmnop");
        let mut log = Rotating::open(&path, 10).expect("open again");
        log.write(b"qr").expect("write");
        assert_eq!(tail(&path, 4).expect("tail"), b"opqr");
        assert!(length(&path) <= 20);
        assert_eq!(tail(&dir.path().join("none"), 4).expect("no log yet"), b"");
    }

    #[test]
    fn a_tail_is_valid_text_within_the_bound() {
        assert_eq!(text(&"äb".as_bytes()[1..]), "b");
        assert_eq!(text(b"a\xffb"), "a\u{fffd}b");
        assert_eq!(text(b""), "");
        let noise = [0xff; TAIL];
        assert!(text(&noise).len() <= TAIL);
        assert!(text("€".repeat(400).as_bytes()).len() <= TAIL);
    }
}
