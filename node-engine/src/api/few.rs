//! A listener for whoever comes by TCP: so many connections at once, and none that says nothing and takes nothing for long.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep, sleep};

const PLACES: usize = 64;
const SILENCE: Duration = Duration::from_secs(60);

/// Who finds no place waits in the kernel's queue.
pub(super) struct Few {
    listener: TcpListener,
    places: Arc<Semaphore>,
    silence: Duration,
}

impl From<TcpListener> for Few {
    fn from(listener: TcpListener) -> Self {
        Self { listener, places: Arc::new(Semaphore::new(PLACES)), silence: SILENCE }
    }
}

impl Listener for Few {
    type Io = Attentive;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Attentive, SocketAddr) {
        let place = Arc::clone(&self.places).acquire_owned().await.ok();
        let (stream, peer) = Listener::accept(&mut self.listener).await;
        (Attentive { stream, overdue: Box::pin(sleep(self.silence)), silence: self.silence, _place: place }, peer)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that ends where nothing happens on it.
pub(super) struct Attentive {
    stream: TcpStream,
    overdue: Pin<Box<Sleep>>,
    silence: Duration,
    /// Free again with it.
    _place: Option<OwnedSemaphorePermit>,
}

impl Attentive {
    fn watched<T>(
        &mut self,
        cx: &mut Context<'_>,
        act: impl FnOnce(Pin<&mut TcpStream>, &mut Context<'_>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        let acted = act(Pin::new(&mut self.stream), cx);
        if acted.is_ready() {
            self.overdue.as_mut().reset(Instant::now() + self.silence);
            return acted;
        }
        self.overdue.as_mut().poll(cx).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Attentive {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.watched(cx, |stream, cx| stream.poll_read(cx, buf))
    }
}

impl AsyncWrite for Attentive {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.watched(cx, |stream, cx| stream.poll_write(cx, buf))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn who_says_nothing_makes_room_for_others() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let silence = Duration::from_millis(300);
        let mut few = Few { listener, places: Arc::new(Semaphore::new(1)), silence };
        let address = few.local_addr().unwrap();
        let _idle = TcpStream::connect(address).await.unwrap();
        let (mut first, _) = few.accept().await;
        let mut next = TcpStream::connect(address).await.unwrap();
        assert!(timeout(Duration::from_millis(50), few.accept()).await.is_err(), "there is one place");

        let mut byte = [0];
        let error = timeout(Duration::from_secs(20), first.read(&mut byte)).await.expect("in time").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(first);
        let (mut second, _) = timeout(Duration::from_secs(20), few.accept()).await.expect("a place");
        for _ in 0..4 {
            tokio::time::sleep(silence / 2).await;
            next.write_all(b"x").await.unwrap();
            assert_eq!(second.read(&mut byte).await.expect("who says something may stay"), 1);
        }
    }
}
