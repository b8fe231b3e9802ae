//! What the core does about its peers: greets them, finds out how far they are and how large a packet reaches them.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::Duration;

use netmanager_common::abi::{PEER_OURS, Peer};

use super::{Core, Effect};
use crate::netmanager::hello::{Known, Outcome as Greeting};
use crate::netmanager::path::Outcome as PathNews;

impl Core {
    pub(super) fn meet(&mut self, number: u32, peer: &Peer, out: &mut Vec<Effect>) {
        let known = Known {
            ours: peer.flags & PEER_OURS != 0,
            framed_port: Some(u16::from_be_bytes(peer.framed_port)).filter(|port| *port != 0),
        };
        let to = SocketAddr::new(peer.host.into(), u16::from_be_bytes(peer.port));
        self.greetings.learn(number, to, known, self.now);
        if self.ways.insert(peer.host) {
            out.push(Effect::FindWays(vec![peer.host.into()]));
        }
    }

    pub(super) fn greet_who_is_due(&mut self, out: &mut Vec<Effect>) {
        let due = self.greetings.tick(self.now);
        self.greet(due, out);
    }

    pub(super) fn greet(&mut self, greetings: Vec<Greeting>, out: &mut Vec<Effect>) {
        for greeting in greetings {
            match greeting {
                Greeting::Send { to, payload } => out.push(Effect::SendControl(to, payload)),
                Greeting::Ours { peer, ours } => {
                    let delta = self.table.set_ours(peer, ours);
                    self.project(delta, out);
                    if !ours {
                        self.paths.forget(peer);
                        let delta = self.table.set_path_mtu(peer, None);
                        self.project(delta, out);
                    }
                }
                Greeting::Probes { peer, to } => {
                    let believed = self.table.path_mtu(peer);
                    self.paths.learn(peer, to, believed, self.now);
                }
                Greeting::Framed { peer, port } => {
                    let delta = self.table.set_framed(peer, port);
                    self.project(delta, out);
                }
                Greeting::Gone { peer, namespaces } => {
                    let delta = self.table.gone(peer, &namespaces);
                    self.project(delta, out);
                }
            }
        }
    }

    /// Packets have been sent to peers since the last tick.
    pub(in crate::netmanager) fn travels(&mut self) {
        self.greetings.travels();
        self.paths.travels();
    }

    /// When a path has to be looked at next.
    pub(in crate::netmanager) fn paths_due(&self) -> Option<Duration> {
        self.paths.due()
    }

    pub(super) fn hear_paths(&mut self, news: impl IntoIterator<Item = PathNews>, out: &mut Vec<Effect>) {
        for news in news {
            match news {
                PathNews::Probe { to, payload } => out.push(Effect::SendWhole(to, payload)),
                PathNews::Mtu { peer, mtu } => {
                    let delta = self.table.set_path_mtu(peer, Some(mtu.unwrap_or(0)));
                    self.project(delta, out);
                }
            }
        }
    }

    /// How far the peers are.
    pub(super) fn measure(&mut self, out: &mut Vec<Effect>) {
        self.greetings.race(&self.table.raced(), self.now);
        let rtts: HashMap<u32, Duration> = self.greetings.rtts().collect();
        if rtts != self.figures.rtts {
            self.figures.rtts = rtts;
            self.weigh(out);
        }
    }

    pub(super) fn weigh(&mut self, out: &mut Vec<Effect>) {
        let delta = self.table.weigh(self.figures.clone());
        self.project(delta, out);
    }
}
