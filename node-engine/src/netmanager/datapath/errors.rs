//! ICMP errors on their way: what an instance, the node itself or a peer has to say about a packet of a flow.

use netmanager_common::icmp::{self, Cause};
use netmanager_common::pipeline::LEAST_V6;
use netmanager_common::verdict::{Miss, Verdict};

use super::carry::{Carrier, Origin, source};
use super::counters::Count;
use super::host;
use super::offload::Offload;
use super::projection::Projection;

impl<T: Projection> Carrier<T> {
    /// Tells the sender on this node that its packet is too long for the path to the instance that it is for.
    pub(super) fn refuse_long(&mut self, packet: &[u8], origin: Origin) {
        self.counters.add(Count::TooLong, 1);
        let Some(mtu) = self.path_mtu(packet) else { return };
        let mut buffer = [0; icmp::MAX_LEN];
        let Some(error) = icmp::answer(packet, Cause::TooBig(mtu), &mut buffer) else { return };
        let mut error = error.to_vec();
        // The node has sent it in an instance's name.
        if matches!(origin, Origin::Host) && self.host.give_back_error(&mut error).is_none() {
            return self.counters.add(Count::Host, 1);
        }
        if !self.write(&error, &Offload::default()) {
            self.counters.add(Count::Write, 1);
        }
    }

    /// The longest packet on the way that the packet's flow has taken.
    fn path_mtu(&mut self, packet: &[u8]) -> Option<u16> {
        let (key, _) = host::key(packet)?;
        let slot = match self.tables.flow(&key) {
            Some(flow) => flow.slot,
            // Nothing had to be remembered of it.
            None => self.tables.service(&key.destination)?.first,
        };
        let peer = self.tables.slot(slot)?.peer;
        let mtu = self.tables.peer(peer)?.mtu as usize;
        // No IPv6 sender must be told less: what is shorter than that the proxy sends in several.
        u16::try_from(if key.source.is_v4() { mtu } else { mtu.max(LEAST_V6) }).ok()
    }

    pub(super) fn carry_error(&mut self, packet: &mut [u8], origin: Origin) {
        let verdict = match origin {
            Origin::Node(outer) => icmp::inbound(packet, &mut self.tables, &outer),
            Origin::Instance => icmp::outbound(packet, &mut self.tables, false),
            Origin::Host => {
                let about = icmp::Message::read(packet).map(|error| error.about.destination);
                if about.is_ok_and(|own| self.host.is_own(&own)) && self.host.lend_error(packet).is_none() {
                    return self.counters.add(Count::Host, 1);
                }
                icmp::outbound(packet, &mut self.tables, true)
            }
        };
        match verdict {
            Ok(Verdict::Send { peer }) => self.send_alone(packet, peer, &Offload::default()),
            Ok(Verdict::Local { .. }) => self.deliver(packet, origin, &Offload::default()),
            Ok(Verdict::Slow(Miss::Host)) => match self.host.give_back_error(packet) {
                Some(()) => self.deliver(packet, origin, &Offload::default()),
                None => self.counters.add(Count::Host, 1),
            },
            // The sender, who is not known yet; the law of errors lacks nothing else.
            Ok(Verdict::Slow(_)) => self.hold(source(packet), packet, origin, Offload::default()),
            Ok(Verdict::Pass) => self.counters.add(Count::NotService, 1),
            Err(reason) => self.counters.dropped(reason),
        }
    }
}
