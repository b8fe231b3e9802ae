//! Stable numbers: each key has one while it is here, and a number that was given back is the last to be given again, not before
//! the change that freed it has been handed out. Low numbers go first where they are worth more.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;

/// Numbers from 1 up to, but not including, a limit.
#[derive(Clone, Debug)]
pub(super) struct Numbers<K> {
    by_key: HashMap<K, u32>,
    /// Never used from here on.
    next: u32,
    limit: u32,
    /// What is below this is given as long as there is any.
    preferred: u32,
    /// Longest free first: those below, and the others.
    free: [VecDeque<u32>; 2],
    /// Given back since the last `settle`.
    freed: Vec<u32>,
}

impl<K: Hash + Eq> Numbers<K> {
    pub(super) fn new(limit: u32) -> Self {
        Self::preferring(limit, limit)
    }

    /// The same; what is below `preferred` is given first.
    pub(super) fn preferring(preferred: u32, limit: u32) -> Self {
        Self { by_key: HashMap::new(), next: 1, limit, preferred, free: Default::default(), freed: Vec::new() }
    }

    pub(super) fn get(&self, key: &K) -> Option<u32> {
        self.by_key.get(key).copied()
    }

    pub(super) fn len(&self) -> usize {
        self.by_key.len()
    }

    /// The key's number, a new one where it has none; `None` where all are taken.
    pub(super) fn take(&mut self, key: K) -> Option<u32> {
        if let Some(number) = self.get(&key) {
            return Some(number);
        }
        let [low, high] = &mut self.free;
        let number = if self.next < self.preferred.min(self.limit) { None } else { low.pop_front() };
        let number = match number {
            Some(number) => number,
            None if self.next < self.limit => {
                self.next += 1;
                self.next - 1
            }
            None => high.pop_front()?,
        };
        self.by_key.insert(key, number);
        Some(number)
    }

    /// Takes over a number of an earlier run. False where the number or the key is taken, or the number is out of range.
    pub(super) fn adopt(&mut self, key: K, number: u32) -> bool {
        if number == 0 || number >= self.limit || self.by_key.contains_key(&key) {
            return false;
        }
        if number >= self.next {
            (self.next..number).for_each(|number| self.free_of(number).push_back(number));
            self.next = number + 1;
        } else {
            let free = self.free_of(number);
            let Some(place) = free.iter().position(|free| *free == number) else { return false };
            free.remove(place);
        }
        self.by_key.insert(key, number);
        true
    }

    /// Gives the number of one key to another. False where there is nothing to give, or the other has one.
    pub(super) fn rename(&mut self, from: &K, to: K) -> bool {
        if self.by_key.contains_key(&to) {
            return false;
        }
        let Some(number) = self.by_key.remove(from) else { return false };
        self.by_key.insert(to, number);
        true
    }

    pub(super) fn release(&mut self, key: &K) -> Option<u32> {
        let number = self.by_key.remove(key)?;
        self.freed.push(number);
        Some(number)
    }

    /// What was given back may be given again.
    pub(super) fn settle(&mut self) {
        for number in std::mem::take(&mut self.freed) {
            self.free_of(number).push_back(number);
        }
    }

    fn free_of(&mut self, number: u32) -> &mut VecDeque<u32> {
        &mut self.free[usize::from(number >= self.preferred)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn freed_number_waits_for_settle_and_its_turn() {
        let mut numbers = Numbers::new(4);
        assert_eq!([numbers.take('a'), numbers.take('b'), numbers.take('c')], [Some(1), Some(2), Some(3)]);
        assert_eq!(numbers.take('d'), None);
        assert_eq!(numbers.release(&'b'), Some(2));
        assert_eq!(numbers.take('d'), None, "not before it is settled");
        numbers.settle();
        numbers.release(&'a');
        numbers.settle();
        assert_eq!(numbers.take('d'), Some(2), "longest free first");
        assert_eq!(numbers.take('d'), Some(2));
    }

    #[test]
    fn low_numbers_go_first_where_they_are_worth_more() {
        let mut numbers = Numbers::preferring(3, 6);
        assert_eq!(['a', 'b', 'c', 'd'].map(|key| numbers.take(key)), [1, 2, 3, 4].map(Some));
        for key in ['c', 'b'] {
            numbers.release(&key);
        }
        numbers.settle();
        assert_eq!(['e', 'f', 'g', 'h'].map(|key| numbers.take(key)), [Some(2), Some(5), Some(3), None]);
    }

    #[test]
    fn adopts_any_free_number_once() {
        let mut numbers = Numbers::new(10);
        assert!(numbers.adopt('a', 5));
        assert!(!numbers.adopt('b', 5));
        assert!(!numbers.adopt('a', 6));
        assert!(!numbers.adopt('b', 0));
        assert!(!numbers.adopt('b', 10));
        assert!(numbers.adopt('b', 2));
        assert!(numbers.rename(&'b', 'c'));
        assert_eq!((numbers.get(&'b'), numbers.get(&'c')), (None, Some(2)));
        let mut rest: Vec<_> = std::iter::successors(Some(100u8), |key| Some(key + 1))
            .map_while(|key| numbers.take(char::from(key)))
            .collect();
        rest.sort_unstable();
        assert_eq!(rest, [1, 3, 4, 6, 7, 8, 9]);
    }
}
