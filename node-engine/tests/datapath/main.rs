//! Real packets through both datapaths: two nodes, real namespaces, real TCP and UDP.
#![expect(clippy::unwrap_used, reason = "a test panics where it cannot go on")]

mod filter;
mod gone;
mod lab;
mod newcomers;
mod pings;
mod upgrade;

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use aya::programs::{SchedClassifier, TcAttachType};
use netmanager_common::ABI_VERSION;
use netmanager_common::abi::Endpoint;
use netmanager_common::addr::Addr;
use netmanager_common::frame::control_framing;
use nix::sys::socket::{setsockopt, sockopt::ReceiveTimeout};
use nix::sys::time::{TimeVal, TimeValLike};
use node_engine::config::DatapathChoice::{self, Ebpf, Tun};
use node_engine::netmanager::datapath::{DatapathError, Event, TableDelta, Underlay, choose, uninstall};
use node_engine::netns::Netns;

use self::gone::{
    a_flood_of_flows_costs_others_nothing, answers_are_counted_and_a_trial_is_one_flow,
    who_calls_a_service_without_instances_is_told, who_has_a_connection_to_an_instance_that_goes_is_reset,
};
use self::lab::{Instance, Lab, Node, PATIENCE, Sniffer, TUNNEL_PORT, addr, blocking, service, until};
use self::pings::{Pinged, Pings};

const SERVICES: [&str; 2] = ["10.30.50.2", "fdff:2000::1"];
const PORT: u16 = 8080;
const SWITCHES: usize = 20;

/// Each case once for every datapath.
macro_rules! on_both {
    ($($case:ident),* $(,)?) => {
        mod tun { $( #[tokio::test(flavor = "multi_thread")] #[ignore = "needs root"]
            async fn $case() { super::$case(super::Tun).await; } )* }
        mod ebpf { $( #[tokio::test(flavor = "multi_thread")] #[ignore = "needs root"]
            async fn $case() { super::$case(super::Ebpf).await; } )* }
    };
}

mod odd;

on_both! {
    a_service_is_reached_across_nodes,
    a_service_is_reached_on_the_same_node,
    the_first_packet_of_an_unknown_address_is_not_lost,
    a_connection_through_unknown_addresses_opens_at_once,
    an_unknown_address_stalls_nobody,
    garbage_does_no_harm,
    a_stranger_is_not_heard,
    a_flow_stays_with_its_instance,
    a_sender_without_a_name_waits_for_it,
    an_ipv6_underlay_carries_both_families,
    a_restart_breaks_no_connection,
    who_has_a_connection_to_an_instance_that_goes_is_reset,
    who_calls_a_service_without_instances_is_told,
    answers_are_counted_and_a_trial_is_one_flow,
    a_flood_of_flows_costs_others_nothing,
}

async fn a_service_is_reached_across_nodes(choice: DatapathChoice) {
    let lab = ready(choice).await;
    for (family, name) in SERVICES.into_iter().enumerate() {
        let to = SocketAddr::new(name.parse().unwrap(), PORT);
        let seen = exchange(&lab.nodes[0].instances[0], &lab.nodes[1].instances[0], to).await;
        assert_eq!(seen, lab.nodes[0].instances[0].instance[family], "the server sees the client's instance address");
    }
    for node in &lab.nodes {
        let [sent, received] = [node.counter("sent").await, node.counter("received").await];
        assert!(sent > 100 && received > 100, "{:?}", node.counters().await);
        let drops = node.counters().await.into_iter().filter(|(name, _)| name.starts_with("drop_"));
        // The kernel's own chatter on the TUN device.
        let drops: Vec<_> = drops.filter(|(name, _)| name != "drop_not_service").collect();
        assert_eq!(drops, []);
        if choice == Ebpf {
            assert_eq!(node.counter("slow").await, 0, "the kernel needs no help with known addresses");
        }
    }
}

async fn a_service_is_reached_on_the_same_node(choice: DatapathChoice) {
    let lab = ready(choice).await;
    for (family, (name, slot)) in SERVICES.into_iter().zip([6, 8]).enumerate() {
        let address: IpAddr = name.parse().unwrap();
        lab.nodes[0].apply(service(address, 1 + family as u32, 2, &[slot])).await;
        let [client, server] = [&lab.nodes[0].instances[0], &lab.nodes[0].instances[1]];
        let seen = exchange(client, server, SocketAddr::new(address, PORT)).await;
        assert_eq!(seen, client.instance[family]);
    }
    assert_eq!(lab.nodes[0].counter("sent").await, 0, "nothing has left the node");
}

async fn the_first_packet_of_an_unknown_address_is_not_lost(choice: DatapathChoice) {
    let mut lab = Lab::new();
    lab.start(choice).await;
    let (client, server) = (&lab.nodes[0].instances[0], &lab.nodes[1].instances[0]);
    let server = client_socket(server, PORT);
    let client_socket = client_socket(client, 0);

    let to = SocketAddr::new(SERVICES[0].parse().unwrap(), PORT);
    client_socket.send_to(b"first", to).unwrap();
    client_socket.send_to(b"second", to).unwrap();
    assert_eq!(lab.nodes[0].event().await, Event::UnknownService(addr(SERVICES[0])));
    lab.nodes[0].apply(service(to.ip(), 1, 1, &[1])).await;

    // Now the other node asks whose address the sender's is.
    let source = client.instance[0];
    assert_eq!(lab.nodes[1].event().await, Event::UnknownService(source.into()));
    lab.nodes[1].apply(lab.instance_rows(1)).await;

    let mut buffer = [0; 16];
    for expected in [&b"first"[..], b"second"] {
        let (len, from) = server.recv_from(&mut buffer).expect("a held packet was lost");
        assert_eq!((&buffer[..len], from.ip()), (expected, source));
    }
    assert!(lab.nodes[0].counter("held").await >= 1);
}

/// The service, and the client at the server's node: two packets are held, and none is sent again. Whose address the server's is,
/// the client's node need not ask: the flow says from which instance its replies come.
async fn a_connection_through_unknown_addresses_opens_at_once(choice: DatapathChoice) {
    let mut lab = Lab::new();
    lab.start(choice).await;
    let (client, server) = (&lab.nodes[0].instances[0], &lab.nodes[1].instances[0]);
    let to = SocketAddr::new(SERVICES[0].parse().unwrap(), PORT);
    let _listener = server.run(|| TcpListener::bind((server.namespace[0], PORT))).unwrap();
    let netns = client.run(Netns::current).unwrap();
    let connect = thread::spawn(move || {
        let begin = Instant::now();
        let connected = netns.run(|| TcpStream::connect_timeout(&to, PATIENCE)).unwrap();
        (connected.map(drop), begin.elapsed())
    });

    assert_eq!(lab.nodes[0].event().await, Event::UnknownService(to.ip().into()));
    lab.nodes[0].apply(service(to.ip(), 1, 1, &[1])).await;
    assert_eq!(lab.nodes[1].event().await, Event::UnknownService(client.instance[0].into()));
    lab.nodes[1].apply(lab.instance_rows(1)).await;

    let (connected, elapsed) = tokio::task::spawn_blocking(|| connect.join()).await.unwrap().unwrap();
    connected.expect("no connection");
    assert!(elapsed < Duration::from_millis(900), "a segment was sent again: {elapsed:?}");
}

async fn an_unknown_address_stalls_nobody(choice: DatapathChoice) {
    let lab = ready(choice).await;
    let node = &lab.nodes[0];
    let stuck = client_socket(&node.instances[1], 0);
    let unknown: SocketAddr = "10.30.99.99:1".parse().unwrap();
    stuck.send_to(b"stuck", unknown).unwrap();
    assert_eq!(node.event().await, Event::UnknownService(unknown.ip().into()));

    let to = SocketAddr::new(SERVICES[0].parse().unwrap(), PORT);
    exchange(&node.instances[0], &lab.nodes[1].instances[0], to).await;

    node.call(move |datapath| async move { datapath.give_up(unknown.ip().into()).await }).await;
    stuck.send_to(b"again", unknown).unwrap();
    until("what waits for an address nobody knows is dropped, and so is what follows", || async {
        node.counter("drop_unknown").await == 2
    })
    .await;
}

async fn garbage_does_no_harm(choice: DatapathChoice) {
    let lab = ready(choice).await;
    let node = &lab.nodes[1];
    let sender = lab.nodes[0].netns().run(|| UdpSocket::bind((lab.nodes[0].address, 0))).unwrap().unwrap();
    let tunnel = SocketAddr::new(node.address, TUNNEL_PORT);
    let mut garbage: Vec<Vec<u8>> =
        vec![vec![], vec![0x45], vec![0x60; 3], vec![0x4f; 30], vec![0x60; 39], vec![0x45; 1400]];
    // Every length of an otherwise plausible packet.
    garbage.extend((1..60).map(|len| [[0x45, 0, 0, 60].as_slice(), &[0; 60]].concat()[..len].to_vec()));
    for datagram in &garbage {
        sender.send_to(datagram, tunnel).unwrap();
    }
    // First nibble neither 4 nor 6: a word from node to node.
    sender.send_to(b"\x10hello", tunnel).unwrap();
    let control = Event::Control { from: sender.local_addr().unwrap(), payload: b"\x10hello".to_vec() };
    assert_eq!(node.event().await, control);

    let dropped = ["drop_garbage", "drop_malformed", "drop_not_ours", "drop_protocol"];
    until("each datagram is counted", || async {
        let mut sum = 0;
        for name in dropped {
            sum += node.counter(name).await;
        }
        sum == garbage.len() as u64
    })
    .await;

    let to = SocketAddr::new(SERVICES[0].parse().unwrap(), PORT);
    exchange(&lab.nodes[0].instances[0], &lab.nodes[1].instances[0], to).await;
}

/// A packet from the right node in the name of an instance that is not on it, and the other way round.
async fn a_stranger_is_not_heard(choice: DatapathChoice) {
    let lab = ready(choice).await;
    let node = &lab.nodes[1];
    let server = client_socket(&node.instances[0], PORT);
    let sender = lab.nodes[0].netns().run(|| UdpSocket::bind((lab.nodes[0].address, 0))).unwrap().unwrap();
    // The second instance of the receiving node itself.
    let forged = udp_packet([10, 30, 1, 2], [10, 18, 1, 2], PORT, b"forged");
    let honest = udp_packet([10, 30, 0, 1], [10, 18, 1, 2], PORT, b"honest");
    sender.send_to(&forged, (node.address, TUNNEL_PORT)).unwrap();
    sender.send_to(&honest, (node.address, TUNNEL_PORT)).unwrap();

    let mut buffer = [0; 16];
    let (len, from) = server.recv_from(&mut buffer).expect("nothing arrived");
    assert_eq!((&buffer[..len], from.ip()), (&b"honest"[..], lab.nodes[0].instances[0].instance[0]));
    until("the forged packet is counted", || async { node.counter("drop_foreign_source").await == 1 }).await;
}

async fn a_flow_stays_with_its_instance(choice: DatapathChoice) {
    let lab = ready(choice).await;
    let to = SocketAddr::new(SERVICES[0].parse().unwrap(), PORT);
    lab.nodes[0].apply(service(to.ip(), 1, 2, &[1, 2])).await;
    let servers = [0, 1].map(|i| client_socket(&lab.nodes[1].instances[i], PORT));
    for server in &servers {
        let server = server.try_clone().unwrap();
        thread::spawn(move || echo_udp(&server, 40));
    }
    let mut counts = [0; 2];
    for _ in 0..20 {
        let client = client_socket(&lab.nodes[0].instances[0], 0);
        client.send_to(b"who", to).unwrap();
        let first = answer(&client);
        counts[usize::from(first.ends_with(lab.nodes[1].instances[1].namespace[0].to_string().as_bytes()))] += 1;
        // The list changes under the flow, which stays.
        lab.nodes[0].apply(service(to.ip(), 1, 3, &[2, 1])).await;
        client.send_to(b"who", to).unwrap();
        assert_eq!(answer(&client), first);
        lab.nodes[0].apply(service(to.ip(), 1, 4, &[1, 2])).await;
    }
    assert!(counts.iter().all(|count| *count > 0), "new flows spread: {counts:?}");
}

async fn a_sender_without_a_name_waits_for_it(choice: DatapathChoice) {
    let lab = ready(choice).await;
    let (client, server) = (&lab.nodes[0].instances[0], &lab.nodes[1].instances[0]);
    let (nameless, named): (Vec<_>, Vec<_>) = {
        let endpoints = lab.base(0).endpoints.into_iter().filter(|(address, _)| *address == client.namespace[0].into());
        endpoints.map(|row| ((row.0, Endpoint { instance: Addr::NONE, ..row.1 }), row)).unzip()
    };
    lab.nodes[0].apply(TableDelta { endpoints: nameless, ..TableDelta::default() }).await;
    let [server, client_socket] = [client_socket(server, PORT), client_socket(client, 0)];
    client_socket.send_to(b"early", (SERVICES[0], PORT)).unwrap();
    assert_eq!(lab.nodes[0].event().await, Event::UnknownEndpoint(client.namespace[0].into()));
    lab.nodes[0].apply(TableDelta { endpoints: named, ..TableDelta::default() }).await;
    let mut buffer = [0; 16];
    let (len, from) = server.recv_from(&mut buffer).expect("the packet was lost");
    assert_eq!((&buffer[..len], from.ip()), (&b"early"[..], client.instance[0]));
}

async fn an_ipv6_underlay_carries_both_families(choice: DatapathChoice) {
    let mut lab = Lab::with_underlay(["fd00:77::1".parse().unwrap(), "fd00:77::2".parse().unwrap()]);
    lab.start(choice).await;
    fill(&lab).await;
    for name in SERVICES {
        let to = SocketAddr::new(name.parse().unwrap(), PORT);
        exchange(&lab.nodes[0].instances[0], &lab.nodes[1].instances[0], to).await;
    }
}

/// A connection, and a stream of numbered datagrams, over three ends and starts of the client's daemon.
async fn a_restart_breaks_no_connection(choice: DatapathChoice) {
    const DATAGRAMS: u32 = 20_000;
    let mut lab = ready(choice).await;
    let to = SocketAddr::new(SERVICES[0].parse().unwrap(), PORT);
    let (client, server) = (&lab.nodes[0].instances[0], &lab.nodes[1].instances[0]);
    let listener = server.run(|| TcpListener::bind(("0.0.0.0", PORT))).unwrap();
    let receiver = client_socket(server, PORT + 1);
    let sender = client_socket(client, 0);
    let mut stream = client.run(|| TcpStream::connect_timeout(&to, PATIENCE)).unwrap();
    let (mut served, _) = listener.accept().unwrap();
    stream.set_nodelay(true).unwrap();

    let received = thread::spawn(move || {
        let (mut next, mut count) = (0_u32, 0);
        let mut buffer = [0; 4];
        while next < DATAGRAMS && receiver.recv_from(&mut buffer).is_ok() {
            assert!(u32::from_be_bytes(buffer) >= next, "out of order or twice");
            next = u32::from_be_bytes(buffer) + 1;
            count += 1;
        }
        count
    });
    let done = Arc::new(AtomicBool::new(false));
    let finished = done.clone();
    let paced = thread::spawn(move || {
        for number in 0..DATAGRAMS {
            sender.send_to(&number.to_be_bytes(), (to.ip(), PORT + 1)).unwrap();
            if number % 10 == 9 {
                thread::sleep(Duration::from_millis(1));
            }
        }
        // Until the receiver has seen the last one.
        while !finished.load(Relaxed) {
            sender.send_to(&(DATAGRAMS - 1).to_be_bytes(), (to.ip(), PORT + 1)).unwrap();
            thread::sleep(Duration::from_millis(20));
        }
    });

    for round in 0..3_u8 {
        lab.nodes[0].stop().await;
        lab.nodes[0].start(choice).await;
        let snapshot = lab.nodes[0].call(|datapath| async move { datapath.snapshot().await }).await.unwrap();
        assert!(!snapshot.services.is_empty(), "what the earlier run knew is adopted");
        let full = lab.full(0, SERVICES.map(|name| name.parse().unwrap()));
        lab.nodes[0].reconcile(full).await;
        lab.nodes[0].attach_all().await;

        stream.write_all(&[round; 100]).unwrap();
        let mut buffer = [0; 100];
        served.set_read_timeout(Some(PATIENCE)).unwrap();
        served.read_exact(&mut buffer).expect("the connection is broken");
        assert_eq!(buffer, [round; 100]);
    }
    let count = tokio::task::spawn_blocking(|| received.join()).await.unwrap().unwrap();
    done.store(true, Relaxed);
    tokio::task::spawn_blocking(|| paced.join()).await.unwrap().unwrap();
    if choice == Ebpf {
        assert_eq!(count, DATAGRAMS, "datagrams were lost: {:?}", lab.nodes[0].counters().await);
    }
}

/// What a bare packet does, a framed one does, too: both families, senders that are asked for first, control datagrams.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root"]
async fn framing_carries_what_bare_datagrams_do() {
    let mut lab = Lab::new();
    lab.start(Ebpf).await;
    lab.frame().await;
    let (client, server) = (&lab.nodes[0].instances[0], &lab.nodes[1].instances[0]);
    let to = SocketAddr::new(SERVICES[0].parse().unwrap(), PORT);
    lab.nodes[0].apply(service(to.ip(), 1, 1, &[1])).await;
    {
        let [server, client_socket] = [client_socket(server, PORT), client_socket(client, 0)];
        client_socket.send_to(b"first", to).unwrap();
        assert_eq!(lab.nodes[1].event().await, Event::UnknownService(client.instance[0].into()));
        lab.nodes[1].apply(lab.instance_rows(1)).await;
        let mut buffer = [0; 16];
        let (len, from) = server.recv_from(&mut buffer).expect("the held packet was lost");
        assert_eq!((&buffer[..len], from.ip()), (&b"first"[..], client.instance[0]));
    }

    fill(&lab).await;
    lab.frame_peers().await;
    for name in SERVICES {
        let sniffers = [0, 1].map(|index| Sniffer::new(&lab.nodes[index]));
        let to = SocketAddr::new(name.parse().unwrap(), PORT);
        exchange(client, server, to).await;
        for sniffer in sniffers {
            assert!(sniffer.count(TUNNEL_PORT + 1) > 10);
        }
    }
    let bare = Sniffer::new(&lab.nodes[1]);
    exchange(client, server, to).await;
    assert_eq!(bare.count(TUNNEL_PORT), 0, "nothing went bare");
    let drops = lab.nodes[1].counters().await.into_iter().filter(|(name, _)| name.starts_with("drop_"));
    assert_eq!(drops.filter(|(name, _)| name != "drop_not_service").collect::<Vec<_>>(), []);

    let mut payload = control_framing().to_vec();
    payload.extend(b"\x9e\x6eabc");
    let to = SocketAddr::new(lab.nodes[1].address, TUNNEL_PORT + 1);
    lab.nodes[0].call(move |datapath| async move { datapath.send_control(to, &payload).await }).await.unwrap();
    let from = SocketAddr::new(lab.nodes[0].address, TUNNEL_PORT);
    assert_eq!(lab.nodes[1].event().await, Event::Control { from, payload: b"\x9e\x6eabc".to_vec() });
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root"]
async fn detached_and_uninstalled_nothing_is_left() {
    let mut lab = ready(Ebpf).await;
    let node = &lab.nodes[0];
    let attached = |node: &Node| {
        let count = |name: &str| SchedClassifier::query_tcx(name, TcAttachType::Ingress).unwrap().1.len();
        node.netns().run(|| ["host1", "host2", "wire"].map(count)).unwrap()
    };
    assert_eq!(attached(node), [1, 1, 2], "bare and framed packets");
    node.attach_all().await;
    assert_eq!(attached(node), [1, 1, 2], "attaching is repeatable");
    node.detach_all().await;
    node.detach_all().await;
    // The kernel frees an unpinned link a moment later.
    until("detached programs are gone", || async { attached(node) == [0, 0, 2] }).await;
    node.attach_all().await;

    lab.nodes[0].stop().await;
    let node = &lab.nodes[0];
    assert_eq!(attached(node), [1, 1, 2], "programs outlive the daemon");
    let pins = node.underlay.pin_dir.clone();
    assert!(pins.join(format!("v{ABI_VERSION}/maps/SERVICES")).exists());
    assert!(node.netns().run(|| uninstall(&pins)).unwrap().is_empty());
    until("all programs are gone", || async { attached(node) == [0, 0, 0] }).await;
    assert_eq!(std::fs::read_dir(&pins).unwrap().count(), 0);
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(pins.to_str().unwrap()), "what was mounted is unmounted");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root"]
async fn each_datapath_takes_over_from_the_other() {
    let mut lab = ready(Ebpf).await;
    let to = SocketAddr::new(SERVICES[0].parse().unwrap(), PORT);
    for choice in [Tun, Ebpf, Tun] {
        for index in 0..2 {
            lab.nodes[index].stop().await;
            lab.nodes[index].start(choice).await;
            let full = lab.full(index, SERVICES.map(|name| name.parse().unwrap()));
            lab.nodes[index].reconcile(full).await;
            lab.nodes[index].attach_all().await;
        }
        exchange(&lab.nodes[0].instances[0], &lab.nodes[1].instances[0], to).await;
        assert!(lab.nodes[0].counter("sent").await > 0);
    }
}

/// A rung to the other, again and again, between two packets of a flow each millisecond: none is lost, none is late, and the echoes
/// come from the instance that the flow has chosen.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root"]
async fn a_change_of_rung_costs_no_flow_a_packet() {
    let mut lab = Lab::new();
    lab.start(Tun).await;
    fill(&lab).await;
    let to = SocketAddr::new(SERVICES[0].parse().unwrap(), PORT);
    let pings = Pings::begin(&lab, to).await;
    for turn in 0..SWITCHES {
        let choice = [Ebpf, Tun, DatapathChoice::EbpfPlain, Tun][turn % 4];
        for node in &lab.nodes {
            node.call(move |datapath| async move { datapath.switch(choice, "a test").await })
                .await
                .expect("it changes");
        }
    }
    let Pinged { longest, lost, sent } = tokio::task::spawn_blocking(|| pings.finish()).await.unwrap();
    println!("{SWITCHES} changes of both nodes, {sent} datagrams, {lost} lost, the longest round trip {longest:?}");
    assert!(sent > 100 && lost == 0, "{lost} of {sent} were lost");
    assert!(longest < Duration::from_millis(500), "{longest:?}");
}

#[test]
#[ignore = "needs root"]
fn auto_falls_back_and_says_why() {
    let lab = Lab::new();
    let underlay = Underlay { uplink: "nonesuch".into(), uplink_ifindex: 99, ..lab.nodes[0].underlay.clone() };
    let try_out = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let refused = choose(Ebpf, &underlay, Arc::default()).await.expect_err("there is no such uplink");
            assert!(matches!(refused, DatapathError::Refused(_)), "{refused}");
            let chosen = choose(DatapathChoice::Auto, &underlay, Arc::default()).await.expect("TUN works");
            assert_eq!((chosen.datapath.name(), chosen.reason), ("tun", refused.to_string()));
        });
        assert!(
            !underlay.pin_dir.join(format!("v{ABI_VERSION}")).exists(),
            "programs were left beside the TUN datapath"
        );
    };
    lab.nodes[0].netns().run(try_out).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root"]
async fn datapaths_of_both_kinds_understand_each_other() {
    for choices in [[Ebpf, Tun], [Tun, Ebpf]] {
        let mut lab = Lab::new();
        lab.start_each(choices).await;
        fill(&lab).await;
        for name in SERVICES {
            let to = SocketAddr::new(name.parse().unwrap(), PORT);
            exchange(&lab.nodes[0].instances[0], &lab.nodes[1].instances[0], to).await;
        }
    }
}

/// Both nodes at work, the services of [`SERVICES`] on the first instance of the second node.
async fn ready(choice: DatapathChoice) -> Lab {
    let mut lab = Lab::new();
    lab.start(choice).await;
    fill(&lab).await;
    lab
}

async fn fill(lab: &Lab) {
    for index in 0..2 {
        lab.nodes[index].apply(lab.full(index, SERVICES.map(|name| name.parse().unwrap()))).await;
    }
}

/// TCP with many and with large writes, then UDP, from client to server and back through the service address. Returns the address under
/// which the server sees the client.
async fn exchange(client: &Instance, server: &Instance, to: SocketAddr) -> IpAddr {
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let listener = server.run(|| TcpListener::bind((any, PORT))).expect("listen");
    setsockopt(&listener, ReceiveTimeout, &TimeVal::seconds(PATIENCE.as_secs() as i64)).expect("a deadline for accept");
    let datagrams = server.run(|| UdpSocket::bind((any, PORT))).expect("bind");
    let served = tokio::task::spawn_blocking(move || -> io::Result<IpAddr> {
        let (mut stream, from) = listener.accept()?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut bytes = vec![0; BULK];
        stream.read_exact(&mut bytes)?;
        stream.write_all(&bytes)?;
        datagrams.set_read_timeout(Some(PATIENCE))?;
        echo_udp(&datagrams, 3);
        Ok(from.ip())
    });

    let bytes: Vec<u8> = (0..BULK).map(|i| (i * 31 + i / 251) as u8).collect();
    let netns = client.run(Netns::current).expect("the client's namespace");
    blocking(move || {
        let mut stream = netns.run(|| TcpStream::connect_timeout(&to, PATIENCE))??;
        stream.set_read_timeout(Some(PATIENCE))?;
        assert_eq!(stream.peer_addr()?, to);
        stream.write_all(&bytes)?;
        let mut back = vec![0; BULK];
        stream.read_exact(&mut back)?;
        assert!(back == bytes, "bytes have changed on the way");

        let socket = netns.run(|| UdpSocket::bind((any, 0)))??;
        socket.set_read_timeout(Some(PATIENCE))?;
        for len in [1, 512, 1400] {
            socket.send_to(&bytes[..len], to)?;
            let mut back = [0; 2048];
            let (received, from) = socket.recv_from(&mut back)?;
            assert_eq!(from, to, "a reply regains the service address");
            assert!(back[..received].starts_with(&bytes[..len]));
        }
        Ok(())
    })
    .await;
    served.await.unwrap().expect("the server failed")
}

const BULK: usize = 4 << 20;

/// Sends back what comes, followed by the address it was sent to.
fn echo_udp(socket: &UdpSocket, datagrams: usize) {
    let mut buffer = [0; 2048];
    for _ in 0..datagrams {
        let Ok((len, from)) = socket.recv_from(&mut buffer) else { return };
        let own = socket.local_addr().map(|own| own.ip().to_string()).unwrap_or_default();
        let reply = [&buffer[..len], own.as_bytes()].concat();
        let _ = socket.send_to(&reply[..reply.len().min(1400).max(len)], from);
    }
}

fn answer(socket: &UdpSocket) -> Vec<u8> {
    let mut buffer = [0; 2048];
    let (len, _) = socket.recv_from(&mut buffer).expect("no answer");
    buffer[..len].to_vec()
}

/// A socket on the instance's own IPv4 address.
fn client_socket(instance: &Instance, port: u16) -> UdpSocket {
    let socket = instance.run(|| UdpSocket::bind((instance.namespace[0], port))).expect("bind");
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// An IPv4 packet with a UDP datagram without checksum.
fn udp_packet(source: [u8; 4], destination: [u8; 4], port: u16, payload: &[u8]) -> Vec<u8> {
    let len = 28 + payload.len();
    let mut packet = vec![0x45, 0, 0, len as u8, 0, 1, 0, 0, 64, 17, 0, 0];
    packet.extend(source);
    packet.extend(destination);
    let sum: u32 = packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    packet[10..12].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    packet.extend(9_u16.to_be_bytes());
    packet.extend(port.to_be_bytes());
    packet.extend((len as u16 - 20).to_be_bytes());
    packet.extend([0, 0]);
    packet.extend(payload);
    packet
}
