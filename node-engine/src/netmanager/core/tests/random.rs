//! The core in random orders, against a host that only exists here.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug)]
enum Doing {
    Attach(u32, u8),
    Detach(u32),
    /// Ends the n-th effect under way, well or not.
    End(usize, bool),
    Answer(Vec<u32>),
    Tick,
    Retain(Vec<u32>),
    Reconnect,
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn everybody_is_answered_once_and_nothing_is_left(doings in prop::collection::vec(doing(), 1..120)) {
        let mut host = Host::new();
        for doing in doings {
            host.perform(doing);
        }
        host.calm();
        prop_assert!(host.waiting.is_empty(), "somebody waits for nothing: {:?}", host.waiting);
        for number in 0..4 {
            host.perform(Doing::Detach(number));
        }
        host.calm();
        // What could not be undone the first time is undone now.
        for number in 0..4 {
            host.perform(Doing::Detach(number));
        }
        host.calm();
        for _ in 0..5 {
            host.perform(Doing::Tick);
            host.calm();
        }
        prop_assert!(host.waiting.is_empty(), "somebody still waits: {:?}", host.waiting);
        prop_assert!(host.lab.core.members.is_empty());
        prop_assert_eq!(host.lab.core.home.ipam().unwrap().used(), 0);
        prop_assert!(host.veths.is_empty() && host.carried.is_empty() && host.ports.is_empty());
        prop_assert!(host.lab.core.table.full().endpoints.is_empty());
        prop_assert!(host.lab.core.kept.leases.is_empty());
    }
}

fn doing() -> impl Strategy<Value = Doing> {
    prop_oneof![
        4 => (0u32..4, 0u8..3).prop_map(|(number, netns)| Doing::Attach(number, netns)),
        3 => (0u32..4).prop_map(Doing::Detach),
        8 => (any::<usize>(), prop::bool::weighted(0.85)).prop_map(|(which, well)| Doing::End(which, well)),
        1 => prop::collection::vec(0u32..4, 0..4).prop_map(Doing::Answer),
        1 => Just(Doing::Tick),
        1 => prop::collection::vec(0u32..4, 0..4).prop_map(Doing::Retain),
        1 => Just(Doing::Reconnect),
    ]
}

/// A host that does what the core says, when it is told to.
struct Host {
    lab: Lab,
    under_way: Vec<Effect>,
    waiting: BTreeMap<Waiter, InstanceId>,
    next: u64,
    veths: BTreeMap<InstanceId, u32>,
    carried: BTreeMap<u32, InstanceId>,
    ports: Vec<(PortMapping, Addresses)>,
}

impl Host {
    fn new() -> Self {
        Self {
            lab: Lab::ready(),
            under_way: Vec::new(),
            waiting: BTreeMap::new(),
            next: 100,
            veths: BTreeMap::new(),
            carried: BTreeMap::new(),
            ports: Vec::new(),
        }
    }

    fn perform(&mut self, doing: Doing) {
        let event = match doing {
            Doing::Attach(number, netns) => {
                let waiter = self.waiter(number);
                let ports = if number % 2 == 0 { vec![port(8000 + (number / 2) as u16)] } else { vec![] };
                Event::Attach(Attachment { ports, ..attachment(number, &format!("/ns/{netns}")) }, waiter)
            }
            Doing::Detach(number) => {
                let waiter = self.waiter(number);
                Event::Detach(id(number), waiter)
            }
            Doing::End(which, well) => {
                if self.under_way.is_empty() {
                    return;
                }
                let effect = self.under_way.remove(which % self.under_way.len());
                self.end(effect, well)
            }
            Doing::Answer(numbers) => {
                let rows: Vec<TableRow> = numbers.iter().map(|number| row(*number, 2)).collect();
                Event::Command(Command::Table(answer(Some(Query::Name(name())), &rows)))
            }
            Doing::Tick => {
                self.lab.now += Duration::from_secs(3);
                Event::Tick
            }
            Doing::Retain(numbers) => Event::Retain(numbers.into_iter().map(id).collect()),
            Doing::Reconnect => {
                self.handle(Event::Command(Command::Disconnected(String::new())));
                Event::Command(Command::Connected)
            }
        };
        self.handle(event);
    }

    /// Everything under way ends well.
    fn calm(&mut self) {
        for _ in 0..10_000 {
            if self.under_way.is_empty() {
                return;
            }
            self.perform(Doing::End(0, true));
        }
        panic!("it never comes to rest: {:?}", self.under_way);
    }

    fn waiter(&mut self, number: u32) -> Waiter {
        self.next += 1;
        self.waiting.insert(Waiter(self.next), id(number));
        Waiter(self.next)
    }

    fn handle(&mut self, event: Event) {
        for effect in self.lab.core.handle(event, self.lab.now) {
            match effect {
                Effect::Attached(waiter, Ok(lease)) => {
                    assert_eq!(self.waiting.remove(&waiter), Some(lease.instance.clone()), "answered twice");
                    assert!(self.veths.contains_key(&lease.instance), "attached without a veth");
                    assert!(self.carried.values().any(|id| *id == lease.instance), "attached and not carried");
                }
                Effect::Attached(waiter, Err(_)) | Effect::Detached(waiter, _) => {
                    assert!(self.waiting.remove(&waiter).is_some(), "answered twice");
                }
                Effect::AttachVeth { .. }
                | Effect::DetachVeth(_)
                | Effect::Carry { .. }
                | Effect::Release { .. }
                | Effect::Settle(_)
                | Effect::Publish(..)
                | Effect::Upkeep(_) => self.under_way.push(effect),
                _ => {}
            }
        }
        let mut busy: Vec<String> = self.under_way.iter().map(subject).collect();
        let all = busy.len();
        busy.sort();
        busy.dedup();
        assert_eq!(busy.len(), all, "two effects of one subject at a time: {:?}", self.under_way);
    }

    fn end(&mut self, effect: Effect, well: bool) -> Event {
        let failed = || Err::<Made, String>("broken".into());
        let (instance, step, result) = match effect {
            Effect::AttachVeth { instance, .. } if well => {
                self.next += 1;
                let ifindex = *self.veths.entry(instance.clone()).or_insert(self.next as u32);
                (instance, Step::Veth, Ok(Made::Veth { veth: veth(ifindex), inode: 77 }))
            }
            Effect::AttachVeth { instance, .. } => (instance, Step::Veth, failed()),
            Effect::DetachVeth(instance) => {
                if well {
                    self.veths.remove(&instance);
                }
                (instance, Step::Veth, if well { Ok(Made::Done) } else { failed() })
            }
            Effect::Carry { instance, port, replaces } => {
                if well {
                    replaces.iter().for_each(|port| drop(self.carried.remove(&port.ifindex)));
                    self.carried.insert(port.ifindex, instance.clone());
                }
                (instance, Step::Carry, if well { Ok(Made::Done) } else { failed() })
            }
            // A program that cannot be taken off goes with its interface.
            Effect::Release { instance, port } => {
                self.carried.remove(&port.ifindex);
                (instance, Step::Carry, if well { Ok(Made::Done) } else { failed() })
            }
            Effect::Settle(instance) => (instance, Step::Endpoint, Ok(Made::Done)),
            Effect::Publish(_, ports) => {
                if well {
                    self.ports = ports;
                }
                return Event::Published(if well { Ok(()) } else { Err("broken".into()) });
            }
            Effect::Upkeep(_) => {
                let present = self.veths.iter().map(|(id, ifindex)| (id.clone(), *ifindex)).collect();
                return Event::Kept(if well { Ok((BRIDGE, present)) } else { Err("broken".into()) });
            }
            other => panic!("{other:?} does not end"),
        };
        Event::Stepped { instance, step, result }
    }
}

/// Of which there is one effect at a time.
fn subject(effect: &Effect) -> String {
    match effect {
        Effect::AttachVeth { instance, .. }
        | Effect::DetachVeth(instance)
        | Effect::Carry { instance, .. }
        | Effect::Release { instance, .. }
        | Effect::Settle(instance) => instance.to_string(),
        Effect::Publish(..) => "ports".into(),
        _ => "upkeep".into(),
    }
}
