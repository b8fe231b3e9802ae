//! The filter before the stack, through `BPF_PROG_TEST_RUN`: it drops nothing that the law would take, touches nothing, and is cheaper
//! than a drop behind it.
//!
//! Needs root and the eBPF object (`cargo xtask build-ebpf`, or `NODE_ENGINE_EBPF_OBJECT`).

use std::path::PathBuf;
use std::time::Duration;

use aya::maps::{Array, HashMap, MapData, PerCpuArray};
use aya::programs::{SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader, Pod, TestRun, TestRunOptions};
use netmanager_common::abi::{Endpoint, Peer, Service, Slot};
use netmanager_common::addr::Addr;
use netmanager_common::frame::{CONTROL_FIRST, SliceFrame, control_framing};
use netmanager_common::pipeline::inbound;
use netmanager_common::testing::{
    CLIENT, DB0, DB0_INSTANCE, Direction, Frames, HERE, OURS, Payload, UNKNOWN_SERVICE, UPSTREAM, WEB, World, packet,
};
use netmanager_common::verdict::{DropReason, Miss, Verdict};
use netmanager_common::{FRAMING_LEN, TUNNEL_PORT};

const DROP: u32 = 1;
const PASS: u32 = 2;
const STRANGER: Addr = Addr::v4([198, 51, 100, 77]);

#[test]
#[ignore = "needs root"]
fn what_does_not_belong_is_dropped_and_counted() {
    let kernel = Kernel::load(&World::sample());
    let tcp = Payload::Tcp(80, 40_000);
    let from = |source: Addr, destination: Addr| packet(source, destination, tcp);
    let control = [&[CONTROL_FIRST, 0x6e][..], &[0; 30]].concat();
    let framed = |inner: Vec<u8>| [control_framing()[..FRAMING_LEN - 2].to_vec(), vec![8, 0], inner].concat();
    let framed_control = [control_framing().to_vec(), control.clone()].concat();
    let good = from(DB0_INSTANCE.v4(), WEB.v4());
    let dropped = |reason: DropReason| Some(reason);
    for (name, outer, port, payload, reason) in [
        ("a packet that belongs", OURS, 0, good.clone(), None),
        ("the same framed", OURS, 1, framed(good.clone()), None),
        ("IPv6 inside", OURS, 0, from(DB0_INSTANCE.v6(), WEB.v6()), None),
        ("a sender nobody knows yet", STRANGER, 0, from(UNKNOWN_SERVICE.v4(), WEB.v4()), None),
        ("a greeting of a known node", OURS, 0, control.clone(), None),
        ("a greeting in framing", OURS, 1, framed_control.clone(), None),
        ("another port", STRANGER, 7, b"anything".to_vec(), None),
        ("a foreign inner source", UPSTREAM, 0, good.clone(), dropped(DropReason::ForeignSource)),
        ("a stranger in a known name", STRANGER, 0, good.clone(), dropped(DropReason::ForeignSource)),
        ("a stranger, framed", STRANGER, 1, framed(good), dropped(DropReason::ForeignSource)),
        ("a stranger's greeting", STRANGER, 0, control, dropped(DropReason::ForeignSource)),
        ("a stranger's framed greeting", STRANGER, 1, framed_control, dropped(DropReason::ForeignSource)),
        ("for an instance elsewhere", OURS, 0, from(DB0_INSTANCE.v4(), DB0.v4()), dropped(DropReason::NotOurs)),
        ("nothing in it", OURS, 0, Vec::new(), dropped(DropReason::Malformed)),
        ("garbage", OURS, 0, vec![0x77; 60], dropped(DropReason::Malformed)),
        ("framing of somebody else", OURS, 1, vec![8; 80], dropped(DropReason::Malformed)),
    ] {
        let frame = frame(&outer, TUNNEL_PORT + port, &payload);
        let before = reason.map(|reason| kernel.counter(reason));
        let (action, after) = kernel.run(&frame);
        assert_eq!(after, frame, "{name}: untouched");
        assert_eq!(action, if reason.is_some() { DROP } else { PASS }, "{name}");
        assert_eq!(reason.map(|reason| kernel.counter(reason)), before.map(|count| count + 1), "{name}");
    }
}

#[test]
#[ignore = "needs root"]
fn nothing_that_the_law_takes_is_dropped() {
    let mut world = World::sample();
    let kernel = Kernel::load(&world);
    let mut frames = Frames::new(5);
    let (mut dropped, mut passed) = (0, 0);
    for number in 0..40_000 {
        let (Direction::Inbound(outer), packet) = frames.frame() else { continue };
        if packet.is_empty() {
            continue;
        }
        let (action, _) = kernel.run(&frame(&outer, TUNNEL_PORT, &packet));
        if action == DROP {
            dropped += 1;
            let verdict = inbound(&mut SliceFrame::new(&mut packet.clone()), &mut world, &outer);
            // What user space would have to take apart first is from the same foreign address then.
            let refused = matches!(verdict, Err(_) | Ok(Verdict::Slow(Miss::Header | Miss::Fragment | Miss::Error)));
            assert!(refused, "frame {number}: the law says {verdict:?} of {packet:02x?}");
        } else {
            passed += 1;
        }
    }
    assert!(dropped > 3_000 && passed > 3_000, "{dropped} dropped, {passed} passed");
}

/// Prints what a drop costs here and behind the stack's first steps.
#[test]
#[ignore = "needs root"]
fn a_drop_costs_little() {
    let kernel = Kernel::load(&World::sample());
    let frame = frame(&STRANGER, TUNNEL_PORT, &packet(DB0_INSTANCE.v4(), CLIENT.v4(), Payload::Udp(80, 40_000)));
    let nanoseconds = |name: &str| {
        let mut best = Duration::MAX;
        for _ in 0..7 {
            best = best.min(kernel.time(name, &frame));
        }
        println!(
            "{name}: {} ns a dropped datagram, {:.1} million a second",
            best.as_nanos(),
            1e3 / best.as_nanos() as f64
        );
        best.as_nanos()
    };
    let (xdp, tc) = (nanoseconds("xdp_uplink_ingress"), nanoseconds("tc_uplink_ingress"));
    // The time in the programs alone: what a buffer costs before the second is not in it.
    assert!(xdp < 2 * tc, "{xdp} ns and {tc} ns");
}

/// An Ethernet frame with this UDP payload for this node.
fn frame(outer: &Addr, port: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0xaa, 0, 0, 0, 1, 2, 0xbb, 0, 0, 0, 2, 8, 0];
    let mut header = vec![0x45, 0];
    header.extend((payload.len() as u16 + 28).to_be_bytes());
    header.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    header.extend(outer.v4_bytes());
    header.extend(HERE.v4_bytes());
    let sum = !netmanager_common::checksum::fold(netmanager_common::checksum::sum(0, &header));
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    frame.extend(header);
    frame.extend([0xc0, 1]);
    frame.extend(port.to_be_bytes());
    frame.extend((payload.len() as u16 + 8).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(payload);
    frame
}

struct Kernel(Ebpf);

impl Kernel {
    fn load(world: &World) -> Self {
        let path = std::env::var_os("NODE_ENGINE_EBPF_OBJECT").map_or_else(
            || {
                let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
                root.join("../target/ebpf/bpfel-unknown-none/release/netmanager")
            },
            PathBuf::from,
        );
        let object = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut ebpf = EbpfLoader::new().load(&object).expect("the object loads");
        let xdp: &mut Xdp = ebpf.program_mut("xdp_uplink_ingress").expect("it is there").try_into().expect("XDP");
        xdp.load().unwrap_or_else(|error| panic!("{error:?}"));
        let tc: &mut SchedClassifier =
            ebpf.program_mut("tc_uplink_ingress").expect("it is there").try_into().expect("a classifier");
        tc.load().expect("it loads");
        let mut kernel = Self(ebpf);
        kernel.array("CONFIG").set(0, world.config, 0).expect("CONFIG");
        for (index, slot) in &world.slots {
            kernel.array::<Slot>("SLOTS").set(*index, *slot, 0).expect("SLOTS");
        }
        for (index, peer) in &world.peers {
            kernel.array::<Peer>("PEERS").set(*index, *peer, 0).expect("PEERS");
            kernel.hash::<Addr, u32>("HOSTS").insert(peer.host, *index, 0).expect("HOSTS");
        }
        for (key, row) in &world.services {
            kernel.hash::<Addr, Service>("SERVICES").insert(key, row, 0).expect("SERVICES");
        }
        for (key, row) in &world.endpoints {
            kernel.hash::<Addr, Endpoint>("ENDPOINTS").insert(key, row, 0).expect("ENDPOINTS");
        }
        kernel
    }

    fn array<T: Pod>(&mut self, name: &str) -> Array<&mut MapData, T> {
        self.0.map_mut(name).expect("the map is there").try_into().expect("an array")
    }

    fn hash<K: Pod, V: Pod>(&mut self, name: &str) -> HashMap<&mut MapData, K, V> {
        self.0.map_mut(name).expect("the map is there").try_into().expect("a hash")
    }

    fn counter(&self, reason: DropReason) -> u64 {
        let counters: PerCpuArray<_, u64> =
            self.0.map("COUNTERS").expect("COUNTERS").try_into().expect("a per-CPU array");
        counters.get(&(reason as u32), 0).expect("a counter").iter().sum()
    }

    fn run(&self, frame: &[u8]) -> (u32, Vec<u8>) {
        let program: &Xdp = self.0.program("xdp_uplink_ingress").expect("loaded").try_into().expect("XDP");
        let mut out = vec![0; frame.len() + 64];
        let options = TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ..TestRunOptions::default() };
        let result = program.test_run(options).expect("it runs");
        out.truncate(result.data_size_out as usize);
        (result.return_value, out)
    }

    /// Of one run, over very many.
    fn time(&self, name: &str, frame: &[u8]) -> Duration {
        let options = TestRunOptions { data_in: Some(frame), repeat: 200_000, ..TestRunOptions::default() };
        let program = self.0.program(name).expect("loaded");
        let result = match name {
            "xdp_uplink_ingress" => <&Xdp>::try_from(program).expect("XDP").test_run(options),
            _ => <&SchedClassifier>::try_from(program).expect("a classifier").test_run(options),
        };
        result.expect("it runs").duration
    }
}
