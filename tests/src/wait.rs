//! Waiting for a condition instead of sleeping.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Asks again and again until there is a value; the last reason there was none is in the error.
pub fn until<T>(what: &str, limit: Duration, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + limit;
    loop {
        let reason = match ask() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if Instant::now() >= deadline {
            match reason {
                Some(error) => return Err(error.context(format!("{what}: not within {limit:?}"))),
                None => bail!("{what}: not within {limit:?}"),
            }
        }
        thread::sleep(Duration::from_millis(25));
    }
}

/// Asks until it is so.
pub fn until_true(what: &str, limit: Duration, mut ask: impl FnMut() -> Result<bool>) -> Result<()> {
    until(what, limit, || Ok(ask()?.then_some(())))
}
