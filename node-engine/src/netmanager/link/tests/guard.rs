//! What an instance may not send: made by hand in its namespace, frame by frame, and looked for at its neighbour.

use std::net::UdpSocket;

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, sendto};

use super::*;

const BROADCAST: [u8; 6] = [0xff; 6];
const SOMEBODY: [u8; 6] = [0x02, 1, 2, 3, 4, 5];
const ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);
const NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Ethernet around something.
fn frame(source: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    [&BROADCAST[..], &source, &kind.to_be_bytes(), payload].concat()
}

fn arp(operation: u8, hardware: [u8; 6], sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    let fixed = [0, 1, 8, 0, 6, 4, 0, operation];
    [&fixed[..], &hardware, &sender.octets(), &[0; 6], &target.octets(), &[0; 18]].concat()
}

fn ipv4(source: Ipv4Addr, destination: Ipv4Addr) -> Vec<u8> {
    let mut header = [0x45, 0, 0, 28, 0, 1, 0x40, 0, 64, 17, 0, 0].to_vec();
    header.extend(source.octets());
    header.extend(destination.octets());
    let sum: u32 = header.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    header[10..12].copy_from_slice(&(!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
    [&header[..], &[0x12, 0x34, 0, 53, 0, 8, 0, 0], &[0; 18]].concat()
}

fn ipv6(source: Ipv6Addr, destination: Ipv6Addr, next: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(payload.len()).unwrap().to_be_bytes();
    [&[0x60, 0, 0, 0], &length[..], &[next, 255], &source.octets(), &destination.octets(), payload].concat()
}

/// ICMPv6 with an address in it: neighbour and redirect messages have it at the same place.
fn icmpv6(kind: u8, target: Ipv6Addr) -> Vec<u8> {
    [&[kind, 0, 0, 0, 0x20, 0, 0, 0][..], &target.octets(), &[2, 1], &SOMEBODY].concat()
}

/// Puts a frame on the wire as it is.
fn send(from: &Namespace, bytes: &[u8]) {
    from.within(|| {
        let index = nix::net::if_::if_nametoindex("eth0").expect("an interface");
        let socket =
            nix::sys::socket::socket(AddressFamily::Packet, SockType::Raw, SockFlag::empty(), None).expect("root");
        let address = packet_address(index);
        sendto(socket.as_raw_fd(), bytes, &address, MsgFlags::empty()).expect("sent");
    });
}

fn packet_address(index: u32) -> nix::sys::socket::LinkAddr {
    let found = nix::ifaddrs::getifaddrs()
        .expect("addresses")
        .find_map(|entry| entry.address?.as_link_addr().filter(|link| link.ifindex() == index as usize).copied());
    found.expect("the interface has a link address")
}

#[test]
#[ignore = "needs root"]
fn forty_kinds_of_forged_frames_are_dropped_each_for_its_reason() {
    let host = Host::new("grd");
    let first = host.with_instance();
    let second = Namespace::new("in");
    let path = &second.path;
    host.links(|links| async move { links.attach(&id(1), path, SUBNET, SECOND).await.expect("attached") });
    let own = stable_mac(&id(0).to_string());
    let neighbour = stable_mac(&id(1).to_string());
    let gateway = stable_mac(BRIDGE);
    let (foreign_v4, foreign_v6) = (Ipv4Addr::new(8, 8, 8, 8), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 9));
    let (service_v4, service_v6) = (Ipv4Addr::new(10, 30, 0, 1), Ipv6Addr::new(0xfdff, 0, 0, 0, 0, 0, 0, 1));
    let other_local = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
    let (arps, v4, v6) = (0x0806, 0x0800, 0x86dd);

    let mut kinds: Vec<(&str, Vec<u8>)> = Vec::new();
    for mac in [neighbour, gateway, SOMEBODY] {
        kinds.push(("drop_spoofed_mac", frame(mac, arps, &arp(1, own, FIRST.v4, SECOND.v4))));
        kinds.push(("drop_spoofed_mac", frame(mac, v4, &ipv4(FIRST.v4, SECOND.v4))));
        kinds.push(("drop_spoofed_mac", frame(mac, v6, &ipv6(FIRST.v6, SECOND.v6, 59, &[]))));
    }
    for operation in [1, 2] {
        for sender in [GATEWAY.v4, SECOND.v4, foreign_v4, service_v4] {
            kinds.push(("drop_spoofed_arp", frame(own, arps, &arp(operation, own, sender, SECOND.v4))));
        }
        for hardware in [gateway, neighbour] {
            kinds.push(("drop_spoofed_arp", frame(own, arps, &arp(operation, hardware, FIRST.v4, SECOND.v4))));
        }
    }
    let loopback = Ipv4Addr::LOCALHOST;
    for source in
        [SECOND.v4, GATEWAY.v4, foreign_v4, service_v4, loopback, TUN_V4, Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST]
    {
        kinds.push(("drop_spoofed_source", frame(own, v4, &ipv4(source, SECOND.v4))));
    }
    for source in
        [SECOND.v6, GATEWAY.v6, foreign_v6, service_v6, other_local, TUN_V6, Ipv6Addr::LOCALHOST, Ipv6Addr::UNSPECIFIED]
    {
        kinds.push(("drop_spoofed_source", frame(own, v6, &ipv6(source, NODES, 59, &[]))));
    }
    for (kind, target) in [(134, ROUTERS), (137, SECOND.v6), (136, SECOND.v6), (136, GATEWAY.v6), (136, other_local)] {
        kinds.push(("drop_spoofed_neighbour", frame(own, v6, &ipv6(FIRST.v6, NODES, 58, &icmpv6(kind, target)))));
    }
    for kind in [0x8100, 0x88a8, 0x88cc, 0x8847, 0x9000] {
        kinds.push(("drop_foreign_frame", frame(own, kind, &ipv4(FIRST.v4, SECOND.v4))));
    }
    assert!(kinds.len() >= 40, "{}", kinds.len());

    let counters = || host.links(|links| async move { links.counters() });
    let count =
        |all: &[(String, u64)], reason: &str| all.iter().find(|(name, _)| name == reason).map_or(0, |(_, n)| *n);
    for (reason, bytes) in &kinds {
        let before = counters();
        send(&first, bytes);
        let after = counters();
        for (name, value) in &after {
            let wanted = u64::from(name == reason);
            assert_eq!(value - count(&before, name), wanted, "{name} after {bytes:02x?}, which is {reason}");
        }
    }
    // What it may say, it says: neighbours find each other, and the host.
    let _server = Server::start(&second, 80);
    assert!(ask(&first, SECOND.v4.into(), 80).is_ok() && ask(&first, SECOND.v6.into(), 80).is_ok());
    first.exec("ip neigh flush all");
    assert!(ask(&first, SECOND.v4.into(), 80).is_ok() && ask(&first, SECOND.v6.into(), 80).is_ok());

    let name = crate::netmanager::link::veth::host_end(&id(0));
    assert!(host.namespace.exec("nft list table netdev node_engine").contains(&format!("chain {name}")));
    host.links(|links| async move { links.detach(&id(0)).await.expect("detached") });
    assert!(!host.namespace.exec("nft list table netdev node_engine").contains(&format!("chain {name}")));
}

#[test]
#[ignore = "needs root"]
fn the_guard_of_who_went_while_nobody_looked_goes_and_no_other() {
    let host = Host::new("grg");
    let _instance = host.with_instance();
    let guards = || host.namespace.exec("nft list table netdev node_engine");
    let name = crate::netmanager::link::veth::host_end(&id(0));
    let upkeep = || host.links(|links| async move { links.ensure_bridge(SUBNET).await.expect("whole") });
    upkeep();
    assert!(guards().contains(&format!("chain {name}")), "who is connected is guarded, also before it is adopted");
    host.namespace.exec(&format!("ip link delete {name}"));
    // Whether its chain goes with the device is the kernel's choice; where it does, nothing is left to remove.
    upkeep();
    assert!(
        !guards().contains(&format!("chain {name}")) && guards().contains("chain drop_spoofed_mac"),
        "{}",
        guards()
    );
}

/// The host forwards, so that whoever is on one of its wires could send to services as an instance.
#[test]
#[ignore = "needs root"]
fn nobody_outside_speaks_as_an_instance() {
    let host = Host::new("fwd");
    let instance = host.with_instance();
    let count = || {
        let all = host.links(|links| async move { links.counters() });
        all.iter().find(|(name, _)| name == "drop_outside_source").map_or(0, |(_, count)| *count)
    };
    // Whoever has an address of his own is heard, and instances reach the outside and are answered.
    let others_are_heard = || {
        for (from, to) in
            [(&host.outside, HOST_V4), (&host.outside, HOST_V6), (&instance, OUTSIDE_V4), (&instance, OUTSIDE_V6)]
        {
            from.exec(&format!("ping -c 1 -W 2 {to}"));
        }
    };
    // First, so that nobody has to look for his neighbour in another's name.
    others_are_heard();
    assert_eq!(count(), 0);
    let services = [IpAddr::V4(Ipv4Addr::new(10, 30, 0, 9)), "fdff::9".parse().unwrap()];
    let instances = [FIRST, SECOND].into_iter().flat_map(|address| [address.v4.into(), address.v6.into()]);
    for source in instances.chain(services) {
        let prefix = if source.is_ipv4() { "32" } else { "128 nodad" };
        host.outside.exec(&format!("ip addr add {source}/{prefix} dev lk-out"));
        let to = if source.is_ipv4() { HOST_V4 } else { HOST_V6 };
        let before = count();
        let from = host.outside.within(|| UdpSocket::bind((source, 0))).expect("a socket");
        from.send_to(b"forged", (to, 9)).expect("sent");
        wait_until(&format!("{source} is dropped"), || count() == before + 1);
    }
    let before = count();
    others_are_heard();
    assert_eq!(count(), before);
}

#[test]
#[ignore = "needs root"]
fn no_instance_reaches_a_tunnel_port() {
    let host = Host::new("tnl");
    let instance = host.with_instance();
    for port in [50_103, 50_104] {
        let own = host.namespace.within(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))).expect("a socket");
        let peers = host.outside.within(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, port))).expect("a socket");
        for (to, at) in
            [(HOST_V4, &own), (HOST_V6, &own), (GATEWAY.v4.into(), &own), (OUTSIDE_V4, &peers), (OUTSIDE_V6, &peers)]
        {
            at.set_nonblocking(true).unwrap();
            let dropped = || {
                let all = host.links(|links| async move { links.counters() });
                all.iter().find(|(name, _)| name == "drop_to_tunnel").map_or(0, |(_, count)| *count)
            };
            let before = dropped();
            let from = instance.within(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))).expect("a socket");
            let mapped = match to {
                IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                IpAddr::V6(v6) => v6,
            };
            from.send_to(b"forged", (mapped, port)).expect("sent");
            // 4000 bytes leave in fragments.
            from.send_to(&[0x45; 4000], (mapped, port)).expect("sent");
            wait_until("both are dropped", || dropped() >= before + 2);
            assert_eq!(at.recv_from(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::WouldBlock, "{to}");
        }
    }
    // The answer to a client whose port happens to be the tunnel's.
    let server = instance.within(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 53))).expect("a socket");
    host.links(|links| async move {
        let udp = PortMapping { host: 5300, container: 53, protocol: Protocol::Udp };
        links.publish(SUBNET, &[(udp, FIRST)]).await.expect("published");
    });
    let client = host.outside.within(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 50_103))).expect("a socket");
    client.send_to(b"question", (HOST_V4, 5300)).expect("sent");
    let mut buffer = [0; 16];
    let (length, from) = server.recv_from(&mut buffer).expect("the question");
    server.send_to(&buffer[..length], from).expect("answered");
    client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    assert_eq!(client.recv(&mut buffer).expect("the answer"), length);
}
