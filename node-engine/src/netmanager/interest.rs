//! Whom we watch: services with an instance here, and services that were asked for. Asks the cluster for what is unknown, each
//! thing once however many wait for it, repeats, refreshes, gives up, and never faster than the cluster should be asked. Pure:
//! time and randomness are arguments. Does not keep what the answers say: that is the table's.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use crate::model::{Query, ServiceName, TableAnswer};

/// An answer that takes longer is asked for once more, then given up.
const TIMEOUT: Duration = Duration::from_secs(5);
const ATTEMPTS: u32 = 2;
/// So long an address that nobody knows is not asked for again.
const NEGATIVE: Duration = Duration::from_secs(2);
/// There is no sequence number in what the cluster pushes: a lost update is noticed only by asking again.
const REFRESH: Duration = Duration::from_secs(45);
/// The last part of the refresh period is random.
const JITTER: Duration = Duration::from_secs(10);
/// A service without an instance here that nobody has missed for so long is idle: it is forgotten where no instance is left on
/// the node that could use it. Else it stays, because the kernel's path does not tell of use, and a flow would lose its instance.
const IDLE: Duration = Duration::from_secs(10 * 60);
/// Idle services are refreshed so many times less often; updates of them are still pushed.
const IDLE_REFRESH: u32 = 8;
/// More idle services than this are not kept: those that were used longest ago go first.
const MAX_IDLE: usize = 1_024;
/// Interests that end in one tick.
const ENDS: usize = 8;
/// Queries a second, and how many at once.
const RATE: u32 = 50;
const BURST: u32 = 100;
/// More open questions than this are given up at once: an address scan in a container must not fill our memory.
const MAX_OPEN: usize = 4_096;

/// What the cluster is to be told, and what becomes of who waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Ask(Query),
    Add(ServiceName),
    Remove(ServiceName),
    /// Nobody knows the address, or nobody answers.
    GiveUp(IpAddr),
}

/// Interests and open questions.
#[derive(Clone, Debug, Default)]
pub struct Interests {
    connected: bool,
    watched: BTreeMap<ServiceName, Watch>,
    open: BTreeMap<Query, Open>,
    /// Open questions that wait for their turn.
    queue: Queue,
    negative: HashMap<IpAddr, Duration>,
    /// Questions that may be asked now, in thousandths.
    tokens: u64,
    refilled: Option<Duration>,
    /// Questions that found too many open ones.
    refused: u64,
}

/// Names and addresses take turns, each in the order they came: who scans the ones does not keep back the others.
#[derive(Clone, Debug, Default)]
struct Queue {
    names: VecDeque<Query>,
    addresses: VecDeque<Query>,
    /// Whose turn it is.
    address: bool,
}

#[derive(Clone, Debug)]
struct Watch {
    /// Instances of the service on this node.
    local: usize,
    used: Duration,
    refresh: Duration,
}

#[derive(Clone, Debug)]
struct Open {
    attempts: u32,
    /// When the question fails, or is asked again: counted from when it was asked, or, without a broker, from when it could not be.
    deadline: Duration,
    queued: bool,
    /// Something changed since it was asked: the answer may be old already, so ask once more when it comes.
    again: bool,
    /// A packet waits for it, or somebody who looks up a name.
    waiting: bool,
}

impl Interests {
    pub fn new() -> Self {
        Self::default()
    }

    /// An instance of the service is connected here: the service is watched and asked for at once.
    pub fn hold(&mut self, service: &ServiceName, now: Duration) -> Vec<Outcome> {
        let mut outcomes = self.watch(service, now);
        if let Some(watch) = self.watched.get_mut(service) {
            watch.local += 1;
        }
        outcomes.extend(self.ask(Query::Name(service.clone()), now));
        outcomes
    }

    /// The service was watched by an earlier run, and may be used still.
    pub fn recall(&mut self, service: &ServiceName, now: Duration) -> Vec<Outcome> {
        self.watch(service, now)
    }

    /// An instance of the service is not connected here any more. Its other users may still be.
    pub fn release(&mut self, service: &ServiceName, now: Duration) {
        if let Some(watch) = self.watched.get_mut(service) {
            watch.local = watch.local.saturating_sub(1);
            watch.used = now;
        }
    }

    /// The service is used, however the datapath noticed. An unknown one stays unknown.
    pub fn touch(&mut self, service: &ServiceName, now: Duration) {
        if let Some(watch) = self.watched.get_mut(service) {
            watch.used = now;
        }
    }

    /// Something waits for this address.
    pub fn miss(&mut self, address: IpAddr, now: Duration) -> Vec<Outcome> {
        if self.negative.get(&address).is_some_and(|until| *until > now) {
            return vec![Outcome::GiveUp(address)];
        }
        let query = Query::Address(address);
        let outcomes = self.ask(query.clone(), now);
        match self.open.get_mut(&query) {
            Some(open) => open.waiting = true,
            None => return vec![Outcome::GiveUp(address)],
        }
        outcomes
    }

    /// Somebody waits to hear of this service. It is watched from the answer on, if there is such a service. False where too many
    /// questions are open.
    pub fn look_up(&mut self, service: &ServiceName, now: Duration) -> (bool, Vec<Outcome>) {
        let query = Query::Name(service.clone());
        let outcomes = self.ask(query.clone(), now);
        let open = self.open.get_mut(&query);
        (open.is_some_and(|open| std::mem::replace(&mut open.waiting, true) || open.waiting), outcomes)
    }

    /// Instances of the service came or went.
    pub fn changed(&mut self, service: &ServiceName, now: Duration) -> Vec<Outcome> {
        if !self.watched.contains_key(service) {
            return Vec::new();
        }
        self.ask_anew(Query::Name(service.clone()), now)
    }

    /// Whose address is this? Like a miss, but nobody waits, so nobody is given up.
    pub fn inquire(&mut self, address: IpAddr, now: Duration) -> Vec<Outcome> {
        self.ask(Query::Address(address), now)
    }

    /// Is this answer about anything that somebody here asked or watches?
    pub fn wants(&self, answer: &TableAnswer) -> bool {
        let watched = answer.service.as_ref().is_some_and(|service| self.watched.contains_key(service));
        watched || !self.answers(answer).is_empty()
    }

    /// An answer came and is in the table, where `serves` looks.
    pub fn answered(
        &mut self,
        answer: &TableAnswer,
        jitter: u64,
        now: Duration,
        serves: impl Fn(IpAddr) -> bool,
    ) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        for query in self.answers(answer) {
            let Some(open) = self.open.remove(&query) else { continue };
            let Query::Address(address) = query else {
                // Whoever asks for names that there are not must not make us watch them all.
                if let Some(service) = answer.service.as_ref().filter(|_| open.waiting && !answer.rows.is_empty()) {
                    outcomes.extend(self.watch(service, now));
                }
                if open.again {
                    outcomes.extend(self.ask(query, now));
                }
                continue;
            };
            if let Some(service) = &answer.service {
                outcomes.extend(self.watch(service, now));
            }
            if !serves(address) {
                self.negative.insert(address, now + NEGATIVE);
                outcomes.extend(open.waiting.then_some(Outcome::GiveUp(address)));
            }
        }
        if let Some(watch) = answer.service.as_ref().and_then(|service| self.watched.get_mut(service)) {
            watch.refresh = watch.next_refresh(jitter, now);
        }
        outcomes
    }

    /// The broker is there again: what may have been missed is asked for, and interests it may have lost are told again.
    pub fn connected(&mut self, now: Duration) -> Vec<Outcome> {
        self.connected = true;
        // Services with an instance here first: it is announced after the answer.
        let mut services: Vec<(bool, ServiceName)> =
            self.watched.iter().map(|(service, watch)| (watch.local == 0, service.clone())).collect();
        services.sort_unstable();
        let mut outcomes: Vec<_> = services.iter().map(|(_, service)| Outcome::Add(service.clone())).collect();
        for open in self.open.values_mut() {
            (open.attempts, open.deadline) = (0, now + TIMEOUT);
        }
        self.queue = Queue::default();
        for (query, open) in &mut self.open {
            open.queued = true;
            self.queue.push(query.clone());
        }
        for (_, service) in services {
            outcomes.extend(self.ask(Query::Name(service), now));
        }
        outcomes.extend(self.drain(now));
        outcomes
    }

    /// Questions wait until the broker is back, or their time is over.
    pub fn disconnected(&mut self) {
        self.connected = false;
    }

    /// What is due: questions that wait, answers that never came, refreshes, and services nobody uses.
    pub fn tick(&mut self, jitter: u64, now: Duration) -> Vec<Outcome> {
        let mut outcomes = self.expire_questions(now);
        self.negative.retain(|_, until| *until > now);
        let connected = self.connected;
        let mut due = Vec::new();
        for (place, (service, watch)) in self.watched.iter_mut().enumerate() {
            if connected && watch.refresh <= now {
                watch.refresh = watch.next_refresh(jitter.wrapping_add(place as u64), now);
                due.push(service.clone());
            }
        }
        for service in self.surplus(now) {
            self.watched.remove(&service);
            self.open.remove(&Query::Name(service.clone()));
            due.retain(|other| *other != service);
            outcomes.push(Outcome::Remove(service));
        }
        for service in due {
            outcomes.extend(self.ask(Query::Name(service), now));
        }
        outcomes.extend(self.drain(now));
        outcomes
    }

    /// Is there somebody to ask?
    pub fn is_connected(&self) -> bool {
        self.connected
    }

    /// Is this service watched?
    pub fn watches(&self, service: &ServiceName) -> bool {
        self.watched.contains_key(service)
    }

    /// How many services are watched.
    pub fn watched(&self) -> usize {
        self.watched.len()
    }

    /// How many questions were not asked because too many were open.
    pub fn refused(&self) -> u64 {
        self.refused
    }

    /// Idle services that are not worth keeping; those that were not used for longest go first, a few at a time, since the end of each
    /// interest costs the cluster a question.
    fn surplus(&self, now: Duration) -> Vec<ServiceName> {
        let mut idle: Vec<(Duration, &ServiceName)> = self
            .watched
            .iter()
            .filter(|(_, watch)| watch.idle(now))
            .map(|(service, watch)| (watch.used, service))
            .collect();
        let kept = if self.watched.values().any(|watch| watch.local > 0) { MAX_IDLE } else { 0 };
        idle.sort_unstable();
        idle.truncate(idle.len().saturating_sub(kept));
        idle.into_iter().take(ENDS).map(|(_, service)| service.clone()).collect()
    }

    fn watch(&mut self, service: &ServiceName, now: Duration) -> Vec<Outcome> {
        if let Some(watch) = self.watched.get_mut(service) {
            watch.used = now;
            return Vec::new();
        }
        let watch = Watch { local: 0, used: now, refresh: now + REFRESH };
        self.watched.insert(service.clone(), watch);
        vec![Outcome::Add(service.clone())]
    }

    /// The open questions that this answers. Older clusters do not repeat the question: then what the answer is about tells it.
    fn answers(&self, answer: &TableAnswer) -> Vec<Query> {
        let name = answer.service.iter().cloned().map(Query::Name);
        let services = answer.rows.iter().flat_map(|row| &row.services).map(|service| service.address);
        let instances = answer
            .rows
            .iter()
            .flat_map(|row| row.instance.v4.map(IpAddr::from).into_iter().chain(row.instance.v6.map(IpAddr::from)));
        let mut queries: Vec<Query> = answer
            .query
            .iter()
            .cloned()
            .chain(name)
            .chain(services.chain(instances).map(Query::Address))
            .filter(|query| self.open.contains_key(query))
            .collect();
        queries.sort_unstable();
        queries.dedup();
        queries
    }

    fn ask_anew(&mut self, query: Query, now: Duration) -> Vec<Outcome> {
        match self.open.get_mut(&query) {
            Some(open) => {
                open.again = true;
                Vec::new()
            }
            None => self.ask(query, now),
        }
    }

    fn ask(&mut self, query: Query, now: Duration) -> Vec<Outcome> {
        if self.open.contains_key(&query) {
            return Vec::new();
        }
        if self.open.len() >= MAX_OPEN {
            self.refused += 1;
            return Vec::new();
        }
        let open = Open { attempts: 0, deadline: now + TIMEOUT, queued: true, again: false, waiting: false };
        self.open.insert(query.clone(), open);
        self.queue.push(query);
        self.drain(now)
    }

    fn expire_questions(&mut self, now: Duration) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        // What is in the queue has not been asked yet, and its turn comes.
        let late = |open: &Open| open.deadline <= now && !(open.queued && self.connected);
        let late: Vec<Query> =
            self.open.iter().filter(|(_, open)| late(open)).map(|(query, _)| query.clone()).collect();
        for query in late {
            let Some(open) = self.open.get_mut(&query) else { continue };
            if !open.queued && open.attempts < ATTEMPTS {
                (open.deadline, open.queued) = (now + TIMEOUT, true);
                self.queue.push(query);
                continue;
            }
            let waiting = open.waiting;
            self.open.remove(&query);
            if let Query::Address(address) = query
                && waiting
            {
                self.negative.insert(address, now + NEGATIVE);
                outcomes.push(Outcome::GiveUp(address));
            }
        }
        self.queue.retain(|query| self.open.get(query).is_some_and(|open| open.queued));
        outcomes
    }

    /// Asks what waits, as fast as it may.
    fn drain(&mut self, now: Duration) -> Vec<Outcome> {
        let mut outcomes = Vec::new();
        self.refill(now);
        while self.connected && self.tokens >= 1_000 {
            let Some(query) = self.queue.pop() else { break };
            let Some(open) = self.open.get_mut(&query) else { continue };
            if !std::mem::replace(&mut open.queued, false) {
                continue;
            }
            open.attempts += 1;
            open.deadline = now + TIMEOUT;
            self.tokens -= 1_000;
            outcomes.push(Outcome::Ask(query));
        }
        outcomes
    }

    fn refill(&mut self, now: Duration) {
        let full = u64::from(BURST) * 1_000;
        let Some(refilled) = self.refilled.replace(now) else {
            self.tokens = full;
            return;
        };
        let millis = u64::try_from(now.saturating_sub(refilled).as_millis()).unwrap_or(u64::MAX);
        if millis == 0 {
            self.refilled = Some(refilled);
            return;
        }
        self.tokens = millis.saturating_mul(u64::from(RATE)).saturating_add(self.tokens).min(full);
    }
}

impl Queue {
    fn push(&mut self, query: Query) {
        match query {
            Query::Name(_) => self.names.push_back(query),
            Query::Address(_) => self.addresses.push_back(query),
        }
    }

    fn pop(&mut self) -> Option<Query> {
        let query = match self.address {
            true => self.addresses.pop_front().or_else(|| self.names.pop_front()),
            false => self.names.pop_front().or_else(|| self.addresses.pop_front()),
        };
        self.address = matches!(query, Some(Query::Name(_)));
        query
    }

    fn retain(&mut self, stays: impl Fn(&Query) -> bool) {
        self.names.retain(&stays);
        self.addresses.retain(&stays);
    }
}

impl Watch {
    fn idle(&self, now: Duration) -> bool {
        self.local == 0 && now.saturating_sub(self.used) >= IDLE
    }

    /// The last part of the period is random, so that services do not stay in step.
    fn next_refresh(&self, jitter: u64, now: Duration) -> Duration {
        let span = u64::try_from(JITTER.as_millis()).unwrap_or(1);
        let period = if self.idle(now) { REFRESH * IDLE_REFRESH } else { REFRESH };
        now + period - Duration::from_millis(jitter % span)
    }
}

#[cfg(test)]
mod tests;
