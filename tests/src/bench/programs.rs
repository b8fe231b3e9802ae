//! The kernel's programs by themselves, attached to nothing: how large they are, and what one packet costs in them by
//! `BPF_PROG_TEST_RUN`. That covers the program alone, not what the kernel does with its verdict.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use aya::maps::{Array, HashMap, MapData};
use aya::programs::SchedClassifier;
use aya::{Ebpf, EbpfLoader, Pod, TestRun, TestRunOptions};
use netmanager_common::abi::Service;
use netmanager_common::addr::Addr;
use netmanager_common::frame::{FRAMED_MACS, Vxlan};
use netmanager_common::testing::{CLIENT, DB_SERVICE, DB0_INSTANCE, HERE, OURS, Payload, WEB_SERVICE, World, packet};
use netmanager_common::{TUNNEL_PORT, checksum, framed_port};
use serde::Serialize;

use super::report::median;

pub const VETH: &str = "tc_veth_ingress";
pub const UPLINK: &str = "tc_uplink_ingress";
pub const FRAMED: &str = "tc_framed_ingress";
/// Drops what it sees: what the measurement itself costs.
const NOTHING: &str = "tc_framing_ingress";

const PROGRAMS: [&str; 4] = [VETH, UPLINK, FRAMED, NOTHING];
const RUNS: usize = 20_000;
const REDIRECTED: u32 = 7;
const FRAMED_PORT: [u8; 2] = match framed_port(TUNNEL_PORT) {
    Some(port) => port.to_be_bytes(),
    None => [0; 2],
};

/// A program, and what packets cost in it.
#[derive(Clone, Debug, Serialize)]
pub struct Program {
    pub name: &'static str,
    /// Instructions that the verifier walked.
    pub verified: u32,
    /// Bytes of machine code.
    pub jited: u32,
    pub packets: Vec<Cost>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Cost {
    pub packet: &'static str,
    /// Nanoseconds, the median.
    pub ns: f64,
}

/// Loads the programs with a small world and runs packets through them.
///
/// # Errors
/// Where the object is not built, or a packet is not carried.
pub fn measure() -> Result<Vec<Program>> {
    let mut world = World::sample();
    for peer in world.peers.values_mut() {
        peer.framed_port = FRAMED_PORT;
    }
    let framed = Kernel::load(&world)?;
    let bare = Kernel::load(&World::sample())?;
    let nothing = framed.cost(NOTHING, &outbound(80), None)?;
    let cost = |packet, kernel: &Kernel, program, frame: &[u8]| -> Result<Cost> {
        // The first one opens the flow.
        kernel.run(program, frame)?;
        Ok(Cost { packet, ns: (kernel.cost(program, frame, Some(REDIRECTED))? - nothing).max(0.0) })
    };
    let out = outbound(80);
    let local = ethernet([0x08, 0], &packet(CLIENT.v4(), WEB_SERVICE.v4(), Payload::Udp(40_000, 80)));
    let reply = packet(DB0_INSTANCE.v4(), CLIENT.v4(), Payload::Udp(80, 40_000));
    let costs = [
        (
            VETH,
            vec![
                cost("to a peer, framed", &framed, VETH, &out)?,
                cost("to a peer, bare", &bare, VETH, &out)?,
                cost("to a neighbour", &framed, VETH, &local)?,
                framed.new_flows(nothing, "a new flow", 1_000..11_000)?,
            ],
        ),
        (UPLINK, vec![cost("from a peer, bare", &bare, UPLINK, &tunnelled(&reply, false))?]),
        (FRAMED, vec![cost("from a peer, framed", &framed, FRAMED, &tunnelled(&reply, true))?]),
        (NOTHING, Vec::new()),
    ];
    costs.into_iter().map(|(name, packets)| framed.program(name, packets)).collect()
}

/// New flows a second and core beside 65,536 live ones, each with its two rows; and how many were live.
///
/// # Errors
/// As [`measure`].
pub fn new_flows() -> Result<(f64, usize)> {
    const LIVE: usize = 65_536;
    let kernel = Kernel::load(&World::sample())?;
    let nothing = kernel.cost(NOTHING, &outbound(80), None)?;
    for number in 0..LIVE {
        kernel.carried(VETH, &flow(number))?;
    }
    let cost = kernel.new_flows(nothing, "", LIVE..LIVE + RUNS)?;
    // All of the first are still there: none was put out for another.
    let rows: HashMap<_, netmanager_common::abi::FlowKey, netmanager_common::abi::Flow> =
        kernel.ebpf.map("FLOWS").context("no FLOWS")?.try_into()?;
    let live = rows.keys().filter_map(Result::ok).count() / 2;
    anyhow::ensure!(live == LIVE + RUNS, "{live} flows are live, not {}", LIVE + RUNS);
    Ok((1e9 / cost.ns, live))
}

/// The programs and maps in this kernel.
struct Kernel {
    ebpf: Ebpf,
}

impl Kernel {
    fn load(world: &World) -> Result<Self> {
        let path = object_path();
        let object = std::fs::read(&path).with_context(|| format!("{} (cargo xtask build-ebpf)", path.display()))?;
        // Chance always shows the candidate with the first peer, which is one of ours.
        let mut ebpf = EbpfLoader::new().override_global("FIXED_PICK", &3_u64, true).load(&object)?;
        for name in PROGRAMS {
            let program: &mut SchedClassifier = ebpf.program_mut(name).context(name)?.try_into()?;
            program.load().with_context(|| format!("the kernel refuses {name}"))?;
        }
        let mut kernel = Self { ebpf };
        kernel.fill(world)?;
        Ok(kernel)
    }

    fn fill(&mut self, world: &World) -> Result<()> {
        self.array("CONFIG")?.set(0, world.config, 0)?;
        for (index, slot) in &world.slots {
            self.array("SLOTS")?.set(*index, *slot, 0)?;
        }
        for (index, peer) in &world.peers {
            self.array("PEERS")?.set(*index, *peer, 0)?;
        }
        let services: Vec<(Addr, Service)> = world.services.iter().map(|(key, row)| (*key, *row)).collect();
        self.rows("SERVICES", services)?;
        self.rows("CANDIDATES", world.candidates.iter().map(|(key, row)| (*key, *row)))?;
        self.rows("ENDPOINTS", world.endpoints.iter().map(|(key, row)| (*key, *row)))
    }

    fn array<T: Pod>(&mut self, name: &str) -> Result<Array<&mut MapData, T>> {
        Ok(self.ebpf.map_mut(name).with_context(|| format!("no map {name}"))?.try_into()?)
    }

    fn rows<K: Pod, V: Pod>(&mut self, name: &str, rows: impl IntoIterator<Item = (K, V)>) -> Result<()> {
        let map = self.ebpf.map_mut(name).with_context(|| format!("no map {name}"))?;
        let mut map: HashMap<_, K, V> = map.try_into()?;
        rows.into_iter().try_for_each(|(key, value)| map.insert(key, value, 0)).with_context(|| name.to_owned())
    }

    fn classifier(&self, name: &str) -> Result<&SchedClassifier> {
        Ok(self.ebpf.program(name).with_context(|| format!("no program {name}"))?.try_into()?)
    }

    fn program(&self, name: &'static str, packets: Vec<Cost>) -> Result<Program> {
        let info = self.classifier(name)?.info()?;
        let verified = info.verified_instruction_count().unwrap_or(0);
        Ok(Program { name, verified, jited: info.size_jitted(), packets })
    }

    /// What became of the frame, and how long that took.
    fn run(&self, program: &str, frame: &[u8]) -> Result<(u32, Duration)> {
        let options = TestRunOptions { data_in: Some(frame), ..TestRunOptions::default() };
        let result = self.classifier(program)?.test_run(options).with_context(|| program.to_owned())?;
        Ok((result.return_value, result.duration))
    }

    fn carried(&self, program: &str, frame: &[u8]) -> Result<f64> {
        let (action, time) = self.run(program, frame)?;
        anyhow::ensure!(action == REDIRECTED, "{program} did not carry the packet: action {action}");
        Ok(time.as_nanos() as f64)
    }

    /// Nanoseconds. Each run has its own frame, as a program changes the one it gets.
    fn cost(&self, program: &str, frame: &[u8], expected: Option<u32>) -> Result<f64> {
        let mut times = Vec::with_capacity(RUNS);
        for _ in 0..RUNS {
            let (action, time) = self.run(program, frame)?;
            let expected = expected.unwrap_or(action);
            anyhow::ensure!(action == expected, "{program} did not carry the packet: action {action}");
            times.push(time.as_nanos() as f64);
        }
        median(times).context("no runs")
    }

    /// What the first packet of each of these flows costs.
    fn new_flows(&self, nothing: f64, packet: &'static str, flows: std::ops::Range<usize>) -> Result<Cost> {
        let times: Vec<f64> = flows.map(|number| self.carried(VETH, &flow(number))).collect::<Result<_>>()?;
        Ok(Cost { packet, ns: (median(times).context("no flows")? - nothing).max(1.0) })
    }
}

/// A datagram: what begins a connection is not decided by the row of one before it.
fn outbound(port: u16) -> Vec<u8> {
    ethernet([0x08, 0], &packet(CLIENT.v4(), DB_SERVICE.v4(), Payload::Udp(40_000, port)))
}

/// The first packet of the flow of this number.
fn flow(number: usize) -> Vec<u8> {
    let (source, destination) = (1_024 + (number % 50_000) as u16, 1_000 + (number / 50_000) as u16);
    ethernet([0x08, 0], &packet(CLIENT.v4(), DB_SERVICE.v4(), Payload::Udp(source, destination)))
}

fn ethernet(protocol: [u8; 2], packet: &[u8]) -> Vec<u8> {
    [&[0x02, 0xaa, 0, 0, 0, 1, 0x02, 0xbb, 0, 0, 0, 2][..], &protocol, packet].concat()
}

/// As it comes from db#0's node.
fn tunnelled(inner: &[u8], framed: bool) -> Vec<u8> {
    let (port, framing) = if framed {
        let (vxlan, macs) = (Vxlan::OURS, FRAMED_MACS);
        let ethernet = [&macs.destination.0[..], &macs.source.0, &[0x08, 0]].concat();
        (FRAMED_PORT, [&vxlan.flags[..], &vxlan.vni, &ethernet].concat())
    } else {
        (TUNNEL_PORT.to_be_bytes(), Vec::new())
    };
    let len = (inner.len() + framing.len() + 8) as u16;
    let mut header = [&[0x45, 0][..], &(len + 20).to_be_bytes(), &[0, 0, 0x40, 0, 64, 17, 0, 0]].concat();
    header.extend(OURS.v4_bytes());
    header.extend(HERE.v4_bytes());
    let sum = !checksum::fold(checksum::sum(0, &header));
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    let udp = [&[0xc0, 1][..], &port, &len.to_be_bytes(), &[0, 0]].concat();
    ethernet([0x08, 0], &[&header[..], &udp, &framing, inner].concat())
}

fn object_path() -> PathBuf {
    std::env::var_os("NODE_ENGINE_EBPF_OBJECT").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/ebpf/bpfel-unknown-none/release/netmanager"),
        PathBuf::from,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use netmanager_common::frame::SliceFrame;
    use netmanager_common::pipeline::{inbound, outbound as law};
    use netmanager_common::testing::{CLIENT_INSTANCE, DB0};
    use netmanager_common::verdict::Verdict;

    #[test]
    fn the_packets_are_carried() {
        let mut world = World { pick: 2, ..World::sample() };
        let mut out = outbound(80).split_off(14);
        assert_eq!(law(&mut SliceFrame::new(&mut out), &mut world, 1), Ok(Verdict::Send { peer: 1 }));
        assert_eq!(netmanager_common::testing::addresses(&out), (CLIENT_INSTANCE.v4(), DB0.v4()));
        let mut back = packet(DB0_INSTANCE.v4(), CLIENT.v4(), Payload::Udp(80, 40_000));
        let verdict = inbound(&mut SliceFrame::new(&mut back), &mut world, &OURS);
        assert!(matches!(verdict, Ok(Verdict::Local { .. })), "{verdict:?}");
        assert_eq!(netmanager_common::testing::addresses(&back).0, DB_SERVICE.v4(), "the reply regains the service");
    }
}
