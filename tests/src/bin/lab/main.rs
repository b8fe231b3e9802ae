//! The lab's own program: brings up hosts for other programs, shows a cluster (`demo`), measures one (`bench`), tidies up.

mod demo;

use std::ffi::OsString;
use std::net::{SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use lab::host::{Docker, Host};
use lab::scratch::{self, Scratch};

#[derive(Debug, Parser)]
#[command(name = "lab", about = "Simulated hosts and clusters for node-engine")]
struct Args {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Run a program on a simulated host with its own dockerd, and remove the host again
    HostRun {
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// Show a cluster of two nodes on this machine, step by step
    Demo,
    /// Send datagrams given as hexadecimal digits
    #[command(hide = true)]
    Datagrams {
        to: SocketAddr,
        #[arg(long, default_value_t = 1)]
        times: u32,
        payloads: Vec<String>,
    },
    /// Remove what killed runs have left
    Clean,
    /// The first process of a simulated host
    #[command(hide = true)]
    HostInit {
        name: String,
        directory: PathBuf,
        group: String,
        #[arg(long)]
        docker: bool,
    },
}

fn main() -> ExitCode {
    match run(Args::parse().task) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<ExitCode> {
    match task {
        Task::HostInit { name, directory, group, docker } => lab::host_init(&name, &directory, &group, docker)?,
        Task::HostRun { command } => return host_run(&command),
        Task::Datagrams { to, times, payloads } => datagrams(to, times, &payloads)?,
        Task::Demo => demo::run()?,
        Task::Clean => {
            for path in scratch::clean()? {
                println!("removed {}", path.display());
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn host_run(command: &[OsString]) -> Result<ExitCode> {
    let scratch = Scratch::new()?;
    let host = Host::boot(&scratch, "alone", Docker::Yes)?;
    // Entering the host's mounts moves to the root directory.
    let status = host
        .command("sh")
        .args(["-c", r#"cd "$0" && exec "$@""#])
        .arg(std::env::current_dir().context("no current directory")?)
        .args(command)
        .status()
        .context("cannot start nsenter")?;
    Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)))
}

fn datagrams(to: SocketAddr, times: u32, payloads: &[String]) -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0").context("cannot open a socket")?;
    for _ in 0..times {
        for payload in payloads {
            let bytes: Result<Vec<u8>, _> = (0..payload.len())
                .step_by(2)
                .map(|at| u8::from_str_radix(payload.get(at..at + 2).unwrap_or("odd"), 16))
                .collect();
            let bytes = bytes.with_context(|| format!("{payload:?} is not a row of bytes"))?;
            socket.send_to(&bytes, to).with_context(|| format!("cannot send to {to}"))?;
        }
    }
    Ok(())
}
