//! One fuzzer for every door; which one says `FUZZ_TARGET`.
#![no_main]

use std::sync::LazyLock;
use std::{env, fs, path};

use libfuzzer_sys::fuzz_target;
use node_engine::fuzzing::{TARGETS, Target};

static TARGET: LazyLock<Target> = LazyLock::new(|| {
    let name = env::var("FUZZ_TARGET").expect("FUZZ_TARGET names a target");
    let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
    *TARGETS.iter().find(|target| target.name == name).unwrap_or_else(|| panic!("{name} is none of {names:?}"))
});

/// Puts the target's seeds where the fuzzer looks for inputs.
fn plant() {
    let directory = env::var_os("FUZZ_SEEDS").expect("FUZZ_SEEDS names a directory");
    for (number, seed) in (TARGET.seeds)().iter().enumerate() {
        let path = path::Path::new(&directory).join(format!("seed-{number}"));
        fs::write(&path, seed).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

fuzz_target!(init: plant(), |bytes: &[u8]| (TARGET.run)(bytes));
