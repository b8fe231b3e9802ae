//! Rows as the bytes that they are in memory: how they lie in a file. The one place of the datapath that looks at them so.

use aya::Pod;

/// The row's bytes.
pub(super) fn bytes<T: Pod>(row: &T) -> &[u8] {
    // SAFETY: Pod says that the type is plain data; those of the law have no padding (their sizes are asserted there), so that each of
    // the bytes is initialised. The slice lives no longer than the row.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(row).cast(), size_of::<T>()) }
}

/// The row that these bytes are. `None` where they are of another length.
pub(super) fn row<T: Pod>(bytes: &[u8]) -> Option<T> {
    // SAFETY: as long as the type, whose every pattern of bytes is a value (Pod); read without alignment.
    (bytes.len() == size_of::<T>()).then(|| unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}
