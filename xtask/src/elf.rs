//! The little of ELF that the driver looks at: the functions in a finished eBPF object, and whether a program is static.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

const SHT_SYMTAB: u32 = 2;
const SHF_EXECINSTR: u64 = 4;
const STT_FUNC: u8 = 2;
const PT_INTERP: u32 = 3;
/// How little-endian files begin, of 64 bits and of 32.
const WIDE: &[u8] = b"\x7fELF\x02\x01";
const NARROW: &[u8] = b"\x7fELF\x01\x01";

/// A function in an executable section.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Function {
    pub(crate) section: String,
    pub(crate) name: String,
    pub(crate) bytes: u64,
}

/// The functions of a little-endian 64-bit object, in the order of its symbol table.
pub(crate) fn functions(path: &Path) -> Result<Vec<Function>> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse_functions(&bytes).with_context(|| format!("{} is not a whole ELF object", path.display()))
}

/// Does the program run without a dynamic linker?
pub(crate) fn is_static(path: &Path) -> Result<bool> {
    let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse_static(&bytes).with_context(|| format!("{} is not a whole ELF program", path.display()))
}

fn parse_static(bytes: &[u8]) -> Result<bool> {
    let (elf, start, size, count) = if bytes.starts_with(NARROW) {
        let elf = Elf { bytes };
        (elf, u64::from(elf.u32(0x1c)?), elf.u16(0x2a)?, elf.u16(0x2c)?)
    } else {
        let elf = Elf::new(bytes)?;
        (elf, elf.u64(0x20)?, elf.u16(0x36)?, elf.u16(0x38)?)
    };
    for index in 0..u64::from(count) {
        if elf.u32(start + index * u64::from(size))? == PT_INTERP {
            return Ok(false);
        }
    }
    Ok(true)
}

fn parse_functions(bytes: &[u8]) -> Result<Vec<Function>> {
    let elf = Elf::new(bytes)?;
    let sections = elf.sections()?;
    let names = sections.get(usize::from(elf.u16(0x3e)?)).context("no section names")?.offset;
    let mut found = Vec::new();
    for table in sections.iter().filter(|section| section.kind == SHT_SYMTAB) {
        let strings = sections.get(table.link as usize).context("no symbol names")?.offset;
        for symbol in (table.offset..table.offset + table.size).step_by(24) {
            let home = sections.get(usize::from(elf.u16(symbol + 6)?));
            let Some(section) = home.filter(|section| section.flags & SHF_EXECINSTR != 0) else { continue };
            if elf.u8(symbol + 4)? & 0xf != STT_FUNC {
                continue;
            }
            found.push(Function {
                section: elf.text(names + u64::from(section.name))?,
                name: elf.text(strings + u64::from(elf.u32(symbol)?))?,
                bytes: elf.u64(symbol + 16)?,
            });
        }
    }
    Ok(found)
}

struct Section {
    name: u32,
    kind: u32,
    flags: u64,
    offset: u64,
    size: u64,
    link: u32,
}

#[derive(Clone, Copy)]
struct Elf<'a> {
    bytes: &'a [u8],
}

impl<'a> Elf<'a> {
    fn new(bytes: &'a [u8]) -> Result<Self> {
        if !bytes.starts_with(WIDE) {
            bail!("not a little-endian 64-bit ELF file");
        }
        Ok(Self { bytes })
    }

    fn sections(&self) -> Result<Vec<Section>> {
        let (start, size, count) = (self.u64(0x28)?, u64::from(self.u16(0x3a)?), u64::from(self.u16(0x3c)?));
        (0..count)
            .map(|index| {
                let at = start + index * size;
                Ok(Section {
                    name: self.u32(at)?,
                    kind: self.u32(at + 4)?,
                    flags: self.u64(at + 8)?,
                    offset: self.u64(at + 24)?,
                    size: self.u64(at + 32)?,
                    link: self.u32(at + 40)?,
                })
            })
            .collect()
    }

    fn text(&self, at: u64) -> Result<String> {
        let rest = self.bytes.get(usize::try_from(at)?..).context("a name lies outside the file")?;
        let end = rest.iter().position(|&byte| byte == 0).context("a name has no end")?;
        Ok(String::from_utf8_lossy(&rest[..end]).into_owned())
    }

    fn read<const N: usize>(&self, at: u64) -> Result<[u8; N]> {
        let start = usize::try_from(at)?;
        let field = start.checked_add(N).and_then(|end| self.bytes.get(start..end));
        Ok(field.context("a field lies outside the file")?.try_into()?)
    }

    fn u8(&self, at: u64) -> Result<u8> {
        Ok(self.read::<1>(at)?[0])
    }

    fn u16(&self, at: u64) -> Result<u16> {
        Ok(u16::from_le_bytes(self.read(at)?))
    }

    fn u32(&self, at: u64) -> Result<u32> {
        Ok(u32::from_le_bytes(self.read(at)?))
    }

    fn u64(&self, at: u64) -> Result<u64> {
        Ok(u64::from_le_bytes(self.read(at)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_program_has_functions_and_truncations_are_errors() {
        let own = fs::read(std::env::current_exe().expect("a test program has a path")).expect("readable");
        let found = parse_functions(&own).expect("the compiler writes good ELF");
        assert!(found.iter().any(|function| function.name == "main" && function.section == ".text"));
        for cut in [0, 5, 63, 64, own.len() / 2] {
            assert!(parse_functions(&own[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn a_program_is_static_where_nothing_is_to_interpret_it() {
        let own = fs::read(std::env::current_exe().expect("a test program has a path")).expect("readable");
        assert!(!parse_static(&own).expect("the compiler writes good ELF"), "tests are linked dynamically");
        for (segment, is_static) in [(1, true), (PT_INTERP, false)] {
            let mut narrow = NARROW.to_vec();
            narrow.resize(0x34, 0);
            narrow[0x1c] = 0x34;
            (narrow[0x2a], narrow[0x2c]) = (32, 1);
            narrow.extend(segment.to_le_bytes());
            assert_eq!(parse_static(&narrow).expect("whole"), is_static);
            assert!(parse_static(&narrow[..0x34]).is_err(), "its segments are cut off");
        }
        assert!(parse_static(b"#!/bin/sh").is_err());
    }
}
