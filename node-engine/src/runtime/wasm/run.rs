//! The interpreter's own process: this binary, run again. As `check` it looks at a module that has come from somewhere, as nobody and
//! with little room; as `run` it is the command that a supervisor looks after.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};
use std::path::Path;
use std::process::ExitCode;

use nix::sys::prctl;
use nix::sys::resource::{Resource, rlim_t, setrlimit};
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};
use rustix::thread::{CapabilitySet, CapabilitySets, remove_capability_from_bounding_set, set_capabilities};
use wasmi_wasi::{Dir, WasiCtx, WasiCtxBuilder};

use super::module;
use super::order::{self, End, Order};

/// User and group of whoever needs no files.
pub(super) const NOBODY: (u32, u32) = (65_534, 65_534);
/// What it takes to read the largest module, and no more.
const CHECK_MEMORY: rlim_t = 1 << 30;
const CHECK_SECONDS: rlim_t = 30;
/// As of a program that cannot be run.
const NOT_RUN: u8 = 126;
/// The first descriptor behind input, output and errors.
const FIRST: u32 = 3;

/// `check`: 1 and a reason on the standard output where the module of this directory is not taken. `run`: the module's exit code.
pub fn run(stage: &str, directory: &Path) -> ExitCode {
    match stage {
        "check" => check(directory),
        _ => ExitCode::from(execute(directory)),
    }
}

fn check(directory: &Path) -> ExitCode {
    let read = || {
        let bytes = fs::read(order::module(directory))?;
        setrlimit(Resource::RLIMIT_AS, CHECK_MEMORY, CHECK_MEMORY)?;
        setrlimit(Resource::RLIMIT_CPU, CHECK_SECONDS, CHECK_SECONDS)?;
        become_user(NOBODY)?;
        Ok(bytes)
    };
    let checked = read().map_err(|error: io::Error| error.to_string()).and_then(|bytes| module::check(&bytes));
    let Err(reason) = checked else { return ExitCode::SUCCESS };
    // With nobody there to read, the code has to do.
    let _ = write!(io::stdout(), "{reason}");
    ExitCode::from(1)
}

/// Everything that is the node's to give is opened first; then the interpreter has no more rights than its user.
fn execute(directory: &Path) -> u8 {
    let mut told = File::create(order::end(directory));
    let (code, end) = match prepare(directory) {
        Ok((order, bytes, wasi)) => match module::check(&bytes) {
            Ok(checked) => module::run(&checked, wasi, order.memory_mib),
            Err(reason) => (NOT_RUN, Some(End::Failed(reason))),
        },
        Err(error) => (NOT_RUN, Some(End::Failed(error.to_string()))),
    };
    if let Some(end) = end {
        // Into the log, for who looks there; the file is for the daemon.
        let _ = match &end {
            End::OutOfMemory => writeln!(io::stderr(), "out of memory"),
            End::Failed(reason) => writeln!(io::stderr(), "{reason}"),
        };
        let _ = told.as_mut().map(|file| file.write_all(end.text().as_bytes()));
    }
    code
}

fn prepare(directory: &Path) -> io::Result<(Order, Vec<u8>, WasiCtx)> {
    let order = Order::read(directory)?;
    let bytes = fs::read(order::module(directory))?;
    let root = if order.root.as_os_str().is_empty() { None } else { Some(File::open(&order.root)?) };
    let listeners = order.ports.iter().map(|port| listen(*port)).collect::<io::Result<Vec<_>>>()?;
    become_user(order.user)?;
    let wasi = surroundings(&order, root, listeners)
        .map_err(|error| io::Error::other(format!("its surroundings: {error}")))?;
    Ok((order, bytes, wasi))
}

/// For both families where there are both.
fn listen(port: u16) -> io::Result<TcpListener> {
    TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
        .or_else(|_| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))
        .map_err(|error| io::Error::new(error.kind(), format!("listen at port {port}: {error}")))
}

/// Without capabilities, whoever the user is: the kernel takes them from whoever ceases to be the superuser, and only then.
fn become_user((user, group): (u32, u32)) -> io::Result<()> {
    prctl::set_no_new_privs()?;
    for number in 0..u64::BITS {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
            Ok(()) => {}
            // The kernel knows no more of them; or the node may not do this, and after the first line nobody gains from the set.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::PERM) => break,
            Err(error) => return Err(error.into()),
        }
    }
    setgroups(&[])?;
    setgid(Gid::from_raw(group))?;
    setuid(Uid::from_raw(user))?;
    let none = CapabilitySet::empty();
    // The ambient ones go with these.
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })?;
    Ok(())
}

fn surroundings(order: &Order, root: Option<File>, listeners: Vec<TcpListener>) -> Result<WasiCtx, String> {
    let mut wasi = WasiCtxBuilder::new();
    wasi.inherit_stdio().args(&order.arguments).map_err(|error| error.to_string())?;
    let mut environment = order.environment.clone();
    let mut next = FIRST;
    if let Some(root) = root {
        // The first: a C library looks for directories until a descriptor is none.
        wasi.preopened_dir(Dir::from_std_file(root), "/").map_err(|error| error.to_string())?;
        next += 1;
    }
    if !listeners.is_empty() {
        environment.extend([format!("LISTEN_FDS={}", listeners.len()), format!("LISTEN_FD={next}")]);
    }
    for listener in listeners {
        let listener = wasmi_wasi::TcpListener::from_std(listener);
        wasi.preopened_socket(next, listener).map_err(|error| error.to_string())?;
        next += 1;
    }
    for variable in &environment {
        let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
        wasi.env(name, value).map_err(|error| error.to_string())?;
    }
    Ok(wasi.build())
}

/// No arguments, no files, no output.
pub(super) fn nothing() -> WasiCtx {
    WasiCtxBuilder::new().build()
}
