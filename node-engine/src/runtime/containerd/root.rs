//! A prepared root file system, looked into before it is mounted: an OCI runtime knows users by number alone, and names are the image's.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};

use super::api::snapshots::Mount;
use crate::runtime::user::Accounts;

/// Of a file of accounts; the rest of a longer one is not read.
const LONGEST: u64 = 1 << 20;

/// The accounts that the image brings.
pub(super) fn accounts(mounts: &[Mount]) -> Accounts {
    let layers = layers(mounts);
    let read = |path: &str| {
        read(&layers, Path::new(path)).unwrap_or_else(|error| {
            tracing::debug!(path, %error, "accounts of an image cannot be read");
            String::new()
        })
    };
    let (passwd, groups) = (read("etc/passwd"), read("etc/group"));
    Accounts { passwd, groups, place: "in the image", lone_group: Some(0) }
}

/// The directories that lie over each other, the uppermost first.
fn layers(mounts: &[Mount]) -> Vec<PathBuf> {
    let of = |mount: &Mount| -> Vec<PathBuf> {
        if mount.kind != "overlay" {
            return vec![mount.source.clone().into()];
        }
        let option = |name: &str| mount.options.iter().find_map(|option| option.strip_prefix(name)).unwrap_or_default();
        let lower = option("lowerdir=").split(':');
        std::iter::once(option("upperdir=")).chain(lower).filter(|path| !path.is_empty()).map(PathBuf::from).collect()
    };
    mounts.last().map(of).unwrap_or_default()
}

/// Links lead nowhere outside of their layer. Of a file that no layer has, nothing.
fn read(layers: &[PathBuf], path: &Path) -> io::Result<String> {
    let inside = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    for layer in layers {
        let file = match openat2(File::open(layer)?, path, inside) {
            Ok(file) => File::from(file),
            Err(Errno::ENOENT) => continue,
            // A device without a driver is how an overlay says that a lower layer's file was removed.
            Err(Errno::ENXIO) => break,
            Err(error) => return Err(error.into()),
        };
        if !file.metadata()?.is_file() {
            break;
        }
        let mut bytes = Vec::new();
        file.take(LONGEST).read_to_end(&mut bytes)?;
        return Ok(String::from_utf8_lossy(&bytes).into_owned());
    }
    Ok(String::new())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_uppermost_file_counts_and_links_stay_inside() {
        let dir = tempfile::tempdir().expect("a directory");
        let at = |path: &str| dir.path().join(path);
        for layer in ["upper", "low/etc", "lowest/etc", "odd"] {
            fs::create_dir_all(at(layer)).expect("a layer");
        }
        fs::write(at("low/etc/passwd"), "web:x:7:8::/:\n").expect("write");
        fs::write(at("lowest/etc/passwd"), "web:x:1:1::/:\n").expect("write");
        fs::write(at("lowest/etc/group"), "www:x:33:web\n").expect("write");
        // Were it followed outside, it would lead to a directory with accounts.
        symlink(at("lowest/etc"), at("odd/etc")).expect("a link");
        let option = |name: &str, paths: &[&str]| {
            let paths: Vec<_> = paths.iter().map(|path| at(path).display().to_string()).collect();
            format!("{name}={}", paths.join(":"))
        };
        let overlay = |lower: &[&str]| Mount {
            kind: "overlay".into(),
            options: vec!["index=off".into(), option("upperdir", &["upper"]), option("lowerdir", lower)],
            ..Mount::default()
        };
        let found = accounts(&[overlay(&["low", "lowest"])]);
        assert_eq!(found.resolve("web:www"), Ok((7, 33)));
        assert!(accounts(&[overlay(&["odd"])]).resolve("web").is_err());
        let bind = Mount { kind: "bind".into(), source: at("low").display().to_string(), ..Mount::default() };
        assert_eq!(accounts(&[bind]).resolve("web"), Ok((7, 8)));
        assert_eq!(accounts(&[]).resolve("77"), Ok((77, 0)));
    }
}
