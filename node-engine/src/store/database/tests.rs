//! A disk that fails at any of the calls that a commit makes.

use std::sync::atomic::{AtomicI32, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};

use super::*;

/// Bytes that outlive the database over them.
#[derive(Clone, Debug, Default)]
struct Disk {
    bytes: Arc<Mutex<Vec<u8>>>,
    /// Calls that are still answered well; negative: all of them.
    left: Arc<AtomicI64>,
    error: Arc<AtomicI32>,
}

impl Disk {
    fn new() -> Self {
        let disk = Self::default();
        disk.heal();
        disk
    }

    fn fail_after(&self, calls: i64, error: i32) {
        self.error.store(error, Ordering::SeqCst);
        self.left.store(calls, Ordering::SeqCst);
    }

    fn heal(&self) {
        self.left.store(-1, Ordering::SeqCst);
    }

    /// Has it failed, or would it at the next call?
    fn is_spent(&self) -> bool {
        self.left.load(Ordering::SeqCst) == 0
    }

    fn called(&self) -> io::Result<()> {
        let counted = |left: i64| if left > 0 { Some(left - 1) } else { None };
        match self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, counted) {
            Err(0) => Err(io::Error::from_raw_os_error(self.error.load(Ordering::SeqCst))),
            _ => Ok(()),
        }
    }
}

impl redb::StorageBackend for Disk {
    fn len(&self) -> io::Result<u64> {
        self.called()?;
        Ok(self.bytes.lock().unwrap().len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.called()?;
        let (bytes, at) = (self.bytes.lock().unwrap(), offset as usize);
        let found = bytes.get(at..at + out.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        out.copy_from_slice(found);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.called()?;
        self.bytes.lock().unwrap().resize(len as usize, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.called()
    }

    fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.called()?;
        let (mut bytes, at) = (self.bytes.lock().unwrap(), offset as usize);
        bytes.get_mut(at..at + data.len()).ok_or(io::ErrorKind::UnexpectedEof)?.copy_from_slice(data);
        Ok(())
    }
}

fn put(key: &str, text: &str) -> Put {
    Put { table: Table::Instances, key: key.into(), text: Some(text.into()) }
}

/// Whichever call it is: nothing panics out of it, what was committed before is there, and what was not is there whole or not at all.
#[test]
fn a_disk_that_fails_at_any_call_costs_nothing_that_was_committed() {
    let large = "x".repeat(64 << 10);
    for error in [libc::EIO, libc::ENOSPC, libc::EMFILE] {
        let mut refused = 0;
        for calls in 0.. {
            let disk = Disk::new();
            let (mut database, contents) = Database::on(disk.clone()).expect("a new one");
            assert!(contents.values().all(BTreeMap::is_empty));
            database.commit(&[put("a", "first")]).expect("a disk that works");
            disk.fail_after(calls, error);
            let done = database.commit(&[put("a", "second"), put("b", &large)]);
            let whole = !disk.is_spent();
            drop(database);
            disk.heal();
            let (_, contents) = Database::on(disk).unwrap_or_else(|fault| panic!("after {calls} calls: {fault}"));
            let found = &contents[&Table::Instances];
            let first = found.get("a").map(String::as_str) == Some("first") && !found.contains_key("b");
            let second = found.get("a").map(String::as_str) == Some("second") && found.get("b") == Some(&large);
            assert!(second || first && done.is_err(), "{error} after {calls} calls: {done:?}, {:?}", found.keys());
            refused += u32::from(done.is_err());
            if whole {
                break;
            }
            assert!(calls < 1_000, "a commit has an end");
        }
        assert!(refused > 2, "a commit of {refused} calls");
    }
}
