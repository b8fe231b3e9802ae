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

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use netmanager_common::addr::Addr;

/// Takes more than TCP and UDP.
pub const CAPABILITY_ANY_PROTOCOL: u32 = 1;
/// What this node can do.
pub const CAPABILITIES: u32 = CAPABILITY_ANY_PROTOCOL;

const MAGIC: [u8; 2] = [0x9e, 0x6e];
const VERSION: u8 = 1;
const HEADER: usize = 16;
/// No datagram of this kind is longer; a longer one is not read.
const MAX_LEN: usize = 1_024;

/// After the first, a hello is repeated so long after the last while there is no answer; then at `PERIOD`.
const RETRIES: [Duration; 3] = [Duration::from_secs(1), Duration::from_secs(2), Duration::from_secs(4)];
const PERIOD: Duration = Duration::from_secs(60);
/// A peer's hellos draw no more than one of ours in this time.
const PAUSE: Duration = Duration::from_millis(500);
/// A peer that has not answered for so long is not known to be ours any more.
const SILENCE: Duration = Duration::from_secs(3 * 60);

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

/// Who of our peers has answered, and whom to ask next.
#[derive(Clone, Debug)]
pub struct Greetings {
    secret: u64,
    peers: BTreeMap<u32, Greeting>,
}

#[derive(Clone, Debug)]
struct Greeting {
    to: SocketAddr,
    token: u64,
    ours: bool,
    /// When theirs last made us say ours again.
    returned: Option<Duration>,
    /// Hellos without an answer since the last answer.
    unanswered: usize,
    next: Duration,
    /// When silence began: the last answer, or the first hello.
    heard: Duration,
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
}

impl Greetings {
    /// `secret` makes the tokens hard to guess; it is a random number of this run.
    pub fn new(secret: u64) -> Self {
        Self { secret, peers: BTreeMap::new() }
    }

    /// A peer has this number and tunnel address. `ours` is what an earlier run knew of it. The first hello is due now.
    pub fn learn(&mut self, peer: u32, to: SocketAddr, ours: bool, now: Duration) {
        if self.peers.get(&peer).is_some_and(|known| known.to == to) {
            return;
        }
        self.secret = self.secret.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let token = scramble(self.secret);
        let greeting = Greeting { to, token, ours, returned: None, unanswered: 0, next: now, heard: now };
        self.peers.insert(peer, greeting);
    }

    pub fn forget(&mut self, peer: u32) {
        self.peers.remove(&peer);
    }

    /// What is due.
    pub fn tick(&mut self, now: Duration) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        for (&peer, greeting) in &mut self.peers {
            if greeting.ours && now.saturating_sub(greeting.heard) >= SILENCE {
                greeting.ours = false;
                outcomes.push(Outcome::Ours { peer, ours: false });
            }
            if greeting.next <= now {
                greeting.next = now + RETRIES.get(greeting.unanswered).copied().unwrap_or(PERIOD);
                greeting.unanswered += 1;
                let payload = Hello::new(Kind::Hello, greeting.token).encode();
                outcomes.push(Outcome::Send { to: greeting.to, payload });
            }
        }
        outcomes
    }

    /// A control datagram arrived. Strangers and nonsense are met with silence.
    pub fn receive(&mut self, from: SocketAddr, payload: &[u8], now: Duration) -> Vec<Outcome> {
        let Ok(hello) = Hello::decode(payload) else { return Vec::new() };
        let host = Addr::from(from.ip().to_canonical());
        let mut known = self.peers.iter_mut().filter(|(_, greeting)| Addr::from(greeting.to.ip()) == host);
        match hello.kind {
            Kind::Hello => {
                let Some((_, greeting)) = known.next() else { return Vec::new() };
                // Whoever says hello has just started, or has just heard of us: it will answer now.
                if !greeting.ours && greeting.returned.is_none_or(|returned| now.saturating_sub(returned) >= PAUSE) {
                    greeting.returned = Some(now);
                    greeting.next = now;
                    greeting.unanswered = greeting.unanswered.min(1);
                }
                vec![Outcome::Send { to: from, payload: Hello::new(Kind::Answer, hello.token).encode() }]
            }
            Kind::Answer => {
                let Some((&peer, greeting)) = known.find(|(_, greeting)| greeting.token == hello.token) else {
                    return Vec::new();
                };
                let news = !greeting.ours && hello.capabilities & CAPABILITY_ANY_PROTOCOL != 0;
                greeting.ours |= news;
                (greeting.unanswered, greeting.heard, greeting.next) = (0, now, now + PERIOD);
                if news { vec![Outcome::Ours { peer, ours: true }] } else { Vec::new() }
            }
        }
    }
}

/// The finaliser of splitmix64: consecutive states give unrelated tokens.
fn scramble(state: u64) -> u64 {
    let state = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    state ^ (state >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn peer() -> SocketAddr {
        "192.0.2.2:50103".parse().unwrap()
    }

    fn hellos(outcomes: &[Outcome]) -> Vec<Hello> {
        outcomes
            .iter()
            .filter_map(|outcome| match outcome {
                Outcome::Send { payload, .. } => Some(Hello::decode(payload).unwrap()),
                Outcome::Ours { .. } => None,
            })
            .collect()
    }

    #[test]
    fn first_nibble_is_no_ip_version() {
        let bytes = Hello::new(Kind::Hello, 7).encode();
        assert_eq!(bytes, [0x9e, 0x6e, 1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7]);
    }

    #[test]
    fn unknown_options_are_skipped_and_broken_ones_refused() {
        let good = Hello { options: vec![(200, vec![1, 2, 3]), (0, vec![])], ..Hello::new(Kind::Answer, 9) };
        let bytes = good.encode();
        assert_eq!(Hello::decode(&bytes), Ok(good));
        for (bytes, error) in [
            (&bytes[..bytes.len() - 1], DecodeError::Option),
            (&bytes[..18], DecodeError::Option),
            (&bytes[..15], DecodeError::Length),
            (&[], DecodeError::Length),
            (&[0x9e], DecodeError::Length),
            (&[0x45, 0, 0, 40], DecodeError::Magic),
            (&[0x9e, 0x6e, 2, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7], DecodeError::Version(2)),
            (&[0x9e, 0x6e, 1, 3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7], DecodeError::Kind(3)),
        ] {
            assert_eq!(Hello::decode(bytes), Err(error), "{bytes:x?}");
        }
    }

    #[test]
    fn peer_that_answers_is_ours_until_it_is_silent() {
        let mut greetings = Greetings::new(1);
        greetings.learn(4, peer(), false, at(0));
        let [hello] = &hellos(&greetings.tick(at(0)))[..] else { panic!("one hello") };
        let answer = Hello::new(Kind::Answer, hello.token).encode();
        assert_eq!(greetings.receive(peer(), &answer, at(0)), [Outcome::Ours { peer: 4, ours: true }]);
        assert_eq!(greetings.receive(peer(), &answer, at(0)), [], "no news twice");
        assert_eq!(greetings.tick(at(59)), []);
        assert_eq!(greetings.tick(at(60)).len(), 1);
        assert_eq!(greetings.receive(peer(), &answer, at(60)), []);
        for second in 61..240 {
            let outcomes = greetings.tick(at(second));
            assert!(!outcomes.iter().any(|outcome| matches!(outcome, Outcome::Ours { .. })), "{second}");
        }
        assert!(greetings.tick(at(240)).contains(&Outcome::Ours { peer: 4, ours: false }));
    }

    #[test]
    fn unanswered_hello_is_repeated_thrice_then_every_minute() {
        let mut greetings = Greetings::new(1);
        greetings.learn(4, peer(), false, at(0));
        let sent: Vec<u64> = (0..200).filter(|second| !greetings.tick(at(*second)).is_empty()).collect();
        assert_eq!(sent, [0, 1, 3, 7, 67, 127, 187]);
    }

    #[test]
    fn hello_is_answered_and_returned_by_who_had_given_up() {
        let mut greetings = Greetings::new(1);
        greetings.learn(4, peer(), false, at(0));
        (0..30).for_each(|second| drop(greetings.tick(at(second))));
        let from: SocketAddr = "[::ffff:192.0.2.2]:4000".parse().unwrap();
        let outcomes = greetings.receive(from, &Hello::new(Kind::Hello, 77).encode(), at(30));
        assert_eq!(outcomes, [Outcome::Send { to: from, payload: Hello::new(Kind::Answer, 77).encode() }]);
        assert_eq!(hellos(&greetings.tick(at(30))).len(), 1);
    }

    #[test]
    fn hello_to_a_peer_that_knew_us_not_yet_is_said_again_when_it_does() {
        let mut greetings = Greetings::new(1);
        greetings.learn(4, peer(), false, at(0));
        assert_eq!(hellos(&greetings.tick(at(0))).len(), 1);
        let theirs = Hello::new(Kind::Hello, 77).encode();
        for (milliseconds, said) in [(10, 1), (20, 0), (509, 0), (510, 1), (511, 0)] {
            let now = Duration::from_millis(milliseconds);
            greetings.receive(peer(), &theirs, now);
            assert_eq!(hellos(&greetings.tick(now)).len(), said, "no flood can be drawn from us");
        }
    }

    #[test]
    fn strangers_and_forgers_get_nothing() {
        let mut greetings = Greetings::new(1);
        greetings.learn(4, peer(), false, at(0));
        let hello = hellos(&greetings.tick(at(0))).remove(0);
        let stranger: SocketAddr = "198.51.100.1:50103".parse().unwrap();
        assert_eq!(greetings.receive(stranger, &Hello::new(Kind::Hello, 1).encode(), at(1)), []);
        assert_eq!(greetings.receive(stranger, &Hello::new(Kind::Answer, hello.token).encode(), at(1)), []);
        assert_eq!(greetings.receive(peer(), &Hello::new(Kind::Answer, hello.token ^ 1).encode(), at(1)), []);
        greetings.forget(4);
        assert_eq!(greetings.receive(peer(), &Hello::new(Kind::Hello, 1).encode(), at(1)), []);
        assert_eq!(greetings.tick(at(100)), []);
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(
            answer: bool, capabilities: u32, token: u64,
            options in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..40)), 0..10),
        ) {
            let kind = if answer { Kind::Answer } else { Kind::Hello };
            let hello = Hello { kind, capabilities, token, options };
            prop_assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
        }

        #[test]
        fn no_bytes_panic_and_no_answer_is_longer_than_its_question(mut bytes: Vec<u8>, magic: bool) {
            if magic {
                bytes.splice(0..0, [0x9e, 0x6e, 1, 1]);
            }
            let mut greetings = Greetings::new(1);
            greetings.learn(4, peer(), false, at(0));
            for outcome in greetings.receive(peer(), &bytes, at(1)) {
                if let Outcome::Send { payload, .. } = outcome {
                    prop_assert!(!payload.is_empty() && payload.len() <= bytes.len());
                }
            }
        }
    }
}
