//! ICMP errors on their way: what an instance, the node itself or a peer has to say about a packet of a flow.

use netmanager_common::icmp;
use netmanager_common::verdict::{Miss, Verdict};

use super::carry::{Carrier, Origin, source};
use super::counters::Count;
use super::offload::Offload;
use super::projection::Projection;

impl<T: Projection> Carrier<T> {
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
