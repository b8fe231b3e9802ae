//! What was changed on this host and how to undo it: one line a change, on disk before the change is made.
//!
//! ```text
//! boot 5f0c…            the journal of an earlier boot describes a kernel that is gone
//! + link edge-bridge    this will be made: undo it
//! - link edge-bridge    it is gone again: nothing to undo
//! ```
//!
//! A kill between note and change leaves a note without a change, and undoing what is not there is a success. The words of a line
//! are separated by one space; a space, `%` or control character inside a word is written `%XX`. A line nobody can read is left out
//! with a warning: the rest still counts.

use std::fmt::{self, Write as _};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use tracing::warn;

use super::LinkError;

/// How to undo one change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Undo {
    DelLink {
        name: String,
    },
    DelAddress {
        link: String,
        address: IpAddr,
        prefix: u8,
    },
    DelRoute {
        link: String,
        destination: IpAddr,
        prefix: u8,
    },
    /// `path` is relative to `/proc/sys`. Restored only while it still has the value `ours`: who changed it since had a reason.
    RestoreSysctl {
        path: String,
        ours: String,
        old: String,
    },
    /// Our own table of this family.
    DelTable {
        family: Family,
    },
    /// Our marked rules in a chain of somebody else's.
    DelRules {
        family: Family,
        table: String,
        chain: String,
    },
}

/// nf_tables keeps separate tables for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Family {
    V4,
    V6,
    /// Whatever comes in by a device, before any protocol.
    Device,
}

impl Undo {
    /// Two notes of one change: only the first one's old value is the host's own.
    fn concerns_the_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::RestoreSysctl { path: a, .. }, Self::RestoreSysctl { path: b, .. }) => a == b,
            _ => self == other,
        }
    }
}

/// The notes of what is not undone yet, oldest first, and the file that holds them.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    boot: String,
    notes: Vec<Undo>,
    file: File,
    lines: usize,
    /// The last line may be half of one: what is written after it would be lost with it.
    torn: bool,
    /// Tests end the work here, as a kill would: after the note, before the change.
    #[cfg(test)]
    notes_until_stop: Option<usize>,
}

impl Journal {
    /// Reads the notes of an earlier run in this boot, and rewrites the file without what is settled.
    pub(super) fn open(run_dir: &Path) -> Result<Self, LinkError> {
        let path = run_dir.join("journal");
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned();
        let at = |error| failed(&path, &error);
        fs::create_dir_all(run_dir).map_err(at)?;
        let text = match fs::read(&path) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(at(error)),
        };
        let notes = parse(&text, &boot, &path);
        let file = write_anew(&path, &boot, &notes).map_err(at)?;
        let lines = notes.len();
        Ok(Self {
            path,
            boot,
            notes,
            file,
            lines,
            torn: false,
            #[cfg(test)]
            notes_until_stop: None,
        })
    }

    /// On disk when this returns. Noting what is noted already changes nothing.
    pub(super) fn note(&mut self, undo: Undo) -> Result<(), LinkError> {
        if self.notes.iter().any(|known| known.concerns_the_same(&undo)) {
            return Ok(());
        }
        self.append('+', &undo)?;
        self.notes.push(undo);
        #[cfg(test)]
        self.count_down()?;
        Ok(())
    }

    /// There is nothing to undo any more.
    pub(super) fn settle(&mut self, undo: &Undo) -> Result<(), LinkError> {
        let Some(index) = self.notes.iter().position(|known| known.concerns_the_same(undo)) else { return Ok(()) };
        self.append('-', undo)?;
        self.notes.remove(index);
        if self.lines > 4 * self.notes.len() + 256 {
            self.file = write_anew(&self.path, &self.boot, &self.notes).map_err(|error| failed(&self.path, &error))?;
            self.lines = self.notes.len();
        }
        Ok(())
    }

    pub(super) fn holds(&self, undo: &Undo) -> bool {
        self.notes.iter().any(|known| known.concerns_the_same(undo))
    }

    /// What is to be undone, in the order to do it: newest first.
    pub(super) fn to_undo(&self) -> Vec<Undo> {
        self.notes.iter().rev().cloned().collect()
    }

    /// Removes the file if nothing is left to undo; a later note writes it anew.
    pub(super) fn close(&mut self) -> Result<(), LinkError> {
        if !self.notes.is_empty() {
            return Ok(());
        }
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(&self.path, &error)),
            _ => Ok(()),
        }
    }

    /// From then on every note is refused.
    #[cfg(test)]
    pub(super) fn stop_after(&mut self, notes: usize) {
        self.notes_until_stop = Some(notes);
    }

    #[cfg(test)]
    fn count_down(&mut self) -> Result<(), LinkError> {
        match &mut self.notes_until_stop {
            None => Ok(()),
            Some(0 | 1) => Err(failed(&self.path, &io::Error::other("stopped by the test"))),
            Some(left) => {
                *left -= 1;
                Ok(())
            }
        }
    }

    fn append(&mut self, sign: char, undo: &Undo) -> Result<(), LinkError> {
        let write = |journal: &mut Self| {
            if journal.torn || !journal.path.exists() {
                journal.file = write_anew(&journal.path, &journal.boot, &journal.notes)?;
                journal.lines = journal.notes.len();
            }
            journal.torn = true;
            journal.file.write_all(format!("{sign} {undo}\n").as_bytes())?;
            journal.lines += 1;
            journal.file.sync_data()?;
            journal.torn = false;
            Ok(())
        };
        write(self).map_err(|error| failed(&self.path, &error))
    }
}

fn failed(path: &Path, error: &io::Error) -> LinkError {
    LinkError::Journal { path: path.to_owned(), reason: error.to_string() }
}

/// Old or new, never half: written beside it, then renamed.
fn write_anew(path: &Path, boot: &str, notes: &[Undo]) -> io::Result<File> {
    let beside = path.with_extension("new");
    let mut text = format!("boot {}\n", Word(boot));
    for note in notes {
        let _ = writeln!(text, "+ {note}");
    }
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).open(&beside)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    if let Some(directory) = path.parent() {
        File::open(directory)?.sync_all()?;
    }
    OpenOptions::new().append(true).open(path)
}

fn parse(text: &str, boot: &str, path: &Path) -> Vec<Undo> {
    let mut notes: Vec<Undo> = Vec::new();
    for (number, line) in text.lines().enumerate() {
        match parse_line(line) {
            Some(Line::Boot(id)) if id != boot => return Vec::new(),
            Some(Line::Boot(_)) => {}
            Some(Line::Note(undo)) if notes.iter().any(|known| known.concerns_the_same(&undo)) => {}
            Some(Line::Note(undo)) => notes.push(undo),
            Some(Line::Settled(undo)) => notes.retain(|known| !known.concerns_the_same(&undo)),
            None if line.is_empty() => {}
            None => {
                warn!(journal = %path.display(), line = number + 1, "left out a line of the journal that is not readable");
            }
        }
    }
    notes
}

enum Line {
    Boot(String),
    Note(Undo),
    Settled(Undo),
}

fn parse_line(line: &str) -> Option<Line> {
    let words: Vec<String> = line.split(' ').map(read_word).collect::<Option<_>>()?;
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["boot", id] => Some(Line::Boot((*id).to_owned())),
        ["+", undo @ ..] => parse_undo(undo).map(Line::Note),
        ["-", undo @ ..] => parse_undo(undo).map(Line::Settled),
        _ => None,
    }
}

fn parse_undo(words: &[&str]) -> Option<Undo> {
    Some(match *words {
        ["link", name] if !name.is_empty() => Undo::DelLink { name: name.to_owned() },
        ["address", link, address, prefix] => {
            Undo::DelAddress { link: link.to_owned(), address: address.parse().ok()?, prefix: prefix.parse().ok()? }
        }
        ["route", link, destination, prefix] => Undo::DelRoute {
            link: link.to_owned(),
            destination: destination.parse().ok()?,
            prefix: prefix.parse().ok()?,
        },
        // The file decides what root writes where: nothing outside the network's own settings.
        ["sysctl", path, ours, old] if path.starts_with("net/") && !path.split('/').any(|part| part == "..") => {
            Undo::RestoreSysctl { path: path.to_owned(), ours: ours.to_owned(), old: old.to_owned() }
        }
        ["table", family] => Undo::DelTable { family: Family::parse(family)? },
        ["rules", family, table, chain] => {
            Undo::DelRules { family: Family::parse(family)?, table: table.to_owned(), chain: chain.to_owned() }
        }
        _ => return None,
    })
}

impl Family {
    fn parse(word: &str) -> Option<Self> {
        match word {
            "ip" => Some(Self::V4),
            "ip6" => Some(Self::V6),
            "netdev" => Some(Self::Device),
            _ => None,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "ip",
            Self::V6 => "ip6",
            Self::Device => "netdev",
        })
    }
}

impl fmt::Display for Undo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DelLink { name } => write!(f, "link {}", Word(name)),
            Self::DelAddress { link, address, prefix } => write!(f, "address {} {address} {prefix}", Word(link)),
            Self::DelRoute { link, destination, prefix } => write!(f, "route {} {destination} {prefix}", Word(link)),
            Self::RestoreSysctl { path, ours, old } => {
                write!(f, "sysctl {} {} {}", Word(path), Word(ours), Word(old))
            }
            Self::DelTable { family } => write!(f, "table {family}"),
            Self::DelRules { family, table, chain } => write!(f, "rules {family} {} {}", Word(table), Word(chain)),
        }
    }
}

/// A word of a line, whatever is in it.
struct Word<'a>(&'a str);

impl fmt::Display for Word<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for byte in self.0.bytes() {
            if byte <= b' ' || byte == b'%' || byte >= 0x7f {
                write!(f, "%{byte:02X}")?;
            } else {
                f.write_char(char::from(byte))?;
            }
        }
        Ok(())
    }
}

fn read_word(word: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
            bytes.push(digit(rest.next()?)? << 4 | digit(rest.next()?)?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

/// What is understood of a journal is understood again from what is written of it, and names no setting but the network's, for the
/// fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn round_trip(text: &str) {
    let path = Path::new("journal");
    let notes = parse(text, "boot", path);
    let written: String = notes.iter().map(|note| format!("+ {note}\n")).collect();
    assert_eq!(parse(&written, "boot", path), notes);
    for note in &notes {
        if let Undo::RestoreSysctl { path, .. } = note {
            let inside = Path::new(path).components().all(|part| matches!(part, std::path::Component::Normal(_)));
            assert!(path.starts_with("net/") && inside, "{path:?} is written to below /proc/sys");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str) -> Undo {
        Undo::DelLink { name: name.into() }
    }

    fn every_kind() -> Vec<Undo> {
        vec![
            link("edge-bridge"),
            Undo::DelAddress { link: "edge tun%".into(), address: "fcef::dead:beef".parse().unwrap(), prefix: 128 },
            Undo::DelRoute { link: "edge-tun".into(), destination: "10.30.0.0".parse().unwrap(), prefix: 16 },
            Undo::RestoreSysctl { path: "net/ipv4/ip_forward".into(), ours: "1".into(), old: "0".into() },
            Undo::RestoreSysctl { path: "net/ipv4/ping_group_range".into(), ours: "*".into(), old: "1\t0".into() },
            Undo::DelTable { family: Family::V6 },
            Undo::DelRules { family: Family::V4, table: "filter".into(), chain: "DOCKER-USER".into() },
        ]
    }

    #[test]
    fn a_journal_reads_what_it_wrote() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path()).unwrap();
        for undo in every_kind() {
            journal.note(undo).unwrap();
        }
        let mut newest_first = every_kind();
        newest_first.reverse();
        assert_eq!(Journal::open(dir.path()).unwrap().to_undo(), newest_first);
    }

    #[test]
    fn what_is_settled_is_not_undone() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path()).unwrap();
        journal.note(link("a")).unwrap();
        journal.note(link("b")).unwrap();
        journal.note(link("a")).unwrap();
        journal.settle(&link("a")).unwrap();
        journal.settle(&link("never noted")).unwrap();
        assert_eq!(Journal::open(dir.path()).unwrap().to_undo(), [link("b")]);
        assert!(!journal.holds(&link("a")) && journal.holds(&link("b")));

        journal.close().unwrap();
        assert!(dir.path().join("journal").exists(), "a note is left");
        journal.settle(&link("b")).unwrap();
        journal.close().unwrap();
        assert!(!dir.path().join("journal").exists());
        journal.note(link("c")).unwrap();
        assert_eq!(Journal::open(dir.path()).unwrap().to_undo(), [link("c")]);
    }

    #[test]
    fn the_first_old_value_of_a_sysctl_is_the_one_that_counts() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path()).unwrap();
        let note = |ours: &str, old: &str| Undo::RestoreSysctl {
            path: "net/ipv4/ip_forward".into(),
            ours: ours.into(),
            old: old.into(),
        };
        journal.note(note("1", "0")).unwrap();
        journal.note(note("1", "1")).unwrap();
        assert_eq!(Journal::open(dir.path()).unwrap().to_undo(), [note("1", "0")]);
    }

    /// As a full disk leaves it.
    #[test]
    fn half_a_line_takes_no_other_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path()).unwrap();
        journal.note(link("a")).unwrap();
        fs::OpenOptions::new().append(true).open(dir.path().join("journal")).unwrap().write_all(b"+ li").unwrap();
        let whole = std::mem::replace(&mut journal.file, File::open("/dev/full").unwrap());
        journal.note(link("b")).unwrap_err();
        drop(whole);
        journal.note(link("c")).unwrap();
        assert_eq!(Journal::open(dir.path()).unwrap().to_undo(), [link("c"), link("a")]);
    }

    #[test]
    fn unreadable_lines_are_left_out() {
        let good = "+ link good\n";
        for bad in [
            "+ link\n",
            "+ link a b\n",
            "link a\n",
            "* link a\n",
            "+ address tun 10.0.0.256 32\n",
            "+ route tun 10.0.0.0 256\n",
            "+ sysctl kernel/core_pattern 1 0\n",
            "+ sysctl net/../kernel/core_pattern 1 0\n",
            "+ table inet\n",
            "+ link a%4\n",
            "+ link a%ff\n",
            "\u{fffd}\u{0}\n",
            "+ lin",
        ] {
            assert_eq!(parse(&format!("{good}{bad}"), "b", Path::new("j")), [link("good")], "{bad:?}");
        }
    }

    #[test]
    fn a_torn_last_line_does_not_spoil_the_next_note() {
        let dir = tempfile::tempdir().unwrap();
        Journal::open(dir.path()).unwrap().note(link("a")).unwrap();
        let path = dir.path().join("journal");
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, format!("{text}+ link torn-of").trim_end_matches("of")).unwrap();
        // The torn line still reads as a link; undoing a link that is not there is a success.
        Journal::open(dir.path()).unwrap().note(link("b")).unwrap();
        assert_eq!(Journal::open(dir.path()).unwrap().to_undo(), [link("b"), link("torn-"), link("a")]);
    }

    #[test]
    fn an_earlier_boot_leaves_nothing_to_undo() {
        assert_eq!(parse("boot old\n+ link a\n", "new", Path::new("j")), []);
        assert_eq!(parse("boot same\n+ link a\n", "same", Path::new("j")), [link("a")]);
    }

    #[test]
    fn a_long_life_does_not_grow_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(dir.path()).unwrap();
        journal.note(link("stays")).unwrap();
        for number in 0..1000 {
            journal.note(link(&format!("ne{number}"))).unwrap();
            journal.settle(&link(&format!("ne{number}"))).unwrap();
        }
        let lines = fs::read_to_string(dir.path().join("journal")).unwrap().lines().count();
        assert!(lines <= 264, "{lines} lines");
        assert_eq!(Journal::open(dir.path()).unwrap().to_undo(), [link("stays")]);
    }
}
