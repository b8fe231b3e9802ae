//! What an instance gets from its node whatever runs it: volumes, added files, and privileges where the node's configuration grants
//! them. A runtime in this wrapping is handed a description whose mounts are made, and knows nothing of where they come from.

use std::fs::{self, DirBuilder};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::volumes::Volumes;
use super::{Adopted, AdoptedState, Exec, Exit, Follow, Runtime, RuntimeError, Sandbox, Session};
use crate::model::{
    AddedFile, InstanceDetails, InstanceId, InstanceSpec, InstanceUsage, Mount, ServicePattern, Technology,
};

/// A runtime, and what the node adds to its instances.
#[expect(missing_debug_implementations, reason = "the runtime is a trait object")]
pub struct Furnished {
    inner: Arc<dyn Runtime>,
    volumes: Arc<Volumes>,
    grants: Grants,
    /// Added files, in a directory for each instance. It is there before anything else that the instance gets, and goes last: by it
    /// an instance is found of which only that is left.
    files: PathBuf,
}

/// What the node's configuration grants; no description can ask for more.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grants {
    /// Services that may be privileged.
    pub privileged: Vec<ServicePattern>,
}

impl Furnished {
    /// Added files lie below `state_dir`.
    pub fn new(inner: Arc<dyn Runtime>, volumes: Arc<Volumes>, grants: Grants, state_dir: &Path) -> Self {
        let files = state_dir.join("files").join(inner.technology().as_str());
        Self { inner, volumes, grants, files }
    }

    /// Each request leaves a line, granted or not.
    fn authorise(&self, spec: &InstanceSpec) -> Result<(), RuntimeError> {
        if !spec.privileged {
            return Ok(());
        }
        let granted = self.grants.privileged.iter().any(|pattern| pattern.matches(&spec.id.service));
        tracing::info!(target: "audit", instance = %spec.id, technology = %spec.technology, granted, "privileges were asked for");
        if granted {
            return Ok(());
        }
        let reason = "the configuration of this node does not grant it to this service (runtime.privileged)".into();
        Err(RuntimeError::Refused { what: "privileged", reason })
    }

    fn add_files(&self, spec: &InstanceSpec) -> Result<Vec<Mount>, RuntimeError> {
        let directory = self.files.join(spec.id.to_string());
        let write = |(number, file): (usize, &AddedFile)| {
            let source = directory.join(number.to_string());
            remove(&source)?;
            let mut made = fs::File::options().create_new(true).write(true).mode(file.mode).open(&source)?;
            made.write_all(file.content.as_bytes())?;
            Ok(Mount { source, target: file.path.clone(), read_only: true })
        };
        spec.files.iter().enumerate().map(write).collect::<io::Result<_>>().map_err(failed("add files"))
    }

    /// Instances of an earlier run that got something.
    fn furnished(&self) -> Result<Vec<InstanceId>, RuntimeError> {
        let entries = match fs::read_dir(&self.files) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(failed("look for added files"))?,
        };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        Ok(names.filter_map(|name| name.parse().ok()).collect())
    }
}

fn failed(step: &'static str) -> impl FnOnce(io::Error) -> RuntimeError {
    move |error| RuntimeError::Step { step, reason: error.to_string() }
}

#[async_trait]
impl Runtime for Furnished {
    fn technology(&self) -> Technology {
        self.inner.technology()
    }

    async fn prepare(&self, spec: &InstanceSpec) -> Result<Sandbox, RuntimeError> {
        self.authorise(spec)?;
        if spec.volumes.is_empty() && spec.files.is_empty() {
            return self.inner.prepare(spec).await;
        }
        // Nobody else on the node may look at what only the instance should have.
        let made = DirBuilder::new().recursive(true).mode(0o700).create(self.files.join(spec.id.to_string()));
        made.map_err(failed("add files"))?;
        let mut mounts = self.volumes.publish(&spec.id, &spec.volumes).await?;
        mounts.extend(self.add_files(spec)?);
        self.inner.prepare(&InstanceSpec { mounts, ..spec.clone() }).await
    }

    async fn start(&self, instance: &InstanceId) -> Result<(), RuntimeError> {
        self.inner.start(instance).await
    }

    /// Volumes go after the last process that may write to them.
    async fn stop(&self, instance: &InstanceId, grace: Duration) -> Result<(), RuntimeError> {
        self.inner.stop(instance, grace).await?;
        self.volumes.unpublish(instance).await?;
        match fs::remove_dir_all(self.files.join(instance.to_string())) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove added files")(error)),
            _ => Ok(()),
        }
    }

    /// Also those of which the runtime has nothing any more, and the node has.
    async fn adopt(&self) -> Result<Vec<Adopted>, RuntimeError> {
        // Looked for first: what is prepared meanwhile is not left over.
        let furnished = self.furnished()?;
        let mut held = self.inner.adopt().await?;
        for instance in furnished {
            if held.iter().all(|adopted| adopted.instance != instance) {
                held.push(Adopted { instance, document: "".into(), state: AdoptedState::Left });
            }
        }
        Ok(held)
    }

    async fn usage(&self) -> Result<Vec<InstanceUsage>, RuntimeError> {
        self.inner.usage().await
    }

    async fn logs(&self, instance: &InstanceId, tail: usize) -> Result<Vec<u8>, RuntimeError> {
        self.inner.logs(instance, tail).await
    }

    async fn inspect(&self, instance: &InstanceId) -> Result<InstanceDetails, RuntimeError> {
        self.inner.inspect(instance).await
    }

    async fn follow(&self, instance: &InstanceId, tail: usize) -> Result<Follow, RuntimeError> {
        self.inner.follow(instance, tail).await
    }

    async fn exec(&self, instance: &InstanceId, exec: Exec) -> Result<Session, RuntimeError> {
        self.inner.exec(instance, exec).await
    }

    async fn exited(&self) -> Exit {
        self.inner.exited().await
    }
}

fn remove(file: &Path) -> io::Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::runtime::memory::MemoryRuntime;

    fn furnished(state_dir: &Path, privileged: &[&str]) -> (Arc<MemoryRuntime>, Furnished) {
        let inner = Arc::new(MemoryRuntime::new(Technology::Container));
        let volumes = Volumes::new(BTreeMap::new(), None, state_dir, state_dir).expect("volumes");
        let privileged = privileged.iter().map(|pattern| pattern.parse().expect("a pattern")).collect();
        let furnished = Furnished::new(inner.clone(), Arc::new(volumes), Grants { privileged }, state_dir);
        (inner, furnished)
    }

    fn spec() -> InstanceSpec {
        let id = "app.default.web.test.instance.0".parse().expect("an id");
        InstanceSpec { privileged: true, ..InstanceSpec::new(id, Technology::Container) }
    }

    #[tokio::test]
    async fn privileges_are_the_nodes_to_grant() {
        let dir = tempfile::tempdir().expect("a directory");
        for (patterns, granted) in [
            (&[][..], false),
            (&["app.default.other.test", "other.*.*.*"], false),
            (&["app.default.web.test"], true),
            (&["x.y.z.w", "app.*.web.*"], true),
        ] {
            let (inner, furnished) = furnished(dir.path(), patterns);
            let prepared = furnished.prepare(&spec()).await;
            assert_eq!(prepared.is_ok(), granted, "{patterns:?}: {prepared:?}");
            assert_eq!(inner.instances().len(), usize::from(granted), "what is refused reaches no runtime");
            furnished.prepare(&InstanceSpec { privileged: false, ..spec() }).await.expect("no privilege asked for");
        }
    }

    #[tokio::test]
    async fn added_files_are_there_until_the_instance_is_not() {
        let dir = tempfile::tempdir().expect("a directory");
        let (inner, furnished) = furnished(dir.path(), &[]);
        let file = AddedFile { path: "/etc/web.conf".into(), content: "listen 80\n".into(), mode: 0o640 };
        let spec = InstanceSpec { privileged: false, files: vec![file], ..spec() };
        furnished.prepare(&spec).await.expect("prepared");
        let mounts = inner.prepared(&spec.id).expect("prepared").mounts.clone();
        assert_eq!((mounts.len(), mounts[0].target.as_str(), mounts[0].read_only), (1, "/etc/web.conf", true));
        assert_eq!(fs::read_to_string(&mounts[0].source).expect("the file"), "listen 80\n");
        furnished.stop(&spec.id, Duration::ZERO).await.expect("stopped");
        assert!(!mounts[0].source.exists());
        assert!(furnished.adopt().await.expect("adopted").is_empty(), "nothing is left");
    }

    #[tokio::test]
    async fn what_the_runtime_has_lost_is_held_as_long_as_its_files_are_there() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = AddedFile { path: "/etc/web.conf".into(), content: "listen 80\n".into(), mode: 0o640 };
        let spec = InstanceSpec { privileged: false, files: vec![file], ..spec() };
        furnished(dir.path(), &[]).1.prepare(&spec).await.expect("prepared");

        // Ended between the removal of the container and that of its files.
        let (_, next) = furnished(dir.path(), &[]);
        let held = next.adopt().await.expect("adopted");
        let expected = Adopted { instance: spec.id.clone(), document: "".into(), state: AdoptedState::Left };
        assert_eq!(held, [expected]);
        next.stop(&spec.id, Duration::ZERO).await.expect("stopped");
        assert!(next.adopt().await.expect("adopted").is_empty());
    }
}
