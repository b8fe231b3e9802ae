//! Packets through our own programs and maps, before what they have replaced is given up: those of flows that are under way, and one to
//! an address that nobody has. The kernel runs the programs as for any packet, and delivers nothing.

use aya::programs::{SchedClassifier, TestRun, TestRunOptions};
use netmanager_common::abi::{FLOW_CHOSEN, FLOW_CLOSING, FLOW_SEEN, FlowKey};
use netmanager_common::addr::Addr;
use netmanager_common::frame::{SliceFrame, TCP, UDP};
use netmanager_common::pipeline::{Tables, outbound};
use netmanager_common::verdict::{Miss, Verdict};

use super::hooks::{Hook, classifier, interface};
use super::maps::BpfTables;
use crate::fault;

/// So many instances, and flows of theirs.
const INSTANCES: usize = 8;
const FLOWS: usize = 32;

const ETHERNET: usize = 14;
/// `linux/pkt_cls.h`
const PASSED: u32 = u32::MAX;
const REDIRECTED: u32 = 7;
/// Where `struct __sk_buff` has the interface.
const IFINDEX: usize = 40;
/// Room for a frame and what is put around it.
const ROOM: usize = 512;

/// # Errors
/// What a program did with a packet, and what it should have done.
pub(super) fn run(programs: &mut aya::Ebpf, tables: &mut BpfTables) -> Result<(), String> {
    fault::at("self-test")?;
    // Nothing has been carried yet.
    let Some(config) = tables.config() else { return Ok(()) };
    let program = classifier(programs, Hook::Veth).map_err(|error| error.to_string())?;
    let slow = if config.slow_ifindex == 0 { PASSED } else { REDIRECTED };
    let endpoints = tables.endpoints().map_err(|error| error.to_string())?;
    let here: Vec<(Addr, u32)> = endpoints
        .into_iter()
        .map(|(address, endpoint)| (address, endpoint.ifindex))
        .filter(|(_, ifindex)| interface(*ifindex).is_some())
        .collect();
    for (source, ifindex) in here.iter().take(INSTANCES) {
        let nobody = if source.is_v4() { config.service_v4 } else { config.service_v6 };
        let key = key(*source, nobody);
        match decided(tables, &key, *ifindex)? {
            // Somebody has it after all.
            Verdict::Send { .. } | Verdict::Local { .. } => {}
            Verdict::Slow(Miss::Service | Miss::Endpoint | Miss::Gone) => check(program, &key, *ifindex, slow, None)?,
            other => return Err(format!("the law says {other:?} of a packet to an address that nobody has")),
        }
    }
    let under_way = |kind: u8, state: u8| kind == FLOW_CHOSEN && state & (FLOW_SEEN | FLOW_CLOSING) == FLOW_SEEN;
    let flows = tables.some_flows().filter(|(key, flow)| {
        under_way(flow.kind, flow.state)
            && [TCP, UDP].map(u32::from).contains(&key.protocol)
            && here.contains(&(key.source, flow.port))
    });
    let flows: Vec<_> = flows.take(FLOWS).collect();
    for (key, flow) in flows {
        // What the law drops has lost its instance, or its peer, since the last daemon looked.
        let Ok(verdict) = decided(tables, &key, flow.port) else { continue };
        match verdict {
            Verdict::Send { peer } => {
                let to = tables.peer(peer).map(|peer| peer.host);
                check(program, &key, flow.port, REDIRECTED, to)?;
            }
            Verdict::Local { .. } => check(program, &key, flow.port, REDIRECTED, None)?,
            Verdict::Slow(_) => check(program, &key, flow.port, slow, None)?,
            Verdict::Pass => return Err(format!("the law passes a packet of the flow {key:?} by")),
        }
    }
    Ok(())
}

/// What the law says in user space, over the same maps.
fn decided(tables: &mut BpfTables, key: &FlowKey, ifindex: u32) -> Result<Verdict, String> {
    let mut frame = frame(key);
    let verdict = outbound(&mut SliceFrame::new(&mut frame[ETHERNET..]), tables, ifindex);
    verdict.map_err(|reason| format!("the law drops a packet of {key:?}: {}", reason.name()))
}

/// `to`: the node to which the packet must be on its way.
fn check(program: &SchedClassifier, key: &FlowKey, ifindex: u32, want: u32, to: Option<Addr>) -> Result<(), String> {
    let frame = frame(key);
    let mut context = [0; IFINDEX + 4];
    context[IFINDEX..].copy_from_slice(&ifindex.to_ne_bytes());
    let mut out = [0; ROOM];
    let options = TestRunOptions {
        data_in: Some(&frame),
        data_out: Some(&mut out),
        ctx_in: Some(&context),
        ..TestRunOptions::default()
    };
    // Kernels before 5.9 cannot be told by which interface a packet comes.
    let Ok(done) = program.test_run(options) else { return Ok(()) };
    let action = done.return_value;
    if action != want {
        return Err(format!(
            "a packet of {key:?} was given the action {}, not {}",
            action.cast_signed(),
            want.cast_signed()
        ));
    }
    let destination: [u8; 4] = out[ETHERNET + 16..ETHERNET + 20].try_into().unwrap_or_default();
    match to {
        Some(node) if node.is_v4() && Addr::v4(destination) != node => {
            Err(format!("a packet of {key:?} went to {destination:?}, not to {node:?}"))
        }
        _ => Ok(()),
    }
}

fn key(source: Addr, destination: Addr) -> FlowKey {
    let [source_port, destination_port] = [9_u16; 2].map(u16::to_be_bytes);
    FlowKey { source, destination, source_port, destination_port, protocol: UDP.into() }
}

/// An empty packet of the flow, of the middle of its life.
fn frame(key: &FlowKey) -> Vec<u8> {
    let mut transport = [key.source_port, key.destination_port].concat();
    if key.protocol == u32::from(TCP) {
        // Only ACK is set.
        transport.extend([0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 0, 0, 0, 0, 0, 0]);
    } else {
        transport.extend([0, 8, 0, 0]);
    }
    let len = transport.len() as u16;
    let mut frame = vec![0; ETHERNET - 2];
    let protocol = key.protocol as u8;
    if key.source.is_v4() {
        let [high, low] = (20 + len).to_be_bytes();
        frame.extend([8, 0, 0x45, 0, high, low, 0, 0, 0, 0, 64, protocol, 0, 0]);
        frame.extend(key.source.v4_bytes());
        frame.extend(key.destination.v4_bytes());
    } else {
        let [high, low] = len.to_be_bytes();
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, high, low, protocol, 64]);
        frame.extend(key.source.0);
        frame.extend(key.destination.0);
    }
    frame.extend(transport);
    frame
}

#[cfg(test)]
mod tests {
    use netmanager_common::testing::World;

    use super::*;

    #[test]
    fn frames_are_of_their_flow() {
        let v4 = [Addr::v4([10, 18, 1, 2]), Addr::v4([10, 30, 0, 0])];
        let v6 = [1, 2].map(|last| Addr([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]));
        for [source, destination] in [v4, v6] {
            for protocol in [TCP, UDP].map(u32::from) {
                let key = FlowKey { protocol, ..key(source, destination) };
                let mut frame = frame(&key);
                let read = crate::netmanager::datapath::host::key(&frame[ETHERNET..]);
                assert_eq!(read, Some((key, 0)));
                // Whatever the law makes of it, it reads it.
                let _ = outbound(&mut SliceFrame::new(&mut frame[ETHERNET..]), &mut World::sample(), 0);
            }
        }
    }
}
