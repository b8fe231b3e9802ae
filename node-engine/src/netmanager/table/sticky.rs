//! Which instance a client sticks to: a table whose cells each belong to the instance with the highest score there ("highest random
//! weight", Thaler and Ravishankar 1998). An instance that goes leaves its own cells and no others, and one that comes takes cells for
//! itself and moves no client between others; a table filled by turns (Maglev) is more even, but moves a few per cent of strangers.
//! Scores are of instance numbers, so all nodes make the same table of the same instances, whatever slots they have there.

use super::balance::Candidate;

/// Above this each stands in the list once, and a change moves most clients: a larger table would push out other services' lists.
const MOST: usize = 1_024;

/// The slots by cell; a client's cell is the hash of its address.
pub(super) fn table(candidates: &[Candidate]) -> Vec<u32> {
    let cells: u32 = match candidates.len() {
        0..=1 => return candidates.iter().map(|candidate| candidate.slot).collect(),
        2..=64 => 1_024,
        65..=MOST => 4_096,
        _ => return candidates.iter().map(|candidate| candidate.slot).collect(),
    };
    let best = |cell| candidates.iter().max_by_key(|candidate| (score(cell, candidate.number), candidate.number));
    (0..cells).filter_map(best).map(|candidate| candidate.slot).collect()
}

/// The finaliser of splitmix64, over both.
const fn score(cell: u32, number: u32) -> u64 {
    let mixed = ((cell as u64) << 32 | number as u64).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Slots differ from node to node; here they tell the number.
    fn candidates(numbers: impl IntoIterator<Item = u32>, slots_from: u32) -> Vec<Candidate> {
        let candidate = |number| Candidate {
            number,
            slot: slots_from + number,
            peer: 1,
            weight: 1,
            rtt: None,
            flows: 0,
            busy: None,
        };
        numbers.into_iter().map(candidate).collect()
    }

    #[test]
    fn whoever_goes_moves_only_its_own_clients() {
        for count in [2, 3, 4, 10, 16, 64, 300] {
            let before = table(&candidates(0..count, 0));
            for gone in [0, count / 2, count - 1] {
                let after = table(&candidates((0..count).filter(|number| *number != gone), 0));
                if after.len() != before.len() {
                    assert_eq!((count, after), (2, vec![1 - gone]), "the other is all there is");
                    continue;
                }
                for (old, new) in before.iter().zip(&after) {
                    assert!(old == new || *old == gone, "{count} without {gone}");
                    assert_ne!(*new, gone);
                }
                let back = table(&candidates(0..count, 0));
                assert_eq!(back, before, "and gets them back");
            }
        }
    }

    #[test]
    fn all_nodes_agree() {
        let here = table(&candidates(0..7, 100));
        let there = table(&candidates(0..7, 900));
        assert!(here.iter().zip(&there).all(|(here, there)| here - 100 == there - 900));
    }

    #[test]
    fn cells_are_shared_fairly() {
        for (count, within) in [(2, 0.1), (3, 0.1), (8, 0.25), (16, 0.35), (50, 0.7), (300, 1.2)] {
            let table = table(&candidates(0..count, 0));
            let fair = table.len() as f64 / f64::from(count);
            for number in 0..count {
                let cells = table.iter().filter(|slot| **slot == number).count() as f64;
                assert!((cells - fair).abs() <= fair * within, "{number} of {count}: {cells} cells, {fair} were fair");
            }
        }
    }

    #[test]
    fn few_and_very_many_are_listed_plainly() {
        assert!(table(&candidates([], 0)).is_empty());
        assert_eq!(table(&candidates([3], 0)), [3]);
        assert_eq!(table(&candidates(0..2_000, 0)).len(), 2_000);
    }
}
