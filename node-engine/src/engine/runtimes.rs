//! Which technologies this node runs: every one that is configured is made, so that what an earlier run left is adopted; only those
//! that were seen to work here are announced to the cluster.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::sync::watch::Receiver;
use tokio::time::{Instant, sleep, timeout_at};

use crate::config::{Config, ContainerdChoice};
use crate::model::Technology;
use crate::runtime::containerd::{self, ContainerdRuntime, Handler, Settings, Share};
use crate::runtime::docker::DockerRuntime;
use crate::runtime::furnished::{Furnished, Grants};
use crate::runtime::process::{Policy, ProcessRuntime};
use crate::runtime::supervised::Home;
use crate::runtime::unikernel::{self, UnikernelRuntime};
use crate::runtime::volumes::Volumes;
use crate::runtime::wasm::{self, WasmRuntime};
use crate::runtime::{Resolvers, Runtime, RuntimeError};

/// An engine that is just starting may take so long to answer.
const STARTING: Duration = Duration::from_secs(10);
/// The word of a cluster that asks for containerd where `docker` is Docker's, and the directory of what it makes.
const CONTAINERD: &str = "containerd";
/// Of containers that no handler we know has made. No cluster asks for it.
const OTHERS: &str = "containerd-others";
/// And so much longer for a container that is run to see whether it does.
const TRIAL: Duration = Duration::from_secs(35);
const RETRY: Duration = Duration::from_millis(250);
/// Where Docker keeps containers, also while it does not run.
pub(super) const DOCKER_DATA: &str = "/var/lib/docker";

/// What runs workloads here.
pub(super) struct Runtimes {
    pub(super) held: Vec<Arc<dyn Runtime>>,
    pub(super) announced: Vec<Technology>,
    /// Volume drivers that answer, and where.
    pub(super) drivers: Vec<(String, PathBuf)>,
}

/// All that may run workloads here, before any was tried.
pub(super) struct Made {
    docker: DockerRuntime,
    process: ProcessRuntime,
    unikernel: UnikernelRuntime,
    wasm: WasmRuntime,
    direct: Vec<ContainerdRuntime>,
    furniture: Furniture,
    has_docker: bool,
}

/// Makes them. Nothing is asked of anybody yet.
pub(super) fn make(config: &Config, resolvers: Receiver<Resolvers>) -> Result<Made, RuntimeError> {
    let docker = DockerRuntime::new(
        config.runtime.docker_host.as_deref(),
        resolvers.clone(),
        config.runtime.registries.clone(),
    )?;
    let process = process(config, resolvers.clone());
    let (unikernel, wasm) = (unikernel(config), wasm(config));
    let furniture = Furniture::of(config)?;
    let has_docker = has_docker(&docker);
    let direct = by_containerd(config, has_docker, &resolvers)?;
    Ok(Made { docker, process, unikernel, wasm, direct, furniture, has_docker })
}

/// Finds out which of them work.
pub(super) async fn try_out(made: Made, config: &Config) -> Runtimes {
    let Made { docker, process, unikernel, wasm, direct, furniture, has_docker } = made;
    let tried = join_all(direct.iter().map(|direct| runs(direct, config)));
    let (contained, tried, plain, guests, modules, drivers) = tokio::join!(
        answers(&docker, !direct.iter().any(ContainerdRuntime::makes)),
        tried,
        process.works(),
        unikernel.works(),
        wasm.works(),
        furniture.volumes.answering()
    );
    let mut runtimes = Runtimes { held: Vec::new(), announced: Vec::new(), drivers };
    if contained || has_docker {
        runtimes.add(furniture.given_to(Arc::new(docker)), contained);
    }
    for (direct, works) in direct.into_iter().zip(tried) {
        // What does not work and never has holds nothing either.
        if works || held_by_containerd(config) {
            runtimes.add(furniture.given_to(Arc::new(direct)), works);
        }
    }
    runtimes.add(furniture.given_to(Arc::new(process)), plain);
    runtimes.add(furniture.given_to(Arc::new(unikernel)), guests);
    runtimes.add(furniture.given_to(Arc::new(wasm)), modules);
    let announced: Vec<_> = runtimes.announced.iter().map(Technology::as_str).collect();
    match announced.as_slice() {
        [] => tracing::warn!("no technology works on this node: it runs no workloads"),
        runs => tracing::info!("this node runs {}", runs.join(", ")),
    }
    runtimes
}

/// The runtimes that may hold something of ours, Docker apart.
pub(super) fn supervised(config: &Config) -> Result<Vec<Arc<dyn Runtime>>, RuntimeError> {
    let nobody = tokio::sync::watch::channel(None).1;
    let furniture = Furniture::of(config)?;
    let mut made: Vec<Arc<dyn Runtime>> =
        vec![Arc::new(process(config, nobody.clone())), Arc::new(unikernel(config)), Arc::new(wasm(config))];
    if held_by_containerd(config) || config.runtime.containerd.socket().is_some_and(|socket| socket.exists()) {
        let docker = DockerRuntime::new(
            config.runtime.docker_host.as_deref(),
            nobody.clone(),
            config.runtime.registries.clone(),
        );
        let has_docker = docker.is_ok_and(|docker| has_docker(&docker));
        made.extend(
            by_containerd(config, has_docker, &nobody)?.into_iter().map(|one| Arc::new(one) as Arc<dyn Runtime>),
        );
    }
    Ok(made.into_iter().map(|runtime| furniture.given_to(runtime)).collect())
}

/// Where there is none nothing can be held by it, and nobody should wait to hear so.
fn has_docker(docker: &DockerRuntime) -> bool {
    docker.is_installed() || Path::new(DOCKER_DATA).exists()
}

/// What instances get from the node beside what their runtime makes.
pub(super) struct Furniture {
    volumes: Arc<Volumes>,
    grants: Grants,
    state_dir: PathBuf,
}

impl Furniture {
    pub(super) fn of(config: &Config) -> Result<Self, RuntimeError> {
        let settings = &config.runtime;
        let volumes = Volumes::new(
            settings.volume_drivers.clone(),
            settings.host_path_volumes.as_deref(),
            &config.run_dir,
            &config.state_dir,
        )?;
        let grants = Grants { privileged: settings.privileged.clone() };
        Ok(Self { volumes: Arc::new(volumes), grants, state_dir: config.state_dir.clone() })
    }

    pub(super) fn given_to(&self, runtime: Arc<dyn Runtime>) -> Arc<dyn Runtime> {
        Arc::new(Furnished::new(runtime, self.volumes.clone(), self.grants.clone(), &self.state_dir))
    }
}

impl Runtimes {
    fn add(&mut self, runtime: Arc<dyn Runtime>, works: bool) {
        if works {
            self.announced.push(runtime.technology());
        }
        self.held.push(runtime);
    }
}

fn process(config: &Config, resolvers: Receiver<Resolvers>) -> ProcessRuntime {
    let policy = Policy { allowed: config.runtime.process, user: config.runtime.process_user.clone() };
    ProcessRuntime::new(home(config, &Technology::Process), policy, resolvers)
}

fn unikernel(config: &Config) -> UnikernelRuntime {
    let policy = unikernel::Policy { allowed: config.runtime.unikernel, files: config.runtime.image_files };
    UnikernelRuntime::new(home(config, &Technology::Unikernel), &config.state_dir, policy)
}

fn wasm(config: &Config) -> WasmRuntime {
    let policy = wasm::Policy { allowed: config.runtime.wasm, files: config.runtime.image_files };
    WasmRuntime::new(home(config, &Technology::Wasm), &config.state_dir, policy)
}

fn home(config: &Config, technology: &Technology) -> Home {
    Home::new(&config.run_dir, &config.state_dir, technology.as_str(), &config.runtime.control_group)
}

/// One for each OCI runtime of containerd's, and what looks after containers that none of them has made.
fn by_containerd(
    config: &Config,
    has_docker: bool,
    resolvers: &Receiver<Resolvers>,
) -> Result<Vec<ContainerdRuntime>, RuntimeError> {
    let (runtime, held) = (&config.runtime, held_by_containerd(config));
    let socket = runtime.containerd.socket().unwrap_or_else(|| ContainerdChoice::USUAL.into());
    let settings = Settings {
        registries: runtime.registries.clone(),
        ..Settings::new(
            &socket,
            &runtime.containerd_namespace,
            &config.run_dir,
            &config.state_dir,
            &runtime.control_group,
        )
    };
    let offered = match runtime.containerd {
        ContainerdChoice::Off => None,
        ContainerdChoice::Auto if !socket.exists() && !held => None,
        ContainerdChoice::Auto | ContainerdChoice::At(_) => Some(containerd::configured(&runtime.containerd_config)),
    };
    let noted = held.then(|| containerd::noted(&settings.handlers));
    shares(offered, noted, has_docker)
        .into_iter()
        .map(|(share, technology)| ContainerdRuntime::new(settings.clone(), share, technology, resolvers.clone()))
        .collect()
}

/// The usual handler, then by name the others that are `offered`, if containers may be made at all. Where containerd holds something of
/// ours, `noted` are the handlers that may have made it: what is not offered any more is looked after all the same. Where there is no
/// Docker the usual one runs what a cluster calls containers.
fn shares(offered: Option<Vec<Handler>>, noted: Option<Vec<String>>, has_docker: bool) -> Vec<(Share, Technology)> {
    let technology = |name: &str| match Technology::from(name) {
        _ if name.is_empty() && has_docker => Some(Technology::Other(CONTAINERD.into())),
        _ if name.is_empty() => Some(Technology::Container),
        // A name that means something else already cannot be asked for.
        Technology::Other(own) if ![CONTAINERD, OTHERS].contains(&own.as_str()) => Some(Technology::Other(own)),
        _ => None,
    };
    let offered = offered.map(|named| std::iter::once(Handler::usual()).chain(named));
    let mut shares: Vec<_> = offered
        .into_iter()
        .flatten()
        .filter_map(|handler| {
            technology(&handler.name).map(|technology| (handler.name.clone(), Share::Of(handler), technology))
        })
        .collect();
    let Some(noted) = noted else {
        return shares.into_iter().map(|(_, share, technology)| (share, technology)).collect();
    };
    let mut known: BTreeSet<String> = shares.iter().map(|(name, ..)| name.clone()).collect();
    for name in std::iter::once(String::new()).chain(noted) {
        if let Some(technology) = technology(&name)
            && known.insert(name.clone())
        {
            shares.push((name.clone(), Share::Left(name), technology));
        }
    }
    let others = (Share::Others(known), Technology::Other(OTHERS.into()));
    shares.into_iter().map(|(_, share, technology)| (share, technology)).chain([others]).collect()
}

/// Each container has a log for as long as it is there, whether or not containerd is.
fn held_by_containerd(config: &Config) -> bool {
    std::fs::read_dir(config.state_dir.join("logs").join(CONTAINERD)).is_ok_and(|mut logs| logs.next().is_some())
}

/// Whether containers really run. What does not work is told once.
async fn runs(direct: &ContainerdRuntime, config: &Config) -> bool {
    if !direct.makes() {
        return false;
    }
    // One that was named comes, maybe later in the boot.
    let named = matches!(config.runtime.containerd, ContainerdChoice::At(_));
    let there = || named || config.runtime.containerd.socket().is_some_and(|socket| socket.exists());
    let deadline = Instant::now() + STARTING;
    loop {
        match timeout_at(deadline + TRIAL, direct.try_out()).await.unwrap_or_else(|_| Err(silent())) {
            Ok(()) => return true,
            Err(RuntimeError::Unavailable(_)) if there() && Instant::now() < deadline => sleep(RETRY).await,
            Err(error) => {
                tracing::warn!(%error, technology = %direct.technology(), "containerd runs no such containers here");
                return false;
            }
        }
    }
}

/// It takes questions and does not answer. What is asked of it later is told so as well.
fn silent() -> RuntimeError {
    RuntimeError::Unavailable(format!("it has not answered within {:?}", STARTING + TRIAL))
}

/// Without another engine that is news for the operator, and with one it is none.
async fn answers(docker: &DockerRuntime, alone: bool) -> bool {
    let deadline = Instant::now() + STARTING;
    loop {
        match timeout_at(deadline + TRIAL, docker.works()).await.unwrap_or_else(|_| Err(silent())) {
            Ok(()) => return true,
            // Something answers, and what it says will not change by waiting.
            Err(error @ RuntimeError::Refused { .. }) => {
                tracing::warn!(%error, "containers do not run here");
                return false;
            }
            Err(error) if !docker.is_installed() || Instant::now() >= deadline => {
                if alone || docker.is_installed() {
                    tracing::warn!(%error, "containers do not run here");
                }
                return false;
            }
            Err(_) => sleep(RETRY).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::registries::Registries;

    /// As one whose disk hangs: it takes connections and questions.
    #[tokio::test(start_paused = true)]
    async fn an_engine_that_does_not_answer_is_not_waited_for_long() {
        let dir = tempfile::tempdir().expect("a directory");
        let socket = dir.path().join("docker.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("a socket");
        let host = format!("unix://{}", socket.display());
        let resolvers = tokio::sync::watch::channel(Some(Vec::new())).1;
        let docker = DockerRuntime::new(Some(&host), resolvers, Registries::default()).expect("an address");
        let began = Instant::now();
        assert!(!answers(&docker, true).await);
        assert!(began.elapsed() < Duration::from_secs(60), "{:?}", began.elapsed());
    }

    #[test]
    fn what_containerd_holds_is_looked_after_whatever_is_offered() {
        let handler = |name: &str| Handler { name: name.into(), ..Handler::usual() };
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        for (offered, noted, expected) in [
            // Switched off, or not there, and never used.
            (None, None, ""),
            (Some(vec![]), None, "make '' as containerd"),
            (Some(vec!["kata", "docker", "containerd"]), None, "make '' as containerd, make 'kata' as kata"),
            (
                Some(vec!["kata"]),
                Some(vec!["kata"]),
                "make '' as containerd, make 'kata' as kata, adopt all but '', 'kata'",
            ),
            // A handler that is configured no longer, or whose configuration cannot be read.
            (Some(vec![]), Some(vec!["kata"]), "make '' as containerd, adopt 'kata' as kata, adopt all but '', 'kata'"),
            // Switched off.
            (None, Some(vec!["kata"]), "adopt '' as containerd, adopt 'kata' as kata, adopt all but '', 'kata'"),
        ] {
            let offered = offered.map(|names| names.into_iter().map(handler).collect());
            let shares = shares(offered, noted.as_deref().map(names), true);
            let shown = shares.into_iter().map(|(share, technology)| match share {
                Share::Of(handler) => format!("make '{}' as {technology}", handler.name),
                Share::Left(name) => format!("adopt '{name}' as {technology}"),
                Share::Others(known) => {
                    format!(
                        "adopt all but {}",
                        known.iter().map(|name| format!("'{name}'")).collect::<Vec<_>>().join(", ")
                    )
                }
            });
            assert_eq!(shown.collect::<Vec<_>>().join(", "), expected);
        }
        let alone = shares(None, Some(Vec::new()), false);
        assert_eq!(alone[0], (Share::Left(String::new()), Technology::Container), "where there is no Docker");
    }
}
