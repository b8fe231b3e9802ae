//! Which peers are of our kind: a small datagram on the tunnel port that an upstream peer ignores, because its first nibble is
//! neither 4 nor 6, and that ours answers. A peer counts as ours only while it answers with the token it was sent, so that a
//! forged source address proves nothing. Pure: the clock and the secret are arguments.
//!
//! Layout, network byte order:
//!
//! | bytes | meaning |
//! |---|---|
//! | 0–1 | magic `9e 6e` |
//! | 2 | version, 1 |
//! | 3 | kind: 1 hello, 2 answer |
//! | 4–7 | capabilities of the sender, bits of `CAPABILITY_*` |
//! | 8–15 | token: chosen by who says hello, repeated in the answer |
//! | 16– | options: type, length of the value, value; unknown types are skipped |
//!
//! | option | value |
//! |---|---|
//! | 0 | none, and no length: what follows only makes the datagram long |
//! | 1 | the port on which the sender takes framed packets, 2 bytes; 0: on none |
//! | 2 | namespace addresses (IPv4 mapped), 16 bytes each: in a hello, is an instance still there? In an answer: at these none is |
//! | 3 | none: a probe of the path ([`super::path`]), to be answered to the sender's tunnel port |
//!
//! A peer that offers a port gets framed packets once a hello in framing to that port was answered, so that a filter on the way costs
//! nothing but a hello now and then; and bare ones again when such hellos remain without an answer.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::hash::Hasher;
use std::net::SocketAddr;
use std::time::Duration;

use netmanager_common::addr::Addr;
use netmanager_common::frame::{CONTROL_FIRST, control_framing};

/// Takes more than TCP and UDP.
pub const CAPABILITY_ANY_PROTOCOL: u32 = 1;
/// Answers probes of any length.
pub const CAPABILITY_PROBES: u32 = 2;
/// What this node can do.
pub const CAPABILITIES: u32 = CAPABILITY_ANY_PROTOCOL | CAPABILITY_PROBES;

const MAGIC: [u8; 2] = [CONTROL_FIRST, 0x6e];
const VERSION: u8 = 1;
const HEADER: usize = 16;
/// Nothing is said beyond this; of a longer datagram only so much is passed on.
const MAX_LEN: usize = 1_024;

/// After the first, a hello is repeated so long after the last while there is no answer; then at `PERIOD`.
const RETRIES: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(2), Duration::from_secs(4)];
const PERIOD: Duration = Duration::from_secs(60);
/// A peer's hellos draw no more than one of ours in this time.
const PAUSE: Duration = Duration::from_millis(500);
/// A peer that has not answered for so long is not known to be ours any more.
const SILENCE: Duration = Duration::from_secs(3 * 60);

/// The option with the port for framed packets.
const OPTION_FRAMED: u8 = 1;
/// The option that ends the options.
const OPTION_END: u8 = 0;
/// The option with namespace addresses, and how many fit.
const OPTION_ASKED: u8 = 2;
const MOST_ASKED: usize = u8::MAX as usize / size_of::<Addr>();
/// The option of a probe.
const OPTION_PROBE: u8 = 3;
/// A peer whose round trip decides something is asked so often; of so many of its last answers the fastest counts, as the others have
/// waited for a processor.
const RACE: Duration = Duration::from_secs(2);
const LAPS: usize = 8;
/// A framed hello is repeated so long after the last that was answered, while packets are sent;
const FRAMED_PERIOD: Duration = Duration::from_secs(10);
/// so long while none are: nothing can be lost;
const FRAMED_IDLE: Duration = PERIOD;
/// and so long after one that was not yet.
const FRAMED_RETRY: Duration = Duration::from_millis(500);
/// After so many without an answer packets travel bare.
const FRAMED_TRIES: usize = 4;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Hello,
    Answer,
}

/// One control datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    pub kind: Kind,
    pub capabilities: u32,
    pub token: u64,
    /// Options in the order they were in, also those of unknown types.
    pub options: Vec<(u8, Vec<u8>)>,
}

/// Why a datagram says nothing to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("not a control datagram")]
    Magic,
    #[error("too short or too long")]
    Length,
    #[error("unknown version {0}")]
    Version(u8),
    #[error("unknown kind {0}")]
    Kind(u8),
    #[error("an option is longer than the datagram")]
    Option,
}

impl Hello {
    fn new(kind: Kind, token: u64) -> Self {
        Self { kind, capabilities: CAPABILITIES, token, options: Vec::new() }
    }

    /// A probe of this length, or of as much as it takes to say so.
    pub fn probe(token: u64, len: usize) -> Vec<u8> {
        let mut probe = Self::new(Kind::Hello, token);
        probe.options.push((OPTION_PROBE, Vec::new()));
        let mut bytes = probe.encode();
        bytes.resize(len.max(bytes.len()), OPTION_END);
        bytes
    }

    /// The answer to it.
    pub fn answer_to(hello: &Self) -> Self {
        Self::new(Kind::Answer, hello.token)
    }

    fn is_probe(&self) -> bool {
        self.options.iter().any(|(option, _)| *option == OPTION_PROBE)
    }

    /// Says on which port its sender takes framed packets.
    fn offering(mut self, framed_port: Option<u16>) -> Self {
        self.options.push((OPTION_FRAMED, framed_port.unwrap_or(0).to_be_bytes().to_vec()));
        self
    }

    /// The port on which the sender takes framed packets.
    fn framed_port(&self) -> Option<u16> {
        let (_, value) = self.options.iter().find(|(option, _)| *option == OPTION_FRAMED)?;
        <[u8; 2]>::try_from(&value[..]).ok().map(u16::from_be_bytes).filter(|port| *port != 0)
    }

    /// Asks whether somebody is at these addresses, or says that nobody is.
    fn asking(mut self, namespaces: &[Addr]) -> Self {
        if !namespaces.is_empty() {
            let value = namespaces.iter().take(MOST_ASKED).flat_map(|address| address.0).collect();
            self.options.push((OPTION_ASKED, value));
        }
        self
    }

    /// The addresses that are asked about, or spoken of.
    fn asked(&self) -> Vec<Addr> {
        let values = self.options.iter().filter(|(option, _)| *option == OPTION_ASKED);
        values.flat_map(|(_, value)| value.as_chunks().0).map(|bytes| Addr(*bytes)).collect()
    }

    /// The datagram. Options longer than a byte can say are left out.
    pub fn encode(&self) -> Vec<u8> {
        let kind = match self.kind {
            Kind::Hello => 1,
            Kind::Answer => 2,
        };
        let mut bytes = Vec::with_capacity(HEADER);
        bytes.extend(MAGIC);
        bytes.extend([VERSION, kind]);
        bytes.extend(self.capabilities.to_be_bytes());
        bytes.extend(self.token.to_be_bytes());
        for (option, value) in &self.options {
            if let Ok(length) = u8::try_from(value.len()) {
                bytes.extend([*option, length]);
                bytes.extend(value);
            }
        }
        bytes
    }

    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let Some((magic, _)) = bytes.split_first_chunk() else { return Err(DecodeError::Length) };
        if *magic != MAGIC {
            return Err(DecodeError::Magic);
        }
        let Some((&[_, _, version, kind, c0, c1, c2, c3, ref token @ ..], mut rest)) =
            bytes.split_first_chunk::<HEADER>()
        else {
            return Err(DecodeError::Length);
        };
        if bytes.len() > MAX_LEN {
            return Err(DecodeError::Length);
        }
        if version != VERSION {
            return Err(DecodeError::Version(version));
        }
        let kind = match kind {
            1 => Kind::Hello,
            2 => Kind::Answer,
            other => return Err(DecodeError::Kind(other)),
        };
        let mut options = Vec::new();
        if let Some(end) = end_of_options(rest) {
            rest = &rest[..end];
        }
        while let Some((&[option, length], values)) = rest.split_first_chunk() {
            let (value, after) = values.split_at_checked(length.into()).ok_or(DecodeError::Option)?;
            options.push((option, value.to_vec()));
            rest = after;
        }
        if !rest.is_empty() {
            return Err(DecodeError::Option);
        }
        let capabilities = u32::from_be_bytes([c0, c1, c2, c3]);
        Ok(Self { kind, capabilities, token: u64::from_be_bytes(*token), options })
    }
}

/// Where the option is that ends them.
fn end_of_options(options: &[u8]) -> Option<usize> {
    let mut at = 0;
    while *options.get(at)? != OPTION_END {
        at += 2 + usize::from(*options.get(at + 1)?);
    }
    Some(at)
}

/// Who of our peers has answered, and whom to ask next.
#[derive(Clone, Debug)]
pub struct Greetings {
    tokens: Tokens,
    /// On which port this node takes framed packets. `None`: on none, and it sends none.
    framed_port: Option<u16>,
    peers: BTreeMap<u32, Greeting>,
}

#[derive(Clone, Debug)]
struct Greeting {
    to: SocketAddr,
    token: u64,
    ours: bool,
    /// It answers probes.
    probes: bool,
    /// When theirs last made us say ours again.
    returned: Option<Duration>,
    /// Hellos without an answer since the last answer.
    unanswered: usize,
    next: Duration,
    /// When silence began: the last answer, or the first hello.
    heard: Duration,
    framing: Framing,
    /// At which addresses it may have nobody any more.
    asking: Vec<Addr>,
    /// Its round trip decides something.
    raced: bool,
    /// When the hello in flight was sent, and what the last ones took.
    sent: Option<Duration>,
    laps: VecDeque<Duration>,
}

/// What is known of a peer's framing.
#[derive(Clone, Debug)]
struct Framing {
    /// In framed hellos.
    token: u64,
    /// The port it has offered.
    offered: Option<u16>,
    /// A framed hello was answered: packets are sent framed.
    agreed: bool,
    /// Framed hellos since the last answer to one.
    unanswered: usize,
    /// When one was last answered, or else the peer first known.
    heard: Duration,
    next: Duration,
}

impl Framing {
    /// What is due: a hello in framing, or the end of framing. Only an IPv4 underlay has it.
    fn tick(&mut self, peer: u32, to: SocketAddr, own: Option<u16>, now: Duration) -> Option<Outcome> {
        let (Some(offered), Some(own), true) = (self.offered, own, to.is_ipv4()) else { return self.end(peer) };
        if now < self.next {
            return None;
        }
        if self.unanswered >= FRAMED_TRIES {
            self.unanswered = 0;
            self.next = now + PERIOD;
            return self.end(peer);
        }
        self.unanswered += 1;
        self.next = now + FRAMED_RETRY;
        let mut payload = control_framing().to_vec();
        payload.extend(Hello::new(Kind::Hello, self.token).offering(Some(own)).encode());
        Some(Outcome::Send { to: SocketAddr::new(to.ip(), offered), payload })
    }

    fn end(&mut self, peer: u32) -> Option<Outcome> {
        std::mem::take(&mut self.agreed).then_some(Outcome::Framed { peer, port: None })
    }

    /// Packets are sent.
    fn travels(&mut self) {
        if self.agreed && self.unanswered == 0 {
            self.next = self.next.min(self.heard + FRAMED_PERIOD);
        }
    }

    /// The peer has offered this, or nothing.
    fn offer(&mut self, port: Option<u16>, now: Duration) {
        if port != self.offered {
            (self.offered, self.unanswered, self.next) = (port, 0, now);
        }
    }

    /// A framed hello was answered.
    fn answered(&mut self, peer: u32, now: Duration) -> Option<Outcome> {
        (self.unanswered, self.heard, self.next) = (0, now, now + FRAMED_IDLE);
        let news = self.offered.is_some() && !std::mem::replace(&mut self.agreed, self.offered.is_some());
        news.then_some(Outcome::Framed { peer, port: self.offered })
    }
}

/// What a greeting leads to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Send {
        to: SocketAddr,
        payload: Vec<u8>,
    },
    /// The peer answered, or answers no more.
    Ours {
        peer: u32,
        ours: bool,
    },
    /// The peer answers probes.
    Probes {
        peer: u32,
        to: SocketAddr,
    },
    /// Packets to the peer are framed from now on, to this port; or bare.
    Framed {
        peer: u32,
        port: Option<u16>,
    },
    /// The peer has no instance at these namespace addresses.
    Gone {
        peer: u32,
        namespaces: Vec<Addr>,
    },
}

/// What an earlier run knew of a peer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Known {
    pub ours: bool,
    pub framed_port: Option<u16>,
}

impl Greetings {
    /// `secret` makes the tokens hard to guess, and is another in each run. `framed_port`: where this node takes framed packets.
    pub(super) fn new(secret: Secret, framed_port: Option<u16>) -> Self {
        Self { tokens: Tokens::new(secret, 0), framed_port, peers: BTreeMap::new() }
    }

    /// A peer has this number and tunnel address, and an earlier run knew this of it. The first hello is due now.
    pub fn learn(&mut self, peer: u32, to: SocketAddr, known: Known, now: Duration) {
        if self.peers.get(&peer).is_some_and(|known| known.to == to) {
            return;
        }
        let framing = Framing {
            token: self.tokens.next(),
            offered: known.framed_port,
            agreed: known.framed_port.is_some(),
            unanswered: 0,
            heard: now,
            next: now,
        };
        let (token, ours) = (self.tokens.next(), known.ours);
        let greeting = Greeting {
            to,
            token,
            ours,
            probes: false,
            returned: None,
            unanswered: 0,
            next: now,
            heard: now,
            framing,
            asking: Vec::new(),
            raced: false,
            sent: None,
            laps: VecDeque::new(),
        };
        self.peers.insert(peer, greeting);
    }

    /// Asks these peers, now, at which of these namespace addresses they have nobody any more.
    pub fn ask(&mut self, mut asking: BTreeMap<u32, Vec<Addr>>, now: Duration) {
        for (peer, greeting) in &mut self.peers {
            greeting.asking = asking.remove(peer).unwrap_or_default();
            if !greeting.asking.is_empty() && greeting.ours {
                greeting.next = now;
            }
        }
    }

    /// The round trips of these peers decide something.
    pub fn race(&mut self, peers: &BTreeSet<u32>, now: Duration) {
        for (peer, greeting) in &mut self.peers {
            greeting.raced = peers.contains(peer);
            if greeting.raced && greeting.ours {
                greeting.next = greeting.next.min(now + RACE);
            }
        }
    }

    /// Round trips by peer, as far as they are known.
    pub fn rtts(&self) -> impl Iterator<Item = (u32, Duration)> {
        self.peers.iter().filter_map(|(peer, greeting)| Some((*peer, *greeting.laps.iter().min()?)))
    }

    /// Packets have been sent to peers.
    pub fn travels(&mut self) {
        self.peers.values_mut().for_each(|greeting| greeting.framing.travels());
    }

    pub fn forget(&mut self, peer: u32) {
        self.peers.remove(&peer);
    }

    /// What is due.
    pub fn tick(&mut self, now: Duration) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        for (&peer, greeting) in &mut self.peers {
            if greeting.ours && now.saturating_sub(greeting.heard) >= SILENCE {
                (greeting.ours, greeting.probes) = (false, false);
                greeting.framing.offer(None, now);
                outcomes.push(Outcome::Ours { peer, ours: false });
            }
            outcomes.extend(greeting.framing.tick(peer, greeting.to, self.framed_port, now));
            if greeting.next <= now {
                greeting.next = now + RETRIES.get(greeting.unanswered).copied().unwrap_or(PERIOD);
                greeting.unanswered += 1;
                greeting.sent = Some(now);
                let hello = Hello::new(Kind::Hello, greeting.token).offering(self.framed_port);
                let payload = hello.asking(&greeting.asking).encode();
                outcomes.push(Outcome::Send { to: greeting.to, payload });
            }
        }
        outcomes
    }

    /// A control datagram arrived. Strangers and nonsense are met with silence. `here`: is an instance of this node at a namespace address?
    pub fn receive(
        &mut self,
        from: SocketAddr,
        payload: &[u8],
        here: impl Fn(Addr) -> bool,
        now: Duration,
    ) -> Vec<Outcome> {
        let Ok(hello) = Hello::decode(payload) else { return Vec::new() };
        let host = Addr::from(from.ip().to_canonical());
        let mut known = self.peers.iter_mut().filter(|(_, greeting)| Addr::from(greeting.to.ip()) == host);
        match hello.kind {
            Kind::Hello => {
                let Some((_, greeting)) = known.next() else { return Vec::new() };
                if hello.is_probe() {
                    return vec![Outcome::Send { to: greeting.to, payload: Hello::answer_to(&hello).encode() }];
                }
                // Whoever says hello has just started, or has just heard of us: it will answer now. And who offers something else
                // than before is asked, as anybody may have said so in its name.
                let news = !greeting.ours || hello.framed_port() != greeting.framing.offered;
                if news && greeting.returned.is_none_or(|returned| now.saturating_sub(returned) >= PAUSE) {
                    greeting.returned = Some(now);
                    greeting.next = now;
                    greeting.unanswered = greeting.unanswered.min(1);
                }
                let answer = Hello::answer_to(&hello);
                let nobody: Vec<Addr> = hello.asked().into_iter().filter(|address| !here(*address)).collect();
                let full = answer.clone().offering(self.framed_port).asking(&nobody).encode();
                // No answer is longer than its question.
                let answer = if full.len() <= payload.len() { full } else { answer.encode() };
                vec![Outcome::Send { to: from, payload: answer }]
            }
            Kind::Answer => {
                let tokens = |greeting: &Greeting| [greeting.token, greeting.framing.token];
                let Some((&peer, greeting)) = known.find(|(_, greeting)| tokens(greeting).contains(&hello.token))
                else {
                    return Vec::new();
                };
                greeting.framing.offer(hello.framed_port(), now);
                if hello.token == greeting.framing.token {
                    return greeting.framing.answered(peer, now).into_iter().collect();
                }
                let news = !greeting.ours && hello.capabilities & CAPABILITY_ANY_PROTOCOL != 0;
                greeting.ours |= news;
                let pause = if greeting.raced { RACE } else { PERIOD };
                (greeting.unanswered, greeting.heard, greeting.next) = (0, now, now + pause);
                if let Some(sent) = greeting.sent.take() {
                    if greeting.laps.len() == LAPS {
                        greeting.laps.pop_front();
                    }
                    greeting.laps.push_back(now.saturating_sub(sent));
                }
                let namespaces = hello.asked();
                let gone = (!namespaces.is_empty()).then_some(Outcome::Gone { peer, namespaces });
                let framing = greeting.framing.tick(peer, greeting.to, self.framed_port, now);
                let measured = hello.capabilities & CAPABILITY_PROBES != 0
                    && greeting.ours
                    && !std::mem::replace(&mut greeting.probes, true);
                let ours = news.then_some(Outcome::Ours { peer, ours: true });
                let probes = measured.then_some(Outcome::Probes { peer, to: greeting.to });
                ours.into_iter().chain(probes).chain(framing).chain(gone).collect()
            }
        }
    }
}

/// What tokens are made of: from the operating system in a daemon, the same number each time in tests.
#[derive(Clone, Copy)]
pub(super) struct Secret(pub(super) [u64; 2]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// Numbers that nobody guesses who has not been told them, however many others he has been told.
#[derive(Clone, Debug)]
pub(super) struct Tokens {
    secret: Secret,
    /// Tokens of another purpose are others.
    purpose: u64,
    count: u64,
}

impl Tokens {
    pub(super) const fn new(secret: Secret, purpose: u64) -> Self {
        Self { secret, purpose, count: 0 }
    }

    pub(super) fn next(&mut self) -> u64 {
        self.count = self.count.wrapping_add(1);
        let Secret([one, other]) = self.secret;
        #[expect(deprecated, reason = "the standard library's only keyed hash that takes a key")]
        let mut hasher = std::hash::SipHasher::new_with_keys(one, other);
        hasher.write_u64(self.purpose);
        hasher.write_u64(self.count);
        hasher.finish()
    }
}

#[cfg(test)]
mod tests;
