//! A world to test the law in: tables in memory, packets by kind, named cases, and random frames.
//!
//! The same world is loaded into kernel maps to check that the kernel's programs decide as the law does.

extern crate std;

mod frames;
mod packets;

use std::collections::HashMap;
use std::sync::LazyLock;
use std::vec;
use std::vec::Vec;

pub use self::frames::Frames;
use self::packets::ECHOED;
pub use self::packets::{Payload, addresses, checksums_hold, packet, with_options};
use crate::abi::{
    Answers, CONFIG_RELAX_SOURCE, CandidateKey, Config, Endpoint, FLOW_SEEN, Flow, FlowKey, Mac, PEER_OURS, POLICY_ANY,
    POLICY_CLIENT, POLICY_INSTANCE, POLICY_TRIAL, POLICY_TURN, Peer, Service, Slot,
};
use crate::addr::Addr;
use crate::frame::{TCP, TCP_ACK};
use crate::pipeline::{Owned, Tables};
use crate::verdict::{DropReason, Miss, Verdict};

/// The interface by which test packets of instances arrive: loopback, which every namespace has.
pub const PORT: u32 = 1;

/// Tables in memory; `pick` is the number that chance always shows.
#[derive(Clone, Debug, Default)]
pub struct World {
    pub config: Config,
    pub services: HashMap<Addr, Service>,
    pub candidates: HashMap<CandidateKey, u32>,
    pub slots: HashMap<u32, Slot>,
    pub peers: HashMap<u32, Peer>,
    pub endpoints: HashMap<Addr, Endpoint>,
    pub flows: HashMap<FlowKey, Flow>,
    pub pick: u32,
    /// The clock.
    pub now: u32,
    /// Rows of flows that there is room for.
    pub room: Option<usize>,
    pub turns: HashMap<u32, u32>,
    /// Flows that each slot was chosen for.
    pub chosen: HashMap<u32, u64>,
    pub answers: HashMap<u32, Answers>,
    /// Slots to be tried, by service.
    pub trials: HashMap<u32, u32>,
}

impl Tables for World {
    type Row<T: Copy + 'static> = Owned<T>;

    fn config(&mut self) -> Option<Owned<Config>> {
        Some(Owned(self.config))
    }

    fn service(&mut self, address: &Addr) -> Option<Owned<Service>> {
        self.services.get(address).copied().map(Owned)
    }

    fn candidate(&mut self, key: &CandidateKey) -> Option<u32> {
        self.candidates.get(key).copied()
    }

    fn slot(&mut self, index: u32) -> Option<Owned<Slot>> {
        // Like the kernel's array, which has every index.
        Some(Owned(self.slots.get(&index).copied().unwrap_or_default()))
    }

    fn peer(&mut self, index: u32) -> Option<Owned<Peer>> {
        Some(Owned(self.peers.get(&index).copied().unwrap_or_default()))
    }

    fn endpoint(&mut self, address: &Addr) -> Option<Owned<Endpoint>> {
        self.endpoints.get(address).copied().map(Owned)
    }

    fn flow(&mut self, key: &FlowKey) -> Option<Owned<Flow>> {
        self.flows.get(key).copied().map(Owned)
    }

    fn touch(&mut self, key: &FlowKey, flow: &Owned<Flow>, ends: u8) {
        if flow.unanswered() && key.protocol == u32::from(TCP) {
            self.answered(flow.server, ends != 0);
        }
        if let Some(flow) = self.flows.get_mut(key) {
            flow.seen = self.now;
            flow.state |= FLOW_SEEN | ends;
        }
    }

    fn learn(&mut self, key: &FlowKey, flow: &mut Flow, new: bool) -> bool {
        if new && self.room.is_some_and(|room| self.flows.len() >= room) {
            return false;
        }
        assert_eq!(new, !self.flows.contains_key(key));
        flow.seen = self.now;
        self.flows.insert(*key, *flow);
        true
    }

    fn forget(&mut self, key: &FlowKey) {
        self.flows.remove(key);
    }

    fn pick(&mut self) -> u32 {
        self.pick
    }

    fn turn(&mut self, service: u32) -> u32 {
        let turn = self.turns.entry(service).or_default();
        *turn += 1;
        *turn - 1
    }

    fn trial(&mut self, service: u32) -> Option<u32> {
        self.trials.remove(&service)
    }

    fn chosen(&mut self, slot: u32, tcp: bool) {
        *self.chosen.entry(slot).or_default() += 1;
        if tcp {
            for index in [0, slot] {
                self.answers.entry(index).or_default().asked += 1;
            }
        }
    }

    fn answered(&mut self, slot: u16, refused: bool) {
        let answers = self.answers.entry(slot.into()).or_default();
        *(if refused { &mut answers.refused } else { &mut answers.answered }) += 1;
    }
}

/// The addresses of the sample world, an IPv4 and an IPv6 one each.
#[derive(Clone, Copy, Debug)]
pub struct Pair(pub [u8; 4], pub u16, pub u16);

impl Pair {
    pub fn v4(self) -> Addr {
        Addr::v4(self.0)
    }

    /// `<first group>::<last group>`.
    pub fn v6(self) -> Addr {
        let mut bytes = [0; 16];
        bytes[..2].copy_from_slice(&self.1.to_be_bytes());
        bytes[14..].copy_from_slice(&self.2.to_be_bytes());
        Addr::v6(bytes)
    }

    pub fn of(self, v6: bool) -> Addr {
        if v6 { self.v6() } else { self.v4() }
    }
}

/// On this node: namespace addresses.
pub const WEB: Pair = Pair([10, 18, 0, 2], 0xfc00, 2);
pub const CLIENT: Pair = Pair([10, 18, 0, 3], 0xfc00, 3);
/// Does not know its instance address yet.
pub const NEWBORN: Pair = Pair([10, 18, 0, 4], 0xfc00, 4);
/// Behind another port than [`PORT`].
pub const NEIGHBOUR: Pair = Pair([10, 18, 0, 5], 0xfc00, 5);
pub const WEB_INSTANCE: Pair = Pair([10, 30, 0, 0], 0xfdff, 0x10);
pub const CLIENT_INSTANCE: Pair = Pair([10, 30, 0, 2], 0xfdff, 2);
/// On other nodes: db#0 on one of ours, db#1 on an upstream one, db#2 behind an IPv6 underlay, db#3 behind a narrow path.
pub const DB0: Pair = Pair([10, 18, 0, 66], 0xfc00, 0x102);
pub const DB1: Pair = Pair([10, 18, 0, 130], 0xfc00, 0x202);
pub const DB2: Pair = Pair([10, 18, 0, 194], 0xfc00, 0x302);
pub const DB3: Pair = Pair([10, 18, 0, 250], 0xfc00, 0x402);
pub const DB0_INSTANCE: Pair = Pair([10, 30, 0, 3], 0xfdff, 3);
pub const DB1_INSTANCE: Pair = Pair([10, 30, 0, 4], 0xfdff, 4);
pub const DB2_INSTANCE: Pair = Pair([10, 30, 0, 5], 0xfdff, 5);
pub const DB3_INSTANCE: Pair = Pair([10, 30, 0, 6], 0xfdff, 6);
/// The longest packet to db#3.
pub const NARROW_MTU: u32 = 100;
/// Service addresses: two instances elsewhere, one here, none, one nobody knows, one outside all services.
pub const DB_SERVICE: Pair = Pair([10, 30, 50, 2], 0xfdff, 0x2002);
pub const WEB_SERVICE: Pair = Pair([10, 30, 50, 1], 0xfdff, 0x2001);
pub const EMPTY_SERVICE: Pair = Pair([10, 30, 50, 9], 0xfdff, 0x2009);
/// By turns: db#1, web, db#0. By the client: db#0 and db#1.
pub const TURN_SERVICE: Pair = Pair([10, 30, 50, 3], 0xfdff, 0x2003);
pub const STICKY_SERVICE: Pair = Pair([10, 30, 50, 4], 0xfdff, 0x2004);
/// db#0, and db#1 is to be tried once.
pub const TRIED_SERVICE: Pair = Pair([10, 30, 50, 5], 0xfdff, 0x2005);
pub const UNKNOWN_SERVICE: Pair = Pair([10, 30, 99, 99], 0xfdff, 0x9999);
pub const OUTSIDE: Pair = Pair([198, 51, 100, 1], 0x2001, 1);
/// Outer addresses: this node, the nodes of db#0, of db#1 and of db#3.
pub const HERE: Addr = Addr::v4([192, 0, 2, 11]);
pub const OURS: Addr = Addr::v4([192, 0, 2, 12]);
pub const UPSTREAM: Addr = Addr::v4([192, 0, 2, 13]);
pub const NARROW: Addr = Addr::v4([192, 0, 2, 14]);

pub const WEB_MAC: Mac = Mac([2, 0, 0, 0, 0, 2]);
pub const CLIENT_MAC: Mac = Mac([2, 0, 0, 0, 0, 3]);
pub const GATEWAY_MAC: Mac = Mac([2, 0, 0, 0, 0, 1]);

impl World {
    /// Two instances here, four on four peers, services over them, in both families.
    pub fn sample() -> Self {
        // Copied, not built: a fuzzer asks for one per input, and hundreds of keys are long to hash.
        static SAMPLE: LazyLock<World> = LazyLock::new(World::build);
        SAMPLE.clone()
    }

    fn build() -> Self {
        let mut world = Self {
            config: Config {
                service_v4: Addr::v4([10, 30, 0, 0]),
                service_v4_mask: mask(96 + 16),
                service_v6: Pair([0; 4], 0xfdff, 0).v6(),
                service_v6_mask: mask(16),
                node: HERE,
                gateway_mac: GATEWAY_MAC,
                tunnel_port: crate::TUNNEL_PORT.to_be_bytes(),
                framed_port: (crate::TUNNEL_PORT + 1).to_be_bytes(),
                _pad: [0; 2],
                slow_ifindex: 0,
                flags: 0,
                epoch: 3,
            },
            ..Self::default()
        };
        let port = crate::TUNNEL_PORT.to_be_bytes();
        let peer = Peer { host: OURS, source: HERE, ifindex: 2, port, flags: PEER_OURS, ..Peer::default() };
        world.peers.insert(1, peer);
        world.peers.insert(2, Peer { host: UPSTREAM, flags: 0, ..peer });
        world.peers.insert(3, Peer { host: OUTSIDE.v6(), source: OUTSIDE.v6(), ..peer });
        world.peers.insert(4, Peer { host: NARROW, mtu: NARROW_MTU, ..peer });
        for v6 in [false, true] {
            world.populate(v6);
        }
        world
    }

    fn populate(&mut self, v6: bool) {
        let endpoint = |instance: Addr, ifindex, mac| Endpoint { instance, ifindex, mac, account: 0 };
        self.endpoints.insert(WEB.of(v6), endpoint(WEB_INSTANCE.of(v6), PORT, WEB_MAC.0));
        self.endpoints.insert(CLIENT.of(v6), endpoint(CLIENT_INSTANCE.of(v6), PORT, CLIENT_MAC.0));
        self.endpoints.insert(NEWBORN.of(v6), endpoint(Addr::NONE, PORT, [2, 0, 0, 0, 0, 4]));
        self.endpoints.insert(NEIGHBOUR.of(v6), endpoint(WEB_INSTANCE.of(v6), PORT + 98, [2, 0, 0, 0, 0, 5]));

        let first = if v6 { 11 } else { 1 };
        let instances = [
            (WEB, WEB_INSTANCE, 0),
            (CLIENT, CLIENT_INSTANCE, 0),
            (DB0, DB0_INSTANCE, 1),
            (DB1, DB1_INSTANCE, 2),
            (DB2, DB2_INSTANCE, 3),
            (DB3, DB3_INSTANCE, 4),
        ];
        for (number, (namespace, instance, peer)) in (first..).zip(instances) {
            let (namespace, instance) = (namespace.of(v6), instance.of(v6));
            self.slots.insert(number, Slot { generation: 1, peer, namespace, instance });
            self.services
                .insert(instance, Service { id: number, epoch: 1, count: 1, policy: POLICY_INSTANCE, first: number });
        }
        self.serve(DB_SERVICE.of(v6), first + 100, POLICY_ANY, &[first + 2, first + 3]);
        self.serve(WEB_SERVICE.of(v6), first + 101, POLICY_ANY, &[first]);
        self.serve(EMPTY_SERVICE.of(v6), first + 102, POLICY_ANY, &[]);
        self.serve(TURN_SERVICE.of(v6), first + 103, POLICY_TURN, &[first + 3, first, first + 2]);
        // Many, so that two clients rarely share one.
        let sticky: Vec<u32> = (0..61).map(|cell| first + 2 + cell % 2).collect();
        self.serve(STICKY_SERVICE.of(v6), first + 104, POLICY_CLIENT, &sticky);
        self.serve(TRIED_SERVICE.of(v6), first + 105, POLICY_TURN | POLICY_TRIAL, &[first + 2]);
        self.trials.insert(first + 105, first + 3);
    }

    fn serve(&mut self, address: Addr, id: u32, policy: u32, slots: &[u32]) {
        let first = slots.first().copied().unwrap_or(0);
        let row = Service { id, epoch: 7, count: slots.len() as u32, policy, first };
        self.services.insert(address, row);
        for (index, slot) in (0..).zip(slots) {
            self.candidates.insert(CandidateKey { service: id, epoch: 7, index }, *slot);
        }
    }
}

/// A mask of `bits` leading ones.
fn mask(bits: u32) -> Addr {
    Addr((u128::MAX << (128 - bits)).to_be_bytes())
}

/// A world that takes any inner source.
pub fn relaxed() -> World {
    let mut world = World::sample();
    world.config.flags |= CONFIG_RELAX_SOURCE;
    world
}

/// Which way a packet goes through the law.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From an instance, by this port.
    Outbound(u32),
    /// Through the tunnel, from this outer source.
    Inbound(Addr),
}

/// One row of the table: *given* a direction, a packet and what chance shows, the law says and the packet becomes.
#[derive(Clone, Debug)]
pub struct Case {
    pub name: &'static str,
    pub direction: Direction,
    pub packet: Vec<u8>,
    pub pick: u32,
    pub verdict: Result<Verdict, DropReason>,
    /// New source and destination; `None`: the packet stays as it was.
    pub rewritten: Option<(Addr, Addr)>,
}

/// The table of packet cases over [`World::sample`], each from a fresh world, in both families.
pub fn cases() -> Vec<Case> {
    [false, true].into_iter().flat_map(|v6| [outbound_cases(v6), inbound_cases(v6)].concat()).collect()
}

fn outbound_cases(v6: bool) -> Vec<Case> {
    let from_client = |destination: Pair, payload| packet(CLIENT.of(v6), destination.of(v6), payload);
    let case = |name, packet, pick, verdict, rewritten: Option<(Pair, Pair)>| Case {
        name,
        direction: Direction::Outbound(PORT),
        packet,
        pick,
        verdict,
        rewritten: rewritten.map(|(source, destination)| (source.of(v6), destination.of(v6))),
    };
    let tcp = Payload::Tcp(40_000, 80);
    let to_peer = |peer| Ok(Verdict::Send { peer });
    let to_web = Ok(Verdict::Local { ifindex: PORT, mac: WEB_MAC });
    let to_db0 = Some((CLIENT_INSTANCE, DB0));
    let slow = |miss| Ok(Verdict::Slow(miss));
    let data = Payload::Segment(40_000, 80, ECHOED | TCP_ACK);
    let to_db3 = Some((CLIENT_INSTANCE, DB3));
    let by_narrow = if v6 { (slow(Miss::Narrow), None) } else { (to_peer(4), to_db3) };
    let neighbour = packet(NEIGHBOUR.of(v6), DB_SERVICE.of(v6), tcp);
    let newborn = packet(NEWBORN.of(v6), DB_SERVICE.of(v6), tcp);
    let stranger = packet(OUTSIDE.of(v6), DB_SERVICE.of(v6), tcp);
    let mut cases = vec![
        case("tcp to a service takes the picked instance", from_client(DB_SERVICE, tcp), 2, to_peer(1), to_db0),
        case(
            "another pick, another instance",
            from_client(DB_SERVICE, tcp),
            1,
            to_peer(2),
            Some((CLIENT_INSTANCE, DB1)),
        ),
        case(
            "by turns, from the first on",
            from_client(TURN_SERVICE, tcp),
            1,
            to_peer(2),
            Some((CLIENT_INSTANCE, DB1)),
        ),
        case(
            "by the client, whatever chance shows",
            from_client(STICKY_SERVICE, tcp),
            1,
            to_peer(if v6 { 2 } else { 1 }),
            Some((CLIENT_INSTANCE, if v6 { DB1 } else { DB0 })),
        ),
        case("udp to a service", from_client(DB_SERVICE, Payload::Udp(5000, 53)), 0, to_peer(1), to_db0),
        case("tcp to an instance address", from_client(DB1_INSTANCE, tcp), 0, to_peer(2), Some((CLIENT_INSTANCE, DB1))),
        case("service on this node", from_client(WEB_SERVICE, tcp), 0, to_web, Some((CLIENT_INSTANCE, WEB))),
        case("echo to one of ours", from_client(DB_SERVICE, Payload::EchoRequest(7)), 0, to_peer(1), to_db0),
        case(
            "echo to an upstream peer",
            from_client(DB1_INSTANCE, Payload::EchoRequest(7)),
            0,
            Err(DropReason::PeerProtocol),
            None,
        ),
        case(
            "the port that ends an upstream peer",
            from_client(DB1_INSTANCE, Payload::Tcp(40_000, 65_535)),
            0,
            Err(DropReason::PeerProtocol),
            None,
        ),
        case(
            "the same port of one of ours",
            from_client(DB_SERVICE, Payload::Udp(5000, 65_535)),
            0,
            to_peer(1),
            to_db0,
        ),
        case("ipv6 underlay is user space's", from_client(DB2_INSTANCE, tcp), 0, slow(Miss::Underlay), None),
        case("a service without instances", from_client(EMPTY_SERVICE, tcp), 0, slow(Miss::Gone), None),
        case("a trial", from_client(TRIED_SERVICE, tcp), 0, to_peer(2), Some((CLIENT_INSTANCE, DB1))),
        case("a service nobody knows", from_client(UNKNOWN_SERVICE, tcp), 0, slow(Miss::Service), None),
        case("no service address", from_client(OUTSIDE, tcp), 0, Ok(Verdict::Pass), None),
        case(
            "a protocol we do not carry",
            from_client(DB_SERVICE, Payload::Other(47)),
            0,
            Err(DropReason::Protocol),
            None,
        ),
        case(
            "what is not about a flow",
            from_client(DB_SERVICE, Payload::Message(if v6 { 135 } else { 5 })),
            0,
            Err(DropReason::Protocol),
            None,
        ),
        case("an error is user space's", from_client(DB_SERVICE, Payload::Message(3)), 0, slow(Miss::Error), None),
        case(
            "an error in another's name",
            packet(NEIGHBOUR.of(v6), DB_SERVICE.of(v6), Payload::Message(3)),
            0,
            Err(DropReason::Spoofed),
            None,
        ),
        case("within a connection", from_client(DB_SERVICE, data), 0, to_peer(1), to_db0),
        case("a connection begins by a narrow path", from_client(DB3_INSTANCE, tcp), 0, slow(Miss::Narrow), None),
        case("short enough for it", from_client(DB3_INSTANCE, Payload::Udp(5000, 53)), 0, to_peer(4), to_db3),
        case("within a connection, shorter over IPv4", from_client(DB3_INSTANCE, data), 0, by_narrow.0, by_narrow.1),
        case("another instance's address", neighbour, 0, Err(DropReason::Spoofed), None),
        case("an address of nobody here", stranger, 0, Err(DropReason::Spoofed), None),
        case("a sender without instance address", newborn, 0, slow(Miss::Endpoint), None),
        case(
            "a service calls itself",
            packet(WEB.of(v6), WEB_SERVICE.of(v6), tcp),
            0,
            to_web,
            Some((WEB_INSTANCE, WEB)),
        ),
    ];
    if !v6 {
        let mut fragment = from_client(DB_SERVICE, tcp);
        fragment[6] = 0x20;
        cases.push(case("first fragment", fragment.clone(), 0, slow(Miss::Fragment), None));
        (fragment[6], fragment[7]) = (0, 0xb9);
        cases.push(case("later fragment", fragment, 0, slow(Miss::Fragment), None));
        let bare = from_client(DB_SERVICE, Payload::UdpBare(5000, 53));
        cases.push(case("udp without checksum", bare, 0, to_peer(1), to_db0));
        cases.push(case("ip options", with_options(&from_client(DB_SERVICE, tcp)), 0, to_peer(1), to_db0));
        let mut short = from_client(DB_SERVICE, tcp);
        short.truncate(30);
        cases.push(case("tcp header cut off", short, 0, Err(DropReason::Malformed), None));
    } else {
        for (name, next_header) in [("hop-by-hop options", 0), ("routing header", 43), ("destination options", 60)] {
            cases.push(case(name, from_client(DB_SERVICE, Payload::Other(next_header)), 0, slow(Miss::Header), None));
        }
        cases.push(case("fragment header", from_client(DB_SERVICE, Payload::Other(44)), 0, slow(Miss::Fragment), None));
    }
    cases
}

fn inbound_cases(v6: bool) -> Vec<Case> {
    let case = |name, outer, source: Pair, destination: Pair, payload, verdict, rewritten| Case {
        name,
        direction: Direction::Inbound(outer),
        packet: packet(source.of(v6), destination.of(v6), payload),
        pick: 0,
        verdict,
        rewritten,
    };
    let tcp = Payload::Tcp(80, 40_000);
    let to_web = Ok(Verdict::Local { ifindex: PORT, mac: WEB_MAC });
    let foreign = Err(DropReason::ForeignSource);
    vec![
        case("from a known instance of its node", OURS, DB0_INSTANCE, WEB, tcp, to_web, None),
        case("echo through the tunnel", OURS, DB0_INSTANCE, WEB, Payload::EchoReply(3), to_web, None),
        case("instance of another node", UPSTREAM, DB0_INSTANCE, WEB, tcp, foreign, None),
        case("instance of this node", OURS, CLIENT_INSTANCE, WEB, tcp, foreign, None),
        case("a service address is no sender", OURS, DB_SERVICE, WEB, tcp, foreign, None),
        case("sender nobody knows", OURS, UNKNOWN_SERVICE, WEB, tcp, Ok(Verdict::Slow(Miss::Source)), None),
        case("to an instance that is not here", OURS, DB0_INSTANCE, DB1, tcp, Err(DropReason::NotOurs), None),
        case(
            "within a connection",
            OURS,
            DB0_INSTANCE,
            WEB,
            Payload::Segment(80, 40_000, ECHOED | TCP_ACK),
            to_web,
            None,
        ),
        case("a connection by a narrow path", NARROW, DB3_INSTANCE, WEB, tcp, Ok(Verdict::Slow(Miss::Narrow)), None),
        case("within it", NARROW, DB3_INSTANCE, WEB, Payload::Segment(80, 40_000, ECHOED | TCP_ACK), to_web, None),
        case("an error", OURS, DB0_INSTANCE, WEB, Payload::Message(3), Ok(Verdict::Slow(Miss::Error)), None),
        case("an error for nobody here", OURS, DB0_INSTANCE, DB1, Payload::Message(3), Err(DropReason::NotOurs), None),
        case("other protocol", OURS, DB0_INSTANCE, WEB, Payload::Other(89), Err(DropReason::Protocol), None),
    ]
}
