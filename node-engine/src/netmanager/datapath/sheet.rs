//! A table of rows in this process's memory, each written through to a file that outlives it: what the kernel's pinned maps are to the
//! programs, these files are to the slow path. They lie where a reboot forgets them.
//!
//! ```text
//! <directory>/v<ABI_VERSION>[_<slots>]/<table>     records of one size, none across a page: check · key · value; a check of 0: no row
//! ```
//!
//! One call of `pwrite` makes or ends a row, so that a process that is killed leaves a row or none. A file that cannot be written is
//! removed, since half of the rows would be worse than none, and made anew as soon as all of them have room.

use std::collections::HashMap;
use std::fmt;
use std::fs::{DirBuilder, File, OpenOptions};
use std::hash::Hash;
use std::io::{self, Read};
use std::marker::PhantomData;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use aya::Pod;
use foldhash::quality::RandomState;

use super::ebpf::version_name;
use super::{Capacity, pod};

const PAGE: usize = 4_096;
/// How long a file that cannot be written is left alone.
const RETRY: Duration = Duration::from_secs(10);
/// Of a record: what says that there is a row, and that it is whole.
const CHECK: usize = 4;

/// The directory of this layout version's tables, and of their size, as for pins.
pub(super) fn directory(root: &Path, capacity: Capacity) -> PathBuf {
    root.join(version_name(capacity))
}

/// Makes the directory, which nobody else may read. Those of other versions go: one that is come back to would tell of the past.
pub(super) fn ensure_directory(root: &Path, capacity: Capacity) -> io::Result<PathBuf> {
    let directory = directory(root, capacity);
    if !directory.exists() && root.exists() {
        std::fs::remove_dir_all(root)?;
    }
    DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
    Ok(directory)
}

/// Rows by key, and where each lies in the file.
pub(super) struct Sheet<K, V> {
    rows: HashMap<K, (V, u32), RandomState>,
    file: Option<Records<K, V>>,
    lost: Option<Lost>,
}

/// The file that should be there.
struct Lost {
    path: PathBuf,
    /// When it is tried again to write all rows.
    retry: Instant,
}

impl<K, V> Default for Sheet<K, V> {
    fn default() -> Self {
        Self { rows: HashMap::default(), file: None, lost: None }
    }
}

impl<K: Pod + Eq + Hash, V: Pod> Sheet<K, V> {
    /// The rows that the file holds, and from now on the file holds the rows.
    pub(super) fn open(directory: &Path, name: &str) -> io::Result<Self> {
        let mut file = Records::open(directory.join(name))?;
        let mut rows = HashMap::default();
        for (at, (key, value)) in file.read()? {
            // A key that is there twice was never written so.
            if let Some((_, other)) = rows.insert(key, (value, at)) {
                file.free.push(other);
            }
        }
        Ok(Self { rows, file: Some(file), lost: None })
    }

    pub(super) fn get(&self, key: &K) -> Option<V> {
        self.rows.get(key).map(|(value, _)| *value)
    }

    pub(super) fn contains_key(&self, key: &K) -> bool {
        self.rows.contains_key(key)
    }

    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (K, V)> {
        self.rows.iter().map(|(key, (value, _))| (*key, *value))
    }

    pub(super) fn insert(&mut self, key: K, value: V) {
        self.heal();
        let known = self.rows.get(&key).map(|(_, at)| *at);
        let at = self.file.as_mut().map_or(0, |file| known.unwrap_or_else(|| file.place()));
        self.rows.insert(key, (value, at));
        self.keep(|file| file.write(at, &key, &value));
    }

    /// Changes a row that is there; `keep` says whether the file must know at once.
    pub(super) fn change(&mut self, key: &K, change: impl FnOnce(&mut V) -> bool) {
        let Some((value, at)) = self.rows.get_mut(key) else { return };
        if change(value) {
            let (value, at) = (*value, *at);
            self.keep(|file| file.write(at, key, &value));
        }
    }

    pub(super) fn remove(&mut self, key: &K) -> Option<V> {
        let (value, at) = self.rows.remove(key)?;
        self.keep(|file| file.clear(at));
        Some(value)
    }

    fn keep(&mut self, write: impl FnOnce(&mut Records<K, V>) -> io::Result<()>) {
        let Some(file) = &mut self.file else { return };
        if let Err(error) = write(file) {
            let path = std::mem::take(&mut file.path);
            tracing::warn!(%error, file = %path.display(), "rows are kept in memory only: a restart would break connections");
            let _ = std::fs::remove_file(&path);
            self.file = None;
            self.lost = Some(Lost { path, retry: Instant::now() + RETRY });
        }
    }

    /// Where the file was lost, writes all rows to another, from time to time.
    fn heal(&mut self) {
        let Some(lost) = self.lost.as_mut().filter(|lost| lost.retry <= Instant::now()) else { return };
        // It takes as long as there are rows, in which no packet is carried.
        lost.retry = Instant::now() + RETRY;
        let path = lost.path.clone();
        let written = self.write_all(path.clone());
        match written {
            Ok(file) => {
                tracing::info!(file = %path.display(), "rows are kept in their file again");
                self.file = Some(file);
                self.lost = None;
            }
            // It was told when it was lost.
            Err(_) => drop(std::fs::remove_file(&path)),
        }
    }

    fn write_all(&mut self, path: PathBuf) -> io::Result<Records<K, V>> {
        let mut file = Records::open(path)?;
        file.file.set_len(0)?;
        for (key, (value, at)) in &mut self.rows {
            *at = file.place();
            file.write(*at, key, value)?;
        }
        Ok(file)
    }
}

impl<K, V> fmt::Debug for Sheet<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sheet").field("rows", &self.rows.len()).field("kept", &self.file.is_some()).finish()
    }
}

/// The file.
struct Records<K, V> {
    file: File,
    path: PathBuf,
    free: Vec<u32>,
    /// Records that the file has.
    count: u32,
    row: PhantomData<(K, V)>,
}

impl<K: Pod, V: Pod> Records<K, V> {
    const SIZE: usize = CHECK + size_of::<K>() + size_of::<V>();
    const IN_PAGE: usize = PAGE / Self::SIZE;

    fn open(path: PathBuf) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&path)?;
        Ok(Self { file, path, free: Vec::new(), count: 0, row: PhantomData })
    }

    /// All whole rows and where they lie; what is no row is free.
    fn read(&mut self) -> io::Result<Vec<(u32, (K, V))>> {
        let mut bytes = Vec::new();
        self.file.read_to_end(&mut bytes)?;
        let mut rows = Vec::new();
        for page in bytes.chunks(PAGE) {
            for record in page.chunks(Self::SIZE).take(Self::IN_PAGE) {
                match decode(record) {
                    Some(row) => rows.push((self.count, row)),
                    None => self.free.push(self.count),
                }
                self.count += 1;
            }
        }
        Ok(rows)
    }

    fn place(&mut self) -> u32 {
        self.free.pop().unwrap_or_else(|| {
            self.count += 1;
            self.count - 1
        })
    }

    fn write(&mut self, at: u32, key: &K, value: &V) -> io::Result<()> {
        let mut record = [0; PAGE];
        let record = &mut record[..Self::SIZE];
        encode(record, key, value);
        self.file.write_all_at(record, offset::<K, V>(at))
    }

    fn clear(&mut self, at: u32) -> io::Result<()> {
        self.file.write_all_at(&[0; CHECK], offset::<K, V>(at))?;
        self.free.push(at);
        Ok(())
    }
}

fn offset<K: Pod, V: Pod>(at: u32) -> u64 {
    let (page, place) = (at as usize / Records::<K, V>::IN_PAGE, at as usize % Records::<K, V>::IN_PAGE);
    page as u64 * PAGE as u64 + (place * Records::<K, V>::SIZE) as u64
}

fn encode<K: Pod, V: Pod>(record: &mut [u8], key: &K, value: &V) {
    let (check_bytes, row) = record.split_at_mut(CHECK);
    row[..size_of::<K>()].copy_from_slice(pod::bytes(key));
    row[size_of::<K>()..].copy_from_slice(pod::bytes(value));
    check_bytes.copy_from_slice(&check(row).to_ne_bytes());
}

fn decode<K: Pod, V: Pod>(record: &[u8]) -> Option<(K, V)> {
    let (stored, row) = record.split_first_chunk::<CHECK>()?;
    let (key, value) = row.split_at_checked(size_of::<K>())?;
    let row_of_bytes = (pod::row(key)?, pod::row(value)?);
    (u32::from_ne_bytes(*stored) == check(row)).then_some(row_of_bytes)
}

/// Of a row (FNV-1a), never 0.
fn check(row: &[u8]) -> u32 {
    row.iter().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)) | 1
}

/// A row that is taken from a file is written as it was there, for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn round_trip(bytes: &[u8]) {
    use netmanager_common::abi::{Flow, FlowKey};
    for record in bytes.chunks(Records::<FlowKey, Flow>::SIZE) {
        if let Some((key, value)) = decode::<FlowKey, Flow>(record) {
            let mut again = vec![0; record.len()];
            encode(&mut again, &key, &value);
            assert_eq!(again, record);
        }
    }
}

/// A record of a file, for a fuzzer to begin with.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn sample() -> Vec<u8> {
    use netmanager_common::abi::{Flow, FlowKey};
    let mut record = vec![0; Records::<FlowKey, Flow>::SIZE];
    encode(&mut record, &FlowKey::default(), &Flow { slot: 3, ..Flow::default() });
    record
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_outlive_their_table() {
        let scratch = tempfile::tempdir().unwrap();
        let mut sheet = Sheet::<u32, u64>::open(scratch.path(), "t").unwrap();
        for key in 0..2_000 {
            sheet.insert(key, u64::from(key) * 3);
        }
        for key in (0..2_000).step_by(2) {
            sheet.remove(&key);
        }
        sheet.insert(4_000, 7);
        sheet.change(&1, |value| {
            *value = 1;
            true
        });
        sheet.change(&3, |value| {
            *value = 99;
            false
        });
        let len = std::fs::metadata(scratch.path().join("t")).unwrap().len();

        let mut again = Sheet::<u32, u64>::open(scratch.path(), "t").unwrap();
        assert_eq!(again.len(), 1_001);
        assert_eq!([1, 3, 5, 4, 4_000].map(|key| again.get(&key)), [Some(1), Some(9), Some(15), None, Some(7)]);
        (10_000..10_900).for_each(|key| again.insert(key, 0));
        assert_eq!(std::fs::metadata(scratch.path().join("t")).unwrap().len(), len, "free records are used again");
    }

    #[test]
    fn what_is_damaged_is_no_row() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("t");
        let mut sheet = Sheet::<u32, u64>::open(scratch.path(), "t").unwrap();
        (0..1_000).for_each(|key| sheet.insert(key, u64::MAX));
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[20] ^= 1;
        bytes.truncate(bytes.len() - 7);
        std::fs::write(&path, &bytes).unwrap();
        let again = Sheet::<u32, u64>::open(scratch.path(), "t").unwrap();
        assert_eq!(again.len(), 998);
        assert!(again.iter().all(|(_, value)| value == u64::MAX));
    }

    #[test]
    fn a_full_disk_costs_the_file_and_not_the_rows() {
        let scratch = tempfile::tempdir().unwrap();
        let mut sheet = Sheet::<u32, u64>::open(scratch.path(), "t").unwrap();
        sheet.insert(1, 1);
        if let Some(file) = &mut sheet.file {
            file.file = File::open("/dev/full").unwrap();
        }
        sheet.insert(2, 2);
        assert_eq!((sheet.get(&1), sheet.get(&2)), (Some(1), Some(2)));
        assert!(!scratch.path().join("t").exists());

        sheet.remove(&1);
        sheet.insert(3, 3);
        assert!(!scratch.path().join("t").exists(), "it is not tried for every row");
        if let Some(lost) = &mut sheet.lost {
            lost.retry = Instant::now();
        }
        sheet.insert(4, 4);
        sheet.remove(&3);
        let again = Sheet::<u32, u64>::open(scratch.path(), "t").unwrap();
        assert_eq!((again.len(), again.get(&2), again.get(&4)), (2, Some(2), Some(4)), "there is room again");
    }
}
