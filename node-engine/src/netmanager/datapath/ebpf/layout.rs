//! The layout of pinned rows as text that is pinned beside them, so that a program of another version, older or newer, can take them
//! over field by field; and how a row becomes one of another layout.
//!
//! ```text
//! <map> <bytes of a key> <field>:<offset>:<bytes>,… <bytes of a value> <field>:<offset>:<bytes>,…
//! ```

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::ops::Range;

use netmanager_common::layout::{Row, TABLES};

/// The layout of version 3, of which nodes have pins without a description.
pub(super) const THREE: &str = include_str!("layout_3.txt");

/// A key or a value of some layout.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) size: usize,
    fields: BTreeMap<String, (usize, usize)>,
}

/// Of each map, key and value.
pub(super) type Layout = BTreeMap<String, (Shape, Shape)>;

/// The layout of this program.
pub(super) fn own() -> String {
    let mut text = String::new();
    for table in TABLES {
        let _ = writeln!(text, "{} {} {}", table.name, described(&table.key), described(&table.value));
    }
    text
}

fn described(row: &Row) -> String {
    let fields = row.fields.iter().map(|field| format!("{}:{}:{}", field.name, field.offset, field.size));
    format!("{} {}", row.size, fields.collect::<Vec<_>>().join(","))
}

/// `None`: it is no description.
pub(super) fn read(text: &str) -> Option<Layout> {
    text.lines()
        .map(|line| {
            let mut words = line.split(' ');
            let name = words.next()?.to_owned();
            let rows = (shape(words.next()?, words.next()?)?, shape(words.next()?, words.next()?)?);
            Some((name, rows))
        })
        .collect()
}

fn shape(size: &str, fields: &str) -> Option<Shape> {
    let size = size.parse().ok()?;
    let fields: Option<BTreeMap<_, _>> = fields
        .split(',')
        .map(|field| {
            let mut parts = field.split(':');
            let (name, offset, len) = (parts.next()?, parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
            // Whatever it says, nothing beyond the row is read.
            let whole = usize::checked_add(offset, len).is_some_and(|end| end <= size);
            whole.then(|| (name.to_owned(), (offset, len)))
        })
        .collect();
    Some(Shape { size, fields: fields? })
}

/// How rows become those of another layout: fields go by their names, what is new is zero, what is not known any more is left out.
#[derive(Debug)]
pub(super) struct Translation {
    size: usize,
    /// Where bytes are taken from, and where they go.
    moves: Vec<(Range<usize>, Range<usize>)>,
}

impl Translation {
    pub(super) fn new(from: &Shape, to: &Shape) -> Self {
        let moves = to.fields.iter().filter_map(|(name, (target, room))| {
            let (source, len) = from.fields.get(name)?;
            // A number that has become wider or narrower keeps its low bytes, and so its value where there is room for it.
            let kept = *len.min(room);
            let low = |begin: usize, len: usize| if cfg!(target_endian = "big") { begin + len - kept } else { begin };
            let (source, target) = (low(*source, *len), low(*target, *room));
            Some((source..source + kept, target..target + kept))
        });
        Self { size: to.size, moves: moves.collect() }
    }

    pub(super) fn of(&self, row: &[u8]) -> Vec<u8> {
        let mut out = vec![0; self.size];
        for (source, target) in &self.moves {
            if let (Some(bytes), Some(place)) = (row.get(source.clone()), out.get_mut(target.clone())) {
                place.copy_from_slice(bytes);
            }
        }
        out
    }
}

/// What differs between two layouts, map by map, for people to read.
pub(super) fn differences(from: &Layout, to: &Layout) -> Vec<String> {
    let names: std::collections::BTreeSet<&String> = from.keys().chain(to.keys()).collect();
    let mut said = Vec::new();
    for name in names {
        match (from.get(name), to.get(name)) {
            (Some(old), Some(new)) if old != new => {
                let mut words = Vec::new();
                for (old, new) in [(&old.0, &new.0), (&old.1, &new.1)] {
                    let gone = old.fields.keys().filter(|field| !new.fields.contains_key(*field));
                    words.extend(gone.map(|field| format!("without {field}")));
                    let come = new.fields.keys().filter(|field| !old.fields.contains_key(*field));
                    words.extend(come.map(|field| format!("with {field}")));
                    let other = new
                        .fields
                        .iter()
                        .filter(|(field, place)| old.fields.get(*field).is_some_and(|before| before.1 != place.1));
                    words.extend(other.map(|(field, place)| format!("{field} of {} bytes", place.1)));
                }
                let how = if words.is_empty() { "in another order".to_owned() } else { words.join(", ") };
                said.push(format!("{name}: {how}"));
            }
            (Some(_), None) => said.push(format!("{name}: not known any more")),
            (None, Some(_)) => said.push(format!("{name}: new")),
            _ => {}
        }
    }
    said
}

/// Rows go from any described layout to ours and back without a panic, and are as long as they are said to be, for the fuzzer.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn understand(text: &str) {
    /// No map of anybody has longer rows.
    const LONGEST: usize = 1 << 16;
    let Some(theirs) = read(text) else { return };
    let ours = read(&own()).expect("our own description");
    let _ = differences(&theirs, &ours);
    for (name, (key, value)) in &theirs {
        let Some((our_key, our_value)) = ours.get(name) else { continue };
        for (theirs, ours) in
            [(key, our_key), (value, our_value)].into_iter().filter(|(theirs, _)| theirs.size <= LONGEST)
        {
            for (from, to) in [(theirs, ours), (ours, theirs)] {
                assert_eq!(Translation::new(from, to).of(&vec![0xa5; from.size]).len(), to.size);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use netmanager_common::abi::{Flow, Slot};
    use netmanager_common::addr::Addr;

    use super::*;
    use crate::netmanager::datapath::pod;

    /// Where this fails, rows have changed: then [`netmanager_common::ABI_VERSION`] is another, and nodes that have pins of the version
    /// before are to be known by a text of their own.
    #[test]
    #[cfg(not(feature = "other-layout"))]
    fn rows_are_those_of_their_version() {
        assert_eq!((own().as_str(), netmanager_common::ABI_VERSION), (THREE, 3));
    }

    #[test]
    fn a_layout_is_read_as_it_is_written() {
        let layout = read(&own()).expect("a layout");
        assert_eq!(layout.len(), TABLES.len());
        for table in TABLES {
            let (key, value) = &layout[table.name];
            assert_eq!((key.size, value.size), (table.key.size, table.value.size), "{}", table.name);
            assert_eq!(value.fields.len(), table.value.fields.len(), "{}", table.name);
        }
        for bad in [
            "FLOWS",
            "FLOWS 4 a:0:4 4",
            "FLOWS 4 a:1:4 4 b:0:4",
            "FLOWS x a:0:4 4 b:0:4",
            "A 4 a:0:4 4 b:18446744073709551615:4",
        ] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_row_goes_to_another_layout_and_back() {
        let own = read(&own()).unwrap();
        let (_, flow) = &own["FLOWS"];
        let row = Flow {
            slot: 7,
            generation: 9,
            seen: 1_000,
            kind: 2,
            server: 0x1234,
            source: Addr::v4([10, 30, 0, 1]),
            ..Flow::default()
        };
        // Other fields, another order, a wider number and a narrower one.
        let other =
            shape("70", "new:0:10,server:10:4,kind:14:1,source:15:16,generation:31:4,slot:35:8,seen:43:2,state:50:1")
                .unwrap();
        let there = Translation::new(flow, &other).of(pod::bytes(&row));
        assert_eq!((there.len(), &there[..10]), (70, &[0; 10][..]));
        assert_eq!(u32::from_ne_bytes(there[10..14].try_into().unwrap()), 0x1234);
        assert_eq!(u64::from_ne_bytes(there[35..43].try_into().unwrap()), 7);
        let back: Flow = pod::row(&Translation::new(&other, flow).of(&there)).unwrap();
        assert_eq!(back, row, "all that the other layout knows too");
        assert_eq!(
            Translation::new(flow, flow).of(&[]),
            vec![0; size_of::<Flow>()],
            "a row that is too short is no row"
        );

        let (_, slot) = &own["SLOTS"];
        let live = Slot { generation: 5, peer: 3, instance: Addr::v4([10, 30, 0, 2]), ..Slot::default() };
        assert_eq!(pod::row::<Slot>(&Translation::new(slot, slot).of(pod::bytes(&live))), Some(live));
    }

    #[test]
    fn differences_are_told_by_field() {
        let from = read(
            "FLOWS 4 a:0:4 8 slot:0:4,seen:4:4\nOLD 4 a:0:4 4 b:0:4\nSAME 4 a:0:4 4 b:0:4\nTURNED 4 a:0:4 8 b:0:4,c:4:4",
        );
        let to = read(
            "FLOWS 4 a:0:4 12 slot:0:8,kind:8:4\nNEW 4 a:0:4 4 b:0:4\nSAME 4 a:0:4 4 b:0:4\nTURNED 4 a:0:4 8 c:0:4,b:4:4",
        );
        let told = differences(&from.unwrap(), &to.unwrap());
        let want = [
            "FLOWS: without seen, with kind, slot of 8 bytes",
            "NEW: new",
            "OLD: not known any more",
            "TURNED: in another order",
        ];
        assert_eq!(told, want);
    }
}
