//! Why the kernel said no, in a line that an operator can act on.

use std::error::Error;
use std::io;

use aya::programs::ProgramError;
use aya::sys::SyscallError;

use crate::netmanager::datapath::DatapathError;

/// Lines of a long message that are kept at its end: a verifier's log ends in what it objects to.
const LAST: usize = 3;

/// This machine cannot do `what`, for this reason.
pub(super) fn unsupported(what: &'static str, error: &(dyn Error + 'static)) -> DatapathError {
    if let Some(objection) = verifier_log(error) {
        return DatapathError::Refused(objection);
    }
    match os_error(error).and_then(|code| refusal(code, &Confinement::own())) {
        Some(refusal) => DatapathError::Refused(refusal),
        None => DatapathError::Unsupported { what, reason: reason(error) },
    }
}

/// The error with all its causes, and what can be done about it where that is known.
pub(super) fn reason(error: &(dyn Error + 'static)) -> String {
    if let Some(refusal) = os_error(error).and_then(|code| refusal(code, &Confinement::own())) {
        return refusal;
    }
    let mut text = String::new();
    for error in causes(error) {
        let brief = brief(&error.to_string());
        // Some errors repeat their cause, some do not.
        if !text.contains(&brief) {
            text = if text.is_empty() { brief } else { format!("{text}: {brief}") };
        }
    }
    text
}

fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |error: &&'a (dyn Error + 'static)| (*error).source())
}

/// What the kernel said, at the root of it.
fn os_error(error: &(dyn Error + 'static)) -> Option<i32> {
    causes(error).find_map(|error| match error.downcast_ref::<SyscallError>() {
        Some(error) => error.io_error.raw_os_error(),
        None => error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error),
    })
}

/// What the verifier objects to, where it is that which failed.
fn verifier_log(error: &(dyn Error + 'static)) -> Option<String> {
    causes(error).find_map(|error| match error.downcast_ref::<ProgramError>() {
        Some(ProgramError::LoadError { verifier_log, io_error }) => {
            objection(io_error.raw_os_error(), &verifier_log.to_string())
        }
        _ => None,
    })
}

/// In words, where the verifier has come to look at the program at all.
fn objection(code: Option<i32>, log: &str) -> Option<String> {
    let looked = code != Some(libc::EPERM) && !log.trim().is_empty();
    looked.then(|| format!("the kernel's verifier refused a program: {}", brief(log)))
}

/// In words, where bpf(2) as a whole is refused.
fn refusal(code: i32, confinement: &Confinement) -> Option<String> {
    match code {
        libc::EPERM => {
            let why = match (confinement.missing, confinement.filtered) {
                (Some(capability), _) => format!("{capability} missing"),
                (None, true) => "a seccomp filter is in the way".into(),
                (None, false) => "no capability is missing: is the kernel locked down?".into(),
            };
            Some(format!("bpf(2) refused: operation not permitted ({why})"))
        }
        libc::ENOSYS if confinement.filtered => {
            Some("bpf(2) is not there: a seccomp filter hides it, or the kernel was built without it".into())
        }
        libc::ENOSYS => Some("bpf(2) is not there: the kernel was built without it (CONFIG_BPF_SYSCALL)".into()),
        _ => None,
    }
}

/// What this process may not do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Confinement {
    /// The first capability of those that are needed.
    missing: Option<&'static str>,
    /// There is a seccomp filter.
    filtered: bool,
}

impl Confinement {
    fn own() -> Self {
        std::fs::read_to_string("/proc/thread-self/status").map(|status| Self::read(&status)).unwrap_or_default()
    }

    /// `/proc/<pid>/status`, see proc(5).
    fn read(status: &str) -> Self {
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let effective = field("CapEff:").and_then(|hex| u64::from_str_radix(hex, 16).ok()).unwrap_or(u64::MAX);
        let holds = |capability: u32| effective & 1 << capability != 0;
        // Linux 5.8 took the latter two out of the first.
        let needed = [(12, "CAP_NET_ADMIN"), (39, "CAP_BPF"), (38, "CAP_PERFMON")];
        let missing = needed
            .into_iter()
            .find(|(number, _)| !holds(*number) && (*number == 12 || !holds(21)))
            .map(|(_, name)| name);
        Self { missing, filtered: field("Seccomp:") == Some("2") }
    }
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
    fn a_refusal_says_what_is_in_the_way() {
        let status =
            |capabilities: u64, seccomp: u8| format!("Name:\tx\nCapEff:\t{capabilities:016x}\nSeccomp:\t{seccomp}\n");
        let all = u64::MAX >> 23;
        for (capabilities, seccomp, code, expected) in [
            (
                all & !(1 << 39) & !(1 << 21),
                0,
                libc::EPERM,
                "bpf(2) refused: operation not permitted (CAP_BPF missing)",
            ),
            (all & !(1 << 12), 0, libc::EPERM, "bpf(2) refused: operation not permitted (CAP_NET_ADMIN missing)"),
            (
                all & !(1 << 38) & !(1 << 21),
                2,
                libc::EPERM,
                "bpf(2) refused: operation not permitted (CAP_PERFMON missing)",
            ),
            (
                all & !(1 << 39),
                2,
                libc::EPERM,
                "bpf(2) refused: operation not permitted (a seccomp filter is in the way)",
            ),
            (
                all,
                0,
                libc::EPERM,
                "bpf(2) refused: operation not permitted (no capability is missing: is the kernel locked down?)",
            ),
            (all, 0, libc::ENOSYS, "bpf(2) is not there: the kernel was built without it (CONFIG_BPF_SYSCALL)"),
            (
                all,
                2,
                libc::ENOSYS,
                "bpf(2) is not there: a seccomp filter hides it, or the kernel was built without it",
            ),
        ] {
            let confinement = Confinement::read(&status(capabilities, seccomp));
            assert_eq!(refusal(code, &confinement).as_deref(), Some(expected));
        }
        assert_eq!(refusal(libc::ENOENT, &Confinement::default()), None);
    }

    #[test]
    fn the_root_of_an_error_is_found() {
        assert_eq!(os_error(&Outer(io::Error::from_raw_os_error(libc::ENOSYS))), Some(libc::ENOSYS));
        let text = reason(&Outer(io::Error::from_raw_os_error(libc::EIO)));
        assert!(text.starts_with("map could not be made: Input/output error"), "{text}");
    }

    #[test]
    fn of_a_verifier_the_objection_is_told() {
        let log = "0: R1=ctx()\n1: (85) call\n2: x\n3: y\nR2 invalid mem access 'scalar'\nprocessed 5 insns";
        let text = objection(Some(libc::EACCES), log).expect("it objects");
        assert!(text.starts_with("the kernel's verifier refused a program: 0: R1=ctx()"), "{text}");
        assert!(text.contains("R2 invalid mem access 'scalar'"), "{text}");
        assert_eq!(objection(Some(libc::EPERM), log), None, "it was not asked");
        assert_eq!(objection(Some(libc::EINVAL), "\n"), None);
    }

    #[test]
    fn of_a_log_the_end_is_kept() {
        let log = (0..100).map(|i| format!("{i}: (85) call")).chain(["R1 invalid mem access".into()]);
        let text = brief(&log.collect::<Vec<_>>().join("\n"));
        assert_eq!(text, "0: (85) call … 98: (85) call; 99: (85) call; R1 invalid mem access");
        assert_eq!(brief("a\n\nb\n"), "a; b");
    }
}
