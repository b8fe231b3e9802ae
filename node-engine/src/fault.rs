//! Failures on purpose, for the fault lab, in debug builds alone.
//!
//! `LAB_FAULT` names a file that says `<point> <act>`. Whoever reaches that point first removes the file and does it: `kill` ends the
//! process as nothing else does, `error` and `panic` are the step's, `delay` keeps it waiting. Points are the effects of a deployment
//! and a deletion, each before it is done and, as `<point>-done`, when it is done and nobody knows yet.

use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A step is kept waiting for so long.
const DELAY: Duration = Duration::from_secs(2);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    Kill,
    Error,
    Panic,
    Delay,
}

/// What is to happen here, if anything.
///
/// # Errors
/// Somebody wants one.
pub(crate) async fn reach(point: &str, done: bool) -> Result<(), String> {
    match act(point, done) {
        Some(Act::Delay) => {
            tokio::time::sleep(DELAY).await;
            Ok(())
        }
        act => do_it(act),
    }
}

/// The same where nothing can be waited for.
///
/// # Errors
/// Somebody wants one.
pub(crate) fn at(point: &str) -> Result<(), String> {
    do_it(act(point, false))
}

fn do_it(act: Option<Act>) -> Result<(), String> {
    match act {
        None | Some(Act::Delay) => Ok(()),
        Some(Act::Error) => Err("a test wants it so".into()),
        Some(Act::Panic) => std::panic::panic_any("a test wants it so"),
        Some(Act::Kill) => {
            // It does not return.
            kill(Pid::this(), Signal::SIGKILL).map_err(|error| error.to_string())
        }
    }
}

fn act(point: &str, done: bool) -> Option<Act> {
    if !cfg!(debug_assertions) {
        return None;
    }
    let path = std::env::var_os("LAB_FAULT")?;
    let act = wanted(&std::fs::read_to_string(&path).ok()?, point, done)?;
    // Whoever removes it does it, and nobody else.
    std::fs::remove_file(path).ok().map(|()| act)
}

fn wanted(text: &str, point: &str, done: bool) -> Option<Act> {
    let (name, act) = text.trim().split_once(' ')?;
    let here = if done { name.strip_suffix("-done") } else { Some(name) };
    match act {
        _ if here != Some(point) => None,
        "kill" => Some(Act::Kill),
        "error" => Some(Act::Error),
        "panic" => Some(Act::Panic),
        "delay" => Some(Act::Delay),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_at_its_point_alone() {
        assert_eq!(wanted("veth kill\n", "veth", false), Some(Act::Kill));
        assert_eq!(wanted("veth-done error", "veth", true), Some(Act::Error));
        for (text, point, done) in [
            ("veth kill", "veth", true),
            ("veth-done kill", "veth", false),
            ("veth kill", "ve", false),
            ("veth", "veth", false),
            ("veth burn", "veth", false),
            ("", "", false),
        ] {
            assert_eq!(wanted(text, point, done), None, "{text} at {point}");
        }
        assert_eq!(do_it(Some(Act::Error)), Err("a test wants it so".into()));
        assert!(std::panic::catch_unwind(|| do_it(Some(Act::Panic))).is_err());
    }
}
