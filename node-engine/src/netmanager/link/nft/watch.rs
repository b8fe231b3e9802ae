//! Hears of every change to nf_tables, whoever makes it: a flushed table is told by nothing else.

use std::io;

use futures_util::FutureExt;
use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{AsyncSocket, AsyncSocketExt, TokioSocket};

/// `NFNLGRP_NFTABLES`.
const GROUP: u32 = 7;

/// A subscription in the calling thread's namespace.
pub(in super::super) struct Watch(TokioSocket);

impl Watch {
    pub(in super::super) fn open() -> io::Result<Self> {
        let mut socket = TokioSocket::new(NETLINK_NETFILTER)?;
        socket.socket_mut().bind_auto()?;
        socket.socket_mut().add_membership(GROUP)?;
        Ok(Self(socket))
    }

    /// Resolves when something has changed. A socket that overflowed has lost only how much.
    pub(in super::super) async fn next(&self) -> io::Result<()> {
        told(self.0.recv_from_full().await.map(drop))
    }

    /// Forgets what was told so far.
    pub(in super::super) fn drain(&self) -> io::Result<()> {
        while let Some(more) = self.0.recv_from_full().now_or_never() {
            told(more.map(drop))?;
        }
        Ok(())
    }
}

fn told(received: io::Result<()>) -> io::Result<()> {
    match received {
        Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
        received => received,
    }
}
