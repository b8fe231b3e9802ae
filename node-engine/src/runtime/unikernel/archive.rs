//! What is in an image: a gzipped tar archive with a `kernel`, and optionally `initramfs.cpio`, `cmdline` (options before those that
//! we add), and the directories `files` and `files1`, which the guest may mount by 9p as `fs0` and `fs1`.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::{Component, Path};

use flate2::read::GzDecoder;

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
        if is_wanted(&path) {
            // Stays below `to` whatever its name and links say.
            entry.unpack_in(to).map_err(damaged)?;
        }
    }
    if to.join(KERNEL).is_file() {
        Ok(())
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, format!("the archive has no file `{KERNEL}`")))
    }
}

fn is_wanted(path: &Path) -> bool {
    let mut components = path.components().filter(|component| *component != Component::CurDir);
    let Some(Component::Normal(first)) = components.next() else { return false };
    let alone = components.next().is_none();
    let file = [KERNEL, INITRAMFS, COMMAND_LINE].iter().any(|name| first == *name) && alone;
    file || SHARED.iter().any(|(name, _)| first == *name)
}

/// Nothing of an archive leaves the directory, for the fuzzer. Such files are there only where it is one.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn understand(bytes: &[u8]) {
    // Where files cost little, and one directory a process.
    let base = Path::new("/dev/shm").join(format!("node-engine-fuzz-{}", std::process::id()));
    let (to, beside) = (base.join("to"), base.join("beside"));
    let made = std::fs::create_dir_all(&to).and_then(|()| std::fs::write(&beside, "b"));
    made.expect("a directory to unpack into");
    let _ = take_out(bytes, &to);
    let kept = std::fs::read(&beside);
    let names: Vec<_> =
        std::fs::read_dir(&base).expect("the directory").flatten().map(|entry| entry.file_name()).collect();
    let _ = std::fs::remove_dir_all(&base);
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
        std::fs::write(&archive, bytes).expect("write");
        let to = dir.path().join("to");
        std::fs::create_dir(&to).expect("a directory");
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
            assert_eq!(std::fs::read_to_string(to.join(name)).expect(name), text);
        }
        assert!(!to.join("etc").exists() && !dir.path().join("outside").exists());
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
