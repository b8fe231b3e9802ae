use super::*;

#[test]
#[ignore = "needs root"]
fn an_instance_reaches_its_gateway() {
    let host = Host::new("veth");
    let instance = Namespace::new("in");
    // As a container runtime leaves it that assigns no IPv6 address.
    instance.exec("ip link set lo down");
    instance.write("net/ipv6/conf/all/disable_ipv6", "1");
    instance.write("net/ipv6/conf/default/disable_ipv6", "1");
    let path = &instance.path;
    let veth = host.links(|links| async move {
        links.ensure_bridge(SUBNET).await.expect("bridge");
        links.attach(&id(0), path, SUBNET, FIRST).await.expect("attached")
    });
    for gateway in ["10.18.0.1", "fc00::1", "127.0.0.1", "::1"] {
        instance.exec(&format!("ping -c 1 -W 2 {gateway}"));
    }

    let inside = &instance.json("ip -j -d link show eth0")[0];
    let outside = &host.namespace.json(&format!("ip -j -d link show {}", veth.name))[0];
    assert_eq!(inside["address"], veth.mac.map(|byte| format!("{byte:02x}")).join(":").as_str());
    assert_eq!(outside["ifindex"], veth.ifindex);
    assert_eq!(outside["ifalias"], "app.default.web.test.instance.0");
    assert_eq!(outside["master"], BRIDGE);
    for end in [inside, outside] {
        assert_eq!(end["mtu"], 1450);
        assert_eq!(end["gso_max_size"], 65_000, "{end}");
    }
    let routes = instance.exec("ip route") + &instance.exec("ip -6 route");
    assert!(
        routes.contains("default via 10.18.0.1 dev eth0") && routes.contains("default via fc00::1 dev eth0"),
        "{routes}"
    );
    let addresses = instance.exec("ip addr show eth0");
    assert!(addresses.contains("10.18.0.2/26") && addresses.contains("fc00::2/120"), "{addresses}");
    assert!(!addresses.contains("tentative"), "{addresses}");
    for setting in [
        "ipv4/conf/all/accept_redirects",
        "ipv4/conf/eth0/accept_redirects",
        "ipv6/conf/eth0/accept_redirects",
        "ipv6/conf/eth0/accept_ra",
    ] {
        assert_eq!(
            instance.read(&format!("net/{setting}")),
            "0",
            "{setting}: a neighbour is nobody to learn a way from"
        );
    }
}

#[test]
#[ignore = "needs root"]
fn who_is_connected_while_the_bridge_is_gone_waits_for_the_next_one() {
    let host = Host::new("rmd");
    let path = &Namespace::new("in").path;
    host.links(|links| async move {
        let too_early = links.attach(&id(0), path, SUBNET, FIRST).await.expect_err("there has been none");
        assert!(too_early.to_string().contains("does not exist yet"), "{too_early}");
        links.ensure_bridge(SUBNET).await.expect("bridge");
        links.netlink.delete(BRIDGE).await.expect("deleted");
        let instance = id(0);
        let mut attach = std::pin::pin!(links.attach(&instance, path, SUBNET, FIRST));
        tokio::time::timeout(Duration::from_millis(300), &mut attach).await.expect_err("it waits");
        let bridge = links.ensure_bridge(SUBNET).await.expect("made anew");
        let veth = attach.await.expect("attached");
        let link = links.netlink.link(&veth.name).await.expect("asked").expect("it is there");
        assert_eq!(link.controller, Some(bridge.ifindex));
    });
}

#[test]
#[ignore = "needs root"]
fn attaching_again_changes_nothing_and_completes_what_is_missing() {
    let host = Host::new("again");
    let instance = host.with_instance();
    let path = &instance.path;
    let attach =
        || host.links(|links| async move { links.attach(&id(0), path, SUBNET, FIRST).await.expect("attached") });
    let veth = attach();
    let (inside, outside) = (instance.snapshot(), host.namespace.snapshot());
    assert_eq!(attach(), veth);
    assert_same(&outside, &host.namespace.snapshot());
    assert_same(&inside, &instance.snapshot());

    // As after a kill in the middle.
    instance.exec("ip addr flush dev eth0");
    instance.exec("ip link set eth0 down");
    host.namespace.exec(&format!("ip link set {} down", veth.name));
    host.namespace.exec(&format!("ip link set {} alias ", veth.name).trim_end().replace(" alias", " nomaster"));
    let connected = || {
        host.links(|links| async move {
            let bridge = links.ensure_bridge(SUBNET).await.expect("bridge");
            links.connected(&bridge).await.expect("a list")
        })
    };
    assert_eq!(connected(), [], "it is there, and connected to nothing");
    assert_eq!(attach(), veth);
    assert_eq!(connected(), [(id(0), veth)]);
    for gateway in ["10.18.0.1", "fc00::1"] {
        instance.exec(&format!("ping -c 1 -W 2 {gateway}"));
    }
}

#[test]
#[ignore = "needs root"]
fn a_restarted_instance_gets_a_new_wire_with_the_same_addresses() {
    let host = Host::new("re");
    let old = host.with_instance();
    let new = Namespace::new("in");
    let (before, after) = (old.path.clone(), new.path.clone());
    let (first, second) = host.links(|links| async move {
        let first = links.attach(&id(0), &before, SUBNET, FIRST).await.expect("attached");
        (first, links.attach(&id(0), &after, SUBNET, FIRST).await.expect("attached again"))
    });
    assert_eq!(first.name, second.name);
    assert_ne!(first.ifindex, second.ifindex);
    assert!(!old.exec("ip link").contains("eth0"), "the old wire is gone");
    new.exec("ping -c 1 -W 2 10.18.0.1");
    let attached = host.links(|links| async move { links.attached().await.expect("a list") });
    assert_eq!(attached, [(id(0), second)]);
}

/// The kernel would ask for nobody whom it has heard of a moment ago.
#[test]
#[ignore = "needs root"]
fn an_address_leads_to_whom_it_was_given_last() {
    let host = &Host::new("heir");
    let (old, new) = (Namespace::new("in"), Namespace::new("in"));
    let known = || host.namespace.exec(&format!("ip neigh show dev {BRIDGE}"));
    let reached = |address: IpAddr| ask(&host.namespace, address, 80).is_ok();
    let [_first, _second] = [&old, &new].map(|namespace| Server::start(namespace, 80));
    let [before, after] =
        [0, 1].map(|number| stable_mac(&id(number).to_string()).map(|byte| format!("{byte:02x}")).join(":"));
    let (old, new) = (&old.path, &new.path);
    host.links(|links| async move {
        links.ensure_bridge(SUBNET).await.expect("bridge");
        links.attach(&id(0), old, SUBNET, FIRST).await.expect("attached");
        let both = [IpAddr::V4(FIRST.v4), IpAddr::V6(FIRST.v6)];
        assert!(both.into_iter().all(reached));
        assert_eq!(known().matches(&before).count(), 2, "{}", known());
        links.detach(&id(0)).await.expect("detached");
        assert!(!known().contains(&before), "{}", known());
        // As who tries to reach an address while nobody has it, or an earlier run has left it.
        for address in both {
            host.namespace.exec(&format!("ip neigh replace {address} lladdr {before} dev {BRIDGE} nud reachable"));
        }
        links.attach(&id(1), new, SUBNET, FIRST).await.expect("attached");
        assert!(both.into_iter().all(reached), "{}", known());
        assert_eq!((known().matches(&before).count(), known().matches(&after).count()), (0, 2), "{}", known());
    });
}

#[test]
#[ignore = "needs root"]
fn a_restarted_daemon_finds_what_is_attached() {
    let host = Host::new("adopt");
    let first = host.with_instance();
    let second = Namespace::new("in");
    // The workload may change its own address; what counts is the one it has now.
    first.exec("ip link set eth0 address 02:00:00:00:00:77");
    let path = second.path.clone();
    let veth = host.links(|links| async move { links.attach(&id(7), &path, SUBNET, SECOND).await.expect("attached") });
    host.namespace.exec("ip link add ne00000000000 type veth peer name lk-other");
    let mut attached = host.links(|links| async move { links.attached().await.expect("a list") });
    attached.sort_by_key(|(instance, _)| instance.number);
    assert_eq!(attached.len(), 2, "{attached:?}");
    assert_eq!((attached[0].0.clone(), attached[0].1.mac), (id(0), [2, 0, 0, 0, 0, 0x77]));
    assert_eq!(attached[1], (id(7), veth));

    host.links(|links| async move {
        links.detach(&id(0)).await.expect("detached");
        links.detach(&id(0)).await.expect("an unknown instance is a success");
        assert_eq!(links.attached().await.expect("a list").len(), 1);
    });
    assert!(!first.exec("ip link").contains("eth0"));
    host.links(|links| async move { links.detach(&id(7)).await.expect("detached") });
    assert_eq!(host.namespace.json(&format!("ip -j link show {BRIDGE}"))[0]["mtu"], 1450, "also without a port");
}

#[test]
#[ignore = "needs root"]
fn a_failed_attach_leaves_nothing() {
    let host = Host::new("half");
    let instance = Namespace::new("in");
    let _other = host.with_instance();
    // The one setting of the namespace as a whole; it goes with the namespace.
    instance.write("net/ipv4/conf/all/accept_redirects", "0");
    // The namespace has an interface of this name already.
    instance.exec("ip link add eth0 type veth peer name lk-x");
    let before = (host.namespace.snapshot(), instance.snapshot());
    let path = &instance.path;
    let attach = |addresses| host.links(|links| async move { links.attach(&id(1), path, SUBNET, addresses).await });
    let error = attach(FIRST).expect_err("the name is taken");
    assert!(error.to_string().contains("exists"), "{error}");
    assert_same(&before.0, &host.namespace.snapshot());
    assert_same(&before.1, &instance.snapshot());

    // A step inside the namespace fails: this is no address for an interface.
    instance.exec("ip link del eth0");
    let before = (host.namespace.snapshot(), instance.snapshot());
    let error = attach(Addresses { v6: Ipv6Addr::LOCALHOST, ..SECOND }).expect_err("no address for eth0");
    assert!(error.to_string().contains("add address"), "{error}");
    assert_same(&before.0, &host.namespace.snapshot());
    assert_same(&before.1, &instance.snapshot());
    assert_eq!(host.links(|links| async move { links.attached().await.expect("a list") }).len(), 1);

    let gone = host.links(|links| async move { links.attach(&id(1), Path::new("/nonexistent"), SUBNET, FIRST).await });
    assert!(matches!(gone, Err(LinkError::Netns(_))), "{gone:?}");
}

#[test]
#[ignore = "needs root"]
fn a_link_of_another_is_not_taken_for_ours() {
    let host = Host::new("name");
    let instance = Namespace::new("in");
    let name = crate::netmanager::link::veth::host_end(&id(0));
    host.namespace.exec(&format!("ip link add {name} type veth peer name lk-other"));
    let path = &instance.path;
    let (attached, detached) = host.links(|links| async move {
        links.ensure_bridge(SUBNET).await.expect("bridge");
        (links.attach(&id(0), path, SUBNET, FIRST).await, links.detach(&id(0)).await)
    });
    assert!(matches!(attached, Err(LinkError::Foreign(_))), "{attached:?}");
    assert!(matches!(detached, Err(LinkError::Foreign(_))), "{detached:?}");
    assert!(host.links(|links| async move { links.uninstall().await }).is_empty());
    host.namespace.exec(&format!("ip link show {name}"));
}

/// Not a limit, a look: `--nocapture` shows what an attach costs.
#[test]
#[ignore = "needs root"]
fn sixty_instances_fit_on_the_bridge() {
    let host = Host::new("cost");
    let instances: Vec<Namespace> = (0..60).map(|_| Namespace::new("in")).collect();
    let paths: Vec<PathBuf> = instances.iter().map(|instance| instance.path.clone()).collect();
    let (mut attach, mut again, mut ensure) = host.links(|links| async move {
        links.ensure_bridge(SUBNET).await.expect("bridge");
        let (mut attach, mut again, mut ensure) = (Vec::new(), Vec::new(), Vec::new());
        for (number, path) in (0_u8..).zip(&paths) {
            let addresses = Addresses {
                v4: Ipv4Addr::new(10, 18, 0, number + 2),
                v6: Ipv6Addr::new(0xfc00, 0, 0, 0, 0, 0, 0, u16::from(number) + 2),
            };
            for times in [&mut attach, &mut again] {
                let began = Instant::now();
                links.attach(&id(u32::from(number)), path, SUBNET, addresses).await.expect("attached");
                times.push(began.elapsed());
            }
            let began = Instant::now();
            links.ensure_bridge(SUBNET).await.expect("bridge");
            ensure.push(began.elapsed());
        }
        (attach, again, ensure)
    });
    for (what, times) in [("attach", &mut attach), ("attach again", &mut again), ("ensure_bridge again", &mut ensure)] {
        times.sort();
        println!("{what}: median {:?}, slowest {:?}", times[times.len() / 2], times[times.len() - 1]);
    }
    for instance in [&instances[0], &instances[59]] {
        instance.exec("ping -c 1 -W 2 10.18.0.1");
    }
    assert!(host.links(|links| async move { links.uninstall().await }).is_empty());
}

/// As when a node with many instances begins: what the kernel says waits until all is asked.
#[test]
#[ignore = "needs root"]
fn a_crowd_of_requests_is_answered() {
    let host = Host::new("crowd");
    let answers = host.namespace.within(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let netlink = Netlink::open().expect("a socket");
            futures_util::future::join_all((0..1_000).map(|_| netlink.link("lo"))).await
        })
    });
    assert!(answers.iter().all(|answer| answer.as_ref().is_ok_and(Option::is_some)), "{:?}", answers.last());
}
