//! What the counters say, in sentences: what it means that a packet was counted, and what can be done where something should. Every
//! reason has its arm here; a new one does not compile without.

use netmanager_common::verdict::DropReason;

use super::counters::Count;

/// What kind of event is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A packet went its way.
    Carried,
    /// A packet was thrown away.
    Dropped,
    /// Something that was said to this node was not believed, or there was no room for it.
    Refused,
    /// A size, not a count of events.
    Level,
}

/// A counter in sentences.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Words {
    pub kind: Kind,
    pub meaning: &'static str,
    /// Empty where nothing is to be done.
    pub advice: &'static str,
}

/// What the counter of this name says; `None` for a name that nobody counts.
pub fn explain(name: &str) -> Option<Words> {
    let reason = DropReason::ALL.into_iter().find(|reason| reason.name() == name).map(reason);
    let count = || Count::ALL.into_iter().find(|count| count.name() == name).map(count);
    reason.or_else(count).or_else(|| other(name))
}

const fn carried(meaning: &'static str) -> Words {
    Words { kind: Kind::Carried, meaning, advice: "" }
}

const fn dropped(meaning: &'static str, advice: &'static str) -> Words {
    Words { kind: Kind::Dropped, meaning, advice }
}

const fn refused(meaning: &'static str, advice: &'static str) -> Words {
    Words { kind: Kind::Refused, meaning, advice }
}

fn reason(reason: DropReason) -> Words {
    match reason {
        DropReason::Malformed => dropped(
            "the packet was too short for its headers, or its lengths contradict each other",
            "look at who sends it: no sound network stack makes such packets",
        ),
        DropReason::Protocol => dropped(
            "a container sent a protocol that the overlay does not carry",
            "use TCP, UDP, echo requests or ICMP errors towards service addresses",
        ),
        DropReason::Spoofed => dropped(
            "a container used a source address that is not its own",
            "look into the container: its addresses are in `node-engine ps --local`",
        ),
        DropReason::NoInstance => dropped(
            "the service is known and has no instance in this address family, or the connection's instance has gone",
            "start one: `node-engine replicate NAME 1`; `node-engine net services` shows what there is",
        ),
        DropReason::NotOurs => dropped(
            "a node sent a packet for an instance that is not on this node",
            "it ends when that node has heard that the instance has moved; if it goes on, restart that node's daemon",
        ),
        DropReason::ForeignSource => dropped(
            "a node sent a packet in the name of an instance that is not on it",
            "if the sender is behind a NAT set network.relax_source; else somebody forges packets",
        ),
        DropReason::PeerProtocol => dropped(
            "the instance is on a node of the reference system, which takes only TCP and UDP, and ends at port 65535",
            "run node-engine on that node, or do without echo requests and that port",
        ),
        DropReason::TableFull => {
            dropped("a table of flows was full", "look for the client with very many flows in `node-engine net flows`")
        }
        DropReason::Tunnel => {
            dropped("the outer header could not be put on or taken off", "report it with the output of `uname -r`")
        }
        DropReason::NoFlow => dropped("an ICMP error was about a packet that nobody here has sent", ""),
    }
}

fn count(count: Count) -> Words {
    match count {
        Count::Sent => carried("carried to another node"),
        Count::Local => carried("carried between two instances of this node"),
        Count::Received => carried("delivered from another node"),
        Count::Held => carried("held until the cluster had said whose address it is"),
        Count::Joined => carried("put together of fragments, to be carried as one"),
        Count::Fragment => dropped(
            "a fragment whose others did not come, or that came from a node of the reference system, whose fragments are damaged",
            "a few are lost ones of a datagram; if there are many, let the application send smaller datagrams",
        ),
        Count::TooLong => dropped(
            "a packet longer than the path to its node takes; its sender was told how long it may be",
            "a few at the beginning of a connection are usual; `node-engine net peers` shows how wide the paths are",
        ),
        Count::Header => dropped("IPv6 extension headers that the overlay does not read", "do without them"),
        Count::NotService => dropped(
            "a packet came to the overlay's device and is for no service address",
            "a few are the host's own multicast; if there are many, look for a route of your own to the TUN device",
        ),
        Count::HeldFull => dropped(
            "too many packets waited for the cluster to say whose their address is",
            "if it goes on, look for a container that scans addresses",
        ),
        Count::Host => dropped(
            "the node itself called a service and no instance here could speak for it, or an answer came that it does not expect",
            "run an instance on this node: peers answer only to addresses that the cluster knows",
        ),
        Count::Expired => dropped(
            "the cluster did not say in time whose the address is",
            "see in `node-engine status` whether the cluster is connected",
        ),
        Count::GivenUp => dropped(
            "nobody in the cluster has this service address",
            "`node-engine net services` shows the addresses that are in use here",
        ),
        Count::Garbage => dropped(
            "something on the tunnel's port that is no packet of an overlay",
            "look for a foreign sender to the tunnel's UDP port",
        ),
        Count::Control => dropped("a greeting of another node that came faster than they are read", ""),
        Count::Send => dropped("the kernel did not take a packet to another node", "look at the uplink and its routes"),
        Count::Told => carried("answered for an instance that has gone: a reset, or an ICMP error"),
        Count::Write => dropped("the overlay's device did not take a packet", "look whether it is up: `ip link show`"),
    }
}

const LOOK_INSIDE: &str = "look into the containers of this node: no sound one does so";

/// What is counted elsewhere: in the kernel, and by those who keep the tables.
fn other(name: &str) -> Option<Words> {
    Some(match name {
        "drop_spoofed_mac" => dropped("a container sent a frame with a MAC that is not its own", LOOK_INSIDE),
        "drop_spoofed_arp" => dropped("a container spoke ARP in another's name", LOOK_INSIDE),
        "drop_spoofed_source" => dropped("a container sent from an address that is not its own", LOOK_INSIDE),
        "drop_spoofed_neighbour" => {
            dropped("a container posed as a router, or as the neighbour at another's address", LOOK_INSIDE)
        }
        "drop_foreign_frame" => dropped("a container sent what is neither ARP nor IP", LOOK_INSIDE),
        "drop_to_tunnel" => dropped("a container sent to the tunnel port of a node", LOOK_INSIDE),
        "drop_to_loopback" => dropped("a container sent to the loopback of its node", LOOK_INSIDE),
        "drop_outside_source" => {
            dropped("somebody outside sent from an address of the overlay", "look who is on the node's other networks")
        }
        "slow" => carried("left to user space by the kernel's programs"),
        "peers_ours" => Words { kind: Kind::Level, meaning: "nodes that run node-engine too", advice: "" },
        "table_full" => refused("a row of the service table found no room", "this node talks to too many services"),
        "table_refused_range" => refused(
            "an address that the cluster told lies where no such address may be",
            "compare network.service_v4 and network.service_v6 with those of the cluster",
        ),
        "table_refused_duplicate" => refused("the cluster told a number or an address twice in one answer", ""),
        "table_refused_stale" => refused(
            "the cluster said that an instance is here which is not, or not any more",
            "it ends with its next news",
        ),
        "table_unwanted_answers" => refused("the cluster told what nobody here has asked for", ""),
        "query_refused" => refused(
            "too many questions to the cluster were open at once",
            "look for a container that scans addresses or names",
        ),
        "report_lost" => refused(
            "a report to the cluster found no room in its queue",
            "see in `node-engine status` whether the cluster is connected",
        ),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::super::counters::{Counters, kernel_name};
    use super::*;

    #[test]
    fn every_counter_is_explained() {
        let user = Counters::default().read().into_iter().map(|(name, _)| name);
        let kernel = (0..netmanager_common::verdict::COUNTERS).filter_map(kernel_name).map(str::to_owned);
        let guard = crate::netmanager::link::counted().map(str::to_owned);
        for name in user.chain(kernel).chain(guard) {
            let words = explain(&name).unwrap_or_else(|| panic!("{name} is not explained"));
            assert_eq!(words.kind == Kind::Dropped, name.starts_with("drop_"), "{name}: {words:?}");
            assert!(!words.meaning.is_empty() && !words.meaning.ends_with('.'), "{name}: {words:?}");
        }
        assert_eq!(explain("no such counter"), None);
    }
}
