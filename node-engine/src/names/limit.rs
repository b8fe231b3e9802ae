//! How much one client may ask: a bucket of questions that refills, and so many at once. Time is an argument.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Questions a second, and how many at once after a silence.
const RATE: f64 = 200.0;
const BURST: f64 = 400.0;
/// Questions of one client that are being answered.
const AT_ONCE: usize = 64;
/// Questions of all clients that are being answered.
const IN_ALL: usize = 512;
/// A node's subnets have fewer addresses.
const CLIENTS: usize = 512;

/// Everybody's account.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    state: Arc<Mutex<State>>,
    at_once: usize,
}

#[derive(Debug, Default)]
struct State {
    clients: HashMap<IpAddr, Client>,
    open: usize,
}

#[derive(Debug)]
struct Client {
    tokens: f64,
    at: Instant,
    open: usize,
}

/// A question that is being answered; its place is free again when this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    limits: Limits,
    client: IpAddr,
}

impl Default for Limits {
    fn default() -> Self {
        Self::at_once(AT_ONCE)
    }
}

impl Limits {
    /// With so many places a client.
    pub(super) fn at_once(at_once: usize) -> Self {
        Self { state: Arc::default(), at_once }
    }

    /// A place for a question of this client; `None` where it asks too much.
    pub(super) fn admit(&self, client: IpAddr, now: Instant) -> Option<Place> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.open >= IN_ALL {
            return None;
        }
        if state.clients.len() >= CLIENTS && !state.clients.contains_key(&client) {
            state.clients.retain(|_, client| client.open > 0);
            if state.clients.len() >= CLIENTS {
                return None;
            }
        }
        let account = state.clients.entry(client).or_insert(Client { tokens: BURST, at: now, open: 0 });
        let refill = now.saturating_duration_since(account.at).as_secs_f64() * RATE;
        (account.tokens, account.at) = ((account.tokens + refill).min(BURST), now);
        if account.tokens < 1.0 || account.open >= self.at_once {
            return None;
        }
        account.tokens -= 1.0;
        account.open += 1;
        state.open += 1;
        Some(Place { limits: self.clone(), client })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.limits.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.open = state.open.saturating_sub(1);
        if let Some(client) = state.clients.get_mut(&self.client) {
            client.open = client.open.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use super::*;

    #[test]
    fn one_client_spends_its_own_and_gets_it_back() {
        let (limits, now) = (Limits::default(), Instant::now());
        let (greedy, calm) = (IpAddr::from([10, 18, 0, 2]), IpAddr::from([10, 18, 0, 3]));
        let served = (0..10_000).filter(|_| limits.admit(greedy, now).is_some()).count();
        assert_eq!(served, 400);
        assert!(limits.admit(calm, now).is_some());
        let later = now + Duration::from_millis(500);
        let served = (0..10_000).filter(|_| limits.admit(greedy, later).is_some()).count();
        assert_eq!(served, 100);
    }

    #[test]
    fn questions_at_once_are_bounded_for_each_and_for_all() {
        let (limits, now) = (Limits::default(), Instant::now());
        let mut held = Vec::new();
        for client in 0..20 {
            held.extend((0..100).filter_map(|_| limits.admit(Ipv4Addr::new(10, 18, 0, client).into(), now)));
            assert_eq!(held.len(), (64 * (usize::from(client) + 1)).min(512));
        }
        drop(held);
        assert!(limits.admit([10, 18, 0, 0].into(), now).is_some(), "places come back");
    }
}
