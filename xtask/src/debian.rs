//! Debian's archive seen through lists of our own: other architectures and other releases, with nothing changed in this machine's
//! apt or dpkg. What is taken from it is unpacked into the cache, never installed.
//!
//! ```text
//! <cache>/debian/<architecture>/sources.list     this machine's archive, every release
//!                              /lists/           what it holds
//!                              /unpacked/<package>_<version>/
//! ```

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};

use crate::cache;
use crate::process::{output, run, which};

/// Releases that may be looked at, oldest first; those that the archive no longer has are passed over.
const RELEASES: [&str; 6] = ["bullseye", "bookworm", "bookworm-backports", "trixie", "trixie-backports", "sid"];
/// Lists older than this are fetched again.
const FRESH: Duration = Duration::from_secs(7 * 24 * 3600);

/// The archive for one architecture.
#[derive(Debug)]
pub(crate) struct Archive {
    architecture: &'static str,
    directory: PathBuf,
}

/// A package in one version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) version: String,
}

impl Archive {
    /// Opens the archive, with lists that are no older than a week.
    pub(crate) fn open(architecture: &'static str) -> Result<Self> {
        if which("apt-get").is_none() || which("dpkg-deb").is_none() {
            bail!("this machine has no apt: packages of Debian for {architecture} cannot be had");
        }
        let archive = Self { architecture, directory: cache::directory("debian")?.join(architecture) };
        for directory in ["lists/partial", "cache", "unpacked"] {
            fs::create_dir_all(archive.directory.join(directory)).context("cannot make the archive's cache")?;
        }
        let sources = sources()?;
        let list = archive.directory.join("sources.list");
        let stamp = archive.directory.join("lists/fetched");
        let known = fs::read_to_string(&list).is_ok_and(|known| known == sources);
        if !known || age(&stamp).is_none_or(|age| age > FRESH) {
            fs::write(&list, sources).with_context(|| format!("cannot write {}", list.display()))?;
            println!("fetching lists of Debian's packages for {architecture}");
            // A release that has gone from the archive is an error to apt, and the others' lists are good all the same.
            if let Err(error) = output(archive.apt("apt-get").arg("update")) {
                eprintln!("not every list is there: {}", last_line(&format!("{error:#}")));
            }
            fs::write(&stamp, "").context("cannot note that lists were fetched")?;
        }
        Ok(archive)
    }

    /// The versions of a package, newest first.
    pub(crate) fn versions(&self, name: &str) -> Result<Vec<Package>> {
        self.versions_of(&[name.to_owned()])
    }

    /// The versions of all these packages, asked for at once: apt reads its lists anew each time.
    pub(crate) fn versions_of(&self, names: &[String]) -> Result<Vec<Package>> {
        let table = output(self.apt("apt-cache").arg("madison").args(names))?;
        Ok(table.lines().filter_map(madison).collect())
    }

    /// Names of packages, by a regular expression.
    pub(crate) fn names(&self, pattern: &str) -> Result<Vec<String>> {
        let found = output(self.apt("apt-cache").args(["search", "--names-only", pattern]))?;
        Ok(found.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned).collect())
    }

    /// What the package holds, fetched and unpacked unless it is there. apt checks it against the archive's signature.
    pub(crate) fn unpacked(&self, package: &Package) -> Result<PathBuf> {
        let Package { name, version } = package;
        let directory = self.directory.join("unpacked").join(format!("{name}_{}", version.replace(':', "%3a")));
        if directory.is_dir() {
            return Ok(directory);
        }
        let fresh = directory.with_file_name(format!(".{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&fresh);
        fs::create_dir_all(&fresh).with_context(|| format!("cannot make {}", fresh.display()))?;
        run(self.apt("apt-get").current_dir(&fresh).args(["-q", "download", &format!("{name}={version}")]))?;
        let archives = fs::read_dir(&fresh)?.flatten().map(|entry| entry.path());
        let archive = archives.filter(|path| path.extension().is_some_and(|extension| extension == "deb")).last();
        let archive = archive.with_context(|| format!("apt-get has not brought {name}"))?;
        run(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&fresh))?;
        fs::remove_file(&archive).context("cannot remove an unpacked archive")?;
        // Whole or not at all: what was killed half way is not taken for a package.
        fs::rename(&fresh, &directory).with_context(|| format!("cannot make {}", directory.display()))?;
        Ok(directory)
    }

    fn apt(&self, program: &str) -> Command {
        let at = |name: &str| self.directory.join(name).display().to_string();
        let mut command = Command::new(program);
        command.env("LC_ALL", "C").env("DEBIAN_FRONTEND", "noninteractive");
        for option in [
            format!("APT::Architecture={}", self.architecture),
            format!("APT::Architectures::={}", self.architecture),
            format!("Dir::Etc::SourceList={}", at("sources.list")),
            "Dir::Etc::SourceParts=/dev/null".to_owned(),
            format!("Dir::State::Lists={}", at("lists")),
            format!("Dir::Cache={}", at("cache")),
            "Dir::State::Status=/dev/null".to_owned(),
            // apt's own user may not read a cache in somebody's home.
            "APT::Sandbox::User=root".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command
    }
}

/// Source lines for every release, from where this machine gets its own.
fn sources() -> Result<String> {
    let (address, options) = own_archive(Path::new("/etc/apt")).context("no Debian archive in /etc/apt")?;
    Ok(RELEASES.map(|release| format!("deb {options}{address} {release} main\n")).concat())
}

/// Address and options of the first source that is Debian's main archive.
fn own_archive(apt: &Path) -> Option<(String, String)> {
    let mut files = vec![apt.join("sources.list")];
    let parts = fs::read_dir(apt.join("sources.list.d")).into_iter().flatten().flatten().map(|entry| entry.path());
    files.extend(parts);
    files.sort();
    files
        .iter()
        .filter_map(|file| fs::read_to_string(file).ok())
        .find_map(|text| one_line(&text).or_else(|| stanza(&text)))
}

/// `deb [signed-by=…] ADDRESS bookworm main`
fn one_line(text: &str) -> Option<(String, String)> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim_start();
        let (options, rest) = match rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((options, rest)) => (key(options), rest),
            None => (String::new(), rest),
        };
        let mut words = rest.split_whitespace();
        let (address, release) = (words.next()?, words.next()?);
        (RELEASES.contains(&release) && words.any(|word| word == "main")).then(|| (address.to_owned(), options))
    })
}

/// Of the options only by whose key the archive signs: the others are about this machine.
fn key(options: &str) -> String {
    let key = options.split_whitespace().find(|option| option.starts_with("signed-by="));
    key.map_or_else(String::new, |key| format!("[{key}] "))
}

/// The same as a paragraph of fields.
fn stanza(text: &str) -> Option<(String, String)> {
    text.split("\n\n").find_map(|paragraph| {
        let field = |name: &str| paragraph.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let suites = field("Suites:")?;
        let ours = suites.split_whitespace().any(|suite| RELEASES.contains(&suite));
        if !ours || !field("Components:")?.split_whitespace().any(|component| component == "main") {
            return None;
        }
        let address = field("URIs:")?.split_whitespace().next()?.to_owned();
        Some((address, field("Signed-By:").map_or_else(String::new, |key| format!("[signed-by={key}] "))))
    })
}

/// `package | version | source`
fn madison(line: &str) -> Option<Package> {
    let mut columns = line.split('|').map(str::trim);
    let (name, version, source) = (columns.next()?, columns.next()?, columns.next()?);
    (!source.ends_with("Sources")).then(|| Package { name: name.to_owned(), version: version.to_owned() })
}

fn age(path: &Path) -> Option<Duration> {
    SystemTime::now().duration_since(fs::metadata(path).ok()?.modified().ok()?).ok()
}

fn last_line(text: &str) -> &str {
    text.trim().lines().last().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_own_archive_is_found_in_either_form() {
        let line = "# deb http://old.example bookworm main\ndeb [signed-by=/k arch=amd64] http://a.example/debian bookworm main\n";
        let paragraphs = "Types: deb\nURIs: http://vendor.example\nSuites: stable\nComponents: main\n\n\
                          Types: deb\nURIs: http://b.example/debian\nSuites: bookworm bookworm-updates\nComponents: main\n\
                          Signed-By: /key.gpg\n";
        let found = |address: &str, options: &str| Some((address.to_owned(), options.to_owned()));
        assert_eq!(one_line(line), found("http://a.example/debian", "[signed-by=/k] "));
        assert_eq!(stanza(paragraphs), found("http://b.example/debian", "[signed-by=/key.gpg] "));
        for foreign in ["deb http://vendor.example stable main", "deb http://v.example bookworm contrib", "", "deb"] {
            assert_eq!(one_line(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn versions_are_read_from_apts_table() {
        let line = " linux-image-armmp | 6.12.117-1 | http://a.example/debian trixie/main armhf Packages";
        let package = Package { name: "linux-image-armmp".into(), version: "6.12.117-1".into() };
        assert_eq!(madison(line), Some(package));
        assert_eq!(madison("linux | 6.12.117-1 | http://a.example/debian trixie/main Sources"), None);
        assert_eq!(madison("nothing"), None);
    }
}
