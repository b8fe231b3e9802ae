//! A module in the interpreter: what of it is taken, what it is given, and how it ends.

use wasmi::errors::{MemoryError, TableError};
use wasmi::{Config, Engine, Extern, ExternType, FuncType, Instance, Module, ResourceLimiter, Store, TrapCode};
use wasmi_core::LimiterError;
use wasmi_wasi::{WasiCtx, add_to_externals};

use super::order::End;

/// The first bytes of a module, and of what is none.
const MODULE: [u8; 8] = *b"\0asm\x01\0\0\0";
const COMPONENT: [u8; 8] = *b"\0asm\x0d\0\x01\0";
/// The function that is a command.
const START: &str = "_start";
const WASI: &str = "wasi_snapshot_preview1";
/// What an entry of a table costs, about.
const ENTRY: usize = 16;
const MIB: u64 = 1 << 20;

/// Exit codes as a shell would tell the signals that end other programs: killed, and aborted.
const KILLED: u8 = 128 + 9;
const ABORTED: u8 = 128 + 6;

/// A module that was found to be one.
pub(super) struct Checked(Module);

struct State {
    wasi: WasiCtx,
    room: Room,
}

/// Reads the module and looks whether everything that it asks for is there. Runs nothing of it.
///
/// # Errors
/// What is wrong with it, in a sentence.
pub(super) fn check(bytes: &[u8]) -> Result<Checked, String> {
    if bytes.starts_with(&COMPONENT) {
        return Err("it is a component; this node runs modules (WASI preview 1)".into());
    }
    if !bytes.starts_with(&MODULE) {
        return Err("it is no WebAssembly module".into());
    }
    let engine = Engine::new(&Config::default());
    let module = Module::new(&engine, bytes).map_err(|error| format!("it is not a valid module: {error}"))?;
    let mut store = Store::new(&engine, State { wasi: super::run::nothing(), room: Room::new(None) });
    provided(&mut store, &module)?;
    let command = FuncType::new([], []);
    if !matches!(module.get_export(START), Some(ExternType::Func(function)) if function == command) {
        return Err(format!("it exports no function {START} without arguments: it is a library and no command"));
    }
    if !matches!(module.get_export("memory"), Some(ExternType::Memory(_))) {
        return Err("it exports no memory, by which WASI gives and takes".into());
    }
    Ok(Checked(module))
}

/// Runs it to its end. Gives its exit code, and what there is to say where that is not its own.
pub(super) fn run(Checked(module): &Checked, wasi: WasiCtx, memory_mib: Option<u64>) -> (u8, Option<End>) {
    let room = Room::new(memory_mib.map(|mib| usize::try_from(mib.saturating_mul(MIB)).unwrap_or(usize::MAX)));
    let mut store = Store::new(module.engine(), State { wasi, room });
    store.limiter(|state| &mut state.room);
    let given = match provided(&mut store, module) {
        Ok(given) => given,
        Err(reason) => return (ABORTED, Some(End::Failed(reason))),
    };
    let done = Instance::new(&mut store, module, &given).and_then(|instance| {
        let start = instance.get_export(&store, START).and_then(Extern::into_func);
        // It was looked for before.
        start.map_or(Ok(()), |start| start.call(&mut store, &[], &mut []))
    });
    let Err(error) = done else { return (0, None) };
    match (error.i32_exit_status(), error.as_trap_code()) {
        (Some(status), _) => (u8::try_from(status).unwrap_or(u8::MAX), None),
        (None, Some(TrapCode::OutOfSystemMemory)) => (KILLED, Some(End::OutOfMemory)),
        _ if store.data().room.exceeded => (KILLED, Some(End::OutOfMemory)),
        (None, Some(trap)) => (ABORTED, Some(End::Failed(format!("trap: {trap}")))),
        (None, None) => (ABORTED, Some(End::Failed(error.to_string()))),
    }
}

/// What the module imports, from WASI.
fn provided(store: &mut Store<State>, module: &Module) -> Result<Vec<Extern>, String> {
    let mut given = Vec::new();
    add_to_externals(&mut *store, module, &mut given, |state: &mut State| &mut state.wasi).map_err(|error| {
        let error = error.to_string();
        let name = error.rsplit(": ").next().unwrap_or(&error);
        format!("it imports {name}; there is {WASI} and nothing else")
    })?;
    for (given, import) in given.iter().zip(module.imports()) {
        match (given.ty(&*store), import.ty()) {
            (ExternType::Func(has), ExternType::Func(wants)) if has == *wants => {}
            _ => return Err(format!("it imports {WASI}::{} as what it is not", import.name())),
        }
    }
    Ok(given)
}

/// What all memories and tables of a module may have together. One that asks for more is ended, as a container would be: few programs
/// know what to do where memory is not given, and then who looks sees no reason.
struct Room {
    limit: usize,
    used: usize,
    exceeded: bool,
}

impl Room {
    fn new(limit: Option<usize>) -> Self {
        Self { limit: limit.unwrap_or(usize::MAX), used: 0, exceeded: false }
    }

    fn take(&mut self, more: usize, within_its_own: bool) -> Result<bool, LimiterError> {
        if !within_its_own {
            // By its own maximum: the module is told.
            return Ok(false);
        }
        let wanted = self.used.saturating_add(more);
        if wanted > self.limit {
            self.exceeded = true;
            return Err(LimiterError::ResourceLimiterDeniedAllocation);
        }
        self.used = wanted;
        Ok(true)
    }
}

impl ResourceLimiter for Room {
    fn memory_growing(&mut self, current: usize, desired: usize, maximum: Option<usize>) -> Result<bool, LimiterError> {
        self.take(desired.saturating_sub(current), maximum.is_none_or(|maximum| desired <= maximum))
    }

    fn table_growing(&mut self, current: usize, desired: usize, maximum: Option<usize>) -> Result<bool, LimiterError> {
        let more = desired.saturating_sub(current).saturating_mul(ENTRY);
        self.take(more, maximum.is_none_or(|maximum| desired <= maximum))
    }

    fn memory_grow_failed(&mut self, _error: &MemoryError) -> Result<(), LimiterError> {
        self.exceeded = true;
        Err(LimiterError::ResourceLimiterDeniedAllocation)
    }

    fn table_grow_failed(&mut self, _error: &TableError) -> Result<(), LimiterError> {
        Ok(())
    }

    fn instances(&self) -> usize {
        1
    }

    fn tables(&self) -> usize {
        1_000
    }

    fn memories(&self) -> usize {
        100
    }
}

/// Whatever the bytes are, they are a command or there is a reason why not; for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn understand(bytes: &[u8]) {
    if let Err(reason) = check(bytes) {
        assert!(!reason.is_empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(text: &str) -> Vec<u8> {
        wat::parse_str(text).expect("a module")
    }

    fn ended(body: &str, memory_mib: Option<u64>) -> (u8, Option<End>) {
        let text = format!(
            r#"(module (import "{WASI}" "proc_exit" (func $exit (param i32))) (memory (export "memory") 1)
               (func $deeper (call $deeper) (call $deeper)) (func (export "_start") {body}))"#
        );
        let checked = check(&module(&text)).unwrap_or_else(|reason| panic!("{reason}"));
        run(&checked, super::super::run::nothing(), memory_mib)
    }

    #[test]
    fn what_is_no_command_says_why() {
        let memory = r#"(memory (export "memory") 1)"#;
        let start = r#"(func (export "_start"))"#;
        for (bytes, reason) in [
            (b"hello".to_vec(), "no WebAssembly module"),
            (COMPONENT.to_vec(), "it is a component"),
            ([MODULE.as_slice(), b"\x09garbage"].concat(), "not a valid module"),
            (module(&format!("(module {memory})")), "exports no function _start"),
            (
                module(&format!(r#"(module {memory} (func (export "_start") (param i32)))"#)),
                "exports no function _start",
            ),
            (module(&format!("(module {start})")), "exports no memory"),
            (
                module(&format!(r#"(module (import "env" "f" (func)) {memory} {start})"#)),
                "it imports env::f; there is wasi_snapshot_preview1 and nothing else",
            ),
            (
                module(&format!(r#"(module (import "{WASI}" "sock_connect" (func)) {memory} {start})"#)),
                "it imports wasi_snapshot_preview1::sock_connect;",
            ),
            (
                module(&format!(r#"(module (import "{WASI}" "proc_exit" (func)) {memory} {start})"#)),
                "it imports wasi_snapshot_preview1::proc_exit as what it is not",
            ),
        ] {
            let said = check(&bytes).err().unwrap_or_else(|| panic!("taken in place of {reason:?}"));
            assert!(said.contains(reason), "{said}");
        }
    }

    #[test]
    fn each_end_is_told_by_code_and_reason() {
        let failed = |reason: &str| Some(End::Failed(reason.into()));
        for (body, memory_mib, code, end) in [
            ("", None, 0, None),
            ("(call $exit (i32.const 7))", None, 7, None),
            ("(call $exit (i32.const 125))", None, 125, None),
            // What a shell says of signals is not a module's to say.
            (
                "(call $exit (i32.const 137))",
                None,
                ABORTED,
                failed("exit with invalid exit status outside of [0..126)"),
            ),
            ("unreachable", None, ABORTED, failed("trap: wasm `unreachable` instruction executed")),
            ("(drop (i32.load (i32.const -1)))", None, ABORTED, failed("trap: out of bounds memory access")),
            ("(drop (i32.div_u (i32.const 1) (i32.const 0)))", None, ABORTED, failed("trap: integer divide by zero")),
            ("(call $deeper)", None, ABORTED, failed("trap: call stack exhausted")),
            ("(call $exit (memory.grow (i32.const 15)))", Some(1), 1, None),
            ("(call $exit (memory.grow (i32.const 16)))", Some(1), KILLED, Some(End::OutOfMemory)),
            ("(drop (memory.grow (i32.const 1)))", Some(0), KILLED, Some(End::OutOfMemory)),
        ] {
            assert_eq!(ended(body, memory_mib), (code, end), "{body}");
        }
    }
}
