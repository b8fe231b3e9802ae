//! Embeds the eBPF object. Where there is none, because the machine has no BPF toolchain or `cargo xtask build-ebpf` was not run, an
//! empty file takes its place and the daemon says so when it is asked for the eBPF datapath.

use std::path::{Path, PathBuf};
use std::{env, fs};

/// Names a finished object in place of the one in the target directory.
const OVERRIDE: &str = "NODE_ENGINE_EBPF_OBJECT";
/// Where `cargo xtask build-ebpf` leaves it, below the workspace.
const RELEASE: &str = "target/ebpf/bpfel-unknown-none/release";

fn main() {
    println!("cargo::rerun-if-env-changed={OVERRIDE}");
    let object = match env::var_os(OVERRIDE).filter(|path| !path.is_empty()) {
        Some(path) => {
            let path = PathBuf::from(path);
            assert!(path.is_file(), "{OVERRIDE} names {}, which is no file", path.display());
            Some(path)
        }
        None => built(),
    };
    if let Some(object) = &object {
        println!("cargo::rerun-if-changed={}", object.display());
    }
    let embedded = Path::new(&variable("OUT_DIR")).join("netmanager");
    let bytes =
        object.map(|object| fs::read(&object).unwrap_or_else(|error| panic!("read {}: {error}", object.display())));
    fs::write(&embedded, bytes.unwrap_or_default())
        .unwrap_or_else(|error| panic!("write {}: {error}", embedded.display()));
}

/// The object in the workspace, if it was built.
fn built() -> Option<PathBuf> {
    let directory = Path::new(&variable("CARGO_MANIFEST_DIR")).join("..").join(RELEASE);
    let object = directory.join("netmanager");
    if object.is_file() {
        return Some(object);
    }
    // A file that is not there cannot be watched without building anew each time: watch the directory it will appear in.
    match fs::create_dir_all(&directory) {
        Ok(()) => println!("cargo::rerun-if-changed={}", directory.display()),
        Err(error) => println!("cargo::warning=no watch on {}: {error}", directory.display()),
    }
    None
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"))
}
