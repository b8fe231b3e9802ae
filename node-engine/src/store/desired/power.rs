//! Power cuts: the file system stops in the midst of whatever it does, and comes back with what its journal has.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::super::record::Fate;
use super::tests::{Chance, deploy, size};
use super::*;

const INSTANCES: u32 = 64;
/// Something is acknowledged before the first cut, however busy the machine is.
const FIRST: Duration = Duration::from_secs(20);
/// `EXT4_GOING_FLAGS_NOLOGFLUSH`: not even the journal is written out.
const AT_ONCE: u32 = 2;

nix::ioctl_read!(shut_down, b'X', 125, u32);

#[test]
#[ignore = "needs root"]
fn what_was_acknowledged_before_a_power_cut_is_there_after_it() {
    let cuts = size("NODE_ENGINE_TEST_CUTS", 5);
    let dir = tempfile::tempdir().unwrap();
    let (image, disk) = (dir.path().join("image"), dir.path().join("disk"));
    std::fs::create_dir(&disk).unwrap();
    File::create(&image).and_then(|file| file.set_len(64 << 20)).unwrap();
    run("mkfs.ext4", &["-q".as_ref(), "-F".as_ref(), &image]);
    let mut chance = Chance(3);
    // The last order for each instance that was acknowledged before the last cut, and the last that was given at all.
    let (mut kept, mut given) = (vec![0; INSTANCES as usize], 0);
    for cut in 0..cuts {
        run("mount", &["-o".as_ref(), "loop".as_ref(), &image, &disk]);
        let mut desired = Desired::open(&disk);
        assert!(desired.behind().is_none() && desired.aside().is_none(), "cut {cut}: {:?}", desired.aside());
        let found: Vec<(u32, u32)> = desired.instances().map(|(id, record)| (id.number, number(record))).collect();
        for (instance, least) in (0..).zip(&kept) {
            let order = found.iter().find(|(id, _)| *id == instance).map_or(0, |(_, order)| *order);
            assert!((*least..=given).contains(&order), "cut {cut}: {instance} is at {order}, of {least} to {given}");
        }
        let first = given;
        let acknowledged = AtomicU32::new(first);
        let mark = thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut order = first;
                loop {
                    order += 1;
                    let text = order.to_string();
                    match desired.orders(&[deploy(order % INSTANCES, &text, None)])[..] {
                        [Verdict::Refused(_)] => return order,
                        _ => acknowledged.store(order, Ordering::SeqCst),
                    }
                }
            });
            let patience = Instant::now() + FIRST;
            while cut == 0 && acknowledged.load(Ordering::SeqCst) == first && Instant::now() < patience {
                thread::sleep(Duration::from_millis(1));
            }
            thread::sleep(Duration::from_millis(10 + chance.below(60)));
            let mark = acknowledged.load(Ordering::SeqCst);
            let root = File::open(&disk).unwrap();
            // SAFETY: the descriptor is open, and the kernel reads one number.
            unsafe { shut_down(root.as_raw_fd(), &mut { AT_ONCE }) }.expect("a file system that can be shut down");
            drop(root);
            given = writer.join().unwrap();
            mark
        });
        drop(desired);
        run("umount", &[&disk]);
        for order in first + 1..=mark {
            kept[(order % INSTANCES) as usize] = order;
        }
        assert!(mark > first || cut > 0, "nothing was written at all");
    }
    println!("{cuts} power cuts, {given} orders, none of those lost that were acknowledged");
}

fn number(record: &Record) -> u32 {
    match &record.fate {
        Fate::Run(document) => document.parse().unwrap(),
        other => panic!("nobody has ordered {other:?}"),
    }
}

fn run(program: &str, words: &[&Path]) {
    let output = Command::new(program).args(words).output().unwrap();
    assert!(output.status.success(), "{program} {words:?}: {}", String::from_utf8_lossy(&output.stderr));
}
