//! A module that ends with a code of its own: whether the interpreter, its surroundings and WASI work here.

/// What the trial ends with.
pub(super) const GOOD: i64 = 42;

/// ```text
/// (module (import "wasi_snapshot_preview1" "proc_exit" (func (param i32))) (memory (export "memory") 1)
///   (func (export "_start") (call 0 (i32.const 42))))
/// ```
#[rustfmt::skip]
pub(super) const MODULE: [u8; 96] = *b"\0asm\x01\0\0\0\
    \x01\x08\x02\x60\x01\x7f\0\x60\0\0\
    \x02\x24\x01\x16wasi_snapshot_preview1\x09proc_exit\0\0\
    \x03\x02\x01\x01\
    \x05\x03\x01\0\x01\
    \x07\x13\x02\x06memory\x02\0\x06_start\0\x01\
    \x0a\x08\x01\x06\0\x41\x2a\x10\0\x0b";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_trial_is_what_it_says() {
        let text = r#"(module (import "wasi_snapshot_preview1" "proc_exit" (func (param i32))) (memory (export "memory") 1)
            (func (export "_start") (call 0 (i32.const 42))))"#;
        assert_eq!(wat::parse_str(text).expect("a module"), MODULE);
    }
}
