//! Plain commands of the node's own system, for boards without a container engine. A command runs in namespaces and a control group of
//! its own and sees the node's files, so a cluster may only ask for one where the node's configuration allows it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::watch::Receiver;

use super::supervised::{Home, Keeper, Launch};
use super::surroundings::{self, Resolvers};
use super::user::Accounts;
use super::{Adopted, Exec, Exit, Follow, Runtime, RuntimeError, Sandbox, Session, unsupported};
use crate::model::{InstanceDetails, InstanceId, InstanceSpec, InstanceUsage, Technology};

/// A trial takes a fraction of a second; a machine under load may be slow.
const TRIAL: Duration = Duration::from_secs(20);
/// Where programs are looked for unless the environment says otherwise.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Commands of this machine.
#[derive(Debug)]
pub struct ProcessRuntime {
    keeper: Keeper,
    policy: Policy,
    resolvers: Receiver<Resolvers>,
}

/// What the node's configuration allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    pub allowed: bool,
    /// Runs the commands of descriptions that name no user. Where it is the superuser, these may name any.
    pub user: String,
}

impl ProcessRuntime {
    /// Must be called inside a tokio runtime.
    pub fn new(home: Home, policy: Policy, resolvers: Receiver<Resolvers>) -> Self {
        Self { keeper: Keeper::new(Technology::Process, home), policy, resolvers }
    }

    /// Whether commands are allowed and really run here, found out by running one. What does not work is told once.
    pub async fn works(&self) -> bool {
        if !self.policy.allowed {
            return false;
        }
        let spec = InstanceSpec::new(trial(), Technology::Process);
        let launch = Launch {
            program: "/proc/self/exe".into(),
            arguments: vec!["version".into()],
            directory: "/".into(),
            host_name: "trial".into(),
            ..Launch::default()
        };
        if let Err(error) = self.keeper.trial(&spec, launch, 0, TRIAL).await {
            tracing::warn!(%error, "processes are allowed by the configuration, and do not run on this machine");
            return false;
        }
        let unlimited = self.keeper.unlimited();
        if !unlimited.is_empty() {
            tracing::warn!(missing = unlimited.join(", "), "this kernel lacks control groups: limits are not held");
        }
        true
    }

    fn launch(&self, spec: &InstanceSpec) -> Result<Launch, RuntimeError> {
        let mut environment: Vec<_> = surroundings::environment(spec).collect();
        if !environment.iter().any(|variable| variable.starts_with("PATH=")) {
            environment.push(format!("PATH={PATH}"));
        }
        let path = environment.iter().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or(PATH);
        let (name, arguments) = match (spec.image.as_str(), spec.command.split_first()) {
            ("", Some((first, rest))) => (first.as_str(), rest),
            ("", None) => return Err(refused("process", "it has neither image nor cmd".into())),
            (image, _) => (image, spec.command.as_slice()),
        };
        let directory = PathBuf::from(spec.directory.as_deref().unwrap_or("/"));
        if !directory.is_dir() {
            return Err(refused("working directory", format!("{} is no directory of this node", directory.display())));
        }
        for mount in &spec.mounts {
            let target = Path::new(&mount.target);
            if !target.exists() || target.is_dir() != mount.source.is_dir() {
                let reason =
                    format!("{} is not there to be mounted on: a process sees the node's own files", mount.target);
                return Err(refused("mount path", reason));
            }
        }
        Ok(Launch {
            mounts: spec.mounts.clone(),
            program: program(name, path)?,
            arguments: arguments.to_vec(),
            user: Some(self.user(spec)?),
            environment,
            directory,
            host_name: surroundings::host_name(&spec.id),
            ..Launch::default()
        })
    }

    fn user(&self, spec: &InstanceSpec) -> Result<(u32, u32), RuntimeError> {
        let accounts = Accounts::of_node();
        let own = accounts.resolve(&self.policy.user).map_err(|reason| refused("runtime.process_user", reason))?;
        let Some(asked) = &spec.user else { return Ok(own) };
        let asked = accounts.resolve(asked).map_err(|reason| refused("user", reason))?;
        if own.0 == 0 || asked == own {
            return Ok(asked);
        }
        let allowed = &self.policy.user;
        Err(refused("user", format!("this node runs processes as {allowed} (runtime.process_user) and nobody else")))
    }
}

#[async_trait]
impl Runtime for ProcessRuntime {
    fn technology(&self) -> Technology {
        Technology::Process
    }

    async fn prepare(&self, spec: &InstanceSpec) -> Result<Sandbox, RuntimeError> {
        if !self.policy.allowed {
            let reason = "the configuration of this node does not allow commands of its own system (runtime.process)";
            return Err(refused("process", reason.into()));
        }
        unsupported::refuse(spec)?;
        let launch = self.launch(spec)?;
        let servers = surroundings::name_servers(&self.resolvers).await;
        let resolver = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
        let sandbox = self.keeper.make(spec).await?;
        self.keeper.supervise(&spec.id, Launch { resolver, ..launch }, spec.limits).await?;
        Ok(sandbox)
    }

    async fn start(&self, instance: &InstanceId) -> Result<(), RuntimeError> {
        self.keeper.start(instance).await
    }

    async fn stop(&self, instance: &InstanceId, grace: Duration) -> Result<(), RuntimeError> {
        self.keeper.stop(instance, grace).await
    }

    async fn adopt(&self) -> Result<Vec<Adopted>, RuntimeError> {
        self.keeper.adopt().await
    }

    async fn usage(&self) -> Result<Vec<InstanceUsage>, RuntimeError> {
        self.keeper.usage().await
    }

    async fn logs(&self, instance: &InstanceId, tail: usize) -> Result<Vec<u8>, RuntimeError> {
        self.keeper.logs(instance, tail).await
    }

    async fn inspect(&self, instance: &InstanceId) -> Result<InstanceDetails, RuntimeError> {
        self.keeper.inspect(instance).await
    }

    async fn follow(&self, instance: &InstanceId, tail: usize) -> Result<Follow, RuntimeError> {
        self.keeper.follow(instance, tail).await
    }

    async fn exec(&self, instance: &InstanceId, exec: Exec) -> Result<Session, RuntimeError> {
        self.keeper.exec(instance, &exec)
    }

    async fn exited(&self) -> Exit {
        self.keeper.exited().await
    }
}

/// The program's file: as named, or the first of its name on the path.
fn program(name: &str, path: &str) -> Result<PathBuf, RuntimeError> {
    let executable =
        |path: &Path| fs::metadata(path).is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0);
    let found = if name.contains('/') {
        Some(PathBuf::from(name)).filter(|path| path.is_absolute() && executable(path))
    } else {
        path.split(':')
            .map(|directory| Path::new(directory).join(name))
            .find(|path| path.is_absolute() && executable(path))
    };
    found.ok_or_else(|| refused("program", format!("{name:?} is not an executable file of this node")))
}

fn refused(what: &'static str, reason: String) -> RuntimeError {
    RuntimeError::Refused { what, reason }
}

/// No cluster names an instance so: it would have to be the name of a service of its own.
fn trial() -> InstanceId {
    "node.engine.trial.process.instance.0".parse().expect("a name of four parts and a number")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_as_a_shell_finds_them() {
        assert_eq!(program("sh", PATH).expect("there is a shell").file_name(), Some("sh".as_ref()));
        assert_eq!(program("/bin/sh", "").expect("there is a shell"), Path::new("/bin/sh"));
        for (name, path) in
            [("sh", ""), ("sh", "."), ("./sh", PATH), ("/etc/passwd", PATH), ("/nonexistent", PATH), ("", PATH)]
        {
            let error = program(name, path).expect_err(name);
            assert!(error.to_string().contains("not an executable file"), "{error}");
        }
    }
}
