//! The lab's own program: brings up hosts for other programs, shows a cluster (`demo`), tidies up.

mod demo;
mod soak;
mod vm;

use std::net::UdpSocket;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use lab::footprint::{self, Effort};
use lab::host::{Docker, Host};
use lab::node::Datapath;
use lab::scratch::{self, Scratch};

/// How long an answer to datagrams is waited for after the last.
const ANSWER: Duration = Duration::from_millis(1_500);

const USAGE: &str = "usage: lab demo                       two nodes and a cluster on this machine, step by step
       lab footprint DAEMON [--short]  what a daemon costs an idle node
       lab soak [OPTION VALUE]...      faults and operations at random on two nodes under traffic (see `cargo xtask soak --help`)
       lab vm MACHINE OPTION VALUE...  other kernels, in emulators (see `cargo xtask vm`)
       lab host-run -- PROGRAM ARGUMENTS  run a program on a simulated host with its own dockerd
       lab clean                      remove what killed runs have left";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<ExitCode> {
    match words {
        ["demo"] => demo::run()?,
        ["footprint", daemon, short @ ..] => return footprint(Path::new(daemon), short.contains(&"--short")),
        ["soak", options @ ..] => soak::run(options)?,
        ["vm", machine, options @ ..] => vm::run(machine, options)?,
        ["host-run", "--", command @ ..] => return host_run(command),
        ["clean"] => {
            for path in scratch::clean()? {
                println!("removed {}", path.display());
            }
        }
        // For the lab itself: the first process of a host, and a sender of datagrams given as hexadecimal digits.
        ["host-init", name, directory, group, docker @ ..] => {
            lab::host_init(name, Path::new(directory), group, docker.contains(&"--docker"))?;
        }
        ["datagrams", to, times, payloads @ ..] => datagrams(to, times.parse()?, payloads)?,
        ["relay", port, to, delay, rate] => {
            lab::relay::run(port.parse()?, to.parse()?, Duration::from_millis(delay.parse()?), rate.parse()?)?;
        }
        _ => bail!("{USAGE}"),
    }
    Ok(ExitCode::SUCCESS)
}

fn footprint(daemon: &Path, short: bool) -> Result<ExitCode> {
    let effort = if short { Effort::SHORT } else { Effort::FULL };
    let mut exceeded = 0;
    for datapath in [Datapath::Ebpf, Datapath::Tun] {
        println!(
            "an idle node with two instances, its overlay on {}, watched for {:?}:",
            datapath.name(),
            effort.watch
        );
        let (text, beyond) = footprint::measure(daemon, datapath, effort)?.report();
        println!("{text}");
        exceeded += beyond;
    }
    if exceeded > 0 {
        bail!("{exceeded} figures exceed their limits");
    }
    Ok(ExitCode::SUCCESS)
}

fn host_run(command: &[&str]) -> Result<ExitCode> {
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

/// Sends all of them so often, and prints how many datagrams came back.
fn datagrams(to: &str, times: u32, payloads: &[&str]) -> Result<()> {
    let digits = |payload: &&str| -> Result<Vec<u8>> {
        let bytes: Result<_, _> = (0..payload.len())
            .step_by(2)
            .map(|at| u8::from_str_radix(payload.get(at..at + 2).unwrap_or("odd"), 16))
            .collect();
        bytes.with_context(|| format!("{payload:?} is not a row of bytes"))
    };
    let payloads = payloads.iter().map(digits).collect::<Result<Vec<_>>>()?;
    let socket = UdpSocket::bind("0.0.0.0:0").context("cannot open a socket")?;
    for _ in 0..times {
        for payload in &payloads {
            socket.send_to(payload, to).with_context(|| format!("cannot send to {to}"))?;
        }
    }
    socket.set_read_timeout(Some(ANSWER)).context("cannot wait for an answer")?;
    let mut buffer = [0; 2048];
    let answers = std::iter::from_fn(|| socket.recv(&mut buffer).ok()).take(1_000).count();
    println!("{answers} answers");
    Ok(())
}
