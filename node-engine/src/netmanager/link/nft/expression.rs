//! The expressions our rules are made of: a rule is a list of them, each loads a register, compares one, or acts.
//! Numbers are from the kernel's `linux/netfilter/nf_tables.h`.

use std::net::IpAddr;

use super::attribute::Writer;

/// The first two data registers, sixteen bytes each.
const REG_1: u32 = 1;
const REG_2: u32 = 2;
const REG_VERDICT: u32 = 0;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) enum Expression {
    /// The interface the packet came by is this one.
    In(String),
    /// It is another one.
    NotIn(String),
    /// The interface the packet leaves by is (not) this one.
    Out {
        name: String,
        equal: bool,
    },
    /// The transport protocol is this one.
    Protocol(u8),
    /// The transport's destination port is this one.
    DestinationPort(u16),
    /// The address is inside (or outside) this network.
    Source {
        network: IpAddr,
        prefix: u8,
    },
    NotDestination {
        network: IpAddr,
        prefix: u8,
    },
    /// The destination is an address of this host.
    DestinationIsLocal,
    Destination {
        network: IpAddr,
        prefix: u8,
    },
    /// What the device says the frame carries, by its Ethernet type.
    Carries(u16),
    /// These bytes of a header are (or are not) so.
    Field {
        header: Header,
        offset: u32,
        value: Vec<u8>,
        equal: bool,
    },
    /// Its connection began with a packet in this direction.
    FromOriginator,
    /// Published ports have changed the destination of this connection.
    WasTranslated,
    Counter,
    Masquerade,
    /// The destination becomes this address and port.
    TranslateTo(IpAddr, u16),
    /// The destination becomes this address; the port stays.
    TranslateToAddress(IpAddr),
    Accept,
    Drop,
    Jump(String),
    Goto(String),
}

/// Whose bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Header {
    Link = 0,
    Network = 1,
    Transport = 2,
}

#[derive(Clone, Copy)]
enum Compare {
    Equal = 0,
    NotEqual = 1,
}

impl Expression {
    /// Appends the elements of a rule's expression list that this one is made of.
    pub(super) fn write(&self, list: &mut Writer) {
        match self {
            Self::In(name) => interface(list, META_IIFNAME, name, Compare::Equal),
            Self::NotIn(name) => interface(list, META_IIFNAME, name, Compare::NotEqual),
            Self::Out { name, equal: true } => interface(list, META_OIFNAME, name, Compare::Equal),
            Self::Out { name, equal: false } => interface(list, META_OIFNAME, name, Compare::NotEqual),
            Self::Protocol(protocol) => {
                meta(list, META_L4PROTO);
                compare(list, Compare::Equal, &[*protocol]);
            }
            Self::DestinationPort(port) => {
                payload(list, BASE_TRANSPORT, 2, 2);
                compare(list, Compare::Equal, &port.to_be_bytes());
            }
            Self::Source { network, prefix } => {
                let offset = if network.is_ipv4() { 12 } else { 8 };
                inside(list, offset, *network, *prefix, Compare::Equal);
            }
            Self::NotDestination { network, prefix } => {
                let offset = if network.is_ipv4() { 16 } else { 24 };
                inside(list, offset, *network, *prefix, Compare::NotEqual);
            }
            Self::Destination { network, prefix } => {
                let offset = if network.is_ipv4() { 16 } else { 24 };
                inside(list, offset, *network, *prefix, Compare::Equal);
            }
            Self::Carries(kind) => {
                meta(list, META_PROTOCOL);
                compare(list, Compare::Equal, &kind.to_be_bytes());
            }
            Self::Field { header, offset, value, equal } => {
                payload(list, *header as u32, *offset, u32::try_from(value.len()).expect("a field of a header"));
                compare(list, if *equal { Compare::Equal } else { Compare::NotEqual }, value);
            }
            Self::FromOriginator => {
                element(list, "ct", |data| {
                    data.be32(1, REG_1);
                    data.be32(2, CT_DIRECTION);
                });
                compare(list, Compare::Equal, &[CT_ORIGINAL]);
            }
            Self::DestinationIsLocal => {
                element(list, "fib", |data| {
                    data.be32(1, REG_1);
                    data.be32(2, FIB_RESULT_ADDRTYPE);
                    data.be32(3, FIB_DESTINATION);
                });
                compare(list, Compare::Equal, &RTN_LOCAL.to_ne_bytes());
            }
            Self::WasTranslated => {
                element(list, "ct", |data| {
                    data.be32(1, REG_1);
                    data.be32(2, CT_STATUS);
                });
                mask(list, &IPS_DST_NAT.to_ne_bytes());
                compare(list, Compare::NotEqual, &0_u32.to_ne_bytes());
            }
            Self::Counter => element(list, "counter", |_| {}),
            Self::Masquerade => element(list, "masq", |_| {}),
            Self::TranslateTo(address, port) => {
                load_address(list, *address);
                immediate(list, REG_2, &port.to_be_bytes());
                element(list, "nat", |data| {
                    data.be32(1, NAT_DESTINATION);
                    data.be32(2, if address.is_ipv4() { NFPROTO_IPV4 } else { NFPROTO_IPV6 });
                    data.be32(3, REG_1);
                    data.be32(5, REG_2);
                    data.be32(7, NAT_PORT_GIVEN);
                });
            }
            Self::TranslateToAddress(address) => {
                load_address(list, *address);
                element(list, "nat", |data| {
                    data.be32(1, NAT_DESTINATION);
                    data.be32(2, if address.is_ipv4() { NFPROTO_IPV4 } else { NFPROTO_IPV6 });
                    data.be32(3, REG_1);
                });
            }
            Self::Accept => verdict(list, NF_ACCEPT, None),
            Self::Drop => verdict(list, NF_DROP, None),
            Self::Jump(chain) => verdict(list, NFT_JUMP, Some(chain)),
            Self::Goto(chain) => verdict(list, NFT_GOTO, Some(chain)),
        }
    }
}

const META_PROTOCOL: u32 = 1;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_L4PROTO: u32 = 16;
const BASE_NETWORK: u32 = 1;
const BASE_TRANSPORT: u32 = 2;
const FIB_RESULT_ADDRTYPE: u32 = 3;
const FIB_DESTINATION: u32 = 2;
/// An address of the host's own, in the order the machine keeps it in the register.
const RTN_LOCAL: u32 = 2;
const CT_DIRECTION: u32 = 1;
const CT_ORIGINAL: u8 = 0;
const CT_STATUS: u32 = 2;
const IPS_DST_NAT: u32 = 1 << 5;
const NAT_DESTINATION: u32 = 1;
const NAT_PORT_GIVEN: u32 = 2;
const NFPROTO_IPV4: u32 = 2;
const NFPROTO_IPV6: u32 = 10;
const NF_DROP: i32 = 0;
const NF_ACCEPT: i32 = 1;
const NFT_JUMP: i32 = -3;
const NFT_GOTO: i32 = -4;

/// Interface names fill the whole register.
const IFNAMSIZ: usize = 16;

fn element(list: &mut Writer, name: &str, data: impl FnOnce(&mut Writer)) {
    list.nest(1, |element| {
        element.text(1, name);
        element.nest(2, data);
    });
}

fn meta(list: &mut Writer, key: u32) {
    element(list, "meta", |data| {
        data.be32(2, key);
        data.be32(1, REG_1);
    });
}

fn interface(list: &mut Writer, key: u32, name: &str, how: Compare) {
    let mut padded = [0; IFNAMSIZ];
    for (to, from) in padded.iter_mut().zip(name.bytes().take(IFNAMSIZ - 1)) {
        *to = from;
    }
    meta(list, key);
    compare(list, how, &padded);
}

fn payload(list: &mut Writer, base: u32, offset: u32, length: u32) {
    element(list, "payload", |data| {
        data.be32(1, REG_1);
        data.be32(2, base);
        data.be32(3, offset);
        data.be32(4, length);
    });
}

/// Compares the leading `prefix` bits of the address at this offset of the network header.
fn inside(list: &mut Writer, offset: u32, network: IpAddr, prefix: u8, how: Compare) {
    let (address, length) = match network {
        IpAddr::V4(v4) => (v4.octets().to_vec(), 4),
        IpAddr::V6(v6) => (v6.octets().to_vec(), 16),
    };
    let bits: Vec<u8> = (0_u32..).step_by(8).zip(&address).map(|(at, _)| leading_bits(u32::from(prefix), at)).collect();
    let network: Vec<u8> = address.iter().zip(&bits).map(|(byte, bits)| byte & bits).collect();
    payload(list, BASE_NETWORK, offset, length);
    mask(list, &bits);
    compare(list, how, &network);
}

/// The mask's byte that begins at bit `at`.
fn leading_bits(prefix: u32, at: u32) -> u8 {
    match prefix.saturating_sub(at).min(8) {
        0 => 0,
        bits => 0xff << (8 - bits),
    }
}

fn mask(list: &mut Writer, bits: &[u8]) {
    element(list, "bitwise", |data| {
        data.be32(1, REG_1);
        data.be32(2, REG_1);
        data.be32(3, u32::try_from(bits.len()).expect("at most sixteen bytes"));
        data.nest(4, |mask| mask.put(DATA_VALUE, bits));
        data.nest(5, |xor| xor.put(DATA_VALUE, &vec![0; bits.len()]));
    });
}

fn compare(list: &mut Writer, how: Compare, value: &[u8]) {
    element(list, "cmp", |data| {
        data.be32(1, REG_1);
        data.be32(2, how as u32);
        data.nest(3, |nested| nested.put(DATA_VALUE, value));
    });
}

fn immediate(list: &mut Writer, register: u32, value: &[u8]) {
    element(list, "immediate", |data| {
        data.be32(1, register);
        data.nest(2, |nested| nested.put(DATA_VALUE, value));
    });
}

fn load_address(list: &mut Writer, address: IpAddr) {
    match address {
        IpAddr::V4(v4) => immediate(list, REG_1, &v4.octets()),
        IpAddr::V6(v6) => immediate(list, REG_1, &v6.octets()),
    }
}

fn verdict(list: &mut Writer, code: i32, chain: Option<&str>) {
    element(list, "immediate", |data| {
        data.be32(1, REG_VERDICT);
        data.nest(2, |nested| {
            nested.nest(DATA_VERDICT, |verdict| {
                verdict.put(1, &code.to_be_bytes());
                if let Some(chain) = chain {
                    verdict.text(2, chain);
                }
            });
        });
    });
}

const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_have_the_leading_bits_of_a_prefix() {
        let mask = |prefix, bytes: u32| (0..bytes).map(|byte| leading_bits(prefix, byte * 8)).collect::<Vec<_>>();
        assert_eq!(mask(26, 4), [0xff, 0xff, 0xff, 0xc0]);
        assert_eq!(mask(0, 4), [0, 0, 0, 0]);
        assert_eq!(mask(32, 4), [0xff; 4]);
        assert_eq!(mask(9, 4), [0xff, 0x80, 0, 0]);
    }
}
