//! What one process of this binary tells another by a file: records of `name=value`, each ended by a NUL.

use std::fs;
use std::io;
use std::path::Path;

use super::place::write_private;

#[derive(Debug, Default)]
pub(in crate::runtime) struct Records(String);

impl Records {
    pub(in crate::runtime) fn put(&mut self, name: &str, value: &str) {
        self.0.push_str(name);
        self.0.push('=');
        self.0.push_str(value);
        self.0.push('\0');
    }

    /// Others may not read them: an environment may hold secrets.
    pub(in crate::runtime) fn write(&self, path: &Path) -> io::Result<()> {
        write_private(path, self.0.as_bytes())
    }

    /// Hands over each record's name and value.
    ///
    /// # Errors
    /// Where the file cannot be read, or what takes a record does not know it.
    pub(in crate::runtime) fn read(path: &Path, take: impl FnMut(&str, &str) -> Option<()>) -> io::Result<()> {
        Self::parse(&fs::read_to_string(path)?, take)
            .map_err(|record| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {record:?}", path.display())))
    }

    /// # Errors
    /// The record that is none, or that is not known.
    pub(in crate::runtime) fn parse(text: &str, mut take: impl FnMut(&str, &str) -> Option<()>) -> Result<(), &str> {
        for record in text.split_terminator('\0') {
            record.split_once('=').and_then(|(name, value)| take(name, value)).ok_or(record)?;
        }
        Ok(())
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub(in crate::runtime) fn text(&self) -> &str {
        &self.0
    }
}
