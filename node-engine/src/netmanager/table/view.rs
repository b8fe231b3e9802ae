//! The table for people: see [`crate::netmanager::view`].

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};

use netmanager_common::abi::Slot;
use netmanager_common::addr::Addr;

use super::{Entry, ServiceTable, Standing, sides};
use crate::model::{InstanceId, Policy, ServiceName, TableRow};
use crate::netmanager::datapath::{FlowRow, Tally};
use crate::netmanager::view::{
    AddressView, Choice, FlowView, InstanceView, Named, Page, PeerView, Picks, ServiceView, State, framing, is_ours,
};

/// The word for an address that means one instance.
const INSTANCE: &str = "instance";

impl ServiceTable {
    /// The service of this name, also where the case of letters differs, and its addresses: `None` where it is not known here.
    pub fn named(&self, service: &ServiceName) -> Option<Named> {
        let (service, entry) = match self.entries.get_key_value(service) {
            Some(found) => found,
            None => {
                let same = |(other, _): &(&ServiceName, &Entry)| other.as_str().eq_ignore_ascii_case(service.as_str());
                self.entries.iter().find(same)?
            }
        };
        let policies = entry.labelled().map(|(label, address)| (label.to_owned(), address.into()));
        let own = sides(&entry.rows).map(|(row, side)| (format!("{INSTANCE}-{}", row.number), side.instance.into()));
        let addresses: Vec<(String, IpAddr)> = policies.chain(own).collect();
        (!addresses.is_empty()).then(|| Named { service: service.clone(), addresses })
    }

    /// Whose address this is, and the label of what it means: a policy, or an instance.
    pub fn name_of(&self, address: IpAddr) -> Option<(ServiceName, String)> {
        let address = Addr::from(address);
        if let Some(instance) = self.leased.get(&address) {
            return Some((instance.service.clone(), format!("{INSTANCE}-{}", instance.number)));
        }
        let service = self.semantics.winner(address)?;
        let (label, _) = self.named(service)?.addresses.into_iter().find(|(_, other)| Addr::from(*other) == address)?;
        Some((service.clone(), label))
    }

    /// The slots of the instances of one service, where one is asked for.
    pub fn slots(&self, choice: &Choice) -> Vec<u32> {
        let wanted = |service: &&ServiceName| choice.service.is_some() && choice.takes_service(Some(service));
        let placed = self.entries.iter().filter(|(service, _)| wanted(service));
        let leaving = self.leaving.all().filter(|(key, _)| wanted(&&key.instance.service)).map(|(_, left)| left.slot);
        placed.flat_map(|(_, entry)| entry.slots.values().copied()).chain(leaving).collect()
    }

    /// Services in the order of their names. `flows` are this node's, `tallies` those of [`Self::slots`].
    pub fn service_views(&self, choice: &Choice, flows: &[FlowRow], tallies: &[(u32, Tally)]) -> Page<ServiceView> {
        let tallies: HashMap<u32, Tally> = tallies.iter().copied().collect();
        let mut used: HashMap<&ServiceName, usize> = HashMap::new();
        for service in flows.iter().filter_map(|flow| self.semantics.winner(flow.service)) {
            *used.entry(service).or_default() += 1;
        }
        let chosen = self.entries.iter().filter(|(service, entry)| {
            let ids: Vec<InstanceId> = entry.instances(service).collect();
            let ids: Vec<Option<&InstanceId>> = ids.iter().map(Some).collect();
            choice.takes_service(Some(service)) && choice.takes_instance(&ids)
        });
        let mut page = Page { rows: Vec::new(), total: 0 };
        for (service, entry) in chosen {
            page.total += 1;
            if page.rows.len() < choice.limit {
                page.rows.push(self.service_view(service, entry, used.get(service).copied().unwrap_or(0), &tallies));
            }
        }
        page
    }

    pub fn peer_views(&self) -> Vec<PeerView> {
        let mut slots: HashMap<u32, usize> = HashMap::new();
        for (_, slot) in self.projection.live_slots() {
            *slots.entry(slot.peer).or_default() += 1;
        }
        let view = |(number, peer): (u32, &netmanager_common::abi::Peer)| PeerView {
            address: SocketAddr::new(peer.host.into(), u16::from_be_bytes(peer.port)),
            source: peer.source.into(),
            ours: is_ours(peer.flags),
            framing: framing(peer),
            mtu: Some(peer.mtu).filter(|mtu| *mtu != 0),
            rtt: self.figures.rtts.get(&number).copied(),
            slots: slots.get(&number).copied().unwrap_or(0),
        };
        self.peers().map(view).collect()
    }

    /// Names the flows: by client, then service.
    pub fn flow_views(&self, choice: &Choice, rows: Vec<FlowRow>) -> Page<FlowView> {
        let peers: BTreeMap<u32, Addr> = self.peers().map(|(number, peer)| (number, peer.host)).collect();
        let slots: HashMap<u32, Slot> = self.projection.live_slots().collect();
        let mut holders: HashMap<u32, InstanceId> = HashMap::new();
        for entry in self.entries.values() {
            holders.extend(entry.slots.iter().map(|(key, slot)| (*slot, key.instance.clone())));
        }
        let view = |row: FlowRow| {
            let slot = slots.get(&row.slot).filter(|slot| slot.generation == row.generation);
            let service = self.semantics.winner(row.service);
            FlowView {
                client: self.leased.get(&row.source).cloned(),
                policy: service.and_then(|name| self.entries.get(name)).map_or("", |entry| entry.label(row.service)),
                service: service.cloned(),
                chosen: slot.and_then(|_| holders.get(&row.slot).cloned()),
                node: slot.and_then(|slot| peers.get(&slot.peer)).map(|host| (*host).into()),
                row,
            }
        };
        let mut views: Vec<FlowView> = rows.into_iter().map(view).collect();
        views.retain(|flow| {
            choice.takes_service(flow.service.as_ref())
                && choice.takes_instance(&[flow.client.as_ref(), flow.chosen.as_ref()])
        });
        views.sort_by(|a, b| (&a.client, &a.service, a.row).cmp(&(&b.client, &b.service, b.row)));
        Page::cut(views, choice.limit)
    }

    fn service_view(
        &self,
        service: &ServiceName,
        entry: &Entry,
        flows: usize,
        tallies: &HashMap<u32, Tally>,
    ) -> ServiceView {
        let mut instances: BTreeMap<u32, InstanceView> = BTreeMap::new();
        for (row, side) in sides(&entry.rows) {
            let Some(peer) = self.admit(service, row, side) else { continue };
            let instance = instances.entry(row.number).or_insert_with(|| InstanceView {
                weight: row.weight,
                node: peer.map(|peer| peer.host.into()),
                ..InstanceView::new(row.number)
            });
            instance.namespace.push(side.namespace.into());
            instance.own.push(side.instance.into());
        }
        for (key, left) in self.leaving.of_service(service) {
            let instance = instances.entry(key.instance.number).or_insert_with(|| InstanceView {
                weight: TableRow::DEFAULT_WEIGHT,
                node: self.peers().find(|(number, _)| *number == left.peer).map(|(_, peer)| peer.host.into()),
                state: State::Draining(left.until.map(|until| until.saturating_sub(self.now))),
                ..InstanceView::new(key.instance.number)
            });
            instance.namespace.push(left.namespace.into());
            instance.own.push(left.instance.into());
        }
        let leaving = self.leaving.of_service(service).map(|(key, left)| (key, left.slot));
        let slots: Vec<_> = entry.slots.iter().map(|(key, slot)| (key, *slot)).chain(leaving).collect();
        let numbers: HashMap<u32, u32> = slots.iter().map(|(key, slot)| (*slot, key.instance.number)).collect();
        for (key, slot) in slots {
            if let Some(instance) = instances.get_mut(&key.instance.number) {
                self.describe(instance, slot, tallies.get(&slot));
            }
        }
        let address = |(policy, address)| AddressView {
            policy,
            address: IpAddr::from(address),
            candidates: shares(self.projection.list(address), &numbers),
        };
        ServiceView {
            service: service.clone(),
            addresses: entry.labelled().map(address).collect(),
            instances: instances.into_values().collect(),
            flows,
        }
    }
}

impl ServiceTable {
    /// Adds what is known of an instance's slot in one family.
    fn describe(&self, instance: &mut InstanceView, slot: u32, tally: Option<&Tally>) {
        instance.rtt = self.figures.rtts.get(&self.projection.peer_of(slot)).copied();
        if let Some(tally) = tally {
            let picks = instance.picks.get_or_insert_default();
            picks.chosen += tally.chosen;
            picks.answered += u64::from(tally.answers.answered);
            picks.refused += u64::from(tally.answers.refused);
        }
        match self.health.standing(slot) {
            _ if instance.state != State::Well => {}
            Standing::Well => {}
            Standing::PassedOver(fault, until) => {
                instance.state = State::PassedOver(fault.words(), Some(until.saturating_sub(self.now)));
            }
            Standing::Trial(fault) => instance.state = State::PassedOver(fault.words(), None),
        }
    }
}

impl InstanceView {
    fn new(number: u32) -> Self {
        Self {
            number,
            weight: TableRow::DEFAULT_WEIGHT,
            rtt: None,
            picks: None::<Picks>,
            state: State::Well,
            node: None,
            namespace: Vec::new(),
            own: Vec::new(),
        }
    }
}

/// How much of a list each instance has, in percent.
fn shares(list: &[u32], numbers: &HashMap<u32, u32>) -> Vec<(u32, f64)> {
    let mut counts: BTreeMap<u32, usize> = BTreeMap::new();
    for number in list.iter().filter_map(|slot| numbers.get(slot)) {
        *counts.entry(*number).or_default() += 1;
    }
    counts.into_iter().map(|(number, count)| (number, 100.0 * count as f64 / list.len() as f64)).collect()
}

impl Entry {
    /// The addresses that mean the service, each with the label of its policy; also while it has no instance.
    fn labelled(&self) -> impl Iterator<Item = (&'static str, Addr)> {
        let semantics = if self.semantics.is_empty() { &self.remembered } else { &self.semantics };
        semantics.iter().map(|(address, policy)| (policy.label(), *address))
    }

    fn label(&self, address: Addr) -> &'static str {
        self.policy(address).map_or(INSTANCE, Policy::label)
    }

    fn instances(&self, service: &ServiceName) -> impl Iterator<Item = InstanceId> {
        self.rows.iter().map(|row| InstanceId { service: service.clone(), number: row.number })
    }
}
