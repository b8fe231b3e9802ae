//! Hears of the end of supervisors: each holds a file open for writing for as long as it lives, and the kernel says when it was closed.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;

use crate::model::InstanceId;

/// Takes nothing from the kernel before the first file is added: a user may have few of these, and others may have taken them all.
#[derive(Debug, Default)]
pub(super) struct Watch {
    inotify: OnceLock<AsyncFd<Descriptor>>,
    made: Notify,
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
    /// From now on the closing of this file is told as the instance's. Must be called inside a tokio runtime.
    pub(super) fn add(&self, file: &Path, instance: &InstanceId) -> io::Result<()> {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        let inotify = match self.inotify.get() {
            Some(inotify) => inotify,
            // The lock is held: nobody else makes one.
            None => {
                let opened = open()?;
                let inotify = self.inotify.get_or_init(|| opened);
                self.made.notify_one();
                inotify
            }
        };
        let descriptor = inotify.get_ref().0.add_watch(file, AddWatchFlags::IN_CLOSE_WRITE)?;
        watched.insert(descriptor, instance.clone());
        Ok(())
    }

    /// Instances whose file was closed. An instance may come more than once.
    pub(super) async fn closed(&self) -> io::Result<Vec<InstanceId>> {
        let inotify = loop {
            match self.inotify.get() {
                Some(inotify) => break inotify,
                None => self.made.notified().await,
            }
        };
        loop {
            let mut ready = inotify.readable().await?;
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

#[expect(deprecated, reason = "the descriptor is owned by what is wrapped; the replacement is unsafe to call")]
fn open() -> io::Result<AsyncFd<Descriptor>> {
    AsyncFd::new(Descriptor(Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?))
}
