//! The filter in the uplink's driver, on a real veth: what belongs comes through, what does not is gone before anybody sees it.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use node_engine::config::DatapathChoice::Ebpf;
use node_engine::config::XdpChoice;

use super::lab::{Lab, PATIENCE, Sniffer, TUNNEL_PORT, until};
use super::{PORT, SERVICES, exchange, fill, udp_packet};

/// Datagrams of a flood.
const FLOOD: usize = 100_000;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root"]
async fn what_does_not_belong_is_dropped_in_the_driver() {
    let mut lab = Lab::new();
    for node in &mut lab.nodes {
        node.underlay.xdp = XdpChoice::On;
    }
    lab.start(Ebpf).await;
    fill(&lab).await;
    let shown = |lab: &Lab| super::lab::shown(&lab.nodes[1], "wire");
    assert!(shown(&lab).contains("xdp"), "{}", shown(&lab));
    let (client, server) = (&lab.nodes[0].instances[0], &lab.nodes[1].instances[0]);
    for name in SERVICES {
        exchange(client, server, SocketAddr::new(name.parse().unwrap(), PORT)).await;
    }

    let sniffer = Sniffer::new(&lab.nodes[1]);
    let before = lab.nodes[1].counter("drop_foreign_source").await;
    let (seconds, sent) = flood(&lab);
    let dropped = || async { lab.nodes[1].counter("drop_foreign_source").await - before };
    until("all are counted", || async { dropped().await >= sent as u64 }).await;
    assert_eq!(sniffer.count(TUNNEL_PORT), 0, "nobody else has seen them");
    println!("in the driver: {sent} datagrams of a stranger in {seconds:?}");
    exchange(client, server, SocketAddr::new(SERVICES[0].parse().unwrap(), PORT)).await;

    // A daemon that is told otherwise takes it away; the datagrams go further, and are dropped all the same.
    lab.nodes[1].stop().await;
    lab.nodes[1].underlay.xdp = XdpChoice::Off;
    lab.nodes[1].start(Ebpf).await;
    let full = lab.full(1, SERVICES.map(|name| name.parse().unwrap()));
    lab.nodes[1].reconcile(full).await;
    lab.nodes[1].attach_all().await;
    until("the filter is gone", || async { !shown(&lab).contains("xdp") }).await;
    let before = lab.nodes[1].counter("drop_foreign_source").await;
    let (seconds, sent) = flood(&lab);
    let dropped = || async { lab.nodes[1].counter("drop_foreign_source").await - before };
    until("all are counted", || async { dropped().await >= sent as u64 }).await;
    println!("behind it: {sent} datagrams of a stranger in {seconds:?}");
}

/// The other node sends in the name of an instance that is not its own; gives how long that took, and how many were sent.
fn flood(lab: &Lab) -> (Duration, usize) {
    let [a, b] = [0, 1].map(|index| lab.nodes[1].instances[index].instance[0]);
    let bytes = |address| match address {
        std::net::IpAddr::V4(v4) => v4.octets(),
        std::net::IpAddr::V6(_) => unreachable!("the first family is IPv4"),
    };
    let std::net::IpAddr::V4(receiver) = lab.nodes[1].instances[0].namespace[0] else { unreachable!("as above") };
    assert_ne!(a, b);
    let packet = udp_packet(bytes(b), receiver.octets(), PORT, b"not mine");
    let to = SocketAddr::new(lab.nodes[1].address, TUNNEL_PORT);
    let socket = lab.nodes[0].netns().run(|| UdpSocket::bind("0.0.0.0:0")).unwrap().unwrap();
    socket.set_write_timeout(Some(PATIENCE)).unwrap();
    let begin = Instant::now();
    let sent = (0..FLOOD).filter(|_| socket.send_to(&packet, to).is_ok()).count();
    (begin.elapsed(), sent)
}
