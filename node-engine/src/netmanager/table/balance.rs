//! From a policy to the list that the law picks from. The law knows three ways to pick an index (by turn, by chance, by the client's
//! address); everything else is which list it is given: a weight is how often a slot stands in it, a preference is what is left out of
//! it. Pure: what was measured is an argument, and what must be remembered is in [`Choice`].

use std::collections::BTreeMap;
use std::time::Duration;

use netmanager_common::abi::{POLICY_ANY, POLICY_CLIENT, POLICY_TURN};

use super::health::Standing;
use super::sticky;
use crate::model::Policy;

/// No list by weight is longer, unless there are more candidates than that: then each that has a weight stands in it once.
const LONGEST: u32 = 256;
/// Shares of the candidate with the least to do; the busiest keeps one.
const SHARES: u32 = 16;
/// Another node is closer only if its round trip is shorter by more than this part of the old one's, and by more than this time. The
/// time is what the measuring itself may be off by (both ends answer in user space), the part is the jitter of a path that is queued on.
const CLOSER_PART: u32 = 5;
const CLOSER_TIME: Duration = Duration::from_millis(1);

/// An instance that may be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    pub(super) number: u32,
    pub(super) slot: u32,
    /// Number of the node it is on; 0 for this one.
    pub(super) peer: u32,
    pub(super) weight: u32,
    /// To its node, where it is measured; nothing for one on this node.
    pub(super) rtt: Option<Duration>,
    /// Flows it has from this node.
    pub(super) flows: u32,
    /// Percent of its node's processors in use, where the node says so.
    pub(super) busy: Option<u8>,
}

impl Candidate {
    const fn local(&self) -> bool {
        self.peer == 0
    }

    /// What the next flow would find there: the flows with it, on what the node has left of itself.
    fn load(&self) -> u64 {
        let left = 100 - u64::from(self.busy.unwrap_or(0).min(95));
        (u64::from(self.flows) + 1) * 10_000 / left
    }
}

/// What is remembered of earlier choices behind an address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Choice {
    /// The closest node.
    closest: Option<u32>,
    /// Shares by instance number.
    shares: BTreeMap<u32, u32>,
}

/// Those whom new flows may be sent to, and one that a single flow shall try. Nobody is passed over where nobody would be left; whoever
/// weighs nothing is left out where somebody else weighs something.
pub(super) fn sound(
    candidates: Vec<Candidate>,
    standing: impl Fn(u32) -> Standing,
) -> (Vec<Candidate>, Option<Candidate>) {
    let heavy = candidates.iter().any(|candidate| candidate.weight > 0);
    let offered: Vec<Candidate> = candidates.into_iter().filter(|one| !heavy || one.weight > 0).collect();
    let well: Vec<Candidate> = offered.iter().copied().filter(|one| standing(one.slot) == Standing::Well).collect();
    let trial = offered.iter().copied().find(|one| matches!(standing(one.slot), Standing::Trial(_)));
    if well.is_empty() { (offered, None) } else { (well, trial) }
}

/// All of them in the order of their numbers.
pub(super) fn with(candidates: &[Candidate], one: Candidate) -> Vec<Candidate> {
    let mut all = candidates.to_vec();
    all.insert(all.partition_point(|other| other.number < one.number), one);
    all
}

/// What the law is given for an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct List {
    /// One of `POLICY_*`.
    pub(super) pick: u32,
    pub(super) slots: Vec<u32>,
}

impl List {
    pub(super) fn has(&self, candidate: &Candidate) -> bool {
        self.slots.contains(&candidate.slot)
    }
}

impl Choice {
    /// The list for these candidates, which are in the order of their numbers. `measured`: there are new figures since the last list.
    pub(super) fn list(&mut self, policy: Policy, candidates: &[Candidate], measured: bool) -> List {
        let all = || candidates.iter().map(|candidate| candidate.slot).collect();
        let (pick, slots) = match policy {
            Policy::RoundRobin => (POLICY_TURN, all()),
            Policy::Random => (POLICY_ANY, all()),
            Policy::Closest => (POLICY_TURN, self.closest(candidates)),
            Policy::Underutilised => (POLICY_TURN, self.underutilised(candidates, measured)),
            Policy::Sticky => (POLICY_CLIENT, sticky::table(candidates)),
            Policy::Weighted => (POLICY_TURN, interleave(candidates, |candidate| candidate.weight)),
            Policy::LocalFirst => (POLICY_TURN, local_first(candidates)),
            Policy::FailOver => (POLICY_TURN, fail_over(candidates)),
        };
        List { pick, slots }
    }

    /// All instances of the closest node. This one is always the closest. Where no round trip is known the cluster's order decides.
    fn closest(&mut self, candidates: &[Candidate]) -> Vec<u32> {
        let on = |peer: u32| candidates.iter().filter(move |candidate| candidate.peer == peer);
        let rtt = |peer: u32| on(peer).next().and_then(|candidate| candidate.rtt);
        // Of equals the first: `min_by_key` keeps it. An unknown round trip ranks behind every known one.
        let best = candidates.iter().min_by_key(|candidate| match (candidate.local(), candidate.rtt) {
            (true, _) => Duration::ZERO,
            (false, rtt) => rtt.unwrap_or(Duration::MAX),
        });
        let Some(best) = best else {
            self.closest = None;
            return Vec::new();
        };
        let stays = self.closest.filter(|&old| on(old).next().is_some() && !best.local()).filter(|&old| {
            match (rtt(old), best.rtt) {
                (Some(old), Some(new)) => {
                    let saved = old.saturating_sub(new);
                    saved <= CLOSER_TIME || saved <= old / CLOSER_PART
                }
                (None, _) | (_, None) => false,
            }
        });
        let peer = stays.unwrap_or(best.peer);
        self.closest = Some(peer);
        on(peer).map(|candidate| candidate.slot).collect()
    }

    /// Each gets shares of new flows against its load, the least loaded the most. New figures move the shares half of the way, so that
    /// nodes that measure the same do not all rush to the same instance.
    fn underutilised(&mut self, candidates: &[Candidate], measured: bool) -> Vec<u32> {
        let least = candidates.iter().map(Candidate::load).min().unwrap_or(1);
        let shares = candidates.iter().map(|candidate| {
            let target = u32::try_from(u64::from(SHARES) * least / candidate.load()).unwrap_or(1).clamp(1, SHARES);
            let share = match self.shares.get(&candidate.number) {
                Some(&old) if measured => halfway(old, target),
                Some(&old) => old,
                None => target,
            };
            (candidate.number, share)
        });
        self.shares = shares.collect();
        interleave(candidates, |candidate| self.shares.get(&candidate.number).copied().unwrap_or(1))
    }
}

/// Half of the way, and at least one step.
fn halfway(from: u32, to: u32) -> u32 {
    let middle = from.midpoint(to);
    if to > from { middle.max(from + 1) } else { middle }
}

fn local_first(candidates: &[Candidate]) -> Vec<u32> {
    let any = candidates.iter().any(Candidate::local);
    candidates.iter().filter(|candidate| candidate.local() || !any).map(|candidate| candidate.slot).collect()
}

fn fail_over(candidates: &[Candidate]) -> Vec<u32> {
    let rank = |candidate: &&Candidate| (candidate.weight, std::cmp::Reverse(candidate.number));
    candidates.iter().max_by_key(rank).map(|candidate| candidate.slot).into_iter().collect()
}

/// Each as often as its weight says, and as evenly spread as that allows ("smooth weighted round robin"). Without any weight all weigh
/// the same.
fn interleave(candidates: &[Candidate], weight: impl Fn(&Candidate) -> u32) -> Vec<u32> {
    let mut heavy: Vec<(u32, u32)> = candidates
        .iter()
        .map(|candidate| (candidate.slot, weight(candidate)))
        .filter(|(_, weight)| *weight > 0)
        .collect();
    if heavy.is_empty() {
        return candidates.iter().map(|candidate| candidate.slot).collect();
    }
    let divisor = heavy.iter().fold(0, |divisor, (_, weight)| gcd(divisor, *weight));
    let total: u64 = heavy.iter().map(|(_, weight)| u64::from(weight / divisor)).sum();
    for (_, weight) in &mut heavy {
        let reduced = u64::from(*weight / divisor);
        // Rounded to the nearest, and nobody out.
        let bounded = (reduced * u64::from(LONGEST) + total / 2) / total;
        *weight = u32::try_from(if total > u64::from(LONGEST) { bounded.max(1) } else { reduced }).unwrap_or(1);
    }
    if heavy.len() >= LONGEST as usize {
        return heavy.into_iter().map(|(slot, _)| slot).collect();
    }
    let total: i64 = heavy.iter().map(|(_, weight)| i64::from(*weight)).sum();
    let mut credit = vec![0; heavy.len()];
    let mut list = Vec::with_capacity(usize::try_from(total).unwrap_or(0));
    for _ in 0..total {
        for (credit, (_, weight)) in credit.iter_mut().zip(&heavy) {
            *credit += i64::from(*weight);
        }
        // Of equals the first.
        let Some(next) = (0..credit.len()).rev().max_by_key(|&at| credit[at]) else { break };
        credit[next] -= total;
        list.push(heavy[next].0);
    }
    list
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const MS: fn(u64) -> Option<Duration> = |ms| Some(Duration::from_millis(ms));

    /// Instance `number` in slot `number + 10`, alone on node `peer`.
    fn candidate(number: u32, peer: u32) -> Candidate {
        Candidate { number, slot: number + 10, peer, weight: 1, rtt: None, flows: 0, busy: None }
    }

    fn far(number: u32, rtt: Option<Duration>) -> Candidate {
        Candidate { rtt, ..candidate(number, number + 1) }
    }

    fn heavy(number: u32, weight: u32) -> Candidate {
        Candidate { weight, ..candidate(number, 1) }
    }

    fn slots(policy: Policy, candidates: &[Candidate]) -> Vec<u32> {
        Choice::default().list(policy, candidates, true).slots
    }

    fn counts(list: &[u32]) -> BTreeMap<u32, usize> {
        let mut counts = BTreeMap::new();
        list.iter().for_each(|slot| *counts.entry(*slot).or_default() += 1);
        counts
    }

    #[test]
    fn each_policy_has_its_way_to_pick() {
        let two = [candidate(0, 1), candidate(1, 2)];
        for policy in Policy::ALL {
            let list = Choice::default().list(policy, &two, false);
            let pick = match policy {
                Policy::Random => POLICY_ANY,
                Policy::Sticky => POLICY_CLIENT,
                _ => POLICY_TURN,
            };
            assert_eq!(list.pick, pick, "{policy:?}");
            assert!(Choice::default().list(policy, &[], true).slots.is_empty(), "{policy:?} of nobody");
        }
        assert_eq!(slots(Policy::RoundRobin, &two), [10, 11]);
        assert_eq!(slots(Policy::Random, &two), [10, 11]);
    }

    #[test]
    fn preferences_leave_out_the_rest() {
        let (here, there) = (candidate(2, 0), candidate(1, 3));
        for (policy, candidates, expected) in [
            (Policy::LocalFirst, vec![there, here, candidate(3, 0)], vec![12, 13]),
            (Policy::LocalFirst, vec![there, candidate(4, 3)], vec![11, 14]),
            (Policy::FailOver, vec![there, here], vec![11]),
            (Policy::FailOver, vec![here], vec![12]),
            (Policy::FailOver, vec![heavy(1, 1), heavy(2, 3), heavy(3, 3)], vec![12]),
            (Policy::FailOver, vec![heavy(1, 0)], vec![11]),
        ] {
            assert_eq!(slots(policy, &candidates), expected, "{policy:?} {candidates:?}");
        }
    }

    #[test]
    fn who_is_passed_over_or_weighs_nothing_is_left_out_unless_all_are() {
        let fault = super::super::health::Fault::Silent;
        let out = |slot: u32, trial: Option<u32>| match (slot, trial) {
            (slot, Some(tried)) if slot == tried => Standing::Trial(fault),
            (12.., _) => Standing::PassedOver(fault, Duration::MAX),
            _ => Standing::Well,
        };
        let three = || vec![candidate(0, 1), candidate(1, 1), candidate(2, 1)];
        let chosen = |candidates, trial| {
            let (well, trial) = sound(candidates, |slot| out(slot, trial));
            (well.iter().map(|one| one.slot).collect::<Vec<_>>(), trial.map(|one| one.slot))
        };
        assert_eq!(chosen(three(), None), (vec![10, 11], None));
        assert_eq!(chosen(three(), Some(12)), (vec![10, 11], Some(12)));
        assert_eq!(chosen(vec![candidate(2, 1), candidate(3, 1)], None), (vec![12, 13], None), "not all of them");
        assert_eq!(chosen(vec![candidate(2, 1), candidate(3, 1)], Some(12)), (vec![12, 13], None));
        assert_eq!(chosen(vec![heavy(0, 0), heavy(1, 1)], None), (vec![11], None));
        assert_eq!(chosen(vec![heavy(0, 0), heavy(2, 1)], None), (vec![12], None), "it weighs nothing");
        assert_eq!(chosen(vec![heavy(0, 0), heavy(1, 0)], None), (vec![10, 11], None));
        assert_eq!(with(&[candidate(0, 1), candidate(2, 1)], candidate(1, 1)), three());
    }

    #[test]
    fn closest_moves_only_for_more_than_noise() {
        let mut choice = Choice::default();
        let mut closest = |a, b, c| choice.list(Policy::Closest, &[far(0, a), far(1, b), far(2, c)], true).slots;
        for (a, b, c, expected, why) in [
            (None, None, None, 10, "nothing is known: the cluster's order"),
            (None, MS(40), None, 11, "a known one is better than an unknown one"),
            (MS(39), MS(40), None, 11, "less than a fifth better"),
            (MS(33), MS(40), None, 11, "still less than a fifth"),
            (MS(31), MS(40), None, 10, "more than a fifth, and more than a millisecond"),
            (MS(40), MS(31), None, 11, "and back"),
            (MS(2), MS(1), None, 11, "the same stays"),
            (MS(1), MS(2), None, 11, "half, but no more than a millisecond"),
            (Some(Duration::from_micros(900)), MS(2), None, 10, "half, and more than a millisecond"),
            (None, MS(2), MS(9), 11, "its round trip is lost"),
            (None, None, None, 10, "all are lost: the cluster's order again"),
        ] {
            assert_eq!(closest(a, b, c), [expected], "{why}");
        }
        let gone = choice.list(Policy::Closest, &[far(0, MS(50)), far(2, MS(9))], true);
        assert_eq!(gone.slots, [12], "its instance is gone");
    }

    #[test]
    fn this_node_is_always_the_closest() {
        let mut choice = Choice::default();
        let remote = far(0, Some(Duration::from_micros(80)));
        assert_eq!(choice.list(Policy::Closest, &[remote], true).slots, [10]);
        let here = [remote, candidate(1, 0), candidate(2, 0)];
        assert_eq!(choice.list(Policy::Closest, &here, true).slots, [11, 12], "all that are here");
        assert_eq!(choice.list(Policy::Closest, &[remote], true).slots, [10]);
    }

    #[test]
    fn weights_are_kept_exactly_and_spread_smoothly() {
        assert_eq!(slots(Policy::Weighted, &[heavy(0, 5), heavy(1, 1), heavy(2, 1)]), [10, 10, 11, 10, 12, 10, 10]);
        for (weights, expected) in [
            (&[1, 1][..], &[1, 1][..]),
            (&[50, 100, 0], &[1, 2]),
            (&[0, 0], &[1, 1]),
            (&[100, 99, 1], &[100, 99, 1]),
            (&[7], &[1]),
        ] {
            let candidates: Vec<_> = (0..).zip(weights).map(|(number, weight)| heavy(number, *weight)).collect();
            let list = slots(Policy::Weighted, &candidates);
            assert_eq!(counts(&list).into_values().collect::<Vec<_>>(), expected, "{weights:?}");
        }
        // However long: within any stretch each has its share, give or take one or two.
        let list = slots(Policy::Weighted, &[heavy(0, 60), heavy(1, 30), heavy(2, 10)]);
        for stretch in list.windows(5) {
            assert!((2..=4).contains(&counts(stretch)[&10]), "{list:?}");
        }
    }

    #[test]
    fn lists_are_bounded() {
        for count in [1, 3, 100, 255, 256, 1_000] {
            let candidates: Vec<_> = (0..count).map(|number| heavy(number, 1 + number * 37 % 100)).collect();
            for policy in Policy::ALL {
                let list = slots(policy, &candidates);
                let limit = if policy == Policy::Sticky { 4_096 } else { (2 * LONGEST).max(count) as usize };
                assert!(list.len() <= limit, "{policy:?} of {count}: {}", list.len());
            }
            assert_eq!(counts(&slots(Policy::Weighted, &candidates)).len(), count as usize, "nobody is left out");
        }
    }

    #[test]
    fn who_has_less_to_do_gets_more_but_not_at_once() {
        let busy = |number, flows, busy| Candidate { flows, busy, ..candidate(number, number + 1) };
        let mut choice = Choice::default();
        let mut shares = |candidates: &[Candidate], measured| {
            counts(&choice.list(Policy::Underutilised, candidates, measured).slots).into_values().collect::<Vec<_>>()
        };
        assert_eq!(shares(&[busy(0, 0, None), busy(1, 0, None)], true), [1, 1], "equal");
        let uneven = [busy(0, 99, None), busy(1, 0, None)];
        assert_eq!(shares(&uneven, false), [1, 1], "no new figures, no new list");
        let mut seen = Vec::new();
        for _ in 0..6 {
            seen.push(shares(&uneven, true));
        }
        assert_eq!(seen[0], [1, 2], "half of the way");
        assert_eq!(seen[5], [1, 16], "and there in the end");
        let even = [busy(0, 50, None), busy(1, 50, None)];
        let back: Vec<_> = (0..5).map(|_| shares(&even, true)).collect();
        assert_eq!(back[4], [1, 1], "{back:?}");
        let nodes = [busy(0, 3, Some(90)), busy(1, 3, Some(10))];
        let last = (0..8).map(|_| shares(&nodes, true)).last().unwrap();
        assert_eq!(last, [1, 16], "a ninth of the room left, rounded down");
    }
}
