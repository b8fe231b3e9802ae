//! Hears of the end of supervisors: each holds a file open for writing for as long as it lives, and the kernel says when it was closed.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::io::unix::AsyncFd;

use crate::model::InstanceId;

#[derive(Debug)]
pub(super) struct Watch {
    inotify: AsyncFd<Descriptor>,
    watched: Mutex<HashMap<WatchDescriptor, InstanceId>>,
}

#[derive(Debug)]
struct Descriptor(Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Watch {
    /// Must be called inside a tokio runtime.
    #[expect(deprecated, reason = "the descriptor is owned by what is wrapped; the replacement is unsafe to call")]
    pub(super) fn new() -> io::Result<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
        Ok(Self { inotify: AsyncFd::new(Descriptor(inotify))?, watched: Mutex::default() })
    }

    /// From now on the closing of this file is told as the instance's.
    pub(super) fn add(&self, file: &Path, instance: &InstanceId) -> io::Result<()> {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        let descriptor = self.inotify.get_ref().0.add_watch(file, AddWatchFlags::IN_CLOSE_WRITE)?;
        watched.insert(descriptor, instance.clone());
        Ok(())
    }

    /// Instances whose file was closed. An instance may come more than once.
    pub(super) async fn closed(&self) -> io::Result<Vec<InstanceId>> {
        loop {
            let mut ready = self.inotify.readable().await?;
            match ready.get_inner().0.read_events() {
                Err(Errno::EAGAIN) => ready.clear_ready(),
                Err(error) => return Err(error.into()),
                Ok(events) => {
                    let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
                    let mut closed = Vec::new();
                    for event in events {
                        if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                            // The file was removed; the number may be given again.
                            watched.remove(&event.wd);
                        } else {
                            closed.extend(watched.get(&event.wd).cloned());
                        }
                    }
                    return Ok(closed);
                }
            }
        }
    }
}
