//! What is in an image: a gzipped tar archive with a `kernel`, and optionally `initramfs.cpio`, `cmdline` (options before those that
//! we add), and the directories `files` and `files1`, which the guest may mount by 9p as `fs0` and `fs1`.

use std::fs::{self, File, Metadata};
use std::io::{self, BufReader, Read};
use std::path::{Component, Path};

use flate2::read::GzDecoder;
use tar::EntryType;

pub(super) const KERNEL: &str = "kernel";
pub(super) const INITRAMFS: &str = "initramfs.cpio";
pub(super) const COMMAND_LINE: &str = "cmdline";
/// Directories, and the tags under which the guest mounts them.
pub(super) const SHARED: [(&str, &str); 2] = [("files", "fs0"), ("files1", "fs1")];

/// All that is unpacked of one archive.
const LARGEST: u64 = 4 << 30;

/// Unpacks what we know into the directory and nothing else.
///
/// # Errors
/// If it is no such archive, has no kernel, or is larger than we take.
pub(super) fn unpack(archive: &Path, to: &Path) -> io::Result<()> {
    let file = BufReader::new(File::open(archive)?);
    take_out(GzDecoder::new(file).take(LARGEST), to)
}

fn take_out(tar: impl Read, to: &Path) -> io::Result<()> {
    let mut tar = tar::Archive::new(tar);
    let damaged = |error: io::Error| {
        let gzip = "it is not a gzipped tar archive, or it is damaged or larger than 4 GiB unpacked";
        io::Error::new(error.kind(), format!("{gzip}: {error}"))
    };
    for entry in tar.entries().map_err(damaged)? {
        let mut entry = entry.map_err(damaged)?;
        let path = entry.path().map_err(damaged)?.into_owned();
        let Some((name, part)) = wanted(&path) else { continue };
        let kind = entry.header().entry_type();
        match part {
            Part::File if !matches!(kind, EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse) => {
                return Err(part.otherwise(name));
            }
            Part::Directory if !kind.is_dir() => return Err(part.otherwise(name)),
            Part::File | Part::Directory | Part::Below => {}
        }
        // Stays below `to` whatever its name and links say.
        entry.unpack_in(to).map_err(damaged)?;
    }
    if file(to, KERNEL)? {
        Ok(())
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, format!("the archive has no file `{KERNEL}`")))
    }
}

/// What a name in the archive stands for. QEMU runs as root and opens what we name: over a link it would reach any file of the node.
/// In a directory that it shares it follows none, so that links below are the guest's own.
#[derive(Clone, Copy, Debug)]
enum Part {
    File,
    Directory,
    /// Anything in a shared directory.
    Below,
}

impl Part {
    fn otherwise(self, name: &str) -> io::Error {
        let kind = if matches!(self, Self::File) { "regular file" } else { "directory" };
        io::Error::new(io::ErrorKind::InvalidData, format!("`{name}` of the archive is not a {kind}"))
    }
}

fn wanted(path: &Path) -> Option<(&'static str, Part)> {
    let mut components = path.components().filter(|component| *component != Component::CurDir);
    let Some(Component::Normal(first)) = components.next() else { return None };
    let alone = components.next().is_none();
    if let Some((name, _)) = SHARED.into_iter().find(|(name, _)| first == *name) {
        return Some((name, if alone { Part::Directory } else { Part::Below }));
    }
    let file = [KERNEL, INITRAMFS, COMMAND_LINE].into_iter().find(|name| first == *name);
    file.filter(|_| alone).map(|name| (name, Part::File))
}

/// Whether the image has this file; never one that a link leads to.
pub(super) fn file(directory: &Path, name: &str) -> io::Result<bool> {
    is_there(directory, name, Part::File, Metadata::is_file)
}

/// Whether the image has this directory; never one that a link leads to.
pub(super) fn shared(directory: &Path, name: &str) -> io::Result<bool> {
    is_there(directory, name, Part::Directory, Metadata::is_dir)
}

fn is_there(directory: &Path, name: &str, part: Part, right: fn(&Metadata) -> bool) -> io::Result<bool> {
    match fs::symlink_metadata(directory.join(name)) {
        Ok(found) if right(&found) => Ok(true),
        Ok(_) => Err(part.otherwise(name)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Nothing of an archive leaves the directory, for the fuzzer. Such files are there only where it is one.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn understand(bytes: &[u8]) {
    // Where files cost little, and one directory a process.
    let base = Path::new("/dev/shm").join(format!("node-engine-fuzz-{}", std::process::id()));
    let (to, beside) = (base.join("to"), base.join("beside"));
    let made = fs::create_dir_all(&to).and_then(|()| fs::write(&beside, "b"));
    made.expect("a directory to unpack into");
    let _ = take_out(bytes, &to);
    let kept = fs::read(&beside);
    let names: Vec<_> = fs::read_dir(&base).expect("the directory").flatten().map(|entry| entry.file_name()).collect();
    let _ = fs::remove_dir_all(&base);
    assert!(kept.is_ok_and(|kept| kept == b"b") && names.len() == 2, "{names:?}: something has left the directory");
}

/// An archive, for a fuzzer to begin with.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn sample() -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, text) in [("kernel", "k"), ("files/a", "f")] {
        let mut header = tar::Header::new_ustar();
        header.set_size(1);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, text.as_bytes()).expect("it fits into memory");
    }
    let mut link = tar::Header::new_ustar();
    link.set_entry_type(tar::EntryType::Symlink);
    link.set_size(0);
    tar.append_link(&mut link, "files/b", "a").expect("it fits into memory");
    tar.into_inner().expect("it fits into memory")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// An archive of a kernel and one entry of this kind.
    fn with(kind: EntryType, name: &str, link: &str) -> Vec<u8> {
        let gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        let mut tar = tar::Builder::new(gzip);
        let header = |kind, size| {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_mode(0o755);
            header.set_size(size);
            header
        };
        tar.append_data(&mut header(EntryType::Regular, 1), "kernel", &b"k"[..]).expect("append");
        match link {
            "" => tar.append_data(&mut header(kind, 0), name, &b""[..]).expect("append"),
            _ => tar.append_link(&mut header(kind, 0), name, link).expect("append"),
        }
        tar.into_inner().expect("a tar").finish().expect("a gzip")
    }

    /// An archive of these files.
    pub(in crate::runtime::unikernel) fn packed(files: &[(&str, &str)]) -> Vec<u8> {
        let gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        let mut tar = tar::Builder::new(gzip);
        for (name, text) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(text.len() as u64);
            header.set_mode(0o644);
            // Names that a well-behaved writer refuses.
            header.as_gnu_mut().expect("gnu").name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_cksum();
            tar.append(&header, text.as_bytes()).expect("append");
        }
        tar.into_inner().expect("a tar").finish().expect("a gzip")
    }

    fn unpacked(bytes: &[u8]) -> (tempfile::TempDir, io::Result<()>) {
        let dir = tempfile::tempdir().expect("a directory");
        let archive = dir.path().join("archive");
        fs::write(&archive, bytes).expect("write");
        let to = dir.path().join("to");
        fs::create_dir(&to).expect("a directory");
        let result = unpack(&archive, &to);
        (dir, result)
    }

    #[test]
    fn what_is_known_is_unpacked_and_nothing_leaves_the_directory() {
        let archive = packed(&[
            ("./kernel", "k"),
            ("initramfs.cpio", "i"),
            ("files/a/b", "f"),
            ("etc/passwd", "no"),
            ("../outside", "no"),
            ("files/../../outside", "no"),
        ]);
        let (dir, result) = unpacked(&archive);
        result.expect("unpacked");
        let to = dir.path().join("to");
        for (name, text) in [("kernel", "k"), ("initramfs.cpio", "i"), ("files/a/b", "f")] {
            assert_eq!(fs::read_to_string(to.join(name)).expect(name), text);
        }
        assert!(!to.join("etc").exists() && !dir.path().join("outside").exists());
    }

    #[test]
    fn what_qemu_opens_is_no_link_and_no_device() {
        use EntryType::{Char, Directory, Fifo, Link, Regular, Symlink};
        for (kind, name, link, reason) in [
            (Symlink, "files", "/", "`files` of the archive is not a directory"),
            (Symlink, "./files1/", "..", "`files1` of the archive is not a directory"),
            (Regular, "files", "", "`files` of the archive is not a directory"),
            (Symlink, "initramfs.cpio", "/etc/shadow", "`initramfs.cpio` of the archive is not a regular file"),
            (Symlink, "cmdline", "/dev/zero", "`cmdline` of the archive is not a regular file"),
            (Link, "cmdline", "kernel", "`cmdline` of the archive is not a regular file"),
            (Symlink, "kernel", "files/k", "`kernel` of the archive is not a regular file"),
            (Directory, "kernel", "", "`kernel` of the archive is not a regular file"),
            (Char, "cmdline", "", "`cmdline` of the archive is not a regular file"),
            (Fifo, "initramfs.cpio", "", "`initramfs.cpio` of the archive is not a regular file"),
        ] {
            let (dir, result) = unpacked(&with(kind, name, link));
            assert_eq!(result.expect_err(name).to_string(), reason);
            let there = fs::symlink_metadata(dir.path().join("to").join(name));
            assert!(name == "kernel" || there.is_err(), "{name} was unpacked");
        }
        // A guest's own, which it resolves itself.
        let (dir, result) = unpacked(&with(Symlink, "files/etc", "/etc"));
        result.expect("unpacked");
        assert!(dir.path().join("to/files/etc").is_symlink());
        assert!(shared(&dir.path().join("to"), "files").expect("a directory"));
    }

    #[test]
    fn what_is_no_image_says_why() {
        for (bytes, reason) in
            [(packed(&[("initramfs.cpio", "i")]), "has no file `kernel`"), (b"nonsense".to_vec(), "not a gzipped tar")]
        {
            let (_dir, result) = unpacked(&bytes);
            let error = result.expect_err(reason).to_string();
            assert!(error.contains(reason), "{error}");
        }
        let mut cut = packed(&[("kernel", &"k".repeat(5000))]);
        cut.truncate(cut.len() - 20);
        assert!(unpacked(&cut).1.is_err(), "a half archive is none");
    }
}
