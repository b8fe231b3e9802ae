//! Netlink attributes: written one after another, read one after another. Lengths and types are in the machine's order; nf_tables
//! wants the numbers inside in network order, except data that is compared with what the kernel loads into a register.

/// Length and type.
const HEADER: usize = 4;
const NESTED: u16 = 0x8000;
const TYPE_MASK: u16 = 0x3fff;

/// Writes attributes into a message.
#[derive(Debug, Default)]
pub(super) struct Writer {
    pub(super) bytes: Vec<u8>,
}

impl Writer {
    pub(super) fn put(&mut self, kind: u16, value: &[u8]) {
        let start = self.bytes.len();
        self.bytes.extend([0, 0]);
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value);
        self.close(start);
    }

    /// A text with its terminating zero.
    pub(super) fn text(&mut self, kind: u16, value: &str) {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.put(kind, &bytes);
    }

    pub(super) fn be32(&mut self, kind: u16, value: u32) {
        self.put(kind, &value.to_be_bytes());
    }

    pub(super) fn be64(&mut self, kind: u16, value: u64) {
        self.put(kind, &value.to_be_bytes());
    }

    pub(super) fn nest(&mut self, kind: u16, inside: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend([0, 0]);
        self.bytes.extend((kind | NESTED).to_ne_bytes());
        inside(self);
        self.close(start);
    }

    /// Fills in the length and aligns what follows.
    fn close(&mut self, start: usize) {
        let length = self.bytes.len() - start;
        let length = u16::try_from(length).expect("no rule of ours comes near 64 KiB");
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

/// The attributes in these bytes; ends at the first that does not fit.
pub(super) fn read(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(bytes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(bytes.get(2..4)?.try_into().ok()?) & TYPE_MASK;
        let value = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The first attribute of this type.
pub(super) fn find(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    read(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

pub(super) fn as_text(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

pub(super) fn as_be32(value: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(value.get(..4)?.try_into().ok()?))
}

pub(super) fn as_be64(value: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(value.get(..8)?.try_into().ok()?))
}

/// Attributes and those in them, for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn understand(bytes: &[u8], depth: u8) {
    for (_, value) in read(bytes) {
        assert!(value.len() < bytes.len(), "an attribute is shorter than what holds it");
        let _ = (as_text(value), as_be32(value), as_be64(value));
        if depth > 0 {
            understand(value, depth - 1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_read_what_they_write() {
        let mut writer = Writer::default();
        writer.text(1, "abc");
        writer.nest(2, |inner| {
            inner.be32(1, 7);
            inner.be64(2, 9);
            inner.put(3, &[1]);
        });
        let all: Vec<_> = read(&writer.bytes).collect();
        assert_eq!(all.len(), 2);
        assert_eq!(as_text(all[0].1), "abc");
        let inner = find(&writer.bytes, 2).unwrap();
        assert_eq!(find(inner, 1).and_then(as_be32), Some(7));
        assert_eq!(find(inner, 2).and_then(as_be64), Some(9));
        assert_eq!(find(inner, 3), Some(&[1][..]));
        assert_eq!(find(inner, 4), None);
    }

    #[test]
    fn broken_attributes_end_the_reading() {
        for bytes in [&[][..], &[1], &[0, 0, 0, 0], &[3, 0, 1, 0], &[9, 0, 1, 0, 1], &[255, 255, 255, 255, 0]] {
            assert_eq!(read(bytes).count(), 0, "{bytes:?}");
        }
    }
}
