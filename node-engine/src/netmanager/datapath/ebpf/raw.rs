//! Maps whose rows are bytes: of a layout that only a description tells. Four commands of bpf(2) that aya has for types alone.

use std::ffi::c_int;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use aya::maps::{MapData, MapType};

/// `linux/bpf.h`
const LOOKUP: c_int = 1;
const UPDATE: c_int = 2;
const NEXT: c_int = 4;
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

    /// The key after this one, or the first. A key that is gone begins anew.
    pub(super) fn next(&self, key: Option<&[u8]>) -> Option<Vec<u8>> {
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
