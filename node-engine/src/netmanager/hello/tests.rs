//! Hellos and answers as datagrams, and what peers are believed to be by them.

use proptest::prelude::*;

use super::*;

fn nobody(_: Addr) -> bool {
    false
}

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
            Outcome::Ours { .. } | Outcome::Probes { .. } | Outcome::Framed { .. } | Outcome::Gone { .. } => None,
        })
        .collect()
}

#[test]
fn first_nibble_is_no_ip_version() {
    let bytes = Hello::new(Kind::Hello, 7).encode();
    assert_eq!(bytes, [0x9e, 0x6e, 1, 1, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 7]);
}

/// A token of 64 bits that says how many there were before says all that follow.
#[test]
fn tokens_follow_from_the_secret_and_not_from_each_other() {
    let tokens = |secret, purpose| {
        let mut tokens = Tokens::new(Secret(secret), purpose);
        std::iter::repeat_with(move || tokens.next()).take(1_000).collect::<Vec<_>>()
    };
    let first = tokens([1, 2], 0);
    assert_eq!(first, tokens([1, 2], 0));
    let undone = |token: u64| {
        // The finaliser of splitmix64, backwards.
        let token = (token ^ token >> 31 ^ token >> 62).wrapping_mul(0x3196_42b2_d24d_8ec3);
        let token = (token ^ token >> 27 ^ token >> 54).wrapping_mul(0x96de_1b17_3f11_9089);
        token ^ token >> 30 ^ token >> 60
    };
    let steps: BTreeSet<u64> = first.windows(2).map(|two| undone(two[1]).wrapping_sub(undone(two[0]))).collect();
    assert_eq!(steps.len(), 999, "each token would follow from the one before");
    let others = [tokens([1, 3], 0), tokens([2, 2], 0), tokens([1, 2], 1)].concat();
    let all: BTreeSet<u64> = first.into_iter().chain(others).collect();
    assert_eq!(all.len(), 4_000);
}

#[test]
fn unknown_options_are_skipped_and_broken_ones_refused() {
    let good = Hello { options: vec![(200, vec![1, 2, 3]), (201, vec![])], ..Hello::new(Kind::Answer, 9) };
    let bytes = good.encode();
    assert_eq!(Hello::decode(&bytes), Ok(good.clone()));
    assert_eq!(Hello::decode(&[&bytes[..], &[0; 100], b"anything"].concat()), Ok(good), "it ends there");
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
    let mut greetings = Greetings::new(Secret([1; 2]), Some(50_104));
    greetings.learn(4, peer(), Known::default(), at(0));
    let [hello] = &hellos(&greetings.tick(at(0)))[..] else { panic!("one hello") };
    let answer = Hello::new(Kind::Answer, hello.token).encode();
    let news = [Outcome::Ours { peer: 4, ours: true }, Outcome::Probes { peer: 4, to: peer() }];
    assert_eq!(greetings.receive(peer(), &answer, nobody, at(0)), news);
    assert_eq!(greetings.receive(peer(), &answer, nobody, at(0)), [], "no news twice");
    assert_eq!(greetings.tick(at(59)), []);
    assert_eq!(greetings.tick(at(60)).len(), 1);
    assert_eq!(greetings.receive(peer(), &answer, nobody, at(60)), []);
    for second in 61..240 {
        let outcomes = greetings.tick(at(second));
        assert!(!outcomes.iter().any(|outcome| matches!(outcome, Outcome::Ours { .. })), "{second}");
    }
    assert!(greetings.tick(at(240)).contains(&Outcome::Ours { peer: 4, ours: false }));
}

#[test]
fn unanswered_hello_is_repeated_thrice_then_every_minute() {
    let mut greetings = Greetings::new(Secret([1; 2]), Some(50_104));
    greetings.learn(4, peer(), Known::default(), at(0));
    let sent: Vec<u64> = (0..200).filter(|second| !greetings.tick(at(*second)).is_empty()).collect();
    assert_eq!(sent, [0, 1, 3, 7, 67, 127, 187]);
}

#[test]
fn hello_is_answered_and_returned_by_who_had_given_up() {
    let mut greetings = Greetings::new(Secret([1; 2]), Some(50_104));
    greetings.learn(4, peer(), Known::default(), at(0));
    (0..30).for_each(|second| drop(greetings.tick(at(second))));
    let from: SocketAddr = "[::ffff:192.0.2.2]:4000".parse().unwrap();
    for options in [vec![], vec![(1, vec![0, 0])]] {
        let hello = Hello { options, ..Hello::new(Kind::Hello, 77) };
        let outcomes = greetings.receive(from, &hello.encode(), nobody, at(30));
        let mut answer = Hello::new(Kind::Answer, 77);
        if !hello.options.is_empty() {
            answer = answer.offering(Some(50_104));
        }
        assert_eq!(outcomes, [Outcome::Send { to: from, payload: answer.encode() }], "no longer than the question");
    }
    assert_eq!(hellos(&greetings.tick(at(30))).len(), 1);
}

#[test]
fn hello_to_a_peer_that_knew_us_not_yet_is_said_again_when_it_does() {
    let mut greetings = Greetings::new(Secret([1; 2]), Some(50_104));
    greetings.learn(4, peer(), Known::default(), at(0));
    assert_eq!(hellos(&greetings.tick(at(0))).len(), 1);
    let theirs = Hello::new(Kind::Hello, 77).encode();
    for (milliseconds, said) in [(10, 1), (20, 0), (509, 0), (510, 1), (511, 0)] {
        let now = Duration::from_millis(milliseconds);
        greetings.receive(peer(), &theirs, nobody, now);
        assert_eq!(hellos(&greetings.tick(now)).len(), said, "no flood can be drawn from us");
    }
}

#[test]
fn who_is_asked_says_where_nobody_is_and_is_believed_with_the_token_only() {
    let (a, b) = (Addr::v4([10, 18, 1, 2]), Addr::v4([10, 18, 1, 3]));
    let mut greetings = Greetings::new(Secret([1; 2]), None);
    greetings.learn(4, peer(), Known { ours: true, framed_port: None }, at(0));
    greetings.tick(at(0));
    greetings.ask([(4, vec![a, b])].into(), at(1));
    let asked = hellos(&greetings.tick(at(1))).remove(0);
    assert_eq!(asked.asked(), [a, b]);

    let mut other = Greetings::new(Secret([2; 2]), None);
    other.learn(9, peer(), Known::default(), at(0));
    let question = asked.encode();
    let outcomes = other.receive(peer(), &question, |address| address == a, at(1));
    let answer = hellos(&outcomes).remove(0);
    assert_eq!((answer.kind, answer.asked()), (Kind::Answer, vec![b]));

    let forged = Hello { token: asked.token ^ 1, ..answer.clone() };
    assert_eq!(greetings.receive(peer(), &forged.encode(), nobody, at(2)), []);
    let unasked = Hello { kind: Kind::Hello, ..answer.clone() };
    let outcomes = greetings.receive(peer(), &unasked.encode(), nobody, at(2));
    assert!(!outcomes.iter().any(|outcome| matches!(outcome, Outcome::Gone { .. })), "{outcomes:?}");
    let outcomes = greetings.receive(peer(), &answer.encode(), nobody, at(2));
    assert!(outcomes.contains(&Outcome::Gone { peer: 4, namespaces: vec![b] }), "{outcomes:?}");
    greetings.ask(BTreeMap::new(), at(3));
    assert_eq!(hellos(&greetings.tick(at(70)))[0].asked(), [], "nothing is asked any more");
}

#[test]
fn the_fastest_of_the_last_answers_is_the_round_trip() {
    let mut greetings = Greetings::new(Secret([1; 2]), Some(50_104));
    greetings.learn(4, peer(), Known::default(), at(0));
    greetings.race(&[4].into(), at(0));
    assert_eq!(greetings.rtts().count(), 0);
    let mut now = at(0);
    for (lap, expected) in [(9, 9), (5, 5), (30, 5), (7, 5)].into_iter().chain([(8, 5); 5]).chain([(8, 7), (8, 7)]) {
        let token = hellos(&greetings.tick(now))[0].token;
        let answer = Hello::new(Kind::Answer, token).encode();
        let answered = now + Duration::from_millis(lap);
        greetings.receive(peer(), &answer, nobody, answered);
        assert_eq!(greetings.rtts().collect::<Vec<_>>(), [(4, Duration::from_millis(expected))], "{lap}");
        greetings.receive(peer(), &answer, nobody, answered + at(1));
        now = answered + at(1) + RACE;
    }
    greetings.race(&BTreeSet::new(), now);
}

/// What is said in framing, and where.
fn framed(outcomes: &[Outcome]) -> Vec<(SocketAddr, Hello)> {
    let framed = |outcome: &Outcome| match outcome {
        Outcome::Send { to, payload } => {
            let hello = payload.strip_prefix(&control_framing()[..])?;
            Some((*to, Hello::decode(hello).unwrap()))
        }
        _ => None,
    };
    outcomes.iter().filter_map(framed).collect()
}

/// A peer that has answered with an offer: the framed hello that follows, and the token of the bare ones.
fn offered(greetings: &mut Greetings) -> (Hello, u64) {
    greetings.learn(4, peer(), Known::default(), at(0));
    let token = hellos(&greetings.tick(at(0))).remove(0).token;
    let answer = Hello::new(Kind::Answer, token).offering(Some(4_789)).encode();
    let outcomes = greetings.receive(peer(), &answer, nobody, at(0));
    let [(to, hello)] = &framed(&outcomes)[..] else { panic!("one framed hello: {outcomes:?}") };
    assert_eq!((to.ip(), to.port(), hello.framed_port()), (peer().ip(), 4_789, Some(50_104)));
    assert!(outcomes.contains(&Outcome::Ours { peer: 4, ours: true }));
    (hello.clone(), token)
}

#[test]
fn peer_that_answers_in_framing_gets_framed_packets_until_it_does_no_more() {
    let mut greetings = Greetings::new(Secret([1; 2]), Some(50_104));
    let (hello, _) = offered(&mut greetings);
    let answer = Hello::new(Kind::Answer, hello.token).offering(Some(4_789)).encode();
    assert_eq!(greetings.receive(peer(), &answer, nobody, at(0)), [Outcome::Framed { peer: 4, port: Some(4_789) }]);
    assert_eq!(greetings.receive(peer(), &answer, nobody, at(0)), [], "no news twice");
    for second in 1..=50 {
        greetings.travels();
        let outcomes = greetings.tick(at(second));
        assert_eq!(framed(&outcomes).len(), usize::from(second % 10 == 0), "{second}");
        assert_eq!(outcomes.len(), framed(&outcomes).len());
        if second % 10 == 0 {
            assert_eq!(greetings.receive(peer(), &answer, nobody, at(second)), []);
        }
    }
    let ticks = |greetings: &mut Greetings, seconds: std::ops::Range<u64>| -> Vec<Outcome> {
        seconds.flat_map(|second| greetings.tick(at(second))).collect()
    };
    // Nothing is sent; then something is, and it is found out at once whether it arrives.
    assert_eq!(framed(&ticks(&mut greetings, 51..95)), []);
    greetings.travels();
    let silent = ticks(&mut greetings, 95..100);
    assert_eq!(framed(&silent).len(), FRAMED_TRIES);
    assert!(silent.contains(&Outcome::Framed { peer: 4, port: None }), "a filter has come in between: {silent:?}");
    assert_eq!(greetings.receive(peer(), &answer, nobody, at(110)), [Outcome::Framed { peer: 4, port: Some(4_789) }]);
}

#[test]
fn lost_framed_hellos_leave_packets_bare_and_are_tried_again() {
    let mut greetings = Greetings::new(Secret([1; 2]), Some(50_104));
    let (_, token) = offered(&mut greetings);
    let answer = Hello::new(Kind::Answer, token).offering(Some(4_789)).encode();
    let mut tries = 1;
    for second in 1..200 {
        let outcomes = greetings.tick(at(second));
        assert!(!outcomes.iter().any(|outcome| matches!(outcome, Outcome::Framed { .. })), "{second}");
        tries += framed(&outcomes).len();
        if hellos_bare(&outcomes) {
            greetings.receive(peer(), &answer, nobody, at(second));
        }
    }
    assert!((12..=16).contains(&tries), "four a minute: {tries}");
}

fn hellos_bare(outcomes: &[Outcome]) -> bool {
    outcomes.iter().any(|outcome| matches!(outcome, Outcome::Send { to, .. } if *to == peer()))
}

#[test]
fn peer_that_offers_no_more_gets_bare_packets_at_once() {
    let mut greetings = Greetings::new(Secret([1; 2]), Some(50_104));
    let (hello, token) = offered(&mut greetings);
    let answer = Hello::new(Kind::Answer, hello.token).offering(Some(4_789)).encode();
    greetings.receive(peer(), &answer, nobody, at(0));

    // It has come back without eBPF, says hello, and is asked whether that is true.
    let theirs = Hello::new(Kind::Hello, 77).offering(None).encode();
    let outcomes = greetings.receive(peer(), &theirs, nobody, at(5));
    assert!(!outcomes.contains(&Outcome::Framed { peer: 4, port: None }), "anybody may have said so");
    assert!(hellos_bare(&greetings.tick(at(5))));
    let answer = Hello::new(Kind::Answer, token).offering(None).encode();
    assert_eq!(greetings.receive(peer(), &answer, nobody, at(5)), [Outcome::Framed { peer: 4, port: None }]);

    // And with it again.
    let answer = Hello::new(Kind::Answer, token).offering(Some(4_789)).encode();
    let outcomes = greetings.receive(peer(), &answer, nobody, at(6));
    assert_eq!(framed(&outcomes).len(), 1);
}

#[test]
fn who_takes_no_framed_packets_sends_none() {
    let mut greetings = Greetings::new(Secret([1; 2]), None);
    greetings.learn(4, peer(), Known { ours: true, framed_port: Some(4_789) }, at(0));
    let outcomes = greetings.tick(at(0));
    assert!(outcomes.contains(&Outcome::Framed { peer: 4, port: None }), "what an earlier run has agreed on");
    let token = hellos(&outcomes).remove(0).token;
    let answer = Hello::new(Kind::Answer, token).offering(Some(4_789)).encode();
    assert_eq!(greetings.receive(peer(), &answer, nobody, at(0)), [Outcome::Probes { peer: 4, to: peer() }]);

    let v6: SocketAddr = "[2001:db8::2]:50103".parse().unwrap();
    let mut greetings = Greetings::new(Secret([1; 2]), Some(50_104));
    greetings.learn(4, v6, Known::default(), at(0));
    let token = hellos(&greetings.tick(at(0))).remove(0).token;
    let answer = Hello::new(Kind::Answer, token).offering(Some(4_789)).encode();
    let news = [Outcome::Ours { peer: 4, ours: true }, Outcome::Probes { peer: 4, to: v6 }];
    assert_eq!(greetings.receive(v6, &answer, nobody, at(0)), news);
}

#[test]
fn a_probe_is_answered_to_the_tunnel_and_means_nothing_else() {
    let mut greetings = Greetings::new(Secret([1; 2]), Some(50_104));
    greetings.learn(4, peer(), Known::default(), at(0));
    greetings.tick(at(0));
    let probe = Hello::probe(77, 1_472);
    assert_eq!((probe.len(), probe[0] >> 4), (1_472, 9));
    let elsewhere: SocketAddr = "192.0.2.2:40000".parse().unwrap();
    let outcomes = greetings.receive(elsewhere, &probe[..MAX_LEN], nobody, at(0));
    let payload = Hello::new(Kind::Answer, 77).encode();
    assert_eq!(outcomes, [Outcome::Send { to: peer(), payload }]);
    assert_eq!(greetings.tick(at(0)), [], "it draws no hello");
    let stranger: SocketAddr = "198.51.100.1:50103".parse().unwrap();
    assert_eq!(greetings.receive(stranger, &probe[..MAX_LEN], nobody, at(1)), []);
}

#[test]
fn strangers_and_forgers_get_nothing() {
    let mut greetings = Greetings::new(Secret([1; 2]), Some(50_104));
    greetings.learn(4, peer(), Known::default(), at(0));
    let hello = hellos(&greetings.tick(at(0))).remove(0);
    let stranger: SocketAddr = "198.51.100.1:50103".parse().unwrap();
    assert_eq!(greetings.receive(stranger, &Hello::new(Kind::Hello, 1).encode(), nobody, at(1)), []);
    assert_eq!(greetings.receive(stranger, &Hello::new(Kind::Answer, hello.token).encode(), nobody, at(1)), []);
    assert_eq!(greetings.receive(peer(), &Hello::new(Kind::Answer, hello.token ^ 1).encode(), nobody, at(1)), []);
    greetings.forget(4);
    assert_eq!(greetings.receive(peer(), &Hello::new(Kind::Hello, 1).encode(), nobody, at(1)), []);
    assert_eq!(greetings.tick(at(100)), []);
}

proptest! {
    #[test]
    fn what_is_encoded_is_decoded(
        answer: bool, capabilities: u32, token: u64,
        options in prop::collection::vec((1_u8.., prop::collection::vec(any::<u8>(), 0..40)), 0..10),
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
        let mut greetings = Greetings::new(Secret([1; 2]), Some(50_104));
        greetings.learn(4, peer(), Known::default(), at(0));
        for outcome in greetings.receive(peer(), &bytes, nobody, at(1)) {
            if let Outcome::Send { payload, .. } = outcome {
                prop_assert!(!payload.is_empty() && payload.len() <= bytes.len());
            }
        }
    }
}
