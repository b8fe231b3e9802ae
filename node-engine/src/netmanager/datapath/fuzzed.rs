//! What the slow path reads of packets, for the fuzzer.

use std::time::{Duration, Instant};

use netmanager_common::abi::{Config, Endpoint};
use netmanager_common::addr::Addr;
use netmanager_common::icmp;
use netmanager_common::testing::{CLIENT, World, checksums_hold};

use super::TableDelta;
use super::carry;
use super::fragments::{Fragments, Outcome, is_fragment};
use super::host::HostFlows;
use super::offload::Offload;
use super::refusal;

/// What is in a datagram, framed or not, and what is answered to a packet that nobody takes.
pub(crate) fn datagrams(bytes: &[u8]) {
    for framed in [false, true] {
        let inner = carry::inner(bytes, framed);
        assert!(inner.len() <= bytes.len());
        let mut packet = inner.to_vec();
        if let Some(whole) = carry::whole(&mut packet) {
            assert!(!whole.is_empty());
        }
    }
    let _ = carry::ready(bytes, &Config::default());
    if let Some(answer) = refusal::of(bytes) {
        assert!(checksums_hold(&answer), "an answer has right checksums");
        assert!(refusal::of(&answer).is_none(), "answers are not answered");
        assert!(
            carry::source(bytes) == carry::destination(&answer) && carry::destination(bytes) == carry::source(&answer)
        );
    }
    let mut packet = bytes.to_vec();
    if let Ok(error) = icmp::Message::read(bytes) {
        error.rewrite(&mut packet, &error.destination, &error.source);
    }
}

/// A packet of the host is lent an instance's name, and is the host's own again when that is taken back.
pub(crate) fn host(bytes: &[u8]) {
    let mut flows = HostFlows::new([Addr::v4([10, 19, 1, 254]), Addr::v6([0xfc; 16])]);
    let endpoints =
        [CLIENT.v4(), CLIENT.v6()].map(|address| (address, Endpoint { instance: address, ..Endpoint::default() }));
    flows.observe(&TableDelta { endpoints: endpoints.to_vec(), ..TableDelta::default() }, true);
    let offload = Offload::default();
    let mut packet = bytes.to_vec();
    if flows.lend(&mut packet, &offload, 1).is_some() {
        assert_eq!(packet.len(), bytes.len());
        assert!(!checksums_hold(bytes) || checksums_hold(&packet), "right checksums stay right");
        if flows.take_back(&mut packet, &offload).is_some() {
            assert!(carry::source(&packet) == carry::source(bytes), "it is the host's own again");
            assert!(carry::destination(&packet) == carry::destination(bytes));
        }
    }
    let mut world = World::sample();
    let mut packet = bytes.to_vec();
    let _ = flows.give_back(&mut packet, &mut world, &offload, 2);
    let _ = flows.give_back_error(&mut packet);
    let _ = flows.lend_error(&mut packet);
}

/// Fragments, each behind two bytes of its length: nothing is longer than a packet can be, and nothing stays charged.
pub(crate) fn fragments(mut bytes: &[u8]) {
    let (mut fragments, now) = (Fragments::default(), Instant::now());
    while let Some((len, rest)) = bytes.split_first_chunk::<2>() {
        let (piece, rest) = rest.split_at(usize::from(u16::from_be_bytes(*len)).min(rest.len()));
        bytes = rest;
        let (outcome, _) = fragments.take(Addr::v4([piece.len() as u8 & 1; 4]), piece, now);
        if let Outcome::Whole(packet) = outcome {
            assert!(packet.len() <= 40 + 65_535 && !is_fragment(&packet), "it is a whole packet");
            assert!(carry::source(&packet).is_some());
        }
        let mut cut = Fragments::default();
        cut.cut(piece, 1_280, |fragment| assert!(fragment.len() <= 1_280));
    }
    fragments.expire(now + Duration::from_secs(3_600));
    assert!(fragments.is_empty(), "what has waited too long is forgotten");
}
