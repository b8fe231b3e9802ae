//! nf_tables by netlink: just enough to keep a table of our own and a few marked rules in the tables of others (ADR 3).
//!
//! A [`Batch`] is one transaction: the kernel takes all of it or nothing. Rules carry a comment, by which we know them again; what
//! is in the way of others is read as chains and rule comments only, never interpreted.

mod attribute;
mod expression;
mod socket;
mod watch;

use std::io;

use nix::errno::Errno;

use super::journal::Family;
use attribute::{Writer, as_be32, as_be64, as_text, find};
use socket::{Answer, dump, open, receive};

pub(super) use expression::{Expression, Header};
pub(super) use watch::Watch;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) use attribute::understand;

/// What a base chain hangs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hook {
    Prerouting = 0,
    Forward = 2,
    Output = 3,
    Postrouting = 4,
}

/// A chain of the kernel's, as far as we care.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ChainState {
    /// As `nft` numbers them: 1 inet, 2 ip, 10 ip6.
    pub(super) family: u8,
    pub(super) table: String,
    pub(super) name: String,
    pub(super) hook: Option<u32>,
    pub(super) drops_by_default: bool,
}

/// A rule of the kernel's, as far as we care.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct RuleState {
    pub(super) chain: String,
    pub(super) handle: u64,
    pub(super) comment: Option<String>,
    /// What its first counter has counted.
    pub(super) packets: Option<u64>,
}

/// Where a new rule goes in its chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    First,
    Last,
}

impl Family {
    pub(super) fn number(self) -> u8 {
        match self {
            Self::V4 => 2,
            Self::V6 => 10,
            Self::Device => 5,
        }
    }
}

/// One transaction.
#[derive(Debug)]
pub(super) struct Batch {
    bytes: Vec<u8>,
    /// What each message is about, by sequence number from 1, for the error.
    steps: Vec<String>,
}

impl Batch {
    pub(super) fn new() -> Self {
        let mut batch = Self { bytes: Vec::new(), steps: Vec::new() };
        batch.message(BATCH_BEGIN, 0, 0, SUBSYSTEM, |_| {});
        batch
    }

    pub(super) fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }

    /// Makes the table unless it exists.
    pub(super) fn table(&mut self, family: Family, table: &str) {
        self.step(format!("table {family} {table}"));
        self.change(NEW_TABLE, CREATE, family, |message| {
            message.text(1, table);
            message.be32(2, 0);
        });
    }

    pub(super) fn delete_table(&mut self, family: Family, table: &str) {
        self.step(format!("delete table {family} {table}"));
        self.change(DEL_TABLE, 0, family, |message| message.text(1, table));
    }

    /// Makes a plain chain unless it exists.
    pub(super) fn chain(&mut self, family: Family, table: &str, chain: &str) {
        self.step(format!("chain {family} {table} {chain}"));
        self.change(NEW_CHAIN, CREATE, family, |message| {
            message.text(1, table);
            message.text(3, chain);
        });
    }

    /// Makes a chain of type `nat` at this hook unless it exists.
    pub(super) fn nat_chain(&mut self, family: Family, table: &str, chain: &str, hook: Hook, priority: i32) {
        self.base_chain(family, table, chain, "nat", hook as u32, priority, None);
    }

    /// Makes a chain of type `filter` at this hook unless it exists.
    pub(super) fn filter_chain(&mut self, family: Family, table: &str, chain: &str, hook: Hook, priority: i32) {
        self.base_chain(family, table, chain, "filter", hook as u32, priority, None);
    }

    /// Makes a chain that sees first what comes in by this device, unless it exists.
    pub(super) fn device_chain(&mut self, table: &str, chain: &str, device: &str) {
        self.base_chain(Family::Device, table, chain, "filter", INGRESS, 0, Some(device));
    }

    #[expect(clippy::too_many_arguments, reason = "the attributes of one message")]
    fn base_chain(
        &mut self,
        family: Family,
        table: &str,
        chain: &str,
        kind: &str,
        hook: u32,
        priority: i32,
        device: Option<&str>,
    ) {
        self.step(format!("chain {family} {table} {chain}"));
        self.change(NEW_CHAIN, CREATE, family, |message| {
            message.text(1, table);
            message.text(3, chain);
            message.nest(4, |nested| {
                nested.be32(1, hook);
                nested.put(2, &priority.to_be_bytes());
                if let Some(device) = device {
                    nested.text(3, device);
                }
            });
            message.be32(5, NF_ACCEPT);
            message.text(7, kind);
        });
    }

    /// Removes a chain that nobody jumps to, and its rules.
    pub(super) fn delete_chain(&mut self, family: Family, table: &str, chain: &str) {
        self.step(format!("delete chain {family} {table} {chain}"));
        self.change(DEL_CHAIN, 0, family, |message| {
            message.text(1, table);
            message.text(3, chain);
        });
    }

    /// Removes all rules of the chain.
    pub(super) fn flush(&mut self, family: Family, table: &str, chain: &str) {
        self.step(format!("flush chain {family} {table} {chain}"));
        self.change(DEL_RULE, 0, family, |message| {
            message.text(1, table);
            message.text(2, chain);
        });
    }

    pub(super) fn delete_rule(&mut self, family: Family, table: &str, chain: &str, handle: u64) {
        self.step(format!("delete rule {handle} of {family} {table} {chain}"));
        self.change(DEL_RULE, 0, family, |message| {
            message.text(1, table);
            message.text(2, chain);
            message.be64(3, handle);
        });
    }

    pub(super) fn rule(
        &mut self,
        family: Family,
        table: &str,
        chain: &str,
        place: Place,
        comment: &str,
        expressions: &[Expression],
    ) {
        self.step(format!("rule \"{comment}\" in {family} {table} {chain}"));
        let flags = match place {
            Place::First => CREATE,
            Place::Last => CREATE | APPEND,
        };
        self.change(NEW_RULE, flags, family, |message| {
            message.text(1, table);
            message.text(2, chain);
            message.nest(4, |list| expressions.iter().for_each(|expression| expression.write(list)));
            message.put(7, &user_data(comment));
        });
    }

    /// The transaction's bytes, with an answer asked for its last step.
    fn finish(mut self) -> (Vec<u8>, Vec<String>) {
        self.message(BATCH_END, 0, 0, SUBSYSTEM, |_| {});
        (self.bytes, self.steps)
    }

    fn step(&mut self, what: String) {
        self.steps.push(what);
    }

    fn change(&mut self, kind: u16, flags: u16, family: Family, inside: impl FnOnce(&mut Writer)) {
        self.message(SUBSYSTEM << 8 | kind, flags | ACK, family.number(), 0, inside);
    }

    fn message(&mut self, kind: u16, flags: u16, family: u8, resource: u16, inside: impl FnOnce(&mut Writer)) {
        let sequence = u32::try_from(self.steps.len()).expect("far fewer steps");
        self.bytes.extend(message(kind, flags, sequence, family, resource, inside));
    }

    /// Commits the transaction in the calling thread's namespace: all of it, or an error that names the step in the way.
    pub(super) fn commit(self) -> Result<(), Refused> {
        let (bytes, steps) = self.finish();
        let refused = |step: &str, errno| Refused { step: step.to_owned(), errno };
        let failed = |error: io::Error| refused("commit", Errno::from_raw(error.raw_os_error().unwrap_or(0)));
        let socket = open(bytes.len() + steps.len() * 64).map_err(failed)?;
        socket.send(&bytes, 0).map_err(failed)?;
        let mut acknowledged = 0;
        for answer in receive(&socket).map_err(failed)? {
            match answer.error() {
                Some(0) => acknowledged += 1,
                Some(errno) => {
                    let step = usize::try_from(answer.sequence).ok().and_then(|at| steps.get(at.checked_sub(1)?));
                    return Err(refused(step.map_or("commit", String::as_str), Errno::from_raw(errno)));
                }
                None => {}
            }
        }
        // The kernel answers before send returns: what is missing now does not come any more.
        if acknowledged < steps.len() { Err(refused("commit", Errno::ENOMSG)) } else { Ok(()) }
    }
}

/// The kernel took nothing of the transaction.
#[derive(Debug)]
pub(super) struct Refused {
    pub(super) step: String,
    pub(super) errno: Errno,
}

/// The rules of a table, in order; none where the table does not exist.
pub(super) fn rules(family: Family, table: &str) -> io::Result<Vec<RuleState>> {
    rules_of(family, table, None)
}

/// The rules of one chain, in order; none where there is no such chain.
pub(super) fn rules_in(family: Family, table: &str, chain: &str) -> io::Result<Vec<RuleState>> {
    rules_of(family, table, Some(chain))
}

fn rules_of(family: Family, table: &str, wanted: Option<&str>) -> io::Result<Vec<RuleState>> {
    let request = message(SUBSYSTEM << 8 | GET_RULE, DUMP, 1, family.number(), 0, |message| {
        message.text(1, table);
        if let Some(chain) = wanted {
            message.text(2, chain);
        }
    });
    let rule = |attributes: &[u8]| {
        let chain = as_text(find(attributes, 2)?);
        // Old kernels dump every table.
        let asked = as_text(find(attributes, 1)?) == table && wanted.is_none_or(|wanted| wanted == chain);
        asked.then_some(RuleState {
            chain,
            handle: as_be64(find(attributes, 3)?)?,
            comment: find(attributes, 7).and_then(comment),
            packets: find(attributes, 4).and_then(packets),
        })
    };
    Ok(dump(&request, SUBSYSTEM << 8 | NEW_RULE)?.iter().filter_map(|answer| rule(answer.attributes())).collect())
}

/// All chains of all tables and families.
pub(super) fn chains() -> io::Result<Vec<ChainState>> {
    let request = message(SUBSYSTEM << 8 | GET_CHAIN, DUMP, 1, 0, 0, |_| {});
    let chain = |answer: &Answer| {
        let attributes = answer.attributes();
        Some(ChainState {
            family: answer.family()?,
            table: as_text(find(attributes, 1)?),
            name: as_text(find(attributes, 3)?),
            hook: find(attributes, 4).and_then(|hook| find(hook, 1)).and_then(as_be32),
            drops_by_default: find(attributes, 5).and_then(as_be32) == Some(NF_DROP),
        })
    };
    Ok(dump(&request, SUBSYSTEM << 8 | NEW_CHAIN)?.iter().filter_map(chain).collect())
}

const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const SUBSYSTEM: u16 = 10;
const NEW_TABLE: u16 = 0;
const DEL_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const GET_CHAIN: u16 = 4;
const DEL_CHAIN: u16 = 5;
const NEW_RULE: u16 = 6;
const GET_RULE: u16 = 7;
const DEL_RULE: u16 = 8;

const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;

/// The one hook of a device.
const INGRESS: u32 = 0;

const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;

fn message(
    kind: u16,
    flags: u16,
    sequence: u32,
    family: u8,
    resource: u16,
    inside: impl FnOnce(&mut Writer),
) -> Vec<u8> {
    let mut writer = Writer::default();
    writer.bytes.extend([0; 4]);
    writer.bytes.extend(kind.to_ne_bytes());
    writer.bytes.extend((flags | REQUEST).to_ne_bytes());
    writer.bytes.extend(sequence.to_ne_bytes());
    writer.bytes.extend([0; 4]);
    writer.bytes.extend([family, 0]);
    writer.bytes.extend(resource.to_be_bytes());
    inside(&mut writer);
    let length = u32::try_from(writer.bytes.len()).expect("no rule of ours comes near 64 KiB");
    writer.bytes[..4].copy_from_slice(&length.to_ne_bytes());
    writer.bytes
}

/// A comment as `nft` writes and shows it: type 0, length, text, zero.
fn user_data(comment: &str) -> Vec<u8> {
    let text = comment.as_bytes().get(..COMMENT_LIMIT).unwrap_or(comment.as_bytes());
    let mut bytes = vec![0, u8::try_from(text.len() + 1).expect("limited above")];
    bytes.extend(text);
    bytes.push(0);
    bytes
}

/// `nft` shows at most so much.
const COMMENT_LIMIT: usize = 127;

fn comment(mut bytes: &[u8]) -> Option<String> {
    while let [kind, length, rest @ ..] = bytes {
        let value = rest.get(..usize::from(*length))?;
        if *kind == 0 {
            return Some(as_text(value));
        }
        bytes = &rest[value.len()..];
    }
    None
}

/// The first counter in a list of expressions.
fn packets(list: &[u8]) -> Option<u64> {
    attribute::read(list).find_map(|(_, element)| {
        let counter = find(element, 1).map(as_text).as_deref() == Some("counter");
        find(element, 2).filter(|_| counter).and_then(|data| find(data, 2)).and_then(as_be64)
    })
}

#[cfg(test)]
mod tests {
    use super::socket::split;
    use super::*;

    /// `nft --debug=mnl add rule ip t ports tcp dport 8080 counter dnat to 10.18.0.2:80 comment "x"` (nftables 1.0.6), attributes
    /// only: what the kernel's own user-space sends for this rule.
    #[cfg(target_endian = "little")]
    const RULE: &str = "\
        06000100740000000a000200706f7274730000005801048024000180090001006d6574610000000014000280080002000000001008000100\
        000000012c00018008000100636d700020000280080001000000000108000200000000000c0003800500010006000000340001800c000100\
        7061796c6f6164002400028008000100000000010800020000000002080003000000000208000400000000022c00018008000100636d7000\
        20000280080001000000000108000200000000000c000380060001001f900000140001800c000100636f756e74657200040002802c000180\
        0e000100696d6d6564696174650000001800028008000100000000010c000280080001000a1200022c0001800e000100696d6d6564696174\
        650000001800028008000100000000020c000280060001000050000038000180080001006e6174002c000280080001000000000108000200\
        000000020800030000000001080005000000000208000700000000020800070000027800";

    fn port_rule() -> Batch {
        let mut batch = Batch::new();
        let expressions = [
            Expression::Protocol(6),
            Expression::DestinationPort(8080),
            Expression::Counter,
            Expression::TranslateTo([10, 18, 0, 2].into(), 80),
        ];
        batch.rule(Family::V4, "t", "ports", Place::Last, "x", &expressions);
        batch
    }

    #[cfg(target_endian = "little")]
    #[test]
    fn a_rule_is_byte_for_byte_what_nft_sends() {
        let (bytes, steps) = port_rule().finish();
        assert_eq!(steps, ["rule \"x\" in ip t ports"]);
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        // Begin: length, type, flags, sequence, port, family, version, subsystem.
        assert_eq!(hex(&bytes[..20]), "14000000100001000000000000000000".to_owned() + "0000000a");
        // The rule: CREATE, APPEND, ACK, REQUEST.
        assert_eq!(hex(&bytes[20..40]), "88010000060a050c0100000000000000".to_owned() + "02000000");
        assert_eq!(hex(&bytes[40..412]), RULE);
        assert_eq!(hex(&bytes[412..]), "14000000110001000100000000000000".to_owned() + "0000000a");
    }

    #[test]
    fn messages_read_what_they_write() {
        let (bytes, _) = port_rule().finish();
        let mut answers = Vec::new();
        split(&bytes, &mut answers);
        let kinds: Vec<u16> = answers.iter().map(|answer| answer.kind).collect();
        assert_eq!(kinds, [BATCH_BEGIN, SUBSYSTEM << 8 | NEW_RULE, BATCH_END]);
        let rule = &answers[1];
        assert_eq!((rule.sequence, rule.family()), (1, Some(2)));
        assert_eq!(find(rule.attributes(), 2).map(as_text).as_deref(), Some("ports"));
        assert_eq!(find(rule.attributes(), 7).and_then(comment).as_deref(), Some("x"));
    }

    #[test]
    fn comments_fit_and_foreign_user_data_is_not_ours() {
        let long = "c".repeat(300);
        assert_eq!(comment(&user_data(&long)).map(|text| text.len()), Some(COMMENT_LIMIT));
        assert_eq!(comment(&[1, 2, 0, 0, 0, 2, b'a', 0]).as_deref(), Some("a"), "after another kind of note");
        for broken in [&[][..], &[0], &[0, 5, b'a'], &[1, 0]] {
            assert_eq!(comment(broken), None, "{broken:?}");
        }
    }

    #[test]
    fn a_cut_message_ends_the_reading() {
        let (bytes, _) = port_rule().finish();
        for cut in 0..bytes.len() {
            let mut answers = Vec::new();
            split(&bytes[..cut], &mut answers);
            assert!(answers.len() < 3);
            // Whatever is left of a message is read without a fault.
            for answer in &answers {
                let _ = (answer.error(), answer.family(), attribute::read(answer.attributes()).count());
            }
        }
    }
}
