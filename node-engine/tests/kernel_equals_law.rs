//! The kernel's programs decide as the law does: the table of packet cases and random frames, through `BPF_PROG_TEST_RUN` and
//! through user space, give the same verdict and the same bytes.
//!
//! Needs root and the eBPF object (`cargo xtask build-ebpf`, or `NODE_ENGINE_EBPF_OBJECT`).

use std::collections::BTreeMap;
use std::path::PathBuf;

use aya::maps::{Array, HashMap, MapData};
use aya::programs::{Program, SchedClassifier, Xdp};
use aya::{Ebpf, EbpfLoader, Pod, TestRun, TestRunOptions};
use netmanager_common::abi::{Answers, Flow, FlowKey, PEER_OURS};
use netmanager_common::addr::Addr;
use netmanager_common::frame::SliceFrame;
use netmanager_common::pipeline::{inbound, outbound};
use netmanager_common::testing::{Case, Direction, Frames, GATEWAY_MAC, HERE, PORT, World, cases};
use netmanager_common::verdict::{DropReason, Miss, Verdict};
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};

const ETH_LEN: usize = 14;
const OUTER_LEN: usize = ETH_LEN + 28;
/// What the ordinary path gets: `TC_ACT_UNSPEC`.
const PASS: u32 = u32::MAX;
const DROPPED: u32 = 2;
const REDIRECTED: u32 = 7;
/// The MACs that a frame arrives with.
const ARRIVAL: [u8; 12] = [0x02, 0xaa, 0, 0, 0, 1, 0x02, 0xbb, 0, 0, 0, 2];

#[test]
#[ignore = "needs root"]
fn every_case_is_decided_as_the_law_says() {
    // Chance is decided when programs are loaded, and in an emulator that takes them seconds.
    let mut kernels = BTreeMap::new();
    for case in cases() {
        let Case { name, direction, packet, pick, .. } = case;
        let mut world = World::sample();
        world.pick = pick;
        let kernel = kernels.entry(pick).or_insert_with(|| Kernel::load(&world));
        check(kernel, &mut world, direction, &packet, name);
        kernel.forget();
    }
    assert!(kernels.len() > 1, "chance is always the same");
}

/// What loading costs a node at its start, and how near the kernel's limit of a million is. Every program is tried, so that another
/// kernel's words on each of them are seen at once (`cargo xtask vm`).
#[test]
#[ignore = "needs root"]
fn programs_are_cheap_to_verify() {
    let mut ebpf = object(&mut EbpfLoader::new());
    let mut refused = Vec::new();
    for (name, program) in ebpf.programs_mut() {
        let loaded = match program {
            Program::SchedClassifier(program) => program.load(),
            Program::Xdp(program) => program.load(),
            _ => panic!("{name} is of a kind that nothing attaches"),
        };
        if let Err(error) = loaded {
            println!("program {name}: refused");
            refused.push(format!("{name}: {error:?}"));
            continue;
        }
        let info = program.info().expect("the program is loaded");
        // Kernels before 5.16 do not tell.
        match info.verified_instruction_count() {
            Some(verified) if verified > 0 => {
                println!("program {name}: {verified}");
                assert!(verified < 150_000, "{name}: {verified}");
            }
            _ => println!("program {name}: loads"),
        }
    }
    assert!(refused.is_empty(), "{}", refused.join("\n"));
}

#[test]
#[ignore = "needs root"]
fn random_frames_are_decided_as_the_law_says() {
    let count: usize = std::env::var("NODE_ENGINE_FRAMES").map_or(120_000, |text| text.parse().expect("a number"));
    let mut redirected = 0;
    for (seed, pick) in [(7, 0), (11, 1)] {
        let mut world = World::sample();
        world.pick = pick;
        let mut kernel = Kernel::load(&world);
        let mut frames = Frames::new(seed);
        for number in 0..count / 2 {
            if number == count / 4 {
                // An instance has gone, another has come in the place of one.
                for slot in [4, 13] {
                    let row = world.slots.get_mut(&slot).expect("a slot of the sample");
                    row.generation += if slot == 4 { 1 } else { 2 };
                    kernel.array("SLOTS").set(slot, *row, 0).expect("SLOTS");
                }
            }
            let (direction, packet) = frames.frame();
            if runnable(direction, &packet) {
                let action = check(&kernel, &mut world, direction, &packet, &format!("frame {number} of seed {seed}"));
                redirected += usize::from(action == REDIRECTED);
            }
        }
        kernel.assert_same_flows(&world);
    }
    assert!(redirected > count / 20, "only {redirected} of {count} frames were carried: the generator is off");
}

/// The test run refuses Ethernet frames that are shorter than an IP header.
fn runnable(direction: Direction, packet: &[u8]) -> bool {
    match direction {
        Direction::Outbound(_) => packet.first().is_some_and(|first| match first >> 4 {
            6 => packet.len() >= 40,
            _ => packet.len() >= 20,
        }),
        Direction::Inbound(_) => !packet.is_empty(),
    }
}

/// Runs one packet both ways and compares; the kernel's action is returned.
fn check(kernel: &Kernel, world: &mut World, direction: Direction, packet: &[u8], name: &str) -> u32 {
    let arrived = arrival(direction, packet);
    // Neither IPv4 nor IPv6, or not one whole packet: the program leaves it to the socket before it asks the law.
    if matches!(direction, Direction::Inbound(_)) && claimed_len(packet) != Some(packet.len() as u16) {
        assert_eq!(kernel.run(direction, &arrived), (PASS, arrived), "{name}: not one whole packet");
        return PASS;
    }
    let mut after = packet.to_vec();
    let mut frame = SliceFrame::new(&mut after);
    let verdict = match direction {
        Direction::Outbound(port) => outbound(&mut frame, world, port),
        Direction::Inbound(outer) => inbound(&mut frame, world, &outer),
    };
    let mut expected = expectation(world, verdict, &after, &arrived);
    let (action, mut bytes) = kernel.run(direction, &arrived);
    let wrapped = matches!(direction, Direction::Outbound(_)) && matches!(verdict, Ok(Verdict::Send { .. }));
    if wrapped && bytes.len() >= OUTER_LEN {
        let port = u16::from_be_bytes([bytes[34], bytes[35]]);
        assert!(port >= 0xc000, "{name}: outer source port {port}");
        // by the kernel's flow hash
        bytes[34..36].fill(0);
        // Numbered, so that it may be cut, where nobody knows how wide the path is.
        if expected.1[20] & 0x40 == 0 {
            let (number, sum) = ([bytes[18], bytes[19]], [bytes[24], bytes[25]]);
            seal(&mut expected.1[14..34], number);
            assert_eq!(sum, [expected.1[24], expected.1[25]], "{name}: outer checksum");
        }
    }
    // After a drop nobody sees the bytes.
    if expected.0 == DROPPED {
        assert_eq!(action, DROPPED, "{name}: law says {verdict:?}\n{direction:?} {packet:02x?}");
        return action;
    }
    assert_eq!(
        (action, &bytes),
        (expected.0, &expected.1),
        "{name}: law says {verdict:?}\n{direction:?}\n given {packet:02x?}\n kernel {bytes:02x?}\n law    {:02x?}",
        expected.1
    );
    action
}

/// The Ethernet frame in which a packet arrives.
fn arrival(direction: Direction, packet: &[u8]) -> Vec<u8> {
    let mut frame = ARRIVAL.to_vec();
    match direction {
        Direction::Outbound(_) => {
            frame.extend(ethertype(packet));
            frame.extend(packet);
        }
        Direction::Inbound(outer) => {
            frame.extend([0x08, 0x00]);
            frame.extend(outer_headers(&outer, &HERE, packet.len()));
            frame.extend(packet);
        }
    }
    frame
}

/// The action and the bytes that follow from what the law said.
fn expectation(world: &World, verdict: Result<Verdict, DropReason>, after: &[u8], arrived: &[u8]) -> (u32, Vec<u8>) {
    match verdict {
        Err(_) => (DROPPED, Vec::new()),
        Ok(Verdict::Pass | Verdict::Slow(_)) => (PASS, arrived.to_vec()),
        Ok(Verdict::Local { mac, .. }) => {
            let mut frame = [mac.0, GATEWAY_MAC.0].concat();
            frame.extend(ethertype(after));
            frame.extend(after);
            (REDIRECTED, frame)
        }
        Ok(Verdict::Send { peer }) => {
            let peer = world.peers[&peer];
            let mut frame = ARRIVAL.to_vec();
            frame.extend([0x08, 0x00]);
            frame.extend(outer_headers(&peer.source, &peer.host, after.len()));
            if peer.flags & PEER_OURS == 0 {
                frame[20] = 0;
                seal(&mut frame[14..34], [0; 2]);
            }
            frame.extend(after);
            (REDIRECTED, frame)
        }
    }
}

/// The length that the packet's own header says, as the program reads it.
fn claimed_len(packet: &[u8]) -> Option<u16> {
    match *packet.first_chunk::<6>()? {
        [first, _, a, b, ..] if first >> 4 == 4 => Some(u16::from_be_bytes([a, b])),
        [first, _, _, _, a, b] if first >> 4 == 6 => Some(u16::from_be_bytes([a, b]).wrapping_add(40)),
        _ => None,
    }
}

fn ethertype(packet: &[u8]) -> [u8; 2] {
    if packet.first().is_some_and(|first| first >> 4 == 6) { [0x86, 0xdd] } else { [0x08, 0x00] }
}

/// Outer IPv4 and UDP header, source port 0.
fn outer_headers(source: &Addr, destination: &Addr, inner_len: usize) -> Vec<u8> {
    let mut header = vec![0x45, 0];
    header.extend(((inner_len + 28) as u16).to_be_bytes());
    header.extend([0, 0, 0x40, 0, 64, 17, 0, 0]);
    header.extend(source.v4_bytes());
    header.extend(destination.v4_bytes());
    let sum = !netmanager_common::checksum::fold(netmanager_common::checksum::sum(0, &header));
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header.extend([0, 0]);
    header.extend(netmanager_common::TUNNEL_PORT.to_be_bytes());
    header.extend(((inner_len + 8) as u16).to_be_bytes());
    header.extend([0, 0]);
    header
}

/// Gives an IPv4 header this number, and the checksum that goes with it.
fn seal(header: &mut [u8], number: [u8; 2]) {
    header[4..6].copy_from_slice(&number);
    header[10..12].fill(0);
    let sum = !netmanager_common::checksum::fold(netmanager_common::checksum::sum(0, header));
    header[10..12].copy_from_slice(&sum.to_be_bytes());
}

/// The programs and maps in this kernel, attached to nothing.
struct Kernel {
    ebpf: Ebpf,
}

impl Kernel {
    fn load(world: &World) -> Self {
        let pick = u64::from(world.pick) + 1;
        let mut ebpf = object(EbpfLoader::new().override_global("FIXED_PICK", &pick, true));
        for name in ["tc_veth_ingress", "tc_uplink_ingress", "tc_framed_ingress", "tc_framing_ingress"] {
            let program: &mut SchedClassifier =
                ebpf.program_mut(name).expect("the program is there").try_into().expect("a classifier");
            program.load().unwrap_or_else(|error| panic!("{name}: {error:?}"));
        }
        let filter: &mut Xdp =
            ebpf.program_mut("xdp_uplink_ingress").expect("the program is there").try_into().expect("XDP");
        filter.load().unwrap_or_else(|error| panic!("xdp_uplink_ingress: {error:?}"));
        let mut kernel = Self { ebpf };
        kernel.fill(world);
        kernel
    }

    fn fill(&mut self, world: &World) {
        self.array("CONFIG").set(0, world.config, 0).expect("CONFIG");
        for (index, slot) in &world.slots {
            self.array("SLOTS").set(*index, *slot, 0).expect("SLOTS");
        }
        for (index, peer) in &world.peers {
            self.array("PEERS").set(*index, *peer, 0).expect("PEERS");
        }
        for (service, slot) in &world.trials {
            self.array("TRIALS").set(*service, *slot, 0).expect("TRIALS");
        }
        self.fill_hash("SERVICES", &world.services);
        self.fill_hash("CANDIDATES", &world.candidates);
        self.fill_hash("ENDPOINTS", &world.endpoints);
    }

    /// Has the tables as they were before any packet.
    fn forget(&mut self) {
        let world = World::sample();
        let mut flows: HashMap<_, FlowKey, Flow> =
            self.ebpf.map_mut("FLOWS").expect("FLOWS").try_into().expect("a hash");
        let keys: Vec<FlowKey> = flows.keys().map(|key| key.expect("a key")).collect();
        keys.iter().for_each(|key| flows.remove(key).expect("a flow"));
        for service in world.services.values().map(|service| service.id) {
            self.array("TURNS").set(service, 0_u32, 0).expect("TURNS");
        }
        for service in world.trials.keys() {
            self.array("TRIALS").set(*service, 0_u32, 0).expect("TRIALS");
        }
        for slot in world.slots.keys() {
            self.array("CHOSEN").set(*slot, 0_u64, 0).expect("CHOSEN");
            self.array("ANSWERS").set(*slot, Answers::default(), 0).expect("ANSWERS");
        }
        self.fill(&world);
    }

    fn array<T: Pod>(&mut self, name: &str) -> Array<&mut MapData, T> {
        self.ebpf.map_mut(name).expect("the map is there").try_into().expect("an array")
    }

    fn fill_hash<K: Pod, V: Pod>(&mut self, name: &str, rows: &std::collections::HashMap<K, V>) {
        let map = self.ebpf.map_mut(name).expect("the map is there");
        let mut map: HashMap<_, K, V> = map.try_into().expect("a hash");
        for (key, value) in rows {
            map.insert(key, value, 0).expect(name);
        }
    }

    fn run(&self, direction: Direction, frame: &[u8]) -> (u32, Vec<u8>) {
        let name = match direction {
            Direction::Outbound(_) => "tc_veth_ingress",
            Direction::Inbound(_) => "tc_uplink_ingress",
        };
        let program: &SchedClassifier = self.ebpf.program(name).expect("loaded").try_into().expect("a classifier");
        let mut out = vec![0; frame.len() + 128];
        let options = TestRunOptions { data_in: Some(frame), data_out: Some(&mut out), ..TestRunOptions::default() };
        let result = program.test_run(options).unwrap_or_else(|error| panic!("{name}: {error:?} {frame:02x?}"));
        out.truncate(result.data_size_out as usize);
        (result.return_value, out)
    }

    /// What was learned on the way is the same too.
    fn assert_same_flows(&self, world: &World) {
        let flows: HashMap<_, FlowKey, Flow> = self.ebpf.map("FLOWS").expect("FLOWS").try_into().expect("a hash");
        let learned: std::collections::HashMap<_, _> = flows.iter().map(|row| row.expect("a row")).collect();
        assert_eq!(learned, world.flows);
        assert!(!learned.is_empty());
        let turns: Array<_, u32> = self.ebpf.map("TURNS").expect("TURNS").try_into().expect("an array");
        for (service, turn) in &world.turns {
            assert_eq!(turns.get(service, 0).expect("a turn"), *turn, "turns of service {service}");
        }
        let chosen: Array<_, u64> = self.ebpf.map("CHOSEN").expect("CHOSEN").try_into().expect("an array");
        for (slot, flows) in &world.chosen {
            assert_eq!(chosen.get(slot, 0).expect("a count"), *flows, "choices of slot {slot}");
        }
        assert!(world.turns.len() == 2 && world.chosen.len() >= 6, "{:?} {:?}", world.turns, world.chosen);
        let answers: Array<_, Answers> = self.ebpf.map("ANSWERS").expect("ANSWERS").try_into().expect("an array");
        for (slot, expected) in &world.answers {
            assert_eq!(answers.get(slot, 0).expect("counts"), *expected, "answers of slot {slot}");
        }
        let some = |count: fn(&Answers) -> u32| world.answers.values().any(|answers| count(answers) > 0);
        assert!(some(|one| one.answered) && some(|one| one.refused), "{:?}", world.answers);
        assert!(world.trials.is_empty(), "each was taken: {:?}", world.trials);
    }
}

/// The object with its maps, none of its programs loaded yet.
fn object(loader: &mut EbpfLoader<'_>) -> Ebpf {
    // Kernels before 5.11 count maps against it. Where it may not be raised, as in some containers, it may still suffice.
    let _ = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY);
    let path = object_path();
    let object = std::fs::read(&path)
        .unwrap_or_else(|error| panic!("{}: {error} (run `cargo xtask build-ebpf`)", path.display()));
    loader.load(&object).expect("the object loads")
}

fn object_path() -> PathBuf {
    std::env::var_os("NODE_ENGINE_EBPF_OBJECT").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/ebpf/bpfel-unknown-none/release/netmanager"),
        PathBuf::from,
    )
}

#[test]
fn the_generator_is_worth_its_name() {
    let mut frames = Frames::new(3);
    let runnable = (0..1_000).map(|_| frames.frame()).filter(|(way, packet)| runnable(*way, packet)).count();
    assert!(runnable > 900, "{runnable}");
    assert_eq!(PORT, 1, "test runs arrive by loopback");
    assert!(matches!(Verdict::Slow(Miss::Service), Verdict::Slow(_)));
}
