use std::net::UdpSocket;

use super::*;

/// What dockerd writes, by the same program.
fn like_docker(host: &Host, iptables: &str) {
    for rule in ["-P FORWARD DROP", "-N DOCKER-USER", "-A DOCKER-USER -j RETURN", "-A FORWARD -j DOCKER-USER"] {
        host.namespace.exec(&format!("{iptables} {rule}"));
    }
}

fn reaches_outside(instance: &Namespace) -> bool {
    ask(instance, OUTSIDE_V4, 80).is_ok() && ask(instance, OUTSIDE_V6, 80).is_ok()
}

fn is_kept_inside(instance: &Namespace) -> bool {
    is_cut_off(instance, OUTSIDE_V4, 80) && is_cut_off(instance, OUTSIDE_V6, 80)
}

fn ensure(host: &Host) {
    host.links(|links| async move { links.ensure_bridge(SUBNET).await.expect("bridge") });
}

#[test]
#[ignore = "needs root"]
fn instances_pass_where_docker_drops() {
    let host = Host::new("dck");
    let instance = host.with_instance();
    let _outside = Server::start(&host.outside, 80);
    assert!(reaches_outside(&instance));
    like_docker(&host, "iptables");
    like_docker(&host, "ip6tables");
    assert!(is_kept_inside(&instance), "Docker's policy is in the way");

    ensure(&host);
    assert!(reaches_outside(&instance));
    // The program that owns the chain still reads it.
    for iptables in ["iptables", "ip6tables"] {
        let rules = host.namespace.exec(&format!("{iptables} -S DOCKER-USER"));
        assert!(rules.contains(&format!("-i {BRIDGE}")) && rules.contains(&format!("-o {TUN}")), "{rules}");
        assert!(rules.trim_end().ends_with("-j RETURN"), "{rules}");
    }

    let before = host.namespace.exec("nft -j list chain ip filter DOCKER-USER");
    let count = |text: &str| text.matches("node-engine").count();
    ensure(&host);
    assert_eq!(count(&host.namespace.exec("nft -j list chain ip filter DOCKER-USER")), count(&before));

    host.namespace.exec("iptables -F DOCKER-USER");
    assert!(is_cut_off(&instance, OUTSIDE_V4, 80));
    ensure(&host);
    assert!(reaches_outside(&instance));
}

#[test]
#[ignore = "needs root"]
fn instances_pass_a_dropping_forward_chain_without_docker() {
    let host = Host::new("fwd");
    let instance = host.with_instance();
    let _outside = Server::start(&host.outside, 80);
    host.namespace.exec("iptables -P FORWARD DROP");
    host.namespace.exec("ip6tables -P FORWARD DROP");
    assert!(is_kept_inside(&instance));
    ensure(&host);
    assert!(reaches_outside(&instance));
    assert!(host.links(|links| async move { links.uninstall().await }).is_empty());
    assert_eq!(host.namespace.exec("iptables -S FORWARD").trim(), "-P FORWARD DROP");
}

#[test]
#[ignore = "needs root"]
fn packets_pass_between_instance_and_tun_device_where_docker_drops() {
    let host = Host::new("tunf");
    like_docker(&host, "iptables");
    let instance = host.with_instance();
    let namespace = &host.namespace;
    host.links(|links| async move { links.ensure_tun_routes(TUN_V4, TUN_V6).await.expect("routes") });
    let device = namespace.within(|| tun_rs::DeviceBuilder::new().name(TUN).build_sync()).expect("the TUN device");
    device.set_nonblocking(true).expect("a device that does not block");

    let service: SocketAddr = "10.30.0.5:4000".parse().unwrap();
    let socket = instance.within(|| UdpSocket::bind((FIRST.v4, 4001))).expect("a socket");
    let mut packet = vec![0; 2000];
    wait_until("the instance's packet is at the TUN device", || {
        socket.send_to(b"to a service", service).expect("sent");
        let mut buffer = vec![0; 2000];
        device.recv(&mut buffer).is_ok_and(|length| buffer[..length].ends_with(b"to a service"))
    });
    // The answer, written by hand: from the service address to the instance, UDP without a checksum.
    packet.clear();
    let payload = b"from a service";
    let (udp, total) = (8 + payload.len() as u8, 28 + payload.len() as u8);
    packet.extend([0x45, 0, 0, total, 0, 0, 0, 0, 64, 17, 0, 0, 10, 30, 0, 5]);
    packet.extend(FIRST.v4.octets());
    let sum: u32 = packet.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let sum = !((sum & 0xffff) + (sum >> 16)) as u16;
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet.extend(4000_u16.to_be_bytes());
    packet.extend(4001_u16.to_be_bytes());
    packet.extend([0, udp, 0, 0]);
    packet.extend(payload);
    device.send(&packet).expect("written to the TUN device");
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer).expect("the answer");
    assert_eq!((&buffer[..length], from), (&payload[..], service));
}

#[test]
#[ignore = "needs root"]
fn what_is_not_ours_to_open_is_told() {
    let host = Host::new("warn");
    host.namespace.exec("nft add table inet firewall");
    host.namespace.exec("nft add chain inet firewall forward { type filter hook forward priority 0 ; policy drop ; }");
    let warnings = host.links(|links| async move {
        links.ensure_bridge(SUBNET).await.expect("bridge");
        links.warnings()
    });
    assert!(warnings.len() == 1 && warnings[0].contains("inet firewall"), "{warnings:?}");
    host.namespace.exec("nft delete table inet firewall");

    let warnings = || {
        host.links(|links| async move {
            links.ensure_bridge(SUBNET).await.expect("bridge");
            links.warnings()
        })
    };
    for iptables in ["iptables-legacy", "ip6tables-legacy"] {
        host.namespace.exec(&format!("{iptables} -P FORWARD DROP"));
        let told = warnings();
        assert!(told.len() == 1 && told[0].contains(iptables) && told[0].contains(BRIDGE), "{told:?}");
        for (direction, interface) in [("-i", BRIDGE), ("-o", BRIDGE), ("-i", TUN), ("-o", TUN)] {
            host.namespace.exec(&format!("{iptables} -I FORWARD {direction} {interface} -j ACCEPT"));
        }
        assert_eq!(warnings(), [""; 0]);
    }
}
