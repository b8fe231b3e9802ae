//! Parse, set up tracing, run, exit code: 1 for a failure, 2 for a usage error, 75 where the version before is to be started again.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use node_engine::cli::{Cli, LogChoice, Task, environment, shown_upgrade};
use node_engine::config::{self, ConfigError, Loaded, Origin, Sources};
use node_engine::{drain::Drain, engine, heap, notify, output};
use tokio::runtime::{Builder, Runtime};
use tracing_subscriber::EnvFilter;

/// The embedded broker calls it an error when a client hangs up; netlink's multiplexer warns of each notification that comes while
/// its subscriber goes away.
const QUIET: &str = "rumqttd=off,netlink_proto=error";

fn main() -> ExitCode {
    notify::take_over();
    let (task, log) = {
        let (cli, environment) = (Cli::parse(), environment());
        let log = cli.log(&environment);
        (cli.task(&environment).unwrap_or_else(|error| error.exit()), log)
    };
    if let Task::Supervise(stage, directory, own) = &task {
        return node_engine::runtime::supervised::run(stage, directory, own);
    }
    if let Task::KeepLog(path) = &task {
        return node_engine::runtime::containerd::keep_log(path);
    }
    if let Task::Interpret(stage, directory) = &task {
        return node_engine::runtime::wasm::run(stage, directory);
    }
    match run(task, &log) {
        Ok(code) => code,
        Err(error) => {
            // Nobody reads the standard error: then the exit code has to do.
            let _ = writeln!(std::io::stderr(), "node-engine: {error:#}");
            ExitCode::from(match (is_usage(&error), engine::went_back(&error)) {
                (true, _) => 2,
                (_, true) => engine::WENT_BACK,
                _ => 1,
            })
        }
    }
}

fn run(task: Task, log: &LogChoice) -> anyhow::Result<ExitCode> {
    let done: anyhow::Result<()> = match task {
        Task::Supervise(..) | Task::KeepLog(_) | Task::Interpret(..) => unreachable!("returned above"),
        Task::Version => {
            let version = concat!("node-engine ", env!("CARGO_PKG_VERSION"), "\n");
            output::print(version.as_bytes()).context("write the version").map(drop)
        }
        Task::Ask(question) => {
            trace(log, "warn")?;
            let runtime = Builder::new_current_thread().enable_all().build().context("start the async runtime")?;
            return runtime.block_on(question.ask()).map(ExitCode::from);
        }
        Task::Uninstall { sources, purge } => {
            trace(log, "error")?;
            let config = load(&sources)?;
            multi_thread()?.block_on(engine::uninstall(&config, purge))
        }
        Task::Upgrade { sources, socket, json } => {
            trace(log, "error")?;
            let found = multi_thread()?.block_on(engine::upgrade(config::load(&sources), &socket))?;
            output::print(shown_upgrade(&found, json).as_bytes()).context("write what was found")?;
            return Ok(if found.hitless { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Task::Daemon(sources) => {
            trace(log, "info")?;
            let config = load(&sources)?.with_cluster()?;
            daemon(|drain| engine::run(config, None, drain))
        }
        Task::Standalone(sources, choice) => {
            trace(log, "info")?;
            let config = load(&sources)?;
            daemon(|drain| engine::run(config, Some(choice), drain))
        }
    };
    done.map(|()| ExitCode::SUCCESS)
}

fn daemon<F: Future<Output = anyhow::Result<()>>>(run: impl FnOnce(Drain) -> F) -> anyhow::Result<()> {
    heap::frugal();
    let runtime = multi_thread()?;
    let drain = Drain::new(engine::GRACE);
    let ended = runtime.block_on(async {
        engine::stop_on_signals(drain.clone()).context("listen to signals")?;
        run(drain).await
    });
    // What still blocks a thread (a disk, a driver) has had its time.
    runtime.shutdown_timeout(std::time::Duration::from_secs(1));
    ended
}

fn multi_thread() -> anyhow::Result<Runtime> {
    Builder::new_multi_thread().enable_all().build().context("start the async runtime")
}

fn load(sources: &Sources) -> Result<config::Config, ConfigError> {
    let Loaded { config, warnings } = config::load(sources)?;
    for warning in warnings {
        tracing::warn!("{warning}");
    }
    Ok(config)
}

/// Lines on the standard error: with colours on a terminal, without times where the journal adds its own.
fn trace(log: &LogChoice, usual: &str) -> Result<(), BadFilter> {
    let filter = match (&log.filter, log.verbose) {
        (Some((origin, text)), _) => {
            EnvFilter::try_new(text).map_err(|_| BadFilter { origin: origin.clone(), text: text.clone() })?
        }
        (None, 0) => EnvFilter::new(format!("{usual},{QUIET}")),
        (None, 1) => EnvFilter::new(format!("info,{QUIET},node_engine=debug")),
        (None, 2) => EnvFilter::new("debug,node_engine=trace"),
        (None, _) => EnvFilter::new("trace"),
    };
    let lines = tracing_subscriber::fmt()
        .compact()
        .with_target(log.verbose > 0)
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match std::env::var_os("JOURNAL_STREAM") {
        Some(_) => lines.without_time().init(),
        None => lines.init(),
    }
    Ok(())
}

#[derive(Debug, thiserror::Error)]
#[error("{origin}: {text:?} is not a filter such as debug or info,node_engine::control=trace")]
struct BadFilter {
    origin: Origin,
    text: String,
}

/// Was it the command line that was wrong?
fn is_usage(error: &anyhow::Error) -> bool {
    let typed = matches!(error.downcast_ref(), Some(ConfigError::Value { origin: Origin::Flag(_), .. }));
    let filter = matches!(error.downcast_ref(), Some(BadFilter { origin: Origin::Flag(_), .. }));
    typed || filter || matches!(error.downcast_ref(), Some(ConfigError::NoCluster))
}
