//! Sockets at one address, and what is answered there.

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep_until, timeout};

use super::limit::{Limits, Place};
use super::upstream::{Transport, Upstreams};
use super::zone::{self, Asked, Heard, Question, Zone};
use super::{Directory, in_subnet};
use crate::model::ServiceName;
use crate::netmanager::view::Lookup;

/// A longer question is none.
const QUESTION: usize = 4_096;
/// Connections at once, and for how long one may say nothing.
const CONNECTIONS: usize = 64;
const IDLE: Duration = Duration::from_secs(5);
/// After a connection that could not be taken.
const REST: Duration = Duration::from_millis(100);
/// So long a question about a service waits for the cluster.
const PATIENCE: Duration = Duration::from_millis(2_500);
/// So long the cluster is not asked again for a service that it does not know, and how many of these are remembered.
const UNKNOWN: Duration = Duration::from_secs(2);
const MOST_UNKNOWN: usize = 1_024;

/// The sockets at one address.
#[derive(Debug)]
pub(super) struct Door {
    datagrams: UdpSocket,
    connections: TcpListener,
}

impl Door {
    /// `interface`: who comes by another one is not heard.
    ///
    /// # Errors
    /// If the address is not there, or the port is taken.
    pub(super) fn open(address: IpAddr, port: u16, interface: Option<&str>) -> io::Result<Self> {
        let at = SocketAddr::new(address, port);
        let socket = std::net::UdpSocket::bind(at)?;
        socket.set_nonblocking(true)?;
        let datagrams = UdpSocket::from_std(socket)?;
        let at = datagrams.local_addr()?;
        let listener = if at.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        listener.set_reuseaddr(true)?;
        if let Some(interface) = interface {
            datagrams.bind_device(Some(interface.as_bytes()))?;
            listener.bind_device(Some(interface.as_bytes()))?;
        }
        listener.bind(at)?;
        Ok(Self { datagrams, connections: listener.listen(64)? })
    }

    #[cfg(test)]
    pub(super) fn address(&self) -> SocketAddr {
        self.datagrams.local_addr().expect("a bound socket has an address")
    }
}

/// Answers questions.
pub(super) struct Server {
    directory: Arc<dyn Directory>,
    zone: Zone,
    upstreams: Arc<Upstreams>,
    limits: Limits,
    connections: Limits,
    unknown: Mutex<HashMap<ServiceName, Instant>>,
}

impl Server {
    pub(super) fn new(directory: Arc<dyn Directory>, zone: Zone, upstreams: Arc<Upstreams>) -> Self {
        let (limits, connections) = (Limits::default(), Limits::at_once(CONNECTIONS / 4));
        Self { directory, zone, upstreams, limits, connections, unknown: Mutex::default() }
    }

    /// Answers whoever comes to the door, each question in a task of its own, until a socket fails for good.
    pub(super) async fn serve(self: Arc<Self>, door: Door) -> io::Result<()> {
        let Door { datagrams, connections } = door;
        let datagrams = Arc::new(datagrams);
        let mut work = JoinSet::new();
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        let mut buffer = vec![0; QUESTION];
        let mut rests_until = None;
        loop {
            tokio::select! {
                Some(_) = work.join_next() => {}
                () = sleep_until(rests_until.unwrap_or_else(tokio::time::Instant::now)), if rests_until.is_some() => rests_until = None,
                heard = datagrams.recv_from(&mut buffer) => {
                    // An ICMP error for an earlier answer.
                    let Ok((length, client)) = heard else { continue };
                    let Some(place) = self.admit(client.ip()) else { continue };
                    let (server, socket, question) = (Arc::clone(&self), Arc::clone(&datagrams), buffer[..length].to_vec());
                    work.spawn(async move {
                        if let Some(answer) = server.answer(&question, Transport::Udp, place).await {
                            // A client that has gone.
                            let _ = socket.send_to(&answer, client).await;
                        }
                    });
                }
                accepted = connections.accept(), if rests_until.is_none() => {
                    let Ok((stream, client)) = accepted else {
                        // For want of descriptors, say: the connection waits, and the next try would fail as well.
                        rests_until = Some(tokio::time::Instant::now() + REST);
                        continue;
                    };
                    let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
                    if !self.welcome(client.ip()) {
                        continue;
                    }
                    // Nobody takes all places.
                    let Some(share) = self.connections.admit(client.ip(), Instant::now()) else { continue };
                    let server = Arc::clone(&self);
                    work.spawn(async move {
                        // Whatever ended it, there is nobody to tell.
                        let _ = server.converse(stream, client.ip()).await;
                        drop((place, share));
                    });
                }
            }
        }
    }

    /// One question after the other, until the client says nothing more.
    async fn converse(&self, mut stream: TcpStream, client: IpAddr) -> io::Result<()> {
        loop {
            let length = usize::from(timeout(IDLE, stream.read_u16()).await??);
            if length > QUESTION {
                return Ok(());
            }
            let mut question = vec![0; length];
            timeout(IDLE, stream.read_exact(&mut question)).await??;
            let Some(place) = self.admit(client) else { return Ok(()) };
            let Some(answer) = self.answer(&question, Transport::Tcp, place).await else { return Ok(()) };
            let Ok(length) = u16::try_from(answer.len()) else { return Ok(()) };
            let whole = [&length.to_be_bytes(), answer.as_slice()].concat();
            timeout(IDLE, stream.write_all(&whole)).await??;
        }
    }

    fn welcome(&self, client: IpAddr) -> bool {
        in_subnet(self.zone.subnet, client)
    }

    fn admit(&self, client: IpAddr) -> Option<Place> {
        if self.welcome(client) { self.limits.admit(client, Instant::now()) } else { None }
    }

    /// `None` where nothing is said.
    pub(super) async fn answer(&self, bytes: &[u8], transport: Transport, _place: Place) -> Option<Vec<u8>> {
        let question = match zone::hear(bytes) {
            Heard::Question(question) => question,
            Heard::Answer(answer) => return Some(answer),
            Heard::Nothing => return None,
        };
        let answer = match self.zone.read(&question.name) {
            Asked::Service { service, label } => self.service(&question, service, label.as_deref()).await,
            Asked::Address(address) => match self.directory.name_of(address).await {
                Some((service, label)) => question.pointer(zone::name_of(&service, &label)?),
                None => question.no_such_name(),
            },
            Asked::Part => question.nothing(),
            Asked::Nobody => question.no_such_name(),
            Asked::Foreign => match self.upstreams.ask(bytes, transport).await {
                Ok(answer) => Some(answer),
                Err(_) => question.failed(),
            },
        }?;
        match transport {
            Transport::Udp if answer.len() > question.largest() => question.cut(),
            _ => Some(answer),
        }
    }

    async fn service(&self, question: &Question, service: ServiceName, label: Option<&str>) -> Option<Vec<u8>> {
        if self.is_unknown(&service) {
            return question.no_such_name();
        }
        let asked = timeout(PATIENCE, self.directory.look_up(service.clone())).await;
        match asked.unwrap_or(Lookup::Unreachable) {
            Lookup::Known(named) => match zone::choose(&named, label) {
                Some(addresses) => question.addresses(&addresses),
                None => question.no_such_name(),
            },
            Lookup::Unknown => {
                self.remember_unknown(service);
                question.no_such_name()
            }
            Lookup::Unreachable => question.failed(),
        }
    }

    fn is_unknown(&self, service: &ServiceName) -> bool {
        let unknown = self.unknown.lock().unwrap_or_else(PoisonError::into_inner);
        unknown.get(service).is_some_and(|since| since.elapsed() < UNKNOWN)
    }

    fn remember_unknown(&self, service: ServiceName) {
        let mut unknown = self.unknown.lock().unwrap_or_else(PoisonError::into_inner);
        if unknown.len() >= MOST_UNKNOWN {
            unknown.retain(|_, since| since.elapsed() < UNKNOWN);
        }
        if unknown.len() < MOST_UNKNOWN {
            unknown.insert(service, Instant::now());
        }
    }
}
