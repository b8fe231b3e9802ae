//! Looks whether the kernel's programs are where they were put: links go away where somebody detaches them, and packets in framing, which
//! only a program takes, are lost from then on. A thread of its own, that mostly sleeps.

use std::sync::{Arc, Weak};
use std::thread;
use std::time::Duration;

use tokio::sync::mpsc;

use super::ebpf::{Hook, Kernel};
use super::{DatapathError, Port};

/// Between two looks at the uplinks; the other interfaces get one look each by turns, as their packets find the slow path by
/// themselves.
const PAUSE: Duration = Duration::from_millis(25);

/// A program that is not where it was put.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Gone {
    pub(super) hook: Hook,
    pub(super) port: Port,
}

/// Watches until the kernel's side is dropped.
pub(super) fn start(kernel: &Arc<Kernel>, alarm: &mpsc::Sender<Gone>) -> Result<(), DatapathError> {
    let (kernel, alarm) = (Arc::downgrade(kernel), alarm.clone());
    let thread = thread::Builder::new().name("watch".into()).spawn(move || watch(&kernel, &alarm));
    thread.map(drop).map_err(|error| DatapathError::Step { step: "watch programs", reason: error.to_string() })
}

fn watch(kernel: &Weak<Kernel>, alarm: &mpsc::Sender<Gone>) {
    let mut turn = 0_usize;
    loop {
        thread::sleep(PAUSE);
        let Some(kernel) = kernel.upgrade() else { return };
        let (uplinks, others): (Vec<_>, Vec<_>) =
            kernel.attached().into_iter().partition(|(hook, _)| matches!(hook, Hook::Uplink | Hook::Framed));
        turn = turn.wrapping_add(1);
        let other = others.get(turn % others.len().max(1)).cloned();
        for (hook, port) in uplinks.into_iter().chain(other) {
            // Full: there is enough to do.
            if !kernel.holds(hook, port.ifindex) {
                let _ = alarm.try_send(Gone { hook, port });
            }
        }
    }
}
