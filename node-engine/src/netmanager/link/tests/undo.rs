use super::*;

/// A host where every kind of change is needed: Docker's chains, a router that was discovered, forwarding on one interface only.
fn busy_host(label: &str) -> Host {
    let host = Host::new(label);
    for iptables in ["iptables", "ip6tables"] {
        for rule in ["-P FORWARD DROP", "-N DOCKER-USER", "-A DOCKER-USER -j RETURN", "-A FORWARD -j DOCKER-USER"] {
            host.namespace.exec(&format!("{iptables} {rule}"));
        }
    }
    host.namespace.write("net/ipv4/ip_forward", "0");
    host.namespace.write("net/ipv4/conf/all/accept_redirects", "0");
    host.namespace.write("net/ipv4/conf/lk-up/forwarding", "1");
    host.namespace.write("net/ipv6/conf/lk-up/forwarding", "1");
    host.namespace.write("net/ipv6/conf/lk-up/accept_ra", "1");
    // The datapath makes the device, and `uninstall` removes it: before and after there is none.
    host.namespace.exec(&format!("ip link del {TUN}"));
    host
}

/// What the datapath has done before the links are made.
fn make_tun(host: &Host) {
    host.namespace.exec(&format!("ip tuntap add {TUN} mode tun"));
}

/// Everything this module can make, in the order a node makes it.
async fn set_up(links: &Links, instance: &Path) -> Result<(), LinkError> {
    links.ensure_bridge(SUBNET).await?;
    links.ensure_tun_routes(TUN_V4, TUN_V6).await?;
    links.attach(&id(0), instance, SUBNET, FIRST).await?;
    links.publish(SUBNET, &[(tcp(8080, 80), FIRST)]).await
}

#[test]
#[ignore = "needs root"]
fn doing_it_twice_changes_nothing_and_undoing_it_leaves_nothing() {
    let host = busy_host("undo");
    let instance = Namespace::new("in");
    let before = (host.namespace.snapshot(), instance.snapshot());
    make_tun(&host);
    let path = &instance.path;
    let once = || host.links(|links| async move { set_up(&links, path).await.expect("set up") });
    once();
    let after = (host.namespace.snapshot(), instance.snapshot());
    assert!(before.0.iter().any(|entry| !after.0.contains(entry)), "the snapshot sees what is made");

    let journal = std::fs::read_to_string(host.run_dir.path().join("journal")).expect("a journal");
    host.links(|links| async move { links.ensure_bridge(SUBNET).await.expect("the first step of a restarted daemon") });
    assert_same(&after.0, &host.namespace.snapshot());
    host.links(|links| async move {
        set_up(&links, path).await.expect("set up again, by a restarted daemon");
        set_up(&links, path).await.expect("set up again, by the same one");
    });
    assert_same(&after.0, &host.namespace.snapshot());
    assert_same(&after.1, &instance.snapshot());
    assert_eq!(std::fs::read_to_string(host.run_dir.path().join("journal")).expect("a journal"), journal);

    assert!(host.links(|links| async move { links.uninstall().await }).is_empty());
    assert_same(&before.0, &host.namespace.snapshot());
    assert!(!instance.exec("ip link").contains("eth0"));
    assert!(!host.run_dir.path().join("journal").exists());
    assert!(host.links(|links| async move { links.uninstall().await }).is_empty(), "nothing is left to undo");
}

#[test]
#[ignore = "needs root"]
fn a_kill_after_any_note_leaves_what_can_be_undone() {
    let host = busy_host("kill");
    let instance = Namespace::new("in");
    let before = host.namespace.snapshot();
    let path = &instance.path;
    let mut notes = 0;
    loop {
        notes += 1;
        make_tun(&host);
        let done = host.links(|links| async move {
            links.journal().stop_after(notes);
            set_up(&links, path).await
        });
        let left = host.links(|links| async move { links.uninstall().await });
        assert!(left.is_empty(), "stopped after note {notes}: {left:?}");
        assert_same(&before, &host.namespace.snapshot());
        assert!(!instance.exec("ip link").contains("eth0"), "stopped after note {notes}");
        match done {
            Ok(()) => break,
            Err(error) => assert!(matches!(error, LinkError::Journal { .. }), "{error}"),
        }
    }
    assert!(notes > 12, "every kind of change was cut short, not only {notes}");
}

#[test]
#[ignore = "needs root"]
fn what_others_removed_or_changed_since_is_left_to_them() {
    let host = busy_host("since");
    make_tun(&host);
    let instance = Namespace::new("in");
    let path = &instance.path;
    host.links(|links| async move { set_up(&links, path).await.expect("set up") });
    host.namespace.exec("nft flush ruleset");
    host.namespace.exec(&format!("ip link del {TUN}"));
    host.namespace.exec(&format!("ip link del {BRIDGE}"));
    host.namespace.write("net/ipv6/conf/lk-up/accept_ra", "0");
    assert!(host.links(|links| async move { links.uninstall().await }).is_empty());
    assert_eq!(host.namespace.read("net/ipv6/conf/lk-up/accept_ra"), "0");
    assert_eq!(host.namespace.read("net/ipv4/ip_forward"), "0");
    assert_eq!(host.namespace.exec("nft list ruleset"), "");
}
