//! The table for people: see [`crate::netmanager::view`].

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};

use netmanager_common::abi::Slot;
use netmanager_common::addr::Addr;

use super::{Entry, ServiceTable, sides};
use crate::model::{InstanceId, Policy, ServiceName};
use crate::netmanager::datapath::FlowRow;
use crate::netmanager::view::{Choice, FlowView, InstanceView, Named, Page, PeerView, ServiceView, framing, is_ours};

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

    /// Services in the order of their names. `flows` are this node's.
    pub fn service_views(&self, choice: &Choice, flows: &[FlowRow]) -> Page<ServiceView> {
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
                page.rows.push(self.service_view(service, entry, used.get(service).copied().unwrap_or(0)));
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
            rtt: None,
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

    fn service_view(&self, service: &ServiceName, entry: &Entry, flows: usize) -> ServiceView {
        let mut instances: BTreeMap<u32, InstanceView> = BTreeMap::new();
        for (row, side) in sides(&entry.rows) {
            let Some(peer) = self.admit(service, row, side) else { continue };
            let instance = instances.entry(row.number).or_insert_with(|| InstanceView {
                number: row.number,
                node: peer.map(|peer| peer.host.into()),
                namespace: Vec::new(),
                own: Vec::new(),
            });
            instance.namespace.push(side.namespace.into());
            instance.own.push(side.instance.into());
        }
        ServiceView {
            service: service.clone(),
            addresses: entry.labelled().map(|(label, address)| (label, IpAddr::from(address))).collect(),
            instances: instances.into_values().collect(),
            flows,
        }
    }
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
