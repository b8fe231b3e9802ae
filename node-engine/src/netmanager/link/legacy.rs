//! The older iptables, which nf_tables does not show: whether its filter drops what we forward. Its tables can only be replaced as a
//! whole, under the feet of whoever else edits them, so we look and tell, and change nothing.
//!
//! A table is one block of entries: an IP match with interface names, then matches, then a target. The block's header says where
//! each built-in chain ends; the entry there is its policy (`linux/netfilter_ipv4/ip_tables.h`, `…_ipv6/ip6_tables.h`).

use std::fs;
use std::os::fd::{AsFd, AsRawFd};

use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

/// What a family's legacy `FORWARD` chain does to traffic that no rule of it names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Forward {
    /// The program that edits it.
    program: &'static str,
    drops_by_default: bool,
    /// Interface names of rules that accept: coming from, and going to.
    accepts_from: Vec<String>,
    accepts_to: Vec<String>,
}

/// One per family whose legacy filter table is in use. What cannot be read counts as not there: nothing is decided by it.
pub(super) fn dropping() -> Vec<Forward> {
    [IPV4, IPV6].iter().filter_map(|layout| read(layout).filter(|forward| forward.drops_by_default)).collect()
}

/// Names the commands that open the way, as long as one is missing.
pub(super) fn warnings(chains: &[Forward], interfaces: &[String]) -> Vec<String> {
    let mut warnings = Vec::new();
    for chain in chains {
        let mut missing = Vec::new();
        for name in interfaces {
            for (option, accepted) in [("-i", &chain.accepts_from), ("-o", &chain.accepts_to)] {
                if !accepted.contains(name) {
                    missing.push(format!("{} -I FORWARD {option} {name} -j ACCEPT", chain.program));
                }
            }
        }
        if !missing.is_empty() {
            warnings.push(format!(
                "the legacy iptables drop forwarded traffic by default, so instances reach nobody; open the way with: {}",
                missing.join("; ")
            ));
        }
    }
    warnings
}

/// Where things are in a family's structures.
struct Layout {
    program: &'static str,
    names: &'static str,
    domain: AddressFamily,
    level: libc::c_int,
    /// In an entry: the name of the incoming interface; the outgoing one's follows.
    interface: usize,
    /// In an entry: the offsets of its target and of the next entry.
    offsets: usize,
}

const IPV4: Layout = Layout {
    program: "iptables-legacy",
    names: "/proc/thread-self/net/ip_tables_names",
    domain: AddressFamily::Inet,
    level: libc::IPPROTO_IP,
    interface: 16,
    offsets: 88,
};

const IPV6: Layout = Layout {
    program: "ip6tables-legacy",
    names: "/proc/thread-self/net/ip6_tables_names",
    domain: AddressFamily::Inet6,
    level: libc::IPPROTO_IPV6,
    interface: 64,
    offsets: 140,
};

const GET_INFO: libc::c_int = 64;
const GET_ENTRIES: libc::c_int = 65;
const TABLE: &[u8] = b"filter";
const NAME_LENGTH: usize = 32;
/// Name, valid hooks, five entry points, five policies, number of entries, their size.
const INFO_LENGTH: usize = 84;
const FORWARD: usize = 2;
/// Of the block in the answer to `GET_ENTRIES`: its alignment is that of a 64-bit counter.
const ENTRIES: usize = if cfg!(target_arch = "x86") { 36 } else { 40 };
const INTERFACE_LENGTH: usize = 16;
/// In a target: size, name, revision; then the standard target's verdict.
const TARGET_NAME: usize = 2;
const VERDICT: usize = 32;
const ACCEPT: i32 = -2;
const DROP: i32 = -1;

fn read(layout: &Layout) -> Option<Forward> {
    // Asking for a table that is not in use would load it.
    let names = fs::read_to_string(layout.names).ok()?;
    if !names.lines().any(|name| name.as_bytes() == TABLE) {
        return None;
    }
    // The kernel answers these on raw sockets alone.
    let socket = socket(layout.domain, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw).ok()?;
    let mut info = vec![0; INFO_LENGTH];
    info[..TABLE.len()].copy_from_slice(TABLE);
    get(&socket, layout.level, GET_INFO, &mut info)?;
    let policy_at = number(&info, NAME_LENGTH + 4 + 20 + FORWARD * 4)?;
    let size = number(&info, INFO_LENGTH - 4)?;

    let mut answer = vec![0; ENTRIES + size];
    answer[..TABLE.len()].copy_from_slice(TABLE);
    answer[NAME_LENGTH..NAME_LENGTH + 4].copy_from_slice(&u32::try_from(size).ok()?.to_ne_bytes());
    get(&socket, layout.level, GET_ENTRIES, &mut answer)?;
    parse(layout, answer.get(ENTRIES..)?, policy_at)
}

fn parse(layout: &Layout, entries: &[u8], policy_at: usize) -> Option<Forward> {
    let mut forward = Forward { program: layout.program, ..Forward::default() };
    let mut at = 0;
    while let Some(entry) = entries.get(at..).filter(|rest| !rest.is_empty()) {
        let target = entry.get(half(entry, layout.offsets)?..)?;
        let verdict = verdict(target);
        if at == policy_at {
            forward.drops_by_default = verdict == Some(DROP);
        }
        if verdict == Some(ACCEPT) {
            forward.accepts_from.extend(name(entry, layout.interface));
            forward.accepts_to.extend(name(entry, layout.interface + INTERFACE_LENGTH));
        }
        // An entry is longer than nothing, or there would be no end.
        at += half(entry, layout.offsets + 2).filter(|length| *length > 0)?;
    }
    Some(forward)
}

/// Of a standard target, whose name is empty.
fn verdict(target: &[u8]) -> Option<i32> {
    if *target.get(TARGET_NAME)? != 0 {
        return None;
    }
    Some(i32::from_ne_bytes(target.get(VERDICT..VERDICT + 4)?.try_into().ok()?))
}

fn name(entry: &[u8], at: usize) -> Option<String> {
    let bytes = entry.get(at..at + INTERFACE_LENGTH)?;
    let text: Vec<u8> = bytes.iter().copied().take_while(|byte| *byte != 0).collect();
    String::from_utf8(text).ok().filter(|name| !name.is_empty())
}

fn half(bytes: &[u8], at: usize) -> Option<usize> {
    Some(usize::from(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?)))
}

fn number(bytes: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?)).ok()
}

/// Sends the buffer as the question and fills it with the answer.
fn get(socket: &impl AsFd, level: libc::c_int, option: libc::c_int, buffer: &mut [u8]) -> Option<()> {
    let mut length = libc::socklen_t::try_from(buffer.len()).ok()?;
    // SAFETY: the kernel reads and writes at most `length` bytes at the pointer, which is the exclusively borrowed buffer's length.
    let result = unsafe {
        libc::getsockopt(socket.as_fd().as_raw_fd(), level, option, buffer.as_mut_ptr().cast(), &raw mut length)
    };
    (result == 0).then_some(())
}

/// A block of entries of either family, for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn understand(bytes: &[u8]) {
    for layout in [&IPV4, &IPV6] {
        for policy_at in [0, 152] {
            let _ = parse(layout, bytes, policy_at);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An entry without matches and with a standard target.
    fn entry(interface: &str, verdict: i32) -> Vec<u8> {
        let mut entry = vec![0; 112];
        entry[16..16 + interface.len()].copy_from_slice(interface.as_bytes());
        entry[88..90].copy_from_slice(&112_u16.to_ne_bytes());
        entry[90..92].copy_from_slice(&152_u16.to_ne_bytes());
        entry.extend([0; 40]);
        entry[112 + VERDICT..112 + VERDICT + 4].copy_from_slice(&verdict.to_ne_bytes());
        entry
    }

    #[test]
    fn the_policy_is_the_entry_that_the_header_points_at() {
        let block = [entry("edge-bridge", ACCEPT), entry("other", DROP), entry("", DROP), entry("", ACCEPT)].concat();
        let forward = parse(&IPV4, &block, 304).unwrap();
        assert!(forward.drops_by_default);
        assert_eq!((forward.accepts_from, forward.accepts_to), (vec!["edge-bridge".to_owned()], vec![]));
        assert!(!parse(&IPV4, &block, 456).unwrap().drops_by_default);
    }

    #[test]
    fn a_broken_block_is_no_answer() {
        for cut in 1..112 {
            assert_eq!(parse(&IPV4, &entry("a", DROP)[..cut], 0), None, "{cut}");
        }
        for cut in 112..148 {
            let without_verdict = parse(&IPV4, &entry("a", DROP)[..cut], 0);
            assert!(without_verdict.is_none_or(|forward| !forward.drops_by_default), "{cut}");
        }
        assert_eq!(parse(&IPV4, &[0; 200], 0), None, "an entry of no length");
    }

    #[test]
    fn a_warning_names_the_commands_that_are_missing() {
        let interfaces = ["edge-bridge".to_owned()];
        let mut chain = Forward { program: "iptables-legacy", drops_by_default: true, ..Forward::default() };
        chain.accepts_from.push("edge-bridge".into());
        let told = warnings(std::slice::from_ref(&chain), &interfaces);
        assert!(told[0].ends_with("with: iptables-legacy -I FORWARD -o edge-bridge -j ACCEPT"), "{told:?}");
        chain.accepts_to.push("edge-bridge".into());
        assert!(warnings(&[chain], &interfaces).is_empty());
    }
}
