//! How long a packet may be on the way to each peer of ours (RFC 8899): found out by padded hellos that nobody may cut, and by nothing
//! else, as the underlay need not say a word. Pure: the clock and the secret are arguments.
//!
//! ```text
//! Verify   what is believed, at first the full size: answered ──► Rest, and again after a while
//!   │ not answered, three times                                   (while it is not the full size, with longer ones beside it)
//!   ▼
//! Search   sizes all over what is possible, at once: the longest that is answered is believed; then those up to the next, until
//!          the two are close ──► Rest
//! ```
//!
//! While nothing at all is answered nothing new is believed. While no packets are sent nothing can be lost, and a rest is long; it ends
//! with the first packets that are.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use netmanager_common::addr::Addr;
use netmanager_common::{FRAMING_LEN, OUTER_LEN_V4, OUTER_LEN_V6};

use super::hello::{Hello, Kind, Secret, Tokens};

/// How long an answer is waited for: as long as two answers have taken, within these bounds.
const PATIENCE: Duration = Duration::from_millis(250);
const MOST_PATIENCE: Duration = Duration::from_secs(4);
/// How often a probe is sent before it counts as lost,
const TRIES: u8 = 3;
/// and for how long nothing at all may be answered before a search is put off.
const SILENCE: u8 = 8;
/// What is believed is tried again so often where it has changed lately,
const PERIOD: Duration = Duration::from_secs(5);
const LATELY: Duration = Duration::from_secs(600);
/// so often where it has not; a probe is as long as a packet, and somebody may pay for each;
const CALM_PERIOD: Duration = Duration::from_secs(15);
/// and so often while no packets are sent.
const IDLE: Duration = Duration::from_secs(3_600);
/// Less often where there are many peers: so much for each.
const PERIOD_EACH: Duration = Duration::from_millis(10);
/// Where there could be more, these parts of what is missing are tried with it.
const RUNGS: [u16; 3] = [4, 2, 1];
/// Whether a narrow path takes a little more is looked at so often.
const RAISE: Duration = Duration::from_secs(60);
/// Steps of a search at a time.
const ROUND: u16 = 8;
/// A search ends when it knows the size as exactly as this.
const EXACTLY: u16 = 4;
/// Every path takes this, by custom over IPv4 and by rule over IPv6 (RFC 8200 5).
const SMALLEST_V4: u16 = 576;
const SMALLEST_V6: u16 = 1_280;

/// What a path leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// A datagram that must go whole or not at all.
    Probe { to: SocketAddr, payload: Vec<u8> },
    /// Packets of instances to the peer may have this length; `None`: any that they send.
    Mtu { peer: u32, mtu: Option<u16> },
}

/// The paths to all peers that answer probes.
#[derive(Clone, Debug)]
pub struct Paths {
    tokens: Tokens,
    /// The longest packet that instances send.
    mtu: u16,
    paths: BTreeMap<u32, Path>,
}

#[derive(Clone, Debug)]
struct Path {
    to: SocketAddr,
    /// Outer length of the longest packet that instances send.
    full: u16,
    /// Outer length that the path is believed to take.
    believed: u16,
    /// What was last told of it.
    told: u16,
    doing: Doing,
    /// When the next step is due,
    next: Duration,
    /// and when the last began.
    began: Duration,
    /// When what is told has changed, or was first asked for.
    changed: Duration,
    /// By how much longer the periods are, as there are other peers.
    crowd: Duration,
    /// When a narrow path is searched anew.
    raise: Duration,
    patience: Duration,
    /// Probes under way: token, outer length, and since when.
    out: Vec<(u64, u16, Duration)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Doing {
    Rest,
    /// The believed size was sent so often.
    Verify(u8),
    Search(Search),
}

/// Somewhere from `low` on, below `high`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Search {
    /// It was answered; 0: nothing was yet.
    low: u16,
    high: u16,
    /// What was sent in this round, in order, and the longest of it that was answered.
    sent: Vec<u16>,
    best: u16,
    /// How long there was no answer at all.
    silent: u8,
}

impl Paths {
    /// `mtu`: the longest packet that instances send. `secret` makes tokens hard to guess.
    pub(super) fn new(secret: Secret, mtu: u16) -> Self {
        Self { tokens: Tokens::new(secret, 1), mtu, paths: BTreeMap::new() }
    }

    /// The peer answers probes, and packets of instances may have had this length in an earlier run; the first probe is due now.
    pub fn learn(&mut self, peer: u32, to: SocketAddr, believed: Option<u16>, now: Duration) {
        if self.paths.get(&peer).is_some_and(|path| path.to == to) {
            return;
        }
        let full = self.mtu.saturating_add(overhead(&to));
        let believed = believed.map_or(full, |mtu| mtu.saturating_add(overhead(&to)));
        let doing = Doing::Verify(0);
        let path = Path {
            to,
            full,
            believed,
            told: believed,
            doing,
            next: now,
            began: now,
            changed: now,
            crowd: Duration::ZERO,
            raise: now + RAISE,
            patience: PATIENCE,
            out: Vec::new(),
        };
        self.paths.insert(peer, path);
    }

    pub fn forget(&mut self, peer: u32) {
        self.paths.remove(&peer);
    }

    /// When something is due.
    pub fn due(&self) -> Option<Duration> {
        self.paths.values().map(|path| path.next).min()
    }

    /// Packets are sent to peers.
    pub fn travels(&mut self) {
        for path in self.paths.values_mut().filter(|path| path.doing == Doing::Rest) {
            path.next = path.next.min(path.began + path.period());
        }
    }

    /// What is due.
    pub fn tick(&mut self, now: Duration) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        let crowd = PERIOD_EACH * u32::try_from(self.paths.len()).unwrap_or(u32::MAX);
        for (&peer, path) in &mut self.paths {
            if path.next <= now {
                path.crowd = crowd;
                let sizes = path.step(now);
                outcomes.extend(sizes.into_iter().map(|size| path.probe(size, &mut self.tokens, now)));
                outcomes.extend(path.tell(peer, now));
            }
        }
        outcomes
    }

    /// A control datagram arrived; it is none for this unless it answers a probe.
    pub fn receive(&mut self, from: SocketAddr, payload: &[u8], now: Duration) -> Option<Outcome> {
        let Ok(Hello { kind: Kind::Answer, token, .. }) = Hello::decode(payload) else { return None };
        let host = Addr::from(from.ip().to_canonical());
        let known = self.paths.iter_mut().filter(|(_, path)| Addr::from(path.to.ip()) == host);
        for (&peer, path) in known {
            if let Some(at) = path.out.iter().position(|(other, ..)| *other == token) {
                let (_, size, since) = path.out.swap_remove(at);
                path.patience = (2 * now.saturating_sub(since)).clamp(PATIENCE, MOST_PATIENCE);
                path.answered(size, now);
                return path.tell(peer, now);
            }
        }
        None
    }
}

impl Path {
    /// What was under way has had its time. Returns what to send now.
    fn step(&mut self, now: Duration) -> Vec<u16> {
        (self.began, self.next) = (now, now + self.patience);
        match &mut self.doing {
            Doing::Rest => {
                self.out.clear();
                self.verify(1)
            }
            Doing::Verify(sent) if *sent < TRIES => {
                let sent = *sent + 1;
                self.verify(sent)
            }
            // The path has become narrower, or always was.
            Doing::Verify(_) => self.search(0, self.believed),
            Doing::Search(search) if search.low == 0 && search.best == 0 => {
                search.silent += 1;
                let smallest = search.sent.iter().copied().take(1).collect();
                if search.silent >= SILENCE { self.rest(now) } else { smallest }
            }
            Doing::Search(search) => {
                let low = search.best;
                let high = search.sent.iter().copied().find(|size| *size > low).unwrap_or(search.high);
                self.believed = low;
                if high - low <= EXACTLY { self.rest(now) } else { self.search(low, high) }
            }
        }
    }

    fn rest(&mut self, now: Duration) -> Vec<u16> {
        (self.doing, self.began, self.next) = (Doing::Rest, now, now + IDLE);
        Vec::new()
    }

    /// How long a rest is while packets are sent.
    fn period(&self) -> Duration {
        let lately = self.began.saturating_sub(self.changed) < LATELY;
        self.crowd + if lately { PERIOD } else { CALM_PERIOD }
    }

    fn verify(&mut self, sent: u8) -> Vec<u16> {
        self.doing = Doing::Verify(sent);
        let (size, full) = (self.believed, self.full);
        // Where there could be more, there may be by now.
        let parts: &[u16] = if sent == 1 { &RUNGS } else { &[] };
        let more = parts.iter().map(|part| size + full.saturating_sub(size) / part).filter(|more| *more > size);
        std::iter::once(size).chain(more).collect()
    }

    fn search(&mut self, low: u16, high: u16) -> Vec<u16> {
        let smallest = if self.to.is_ipv4() { SMALLEST_V4 } else { SMALLEST_V6 }.min(high.saturating_sub(1));
        let begin = low.max(smallest);
        let step = (high.saturating_sub(begin) / (ROUND + 1)).max(1);
        let first = u16::from(low != 0);
        let sent: Vec<u16> = (first..=ROUND).map(|number| begin + number * step).filter(|size| *size < high).collect();
        self.doing = Doing::Search(Search { low, high, sent: sent.clone(), best: low, silent: 0 });
        sent
    }

    fn answered(&mut self, size: u16, now: Duration) {
        match &mut self.doing {
            Doing::Search(search) if size < search.high => search.best = search.best.max(size),
            // More than was believed possible; or no more than that for long enough.
            _ if size < self.full && (size > self.believed || size == self.believed && now >= self.raise) => {
                let search = Search { low: size, high: self.full, sent: Vec::new(), best: size, silent: 0 };
                (self.believed, self.doing, self.next, self.raise) = (size, Doing::Search(search), now, now + RAISE);
            }
            Doing::Verify(_) | Doing::Search(_) if size >= self.believed => {
                self.believed = size;
                self.rest(now);
            }
            _ => self.believed = self.believed.max(size),
        }
    }

    fn tell(&mut self, peer: u32, now: Duration) -> Option<Outcome> {
        let news = std::mem::replace(&mut self.told, self.believed) != self.believed;
        if news {
            self.changed = now;
        }
        let mtu = (self.believed < self.full).then(|| self.believed.saturating_sub(overhead(&self.to)));
        news.then_some(Outcome::Mtu { peer, mtu })
    }

    fn probe(&mut self, size: u16, tokens: &mut Tokens, now: Duration) -> Outcome {
        let token = tokens.next();
        self.out.push((token, size, now));
        let headers = if self.to.is_ipv4() { OUTER_LEN_V4 } else { OUTER_LEN_V6 };
        Outcome::Probe { to: self.to, payload: Hello::probe(token, usize::from(size).saturating_sub(headers)) }
    }
}

/// What is around a packet in framing; around a bare one there is less.
fn overhead(to: &SocketAddr) -> u16 {
    let outer = if to.is_ipv4() { OUTER_LEN_V4 } else { OUTER_LEN_V6 };
    (outer + FRAMING_LEN) as u16
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MTU: u16 = 1_450;

    fn peer() -> SocketAddr {
        "192.0.2.2:50103".parse().unwrap()
    }

    /// A path that takes packets up to a size, delays answers, and loses some.
    struct World {
        paths: Paths,
        now: Duration,
        takes: u16,
        delay: Duration,
        /// Of 100.
        loss: u64,
        chance: u64,
        /// Answers under way.
        answers: Vec<(Duration, Vec<u8>)>,
        mtu: Option<u16>,
        sent: usize,
        /// No packets are sent.
        idle: bool,
    }

    impl World {
        fn new(takes: u16) -> Self {
            let mut paths = Paths::new(Secret([7; 2]), MTU);
            paths.learn(1, peer(), None, Duration::ZERO);
            let (now, delay) = (Duration::ZERO, Duration::from_millis(20));
            Self { paths, now, takes, delay, loss: 0, chance: 1, answers: Vec::new(), mtu: None, sent: 0, idle: false }
        }

        fn run(&mut self, time: Duration) -> &mut Self {
            let end = self.now + time;
            while self.now < end {
                self.now += Duration::from_millis(10);
                let (due, later) = std::mem::take(&mut self.answers).into_iter().partition(|(at, _)| *at <= self.now);
                self.answers = later;
                // As often as it is looked at.
                if !self.idle && self.now.subsec_millis() == 0 {
                    self.paths.travels();
                }
                let mut outcomes: Vec<Outcome> = Vec::new();
                for (_, payload) in due {
                    outcomes.extend(self.paths.receive(peer(), &payload, self.now));
                }
                outcomes.extend(self.paths.tick(self.now));
                for outcome in outcomes {
                    match outcome {
                        Outcome::Mtu { peer: 1, mtu } => self.mtu = mtu,
                        Outcome::Probe { payload, .. } => self.probe(&payload),
                        Outcome::Mtu { .. } => panic!("nobody knows that peer"),
                    }
                }
            }
            self
        }

        fn probe(&mut self, payload: &[u8]) {
            self.sent += 1;
            self.chance = self.chance.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            let lost = (self.chance >> 33) % 100 < self.loss;
            if payload.len() + 28 > usize::from(self.takes) || lost {
                return;
            }
            let hello = Hello::decode(&payload[..payload.len().min(1_024)]).expect("a hello");
            self.answers.push((self.now + self.delay, Hello::answer_to(&hello).encode()));
        }
    }

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_full_path_costs_a_probe_now_and_then() {
        let mut world = World::new(1_500);
        world.run(s(60));
        assert_eq!(world.mtu, None);
        assert!((10..15).contains(&world.sent), "{}", world.sent);
        world.run(s(600)).sent = 0;
        world.run(s(150));
        assert!((8..12).contains(&world.sent), "{}", world.sent);
    }

    #[test]
    fn a_narrow_path_is_found_in_two_seconds_and_the_full_one_again() {
        for takes in [1_499, 1_492, 1_400, 1_280, 700, 576] {
            let mut world = World::new(takes);
            world.run(s(2));
            let found = world.mtu.unwrap_or_else(|| panic!("{takes} is not seen"));
            assert!(found + 50 <= takes && found + 50 + EXACTLY > takes, "{takes}: {found}");
            world.run(s(60));
            let stays = world.mtu.is_some_and(|mtu| found <= mtu && mtu + 50 <= takes);
            assert!(stays, "{takes}: {found} became {:?}", world.mtu);
            world.takes = 1_500;
            world.run(s(6));
            assert_eq!(world.mtu, None, "{takes}");
        }
    }

    #[test]
    fn a_path_that_changes_is_followed() {
        let mut world = World::new(1_500);
        world.run(s(13));
        for takes in [1_400, 1_280, 700, 1_000, 900, 1_492, 1_500] {
            world.takes = takes;
            world.run(s(8));
            let size = world.mtu.unwrap_or(MTU) + 50;
            assert!(size <= takes && size + EXACTLY > takes, "{takes}: {size}");
        }
    }

    #[test]
    fn a_path_rests_while_nothing_is_sent_on_it() {
        for takes in [1_500, 1_400] {
            let mut world = World::new(takes);
            world.run(s(100)).idle = true;
            world.run(s(60)).sent = 0;
            world.run(s(24 * 3_600));
            assert!((20..600).contains(&world.sent), "{takes}: {}", world.sent);
        }
    }

    #[test]
    fn what_has_changed_in_a_rest_is_found_in_three_seconds_of_traffic() {
        for (before, after) in [(1_500, 1_400), (1_500, 576), (1_400, 700), (1_280, 1_500), (900, 1_300)] {
            let mut world = World::new(before);
            world.run(s(100)).idle = true;
            world.run(s(600)).takes = after;
            world.run(s(60));
            let known = world.mtu;
            // At the worst of moments: it has just been looked whether any is.
            world.run(Duration::from_millis(10)).idle = false;
            world.run(s(3));
            let size = world.mtu.unwrap_or(MTU) + 50;
            assert!(size <= after && size + EXACTLY > after, "{before}, {after}: {known:?} became {size}");
        }
    }

    #[test]
    fn silence_is_no_news() {
        let mut world = World::new(0);
        world.run(s(60));
        assert_eq!(world.mtu, None, "nothing is known");
        world.takes = 1_400;
        world.run(s(10));
        let found = world.mtu.expect("it is narrow");
        world.takes = 0;
        world.run(s(60));
        assert_eq!(world.mtu, Some(found), "an outage is no change of the path");
        assert!(world.sent < 700, "{}", world.sent);
    }

    #[test]
    fn what_another_says_counts_nothing() {
        let mut paths = Paths::new(Secret([7; 2]), MTU);
        paths.learn(1, peer(), Some(900), Duration::ZERO);
        let probes = paths.tick(Duration::ZERO);
        let Some(Outcome::Probe { payload, .. }) = probes.last() else { panic!("{probes:?}") };
        let answer = Hello::answer_to(&Hello::decode(&payload[..1_024]).unwrap()).encode();
        assert_eq!(paths.receive("192.0.2.3:50103".parse().unwrap(), &answer, s(1)), None, "another host");
        assert_eq!(paths.receive(peer(), payload, s(1)), None, "no answer");
        let told = Some(Outcome::Mtu { peer: 1, mtu: None });
        assert_eq!(paths.receive(peer(), &answer, s(1)), told, "what an earlier run believed is overcome");
        assert_eq!(paths.receive(peer(), &answer, s(1)), None, "once");
    }

    #[test]
    fn an_ipv6_underlay_takes_at_least_1280_bytes() {
        let mut paths = Paths::new(Secret([7; 2]), MTU);
        let to: SocketAddr = "[2001:db8::2]:50103".parse().unwrap();
        paths.learn(1, to, None, Duration::ZERO);
        let mut now = Duration::ZERO;
        for _ in 0..8 {
            for outcome in paths.tick(now) {
                let Outcome::Probe { payload, .. } = outcome else { panic!("nothing was answered") };
                assert!((1_280..=1_520).contains(&(payload.len() + 48)), "{}", payload.len());
            }
            now = paths.due().unwrap();
        }
    }

    proptest! {
        /// Whatever is lost and however late answers come, the path is found and nothing longer is believed than it takes.
        #[test]
        fn losses_and_delays_only_cost_time(takes in 576..1_501_u16, delay in 1..900_u64, loss in 0..20_u64, chance: u64) {
            let mut world = World { delay: Duration::from_millis(delay), loss, chance, ..World::new(takes) };
            world.run(s(20));
            let size = world.mtu.unwrap_or(MTU) + 50;
            prop_assert!(size <= takes, "{size} > {takes}");
            world.loss = 0;
            world.run(s(80));
            let size = world.mtu.unwrap_or(MTU) + 50;
            prop_assert!(size <= takes && size + EXACTLY > takes, "{takes}: {size}");
        }
    }
}
