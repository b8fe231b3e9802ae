//! Packets that are not the common ones: ICMP errors, fragments, options.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::thread;

use netmanager_common::FRAMING_LEN;
use netmanager_common::abi::{PEER_OURS, Peer};
use netmanager_common::frame::control_framing;
use netmanager_common::testing::{Payload, packet, with_options};
use nix::sys::socket::sockopt::TcpMaxSeg;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, getsockopt, sendto, socket,
};
use node_engine::config::DatapathChoice::{self, Ebpf, Tun};
use node_engine::netmanager::datapath::TableDelta;
use node_engine::netns::Netns;
use rustix::net::sockopt::{Ipv4PathMtuDiscovery, set_ip_mtu_discover};

use super::lab::{Instance, Lab, PATIENCE, Sniffer, TUNNEL_PORT, blocking, service, until};
use super::{PORT, SERVICES, ready};

on_both! {
    who_is_refused_is_told,
    datagrams_of_any_size_arrive,
    fragments_are_taken_from_nodes_of_ours,
    a_narrow_path_is_kept_to,
    the_rest_of_a_packet_is_left_alone,
}

/// Nobody listens: the client's socket says so at once, across nodes, on one node, and nobody tells an upstream peer.
async fn who_is_refused_is_told(choice: DatapathChoice) {
    let lab = ready(choice).await;
    let client = &lab.nodes[0].instances[0];
    let known = |family: usize| lab.nodes[1].instances[0].instance[family];
    let to = |address: IpAddr| SocketAddr::new(address, PORT);
    let services: [IpAddr; 2] = SERVICES.map(|name| name.parse().unwrap());

    let socket = connected(client, to(services[0]));
    socket.send(b"anybody").unwrap();
    until("the server's node tells no upstream peer", || async {
        lab.nodes[1].counter("drop_peer_protocol").await == 1
    })
    .await;

    ours(&lab).await;
    for (family, name) in services.into_iter().enumerate() {
        for address in [name, known(family)] {
            assert_eq!(refusal(client, to(address)), ErrorKind::ConnectionRefused, "{address} across nodes");
        }
    }
    // A service on the client's own node.
    for (family, (name, slot)) in services.into_iter().zip([6, 8]).enumerate() {
        lab.nodes[0].apply(service(name, 1 + family as u32, 2, &[slot])).await;
        assert_eq!(refusal(client, to(name)), ErrorKind::ConnectionRefused, "{name} on the same node");
    }
}

/// What comes of a datagram to a port on which nobody listens.
fn refusal(client: &Instance, to: SocketAddr) -> ErrorKind {
    let socket = connected(client, to);
    socket.send(b"anybody").unwrap();
    socket.recv(&mut [0; 16]).expect_err("nobody listens there").kind()
}

fn connected(client: &Instance, to: SocketAddr) -> UdpSocket {
    let own = client.namespace[usize::from(to.is_ipv6())];
    let socket = client.run(|| UdpSocket::bind((own, 0))).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket.connect(to).unwrap();
    socket
}

/// Longer than any link on the way, both ways, from afar, from a neighbour, and from the node itself; and whoever may listen on the wire,
/// an upstream peer above all, sees whole packets only.
async fn datagrams_of_any_size_arrive(choice: DatapathChoice) {
    let lab = ready(choice).await;
    let sniffers = [0, 1].map(|index| Sniffer::new(&lab.nodes[index]));
    let (client, far) = (&lab.nodes[0].instances[0], &lab.nodes[1].instances[0]);
    let services: [IpAddr; 2] = SERVICES.map(|name| name.parse().unwrap());
    for address in services {
        exchange_sizes(&client.netns, far, address).await;
    }
    for sniffer in sniffers {
        let (whole, fragments) = sniffer.inner();
        assert!(whole > SIZES.len() && fragments == 0, "{whole} whole packets, {fragments} fragments");
    }
    let joined = lab.nodes[0].counter("joined").await;
    assert!(joined >= 8, "{joined}");

    for (family, (name, slot)) in services.into_iter().zip([6, 8]).enumerate() {
        lab.nodes[0].apply(service(name, 1 + family as u32, 2, &[slot])).await;
        exchange_sizes(&client.netns, &lab.nodes[0].instances[1], name).await;
        exchange_sizes(&lab.nodes[0].netns(), &lab.nodes[0].instances[1], name).await;
    }
    for node in &lab.nodes {
        let drops = node.counters().await.into_iter().filter(|(name, _)| name.starts_with("drop_"));
        assert_eq!(drops.filter(|(name, _)| name != "drop_not_service").collect::<Vec<_>>(), []);
    }
}

const SIZES: [usize; 7] = [1_300, 1_422, 1_423, 1_500, 4_000, 9_000, 60_000];

/// Datagrams of all sizes to the instance by this address, and back.
async fn exchange_sizes(client: &Netns, server: &Instance, to: IpAddr) {
    let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let bind = |port| -> std::io::Result<UdpSocket> {
        let socket = UdpSocket::bind((any, port))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        // As an application that knows nothing of path MTUs.
        match any {
            IpAddr::V4(_) => set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::DONT)?,
            IpAddr::V6(_) => {}
        }
        Ok(socket)
    };
    let (server, client) = (server.run(|| bind(PORT)).unwrap(), client.run(|| bind(0)).unwrap().unwrap());
    blocking(move || {
        for (number, size) in SIZES.into_iter().enumerate() {
            let sent: Vec<u8> = (0..size).map(|i| (i * 31 + i / 251 + number) as u8).collect();
            let mut buffer = vec![0; 65_536];
            client.send_to(&sent, (to, PORT))?;
            let (len, from) = server.recv_from(&mut buffer).map_err(|error| at(size, "there", &error))?;
            assert!(buffer[..len] == sent, "{size} bytes to {to} arrived as {len}");
            server.send_to(&buffer[..len], from)?;
            let (len, from) = client.recv_from(&mut buffer).map_err(|error| at(size, "back", &error))?;
            assert!(buffer[..len] == sent, "{size} bytes from {to} came back as {len}");
            assert_eq!(from, SocketAddr::new(to, PORT));
        }
        Ok(())
    })
    .await;
}

fn at(size: usize, way: &str, error: &std::io::Error) -> std::io::Error {
    std::io::Error::new(error.kind(), format!("{size} bytes {way}: {error}"))
}

async fn fragments_are_taken_from_nodes_of_ours(choice: DatapathChoice) {
    let lab = ready(choice).await;
    let node = &lab.nodes[1];
    let server = connectable(&node.instances[0]);
    let sender = lab.nodes[0].netns().run(|| UdpSocket::bind((lab.nodes[0].address, 0))).unwrap().unwrap();
    let whole = super::udp_packet([10, 30, 0, 1], [10, 18, 1, 2], PORT, &[7; 100]);
    let send = |id: u8| {
        for (data, field) in [(&whole[20..68], [0x20, 0]), (&whole[68..], [0, 6])] {
            let mut fragment = [&whole[..20], data].concat();
            fragment[2..4].copy_from_slice(&(20 + data.len() as u16).to_be_bytes());
            (fragment[5], fragment[6], fragment[7]) = (id, field[0], field[1]);
            fragment[10..12].fill(0);
            let sum = !netmanager_common::checksum::fold(netmanager_common::checksum::sum(0, &fragment[..20]));
            fragment[10..12].copy_from_slice(&sum.to_be_bytes());
            sender.send_to(&fragment, (node.address, TUNNEL_PORT)).unwrap();
        }
    };
    send(1);
    until("those of an upstream peer are dropped", || async { node.counter("drop_fragment").await == 2 }).await;
    ours(&lab).await;
    send(2);
    let mut buffer = [0; 256];
    let (len, from) = server.recv_from(&mut buffer).expect("nothing arrived");
    assert_eq!((&buffer[..len], from.ip()), (&[7; 100][..], lab.nodes[0].instances[0].instance[0]));
    assert_eq!(node.counter("drop_fragment").await, 2);
}

fn connectable(instance: &Instance) -> UdpSocket {
    let socket = instance.run(|| UdpSocket::bind((instance.namespace[0], PORT))).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// Connections are told at their beginning, on both sides; who forbids that datagrams are cut is told at the first; those of everybody
/// else arrive.
async fn a_narrow_path_is_kept_to(choice: DatapathChoice) {
    const TAKES: u32 = 1_000;
    let lab = ready(choice).await;
    with_peers(&lab, |peer| Peer { mtu: TAKES, flags: PEER_OURS, ..peer }).await;
    let (client, far) = (&lab.nodes[0].instances[0], &lab.nodes[1].instances[0]);
    for name in SERVICES {
        let to = SocketAddr::new(name.parse().unwrap(), PORT);
        let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let listener = far.run(|| TcpListener::bind((any, PORT))).unwrap();
        let netns = client.run(Netns::current).unwrap();
        let headers = if to.is_ipv4() { 40 } else { 60 };
        blocking(move || {
            let mut there = netns.run(|| TcpStream::connect_timeout(&to, PATIENCE))??;
            let (mut here, _) = listener.accept()?;
            for stream in [&there, &here] {
                stream.set_read_timeout(Some(PATIENCE))?;
                let segment = getsockopt(stream, TcpMaxSeg)?;
                // Timestamps take 12 bytes of each.
                assert!(segment <= TAKES - headers && segment >= TAKES - headers - 12, "{to}: {segment}");
            }
            let bytes: Vec<u8> = (0..1 << 20).map(|i: u32| (i * 31 + i / 251) as u8).collect();
            let mut back = vec![0; bytes.len()];
            let sent = bytes.clone();
            let writing = thread::spawn(move || there.write_all(&sent).map(|()| there));
            here.read_exact(&mut back)?;
            assert!(back == bytes);
            let mut there = writing.join().expect("no panic")?;
            let writing = thread::spawn(move || here.write_all(&bytes));
            there.read_exact(&mut back)?;
            writing.join().expect("no panic")
        })
        .await;
    }
    let [told, untold] = [&lab.nodes[0], &lab.nodes[1]];
    assert_eq!((told.counter("drop_too_long").await, untold.counter("drop_too_long").await), (0, 0));

    for (name, len) in SERVICES.into_iter().zip([1_200, 1_400]) {
        let to = SocketAddr::new(name.parse().unwrap(), PORT);
        let socket = connected(client, to);
        socket.send(&vec![1; len]).unwrap();
        let error = socket.recv(&mut [0; 16]).expect_err("it is too long");
        assert_eq!(error.raw_os_error(), Some(nix::libc::EMSGSIZE), "{to}: {error}");
    }
    assert_eq!(told.counter("drop_too_long").await, 2);
    // Over IPv6 the server has to hear it first, too.
    let socket = connected(far, SocketAddr::new(client.instance[1], PORT));
    socket.send(&[1; 1_400]).unwrap();
    assert!(socket.recv(&mut [0; 16]).is_err());
    for name in SERVICES {
        exchange_sizes(&client.netns, far, name.parse().unwrap()).await;
    }
}

/// Options of IP, a datagram without a checksum, and what the ends of a connection agree on.
async fn the_rest_of_a_packet_is_left_alone(choice: DatapathChoice) {
    let lab = ready(choice).await;
    let (client, far) = (&lab.nodes[0].instances[0], &lab.nodes[1].instances[0]);
    let server = connectable(far);
    let to: IpAddr = SERVICES[0].parse().unwrap();
    let plain = packet(client.namespace[0].into(), to.into(), Payload::Udp(5_000, PORT));
    let bare = packet(client.namespace[0].into(), to.into(), Payload::UdpBare(5_000, PORT));
    for bytes in [with_options(&plain), with_options(&bare), bare] {
        client.run(|| send_raw(&bytes, to));
        let mut buffer = [0; 64];
        let (len, from) = server.recv_from(&mut buffer).expect("nothing arrived");
        assert_eq!((&buffer[..len], from), (&b"twenty bytes of data"[..], (client.instance[0], 5_000).into()));
    }

    for instance in [client, far] {
        instance.run(|| std::fs::write("/proc/sys/net/ipv4/tcp_ecn", "1")).expect("explicit congestion notification");
    }
    for (family, name) in SERVICES.into_iter().enumerate() {
        let to = SocketAddr::new(name.parse().unwrap(), PORT + 1);
        let listener = far.run(|| TcpListener::bind((far.namespace[family], PORT + 1))).unwrap();
        let netns = client.run(Netns::current).unwrap();
        let ends = blocking(move || {
            let stream = netns.run(|| TcpStream::connect_timeout(&to, PATIENCE))??;
            Ok((stream, listener.accept()?.0))
        })
        .await;
        for instance in [client, far] {
            let shown = instance.run(|| Command::new("ss").args(["-tineH"]).output()).expect("ss");
            let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
            let has = |word: &str| shown.split_whitespace().any(|other| other == word);
            assert!(has("ts") && has("sack") && has("ecn") && shown.contains("wscale"), "{to}: {shown}");
        }
        drop(ends);
    }
}

/// Datagrams of which only the outer headers are in one piece, as some drivers hand them over.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs root"]
async fn headers_in_pieces_are_read() {
    let lab = ready(Ebpf).await;
    lab.frame().await;
    let (client, far) = (&lab.nodes[0].instances[0], &lab.nodes[1].instances[0]);
    let node = &lab.nodes[1];
    let to = |family: usize, what| packet(client.instance[family].into(), far.namespace[family].into(), what);
    let tcp = |family| to(family, Payload::Tcp(5_000, PORT));
    let udp = |family| to(family, Payload::Udp(5_000, PORT));
    // Who is not refused need not be told.
    let _servers = [0, 1].map(|family| far.run(|| UdpSocket::bind((far.namespace[family], PORT))).unwrap());
    let mut received = node.counter("received").await;
    for (name, inner) in [
        ("TCP over IPv4", tcp(0)),
        ("UDP over IPv4", udp(0)),
        ("TCP over IPv4 with options", with_options(&tcp(0))),
        ("TCP over IPv6", tcp(1)),
        ("UDP over IPv6", udp(1)),
    ] {
        let protocol = if inner[0] >> 4 == 6 { [0x86, 0xdd] } else { [8, 0] };
        let framing = &control_framing()[..FRAMING_LEN - 2];
        let framed = [framing, &protocol, &inner].concat();
        for (port, datagram) in [(TUNNEL_PORT, inner), (TUNNEL_PORT + 1, framed)] {
            let from = SocketAddr::new(lab.nodes[0].address, 0);
            let socket = lab.nodes[0].netns().run(|| UdpSocket::bind(from)).unwrap().unwrap();
            socket.connect((node.address, port)).unwrap();
            send_in_pieces(socket, &datagram);
            received += 1;
            until(&format!("{name} to {port} arrives"), || async { node.counter("received").await == received }).await;
        }
    }
    assert_eq!(node.counter("slow").await, 0, "the kernel has read them all");
}

/// Sends the bytes by splice, which is what the standard library uses from a pipe to a socket: the kernel copies none of them, and has only
/// its own headers in one piece.
fn send_in_pieces(socket: UdpSocket, bytes: &[u8]) {
    let (reader, mut writer) = std::io::pipe().expect("a pipe");
    writer.write_all(bytes).expect("it fits a pipe");
    drop(writer);
    let (mut pipe, mut socket) = (File::from(OwnedFd::from(reader)), TcpStream::from(OwnedFd::from(socket)));
    assert_eq!(std::io::copy(&mut pipe, &mut socket).expect("sent"), bytes.len() as u64);
}

/// Sends a whole IPv4 packet, header and all.
fn send_raw(bytes: &[u8], to: IpAddr) {
    let raw = socket(AddressFamily::Inet, SockType::Raw, SockFlag::empty(), SockProtocol::Raw).expect("a raw socket");
    let IpAddr::V4(to) = to else { panic!("IPv4 only") };
    let to = SockaddrIn::from(SocketAddrV4::new(to, 0));
    sendto(raw.as_raw_fd(), bytes, &to, MsgFlags::empty()).expect("sent");
}

/// The nodes know each other as nodes of ours.
async fn ours(lab: &Lab) {
    with_peers(lab, |peer| Peer { flags: PEER_OURS, ..peer }).await;
}

async fn with_peers(lab: &Lab, change: impl Fn(Peer) -> Peer) {
    for (index, node) in lab.nodes.iter().enumerate() {
        let TableDelta { config, peers, .. } = lab.base(index);
        let peers = peers.into_iter().map(|(number, peer)| (number, change(peer))).collect();
        node.apply(TableDelta { config, peers, ..TableDelta::default() }).await;
    }
}
