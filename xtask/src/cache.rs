//! What outlives `target/`: compilers' libraries, kernels and what else takes long to get and never changes once it is there.

use std::env;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// The project's directory in the user's cache, so that neither `cargo clean` nor a fresh clone fetches or builds again.
pub(crate) fn directory(name: &str) -> Result<PathBuf> {
    let cache = match env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
        Some(cache) => PathBuf::from(cache),
        None => PathBuf::from(env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?).join(".cache"),
    };
    Ok(cache.join("node-engine").join(name))
}
