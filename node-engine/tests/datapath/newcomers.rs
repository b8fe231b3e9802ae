//! Flows that begin all the while that something is done to the datapath: each asks a few times, and is answered by the same instance.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::lab::{Lab, PATIENCE};
use super::{PORT, client_socket};
use node_engine::netns::Netns;

/// Beside the one of those that last.
const NEW_PORT: u16 = PORT + 1;
const AT_A_TIME: usize = 4;
/// Datagrams of each.
const ASKED: usize = 6;

pub struct Newcomers {
    servers: [JoinHandle<()>; 2],
    clients: Vec<JoinHandle<Newcome>>,
    done: Arc<AtomicBool>,
    served: Arc<AtomicBool>,
}

/// What became of them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Newcome {
    pub flows: u32,
    /// Answered by another instance than before.
    pub moved: u32,
    /// A datagram of theirs was not answered.
    pub lost: u32,
}

impl Newcomers {
    /// From the first node's first instance to a service of both of the second's.
    pub fn begin(lab: &Lab, service: SocketAddr) -> Self {
        let to = SocketAddr::new(service.ip(), NEW_PORT);
        let (done, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let servers = [0, 1].map(|which: u8| {
            let (server, stop) = (client_socket(&lab.nodes[1].instances[usize::from(which)], NEW_PORT), served.clone());
            thread::spawn(move || answer(&server, which, &stop))
        });
        let clients = (0..AT_A_TIME).map(|_| {
            let netns = lab.nodes[0].instances[0].run(Netns::current).expect("the client's namespace");
            let stop = done.clone();
            thread::spawn(move || netns.run(|| come(to, &stop)).expect("enter the client's namespace"))
        });
        Self { servers, clients: clients.collect(), done, served }
    }

    pub fn finish(self) -> Newcome {
        self.done.store(true, Relaxed);
        let mut sum = Newcome::default();
        for client in self.clients {
            let Newcome { flows, moved, lost } = client.join().unwrap();
            (sum.flows, sum.moved, sum.lost) = (sum.flows + flows, sum.moved + moved, sum.lost + lost);
        }
        self.served.store(true, Relaxed);
        self.servers.into_iter().for_each(|server| server.join().unwrap());
        sum
    }
}

/// Says who it is.
fn answer(server: &UdpSocket, which: u8, stop: &AtomicBool) {
    server.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    while !stop.load(Relaxed) {
        let Ok((_, from)) = server.recv_from(&mut [0; 64]) else { continue };
        server.send_to(&[which], from).unwrap();
    }
}

fn come(to: SocketAddr, stop: &AtomicBool) -> Newcome {
    let any: SocketAddr = if to.is_ipv4() { ([0; 4], 0).into() } else { ([0_u16; 8], 0).into() };
    let mut come = Newcome::default();
    while !stop.load(Relaxed) {
        let socket = UdpSocket::bind(any).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.connect(to).unwrap();
        let ask = || {
            let mut which = [0];
            // An earlier datagram's ICMP error is not this one's.
            let _ = socket.send(&[0]).or_else(|_| socket.send(&[0]));
            socket.recv(&mut which).ok().map(|_| which[0])
        };
        let answers: Vec<Option<u8>> = (0..ASKED).map(|_| ask()).collect();
        come.flows += 1;
        come.lost += u32::from(answers.contains(&None));
        let first = answers.iter().flatten().next();
        come.moved += u32::from(answers.iter().flatten().any(|which| Some(which) != first));
        thread::sleep(Duration::from_micros(500));
    }
    come
}
