//! What was typed. The daemon's options become settings of `config`; everything else is asked of a running daemon over its socket.

mod ask;
mod describe;
mod exec;
mod hardware;
mod look;
mod net;
mod table;
mod upgrade;
mod watch;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use clap::{Args, CommandFactory, Parser, Subcommand, error::ErrorKind};

use crate::api::Selector;
use crate::api::dto::upgrade::Upgrade;
use crate::config::{self, Flag, Origin, Sources};
use crate::runtime::containerd::KEEP_LOG;

/// What the environment may name that is no setting of the daemon.
const CONFIG: &str = "NODE_ENGINE_CONFIG";
const SOCKET: &str = "NODE_ENGINE_SOCKET";
const LOG: &str = "NODE_ENGINE_LOG";

/// The daemon on every machine of an edge cluster: runs workloads, connects them, reports the node.
///
/// Without a command it is the daemon and belongs to the cluster that --cluster names. `node-engine standalone` is a cluster of its
/// own. The other commands ask the daemon that runs on this machine.
#[derive(Debug, Parser)]
#[command(name = "node-engine", version, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    daemon: DaemonArgs,
    #[command(flatten)]
    shared: SharedArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Clone, Debug, Default, Args)]
struct SharedArgs {
    /// Socket of the daemon to ask [default: api.sock in the run directory] [env: NODE_ENGINE_SOCKET]
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Tell more: -v each turn taken, -vv everything
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    /// What is logged, such as `debug` or `info,node_engine::control=trace` [env: NODE_ENGINE_LOG]
    #[arg(long, global = true, value_name = "FILTER")]
    log: Option<String>,
}

/// Options of the daemon; each is a setting of the configuration file too.
#[derive(Clone, Debug, Default, PartialEq, Eq, Args)]
pub struct DaemonArgs {
    /// The cluster manager this node belongs to
    #[arg(long, value_name = "HOST[:PORT]")]
    cluster: Option<String>,
    /// Generation of the cluster: auto, g1, g1b, g2, g4
    #[arg(long)]
    generation: Option<String>,
    /// Name of this node [default: its host name]
    #[arg(long)]
    name: Option<String>,
    /// What carries packets: auto, ebpf, ebpf-plain, tun
    #[arg(long)]
    datapath: Option<String>,
    /// Interface towards the other nodes [default: the one that leads to the cluster]
    #[arg(long, value_name = "INTERFACE")]
    uplink: Option<String>,
    /// Address at which the other nodes reach this one [default: the uplink's]
    #[arg(long, value_name = "ADDRESS")]
    public_ip: Option<String>,
    /// UDP port of the overlay [default: 50103]
    #[arg(long, value_name = "PORT")]
    tunnel_port: Option<String>,
    /// What happens to workloads when the daemon is stopped: leave, stop
    #[arg(long, value_name = "FATE")]
    on_exit: Option<String>,
    /// What outlives a reboot [default: /var/lib/node-engine]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<String>,
    /// What a reboot forgets [default: /run/node-engine]
    #[arg(long, value_name = "DIR")]
    run_dir: Option<String>,
    /// Socket or address of the Docker daemon
    #[arg(long, value_name = "URL")]
    docker_host: Option<String>,
    /// How often an instance that falls is started again in its place before the cluster is told; 0: never [default: 5]
    #[arg(long, value_name = "N")]
    restart_limit: Option<String>,
    /// Configuration file [default: /etc/node-engine/config.toml] [env: NODE_ENGINE_CONFIG]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Be the daemon (as without a command)
    Run(DaemonArgs),
    /// Be a cluster and, unless told otherwise, its first node
    Standalone(StandaloneArgs),
    /// What the daemon is and how it is
    Status(Output),
    /// Instances on this node, or of the cluster where this machine is one
    Ps {
        /// Only those on this node
        #[arg(long)]
        local: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Why an instance on this node is not what it should be: what is wanted, what is, and what it waits for
    Explain {
        #[arg(value_name = "INSTANCE")]
        instance: Selector,
        #[command(flatten)]
        output: Output,
    },
    /// The last output of an instance on this node
    Logs {
        #[arg(value_name = "INSTANCE")]
        instance: Selector,
        /// Bytes from the end
        #[arg(long, value_name = "BYTES")]
        tail: Option<usize>,
        /// Go on with what it adds, until it ends
        #[arg(long, short)]
        follow: bool,
    },
    /// Everything that is known of an instance on this node
    Inspect {
        #[arg(value_name = "INSTANCE")]
        instance: Selector,
        #[command(flatten)]
        output: Output,
    },
    /// What instances on this node use: CPU, memory, disk, network
    Stats {
        /// Only this one
        #[arg(value_name = "INSTANCE")]
        instance: Option<Selector>,
        #[command(flatten)]
        repeat: watch::Repeat,
    },
    /// What this machine is made of and what is attached to it: CPU, memory, displays, disks, networks, sensors
    Hardware(Output),
    /// What is known of this node as metrics for Prometheus
    Metrics,
    /// Run a command in an instance on this node; its exit code becomes that of this command
    Exec(exec::ExecArgs),
    /// What happens on this node: instances, devices, the cluster
    Events(look::EventsArgs),
    /// Deploy a service
    Deploy(describe::DeployArgs),
    /// Take down an instance (NAME#N) or a whole service (NAME)
    Delete {
        #[arg(value_name = "NAME[#N]")]
        target: Selector,
    },
    /// Bring a service to so many instances
    Replicate {
        #[arg(value_name = "NAME")]
        service: Selector,
        #[arg(value_name = "N")]
        replicas: u32,
    },
    /// Move an instance to another node; the new one runs before the old one ends
    Move {
        #[arg(value_name = "NAME#N")]
        instance: Selector,
        /// Name or id of the node
        #[arg(value_name = "NODE")]
        node: String,
    },
    /// The nodes of the cluster that this machine is
    Nodes(Output),
    /// Look at the overlay: flows, services, peers, drops
    #[command(subcommand)]
    Net(net::NetCommand),
    /// Remove everything that node-engine has made on this machine; works without the daemon
    Uninstall {
        #[command(flatten)]
        daemon: DaemonArgs,
        /// Remove what outlives a reboot too: the node's identity and addresses
        #[arg(long)]
        purge: bool,
    },
    /// What would change if this program took over from the daemon that runs, and whether anybody would notice: ends with 0 if not,
    /// with 1 otherwise
    Upgrade {
        #[command(flatten)]
        daemon: DaemonArgs,
        /// Look, and change nothing
        #[arg(long, required = true)]
        check: bool,
        #[command(flatten)]
        output: Output,
    },
    /// The version
    Version,
    /// Stay with a command from before its start to its end: what the daemon runs for workloads of its own
    #[command(hide = true)]
    Supervise {
        stage: String,
        directory: PathBuf,
        #[arg(default_value = "")]
        own: String,
    },
    /// Keep the output of a container: what containerd runs for each
    #[command(name = KEEP_LOG, hide = true)]
    KeepLog { file: PathBuf },
    /// Look at a WebAssembly module, or run it: what the daemon runs for workloads of its own
    #[command(hide = true)]
    Interpret { stage: String, directory: PathBuf },
}

#[derive(Clone, Debug, Args)]
struct StandaloneArgs {
    #[command(flatten)]
    daemon: DaemonArgs,
    /// Be the cluster alone, without a node on this machine
    #[arg(long)]
    no_node: bool,
    /// Address that nodes reach this cluster at; the ports are open to whoever reaches them
    #[arg(long, value_name = "ADDRESS", default_value = "0.0.0.0")]
    listen: IpAddr,
    /// Port where nodes register
    #[arg(long, value_name = "PORT", default_value_t = 10100)]
    http_port: u16,
    /// Port where nodes of the first generation register
    #[arg(long, value_name = "PORT", default_value_t = 10000)]
    socketio_port: u16,
    /// Port of the broker
    #[arg(long, value_name = "PORT", default_value_t = 10003)]
    broker_port: u16,
    /// Use this broker in place of one's own; nodes look for it on the cluster's machine
    #[arg(long, value_name = "HOST:PORT", value_parser = host_and_port, conflicts_with = "broker_port")]
    broker: Option<(String, u16)>,
    /// Give nodes of the first generation their subnet with the registration
    #[arg(long)]
    first_generation: bool,
}

#[derive(Clone, Copy, Debug, Args)]
struct Output {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What the process is to do.
#[derive(Debug)]
pub enum Task {
    Daemon(Sources),
    Standalone(Sources, StandaloneChoice),
    /// A question to a daemon, or something done without one.
    Ask(Question),
    Uninstall {
        sources: Sources,
        purge: bool,
    },
    Upgrade {
        sources: Sources,
        socket: PathBuf,
        json: bool,
    },
    Version,
    /// A stage of a workload's supervision, the instance's directory, and the namespaces that are its own.
    Supervise(String, PathBuf, String),
    /// Where the output goes that comes from containerd.
    KeepLog(PathBuf),
    /// A stage of a WebAssembly module's life, and the instance's directory.
    Interpret(String, PathBuf),
}

/// How to be a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StandaloneChoice {
    pub node: bool,
    pub listen: IpAddr,
    pub http_port: u16,
    pub socketio_port: u16,
    pub broker_port: u16,
    pub broker: Option<(String, u16)>,
    pub first_generation: bool,
}

/// Something a running daemon is asked.
#[derive(Debug)]
pub struct Question {
    socket: PathBuf,
    command: ask::Ask,
}

/// What is logged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogChoice {
    /// A filter that somebody has written, and where.
    pub filter: Option<(Origin, String)>,
    pub verbose: u8,
}

/// Variables by name.
pub type Environment = BTreeMap<String, String>;

/// Of this process, and below it what the service manager gives the daemon: whoever asks or removes it means the same node. Variables that
/// are not text are nobody's setting.
pub fn environment() -> Environment {
    let mut environment = config::environment_file(Path::new(config::ENVIRONMENT_FILE));
    // What the daemon is to say is no matter of whoever asks it.
    environment.remove(LOG);
    let own = std::env::vars_os();
    environment.extend(own.filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?))));
    environment
}

impl Cli {
    /// What was typed counts more than what the environment says.
    pub fn log(&self, environment: &Environment) -> LogChoice {
        let SharedArgs { log, verbose, .. } = &self.shared;
        let filter = match (log, verbose) {
            (Some(filter), _) => Some((Origin::Flag("--log"), filter.clone())),
            (None, 0) => said(environment, LOG).map(|filter| (Origin::Environment(LOG), filter.to_owned())),
            (None, _) => None,
        };
        LogChoice { filter, verbose: *verbose }
    }

    /// Sorts what was typed by what it asks for.
    ///
    /// # Errors
    /// Where options of the daemon stand before a command that does not take them.
    pub fn task(self, environment: &Environment) -> Result<Task, clap::Error> {
        let Self { daemon, shared, command } = self;
        let command = match command {
            None => return Ok(Task::Daemon(daemon.sources(environment))),
            Some(Command::Run(args)) => return Ok(Task::Daemon(daemon.under(args).sources(environment))),
            Some(Command::Standalone(args)) => {
                let sources = daemon.under(args.daemon.clone()).sources(environment);
                return Ok(Task::Standalone(sources, args.choice()));
            }
            Some(Command::Uninstall { daemon: args, purge }) => {
                return Ok(Task::Uninstall { sources: daemon.under(args).sources(environment), purge });
            }
            Some(Command::Upgrade { daemon: args, output, .. }) => {
                let sources = daemon.under(args).sources(environment);
                let socket = shared.socket(&sources);
                return Ok(Task::Upgrade { sources, socket, json: output.json });
            }
            Some(Command::Supervise { stage, directory, own }) => return Ok(Task::Supervise(stage, directory, own)),
            Some(Command::KeepLog { file }) => return Ok(Task::KeepLog(file)),
            Some(Command::Interpret { stage, directory }) => return Ok(Task::Interpret(stage, directory)),
            Some(command) => command,
        };
        if daemon.flags().iter().any(|flag| flag.key != "run_dir") {
            let message = "options of the daemon go with `run`, `standalone` or no command";
            return Err(Self::command().error(ErrorKind::ArgumentConflict, message));
        }
        let ask = match command {
            Command::Status(output) => ask::Ask::Status { json: output.json },
            Command::Ps { local, output } => ask::Ask::Ps { local, json: output.json },
            Command::Explain { instance, output } => ask::Ask::Explain { instance, json: output.json },
            Command::Logs { instance, tail, follow } => ask::Ask::Logs { instance, tail, follow },
            Command::Inspect { instance, output } => ask::Ask::Inspect { instance, json: output.json },
            Command::Stats { instance, repeat } => ask::Ask::Stats { instance, repeat },
            Command::Hardware(output) => ask::Ask::Hardware { json: output.json },
            Command::Metrics => ask::Ask::Metrics,
            Command::Exec(args) => ask::Ask::Exec(args),
            Command::Events(args) => ask::Ask::Events(args),
            Command::Deploy(args) => ask::Ask::Deploy(Box::new(args)),
            Command::Delete { target } => ask::Ask::Delete { target },
            Command::Replicate { service, replicas } => ask::Ask::Replicate { service, replicas },
            Command::Move { instance, node } => ask::Ask::Move { instance, node },
            Command::Nodes(output) => ask::Ask::Nodes { json: output.json },
            Command::Net(command) => ask::Ask::Net(command),
            Command::Version => return Ok(Task::Version),
            Command::Run(_)
            | Command::Standalone(_)
            | Command::Uninstall { .. }
            | Command::Upgrade { .. }
            | Command::Supervise { .. }
            | Command::KeepLog { .. }
            | Command::Interpret { .. } => unreachable!("returned above"),
        };
        let socket = shared.socket(&daemon.sources(environment));
        Ok(Task::Ask(Question { socket, command: ask }))
    }
}

/// What `upgrade --check` has found, as it was asked for.
pub fn shown_upgrade(found: &Upgrade, json: bool) -> String {
    ask::shown(json, found, upgrade::text)
}

impl Question {
    /// Asks, and prints the answer. Gives the exit code: 0, or that of a command which was run in an instance.
    ///
    /// # Errors
    /// One line that says what to do.
    pub async fn ask(self) -> anyhow::Result<u8> {
        self.command.run(&self.socket).await
    }
}

impl SharedArgs {
    /// The socket that was named, or else where the daemon of this machine is configured to listen. A configuration that cannot be read is
    /// the daemon's trouble.
    fn socket(self, sources: &Sources) -> PathBuf {
        if let Some(named) = self.socket.or_else(|| said(&sources.environment, SOCKET).map(PathBuf::from)) {
            return named;
        }
        let run_dir = config::load(sources).map(|loaded| loaded.config.run_dir);
        run_dir.as_deref().unwrap_or(Path::new("/run/node-engine")).join("api.sock")
    }
}

impl DaemonArgs {
    fn sources(&self, environment: &Environment) -> Sources {
        let file = self.config.clone().or_else(|| said(environment, CONFIG).map(PathBuf::from));
        Sources { file, environment: environment.clone(), flags: self.flags() }
    }

    fn flags(&self) -> Vec<Flag> {
        [
            ("--cluster", "cluster.host", &self.cluster),
            ("--generation", "cluster.generation", &self.generation),
            ("--name", "node_name", &self.name),
            ("--datapath", "network.datapath", &self.datapath),
            ("--uplink", "network.uplink", &self.uplink),
            ("--public-ip", "network.public_ip", &self.public_ip),
            ("--tunnel-port", "network.tunnel_port", &self.tunnel_port),
            ("--on-exit", "on_exit", &self.on_exit),
            ("--state-dir", "state_dir", &self.state_dir),
            ("--run-dir", "run_dir", &self.run_dir),
            ("--docker-host", "runtime.docker_host", &self.docker_host),
            ("--restart-limit", "runtime.restart_limit", &self.restart_limit),
        ]
        .into_iter()
        .filter_map(|(name, key, value)| Some(Flag { name, key, value: value.clone()? }))
        .collect()
    }

    /// What stands after the command wins over what stands before it.
    fn under(self, over: Self) -> Self {
        Self {
            cluster: over.cluster.or(self.cluster),
            generation: over.generation.or(self.generation),
            name: over.name.or(self.name),
            datapath: over.datapath.or(self.datapath),
            uplink: over.uplink.or(self.uplink),
            public_ip: over.public_ip.or(self.public_ip),
            tunnel_port: over.tunnel_port.or(self.tunnel_port),
            on_exit: over.on_exit.or(self.on_exit),
            state_dir: over.state_dir.or(self.state_dir),
            run_dir: over.run_dir.or(self.run_dir),
            docker_host: over.docker_host.or(self.docker_host),
            restart_limit: over.restart_limit.or(self.restart_limit),
            config: over.config.or(self.config),
        }
    }
}

impl StandaloneArgs {
    fn choice(self) -> StandaloneChoice {
        StandaloneChoice {
            node: !self.no_node,
            listen: self.listen,
            http_port: self.http_port,
            socketio_port: self.socketio_port,
            broker_port: self.broker_port,
            broker: self.broker,
            first_generation: self.first_generation,
        }
    }
}

/// An empty variable is an unset one, as scripts have it.
fn said<'a>(environment: &'a Environment, name: &str) -> Option<&'a str> {
    environment.get(name).map(String::as_str).filter(|value| !value.is_empty())
}

fn host_and_port(text: &str) -> Result<(String, u16), String> {
    let (host, port) = text.rsplit_once(':').ok_or("expected HOST:PORT")?;
    let port = port.parse().map_err(|_| "the port is not a number from 1 to 65535")?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    if host.is_empty() || port == 0 { Err("expected HOST:PORT".into()) } else { Ok((host.to_owned(), port)) }
}

#[cfg(test)]
mod tests;
