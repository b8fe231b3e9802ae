use tokio::time::timeout;

use super::*;

fn other_subnet() -> Subnet {
    Subnet { v4: Ipv4Addr::new(10, 18, 0, 64), v6: "fc00::100".parse().unwrap() }
}

fn addresses_of(host: &Host, link: &str) -> Vec<String> {
    let shown = host.namespace.json(&format!("ip -j addr show dev {link} scope global"));
    let addresses = shown[0]["addr_info"].as_array().unwrap().clone();
    addresses.iter().map(|address| format!("{}/{}", address["local"].as_str().unwrap(), address["prefixlen"])).collect()
}

#[test]
#[ignore = "needs root"]
fn the_bridge_has_the_gateway_addresses_and_a_mac_of_its_own() {
    let host = Host::new("br");
    let (bridge, warnings) =
        host.links(|links| async move { (links.ensure_bridge(SUBNET).await.expect("bridge"), links.warnings()) });
    let link = &host.namespace.json(&format!("ip -j -d link show {BRIDGE}"))[0];
    assert_eq!(link["ifindex"], bridge.ifindex);
    assert_eq!(link["mtu"], 1450);
    assert!(link["flags"].as_array().unwrap().iter().any(|flag| flag == "UP"));
    let mac = bridge.mac.map(|byte| format!("{byte:02x}")).join(":");
    assert_eq!(link["address"], mac.as_str());
    assert_eq!(addresses_of(&host, BRIDGE), ["10.18.0.1/26", "fc00::1/120"]);
    assert_eq!(warnings, [""; 0]);

    // A port's address does not become the bridge's.
    let _instance = host.with_instance();
    assert_eq!(host.namespace.json(&format!("ip -j link show {BRIDGE}"))[0]["address"], mac.as_str());
    assert_eq!(host.namespace.read("net/ipv4/ip_forward"), "1");
    assert_eq!(host.namespace.read("net/ipv6/conf/all/forwarding"), "1");
    assert_eq!(host.namespace.read(&format!("net/ipv4/conf/{BRIDGE}/rp_filter")), "2");
}

#[test]
#[ignore = "needs root"]
fn the_framing_device_is_a_port_of_the_bridge_that_carries_nothing() {
    let host = Host::new("room");
    let bridge = host.links(|links| async move {
        let bridge = links.ensure_bridge(SUBNET).await.expect("bridge");
        for _ in 0..2 {
            links.ensure_framing(50_104).await.expect("a device");
            links.raise_framing().await.expect("up");
        }
        bridge
    });
    let port = &host.namespace.json("ip -j -d link show lk-framing")[0];
    assert_eq!(port["master"], BRIDGE, "so that instances leave room for the outer headers");
    for way in ["learning", "flood", "bcast_flood", "mcast_flood"] {
        assert_eq!(port["linkinfo"]["info_slave_data"][way], false, "{way}");
    }
    let link = &host.namespace.json(&format!("ip -j link show {BRIDGE}"))[0];
    let mac = bridge.mac.map(|byte| format!("{byte:02x}")).join(":");
    assert_eq!((&link["mtu"], &link["address"]), (&1450.into(), &mac.into()), "the bridge is as it was");
    host.links(|links| async move { links.remove_framing().await.expect("removed") });
    assert!(!host.namespace.exec("ip link").contains("lk-framing"));
}

#[test]
#[ignore = "needs root"]
fn a_new_subnet_replaces_the_old_one() {
    let host = Host::new("sub");
    host.links(|links| async move {
        links.ensure_bridge(SUBNET).await.expect("bridge");
        links.ensure_bridge(other_subnet()).await.expect("bridge again");
    });
    assert_eq!(addresses_of(&host, BRIDGE), ["10.18.0.65/26", "fc00::101/120"]);
    let rules = host.namespace.exec("nft list ruleset");
    assert!(rules.contains("10.18.0.64/26") && rules.contains("fc00::100/120"), "{rules}");
    assert!(!rules.contains("10.18.0.0/26") && !rules.contains("fc00::/120"), "{rules}");
}

#[test]
#[ignore = "needs root"]
fn somebody_elses_interface_is_left_alone() {
    let host = Host::new("alien");
    host.namespace.exec(&format!("ip link add {BRIDGE} type bridge"));
    let refused = host.links(|links| async move { links.ensure_bridge(SUBNET).await });
    assert!(matches!(&refused, Err(LinkError::Foreign(name)) if name == BRIDGE), "{refused:?}");
    assert!(host.links(|links| async move { links.uninstall().await }).is_empty());
    host.namespace.exec(&format!("ip link show {BRIDGE}"));
}

#[test]
#[ignore = "needs root"]
fn service_networks_lead_to_the_tun_device() {
    let host = Host::new("tun");
    let namespace = &host.namespace;
    host.links(|links| async move {
        let early = LinkConfig { tun: "lk-none".into(), ..links.config.clone() };
        let early = Links::open(early).await.expect("links");
        assert!(early.ensure_tun_routes(TUN_V4, TUN_V6).await.is_err(), "there is no such device");
        links.ensure_tun_routes(TUN_V4, TUN_V6).await.expect("routes");
        links.ensure_tun_routes(TUN_V4, TUN_V6).await.expect("routes again");
        links.ensure_bridge(SUBNET).await.expect("a bridge");
        while timeout(Duration::from_millis(300), links.changed()).await.is_ok() {}
        links.ensure_bridge(SUBNET).await.expect("a bridge again");
        links.ensure_tun_routes(TUN_V4, TUN_V6).await.expect("routes once more");
        // Or the next look would follow this one at once, and so on for ever.
        assert!(timeout(Duration::from_millis(300), links.changed()).await.is_err(), "nothing has changed");
        namespace.exec("ip route replace 10.30.0.0/16 dev lk-up");
        namespace.exec("ip -6 route replace fdff::/16 dev lk-up");
        links.ensure_tun_routes(TUN_V4, TUN_V6).await.expect("routes anew");
        for (address, source) in [("10.30.7.9", TUN_V4.into()), ("fdff:2000::1", IpAddr::from(TUN_V6))] {
            let route = links.route_to(address.parse().unwrap()).await.expect("a route");
            assert_eq!((route.interface.as_str(), route.source), (TUN, source));
        }
    });
    assert_eq!(addresses_of(&host, TUN), ["10.19.1.254/32", "fcef::dead:beef/128"]);
}

#[test]
#[ignore = "needs root"]
fn forwarding_keeps_the_router_an_interface_has_learned() {
    let host = Host::new("ra");
    host.namespace.write("net/ipv6/conf/lk-up/accept_ra", "1");
    host.links(|links| async move { links.ensure_bridge(SUBNET).await.expect("bridge") });
    assert_eq!(host.namespace.read("net/ipv6/conf/lk-up/accept_ra"), "2");
    assert_eq!(host.namespace.read(&format!("net/ipv6/conf/{BRIDGE}/accept_ra")), "0");
    assert!(host.links(|links| async move { links.uninstall().await }).is_empty());
    assert_eq!(host.namespace.read("net/ipv6/conf/lk-up/accept_ra"), "1");
}

#[test]
#[ignore = "needs root"]
fn routes_name_interface_source_and_mtu() {
    let host = Host::new("rt");
    host.namespace.exec("ip link set lk-up mtu 1400");
    host.links(|links| async move {
        let connected = links.default_route().await.expect("the first connected interface");
        assert_eq!((connected.interface.as_str(), connected.source, connected.mtu), ("lk-up", HOST_V4, 1400));
        let unknown: IpAddr = "198.51.100.1".parse().unwrap();
        assert!(matches!(links.route_to(unknown).await, Err(LinkError::NoRoute(address)) if address == unknown));
        let peer = links.route_to(OUTSIDE_V6).await.expect("a route");
        assert_eq!((peer.source, peer.ifindex), (HOST_V6, links.link_index("lk-up").await.unwrap().unwrap()));
        assert_eq!(links.link_index("lk-none").await.expect("an answer"), None);
    });
    host.namespace.exec(&format!("ip -6 route add default via {OUTSIDE_V6}"));
    let v6 = host.links(|links| async move { links.default_route().await.expect("a default route") });
    assert_eq!(v6.source, HOST_V6);
    host.namespace.exec("ip addr add 192.0.2.77/24 dev lk-up");
    host.namespace.exec(&format!("ip route add default via {OUTSIDE_V4} mtu 1300 src 192.0.2.77"));
    let v4 = host.links(|links| async move { links.default_route().await.expect("a default route") });
    assert_eq!((v4.source, v4.mtu), ("192.0.2.77".parse().unwrap(), 1300));
}
