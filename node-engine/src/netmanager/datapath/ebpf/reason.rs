//! Why the kernel said no, in a line that an operator can act on.

use std::error::Error;
use std::io;

use crate::netmanager::datapath::DatapathError;

/// Lines of a long message that are kept at its end: a verifier's log ends in what it objects to.
const LAST: usize = 3;

/// This machine cannot do `what`, for this reason.
pub(super) fn unsupported(what: &'static str, error: &(dyn Error + 'static)) -> DatapathError {
    DatapathError::Unsupported { what, reason: reason(error) }
}

/// The error with all its causes, and what can be done about it where that is known.
pub(super) fn reason(error: &(dyn Error + 'static)) -> String {
    let mut text = String::new();
    let mut refused = false;
    let mut cause = Some(error);
    while let Some(error) = cause {
        refused |= error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) == Some(libc::EPERM);
        let brief = brief(&error.to_string());
        // Some errors repeat their cause, some do not.
        if !text.contains(&brief) {
            text = if text.is_empty() { brief } else { format!("{text}: {brief}") };
        }
        cause = error.source();
    }
    if refused {
        text = format!("{text} (bpf(2) refused: needs CAP_BPF and CAP_NET_ADMIN, and no seccomp filter in the way)");
    }
    text
}

/// One line: the first of the message, and the last ones.
fn brief(message: &str) -> String {
    let lines: Vec<&str> = message.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    match lines.len().checked_sub(LAST + 1) {
        Some(middle) if middle > 0 => format!("{} … {}", lines[0], lines[lines.len() - LAST..].join("; ")),
        _ => lines.join("; "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("map could not be made")]
    struct Outer(#[source] io::Error);

    #[test]
    fn refusal_is_told_with_its_remedy() {
        let text = reason(&Outer(io::Error::from_raw_os_error(libc::EPERM)));
        assert!(text.starts_with("map could not be made: Operation not permitted"), "{text}");
        assert!(text.contains("CAP_BPF"), "{text}");
        assert!(!reason(&Outer(io::Error::from_raw_os_error(libc::ENOSYS))).contains("CAP_BPF"));
    }

    #[test]
    fn of_a_log_the_end_is_kept() {
        let log = (0..100).map(|i| format!("{i}: (85) call")).chain(["R1 invalid mem access".into()]);
        let text = brief(&log.collect::<Vec<_>>().join("\n"));
        assert_eq!(text, "0: (85) call … 98: (85) call; 99: (85) call; R1 invalid mem access");
        assert_eq!(brief("a\n\nb\n"), "a; b");
    }
}
