//! Published ports at `::1`. IPv4 has `route_localnet`, by which the bridge takes what loopback sends; the IPv6 stack refuses to route
//! loopback anywhere, so here this process carries the bytes from one socket to another. Everything is bounded, and ends with the port.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener as StdListener, UdpSocket as StdSocket};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tracing::warn;

use crate::model::{Addresses, PortMapping, Protocol};

use super::sysctl;

/// Connections, or clients of a UDP port, at a time.
const CLIENTS: usize = 256;
/// Datagrams that may wait for one of them.
const WAITING: usize = 64;
/// A UDP client that says nothing and hears nothing for so long is gone.
const IDLE: Duration = Duration::from_secs(60);
/// After an error that the next connection would meet, too.
const PAUSE: Duration = Duration::from_millis(100);
const DATAGRAM: usize = 65_535;

type Key = (u16, Protocol);

/// What is served at `::1` now.
#[derive(Debug, Default)]
pub(super) struct Relay {
    running: Mutex<BTreeMap<Key, Running>>,
}

#[derive(Debug)]
struct Running {
    to: SocketAddr,
    task: JoinHandle<()>,
}

impl Relay {
    /// Serves exactly these: a port that is no longer served is free when this returns.
    pub(super) async fn serve(&self, ports: &[(PortMapping, Addresses)]) {
        if !sysctl::has_ipv6() {
            return;
        }
        let wanted: BTreeMap<Key, SocketAddr> = ports
            .iter()
            .map(|(port, addresses)| ((port.host, port.protocol), SocketAddr::new(addresses.v6.into(), port.container)))
            .collect();
        for mut ended in self.end_others(&wanted) {
            ended.task.abort();
            let _ = (&mut ended.task).await;
        }
        let mut running = self.running();
        for (key, to) in wanted {
            if running.contains_key(&key) {
                continue;
            }
            match start(key, to) {
                Ok(task) => drop(running.insert(key, Running { to, task })),
                Err(error) => warn!(port = key.0, %error, "not published at ::1: another program has this port there"),
            }
        }
    }

    fn end_others(&self, wanted: &BTreeMap<Key, SocketAddr>) -> Vec<Running> {
        let mut running = self.running();
        let ends = |key: &Key, port: &mut Running| wanted.get(key) != Some(&port.to) || port.task.is_finished();
        running.extract_if(.., ends).map(|(_, port)| port).collect()
    }

    fn running(&self) -> MutexGuard<'_, BTreeMap<Key, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn start((port, protocol): Key, to: SocketAddr) -> io::Result<JoinHandle<()>> {
    let at = SocketAddr::new(IpAddr::V6(Ipv6Addr::LOCALHOST), port);
    Ok(match protocol {
        Protocol::Tcp => {
            let listener = StdListener::bind(at)?;
            listener.set_nonblocking(true)?;
            tokio::spawn(accept(TcpListener::from_std(listener)?, to))
        }
        Protocol::Udp => {
            let socket = StdSocket::bind(at)?;
            socket.set_nonblocking(true)?;
            tokio::spawn(exchange(UdpSocket::from_std(socket)?, to))
        }
    })
}

async fn accept(listener: TcpListener, to: SocketAddr) {
    let places = Arc::new(Semaphore::new(CLIENTS));
    // Ends what it holds when this task is ended.
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, _)) => drop(connections.spawn(async move {
                connect(client, to).await;
                drop(place);
            })),
            // Out of descriptors, or the client is gone again.
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// Where nobody answers, the client learns it by the end of its connection.
async fn connect(mut client: TcpStream, to: SocketAddr) {
    if let Ok(mut server) = TcpStream::connect(to).await {
        let _ = client.set_nodelay(true).and_then(|()| server.set_nodelay(true));
        let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
    }
}

async fn exchange(socket: UdpSocket, to: SocketAddr) {
    let socket = Arc::new(socket);
    let mut tasks = JoinSet::new();
    let mut clients: HashMap<SocketAddr, mpsc::Sender<Vec<u8>>> = HashMap::new();
    let mut buffer = vec![0; DATAGRAM];
    loop {
        while tasks.try_join_next().is_some() {}
        // An error is an ICMP message about an earlier answer.
        let Ok((length, from)) = socket.recv_from(&mut buffer).await else { continue };
        let known = clients.get(&from).filter(|client| !client.is_closed()).cloned();
        let client = match known {
            Some(client) => client,
            None => {
                clients.retain(|_, client| !client.is_closed());
                if clients.len() >= CLIENTS {
                    continue;
                }
                let (client, datagrams) = mpsc::channel(WAITING);
                tasks.spawn(converse(Arc::downgrade(&socket), from, to, datagrams));
                clients.insert(from, client.clone());
                client
            }
        };
        // One too many is lost, as on any network.
        let _ = client.try_send(buffer[..length].to_vec());
    }
}

/// One client of a UDP port: its datagrams leave by a socket of their own, by which the answers are known.
async fn converse(here: Weak<UdpSocket>, client: SocketAddr, to: SocketAddr, mut datagrams: mpsc::Receiver<Vec<u8>>) {
    let Ok(there) = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).await else { return };
    if there.connect(to).await.is_err() {
        return;
    }
    let mut buffer = vec![0; DATAGRAM];
    loop {
        tokio::select! {
            datagram = datagrams.recv() => match datagram {
                Some(datagram) => drop(there.send(&datagram).await),
                None => return,
            },
            // An error is the instance's refusal of an earlier datagram.
            answer = there.recv(&mut buffer) => if let Ok(length) = answer {
                // Held for no longer than a datagram takes: the port is free as soon as it is not served.
                let Some(here) = here.upgrade() else { return };
                let _ = here.send_to(&buffer[..length], client).await;
            },
            () = tokio::time::sleep(IDLE) => return,
        }
    }
}
