use super::*;

fn publish(host: &Host, ports: &[(PortMapping, Addresses)]) {
    host.links(|links| async move { links.publish(SUBNET, ports).await.expect("published") });
}

#[test]
#[ignore = "needs root"]
fn a_published_port_leads_to_its_instance_until_it_is_replaced() {
    let host = Host::new("pub");
    let instance = host.with_instance();
    let _server = Server::start(&instance, 80);
    for address in [HOST_V4, HOST_V6] {
        assert!(is_cut_off(&host.outside, address, 8080), "nothing is published yet");
    }

    publish(&host, &[(tcp(8080, 80), FIRST), (tcp(8081, 80), FIRST)]);
    for (address, outside) in [(HOST_V4, OUTSIDE_V4), (HOST_V6, OUTSIDE_V6)] {
        for port in [8080, 8081] {
            assert_eq!(ask(&host.outside, address, port).expect("from outside"), outside, "the real source is seen");
        }
        assert_eq!(ask(&host.namespace, address, 8080).expect("from the host itself"), address);
        ask(&instance, address, 8080).expect("from the instance itself");
        assert!(is_cut_off(&host.outside, address, 80), "only the host port is published");
    }
    // By loopback it is the host that asks. What is published is not taken from others whom the host only forwards to.
    assert_eq!(ask(&host.namespace, Ipv4Addr::LOCALHOST.into(), 8080).expect("by loopback"), IpAddr::from(GATEWAY.v4));
    assert!(is_cut_off(&host.namespace, Ipv4Addr::LOCALHOST.into(), 80), "only the host port is published");
    let local = Server::start_at(&host.namespace, (Ipv4Addr::LOCALHOST, 631).into());
    assert!(ask(&host.namespace, Ipv4Addr::LOCALHOST.into(), 631).is_ok());
    instance.exec("ip route add 127.0.0.2/32 via 10.18.0.1");
    instance.exec("sysctl -q -w net.ipv4.conf.all.route_localnet=1");
    assert!(is_cut_off(&instance, Ipv4Addr::new(127, 0, 0, 2).into(), 631), "the host's loopback is not for instances");
    drop(local);
    let _outside = Server::start(&host.outside, 8080);
    for (address, masqueraded) in [(OUTSIDE_V4, HOST_V4), (OUTSIDE_V6, HOST_V6)] {
        assert_eq!(ask(&instance, address, 8080).expect("somebody else's port"), masqueraded);
    }

    publish(&host, &[(tcp(8081, 80), FIRST)]);
    for address in [HOST_V4, HOST_V6] {
        assert!(is_cut_off(&host.outside, address, 8080));
        assert!(ask(&host.outside, address, 8081).is_ok());
    }
    publish(&host, &[]);
    for address in [HOST_V4, HOST_V6] {
        assert!(is_cut_off(&host.outside, address, 8081));
    }
}

#[test]
#[ignore = "needs root"]
fn instances_reach_each_other_through_a_published_port() {
    let host = Host::new("hair");
    let first = host.with_instance();
    let second = Namespace::new("in");
    let path = &second.path;
    host.links(|links| async move {
        links.attach(&id(1), path, SUBNET, SECOND).await.expect("attached");
        links.publish(SUBNET, &[(tcp(8080, 80), FIRST)]).await.expect("published");
    });
    let _server = Server::start(&first, 80);
    // Docker has bridges hand their packets to the IP filter, which takes quite another way through the kernel.
    for through_filter in ["0", "1"] {
        for setting in ["iptables", "ip6tables"] {
            host.namespace.write(&format!("net/bridge/bridge-nf-call-{setting}"), through_filter);
        }
        for address in [HOST_V4, HOST_V6] {
            ask(&second, address, 8080).expect("by the host's address");
            ask(&first, address, 8080).expect("itself by the host's address");
            ask(&second, address, 8080).expect("by the host's address, once more");
        }
    }
    assert_eq!(ask(&second, FIRST.v4.into(), 80).expect("directly"), IpAddr::from(SECOND.v4));
    assert_eq!(ask(&second, FIRST.v6.into(), 80).expect("directly"), IpAddr::from(SECOND.v6));
}

/// `::1` is served by the process itself: asked from another thread while it runs.
#[test]
#[ignore = "needs root"]
fn a_published_port_is_served_at_the_ipv6_loopback_while_the_process_runs() {
    let host = Host::new("lo6");
    let instance = host.with_instance();
    let _server = Server::start(&instance, 80);
    let echo = instance.within(|| std::net::UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 53))).expect("a socket");
    let echoing = std::thread::spawn(move || {
        let mut buffer = [0; 16];
        for _ in 0..2 {
            let (length, from) = echo.recv_from(&mut buffer).expect("a question");
            echo.send_to(&buffer[..length], from).expect("answered");
        }
    });
    let namespace = &host.namespace.path;
    let talk = |path: PathBuf| {
        netns::within(&path, || {
            let client = std::net::UdpSocket::bind((Ipv6Addr::LOCALHOST, 0)).expect("a socket");
            client.connect((Ipv6Addr::LOCALHOST, 8053)).expect("connected");
            client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let mut buffer = [0; 16];
            for question in ["one", "two"] {
                client.send(question.as_bytes()).expect("sent");
                let length = client.recv(&mut buffer).expect("answered");
                assert_eq!(&buffer[..length], question.as_bytes());
            }
        })
        .expect("a namespace");
    };
    let reach = |path: PathBuf, port: u16| {
        netns::within(&path, || {
            let mut stream = TcpStream::connect_timeout(&(Ipv6Addr::LOCALHOST, port).into(), Duration::from_secs(5))?;
            let mut seen = String::new();
            stream.read_to_string(&mut seen)?;
            seen.parse::<IpAddr>().map_err(io::Error::other)
        })
        .expect("a namespace")
    };
    host.links(|links| async move {
        let udp = PortMapping { host: 8053, container: 53, protocol: Protocol::Udp };
        links.publish(SUBNET, &[(tcp(8080, 80), FIRST), (udp, FIRST)]).await.expect("published");
        let ask = |port| {
            let path = namespace.clone();
            async move { tokio::task::spawn_blocking(move || reach(path, port)).await.unwrap() }
        };
        assert_eq!(ask(8080).await.expect("by loopback"), IpAddr::from(GATEWAY.v6));
        let path = namespace.clone();
        tokio::task::spawn_blocking(move || talk(path)).await.unwrap();
        // Another in its place, and again: what is not published any more is free at once.
        for (old, new) in [(8080, 8081), (8081, 8080)].repeat(10) {
            links.publish(SUBNET, &[(tcp(new, 80), FIRST)]).await.expect("published");
            assert_eq!(ask(old).await.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
            assert_eq!(ask(new).await.expect("by loopback"), IpAddr::from(GATEWAY.v6));
        }
    });
    echoing.join().unwrap();
}

#[test]
#[ignore = "needs root"]
fn udp_and_tcp_are_published_apart() {
    let host = Host::new("udp");
    let instance = host.with_instance();
    let udp = |host, container| PortMapping { host, container, protocol: Protocol::Udp };
    let _server = Server::start(&instance, 80);
    publish(&host, &[(udp(8080, 53), FIRST)]);
    assert!(is_cut_off(&host.outside, HOST_V4, 8080));

    let socket = instance.within(|| std::net::UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 53))).expect("a socket");
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    for (address, outside) in [(HOST_V4, OUTSIDE_V4), (HOST_V6, OUTSIDE_V6)] {
        host.outside.within(|| {
            let client = std::net::UdpSocket::bind((outside, 0)).expect("a socket");
            client.connect((address, 8080)).expect("connected");
            client.send(b"question").expect("sent");
            let mut buffer = [0; 16];
            let (length, from) = socket.recv_from(&mut buffer).expect("the question");
            socket.send_to(&buffer[..length], from).expect("answered");
            client.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            assert_eq!(client.recv(&mut buffer).expect("the answer, from where it was asked"), length);
        });
    }
}

#[test]
#[ignore = "needs root"]
fn instances_reach_the_outside_under_the_hosts_address() {
    let host = Host::new("masq");
    let instance = host.with_instance();
    let _server = Server::start(&host.outside, 80);
    assert_eq!(ask(&instance, OUTSIDE_V4, 80).expect("IPv4"), HOST_V4);
    assert_eq!(ask(&instance, OUTSIDE_V6, 80).expect("IPv6"), HOST_V6);
}

#[test]
#[ignore = "needs root"]
fn a_flushed_ruleset_comes_back_with_all_published_ports() {
    let host = Host::new("flush");
    let instance = host.with_instance();
    let _server = Server::start(&instance, 80);
    let (namespace, path) = (&host.namespace, &instance.path);
    host.links(|links| async move {
        links.attach(&id(0), path, SUBNET, FIRST).await.expect("still attached");
        links.publish(SUBNET, &[(tcp(8080, 80), FIRST)]).await.expect("published");
        let before = namespace.exec("nft list ruleset");
        namespace.exec("nft flush ruleset");
        links.ensure_bridge(SUBNET).await.expect("bridge");
        assert_eq!(namespace.exec("nft list ruleset"), before);
    });
    assert!(ask(&host.outside, HOST_V4, 8080).is_ok());
}

#[test]
#[ignore = "needs root"]
fn a_thousand_ports_are_one_transaction() {
    let host = Host::new("many");
    let ports: Vec<_> = (0..1000).map(|number| (tcp(10_000 + number, 80), FIRST)).collect();
    publish(&host, &ports);
    let rules = host.namespace.exec("nft list table ip node_engine");
    assert_eq!(rules.matches("dnat to 10.18.0.2:80").count(), 1000);
    publish(&host, &ports[..1]);
    assert_eq!(host.namespace.exec("nft list table ip6 node_engine").matches("dnat to [fc00::2]:80").count(), 1);
}

/// The rules as `nft` reads them back: what the encoder means is what the kernel understood.
#[test]
#[ignore = "needs root"]
fn nft_reads_the_rules_as_they_are_meant() {
    let host = Host::new("nft");
    publish(&host, &[(tcp(8080, 80), FIRST)]);
    let text = |family: &str| {
        let listing = host.namespace.exec(&format!("nft -s list table {family} node_engine"));
        listing.lines().map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect::<Vec<_>>()
    };
    let v4 = text("ip");
    for line in [
        "type nat hook prerouting priority dstnat - 10; policy accept;",
        "type filter hook prerouting priority mangle; policy accept;",
        "type nat hook output priority -110; policy accept;",
        "type nat hook postrouting priority srcnat - 10; policy accept;",
        "fib daddr type local jump ports comment \"published ports\"",
        "fib daddr type local jump ports comment \"published ports, from this host\"",
        "iifname \"lk-bridge\" ip daddr 127.0.0.0/8 counter drop comment \"drop_to_loopback\"",
        "iifname \"lk-bridge\" ct direction original udp dport 50104 ip daddr != 10.30.0.0/16 counter drop comment \"drop_to_tunnel \
         50104\"",
        "iifname != \"lk-bridge\" iifname != \"lk-tun\" iifname != \"lo\" ip saddr 10.18.0.0/26 counter drop comment \"drop_outside_source \
         10.18.0.0/26\"",
        "iifname != \"lk-bridge\" iifname != \"lk-tun\" iifname != \"lo\" ip saddr 10.30.0.0/16 counter drop comment \"drop_outside_source \
         10.30.0.0/16\"",
        "ip saddr 127.0.0.0/8 oifname \"lk-bridge\" ct status dnat counter masquerade comment \"loopback to lk-bridge through a \
         published port\"",
        "tcp dport 8080 counter dnat to 10.18.0.2:80 comment \"8080:80/tcp of 10.18.0.2\"",
        "ip saddr 10.18.0.0/26 oifname != \"lk-bridge\" oifname != \"lk-tun\" counter masquerade comment \"10.18.0.0/26 not to \
         lk-bridge or lk-tun\"",
        "ip saddr 10.18.0.0/26 oifname \"lk-bridge\" ct status dnat counter masquerade comment \"10.18.0.0/26 back to lk-bridge \
         through a published port\"",
    ] {
        assert!(v4.contains(&line.to_owned()), "{line}\nis not among\n{}", v4.join("\n"));
    }
    let v6 = text("ip6");
    for line in [
        "iifname != \"lk-bridge\" iifname != \"lk-tun\" iifname != \"lo\" ip6 saddr fdff::/16 counter drop comment \"drop_outside_source \
         fdff::/16\"",
        "ip6 daddr != ::1 fib daddr type local jump ports comment \"published ports, from this host\"",
        "tcp dport 8080 counter dnat to [fc00::2]:80 comment \"8080:80/tcp of fc00::2\"",
        "ip6 saddr fc00::/120 oifname != \"lk-bridge\" oifname != \"lk-tun\" counter masquerade comment \"fc00::/120 not to \
         lk-bridge or lk-tun\"",
    ] {
        assert!(v6.contains(&line.to_owned()), "{line}\nis not among\n{}", v6.join("\n"));
    }
}
