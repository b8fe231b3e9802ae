//! How the kernel's clock stands to its reference, as whoever disciplines it has told the kernel (adjtimex(2)). Nothing is changed.

use crate::model::Clock;

/// `None` where the kernel does not say.
pub(super) fn read() -> Option<Clock> {
    // SAFETY: `timex` is plain numbers, for which all bits zero is a value; its mode 0 asks and sets nothing.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a live `timex` that nobody else uses during the call.
    let state = unsafe { libc::adjtimex(&raw mut timex) };
    if state < 0 {
        return None;
    }
    // The offset is in nanoseconds where the kernel says so, else in microseconds; the error always in microseconds.
    let unit = if timex.status & libc::STA_NANO != 0 { 1e-9 } else { 1e-6 };
    Some(Clock {
        offset_seconds: timex.offset as f64 * unit,
        synchronised: state != libc::TIME_ERROR && timex.status & libc::STA_UNSYNC == 0,
        error_seconds: timex.maxerror as f64 * 1e-6,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_tells_its_clock() {
        let clock = read().expect("adjtimex needs no right to ask");
        assert!(clock.offset_seconds.abs() < 1.0, "a larger offset is stepped: {clock:?}");
        assert!(clock.error_seconds >= 0.0, "{clock:?}");
    }
}
