//! What is said on the standard output. A reader that has had enough (`| head`), a terminal that is gone and a full disk are no reason to
//! break off what is under way, as `println!` does.

use std::fmt;
use std::io::{self, ErrorKind, Write};

/// Says an answer; false where the reader has had enough.
///
/// # Errors
/// Where it cannot be written for another reason.
pub fn print(text: &[u8]) -> io::Result<bool> {
    write(&mut io::stdout().lock(), text)
}

/// Says a line of something that is done in any case: nobody has to hear it.
pub fn say(line: fmt::Arguments<'_>) {
    let _ = print(format!("{line}\n").as_bytes());
}

/// False where the reader has had enough.
pub(crate) fn write(to: &mut impl Write, text: &[u8]) -> io::Result<bool> {
    match to.write_all(text).and_then(|()| to.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes so much, and then ends like this.
    struct Ends(usize, ErrorKind);

    impl Write for Ends {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            match self.0.min(bytes.len()) {
                0 => Err(self.1.into()),
                taken => {
                    self.0 -= taken;
                    Ok(taken)
                }
            }
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_has_had_enough_is_no_error_and_a_full_disk_is() {
        let end = |room, kind| write(&mut Ends(room, kind), b"four").map_err(|error| error.kind());
        assert_eq!(end(4, ErrorKind::BrokenPipe), Ok(true));
        assert_eq!(end(3, ErrorKind::BrokenPipe), Ok(false));
        assert_eq!(end(3, ErrorKind::StorageFull), Err(ErrorKind::StorageFull));
    }
}
