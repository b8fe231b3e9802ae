//! Runs a program to which bpf(2) fails, or only some of its commands: a machine without eBPF, or with less of it.
//!
//! `confine [--error ENOSYS|EPERM|EINVAL] [--commands N,N] PROGRAM [ARGUMENT…]`

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::Parser;
use libc::{
    BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, PR_SET_SECCOMP, SECCOMP_MODE_FILTER, SECCOMP_RET_ALLOW,
    SECCOMP_RET_ERRNO, SYS_bpf, sock_filter, sock_fprog,
};

#[derive(Debug, Parser)]
struct Arguments {
    /// What the refused calls say
    #[arg(long, default_value = "ENOSYS", value_parser = ["ENOSYS", "EPERM", "EINVAL"])]
    error: String,
    /// Numbers of `enum bpf_cmd`; all of them by default
    #[arg(long, value_delimiter = ',')]
    commands: Vec<u32>,
    #[arg(trailing_var_arg = true, required = true)]
    program: Vec<String>,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let code = match arguments.error.as_str() {
        "EPERM" => libc::EPERM,
        "EINVAL" => libc::EINVAL,
        _ => libc::ENOSYS,
    };
    confine(&filter(&arguments.commands, code.cast_unsigned()))?;
    let (program, rest) = arguments.program.split_first().context("nothing to run")?;
    let error = Command::new(program).args(rest).exec();
    Err(error).with_context(|| format!("cannot run {program}"))
}

/// Of the system call's number, and of the low word of its first argument.
fn filter(commands: &[u32], code: u32) -> Vec<sock_filter> {
    let word = |at| statement(BPF_LD | BPF_W | BPF_ABS, at);
    let allow = statement(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    let refuse = statement(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | code);
    let call = SYS_bpf as u32;
    if commands.is_empty() {
        return vec![word(0), jump_unless(call, 1), refuse, allow];
    }
    let first_argument = if cfg!(target_endian = "little") { 16 } else { 20 };
    let mut filter = vec![word(0), jump_unless(call, 2 * commands.len() as u8 + 1), word(first_argument)];
    for command in commands {
        filter.extend([jump_unless(*command, 1), refuse]);
    }
    filter.push(allow);
    filter
}

fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

/// Past so many where what was loaded is something else.
fn jump_unless(k: u32, past: u8) -> sock_filter {
    sock_filter { code: (BPF_JMP | BPF_JEQ | BPF_K) as u16, jt: 0, jf: past, k }
}

fn confine(filter: &[sock_filter]) -> Result<()> {
    nix::sys::prctl::set_no_new_privs().context("cannot give up new privileges")?;
    let program = sock_fprog { len: filter.len() as u16, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the program and the instructions it points to live until the call returns, and the kernel only reads them.
    let confined = unsafe { libc::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &raw const program) };
    if confined != 0 {
        bail!("cannot set the filter: {}", std::io::Error::last_os_error());
    }
    Ok(())
}
