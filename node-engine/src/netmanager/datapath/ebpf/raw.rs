//! Maps whose rows are bytes: of a layout that only a description tells, or so many that one call for each takes too long. Commands of
//! bpf(2) that aya has for types alone, or not at all.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use aya::maps::{MapData, MapType};

/// `linux/bpf.h`
const LOOKUP: c_int = 1;
const UPDATE: c_int = 2;
const NEXT: c_int = 4;
const LOOKUP_MANY: c_int = 24;
/// Rows that are read at a time. No bucket of a hash has as many.
const MANY: u32 = 4_096;
/// Whatever is there, and only where there is no row.
pub(super) const ANY: u64 = 0;
pub(super) const NEW: u64 = 1;

/// A pinned map, array or hash.
pub(super) struct RawMap {
    map: MapData,
    key: usize,
    value: usize,
    pub(super) rows: u32,
    pub(super) array: bool,
}

/// The part of `union bpf_attr` that is about one element.
#[repr(C)]
struct Element {
    map: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// The part that is about many.
#[repr(C)]
struct Elements {
    from: u64,
    to: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

impl RawMap {
    pub(super) fn open(pin: &Path) -> io::Result<Self> {
        let map = MapData::from_pin(pin).map_err(io::Error::other)?;
        let info = map.info().map_err(io::Error::other)?;
        let array = match info.map_type().map_err(io::Error::other)? {
            MapType::Array => true,
            MapType::Hash => false,
            other => return Err(io::Error::other(format!("no rows are read from a map of the kind {other:?}"))),
        };
        let (key, value, rows) = (info.key_size() as usize, info.value_size() as usize, info.max_entries());
        Ok(Self { map, key, value, rows, array })
    }

    /// Bytes of a key, and of a value.
    pub(super) fn sizes(&self) -> (usize, usize) {
        (self.key, self.value)
    }

    /// Has each row looked at until one is an error. Rows of an array that are all zero are in no use and passed by. What comes or goes
    /// meanwhile may be seen or not; a row may be seen twice.
    pub(super) fn each<E>(&self, mut look: impl FnMut(&[u8], &[u8]) -> Result<(), E>) -> Result<(), E> {
        let many = MANY as usize;
        let (mut keys, mut values) = (vec![0; many * self.key], vec![0; many * self.value]);
        // Compared all at once: most of a large array is empty.
        let zero = vec![0; many * self.value];
        // An array's place is an index, a hash's the number of a bucket.
        let mut places = [[0; 4]; 2];
        // Whatever a call does not bring it has passed by.
        for number in 0..=2 * u64::from(self.rows) {
            let [from, to] = &mut places;
            let Ok((count, more)) = self.many((number > 0).then_some(&*from), to, &mut keys, &mut values) else {
                // Kernels before 5.6.
                return self.walk(look);
            };
            let used = |values: &[u8]| !self.array || values != &zero[..values.len()];
            let read = values.get(..count * self.value).unwrap_or_default();
            if used(read) {
                let mut rows = keys.chunks_exact(self.key).zip(read.chunks_exact(self.value));
                rows.try_for_each(|(key, value)| if used(value) { look(key, value) } else { Ok(()) })?;
            }
            if !more {
                break;
            }
            *from = *to;
        }
        Ok(())
    }

    /// The same row by row.
    fn walk<E>(&self, mut look: impl FnMut(&[u8], &[u8]) -> Result<(), E>) -> Result<(), E> {
        let mut key: Option<Vec<u8>> = None;
        // A walk begins anew where the row it stands on goes; twice as many steps as rows suffice for what there is.
        for _ in 0..2 * u64::from(self.rows) {
            key = self.next(key.as_deref());
            let Some(key) = &key else { break };
            let value = self.get(key).filter(|value| !self.array || value.iter().any(|byte| *byte != 0));
            if let Some(value) = value {
                look(key, &value)?;
            }
        }
        Ok(())
    }

    /// Reads rows on from a place, and where to go on; how many, and whether there may be more.
    fn many(
        &self,
        from: Option<&[u8; 4]>,
        to: &mut [u8; 4],
        keys: &mut [u8],
        values: &mut [u8],
    ) -> io::Result<(usize, bool)> {
        // An array goes on by its key, which is an index.
        let place = if self.array { self.key } else { to.len() };
        if place != to.len() || keys.len() < MANY as usize * self.key || values.len() < MANY as usize * self.value {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut elements = Elements {
            from: from.map_or(0, |from| from.as_ptr() as u64),
            to: to.as_mut_ptr() as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: MANY,
            map: self.map.fd().as_fd().as_raw_fd().cast_unsigned(),
            element_flags: 0,
            flags: 0,
        };
        // SAFETY: the kernel reads one place and writes another, each of four bytes, and at most `MANY` keys and values of the map's
        // sizes, for which there is room (looked at above). It keeps no pointer.
        let done = unsafe { libc::syscall(libc::SYS_bpf, LOOKUP_MANY, &raw mut elements, size_of::<Elements>()) };
        match if done < 0 { Some(io::Error::last_os_error()) } else { None } {
            None => Ok((elements.count as usize, true)),
            // These are the last.
            Some(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok((elements.count as usize, false)),
            Some(error) => Err(error),
        }
    }

    /// The key after this one, or the first. A key that is gone begins anew.
    fn next(&self, key: Option<&[u8]>) -> Option<Vec<u8>> {
        let mut next = vec![0; self.key];
        self.call(NEXT, key, &mut next, 0).ok().map(|()| next)
    }

    pub(super) fn get(&self, key: &[u8]) -> Option<Vec<u8>> {
        // The kernel fills whole words.
        let mut value = vec![0; self.value.next_multiple_of(8)];
        self.call(LOOKUP, Some(key), &mut value, 0).ok()?;
        value.truncate(self.value);
        Some(value)
    }

    pub(super) fn set(&self, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
        if value.len() != self.value {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.call(UPDATE, Some(key), &mut value.to_vec(), flags)
    }

    fn call(&self, command: c_int, key: Option<&[u8]>, value: &mut [u8], flags: u64) -> io::Result<()> {
        if key.is_some_and(|key| key.len() != self.key) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut element = Element {
            map: self.map.fd().as_fd().as_raw_fd().cast_unsigned(),
            pad: 0,
            key: key.map_or(0, |key| key.as_ptr() as u64),
            value: value.as_mut_ptr() as u64,
            flags,
        };
        // SAFETY: the kernel reads a key and reads or writes a value (or a key) of the map's sizes, and both slices are as long as the
        // map says or longer: keys are looked at above, values by the callers. It keeps no pointer.
        let done = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut element, size_of::<Element>()) };
        if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

/// Returns when every program that ran when it was called has ended: what has begun since is by the links of now. Without it (a kernel
/// that cannot say) some microseconds have to do.
pub(super) fn all_have_ended() {
    // `linux/membarrier.h`: MEMBARRIER_CMD_GLOBAL is one grace period of RCU, under which programs run.
    const GLOBAL: c_int = 1;
    // SAFETY: numbers alone.
    if unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) } < 0 {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}
