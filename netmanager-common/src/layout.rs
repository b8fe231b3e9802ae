//! How the rows of the pinned maps lie in memory: what a program with other rows needs to know to take them over, field by field.
//!
//! A field keeps its meaning for as long as it keeps its name. What means something else gets another name, and begins at zero.

use core::mem::offset_of;

use crate::abi::{Answers, CandidateKey, Config, Endpoint, Flow, FlowKey, Peer, Service, Slot};
use crate::addr::Addr;

/// Some bytes of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    pub name: &'static str,
    pub offset: usize,
    pub size: usize,
}

/// A key or a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    pub size: usize,
    pub fields: &'static [Field],
}

/// A map by its name in the object. The key of an array is its index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    pub name: &'static str,
    pub key: Row,
    pub value: Row,
}

/// Every map that a program with other rows takes over. Not here is what is found out anew at once, and what only counts packets.
pub const TABLES: &[Table] = &[
    Table { name: "CONFIG", key: INDEX, value: CONFIG },
    Table { name: "PEERS", key: INDEX, value: PEER },
    Table { name: "HOSTS", key: ADDRESS, value: NUMBER },
    Table { name: "SLOTS", key: INDEX, value: SLOT },
    Table { name: "ENDPOINTS", key: ADDRESS, value: ENDPOINT },
    Table { name: "CANDIDATES", key: CANDIDATE, value: NUMBER },
    Table { name: "TRIALS", key: INDEX, value: NUMBER },
    Table { name: SERVICES, key: ADDRESS, value: SERVICE },
    Table { name: "TURNS", key: INDEX, value: NUMBER },
    Table { name: "CHOSEN", key: INDEX, value: LONG },
    Table { name: "ANSWERS", key: INDEX, value: ANSWERS },
    Table { name: "OPENED", key: INDEX, value: LONG },
    Table { name: "ALLOWED", key: INDEX, value: LONG },
    Table { name: FLOWS, key: FLOW_KEY, value: FLOW },
];

/// The map that fills while the others are copied.
pub const FLOWS: &str = "FLOWS";
/// The map without which a program opens no flows.
pub const SERVICES: &str = "SERVICES";

macro_rules! row {
    ($type:ident { $($field:ident),* $(,)? }) => {{
        const FIELDS: &[Field] = &[$(Field {
            name: stringify!($field),
            offset: offset_of!($type, $field),
            size: size_of_field(|row: &$type| &row.$field),
        }),*];
        const _: () = assert!(sum(FIELDS) == size_of::<$type>(), concat!("a field of ", stringify!($type), " is not named"));
        Row { size: size_of::<$type>(), fields: FIELDS }
    }};
}

const INDEX: Row = Row { size: 4, fields: &[Field { name: "index", offset: 0, size: 4 }] };
const NUMBER: Row = Row { size: 4, fields: &[Field { name: "number", offset: 0, size: 4 }] };
const LONG: Row = Row { size: 8, fields: &[Field { name: "number", offset: 0, size: 8 }] };
const ADDRESS: Row =
    Row { size: size_of::<Addr>(), fields: &[Field { name: "address", offset: 0, size: size_of::<Addr>() }] };
const CONFIG: Row = row!(Config {
    service_v4,
    service_v4_mask,
    service_v6,
    service_v6_mask,
    node,
    gateway_mac,
    tunnel_port,
    framed_port,
    _pad,
    slow_ifindex,
    flags,
    epoch,
});
const PEER: Row = row!(Peer { host, source, ifindex, port, framed_port, flags, mtu });
#[cfg(not(feature = "other-layout"))]
const SLOT: Row = row!(Slot { generation, peer, namespace, instance });
#[cfg(feature = "other-layout")]
const SLOT: Row = row!(Slot { spare, generation, peer, namespace, instance });
const ENDPOINT: Row = row!(Endpoint { instance, ifindex, mac, account });
const CANDIDATE: Row = row!(CandidateKey { service, epoch, index });
const SERVICE: Row = row!(Service { id, epoch, count, policy, first });
const ANSWERS: Row = row!(Answers { asked, answered, refused });
const FLOW_KEY: Row = row!(FlowKey { source, destination, source_port, destination_port, protocol });
#[cfg(not(feature = "other-layout"))]
const FLOW: Row =
    row!(Flow { slot, generation, epoch, port, ifindex, mac, account, source, seen, kind, state, server });

#[cfg(feature = "other-layout")]
const FLOW: Row =
    row!(Flow { spare, slot, generation, epoch, port, ifindex, mac, account, source, seen, kind, state, server });

const fn size_of_field<T, F>(_: fn(&T) -> &F) -> usize {
    size_of::<F>()
}

const fn sum(fields: &[Field]) -> usize {
    let (mut sum, mut index) = (0, 0);
    while index < fields.len() {
        sum += fields[index].size;
        index += 1;
    }
    sum
}
