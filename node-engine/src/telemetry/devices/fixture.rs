//! A machine that has one of everything, for tests: the listing in `tests/fixtures/board.txt` as a tree of files.

use std::fs;
use std::ops::Deref;
use std::os::unix::fs::symlink;

use super::super::roots::Roots;

/// The tree; gone with its handle.
pub(in crate::telemetry) struct Fixture {
    roots: Roots,
    dir: tempfile::TempDir,
}

impl Fixture {
    /// Writes one of its files anew.
    pub(in crate::telemetry) fn write(&self, path: &str, text: &str) {
        let path = self.dir.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub(in crate::telemetry) fn remove(&self, path: &str) {
        fs::remove_dir_all(self.dir.path().join(path)).unwrap();
    }
}

impl Deref for Fixture {
    type Target = Roots;

    fn deref(&self) -> &Roots {
        &self.roots
    }
}

pub(in crate::telemetry) fn fixture() -> Fixture {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let fixture = Fixture { roots: Roots { sys: at("sys"), proc: at("proc"), dev: at("dev") }, dir };
    for line in include_str!("../../../tests/fixtures/board.txt").lines().filter(|line| !line.starts_with('#')) {
        if let Some((path, target)) = line.split_once(" -> ") {
            let path = fixture.dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            symlink(target, path).unwrap();
        } else if let Some(directory) = line.strip_suffix('/') {
            fs::create_dir_all(fixture.dir.path().join(directory)).unwrap();
        } else if let Some((path, text)) = line.split_once(": ") {
            fixture.write(path, &format!("{}\n", text.replace("\\n", "\n").replace("\\t", "\t")));
        } else {
            fixture.write(line.strip_suffix(':').expect("a line of the listing"), "");
        }
    }
    fixture
}
