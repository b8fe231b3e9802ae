//! WebAssembly modules: an interpreter in this binary, run again in the instance's namespaces and control group and looked after like a
//! plain command. A module sees nothing of the node but what WASI preview 1 hands it: arguments, environment, clocks, chance, its
//! output, sockets that listen at the job's ports, volumes and added files.

mod module;
mod order;
mod run;
mod trial;

pub use run::run;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use {module::understand, order::round_trip};

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use async_trait::async_trait;
use tokio::process::Command;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

pub use super::fetched::Policy;
use super::fetched::{Directories, remove};
use super::supervised::{Home, Keeper, Launch};
use super::user::Accounts;
use super::{Adopted, AdoptedState, Exit, Follow, Runtime, RuntimeError, Sandbox, fetch, surroundings, unsupported};
use crate::model::{InstanceDetails, InstanceId, InstanceSpec, InstanceUsage, Limits, Mount, Protocol, Technology};
use order::{End, Order};

/// What the interpreter itself may use beside the module's memory.
const OVERHEAD_MIB: u64 = 48;
/// Modules that are fetched and looked at at the same time.
const FETCHES: usize = 2;
/// A look takes a moment; a machine under load may be slow.
const CHECK: Duration = Duration::from_secs(60);
const TRIAL: Duration = Duration::from_secs(20);
/// Names further ports to listen at, which are not published on the node.
const LISTEN_PORTS: &str = "LISTEN_PORTS";

/// Modules on this node.
#[derive(Debug)]
pub struct WasmRuntime {
    keeper: Keeper,
    policy: Policy,
    /// The binary that interprets: this one.
    interpreter: PathBuf,
    /// Modules, and what each instance has of files.
    cache: PathBuf,
    instances: Directories,
    fetches: Semaphore,
}

impl WasmRuntime {
    /// `state_dir` keeps modules over a reboot. Must be called inside a tokio runtime.
    pub fn new(home: Home, state_dir: &Path, policy: Policy) -> Self {
        Self {
            interpreter: home.supervisor.clone(),
            keeper: Keeper::new(Technology::Wasm, home),
            policy,
            cache: state_dir.join("wasm/modules"),
            instances: Directories(state_dir.join("wasm/instances")),
            fetches: Semaphore::new(FETCHES),
        }
    }

    /// Whether modules are allowed and really run here, found out by running one. What does not work is told once.
    pub async fn works(&self) -> bool {
        if !self.policy.allowed {
            return false;
        }
        let spec = InstanceSpec::new(trial(), Technology::Wasm);
        let directory = self.instances.of(&spec.id);
        let made = fresh(&directory).and_then(|()| {
            fs::write(order::module(&directory), trial::MODULE)?;
            Order { arguments: vec!["trial".into()], user: run::NOBODY, ..Order::default() }.write(&directory)
        });
        let tried = match made {
            Ok(()) => self.keeper.trial(&spec, self.launch(&spec), trial::GOOD, TRIAL).await,
            Err(error) => Err(step("make a trial", &error)),
        };
        // What is left is removed by the next one.
        let _ = remove(&directory);
        if let Err(error) = &tried {
            tracing::warn!(%error, "WebAssembly is allowed by the configuration, and does not run on this machine");
        }
        tried.is_ok()
    }

    fn launch(&self, spec: &InstanceSpec) -> Launch {
        let directory = self.instances.of(&spec.id).display().to_string();
        Launch {
            program: "/proc/self/exe".into(),
            arguments: vec!["interpret".into(), "run".into(), directory],
            directory: "/".into(),
            host_name: surroundings::host_name(&spec.id),
            ..Launch::default()
        }
    }

    /// The module, looked at and kept for this instance.
    async fn fetch(&self, spec: &InstanceSpec) -> Result<(), RuntimeError> {
        let _turn = self.fetches.acquire().await.map_err(|error| step("fetch", &error))?;
        let found = fetch::image(&spec.image, &self.cache, self.policy.files, "wasm").await?;
        let part = self.instances.part();
        let copied = spawn_blocking(move || {
            let part = part()?;
            // The one that was looked at is the one that runs, whatever becomes of the file it came from.
            fs::copy(found, order::module(part.path())).map(|_| part)
        });
        let copied = copied.await.map_err(|error| step("copy the module", &error))?;
        let part = copied.map_err(|error| step("copy the module", &error))?;
        self.instances.place(part, &spec.id).await.map_err(|error| step("copy the module", &error))?;
        let directory = self.instances.of(&spec.id);
        self.check(&directory).await
    }

    /// By a process of its own: the daemon reads no modules.
    async fn check(&self, directory: &Path) -> Result<(), RuntimeError> {
        let refused = |reason: String| RuntimeError::Refused { what: "module", reason };
        let mut command = Command::new(&self.interpreter);
        command.args(["interpret", "check"]).arg(directory).env_clear().kill_on_drop(true);
        command.stdin(Stdio::null()).stderr(Stdio::null());
        let looked = timeout(CHECK, command.output()).await;
        let output = looked.map_err(|_| refused(format!("looking at it takes longer than {CHECK:?}")))?;
        let output = output.map_err(|error| step("look at the module", &error))?;
        match output.status.code() {
            Some(0) => Ok(()),
            Some(1) => Err(refused(String::from_utf8_lossy(&output.stdout).into_owned())),
            _ => Err(refused(format!("looking at it takes more than it may ({})", output.status))),
        }
    }

    /// What there is to say of an end.
    fn explained(&self, exit: Exit) -> Exit {
        match End::read(&self.instances.of(&exit.instance)) {
            None => exit,
            Some(End::OutOfMemory) => Exit { out_of_memory: true, ..exit },
            Some(End::Failed(reason)) => Exit { reason: Some(reason), ..exit },
        }
    }
}

#[async_trait]
impl Runtime for WasmRuntime {
    fn technology(&self) -> Technology {
        Technology::Wasm
    }

    async fn prepare(&self, spec: &InstanceSpec) -> Result<Sandbox, RuntimeError> {
        self.policy.permit("wasm", "WebAssembly")?;
        unsupported::refuse(spec)?;
        if let Some(directory) = &spec.directory {
            return Err(refused("working directory", format!("a module has none, and {directory} is asked for")));
        }
        let user = spec.user.as_deref().map_or(Ok(run::NOBODY), |user| Accounts::of_node().resolve(user));
        let (ports, user) = (ports(spec)?, user.map_err(|reason| refused("user", reason))?);
        self.fetch(spec).await?;
        let directory = self.instances.of(&spec.id);
        let (root, mounts) = root(&directory, &spec.mounts)?;
        let arguments = std::iter::once(name(&spec.image)).chain(spec.command.iter().cloned()).collect();
        let environment = surroundings::environment(spec).collect();
        let order = Order { arguments, environment, ports, root, memory_mib: spec.limits.memory_mib, user };
        order.write(&directory).map_err(|error| step("write its order", &error))?;
        let sandbox = self.keeper.make(spec).await?;
        let memory_mib = spec.limits.memory_mib.map(|mib| mib.saturating_add(OVERHEAD_MIB));
        let launch = Launch { mounts, ..self.launch(spec) };
        self.keeper.supervise(&spec.id, launch, Limits { memory_mib, ..spec.limits }).await?;
        Ok(sandbox)
    }

    async fn start(&self, instance: &InstanceId) -> Result<(), RuntimeError> {
        self.keeper.start(instance).await
    }

    async fn stop(&self, instance: &InstanceId, grace: Duration) -> Result<(), RuntimeError> {
        self.keeper.stop(instance, grace).await?;
        self.instances.remove(instance).await.map_err(|error| step("remove its directory", &error))
    }

    async fn adopt(&self) -> Result<Vec<Adopted>, RuntimeError> {
        let adopted = self.keeper.adopt().await?;
        self.instances.keep_only(&adopted).await;
        let explain = |one: Adopted| match one.state {
            AdoptedState::Exited(exit) => Adopted { state: AdoptedState::Exited(self.explained(exit)), ..one },
            AdoptedState::Running(_) | AdoptedState::Incomplete | AdoptedState::Left => one,
        };
        Ok(adopted.into_iter().map(explain).collect())
    }

    async fn usage(&self) -> Result<Vec<InstanceUsage>, RuntimeError> {
        self.keeper.usage().await
    }

    async fn logs(&self, instance: &InstanceId, tail: usize) -> Result<Vec<u8>, RuntimeError> {
        self.keeper.logs(instance, tail).await
    }

    /// Of the module, and not of what interprets it.
    async fn inspect(&self, instance: &InstanceId) -> Result<InstanceDetails, RuntimeError> {
        let details = self.keeper.inspect(instance).await?;
        let Ok(order) = Order::read(&self.instances.of(instance)) else { return Ok(details) };
        let names = order.environment.iter().map(|entry| entry.split('=').next().unwrap_or_default().into());
        Ok(InstanceDetails {
            command: order.arguments.clone(),
            environment: names.collect(),
            user: format!("{}:{}", order.user.0, order.user.1),
            ..details
        })
    }

    async fn follow(&self, instance: &InstanceId, tail: usize) -> Result<Follow, RuntimeError> {
        self.keeper.follow(instance, tail).await
    }

    async fn exited(&self) -> Exit {
        self.explained(self.keeper.exited().await)
    }
}

/// Where the module listens: the job's ports, and those of its environment that are not among them.
fn ports(spec: &InstanceSpec) -> Result<Vec<u16>, RuntimeError> {
    if let Some(udp) = spec.ports.iter().find(|port| port.protocol == Protocol::Udp) {
        return Err(refused("port", format!("{udp}: WASI preview 1 has no sockets for UDP")));
    }
    let mut ports: Vec<u16> = spec.ports.iter().map(|port| port.container).collect();
    let further = spec.environment.iter().find_map(|entry| entry.strip_prefix(LISTEN_PORTS)?.strip_prefix('='));
    for text in further.into_iter().flat_map(|list| list.split(',')) {
        let port = text.trim().parse().ok().filter(|port| *port != 0);
        ports.push(port.ok_or_else(|| refused(LISTEN_PORTS, format!("{text:?} is no port")))?);
    }
    let mut seen = std::collections::BTreeSet::new();
    ports.retain(|port| seen.insert(*port));
    Ok(ports)
}

/// A directory with a place for each mount, which the module sees as `/`, and what is to be mounted there in the instance's own mounts.
/// Empty where there are none: then the module has no files.
fn root(directory: &Path, asked: &[Mount]) -> Result<(PathBuf, Vec<Mount>), RuntimeError> {
    if asked.is_empty() {
        return Ok((PathBuf::new(), Vec::new()));
    }
    let root = directory.join("root");
    let place = |mount: &Mount| {
        let below = Path::new(&mount.target).strip_prefix("/").ok();
        let plain = |path: &&Path| path.components().all(|part| matches!(part, Component::Normal(_)));
        let below = below.filter(plain).filter(|path| !path.as_os_str().is_empty());
        let target = root.join(below.ok_or_else(|| refused("mount path", format!("{:?}", mount.target)))?);
        let made = if mount.source.is_dir() {
            fs::create_dir_all(&target)
        } else {
            fs::create_dir_all(target.parent().unwrap_or(&root)).and_then(|()| fs::write(&target, b""))
        };
        made.map_err(|error| step("make a place for its volumes", &error))?;
        Ok(Mount { target: target.to_string_lossy().into_owned(), ..mount.clone() })
    };
    let mounts = asked.iter().map(place).collect::<Result<_, _>>()?;
    Ok((root, mounts))
}

/// What a module finds as its own name.
fn name(image: &str) -> String {
    let path = image.split(['#', '?']).next().unwrap_or(image);
    path.rsplit('/').next().filter(|name| !name.is_empty()).unwrap_or("module").to_owned()
}

/// Made anew, and nobody else's.
fn fresh(directory: &Path) -> io::Result<()> {
    remove(directory)?;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)
}

fn refused(what: &'static str, reason: String) -> RuntimeError {
    RuntimeError::Refused { what, reason }
}

fn step(step: &'static str, error: &dyn std::error::Error) -> RuntimeError {
    RuntimeError::Step { step, reason: error.to_string() }
}

/// No cluster names an instance so: it would have to be the name of a service of its own.
fn trial() -> InstanceId {
    "node.engine.trial.wasm.instance.0".parse().expect("a name of four parts and a number")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::PortMapping;

    #[test]
    fn a_module_listens_where_its_job_says() {
        let id: InstanceId = "a.b.c.d.instance.0".parse().expect("an id");
        let port = |container, protocol| PortMapping { host: 8000, container, protocol };
        let spec = |mapped: &[PortMapping], listen: &str| InstanceSpec {
            ports: mapped.to_vec(),
            environment: vec![format!("LISTEN_PORTS={listen}"), "LISTEN_PORTS_X=1".into()],
            ..InstanceSpec::new(id.clone(), Technology::Wasm)
        };
        let (web, dns) = (port(80, Protocol::Tcp), port(53, Protocol::Udp));
        assert_eq!(ports(&spec(&[web], "9000, 80,9001")).expect("good"), [80, 9000, 9001]);
        let error = ports(&spec(&[web, dns], "1")).expect_err("UDP").to_string();
        assert_eq!(error, "port: 8000:53/udp: WASI preview 1 has no sockets for UDP");
        for bad in ["", "0", "x", "65536", "80,,81"] {
            let error = ports(&spec(&[], bad)).expect_err(bad).to_string();
            assert!(error.starts_with("LISTEN_PORTS: "), "{error}");
        }
    }

    #[test]
    fn mounts_have_a_place_below_the_modules_root() {
        let dir = tempfile::tempdir().expect("a directory");
        let (volume, file) = (dir.path().join("volume"), dir.path().join("file"));
        fs::create_dir(&volume).expect("a directory");
        fs::write(&file, "x").expect("a file");
        let mount =
            |source: &Path, target: &str| Mount { source: source.into(), target: target.into(), read_only: true };
        let (top, mounts) = root(dir.path(), &[mount(&volume, "/mnt/a"), mount(&file, "/etc/x/y")]).expect("good");
        assert!(top.join("mnt/a").is_dir() && top.join("etc/x/y").is_file());
        assert_eq!(mounts[0].target, top.join("mnt/a").to_string_lossy());
        assert_eq!((&mounts[1].source, mounts[1].read_only), (&file, true));
        for bad in ["/", "relative", "/a/../../b"] {
            assert!(root(dir.path(), &[mount(&volume, bad)]).is_err(), "{bad}");
        }
        assert_eq!(root(dir.path(), &[]).expect("none"), (PathBuf::new(), Vec::new()));
    }

    #[test]
    fn a_module_is_named_as_its_image() {
        for (image, expected) in [
            ("https://host/a/b.wasm?x=/y#sha256=1", "b.wasm"),
            ("file:///a.wasm", "a.wasm"),
            ("https://host/", "module"),
        ] {
            assert_eq!(name(image), expected);
        }
    }
}
