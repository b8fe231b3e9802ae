//! How much freed memory the allocator keeps for itself.
//!
//! glibc gives every thread an arena of its own, and learns from each large block that is freed: after one of four megabytes, which the
//! kernel's types are when programs are loaded, each arena keeps up to eight that nobody uses. A daemon of which a megabyte and a half
//! was in use so grew to fourteen within minutes of deployments. Both are fixed here.

#[cfg(target_env = "gnu")]
mod glibc {
    use std::ffi::c_int;

    /// As many as work at the same time, mostly; who waits for one waits briefly.
    const ARENAS: c_int = 2;
    /// What glibc begins with, before it learns: larger blocks are the kernel's to give and to take back at once…
    const LARGE: c_int = 128 << 10;
    /// … and so much may be free at the end of an arena.
    const SPARE: c_int = 128 << 10;

    pub(super) fn frugal() {
        for (parameter, value) in
            [(libc::M_ARENA_MAX, ARENAS), (libc::M_MMAP_THRESHOLD, LARGE), (libc::M_TRIM_THRESHOLD, SPARE)]
        {
            // SAFETY: `mallopt` takes two numbers and changes the allocator's own settings, under its lock.
            unsafe { libc::mallopt(parameter, value) };
        }
    }
}

/// Has freed memory go back to the system from now on. To be called before there are threads.
pub fn frugal() {
    #[cfg(target_env = "gnu")]
    glibc::frugal();
}

#[cfg(all(test, target_env = "gnu"))]
mod tests {
    use std::process::Command;

    fn resident_mebibytes() -> u64 {
        let status = std::fs::read_to_string("/proc/self/status").expect("the kernel tells of each process");
        let told = status.lines().find_map(|line| line.strip_prefix("RssAnon:")?.split_whitespace().next());
        told.and_then(|kibibytes| kibibytes.parse::<u64>().ok()).expect("its memory, in kibibytes") >> 10
    }

    /// Set in a process of its own, where nobody else allocates.
    const ALONE: &str = "NODE_ENGINE_TEST_ALONE";

    #[test]
    fn freed_memory_goes_back() {
        if std::env::var_os(ALONE).is_some() {
            return alone();
        }
        let mut again = Command::new(std::env::current_exe().unwrap());
        again.args(["--exact", "heap::tests::freed_memory_goes_back", "--test-threads", "1"]).env(ALONE, "1");
        let output = again.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }

    fn alone() {
        super::frugal();
        let before = resident_mebibytes();
        let worker = std::thread::spawn(move || {
            // What teaches glibc to keep more, then as much in small pieces.
            drop(std::hint::black_box(vec![1_u8; 16 << 20]));
            let pieces: Vec<Vec<u8>> = (0..512).map(|_| vec![1; 48 << 10]).collect();
            drop(std::hint::black_box(pieces));
            let kept = resident_mebibytes().saturating_sub(before);
            assert!(kept < 4, "{kept} MiB of 24 are kept");
        });
        worker.join().expect("what it asserts");
    }
}
