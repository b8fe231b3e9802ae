//! Where the kernel describes the machine, and how its small files are read. Anything that is missing, unreadable or no number is
//! absent: hardware comes and goes while it is looked at.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

pub(super) use crate::config::Roots;

/// A description is at most this long.
const LONGEST: u64 = 4096;

/// The file's text without the blanks and zero bytes around it; `None` where there is none.
pub(super) fn text(path: impl AsRef<Path>) -> Option<String> {
    let mut bytes = Vec::new();
    fs::File::open(path).ok()?.take(LONGEST).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let text = text.trim_matches(|letter: char| letter.is_whitespace() || letter == '\0');
    (!text.is_empty()).then(|| text.to_owned())
}

pub(super) fn number<T: FromStr>(path: impl AsRef<Path>) -> Option<T> {
    text(path)?.parse().ok()
}

/// Names and paths in a directory, in the order of a person: `x2` before `x10`.
pub(super) fn entries(directory: impl AsRef<Path>) -> Vec<(String, PathBuf)> {
    let Ok(listed) = fs::read_dir(directory) else { return Vec::new() };
    let mut entries: Vec<(String, PathBuf)> =
        listed.flatten().filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path()))).collect();
    entries.sort_by_cached_key(|(name, _)| {
        let stem = name.trim_end_matches(|letter: char| letter.is_ascii_digit());
        (stem.to_owned(), name[stem.len()..].parse::<u64>().unwrap_or(0), name.clone())
    });
    entries
}

/// The last part of what a link leads to, such as a driver's name.
pub(super) fn link(path: impl AsRef<Path>) -> Option<String> {
    fs::read_link(path).ok()?.file_name()?.to_str().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_read_leniently_and_listed_in_order() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [("x10", " 7\n"), ("x2", "a\0"), ("x1", "\n")] {
            fs::write(dir.path().join(name), text).unwrap();
        }
        let names: Vec<_> = entries(dir.path()).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["x1", "x2", "x10"]);
        assert_eq!(number::<u32>(dir.path().join("x10")), Some(7));
        assert_eq!((text(dir.path().join("x2")), number::<u32>(dir.path().join("x2"))), (Some("a".into()), None));
        assert_eq!((text(dir.path().join("x1")), text(dir.path().join("none"))), (None, None));
        assert_eq!(entries(dir.path().join("none")), []);
    }
}
