//! Keeps the list of what is attached: looked at once, again when the kernel says that something came or went (NETLINK_KOBJECT_UEVENT),
//! and every now and then in any case, as that word can be lost.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use netlink_sys::protocols::NETLINK_KOBJECT_UEVENT;
use netlink_sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket};
use tokio::sync::watch;
use tokio::task;

use super::super::roots::Roots;
use super::{scan, with};
use crate::drain::Drain;
use crate::events::Events;
use crate::model::{Device, EventKind};

/// The kernel's own words; the second group is udev's.
const KERNEL: u32 = 1;
/// One thing plugged in is many events.
const SETTLED: Duration = Duration::from_millis(300);
const LONGEST: usize = 8 * 1024;
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// Everything attached now.
pub type Inventory = Arc<Vec<Device>>;

pub(in crate::telemetry) struct Watch {
    pub(in crate::telemetry) roots: Roots,
    /// What is on the list in any case.
    pub(in crate::telemetry) extra: Option<Device>,
    pub(in crate::telemetry) devices: watch::Sender<Inventory>,
    pub(in crate::telemetry) events: Events,
}

impl Watch {
    /// Until the drain begins.
    pub(in crate::telemetry) async fn run(self, drain: Drain) {
        let mut listener = Listener::open();
        loop {
            tokio::select! {
                _ = drain.wait() => return,
                () = listener.changed() => tokio::time::sleep(SETTLED).await,
                () = tokio::time::sleep(LOOK_AGAIN) => {}
            }
            let (roots, extra) = (self.roots.clone(), self.extra.clone());
            // Reading some of these files asks the hardware.
            let found = task::spawn_blocking(move || with(extra.as_ref(), scan(&roots))).await;
            let Ok(found) = found else { continue };
            let before = self.devices.borrow().clone();
            tell(&before, &found, &self.events);
            if *before != found {
                self.devices.send_replace(Arc::new(found));
            }
        }
    }
}

fn tell(before: &[Device], now: &[Device], events: &Events) {
    let by_name = |devices: &[Device]| -> BTreeMap<String, String> {
        devices.iter().map(|device| (device.name.clone(), device.description.clone())).collect()
    };
    let (before, now) = (by_name(before), by_name(now));
    for (name, description) in before.iter().filter(|(name, _)| !now.contains_key(*name)) {
        tracing::info!(device = name, description, "a device has gone");
        events.say(EventKind::DeviceRemoved, name, description);
    }
    for (name, description) in now.iter().filter(|(name, _)| !before.contains_key(*name)) {
        tracing::info!(device = name, description, "a device has come");
        events.say(EventKind::DeviceAdded, name, description);
    }
}

/// The kernel's word, where it can be heard.
struct Listener {
    socket: Option<TokioSocket>,
}

impl Listener {
    fn open() -> Self {
        let open = || -> io::Result<TokioSocket> {
            let mut socket = TokioSocket::new(NETLINK_KOBJECT_UEVENT)?;
            socket.socket_mut().bind(&SocketAddr::new(0, KERNEL))?;
            Ok(socket)
        };
        match open() {
            Ok(socket) => Self { socket: Some(socket) },
            Err(error) => {
                tracing::info!(%error, "hot-plugged devices are noticed within {} s: the kernel's word cannot be heard", LOOK_AGAIN.as_secs());
                Self { socket: None }
            }
        }
    }

    /// Returns after a word about something that came, went or changed its driver.
    async fn changed(&mut self) {
        loop {
            let Some(socket) = &mut self.socket else { return std::future::pending().await };
            let mut message = BytesMut::with_capacity(LONGEST);
            match socket.recv_from(&mut message).await {
                Ok(from) if from.port_number() == 0 && is_change(&message) => return,
                // Only the kernel's port is 0; anybody may write to the group.
                Ok(_) => {}
                // Words were lost: that is one, too.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return,
                Err(error) => {
                    tracing::warn!(%error, "the kernel's word about devices is heard no more");
                    self.socket = None;
                }
            }
        }
    }
}

/// `add@/devices/…`, then `NAME=value`, each with a zero byte after it.
fn is_change(message: &[u8]) -> bool {
    let action = message.split(|byte| *byte == b'@').next().unwrap_or_default();
    matches!(action, b"add" | b"remove" | b"bind" | b"unbind" | b"move" | b"online" | b"offline")
}

#[cfg(test)]
mod tests {
    use super::super::device;
    use super::*;
    use crate::model::DeviceKind;

    #[test]
    fn only_what_comes_and_goes_is_a_change() {
        for (message, change) in [
            (&b"add@/devices/x\0ACTION=add\0"[..], true),
            (b"remove@/devices/x", true),
            (b"change@/devices/x", false),
            (b"libudev\0\xfe\xed", false),
            (b"", false),
        ] {
            assert_eq!(is_change(message), change, "{message:?}");
        }
    }

    #[test]
    fn comings_and_goings_are_told_once() {
        let events = Events::default();
        let (a, b) = (device(DeviceKind::Usb, "a", "A"), device(DeviceKind::Usb, "b", "B"));
        tell(std::slice::from_ref(&a), &[a.clone(), b.clone()], &events);
        tell(&[a, b.clone()], std::slice::from_ref(&b), &events);
        tell(std::slice::from_ref(&b), std::slice::from_ref(&b), &events);
        let mut heard = events.watch(10).unwrap();
        let mut words = Vec::new();
        while let Ok(event) = heard.try_recv() {
            words.push((event.kind.word(), event.subject, event.detail));
        }
        assert_eq!(
            words,
            [("device-added", "b".to_owned(), "B".to_owned()), ("device-removed", "a".to_owned(), "A".to_owned())]
        );
    }
}
