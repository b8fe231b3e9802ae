//! Datagrams that are answered, from one instance to a service of two, all the while that something is done to the datapath.

use std::collections::BTreeSet;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::lab::{Lab, service};
use super::{PORT, client_socket};

const FLOWS: usize = 8;

pub struct Pings {
    echoes: [JoinHandle<BTreeSet<u16>>; 2],
    pings: JoinHandle<Pinged>,
    done: Arc<AtomicBool>,
    echoes_done: Arc<AtomicBool>,
}

/// What became of them.
pub struct Pinged {
    pub longest: Duration,
    pub lost: u32,
    pub sent: u32,
}

impl Pings {
    /// Has the service of both of the second node's instances, and pings them over and over from the first node's first.
    pub async fn begin(lab: &Lab, to: SocketAddr) -> Self {
        for index in 0..2 {
            // Slots as `Lab::base` has them.
            let slots: &[u32] = if index == 0 { &[1, 2] } else { &[5, 6] };
            lab.nodes[index].apply(service(to.ip(), 1, 2, slots)).await;
        }
        let (done, echoes_done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let echoes = [0, 1].map(|which| {
            let (server, stop) = (client_socket(&lab.nodes[1].instances[which], PORT), echoes_done.clone());
            thread::spawn(move || echo(&server, &stop))
        });
        let clients: Vec<UdpSocket> = (0..FLOWS).map(|_| client_socket(&lab.nodes[0].instances[0], 0)).collect();
        let stop = done.clone();
        let pings = thread::spawn(move || ping(&clients, to, &stop));
        Self { echoes, pings, done, echoes_done }
    }

    /// Ends them. No flow may have had more than one instance.
    pub fn finish(self) -> Pinged {
        self.done.store(true, Relaxed);
        let pinged = self.pings.join().unwrap();
        // Not before the last ping has its answer.
        self.echoes_done.store(true, Relaxed);
        let [first, second] = self.echoes.map(|echo| echo.join().unwrap());
        assert!(
            first.is_disjoint(&second) && first.len() + second.len() == FLOWS,
            "flows have moved: {first:?} {second:?}"
        );
        pinged
    }
}

/// Answers, and returns from which ports it was asked.
fn echo(server: &UdpSocket, stop: &AtomicBool) -> BTreeSet<u16> {
    let mut buffer = [0; 64];
    server.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let mut flows = BTreeSet::new();
    while !stop.load(Relaxed) {
        let Ok((len, from)) = server.recv_from(&mut buffer) else { continue };
        flows.insert(from.port());
        server.send_to(&buffer[..len], from).unwrap();
    }
    flows
}

/// A datagram of each flow each millisecond.
fn ping(clients: &[UdpSocket], to: SocketAddr, stop: &AtomicBool) -> Pinged {
    clients.iter().for_each(|client| client.connect(to).unwrap());
    let mut pinged = Pinged { longest: Duration::ZERO, lost: 0, sent: 0 };
    while !stop.load(Relaxed) {
        for client in clients {
            let begin = Instant::now();
            client.send(&pinged.sent.to_be_bytes()).unwrap();
            pinged.sent += 1;
            match client.recv(&mut [0; 64]) {
                Ok(_) => pinged.longest = pinged.longest.max(begin.elapsed()),
                Err(_) => pinged.lost += 1,
            }
        }
        thread::sleep(Duration::from_millis(1));
    }
    pinged
}
