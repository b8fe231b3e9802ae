//! What a kernel says last on its console. A machine that starts anew after a panic has ended like one that was switched off, and only
//! its last words tell the two apart.

use std::fs;
use std::io;
use std::path::Path;

use crate::runtime::Exit;

/// A panic is followed by where it happened: registers and the stack.
pub(super) const LAST_WORDS: usize = 16 * 1024;
/// Of a guest that has panicked, whatever its machine ended with: that of abort(3).
const PANICKED: i64 = 134;
/// Linux: `panic()` in kernel/panic.c.
const PANIC: &str = "Kernel panic - not syncing: ";
/// Linux: `out_of_memory()` and `check_panic_on_oom()` in mm/oom_kill.c.
const OF_MEMORY: [&str; 2] = ["system is deadlocked on memory", "out of memory"];
/// How long the console's log was when the run began.
const NOTE: &str = "console-before";

/// Notes where in the log a run begins. One that has begun keeps its note.
pub(super) fn begins(directory: &Path, log_length: u64) -> io::Result<()> {
    let note = directory.join(NOTE);
    if note.exists() { Ok(()) } else { fs::write(note, log_length.to_string()) }
}

/// How much of the log's end is of the run that has ended; the next one gets a note of its own.
pub(super) fn ended(directory: &Path, log_length: u64) -> usize {
    let note = directory.join(NOTE);
    let before = fs::read_to_string(&note).ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    // Only costs words of the run before where it stays.
    let _ = fs::remove_file(note);
    // The log has been turned where it is shorter now.
    let said = log_length.checked_sub(before).unwrap_or(log_length);
    usize::try_from(said).unwrap_or(usize::MAX).min(LAST_WORDS)
}

/// The end with what the console has to say of it.
pub(super) fn explained(exit: Exit, console: &[u8]) -> Exit {
    let console = String::from_utf8_lossy(console);
    let Some(words) = console.split_once(PANIC).and_then(|(_, rest)| rest.lines().next()) else { return exit };
    let words = words.trim_end_matches(" ]---").trim();
    let lower = words.to_lowercase();
    Exit {
        code: if exit.code == 0 { PANICKED } else { exit.code },
        out_of_memory: OF_MEMORY.iter().any(|reason| lower.starts_with(reason)),
        reason: Some(format!("kernel panic: {words}")),
        ..exit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_the_reason_of_an_end() {
        let exit = || Exit {
            instance: "a.b.c.d.instance.0".parse().expect("an id"),
            code: 0,
            out_of_memory: false,
            reason: None,
        };
        let panic = |code, out_of_memory, words: &str| {
            let reason = Some(format!("kernel panic: {words}"));
            Exit { code, out_of_memory, reason, ..exit() }
        };
        for (console, told) in [
            ("guest serves\r\n", exit()),
            (
                "[    1.2] Kernel panic - not syncing: VFS: no root\r\n[    1.2] CPU: 0",
                panic(134, false, "VFS: no root"),
            ),
            (
                "Kernel panic - not syncing: System is deadlocked on memory\r\n",
                panic(134, true, "System is deadlocked on memory"),
            ),
            (
                "Kernel panic - not syncing: Out of memory: compulsory panic_on_oom is enabled",
                panic(134, true, "Out of memory: compulsory panic_on_oom is enabled"),
            ),
            (
                "---[ end Kernel panic - not syncing: Attempted to kill init! ]---\n",
                panic(134, false, "Attempted to kill init!"),
            ),
        ] {
            assert_eq!(explained(exit(), console.as_bytes()), told, "{console}");
        }
        let killed = Exit { code: 137, ..exit() };
        assert_eq!(explained(killed, b"Kernel panic - not syncing: x"), panic(137, false, "x"));
    }

    #[test]
    fn each_run_has_its_own_words() {
        let dir = tempfile::tempdir().expect("a directory");
        begins(dir.path(), 100).expect("noted");
        begins(dir.path(), 120).expect("it goes on");
        assert_eq!(ended(dir.path(), 150), 50);
        begins(dir.path(), 150).expect("noted");
        assert_eq!(ended(dir.path(), 150), 0, "silent");
        begins(dir.path(), 1 << 30).expect("noted");
        assert_eq!(ended(dir.path(), 20), 20, "the log was turned");
        assert_eq!(ended(dir.path(), 1 << 30), LAST_WORDS, "without a note");
    }
}
