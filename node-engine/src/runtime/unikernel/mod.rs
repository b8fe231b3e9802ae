//! Unikernels and other small kernels as virtual machines: QEMU in the instance's network namespace, looked after like a plain command.
//! The image is an archive with a `kernel` and what it needs; the guest gets an address of its own behind the instance's (the network
//! wires any namespace that holds the device [`tap::DEVICE`]), its serial console is the log, and QMP asks it to end.

mod archive;
mod console;
mod machine;
mod qmp;
mod tap;
mod trial;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use archive::{sample, understand};

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::{OnceCell, Semaphore};
use tokio::task::spawn_blocking;

use super::fetched::Directories;
pub use super::fetched::Policy;
use super::supervised::{Home, Keeper, Launch};
use super::{Adopted, AdoptedState, Exit, Follow, Runtime, RuntimeError, Sandbox, fetch, surroundings, unsupported};
use crate::model::{InstanceDetails, InstanceId, InstanceSpec, InstanceUsage, Limits, Technology};
use machine::{Accelerator, Guest};

/// Memory of a guest whose description asks for none.
const MEMORY_MIB: u64 = 256;
/// What QEMU itself may use beside the guest's memory.
const OVERHEAD_MIB: u64 = 256;
/// Archives that are fetched and unpacked at the same time.
const FETCHES: usize = 2;
/// What is left of the grace for QEMU itself to end, once the guest has had its time.
const LAST: Duration = Duration::from_secs(2);

/// Virtual machines of this node.
#[derive(Debug)]
pub struct UnikernelRuntime {
    keeper: Keeper,
    policy: Policy,
    /// Archives, and what was unpacked for each instance.
    cache: PathBuf,
    instances: Directories,
    /// Where it is noted until the next boot which way works.
    noted: PathBuf,
    accelerator: OnceCell<Result<Accelerator, String>>,
    fetches: Arc<Semaphore>,
}

impl UnikernelRuntime {
    /// `state_dir` keeps archives over a reboot. Must be called inside a tokio runtime.
    pub fn new(home: Home, state_dir: &Path, policy: Policy) -> Self {
        Self {
            noted: home.run.with_file_name("unikernel-trial").join("accelerator"),
            keeper: Keeper::new(Technology::Unikernel, home),
            policy,
            cache: state_dir.join("unikernel/archives"),
            instances: Directories(state_dir.join("unikernel/instances")),
            accelerator: OnceCell::new(),
            fetches: Arc::new(Semaphore::new(FETCHES)),
        }
    }

    /// Whether virtual machines are allowed and really run here, found out by booting one.
    pub async fn works(&self) -> bool {
        if !self.policy.allowed {
            return false;
        }
        match self.accelerator().await {
            Ok(accelerator) => {
                tracing::info!(accelerator = accelerator.name(), "virtual machines run on this node");
                true
            }
            Err(error) => {
                tracing::warn!(%error, "unikernels are allowed by the configuration, and do not run on this machine");
                false
            }
        }
    }

    /// The first way to run a guest that a trial has shown to work; the answer holds until the next boot.
    async fn accelerator(&self) -> Result<Accelerator, RuntimeError> {
        let found = self.accelerator.get_or_init(|| async {
            let noted = fs::read_to_string(&self.noted).ok().and_then(|name| Accelerator::named(name.trim()));
            if let Some(accelerator) = noted {
                return Ok(accelerator);
            }
            let found = trial::first_that_works(&self.keeper, self.noted.parent().unwrap_or(Path::new("/"))).await?;
            // Only costs another trial where it cannot be kept.
            let _ = fs::write(&self.noted, found.name());
            Ok(found)
        });
        found.await.clone().map_err(|reason| RuntimeError::Step { step: "trial boot", reason })
    }

    /// What the archive holds, unpacked for this instance.
    async fn unpack(&self, spec: &InstanceSpec) -> Result<PathBuf, RuntimeError> {
        let turn = self.fetches.clone().acquire_owned().await.map_err(|error| step("fetch", &error))?;
        let archive = fetch::image(&spec.image, &self.cache, self.policy.files, "tar.gz").await?;
        let unpacked = unpack(&self.instances, archive, &spec.id, turn).await;
        unpacked.map_err(|error| RuntimeError::Image { image: spec.image.clone(), reason: error.to_string() })
    }

    /// What there is to say of an end.
    async fn explained(&self, exit: Exit) -> Exit {
        let said = console::ended(&self.instances.of(&exit.instance), self.keeper.log_length(&exit.instance));
        match self.keeper.logs(&exit.instance, said).await {
            Ok(console) => console::explained(exit, &console),
            // Its log has gone with it.
            Err(_) => exit,
        }
    }
}

#[async_trait]
impl Runtime for UnikernelRuntime {
    fn technology(&self) -> Technology {
        Technology::Unikernel
    }

    async fn prepare(&self, spec: &InstanceSpec) -> Result<Sandbox, RuntimeError> {
        self.policy.permit("unikernel", "virtual machines")?;
        unsupported::refuse(spec)?;
        if !spec.mounts.is_empty() {
            let reason = "a guest shares nothing but `files` of its archive: it has no volumes or added files".into();
            return Err(RuntimeError::Refused { what: "unikernel", reason });
        }
        let accelerator = self.accelerator().await?;
        let directory = self.unpack(spec).await?;
        let guest = Guest::new(&directory, spec, accelerator).map_err(|error| step("machine", &error))?;
        let sandbox = self.keeper.make(spec).await?;
        let netns = sandbox.netns.clone();
        let tap = spawn_blocking(move || tap::ensure(&netns)).await.map_err(|error| step("tap", &error))?;
        tap.map_err(|error| step("tap", &error))?;
        let launch = Launch {
            program: machine::program(),
            arguments: guest.arguments(),
            environment: vec!["PATH=/usr/bin:/bin".into()],
            directory,
            host_name: surroundings::host_name(&spec.id),
            ..Launch::default()
        };
        let limits = Limits { memory_mib: Some(guest.memory_mib + OVERHEAD_MIB), ..spec.limits };
        self.keeper.supervise(&spec.id, launch, limits).await?;
        Ok(sandbox)
    }

    async fn start(&self, instance: &InstanceId) -> Result<(), RuntimeError> {
        let noted = console::begins(&self.instances.of(instance), self.keeper.log_length(instance));
        noted.map_err(|error| step("note where its console begins", &error))?;
        self.keeper.start(instance).await
    }

    async fn stop(&self, instance: &InstanceId, grace: Duration) -> Result<(), RuntimeError> {
        let directory = self.instances.of(instance);
        if !grace.is_zero() && directory.exists() {
            match qmp::power_down(&directory).await {
                Ok(()) => self.keeper.until_ended(instance, grace).await,
                Err(error) => tracing::debug!(%instance, %error, "the guest cannot be asked to end"),
            }
        }
        self.keeper.stop(instance, grace.min(LAST)).await?;
        self.instances.remove(instance).await.map_err(|error| step("remove what was unpacked", &error))
    }

    async fn adopt(&self) -> Result<Vec<Adopted>, RuntimeError> {
        let adopted = self.keeper.adopt().await?;
        self.instances.keep_only(&adopted).await;
        let mut explained = Vec::with_capacity(adopted.len());
        for one in adopted {
            let state = match one.state {
                AdoptedState::Exited(exit) => AdoptedState::Exited(self.explained(exit).await),
                state @ (AdoptedState::Running(_) | AdoptedState::Incomplete | AdoptedState::Left) => state,
            };
            explained.push(Adopted { state, ..one });
        }
        Ok(explained)
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

    async fn exited(&self) -> Exit {
        // A log is read without waiting: who drops this while an end is explained loses it not.
        self.explained(self.keeper.exited().await).await
    }
}

/// The archive in the instance's directory. Where the caller goes away, what was unpacked until then goes too, and `turn` lasts that long.
async fn unpack(
    instances: &Directories,
    archive: PathBuf,
    instance: &InstanceId,
    turn: impl Send + 'static,
) -> io::Result<PathBuf> {
    let part = instances.part();
    let unpacked = spawn_blocking(move || {
        let _turn = turn;
        let part = part()?;
        archive::unpack(&archive, part.path()).map(|()| part)
    });
    let part = unpacked.await.map_err(io::Error::other)??;
    instances.place(part, instance).await?;
    Ok(instances.of(instance))
}

fn step(step: &'static str, error: &dyn std::error::Error) -> RuntimeError {
    RuntimeError::Step { step, reason: error.to_string() }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn an_unpacking_that_was_given_up_leaves_the_next_alone() {
        let dir = tempfile::tempdir().expect("a directory");
        let instances = Directories(dir.path().join("instances"));
        let id: InstanceId = "a.b.c.d.instance.0".parse().expect("an id");
        let (slow, fast) = (dir.path().join("slow"), dir.path().join("fast"));
        // A pipe: unpacking begins and waits for what is in it.
        nix::unistd::mkfifo(&slow, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        let packed = |text| archive::tests::packed(&[("kernel", text), (&format!("files/{text}"), text)]);
        fs::write(&fast, packed("next")).expect("write");
        let given_up = unpack(&instances, slow.clone(), &id, ());
        assert!(tokio::time::timeout(Duration::from_millis(200), given_up).await.is_err(), "it waits");
        let unpacked = unpack(&instances, fast.clone(), &id, ()).await.expect("unpacked");
        fs::write(&slow, packed("before")).expect("write");
        let here = || -> Vec<_> {
            fs::read_dir(&instances.0).expect("instances").flatten().map(|entry| entry.path()).collect()
        };
        let deadline = Instant::now() + Duration::from_secs(20);
        while here() != [unpacked.clone()] {
            assert!(Instant::now() < deadline, "{:?}", here());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(fs::read_to_string(unpacked.join("kernel")).expect("a kernel"), "next");
        assert!(unpacked.join("files/next").is_file() && !unpacked.join("files/before").exists());
        // In place of what is there, and gone with all that is in it.
        unpack(&instances, fast, &id, ()).await.expect("again");
        instances.remove(&id).await.expect("removed");
        instances.remove(&id).await.expect("removed already");
        assert_eq!(here(), [] as [PathBuf; 0]);
    }
}
