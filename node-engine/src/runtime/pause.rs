//! The program of a sandbox container: it waits for signals and does nothing, so that a network namespace exists before, and as long
//! as, a workload does. Made here as a static ELF of one page from a few instructions for each architecture, because the node must
//! not need a registry for it.

use std::io;

/// Where the program lies in its image.
pub(super) const PATH: &str = "/pause";

/// One architecture: what the ELF header says, and a loop around a system call that waits for ever.
struct Machine {
    /// As Docker names it.
    name: &'static str,
    bits: u8,
    /// `e_machine` and `e_flags` of the ELF header.
    elf: (u16, u32),
    code: &'static [u8],
}

const MACHINES: [Machine; 4] = [
    Machine {
        name: "amd64",
        bits: 64,
        elf: (62, 0),
        code: &[
            0x6a, 0x22, // push 34 (pause)
            0x58, // pop rax
            0x0f, 0x05, // syscall
            0xeb, 0xf9, // jmp to the start
        ],
    },
    Machine {
        name: "arm64",
        bits: 64,
        elf: (183, 0),
        code: &[
            0x00, 0x00, 0x80, 0xd2, // mov x0, 0
            0x01, 0x00, 0x80, 0xd2, // mov x1, 0
            0x02, 0x00, 0x80, 0xd2, // mov x2, 0
            0x03, 0x00, 0x80, 0xd2, // mov x3, 0
            0x04, 0x00, 0x80, 0xd2, // mov x4, 0
            0x28, 0x09, 0x80, 0xd2, // mov x8, 73 (ppoll)
            0x01, 0x00, 0x00, 0xd4, // svc 0
            0xf9, 0xff, 0xff, 0x17, // b to the start
        ],
    },
    Machine {
        name: "arm",
        bits: 32,
        // EABI version 5
        elf: (40, 0x0500_0000),
        code: &[
            0x1d, 0x70, 0xa0, 0xe3, // mov r7, 29 (pause)
            0x00, 0x00, 0x00, 0xef, // svc 0
            0xfc, 0xff, 0xff, 0xea, // b to the start
        ],
    },
    Machine {
        name: "riscv64",
        bits: 64,
        elf: (243, 0),
        code: &[
            0x13, 0x05, 0x00, 0x00, // li a0, 0
            0x93, 0x05, 0x00, 0x00, // li a1, 0
            0x13, 0x06, 0x00, 0x00, // li a2, 0
            0x93, 0x06, 0x00, 0x00, // li a3, 0
            0x13, 0x07, 0x00, 0x00, // li a4, 0
            0x93, 0x08, 0x90, 0x04, // li a7, 73 (ppoll)
            0x73, 0x00, 0x00, 0x00, // ecall
            0x6f, 0xf0, 0x5f, 0xfe, // j to the start
        ],
    },
];

/// The program for an architecture as Docker names it; `None` where there is none.
pub(super) fn program(architecture: &str) -> Option<Vec<u8>> {
    MACHINES.iter().find(|machine| machine.name == architecture).map(elf)
}

/// The root file system of the sandbox image, as a tar archive.
pub(super) fn root_fs(program: &[u8]) -> io::Result<Vec<u8>> {
    let mut header = tar::Header::new_ustar();
    header.set_size(program.len() as u64);
    header.set_mode(0o755);
    let mut archive = tar::Builder::new(Vec::new());
    archive.append_data(&mut header, PATH.trim_start_matches('/'), program)?;
    archive.into_inner()
}

/// A little-endian executable of one readable and executable segment, headers included (elf(5)).
fn elf(machine: &Machine) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    let wide = machine.bits == 64;
    let (header, program_header): (u16, u16) = if wide { (64, 56) } else { (52, 32) };
    let start = u64::from(header + program_header);
    let size = start + machine.code.len() as u64;
    let mut file = Vec::with_capacity(256);
    let word = |file: &mut Vec<u8>, value: u64| {
        let bytes = value.to_le_bytes();
        file.extend_from_slice(if wide { &bytes } else { &bytes[..4] });
    };
    file.extend_from_slice(&[0x7f, b'E', b'L', b'F', machine.bits / 32, 1, 1]);
    file.resize(16, 0);
    file.extend_from_slice(&2u16.to_le_bytes()); // e_type: executable
    file.extend_from_slice(&machine.elf.0.to_le_bytes());
    file.extend_from_slice(&1u32.to_le_bytes()); // e_version
    word(&mut file, BASE + start); // e_entry
    word(&mut file, u64::from(header)); // e_phoff
    word(&mut file, 0); // e_shoff
    file.extend_from_slice(&machine.elf.1.to_le_bytes());
    for half in [header, program_header, 1, 0, 0, 0] {
        file.extend_from_slice(&half.to_le_bytes());
    }
    const READ_AND_EXECUTE: [u8; 4] = 5u32.to_le_bytes();
    file.extend_from_slice(&1u32.to_le_bytes()); // p_type: load
    if wide {
        file.extend_from_slice(&READ_AND_EXECUTE);
    }
    for value in [0, BASE, BASE, size, size] {
        word(&mut file, value); // p_offset, p_vaddr, p_paddr, p_filesz, p_memsz
    }
    if !wide {
        file.extend_from_slice(&READ_AND_EXECUTE);
    }
    word(&mut file, 0x1000); // p_align
    file.extend_from_slice(machine.code);
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_architecture_has_a_well_formed_program() {
        for (name, size) in [("amd64", 127), ("arm64", 152), ("arm", 96), ("riscv64", 152)] {
            let program = program(name).expect("a program");
            assert_eq!(program.len(), size, "{name}");
            assert_eq!(&program[..4], b"\x7fELF");
        }
        assert!(program("s390x").is_none());
    }

    #[test]
    fn the_root_file_system_holds_the_program_and_nothing_else() {
        let program = program("amd64").expect("a program");
        let archive = root_fs(&program).expect("an archive");
        let mut archive = tar::Archive::new(archive.as_slice());
        let names: Vec<_> = archive
            .entries()
            .expect("entries")
            .map(|entry| {
                let entry = entry.expect("an entry");
                (entry.path().expect("a path").into_owned(), entry.header().mode().expect("a mode"), entry.size())
            })
            .collect();
        assert_eq!(names, [("pause".into(), 0o755, program.len() as u64)]);
    }

    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    #[test]
    fn the_program_waits_until_it_is_killed() {
        use std::os::unix::fs::PermissionsExt;
        use std::os::unix::process::ExitStatusExt;
        use std::time::{Duration, Instant};

        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("pause");
        std::fs::write(&path, program("amd64").expect("a program")).expect("write");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("chmod");
        let mut child = std::process::Command::new(&path).spawn().expect("it runs");
        // It sleeps in pause(2), system call 34; a program that crashes or ends never gets there.
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            assert_eq!(child.try_wait().expect("wait"), None, "it ended by itself");
            let syscall = std::fs::read_to_string(format!("/proc/{}/syscall", child.id())).unwrap_or_default();
            if syscall.starts_with("34 ") {
                break;
            }
            assert!(Instant::now() < deadline, "it never waits: {syscall:?}");
            std::thread::yield_now();
        }
        child.kill().expect("kill");
        assert_eq!(child.wait().expect("wait").signal(), Some(9));
    }
}
