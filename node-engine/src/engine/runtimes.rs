//! Which technologies this node runs: every one that is configured is made, so that what an earlier run left is adopted; only those
//! that were seen to work here are announced to the cluster.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch::Receiver;
use tokio::time::{Instant, sleep};

use crate::config::Config;
use crate::model::Technology;
use crate::runtime::docker::DockerRuntime;
use crate::runtime::furnished::{Furnished, Grants};
use crate::runtime::process::{Policy, ProcessRuntime};
use crate::runtime::supervised::Home;
use crate::runtime::unikernel::{self, UnikernelRuntime};
use crate::runtime::volumes::Volumes;
use crate::runtime::{Resolvers, Runtime, RuntimeError};

/// A Docker that is just starting may take so long to answer.
const DOCKER: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_millis(250);
/// Where Docker keeps containers, also while it does not run.
const DOCKER_DATA: &str = "/var/lib/docker";

/// What runs workloads here.
pub(super) struct Runtimes {
    pub(super) held: Vec<Arc<dyn Runtime>>,
    pub(super) announced: Vec<Technology>,
    /// Volume drivers that answer, and where.
    pub(super) drivers: Vec<(String, PathBuf)>,
}

/// Makes and tries them.
pub(super) async fn build(config: &Config, resolvers: Receiver<Resolvers>) -> Result<Runtimes, RuntimeError> {
    let docker = DockerRuntime::new(config.runtime.docker_host.as_deref(), resolvers.clone())?;
    let process = process(config, resolvers)?;
    let unikernel = unikernel(config)?;
    let furniture = Furniture::of(config)?;
    let (contained, plain, guests, drivers) =
        tokio::join!(answers(&docker), process.works(), unikernel.works(), furniture.volumes.answering());
    let mut runtimes = Runtimes { held: Vec::new(), announced: Vec::new(), drivers };
    // Where there is no Docker nothing can be held by it, and nobody should wait to hear so.
    if contained || docker.is_installed() || Path::new(DOCKER_DATA).exists() {
        runtimes.add(furniture.given_to(Arc::new(docker)), contained);
    }
    runtimes.add(furniture.given_to(Arc::new(process)), plain);
    runtimes.add(furniture.given_to(Arc::new(unikernel)), guests);
    let announced: Vec<_> = runtimes.announced.iter().map(Technology::as_str).collect();
    match announced.as_slice() {
        [] => tracing::warn!("no technology works on this node: it runs no workloads"),
        runs => tracing::info!("this node runs {}", runs.join(", ")),
    }
    Ok(runtimes)
}

/// The runtimes that may hold something of ours, Docker apart.
pub(super) fn supervised(config: &Config) -> Result<Vec<Arc<dyn Runtime>>, RuntimeError> {
    let nobody = tokio::sync::watch::channel(None).1;
    let furniture = Furniture::of(config)?;
    let made: [Arc<dyn Runtime>; 2] = [Arc::new(process(config, nobody)?), Arc::new(unikernel(config)?)];
    Ok(made.into_iter().map(|runtime| furniture.given_to(runtime)).collect())
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

fn process(config: &Config, resolvers: Receiver<Resolvers>) -> Result<ProcessRuntime, RuntimeError> {
    let policy = Policy { allowed: config.runtime.process, user: config.runtime.process_user.clone() };
    ProcessRuntime::new(home(config, &Technology::Process), policy, resolvers)
}

fn unikernel(config: &Config) -> Result<UnikernelRuntime, RuntimeError> {
    let policy = unikernel::Policy { allowed: config.runtime.unikernel, files: config.runtime.image_files };
    UnikernelRuntime::new(home(config, &Technology::Unikernel), &config.state_dir, policy)
}

fn home(config: &Config, technology: &Technology) -> Home {
    Home::new(&config.run_dir, &config.state_dir, technology.as_str(), &config.runtime.control_group)
}

async fn answers(docker: &DockerRuntime) -> bool {
    let deadline = Instant::now() + DOCKER;
    loop {
        match docker.ping().await {
            Ok(()) => return true,
            Err(error) if !docker.is_installed() || Instant::now() >= deadline => {
                tracing::warn!(%error, "containers do not run here");
                return false;
            }
            Err(_) => sleep(RETRY).await,
        }
    }
}
